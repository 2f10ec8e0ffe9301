//! A whole session inside: the real OpenCode, its tools, and what agents commonly run.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::sidecar::{World, text_of};
use opencode_sidecar::scripted::Script;

#[tokio::test]
async fn tmp_look() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let script = std::fs::read_to_string("/tmp/probe.sh").unwrap();
    std::fs::write(world.file("probe.sh"), script).unwrap();
    let id = sidecar.submit(&Script::new().bash("bash probe.sh").text("done")).await;
    let events = sidecar.follow(&id).await;
    println!("{}", text_of(&events, "stdout"));
    println!("--- stderr\n{}", text_of(&events, "stderr"));
    println!("{}", events.last().unwrap());
    sidecar.stop().await;
}
