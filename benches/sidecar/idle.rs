//! What the sidecar's own process costs while nothing is to do, and how long it takes to start.

use crate::World;
use crate::health::start_bare;
use crate::machine::{cpu, memory};
use crate::sidecar::{Sidecar, directory};
use crate::table::{Row, Shown, print, target};
use opencode_sidecar::scripted::Script;
use opencode_sidecar::store::Embedded;
use std::time::Duration;

/// How long an idle process is watched.
const WATCH: Duration = Duration::from_secs(10);
const MIB: f64 = 1024.0 * 1024.0;

pub(crate) async fn run(world: &World) {
    let state = directory();
    // The first start makes the cluster; it is none of the starts that are measured.
    let sidecar = Sidecar::start(world, state.path(), 0, None).await;
    let first = sidecar.ready_after;
    println!("{:32} {:>8} {:>8} {:>8} {:>8} {:>8}", "idle", "RSS MiB", "PSS MiB", "anon MiB", "threads", "CPU %");
    let fresh = look("sidecar, after its start", sidecar.pid()).await;
    let prompt = Script::new().bash("for i in $(seq 200); do echo line $i; done").text("Done.").to_prompt("Go.");
    for _ in 0..10 {
        sidecar.run(&prompt).await;
    }
    look("sidecar, after 10 tasks", sidecar.pid()).await;
    sidecar.stop().await;
    let (server, _) = start_bare(world, state.path()).await;
    look("a bare axum server", server.pid()).await;
    server.kill(Duration::from_secs(10)).await.unwrap();
    target("RSS of the idle sidecar", fresh * MIB / 1e6, 15.0, " MB");

    let other = directory();
    let postgres = Embedded::start(&world.sandbox, &world.tasks, other.path()).await.unwrap();
    let url = postgres.url();
    let (mut embedded, mut external) = (Vec::new(), Vec::new());
    for round in 0..=world.rounds(5) {
        let sidecar = Sidecar::start(world, state.path(), 0, None).await;
        let embedded_ready = sidecar.ready_after;
        sidecar.stop().await;
        let sidecar = Sidecar::start(world, other.path(), 0, Some(&url)).await;
        // The first one migrates.
        if round > 0 {
            embedded.push(embedded_ready.as_secs_f64() * 1000.0);
            external.push(sidecar.ready_after.as_secs_f64() * 1000.0);
        }
        sidecar.stop().await;
    }
    postgres.stop().await.unwrap();
    let rows = [Row::new("external database", external), Row::new("embedded one that exists", embedded)];
    print("start to ready", "ms", Shown::Spread, &rows);
    println!("the first start, which makes the embedded one: {:.0} ms", first.as_secs_f64() * 1000.0);
    target("start to ready with a database", rows[0].median(), 150.0, " ms");
}

/// Watches a process that has nothing to do; gives its RSS in MiB.
async fn look(name: &str, pid: u32) -> f64 {
    // What the last work left to do is done by then.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = cpu(pid);
    tokio::time::sleep(WATCH).await;
    let percent = (cpu(pid) - before) / WATCH.as_secs_f64() * 100.0;
    let memory = memory(pid);
    let [rss, pss, anonymous] = [memory.rss, memory.pss, memory.anonymous].map(|bytes| bytes as f64 / MIB);
    println!("{name:32} {rss:>8.1} {pss:>8.1} {anonymous:>8.1} {:>8} {percent:>8.2}", memory.threads);
    rss
}
