//! One call to the backend, and what its answer means.

use super::Settings;
use crate::model::{SessionEventId, SessionId};
use crate::store::Callback;
use crate::telemetry::chain;
use chrono::{DateTime, Utc};
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Client, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use std::time::Duration;
use tokio::sync::watch;

/// The client for the backend could not be made: there are no root certificates to check an `https` one by.
#[derive(Debug, thiserror::Error)]
#[error("TLS cannot be set up")]
pub struct ClientError(#[from] reqwest::Error);

#[derive(Debug)]
pub(super) struct Backend {
    http: Client,
    /// Without a slash at its end.
    base: String,
    secret: Option<watch::Receiver<SecretString>>,
    /// How long a call may take until its answer begins.
    within: Duration,
}

/// What the backend made of a call.
#[derive(Debug)]
pub(super) enum Answer {
    Taken,
    /// It has no such session.
    Unknown,
    /// It was not reached, or could not take it.
    Failed {
        /// For people.
        why: String,
        /// How long it asks to be left alone.
        after: Option<Duration>,
    },
}

#[derive(Serialize)]
struct StatusBody<'a> {
    status: &'a str,
    error: Option<&'a str>,
}

#[derive(Serialize)]
struct PlaceBody {
    last_event_id: String,
}

impl Backend {
    pub(super) fn new(settings: &Settings) -> Result<Self, ClientError> {
        let mut builder = Client::builder()
            .no_proxy()
            .referer(false)
            .redirect(reqwest::redirect::Policy::none())
            // Calls are rare: a connection kept from the last one would often be closed by the time of the next, and fail it.
            .pool_max_idle_per_host(0);
        if settings.backend.scheme() == "http" {
            // No certificates are needed, and a host without any is none that cannot be used.
            builder = builder.tls_certs_only([]);
        }
        Ok(Self {
            http: builder.build()?,
            base: settings.backend.as_str().trim_end_matches('/').to_owned(),
            secret: settings.secret.clone(),
            within: settings.pace.call,
        })
    }

    pub(super) async fn status(&self, callback: &Callback) -> Answer {
        let body = StatusBody { status: &callback.status, error: callback.error.as_deref() };
        self.patch(callback.session_id, "status", &body).await
    }

    pub(super) async fn place(&self, session: SessionId, place: SessionEventId) -> Answer {
        self.patch(session, "event-id", &PlaceBody { last_event_id: place.to_string() }).await
    }

    async fn patch(&self, session: SessionId, what: &str, body: &impl Serialize) -> Answer {
        let mut request =
            self.http.patch(format!("{}/api/sessions/{session}/{what}", self.base)).timeout(self.within).json(body);
        if let Some(secret) = &self.secret {
            let secret = secret.borrow().clone();
            request = request.bearer_auth(secret.expose_secret());
        }
        // Nothing of an answer but its head is of use.
        match request.send().await {
            Ok(answer) if answer.status().is_success() => Answer::Taken,
            Ok(answer) if answer.status() == StatusCode::NOT_FOUND => Answer::Unknown,
            Ok(answer) => Answer::Failed {
                why: format!("it answers {}", answer.status()),
                after: retry_after(answer.headers(), Utc::now()),
            },
            Err(error) => Answer::Failed { why: chain(&error), after: None },
        }
    }
}

/// `Retry-After`, in seconds or as a date.
fn retry_after(headers: &HeaderMap, now: DateTime<Utc>) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = DateTime::parse_from_rfc2822(text).ok()?.with_timezone(&Utc);
    Some((date - now).to_std().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_in_both_forms() {
        let now = DateTime::parse_from_rfc3339("2026-11-21T01:00:00Z").unwrap().with_timezone(&Utc);
        let read = |text: &str| retry_after(&HeaderMap::from_iter([(RETRY_AFTER, text.parse().unwrap())]), now);
        assert_eq!(read("7"), Some(Duration::from_secs(7)));
        assert_eq!(read("Sat, 21 Nov 2026 01:00:30 GMT"), Some(Duration::from_secs(30)));
        assert_eq!(read("Sat, 21 Nov 2026 00:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(read("soon"), None);
        assert_eq!(read("-3"), None);
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }
}
