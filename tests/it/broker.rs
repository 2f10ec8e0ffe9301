//! The broker between a client and a scripted provider, over real sockets.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

mod bounds;
mod destinations;

use crate::support::sidecar::PATIENCE;
use bytes::Bytes;
use futures_util::StreamExt;
use opencode_sidecar::broker::destination::{Destinations, Ports};
use opencode_sidecar::broker::{Broker, BrokerConfig, Budget, Exhausted, Facts, Grant, Lease, Outcome, Upstream};
use opencode_sidecar::model::task::Provider;
use opencode_sidecar::scripted::{Script, ScriptedModel};
use opencode_sidecar::tasks::Tasks;
use opencode_sidecar::telemetry::Metrics;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::sync::mpsc;

const KEY: &str = "the-real-key";
const PLENTY: Budget = Budget { model_calls: 1_000, total_tokens: 1_000_000 };

fn client() -> reqwest::Client {
    // The provider of TLS is the process's; another test may have set it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // No pool: what one test closes, no other call of it may meet.
    reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build().unwrap()
}

struct World {
    tasks: Tasks,
    metrics: Metrics,
    model: ScriptedModel,
    broker: Broker,
    lease: Lease,
    http: reqwest::Client,
}

fn config() -> BrokerConfig {
    BrokerConfig { destinations: Destinations::parse("127.0.0.1", Ports::Optional).unwrap(), ..BrokerConfig::default() }
}

fn grant(endpoint: &str, provider: Provider, limits: Budget) -> Grant {
    Grant {
        upstream: Upstream {
            provider,
            endpoint: endpoint.parse().unwrap(),
            api_key: SecretString::from(KEY),
            model: "m".to_owned(),
        },
        limits,
    }
}

impl World {
    async fn new() -> Self {
        Self::with(config(), Provider::Custom, PLENTY).await
    }

    async fn with(config: BrokerConfig, provider: Provider, limits: Budget) -> Self {
        let tasks = Tasks::new();
        let metrics = Metrics::new().unwrap();
        let model = ScriptedModel::start(&tasks, None).await.unwrap();
        let broker = Broker::start(&tasks, metrics.clone(), config).await.unwrap();
        let lease = broker.open(grant(&model.base_url(), provider, limits));
        Self { tasks, metrics, model, broker, lease, http: client() }
    }

    fn post(&self, path: &str) -> reqwest::RequestBuilder {
        let token = self.lease.token().expose_secret();
        self.http.post(format!("{}{path}", self.lease.base_url())).bearer_auth(token)
    }

    fn chat(&self, step: Value) -> reqwest::RequestBuilder {
        self.post("/chat/completions").json(&call(step))
    }

    fn facts(&self) -> Facts {
        self.lease.facts().borrow().clone()
    }

    /// Waits until no call is under way, and gives the facts then.
    async fn settled(&self) -> Facts {
        self.lease.facts().wait_for(|facts| facts.in_flight == 0).await.unwrap().clone()
    }

    /// Ends everything; nothing may be left.
    async fn end(self) {
        let Self { tasks, metrics: _, model, broker, lease, http } = self;
        drop((model, broker, lease, http));
        assert_eq!(tasks.stop(PATIENCE).await, Ok(()));
    }
}

fn call(step: Value) -> Value {
    let prompt = Script::new().json(step).unwrap().to_prompt("Go.");
    json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": prompt}]})
}

async fn error(response: reqwest::Response) -> Value {
    serde_json::from_slice::<Value>(&response.bytes().await.unwrap()).unwrap()["error"].clone()
}

#[tokio::test]
async fn an_answer_passes_byte_for_byte_and_only_the_key_reaches_the_provider() {
    let world = World::new().await;
    let body = call(
        json!({"text": "Grüße, two words", "reasoning": "so", "tools": [{"name": "bash", "args": {"command": "ls"}}],
        "usage": {"prompt": 11, "completion": 5, "cost": 0.25}}),
    );
    let direct =
        world.http.post(format!("{}/chat/completions", world.model.base_url())).json(&body).send().await.unwrap();
    let direct = direct.bytes().await.unwrap();
    let through = world
        .post("/chat/completions")
        .header("cookie", "a=b")
        .header("x-forwarded-for", "1.2.3.4")
        .header("accept-encoding", "gzip")
        .json(&body)
        .send()
        .await
        .unwrap();
    assert_eq!(through.status(), 200);
    assert_eq!(through.headers()["content-type"], "text/event-stream");
    assert_eq!(through.bytes().await.unwrap(), direct);

    assert_eq!(world.model.authorization_values(), [format!("Bearer {KEY}")]);
    let request = world.model.requests().pop().unwrap();
    assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/v1/chat/completions"));
    let header = |name: &str| request.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
    assert_eq!((header("cookie"), header("x-forwarded-for")), (None, None));
    assert_eq!((header("accept-encoding"), header("content-type")), (Some("identity"), Some("application/json")));
    assert!(!format!("{request:?}").contains(world.lease.token().expose_secret()));
    assert_eq!(serde_json::from_slice::<Value>(&request.body).unwrap(), body);

    let facts = world.settled().await;
    assert_eq!((facts.calls, facts.input_tokens, facts.output_tokens), (1, 11, 5));
    assert!((facts.cost - 0.25).abs() < 1e-9, "{facts:?}");
    assert_eq!((facts.last_error, facts.exhausted, facts.failures_in_a_row), (None, None, 0));
    let shown = format!("{:?} {:?}", world.lease, world.broker);
    assert!(!shown.contains(KEY) && !shown.contains(world.lease.token().expose_secret()), "{shown}");
    world.end().await;
}

#[tokio::test]
async fn anthropic_gets_its_own_header_and_its_usage_is_read() {
    let world = World::with(config(), Provider::Anthropic, PLENTY).await;
    let response = world
        .http
        .post(format!("{}/messages", world.lease.base_url()))
        .header("x-api-key", world.lease.token().expose_secret())
        .header("anthropic-version", "2023-06-01")
        .header("anthropic-beta", "some-beta")
        .json(&call(json!({"text": "hello", "tools": [{"name": "bash", "args": {}}]})))
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.text().await.unwrap().contains("message_stop"));
    assert_eq!(world.model.authorization_values(), [KEY]);
    let request = world.model.requests().pop().unwrap();
    assert_eq!(request.path, "/v1/messages");
    assert!(request.headers.contains(&("anthropic-version".to_owned(), "2023-06-01".to_owned())));
    assert!(request.headers.contains(&("anthropic-beta".to_owned(), "some-beta".to_owned())));
    let facts = world.settled().await;
    assert_eq!((facts.input_tokens, facts.output_tokens, facts.failures_in_a_row), (100, 20, 0));
    world.end().await;
}

#[tokio::test]
async fn whole_answers_pass_too() {
    let world = World::new().await;
    let mut body = call(json!({"text": "hello"}));
    body["stream"] = json!(false);
    let response = world.post("/chat/completions").json(&body).send().await.unwrap();
    let answer: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
    assert_eq!(answer["choices"][0]["message"]["content"], "hello");
    assert_eq!(world.settled().await.output_tokens, 20);
    world.end().await;
}

#[tokio::test]
async fn no_piece_waits_for_the_next() {
    let world = World::new().await;
    let response = world.chat(json!({"text": "one two", "hold": "second"})).send().await.unwrap();
    let mut stream = response.bytes_stream();
    let mut seen = String::new();
    while !seen.contains("one ") {
        seen.push_str(std::str::from_utf8(&stream.next().await.unwrap().unwrap()).unwrap());
    }
    assert!(!seen.contains("two"));
    assert_eq!(world.facts().in_flight, 1);
    world.model.open_gate("second");
    while let Some(bytes) = stream.next().await {
        seen.push_str(std::str::from_utf8(&bytes.unwrap()).unwrap());
    }
    assert!(seen.contains("two") && seen.ends_with("data: [DONE]\n\n"));
    world.end().await;
}

#[tokio::test]
async fn a_client_that_goes_away_takes_the_providers_call_with_it() {
    let mut world = World::new().await;
    let mut reports = world.lease.take_reports();
    // In the middle of an answer …
    let mut stream = world.chat(json!({"text": "one two", "silence": "middle"})).send().await.unwrap().bytes_stream();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    world.model.counts().wait_for(|counts| counts.dropped == 1 && counts.open == 0).await.unwrap();
    // … and before its headers.
    let waiting = world.tasks.spawn("client", world.chat(json!({"silence": "headers"})).send());
    world.model.counts().wait_for(|counts| counts.open == 1).await.unwrap();
    waiting.abort();
    world.model.counts().wait_for(|counts| counts.dropped == 2).await.unwrap();

    assert_eq!(reports.recv().await.unwrap().outcome, Outcome::Abandoned);
    assert_eq!(reports.recv().await.unwrap().outcome, Outcome::Abandoned);
    let facts = world.settled().await;
    assert_eq!((facts.calls, facts.failures_in_a_row, facts.last_error), (2, 0, None));
    world.end().await;
}

#[tokio::test]
async fn every_refusal_of_the_provider_is_typed_and_keeps_its_status() {
    let world = World::with(BrokerConfig { max_failures: 100, ..config() }, Provider::Custom, PLENTY).await;
    for (step, status, code, retry_after, transient) in [
        (json!({"status": 400}), 400, "model_rejected", None, false),
        (json!({"status": 401}), 401, "model_auth", None, false),
        (json!({"status": 402}), 402, "model_rate_limited", None, false),
        (json!({"status": 403}), 403, "model_auth", None, false),
        (json!({"status": 404}), 404, "model_rejected", None, false),
        (json!({"status": 422}), 422, "model_rejected", None, false),
        (
            json!({"status": 429, "headers": {"retry-after": "7", "set-cookie": "a=b"}}),
            429,
            "model_rate_limited",
            Some(7),
            true,
        ),
        (json!({"status": 429, "headers": {"retry-after-ms": "2500"}}), 429, "model_rate_limited", Some(3), true),
        (
            json!({"status": 429, "body": {"error": {"message": "x", "type": "insufficient_quota"}}}),
            402,
            "model_rate_limited",
            None,
            false,
        ),
        (json!({"status": 500}), 500, "model_unavailable", None, true),
        (json!({"status": 503, "headers": {"retry-after": "1"}}), 503, "model_unavailable", Some(1), true),
        (json!({"status": 529}), 529, "model_unavailable", None, true),
        (json!({"status": 307, "headers": {"location": "http://127.0.0.1:1/"}}), 400, "model_rejected", None, false),
    ] {
        let shown = step.to_string();
        let response = world.chat(step).send().await.unwrap();
        assert_eq!(response.status(), status, "{shown}");
        let header = response.headers().get("retry-after").map(|value| value.to_str().unwrap().parse().unwrap());
        assert_eq!(header, retry_after, "{shown}");
        assert!(response.headers().get("set-cookie").is_none() && response.headers().get("location").is_none());
        assert!(error(response).await["message"].as_str().unwrap().contains("model provider"));
        let last = world.settled().await.last_error.unwrap();
        assert_eq!((last.code, last.retry_after, last.transient), (code, retry_after, transient), "{shown}");
    }
    world.end().await;
}

#[tokio::test]
async fn the_providers_words_are_quoted_without_its_key() {
    let world = World::new().await;
    let body = json!({"error": {"message": format!("too long for {KEY}"), "type": "invalid_request_error", "code": "context_length_exceeded"}});
    let response = world.chat(json!({"status": 400, "body": body})).send().await.unwrap();
    let said = error(response).await;
    assert_eq!(said["message"], "the model provider rejected the call (HTTP 400): too long for [key]");
    assert_eq!((&said["type"], &said["code"]), (&json!("invalid_request_error"), &json!("context_length_exceeded")));
    world.end().await;
}

/// Reads a body to its end; `Err` where the connection broke.
async fn read(response: reqwest::Response) -> Result<Bytes, reqwest::Error> {
    response.bytes().await
}

/// The error that the last event of a stream tells.
fn told(body: &[u8]) -> Value {
    let body = std::str::from_utf8(body).unwrap();
    let last = body.trim_end().rsplit("\n\n").next().unwrap();
    let data = last.strip_prefix("event: error\ndata: ").unwrap_or_else(|| panic!("ends otherwise: {body}"));
    serde_json::from_str::<Value>(data).unwrap()["error"].clone()
}

/// Plays each step in a row: the status that OpenCode gets, the code. What fails within an answer is told at its end.
async fn each_is_typed(world: &World, cases: Vec<(Value, u16, &str)>) {
    for (step, status, code) in cases {
        let shown = step.to_string();
        let before = world.facts().failures_in_a_row;
        let response = world.chat(step).send().await.unwrap();
        assert_eq!(response.status(), status, "{shown}");
        let body = read(response).await.unwrap();
        if status == 200 {
            let (said, told) = (world.facts().last_error.unwrap().message, told(&body));
            assert_eq!(told["message"], said, "{shown}");
        }
        let facts = world.settled().await;
        assert_eq!(facts.last_error.unwrap().code, code, "{shown}");
        assert_eq!(facts.failures_in_a_row, before + 1, "{shown}");
    }
}

#[tokio::test]
async fn broken_answers_are_typed() {
    let world = World::with(BrokerConfig { max_failures: 100, ..config() }, Provider::Custom, PLENTY).await;
    let tools = json!([{"name": "write", "args": {"filePath": "a"}}]);
    let cases = vec![
        (json!({"garbage": "text"}), 502, "model_bad_response"),
        (json!({"garbage": "sse"}), 502, "model_bad_response"),
        (json!({"cut": "start"}), 502, "model_cut"),
        (json!({"cut": "text", "text": "one two three"}), 200, "model_cut"),
        (json!({"cut": "tool", "tools": tools}), 200, "model_cut"),
        (json!({"refuse": true}), 502, "model_cut"),
        (json!({"text": "one", "finish": null}), 200, "model_unfinished"),
        (json!({"text": "one", "no_finish": true}), 200, "model_unfinished"),
        (json!({"text": "one", "finish": "error"}), 200, "model_unfinished"),
    ];
    each_is_typed(&world, cases).await;
    // One good call, and the row is broken.
    read(world.chat(json!({"text": "fine"})).send().await.unwrap()).await.unwrap();
    let facts = world.settled().await;
    assert_eq!((facts.failures_in_a_row, facts.last_error, facts.exhausted), (0, None, None));
    world.end().await;
}

#[tokio::test]
async fn an_error_in_the_middle_is_told_in_our_words() {
    let config = BrokerConfig { max_failures: 2, ..config() };
    for (provider, path) in [(Provider::Custom, "/chat/completions"), (Provider::Anthropic, "/messages")] {
        let world = World::with(config.clone(), provider, PLENTY).await;
        let error = json!({"type": "overloaded_error", "message": format!("Overloaded, {KEY}")});
        let step = json!({"text": "one two three four", "cut": "text", "by": {"error": error}});
        let mut ends = Vec::new();
        for _ in 0..2 {
            let response = world.post(path).json(&call(step.clone())).send().await.unwrap();
            let body = read(response).await.unwrap();
            let text = String::from_utf8_lossy(&body);
            assert!(text.contains("one ") && text.contains("two ") && !text.contains("three"), "{text}");
            assert!(!text.contains(KEY) && text.matches("\"error\":").count() == 1, "{text}");
            ends.push(told(&body));
        }
        assert_eq!(ends[0]["message"], "the model provider broke off with an error: Overloaded, [key]");
        assert_eq!(ends[0]["type"], "server_error");
        // One failure too many: nothing in it makes OpenCode call again.
        assert_eq!(ends[1]["message"], Exhausted::Failures.message());
        assert_eq!(ends[1]["type"], "model_error");
        assert_eq!(world.settled().await.exhausted, Some(Exhausted::Failures));
        world.end().await;
    }
}

#[tokio::test]
async fn an_event_longer_than_what_is_held_back_passes_whole() {
    let world = World::new().await;
    let long = "x".repeat(200_000);
    for fault in [Value::Null, json!("abort")] {
        let mut step = json!({"text": long, "chunk_chars": 1_000_000});
        if !fault.is_null() {
            step = json!({"tools": [{"name": "bash", "args": long}], "chunk_chars": 1_000_000, "cut": "call"});
        }
        let body = read(world.chat(step).send().await.unwrap()).await.unwrap();
        assert!(String::from_utf8_lossy(&body).contains(&long));
        assert_eq!(body.ends_with(b"data: [DONE]\n\n"), fault.is_null());
        if !fault.is_null() {
            assert!(told(&body)["message"].as_str().unwrap().contains("broke in the middle"));
        }
    }
    world.end().await;
}

#[tokio::test]
async fn a_wait_that_is_too_long_is_the_end() {
    let config = BrokerConfig { longest_wait: Duration::from_secs(60), ..config() };
    let world = World::with(config, Provider::Custom, PLENTY).await;
    for (status, seconds, answer) in [(429, "60", 402), (429, "59", 429), (503, "60", 400), (503, "59", 503)] {
        let step = json!({"status": status, "headers": {"retry-after": seconds}});
        let response = world.chat(step).send().await.unwrap();
        assert_eq!(response.status(), answer, "{status} {seconds}");
        let last = world.settled().await.last_error.unwrap();
        assert_eq!(last.retry_after, Some(seconds.parse().unwrap()));
        assert_eq!(last.transient, seconds == "59");
        world.lease.reset(PLENTY);
    }
    world.end().await;
}

#[tokio::test]
async fn silence_is_typed() {
    let soon = Duration::from_millis(100);
    // One clock at a time: the other must not be met on a busy machine.
    let hasty = BrokerConfig { header_timeout: soon, ..config() };
    let world = World::with(hasty, Provider::Custom, PLENTY).await;
    each_is_typed(&world, vec![(json!({"silence": "headers"}), 504, "model_timeout")]).await;
    world.end().await;
    let hasty = BrokerConfig { idle_timeout: soon, ..config() };
    let world = World::with(hasty, Provider::Custom, PLENTY).await;
    let cases = vec![
        (json!({"silence": "body"}), 504, "model_timeout"),
        (json!({"text": "one two", "silence": "middle"}), 200, "model_timeout"),
    ];
    each_is_typed(&world, cases).await;
    world.end().await;
}

#[tokio::test]
async fn a_provider_that_is_not_there() {
    let world = World::new().await;
    // Bound and not listening: nobody else gets it.
    let held = tokio::net::TcpSocket::new_v4().unwrap();
    held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = held.local_addr().unwrap();
    let lease = world.broker.open(grant(&format!("http://{address}/v1"), Provider::Local, PLENTY));
    let url = format!("{}/chat/completions", lease.base_url());
    let response =
        world.http.post(url).bearer_auth(lease.token().expose_secret()).json(&call(json!({}))).send().await.unwrap();
    assert_eq!(response.status(), 502);
    let last = lease.facts().borrow().last_error.clone().unwrap();
    assert_eq!(last.code, "model_unreachable");
    assert_eq!(last.message, "the model provider at 127.0.0.1 cannot be reached: connection refused");
    drop(lease);
    world.end().await;
}

#[tokio::test]
async fn a_fault_may_be_limited_to_some_calls() {
    let world = World::new().await;
    let step = json!({"text": "fine", "status": 500, "times": 2});
    for status in [500, 500, 200] {
        assert_eq!(world.chat(step.clone()).send().await.unwrap().status(), status);
    }
    world.end().await;
}

#[tokio::test]
async fn the_budget_of_calls_and_of_tokens_holds() {
    let world = World::with(config(), Provider::Custom, Budget { model_calls: 2, total_tokens: 1_000 }).await;
    for status in [200, 200, 400, 400] {
        let response = world.chat(json!({"text": "x"})).send().await.unwrap();
        assert_eq!(response.status(), status);
        if status == 400 {
            assert_eq!(error(response).await["code"], "budget_exceeded");
        } else {
            read(response).await.unwrap();
        }
    }
    let facts = world.settled().await;
    assert_eq!((facts.calls, facts.exhausted), (2, Some(Exhausted::ModelCalls)));
    assert_eq!(world.model.calls(), 2);

    // The next execution in the session starts anew.
    world.lease.reset(Budget { model_calls: 10, total_tokens: 150 });
    assert_eq!((world.facts().calls, world.facts().exhausted), (0, None));
    for status in [200, 200, 400] {
        let response = world.chat(json!({"text": "x"})).send().await.unwrap();
        assert_eq!(response.status(), status);
        read(response).await.unwrap();
    }
    assert_eq!(world.settled().await.exhausted, Some(Exhausted::TotalTokens));
    assert_eq!(world.model.calls(), 4);
    world.end().await;
}

#[tokio::test]
async fn failures_in_a_row_end_it() {
    let world = World::with(BrokerConfig { max_failures: 3, ..config() }, Provider::Custom, PLENTY).await;
    for _ in 0..3 {
        assert_eq!(world.facts().exhausted, None);
        read(world.chat(json!({"text": "x", "finish": null})).send().await.unwrap()).await.unwrap();
        world.settled().await;
    }
    assert_eq!(world.facts().exhausted, Some(Exhausted::Failures), "known before the next call comes");
    let response = world.chat(json!({"text": "x"})).send().await.unwrap();
    assert_eq!(response.status(), 400);
    assert_eq!(error(response).await["code"], "model_error");
    assert_eq!(world.facts().last_error.unwrap().code, "model_unfinished");
    assert_eq!(world.model.calls(), 3);
    world.end().await;
}

#[tokio::test]
async fn the_failure_that_is_one_too_many_is_told_as_such() {
    let world = World::with(BrokerConfig { max_failures: 2, ..config() }, Provider::Custom, PLENTY).await;
    let step = json!({"status": 500, "headers": {"retry-after": "60"}});
    assert_eq!(world.chat(step.clone()).send().await.unwrap().status(), 500);
    let response = world.chat(step).send().await.unwrap();
    assert_eq!(response.status(), 400);
    assert!(response.headers().get("retry-after").is_none());
    let message = "too many calls of the model failed in a row";
    assert_eq!(error(response).await["message"], message);
    let facts = world.facts();
    assert_eq!((facts.exhausted, facts.last_error.unwrap().code), (Some(Exhausted::Failures), "model_unavailable"));
    world.end().await;
}

#[tokio::test]
async fn a_call_of_an_earlier_execution_counts_for_none() {
    let mut world = World::new().await;
    let mut reports = world.lease.take_reports();
    let response = world.chat(json!({"text": "one two", "hold": "later"})).send().await.unwrap();
    world.lease.reset(PLENTY);
    assert_eq!((world.facts().calls, world.facts().in_flight), (0, 1));
    world.model.open_gate("later");
    read(response).await.unwrap();
    let facts = world.settled().await;
    assert_eq!((facts.input_tokens, facts.output_tokens), (0, 0));
    assert!(matches!(reports.try_recv(), Err(mpsc::error::TryRecvError::Empty)));
    world.end().await;
}

#[tokio::test]
async fn reports_tell_each_call() {
    let mut world = World::new().await;
    let mut reports = world.lease.take_reports();
    read(world.chat(json!({"text": "x", "finish": "length"})).send().await.unwrap()).await.unwrap();
    read(world.chat(json!({"status": 500})).send().await.unwrap()).await.unwrap();
    let first = reports.recv().await.unwrap();
    assert_eq!((first.call, first.outcome), (1, Outcome::Finished("length".to_owned())));
    assert_eq!((first.input_tokens, first.output_tokens), (100, 20));
    assert!(first.first_byte.unwrap() <= first.duration);
    let second = reports.recv().await.unwrap();
    assert!(matches!(second.outcome, Outcome::Failed(error) if error.code == "model_unavailable"));
    assert_eq!(second.call, 2);
    world.end().await;
}

#[tokio::test]
async fn priming_never_reaches_the_provider() {
    let world = World::new().await;
    world.lease.priming(true);
    for path in ["/chat/completions", "/messages", "/responses"] {
        let response = world.post(path).json(&call(json!({"text": "x"}))).send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(read(response).await.unwrap().windows(4).any(|window| window == b"\"ok\""), "{path}");
    }
    assert_eq!((world.model.calls(), world.facts().calls), (0, 0));
    world.lease.priming(false);
    read(world.chat(json!({"text": "x"})).send().await.unwrap()).await.unwrap();
    assert_eq!((world.model.calls(), world.facts().calls), (1, 1));
    world.end().await;
}

#[tokio::test]
async fn who_may_call_what() {
    let world = World::new().await;
    let base = world.lease.base_url();
    let body = call(json!({"text": "x"}));
    let bare = |path: &str| world.http.post(format!("{base}{path}")).json(&body);
    for request in [
        bare("/chat/completions"),
        bare("/chat/completions").bearer_auth(KEY),
        bare("/chat/completions").bearer_auth(""),
        bare("/chat/completions").basic_auth("opencode", Some(world.lease.token().expose_secret())),
        bare("/elsewhere").bearer_auth("wrong"),
        world.http.post(world.lease.shell_url()).bearer_auth("wrong"),
    ] {
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 401);
        assert_eq!(error(response).await["message"], "unauthorized");
    }
    for path in ["/models", "/chat/completions/", "/../v1/embeddings", "/files"] {
        assert_eq!(world.post(path).json(&body).send().await.unwrap().status(), 404, "{path}");
    }
    let token = world.lease.token().expose_secret();
    let get = world.http.get(format!("{base}/chat/completions")).bearer_auth(token).send().await.unwrap();
    assert_eq!(get.status(), 405);
    assert_eq!(world.post("/chat/completions").body("no json").send().await.unwrap().status(), 400);
    assert_eq!(world.model.calls(), 0);

    let mut other = body.clone();
    other["model"] = json!("a-dearer-one");
    let response = world.post("/chat/completions").json(&other).send().await.unwrap();
    assert_eq!(response.status(), 400);
    assert_eq!(world.facts().last_error.unwrap().code, "model_rejected");
    assert_eq!(world.model.calls(), 0);
    world.end().await;
}

#[tokio::test]
async fn a_call_that_is_too_long_is_refused() {
    let world = World::with(BrokerConfig { max_body: 1_000, ..config() }, Provider::Custom, PLENTY).await;
    let response = world.chat(json!({"text": "x".repeat(2_000)})).send().await.unwrap();
    assert_eq!(response.status(), 413);
    assert_eq!(world.model.calls(), 0);
    world.end().await;
}

#[tokio::test]
async fn a_dropped_lease_closes_its_connections_and_its_token_is_worth_nothing() {
    let world = World::new().await;
    let lease = world.broker.open(grant(&world.model.base_url(), Provider::Custom, PLENTY));
    let (url, token) = (format!("{}/chat/completions", lease.base_url()), lease.token().clone());
    let request = |step: Value| world.http.post(&url).bearer_auth(token.expose_secret()).json(&call(step)).send();
    let open = request(json!({"text": "one two", "silence": "middle"})).await.unwrap();
    drop(lease);
    assert!(read(open).await.is_err());
    world.model.counts().wait_for(|counts| counts.dropped == 1).await.unwrap();
    assert_eq!(request(json!({"text": "x"})).await.unwrap().status(), 401);
    // The neighbour is not disturbed.
    assert_eq!(world.chat(json!({"text": "x"})).send().await.unwrap().status(), 200);
    world.end().await;
}

#[tokio::test]
async fn it_serves_until_the_last_lease_is_gone() {
    let world = World::new().await;
    world.tasks.shutdown_token().cancel();
    let primed = {
        world.lease.priming(true);
        world.chat(json!({"text": "x"})).send().await.unwrap()
    };
    assert_eq!(primed.status(), 200);
    drop(primed);
    world.end().await;
}

#[tokio::test]
async fn a_shell_taps_upload_is_handed_on_and_answered_when_taken() {
    let mut world = World::new().await;
    let url = world.lease.shell_url();
    let token = world.lease.token().expose_secret().to_owned();
    let http = world.http.clone();
    let send = |body: reqwest::Body| http.post(&url).bearer_auth(&token).body(body).send();
    assert_eq!(send("early".into()).await.unwrap().status(), 503, "nobody takes it yet");

    let mut calls = world.lease.take_shell_calls();
    let (pieces, body) = mpsc::channel::<Result<Bytes, std::io::Error>>(1);
    let body = futures_util::stream::unfold(body, |mut body| async { body.recv().await.map(|piece| (piece, body)) });
    let answer = world.tasks.spawn("tap", send(reqwest::Body::wrap_stream(body)));
    let mut call = calls.recv().await.unwrap();
    let mut seen = Vec::new();
    for piece in ["one", "two"] {
        pieces.send(Ok(Bytes::from(piece))).await.unwrap();
        seen.extend_from_slice(&call.frames.recv().await.unwrap());
    }
    assert_eq!(seen, b"onetwo", "each piece arrives while the upload is open");
    drop(pieces);
    assert_eq!(call.frames.recv().await, None);
    assert!(!answer.is_finished(), "not answered before it is taken");
    call.done.send(()).unwrap();
    assert_eq!(answer.await.unwrap().unwrap().status(), 204);

    let answer = world.tasks.spawn("tap", send("dropped".into()));
    drop(calls.recv().await.unwrap());
    assert_eq!(answer.await.unwrap().unwrap().status(), 503);
    world.end().await;
}
