//! From what a caller asks for to a [`Task`]: every field checked, every default filled in.
//!
//! What this version cannot do is refused by the field's name, never skipped.

use super::models;
use crate::model::destination::Destinations;
use crate::model::request::{LimitsRequest, ModelConfig, PermissionMode, TaskRequest};
use crate::model::task::{LEAST_CPU_MILLIS, LEAST_DISK, LEAST_MEMORY, LEAST_PIDS, Limits, ModelChoice, Task};
use crate::model::turns_text;
use crate::secrets::Keyring;
use crate::workspace::is_plain_relative;
use secrecy::SecretString;
use std::path::Path;

/// The longest `metadata`, as JSON, in bytes.
const MAX_METADATA: usize = 16 * 1024;
/// The longest name (of a model, agent, directory) in bytes.
const MAX_NAME: usize = 1024;

/// What the configuration allows, and its defaults.
#[derive(Clone, Debug)]
pub struct Ceilings {
    pub task_timeout_seconds: u64,
    /// Characters of `prompt` and `code` together; the same again for `context` and for `system_prompt`.
    pub max_prompt_length: usize,
    pub limits: Limits,
    pub default_model: Option<(ModelChoice, SecretString)>,
    /// Where models may be called.
    pub endpoints: Destinations,
    /// Opens keys that come encrypted; `None`: such are refused.
    pub keyring: Option<Keyring>,
    /// Why memory, processes and disk of a session are not bounded here, and why its CPU time is not; `None`: they are.
    pub unheld: Option<String>,
    pub unheld_cpu: Option<String>,
}

/// A field that cannot be taken, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct FieldError {
    /// Dotted path in the request, such as `model_config.temperature`.
    pub field: String,
    /// A sentence for the caller. Never the value itself.
    pub reason: String,
}

pub(super) fn refuse<T>(field: &str, reason: impl Into<String>) -> Result<T, FieldError> {
    Err(FieldError { field: field.to_owned(), reason: reason.into() })
}

const NOT_YET: &str = "is not supported by this version";

/// Checks a request; `default_model` is for one that brings no model. The model's key is handed out beside the task,
/// which is stored and shown.
///
/// # Errors
/// The first field that cannot be taken.
pub(super) fn admit(
    request: TaskRequest,
    ceilings: &Ceilings,
    default_model: Option<&(ModelChoice, SecretString)>,
) -> Result<(Task, SecretString), FieldError> {
    let (prompt, code) = (non_empty(request.prompt), non_empty(request.code));
    if prompt.is_none() && code.is_none() {
        return refuse("prompt", "at least one of prompt and code is required");
    }
    let (context, system_prompt) = (non_empty(request.context), non_empty(request.system_prompt));
    let length = |text: &Option<String>| text.as_deref().map_or(0, |t| t.chars().count());
    let max = ceilings.max_prompt_length;
    if length(&prompt) + length(&code) > max {
        let field = if length(&prompt) >= length(&code) { "prompt" } else { "code" };
        return refuse(
            field,
            format!("prompt and code together may have at most {max} characters (MAX_PROMPT_LENGTH)"),
        );
    }
    for (field, text) in
        [("prompt", &prompt), ("code", &code), ("context", &context), ("system_prompt", &system_prompt)]
    {
        prose(field, text.as_deref(), ceilings)?;
    }
    if let Some(permissions) = &request.permissions {
        match permissions.mode {
            None | Some(PermissionMode::Allow) => {}
            Some(_) => return refuse("permissions.mode", format!("only `allow` is possible: another mode {NOT_YET}")),
        }
        if permissions.deadline_seconds.is_some() {
            return refuse("permissions.deadline_seconds", NOT_YET);
        }
        if permissions.on_deadline.is_some() {
            return refuse("permissions.on_deadline", NOT_YET);
        }
    }
    let timeout_seconds = match request.timeout_seconds {
        None => ceilings.task_timeout_seconds,
        Some(0) => return refuse("timeout_seconds", "must be at least 1"),
        Some(seconds) if seconds > ceilings.task_timeout_seconds => {
            return refuse(
                "timeout_seconds",
                format!("may be at most {} (TASK_TIMEOUT)", ceilings.task_timeout_seconds),
            );
        }
        Some(seconds) => seconds,
    };
    let workdir = non_empty(request.workdir);
    if let Some(dir) = &workdir {
        name("workdir", dir)?;
        if !is_plain_relative(Path::new(dir)) {
            return refuse("workdir", "must be relative to the workspace and may not lead outside of it");
        }
    }
    let agent = non_empty(request.agent);
    if let Some(agent) = &agent
        && !["build", "plan"].contains(&agent.as_str())
    {
        return refuse("agent", "must be `build` or `plan`");
    }
    if let Some(metadata) = &request.metadata
        && metadata.to_string().len() > MAX_METADATA
    {
        return refuse("metadata", format!("may have at most {MAX_METADATA} bytes as JSON"));
    }
    let (model, api_key) = model(request.model_config, ceilings, default_model)?;
    let task = Task {
        task_id: request.task_id,
        prompt,
        code,
        context,
        session_id: request.session_id,
        model,
        system_prompt,
        agent,
        workdir,
        timeout_seconds,
        limits: limits(&request.limits.unwrap_or_default(), ceilings)?,
        on_restart: request.on_restart.unwrap_or_default(),
        metadata: request.metadata,
    };
    Ok((task, api_key))
}

/// The model that is asked for, or the default one.
pub(super) fn model(
    config: Option<ModelConfig>,
    ceilings: &Ceilings,
    default: Option<&(ModelChoice, SecretString)>,
) -> Result<(ModelChoice, SecretString), FieldError> {
    match (config, default) {
        (Some(config), _) => models::choose(config, &ceilings.endpoints, ceilings.keyring.as_ref()),
        (None, Some(default)) => Ok(default.clone()),
        (None, None) => {
            refuse("model_config", "is required: this sidecar has no default model (OPENCODE_PROVIDER, OPENCODE_MODEL)")
        }
    }
}

/// A text that goes to the model.
pub(super) fn prose(field: &str, text: Option<&str>, ceilings: &Ceilings) -> Result<(), FieldError> {
    let max = ceilings.max_prompt_length;
    if text.is_some_and(|text| text.chars().count() > max) {
        return refuse(field, format!("may have at most {max} characters (MAX_PROMPT_LENGTH)"));
    }
    if text.is_some_and(|text| text.contains('\0')) {
        return refuse(field, "may not contain the character U+0000");
    }
    Ok(())
}

pub(super) fn non_empty(text: Option<String>) -> Option<String> {
    text.filter(|t| !t.is_empty())
}

/// Names go into paths, logs and terminals: no control characters, nothing that turns the direction of text.
pub(super) fn name(field: &str, value: &str) -> Result<(), FieldError> {
    if value.len() > MAX_NAME {
        return refuse(field, format!("may have at most {MAX_NAME} bytes"));
    }
    if value.chars().any(|c| c.is_control() || turns_text(c)) {
        return refuse(field, "may not contain control or direction characters");
    }
    Ok(())
}

fn limits(asked: &LimitsRequest, ceilings: &Ceilings) -> Result<Limits, FieldError> {
    // What nothing would hold is not promised.
    for (field, value, unheld) in [
        ("limits.memory_bytes", asked.memory_bytes, &ceilings.unheld),
        ("limits.pids", asked.pids, &ceilings.unheld),
        ("limits.disk_bytes", asked.disk_bytes, &ceilings.unheld),
        ("limits.cpu_millis", asked.cpu_millis, &ceilings.unheld_cpu),
    ] {
        if let (Some(_), Some(why)) = (value, unheld) {
            return refuse(field, format!("cannot be held here: {why}"));
        }
    }
    let ceilings = &ceilings.limits;
    let within = |field: &str, value: Option<u64>, ceiling: u64| match value {
        None => Ok(ceiling),
        Some(0) => refuse(field, "must be at least 1"),
        Some(value) if value > ceiling => refuse(field, format!("may be at most {ceiling}, the configured ceiling")),
        Some(value) => Ok(value),
    };
    // Without a configured ceiling any value lowers it. Less than these and OpenCode itself could not start.
    let lowered = |field: &str, value: Option<u64>, ceiling: Option<u64>, least: u64| match value {
        None => Ok(ceiling),
        Some(value) if value < least => refuse(field, format!("must be at least {least}")),
        Some(value) => within(field, Some(value), ceiling.unwrap_or(u64::MAX)).map(Some),
    };
    Ok(Limits {
        memory_bytes: lowered("limits.memory_bytes", asked.memory_bytes, ceilings.memory_bytes, LEAST_MEMORY)?,
        pids: lowered("limits.pids", asked.pids, ceilings.pids, LEAST_PIDS)?,
        cpu_millis: lowered("limits.cpu_millis", asked.cpu_millis, ceilings.cpu_millis, LEAST_CPU_MILLIS)?,
        disk_bytes: lowered("limits.disk_bytes", asked.disk_bytes, ceilings.disk_bytes, LEAST_DISK)?,
        output_bytes: within("limits.output_bytes", asked.output_bytes, ceilings.output_bytes)?,
        model_calls: within("limits.model_calls", asked.model_calls, ceilings.model_calls)?,
        total_tokens: within("limits.total_tokens", asked.total_tokens, ceilings.total_tokens)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::destination::Ports;
    use secrecy::ExposeSecret;
    use serde_json::{Value, json};

    fn ceilings() -> Ceilings {
        Ceilings {
            task_timeout_seconds: 100,
            max_prompt_length: 20,
            limits: Limits { output_bytes: 1000, model_calls: 10, total_tokens: 5000, ..Limits::default() },
            default_model: None,
            endpoints: Destinations::parse("127.0.0.1", Ports::Optional).unwrap(),
            keyring: None,
            unheld: None,
            unheld_cpu: Some("no group".to_owned()),
        }
    }

    fn request(change: impl FnOnce(&mut Value)) -> TaskRequest {
        let mut body = json!({
            "task_id": "018f0000-0000-7000-8000-000000000001",
            "prompt": "do it",
            "model_config": {"provider": "custom", "model": "m", "api_endpoint": "http://127.0.0.1:1/v1/"},
        });
        change(&mut body);
        serde_json::from_value(body).unwrap()
    }

    #[test]
    fn defaults_are_filled_in() {
        let (task, key) = admit(request(|_| {}), &ceilings(), ceilings().default_model.as_ref()).unwrap();
        assert_eq!(task.timeout_seconds, 100);
        assert_eq!(task.limits, ceilings().limits);
        assert_eq!(task.model.model, "m");
        assert_eq!(key.expose_secret(), "");
    }

    #[test]
    fn every_bad_field_is_named() {
        type Change = Box<dyn FnOnce(&mut Value)>;
        let cases: Vec<(&str, Change)> = vec![
            ("prompt", Box::new(|b| b["prompt"] = json!(""))),
            ("prompt", Box::new(|b| b["prompt"] = json!("x".repeat(21)))),
            ("prompt", Box::new(|b| b["prompt"] = json!("a\0b"))),
            ("code", Box::new(|b| b["code"] = json!("x".repeat(18)))),
            ("context", Box::new(|b| b["context"] = json!("x".repeat(21)))),
            ("timeout_seconds", Box::new(|b| b["timeout_seconds"] = json!(0))),
            ("timeout_seconds", Box::new(|b| b["timeout_seconds"] = json!(101))),
            ("workdir", Box::new(|b| b["workdir"] = json!("../x"))),
            ("workdir", Box::new(|b| b["workdir"] = json!("/etc"))),
            ("workdir", Box::new(|b| b["workdir"] = json!("a\u{202e}b"))),
            ("workdir", Box::new(|b| b["workdir"] = json!("a\u{61c}b"))),
            ("agent", Box::new(|b| b["agent"] = json!("nobody"))),
            ("metadata", Box::new(|b| b["metadata"] = json!("x".repeat(20_000)))),
            ("permissions.mode", Box::new(|b| b["permissions"] = json!({"mode": "ask"}))),
            ("limits.memory_bytes", Box::new(|b| b["limits"] = json!({"memory_bytes": 1}))),
            ("limits.model_calls", Box::new(|b| b["limits"] = json!({"model_calls": 11}))),
            ("limits.output_bytes", Box::new(|b| b["limits"] = json!({"output_bytes": 0}))),
            ("model_config", Box::new(|b| b["model_config"] = Value::Null)),
        ];
        for (field, change) in cases {
            let error = admit(request(change), &ceilings(), ceilings().default_model.as_ref())
                .map(|(task, _)| task)
                .unwrap_err();
            assert_eq!(error.field, field, "{error}");
        }
    }
}
