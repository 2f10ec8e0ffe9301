//! A reader's place in a log: what SSE and WebSocket share.
//!
//! It holds a number and nothing else; the log is read by it, and between reads it waits for the log's head to
//! move. A slow reader costs its connection and no memory here.

use crate::events::ReadQuery;
use crate::executions::Executions;
use crate::model::ExecutionId;
use crate::model::event::Event;
use crate::store::StoreError;
use std::time::Duration;

/// Events per read.
const BATCH: u32 = 256;
/// How often it is looked after an execution that another sidecar runs.
const FOREIGN: Duration = Duration::from_secs(1);

/// What comes next in a log.
#[derive(Debug)]
pub(crate) enum Next {
    Events(Vec<Event>),
    /// The last event was given out before.
    End,
    /// The execution was deleted, or its log was lost.
    Gone,
}

#[derive(Debug)]
pub(crate) struct Cursor {
    executions: Executions,
    id: ExecutionId,
    after: u64,
    /// The last event of an execution that has ended was given out: nobody has to be asked for more.
    is_over: bool,
}

impl Cursor {
    pub(crate) fn new(executions: Executions, id: ExecutionId, after: u64) -> Self {
        Self { executions, id, after, is_over: false }
    }

    /// Whether the place is beyond the log's end: what it was read from is not this log. The cursor goes back to the
    /// beginning then, and the reader has to be told.
    pub(crate) fn reset_if_beyond(&mut self, last_seq: u64) -> bool {
        let beyond = self.after > last_seq;
        if beyond {
            self.after = 0;
        }
        beyond
    }

    /// Waits for what comes next. May be dropped while it waits: nothing is lost, since only what is returned moves
    /// the cursor.
    pub(crate) async fn next(&mut self) -> Result<Next, StoreError> {
        if self.is_over {
            return Ok(Next::End);
        }
        let events = self.executions.events().clone();
        loop {
            let (last_seq, ended) = match events.head(self.id) {
                Some(mut head) => {
                    let now = head.borrow_and_update().clone();
                    if now.lost {
                        return Ok(Next::Gone);
                    }
                    if now.last_seq <= self.after && !now.ended {
                        // The sender may go: then the store has the rest.
                        let _ = head.changed().await;
                        continue;
                    }
                    (now.last_seq, now.ended)
                }
                None => match events.record(self.id).await? {
                    None => return Ok(Next::Gone),
                    Some(record) if record.last_seq <= self.after && !record.status.is_final() => {
                        tokio::time::sleep(FOREIGN).await;
                        continue;
                    }
                    Some(record) => (record.last_seq, record.status.is_final()),
                },
            };
            if last_seq > self.after {
                let query = ReadQuery { after: self.after, limit: BATCH, ..ReadQuery::default() };
                let page = events.read(self.id, last_seq, &query).await?;
                if let Some(last) = page.events.last() {
                    self.after = last.seq;
                    self.is_over = ended && last.seq >= last_seq;
                    return Ok(Next::Events(page.events));
                }
                // Deleted between the two looks.
                return Ok(Next::Gone);
            }
            if ended {
                return Ok(Next::End);
            }
        }
    }
}
