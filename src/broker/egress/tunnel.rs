//! A connection through the proxy: bytes in both directions, as they come.

use crate::broker::session::Session;
use crate::telemetry::{EgressDirection, Metrics};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until};

/// Bytes that are read at once, in each direction.
const PIECE: usize = 32 * 1024;

/// Where a granted tunnel waits until the connection that asked for it is handed over.
#[derive(Clone, Debug, Default)]
pub(in crate::broker) struct Place(Arc<Mutex<Option<Tunnel>>>);

impl Place {
    pub(super) fn put(&self, tunnel: Tunnel) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(tunnel);
    }

    /// The tunnel, where one was granted.
    pub(in crate::broker) fn take(&self) -> Option<Tunnel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A connection that was granted, both ends of it.
#[derive(Debug)]
pub(in crate::broker) struct Tunnel {
    pub(super) upgrade: OnUpgrade,
    pub(super) outside: TcpStream,
    pub(super) session: Arc<Session>,
    pub(super) idle: Duration,
    pub(super) metrics: Metrics,
    /// Its place among the session's.
    pub(super) _slot: OwnedSemaphorePermit,
}

impl Tunnel {
    /// Passes bytes until both sides have ended, one breaks off, nothing passes for too long, or the session closes.
    pub(in crate::broker) async fn run(self) {
        let Self { upgrade, outside, session, idle, metrics, _slot } = self;
        let closed = session.closed.clone();
        let pass = async {
            // What the client sent after its request is the beginning of what is read here.
            let Ok(inside) = upgrade.await else { return };
            let passed = Passed { session, metrics, begun: Instant::now(), last: AtomicU64::new(0) };
            let (from_inside, to_inside) = tokio::io::split(TokioIo::new(inside));
            let (from_outside, to_outside) = outside.into_split();
            let sent = copy(from_inside, to_outside, &passed, EgressDirection::Sent);
            let received = copy(from_outside, to_inside, &passed, EgressDirection::Received);
            tokio::select! {
                // A side that breaks off has no more to say, and nobody to say it to.
                _ = async { tokio::try_join!(sent, received) } => {}
                () = passed.nothing_for(idle) => {}
            }
        };
        tokio::select! {
            () = pass => {}
            () = closed.cancelled() => {}
        }
    }
}

/// What has passed through a tunnel.
struct Passed {
    session: Arc<Session>,
    metrics: Metrics,
    begun: Instant,
    /// When something passed last, in milliseconds since it was begun.
    last: AtomicU64,
}

impl Passed {
    fn note(&self, bytes: usize, direction: EgressDirection) {
        self.session.touch();
        self.last.store(u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.metrics.egress_bytes(direction, bytes);
    }

    /// Ends when nothing has passed for so long.
    async fn nothing_for(&self, idle: Duration) {
        loop {
            let until = self.begun + Duration::from_millis(self.last.load(Ordering::Relaxed)) + idle;
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }
}

/// Copies to the end, and hands that on: the other direction may have more.
async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    passed: &Passed,
    direction: EgressDirection,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        match from.read(&mut piece).await? {
            0 => return to.shutdown().await,
            length => {
                to.write_all(&piece[..length]).await?;
                passed.note(length, direction);
            }
        }
    }
}
