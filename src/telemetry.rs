//! What operators see: the log on stderr, and metrics in a registry of our own (no globals).

use crate::model::{EventType, Reason, Status};
use http::Method;
use prometheus::core::Collector;
use prometheus::{
    Gauge, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts, Registry, TextEncoder, exponential_buckets,
};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::{LevelFilter, ParseError};
use tracing_subscriber::util::SubscriberInitExt;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object per line.
    Json,
    /// For people.
    Text,
}

/// A log level that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LevelError {
    #[error("the log level has a word that is no level")]
    Word,
    #[error("the log level is not a filter")]
    Filter(#[source] ParseError),
}

/// The log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error(transparent)]
    Level(#[from] LevelError),
    #[error("a log is set up already")]
    Twice(#[source] tracing_subscriber::util::TryInitError),
}

/// Reads a level (`info`) or filter directives (`info,opencode_sidecar::broker=debug`).
///
/// # Errors
/// Where it is neither. A bare word must be a level: as a filter it would name a module, and `inof` would silence all.
pub fn log_filter(level: &str) -> Result<EnvFilter, LevelError> {
    let word = |directive: &str| LevelFilter::from_str(directive.trim()).is_ok_and(|_| !directive.trim().is_empty());
    if !level.split(',').all(|directive| directive.contains('=') || word(directive)) {
        return Err(LevelError::Word);
    }
    EnvFilter::builder().parse(level).map_err(LevelError::Filter)
}

/// Sets up the process's log, on stderr.
///
/// # Errors
/// A level that cannot be read, or a second call.
pub fn init_log(level: &str, format: LogFormat) -> Result<(), LogError> {
    let filter = log_filter(level)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).finish().try_init(),
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).finish().try_init(),
    }
    .map_err(LogError::Twice)
}

/// An error and all its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}

/// How a call of the model ended, as the metrics count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ModelCallOutcome {
    /// A whole answer.
    Ok,
    /// The provider answered with an error status.
    Refused,
    /// The provider could not be reached, was silent, or broke off.
    Failed,
    /// The sidecar did not make the call: over a limit.
    OverLimit,
    /// The caller went away.
    Cancelled,
}

impl ModelCallOutcome {
    const ALL: [Self; 5] = [Self::Ok, Self::Refused, Self::Failed, Self::OverLimit, Self::Cancelled];

    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::OverLimit => "over_limit",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What became of a call that tells the backend a change of status, as the metrics count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CallbackOutcome {
    /// The backend took it.
    Delivered,
    /// It did not; the call is made again.
    Failed,
    /// The backend does not know the session.
    Unwanted,
}

impl CallbackOutcome {
    const ALL: [Self; 3] = [Self::Delivered, Self::Failed, Self::Unwanted];

    fn as_str(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Failed => "failed",
            Self::Unwanted => "unwanted",
        }
    }
}

/// Why a request was not let in, as the metrics count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AuthRefusal {
    /// It had no credential.
    Missing,
    /// Its credential is none of ours, or a token that says too little.
    Invalid,
    /// Its token has expired.
    Expired,
    /// Its token is for another audience or project.
    Elsewhere,
    /// Its credential is good, and not for this.
    Scope,
    /// Counted beside one of the first ones: so many had failed that it was turned away at once.
    TooMany,
}

impl AuthRefusal {
    const ALL: [Self; 6] = [Self::Missing, Self::Invalid, Self::Expired, Self::Elsewhere, Self::Scope, Self::TooMany];

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Invalid => "invalid",
            Self::Expired => "expired",
            Self::Elsewhere => "elsewhere",
            Self::Scope => "scope",
            Self::TooMany => "too_many",
        }
    }
}

/// What became of an attempt of a session's to reach another host than its model's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EgressOutcome {
    /// A tunnel was opened.
    Opened,
    /// It may not.
    Refused,
    /// It may, but the host was not reached.
    Failed,
}

impl EgressOutcome {
    const ALL: [Self; 3] = [Self::Opened, Self::Refused, Self::Failed];

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// Which way bytes went through a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EgressDirection {
    /// From the session.
    Sent,
    /// To it.
    Received,
}

impl EgressDirection {
    const ALL: [Self; 2] = [Self::Sent, Self::Received];

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Received => "received",
        }
    }
}

/// Why the broker did not do what a session's process asked for, as the metrics count it. What is over a limit is a
/// [`ModelCallOutcome::OverLimit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BrokerRefusal {
    /// No session has its token.
    Token,
    /// It is none of the provider's paths, or not their method.
    Path,
    /// Its body is too long, or no call of a model.
    Body,
    /// It names another model than the execution's.
    Model,
    /// The model's host may not be called, or has no address that may.
    Endpoint,
}

impl BrokerRefusal {
    const ALL: [Self; 5] = [Self::Token, Self::Path, Self::Body, Self::Model, Self::Endpoint];

    fn as_str(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Path => "path",
            Self::Body => "body",
            Self::Model => "model",
            Self::Endpoint => "endpoint",
        }
    }
}

/// The sidecar's metrics. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    started: Instant,
    http_requests: IntCounterVec,
    http_duration: HistogramVec,
    auth_refused: IntCounterVec,
    executions: IntCounterVec,
    running: IntGauge,
    queued: IntGauge,
    execution_duration: HistogramVec,
    queue_wait: HistogramVec,
    events: IntCounterVec,
    redacted: IntCounterVec,
    model_calls: IntCounterVec,
    egress: IntCounterVec,
    egress_bytes: IntCounterVec,
    broker_refused: IntCounterVec,
    callbacks: IntCounterVec,
    callbacks_waiting: IntGauge,
    retention: IntCounterVec,
    uptime: Gauge,
    resident: IntGauge,
    open_fds: IntGauge,
}

const PREFIX: &str = "opencode_sidecar_";

/// What retention removes, in the order of [`Metrics::retention_removed`].
const REMOVED: [&str; 4] = ["execution", "event", "session", "callback"];

/// Makes metrics and puts them into the registry.
struct Maker(Registry);

impl Maker {
    fn add<C: Collector + Clone + 'static>(&self, metric: C) -> Result<C, prometheus::Error> {
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
        self.add(IntCounterVec::new(Opts::new(format!("{PREFIX}{name}"), help), labels)?)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.add(IntGauge::new(name, help)?)
    }

    fn histogram(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: Vec<f64>,
    ) -> Result<HistogramVec, prometheus::Error> {
        self.add(HistogramVec::new(HistogramOpts::new(format!("{PREFIX}{name}"), help).buckets(buckets), labels)?)
    }
}

impl Metrics {
    /// A new registry with every series at zero. Counts as the start of the process.
    ///
    /// # Errors
    /// None in practice: all names are constants.
    pub fn new() -> Result<Self, prometheus::Error> {
        let make = Maker(Registry::new());
        let start = make.add(Gauge::new("process_start_time_seconds", "Start time, in seconds since the epoch.")?)?;
        start.set(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
        let inner = Inner {
            started: Instant::now(),
            http_requests: make.counters("http_requests_total", "HTTP requests.", &["route", "method", "status"])?,
            http_duration: make.histogram(
                "http_request_duration_seconds",
                "Time to the head of the answer.",
                &["route", "method"],
                exponential_buckets(0.001, 4.0, 8)?,
            )?,
            auth_refused: make.counters("auth_refused_total", "Requests that were not let in.", &["why"])?,
            executions: make.counters("executions_total", "Executions that ended.", &["status", "reason"])?,
            running: make.gauge(&format!("{PREFIX}executions_running"), "Executions that run.")?,
            queued: make.gauge(&format!("{PREFIX}executions_queued"), "Executions that wait for a place.")?,
            execution_duration: make.histogram(
                "execution_duration_seconds",
                "Time from start to end, without paused time.",
                &["status"],
                exponential_buckets(0.5, 2.0, 14)?,
            )?,
            queue_wait: make.histogram(
                "queue_wait_seconds",
                "Time from submission to start.",
                &[],
                exponential_buckets(0.01, 4.0, 9)?,
            )?,
            events: make.counters("events_total", "Events appended to logs.", &["type"])?,
            redacted: make.counters("redacted_total", "Secrets that were kept out of the logs.", &["kind"])?,
            model_calls: make.counters("model_calls_total", "Calls of models through the broker.", &["outcome"])?,
            egress: make.counters("egress_total", "Attempts of sessions to reach other hosts.", &["outcome"])?,
            egress_bytes: make.counters("egress_bytes_total", "Bytes of sessions to and from them.", &["direction"])?,
            broker_refused: make.counters(
                "broker_refused_total",
                "Calls of sessions that the broker refused.",
                &["why"],
            )?,
            callbacks: make.counters("callbacks_total", "Calls that tell the backend a status.", &["outcome"])?,
            callbacks_waiting: make.gauge(
                &format!("{PREFIX}callbacks_waiting"),
                "Changes of status that the backend has not taken yet.",
            )?,
            retention: make.counters("retention_removed_total", "What was removed since it was old.", &["kind"])?,
            uptime: make.add(Gauge::new(format!("{PREFIX}uptime_seconds"), "Time since the start.")?)?,
            resident: make.gauge("process_resident_memory_bytes", "Resident memory.")?,
            open_fds: make.gauge("process_open_fds", "Open file descriptors.")?,
            registry: make.0,
        };
        // A series that appears with its first event hides that event from `rate()`.
        for reason in Reason::ALL {
            inner.executions.with_label_values(&[reason.status().as_str(), reason.as_str()]);
        }
        for status in Status::ALL.iter().filter(|s| s.is_final()) {
            inner.execution_duration.with_label_values(&[status.as_str()]);
        }
        for kind in EventType::ALL {
            inner.events.with_label_values(&[kind.as_str()]);
        }
        for outcome in ModelCallOutcome::ALL {
            inner.model_calls.with_label_values(&[outcome.as_str()]);
        }
        for outcome in EgressOutcome::ALL {
            inner.egress.with_label_values(&[outcome.as_str()]);
        }
        for direction in EgressDirection::ALL {
            inner.egress_bytes.with_label_values(&[direction.as_str()]);
        }
        for why in BrokerRefusal::ALL {
            inner.broker_refused.with_label_values(&[why.as_str()]);
        }
        for outcome in CallbackOutcome::ALL {
            inner.callbacks.with_label_values(&[outcome.as_str()]);
        }
        for why in AuthRefusal::ALL {
            inner.auth_refused.with_label_values(&[why.as_str()]);
        }
        for kind in REMOVED {
            inner.retention.with_label_values(&[kind]);
        }
        inner.queue_wait.with_label_values::<&str>(&[]);
        Ok(Self(Arc::new(inner)))
    }

    /// Time since the start of the process.
    pub fn uptime(&self) -> Duration {
        self.0.started.elapsed()
    }

    /// One answered request. `route` is the pattern, never the path.
    pub fn http_request(&self, route: &str, method: &Method, status: u16, took: Duration) {
        // Callers may invent methods, and each label lives for ever.
        let method = match method.as_str() {
            known @ ("GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" | "OPTIONS") => known,
            _ => "other",
        };
        let code = status.to_string();
        self.0.http_requests.with_label_values(&[route, method, &code]).inc();
        self.0.http_duration.with_label_values(&[route, method]).observe(took.as_secs_f64());
    }

    /// A request was not let in.
    pub fn auth_refused(&self, why: AuthRefusal) {
        self.0.auth_refused.with_label_values(&[why.as_str()]).inc();
    }

    /// An execution ended; `ran` is `None` where it never started.
    pub fn execution_ended(&self, reason: Reason, ran: Option<Duration>) {
        let status = reason.status().as_str();
        self.0.executions.with_label_values(&[status, reason.as_str()]).inc();
        if let Some(ran) = ran {
            self.0.execution_duration.with_label_values(&[status]).observe(ran.as_secs_f64());
        }
    }

    /// How many executions run now.
    pub fn set_running(&self, count: usize) {
        self.0.running.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// How many executions wait now.
    pub fn set_queued(&self, count: usize) {
        self.0.queued.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// An execution started after it waited so long.
    pub fn queue_waited(&self, waited: Duration) {
        self.0.queue_wait.with_label_values::<&str>(&[]).observe(waited.as_secs_f64());
    }

    /// An event was appended to a log.
    pub fn event(&self, kind: EventType) {
        self.0.events.with_label_values(&[kind.as_str()]).inc();
    }

    /// These kinds of secrets are looked for.
    pub fn looks_for(&self, kinds: impl Iterator<Item = &'static str>) {
        kinds.for_each(|kind| drop(self.0.redacted.with_label_values(&[kind])));
    }

    /// A secret of this kind was kept out of a log.
    pub fn redacted(&self, kind: &str) {
        self.0.redacted.with_label_values(&[kind]).inc();
    }

    /// A call of a model ended.
    pub fn model_call(&self, outcome: ModelCallOutcome) {
        self.0.model_calls.with_label_values(&[outcome.as_str()]).inc();
    }

    /// A session tried to reach another host than its model's.
    pub fn egress(&self, outcome: EgressOutcome) {
        self.egress_many(outcome, 1);
    }

    /// The same, so many times.
    pub fn egress_many(&self, outcome: EgressOutcome, count: u64) {
        self.0.egress.with_label_values(&[outcome.as_str()]).inc_by(count);
    }

    /// So many bytes passed through a tunnel.
    pub fn egress_bytes(&self, direction: EgressDirection, bytes: usize) {
        self.0.egress_bytes.with_label_values(&[direction.as_str()]).inc_by(u64::try_from(bytes).unwrap_or(0));
    }

    /// The broker refused what a session's process asked for.
    pub fn broker_refused(&self, why: BrokerRefusal) {
        self.0.broker_refused.with_label_values(&[why.as_str()]).inc();
    }

    /// A call that tells the backend a change of status ended.
    pub fn callback(&self, outcome: CallbackOutcome) {
        self.0.callbacks.with_label_values(&[outcome.as_str()]).inc();
    }

    /// How many changes of status the backend has not taken.
    pub fn set_callbacks_waiting(&self, count: u64) {
        self.0.callbacks_waiting.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// So many of each were removed since they were old.
    pub fn retention_removed(&self, executions: u64, events: u64, sessions: u64, callbacks: u64) {
        for (kind, count) in REMOVED.iter().zip([executions, events, sessions, callbacks]) {
            self.0.retention.with_label_values(&[*kind]).inc_by(count);
        }
    }

    /// All metrics in Prometheus' text format 0.0.4.
    ///
    /// # Errors
    /// None in practice: a metric that cannot be encoded.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        self.0.uptime.set(self.uptime().as_secs_f64());
        // Absent on other systems than Linux: the gauge stays 0.
        if let Some(bytes) = resident_bytes() {
            self.0.resident.set(bytes);
        }
        if let Ok(fds) = std::fs::read_dir("/proc/self/fd") {
            // One of them is the directory itself.
            self.0.open_fds.set(i64::try_from(fds.count()).unwrap_or(i64::MAX).saturating_sub(1));
        }
        TextEncoder::new().encode_to_string(&self.0.registry.gather())
    }
}

/// `VmRSS` of this process.
fn resident_bytes() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: i64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_there_from_the_start_and_counts() {
        let metrics = Metrics::new().unwrap();
        let before = metrics.render().unwrap();
        for line in [
            "opencode_sidecar_executions_total{reason=\"finished\",status=\"completed\"} 0",
            "opencode_sidecar_auth_refused_total{why=\"expired\"} 0",
            "opencode_sidecar_executions_running 0",
            "opencode_sidecar_executions_queued 0",
            "opencode_sidecar_execution_duration_seconds_count{status=\"failed\"} 0",
            "opencode_sidecar_queue_wait_seconds_count 0",
            "opencode_sidecar_events_total{type=\"stdout\"} 0",
            "opencode_sidecar_model_calls_total{outcome=\"ok\"} 0",
            "opencode_sidecar_egress_total{outcome=\"opened\"} 0",
            "opencode_sidecar_egress_bytes_total{direction=\"sent\"} 0",
            "opencode_sidecar_broker_refused_total{why=\"endpoint\"} 0",
            "opencode_sidecar_callbacks_total{outcome=\"failed\"} 0",
            "opencode_sidecar_callbacks_waiting 0",
            "opencode_sidecar_retention_removed_total{kind=\"session\"} 0",
        ] {
            assert!(before.lines().any(|l| l == line), "{line}\n{before}");
        }
        metrics.http_request("/tasks/{execution_id}", &Method::GET, 200, Duration::from_millis(2));
        metrics.http_request("none", &Method::from_bytes(b"BREW").unwrap(), 404, Duration::ZERO);
        metrics.auth_refused(AuthRefusal::Scope);
        metrics.execution_ended(Reason::Timeout, Some(Duration::from_secs(3)));
        metrics.execution_ended(Reason::Cancelled, None);
        metrics.set_running(2);
        metrics.set_queued(3);
        metrics.queue_waited(Duration::from_millis(1));
        metrics.event(EventType::Stdout);
        metrics.model_call(ModelCallOutcome::Refused);
        metrics.egress(EgressOutcome::Refused);
        metrics.egress_bytes(EgressDirection::Received, 7);
        metrics.broker_refused(BrokerRefusal::Path);
        metrics.callback(CallbackOutcome::Delivered);
        metrics.set_callbacks_waiting(4);
        metrics.retention_removed(1, 2, 3, 4);
        metrics.retention_removed(1, 0, 0, 0);
        let after = metrics.render().unwrap();
        for line in [
            "opencode_sidecar_http_requests_total{method=\"GET\",route=\"/tasks/{execution_id}\",status=\"200\"} 1",
            "opencode_sidecar_http_requests_total{method=\"other\",route=\"none\",status=\"404\"} 1",
            "opencode_sidecar_http_request_duration_seconds_count{method=\"GET\",route=\"/tasks/{execution_id}\"} 1",
            "opencode_sidecar_auth_refused_total{why=\"scope\"} 1",
            "opencode_sidecar_executions_total{reason=\"timeout\",status=\"failed\"} 1",
            "opencode_sidecar_executions_total{reason=\"cancelled\",status=\"cancelled\"} 1",
            "opencode_sidecar_execution_duration_seconds_count{status=\"failed\"} 1",
            "opencode_sidecar_execution_duration_seconds_count{status=\"cancelled\"} 0",
            "opencode_sidecar_executions_running 2",
            "opencode_sidecar_executions_queued 3",
            "opencode_sidecar_queue_wait_seconds_count 1",
            "opencode_sidecar_events_total{type=\"stdout\"} 1",
            "opencode_sidecar_model_calls_total{outcome=\"refused\"} 1",
            "opencode_sidecar_egress_total{outcome=\"refused\"} 1",
            "opencode_sidecar_egress_bytes_total{direction=\"received\"} 7",
            "opencode_sidecar_broker_refused_total{why=\"path\"} 1",
            "opencode_sidecar_callbacks_total{outcome=\"delivered\"} 1",
            "opencode_sidecar_callbacks_waiting 4",
            "opencode_sidecar_retention_removed_total{kind=\"execution\"} 2",
            "opencode_sidecar_retention_removed_total{kind=\"event\"} 2",
            "opencode_sidecar_retention_removed_total{kind=\"session\"} 3",
            "opencode_sidecar_retention_removed_total{kind=\"callback\"} 4",
        ] {
            assert!(after.lines().any(|l| l == line), "{line}\n{after}");
        }
    }

    #[test]
    fn two_registries_do_not_meet() {
        let (one, other) = (Metrics::new().unwrap(), Metrics::new().unwrap());
        one.event(EventType::Log);
        assert!(other.render().unwrap().contains("opencode_sidecar_events_total{type=\"log\"} 0"));
    }

    #[test]
    fn the_process_is_measured() {
        let text = Metrics::new().unwrap().render().unwrap();
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|l| l.starts_with(name) && !l.starts_with('#')).unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        assert!(value("process_resident_memory_bytes") > 100_000.0);
        assert!(value("process_open_fds") >= 3.0);
        assert!(value("process_start_time_seconds") > 1.7e9);
    }

    #[test]
    fn levels_and_filters_are_read() {
        for good in ["info", "WARN", "info,opencode_sidecar::broker=debug"] {
            assert!(log_filter(good).is_ok(), "{good}");
        }
        for bad in ["", "inof", "info,,", "loud=very", "a=b=c"] {
            assert!(log_filter(bad).is_err(), "{bad}");
        }
    }
}
