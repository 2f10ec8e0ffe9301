//! What goes wrong between a session and its model, in words of our own: stable codes, a sentence for the user, and
//! what a provider said only where it can be quoted without a key in it.

use super::destination::Refused;
use chrono::{DateTime, Utc};
use hyper::{HeaderMap, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use std::time::Duration;

/// What makes OpenCode 1.18 repeat a call, whatever its status, where it stands anywhere in an error body.
const REPEATED: [&str; 36] = [
    "429",
    "500",
    "502",
    "503",
    "504",
    "524",
    "rate increased",
    "rate limit",
    "rate-limit",
    "rate_limit",
    "too many requests",
    "overloaded",
    "service unavailable",
    "service_unavailable",
    "service-unavailable",
    "internal error",
    "internal_error",
    "server error",
    "server_error",
    "server-error",
    "provider returned",
    "terminated",
    "fetch",
    "network",
    "upstream connect",
    "connection",
    "hang up",
    "reset before",
    "getaddrinfo",
    "timeout",
    "timed out",
    "time out",
    "your request",
    "resource",
    "try again",
    "at capacity",
];
/// Words of a call that was too long. OpenCode shortens the conversation then, and must see them.
const OVERFLOW: [&str; 5] = ["context", "token", "too long", "too large", "maximum"];
/// Longest quotation of a provider's message, in characters.
const QUOTE: usize = 300;

/// Why a call of the model failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ModelError {
    /// One of `model_auth`, `model_endpoint_refused`, `model_rate_limited`, `model_rejected`, `model_unavailable`, `model_unreachable`,
    /// `model_timeout`, `model_bad_response`, `model_cut`, `model_unfinished`.
    pub code: &'static str,
    /// A sentence for the user. Neither key nor prompt is in it.
    pub message: String,
    /// Seconds that the provider asks to wait.
    pub retry_after: Option<u64>,
    /// Whether the same call may work soon.
    pub transient: bool,
    /// The provider's status, where it answered with one.
    pub http_status: Option<u16>,
}

impl ModelError {
    fn new(code: &'static str, transient: bool, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after: None, transient, http_status: None }
    }

    pub(super) fn unreachable(host: &str, detail: &str) -> Self {
        Self::new("model_unreachable", true, format!("the model provider at {host} cannot be reached: {detail}"))
    }

    pub(super) fn no_headers(waited: Duration) -> Self {
        Self::new("model_timeout", true, format!("the model provider did not answer within {}", seconds(waited)))
    }

    pub(super) fn stalled(waited: Duration) -> Self {
        Self::new("model_timeout", true, format!("the model's answer stopped: nothing came for {}", seconds(waited)))
    }

    pub(super) fn cut() -> Self {
        Self::new("model_cut", true, "the connection to the model provider broke in the middle of an answer")
    }

    pub(super) fn closed_early() -> Self {
        Self::new("model_cut", true, "the model provider closed the connection without an answer")
    }

    pub(super) fn unfinished() -> Self {
        Self::new("model_unfinished", true, "the model's answer ended without a finish reason")
    }

    pub(super) fn unknown_finish(reason: &str) -> Self {
        let reason = if is_word(reason) { reason } else { "…" };
        Self::new("model_unfinished", true, format!("the model's answer ended with an unknown finish reason, {reason}"))
    }

    pub(super) fn bad_response(what: &str) -> Self {
        Self::new("model_bad_response", true, format!("the model provider's answer cannot be read: {what}"))
    }

    /// The code where a host may not be called.
    pub(super) const ENDPOINT: &str = "model_endpoint_refused";

    /// The provider's host may not be called.
    pub(super) fn endpoint(refused: &Refused) -> Self {
        Self::new(
            Self::ENDPOINT,
            false,
            format!("the model's endpoint is not called: {refused} (MODEL_ENDPOINT_ALLOW)"),
        )
    }

    pub(super) fn bad_key() -> Self {
        Self::new("model_auth", false, "the model provider's key has characters that cannot be sent in a header")
    }

    pub(super) fn rejected(why: &str) -> Self {
        Self::new("model_rejected", false, why)
    }

    /// The error for an answer that is not 2xx.
    pub(super) fn from_status(status: StatusCode, headers: &HeaderMap, said: &Said, now: DateTime<Utc>) -> Self {
        let retry_after = retry_after(headers, now);
        let (code, transient, what) = match status.as_u16() {
            401 | 403 => ("model_auth", false, "the model provider refused the key"),
            402 => ("model_rate_limited", false, "the model provider wants to be paid"),
            429 if said.is_about_quota() && retry_after.is_none() => {
                ("model_rate_limited", false, "the quota at the model provider is used up")
            }
            429 => ("model_rate_limited", true, "the model provider limits the rate of calls"),
            408 => ("model_timeout", true, "the model provider gave up waiting"),
            300..=399 => {
                ("model_rejected", false, "the model provider answered with a redirection, which is not followed")
            }
            409 | 425 | 500.. => ("model_unavailable", true, "the model provider is not available"),
            _ => ("model_rejected", false, "the model provider rejected the call"),
        };
        // What is said about a key often shows a part of it.
        let quotation = if code == "model_auth" { "" } else { said.message.as_str() };
        let separator = if quotation.is_empty() { "" } else { ": " };
        Self {
            code,
            message: format!("{what} (HTTP {}){separator}{quotation}", status.as_u16()),
            retry_after,
            transient,
            http_status: Some(status.as_u16()),
        }
    }

    /// The same, but not worth a repetition where the provider asks for a longer wait than that.
    pub(super) fn within(mut self, longest_wait: Duration) -> Self {
        self.transient &= self.retry_after.is_none_or(|seconds| Duration::from_secs(seconds) < longest_wait);
        self
    }

    /// The error for one that came as an event in the middle of a stream.
    pub(super) fn in_stream(said: &Said) -> Self {
        let is = |words: &[&str]| words.iter().any(|word| said.kind.contains(word) || said.code.contains(word));
        let (code, transient) = if is(&["rate_limit", "quota", "429"]) {
            ("model_rate_limited", !said.is_about_quota())
        } else if is(&["auth", "permission", "401", "403"]) {
            ("model_auth", false)
        } else if is(&["invalid_request", "context_length", "not_found", "400", "413", "422"]) {
            ("model_rejected", false)
        } else {
            ("model_unavailable", true)
        };
        let quotation = if code == "model_auth" { "" } else { said.message.as_str() };
        let separator = if quotation.is_empty() { "" } else { ": " };
        Self::new(code, transient, format!("the model provider broke off with an error{separator}{quotation}"))
    }

    /// Message, type and code for OpenCode. It looks for words in them: where repeating the call is of no use they
    /// are left out.
    pub(super) fn told(&self, said: &Said) -> (String, String, String) {
        let or = |word: &str, code: &str| if word.is_empty() { code.to_owned() } else { word.to_owned() };
        if self.transient {
            return (self.message.clone(), or(&said.kind, self.code), or(&said.code, self.code));
        }
        let code = if self.code == "model_rate_limited" { "model_quota" } else { self.code };
        let told = (self.message.clone(), or(&said.kind, code), or(&said.code, code));
        let text = format!("{} {} {}", told.0, told.1, told.2).to_lowercase();
        let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
        if has(&OVERFLOW) || !has(&REPEATED) {
            return told;
        }
        let message = match self.code {
            "model_auth" => "the model provider refused the key",
            Self::ENDPOINT => "the model's endpoint is not allowed",
            "model_rate_limited" => "the quota at the model provider is used up",
            "model_unavailable" => "the model provider is not available",
            _ => "the model provider rejected the call",
        };
        (message.to_owned(), code.to_owned(), code.to_owned())
    }

    /// The same for the middle of an answer, where no status says whether to repeat the call: only the words do.
    pub(super) fn told_in_stream(&self, said: &Said) -> (String, String, String) {
        let told = self.told(said);
        // It would show an error with "unavailable" in it in words of its own.
        if self.transient { (told.0, "server_error".to_owned(), "server_error".to_owned()) } else { told }
    }

    /// The status that OpenCode gets for it; it repeats a call that got 408, 409, 429 or 5xx.
    pub(super) fn status(&self) -> StatusCode {
        if let Some(status) = self.http_status {
            let status = match status {
                // A redirection would be followed.
                ..400 => 400,
                // A quota that is used up does not come back while OpenCode waits.
                429 if !self.transient => 402,
                408 | 409 | 500.. if !self.transient => 400,
                status => status,
            };
            return StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
        }
        match self.code {
            "model_timeout" => StatusCode::GATEWAY_TIMEOUT,
            "model_rejected" => StatusCode::BAD_REQUEST,
            "model_auth" => StatusCode::UNAUTHORIZED,
            Self::ENDPOINT => StatusCode::FORBIDDEN,
            "model_rate_limited" if self.transient => StatusCode::TOO_MANY_REQUESTS,
            "model_rate_limited" => StatusCode::PAYMENT_REQUIRED,
            _ => StatusCode::BAD_GATEWAY,
        }
    }
}

fn seconds(duration: Duration) -> String {
    if duration.subsec_millis() == 0 {
        format!("{} s", duration.as_secs())
    } else {
        format!("{} ms", duration.as_millis())
    }
}

/// An error body in the words that OpenAI's clients know; Anthropic's find their own members in it.
pub(super) fn body(message: &str, kind: &str, code: &str) -> Value {
    json!({"type": "error", "error": {"message": message, "type": kind, "code": code, "param": null}})
}

/// What a provider said about an error, cleaned: short, one line, without anything that looks like a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) message: String,
    /// The provider's own word for the kind of error; OpenCode knows some, such as `context_length_exceeded`.
    pub(super) kind: String,
    pub(super) code: String,
}

impl Said {
    /// Reads an error body. A page of HTML says nothing.
    pub(super) fn read(body: &[u8], key: &SecretString) -> Self {
        match serde_json::from_slice::<Value>(body) {
            Ok(value) => Self::from_json(&value, key),
            Err(_) => {
                let text = String::from_utf8_lossy(body);
                let text = if text.trim_start().starts_with('<') { "" } else { &*text };
                Self { message: clean(text, key), ..Self::default() }
            }
        }
    }

    /// Reads an error object: `{"error":{"message","type","code"}}`, `{"error":"…"}`, `{"message":"…"}`.
    pub(super) fn from_json(value: &Value, key: &SecretString) -> Self {
        let error = if value["error"].is_null() { value } else { &value["error"] };
        let message = error.as_str().or(error["message"].as_str()).or(value["message"].as_str());
        let message = message.or(value["detail"].as_str()).unwrap_or_default();
        let word = |value: &Value| match value {
            Value::String(word) if is_word(word) => word.clone(),
            Value::Number(number) => number.to_string(),
            _ => String::new(),
        };
        Self { message: clean(message, key), kind: word(&error["type"]), code: word(&error["code"]) }
    }

    fn is_about_quota(&self) -> bool {
        let text = format!("{} {} {}", self.message, self.kind, self.code).to_lowercase();
        ["quota", "billing", "credit", "balance", "insufficient funds"].iter().any(|word| text.contains(word))
    }
}

fn is_word(word: &str) -> bool {
    word.len() <= 64 && word.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
}

/// One short line without the key or anything that looks like one.
fn clean(message: &str, key: &SecretString) -> String {
    let key = key.expose_secret();
    let message = if key.is_empty() { message.to_owned() } else { message.replace(key, "[key]") };
    let line: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let words: Vec<&str> =
        line.split_whitespace().map(|word| if looks_like_key(word) { "[…]" } else { word }).collect();
    let line = words.join(" ");
    if line.chars().count() <= QUOTE { line } else { line.chars().take(QUOTE - 1).chain(['…']).collect() }
}

fn looks_like_key(word: &str) -> bool {
    let word = word.trim_matches(|c: char| !c.is_ascii_alphanumeric() && c != '*');
    let long = word.len() >= 24
        && word.bytes().any(|b| b.is_ascii_digit())
        && word.bytes().any(|b| b.is_ascii_alphabetic())
        && word
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b'*' | b'=' | b'+' | b'/'));
    long || word.starts_with("sk-") || word.contains("***")
}

/// Seconds that a provider asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date.
pub(super) fn retry_after(headers: &HeaderMap, now: DateTime<Utc>) -> Option<u64> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let whole = |seconds: f64| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked; a cast saturates")]
        let whole = (seconds.is_finite() && seconds >= 0.0).then(|| seconds.ceil() as u64);
        whole
    };
    if let Some(milliseconds) = text("retry-after-ms").and_then(|text| text.parse::<f64>().ok()) {
        return whole(milliseconds / 1000.0);
    }
    let after = text("retry-after")?;
    if let Ok(seconds) = after.parse::<f64>() {
        return whole(seconds);
    }
    let date = DateTime::parse_from_rfc2822(after).ok()?.with_timezone(&Utc);
    let milliseconds = u64::try_from((date - now).num_milliseconds()).unwrap_or(0);
    Some(milliseconds.div_ceil(1000))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn key() -> SecretString {
        SecretString::from("the-key")
    }

    #[test]
    fn retry_after_in_every_form() {
        let now = DateTime::parse_from_rfc3339("2026-11-21T01:00:00Z").unwrap().with_timezone(&Utc);
        for (pairs, want) in [
            (&[("retry-after", "7")][..], Some(7)),
            (&[("retry-after", " 1.2 ")], Some(2)),
            (&[("retry-after", "Sat, 21 Nov 2026 01:00:30 GMT")], Some(30)),
            (&[("retry-after", "Sat, 21 Nov 2026 00:00:00 GMT")], Some(0)),
            (&[("retry-after-ms", "1500"), ("retry-after", "9")], Some(2)),
            (&[("retry-after", "soon")], None),
            (&[("retry-after", "-3")], None),
            (&[("retry-after", "NaN")], None),
            (&[], None),
        ] {
            assert_eq!(retry_after(&headers(pairs), now), want, "{pairs:?}");
        }
    }

    #[test]
    fn every_status_has_its_code() {
        let none = Said::default();
        for (status, code, transient) in [
            (302, "model_rejected", false),
            (400, "model_rejected", false),
            (401, "model_auth", false),
            (402, "model_rate_limited", false),
            (403, "model_auth", false),
            (404, "model_rejected", false),
            (408, "model_timeout", true),
            (413, "model_rejected", false),
            (422, "model_rejected", false),
            (429, "model_rate_limited", true),
            (500, "model_unavailable", true),
            (529, "model_unavailable", true),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            let error = ModelError::from_status(status, &HeaderMap::new(), &none, Utc::now());
            assert_eq!((error.code, error.transient), (code, transient), "{status}");
            assert!(error.status().is_client_error() || error.status().is_server_error());
        }
    }

    #[test]
    fn a_spent_quota_is_not_transient_unless_a_wait_is_named() {
        let said = Said::read(
            br#"{"error":{"message":"You exceeded your current quota","code":"insufficient_quota"}}"#,
            &key(),
        );
        let error =
            |headers: &HeaderMap| ModelError::from_status(StatusCode::TOO_MANY_REQUESTS, headers, &said, Utc::now());
        assert!(!error(&HeaderMap::new()).transient);
        assert!(error(&headers(&[("retry-after", "7")])).transient);
    }

    #[test]
    fn a_quotation_has_no_key_and_is_short() {
        let said = Said::read(br#"{"error":{"message":"bad\nkey the-key, sk-abc123 or sk-pr****wxyz, 0123456789abcdef0123456789abcdef","type":"a b"}}"#, &key());
        assert_eq!(said.message, "bad key [key], […] or […] […]");
        assert_eq!(said.kind, "");
        assert_eq!(Said::read("x".repeat(9999).as_bytes(), &key()).message.chars().count(), QUOTE);
        assert_eq!(Said::read(b"<html>500</html>", &key()).message, "");
        assert_eq!(Said::read(br#"{"error":"plain"}"#, &key()).message, "plain");
        let refused = ModelError::from_status(StatusCode::UNAUTHORIZED, &HeaderMap::new(), &said, Utc::now());
        assert_eq!(refused.message, "the model provider refused the key (HTTP 401)");
    }

    #[test]
    fn what_cannot_get_better_is_told_in_words_that_are_not_repeated() {
        let told = |status: StatusCode, body: &str| {
            let said = Said::read(body.as_bytes(), &key());
            ModelError::from_status(status, &HeaderMap::new(), &said, Utc::now()).told(&said)
        };
        let words = |message: &str, kind: &str, code: &str| (message.to_owned(), kind.to_owned(), code.to_owned());
        assert_eq!(
            told(StatusCode::TOO_MANY_REQUESTS, r#"{"error":{"message":"quota","type":"insufficient_quota"}}"#),
            words("the quota at the model provider is used up", "model_quota", "model_quota")
        );
        assert_eq!(
            told(StatusCode::BAD_REQUEST, r#"{"error":"500 is no temperature"}"#),
            words("the model provider rejected the call", "model_rejected", "model_rejected")
        );
        let long = told(StatusCode::BAD_REQUEST, r#"{"error":{"message":"prompt is too long: 215000 tokens"}}"#);
        assert!(long.0.ends_with("prompt is too long: 215000 tokens"));
        let limited = told(StatusCode::TOO_MANY_REQUESTS, "{}");
        assert_eq!((limited.1, limited.2), ("model_rate_limited".to_owned(), "model_rate_limited".to_owned()));
    }

    #[test]
    fn an_error_in_a_stream_is_told_by_its_words() {
        let of = |kind: &str| ModelError::in_stream(&Said { kind: kind.into(), ..Said::default() }).code;
        assert_eq!(of("rate_limit_error"), "model_rate_limited");
        assert_eq!(of("overloaded_error"), "model_unavailable");
        assert_eq!(of("invalid_request_error"), "model_rejected");
        assert_eq!(of("authentication_error"), "model_auth");
    }
}
