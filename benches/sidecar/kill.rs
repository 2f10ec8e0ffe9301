//! How long it takes from the wish to end a fork bomb until it is proven that nothing of it is left.

use crate::World;
use crate::table::{Row, Shown, print, target};
use opencode_sidecar::sandbox::{Limits, Resources, Sandbox, Spec};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, BufReader};

/// Cells that replace themselves without end, each child in a session of its own and deaf to every signal that one can
/// be deaf to, each of which leaves orphans; and some that only sit there. It writes a line when it has grown.
const BOMB: &str = r#"
    deaf() { trap '' TERM HUP INT QUIT USR1 USR2 ALRM; }
    i=0; while [ $i -lt 50 ]; do (setsid sh -c 'trap "" TERM HUP INT QUIT; while :; do sleep 1000; done' &); i=$((i+1)); done
    cell() { deaf; while :; do (setsid sleep 0.1 & exec sleep 0.02); done; }
    i=0; while [ $i -lt 50 ]; do cell & i=$((i+1)); done
    echo grown; wait; while :; do sleep 1; done"#;
/// Well above what the bomb has at a time, so that it goes on forking.
const PIDS: u64 = 1000;

pub(crate) async fn run(world: &World) {
    let resources = Resources::claim(&uuid::Uuid::new_v4().to_string(), Duration::from_millis(200));
    println!("{}, kill by {:?}", resources.probe().mechanism, resources.probe().kill);
    let grouped = world.sandbox.clone().with_resources(resources);
    let (mut in_group, mut by_jail) = (Vec::new(), Vec::new());
    for _ in 0..world.rounds(100) {
        in_group.push(kill(&grouped, Some(Limits { pids: Some(PIDS), ..Limits::default() })).await);
        by_jail.push(kill(&world.sandbox, None).await);
    }
    let rows = [Row::new("in a group, until it is empty", in_group), Row::new("by the jail's own search", by_jail)];
    print("a fork bomb with daemons, ended", "ms", Shown::Tail, &rows);
    target("p99 in a group", rows[0].quantile(0.99), 1000.0, " ms");
    target("p99 by the jail", rows[1].quantile(0.99), 1000.0, " ms");
}

async fn kill(sandbox: &Sandbox, limits: Option<Limits>) -> f64 {
    let mut spec = Spec::new("bomb", "/bin/sh");
    spec.args = vec!["-c".into(), BOMB.into()];
    spec.env = vec![("PATH".into(), "/usr/bin:/bin".into())];
    spec.limits = limits;
    let mut process = sandbox.start(spec).await.unwrap();
    let mut lines = BufReader::new(process.take_stdout().unwrap()).lines();
    lines.next_line().await.unwrap();
    let began = Instant::now();
    process.kill(Duration::from_secs(30)).await.unwrap();
    began.elapsed().as_secs_f64() * 1000.0
}
