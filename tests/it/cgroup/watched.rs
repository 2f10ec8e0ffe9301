//! Where no group can be made, the jail looks, and ends everything at a limit.

use super::{MIB, watched};
use crate::sandbox::{Bench, DEADLINE, line};
use opencode_sidecar::sandbox::{Limits, Mechanism, Process, Resource, ResourceEvents};

async fn start(bench: &Bench, script: &str, limits: Limits) -> Process {
    let mut spec = bench.sh(script);
    spec.limits = Some(limits);
    bench.sandbox.start(spec).await.unwrap()
}

#[tokio::test]
async fn too_much_memory_ends_everything() {
    let bench = watched();
    assert_eq!(bench.sandbox.resources().probe().mechanism, Mechanism::Watched);
    // It holds what is too much and waits to be found, and so does a daemon.
    let script = r#"(setsid sh -c 'trap "" TERM; while :; do sleep 1000; done' &)
        x=$(head -c 104857600 /dev/zero | tr '\0' x); sleep 1000; :"#;
    let limits = Limits { memory_bytes: Some(64 * MIB), ..Limits::default() };
    let process = start(&bench, script, limits).await;
    assert_eq!(process.exited().await.signal, Some(9));
    let gone = process.gone().await;
    assert_eq!(gone.exhausted, Some(Resource::Memory), "{gone:?}");
    assert!(gone.usage.memory_peak_bytes.unwrap() > 64 * MIB, "{gone:?}");
    assert_eq!((gone.usage.memory_bytes, gone.usage.pids), (Some(0), Some(0)));
    // No process was killed alone.
    assert_eq!(gone.events, ResourceEvents::default());
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn memory_that_is_shared_counts_once() {
    let bench = watched();
    // Eleven processes of more than 20 MiB each, of which all but a little is the same.
    let script = r#"x=$(head -c 20971520 /dev/zero | tr '\0' x)
        for i in 1 2 3 4 5 6 7 8 9 10; do (sleep 1000; : $x) & done; echo many; wait; :"#;
    let limits = Limits { memory_bytes: Some(100 * MIB), ..Limits::default() };
    let mut process = start(&bench, script, limits).await;
    assert_eq!(line(&mut process).await, "many\n");
    let gone = process.kill(DEADLINE).await.unwrap();
    assert_eq!(gone.exhausted, None, "{gone:?}");
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn too_many_processes_end_everything() {
    let bench = watched();
    let script = "cell() { while :; do (setsid sleep 0.2 & exec sleep 0.05); done; }
        i=0; while [ $i -lt 50 ]; do cell & i=$((i+1)); done; wait";
    let process = start(&bench, script, Limits { pids: Some(40), ..Limits::default() }).await;
    let gone = process.gone().await;
    assert_eq!(gone.exhausted, Some(Resource::Pids), "{gone:?}");
    assert!(gone.usage.pids_peak.unwrap() > 40, "{gone:?}");
    bench.nothing_is_left().await;
}
