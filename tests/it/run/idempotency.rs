//! A submission that is sent again with its key: one execution, and the first answer again.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::sidecar::{API_KEY, Sidecar, World, answer, soon};
use opencode_sidecar::scripted::Script;
use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

/// An answer to a submission.
#[derive(Clone, Debug, PartialEq)]
struct Answer {
    status: u16,
    replayed: bool,
    location: Option<String>,
    body: Value,
}

impl Answer {
    fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or_default()
    }

    fn id(&self) -> &str {
        self.body["execution_id"].as_str().unwrap()
    }

    /// What it is when it is given again.
    fn again(&self) -> Self {
        assert_eq!((self.status, self.replayed), (202, false), "{self:?}");
        Self { status: 200, replayed: true, ..self.clone() }
    }
}

async fn send_with(sidecar: &Sidecar, headers: &[(&str, &[u8])], body: String) -> Answer {
    let url = format!("{}/tasks/execute", sidecar.base);
    let mut request = sidecar.http.post(url).bearer_auth(&sidecar.secret).header("content-type", "application/json");
    for (name, value) in headers {
        request = request.header(*name, reqwest::header::HeaderValue::from_bytes(value).unwrap());
    }
    let response = soon("an answer", request.body(body).send()).await.unwrap();
    let header = |name| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
    let replayed = header("idempotent-replayed");
    assert!(replayed.as_deref().is_none_or(|word| word == "true"));
    let location = header("location");
    let (status, body) = answer(response).await;
    Answer { status, replayed: replayed.is_some(), location, body }
}

async fn send(sidecar: &Sidecar, key: &str, body: &Value) -> Answer {
    send_with(sidecar, &[("idempotency-key", key.as_bytes())], body.to_string()).await
}

fn task(script: &Script) -> Value {
    json!({ "task_id": uuid::Uuid::new_v4(), "prompt": script.to_prompt("Do it."), "metadata": { "n": 1, "z": null } })
}

async fn executions(sidecar: &Sidecar) -> usize {
    sidecar.get("/tasks?limit=200").await["executions"].as_array().unwrap().len()
}

#[tokio::test]
async fn the_first_answer_again_however_the_body_is_written_and_whoever_pays() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let mut body = task(&Script::new().text("done"));
    body["model_config"] = json!({
        "provider": "custom", "model": "scripted-model", "api_endpoint": world.model.base_url(), "api_key": API_KEY,
        "temperature": 1,
    });
    let first = send(&sidecar, "k-1", &body).await;
    assert_eq!(first.location.as_deref(), Some(&*format!("/tasks/{}", first.id())));
    assert_eq!(send(&sidecar, "k-1", &body).await, first.again());

    // Another order, other spaces, another form of a number, a null that says nothing, another key of the provider.
    let model =
        body["model_config"].to_string().replace(API_KEY, "sk-another").replace(":1}", ":1.0 , \"max_tokens\" :null}");
    assert!(model.contains("sk-another") && model.contains("1.0"), "{model}");
    let other = format!(
        "\n{{ \"prompt\":{},\t\"model_config\" : {model}, \"metadata\":{{\"z\":null, \"n\":1e0}}, \"task_id\":{}  }}\r\n",
        body["prompt"], body["task_id"]
    );
    let again = send_with(&sidecar, &[("idempotency-key", b"k-1")], other).await;
    assert_eq!(again, first.again());
    assert_eq!(sidecar.finished(first.id()).await["status"], "completed");
    // After its end as well: the first answer, or the end for whoever prefers to wait for it.
    assert_eq!(send(&sidecar, "k-1", &body).await, first.again());
    let waited = send_with(&sidecar, &[("idempotency-key", b"k-1"), ("prefer", b"wait=60")], body.to_string()).await;
    assert_eq!(
        (waited.status, waited.replayed, &waited.body["status"]),
        (200, true, &json!("completed")),
        "{waited:?}"
    );
    assert_eq!(waited.id(), first.id());

    for (field, value) in
        [("prompt", json!("else")), ("metadata", json!({ "n": 2, "z": null })), ("metadata", json!({ "n": 1 }))]
    {
        let mut other = body.clone();
        other[field] = value;
        let refused = send(&sidecar, "k-1", &other).await;
        assert_eq!((refused.status, refused.code()), (409, "idempotency_mismatch"), "{refused:?}");
        assert_eq!(refused.body["details"]["field"], "Idempotency-Key");
    }
    // A key of one's own, and no key at all, are each a task of their own.
    let second = send(&sidecar, "k-2", &body).await;
    let third = send_with(&sidecar, &[], body.to_string()).await;
    assert_eq!((second.status, third.status), (202, 202));
    for id in [second.id(), third.id()] {
        assert_eq!(sidecar.finished(id).await["status"], "completed");
    }
    assert_eq!(executions(&sidecar).await, 3);
    assert_eq!(world.model.calls(), 3);

    // With the execution its key is gone.
    for _ in 0..2 {
        assert_eq!(sidecar.send(Method::DELETE, &format!("/tasks/{}", first.id()), None).await.0, 204);
    }
    body["prompt"] = json!(Script::new().text("new").to_prompt("Do it."));
    let new = send(&sidecar, "k-1", &body).await;
    assert_eq!(send(&sidecar, "k-1", &body).await, new.again());
    assert_ne!(new.id(), first.id());
    sidecar.finished(new.id()).await;
    sidecar.stop().await;
}

#[tokio::test]
async fn a_bad_key_is_named_and_nothing_is_taken() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let body = task(&Script::new().text("x"));
    let (long, longest) = (vec![b'x'; 256], vec![b'~'; 255]);
    for bad in [b"" as &[u8], b"two words", "\u{e4}".as_bytes(), b"\xff", b"a\tb", &long] {
        let refused = send_with(&sidecar, &[("idempotency-key", bad)], body.to_string()).await;
        assert_eq!((refused.status, refused.code()), (400, "invalid_field"), "{bad:?}: {refused:?}");
        assert_eq!(refused.body["details"]["field"], "Idempotency-Key");
    }
    let twice: [(&str, &[u8]); 2] = [("idempotency-key", b"a"), ("idempotency-key", b"a")];
    let refused = send_with(&sidecar, &twice, body.to_string()).await;
    assert_eq!((refused.status, &refused.body["details"]["field"]), (400, &json!("Idempotency-Key")));
    // A task that is refused leaves its key free for another one.
    let refused =
        send_with(&sidecar, &[("idempotency-key", &longest)], json!({ "task_id": body["task_id"] }).to_string()).await;
    assert_eq!((refused.status, &refused.body["details"]["field"]), (400, &json!("prompt")));
    assert_eq!(executions(&sidecar).await, 0);
    let taken = send_with(&sidecar, &[("idempotency-key", &longest)], body.to_string()).await;
    assert_eq!(taken.status, 202, "{taken:?}");
    sidecar.finished(taken.id()).await;
    sidecar.stop().await;
}

#[tokio::test]
async fn fifty_at_once_are_one_execution() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let body = task(&Script::new().text("once"));
    let answers = futures_util::future::join_all((0..50).map(|_| send(&sidecar, "at-once", &body))).await;
    let (first, replayed): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| !answer.replayed);
    assert_eq!((first.len(), replayed.len()), (1, 49));
    assert!(replayed.iter().all(|answer| *answer == first[0].again()), "{first:?} {replayed:?}");
    assert_eq!(sidecar.finished(first[0].id()).await["status"], "completed");
    assert_eq!((executions(&sidecar).await, world.model.calls()), (1, 1));
    sidecar.stop().await;
}

#[tokio::test]
async fn a_full_queue_takes_nothing_new_and_still_knows_what_it_took() {
    let world = World::new().await;
    let sidecar = world.start(&[("MAX_CONCURRENT_TASKS", "1"), ("MAX_QUEUED_TASKS", "1")]).await;
    let running = task(&Script::new().bash("echo on; until [ -e gate ]; do sleep 0.02; done").text("done"));
    let first = send(&sidecar, "one", &running).await;
    sidecar.stream(first.id(), 0).await.until("work", |e| e["type"] == "stdout").await;
    let waiting = task(&Script::new().text("second"));
    let second = send(&sidecar, "two", &waiting).await;
    let third = task(&Script::new().text("third"));
    for _ in 0..2 {
        let refused = send(&sidecar, "three", &third).await;
        assert_eq!((refused.status, refused.code()), (429, "queue_full"));
    }
    assert_eq!(send(&sidecar, "one", &running).await, first.again());
    assert_eq!(send(&sidecar, "two", &waiting).await, second.again());
    assert_eq!(send(&sidecar, "two", &third).await.status, 409);
    std::fs::write(world.file("gate"), "").unwrap();
    for id in [first.id(), second.id()] {
        assert_eq!(sidecar.finished(id).await["status"], "completed");
    }
    // What was refused is not remembered: the key takes another body.
    let taken = send(&sidecar, "three", &running).await;
    assert_eq!(taken.status, 202);
    sidecar.finished(taken.id()).await;
    assert_eq!(executions(&sidecar).await, 3);
    sidecar.stop().await;
}

#[tokio::test]
async fn keys_outlive_the_sidecar_and_its_state_directory() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let (body, other) =
        (task(&Script::new().bash("echo on; sleep 880044").text("never")), task(&Script::new().text("x")));
    let first = send(&sidecar, "kept", &body).await;
    sidecar.stream(first.id(), 0).await.until("work", |e| e["type"] == "stdout").await;
    let pid = nix::unistd::Pid::from_raw(sidecar.pid().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    sidecar.exited().await;

    let sidecar = world.start(&[]).await;
    assert_eq!(send(&sidecar, "kept", &body).await, first.again());
    assert_eq!(send(&sidecar, "kept", &other).await.status, 409);
    assert_eq!(executions(&sidecar).await, 1);
    sidecar.stop().await;

    let lost = tempfile::Builder::new().prefix("oc-st-").tempdir().unwrap();
    let fresh = [("STATE_DIR", lost.path().to_str().unwrap())];
    let sidecar = world.start(&fresh).await;
    assert_eq!(send(&sidecar, "kept", &body).await, first.again());
    assert_eq!(send(&sidecar, "kept", &other).await.status, 409);
    assert_eq!(executions(&sidecar).await, 1);
    sidecar.stop().await;

    // Keys are the project's own.
    let sidecar = world.start(&[("PROJECT_ID", "another")]).await;
    let taken = send(&sidecar, "kept", &other).await;
    assert_eq!(taken.status, 202, "{taken:?}");
    sidecar.finished(taken.id()).await;
    sidecar.stop().await;
}

#[tokio::test]
async fn a_replay_needs_no_database() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let body = task(&Script::new().text("done"));
    let first = send(&sidecar, "away", &body).await;
    sidecar.finished(first.id()).await;
    sidecar.shipped().await;

    let url = url::Url::parse(world.database().url.expose_secret()).unwrap();
    let name = url.path().trim_start_matches('/').to_owned();
    let mut elsewhere = url.clone();
    elsewhere.set_path("/postgres");
    let mut operator = PgConnection::connect(elsewhere.as_str()).await.unwrap();
    let rename = async |operator: &mut PgConnection, from: &str, to: &str| {
        let end = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{from}'");
        soon("the database under another name", async {
            loop {
                operator.execute(AssertSqlSafe(end.clone())).await.unwrap();
                let rename = AssertSqlSafe(format!("ALTER DATABASE {from} RENAME TO {to}"));
                // Somebody may have come back in between.
                if operator.execute(rename).await.is_ok() {
                    return;
                }
            }
        })
        .await;
    };
    let away = format!("{name}_away");
    rename(&mut operator, &name, &away).await;
    let (status, _) = sidecar.send(Method::GET, &format!("/tasks/{}", first.id()), None).await;
    assert_eq!(status, 503, "the database is away");
    assert_eq!(send(&sidecar, "away", &body).await, first.again());
    let waits: [(&str, &[u8]); 2] = [("idempotency-key", b"away"), ("prefer", b"wait=60")];
    assert_eq!(send_with(&sidecar, &waits, body.to_string()).await, first.again());
    assert_eq!(send(&sidecar, "away", &task(&Script::new().text("x"))).await.status, 409);
    rename(&mut operator, &away, &name).await;
    // The sidecar may have seen it away, and looks again now and then.
    soon("the database is back", async {
        while sidecar.send(Method::GET, &format!("/tasks/{}", first.id()), None).await.0 == 503 {}
    })
    .await;
    assert_eq!(sidecar.finished(first.id()).await["status"], "completed");
    sidecar.stop().await;
}
