//! The way out: a proxy for sessions that opens tunnels (`CONNECT`) to what the operator has named, and to nothing else.
//!
//! - `judge`: which addresses a target may have.
//! - `tunnel`: the bytes of one connection, in both directions.
//! - `refusals`: what was refused, counted, so that a loop of attempts cannot fill a log.
//!
//! A target is judged by its name before the name is looked up, and by its addresses afterwards; exactly those that were
//! judged are dialled. What passes through a tunnel is not looked into, and nothing of it is kept but its length.
//!
//! Plain `http://` is not forwarded: whoever asks for it is told so. All that is understood of a request is its target.

mod judge;
mod refusals;
mod tunnel;

pub use refusals::{Refusal, Why};
pub(super) use tunnel::Place;

use super::destination::{Destinations, Target};
use super::session::{Lease, Session, digest, token};
use super::{BrokerConfig, Inner};
use crate::telemetry::{BrokerRefusal, EgressOutcome, Metrics};
use axum::body::Body;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::body::{Body as _, Incoming};
use hyper::{HeaderMap, Method, Request, Response, StatusCode, header};
use judge::Unfit;
use refusals::Refusals;
use secrecy::{ExposeSecret, SecretString};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use subtle::ConstantTimeEq;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout_at};
use tunnel::Tunnel;

/// The user of the proxy's URL. Nobody looks at it.
const USER: &str = "session";

/// What sessions may reach beside their model.
#[derive(Clone, Debug)]
pub struct EgressConfig {
    /// Nothing by default.
    pub allow: Destinations,
    /// Where the database is: only an entry that is just that reaches it.
    pub database: Option<Target>,
    /// Tunnels of one session at once.
    pub max_tunnels: usize,
    /// How long a tunnel may pass nothing in either direction.
    pub idle_timeout: Duration,
}

impl Default for EgressConfig {
    fn default() -> Self {
        Self { allow: Destinations::default(), database: None, max_tunnels: 64, idle_timeout: Duration::from_secs(300) }
    }
}

impl EgressConfig {
    /// What the session is told may be reached.
    fn allowed(&self) -> String {
        match self.allow.is_empty() {
            true => "EGRESS_ALLOW names no host, so nothing but the model is reached from here".to_owned(),
            false => format!("what is reached from here is, by EGRESS_ALLOW: {}", self.allow),
        }
    }
}

/// What one session has of it.
#[derive(Debug)]
pub(super) struct Way {
    /// Not the token for its model: this one is in the environment of every tool, and some of them show it.
    token: SecretString,
    digest: [u8; 32],
    tunnels: Arc<Semaphore>,
    refusals: watch::Sender<Refusals>,
    metrics: Metrics,
}

impl Way {
    pub(super) fn new(config: &EgressConfig, metrics: Metrics) -> Self {
        let token = token();
        let digest = digest(token.expose_secret());
        let tunnels = Arc::new(Semaphore::new(config.max_tunnels));
        Self { token, digest, tunnels, refusals: watch::Sender::default(), metrics }
    }

    /// Compares in constant time.
    fn has_token(&self, token: &str) -> bool {
        digest(token).ct_eq(&self.digest).into()
    }

    fn refuse(&self, target: &Target, why: Why) {
        self.refusals.send_if_modified(|refusals| refusals.note(Some(target), why, 1));
    }

    /// Begins to count anew.
    pub(super) fn reset(&self) {
        self.refusals.send_replace(Refusals::default());
    }
}

impl Lease {
    /// What the session's tools use as their proxy, with the credential in it: `http://session:…@127.0.0.1:PORT`.
    pub fn proxy_url(&self) -> SecretString {
        let token = self.session().way.token.expose_secret();
        SecretString::from(format!("http://{USER}:{token}@{}", self.address()))
    }

    /// The credential in that.
    pub fn proxy_token(&self) -> &SecretString {
        &self.session().way.token
    }

    /// Takes in what the sandbox refused of the session, for [`Self::refused`]. Does not keep the session's credentials.
    pub fn direct(&self) -> Direct {
        let Way { refusals, metrics, .. } = &self.session().way;
        Direct { refusals: refusals.clone(), metrics: metrics.clone() }
    }

    /// Waits until attempts of the present execution were refused that are to be told, and gives them: each host and port
    /// at its first attempt, and then at every tenfold of those that were told.
    pub async fn refused(&self) -> Vec<Refusal> {
        let sender = &self.session().way.refusals;
        // The sender lives as long as the lease.
        let _ = sender.subscribe().wait_for(Refusals::has_due).await;
        self.take(false)
    }

    /// What was refused and not told yet, to the last attempt: for the end of an execution.
    pub fn refused_at_last(&self) -> Vec<Refusal> {
        self.take(true)
    }

    fn take(&self, all: bool) -> Vec<Refusal> {
        let mut taken = Vec::new();
        // Nobody waits for there being less.
        self.session().way.refusals.send_if_modified(|refusals| {
            taken = refusals.take(all);
            false
        });
        taken
    }
}

/// Where attempts to leave a session without its proxy are counted.
#[derive(Clone, Debug)]
pub struct Direct {
    refusals: watch::Sender<Refusals>,
    metrics: Metrics,
}

impl Direct {
    /// So many more were refused; `to` is `None` where the addresses were not told apart.
    pub fn refused(&self, to: Option<SocketAddr>, count: u64) {
        let target = to.and_then(|to| Target::parse(&to.to_string()));
        self.metrics.egress_many(EgressOutcome::Refused, count);
        self.refusals.send_if_modified(|refusals| refusals.note(target.as_ref(), Why::Direct, count));
    }
}

/// Whether a request is one to a proxy.
pub(super) fn is_meant<B>(request: &Request<B>, own: SocketAddr) -> bool {
    let elsewhere = || request.uri().authority().is_some_and(|authority| authority.as_str() != own.to_string());
    request.method() == Method::CONNECT || elsewhere()
}

/// The session whose credential a request to the proxy shows.
pub(super) fn session(inner: &Inner, headers: &HeaderMap) -> Option<Arc<Session>> {
    let shown = headers.get(header::PROXY_AUTHORIZATION)?.to_str().ok()?;
    let (scheme, encoded) = shown.split_once(' ')?;
    let decoded =
        if scheme.eq_ignore_ascii_case("basic") { STANDARD.decode(encoded.trim()).ok()? } else { return None };
    let (_, token) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
    inner.session_with(|session| session.way.has_token(token))
}

/// The answer without a credential that is good. Some clients show theirs only when they are asked: that is no attempt.
pub(super) fn unauthenticated(inner: &Inner, headers: &HeaderMap) -> Response<Body> {
    if headers.contains_key(header::PROXY_AUTHORIZATION) {
        inner.metrics.broker_refused(BrokerRefusal::Token);
    }
    let mut response = no(StatusCode::PROXY_AUTHENTICATION_REQUIRED, "the session's own proxy credential is needed");
    let basic = header::HeaderValue::from_static("Basic realm=\"opencode-sidecar\"");
    response.headers_mut().insert(header::PROXY_AUTHENTICATE, basic);
    response
}

/// Answers a request to the proxy. Where it is granted, the tunnel waits in `place` for the connection.
pub(super) async fn answer(
    inner: &Inner,
    session: &Arc<Session>,
    place: &Place,
    mut request: Request<Incoming>,
) -> Response<Body> {
    let (config, metrics) = (&inner.config.egress, &inner.metrics);
    let Some(target) = target(&request) else {
        metrics.egress(EgressOutcome::Refused);
        return no(StatusCode::BAD_REQUEST, "the request names no host with a port");
    };
    let refused = |status, why: Why| {
        metrics.egress(EgressOutcome::Refused);
        session.way.refuse(&target, why);
        tracing::debug!(%target, why = why.as_str(), "a session may not reach a host");
        no(status, &format!("{}; {}", why.sentence(&target.to_string()), config.allowed()))
    };
    if request.method() != Method::CONNECT {
        return refused(StatusCode::FORBIDDEN, Why::PlainHttp);
    }
    if has_body(&request) {
        metrics.egress(EgressOutcome::Refused);
        return no(StatusCode::BAD_REQUEST, "CONNECT has no body");
    }
    let Ok(slot) = Arc::clone(&session.way.tunnels).try_acquire_owned() else {
        return refused(StatusCode::SERVICE_UNAVAILABLE, Why::TooMany);
    };
    match dial(&inner.config, &target).await {
        Ok(outside) => {
            metrics.egress(EgressOutcome::Opened);
            place.put(Tunnel {
                upgrade: hyper::upgrade::on(&mut request),
                outside,
                session: Arc::clone(session),
                idle: config.idle_timeout,
                metrics: metrics.clone(),
                _slot: slot,
            });
            Response::new(Body::empty())
        }
        Err(Undialled::Refused(why)) => refused(StatusCode::FORBIDDEN, why),
        Err(Undialled::Failed(status, how)) => {
            metrics.egress(EgressOutcome::Failed);
            tracing::debug!(%target, how, "a host that a session may reach cannot be reached");
            no(status, &format!("{target} cannot be reached: {how}"))
        }
    }
}

/// The host and port of a request in one of the two forms that proxies get.
fn target<B>(request: &Request<B>) -> Option<Target> {
    let uri = request.uri();
    if request.method() == Method::CONNECT {
        let plain = uri.scheme().is_none() && uri.path_and_query().is_none();
        return uri.authority().filter(|_| plain).and_then(|authority| Target::parse(authority.as_str()));
    }
    url::Url::parse(&uri.to_string()).ok().as_ref().and_then(Target::of_url)
}

/// Whether a request says that something of it comes after its head. What follows a `CONNECT` is the tunnel's.
fn has_body(request: &Request<Incoming>) -> bool {
    let headers = request.headers();
    headers.contains_key(header::TRANSFER_ENCODING)
        || headers.contains_key(header::CONTENT_LENGTH)
        || !request.body().is_end_stream()
}

enum Undialled {
    Refused(Why),
    Failed(StatusCode, &'static str),
}

/// A connection to one of the addresses that were judged, each of which gets its share of the time.
async fn dial(config: &BrokerConfig, target: &Target) -> Result<TcpStream, Undialled> {
    let late = || Undialled::Failed(StatusCode::GATEWAY_TIMEOUT, "no connection in time");
    let until = Instant::now() + config.connect_timeout;
    let addresses = match timeout_at(until, judge::addresses(config, target)).await {
        Ok(Ok(addresses)) => addresses,
        Ok(Err(Unfit::Refused(why))) => return Err(Undialled::Refused(why)),
        Ok(Err(Unfit::Unknown)) => return Err(Undialled::Failed(StatusCode::BAD_GATEWAY, "its name is not known")),
        Err(_) => return Err(late()),
    };
    let mut failure = late();
    for (at, address) in addresses.iter().enumerate() {
        let now = Instant::now();
        let share = until.saturating_duration_since(now) / u32::try_from(addresses.len() - at).unwrap_or(u32::MAX);
        failure = match timeout_at(now + share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                // Only latency would suffer.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                Undialled::Failed(StatusCode::BAD_GATEWAY, "connection refused")
            }
            Ok(Err(_)) => Undialled::Failed(StatusCode::BAD_GATEWAY, "no connection"),
            Err(_) => late(),
        };
    }
    Err(failure)
}

/// An answer in words, after which the connection ends: whoever was refused may have sent more, for a tunnel.
fn no(status: StatusCode, message: &str) -> Response<Body> {
    let mut response = Response::new(Body::from(format!("opencode-sidecar: {message}\n")));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::CONNECTION, header::HeaderValue::from_static("close"));
    response
}
