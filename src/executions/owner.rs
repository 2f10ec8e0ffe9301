//! The life of one execution, from its turn to its last event.
//!
//! The owner alone writes to the execution's log once it runs, and decides nothing by itself: each step goes through
//! the state machine, whose effects it carries out. Who wants its end says so to the state machine and then
//! raises a flag that the run looks at before anything else; no queue is between.

use super::Shared;
use super::kept::Kept;
use crate::events::Writer;
use crate::failpoint;
use crate::model::event::{NewEvent, Severity};
use crate::model::execution::{Command, Effect, Rejected, State, apply};
use crate::model::request::OnRestart;
use crate::model::task::Limits;
use crate::model::{ExecutionId, ExecutionRecord, Reason, Status, Usage};
use crate::opencode::launch::LaunchError;
use crate::opencode::outcome::Failure;
use crate::opencode::profile::Profile;
use crate::sessions::{Ended, KnownCalls, Measured, Observer, Parked, Progress, Run, Session, SessionError, Wanted};
use crate::store::{Outcome, OutcomeFailure};
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
    /// What it goes on from, until it does.
    resumption: Mutex<Option<Resumption>>,
    /// What it had used and changed in earlier lives of the sidecar.
    before: (Usage, Vec<String>),
    stop: CancellationToken,
}

/// What an earlier life of the sidecar left of an execution that is resumed.
#[derive(Debug)]
pub(super) struct Resumption {
    pub(super) parked: Parked,
    pub(super) known: KnownCalls,
}

#[derive(Debug)]
struct Work {
    state: State,
    record: ExecutionRecord,
    current_tool: Option<String>,
    /// What the first one who wanted its end had to say.
    ending: Option<String>,
    /// It stops without an end: a later life of the sidecar goes on with it.
    suspended: bool,
}

impl Owner {
    pub(super) fn new(
        record: ExecutionRecord,
        writer: Writer,
        kept: Option<Arc<Kept>>,
        resumption: Option<Resumption>,
    ) -> Self {
        let state = State::of(&record);
        Self {
            id: record.id,
            writer,
            before: (record.usage.clone(), record.files_modified.clone()),
            work: Mutex::new(Work { state, record, current_tool: None, ending: None, suspended: false }),
            kept,
            resumption: Mutex::new(resumption),
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

    /// The sidecar goes away: it stops without an end where a later life can go on with it. `false` where it cannot.
    pub(super) async fn ask_to_suspend(&self) -> bool {
        {
            let mut work = self.lock();
            let resumes = work.record.task.on_restart == OnRestart::Resume && self.kept.is_none();
            if !resumes || work.state.ending.is_some() || work.state.status.is_final() {
                return false;
            }
            work.suspended = true;
        }
        let message = "The sidecar shuts down; the task goes on after its restart.";
        self.writer.append(NewEvent::log(Severity::Info, "suspended", message)).await;
        self.stop.cancel();
        true
    }

    fn is_suspended(&self) -> bool {
        let work = self.lock();
        work.suspended && work.state.ending.is_none()
    }

    /// It was taken up after a restart: its open calls have no result, and it waits for its turn. `false` where that did not
    /// get onto the disk.
    pub(super) async fn restarted(&self, cut_off: Vec<NewEvent>, message: &str) -> bool {
        let calls: Vec<_> = cut_off.iter().map(|call| call.data["call_id"].clone()).collect();
        let severity = if calls.is_empty() { Severity::Info } else { Severity::Warn };
        for call in cut_off {
            self.writer.append(call).await;
        }
        let mut event = NewEvent::log(severity, "restarted", message);
        event.data["interrupted_calls"] = json!(calls);
        let seq = self.writer.append(event).await;
        // With its generation, and with its epoch.
        self.writer.progress(self.lock().record.clone());
        self.writer.committed(seq).await
    }

    /// What is left to do is to end its processes: should the sidecar go away over that, the next life knows how it ended.
    fn keep_outcome(&self, reason: Reason, failure: Option<&Failure>) {
        let failure = failure.map(|failure| OutcomeFailure {
            code: failure.code.clone(),
            message: failure.message.clone(),
            retry_after: failure.retry_after,
        });
        self.writer.progress(self.lock().record.clone());
        self.writer.keep_outcome(Outcome { reason, failure });
    }

    /// Ends what an earlier life of the sidecar has left: its processes are gone. `last_words` go before all else.
    pub(super) async fn end_as(&self, outcome: Outcome, mut last_words: Vec<NewEvent>) {
        let _ = self.step(Command::End(outcome.reason), Vec::new());
        if let Some(OutcomeFailure { code, message, retry_after }) = outcome.failure {
            last_words.push(NewEvent::error(&code, &message, true, retry_after));
            self.lock().record.error = Some(message);
        }
        if let Ok(seq) = self.step(Command::Ended, last_words) {
            self.writer.committed(seq).await;
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
        let begin = if self.lock().state.started_at.is_none() { Command::Start } else { Command::Restart };
        let started = self.step(begin, Vec::new());
        failpoint::pass("run-begun");
        let (ended, before, failure) = match started {
            Ok(_) => self.work(shared, api_key).await,
            // Its end was asked for in the moment of its turn.
            Err(_) => (Ended { nothing_left: true, ..Ended::default() }, Measured::default(), None),
        };
        if self.is_suspended() {
            tracing::info!(execution = %self.id, "execution suspended");
            self.writer.progress(self.lock().record.clone());
            return ended.nothing_left;
        }
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
        failpoint::pass("end-begun");
        match self.step(Command::Ended, last_words) {
            Ok(seq) => {
                failpoint::pass("end-queued");
                self.writer.committed(seq).await;
                failpoint::pass("end-durable");
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
        let used = self.lock().state.running_time(Utc::now()).to_std().unwrap_or_default();
        let deadline = Instant::now() + record.task.timeout().saturating_sub(used);
        shared.make_room().await;
        let resumption = self.resumption.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (parked, known) = resumption.map(|Resumption { parked, known }| (parked, known)).unzip();
        let session = self.session(shared, &record, api_key, parked, deadline).await;
        let (mut session, warm) = match session {
            Ok(session) => session,
            // As if it had never been tried.
            Err(_) if self.is_suspended() => {
                return (Ended { nothing_left: true, ..Ended::default() }, Measured::default(), None);
            }
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
        let run = Run {
            task: &record.task,
            title: &title,
            again: known.as_ref(),
            writer: &self.writer,
            observer: self,
            stop: &self.stop,
            deadline,
        };
        let ending = run.run(&mut session).await;
        failpoint::pass("run-over");
        self.take_over(ending.progress);
        // What ended by itself in that moment has ended.
        if ending.reason == Reason::Cancelled && self.is_suspended() {
            return (session.park(false).await.0, before, None);
        }
        self.lock().record.final_message = ending.final_message;
        // Refused where somebody asked for the end before; then theirs is the reason.
        let failure = match self.step(Command::End(ending.reason), Vec::new()) {
            Ok(_) => {
                self.keep_outcome(ending.reason, ending.failure.as_ref());
                ending.failure
            }
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
        parked: Option<Parked>,
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
            limits: self.limits_left(&record.task.limits),
            start_within: deadline.saturating_duration_since(Instant::now()),
            stop: self.stop.clone(),
        };
        let session = match &self.kept {
            Some(kept) => kept.take(shared, wanted).await,
            None => {
                let session = shared.sessions.acquire(wanted, parked.as_ref()).await;
                if let (Err(_), Some(parked), false) = (&session, parked, self.is_suspended()) {
                    parked.discard();
                }
                session.map(|session| {
                    let warm = session.is_warm();
                    (session, warm)
                })
            }
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

impl Owner {
    /// How far it is, with what it had done before the sidecar's restart.
    fn take_over(&self, progress: Progress) {
        let (usage, files) = &self.before;
        let mut work = self.lock();
        work.record.progress = progress.progress.or(work.record.progress);
        work.record.usage = usage.and_then(progress.usage);
        work.record.files_modified.clone_from(files);
        for file in progress.files_modified {
            if !files.contains(&file) {
                work.record.files_modified.push(file);
            }
        }
        work.current_tool = progress.current_tool;
    }

    /// What it may still use of the model.
    fn limits_left(&self, limits: &Limits) -> Limits {
        let Usage { model_calls, input_tokens, output_tokens, .. } = self.before.0;
        Limits {
            model_calls: limits.model_calls.saturating_sub(model_calls),
            total_tokens: limits.total_tokens.saturating_sub(input_tokens + output_tokens),
            ..*limits
        }
    }
}

impl Observer for Owner {
    fn progress(&self, progress: Progress) {
        self.take_over(progress);
        self.writer.progress(self.lock().record.clone());
    }
}
