//! A task as it was accepted: every field checked, every default filled in. No secret is in it.

use super::request::OnRestart;
use super::{SessionId, TaskId};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::borrow::Cow;
use std::time::Duration;

/// What to run, as accepted. Stored with the execution and shown by `GET /tasks/{id}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    pub task_id: TaskId,
    pub prompt: Option<String>,
    pub code: Option<String>,
    pub context: Option<String>,
    /// The session that the caller asked for; absent where the execution gets one of its own.
    pub session_id: Option<SessionId>,
    pub model: ModelChoice,
    pub system_prompt: Option<String>,
    pub agent: Option<String>,
    /// Relative to the workspace, without `..`; absent for the workspace itself.
    pub workdir: Option<String>,
    /// Wall clock without paused time, in whole seconds.
    pub timeout_seconds: u64,
    pub limits: Limits,
    /// What becomes of it where the sidecar goes away while it runs.
    #[serde(default)]
    pub on_restart: OnRestart,
    /// The caller's own JSON, handed back unread.
    pub metadata: Option<Value>,
}

impl Task {
    /// A task that is nothing but a prompt.
    pub fn new(task_id: TaskId, prompt: &str, model: ModelChoice, timeout_seconds: u64, limits: Limits) -> Self {
        Self {
            task_id,
            prompt: Some(prompt.to_owned()),
            code: None,
            context: None,
            session_id: None,
            model,
            system_prompt: None,
            agent: None,
            workdir: None,
            timeout_seconds,
            limits,
            on_restart: OnRestart::default(),
            metadata: None,
        }
    }

    /// The deadline of the whole run.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_seconds)
    }

    /// What OpenCode is prompted with: the prompt, then the code and the context, each under a heading of its own.
    pub fn prompt_text(&self) -> String {
        let mut text = self.prompt.clone().unwrap_or_default();
        for (heading, part) in [("Code", &self.code), ("Context", &self.context)] {
            if let Some(part) = part {
                if !text.is_empty() {
                    text.push_str("\n\n");
                }
                text.push_str("# ");
                text.push_str(heading);
                text.push_str("\n\n");
                text.push_str(part);
            }
        }
        text
    }
}

/// Which protocol a provider speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Provider {
    /// OpenAI's chat completions at api.openai.com, or another place that speaks them.
    Openai,
    /// Anthropic's messages at api.anthropic.com.
    Anthropic,
    /// An OpenAI-compatible server of one's own; needs an endpoint.
    Local,
    /// Any other OpenAI-compatible provider; needs an endpoint.
    Custom,
}

impl Provider {
    /// The word in requests and in `OPENCODE_PROVIDER`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Openai => "openai",
            Self::Anthropic => "anthropic",
            Self::Local => "local",
            Self::Custom => "custom",
        }
    }

    /// The provider for a word; `None` for an unknown one.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Openai, Self::Anthropic, Self::Local, Self::Custom].into_iter().find(|p| p.as_str() == word)
    }

    /// The highest temperature that it takes. OpenCode would lower a higher one without a word.
    pub fn max_temperature(self) -> f64 {
        match self {
            Self::Anthropic => 1.0,
            Self::Openai | Self::Local | Self::Custom => 2.0,
        }
    }

    /// The provider's public base URL, where it has one.
    pub fn default_endpoint(self) -> Option<&'static str> {
        match self {
            Self::Openai => Some("https://api.openai.com/v1"),
            Self::Anthropic => Some("https://api.anthropic.com/v1"),
            Self::Local | Self::Custom => None,
        }
    }
}

/// The model that a task runs on, without its key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelChoice {
    pub provider: Provider,
    pub model: String,
    /// The pinned version, as it was asked for.
    #[serde(default)]
    pub version: Option<String>,
    /// Base URL, up to and with the version (`https://api.openai.com/v1`).
    pub endpoint: String,
    pub temperature: Option<f64>,
    pub max_tokens: Option<u32>,
    /// OpenCode's own tool names; `None` means all.
    pub enabled_tools: Option<Vec<String>>,
}

impl ModelChoice {
    /// A model with nothing else said of it.
    pub fn new(provider: Provider, model: &str, endpoint: &str) -> Self {
        Self {
            provider,
            model: model.to_owned(),
            version: None,
            endpoint: endpoint.to_owned(),
            temperature: None,
            max_tokens: None,
            enabled_tools: None,
        }
    }

    /// What the model is called at the provider: the version where that begins with the model's name, else
    /// `<model>-<version>`; the model alone where no version is pinned.
    pub fn name(&self) -> Cow<'_, str> {
        match &self.version {
            None => Cow::Borrowed(&self.model),
            Some(version) if version.starts_with(&self.model) => Cow::Borrowed(version),
            Some(version) => Cow::Owned(format!("{}-{version}", self.model)),
        }
    }
}

/// The least memory of a session, in bytes: OpenCode alone takes some 400 MiB after a few prompts.
pub const LEAST_MEMORY: u64 = 256 << 20;
/// The fewest processes and threads of a session.
pub const LEAST_PIDS: u64 = 64;
/// The least CPU time of a session, in thousandths of one CPU.
pub const LEAST_CPU_MILLIS: u64 = 10;
/// The fewest bytes that a session may add to the disk: OpenCode's own database takes some of them.
pub const LEAST_DISK: u64 = 1 << 20;

/// Ceilings of one execution that hold in this version; each is at most the configured one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Limits {
    /// Bytes of shell output that are kept; more ends the run.
    pub output_bytes: u64,
    /// Calls of the model, failed ones included.
    pub model_calls: u64,
    /// Tokens in and out, as the provider counts them.
    pub total_tokens: u64,
    /// Of all processes of the session together; more ends what takes it. Absent: no limit of its own.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Processes and threads of the session; more are refused.
    #[serde(default)]
    pub pids: Option<u64>,
    /// Thousandths of one CPU for the whole session.
    #[serde(default)]
    pub cpu_millis: Option<u64>,
    /// Bytes that may be added to the disk while the session lives; more ends the run.
    #[serde(default)]
    pub disk_bytes: Option<u64>,
}
