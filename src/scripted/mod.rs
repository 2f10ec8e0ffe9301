//! The scripted model: an endpoint on loopback that speaks as a model provider does and plays a script.
//!
//! It stands in for a provider in the demo, the tests and the benchmarks, and says so wherever it speaks of itself.
//! Nothing in here knows the rest of the sidecar, and no part of the sidecar treats it other than a real provider.
//!
//! A conversation brings its own script: the JSON between `<script>` and `</script>` in its last prompt. So one
//! endpoint serves any number of conversations side by side. It answers `POST …/chat/completions` (OpenAI) and
//! `POST …/messages` (Anthropic), streamed or whole, over HTTP/1.1 and HTTP/2.

mod script;
mod server;
mod wire;

pub use script::{Break, Cut, Garbage, Script, Silence, Step, Tokens, ToolUse};

use crate::tasks::Tasks;
use server::Shared;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

/// A request as it arrived. The last 1,000 are kept.
#[derive(Clone, Debug)]
pub struct RecordedRequest {
    pub method: String,
    /// Of HTTP, as `HTTP/2.0`.
    pub version: String,
    pub path: String,
    /// Every header but those that carry a credential (see [`ScriptedModel::authorization_values`]).
    pub headers: Vec<(String, String)>,
    /// Whether it carried a credential.
    pub authorized: bool,
    pub body: bytes::Bytes,
}

/// How many requests there were, and what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that arrived.
    pub calls: u64,
    /// Of these, those that are being answered now.
    pub open: u64,
    /// Of these, those whose connection the client closed before the whole answer was out.
    pub dropped: u64,
}

/// A running scripted model. Dropping it closes the endpoint.
#[derive(Debug)]
pub struct ScriptedModel {
    address: SocketAddr,
    shared: Arc<Shared>,
    _stop: DropGuard,
}

impl ScriptedModel {
    /// Listens on a free port of 127.0.0.1. `script` is for conversations that bring none; without it those are told
    /// that this is the scripted model.
    ///
    /// # Errors
    /// Where no port can be had.
    pub async fn start(tasks: &Tasks, script: Option<Script>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::new(script));
        let stop: CancellationToken = tasks.shutdown_token().child_token();
        tasks.spawn("scripted model", server::serve(tasks.clone(), listener, Arc::clone(&shared), stop.clone()));
        Ok(Self { address, shared, _stop: stop.drop_guard() })
    }

    /// Where a provider's base URL points to: `http://127.0.0.1:PORT/v1`.
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// How many requests have arrived.
    pub fn calls(&self) -> u64 {
        self.shared.counts.borrow().calls
    }

    /// The counters, to wait on: `model.counts().wait_for(|c| c.dropped == 1)`.
    pub fn counts(&self) -> watch::Receiver<Counts> {
        self.shared.counts.subscribe()
    }

    /// The last requests, oldest first.
    pub fn requests(&self) -> Vec<RecordedRequest> {
        self.shared.log().requests.iter().cloned().collect()
    }

    /// What the requests carried as credentials, oldest first: whole `authorization` and `x-api-key` values.
    pub fn authorization_values(&self) -> Vec<String> {
        self.shared.log().credentials.iter().cloned().collect()
    }

    /// Lets every answer pass that waits, or will wait, at this gate.
    pub fn open_gate(&self, name: &str) {
        self.shared.gates.send_modify(|open| {
            open.insert(name.to_owned());
        });
    }
}
