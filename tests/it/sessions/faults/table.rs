//! Every fault of a model, one row each, and what comes of it.

use crate::support::sidecar::API_KEY;
use opencode_sidecar::scripted::Script;
use serde_json::{Value, json};

/// What a provider says of its errors. It is quoted, and the key that it repeats is not.
pub(super) const WORDS: &str = "These are the provider's own words";
/// What the model says, half of it where it breaks off in the middle.
const TEXT: &str = "One two three four.";
const HALF: &str = "One two ";
const AFTER: &str = "After all.";

/// One prompt and its end.
pub(super) struct Row {
    /// The steps of the script, to be seen in a failure of the test.
    pub(super) script: Value,
    pub(super) end: End,
    /// Calls that reach the model.
    pub(super) calls: u64,
    /// Calls that OpenCode makes again after a wait.
    pub(super) retries: u64,
    /// What the agent says, piece by piece: what was begun before a fault, and what came in the end.
    pub(super) says: Vec<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum End {
    Completed,
    /// With this code and this `retry_after`.
    Failed(&'static str, Option<u64>),
}

impl Row {
    pub(super) fn script(&self) -> Script {
        serde_json::from_value(self.script.clone()).unwrap()
    }

    /// A run that completes, with so many calls of the model.
    fn completes(script: Value, calls: u64, says: &[&'static str]) -> Self {
        Self { script, end: End::Completed, calls, retries: 0, says: says.to_vec() }
    }

    /// A run that fails at its first call, or is not allowed another.
    fn fails(script: Value, code: &'static str, says: &[&'static str]) -> Self {
        Self { script, end: End::Failed(code, None), calls: 1, retries: 0, says: says.to_vec() }
    }
}

/// A fault of one call.
struct Fault {
    /// Members of the step.
    step: Value,
    code: &'static str,
    retry_after: Option<u64>,
    /// Whether the same call may work soon, so that OpenCode makes it again.
    passes: bool,
}

fn with(step: &Value, more: Value) -> Value {
    let mut step = step.clone();
    step.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    step
}

fn error(kind: &str) -> Value {
    json!({ "type": kind, "message": format!("{WORDS}, {API_KEY}.") })
}

/// Faults before the first token.
fn refusals() -> Vec<Fault> {
    let fault = |step: Value, code: &'static str, passes: bool| Fault { step, code, retry_after: None, passes };
    let status = |status: u16, code: &'static str, passes: bool| {
        let step = json!({ "status": status, "body": { "error": error("some_error") } });
        // Waits are seen elsewhere; here they would only take time.
        if !passes {
            return fault(step, code, false);
        }
        Fault { retry_after: Some(0), ..fault(with(&step, json!({ "headers": { "retry-after": "0" } })), code, true) }
    };
    let later = |status: u16, code: &'static str| {
        let step = json!({ "status": status, "headers": { "retry-after": "3600" } });
        Fault { retry_after: Some(3600), ..fault(step, code, false) }
    };
    vec![
        status(400, "model_rejected", false),
        status(401, "model_auth", false),
        status(402, "model_rate_limited", false),
        status(403, "model_auth", false),
        fault(
            json!({ "status": 404, "body": { "error": { "message": WORDS, "code": "model_not_found" } } }),
            "model_rejected",
            false,
        ),
        status(422, "model_rejected", false),
        fault(
            json!({ "status": 429, "body": { "error": { "message": WORDS, "code": "insufficient_quota" } } }),
            "model_rate_limited",
            false,
        ),
        later(429, "model_rate_limited"),
        later(503, "model_unavailable"),
        status(408, "model_timeout", true),
        status(409, "model_unavailable", true),
        status(429, "model_rate_limited", true),
        status(500, "model_unavailable", true),
        status(502, "model_unavailable", true),
        status(503, "model_unavailable", true),
        status(504, "model_unavailable", true),
        status(529, "model_unavailable", true),
        // Without a hint: OpenCode's own wait.
        fault(json!({ "status": 429 }), "model_rate_limited", true),
        fault(json!({ "refuse": true }), "model_cut", true),
        fault(json!({ "garbage": "text" }), "model_bad_response", true),
        fault(json!({ "silence": "headers" }), "model_timeout", true),
    ]
}

/// How an answer breaks off, what that is called, and whether it may pass. What comes through the broker in one form is
/// left out for the second protocol.
fn breaks(anthropic: bool) -> Vec<(Value, &'static str, bool)> {
    let all = vec![
        (json!("abort"), "model_cut", true),
        (json!("end"), "model_unfinished", true),
        (json!("silence"), "model_timeout", true),
        (json!("garbage"), "model_bad_response", true),
        (json!({ "error": error("overloaded_error") }), "model_unavailable", true),
        (json!({ "error": error("rate_limit_error") }), "model_rate_limited", true),
        (json!({ "error": error("invalid_request_error") }), "model_rejected", false),
        (json!({ "error": error("authentication_error") }), "model_auth", false),
        (json!({ "error": error("insufficient_quota") }), "model_rate_limited", false),
    ];
    all.into_iter().filter(|(by, ..)| !(anthropic && matches!(by.as_str(), Some("silence" | "garbage")))).collect()
}

/// Where it breaks off, and what was said before.
const PLACES: [(&str, &[&str]); 4] = [("start", &[]), ("text", &[HALF]), ("tool", &[TEXT]), ("call", &[TEXT])];

/// The answer that is broken at a place: for the later two with a tool.
fn broken(place: &str, by: &Value, file: &str) -> Value {
    let step = json!({ "text": TEXT, "cut": place, "by": by });
    if matches!(place, "start" | "text") {
        return step;
    }
    let args = json!({ "command": format!("echo ran | tee -a {file}"), "description": "A scripted command" });
    with(&step, json!({ "tools": [{ "name": "bash", "args": args }] }))
}

/// Whether OpenCode goes on with the tool by itself.
fn goes_on(place: &str, by: &Value) -> bool {
    by == "end" && matches!(place, "tool" | "call")
}

/// Faults that do not pass although OpenCode would try again: the run has one failure (`MODEL_MAX_FAILURES` is 1).
pub(super) fn for_good(anthropic: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    for Fault { step, code, retry_after, .. } in refusals().into_iter().filter(|fault| fault.passes && !anthropic) {
        rows.push(Row { end: End::Failed(code, retry_after), ..Row::fails(json!([step]), code, &[]) });
    }
    for (by, code, _) in breaks(anthropic).iter().filter(|(_, _, passes)| *passes) {
        for (place, said) in PLACES {
            let code = if (by, place) == (&json!("end"), "start") { "model_bad_response" } else { code };
            rows.push(Row::fails(json!([broken(place, by, "for-good")]), code, said));
        }
    }
    rows.push(Row::fails(json!([{ "text": TEXT, "finish": "odd" }]), "model_unfinished", &[TEXT]));
    rows.push(Row::completes(json!([{ "text": AFTER }]), 1, &[AFTER]));
    rows
}

/// Faults before the first token that pass, and those that OpenCode takes for final; odd answers; a conversation that
/// becomes too long.
pub(super) fn before_the_first_token() -> Vec<Row> {
    let mut rows = Vec::new();
    for Fault { step, code, retry_after, passes } in refusals() {
        rows.push(if passes {
            let script = json!([with(&step, json!({ "text": TEXT, "times": 1 }))]);
            Row { retries: 1, ..Row::completes(script, 2, &[TEXT]) }
        } else {
            Row { end: End::Failed(code, retry_after), ..Row::fails(json!([step]), code, &[]) }
        });
    }
    // After work that was done.
    let tool = json!({ "tools": [{ "name": "bash", "args": { "command": "true", "description": "Nothing" } }] });
    let fault = json!({ "status": 500, "headers": { "retry-after": "0" }, "times": 1, "text": AFTER });
    rows.push(Row { retries: 1, ..Row::completes(json!([tool, fault]), 3, &[AFTER]) });
    rows.push(Row { calls: 2, ..Row::fails(json!([tool, { "status": 400 }]), "model_rejected", &[]) });
    rows.extend(odd_answers());
    rows.extend(too_long());
    rows
}

/// Answers that are whole, but no plain ones.
fn odd_answers() -> Vec<Row> {
    let chunk = |delta: Value, finish: Value| {
        format!("data: {}\n\n", json!({ "choices": [{ "index": 0, "delta": delta, "finish_reason": finish }] }))
    };
    let (half, end) = (chunk(json!({ "content": HALF }), Value::Null), chunk(json!({}), json!("stop")));
    let odd = format!("{half}data: {{\"odd\":1}}\n\n{end}data: [DONE]\n\n");
    let args = json!({ "command": "true" }).to_string();
    let tool = |name: &str, args: Value| json!([{ "tools": [{ "name": name, "args": args }] }, { "text": AFTER }]);
    vec![
        Row::completes(json!([{ "text": TEXT, "finish": "length" }]), 1, &[TEXT]),
        Row::completes(json!([{ "text": "" }]), 1, &[]),
        Row::fails(json!([{ "text": TEXT, "finish": "content_filter" }]), "model_content_filter", &[TEXT]),
        Row::completes(tool("bash", json!(args[..args.len() - 3])), 2, &[AFTER]),
        Row::completes(tool("no_such_tool", json!({ "a": 1 })), 2, &[AFTER]),
        // JSON, but not of a model.
        Row::fails(
            json!([{ "status": 200, "headers": { "content-type": "text/event-stream" }, "body": odd }]),
            "model_bad_response",
            &[HALF],
        ),
    ]
}

/// OpenCode sums the conversation up and makes the call again. The summary is the scripted model's answer to the prompt
/// before.
fn too_long() -> Vec<Row> {
    let too_long =
        json!({ "status": 400, "body": { "error": { "message": WORDS, "code": "context_length_exceeded" } } });
    vec![
        Row::completes(json!([{ "text": TEXT }]), 1, &[TEXT]),
        Row::completes(json!([with(&too_long, json!({ "text": AFTER, "times": 1 }))]), 3, &[AFTER]),
        Row::completes(json!([{ "text": TEXT }]), 1, &[TEXT]),
        Row::completes(json!([{ "status": 413, "text": AFTER, "times": 1 }]), 3, &[AFTER]),
        Row::completes(json!([{ "text": TEXT }]), 1, &[TEXT]),
        // Summed up once, it is still too long, and so is the summing up.
        Row { calls: 4, ..Row::fails(json!([too_long]), "model_context_overflow", &[]) },
        Row::completes(json!([{ "text": AFTER }]), 1, &[AFTER]),
    ]
}

/// Faults within an answer: they pass, or OpenCode takes them for final.
pub(super) fn within_an_answer(anthropic: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    for (by, code, passes) in breaks(anthropic) {
        for (place, said) in PLACES {
            let step = broken(place, &by, "within");
            if !passes {
                rows.push(Row::fails(json!([step]), code, said));
                continue;
            }
            let (step, after) = (with(&step, json!({ "times": 1 })), json!({ "text": AFTER }));
            rows.push(match place {
                _ if goes_on(place, &by) => Row::completes(json!([step, after]), 2, &[TEXT, AFTER]),
                "start" => Row { retries: 1, ..Row::completes(json!([step]), 2, &[TEXT]) },
                "text" => Row { retries: 1, ..Row::completes(json!([step]), 2, &[HALF, TEXT]) },
                _ => Row { retries: 1, ..Row::completes(json!([step, after]), 3, &[TEXT, TEXT, AFTER]) },
            });
        }
    }
    rows.push(Row::completes(json!([{ "text": AFTER }]), 1, &[AFTER]));
    rows
}
