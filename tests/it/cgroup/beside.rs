//! A program in the group of another.

use super::Grouped;
use crate::sandbox::{Bench, DEADLINE, line};
use futures_util::FutureExt;
use opencode_sidecar::sandbox::{Limits, Process, ResourceEvents, Spec, StartError};

const TALKS: &str = "echo here; sleep 1000";

fn group_of(process: &Process) -> String {
    std::fs::read_to_string(format!("/proc/{}/cgroup", process.pid())).unwrap()
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn it_is_counted_with_the_other_and_ends_with_it() {
    let grouped = Grouped::new();
    let mut other = grouped.start(TALKS, Limits { pids: Some(20), ..Limits::default() }).await;
    assert_eq!(line(&mut other).await, "here\n");
    let beside = |script: &str| Spec { beside: Some(other.handle()), ..grouped.bench.sh(script) };

    let alone = other.handle().usage().pids.unwrap();
    let mut first = grouped.bench.sandbox.start(beside(TALKS)).await.unwrap();
    assert_eq!(line(&mut first).await, "here\n");
    assert_eq!(group_of(&first), group_of(&other));
    assert!(other.handle().usage().pids.unwrap() > alone);
    // The other's limit is for both.
    let forks = "for i in $(seq 30); do sleep 1000 & done 2>/dev/null; echo never";
    let second = grouped.bench.sandbox.start(beside(forks)).await.unwrap();
    assert!(!second.exited().await.success(), "it could fork as often as it liked");
    second.gone().await;
    let handle = other.handle();
    let felt = handle.resource_events_beyond(ResourceEvents::default());
    assert!(tokio::time::timeout(DEADLINE, felt).await.unwrap().forks_refused > 0);

    // Its own end is not the other's.
    first.kill(DEADLINE).await.unwrap();
    assert!(other.exited().now_or_never().is_none());
    // The other's is its.
    let mut third = grouped.bench.sandbox.start(beside(TALKS)).await.unwrap();
    assert_eq!(line(&mut third).await, "here\n");
    other.kill(DEADLINE).await.unwrap();
    assert_eq!(third.exited().await.signal, Some(9));
    third.gone().await;
    let late = grouped.bench.sandbox.start(Spec { beside: Some(handle), ..grouped.bench.sh(TALKS) }).await;
    assert!(matches!(late, Err(StartError::Resources { .. })), "{late:?}");
    drop((other, first, second, third));
    grouped.nothing_is_left().await;
}

/// Without groups it has the limits for itself.
#[tokio::test]
async fn without_a_group_it_is_watched_by_itself() {
    let bench = Bench::new();
    let limits = Some(Limits { pids: Some(20), ..Limits::default() });
    let other = bench.sandbox.start(Spec { limits, ..bench.sh("sleep 1000") }).await.unwrap();
    let forks = "for i in $(seq 40); do sleep 1000 & done; sleep 1000";
    let spec = Spec { limits, beside: Some(other.handle()), ..bench.sh(forks) };
    let many = bench.sandbox.start(spec).await.unwrap();
    assert_eq!(many.gone().await.exhausted, Some(opencode_sidecar::sandbox::Resource::Pids));
    assert!(other.exited().now_or_never().is_none());
    other.kill(DEADLINE).await.unwrap();
    bench.nothing_is_left().await;
}
