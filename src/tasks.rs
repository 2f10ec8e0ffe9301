//! The only place that spawns: every task and blocking job is tracked, can be told to stop, and is waited for at
//! shutdown. No other module calls `tokio::spawn` (a lint holds that).

use std::future::Future;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

/// A handle to the set of running tasks. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tasks {
    tracker: TaskTracker,
    shutdown: CancellationToken,
}

impl Default for Tasks {
    fn default() -> Self {
        Self::new()
    }
}

impl Tasks {
    /// An empty set.
    pub fn new() -> Self {
        Self { tracker: TaskTracker::new(), shutdown: CancellationToken::new() }
    }

    /// Starts a task. `name` appears in its log lines.
    #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
    pub fn spawn<F>(&self, name: &'static str, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        tokio::spawn(self.tracker.track_future(future).instrument(tracing::info_span!("task", name)))
    }

    /// Runs blocking work on the runtime's threads for it.
    #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
    pub fn spawn_blocking<F, T>(&self, work: F) -> JoinHandle<T>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let token = self.tracker.token();
        tokio::task::spawn_blocking(move || {
            let _token = token;
            work()
        })
    }

    /// Told when the sidecar shuts down. Tasks that live as long as it does stop then.
    pub fn shutdown_token(&self) -> &CancellationToken {
        &self.shutdown
    }

    /// How many tasks run now.
    pub fn running(&self) -> usize {
        self.tracker.len()
    }

    /// Tells every task to stop and waits for them, at most `grace`.
    ///
    /// # Errors
    /// The number of tasks that were still running then.
    pub async fn stop(&self, grace: Duration) -> Result<(), usize> {
        self.shutdown.cancel();
        self.tracker.close();
        match tokio::time::timeout(grace, self.tracker.wait()).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.tracker.len()),
        }
    }
}
