//! The limits of the session's resources: when they are felt, and what is said then.

use super::State;
use crate::model::event::{NewEvent, Severity};
use crate::model::{Reason, Task};
use crate::opencode::outcome::Failure;
use crate::sandbox::{Added, Disk, ProcessHandle, ResourceEvents};
use serde_json::json;
use std::time::Duration;
use tokio::time::Instant;

/// How long no limit is spoken of after one was.
const QUIET: Duration = Duration::from_secs(1);

/// Waits until more was felt than is known; not sooner than a moment after the last time.
pub(super) async fn felt(process: &ProcessHandle, known: ResourceEvents, quiet_until: &mut Instant) -> ResourceEvents {
    tokio::time::sleep_until(*quiet_until).await;
    let events = process.resource_events_beyond(known).await;
    *quiet_until = Instant::now() + QUIET;
    events
}

pub(super) async fn disk_exhausted(disk: Option<&Disk>) -> Added {
    match disk {
        Some(disk) => disk.exhausted().await,
        None => std::future::pending().await,
    }
}

pub(super) fn disk_full(task: &Task, added: u64) -> Failure {
    let limit = task.limits.disk_bytes.unwrap_or_default();
    let message = format!("The session has added {added} bytes to the disk; it may add {limit}.");
    Failure::new(Reason::DiskExhausted, "disk_exhausted", message)
}

impl State<'_> {
    /// What was felt since it was last told. What OpenCode itself ended of is the reason of its end, and not told here.
    pub(super) async fn tell_last_felt(&self) {
        if let Some(events) = self.session.server.process.handle().resource_events_now() {
            self.tell_felt(self.felt, events).await;
        }
    }

    /// A limit was felt by something that the agent had started: it is said, and the run goes on.
    pub(super) async fn tell_felt(&self, before: ResourceEvents, now: ResourceEvents) {
        let remarks = [
            (
                now.oom_kills.saturating_sub(before.oom_kills),
                "oom_kill",
                "The session's memory was used up, and the kernel ended a process in it.",
            ),
            (
                now.forks_refused.saturating_sub(before.forks_refused),
                "fork_refused",
                "The session has as many processes as it may: a new one was refused.",
            ),
        ];
        for (count, code, message) in remarks.into_iter().filter(|(count, ..)| *count > 0) {
            let mut remark = NewEvent::log(Severity::Warn, code, message);
            remark.data["count"] = json!(count);
            self.run.writer.append(remark).await;
        }
    }
}
