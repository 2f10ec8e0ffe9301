//! Killing, freezing, and what an earlier life has left.

use super::{Grouped, groups_of, membership};
use crate::sandbox::{DEADLINE, jail_of, line};
use futures_util::FutureExt;
use nix::sys::signal::{Signal as Raw, kill};
use opencode_sidecar::sandbox::{FreezeError, Limits, Resources, Signal};
use std::process::{Command, Stdio};

/// Writes `daemon` when it is there: a shell that left its parent and session and heeds no signal.
const DAEMON: &str =
    r#"(setsid sh -c 'trap "" TERM HUP INT QUIT USR1 USR2; echo daemon; while :; do sleep 1000; done' &)"#;
/// Goes on until it is stopped, and ends with 7 when it is asked to.
const SPIN: &str = "trap 'exit 7' TERM; echo spins; while :; do i=$((i+1)); done";

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn killing_empties_and_removes_the_group() {
    let grouped = Grouped::new();
    let mut process = grouped.start(&format!("{DAEMON}; sleep 1000; :"), Limits::default()).await;
    assert_eq!(line(&mut process).await, "daemon\n");
    let before = grouped.groups().len();
    let gone = process.kill(DEADLINE).await.unwrap();
    assert!(gone.cpu_seconds.is_some() && gone.usage.cpu_seconds.is_some(), "{gone:?}");
    // While it is still held: nothing waits for that.
    assert!(grouped.groups().len() < before);
    assert!(!grouped.groups().iter().any(|group| group.ends_with("test-1")));
    assert_eq!(process.exited().await.signal, Some(9));
    drop(process);
    grouped.nothing_is_left().await;
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn a_jail_that_is_killed_or_stopped_leaves_no_group() {
    let grouped = Grouped::new();
    for signal in [Raw::SIGKILL, Raw::SIGSTOP] {
        let mut process = grouped.start(&format!("{DAEMON}; sleep 1000; :"), Limits::default()).await;
        assert_eq!(line(&mut process).await, "daemon\n");
        kill(jail_of(&process), signal).unwrap();
        let gone = process.kill(DEADLINE / 3).await.unwrap();
        assert_eq!((gone.cpu_seconds, gone.exhausted), (None, None));
        // The group knows what the jail cannot tell any more.
        assert!(gone.usage.cpu_seconds.is_some());
        assert!(!grouped.groups().iter().any(|group| group.to_string_lossy().contains("/test-")));
    }
    grouped.nothing_is_left().await;
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn nothing_runs_while_it_is_frozen() {
    let grouped = Grouped::new();
    let mut process = grouped.start(SPIN, Limits::default()).await;
    assert_eq!(line(&mut process).await, "spins\n");
    let handle = process.handle();
    assert_eq!(handle.is_frozen(), Some(false));
    handle.freeze(DEADLINE).await.unwrap();
    assert_eq!(handle.is_frozen(), Some(true));
    let before = handle.usage().cpu_seconds.unwrap();
    process.signal(Signal::Term);
    // A neighbour that does as much meanwhile shows that there was time.
    let neighbour = grouped.start("timeout 1 sh -c 'while :; do :; done'", Limits::default()).await;
    let meanwhile = neighbour.gone().await.usage.cpu_seconds.unwrap();
    let after = handle.usage().cpu_seconds.unwrap();
    // What its processes did to come to a stop is counted when they have stopped.
    assert!(meanwhile > 0.05 && after - before < meanwhile / 20.0, "{before} {after}, the neighbour {meanwhile}");
    assert!(process.exited().now_or_never().is_none(), "a frozen program heeded a signal");
    assert_eq!(handle.is_frozen(), Some(true));
    handle.thaw(DEADLINE).await.unwrap();
    assert_eq!(process.exited().await.code, Some(7));
    process.gone().await;
    assert_eq!(handle.is_frozen(), None);
    assert!(matches!(handle.freeze(DEADLINE).await, Err(FreezeError::Refused { .. })));
    grouped.nothing_is_left().await;
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn a_frozen_program_can_be_killed() {
    let grouped = Grouped::new();
    let mut process = grouped.start(&format!("{DAEMON}; sleep 1000; :"), Limits::default()).await;
    assert_eq!(line(&mut process).await, "daemon\n");
    process.handle().freeze(DEADLINE).await.unwrap();
    let gone = process.kill(DEADLINE).await.unwrap();
    assert!(gone.cpu_seconds.is_some(), "the jail itself has to prove it");
    grouped.nothing_is_left().await;
}

/// What a sidecar leaves that was killed together with its jails, frozen as it was.
#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn what_an_earlier_life_left_is_killed_and_removed() {
    let first = Grouped::new();
    let instance = first.instance.clone();
    let process = first.start("sleep 1000; :", Limits::default()).await;
    // Not below any jail: only its group shows whose it is.
    #[expect(clippy::disallowed_methods, reason = "a process that no jail knows")]
    let mut stray = Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().unwrap();
    for group in first.groups().iter().filter(|group| group.ends_with("test-1")) {
        std::fs::write(group.join("cgroup.procs"), stray.id().to_string()).unwrap();
    }
    assert_eq!(membership(stray.id()), membership(process.pid()));
    process.handle().freeze(DEADLINE).await.unwrap();
    let next = Resources::claim(&instance, super::LOOK_EVERY);
    assert!(next.probe().missing.iter().all(|what| !what.contains("earlier")), "{:?}", next.probe());
    assert!(!groups_of(&instance).iter().any(|group| group.to_string_lossy().contains("/test-")));
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(stray.wait().unwrap().signal(), Some(9));
    assert!(process.gone().await.cpu_seconds.is_some());
    assert_eq!(process.exited().await.signal, Some(9));
    drop((process, next));
    first.nothing_is_left().await;
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn what_another_instance_has_is_not_touched() {
    let (ours, theirs) = (Grouped::new(), Grouped::new());
    let mut process = theirs.start("read x; echo alive; sleep 1000; :", Limits::default()).await;
    drop(Resources::claim(&ours.instance, super::LOOK_EVERY));
    assert_eq!(line(&mut process).await, "alive\n");
    process.kill(DEADLINE).await.unwrap();
    theirs.nothing_is_left().await;
    ours.nothing_is_left().await;
}

#[tokio::test]
async fn what_has_no_group_cannot_be_frozen() {
    let bench = super::watched();
    let mut spec = bench.sh("sleep 1000; :");
    spec.limits = Some(Limits::default());
    let process = bench.sandbox.start(spec).await.unwrap();
    assert_eq!(process.handle().is_frozen(), None);
    assert!(matches!(process.handle().freeze(DEADLINE).await, Err(FreezeError::Unsupported(_))));
    process.kill(DEADLINE).await.unwrap();
    bench.nothing_is_left().await;
}
