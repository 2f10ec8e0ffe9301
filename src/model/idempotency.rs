//! What tells a submission that is sent again from a new one: the caller's key, and the fingerprint of the body.

use super::request::TaskRequest;
use super::{ExecutionId, SessionId, TaskId};
use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};
use sha2::{Digest, Sha256};
use std::fmt;
use std::str::FromStr;

/// How long a key stands for its first submission.
pub const KEY_LIFE: TimeDelta = TimeDelta::hours(24);

/// A caller's own key for one submission: 1 to 255 visible ASCII characters.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct IdempotencyKey(String);

/// The text cannot be a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be 1 to 255 visible ASCII characters")]
pub struct BadKey;

impl IdempotencyKey {
    /// As the caller wrote it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for IdempotencyKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        let fits = (1..=255).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        fits.then(|| Self(text.to_owned())).ok_or(BadKey)
    }
}

/// What a submission asks for, as SHA-256, without its credentials. Two bodies that ask for the same thing have the same
/// one, however they are written.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(pub [u8; 32]);

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Fingerprint {
    /// The fingerprint of a request. It is stored: what is fed into it may grow, but not change.
    ///
    /// # Errors
    /// None in practice: a request that was read can be written.
    pub fn of(request: &TaskRequest) -> Result<Self, serde_json::Error> {
        let mut body = serde_json::to_value(request)?;
        // The caller's own JSON: in it a null is a value, elsewhere it is the same as no member.
        let metadata = body.as_object_mut().and_then(|members| members.remove("metadata")).unwrap_or_default();
        let mut text = String::new();
        canonical(&body, false, &mut text);
        text.push('\n');
        canonical(&metadata, true, &mut text);
        Ok(Self(Sha256::digest(text).into()))
    }
}

/// JSON in one form only: members by name, no space, a number by its value.
fn canonical(value: &Value, nulls: bool, out: &mut String) {
    match value {
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().filter(|(_, value)| nulls || !value.is_null()).collect();
            members.sort_unstable_by_key(|(name, _)| *name);
            list(out, ['{', '}'], members, |(name, value), out| {
                out.push_str(&Value::from(name.as_str()).to_string());
                out.push(':');
                canonical(value, nulls, out);
            });
        }
        Value::Array(values) => list(out, ['[', ']'], values, |value, out| canonical(value, nulls, out)),
        Value::Number(value) => out.push_str(&number(value)),
        Value::Null | Value::Bool(_) | Value::String(_) => out.push_str(&value.to_string()),
    }
}

fn list<T>(
    out: &mut String,
    [open, close]: [char; 2],
    items: impl IntoIterator<Item = T>,
    each: impl Fn(T, &mut String),
) {
    out.push(open);
    for (at, item) in items.into_iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        each(item, out);
    }
    out.push(close);
}

/// `1`, `1.0` and `1e0` are one number. What was not written as an integer is a double, and so is compared as one.
fn number(value: &Number) -> String {
    /// Up to here each integer is a double of its own.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match value.as_f64() {
        Some(double) if value.is_f64() && (double.fract() != 0.0 || double.abs() > EXACT) => {
            format!("{:016x}", double.to_bits()) + "f"
        }
        #[expect(clippy::cast_possible_truncation, reason = "an integer that fits, as the arm before it saw")]
        Some(double) if value.is_f64() => (double as i64).to_string(),
        _ => value.to_string(),
    }
}

/// Under which key a caller submitted an execution, and what it asked for. Nothing secret is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Idempotency {
    /// The name of whoever was let in; keys of different callers have nothing to do with each other.
    pub caller: String,
    pub key: IdempotencyKey,
    pub fingerprint: Fingerprint,
}

/// An execution as the answer to its submission names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submitted {
    pub id: ExecutionId,
    pub task_id: TaskId,
    pub session_id: SessionId,
    pub created_at: DateTime<Utc>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(body: &str) -> Fingerprint {
        Fingerprint::of(&serde_json::from_str(body).unwrap()).unwrap()
    }

    const TASK: &str = "018f0000-0000-7000-8000-000000000001";

    #[test]
    fn how_a_body_is_written_does_not_matter() {
        let one = of(&format!(
            r#"{{"task_id":"{TASK}","prompt":"é","model_config":{{"provider":"p","model":"m","temperature":1}},
                "metadata":{{"a":[1,-0.0,100.0],"b":null}},"timeout_seconds":5}}"#
        ));
        let other = of(&format!(
            r#" {{ "metadata" : {{"b":null, "a":[1.0,0,1e2]}}, "timeout_seconds":5, "agent": null,
                "model_config":{{"temperature":1.0,"model":"m","max_tokens":null,"provider":"p"}},
                "prompt":"\u00e9", "task_id":"{}" }} "#,
            TASK.to_uppercase()
        ));
        assert_eq!(one, other);
    }

    #[test]
    fn credentials_do_not_count() {
        let body =
            |key: &str| of(&format!(r#"{{"task_id":"{TASK}","model_config":{{"provider":"p","model":"m"{key}}}}}"#));
        let plain = body("");
        assert_eq!(body(r#","api_key":"one""#), plain);
        assert_eq!(body(r#","api_key":"two""#), plain);
        assert_eq!(body(r#","api_key_encrypted":"three""#), plain);
        assert_ne!(body(r#","max_tokens":1"#), plain);
    }

    #[test]
    fn what_is_asked_for_counts() {
        let bodies = [
            json!({}),
            json!({ "prompt": "a" }),
            json!({ "prompt": "b" }),
            json!({ "code": "a" }),
            json!({ "context": "a" }),
            json!({ "prompt": "a", "session_id": TASK }),
            json!({ "prompt": "a", "system_prompt": "s" }),
            json!({ "prompt": "a", "agent": "plan" }),
            json!({ "prompt": "a", "workdir": "w" }),
            json!({ "prompt": "a", "timeout_seconds": 1 }),
            json!({ "prompt": "a", "limits": { "pids": 64 } }),
            json!({ "prompt": "a", "limits": { "model_calls": 64 } }),
            json!({ "prompt": "a", "permissions": { "mode": "allow" } }),
            json!({ "prompt": "a", "on_restart": "fail" }),
            json!({ "metadata": {} }),
            json!({ "metadata": { "a": null } }),
            json!({ "metadata": { "a": "null" } }),
            json!({ "metadata": [1, 2] }),
            json!({ "metadata": [2, 1] }),
            json!({ "metadata": [12] }),
            json!({ "metadata": [[1], 2] }),
            json!({ "metadata": "[1,2]" }),
            json!({ "metadata": 9_007_199_254_740_992_u64 }),
            json!({ "metadata": 9_007_199_254_740_993_u64 }),
            json!({ "metadata": u64::MAX }),
            json!({ "metadata": 0.1 }),
            json!({ "metadata": -0.1 }),
            json!({ "metadata": 1e300 }),
            json!({ "metadata": "0.1" }),
            json!({ "metadata": { "a\",\"b": 1 } }),
            json!({ "metadata": { "a": 1, "b": 1 } }),
        ];
        let mut seen = Vec::new();
        for mut body in bodies {
            body["task_id"] = json!(TASK);
            let print = of(&body.to_string());
            assert!(!seen.contains(&print), "{body}");
            seen.push(print);
        }
    }

    /// It is stored, and compared with that of a later version.
    #[test]
    fn it_stays_what_it_is() {
        let print = of(&format!(
            r#"{{"task_id":"{TASK}","prompt":"p","model_config":{{"provider":"p","model":"m","temperature":0.5}},"metadata":{{"n":1.5}}}}"#
        ));
        let text = format!(
            r#"{{"model_config":{{"model":"m","provider":"p","temperature":3fe0000000000000f}},"prompt":"p","task_id":"{TASK}"}}"#
        ) + "\n{\"n\":3ff8000000000000f}";
        assert_eq!(print, Fingerprint(Sha256::digest(text).into()));
    }

    #[test]
    fn keys_are_visible_ascii() {
        for good in ["a", "~!\"{}", &"x".repeat(255), "018f0000-0000-7000-8000-000000000001"] {
            assert_eq!(good.parse::<IdempotencyKey>().unwrap().as_str(), good);
        }
        for bad in ["", " ", "a b", "ä", "a\t", "\u{7f}", &"x".repeat(256)] {
            assert_eq!(bad.parse::<IdempotencyKey>(), Err(BadKey), "{bad:?}");
        }
    }
}
