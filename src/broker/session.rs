//! What the broker knows of one session: its grant, its counters, and the lease that keeps it open.

use super::egress::Way;
use super::error::{ModelError, Said};
use super::observe::Observer;
use super::{BrokerConfig, Budget, Grant, Sessions, Upstream};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use rand::RngCore;
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use subtle::ConstantTimeEq;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Calls of one session that are under way at once; more wait. Bounds the memory for their bodies and the connections to the
/// provider.
const MAX_IN_FLIGHT: usize = 16;
/// Reports that wait to be taken.
const REPORTS: usize = 64;
/// Shell calls that wait to be taken.
const SHELL_CALLS: usize = 16;
/// What [`BrokerConfig::calls_per_minute`] counts within.
const MINUTE: Duration = Duration::from_secs(60);

/// Why the broker refuses every further call of an execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exhausted {
    /// [`Budget::model_calls`] are used up and another call came.
    ModelCalls,
    /// [`Budget::total_tokens`] are used up and another call came.
    TotalTokens,
    /// [`super::BrokerConfig::calls_per_minute`] began within a minute and another call came.
    Rate,
    /// [`super::BrokerConfig::max_failures`] calls in a row failed.
    Failures,
}

impl Exhausted {
    /// A sentence for the user. No word in it makes OpenCode repeat the call.
    pub fn message(self) -> &'static str {
        match self {
            Self::ModelCalls => "the execution has used up the model calls that it was allowed",
            Self::TotalTokens => "the execution has used up the tokens that it was allowed",
            Self::Rate => "the execution has called the model more often within a minute than it is allowed",
            Self::Failures => "too many calls of the model failed in a row",
        }
    }

    pub(super) fn code(self) -> &'static str {
        match self {
            Self::ModelCalls | Self::TotalTokens | Self::Rate => "budget_exceeded",
            Self::Failures => "model_error",
        }
    }
}

/// Counters of the present execution. They start anew with [`Lease::reset`], but for `in_flight`.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Calls taken for forwarding, failed ones and retries included; what was refused or primed is not counted.
    pub calls: u64,
    /// Failed or unfinished calls since the last good one.
    pub failures_in_a_row: u32,
    /// As the provider counts them; 0 for a provider that does not say.
    pub input_tokens: u64,
    pub output_tokens: u64,
    /// In US dollars, as the provider says it in its answers; 0 for one that does not say.
    pub cost: f64,
    /// The last call's error; a good call clears it.
    pub last_error: Option<ModelError>,
    /// Calls under way, those of an earlier execution included.
    pub in_flight: u32,
    /// When the last byte passed, in any direction. Receivers are not woken for this member alone.
    pub last_activity: Instant,
    /// Set once and for the rest of the execution: the broker refuses every call.
    pub exhausted: Option<Exhausted>,
}

impl Facts {
    fn new(in_flight: u32) -> Self {
        Self {
            calls: 0,
            failures_in_a_row: 0,
            input_tokens: 0,
            output_tokens: 0,
            cost: 0.0,
            last_error: None,
            in_flight,
            last_activity: Instant::now(),
            exhausted: None,
        }
    }
}

/// How a call ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With a finish reason, in the provider's word.
    Finished(String),
    Failed(ModelError),
    /// OpenCode closed the connection before the end.
    Abandoned,
}

/// A call that has ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its number within the execution, from 1.
    pub call: u64,
    pub outcome: Outcome,
    pub input_tokens: u64,
    pub output_tokens: u64,
    /// From the request to the first byte of the answer's body.
    pub first_byte: Option<Duration>,
    /// From the request to the end.
    pub duration: Duration,
}

/// A shell tap's upload: the frames of one shell command, as raw pieces of the body.
#[derive(Debug)]
pub struct ShellCall {
    /// The body as it arrives, split anywhere. Its end is the end of the body, or of the connection.
    pub frames: mpsc::Receiver<Bytes>,
    /// To be told when everything is taken; only then the tap gets its 204. Dropped untold, the tap gets a 503.
    pub done: oneshot::Sender<()>,
}

/// When the calls of the last minute began, the oldest first; never more than may begin in one.
#[derive(Debug, Default)]
struct Recent(VecDeque<Instant>);

impl Recent {
    /// How many calls began within the minute before now.
    fn count(&mut self, now: Instant) -> usize {
        while self.0.front().is_some_and(|began| now.duration_since(*began) >= MINUTE) {
            self.0.pop_front();
        }
        self.0.len()
    }
}

#[derive(Debug)]
struct Control {
    limits: Budget,
    /// Counts resets, so that a call of an earlier execution does not count for a later one.
    epoch: u64,
    recent: Recent,
    priming: bool,
    reports: Option<mpsc::Sender<Report>>,
    shell_calls: Option<mpsc::Sender<ShellCall>>,
}

#[derive(Debug)]
pub(super) struct Session {
    token: [u8; 32],
    pub(super) upstream: Upstream,
    max_failures: u32,
    calls_per_minute: usize,
    control: Mutex<Control>,
    facts: watch::Sender<Facts>,
    pub(super) closed: CancellationToken,
    pub(super) slots: Arc<Semaphore>,
    pub(super) way: Way,
}

/// A new one, of 256 bits.
pub(super) fn token() -> SecretString {
    let mut bytes = [0; 32];
    rand::rng().fill_bytes(&mut bytes);
    SecretString::from(URL_SAFE_NO_PAD.encode(bytes))
}

pub(super) fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

impl Session {
    pub(super) fn new(grant: Grant, token: &SecretString, way: Way, config: &BrokerConfig) -> Self {
        Self {
            token: digest(token.expose_secret()),
            upstream: grant.upstream,
            max_failures: config.max_failures,
            calls_per_minute: usize::try_from(config.calls_per_minute).unwrap_or(usize::MAX),
            control: Mutex::new(Control {
                limits: grant.limits,
                epoch: 0,
                recent: Recent::default(),
                priming: false,
                reports: None,
                shell_calls: None,
            }),
            facts: watch::Sender::new(Facts::new(0)),
            closed: CancellationToken::new(),
            slots: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
            way,
        }
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Compares in constant time: how much of a token is right does not show.
    pub(super) fn has_token(&self, token: &str) -> bool {
        digest(token).ct_eq(&self.token).into()
    }

    pub(super) fn is_priming(&self) -> bool {
        self.control().priming
    }

    /// Bytes have passed.
    pub(super) fn touch(&self) {
        self.facts.send_if_modified(|facts| {
            facts.last_activity = Instant::now();
            false
        });
    }

    /// Counts a call, or says why there may be none.
    pub(super) fn admit(self: &Arc<Self>, slot: OwnedSemaphorePermit) -> Result<Call, Exhausted> {
        let mut control = self.control();
        let now = Instant::now();
        let recent = control.recent.count(now);
        let mut admitted = Ok(0);
        self.facts.send_modify(|facts| {
            facts.last_activity = now;
            let tokens = facts.input_tokens.saturating_add(facts.output_tokens);
            let exhausted = if facts.exhausted.is_some() {
                facts.exhausted
            } else if facts.calls >= control.limits.model_calls {
                Some(Exhausted::ModelCalls)
            } else if tokens >= control.limits.total_tokens {
                Some(Exhausted::TotalTokens)
            } else if recent >= self.calls_per_minute {
                Some(Exhausted::Rate)
            } else {
                None
            };
            facts.exhausted = exhausted;
            admitted = match exhausted {
                Some(exhausted) => Err(exhausted),
                None => {
                    control.recent.0.push_back(now);
                    facts.calls += 1;
                    facts.in_flight += 1;
                    Ok(facts.calls)
                }
            };
        });
        admitted.map(|number| Call {
            session: Arc::clone(self),
            epoch: control.epoch,
            number,
            started: now,
            first_byte: None,
            observer: None,
            settled: false,
            failure: None,
            _slot: slot,
        })
    }

    pub(super) fn shell_calls(&self) -> Option<mpsc::Sender<ShellCall>> {
        self.control().shell_calls.clone()
    }
}

/// A counted call. Whatever becomes of it is booked once: by [`Call::fail`], [`Call::end`], or its drop, which means
/// that OpenCode went away.
#[derive(Debug)]
pub(super) struct Call {
    session: Arc<Session>,
    epoch: u64,
    number: u64,
    started: Instant,
    first_byte: Option<Duration>,
    observer: Option<Observer>,
    settled: bool,
    failure: Option<ModelError>,
    /// Its place among the calls under way.
    _slot: OwnedSemaphorePermit,
}

/// A call that has failed.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) error: ModelError,
    /// What the provider said in the middle of its answer.
    pub(super) said: Said,
    /// It was one failure too many.
    pub(super) exhausted: Option<Exhausted>,
}

impl Failed {
    pub(super) fn of(error: ModelError) -> Self {
        Self { error, said: Said::default(), exhausted: None }
    }
}

impl Call {
    /// The body of the answer begins.
    pub(super) fn observe_with(&mut self, observer: Observer) {
        self.observer = Some(observer);
    }

    /// Bytes of the answer come by. Gives how many of them may be passed on: those of whole events, and none from the
    /// event on that says that the call has failed. A call whose answer says that it is complete, or has failed, is
    /// booked at once, before OpenCode can see that.
    pub(super) fn pass(&mut self, bytes: &[u8]) -> usize {
        self.session.touch();
        self.first_byte.get_or_insert_with(|| self.started.elapsed());
        let Some(observer) = &mut self.observer else { return bytes.len() };
        let whole = observer.feed(bytes);
        if observer.is_done() || observer.has_failed() {
            self.end();
        }
        whole
    }

    /// Whether it is booked already.
    pub(super) fn is_settled(&self) -> bool {
        self.settled
    }

    /// Whether its answer asks for a tool.
    pub(super) fn asks_for_tools(&self) -> bool {
        self.observer.as_ref().is_some_and(Observer::asks_for_tools)
    }

    /// Whether an event of the answer said that it has failed.
    pub(super) fn has_failed(&self) -> bool {
        self.observer.as_ref().is_some_and(Observer::has_failed)
    }

    /// The answer has ended by itself: what was seen of it decides.
    pub(super) fn end(&mut self) {
        if self.settled {
            return;
        }
        let outcome = match &mut self.observer {
            Some(observer) => {
                observer.end();
                match observer.verdict(&self.session.upstream.api_key) {
                    Ok(finish) => Outcome::Finished(finish),
                    Err(error) => Outcome::Failed(error),
                }
            }
            None => Outcome::Abandoned,
        };
        self.settle(outcome);
    }

    /// The call has failed.
    pub(super) fn fail(&mut self, error: ModelError) {
        self.settle(Outcome::Failed(error));
    }

    /// How it failed, where it was booked as failed, and what OpenCode is to be told of that.
    pub(super) fn failure(&self) -> Option<Failed> {
        let error = self.failure.clone()?;
        let said = self.observer.as_ref().map(|o| o.said(&self.session.upstream.api_key)).unwrap_or_default();
        let current = self.session.control().epoch == self.epoch;
        let exhausted = self.session.facts.borrow().exhausted.filter(|_| current);
        Some(Failed { error, said, exhausted })
    }

    fn settle(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        if let Outcome::Failed(error) = &outcome {
            self.failure = Some(error.clone());
        }
        let (input_tokens, output_tokens, cost) = self
            .observer
            .as_ref()
            .map_or((0, 0, 0.0), |observer| (observer.input_tokens, observer.output_tokens, observer.cost));
        let control = self.session.control();
        let current = control.epoch == self.epoch;
        self.session.facts.send_modify(|facts| {
            facts.in_flight = facts.in_flight.saturating_sub(1);
            facts.last_activity = Instant::now();
            if !current {
                return;
            }
            facts.input_tokens = facts.input_tokens.saturating_add(input_tokens);
            facts.output_tokens = facts.output_tokens.saturating_add(output_tokens);
            facts.cost += cost;
            match &outcome {
                Outcome::Finished(_) => {
                    facts.failures_in_a_row = 0;
                    facts.last_error = None;
                }
                Outcome::Failed(error) => {
                    facts.failures_in_a_row += 1;
                    facts.last_error = Some(error.clone());
                    if facts.failures_in_a_row >= self.session.max_failures {
                        facts.exhausted.get_or_insert(Exhausted::Failures);
                    }
                }
                Outcome::Abandoned => {}
            }
        });
        if let Some(reports) = control.reports.as_ref().filter(|_| current) {
            let report = Report {
                call: self.number,
                outcome,
                input_tokens,
                output_tokens,
                first_byte: self.first_byte,
                duration: self.started.elapsed(),
            };
            // Where nobody takes them the facts still have the sums; an answer must never wait for a reader.
            let _ = reports.try_send(report);
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // A client may close as soon as it has the finish reason: that call has ended.
        if self.observer.as_ref().is_some_and(|observer| observer.finish().is_some()) {
            self.end();
        }
        self.settle(Outcome::Abandoned);
    }
}

/// Keeps the broker open for a session. Dropping it closes the session's connections; later calls with its token are
/// unauthorized.
#[derive(Debug)]
pub struct Lease {
    id: u64,
    token: SecretString,
    address: SocketAddr,
    session: Arc<Session>,
    sessions: Sessions,
}

impl Lease {
    pub(super) fn new(
        id: u64,
        token: SecretString,
        address: SocketAddr,
        session: Arc<Session>,
        sessions: Sessions,
    ) -> Self {
        Self { id, token, address, session, sessions }
    }

    /// What the session's processes show instead of a key: `Authorization: Bearer` or `x-api-key`.
    pub fn token(&self) -> &SecretString {
        &self.token
    }

    /// The base URL for OpenCode's provider: `http://127.0.0.1:PORT/model/v1`.
    pub fn base_url(&self) -> String {
        format!("http://{}/model/v1", self.address)
    }

    /// Where the session's shell tap uploads to: `http://127.0.0.1:PORT/shell`.
    pub fn shell_url(&self) -> String {
        format!("http://{}/shell", self.address)
    }

    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The session's counters, to read or to wait on.
    pub fn facts(&self) -> watch::Receiver<Facts> {
        self.session.facts.subscribe()
    }

    /// Starts the counters anew for the next execution in the session. Calls still under way count for none.
    pub fn reset(&self, limits: Budget) {
        let mut control = self.session.control();
        control.limits = limits;
        control.epoch += 1;
        self.session.way.reset();
        control.recent = Recent::default();
        self.session.facts.send_modify(|facts| *facts = Facts::new(facts.in_flight));
    }

    /// While on, model calls are neither forwarded nor counted: the broker itself answers each with the word "ok".
    /// That warms up a session with a throw-away conversation, without touching the provider. Off at first.
    pub fn priming(&self, on: bool) {
        self.session.control().priming = on;
    }

    /// The shell taps' uploads from now on. Bounded: taps wait while it is full. An earlier receiver gets no more;
    /// without any, taps are told 503.
    pub fn take_shell_calls(&mut self) -> mpsc::Receiver<ShellCall> {
        let (sender, receiver) = mpsc::channel(SHELL_CALLS);
        self.session.control().shell_calls = Some(sender);
        receiver
    }

    /// The ends of calls from now on. Bounded: what does not fit is left out, the facts have the sums. An earlier
    /// receiver gets no more.
    pub fn take_reports(&mut self) -> mpsc::Receiver<Report> {
        let (sender, receiver) = mpsc::channel(REPORTS);
        self.session.control().reports = Some(sender);
        receiver
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.sessions.send_modify(|sessions| {
            sessions.remove(&self.id);
        });
        self.session.closed.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_counts_for_a_minute_from_its_own_beginning() {
        let start = Instant::now();
        let mut recent = Recent::default();
        for seconds in [0, 1, 59] {
            recent.0.push_back(start + Duration::from_secs(seconds));
        }
        let mut at = |milliseconds| recent.count(start + Duration::from_millis(milliseconds));
        assert_eq!([at(59_999), at(60_000), at(60_999), at(61_000), at(118_999), at(119_000)], [3, 2, 2, 1, 1, 0]);
    }
}
