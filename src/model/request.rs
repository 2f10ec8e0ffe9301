//! What a caller may ask for, as it comes in; [`crate::executions`] checks it and makes a [`super::Task`] of it.

use super::{SessionId, TaskId};
use secrecy::SecretString;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

/// The body of `POST /tasks/execute`. Unknown fields are refused.
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
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
    /// Added to the agent's system prompt, as a system message. Sub-agents do not get it.
    #[serde(default)]
    #[schema(max_length = 50_000)]
    pub system_prompt: Option<String>,
    /// The OpenCode agent that takes the task: `build` (default), or `plan`, which may not write or edit files (its shell
    /// may: leave `bash` out of `enabled_tools` to deny that too).
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
    /// What becomes of it where the sidecar goes away while it runs; `resume` only without `session_id`.
    #[serde(default)]
    pub on_restart: Option<OnRestart>,
    /// The caller's own JSON, up to 16 KiB, handed back unread.
    #[serde(default)]
    pub metadata: Option<Value>,
}

impl TaskRequest {
    /// A prompt in a session, everything else as the session has it.
    pub fn prompt(task_id: TaskId, session_id: SessionId, prompt: String) -> Self {
        Self {
            task_id,
            prompt: Some(prompt),
            session_id: Some(session_id),
            code: None,
            context: None,
            model_config: None,
            system_prompt: None,
            agent: None,
            workdir: None,
            timeout_seconds: None,
            limits: None,
            permissions: None,
            on_restart: None,
            metadata: None,
        }
    }
}

/// A credential is written as if there were none.
fn withheld<S: Serializer>(_: &Option<SecretString>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_none()
}

/// A model and how to call it.
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// `openai`, `anthropic`, `local` or `custom`. `anthropic` speaks Anthropic's messages API, the others OpenAI's chat
    /// completions.
    pub provider: String,
    /// The provider's name of the model.
    pub model: String,
    /// The provider's key. It stays in the sidecar. `openai` and `anthropic` need one.
    #[serde(default, serialize_with = "withheld")]
    #[schema(value_type = Option<String>, write_only)]
    pub api_key: Option<SecretString>,
    /// The same, encrypted: base64 of a nonce of 12 bytes, the ciphertext and a tag of 16 bytes, AES-256-GCM under
    /// `ENCRYPTION_KEY` or `ENCRYPTION_KEY_PREVIOUS`, without additional data. Not together with `api_key`.
    #[serde(default, serialize_with = "withheld")]
    #[schema(value_type = Option<String>, write_only)]
    pub api_key_encrypted: Option<SecretString>,
    /// 0 to 2; for `anthropic` 0 to 1. It is sent with each call, those of sub-agents too. Without it none is sent, but
    /// for a few models of which OpenCode knows better (Gemini, GLM, Kimi, MiniMax).
    #[serde(default)]
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// The longest answer, in tokens: 1 to 128000; without it 8192. It is sent with each call. For `anthropic` it is
    /// lowered to what OpenCode knows as the model's own limit, where it knows the model. At api.openai.com it goes by the
    /// name `max_completion_tokens`.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 128_000)]
    pub max_tokens: Option<u32>,
    /// Tools the agent and its sub-agents may use; null, absent and empty mean all. Each other tool is denied, also one
    /// that comes with a later OpenCode.
    ///
    /// `file_ops` stands for `read`, `write`, `edit`, `patch`, `glob`, `grep` and `list`; `terminal` and `code_exec` for
    /// `bash`; `web_search` for `webfetch` and `websearch`. OpenCode's own names, known are: `bash`, `edit`, `glob`, `grep`,
    /// `read`, `skill`, `task`, `todowrite`, `webfetch`, `websearch`, `write`, and `apply_patch` or `patch`. `write`, `edit`
    /// and `patch` are one right: each stands for all three. `task` starts sub-agents, which have the same tools. OpenCode
    /// offers no `list` any more, and `websearch` only where it has a search service; here it has none.
    #[serde(default)]
    pub enabled_tools: Option<Vec<String>>,
    /// The pinned version of the model. What the provider is asked for is the version itself where it begins with
    /// `model` (`claude-x`, `claude-x-20300101`), else `<model>-<model_version>` (`claude-x`, `20300101`).
    #[serde(default)]
    pub model_version: Option<String>,
    /// Base URL of the provider's API with its version, such as `https://api.openai.com/v1`; required for `local` and
    /// `custom`. Slashes at its end do not count.
    #[serde(default)]
    pub api_endpoint: Option<String>,
}

/// Ceilings that a task asks for.
#[derive(Debug, Default, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsRequest {
    /// Memory of all processes of the session together; at least 256 MiB.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Thousandths of one CPU; at least 10.
    #[serde(default)]
    pub cpu_millis: Option<u64>,
    /// Processes and threads; at least 64.
    #[serde(default)]
    pub pids: Option<u64>,
    /// Bytes added to the disk; at least 1 MiB.
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
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PermissionMode {
    Allow,
    Deny,
    Ask,
}

/// What becomes of an execution when the sidecar restarts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnRestart {
    /// It ends as `failed`/`interrupted`.
    #[default]
    Fail,
    /// It goes on in the same conversation, at most three times. No tool call is run again.
    Resume,
}
