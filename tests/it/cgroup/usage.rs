//! What was used, while it is used and afterwards.

use super::{Grouped, MIB, watched};
use crate::sandbox::{Bench, DEADLINE, line};
use opencode_sidecar::sandbox::{Gone, Limits, Usage};

/// Works, writes 8 MiB to the disk, holds 20 MiB, has three processes; then waits.
const WORK: &str = r#"
    i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done
    dd if=/dev/zero of=file bs=1048576 count=8 conv=fsync 2>/dev/null
    x=$(head -c 20971520 /dev/zero | tr '\0' x)
    sleep 1000 & sleep 1000 &
    echo worked; wait; :"#;

async fn work(bench: &Bench) -> (Usage, Gone) {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut spec = bench.sh(WORK);
    spec.limits = Some(Limits::default());
    spec.cwd = directory.path().to_path_buf();
    let mut process = bench.sandbox.start(spec).await.unwrap();
    assert_eq!(line(&mut process).await, "worked\n");
    let usage = process.handle().usage();
    let gone = process.kill(DEADLINE).await.unwrap();
    assert_eq!(process.handle().usage(), gone.usage, "the last word stays");
    (usage, gone)
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn a_group_counts() {
    let grouped = Grouped::new();
    let (usage, gone) = work(&grouped.bench).await;
    assert!(usage.pids.unwrap() >= 3, "{usage:?}");
    assert!(usage.memory_bytes.unwrap() >= 20 * MIB, "{usage:?}");
    let (now, end) = (usage.cpu_seconds.unwrap(), gone.usage.cpu_seconds.unwrap());
    assert!(now > 0.005 && now <= end, "{usage:?} {gone:?}");
    let jails = gone.cpu_seconds.unwrap();
    assert!((jails - end).abs() <= 0.1 + end * 0.2, "the group says {end} s, the jail {jails} s");
    assert!(gone.usage.memory_peak_bytes.is_none_or(|peak| peak >= 20 * MIB), "{gone:?}");
    assert!(gone.usage.pids_peak.is_none_or(|peak| peak >= 3), "{gone:?}");
    assert_eq!(gone.usage.pids, Some(0));
    assert!(gone.usage.read_bytes.is_some() && gone.usage.written_bytes.is_some(), "{gone:?}");
    grouped.nothing_is_left().await;
}

/// Not in a guest: what it has for a disk is memory.
#[tokio::test]
async fn what_reaches_the_disk_is_counted() {
    let bench = watched();
    let (_, gone) = work(&bench).await;
    assert!(gone.usage.written_bytes.unwrap() >= 8 * MIB, "{gone:?}");
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn without_limits_nothing_is_measured_but_time() {
    let bench = watched();
    let process = bench.start("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done").await;
    let gone = process.gone().await;
    assert!(gone.cpu_seconds.unwrap() > 0.01 && gone.usage == Usage::default(), "{gone:?}");
    bench.nothing_is_left().await;
}
