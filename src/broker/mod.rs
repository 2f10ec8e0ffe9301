//! The model broker: what stands between a session and its model.
//!
//! Sessions talk to it on loopback, each with a token that is worth nothing elsewhere. It puts the provider's key
//! on their calls, counts and bounds them, and says in typed words what goes wrong. It changes no byte of an answer
//! and holds no event back: only a small observer reads along. An answer that fails in its middle keeps what came, and
//! ends with an event that says so. It also takes the shell taps' uploads, unread, and is the sessions' proxy to what
//! else they may reach.
//!
//! It does not know executions, OpenCode's own interface, or what is in a shell tap's frames. It logs no key, no
//! prompt and no answer. No proxy is taken from the environment: calls go where the grant says and nowhere else.

pub mod destination;

mod dialect;
mod egress;
mod error;
mod forward;
mod observe;
mod outward;
mod priming;
mod server;
mod session;

pub use egress::{Direct, EgressConfig, Refusal, Why};
pub use error::ModelError;
pub use session::{Exhausted, Facts, Lease, Outcome, Report, ShellCall};

use crate::model::task::Provider;
use crate::tasks::Tasks;
use crate::telemetry::Metrics;
use destination::{Destinations, Names};
use outward::Clients;
use secrecy::SecretString;
use session::Session;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use url::Url;

/// Settings of the broker.
#[derive(Clone, Debug)]
pub struct BrokerConfig {
    /// From a request to the provider's response headers. OpenCode's own clock for this should be longer.
    pub header_timeout: Duration,
    /// Longest silence in the middle of an answer. OpenCode's own clock for this should be longer.
    pub idle_timeout: Duration,
    /// To a provider's open connection, TLS included.
    pub connect_timeout: Duration,
    /// Failed or unfinished calls of one session in a row before the broker refuses more: OpenCode itself would call
    /// again without end.
    pub max_failures: u32,
    /// A provider that asks to wait so long, or longer, has failed for good: OpenCode would wait.
    pub longest_wait: Duration,
    /// Longest body of a call, in bytes.
    pub max_body: usize,
    /// What sessions may reach beside their model.
    pub egress: EgressConfig,
    /// Calls of one session that begin within any minute of one execution. One more exhausts it.
    pub calls_per_minute: u32,
    /// The hosts that may be called.
    pub destinations: Destinations,
    /// Who tells their addresses.
    pub names: Names,
}

impl Default for BrokerConfig {
    fn default() -> Self {
        Self {
            header_timeout: Duration::from_secs(60),
            idle_timeout: Duration::from_secs(120),
            connect_timeout: Duration::from_secs(10),
            max_failures: 5,
            longest_wait: Duration::from_secs(300),
            max_body: 32 * 1024 * 1024,
            egress: EgressConfig::default(),
            calls_per_minute: 300,
            destinations: Destinations::default(),
            names: Names::default(),
        }
    }
}

/// Why the broker could not start.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    #[error("the broker cannot listen on loopback")]
    Listen(#[source] io::Error),
    #[error("the broker cannot set up TLS")]
    Tls(#[source] rustls::Error),
    #[error("the broker's HTTP client cannot be made")]
    Client(#[source] reqwest::Error),
}

/// Where a session's calls go.
#[derive(Clone)]
pub struct Upstream {
    /// Decides how the key is sent: `x-api-key` for Anthropic, else `Authorization: Bearer`.
    pub provider: Provider,
    /// Base URL, up to and with the version.
    pub endpoint: Url,
    /// May be empty: then no credential is sent.
    pub api_key: SecretString,
    /// The only model that may be called. Empty: any.
    pub model: String,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An endpoint may have a password in it, or a key in its query.
        f.debug_struct("Upstream")
            .field("provider", &self.provider)
            .field("host", &self.endpoint.host_str())
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

/// What one execution may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Calls of the model, failed ones included.
    pub model_calls: u64,
    /// Tokens in and out, as the provider counts them. The call that goes beyond is still answered, the next is not.
    pub total_tokens: u64,
}

/// What a session may do.
#[derive(Clone, Debug)]
pub struct Grant {
    pub upstream: Upstream,
    pub limits: Budget,
}

type Sessions = watch::Sender<HashMap<u64, Arc<Session>>>;

#[derive(Debug)]
struct Inner {
    address: SocketAddr,
    config: BrokerConfig,
    clients: Clients,
    metrics: Metrics,
    sessions: Sessions,
    next_id: AtomicU64,
}

/// The running broker. Cheap to clone. It stops when the sidecar shuts down and the last [`Lease`] is gone: sessions
/// that are being ended must not see their model fail before.
#[derive(Clone, Debug)]
pub struct Broker {
    inner: Arc<Inner>,
}

impl Broker {
    /// Starts the broker on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// [`BrokerError`], where no port can be had or TLS cannot be set up.
    pub async fn start(tasks: &Tasks, metrics: Metrics, config: BrokerConfig) -> Result<Self, BrokerError> {
        let clients = Clients::new(&config)?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(BrokerError::Listen)?;
        let address = listener.local_addr().map_err(BrokerError::Listen)?;
        let sessions = Sessions::default();
        let inner = Arc::new(Inner { address, config, clients, metrics, sessions, next_id: AtomicU64::new(0) });
        tasks.spawn("broker", server::serve(tasks.clone(), listener, Arc::clone(&inner)));
        Ok(Self { inner })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.inner.address
    }

    /// Opens the broker for a session, for as long as the lease lives.
    pub fn open(&self, grant: Grant) -> Lease {
        let token = session::token();
        let way = egress::Way::new(&self.inner.config.egress, self.inner.metrics.clone());
        let id = self.inner.next_id.fetch_add(1, Ordering::Relaxed);
        let session = Arc::new(Session::new(grant, &token, way, &self.inner.config));
        self.inner.sessions.send_modify(|sessions| {
            sessions.insert(id, Arc::clone(&session));
        });
        Lease::new(id, token, self.inner.address, session, self.inner.sessions.clone())
    }
}
