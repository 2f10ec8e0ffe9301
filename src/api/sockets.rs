//! What all WebSockets have in common: how they are let in, how often they are pinged, how they are closed.

use crate::api::auth::{Admission, Caller};
use crate::api::problem::{Code, Problem};
use axum::extract::ws::{Message, WebSocket};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How often a quiet connection is told that it lives.
pub(crate) const PING: Duration = Duration::from_secs(15);
/// How long a reader may take nothing.
pub(crate) const STUCK: Duration = Duration::from_secs(60);
/// How long a socket without a credential may wait with its first frame, and how many of them may.
const FIRST_FRAME: Duration = Duration::from_secs(10);
const UNKNOWN_SOCKETS: usize = 32;

/// WebSocket close codes (CONTRACT "WebSocket").
pub(crate) mod close {
    pub(crate) const DONE: u16 = 1000;
    pub(crate) const INTERNAL: u16 = 1011;
    pub(crate) const RESTART: u16 = 1012;
    pub(crate) const BAD_FRAME: u16 = 4400;
    pub(crate) const UNAUTHORIZED: u16 = 4401;
    pub(crate) const FORBIDDEN: u16 = 4403;
    pub(crate) const NOT_FOUND: u16 = 4404;
    pub(crate) const STUCK: u16 = 4408;
}

/// How fast a client's frames are read. A client that sends faster is not cut: its frames wait in its own memory.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Between two frames, in the long run.
    every: Duration,
    /// How many may come at once.
    burst: u32,
    /// When all that was read would have been read at that pace.
    until: Instant,
}

impl Pace {
    /// For a client that now and then says something.
    pub(crate) fn of_commands() -> Self {
        Self::new(Duration::from_millis(50), 20)
    }

    /// For a person's keyboard, and what is pasted with it.
    pub(crate) fn of_input() -> Self {
        Self::new(Duration::from_millis(1), 1_000)
    }

    fn new(every: Duration, burst: u32) -> Self {
        Self { every, burst, until: Instant::now() }
    }

    /// Waits until the next frame may be read.
    pub(crate) async fn turn(&self) {
        if let Some(at) = self.next() {
            tokio::time::sleep_until(at).await;
        }
    }

    /// A frame was read.
    pub(crate) fn read(&mut self) {
        self.read_at(Instant::now());
    }

    /// When the next frame may be read; `None`: at once.
    fn next(&self) -> Option<Instant> {
        self.until.checked_sub(self.every * self.burst)
    }

    fn read_at(&mut self, now: Instant) {
        self.until = self.until.max(now) + self.every;
    }
}

/// The code, and a sentence of at most 123 bytes.
pub(crate) type Closing = (u16, &'static str);

/// The connection is gone: nobody to tell.
#[derive(Debug)]
pub(crate) struct Broken;

/// The answer to a socket without a good credential, or with one that is not for it.
pub(crate) fn turned_away(problem: &Problem) -> Closing {
    match problem.code() {
        Code::Forbidden => (close::FORBIDDEN, "the credential is not for this"),
        _ => (close::UNAUTHORIZED, "a valid credential is required"),
    }
}

/// The answer to a socket whose credential has ended.
pub(crate) const EXPIRED: Closing = (close::UNAUTHORIZED, "the credential has expired");

/// Lets WebSockets in. Cheap to clone; all clones count together.
#[derive(Clone, Debug)]
pub struct Sockets {
    /// Told when the sidecar shuts down: sockets end then.
    pub(crate) shutdown: CancellationToken,
    unknown: Arc<Semaphore>,
}

#[derive(Deserialize)]
struct FirstFrame {
    r#type: String,
    #[serde(default)]
    token: Option<SecretString>,
}

impl Sockets {
    /// `shutdown` is told when the sidecar shuts down.
    pub fn new(shutdown: CancellationToken) -> Self {
        Self { shutdown, unknown: Arc::new(Semaphore::new(UNKNOWN_SOCKETS)) }
    }

    /// Whose socket it is, by what its handshake presented or else by its first frame, which is waited for; or how it is
    /// closed.
    pub(crate) async fn admit(
        &self,
        socket: &mut WebSocket,
        admission: &Admission,
    ) -> Result<Result<Caller, Closing>, Broken> {
        let granted = if !admission.is_open() {
            admission.granted().await
        } else {
            match self.first_token(socket).await? {
                Some(token) => admission.granted_to(token.expose_secret()).await,
                None => admission.granted().await,
            }
        };
        Ok(granted.map_err(|problem| turned_away(&problem)))
    }

    /// The token of the first frame; `None` where there is none in time, or too many wait for theirs.
    async fn first_token(&self, socket: &mut WebSocket) -> Result<Option<SecretString>, Broken> {
        let Ok(_place) = Arc::clone(&self.unknown).try_acquire_owned() else { return Ok(None) };
        let frame = async {
            loop {
                match socket.recv().await {
                    Some(Ok(Message::Text(text))) => return Ok(serde_json::from_str::<FirstFrame>(&text).ok()),
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    Some(Ok(_)) => return Ok(None),
                    Some(Err(_)) | None => return Err(Broken),
                }
            }
        };
        let waited = tokio::select! {
            waited = tokio::time::timeout(FIRST_FRAME, frame) => waited,
            () = self.shutdown.cancelled() => return Ok(None),
        };
        let frame = match waited {
            Ok(frame) => frame?,
            Err(_) => None,
        };
        Ok(frame.filter(|frame| frame.r#type == "auth").and_then(|frame| frame.token))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_at_a_pace() {
        let mut pace = Pace::new(Duration::from_millis(50), 20);
        let begun = Instant::now() + Duration::from_secs(3600);
        let mut now = begun;
        let mut at = Vec::new();
        for _ in 0..60 {
            now = now.max(pace.next().unwrap());
            pace.read_at(now);
            at.push((now - begun).as_millis());
        }
        assert!(at[..21].iter().all(|at| *at == 0), "{at:?}");
        assert!((1_900..=2_000).contains(&at[59]), "{at:?}");
        // Who was quiet for a while may hurry again.
        now += Duration::from_secs(1);
        assert!(pace.next().unwrap() < now);
    }
}
