//! Admission: so many at once, so many behind them, and a clear no beyond.

use crate::support::sidecar::{World, soon};
use opencode_sidecar::scripted::Script;
use serde_json::{Value, json};

#[tokio::test]
async fn one_runs_one_waits_and_the_third_is_refused() {
    let world = World::new().await;
    let sidecar = world.start(&[("MAX_CONCURRENT_TASKS", "1"), ("MAX_QUEUED_TASKS", "2")]).await;
    let gated = Script::new().bash("echo on; until [ -e gate ]; do sleep 0.02; done").text("done");
    let first = sidecar.submit(&gated).await;
    sidecar.stream(&first, 0).await.until("work", |e| e["type"] == "stdout").await;
    let second = sidecar.submit(&Script::new().text("second")).await;
    let third = sidecar.submit(&Script::new().text("third")).await;
    let place = async |id: &str| sidecar.status(id).await["queue_position"].clone();
    assert_eq!([place(&first).await, place(&second).await, place(&third).await], [Value::Null, json!(1), json!(2)]);

    let body = json!({ "task_id": uuid::Uuid::new_v4(), "prompt": "x" });
    let request = sidecar.http.post(format!("{}/tasks/execute", sidecar.base)).bearer_auth(&sidecar.secret).json(&body);
    let refused = request.send().await.unwrap();
    assert_eq!(refused.status(), 429);
    assert!(refused.headers()["retry-after"].to_str().unwrap().parse::<u64>().unwrap() > 0);
    assert_eq!(refused.json::<Value>().await.unwrap()["code"], "queue_full");

    // One that waits is cancelled without ever having run, and makes room.
    let (_, answer) = sidecar.post(&format!("/tasks/{second}/cancel"), json!({})).await;
    assert_eq!((&answer["status"], &answer["started_at"]), (&json!("cancelled"), &Value::Null));
    assert_eq!(place(&third).await, 1);
    let fourth = sidecar.submit(&Script::new().text("fourth")).await;
    let metrics = async || {
        let answer = sidecar.http.get(format!("{}/metrics", sidecar.base)).send().await.unwrap();
        answer.text().await.unwrap()
    };
    let now = metrics().await;
    assert!(now.contains("opencode_sidecar_executions_running 1"), "{now}");
    assert!(now.contains("opencode_sidecar_executions_queued 2"), "{now}");
    // One that never ran is counted too, shortly after its end is told.
    let ended = r#"opencode_sidecar_executions_total{reason="cancelled",status="cancelled"} 1"#;
    soon("the cancelled one is counted", async { while !metrics().await.contains(ended) {} }).await;

    std::fs::write(world.file("gate"), "").unwrap();
    for id in [&first, &third, &fourth] {
        assert_eq!(sidecar.finished(id).await["status"], "completed");
    }
    sidecar.shipped().await;
    let order = sidecar.get("/tasks?status=completed").await;
    let ids: Vec<_> = order["executions"].as_array().unwrap().iter().map(|e| e["execution_id"].clone()).collect();
    assert_eq!(ids, [json!(fourth), json!(third), json!(first)], "newest first");
    let page = sidecar.get("/tasks?limit=2").await;
    let rest = sidecar.get(&format!("/tasks?limit=2&cursor={}", page["next_cursor"].as_str().unwrap())).await;
    assert_eq!(rest["executions"].as_array().unwrap().len(), 2);
    assert_eq!(rest["next_cursor"], Value::Null);
    sidecar.stop().await;
}

#[tokio::test]
async fn whoever_prefers_to_wait_gets_the_end() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let send = async |script: Script, seconds: u32| {
        let body = json!({ "task_id": uuid::Uuid::new_v4(), "prompt": script.to_prompt("x") });
        let request = sidecar.http.post(format!("{}/tasks/execute", sidecar.base)).bearer_auth(&sidecar.secret);
        let response = request.header("prefer", format!("wait={seconds}")).json(&body).send().await.unwrap();
        (response.status().as_u16(), response.headers()["location"].clone(), response.json::<Value>().await.unwrap())
    };
    let (status, location, record) = send(Script::new().text("quick"), 60).await;
    assert_eq!((status, &record["status"]), (200, &json!("completed")), "{record:#}");
    assert_eq!(location, format!("/tasks/{}", record["execution_id"].as_str().unwrap()));
    let (status, _, accepted) = send(Script::new().bash("sleep 550055").text("slow"), 1).await;
    assert_eq!((status, &accepted["status"]), (202, &json!("pending")));
    let id = accepted["execution_id"].as_str().unwrap();
    sidecar.post(&format!("/tasks/{id}/cancel"), json!({})).await;
    sidecar.stop().await;
}
