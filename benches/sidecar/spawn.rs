//! What it costs to start a short program: by itself, in a jail, in a jail that confines it, and in bubblewrap.

use crate::World;
use crate::table::{Row, Shown, print, target};
use opencode_sidecar::sandbox::Spec;
use opencode_sidecar::sandbox::confine::{Confinement, Namespace, Network};
use std::process::Stdio;
use std::time::{Duration, Instant};

const PROGRAM: &str = "/bin/true";
const DEADLINE: Duration = Duration::from_secs(10);

pub(crate) async fn run(world: &World) {
    let mut confinement = Confinement::default();
    confinement.files.execute = ["/usr", "/bin", "/lib", "/lib64", "/etc", "/proc"].map(Into::into).into();
    confinement.files.write = vec![std::env::temp_dir()];
    confinement.files.devices = ["/dev/null", "/dev/zero", "/dev/urandom"].map(Into::into).into();
    confinement.network = Network {
        connect: vec!["127.0.0.1:9".parse().unwrap()],
        serve: vec![20_000],
        local: vec![20_001, 20_002, 20_003, 20_004],
        ..Network::default()
    };
    let jailed = |confinement: Option<Confinement>| async {
        let begin = Instant::now();
        let spec = Spec { confinement, ..Spec::new("true", PROGRAM) };
        assert!(world.sandbox.run(spec, DEADLINE).await.unwrap().exit.success());
        begin.elapsed()
    };
    let bubblewrap = ["--unshare-all", "--ro-bind", "/", "/", "--cap-drop", "ALL", PROGRAM];
    let has_bubblewrap = plain("bwrap", &bubblewrap).await.is_some();
    let mut apart = confinement.clone();
    apart.network.namespace = Namespace::Own;
    let (mut alone, mut jail, mut confined, mut netns, mut wrapped) = (vec![], vec![], vec![], vec![], vec![]);
    let millis = |duration: Duration| duration.as_secs_f64() * 1000.0;
    // Side by side, so that whatever else the machine does meets all of them.
    for round in 0..world.rounds(300) {
        let times = [
            plain(PROGRAM, &[]).await.unwrap(),
            jailed(None).await,
            jailed(Some(confinement.clone())).await,
            jailed(Some(apart.clone())).await,
        ];
        let other = if has_bubblewrap { plain("bwrap", &bubblewrap).await } else { None };
        // The first ones fill the caches.
        if round > 0 {
            for (samples, time) in [&mut alone, &mut jail, &mut confined, &mut netns].into_iter().zip(times) {
                samples.push(millis(time));
            }
            wrapped.extend(other.map(millis));
        }
    }
    let mut rows = vec![
        Row::new("by itself", alone),
        Row::new("in a jail, not confined", jail),
        Row::new("in a jail, confined", confined),
        Row::new("the same, in a network namespace of its own where there is one", netns),
    ];
    if has_bubblewrap {
        rows.push(Row::new("in bubblewrap", wrapped));
    }
    print(&format!("{PROGRAM}, to its end"), "ms", Shown::Spread, &rows);
    if !has_bubblewrap {
        println!("bubblewrap is not installed, or cannot run here");
    }
    target("the confinement in the jail", rows[2].median() - rows[1].median(), 0.5, " ms");
    println!("confined ÷ by itself: {:.2}", rows[2].median() / rows[0].median());
}

/// Starts a program as anybody would, and waits for its end.
#[expect(clippy::disallowed_methods, reason = "this is what the sandbox is compared with")]
async fn plain(program: &str, args: &[&str]) -> Option<Duration> {
    let begin = Instant::now();
    let mut command = tokio::process::Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let status = command.status().await.ok()?;
    status.success().then(|| begin.elapsed())
}
