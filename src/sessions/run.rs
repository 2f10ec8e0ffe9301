//! One execution in a session: the prompt, what comes back, the deadlines, and how it ended.
//!
//! One task waits for everything: OpenCode's events, its end, the broker's facts, the shells' output, the clock, and
//! the wish to end it. It never waits for one of them alone for long, and its end never depends on OpenCode
//! agreeing to it: what happens to the process after that is the caller's ([`super::Session::end`]).

mod again;
mod changes;
mod limits;

pub use again::KnownCalls;

use super::egress;
use super::session::Session;
use super::shell::Shells;
use crate::broker::{Exhausted, Facts, Outcome, Report, ShellCall};
use crate::events::Writer;
use crate::failpoint;
use crate::model::event::{EventType, NewEvent, Severity};
use crate::model::request::OnRestart;
use crate::model::{Reason, Task, Usage};
use crate::opencode::client::{ClientError, EventStream, Prompt};
use crate::opencode::outcome::{Evidence, Failure, ModelEvidence, Verdict, decide, decide_at_last};
use crate::opencode::translate::{Signal, Step, Translator};
use crate::opencode::wire::{MessageInfo, RawEvent};
use crate::sandbox::{Resource, ResourceEvents};
use crate::telemetry::ModelCallOutcome;
use again::Again;
use chrono::Utc;
use futures_util::stream::{FuturesUnordered, StreamExt};
use limits::{disk_exhausted, disk_full, felt};
use serde_json::json;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How often the deadlines are looked at.
const TICK: Duration = Duration::from_secs(1);
/// How long an idle OpenCode may take to complete its last message, and one whose calls are refused to become idle.
const SETTLE: Duration = Duration::from_secs(5);
/// How long the rest of a session may take to end, once OpenCode has ended by itself.
const GONE: Duration = Duration::from_secs(15);
/// How many shell commands of one run may send output at the same time.
const MAX_SHELLS: usize = 64;

/// How far a run is; written to its record from time to time.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    pub progress: Option<u8>,
    pub current_tool: Option<String>,
    pub files_modified: Vec<String>,
    pub usage: Usage,
}

/// Is told how far a run is.
pub trait Observer: Send + Sync {
    /// Called at each change.
    fn progress(&self, progress: Progress);
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Ending {
    pub reason: Reason,
    /// What to tell the user, where it failed.
    pub failure: Option<Failure>,
    pub final_message: Option<String>,
    /// How far it was in the end.
    pub progress: Progress,
    /// Calls of tools that have no result, each with its tool.
    pub open_tools: Vec<(String, String)>,
    /// OpenCode was idle at the end: it can take another prompt.
    pub settled: bool,
}

/// What a run works with.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub task: &'a Task,
    pub title: &'a str,
    /// Where the session's conversation is of an earlier life of the sidecar: what that one's log has. An agent that has got
    /// the task already is told what was cut off instead.
    pub again: Option<&'a KnownCalls>,
    pub writer: &'a Writer,
    pub observer: &'a dyn Observer,
    /// Told when somebody wants the end; the run stops at once and the reason is theirs.
    pub stop: &'a CancellationToken,
    /// When the whole run's time is over.
    pub deadline: Instant,
}

impl std::fmt::Debug for Run<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Run").field("title", &self.title).finish_non_exhaustive()
    }
}

impl Run<'_> {
    /// Runs the task in the session, to its end. The process is left as it is.
    pub async fn run(&self, session: &mut Session) -> Ending {
        // Worth nothing elsewhere; but tools print their proxy, and nobody has to see it.
        self.writer.hide(session.lease.token());
        self.writer.hide(session.lease.proxy_token());
        let patience = session.shared.settings.unresponsive_timeout;
        let last_message = session.last_message.take();
        let prepared = tokio::select! {
            prepared = tokio::time::timeout(patience, self.prepare(session, last_message)) => prepared.unwrap_or_else(|_| {
                Err(unresponsive(format!("OpenCode did not take the task within {} s.", patience.as_secs())))
            }),
            exit = session.server.process.exited() => Err(crashed(session, &exit.to_string()).await),
            () = self.stop.cancelled() => return stopped(),
            () = tokio::time::sleep_until(self.deadline) => Err(timed_out(self.task)),
        };
        let Prepared { stream, conversation, before } = match prepared {
            Ok(prepared) => prepared,
            Err(failure) => return ending(Err(failure), &Translator::new("", ""), Usage::default()),
        };
        session.conversation = Some(conversation.clone());
        let mut state = State::new(self, session, stream, conversation);
        state.before = before;
        let result = state.until_end().await;
        state.tell_last_felt().await;
        for event in state.translator.abandon_texts() {
            self.writer.append(event).await;
        }
        for refusal in state.session.lease.refused_at_last() {
            self.writer.append(egress::event(&refusal)).await;
        }
        state.tell_changes(matches!(result, Some(Ok(())))).await;
        let usage = state.usage();
        match result {
            None => Ending { reason: Reason::Cancelled, ..ending(Ok(()), &state.translator, usage) },
            Some(result) => {
                let responds = result.as_ref().err().is_none_or(|f| f.reason != Reason::OpencodeUnresponsive);
                let settled = responds && state.idle_since.is_some() && state.stopping_since.is_none();
                Ending { settled, ..ending(result, &state.translator, usage) }
            }
        }
    }

    /// `last_message` is the conversation's, where it is known.
    async fn prepare(&self, session: &Session, last_message: Option<String>) -> Result<Prepared, Failure> {
        let unresponsive = |error: ClientError| {
            tracing::warn!(error = &error as &dyn std::error::Error, "OpenCode does not take the task");
            unresponsive(format!("OpenCode does not take the task: {error}."))
        };
        let client = &session.client;
        let conversation = async {
            let Some(conversation) = &session.conversation else {
                return Ok((client.create_session(self.title).await?, None));
            };
            let before = match last_message {
                Some(id) => Some(id),
                None => client.last_message(conversation).await?.map(|message| message.info.id),
            };
            Ok((conversation.clone(), before))
        };
        // Each answer takes OpenCode some 15 ms.
        let (stream, (conversation, before)) = tokio::try_join!(client.events(), conversation).map_err(unresponsive)?;
        let text = match (self.again, &before) {
            (Some(known), Some(_)) => {
                let messages = client.messages(&conversation).await.map_err(unresponsive)?;
                let Again { events, text } = known.again(&messages);
                for event in events {
                    self.writer.append(event).await;
                }
                text
            }
            _ => self.task.prompt_text(),
        };
        failpoint::pass("run-conversation");
        if self.task.on_restart == OnRestart::Resume {
            // Before the prompt: without it a later life would take the task for one that was never begun.
            self.writer.keep_conversation(&conversation).await;
        }
        let prompt =
            Prompt { text: &text, agent: self.task.agent.as_deref(), system: self.task.system_prompt.as_deref() };
        failpoint::pass("run-unprompted");
        client.prompt(&conversation, &prompt).await.map_err(unresponsive)?;
        failpoint::pass("run-prompted");
        Ok(Prepared { stream, conversation, before })
    }
}

/// A prompt that OpenCode has taken.
struct Prepared {
    stream: EventStream,
    conversation: String,
    /// The last message of the conversation before it.
    before: Option<String>,
}

fn stopped() -> Ending {
    Ending {
        reason: Reason::Cancelled,
        failure: None,
        final_message: None,
        progress: Progress::default(),
        open_tools: Vec::new(),
        settled: false,
    }
}

fn ending(result: Result<(), Failure>, translator: &Translator, usage: Usage) -> Ending {
    let failure = result.err();
    Ending {
        reason: failure.as_ref().map_or(Reason::Finished, |failure| failure.reason),
        failure,
        final_message: translator.final_text().map(str::to_owned),
        progress: progress_of(translator, usage),
        open_tools: translator.open_tools(),
        settled: false,
    }
}

fn progress_of(translator: &Translator, usage: Usage) -> Progress {
    Progress {
        progress: translator.progress(),
        current_tool: translator.current_tool().map(str::to_owned),
        files_modified: translator.files().to_vec(),
        usage,
    }
}

/// OpenCode has ended by itself, or for want of something. Its jail ends the rest, and then says which.
async fn crashed(session: &Session, how: &str) -> Failure {
    tracing::warn!(how, lines = session.server.last_lines(), "OpenCode ended by itself");
    let gone = tokio::time::timeout(GONE, session.server.process.gone()).await;
    match gone.ok().and_then(|gone| gone.exhausted) {
        Some(Resource::Memory) => Failure::new(
            Reason::OomKilled,
            "oom_killed",
            "The session's memory was used up, and OpenCode itself was ended for it.",
        ),
        Some(Resource::Pids) => Failure::new(
            Reason::PidsExhausted,
            "pids_exhausted",
            "The session had as many processes as it may, and OpenCode itself ended for want of one.",
        ),
        None => {
            let message = format!("The OpenCode process ended by itself ({how}).");
            Failure::new(Reason::OpencodeCrashed, "opencode_crashed", message)
        }
    }
}

fn unresponsive(message: String) -> Failure {
    Failure::new(Reason::OpencodeUnresponsive, "opencode_unresponsive", message)
}

/// What became of an event stream, for people.
fn how_lost(error: &ClientError) -> String {
    match error {
        ClientError::Stream(error) => error.to_string(),
        ClientError::Garbage(_) => "it holds something that is no event".to_owned(),
        _ => "its connection broke".to_owned(),
    }
}

fn timed_out(task: &Task) -> Failure {
    let message = format!("The task was not done within its {} s.", task.timeout_seconds);
    Failure::new(Reason::Timeout, "timeout", message)
}

/// A run under way.
struct State<'a> {
    run: &'a Run<'a>,
    session: &'a mut Session,
    stream: EventStream,
    conversation: String,
    /// The last message of the conversation before the prompt: it tells nothing of this run.
    before: Option<String>,
    translator: Translator,
    shells: Shells,
    /// The agent was seen at work at least once.
    worked: bool,
    prompted: Instant,
    /// Looks at the clock since OpenCode's last event. They are counted, and no time is measured: what this process did
    /// not run itself is no silence of OpenCode's.
    silent_ticks: u32,
    last_sign: Instant,
    /// What was told of limits that were felt.
    felt: ResourceEvents,
    /// Since when OpenCode is idle.
    idle_since: Option<Instant>,
    /// Since when it calls itself idle although its last message is not completed.
    stopping_since: Option<Instant>,
    /// Something that the agent asked for was refused, since nobody can answer: OpenCode stops then.
    permission_refused: bool,
    /// The broker refuses every further call, for this reason; and until when OpenCode may take that in.
    winding_down: Option<(Failure, Instant)>,
}

impl<'a> State<'a> {
    fn new(run: &'a Run<'a>, session: &'a mut Session, stream: EventStream, conversation: String) -> Self {
        let now = Instant::now();
        let workdir = session.wanted.workdir.to_string_lossy().into_owned();
        // Not by the last look: what the run before this one told at its end may be newer.
        let felt = session.server.process.handle().resource_events_now().unwrap_or_default();
        Self {
            run,
            translator: Translator::new(&conversation, &workdir),
            session,
            stream,
            conversation,
            before: None,
            shells: Shells::new(),
            worked: false,
            prompted: now,
            silent_ticks: 0,
            last_sign: now,
            felt,
            idle_since: None,
            stopping_since: None,
            permission_refused: false,
            winding_down: None,
        }
    }

    /// `None` where somebody wanted the end.
    async fn until_end(&mut self) -> Option<Result<(), Failure>> {
        let mut facts = self.session.lease.facts();
        let mut calls = self.session.lease.take_shell_calls();
        let mut output = self.shells.output();
        let mut reports = self.session.lease.take_reports();
        let process = self.session.server.process.handle();
        let mut quiet_until = Instant::now();
        let mut under_way = FuturesUnordered::new();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let wound_down = self.winding_down.as_ref().map_or_else(|| self.run.deadline, |(_, until)| *until);
            // The order is the order of precedence: a wish to end goes first, what the shells wrote is taken in before
            // OpenCode's word that they have ended, and OpenCode, which may never stop talking, is last.
            let step = tokio::select! {
                biased;
                () = self.run.stop.cancelled() => break None,
                () = tokio::time::sleep_until(wound_down.min(self.run.deadline)) => break Some(Err(self.time_over())),
                exit = process.exited() => break Some(Err(crashed(self.session, &exit.to_string()).await)),
                Ok(()) = facts.changed() => {
                    let exhausted = model_evidence(&facts.borrow_and_update()).exhausted;
                    if let (None, Some(failure)) = (&self.winding_down, exhausted) {
                        self.winding_down = Some((failure, Instant::now() + SETTLE));
                    }
                    None
                }
                Some(call) = calls.recv(), if under_way.len() < MAX_SHELLS => {
                    let call: ShellCall = call;
                    under_way.push(self.shells.clone().take_in(call, self.run.writer.clone()));
                    None
                }
                Some(()) = under_way.next() => None,
                Some(report) = reports.recv() => {
                    self.session.shared.metrics.model_call(outcome_of(&report));
                    None
                }
                refused = self.session.lease.refused() => {
                    for refusal in refused {
                        self.run.writer.append(egress::event(&refusal)).await;
                    }
                    None
                }
                events = felt(&process, self.felt, &mut quiet_until) => {
                    self.tell_felt(self.felt, events).await;
                    self.felt = events;
                    None
                }
                added = disk_exhausted(self.session.disk.as_ref()) => Some(Err(disk_full(self.run.task, added.bytes))),
                Ok(()) = output.changed() => self.too_much_output(output.borrow_and_update().bytes).map(Err),
                _ = tick.tick() => {
                    let (facts, last_output) = (facts.borrow().clone(), output.borrow().last);
                    self.look_at_the_clock(&facts, last_output).await
                }
                event = self.stream.next() => match event {
                    Ok(Some(event)) => self.event(&event).await,
                    Ok(None) => self.lost_stream("it ended").await,
                    Err(error) => {
                        tracing::warn!(error = &error as &dyn std::error::Error, "OpenCode's event stream is lost");
                        self.lost_stream(&how_lost(&error)).await
                    }
                },
            };
            if let Some(result) = step {
                break Some(result);
            }
        }
    }

    /// The stream may break just because the process ended; that is the better thing to say then. `None` where somebody
    /// wanted the end meanwhile.
    async fn lost_stream(&self, how: &str) -> Option<Result<(), Failure>> {
        let failure = tokio::select! {
            () = self.run.stop.cancelled() => return None,
            exit = self.session.server.process.exited() => crashed(self.session, &exit.to_string()).await,
            () = tokio::time::sleep(SETTLE) => Failure::new(
                Reason::OpencodeUnresponsive,
                "opencode_stream_lost",
                format!("OpenCode's event stream was lost although its process still runs: {how}."),
            ),
        };
        Some(Err(failure))
    }

    async fn event(&mut self, event: &RawEvent) -> Option<Result<(), Failure>> {
        self.silent_ticks = 0;
        if event.kind == "server.heartbeat" {
            return None;
        }
        let Step { events, signal, shell_started, tool_ended } =
            self.translator.translate(event, Utc::now().timestamp_millis());
        let told = events.iter().any(|e| {
            matches!(
                e.kind,
                EventType::ToolCall | EventType::ToolResult | EventType::Todo | EventType::File | EventType::Usage
            )
        });
        if event.session_id().is_some() {
            self.last_sign = Instant::now();
        }
        if events.iter().any(|event| event.kind == EventType::ToolCall) {
            failpoint::pass("run-call");
        }
        self.write(events).await;
        if let Some((call_id, command)) = shell_started {
            self.shells.announced(call_id, command);
        }
        if let Some(call_id) = tool_ended {
            self.shells.ended(&call_id);
        }
        if told {
            let progress = progress_of(&self.translator, self.usage());
            self.run.observer.progress(progress);
        }
        match signal {
            None => self.still_idle().await,
            Some(signal) => self.signal(signal).await,
        }
    }

    async fn signal(&mut self, signal: Signal) -> Option<Result<(), Failure>> {
        match signal {
            Signal::Busy => {
                self.worked = true;
                self.idle_since = None;
                self.stopping_since = None;
            }
            Signal::Stopping => {
                self.stopping_since.get_or_insert_with(Instant::now);
            }
            Signal::Idle => {
                self.stopping_since = None;
                self.idle_since.get_or_insert_with(Instant::now);
                return self.still_idle().await;
            }
            Signal::Retry { wait_ms } => {
                self.worked = true;
                let wait = Duration::from_millis(u64::try_from(wait_ms).unwrap_or(0));
                if wait >= self.session.shared.settings.stall_timeout {
                    let evidence = model_evidence(&self.session.lease.facts().borrow());
                    return Some(Err(evidence.last_error.unwrap_or_else(|| {
                        Failure::new(
                            Reason::ModelError,
                            "model_unavailable",
                            format!("The model's provider asks to wait for {} s.", wait.as_secs()),
                        )
                    })));
                }
            }
            // Seen again by the decision at the next idle. One that comes before any work may have none.
            Signal::Error(_) => {}
            Signal::PermissionAsked { request_id } => {
                let refused = self.ask("refuse permission", self.session.client.refuse_permission(&request_id)).await?;
                self.permission_refused = true;
                let answer = json!({ "request_id": request_id, "reply": "reject", "by": "sidecar" });
                self.answered(EventType::Permission, refused, answer).await;
            }
            Signal::QuestionAsked { request_id } => {
                let refused = self.ask("reject question", self.session.client.reject_question(&request_id)).await?;
                self.permission_refused = true;
                self.answered(EventType::Question, refused, json!({ "request_id": request_id, "answers": null })).await;
            }
        }
        None
    }

    /// Asks OpenCode something. `None` where that became pointless meanwhile; the next round says why.
    async fn ask<T>(
        &self,
        call: &'static str,
        asked: impl Future<Output = Result<T, ClientError>>,
    ) -> Option<Result<T, ClientError>> {
        let patience = self.session.shared.settings.unresponsive_timeout;
        tokio::select! {
            biased;
            () = self.run.stop.cancelled() => None,
            () = tokio::time::sleep_until(self.run.deadline) => None,
            _ = self.session.server.process.exited() => None,
            answer = tokio::time::timeout(patience, asked) => {
                Some(answer.unwrap_or(Err(ClientError::Timeout { call })))
            }
        }
    }

    /// The agent has what it waited for, where OpenCode took it; else it waits on, and a clock ends that.
    async fn answered(&self, kind: EventType, taken: Result<(), ClientError>, data: serde_json::Value) {
        match taken {
            Ok(()) => {
                self.run.writer.append(NewEvent::new(kind, data).severity(Severity::Warn)).await;
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, kind = kind.as_str(), "OpenCode does not take an answer");
            }
        }
    }

    /// Decides, where OpenCode is idle and its last message tells how it ended.
    async fn still_idle(&mut self) -> Option<Result<(), Failure>> {
        let since = self.idle_since?;
        if let Some((failure, _)) = &self.winding_down {
            return Some(Err(failure.clone()));
        }
        let last = self.ask("messages", self.last_assistant()).await?;
        let unread = last.as_ref().err().map(|error| {
            tracing::warn!(error = error as &dyn std::error::Error, "OpenCode's messages cannot be read");
            unresponsive(format!("OpenCode has stopped, but cannot be asked how: {error}."))
        });
        let last = last.ok().flatten();
        let facts = self.session.lease.facts().borrow().clone();
        let evidence = Evidence {
            last_assistant: last.as_ref(),
            error: self.translator.pending_error(),
            model: model_evidence(&facts),
            permission_refused: self.permission_refused,
        };
        match decide(&evidence) {
            Verdict::Finished => {
                self.session.last_message = last.map(|info| info.id);
                Some(Ok(()))
            }
            Verdict::Failed(failure) => Some(Err(failure)),
            Verdict::Undecided if since.elapsed() >= SETTLE => {
                Some(Err(unread.unwrap_or_else(|| decide_at_last(&evidence))))
            }
            Verdict::Undecided => None,
        }
    }

    async fn last_assistant(&self) -> Result<Option<MessageInfo>, ClientError> {
        let last = self.session.client.last_message(&self.conversation).await?.map(|message| message.info);
        Ok(last.filter(|info| info.role == "assistant" && Some(&info.id) != self.before.as_ref()))
    }

    /// The run's own time is over, or the time that OpenCode had to stop by itself.
    fn time_over(&self) -> Failure {
        self.winding_down.as_ref().map_or_else(|| timed_out(self.run.task), |(failure, _)| failure.clone())
    }

    fn too_much_output(&self, bytes: u64) -> Option<Failure> {
        let limit = self.run.task.limits.output_bytes;
        (bytes > limit).then(|| {
            Failure::new(
                Reason::BudgetExceeded,
                "output_bytes",
                format!("The task's shell commands wrote more than its {limit} bytes of output."),
            )
        })
    }

    async fn look_at_the_clock(&mut self, facts: &Facts, last_output: Instant) -> Option<Result<(), Failure>> {
        if self.run.writer.head().borrow().lost {
            let message = "The execution's log cannot be written; it ends, since nobody could see what it does.";
            return Some(Err(Failure::new(Reason::Internal, "log_lost", message)));
        }
        self.silent_ticks += 1;
        // A message that is never completed was given up in the middle.
        if self.stopping_since.is_some_and(|since| since.elapsed() >= SETTLE) {
            self.idle_since = self.idle_since.or(self.stopping_since);
        }
        if self.idle_since.is_some() {
            return self.still_idle().await;
        }
        let settings = &self.session.shared.settings;
        if TICK * self.silent_ticks > settings.unresponsive_timeout {
            let silence = settings.unresponsive_timeout.as_secs();
            return Some(Err(unresponsive(format!("OpenCode sent no sign of life for {silence} s."))));
        }
        if !self.worked && self.prompted.elapsed() > settings.first_event_timeout {
            // Where it reported an error and never began, that is what happened.
            let failure = match self.translator.pending_error() {
                Some(error) => decide_error(error, facts),
                None => Failure::new(
                    Reason::OpencodeUnresponsive,
                    "opencode_no_first_event",
                    "OpenCode took the prompt, but did not begin to work.",
                ),
            };
            return Some(Err(failure));
        }
        let last_sign = self.last_sign.max(last_output).max(Instant::from_std(facts.last_activity));
        // A tool may take its time, and has OpenCode's own deadline; the broker has clocks for the model.
        let waiting_for_something = self.translator.tool_running() || facts.in_flight > 0;
        if !waiting_for_something && last_sign.elapsed() > settings.stall_timeout {
            return Some(Err(Failure::new(
                Reason::Stalled,
                "stalled",
                format!(
                    "Nothing happened for {} s: no tool ran and no call of the model.",
                    settings.stall_timeout.as_secs()
                ),
            )));
        }
        None
    }

    fn usage(&self) -> Usage {
        let (input_tokens, output_tokens, cost) = self.translator.spent();
        let facts = self.session.lease.facts();
        let (model_calls, told) = {
            let facts = facts.borrow();
            (facts.calls, facts.cost)
        };
        // What the provider says it costs is better than what OpenCode computes, which knows few prices.
        let cost = if told > 0.0 { told } else { cost };
        let measured = self.session.usage();
        Usage {
            input_tokens,
            output_tokens,
            model_calls,
            cost,
            memory_bytes: measured.memory_bytes,
            memory_peak_bytes: measured.memory_peak_bytes,
            pids: measured.pids,
            ..Usage::default()
        }
    }
}

fn outcome_of(report: &Report) -> ModelCallOutcome {
    match &report.outcome {
        Outcome::Finished(_) => ModelCallOutcome::Ok,
        Outcome::Failed(error) if error.http_status.is_some() => ModelCallOutcome::Refused,
        Outcome::Failed(_) => ModelCallOutcome::Failed,
        Outcome::Abandoned => ModelCallOutcome::Cancelled,
    }
}

fn decide_error(error: &crate::opencode::wire::NamedError, facts: &Facts) -> Failure {
    let evidence = Evidence { error: Some(error), model: model_evidence(facts), ..Evidence::default() };
    match decide(&evidence) {
        Verdict::Failed(failure) => failure,
        Verdict::Finished | Verdict::Undecided => decide_at_last(&evidence),
    }
}

/// The broker's facts as evidence. An error counts only while no later call went well.
fn model_evidence(facts: &Facts) -> ModelEvidence {
    let last_error = facts.last_error.as_ref().filter(|_| facts.failures_in_a_row > 0).map(|error| Failure {
        reason: Reason::ModelError,
        code: error.code.to_owned(),
        message: error.message.clone(),
        retry_after: error.retry_after,
    });
    let exhausted = facts.exhausted.as_ref().map(|exhausted| match exhausted {
        Exhausted::ModelCalls => Failure::new(
            Reason::BudgetExceeded,
            "model_calls",
            "The task has used up its calls of the model (limits.model_calls).",
        ),
        Exhausted::TotalTokens => Failure::new(
            Reason::BudgetExceeded,
            "total_tokens",
            "The task has used up its tokens (limits.total_tokens).",
        ),
        Exhausted::Rate => Failure::new(
            Reason::BudgetExceeded,
            "model_rate",
            "The task called the model more often within a minute than MODEL_CALLS_PER_MINUTE allows.",
        ),
        Exhausted::Failures => last_error
            .clone()
            .unwrap_or_else(|| Failure::new(Reason::ModelError, "model_error", "The model failed too often in a row.")),
    });
    ModelEvidence { last_error, exhausted }
}
