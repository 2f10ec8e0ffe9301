//! What all WebSockets have in common: how they are let in, how often they are pinged, how they are closed.

use crate::api::auth::{Auth, Presented};
use axum::extract::ws::{Message, WebSocket};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
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
    pub(crate) const NOT_FOUND: u16 = 4404;
    pub(crate) const STUCK: u16 = 4408;
}

/// The code, and a sentence of at most 123 bytes.
pub(crate) type Closing = (u16, &'static str);

/// The connection is gone: nobody to tell.
#[derive(Debug)]
pub(crate) struct Broken;

/// Lets WebSockets in. Cheap to clone; all clones count together.
#[derive(Clone, Debug)]
pub struct Sockets {
    pub(crate) auth: Auth,
    /// Told when the sidecar shuts down: sockets end then.
    pub(crate) shutdown: CancellationToken,
    unknown: Arc<Semaphore>,
}

#[derive(Deserialize)]
struct FirstFrame {
    r#type: String,
    #[serde(default)]
    token: Option<String>,
}

impl Sockets {
    /// `shutdown` is told when the sidecar shuts down.
    pub fn new(auth: Auth, shutdown: CancellationToken) -> Self {
        Self { auth, shutdown, unknown: Arc::new(Semaphore::new(UNKNOWN_SOCKETS)) }
    }

    /// Whether a socket may stay, by what its handshake presented or else by its first frame, which is waited for.
    pub(crate) async fn admit(&self, socket: &mut WebSocket, presented: Presented) -> Result<bool, Broken> {
        match presented {
            Presented::Valid => Ok(true),
            Presented::Invalid => Ok(false),
            Presented::None => self.first_frame_is_good(socket).await,
        }
    }

    async fn first_frame_is_good(&self, socket: &mut WebSocket) -> Result<bool, Broken> {
        let Ok(_place) = Arc::clone(&self.unknown).try_acquire_owned() else { return Ok(false) };
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
            () = self.shutdown.cancelled() => return Ok(false),
        };
        let frame = match waited {
            Ok(frame) => frame?,
            Err(_) => None,
        };
        Ok(frame.is_some_and(|f| f.r#type == "auth" && f.token.is_some_and(|token| self.auth.check(&token))))
    }
}
