//! A directory and a file of an execution, read through the API; and the same from a bare axum server, which opens what
//! it is asked for without looking whether it may.

use crate::World;
use crate::health::start_bare;
use crate::sidecar::{Sidecar, directory};
use crate::table::{Row, Shown, print};
use opencode_sidecar::scripted::Script;
use std::time::{Duration, Instant};

/// Files in the directory that is listed.
const ENTRIES: usize = 200;
const SMALL: usize = 4 * 1024;
const LARGE: usize = 8 * 1024 * 1024;
const REQUESTS: usize = 500;
const LARGE_REQUESTS: usize = 50;

pub(crate) async fn run(world: &World) {
    let state = directory();
    let sidecar = Sidecar::start_with(world, state.path(), 0, None, &[("MAX_TASK_FILE_SIZE", "10000000")]).await;
    let id = sidecar.submit(&Script::new().text("Done.").to_prompt("Go.")).await;
    sidecar.ended(&id).await;
    let workspace = state.path().join("workspace");
    let listed = workspace.join("listed");
    std::fs::create_dir(&listed).unwrap();
    for number in 0..ENTRIES {
        std::fs::write(listed.join(format!("file-{number}.txt")), b"x").unwrap();
    }
    std::fs::write(workspace.join("small.txt"), "x".repeat(SMALL)).unwrap();
    std::fs::write(workspace.join("large.txt"), "x".repeat(LARGE)).unwrap();
    let (server, bare) = start_bare(world, &workspace).await;

    let rows = [
        ("list of 200 entries", "files?path=listed&limit=1000", "list/listed", REQUESTS),
        ("file of 4 KiB", "files/content?path=small.txt", "content/small.txt", REQUESTS),
        ("file of 8 MiB", "files/content?path=large.txt", "content/large.txt", LARGE_REQUESTS),
    ];
    for (title, ours, theirs, requests) in rows {
        let ours = sidecar.get(&format!("/tasks/{id}/{ours}"));
        let sides = [ours, sidecar.http.get(format!("http://{bare}/{theirs}"))];
        let mut samples = [Vec::new(), Vec::new()];
        for request in 0..world.rounds(requests) * 2 {
            let side = request % 2;
            let started = Instant::now();
            let answer = sides[side].try_clone().unwrap().send().await.unwrap();
            assert_eq!(answer.status(), 200);
            let length = answer.bytes().await.unwrap().len();
            samples[side].push(started.elapsed().as_secs_f64() * 1000.0);
            assert!(length >= if title.starts_with("list") { ENTRIES } else { SMALL }, "{title}: {length} bytes");
        }
        let [ours, theirs] = samples;
        let rows = [Row::new("sidecar", ours), Row::new("bare axum", theirs)];
        print(title, "ms", Shown::Tail, &rows);
        println!("ratio of the medians: {:.3}", rows[0].median() / rows[1].median());
    }
    server.kill(Duration::from_secs(10)).await.unwrap();
    sidecar.stop().await;
}
