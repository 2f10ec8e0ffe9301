//! Credentials change while the sidecar runs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test's own helpers fail like the test")]

use crate::support::mint::{Signer, claims};
use crate::support::sidecar::{Sidecar, World, frame, soon};
use opencode_sidecar::sandbox::Signal;
use opencode_sidecar::scripted::Script;
use serde_json::json;
use std::path::Path;

const PROJECT: &str = "default";

/// Whole or not at all.
fn put(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

async fn status(sidecar: &Sidecar, token: &str) -> u16 {
    let request = sidecar.http.get(format!("{}/tasks", sidecar.base)).bearer_auth(token);
    soon("an answer", request.send()).await.unwrap().status().as_u16()
}

/// In the line that says so; a signal may find that a look was faster.
const READ_AGAIN: &str = "\"changed\":true";

#[tokio::test]
async fn the_shared_secret_is_rotated_at_sighup() {
    let world = World::new().await;
    let file = world.state.path().join("secret");
    put(&file, "first\n");
    let name = file.to_str().unwrap();
    let changes = [("OPENCODE_SHARED_SECRET", ""), ("OPENCODE_SHARED_SECRET_FILE", name), ("LOG_LEVEL", "info")];
    let mut sidecar = world.start(&changes).await;
    sidecar.secret = "first".to_owned();
    let id = sidecar
        .submit(&Script::new().bash("echo on; until [ -e gate ]; do sleep 0.02; done; echo off").text("x"))
        .await;
    let mut open = sidecar.socket(&format!("/tasks/{id}/stream")).await;
    assert_eq!(frame(&mut open).await.unwrap()["seq"], 1);
    let rotate = async |sidecar: &mut Sidecar, text: &str, said: &str| {
        put(&file, text);
        sidecar.signal(Signal::Hup);
        sidecar.logged(said).await
    };

    // Both for as long as callers change over, the new one first; then the new one alone.
    rotate(&mut sidecar, "second\nfirst\n", READ_AGAIN).await;
    assert_eq!((status(&sidecar, "first").await, status(&sidecar, "second").await), (200, 200));
    rotate(&mut sidecar, "second\n", READ_AGAIN).await;
    assert_eq!((status(&sidecar, "first").await, status(&sidecar, "second").await), (401, 200));
    sidecar.secret = "second".to_owned();

    // What was let in reads on.
    std::fs::write(world.file("gate"), "").unwrap();
    let mut output = String::new();
    let code = loop {
        match frame(&mut open).await {
            Ok(event) if event["type"] == "stdout" => output.push_str(event["data"].as_str().unwrap()),
            Ok(_) => {}
            Err(code) => break code,
        }
    };
    assert_eq!((code, output.as_str()), (1000, "on\noff\n"));

    // A bad file changes nothing, and is told.
    let line = rotate(&mut sidecar, "a hidden mistake", "what was read before stays in force").await;
    assert!(
        line.contains("OPENCODE_SHARED_SECRET_FILE") && line.contains("\"ERROR\"") && !line.contains("hidden"),
        "{line}"
    );
    assert_eq!((status(&sidecar, "second").await, status(&sidecar, "a hidden mistake").await), (200, 401));
    let auth = sidecar.get("/ready").await["checks"]["auth"].clone();
    assert_eq!(auth["status"], "degraded");
    assert!(auth["detail"].as_str().unwrap().starts_with("OPENCODE_SHARED_SECRET_FILE: "), "{auth}");
    rotate(&mut sidecar, "third", READ_AGAIN).await;
    sidecar.secret = "third".to_owned();
    assert_eq!(sidecar.get("/ready").await["checks"]["auth"], json!({ "status": "ok" }));
    assert_eq!((status(&sidecar, "second").await, status(&sidecar, "third").await), (401, 200));
    sidecar.stop().await;
}

/// Nobody says that the file has changed.
#[tokio::test]
async fn a_key_set_is_rotated_when_its_file_changes() {
    let world = World::new().await;
    let file = world.state.path().join("jwks.json");
    let (one, two) = (Signer::p256(), Signer::ed25519());
    let set = |keys: &[(&Signer, &str)]| {
        json!({ "keys": keys.iter().map(|(key, id)| key.jwk(id)).collect::<Vec<_>>() }).to_string()
    };
    put(&file, &set(&[(&one, "one")]));
    let changes = [("JWT_JWKS_FILE", file.to_str().unwrap()), ("LOG_LEVEL", "info")];
    let mut sidecar = world.start(&changes).await;
    let token = |signer: &Signer, id: &str| {
        signer.token_with(&json!({ "alg": signer.algorithm(), "kid": id }), &claims(PROJECT, "tasks:read"))
    };
    let (by_one, by_two) = (token(&one, "one"), token(&two, "two"));
    assert_eq!((status(&sidecar, &by_one).await, status(&sidecar, &by_two).await), (200, 401));
    put(&file, &set(&[(&one, "one"), (&two, "two")]));
    sidecar.logged(READ_AGAIN).await;
    assert_eq!((status(&sidecar, &by_one).await, status(&sidecar, &by_two).await), (200, 200));
    put(&file, &set(&[(&two, "two")]));
    sidecar.logged(READ_AGAIN).await;
    assert_eq!((status(&sidecar, &by_one).await, status(&sidecar, &by_two).await), (401, 200));
    put(&file, r#"{"keys":[]}"#);
    sidecar.logged("what was read before stays in force").await;
    assert_eq!((status(&sidecar, &by_two).await, status(&sidecar, &sidecar.secret).await), (200, 200));
    sidecar.stop().await;
}

#[tokio::test]
async fn a_credential_that_cannot_be_used_stops_the_start() {
    let world = World::new().await;
    let directory = world.state.path();
    put(&directory.join("secret"), "two words");
    put(&directory.join("key.pem"), "no key, but hidden");
    let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    let (secret, key) = (path("secret"), path("key.pem"));
    let changes =
        [("OPENCODE_SHARED_SECRET", ""), ("OPENCODE_SHARED_SECRET_FILE", &*secret), ("JWT_PUBLIC_KEY_FILE", &*key)];
    let log = world.start_in_vain(&changes).await;
    assert!(log.contains("OPENCODE_SHARED_SECRET_FILE: ") && log.contains("JWT_PUBLIC_KEY_FILE: "), "{log}");
    assert!(!log.contains("two words") && !log.contains("hidden"), "{log}");
    let absent = path("absent");
    let log = world.start_in_vain(&[("JWT_JWKS_FILE", &absent)]).await;
    assert!(log.contains("JWT_JWKS_FILE: the file cannot be read"), "{log}");
}
