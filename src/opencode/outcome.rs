//! How a run ended: rules over what OpenCode and the model broker said. Pure; nothing here guesses.
//!
//! A run is finished only if OpenCode's last assistant message is complete, has a finish reason of its model and
//! no error. Everything else is a failure with a cause, or not decided yet.

use super::wire::{MessageInfo, NamedError};
use crate::model::Reason;

/// Why a run failed: a reason of the contract's list, and what to tell the user.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    pub reason: Reason,
    pub code: String,
    pub message: String,
    /// Seconds after which another try makes sense, where the provider said so.
    pub retry_after: Option<u64>,
}

impl Failure {
    /// A failure without a hint when to try again.
    pub fn new(reason: Reason, code: &str, message: impl Into<String>) -> Self {
        Self { reason, code: code.to_owned(), message: message.into(), retry_after: None }
    }
}

/// What the model broker knows about the calls of this run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelEvidence {
    /// The last call failed in this way.
    pub last_error: Option<Failure>,
    /// A bound was hit, and the broker answers nothing any more.
    pub exhausted: Option<Failure>,
}

/// Everything that the decision rests on.
#[derive(Clone, Debug, Default)]
pub struct Evidence<'a> {
    /// The newest message of the conversation, if it is the assistant's.
    pub last_assistant: Option<&'a MessageInfo>,
    /// An error that OpenCode reported last and after which it did not go on.
    pub error: Option<&'a NamedError>,
    pub model: ModelEvidence,
    /// The sidecar refused a permission in this run.
    pub permission_refused: bool,
}

/// The decision.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Finished,
    Failed(Failure),
    /// The evidence is not complete yet; look again.
    Undecided,
}

/// Decides how a run ended that OpenCode reports as idle.
pub fn decide(evidence: &Evidence<'_>) -> Verdict {
    if let Some(exhausted) = &evidence.model.exhausted {
        return Verdict::Failed(exhausted.clone());
    }
    let message = evidence.last_assistant;
    if let Some(error) = message.and_then(|m| m.error.as_ref()).or(evidence.error) {
        return Verdict::Failed(failure_of(error, evidence));
    }
    let Some(message) = message else { return Verdict::Undecided };
    if message.time.completed.is_none() {
        return Verdict::Undecided;
    }
    match message.finish.as_deref() {
        Some("stop" | "length") => Verdict::Finished,
        Some("tool-calls") if evidence.permission_refused => Verdict::Failed(Failure::new(
            Reason::PermissionDenied,
            "permission_denied",
            "The agent stopped because something that it asked for was refused.",
        )),
        Some("content-filter") => Verdict::Failed(content_filter()),
        Some("tool-calls") | None => Verdict::Undecided,
        Some(_) => Verdict::Failed(unfinished(evidence)),
    }
}

/// The decision where [`decide`] stays undecided although OpenCode is idle for good.
pub fn decide_at_last(evidence: &Evidence<'_>) -> Failure {
    if let Some(error) = &evidence.model.last_error {
        return error.clone();
    }
    match evidence.last_assistant.map(|m| m.finish.as_deref()) {
        Some(Some("tool-calls")) => Failure::new(
            Reason::Internal,
            "agent_stopped",
            "OpenCode stopped in the middle of its work: its last answer asked for a tool and nothing followed.",
        ),
        _ => unfinished(evidence),
    }
}

fn unfinished(evidence: &Evidence<'_>) -> Failure {
    evidence.model.last_error.clone().unwrap_or_else(|| {
        Failure::new(Reason::ModelError, "model_unfinished", "The model's answer ended without a finish reason.")
    })
}

fn content_filter() -> Failure {
    Failure::new(
        Reason::ModelError,
        "model_content_filter",
        "The model's provider withheld the answer (content filter).",
    )
}

fn failure_of(error: &NamedError, evidence: &Evidence<'_>) -> Failure {
    match error.name.as_str() {
        "ContentFilterError" => return content_filter(),
        // OpenCode has summed the conversation up, or tried to.
        "ContextOverflowError" => {
            let said = evidence.model.last_error.as_ref().map_or_else(|| error.message(), |e| e.message.clone());
            let message = format!("The conversation is too long for the model, even summed up: {said}");
            return Failure::new(Reason::ModelError, "model_context_overflow", message);
        }
        _ => {}
    }
    // The broker saw the provider's answer itself and knows more than what OpenCode made of it.
    if let Some(model) = &evidence.model.last_error {
        return model.clone();
    }
    // OpenCode's words for an answer whose events are JSON of another form; they quote it all.
    if error.message().starts_with("Type validation failed") {
        let message = "The model provider's answer cannot be read: an event in it is none of a model.";
        return Failure::new(Reason::ModelError, "model_bad_response", message);
    }
    // And for its own database, beneath the session's directory. Why is in its log alone.
    if error.message().starts_with("Failed to execute statement") {
        let message = "OpenCode could not read or write its own state. The disk of STATE_DIR may be full.";
        return Failure::new(Reason::Internal, "opencode_state", message);
    }
    let reason = match error.name.as_str() {
        "MessageAbortedError" | "AbortError" => Reason::Internal,
        _ => Reason::ModelError,
    };
    Failure { reason, code: error_code(&error.name), message: error.message(), retry_after: None }
}

/// OpenCode's name of an error as a code of ours: `ProviderAuthError` → `provider_auth_error`.
pub fn error_code(name: &str) -> String {
    let mut code = String::new();
    let mut after_lower = false;
    for c in name.chars().filter(char::is_ascii_alphanumeric).take(64) {
        if c.is_ascii_uppercase() && after_lower {
            code.push('_');
        }
        after_lower = !c.is_ascii_uppercase();
        code.push(c.to_ascii_lowercase());
    }
    match code.as_str() {
        "" => "unknown_error".to_owned(),
        "apierror" => "api_error".to_owned(),
        _ => code,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn message(value: serde_json::Value) -> MessageInfo {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn finished_needs_a_finish_reason_a_time_and_no_error() {
        let cases = [
            (json!({"id":"m","finish":"stop","time":{"completed":1}}), true),
            (json!({"id":"m","finish":"length","time":{"completed":1}}), true),
            (json!({"id":"m","finish":"stop","time":{}}), false),
            (json!({"id":"m","time":{"completed":1}}), false),
            (json!({"id":"m","finish":"unknown","time":{"completed":1}}), false),
            (json!({"id":"m","finish":"other","time":{"completed":1}}), false),
            (json!({"id":"m","finish":"tool-calls","time":{"completed":1}}), false),
            (json!({"id":"m","finish":"content-filter","time":{"completed":1}}), false),
            (json!({"id":"m","finish":"stop","time":{"completed":1},"error":{"name":"APIError"}}), false),
        ];
        for (value, finished) in cases {
            let info = message(value.clone());
            let evidence = Evidence { last_assistant: Some(&info), ..Evidence::default() };
            assert_eq!(decide(&evidence) == Verdict::Finished, finished, "{value}");
        }
        assert_eq!(decide(&Evidence::default()), Verdict::Undecided);
    }

    #[test]
    fn a_bound_or_an_error_is_never_finished() {
        let good = message(json!({"id":"m","finish":"stop","time":{"completed":1}}));
        let budget = Failure::new(Reason::BudgetExceeded, "model_calls", "x");
        let evidence = Evidence {
            last_assistant: Some(&good),
            model: ModelEvidence { exhausted: Some(budget.clone()), last_error: None },
            ..Evidence::default()
        };
        assert_eq!(decide(&evidence), Verdict::Failed(budget));

        let error = NamedError { name: "UnknownError".into(), data: json!({"message":"Model not found"}) };
        let evidence = Evidence { last_assistant: Some(&good), error: Some(&error), ..Evidence::default() };
        let Verdict::Failed(failure) = decide(&evidence) else { panic!("not failed") };
        assert_eq!((failure.reason, failure.code.as_str()), (Reason::ModelError, "unknown_error"));
        assert_eq!(failure.message, "Model not found");
    }

    #[test]
    fn the_broker_knows_better_what_the_provider_said() {
        let error = NamedError { name: "APIError".into(), data: json!({"message":"x"}) };
        let seen =
            Failure { retry_after: Some(7), ..Failure::new(Reason::ModelError, "model_rate_limited", "slow down") };
        let model = ModelEvidence { last_error: Some(seen.clone()), exhausted: None };
        let evidence = Evidence { error: Some(&error), model, ..Evidence::default() };
        assert_eq!(decide(&evidence), Verdict::Failed(seen));
    }

    #[test]
    fn what_opencode_names_itself_has_a_code_of_the_models() {
        let seen = Failure::new(Reason::ModelError, "model_rejected", "215000 tokens");
        let model = ModelEvidence { last_error: Some(seen), exhausted: None };
        for (name, code, words) in [
            ("ContentFilterError", "model_content_filter", "withheld"),
            ("ContextOverflowError", "model_context_overflow", "215000 tokens"),
            ("UnknownError", "model_rejected", "215000 tokens"),
        ] {
            let error = NamedError { name: name.into(), data: json!({"message":"x"}) };
            let evidence = Evidence { error: Some(&error), model: model.clone(), ..Evidence::default() };
            let Verdict::Failed(failure) = decide(&evidence) else { panic!("not failed") };
            assert_eq!((failure.reason, failure.code.as_str()), (Reason::ModelError, code));
            assert!(failure.message.contains(words), "{}", failure.message);
        }
        let data = json!({"message":"Type validation failed: Value: {\"a\":1}.\nError message: […]"});
        let error = NamedError { name: "UnknownError".into(), data };
        let Verdict::Failed(failure) = decide(&Evidence { error: Some(&error), ..Evidence::default() }) else {
            panic!("not failed")
        };
        assert_eq!(failure.code, "model_bad_response");
        assert!(!failure.message.contains("\"a\""), "{}", failure.message);
    }

    #[test]
    fn codes() {
        assert_eq!(error_code("ProviderAuthError"), "provider_auth_error");
        assert_eq!(error_code("APIError"), "api_error");
        assert_eq!(error_code(""), "unknown_error");
    }
}
