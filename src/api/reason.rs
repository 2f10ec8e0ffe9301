//! Turns serde's messages into reasons that may be sent: they say what was expected and never repeat what came.

use crate::api::problem::{Code, Problem};

/// Where the value stood; words differ, since everything in a query is text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Body,
    Parameter,
}

/// What is wrong, safe to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reason {
    pub(crate) code: Code,
    /// The field that the message itself names, such as a missing one.
    pub(crate) named: Option<String>,
    pub(crate) text: String,
}

impl Reason {
    /// The problem, with the field's path as the parser saw it.
    pub(crate) fn problem(self, path: &str) -> Problem {
        let path = if path == "." { "" } else { path };
        let last = path.rsplit('.').next().unwrap_or_default();
        let field = match &self.named {
            Some(name) if path.is_empty() => name.clone(),
            Some(name) if last != name => format!("{path}.{name}"),
            _ if path.is_empty() => "body".to_owned(),
            _ => path.to_owned(),
        };
        let field = printable(&field);
        Problem::new(self.code, format!("{field}: {}", self.text)).field(field, self.text)
    }
}

/// At most 128 characters and no control characters: the name of an unknown field is the caller's own text.
fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(128).collect()
}

/// Reads one of serde's messages.
pub(crate) fn reason(message: &str, place: Place) -> Reason {
    // serde_json puts the position at the end.
    let message = message.rsplit_once(" at line ").map_or(message, |(message, _)| message);
    let invalid = |text: String| Reason { code: Code::InvalidField, named: None, text };
    let name = || message.split('`').nth(1).map(str::to_owned);
    // What was expected comes from our own types; what precedes it may be the caller's text.
    let wanted = message.rsplit_once(", expected ").map(|(_, wanted)| wanted);

    if message.starts_with("unknown field ") {
        // The name may itself hold a backtick: the parser's path has it whole.
        return Reason { code: Code::UnknownField, named: None, text: "is not a known field".to_owned() };
    }
    if message.starts_with("missing field ") {
        return Reason { code: Code::InvalidField, named: name(), text: "is required".to_owned() };
    }
    if message.starts_with("duplicate field ") {
        return Reason { code: Code::InvalidField, named: name(), text: "is given more than once".to_owned() };
    }
    if message.starts_with("unknown variant ") {
        return invalid(wanted.map_or_else(|| "is not a known value".to_owned(), |w| format!("must be {}", words(w))));
    }
    if let Some(got) = message.strip_prefix("invalid type: ").or_else(|| message.strip_prefix("invalid value: ")) {
        let Some(wanted) = wanted else { return invalid("has the wrong type".to_owned()) };
        let wanted = article(wanted);
        return invalid(match (place, message.starts_with("invalid type: ")) {
            (Place::Body, true) => format!("must be {wanted}, not {}", kind(got)),
            _ => format!("must be {wanted}"),
        });
    }
    if message.starts_with("invalid length ") {
        return invalid(match wanted {
            // serde takes a list for an object, and then counts.
            Some(wanted) if wanted.starts_with("struct ") => "must be an object".to_owned(),
            Some(wanted) => format!("must be {}", words(wanted)),
            None => "has the wrong length".to_owned(),
        });
    }
    if message.contains("UUID parsing failed") {
        return invalid("must be a UUID".to_owned());
    }
    if message.contains("invalid digit found") || message.contains("empty string") {
        return invalid("must be a whole number".to_owned());
    }
    if message.contains("number too large") || message.contains("number too small") || message == "number out of range"
    {
        return invalid("is out of range".to_owned());
    }
    if message.contains("invalid float literal") {
        return invalid("must be a number".to_owned());
    }
    if message.contains("provided string was not") {
        return invalid("must be true or false".to_owned());
    }
    // A sentence of one of our own types.
    invalid(message.to_owned())
}

/// serde's `one of `a`, `b`` in plain words.
fn words(wanted: &str) -> String {
    wanted.replace('`', "")
}

/// The kind of value that came, without the value.
fn kind(got: &str) -> &'static str {
    match got.split([' ', ',']).next().unwrap_or_default() {
        "null" | "unit" | "Option" => "null",
        "boolean" => "a boolean",
        "integer" | "floating" | "number" => "a number",
        "string" | "character" => "a string",
        "sequence" => "a list",
        "map" => "an object",
        _ => "another type",
    }
}

/// A type as serde or axum names it, in plain words.
pub(crate) fn article(wanted: &str) -> String {
    match wanted {
        "u8" | "u16" | "u32" | "u64" | "u128" | "usize" => "a whole number, not negative".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "i128" | "isize" => "a whole number".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "bool" => "true or false".to_owned(),
        "String" => "a string".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "an object".to_owned(),
        "a formatted UUID string" | "UUID" => "a UUID".to_owned(),
        wanted if wanted.starts_with("a UUID") => "a UUID".to_owned(),
        wanted if wanted.starts_with("struct ") => "an object".to_owned(),
        wanted if wanted.starts_with("enum ") || wanted.contains("enum ") => "one of the known words".to_owned(),
        wanted => words(wanted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::extract::parse_json;
    use serde::Deserialize;
    use uuid::Uuid;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only parsed")]
    struct Body {
        task_id: Uuid,
        model_config: Option<Model>,
        #[serde(default)]
        tools: Vec<String>,
        flag: Option<bool>,
        metadata: Option<serde_json::Value>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only parsed")]
    struct Model {
        provider: Option<crate::model::task::Provider>,
        temperature: Option<f64>,
        max_tokens: Option<u32>,
        model: String,
    }

    const ID: &str = "018f0000-0000-7000-8000-000000000000";

    fn fails(body: &str) -> (Code, String, String) {
        let problem = parse_json::<Body>(body.as_bytes()).unwrap_err();
        let document = problem.document();
        assert!(!format!("{document:?}").contains("SECRET"), "{document:?}");
        let details = document.details.map(|d| (d.field, d.reason)).unwrap_or_default();
        (problem.code(), details.0, details.1)
    }

    #[test]
    fn each_mistake_names_its_field_and_repeats_nothing() {
        let with = |rest: &str| format!(r#"{{"task_id":"{ID}",{rest}}}"#);
        let cases = [
            ("{}".to_owned(), Code::InvalidField, "task_id", "is required"),
            (r#"{"task_id":"SECRET"}"#.to_owned(), Code::InvalidField, "task_id", "must be a UUID"),
            (r#"{"task_id":5}"#.to_owned(), Code::InvalidField, "task_id", "must be a UUID, not a number"),
            (with(r#""nope":"SECRET""#), Code::UnknownField, "nope", "is not a known field"),
            (with(r#""no`pe":1"#), Code::UnknownField, "no`pe", "is not a known field"),
            (
                with(r#""model_config":{"model":"m","temprature":1}"#),
                Code::UnknownField,
                "model_config.temprature",
                "is not a known field",
            ),
            (
                with(r#""model_config":{"model":"m","temperature":"SECRET, expected SECRET"}"#),
                Code::InvalidField,
                "model_config.temperature",
                "must be a number, not a string",
            ),
            (
                with(r#""model_config":{"model":"m","temperature":"x at line SECRET"}"#),
                Code::InvalidField,
                "model_config.temperature",
                "must be a number, not a string",
            ),
            (
                with(r#""model_config":{"model":"m","max_tokens":-1}"#),
                Code::InvalidField,
                "model_config.max_tokens",
                "must be a whole number, not negative",
            ),
            (
                with(r#""model_config":{"model":"m","provider":"SECRET"}"#),
                Code::InvalidField,
                "model_config.provider",
                "must be one of openai, anthropic, local, custom",
            ),
            (with(r#""model_config":{}"#), Code::InvalidField, "model_config.model", "is required"),
            (with(r#""model_config":"SECRET""#), Code::InvalidField, "model_config", "must be an object, not a string"),
            (with(r#""tools":["a",{"SECRET":1}]"#), Code::InvalidField, "tools[1]", "must be a string, not an object"),
            (with(r#""tools":null"#), Code::InvalidField, "tools", "must be a list, not null"),
            (with(r#""flag":"SECRET""#), Code::InvalidField, "flag", "must be a boolean, not a string"),
            (with(r#""flag":true,"flag":false"#), Code::InvalidField, "flag", "is given more than once"),
            ("[]".to_owned(), Code::InvalidField, "body", "must be an object"),
            ("\"SECRET\"".to_owned(), Code::InvalidField, "body", "must be an object, not a string"),
        ];
        for (body, code, field, why) in cases {
            let got = fails(&body);
            assert_eq!(got, (code, field.to_owned(), why.to_owned()), "{body}");
        }
    }

    #[test]
    fn what_is_not_json_is_malformed() {
        let deep = "[".repeat(100_000);
        let deep_value = format!(r#"{{"task_id":"{ID}","metadata":{deep}"#);
        let deep_unknown = format!(r#"{{"x":{deep}"#);
        for body in ["", "  \n", "{", "SECRET", r#"{"task_id":"#, "{}{}", "\u{feff}{}", &deep_value] {
            let (code, ..) = fails(body);
            let want = if body == "{}{}" { Code::InvalidField } else { Code::MalformedJson };
            assert_eq!(code, want, "{}", &body[..body.len().min(40)]);
        }
        assert_eq!(fails(&deep_unknown).0, Code::UnknownField);
        let trailing = format!(r#"{{"task_id":"{ID}"}} x"#);
        assert_eq!(fails(&trailing).0, Code::MalformedJson);
        assert_eq!(parse_json::<serde_json::Value>(deep.as_bytes()).unwrap_err().code(), Code::MalformedJson);
        assert_eq!(parse_json::<Body>(b"{\"task_id\":\"\xff\"}").unwrap_err().code(), Code::MalformedJson);
    }

    #[test]
    fn a_long_or_odd_name_is_tamed() {
        let name = "x".repeat(5000);
        assert_eq!(fails(&format!(r#"{{"{name}":1}}"#)).1.len(), 128);
        assert_eq!(fails(r#"{"a\u0007b":1}"#).1, "a\u{fffd}b");
    }
}
