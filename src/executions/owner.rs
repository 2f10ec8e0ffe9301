//! The life of one execution, from its turn to its last event.
//!
//! The owner alone writes to the execution's log once it runs, and decides nothing by itself: each step goes through
//! the state machine, whose effects it carries out. Who wants its end says so to the state machine and then
//! raises a flag that the run looks at before anything else; no queue is between.

use super::Shared;
use super::kept::Kept;
use crate::events::Writer;
use crate::model::event::{NewEvent, Severity};
use crate::model::execution::{Command, Effect, Rejected, State, apply};
use crate::model::{ExecutionId, ExecutionRecord, Reason, Status, Usage};
use crate::opencode::launch::LaunchError;
use crate::opencode::outcome::Failure;
use crate::opencode::profile::Profile;
use crate::sessions::{Ended, Measured, Observer, Progress, Run, Session, SessionError, Wanted};
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde_json::json;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

#[derive(Debug)]
pub(super) struct Owner {
    pub(super) id: ExecutionId,
    pub(super) writer: Writer,
    work: Mutex<Work>,
    /// The caller's session that it runs in; `None` where it gets one of its own.
    pub(super) kept: Option<Arc<Kept>>,
    stop: CancellationToken,
}

#[derive(Debug)]
struct Work {
    state: State,
    record: ExecutionRecord,
    current_tool: Option<String>,
    /// What the first one who wanted its end had to say.
    ending: Option<String>,
}

impl Owner {
    pub(super) fn new(record: ExecutionRecord, writer: Writer, kept: Option<Arc<Kept>>) -> Self {
        let mut state = State::new(record.created_at);
        state.status = record.status;
        state.started_at = record.started_at;
        Self {
            id: record.id,
            writer,
            work: Mutex::new(Work { state, record, current_tool: None, ending: None }),
            kept,
            stop: CancellationToken::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its submission is refused: from the next change of its record on it has no key.
    pub(super) fn give_key_back(&self) {
        self.lock().record.idempotency = None;
    }

    pub(super) fn created_at(&self) -> DateTime<Utc> {
        self.lock().record.created_at
    }

    /// Why it ended, and how long it ran; `None` for the time where it never started, and for all before its end.
    pub(super) fn outcome(&self) -> Option<(Reason, Option<Duration>)> {
        let state = &self.lock().state;
        let ran = state.started_at.map(|_| state.running_time(Utc::now()).to_std().unwrap_or_default());
        Some((state.reason?, ran))
    }

    pub(super) fn current_tool(&self) -> Option<String> {
        self.lock().current_tool.clone()
    }

    /// One step of the state machine, written to the log with the events that go before it.
    fn step(&self, command: Command, mut events: Vec<NewEvent>) -> Result<u64, Rejected> {
        let mut work = self.lock();
        let now = Utc::now();
        let (state, effects) = apply(&work.state, command, now)?;
        work.state = state;
        let state = work.state.clone();
        work.record.set_state(&state, now);
        let mut last = 0;
        let mut change = None;
        for effect in effects {
            match effect {
                Effect::Record { expected, to } => {
                    events.push(NewEvent::status(to, state.reason, work.record.progress));
                    change = Some(expected);
                }
                Effect::Complete => {
                    let record = &work.record;
                    let reason = state.reason.unwrap_or(Reason::Internal);
                    events.push(NewEvent::complete(
                        record.status,
                        reason,
                        record.final_message.as_deref(),
                        &record.files_modified,
                        &record.usage,
                    ));
                }
                // The caller knows the session and ends it. Freezing has no caller in this version.
                Effect::StopSession | Effect::Freeze | Effect::Thaw => {}
            }
        }
        if let Some(expected) = change {
            last = self.writer.change(expected, work.record.clone(), events);
        }
        Ok(last)
    }

    /// Somebody wants its end. It ends by and by; the first one who asked is the reason.
    pub(super) async fn ask_to_end(&self, reason: Reason, message: &str) {
        if self.step(Command::End(reason), Vec::new()).is_ok() {
            self.lock().ending = Some(message.to_owned());
            self.writer.append(NewEvent::log(Severity::Info, "ending", message)).await;
            self.stop.cancel();
        }
    }

    /// Ends it here and now, where it has no session: it never ran, or its processes are gone already. Returns when
    /// that is durable.
    pub(super) async fn end_now(&self, reason: Reason, message: &str) {
        // Somebody may have asked for its end before; then theirs is the reason.
        let _ = self.step(Command::End(reason), Vec::new());
        let event = match reason {
            Reason::Cancelled => NewEvent::log(Severity::Info, "ending", message),
            _ => {
                self.lock().record.error = Some(message.to_owned());
                NewEvent::error(reason.as_str(), message, true, None)
            }
        };
        if let Ok(seq) = self.step(Command::Ended, vec![event]) {
            self.writer.committed(seq).await;
        }
    }

    /// Runs it, to its last event. `false` where something of its session could not be ended.
    pub(super) async fn live(&self, shared: &Shared, api_key: SecretString) -> bool {
        let started = self.step(Command::Start, Vec::new());
        let (ended, before, failure) = match started {
            Ok(_) => self.work(shared, api_key).await,
            // Its end was asked for in the moment of its turn.
            Err(_) => (Ended { nothing_left: true, ..Ended::default() }, Measured::default(), None),
        };
        let mut last_words = Vec::new();
        if !ended.nothing_left {
            last_words.push(NewEvent::log(
                Severity::Error,
                "processes_left",
                "Not every process of the session could be ended; the operator has to look.",
            ));
        }
        if let Some(failure) = failure.or_else(|| self.ended_by_others()) {
            self.lock().record.error = Some(failure.message.clone());
            last_words.push(NewEvent::error(&failure.code, &failure.message, true, failure.retry_after));
        }
        let usage = {
            let mut work = self.lock();
            ended.account(&before, &mut work.record.usage);
            work.current_tool = None;
            work.record.usage.clone()
        };
        last_words.push(NewEvent::new(crate::model::EventType::Usage, json!(usage)).severity(Severity::Debug));
        match self.step(Command::Ended, last_words) {
            Ok(seq) => {
                self.writer.committed(seq).await;
            }
            Err(rejected) => tracing::error!(execution = %self.id, %rejected, "an execution could not be ended"),
        }
        let work = self.lock();
        let reason = work.state.reason.unwrap_or(Reason::Internal);
        tracing::info!(execution = %self.id, status = work.state.status.as_str(), reason = reason.as_str(), "execution ended");
        ended.nothing_left
    }

    /// The failure to tell of where somebody else ended it: each execution that fails says why. A cancelled one has not
    /// failed.
    fn ended_by_others(&self) -> Option<Failure> {
        let work = self.lock();
        let reason = work.state.ending.filter(|reason| reason.status() == Status::Failed)?;
        Some(Failure::new(reason, reason.as_str(), work.ending.clone()?))
    }

    /// Gets a session, runs the task in it, and ends it. When this returns, [`Command::End`] was taken.
    async fn work(&self, shared: &Shared, api_key: SecretString) -> (Ended, Measured, Option<Failure>) {
        let record = self.lock().record.clone();
        let deadline = Instant::now() + record.task.timeout();
        shared.make_room().await;
        let session = self.session(shared, &record, api_key, deadline).await;
        let (mut session, warm) = match session {
            Ok(session) => session,
            Err(failure) => {
                let nothing = Ended { nothing_left: true, ..Ended::default() };
                return (nothing, Measured::default(), self.failed(failure));
            }
        };
        let protections = session.protections();
        self.lock().record.protections.clone_from(&protections);
        // A process of its own was started for it, or ahead for it.
        let before = if self.kept.is_some() { session.usage() } else { Measured::default() };
        let mut started = NewEvent::log(Severity::Info, "session_started", "OpenCode runs.");
        started.data["warm"] = json!(warm);
        started.data["protections"] = json!(protections);
        self.writer.append(started).await;
        if let Some(unknown) =
            self.kept.as_ref().filter(|_| record.ordinal == Some(NonZeroU32::MIN)).map(|k| &k.ignored)
            && !unknown.is_empty()
        {
            let message = format!("Fields that this version does not know were ignored: {}.", unknown.join(", "));
            let mut ignored = NewEvent::log(Severity::Warn, "unknown_fields", &message);
            ignored.data["fields"] = json!(unknown);
            self.writer.append(ignored).await;
        }
        let title = record.id.to_string();
        let run =
            Run { task: &record.task, title: &title, writer: &self.writer, observer: self, stop: &self.stop, deadline };
        let ending = run.run(&mut session).await;
        {
            let mut work = self.lock();
            work.record.final_message = ending.final_message;
            work.record.progress = ending.progress.progress;
            work.record.files_modified = ending.progress.files_modified;
            work.record.usage = Usage { cpu_seconds: None, ..ending.progress.usage };
        }
        // Refused where somebody asked for the end before; then theirs is the reason.
        let failure = match self.step(Command::End(ending.reason), Vec::new()) {
            Ok(_) => ending.failure,
            Err(_) => None,
        };
        for (call_id, tool) in &ending.open_tools {
            let data = json!({ "call_id": call_id, "tool": tool, "result": null, "error": "interrupted", "duration_ms": null });
            self.writer.append(NewEvent::new(crate::model::EventType::ToolResult, data).severity(Severity::Warn)).await;
        }
        let ended = match &self.kept {
            Some(kept) => kept.give_back(session, ending.settled).await,
            None => session.end(ending.reason == Reason::Finished).await,
        };
        (ended, before, failure)
    }

    fn failed(&self, failure: Failure) -> Option<Failure> {
        self.step(Command::End(failure.reason), Vec::new()).is_ok().then_some(failure)
    }

    async fn session(
        &self,
        shared: &Shared,
        record: &ExecutionRecord,
        api_key: SecretString,
        deadline: Instant,
    ) -> Result<(Session, bool), Failure> {
        let workdir = shared.workspace.workdir(record.task.workdir.as_deref()).map_err(|error| {
            Failure::new(Reason::Internal, "workdir", format!("The working directory cannot be used: {error}."))
        })?;
        let wanted = Wanted {
            id: record.session_id,
            profile: Profile { model: record.task.model.clone() },
            api_key,
            workdir,
            limits: record.task.limits,
            start_within: deadline.saturating_duration_since(Instant::now()),
            stop: self.stop.clone(),
        };
        let session = match &self.kept {
            Some(kept) => kept.take(shared, wanted).await,
            None => shared.sessions.acquire(wanted, None).await.map(|session| {
                let warm = session.is_warm();
                (session, warm)
            }),
        };
        session.map_err(|error| {
            if Instant::now() >= deadline {
                return Failure::new(
                    Reason::Timeout,
                    "timeout",
                    "The task's time was over before OpenCode had started.",
                );
            }
            tracing::error!(execution = %self.id, error = &error as &dyn std::error::Error, "no session");
            not_started(&error)
        })
    }
}

/// Why a session did not start, for the user.
pub(super) fn not_started(error: &SessionError) -> Failure {
    match error {
        SessionError::Refused(why) => Failure::new(Reason::SandboxUnavailable, "sandbox_unavailable", why.clone()),
        SessionError::NoUser => Failure::new(
            Reason::SandboxUnavailable,
            "sandbox_unavailable",
            "Every user of SESSION_UID_RANGE is in use; end sessions that nobody needs, or give it more.",
        ),
        SessionError::Launch(LaunchError::Ended { .. }) => {
            Failure::new(Reason::OpencodeCrashed, "opencode_start_failed", "OpenCode ended before it listened.")
        }
        SessionError::Launch(LaunchError::Timeout { within, .. }) => Failure::new(
            Reason::OpencodeUnresponsive,
            "opencode_start_failed",
            format!("OpenCode did not listen within {} s.", within.as_secs()),
        ),
        SessionError::Silent(_) | SessionError::PrimeTimeout => Failure::new(
            Reason::OpencodeUnresponsive,
            "opencode_start_failed",
            "OpenCode started, but does not answer.",
        ),
        _ => Failure::new(Reason::Internal, "session_failed", "The session could not be started."),
    }
}

impl Observer for Owner {
    fn progress(&self, progress: Progress) {
        let mut work = self.lock();
        work.record.progress = progress.progress;
        work.record.files_modified = progress.files_modified;
        work.record.usage = progress.usage;
        work.current_tool = progress.current_tool;
        self.writer.progress(work.record.clone());
    }
}
