//! What is older than `RETENTION_DAYS` is gone soon after the start; what is younger stays.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::sessions::Client;
use crate::support::postgres::connect;
use crate::support::sidecar::{World, soon};
use opencode_sidecar::scripted::Script;
use reqwest::Method;
use serde_json::json;
use sqlx::{AssertSqlSafe, Executor};

#[tokio::test]
async fn what_is_old_is_forgotten_in_the_background() {
    let world = World::new().await;
    let sidecar = world.start(&[("RETENTION_DAYS", "0")]).await;
    let script = Script::new().bash("echo something").text("done");
    let (old, young) = (sidecar.submit(&script).await, sidecar.submit(&script).await);
    for id in [&old, &young] {
        assert_eq!(sidecar.finished(id).await["status"], "completed");
    }
    let client = Client::of(&sidecar);
    let session = client.create(&Script::new().text("said")).await;
    client.stop(&session).await;
    sidecar.stop().await;

    let mut database = connect(&world.database().url).await;
    let ages = format!(
        "SET search_path = opencode_sidecar;
         UPDATE executions SET created_at = created_at - interval '1 day', completed_at = completed_at - interval '1 day'
         WHERE id <> '{young}';
         UPDATE sessions SET created_at = created_at - interval '1 day', ended_at = ended_at - interval '1 day'"
    );
    database.execute(AssertSqlSafe(ages)).await.unwrap();
    let sidecar = world.start(&[("RETENTION_DAYS", "1")]).await;
    let text = async || {
        let answer = sidecar.http.get(format!("{}/metrics", sidecar.base)).send().await.unwrap();
        answer.text().await.unwrap()
    };
    let count =
        |kind: &str, count: u64| format!("opencode_sidecar_retention_removed_total{{kind=\"{kind}\"}} {count}\n");
    soon("two executions are removed", async { while !text().await.contains(&count("execution", 2)) {} }).await;
    let metrics = text().await;
    assert!(metrics.contains(&count("session", 1)) && metrics.contains(&count("callback", 0)), "{metrics}");
    for path in [format!("/tasks/{old}"), format!("/tasks/{old}/events"), format!("/sessions/{session}")] {
        assert_eq!(sidecar.send(Method::GET, &path, None).await.0, 404, "{path}");
    }
    assert_eq!(sidecar.finished(&young).await["status"], "completed");
    let left = sidecar.get("/tasks").await["executions"].clone();
    assert_eq!(left.as_array().unwrap().iter().map(|e| &e["execution_id"]).collect::<Vec<_>>(), [&json!(young)]);
    let events: (i64,) = sqlx::query_as(AssertSqlSafe(format!(
        "SELECT count(*) FROM opencode_sidecar.execution_events WHERE execution_id <> '{young}'"
    )))
    .fetch_one(&mut database)
    .await
    .unwrap();
    assert_eq!(events.0, 0);
    sidecar.stop().await;

    let log = world.start_in_vain(&[("RETENTION_DAYS", "a-month")]).await;
    assert!(log.contains("RETENTION_DAYS") && !log.contains("a-month"), "{log}");
}
