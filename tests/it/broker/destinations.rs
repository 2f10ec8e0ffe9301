//! Where the broker calls, and where not: by the list, and by the addresses that a name has.

use super::{KEY, PLENTY, World, call, config, error, grant};
use futures_util::FutureExt;
use opencode_sidecar::broker::BrokerConfig;
use opencode_sidecar::broker::destination::{Destinations, Names, Ports};
use opencode_sidecar::model::task::Provider;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Public by every list, and nobody takes a connection there: the anycast address of AS112, which answers for private
/// zones on the port of DNS alone.
const PUBLIC: &str = "2620:4f:8000::1";

/// A resolver that gives one list of addresses after another, and how often it was asked.
fn names(answers: &'static [&'static [&'static str]]) -> (Names, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let names = Names::new(move |_| {
        let answer = answers[count.fetch_add(1, Ordering::SeqCst).min(answers.len() - 1)];
        async move { Ok(answer.iter().map(|text| text.parse::<IpAddr>().unwrap()).collect()) }.boxed()
    });
    (names, asked)
}

/// Calls the model at this host, with the scripted model's port. Gives the status, and what OpenCode is told.
async fn asked_at(world: &World, host: &str) -> (u16, Value) {
    let endpoint = world.model.base_url().replace("127.0.0.1", host);
    let lease = world.broker.open(grant(&endpoint, Provider::Custom, PLENTY));
    let url = format!("{}/chat/completions", lease.base_url());
    let request = world.http.post(url).bearer_auth(lease.token().expose_secret()).json(&call(json!({"text": "hello"})));
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    if status == 200 {
        return (status, json!(response.text().await.unwrap()));
    }
    let told = error(response).await;
    let last = lease.facts().borrow().last_error.clone().unwrap();
    assert_eq!(told["message"], last.message);
    (status, json!([last.code, last.transient, last.message]))
}

async fn world(allow: &str, names: Names) -> World {
    let destinations = Destinations::parse(allow, Ports::Optional).unwrap();
    let config = BrokerConfig { destinations, names, connect_timeout: Duration::from_secs(1), ..config() };
    World::with(config, Provider::Custom, PLENTY).await
}

#[tokio::test]
async fn a_host_that_is_not_allowed_is_not_called() {
    let (names, asked) = names(&[&["127.0.0.1"]]);
    let world = world("models.example,*.provider.example:443,127.0.0.1:1", names).await;
    let hosts =
        ["127.0.0.1", "[::1]", "localhost", "other.example", "a.provider.example", "models.example.evil.example"];
    for host in hosts {
        let (status, told) = asked_at(&world, host).await;
        assert_eq!((status, &told[0], &told[1]), (403, &json!("model_endpoint_refused"), &json!(false)), "{host}");
        assert!(told[2].as_str().unwrap().contains("is not among the hosts that are allowed"), "{told}");
    }
    assert_eq!((world.model.calls(), asked.load(Ordering::SeqCst)), (0, 0));
    let line = format!("opencode_sidecar_broker_refused_total{{why=\"endpoint\"}} {}", hosts.len());
    assert!(world.metrics.render().unwrap().lines().any(|l| l == line));
    world.end().await;
}

#[tokio::test]
async fn a_name_is_looked_up_once_and_its_addresses_are_dialled() {
    // A second question would lead nowhere.
    let (names, asked) = names(&[&["127.0.0.1"], &[]]);
    let world = world("models.example", names).await;
    let (status, answer) = asked_at(&world, "models.example").await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!((world.model.calls(), asked.load(Ordering::SeqCst)), (1, 1));
    assert_eq!(world.model.authorization_values(), [format!("Bearer {KEY}")]);
    world.end().await;
}

#[tokio::test]
async fn a_name_that_leads_inside_gains_nothing() {
    for inside in ["127.0.0.1", "::ffff:127.0.0.1", "::1", "10.0.0.1", "169.254.169.254", "fd00:ec2::254"] {
        let found = [inside.parse::<IpAddr>().unwrap()];
        let names = Names::new(move |_| async move { Ok(found.to_vec()) }.boxed());
        let world = world("*.example", names).await;
        let (status, told) = asked_at(&world, "models.example").await;
        assert_eq!((status, &told[0]), (403, &json!("model_endpoint_refused")), "{inside}");
        assert!(told[2].as_str().unwrap().contains("models.example has no public address"), "{told}");
        assert_eq!(world.model.calls(), 0, "{inside}");
        world.end().await;
    }
}

/// The name is public when it is first asked for and leads to this machine from then on; and it is both at once.
#[tokio::test]
async fn a_name_that_changes_its_mind_gains_nothing() {
    let (names, asked) = names(&[&[PUBLIC], &["127.0.0.1"], &["127.0.0.1", PUBLIC]]);
    let world = world("*.example", names).await;
    for (n, code) in ["model_unreachable", "model_endpoint_refused", "model_unreachable"].into_iter().enumerate() {
        let (_, told) = asked_at(&world, "models.example").await;
        assert_eq!(told[0], code, "{n}: {told}");
        assert_eq!(asked.load(Ordering::SeqCst), n + 1, "one question for one connection");
    }
    assert_eq!(world.model.calls(), 0);
    world.end().await;
}

#[tokio::test]
async fn a_redirection_is_not_followed_and_no_header_of_the_provider_comes_along() {
    let (names, asked) = names(&[&["127.0.0.1"]]);
    let world = world("127.0.0.1", names).await;
    let away = json!({"status": 307, "headers": {"location": "http://models.example/v1/chat/completions"}});
    assert_eq!(world.chat(away).send().await.unwrap().status(), 400);
    assert_eq!((world.model.calls(), asked.load(Ordering::SeqCst)), (1, 0));

    let choice = json!({"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello"}});
    let mut body = call(json!({"status": 200, "body": {"choices": [choice]}, "headers": {
        "set-cookie": "a=b", "location": "/x", "alt-svc": "h3=\":443\"", "refresh": "0", "access-control-allow-origin": "*",
        "www-authenticate": "Basic", "link": "</x>; rel=preload", "server": "x", "x-request-id": "1", "retry-after": "9"}}));
    body["stream"] = json!(false);
    let response = world.post("/chat/completions").json(&body).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let names: Vec<_> = response.headers().keys().map(|name| name.as_str().to_owned()).collect();
    for name in &names {
        assert!(["cache-control", "content-type", "date", "transfer-encoding"].contains(&name.as_str()), "{names:?}");
    }
    assert!(response.text().await.unwrap().contains("hello"));
    world.end().await;
}
