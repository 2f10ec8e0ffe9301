//! What a caller may ask for, as it comes in; [`crate::executions`] checks it and makes a [`super::Task`] of it.

use super::{SessionId, TaskId};
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::Value;

/// The body of `POST /tasks/execute`. Unknown fields are refused.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TaskRequest {
    /// The caller's own id of the task.
    pub task_id: TaskId,
    /// What to do. At least one of `prompt` and `code` is required.
    #[serde(default)]
    pub prompt: Option<String>,
    /// Source or instructions that the task is about.
    #[serde(default)]
    pub code: Option<String>,
    /// More for the model to know.
    #[serde(default)]
    pub context: Option<String>,
    /// Run in this session instead of one of its own.
    #[serde(default)]
    pub session_id: Option<SessionId>,
    /// The model to use; the pod's default without it.
    #[serde(default)]
    pub model_config: Option<ModelConfig>,
    /// Added to the agent's system prompt.
    #[serde(default)]
    #[schema(max_length = 50_000)]
    pub system_prompt: Option<String>,
    /// The OpenCode agent that takes the task: `build` (default) or `plan`.
    #[serde(default)]
    pub agent: Option<String>,
    /// Directory to work in, relative to the workspace. It is made where it is missing, and may not lead outside.
    #[serde(default)]
    pub workdir: Option<String>,
    /// Deadline in seconds of wall clock; at most, and by default, `TASK_TIMEOUT`.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub timeout_seconds: Option<u64>,
    /// Ceilings; each may lower the configured one.
    #[serde(default)]
    pub limits: Option<LimitsRequest>,
    /// What the agent may do without asking.
    #[serde(default)]
    pub permissions: Option<PermissionsRequest>,
    /// What a restart of the sidecar does with the execution: only `fail` in this version.
    #[serde(default)]
    pub on_restart: Option<OnRestart>,
    /// The caller's own JSON, up to 16 KiB, handed back unread.
    #[serde(default)]
    pub metadata: Option<Value>,
}

/// A model and how to call it.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// `openai`, `anthropic`, `local` or `custom`.
    pub provider: String,
    /// The provider's name of the model.
    pub model: String,
    /// The provider's key. It stays in the sidecar.
    #[serde(default)]
    #[schema(value_type = Option<String>, write_only)]
    pub api_key: Option<SecretString>,
    /// Not supported by this version.
    #[serde(default)]
    pub api_key_encrypted: Option<String>,
    /// 0 to 2.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// The longest answer, in tokens: 1 to 128000.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 128_000)]
    pub max_tokens: Option<u32>,
    /// Tools the agent may use; null, absent and empty mean all.
    #[serde(default)]
    pub enabled_tools: Option<Vec<String>>,
    /// Not supported by this version.
    #[serde(default)]
    pub model_version: Option<String>,
    /// Base URL of the provider's API with its version; required for `local` and `custom`.
    #[serde(default)]
    pub api_endpoint: Option<String>,
}

/// Ceilings that a task asks for.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsRequest {
    /// Not supported by this version.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Not supported by this version.
    #[serde(default)]
    pub cpu_millis: Option<u64>,
    /// Not supported by this version.
    #[serde(default)]
    pub pids: Option<u64>,
    /// Not supported by this version.
    #[serde(default)]
    pub disk_bytes: Option<u64>,
    /// Bytes of shell output.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub output_bytes: Option<u64>,
    /// Calls of the model, failed ones included.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub model_calls: Option<u64>,
    /// Tokens in and out, as the provider counts them.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub total_tokens: Option<u64>,
}

/// What the agent may do without asking.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PermissionsRequest {
    /// Only `allow` in this version.
    #[serde(default)]
    pub mode: Option<PermissionMode>,
    /// Not supported by this version.
    #[serde(default)]
    pub deadline_seconds: Option<u64>,
    /// Not supported by this version.
    #[serde(default)]
    pub on_deadline: Option<String>,
}

/// Who decides about the agent's actions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PermissionMode {
    Allow,
    Deny,
    Ask,
}

/// What becomes of an execution when the sidecar restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnRestart {
    Fail,
    Resume,
}
