//! What the broker adds to a call of the model: to the first byte of an answer, and to the whole of one of 10,000
//! chunks. Beside it, in turn, the same calls straight at the scripted model, from the same client.
//!
//! The long answer comes twice: a chunk each millisecond or two, which is more than a provider sends, and as fast as the
//! scripted model can. In the second both sides wait for nothing but CPU time, which client, broker and model share here.

use crate::World;
use crate::table::{Row, Shown, print, target};
use futures_util::StreamExt;
use opencode_sidecar::broker::destination::{Destinations, Ports};
use opencode_sidecar::broker::{Broker, BrokerConfig, Budget, Grant, Upstream};
use opencode_sidecar::model::task::Provider;
use opencode_sidecar::scripted::Script;
use opencode_sidecar::telemetry::Metrics;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Calls to each side for the first byte.
const CALLS: usize = 1000;
const CHUNKS: usize = 10_000;
/// Long answers to each side, paced and at full speed.
const ANSWERS: usize = 3;
const FAST_ANSWERS: usize = 15;
const SIDES: [&str; 2] = ["broker", "direct"];

/// One way to the model.
struct Way {
    http: reqwest::Client,
    url: String,
    token: SecretString,
}

impl Way {
    fn new(base_url: &str, token: &SecretString) -> Self {
        let http = reqwest::Client::builder().no_proxy().tcp_nodelay(true).build().unwrap();
        Self { http, url: format!("{base_url}/chat/completions"), token: token.clone() }
    }

    /// Makes the call. Gives the time to the first byte of the answer, to its end, and its length in bytes.
    async fn call(&self, body: &Value) -> (Duration, Duration, usize) {
        let started = Instant::now();
        let request = self.http.post(&self.url).bearer_auth(self.token.expose_secret()).json(body);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        let mut stream = response.bytes_stream();
        let mut length = stream.next().await.unwrap().unwrap().len();
        let first = started.elapsed();
        let mut end = Vec::new();
        while let Some(bytes) = stream.next().await {
            let bytes = bytes.unwrap();
            length += bytes.len();
            end.extend_from_slice(&bytes);
            end.drain(..end.len().saturating_sub(64));
        }
        assert!(end.ends_with(b"data: [DONE]\n\n"), "the answer is whole");
        (first, started.elapsed(), length)
    }
}

fn body(step: Value) -> Value {
    let prompt = Script::new().json(step).unwrap().to_prompt("Go.");
    json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": prompt}]})
}

pub(crate) async fn run(world: &World) {
    let config = BrokerConfig {
        destinations: Destinations::parse("127.0.0.1", Ports::Optional).unwrap(),
        calls_per_minute: u32::MAX,
        ..BrokerConfig::default()
    };
    let broker = Broker::start(&world.tasks, Metrics::new().unwrap(), config).await.unwrap();
    let upstream = Upstream {
        provider: Provider::Custom,
        endpoint: world.model.base_url().parse().unwrap(),
        api_key: SecretString::from("key"),
        model: "m".to_owned(),
    };
    let limits = Budget { model_calls: u64::MAX, total_tokens: u64::MAX };
    let lease = broker.open(Grant { upstream, limits });
    let ways =
        [Way::new(&lease.base_url(), lease.token()), Way::new(&world.model.base_url(), &SecretString::from("key"))];

    let short = body(json!({"text": "hello"}));
    for way in &ways {
        way.call(&short).await;
    }
    let mut firsts = [Vec::new(), Vec::new()];
    for call in 0..world.rounds(CALLS) * 2 {
        let (first, _, _) = ways[call % 2].call(&short).await;
        firsts[call % 2].push(first.as_secs_f64() * 1000.0);
    }
    let rows: Vec<_> = SIDES.iter().zip(firsts).map(|(side, samples)| Row::new(side, samples)).collect();
    print("first byte", "ms", Shown::Tail, &rows);
    println!("ratio of the medians: {:.3}", rows[0].median() / rows[1].median());
    target("added to the first byte, p50", rows[0].median() - rows[1].median(), 1.0, " ms");

    let text = "word ".repeat(CHUNKS);
    // Both sides at once: they mostly wait, and what else the machine does meets both.
    let paced = body(json!({"text": text, "delay_ms": 1}));
    let mut totals = [Vec::new(), Vec::new()];
    for _ in 0..ANSWERS {
        let (ours, direct) = tokio::join!(ways[0].call(&paced), ways[1].call(&paced));
        assert_eq!(ours.2, direct.2, "both sides gave the same");
        totals[0].push(ours.1.as_secs_f64());
        totals[1].push(direct.1.as_secs_f64());
    }
    target("added to the whole answer, paced", added("10,000 chunks, paced", totals), 2.0, " %");

    let fast = body(json!({ "text": text }));
    let mut totals = [Vec::new(), Vec::new()];
    for call in 0..2 * FAST_ANSWERS {
        totals[call % 2].push(ways[call % 2].call(&fast).await.1.as_secs_f64());
    }
    added("10,000 chunks, at full speed", totals);
}

/// Prints both sides, and gives what the broker adds, in percent.
fn added(title: &str, totals: [Vec<f64>; 2]) -> f64 {
    let rows: Vec<_> = SIDES.iter().zip(totals).map(|(side, samples)| Row::new(side, samples)).collect();
    print(title, "s", Shown::Spread, &rows);
    let ratio = rows[0].median() / rows[1].median();
    println!("ratio of the medians: {ratio:.3}");
    (ratio - 1.0) * 100.0
}
