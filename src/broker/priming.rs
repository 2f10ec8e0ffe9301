//! The broker's own answer to a session that is being warmed up: the word "ok".

use super::observe::Api;
use axum::body::Body;
use hyper::{Response, header};
use serde_json::{Value, json};

fn event(value: &Value) -> String {
    match value["type"].as_str() {
        Some(name) => format!("event: {name}\ndata: {value}\n\n"),
        None => format!("data: {value}\n\n"),
    }
}

fn stream(api: Api, model: &str) -> String {
    match api {
        Api::Chat => {
            let chunk = |choices: Value, usage: Value| {
                event(&json!({"id": "chatcmpl-priming", "object": "chat.completion.chunk", "created": 0,
                    "model": model, "choices": choices, "usage": usage}))
            };
            let choice = |delta: Value, finish: Value| json!([{"index": 0, "delta": delta, "finish_reason": finish}]);
            [
                chunk(choice(json!({"role": "assistant", "content": "ok"}), Value::Null), Value::Null),
                chunk(choice(json!({}), json!("stop")), Value::Null),
                chunk(json!([]), json!({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0})),
                "data: [DONE]\n\n".to_owned(),
            ]
            .concat()
        }
        Api::Messages => {
            let usage = json!({"input_tokens": 0, "output_tokens": 0});
            [
                json!({"type": "message_start", "message": {"id": "msg_priming", "type": "message",
                    "role": "assistant", "model": model, "content": [], "stop_reason": null,
                    "stop_sequence": null, "usage": usage}}),
                json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
                json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "ok"}}),
                json!({"type": "content_block_stop", "index": 0}),
                json!({"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": null},
                    "usage": {"output_tokens": 0}}),
                json!({"type": "message_stop"}),
            ]
            .iter()
            .map(event)
            .collect()
        }
        Api::Responses => {
            let response = |status: &str, output: Value| {
                json!({"id": "resp_priming", "object": "response", "created_at": 0, "model": model,
                    "status": status, "output": output, "usage": {"input_tokens": 0, "output_tokens": 0,
                    "total_tokens": 0, "input_tokens_details": {"cached_tokens": 0},
                    "output_tokens_details": {"reasoning_tokens": 0}}})
            };
            let part = json!({"type": "output_text", "text": "ok", "annotations": []});
            let item = |status: &str, content: Value| {
                json!({"id": "msg_priming", "type": "message", "role": "assistant", "status": status,
                    "content": content})
            };
            let at = |kind: &str, name: &str, value: Value| json!({"type": kind, "item_id": "msg_priming", "output_index": 0, "content_index": 0, name: value});
            [
                json!({"type": "response.created", "response": response("in_progress", json!([]))}),
                at("response.output_item.added", "item", item("in_progress", json!([]))),
                at("response.output_text.delta", "delta", json!("ok")),
                at("response.output_item.done", "item", item("completed", json!([part]))),
                json!({"type": "response.completed",
                    "response": response("completed", json!([item("completed", json!([part]))]))}),
            ]
            .iter()
            .map(event)
            .collect()
        }
    }
}

/// The answer to a priming call.
pub(super) fn answer(api: Api, model: &str, streamed: bool) -> Response<Body> {
    let (body, kind) = if streamed {
        (stream(api, model), "text/event-stream")
    } else {
        let whole = match api {
            Api::Chat => json!({"id": "chatcmpl-priming", "object": "chat.completion", "created": 0, "model": model,
                "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}}),
            Api::Messages => json!({"id": "msg_priming", "type": "message", "role": "assistant", "model": model,
                "content": [{"type": "text", "text": "ok"}], "stop_reason": "end_turn", "stop_sequence": null,
                "usage": {"input_tokens": 0, "output_tokens": 0}}),
            Api::Responses => json!({"id": "resp_priming", "object": "response", "created_at": 0, "model": model,
                "status": "completed", "output": [{"id": "msg_priming", "type": "message", "role": "assistant",
                "status": "completed", "content": [{"type": "output_text", "text": "ok", "annotations": []}]}],
                "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}}),
        };
        (whole.to_string(), "application/json")
    };
    let mut response = Response::new(Body::from(body));
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::observe::{Form, Observer};
    use secrecy::SecretString;

    #[test]
    fn every_answer_is_one_that_the_observer_understands() {
        for (api, finish) in [(Api::Chat, "stop"), (Api::Messages, "end_turn"), (Api::Responses, "completed")] {
            let mut observer = Observer::new(api, Form::Stream);
            observer.feed(stream(api, "m").as_bytes());
            observer.end();
            assert_eq!(observer.verdict(&SecretString::from("")).unwrap(), finish);
            assert!(observer.is_done());
            assert_eq!((observer.input_tokens, observer.output_tokens), (0, 0));
        }
    }
}
