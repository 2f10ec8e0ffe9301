//! Problem documents: the one table from error codes to HTTP status, and how an error looks on the wire.
//!
//! No other module picks a status for an error. What is inside (causes, paths, SQL) goes to the log, never into a
//! document.

use crate::api::layers;
use crate::model::rfc3339;
use crate::telemetry::chain;
use axum::response::{IntoResponse, Response};
use chrono::Utc;
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde::Serialize;
use std::error::Error;

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $word:literal, $status:ident, $title:literal;)+) => {
        /// What went wrong, as programs read it. The list is closed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code {
            $($(#[$doc])* $name),+
        }

        impl Code {
            /// Every code.
            pub const ALL: &'static [Code] = &[$(Code::$name),+];

            /// The word in `code`, and at the end of `type`.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word),+ }
            }

            /// The HTTP status that goes with the code.
            pub fn status(self) -> StatusCode {
                match self { $(Self::$name => StatusCode::$status),+ }
            }

            /// The title: the same for each document of this code.
            pub fn title(self) -> &'static str {
                match self { $(Self::$name => $title),+ }
            }
        }
    };
}

codes! {
    /// The body is not JSON.
    MalformedJson = "malformed_json", BAD_REQUEST, "The body is not valid JSON";
    /// A member, parameter or header has a value that is not allowed.
    InvalidField = "invalid_field", BAD_REQUEST, "A field is not valid";
    /// A member or parameter that does not exist.
    UnknownField = "unknown_field", BAD_REQUEST, "A field is not known";
    /// The request asks for something that this version does not do.
    NotSupported = "not_supported", BAD_REQUEST, "Not supported by this version";
    /// No credential, or one that is not valid.
    Unauthorized = "unauthorized", UNAUTHORIZED, "A valid credential is required";
    /// The sidecar has no credential configured, so nobody can be let in.
    AuthNotConfigured = "auth_not_configured", UNAUTHORIZED, "No credential is configured";
    /// The credential is valid, but not for this.
    Forbidden = "forbidden", FORBIDDEN, "Not allowed";
    /// No such path or thing.
    NotFound = "not_found", NOT_FOUND, "Not found";
    /// The path exists, the method on it does not.
    MethodNotAllowed = "method_not_allowed", METHOD_NOT_ALLOWED, "The method is not allowed here";
    /// The client did not send its request in time.
    RequestTimeout = "request_timeout", REQUEST_TIMEOUT, "The request did not arrive in time";
    /// The state of the thing forbids it.
    Conflict = "conflict", CONFLICT, "Conflict";
    /// The idempotency key was used with another body.
    IdempotencyMismatch = "idempotency_mismatch", CONFLICT, "The idempotency key was used for another request";
    /// The body is larger than the limit.
    BodyTooLarge = "body_too_large", PAYLOAD_TOO_LARGE, "The body is too large";
    /// The path or the query is longer than the limit.
    UriTooLong = "uri_too_long", URI_TOO_LONG, "The path or the query is too long";
    /// A file is larger than one answer may be.
    FileTooLarge = "file_too_large", PAYLOAD_TOO_LARGE, "The file is too large";
    /// The range is behind the end of the file.
    RangeNotSatisfiable = "range_not_satisfiable", RANGE_NOT_SATISFIABLE, "There is nothing in this range";
    /// There is a WebSocket here and nothing else.
    UpgradeRequired = "upgrade_required", UPGRADE_REQUIRED, "A WebSocket is required";
    /// The body's media type or encoding is not accepted.
    UnsupportedMediaType = "unsupported_media_type", UNSUPPORTED_MEDIA_TYPE, "The media type is not supported";
    /// The headers are larger or more than the limit.
    HeaderTooLarge = "header_too_large", REQUEST_HEADER_FIELDS_TOO_LARGE, "The headers are too large";
    /// Too many attempts with a wrong credential came from there of late.
    TooManyAttempts = "too_many_attempts", TOO_MANY_REQUESTS, "Too many attempts";
    /// As many tasks wait as may.
    QueueFull = "queue_full", TOO_MANY_REQUESTS, "The queue is full";
    /// As many terminals of the session are open as may.
    TooManyTerminals = "too_many_terminals", TOO_MANY_REQUESTS, "Too many terminals";
    /// Something failed inside; the log says what.
    Internal = "internal", INTERNAL_SERVER_ERROR, "Internal error";
    /// The model or OpenCode failed.
    BadGateway = "bad_gateway", BAD_GATEWAY, "The model or OpenCode failed";
    /// The sidecar stops and takes no new work.
    ShuttingDown = "shutting_down", SERVICE_UNAVAILABLE, "Shutting down";
    /// The database is away for so long that the journal is full.
    JournalFull = "journal_full", SERVICE_UNAVAILABLE, "Journal full";
    /// Something that the request needs is away for now, such as the database.
    Unavailable = "unavailable", SERVICE_UNAVAILABLE, "Temporarily unavailable";
}

impl Code {
    /// Seconds for `Retry-After` where the problem names none; `None` for codes that carry no such header.
    fn default_retry_after(self) -> Option<u64> {
        match self {
            Self::QueueFull | Self::TooManyTerminals | Self::TooManyAttempts => Some(5),
            Self::ShuttingDown | Self::JournalFull => Some(10),
            Self::Unavailable => Some(5),
            _ => None,
        }
    }
}

/// What is wrong with which field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct FieldError {
    /// The member, parameter or header: a dotted path from the body's root, such as `model_config.temperature`.
    pub field: String,
    /// What is wrong with it. Never its value.
    pub reason: String,
}

/// An error as callers see it (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct ProblemDocument {
    /// `urn:opencode-sidecar:error:<code>`.
    pub r#type: String,
    /// The same for each document of this code.
    pub title: &'static str,
    /// The HTTP status.
    pub status: u16,
    /// A sentence for people.
    pub detail: String,
    /// A stable word for programs.
    pub code: &'static str,
    /// The same sentence as `detail`, under the name that the Go backend reads.
    pub error: String,
    /// The field at fault, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<FieldError>,
    /// The request's id, as in the header `x-request-id` and in the log.
    pub request_id: String,
    /// When it happened: RFC 3339, UTC, milliseconds.
    pub timestamp: String,
}

/// An error on its way to the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    code: Code,
    detail: String,
    field: Option<FieldError>,
    retry_after: Option<u64>,
    allow: Option<String>,
}

impl Problem {
    /// A problem with a sentence for people. The sentence is sent as it is: nothing internal or secret in it.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), field: None, retry_after: None, allow: None }
    }

    /// A 400 for a field: the sentence is made of the two.
    pub fn invalid_field(name: impl Into<String>, reason: impl Into<String>) -> Self {
        let (name, reason) = (name.into(), reason.into());
        Self::new(Code::InvalidField, format!("{name}: {reason}")).field(name, reason)
    }

    /// A 500. The cause and its own causes are logged here, once; the caller learns only the request's id.
    pub fn internal(cause: impl Error) -> Self {
        tracing::error!(error = %chain(&cause), "internal error");
        Self::new(Code::Internal, "Something failed inside. The log has it under this request's id.")
    }

    /// A 503 for a dependency that is away. The cause is logged like that of [`Problem::internal`].
    pub fn unavailable(what: &str, cause: impl Error) -> Self {
        tracing::warn!(error = %chain(&cause), what, "unavailable");
        Self::new(Code::Unavailable, format!("The {what} is not available now."))
    }

    /// Names the field at fault.
    #[must_use]
    pub fn field(mut self, name: impl Into<String>, reason: impl Into<String>) -> Self {
        self.field = Some(FieldError { field: name.into(), reason: reason.into() });
        self
    }

    /// Sets `Retry-After`, in seconds.
    #[must_use]
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// Sets `Allow`, such as `GET, HEAD`. Wrong methods on a route need not call it: the router knows its methods.
    #[must_use]
    pub fn allow(mut self, methods: impl Into<String>) -> Self {
        self.allow = Some(methods.into());
        self
    }

    /// The code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// The sentence for people.
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// The document, for edges that send it other than as an HTTP response. Its request id is that of the request
    /// that runs now, or empty outside of one.
    pub fn document(&self) -> ProblemDocument {
        ProblemDocument {
            r#type: format!("urn:opencode-sidecar:error:{}", self.code.as_str()),
            title: self.code.title(),
            status: self.code.status().as_u16(),
            detail: self.detail.clone(),
            code: self.code.as_str(),
            error: self.detail.clone(),
            details: self.field.clone(),
            request_id: layers::current_request_id().map(|id| id.as_str().to_owned()).unwrap_or_default(),
            timestamp: rfc3339(Utc::now()),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        // Strings and numbers always serialize.
        let body = serde_json::to_vec(&self.document()).unwrap_or_default();
        let mut response = (self.code.status(), body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if self.code.status() == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"opencode-sidecar\""));
        }
        if let Some(seconds) = self.retry_after.or(self.code.default_retry_after()) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.code.status() == StatusCode::UPGRADE_REQUIRED {
            headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        }
        if let Some(allow) = self.allow {
            insert(headers, header::ALLOW, &allow);
        }
        response
    }
}

/// Puts a header in if its value can be one.
fn insert(headers: &mut http::HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use serde_json::Value;

    async fn body(response: Response) -> Value {
        serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap()
    }

    #[tokio::test]
    async fn a_document_has_the_contracts_members() {
        let response = Problem::invalid_field("model_config.temperature", "must be 0 to 2").into_response();
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/problem+json");
        let body = body(response).await;
        let names: Vec<_> = body.as_object().unwrap().keys().map(String::as_str).collect();
        let mut want = vec!["type", "title", "status", "detail", "code", "error", "details", "request_id", "timestamp"];
        want.sort_unstable();
        let mut got = names.clone();
        got.sort_unstable();
        assert_eq!(got, want);
        assert_eq!(body["type"], "urn:opencode-sidecar:error:invalid_field");
        assert_eq!(body["error"], body["detail"]);
        assert_eq!(
            body["details"],
            serde_json::json!({ "field": "model_config.temperature", "reason": "must be 0 to 2" })
        );
    }

    #[tokio::test]
    async fn an_internal_error_says_nothing_internal() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer secret-one")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("inner secret-two"));
        assert_eq!(chain(&error), "outer secret-one: inner secret-two");
        let response = Problem::internal(error).into_response();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let body = body(response).await;
        assert!(!body.to_string().contains("secret"), "{body}");
        assert!(body.get("details").is_none());
    }

    #[test]
    fn headers_go_with_the_code() {
        for &code in Code::ALL {
            let response = Problem::new(code, "x").into_response();
            let has = |name| response.headers().contains_key(name);
            let status = code.status().as_u16();
            assert_eq!(has(header::WWW_AUTHENTICATE), status == 401, "{code:?}");
            assert_eq!(has(header::UPGRADE), status == 426, "{code:?}");
            assert_eq!(has(header::RETRY_AFTER), status == 429 || status == 503, "{code:?}");
        }
        let response = Problem::new(Code::QueueFull, "x").retry_after(7).into_response();
        assert_eq!(response.headers()[header::RETRY_AFTER], "7");
        let response = Problem::new(Code::MethodNotAllowed, "x").allow("GET, HEAD").into_response();
        assert_eq!(response.headers()[header::ALLOW], "GET, HEAD");
    }

    #[test]
    fn words_are_unique() {
        let words: std::collections::HashSet<_> = Code::ALL.iter().map(|c| c.as_str()).collect();
        assert_eq!(words.len(), Code::ALL.len());
    }
}
