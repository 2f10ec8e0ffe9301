//! The list of variables: what the README's table, `serve --help` and the defaults come from.

/// One environment variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variable {
    pub name: &'static str,
    /// As it would be written in the environment; empty for none.
    pub default: &'static str,
    /// What it does, with its unit.
    pub meaning: &'static str,
}

const fn var(name: &'static str, default: &'static str, meaning: &'static str) -> Variable {
    Variable { name, default, meaning }
}

/// Every variable that this version honours, by topic.
pub fn reference() -> &'static [Variable] {
    REFERENCE
}

#[rustfmt::skip]
pub(super) const REFERENCE: &[Variable] = &[
    var("PORT", "3003", "Port to listen on; 0 for any free one"),
    var("HOST", "0.0.0.0", "IP address to listen on"),
    var("WORKSPACE_DIR", "/workspace", "The project's files: an absolute path"),
    var("STATE_DIR", "/var/lib/opencode-sidecar", "What the sidecar keeps: an absolute path, best on a volume"),
    var("JOURNAL_MAX_BYTES", "1 GiB", "Most bytes of events that wait on local disk for the database; at nine tenths new tasks are refused"),
    var("DATABASE_URL", "", "Postgres 14 to 18; without it an embedded one in STATE_DIR, where a server is installed"),
    var("DATABASE_SCHEMA", "opencode_sidecar", "Schema of the tables"),
    var("PROJECT_ID", "default", "The pod's project; history is read within one only"),
    var("RETENTION_DAYS", "30", "Days after its end for which an execution, or a session, is kept; 0 keeps everything"),
    var("LEASE_SECONDS", "30", "How long another sidecar of the project has to be silent, while the database can be written, until what it has left unfinished is ended as interrupted"),
    var("LOG_LEVEL", "info", "A level, or filter directives such as info,opencode_sidecar::broker=debug"),
    var("LOG_FORMAT", "json", "json or text, on stderr"),
    var("OPENCODE_SHARED_SECRET", "", "The bearer token of callers who may do everything; without any credential only probes answer"),
    var("OPENCODE_SHARED_SECRET_FILE", "", "The same from a file, which may change: up to four, one a line; the first one goes with callbacks"),
    var("JWT_SECRET", "", "Tokens (JWT) are HS256, signed with this: 32 characters or more, taken as they are"),
    var("JWT_SECRET_FILE", "", "The same from a file, which may change: up to four, one a line"),
    var("JWT_PUBLIC_KEY", "", "Tokens are RS256, ES256 or EdDSA, signed with the key to this one: PEM"),
    var("JWT_PUBLIC_KEY_FILE", "", "The same from a file, which may change"),
    var("JWT_JWKS_FILE", "", "Tokens are RS256, ES256 or EdDSA, signed with a key of this key set (JWKS): a file, which may change"),
    var("SESSIONS_STREAM_UNAUTHENTICATED", "", "1: GET /sessions/{id}/stream needs no credential; whoever knows a session's id can read it"),
    var("REDACTION", "", "off: what looks like somebody's key or token stays in the log; the session's own key never does"),
    var("AUTH", "", "off: without any credential configured, callers on this machine are let in"),
    var("METRICS_AUTH", "", "required: GET /metrics needs a credential with the scope admin"),
    var("BACKEND_API_URL", "", "The backend, which is told each change of status of its sessions"),
    var("MAX_CONCURRENT_TASKS", "5", "Executions that run at once"),
    var("MAX_CONCURRENT_SESSIONS", "", "Another name of MAX_CONCURRENT_TASKS"),
    var("MAX_QUEUED_TASKS", "100", "Executions that may wait; more are refused with 429"),
    var("TASK_TIMEOUT", "3600", "Longest run of an execution, in seconds"),
    var("SESSION_TIMEOUT", "", "Another name of TASK_TIMEOUT"),
    var("STALL_TIMEOUT", "300", "Time without any event after which a run counts as stalled, in seconds"),
    var("UNRESPONSIVE_TIMEOUT", "45", "Time without a sign of life from OpenCode, which gives one every 10 s, and to take a prompt, in seconds; at least 15"),
    var("SESSION_IDLE_TIMEOUT", "900", "Time that the process of a session rests before it is ended, in seconds; the next prompt starts it again"),
    var("START_TIMEOUT", "60", "Time for OpenCode to start, in seconds"),
    var("FIRST_EVENT_TIMEOUT", "60", "Time from the prompt to OpenCode's first event, in seconds"),
    var("SHUTDOWN_GRACE_SECONDS", "25", "Time from SIGTERM to the exit, in seconds"),
    var("MAX_PROMPT_LENGTH", "50000", "Characters of prompt and code together"),
    var("MAX_TASK_FILE_SIZE", "1000000", "Most bytes of a file, or of a range of one, that one answer holds"),
    var("WARM_POOL_SIZE", "0", "Sessions that are kept started for the next execution"),
    var("SESSION_PORT_RANGE", "20000-20999", "Ports on loopback for sessions"),
    var("SESSION_UID_RANGE", "61000-63999", "Users that sessions run as, one each, where the sidecar is root and may choose; nobody else's"),
    var("SANDBOX", "required", "required, best-effort or off"),
    var("SANDBOX_REQUIRE", "landlock_fs,egress,scope,seccomp,no_new_privs", "What has to be in force with SANDBOX=required, or no session starts"),
    var("EGRESS_ALLOW", "", "What sessions may reach beside their model, by https through the sidecar: host:port and *.suffix:port, separated by commas"),
    var("OPENCODE_COMMAND", "", "The OpenCode binary; without it `opencode` on PATH, else the pinned one below the working directory"),
    var("OPENCODE_PROVIDER", "", "Default model: openai, anthropic, local or custom"),
    var("OPENCODE_MODEL", "", "Default model: its name at the provider"),
    var("OPENCODE_API_KEY", "", "Default model: the provider's key; it never reaches a session"),
    var("OPENCODE_API_ENDPOINT", "", "Default model: base URL with the version; needed for local and custom"),
    var("MODEL_ENDPOINT_ALLOW", "api.openai.com:443,api.anthropic.com:443", "Hosts that tasks may call models at, beside OPENCODE_API_ENDPOINT: host, host:port, *.suffix or *.suffix:port, separated by commas; a private address only where its host is named in full here"),
    var("ENCRYPTION_KEY", "", "Opens the api_key_encrypted of tasks: the base64 of 32 bytes, a key of this project's own"),
    var("ENCRYPTION_KEY_PREVIOUS", "", "Opens what was sealed under the key before it"),
    var("MODEL_HEADER_TIMEOUT", "60", "Time for a provider to begin its answer, in seconds"),
    var("MODEL_IDLE_TIMEOUT", "120", "Time that a provider may be silent within an answer, in seconds"),
    var("MODEL_MAX_FAILURES", "5", "Failed calls of a model in a row that end a run"),
    var("MODEL_CALLS_PER_MINUTE", "300", "Most calls of a model in an execution within one minute; more end the run"),
    var("SESSION_MODEL_CALLS", "200", "Most calls of a model in an execution"),
    var("SESSION_TOTAL_TOKENS", "5000000", "Most tokens, in and out, of an execution"),
    var("SESSION_MEMORY_BYTES", "", "Most memory of a session, all its processes together"),
    var("SESSION_PIDS", "", "Most processes and threads of a session; all but 100, or half, are for its commands"),
    var("SESSION_CPU_MILLIS", "", "Most CPU time of a session, in thousandths of one CPU"),
    var("SESSION_DISK_BYTES", "", "Most bytes that a session may add to the disk"),
    var("SESSION_OUTPUT_BYTES", "64 MiB", "Most bytes of shell output of an execution"),
];

/// Variables of the contract that this version cannot honour.
const NOT_YET: &[&str] = &[
    "OPENCODE_PLUGIN_DIR",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
    "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    "OTEL_EXPORTER_OTLP_METRICS_HEADERS",
    "OTEL_EXPORTER_OTLP_LOGS_HEADERS",
    "OTEL_EXPORTER_OTLP_PROTOCOL",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL",
    "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL",
    "OTEL_EXPORTER_OTLP_TIMEOUT",
    "OTEL_EXPORTER_OTLP_COMPRESSION",
    "OTEL_EXPORTER_OTLP_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_CLIENT_KEY",
    "OTEL_EXPORTER_OTLP_INSECURE",
];

/// The names that stop the start when they are set.
pub fn not_yet() -> impl Iterator<Item = &'static str> {
    NOT_YET.iter().copied()
}

/// The default as it would be written; `None` where there is none.
pub(super) fn default_of(name: &str) -> Option<&'static str> {
    REFERENCE.iter().find(|v| v.name == name).map(|v| v.default).filter(|default| !default.is_empty())
}
