//! What a token allows: from its claims to a caller; and the short tokens that open one stream.

use crate::api::auth::scope::{Scope, Scopes};
use crate::api::auth::{Caller, Refusal, Who};
use crate::model::ExecutionId;
use crate::secrets::{AUDIENCE, TokenError, TokenKeys, TokenMaker};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde::{Deserialize, Deserializer, Serialize};
use sha2::{Digest, Sha256};

/// How long a stream token lasts, in seconds.
pub const STREAM_TOKEN_SECONDS: i64 = 60;

/// The claims that count here. Others may stand beside them.
#[derive(Debug, Deserialize)]
struct Claims {
    /// Whole or not: what is left of a second is not given away.
    exp: f64,
    #[serde(default)]
    project_id: Option<String>,
    #[serde(default)]
    scope: Option<String>,
    /// A null or an empty one would widen a token that was to be narrow: those are no UUIDs, and refused.
    #[serde(default, deserialize_with = "present")]
    execution_id: Option<Narrowed>,
    #[serde(default)]
    sub: Option<String>,
}

#[derive(Debug)]
struct Narrowed(Option<ExecutionId>);

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Narrowed>, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    let id = value.as_str().filter(|text| text.len() == 36).and_then(|text| text.parse().ok());
    Ok(Some(Narrowed(id.map(ExecutionId))))
}

/// Reads a token that one of the keys has signed.
pub(super) fn caller(keys: &TokenKeys, token: &str, project: &str) -> Result<Caller, Refusal> {
    let claims: Claims = keys.claims(token).map_err(Refusal::Token)?;
    let missing = |name: &str| Refusal::Token(TokenError::Claim(name.to_owned()));
    // The sign of a time that no calendar has is refused too; the cast cannot leave the range.
    if !claims.exp.is_finite() || claims.exp < 0.0 {
        return Err(missing("exp"));
    }
    #[expect(clippy::cast_possible_truncation, reason = "it saturates, and later than the last year is the last year")]
    let expires = DateTime::from_timestamp(claims.exp as i64, 0).unwrap_or(DateTime::<Utc>::MAX_UTC);
    if expires <= Utc::now() {
        return Err(Refusal::Token(TokenError::Expired));
    }
    if claims.project_id.ok_or_else(|| missing("project_id"))? != project {
        return Err(Refusal::Project);
    }
    let execution = match claims.execution_id {
        None => None,
        Some(Narrowed(Some(id))) => Some(id),
        Some(Narrowed(None)) => return Err(missing("execution_id")),
    };
    let scopes = Scopes::parse(&claims.scope.ok_or_else(|| missing("scope"))?);
    let name = match claims.sub {
        None => "jwt".to_owned(),
        // Of one length, and nothing of a person in the database.
        Some(subject) => format!("jwt:{}", URL_SAFE_NO_PAD.encode(Sha256::digest(subject.as_bytes()))),
    };
    Ok(Caller { who: Who::Token(name), scopes, execution, expires: Some(expires) })
}

#[derive(Serialize)]
struct Made<'a> {
    aud: &'a str,
    exp: i64,
    project_id: &'a str,
    scope: &'a str,
    execution_id: ExecutionId,
}

/// A token for one execution's stream, and when it ends: in a minute, and not after whoever asked for it.
pub(super) fn stream_token(
    maker: &TokenMaker,
    project: &str,
    execution_id: ExecutionId,
    asked_by: &Caller,
) -> Result<(SecretString, DateTime<Utc>), jsonwebtoken::errors::Error> {
    let minute = Utc::now() + chrono::TimeDelta::seconds(STREAM_TOKEN_SECONDS);
    let expires = asked_by.expires.map_or(minute, |until| until.min(minute));
    let scope = Scope::TasksRead.as_str();
    let token =
        maker.make(&Made { aud: AUDIENCE, exp: expires.timestamp(), project_id: project, scope, execution_id })?;
    Ok((token, DateTime::from_timestamp(expires.timestamp(), 0).unwrap_or(expires)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn claims_become_a_caller_or_are_refused() {
        let maker = TokenMaker::new().unwrap();
        let exp = Utc::now().timestamp() + 100;
        let id = ExecutionId::new();
        let of = |changes: Value| {
            let mut claims = json!({ "exp": exp, "aud": AUDIENCE, "project_id": "p", "scope": "tasks:read" });
            for (name, value) in changes.as_object().unwrap() {
                match value {
                    Value::String(text) if text == "absent" => drop(claims.as_object_mut().unwrap().remove(name)),
                    value => claims[name] = value.clone(),
                }
            }
            let token = maker.make(&claims).unwrap();
            caller(maker.keys(), secrecy::ExposeSecret::expose_secret(&token), "p")
        };
        let plain = of(json!({})).unwrap();
        assert_eq!((plain.name().as_ref(), plain.execution), ("jwt", None));
        assert!(plain.scopes.has(Scope::TasksRead) && !plain.scopes.has(Scope::FilesRead));
        assert_eq!(plain.expires.unwrap().timestamp(), exp);
        assert_eq!(of(json!({ "execution_id": id })).unwrap().execution, Some(id));
        assert_eq!(of(json!({ "exp": exp as f64 + 0.9 })).unwrap().expires.unwrap().timestamp(), exp);
        assert_eq!(of(json!({ "exp": 1e18 })).unwrap().expires, Some(DateTime::<Utc>::MAX_UTC));
        assert!(of(json!({ "aud": ["x", AUDIENCE] })).is_ok() && of(json!({ "scope": "" })).is_ok());
        let named = |sub: &str| of(json!({ "sub": sub })).unwrap().name().into_owned();
        assert!(named("ada") != named("grace") && !named("ada").contains("ada"));

        let claim = |name: &str| Refusal::Token(TokenError::Claim(name.to_owned()));
        for (changes, want) in [
            (json!({ "exp": exp - 101 }), Refusal::Token(TokenError::Expired)),
            (json!({ "exp": 0 }), Refusal::Token(TokenError::Expired)),
            (json!({ "exp": "absent" }), Refusal::Token(TokenError::Unreadable)),
            (json!({ "exp": exp.to_string() }), Refusal::Token(TokenError::Unreadable)),
            (json!({ "exp": null }), Refusal::Token(TokenError::Unreadable)),
            (json!({ "exp": -1.5 }), claim("exp")),
            (json!({ "nbf": exp }), Refusal::Token(TokenError::Early)),
            (json!({ "nbf": "now" }), claim("nbf")),
            (json!({ "aud": "absent" }), claim("aud")),
            (json!({ "aud": "other" }), Refusal::Token(TokenError::Audience)),
            (json!({ "aud": ["other"] }), Refusal::Token(TokenError::Audience)),
            (json!({ "aud": 1 }), claim("aud")),
            (json!({ "project_id": "q" }), Refusal::Project),
            (json!({ "project_id": "absent" }), claim("project_id")),
            (json!({ "project_id": null }), claim("project_id")),
            (json!({ "scope": "absent" }), claim("scope")),
            (json!({ "scope": ["tasks:read"] }), Refusal::Token(TokenError::Unreadable)),
            (json!({ "execution_id": "" }), claim("execution_id")),
            (json!({ "execution_id": null }), claim("execution_id")),
            (json!({ "execution_id": 7 }), claim("execution_id")),
        ] {
            assert_eq!(of(changes.clone()).unwrap_err(), want, "{changes}");
        }
    }

    #[test]
    fn a_stream_token_ends_in_a_minute_or_with_whoever_asked() {
        let maker = TokenMaker::new().unwrap();
        let id = ExecutionId::new();
        let asked = |expires| Caller { who: Who::SharedSecret, scopes: Scopes::all(), execution: None, expires };
        let left = |expires| {
            let (token, until) = stream_token(&maker, "p", id, &asked(expires)).unwrap();
            let made = caller(maker.keys(), secrecy::ExposeSecret::expose_secret(&token), "p").unwrap();
            assert_eq!(
                (made.execution, made.scopes, made.expires),
                (Some(id), Scopes::parse("tasks:read"), Some(until))
            );
            (until - Utc::now()).num_milliseconds()
        };
        assert!((50_000..=60_000).contains(&left(None)));
        let soon = Utc::now() + chrono::TimeDelta::seconds(10);
        assert!((1..=10_000).contains(&left(Some(soon))));
    }
}
