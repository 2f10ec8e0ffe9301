//! The broker's connections: who may talk, about what, and for how long.

use super::error::body;
use super::observe::Api;
use super::session::{Session, ShellCall};
use super::{Inner, egress, forward};
use crate::tasks::Tasks;
use crate::telemetry::BrokerRefusal;
use axum::body::Body;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Connections at once, over all sessions.
const MAX_CONNECTIONS: usize = 1024;
/// How long a connection may live without a valid token.
const UNCLAIMED: Duration = Duration::from_secs(30);
/// Pieces of a shell tap's upload that wait to be taken, each at most [`READ_BUFFER`] long.
const SHELL_PIECES: usize = 16;
const READ_BUFFER: usize = 64 * 1024;
/// Longest head of a request, in bytes.
const MAX_HEAD: usize = 32 * 1024;

/// The session that a connection last showed the token of.
type Claim = watch::Sender<Option<CancellationToken>>;

/// Serves until the sidecar shuts down and no lease is left.
pub(super) async fn serve(tasks: Tasks, listener: TcpListener, inner: Arc<Inner>) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut sessions = inner.sessions.subscribe();
    let shutdown = tasks.shutdown_token().clone();
    let over = async {
        shutdown.cancelled().await;
        // The sender is in `inner`, so the wait ends only with the last lease.
        let _ = sessions.wait_for(|sessions| sessions.is_empty()).await;
    };
    tokio::pin!(over);
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    loop {
        let accept = async {
            let permit = Arc::clone(&connections).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            () = &mut over => return,
            accepted = accept => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let (inner, end) = (Arc::clone(&inner), end.clone());
                tasks.spawn("broker's connection", async move {
                    let _permit = permit;
                    connection(stream, inner, end).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the broker could not take a connection");
                // Out of descriptors, or the peer is gone already: the next one may work.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

/// Serves one connection until it ends by itself, its session closes, nobody claims it, or the broker ends.
async fn connection(stream: TcpStream, inner: Arc<Inner>, end: CancellationToken) {
    // Only latency would suffer.
    let _ = stream.set_nodelay(true);
    let claim = Claim::default();
    let claimed = claim.subscribe();
    let place = egress::Place::default();
    let granted = place.clone();
    let service = service_fn(move |request| {
        let (inner, claim, place) = (Arc::clone(&inner), claim.clone(), place.clone());
        async move { Ok::<_, Infallible>(handle(inner, &claim, &place, request).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .max_buf_size(READ_BUFFER)
        .max_header_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::select! {
        // Clients that go away and answers that are cut end in an error here; their calls have said so already.
        _ = served => {}
        () = closed(claimed.clone()) => {}
        () = unclaimed(claimed) => {}
        () = end.cancelled() => {}
    }
    if let Some(tunnel) = granted.take() {
        tokio::select! {
            () = tunnel.run() => {}
            () = end.cancelled() => {}
        }
    }
}

/// Ends when the session of the connection has closed.
async fn closed(mut claimed: watch::Receiver<Option<CancellationToken>>) {
    loop {
        let session = claimed.borrow_and_update().clone();
        let session_closed = async {
            match &session {
                Some(session) => session.cancelled().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            changed = claimed.changed() => if changed.is_err() {
                // No request can come any more: the connection ends by itself.
                return std::future::pending().await;
            },
            () = session_closed => return,
        }
    }
}

/// Ends when nobody has claimed the connection in time.
async fn unclaimed(mut claimed: watch::Receiver<Option<CancellationToken>>) {
    let is_claimed = async { claimed.wait_for(Option::is_some).await.is_ok() };
    if tokio::time::timeout(UNCLAIMED, is_claimed).await.is_ok() {
        std::future::pending().await
    }
}

/// An error that OpenCode can read.
pub(super) fn refuse(status: StatusCode, message: &str, kind: &str, code: &str) -> Response<Body> {
    let mut response = Response::new(Body::from(body(message, kind, code).to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

fn token(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    bearer.or_else(|| headers.get("x-api-key").and_then(|value| value.to_str().ok()))
}

impl Inner {
    /// The session that fits. Every one is looked at, so that the time says nothing of which one it was.
    pub(super) fn session_with(&self, fits: impl Fn(&Session) -> bool) -> Option<Arc<Session>> {
        self.sessions.borrow().values().fold(None, |found, session| {
            let matches = fits(session);
            if matches { Some(Arc::clone(session)) } else { found }
        })
    }
}

fn session(inner: &Inner, headers: &HeaderMap) -> Option<Arc<Session>> {
    let token = token(headers)?;
    inner.session_with(|session| session.has_token(token))
}

async fn handle(inner: Arc<Inner>, claim: &Claim, place: &egress::Place, request: Request<Incoming>) -> Response<Body> {
    if egress::is_meant(&request, inner.address) {
        let Some(session) = egress::session(&inner, request.headers()) else {
            return egress::unauthenticated(&inner, request.headers());
        };
        claim.send_replace(Some(session.closed.clone()));
        session.touch();
        return egress::answer(&inner, &session, place, request).await;
    }
    let Some(session) = session(&inner, request.headers()) else {
        inner.metrics.broker_refused(BrokerRefusal::Token);
        return refuse(StatusCode::UNAUTHORIZED, "unauthorized", "unauthorized", "unauthorized");
    };
    claim.send_replace(Some(session.closed.clone()));
    session.touch();
    let not_here = |status, message, code| {
        inner.metrics.broker_refused(BrokerRefusal::Path);
        refuse(status, message, code, code)
    };
    // Providers have switches in the query of which nobody here knows what they do.
    if request.uri().query().is_some() {
        return not_here(StatusCode::NOT_FOUND, "no query is known here", "not_found");
    }
    let api = match request.uri().path() {
        "/model/v1/chat/completions" => Some(Api::Chat),
        "/model/v1/messages" => Some(Api::Messages),
        "/model/v1/responses" => Some(Api::Responses),
        "/shell" => None,
        _ => return not_here(StatusCode::NOT_FOUND, "not found", "not_found"),
    };
    if request.method() != Method::POST {
        return not_here(StatusCode::METHOD_NOT_ALLOWED, "only POST", "method_not_allowed");
    }
    match api {
        Some(api) => forward::forward(&inner, &session, api, request).await,
        None => shell(&session, request.into_body()).await,
    }
}

/// Hands a shell tap's upload on as it comes, and answers when all of it is taken.
async fn shell(session: &Session, mut body: Incoming) -> Response<Body> {
    let unavailable = || refuse(StatusCode::SERVICE_UNAVAILABLE, "nobody takes it", "unavailable", "unavailable");
    let Some(calls) = session.shell_calls() else { return unavailable() };
    let (pieces, frames) = mpsc::channel(SHELL_PIECES);
    let (done, taken) = oneshot::channel();
    if calls.send(ShellCall { frames, done }).await.is_err() {
        return unavailable();
    }
    drop(calls);
    while let Some(frame) = body.frame().await {
        // The tap was killed or cut off: what came is what there is.
        let Ok(frame) = frame else { break };
        if let Ok(piece) = frame.into_data() {
            session.touch();
            if pieces.send(piece).await.is_err() {
                break;
            }
        }
    }
    drop(pieces);
    match taken.await {
        Ok(()) => {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::NO_CONTENT;
            response
        }
        Err(_) => unavailable(),
    }
}
