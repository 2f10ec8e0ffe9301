//! The configuration: every environment variable, read once through an injected source.
//!
//! All bad variables are reported at once, by name and with what is expected, never with their values. A variable of
//! the contract that this version cannot honour stops the start: silence would look like protection.

mod read;
mod reference;

pub use reference::{Variable, not_yet, reference};

use crate::model::destination::{Destinations, Ports, Reach, Target};
use crate::model::task::{LEAST_CPU_MILLIS, LEAST_DISK, LEAST_MEMORY, LEAST_PIDS, Limits, Provider};
use crate::secrets::{Keyring, SealingKey, Sources, TokenKeys, TokenSource};
use crate::telemetry::LogFormat;
use chrono::TimeDelta;
use read::Reader;
use secrecy::SecretString;
use std::ffi::OsString;
use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;
use url::Url;

/// How strictly sessions are confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SandboxMode {
    /// A protection that cannot be had stops the session.
    Required,
    /// What can be had is on; `/ready` says what is missing.
    BestEffort,
    /// No protection.
    Off,
}

/// The pod's default model.
#[derive(Clone, Debug)]
pub struct DefaultModel {
    pub provider: Provider,
    pub model: String,
    pub api_key: SecretString,
    /// Base URL, up to and with the version.
    pub endpoint: Url,
}

/// Everything that the environment says, checked.
#[derive(Clone, Debug)]
pub struct Config {
    pub host: IpAddr,
    /// 0 for any free one.
    pub port: u16,
    /// Absolute.
    pub workspace_dir: PathBuf,
    /// Absolute.
    pub state_dir: PathBuf,
    /// `None`: the embedded Postgres.
    pub database_url: Option<SecretString>,
    pub database_schema: String,
    /// `JOURNAL_MAX_BYTES`
    pub journal_max_bytes: u64,
    pub project_id: String,
    /// How long what has ended is kept; `None`: for ever.
    pub retention: Option<TimeDelta>,
    pub lease: Duration,
    /// A level or filter directives.
    pub log_level: String,
    pub log_format: LogFormat,
    pub max_concurrent_tasks: usize,
    pub max_queued_tasks: usize,
    pub task_timeout: Duration,
    pub stall_timeout: Duration,
    pub unresponsive_timeout: Duration,
    /// How long the process of a caller's session rests before it is ended.
    pub session_idle_timeout: Duration,
    pub start_timeout: Duration,
    pub first_event_timeout: Duration,
    pub shutdown_grace: Duration,
    /// In characters.
    pub max_prompt_length: usize,
    /// `MAX_TASK_FILE_SIZE`, in bytes
    pub max_task_file_size: u64,
    pub warm_pool_size: usize,
    pub session_port_range: RangeInclusive<u16>,
    /// Users that sessions run as, where the sidecar may choose.
    pub session_uid_range: RangeInclusive<u32>,
    pub sandbox: SandboxMode,
    /// What has to be in force with `SANDBOX=required`, by name.
    pub sandbox_require: Vec<String>,
    /// What sessions may reach beside their model: `EGRESS_ALLOW`.
    pub egress_allow: Destinations,
    pub opencode_command: Option<PathBuf>,
    pub default_model: Option<DefaultModel>,
    /// `MODEL_ENDPOINT_ALLOW` alone; see [`Config::model_endpoints`].
    pub model_endpoint_allow: Destinations,
    /// Opens keys that come encrypted; `None`: such are refused.
    pub keyring: Option<Keyring>,
    /// What callers show; files are not read here.
    pub credentials: Sources,
    /// Base URL of the backend that is told how its sessions stand.
    pub backend_api_url: Option<Url>,
    /// `AUTH=off`.
    pub auth_off: bool,
    /// `REDACTION=off`.
    pub redaction_off: bool,
    /// `METRICS_AUTH=required`.
    pub metrics_auth: bool,
    /// Whether `GET /sessions/{id}/stream` needs no credential.
    pub sessions_stream_unauthenticated: bool,
    pub model_header_timeout: Duration,
    pub model_idle_timeout: Duration,
    pub model_max_failures: u32,
    pub model_calls_per_minute: u32,
    /// Ceilings of each execution.
    pub limits: Limits,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The variable, or the variables that do not fit together.
    pub variables: Vec<&'static str>,
    /// What is expected. Never the value.
    pub problem: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.variables.join(", "), self.problem)
    }
}

/// Everything that is wrong, in the order of [`reference()`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the environment is not valid")?;
        self.0.iter().try_for_each(|error| write!(f, "\n  {error}"))
    }
}

impl std::error::Error for ConfigErrors {}

impl Config {
    /// Reads the process's environment.
    ///
    /// # Errors
    /// All variables that are wrong.
    pub fn from_env() -> Result<Self, ConfigErrors> {
        Self::from_source(&|name| std::env::var_os(name))
    }

    /// Reads variables from `source`, which gives `None` for one that is not set. An empty one counts as not set.
    ///
    /// # Errors
    /// All variables that are wrong.
    pub fn from_source(source: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, ConfigErrors> {
        let mut r = Reader::new(source);
        let config = Self {
            port: r.number("PORT", 0, u16::MAX),
            host: r.parsed("HOST", IpAddr::from([0, 0, 0, 0]), "an IP address, such as 0.0.0.0"),
            workspace_dir: r.directory("WORKSPACE_DIR"),
            state_dir: r.directory("STATE_DIR"),
            database_url: r.database_url("DATABASE_URL"),
            journal_max_bytes: r.bytes("JOURNAL_MAX_BYTES", LEAST_JOURNAL, 1 << 50),
            database_schema: r.matching("DATABASE_SCHEMA", "a name of [a-z_][a-z0-9_]{0,62}", is_schema),
            project_id: r.matching("PROJECT_ID", "1 to 128 visible ASCII characters", |id| {
                id.len() <= 128 && is_visible_ascii(id)
            }),
            retention: match r.number("RETENTION_DAYS", 0, 36_500) {
                0 => None,
                days => Some(TimeDelta::days(days)),
            },
            lease: r.seconds("LEASE_SECONDS", HOUR),
            log_level: r.matching("LOG_LEVEL", "trace, debug, info, warn, error, off, or filter directives", |level| {
                crate::telemetry::log_filter(level).is_ok()
            }),
            log_format: r.word("LOG_FORMAT", &[("json", LogFormat::Json), ("text", LogFormat::Text)]),
            max_concurrent_tasks: r.either("MAX_CONCURRENT_TASKS", "MAX_CONCURRENT_SESSIONS", 1, 1_000),
            max_queued_tasks: r.number("MAX_QUEUED_TASKS", 0, 1_000_000),
            task_timeout: Duration::from_secs(r.either("TASK_TIMEOUT", "SESSION_TIMEOUT", 1, 30 * DAY)),
            stall_timeout: r.seconds("STALL_TIMEOUT", DAY),
            unresponsive_timeout: Duration::from_secs(r.number("UNRESPONSIVE_TIMEOUT", LEAST_SILENCE, HOUR)),
            session_idle_timeout: r.seconds("SESSION_IDLE_TIMEOUT", DAY),
            start_timeout: r.seconds("START_TIMEOUT", HOUR),
            first_event_timeout: r.seconds("FIRST_EVENT_TIMEOUT", HOUR),
            shutdown_grace: r.seconds("SHUTDOWN_GRACE_SECONDS", HOUR),
            max_prompt_length: r.number("MAX_PROMPT_LENGTH", 1, 10_000_000),
            max_task_file_size: r.bytes("MAX_TASK_FILE_SIZE", 1, 1 << 40),
            warm_pool_size: r.number("WARM_POOL_SIZE", 0, 1_000),
            session_port_range: r.port_range("SESSION_PORT_RANGE"),
            session_uid_range: r.uid_range("SESSION_UID_RANGE"),
            sandbox: r.word(
                "SANDBOX",
                &[
                    ("required", SandboxMode::Required),
                    ("best-effort", SandboxMode::BestEffort),
                    ("off", SandboxMode::Off),
                ],
            ),
            sandbox_require: r.words("SANDBOX_REQUIRE", PROTECTIONS),
            egress_allow: r.destinations("EGRESS_ALLOW", Ports::Required),
            opencode_command: r.path("OPENCODE_COMMAND"),
            default_model: default_model(&mut r),
            model_endpoint_allow: r.destinations("MODEL_ENDPOINT_ALLOW", Ports::Optional),
            keyring: keyring(&mut r),
            credentials: credentials(&mut r),
            backend_api_url: r.optional("BACKEND_API_URL", PLAIN_URL, endpoint),
            auth_off: r.flag("AUTH", "off"),
            redaction_off: r.flag("REDACTION", "off"),
            metrics_auth: r.flag("METRICS_AUTH", "required"),
            sessions_stream_unauthenticated: r.flag("SESSIONS_STREAM_UNAUTHENTICATED", "1"),
            model_header_timeout: r.seconds("MODEL_HEADER_TIMEOUT", HOUR),
            model_idle_timeout: r.seconds("MODEL_IDLE_TIMEOUT", HOUR),
            model_max_failures: r.number("MODEL_MAX_FAILURES", 1, 1_000),
            model_calls_per_minute: r.number("MODEL_CALLS_PER_MINUTE", 1, 100_000),
            limits: Limits {
                model_calls: r.number("SESSION_MODEL_CALLS", 1, 1_000_000),
                total_tokens: r.number("SESSION_TOTAL_TOKENS", 1, 1_000_000_000_000),
                output_bytes: r.bytes("SESSION_OUTPUT_BYTES", 1, 1 << 40),
                memory_bytes: r.optional_bytes("SESSION_MEMORY_BYTES", LEAST_MEMORY, 1 << 44),
                pids: r.optional_number("SESSION_PIDS", LEAST_PIDS, 4_194_304),
                cpu_millis: r.optional_number("SESSION_CPU_MILLIS", LEAST_CPU_MILLIS, 1_000_000),
                disk_bytes: r.optional_bytes("SESSION_DISK_BYTES", LEAST_DISK, 1 << 50),
            },
        };
        check_ports(&config, &mut r);
        check_uids(&config, &mut r);
        check_credentials(&config, &mut r);
        for name in not_yet() {
            r.refuse_if_set(name, "is set, but this version does not support it yet");
        }
        r.finish(config)
    }
}

impl Config {
    /// How many users there are for sessions.
    pub fn session_uids(&self) -> usize {
        let range = &self.session_uid_range;
        usize::try_from(range.end() - range.start()).map_or(usize::MAX, |beyond_the_first| beyond_the_first + 1)
    }

    /// Where models may be called: what is allowed, and the default model's own endpoint, which its operator means
    /// wherever it is. A provider's public one was not chosen, and has to be public.
    pub fn model_endpoints(&self) -> Destinations {
        let mut endpoints = self.model_endpoint_allow.clone();
        if let Some(model) = &self.default_model
            && let Some(target) = Target::of_url(&model.endpoint)
        {
            let public = model.provider.default_endpoint().and_then(endpoint).and_then(|url| Target::of_url(&url));
            let reach = if public.as_ref() == Some(&target) { Reach::Public } else { Reach::Anywhere };
            endpoints.add(target, reach);
        }
        endpoints
    }
}

/// OpenCode gives a sign of life every 10 s.
const LEAST_SILENCE: u64 = 15;

/// Two segments: with less there would be no room again once the database has it all.
const LEAST_JOURNAL: u64 = 16 << 20;

/// What `SANDBOX_REQUIRE` can name: every protection of [`sandbox`](crate::sandbox), and four that are not the jail's.
pub const PROTECTIONS: &[&str] = &[
    "capabilities",
    "cgroup",
    "disk",
    "egress",
    "landlock_fs",
    "landlock_ioctl_dev",
    "landlock_net",
    "landlock_refer",
    "landlock_scope",
    "landlock_truncate",
    "landlock_unix",
    "netns",
    "no_new_privs",
    "scope",
    "seccomp",
    "uid",
];

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

/// The four variables belong together: all that the provider needs, or none.
fn default_model(r: &mut Reader<'_>) -> Option<DefaultModel> {
    let words = [Provider::Openai, Provider::Anthropic, Provider::Local, Provider::Custom].map(|p| (p.as_str(), p));
    let provider = r.optional_word("OPENCODE_PROVIDER", &words);
    let model = r.optional("OPENCODE_MODEL", "1 to 256 visible ASCII characters", |model| {
        (model.len() <= 256 && is_visible_ascii(model)).then(|| model.to_owned())
    });
    let api_key = r.secret("OPENCODE_API_KEY");
    let endpoint = r.optional("OPENCODE_API_ENDPOINT", PLAIN_URL, endpoint);

    let all = ["OPENCODE_PROVIDER", "OPENCODE_MODEL", "OPENCODE_API_KEY"];
    let endpoint_name = "OPENCODE_API_ENDPOINT";
    if !all.iter().any(|name| r.is_set(name)) && !r.is_set(endpoint_name) {
        return None;
    }
    for name in all {
        if !r.is_set(name) {
            r.fail(
                &[name],
                "is missing: a default model needs all of OPENCODE_PROVIDER, OPENCODE_MODEL, OPENCODE_API_KEY",
            );
        }
    }
    let public = provider.and_then(Provider::default_endpoint).and_then(self::endpoint);
    if provider.is_some() && public.is_none() && !r.is_set(endpoint_name) {
        r.fail(&[endpoint_name], "is missing: the providers `local` and `custom` need it");
    }
    Some(DefaultModel { provider: provider?, model: model?, api_key: api_key?, endpoint: endpoint.or(public)? })
}

/// The shared secret, and at most one kind of key for tokens.
fn credentials(r: &mut Reader<'_>) -> Sources {
    let shared_secret =
        r.credential("OPENCODE_SHARED_SECRET", "OPENCODE_SHARED_SECRET_FILE", VISIBLE_ASCII, is_visible_ascii);
    let secret = r.credential("JWT_SECRET", "JWT_SECRET_FILE", "32 or more visible ASCII characters", |text| {
        text.len() >= 32 && is_visible_ascii(text)
    });
    let expected = "a public key in PEM (`BEGIN PUBLIC KEY`): RSA of 2048 bits or more, P-256, or Ed25519";
    let public =
        r.credential("JWT_PUBLIC_KEY", "JWT_PUBLIC_KEY_FILE", expected, |text| TokenKeys::of_pem(text).is_ok());
    let set = r.credential_file("JWT_JWKS_FILE");

    let kinds: [&[&'static str]; 3] =
        [&["JWT_SECRET", "JWT_SECRET_FILE"], &["JWT_PUBLIC_KEY", "JWT_PUBLIC_KEY_FILE"], &["JWT_JWKS_FILE"]];
    let named: Vec<_> = kinds.iter().filter_map(|names| names.iter().copied().find(|name| r.is_set(name))).collect();
    if named.len() > 1 {
        r.fail(&named, "are different kinds of key for tokens; set one of them");
    }
    let tokens = secret.map(TokenSource::Secret).or(public.map(TokenSource::PublicKey));
    Sources { shared_secret, tokens: tokens.or(set.map(TokenSource::KeySet)) }
}

/// What a header can carry. A line end would make a secret that nobody can send.
const VISIBLE_ASCII: &str = "visible ASCII characters, without spaces or line ends";

fn keyring(r: &mut Reader<'_>) -> Option<Keyring> {
    let (name, older) = ("ENCRYPTION_KEY", "ENCRYPTION_KEY_PREVIOUS");
    let expected = "the base64 of 32 bytes, such as `openssl rand -base64 32` writes";
    let current = r.optional(name, expected, SealingKey::parse);
    let previous = r.optional(older, expected, SealingKey::parse);
    if r.is_set(older) && !r.is_set(name) {
        r.fail(&[older, name], "a previous key needs a present one");
    }
    Some(Keyring { current: current?, previous })
}

/// What [`endpoint`] takes.
const PLAIN_URL: &str = "an http or https URL without a user, query or fragment";

fn endpoint(text: &str) -> Option<Url> {
    let url = Url::parse(text).ok()?;
    let plain =
        url.username().is_empty() && url.password().is_none() && url.query().is_none() && url.fragment().is_none();
    (matches!(url.scheme(), "http" | "https") && url.has_host() && plain).then_some(url)
}

fn is_schema(name: &str) -> bool {
    let mut bytes = name.bytes();
    name.len() <= 63
        && bytes.next().is_some_and(|b| b.is_ascii_lowercase() || b == b'_')
        && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

fn is_visible_ascii(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic())
}

fn check_ports(config: &Config, r: &mut Reader<'_>) {
    if !r.is_good(&["PORT", "SESSION_PORT_RANGE", "MAX_CONCURRENT_TASKS", "WARM_POOL_SIZE"]) {
        return;
    }
    if config.session_port_range.contains(&config.port) {
        r.fail(&["PORT", "SESSION_PORT_RANGE"], "the port must not be one of the sessions' own");
    }
    if config.session_port_range.len() < config.max_concurrent_tasks + config.warm_pool_size {
        r.fail(
            &["SESSION_PORT_RANGE", "MAX_CONCURRENT_TASKS", "WARM_POOL_SIZE"],
            "the range must hold a port for each session",
        );
    }
}

/// A user for each session: those that run, as many that rest, and the warm ones.
fn check_uids(config: &Config, r: &mut Reader<'_>) {
    let names = ["SESSION_UID_RANGE", "MAX_CONCURRENT_TASKS", "WARM_POOL_SIZE"];
    let needed = 2 * config.max_concurrent_tasks + config.warm_pool_size;
    if r.is_good(&names) && config.session_uids() < needed {
        r.fail(&names, "the range must hold two user ids for each concurrent task, and one for each warm session");
    }
}

/// A session that could write such a file would make itself a credential.
fn check_credentials(config: &Config, r: &mut Reader<'_>) {
    let Sources { shared_secret, tokens } = &config.credentials;
    let shared = shared_secret.as_ref().map(|source| ("OPENCODE_SHARED_SECRET_FILE", source));
    for (name, source) in shared.into_iter().chain(tokens.as_ref().map(|tokens| (tokens.variable(), tokens.source()))) {
        if source.path().is_some_and(|path| path.starts_with(&config.workspace_dir)) {
            r.fail(&[name, "WORKSPACE_DIR"], "the file must not lie in the workspace, which sessions can change");
        }
    }
}

#[cfg(test)]
mod tests;
