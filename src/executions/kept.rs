//! A session that a caller made: it outlives its executions, which share one conversation.
//!
//! It has at most one process, and executions run in it one after another. Between them the process rests; it is
//! *parked* (ended, with its conversation kept on disk) where its memory is needed for others or nobody has used it for
//! `SESSION_IDLE_TIMEOUT`, and after an execution that did not leave it idle. The next prompt starts it again, with
//! the same conversation.
//!
//! Here is one session's state and what becomes of its process. Making, prompting, ending and listing sessions is in
//! `conversations`.

use super::Shared;
use crate::events::Head;
use crate::model::{ExecutionId, ExecutionRecord, SessionId, SessionRecord, Status};
use crate::sessions::{Ended, Parked, Session, SessionError, Terminals, Wanted};
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;
use tokio::time::Instant;

/// How a session has changed, for whoever follows it. A level, not a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Executions that it has had.
    pub executions: u32,
    /// It takes no more.
    pub ended: bool,
}

#[derive(Debug)]
pub(super) struct Kept {
    pub(super) record: SessionRecord,
    pub(super) api_key: SecretString,
    /// Fields of the request that nobody here knows; said in the log of the first execution.
    pub(super) ignored: Vec<String>,
    changes: watch::Sender<Changes>,
    /// Held while its process changes hands, so that nobody meets it half-way.
    moving: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Its executions, in their order.
    executions: Vec<ExecutionId>,
    /// Those of them that wait or run, in their order.
    unfinished: Vec<ExecutionId>,
    /// The latest one of those that have ended.
    latest: Option<Arc<ExecutionRecord>>,
    ended_at: Option<DateTime<Utc>>,
    process: Process,
    /// Those of its latest process.
    terminals: Terminals,
}

#[derive(Debug)]
enum Process {
    /// An execution has it, or somebody who parks it; or there is none any more.
    Away,
    Resting {
        session: Box<Session>,
        since: Instant,
    },
    Parked(Parked),
}

/// The session takes no more executions.
#[derive(Clone, Copy, Debug)]
pub(super) struct HasEnded;

impl Kept {
    /// A session whose process has just been started and rests.
    pub(super) fn new(
        record: SessionRecord,
        api_key: SecretString,
        ignored: Vec<String>,
        mut session: Session,
    ) -> Self {
        session.rest();
        let terminals = session.terminals();
        Self {
            record,
            api_key,
            ignored,
            changes: watch::Sender::default(),
            moving: tokio::sync::Mutex::default(),
            state: Mutex::new(State {
                executions: Vec::new(),
                unfinished: Vec::new(),
                latest: None,
                ended_at: None,
                process: Process::Resting { session: Box::new(session), since: Instant::now() },
                terminals,
            }),
        }
    }

    pub(super) fn id(&self) -> SessionId {
        self.record.id
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As it is to be stored now.
    pub(super) fn to_store(&self) -> SessionRecord {
        SessionRecord { ended_at: self.lock().ended_at, ..self.record.clone() }
    }

    pub(super) fn changes(&self) -> watch::Receiver<Changes> {
        self.changes.subscribe()
    }

    /// Takes an execution in and gives it its place.
    pub(super) fn register(&self, id: ExecutionId) -> Result<NonZeroU32, HasEnded> {
        let mut state = self.lock();
        if state.ended_at.is_some() {
            return Err(HasEnded);
        }
        state.executions.push(id);
        state.unfinished.push(id);
        let ordinal = u32::try_from(state.executions.len()).ok().and_then(NonZeroU32::new).ok_or(HasEnded)?;
        self.changes.send_modify(|changes| changes.executions = ordinal.get());
        Ok(ordinal)
    }

    /// An execution of it has ended.
    pub(super) fn finished(&self, head: &Head) {
        let mut state = self.lock();
        state.unfinished.retain(|id| *id != head.record.id);
        let later = state.latest.as_ref().is_none_or(|latest| latest.ordinal <= head.record.ordinal);
        if later {
            state.latest = Some(Arc::clone(&head.record));
        }
    }

    /// Its executions, in their order.
    pub(super) fn executions(&self) -> Vec<ExecutionId> {
        self.lock().executions.clone()
    }

    /// The execution that its status is that of: the first that waits or runs, else (`Err`) the latest one as it ended.
    pub(super) fn current(&self) -> Option<Result<ExecutionId, Arc<ExecutionRecord>>> {
        let state = self.lock();
        match state.unfinished.first() {
            Some(id) => Some(Ok(*id)),
            None => state.latest.clone().map(Err),
        }
    }

    pub(super) fn ended_at(&self) -> Option<DateTime<Utc>> {
        self.lock().ended_at
    }

    /// From now on it takes no more executions. `false` where that was so already.
    pub(super) fn end(&self, now: DateTime<Utc>) -> bool {
        let mut state = self.lock();
        if state.ended_at.is_some() {
            return false;
        }
        state.ended_at = Some(now);
        self.changes.send_modify(|changes| changes.ended = true);
        true
    }

    /// The status of a session that has had no execution.
    pub(super) fn unused_status(ended: bool) -> Status {
        if ended { Status::Cancelled } else { Status::Pending }
    }

    /// Since when its process rests and nobody types in it, where it does and nothing waits for it.
    pub(super) fn resting_since(&self) -> Option<Instant> {
        let state = self.lock();
        match &state.process {
            Process::Resting { since, .. } if state.unfinished.is_empty() => {
                Some(state.terminals.used_at().map_or(*since, |used_at| used_at.max(*since)))
            }
            _ => None,
        }
    }

    /// Whether no execution of it waits or runs.
    pub(super) fn is_unused(&self) -> bool {
        self.lock().unfinished.is_empty()
    }

    /// When it was used last.
    pub(super) fn used_at(&self) -> DateTime<Utc> {
        let state = self.lock();
        state.latest.as_ref().and_then(|record| record.completed_at).unwrap_or(self.record.created_at)
    }

    /// Its process for an execution: the one that rests (`true`), or one started again where it was parked. On failure
    /// it stays as it was.
    pub(super) async fn take(&self, shared: &Shared, wanted: Wanted) -> Result<(Session, bool), SessionError> {
        let _moving = self.moving.lock().await;
        self.take_out(shared, wanted).await
    }

    /// The same for whoever moves it already.
    async fn take_out(&self, shared: &Shared, wanted: Wanted) -> Result<(Session, bool), SessionError> {
        let process = std::mem::replace(&mut self.lock().process, Process::Away);
        let parked = match process {
            Process::Resting { mut session, .. } if session.is_alive() => {
                shared.sessions.awaken(&mut session, &wanted);
                return Ok((*session, true));
            }
            Process::Resting { session, .. } => {
                tracing::warn!(session = %self.id(), "the process of a session ended while it rested");
                session.park(false).await.1
            }
            Process::Parked(parked) => parked,
            // One execution at a time has it: so it is gone with the session's end.
            Process::Away => return Err(SessionError::HasEnded),
        };
        match shared.sessions.acquire(wanted, Some(&parked)).await {
            Ok(session) => {
                self.lock().terminals = session.terminals();
                Ok((session, false))
            }
            Err(error) => {
                self.lock().process = Process::Parked(parked);
                Err(error)
            }
        }
    }

    /// The terminals of its process, where that lives.
    fn open_terminals(&self) -> Option<Terminals> {
        let state = self.lock();
        (state.ended_at.is_none() && !state.terminals.are_closed()).then(|| state.terminals.clone())
    }

    /// The terminals of its process, which may be one that is just being started; `None` where it has none.
    pub(super) async fn terminals(&self) -> Option<Terminals> {
        let _moving = self.moving.lock().await;
        self.open_terminals()
    }

    /// The same, and where it was parked its process is started again, and rests. Not to be dropped half-way.
    pub(super) async fn awaken(&self, shared: &Shared, wanted: Wanted) -> Result<Terminals, SessionError> {
        let _moving = self.moving.lock().await;
        if let Some(terminals) = self.open_terminals() {
            return Ok(terminals);
        }
        if self.ended_at().is_some() {
            return Err(SessionError::HasEnded);
        }
        let (mut session, _) = self.take_out(shared, wanted).await?;
        session.rest();
        let terminals = session.terminals();
        self.lock().process = Process::Resting { session: Box::new(session), since: Instant::now() };
        Ok(terminals)
    }

    /// The process comes back from an execution. It rests where OpenCode can take another prompt (`settled`), else it is
    /// parked: whatever the execution had started ends with it.
    pub(super) async fn give_back(&self, mut session: Session, settled: bool) -> Ended {
        if settled && session.is_alive() && self.ended_at().is_none() {
            let usage = session.usage();
            session.share().await;
            session.rest();
            self.lock().process = Process::Resting { session: Box::new(session), since: Instant::now() };
            return Ended { usage, nothing_left: true, ..Ended::default() };
        }
        let (ended, parked) = session.park(settled).await;
        if self.ended_at().is_some() {
            parked.discard();
        } else {
            self.lock().process = Process::Parked(parked);
        }
        ended
    }

    /// Ends its process if it rests, and keeps the conversation.
    pub(super) async fn park(&self) {
        let _moving = self.moving.lock().await;
        let session = {
            let mut state = self.lock();
            match std::mem::replace(&mut state.process, Process::Away) {
                Process::Resting { session, .. } if state.unfinished.is_empty() => session,
                other => {
                    state.process = other;
                    return;
                }
            }
        };
        let (_, parked) = session.park(true).await;
        self.lock().process = Process::Parked(parked);
    }

    /// Ends its process for good, and removes what it has on disk. Call it when no execution has it any more.
    pub(super) async fn discard(&self) -> Ended {
        let _moving = self.moving.lock().await;
        let process = std::mem::replace(&mut self.lock().process, Process::Away);
        match process {
            Process::Resting { session, .. } => session.end(true).await,
            Process::Parked(parked) => {
                parked.discard();
                Ended { nothing_left: true, ..Ended::default() }
            }
            Process::Away => Ended { nothing_left: true, ..Ended::default() },
        }
    }
}
