//! What has ended is forgotten after `RETENTION_DAYS`: executions with their events, and the sessions of callers.
//!
//! In small batches, and not by dropping partitions: a partitioned table's primary key must hold the time that it is
//! partitioned by, and `(execution_id, seq)` alone has to be unique, since shipping a log twice rests on it. Sessions live
//! for days and go with all their executions, so that no partition ends where they do. And the events of one that
//! is deleted by hand have to go at once in any case.
//!
//! One task. It holds one connection of the database, rests as long as it works, and locks only rows that nobody writes
//! to any more. What is younger than a day is always kept, and so are all keys that count.

use super::Executions;
use crate::store::{Forgotten, StoreError};
use chrono::Utc;
use std::time::Duration;
use tokio::time::Instant;

/// The first round comes at most so long after the start: several sidecars of one database may start at once.
const FIRST: Duration = Duration::from_secs(5);
/// From one round to the next, give or take a tenth.
const PERIOD: Duration = Duration::from_secs(3600);
/// The longest round. What is left has its turn in the next one.
const ROUND: Duration = Duration::from_secs(600);
/// The shortest rest between two transactions; each rest is at least as long as the transaction before it.
const REST: Duration = Duration::from_millis(10);
/// Executions, and sessions, that one transaction takes out of the project.
const EXPIRED: u32 = 200;
/// Events that one transaction removes.
const EVENTS: u32 = 2_000;

impl Executions {
    /// Forgets what is old, until shutdown. Where nothing has to be forgotten it still removes what an earlier life has
    /// left half removed.
    pub async fn forget_old(self) {
        let mut pause = FIRST.mul_f64(rand::random());
        while self.rest(pause).await {
            let mut forgotten = Forgotten::default();
            let done = self.round(&mut forgotten).await;
            if !forgotten.is_empty() {
                tracing::info!(
                    executions = forgotten.executions,
                    events = forgotten.events,
                    sessions = forgotten.sessions,
                    "what was older than RETENTION_DAYS was removed"
                );
            }
            if forgotten.callbacks > 0 {
                tracing::warn!(
                    callbacks = forgotten.callbacks,
                    "changes of status that the backend had not taken were removed with their sessions (RETENTION_DAYS)"
                );
            }
            if let Err(error) = done {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "what is older than RETENTION_DAYS could not be removed; the next round tries again"
                );
            }
            pause = PERIOD.mul_f64(rand::random_range(0.9..1.1));
        }
    }

    /// `false` where the sidecar shuts down.
    async fn rest(&self, pause: Duration) -> bool {
        tokio::select! {
            () = tokio::time::sleep(pause) => true,
            () = self.shared.tasks.shutdown_token().cancelled() => false,
        }
    }

    async fn round(&self, forgotten: &mut Forgotten) -> Result<(), StoreError> {
        let begun = Instant::now();
        while begun.elapsed() < ROUND {
            let step = Instant::now();
            let done = self.step().await?;
            if done.is_empty() {
                break;
            }
            self.shared.metrics.retention_removed(done.executions, done.events, done.sessions, done.callbacks);
            *forgotten += done;
            if !self.rest(step.elapsed().max(REST)).await {
                break;
            }
        }
        Ok(())
    }

    /// One transaction, or up to three where nothing was left to remove. Nothing is left to do where it returns nothing.
    async fn step(&self) -> Result<Forgotten, StoreError> {
        let (store, project) = (&self.shared.store, &*self.shared.settings.project);
        let purged = store.purge(project, EVENTS).await?;
        let Some(age) = self.shared.settings.retention.filter(|_| purged.is_empty()) else { return Ok(purged) };
        let mut expired = store.expire(project, Utc::now() - age, EXPIRED).await?;
        if expired.is_empty() {
            // What it has taken out of sight is counted when it is removed.
            expired += store.purge(project, EVENTS).await?;
        }
        Ok(expired)
    }
}
