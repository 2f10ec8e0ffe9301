//! The backend is told, by the sidecar as it is: through two restarts of it, and one of the backend.

use super::{Client, last_id};
use crate::notify::backend::{Backend, taken};
use crate::support::sidecar::{World, runs, soon};
use opencode_sidecar::model::SessionId;
use opencode_sidecar::sandbox::Signal;
use opencode_sidecar::scripted::Script;
use opencode_sidecar::store::Store;
use serde_json::json;
use uuid::Uuid;

fn session(id: &str) -> SessionId {
    SessionId(id.parse::<Uuid>().unwrap())
}

#[tokio::test]
async fn each_status_is_told_in_order_through_two_restarts() {
    let world = World::new().await;
    let mut backend = Backend::dead();
    let url = backend.url("/base/");
    let told = [("BACKEND_API_URL", url.as_str())];

    // Nobody listens: everything waits.
    let sidecar = world.start(&told).await;
    let client = Client::of(&sidecar);
    let twice = client.create(&Script::new().text("One.")).await;
    let first = client.frames(&twice, None).await;
    client.message(&twice, &Script::new().text("Two.")).await;
    client.frames(&twice, last_id(&first)).await;
    let stopped = client.create(&Script::new().bash("sleep 97001").text("never")).await;
    client.stop(&stopped).await;
    let running = client.create(&Script::new().bash("echo on; sleep 97002").text("never")).await;
    let idle = Uuid::new_v4().to_string();
    let (status, _) = sidecar.post("/sessions", json!({ "session_id": idle })).await;
    assert_eq!(status, 201);
    client.stream(&running, None).await.until("its output", |frame| frame.data["text"] == "on\n").await;
    // One that waits behind it is no change: to the backend the session runs, until the last of them has ended.
    client.message(&running, &Script::new().text("never")).await;
    assert_eq!(client.status(&running).await["status"], "running");
    sidecar.signal(Signal::Term);
    assert_eq!(sidecar.exited().await.code, Some(0), "a backend that is away holds up no shutdown");

    // The backend comes, and is told by another life of the sidecar.
    let sidecar = world.start(&told).await;
    let client = Client::of(&sidecar);
    backend.start();
    let words = ["running", "completed", "pending", "running", "completed"];
    assert_eq!(backend.told(session(&twice), 5).await, words);
    assert_eq!(backend.told(session(&stopped), 2).await, ["running", "cancelled"]);
    assert_eq!(backend.told(session(&running), 2).await, ["running", "failed"]);
    assert_eq!(backend.told(session(&idle), 1).await, ["cancelled"]);
    let calls = backend.calls();
    let failed = taken(&calls, session(&running), "status");
    assert_eq!(failed[0], json!({ "status": "running", "error": null }));
    assert!(failed[1]["error"].as_str().unwrap().contains("shut down"), "{failed:?}");
    let bearer = format!("Bearer {}", sidecar.secret);
    assert!(calls.iter().all(|call| call.method == "PATCH" && call.authorization.as_ref() == Some(&bearer)));
    assert!(calls.iter().all(|call| call.path.starts_with("/base/api/sessions/")), "{calls:#?}");

    // Killed in the middle of a run, when the sidecar knows that this was told.
    let killed = client.create(&Script::new().bash("echo on; sleep 97003").text("never")).await;
    client.stream(&killed, None).await.until("its output", |frame| frame.data["text"] == "on\n").await;
    backend.told(session(&killed), 1).await;
    let store = Store::connect(&world.database()).await.unwrap();
    soon("it is settled", async { while store.callbacks_waiting("default").await.unwrap() > 0 {} }).await;
    let pid = nix::unistd::Pid::from_raw(sidecar.pid().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    sidecar.exited().await;
    soon("nothing of the session is left", async {
        while runs("sleep 97003") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let sidecar = world.start(&told).await;
    assert_eq!(backend.told(session(&killed), 2).await, ["running", "failed"]);
    let last =
        |calls: &[_]| taken(calls, session(&killed), "event-id").last().map(|body| body["last_event_id"].clone());
    let calls = backend.until("the last event's id", |calls| last(calls).is_some()).await;
    let place: String = serde_json::from_value(last(&calls).unwrap()).unwrap();
    assert!(place.starts_with("1."), "{place}");
    // What was told before is not told again.
    assert_eq!(backend.told(session(&twice), 5).await, words);
    sidecar.stop().await;
}
