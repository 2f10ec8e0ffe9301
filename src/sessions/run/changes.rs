//! What a run changed, told at its end.

use super::State;
use crate::model::event::{EventType, NewEvent};
use chrono::Utc;
use serde_json::json;
use std::time::Duration;
use tokio::time::Instant;

/// How long an idle OpenCode may take to compare its snapshots. It takes some milliseconds, and longer in a large tree.
const COMPARING: Duration = Duration::from_secs(30);

impl State<'_> {
    /// Tells what was changed, as far as it is known; `finished` where the run ended by itself, and OpenCode is idle.
    pub(super) async fn tell_changes(&mut self, finished: bool) {
        if finished {
            self.until_compared().await;
        }
        if let Some(changes) = self.translator.changes(finished) {
            self.run.writer.append(NewEvent::new(EventType::Diff, changes)).await;
        }
    }

    /// OpenCode may be idle before it has compared its last snapshot with the first.
    async fn until_compared(&mut self) {
        let process = self.session.server.process.handle();
        let until = self.run.deadline.min(Instant::now() + COMPARING);
        while !self.translator.changes_settled() {
            let event = tokio::select! {
                biased;
                () = self.run.stop.cancelled() => return,
                () = tokio::time::sleep_until(until) => return,
                _ = process.exited() => return,
                event = self.stream.next() => event,
            };
            // The run has ended well before that: what was told so far has to do.
            let Ok(Some(event)) = event else { return };
            let step = self.translator.translate(&event, Utc::now().timestamp_millis());
            self.write(step.events).await;
        }
    }

    pub(super) async fn write(&self, events: Vec<NewEvent>) {
        for mut event in events {
            if event.kind == EventType::Usage {
                event.data = json!(self.usage());
            }
            self.run.writer.append(event).await;
        }
    }
}
