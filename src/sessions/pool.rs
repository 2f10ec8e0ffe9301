//! Warm sessions: started and primed ahead, for tasks that run on the default model in the workspace itself.

use super::Sessions;
use super::session::{Session, Wanted};
use crate::model::SessionId;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// How long it is waited after a failed start.
const PAUSE: Duration = Duration::from_secs(10);
/// How long a new start is held back at most while sessions are in use: a start takes all of a small pod's
/// processors for some seconds, and whoever waits for a run would wait longer.
const HELD_BACK: Duration = Duration::from_secs(30);
/// How often it is looked whether the ones that wait still live.
const CHECK: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Pool {
    size: usize,
    ready: Mutex<Option<VecDeque<Session>>>,
    /// Counts up when one was taken.
    taken: watch::Sender<u64>,
}

impl Pool {
    pub(super) fn new(size: usize) -> Self {
        Self { size, ready: Mutex::new(Some(VecDeque::new())), taken: watch::Sender::new(0) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<VecDeque<Session>>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn ready(&self) -> usize {
        self.lock().as_ref().map_or(0, VecDeque::len)
    }

    /// A session that fits and lives.
    pub(super) fn claim(&self, wanted: &Wanted) -> Option<Session> {
        let mut guard = self.lock();
        let ready = guard.as_mut()?;
        let at = ready.iter().position(|s| wanted.is_served_by(&s.wanted) && s.is_alive())?;
        let mut session = ready.remove(at)?;
        drop(guard);
        session.claim(wanted);
        self.taken.send_modify(|n| *n += 1);
        Some(session)
    }

    /// Takes the dead ones out.
    fn take_dead(&self) -> Vec<Session> {
        let mut guard = self.lock();
        let Some(ready) = guard.as_mut() else { return Vec::new() };
        let (alive, dead) = ready.drain(..).partition(Session::is_alive);
        *ready = alive;
        dead.into()
    }

    /// No session is kept from now on; gives out those that waited.
    pub(super) fn close(&self) -> VecDeque<Session> {
        self.lock().take().unwrap_or_default()
    }

    /// Keeps a session; gives it back where the pool is closed.
    fn put(&self, session: Session) -> Option<Session> {
        match self.lock().as_mut() {
            Some(ready) => {
                ready.push_back(session);
                None
            }
            None => Some(session),
        }
    }
}

/// Keeps the pool full until shutdown.
pub(super) async fn fill(sessions: Sessions, wanted: Wanted) {
    let shared = &sessions.shared;
    let shutdown = shared.tasks.shutdown_token().clone();
    let mut taken = shared.pool.taken.subscribe();
    while !shutdown.is_cancelled() {
        taken.borrow_and_update();
        for dead in shared.pool.take_dead() {
            tracing::warn!("a warm session has ended by itself");
            dead.end(false).await;
        }
        let mut pause = CHECK;
        if shared.pool.ready() < shared.pool.size {
            let mut in_use = shared.in_use.subscribe();
            tokio::select! {
                _ = tokio::time::timeout(HELD_BACK, in_use.wait_for(|in_use| *in_use == 0)) => {}
                () = shutdown.cancelled() => return,
            }
            let wanted = Wanted { id: SessionId::new(), ..wanted.clone() };
            match Session::start(shared, wanted, None, true).await {
                Ok(session) => {
                    tracing::info!("a warm session is ready");
                    if let Some(session) = shared.pool.put(session) {
                        session.end(true).await;
                    }
                    continue;
                }
                // Called off.
                Err(_) if shutdown.is_cancelled() => return,
                Err(error) => {
                    tracing::error!(error = &error as &dyn std::error::Error, "a warm session did not start");
                    pause = PAUSE;
                }
            }
        }
        tokio::select! {
            _ = taken.changed() => {}
            () = tokio::time::sleep(pause) => {}
            () = shutdown.cancelled() => return,
        }
    }
}
