//! What can go wrong with a call, and which of it may pass by itself.

use reqwest::Response;
use serde::Deserialize;
use std::fmt;
use std::time::Duration;

/// How much of the body of an error is read, in bytes.
const MAX_BODY: usize = 64 * 1024;
/// How much is shown of a body that is no problem document, in characters.
const MAX_SHOWN: usize = 200;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// What the caller gave cannot be used. No call was made.
    #[error("{0}")]
    Setup(String),
    /// No HTTP client can be made here: the system has no root certificates, for one.
    #[error("no HTTP client can be made")]
    Http(#[source] reqwest::Error),
    /// No connection, or one that broke off or fell silent.
    #[error("the sidecar cannot be reached")]
    Unreachable(#[source] reqwest::Error),
    /// Nothing came for too long on a connection that is there.
    #[error("nothing was heard of the sidecar for {} s", .0.as_secs())]
    Silent(Duration),
    /// The stream ended before the task did.
    #[error("the stream ended before the task")]
    Ended,
    /// The sidecar, or something before it, said no.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// The answer is not what the contract says.
    #[error("the answer is not one of a sidecar's: {0}")]
    Unexpected(String),
    /// The connection did not come back.
    #[error("the connection did not come back within {} s", .patience.as_secs())]
    GivenUp {
        /// How long was tried.
        patience: Duration,
        /// The last failure.
        #[source]
        last: Box<ClientError>,
    },
}

impl ClientError {
    pub(super) fn unreachable(error: reqwest::Error) -> Self {
        Self::Unreachable(error.without_url())
    }

    /// Whether it may go better in a moment without anybody's doing.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Silent(_) | Self::Ended | Self::Unexpected(_) => true,
            Self::Refused(refusal) => matches!(refusal.status, 408 | 429 | 500..),
            Self::Setup(_) | Self::Http(_) | Self::GivenUp { .. } => false,
        }
    }

    /// Whether it is certain that no request reached the sidecar.
    pub fn was_not_sent(&self) -> bool {
        matches!(self, Self::Unreachable(error) if error.is_connect() || error.is_builder())
    }
}

/// An answer that is an error.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// The word for programs, where it is a problem document.
    pub code: Option<String>,
    /// The sentence for people.
    pub detail: String,
    /// The field at fault, where one is named.
    pub field: Option<String>,
    /// What the sidecar's log has it under.
    pub request_id: Option<String>,
    /// When to try again, in seconds.
    pub retry_after: Option<u64>,
}

#[derive(Deserialize)]
struct Document {
    detail: String,
    code: Option<String>,
    details: Option<Details>,
    request_id: Option<String>,
}

#[derive(Deserialize)]
struct Details {
    field: String,
}

impl Refusal {
    pub(super) async fn of(mut response: Response) -> Self {
        let status = response.status().as_u16();
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let (request_id, retry_after) = (header("x-request-id"), header("retry-after").and_then(|s| s.parse().ok()));
        let mut body = Vec::new();
        // What cannot be read to its end is shown as far as it goes.
        while body.len() < MAX_BODY
            && let Ok(Some(chunk)) = response.chunk().await
        {
            body.extend_from_slice(&chunk);
        }
        let said = Self::read(status, &body);
        Self { request_id: said.request_id.clone().or(request_id), retry_after, ..said }
    }

    fn read(status: u16, body: &[u8]) -> Self {
        match serde_json::from_slice::<Document>(body) {
            Ok(document) => Self {
                status,
                code: document.code,
                detail: document.detail,
                field: document.details.map(|details| details.field),
                request_id: document.request_id,
                retry_after: None,
            },
            Err(_) => {
                let text: String = String::from_utf8_lossy(body).chars().take(MAX_SHOWN).collect();
                let said = if text.trim().is_empty() { "nothing".to_owned() } else { format!("`{}`", text.trim()) };
                Self { status, detail: format!("no sidecar's answer; it says {said}"), ..Self::default() }
            }
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}", self.detail, self.status)?;
        if let Some(code) = &self.code {
            write!(f, " {code}")?;
        }
        if let Some(field) = &self.field {
            write!(f, ", field {field}")?;
        }
        if let Some(id) = &self.request_id {
            write!(f, ", request {id}")?;
        }
        if let Some(seconds) = self.retry_after {
            write!(f, ", try again in {seconds} s")?;
        }
        f.write_str(")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_told_with_its_field_and_request() {
        let body =
            br#"{"type":"urn:x","title":"t","status":400,"detail":"task_id: must be a UUID","code":"invalid_field",
            "error":"e","details":{"field":"task_id","reason":"must be a UUID"},"request_id":"r-1","timestamp":"t"}"#;
        let refusal = Refusal::read(400, body);
        assert_eq!(refusal.to_string(), "task_id: must be a UUID (400 invalid_field, field task_id, request r-1)");
        assert!(!ClientError::Refused(Box::new(refusal)).is_transient());
    }

    #[test]
    fn what_is_no_problem_document_is_shown_as_it_is() {
        let refusal = Refusal::read(502, b"<html>Bad gateway</html>");
        assert_eq!(refusal.to_string(), "no sidecar's answer; it says `<html>Bad gateway</html>` (502)");
        assert!(ClientError::Refused(Box::new(refusal)).is_transient());
        assert_eq!(Refusal::read(404, b"").to_string(), "no sidecar's answer; it says nothing (404)");
    }
}
