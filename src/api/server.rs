//! The accept loop: connections with limits on headers, time and number, each a tracked task.
//!
//! What hyper refuses by itself, since two readers could see two requests in it, is written in `tests/it/edge/connections.rs`.
//! Two lengths in one head it does not refuse: a `Content-Length` beside `Transfer-Encoding` it passes over. So a request
//! that shows both is refused (in `layers`), and after any with `Transfer-Encoding` the connection is closed (RFC 9112, 6.3): nothing
//! that follows on it is anybody's request.

use crate::api::auth::Origin;
use crate::api::stall::StallLimit;
use crate::tasks::Tasks;
use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use bytes::Bytes;
use http::{HeaderValue, Request, header};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

/// Limits of connections.
#[derive(Clone, Copy, Debug)]
pub struct ServerLimits {
    /// Time for a request's headers, counted from the accept or from the answer before; so also the time that an
    /// idle HTTP/1 connection is kept.
    pub header_timeout: Duration,
    /// Bytes of a request's line and headers; more is a 431.
    pub header_bytes: u32,
    /// Headers of an HTTP/1 request; more is a 431. HTTP/2 counts bytes alone.
    pub headers: usize,
    /// Open connections, WebSockets included; others wait in the kernel's backlog.
    pub connections: usize,
    /// Open connections of one address (of one IPv6 network of 64 bits); more are closed at once. Behind a proxy all
    /// callers have one.
    pub connections_per_address: usize,
    /// HTTP/2: requests at once on a connection.
    pub concurrent_streams: u32,
    /// HTTP/2: time without a request after which a connection is ended.
    pub idle: Duration,
    /// Time that one write may wait for the peer to take something.
    pub stall: Duration,
    /// At shutdown: time for requests that run. What is left then is cut.
    pub drain: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            header_timeout: Duration::from_secs(10),
            header_bytes: 32 * 1024,
            headers: 100,
            connections: 2048,
            connections_per_address: 1024,
            concurrent_streams: 256,
            idle: Duration::from_secs(90),
            stall: Duration::from_secs(60),
            drain: Duration::from_secs(10),
        }
    }
}

/// A place among the open connections, an extension of each request. A WebSocket outlives the HTTP connection that
/// it came from: it keeps this for as long as it lives, so that it is counted and waited for.
#[derive(Clone, Debug)]
pub struct ConnectionSlot {
    _permit: Arc<OwnedSemaphorePermit>,
    _of_address: Arc<Place>,
}

/// [`serve_with`] the default limits.
pub async fn serve(listener: TcpListener, router: Router, tasks: Tasks, shutdown: CancellationToken) -> usize {
    serve_with(listener, router, tasks, shutdown, ServerLimits::default()).await
}

/// Serves until `shutdown`; then stops accepting, lets the requests that run finish, and returns when all
/// connections are gone. Streams do not end by themselves: whoever runs them is told by a token of his own.
///
/// Returns the number of connections that had to be cut at the end of [`ServerLimits::drain`]. A WebSocket that
/// keeps its [`ConnectionSlot`] beyond it is counted, but cannot be cut from here.
pub async fn serve_with(
    listener: TcpListener,
    router: Router,
    tasks: Tasks,
    shutdown: CancellationToken,
    limits: ServerLimits,
) -> usize {
    let server = Arc::new(Server {
        router,
        builder: builder(&tasks, &limits),
        limits,
        shutdown: shutdown.clone(),
        cut: CancellationToken::new(),
        by_origin: Arc::default(),
    });
    let places = Arc::new(Semaphore::new(limits.connections));
    let accepting = accept(listener, &server, &tasks, &places);
    shutdown.run_until_cancelled(accepting).await;

    // All places free again: no connection is left. The number fits: a semaphore holds no more.
    let all = u32::try_from(limits.connections).unwrap_or(u32::MAX);
    if tokio::time::timeout(limits.drain, places.acquire_many(all)).await.is_ok() {
        return 0;
    }
    let left = limits.connections.saturating_sub(places.available_permits());
    tracing::warn!(left, "connections cut at the end of the drain");
    server.cut.cancel();
    left
}

async fn accept(listener: TcpListener, server: &Arc<Server>, tasks: &Tasks, places: &Arc<Semaphore>) {
    let mut backoff = Duration::ZERO;
    loop {
        // First the place, then the connection: what has none waits in the backlog, not in our memory.
        let Ok(permit) = Arc::clone(places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, peer)) => {
                backoff = Duration::ZERO;
                // Only latency depends on it.
                let _ = stream.set_nodelay(true);
                let Some(place) = server.place(peer) else { continue };
                let slot = ConnectionSlot { _permit: Arc::new(permit), _of_address: Arc::new(place) };
                tasks.spawn("http connection", Arc::clone(server).connection(stream, peer, slot));
            }
            Err(error) if gone_before_accept(&error) => {}
            Err(error) => {
                // Out of descriptors or memory: asking again at once would spin.
                backoff = (backoff * 2).clamp(Duration::from_millis(10), Duration::from_secs(1));
                tracing::error!(%error, "cannot accept connections");
                tokio::time::sleep(backoff).await;
            }
        }
    }
}

/// Whether the error is of one connection, not of the listener.
fn gone_before_accept(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

fn builder(tasks: &Tasks, limits: &ServerLimits) -> Builder<OnTasks> {
    // The read buffer holds a whole head, so it is the limit of HTTP/1; hyper takes no less than 8 KiB.
    let head = usize::try_from(limits.header_bytes).unwrap_or(usize::MAX).max(8192);
    let mut builder = Builder::new(OnTasks(tasks.clone()));
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(head)
        .max_headers(limits.headers);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(limits.header_bytes)
        .max_concurrent_streams(limits.concurrent_streams)
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10));
    builder
}

/// Runs what hyper starts beside a connection (HTTP/2 streams) as tracked tasks.
#[derive(Clone, Debug)]
struct OnTasks(Tasks);

impl<F> Executor<F> for OnTasks
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn("http stream", future);
    }
}

struct Server {
    router: Router,
    builder: Builder<OnTasks>,
    limits: ServerLimits,
    shutdown: CancellationToken,
    cut: CancellationToken,
    by_origin: Arc<Mutex<HashMap<Origin, usize>>>,
}

/// One of the connections of an address.
#[derive(Debug)]
struct Place {
    origin: Origin,
    by_origin: Arc<Mutex<HashMap<Origin, usize>>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_origin = self.by_origin.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(mut count) = by_origin.entry(self.origin) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

impl Server {
    /// A place for one more connection of the address; `None` where it has as many as it may.
    fn place(&self, peer: SocketAddr) -> Option<Place> {
        let origin = Origin::of(Some(peer.ip()));
        let mut by_origin = self.by_origin.lock().unwrap_or_else(PoisonError::into_inner);
        let count = by_origin.entry(origin).or_default();
        if *count >= self.limits.connections_per_address {
            // A line for each would be a flood of its own.
            tracing::debug!(%peer, "a connection was closed: its address has as many as it may");
            return None;
        }
        *count += 1;
        Some(Place { origin, by_origin: Arc::clone(&self.by_origin) })
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, peer: SocketAddr, slot: ConnectionSlot) {
        let activity = Arc::new(Activity::default());
        let service = service_fn(|mut request: Request<Incoming>| {
            request.extensions_mut().insert(ConnectInfo(peer));
            request.extensions_mut().insert(slot.clone());
            let busy = activity.begin();
            let is_last = request.headers().contains_key(header::TRANSFER_ENCODING);
            let answer = self.router.clone().oneshot(request.map(Body::new));
            async move {
                let mut response = answer.await?;
                if is_last {
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response.map(|body| Busily { body, _busy: busy }))
            }
        });
        let io = TokioIo::new(StallLimit::new(stream, self.limits.stall));
        let mut connection = pin!(self.builder.serve_connection_with_upgrades(io, service));

        let mut stopping = pin!(self.shutdown.cancelled());
        let mut told = false;
        let mut seen = 0;
        let mut tick = pin!(tokio::time::sleep(self.limits.header_timeout));
        loop {
            tokio::select! {
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, %peer, "connection ended");
                    }
                    return;
                }
                () = self.cut.cancelled() => return,
                () = stopping.as_mut(), if !told => {
                    told = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = tick.as_mut() => {
                    let requests = activity.requests.load(Ordering::Relaxed);
                    // hyper's own limit starts when it knows the protocol; a peer that sends nothing, or half of
                    // HTTP/2's preface, never gets that far.
                    if requests == 0 {
                        tracing::debug!(%peer, "no request in time");
                        return;
                    }
                    if requests == seen && activity.in_flight.load(Ordering::Relaxed) == 0 {
                        connection.as_mut().graceful_shutdown();
                    }
                    seen = requests;
                    tick.as_mut().reset(tokio::time::Instant::now() + self.limits.idle);
                }
            }
        }
    }
}

/// What a connection does.
#[derive(Debug, Default)]
struct Activity {
    requests: AtomicU64,
    in_flight: AtomicUsize,
}

impl Activity {
    fn begin(self: &Arc<Self>) -> InFlight {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }
}

/// One request, until its answer's last byte.
#[derive(Debug)]
struct InFlight(Arc<Activity>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An answer's body that is in flight for as long as it lives.
struct Busily {
    body: Body,
    _busy: InFlight,
}

impl HttpBody for Busily {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
