//! What a program cannot have more of than it was given, and who is told when it tries.

use super::{Grouped, MIB, membership};
use crate::sandbox::{DEADLINE, jail_of, line};
use opencode_sidecar::sandbox::confine::Confinement;
use opencode_sidecar::sandbox::{
    KillMeans, Limits, MOST_OOM_SCORE_ADJ, Mechanism, Resource, ResourceEvents, User, tap,
};
use std::time::Instant;

fn memory(bytes: u64) -> Limits {
    Limits { memory_bytes: Some(bytes), ..Limits::default() }
}

/// A shell line that holds so many MiB in its own memory.
fn hog(mebibytes: u64) -> String {
    format!("x=$(head -c {} /dev/zero | tr \"\\0\" x)", mebibytes * MIB)
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn the_host_gives_what_it_is_known_to_give() {
    let grouped = Grouped::new();
    let probe = grouped.bench.sandbox.resources().probe().clone();
    // In the guest it is known.
    let expected = std::env::var("CGROUP_TEST_EXPECTS").ok();
    assert!(expected.as_ref().is_none_or(|word| word == probe.mechanism.as_str()), "{probe:?}");
    if expected.as_deref() == Some("watched") {
        assert!(!probe.missing.is_empty(), "it says why: {probe:?}");
        let process = grouped.start("sleep 1000; :", memory(32 * MIB)).await;
        process.kill(DEADLINE).await.unwrap();
        return grouped.nothing_is_left().await;
    }
    assert_ne!(probe.mechanism, Mechanism::Watched, "{probe:?}");
    assert!(probe.cpu.is_some() && probe.freeze && probe.told_when_empty, "{probe:?}");
    if expected.is_some() {
        assert!(probe.io && probe.kill == KillMeans::CgroupKill && probe.no_swap == Some(true), "{probe:?}");
        assert_eq!(probe.missing, Vec::<String>::new());
    }
    assert!(!grouped.groups().is_empty());
    grouped.nothing_is_left().await;
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn the_program_is_in_its_group_and_the_jail_is_not() {
    let grouped = Grouped::new();
    // The very first thing that it executes sees itself inside already.
    let mut process =
        grouped.start("read groups < /proc/self/cgroup; echo $groups; sleep 1000; :", memory(32 * MIB)).await;
    let first = line(&mut process).await;
    assert!(first.contains(&grouped.instance) || membership(process.pid()).contains(&grouped.instance), "{first}");
    let (inside, outside) = (membership(process.pid()), membership(jail_of(&process)));
    let name = format!("opencode-sidecar-{}/test-1", grouped.instance);
    let trees = inside.lines().filter(|line| line.ends_with(&name)).count();
    assert!(trees >= 1 && inside.lines().any(|line| line.starts_with("0::") && line.ends_with(&name)), "{inside}");
    assert!(!outside.contains(&name), "{outside}");
    process.kill(DEADLINE).await.unwrap();
    grouped.nothing_is_left().await;
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn a_tool_that_takes_too_much_memory_dies_alone() {
    let grouped = Grouped::new();
    // A tool's score, as the gate gives it: while its end takes its time, the kernel ends a second process.
    let tool = format!("echo {MOST_OOM_SCORE_ADJ} >/proc/self/oom_score_adj; exec sh -c '{}; echo never'", hog(80));
    let script = format!("({tool}); echo tool ended with $?; sleep 1000; :");
    let mut process = grouped.start(&script, memory(32 * MIB)).await;
    let events = process.handle().resource_events_beyond(ResourceEvents::default()).await;
    assert!(events.oom_kills >= 1, "{events:?}");
    assert_eq!(line(&mut process).await, "tool ended with 137\n");
    let gone = process.kill(DEADLINE).await.unwrap();
    // It was asked to end, so its own SIGKILL is not the OOM's.
    assert_eq!(gone.exhausted, None);
    let peak = gone.usage.memory_peak_bytes;
    assert!(peak.is_none_or(|peak| peak > 16 * MIB && peak <= 32 * MIB), "{gone:?}");
    grouped.nothing_is_left().await;
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn a_program_that_takes_too_much_memory_itself_is_told_apart() {
    let grouped = Grouped::new();
    let process = grouped.start(&format!("{}; echo never", hog(80)), memory(32 * MIB)).await;
    assert_eq!(process.exited().await.signal, Some(9));
    let gone = process.gone().await;
    assert_eq!(gone.exhausted, Some(Resource::Memory), "{gone:?}");
    assert!(gone.events.oom_kills >= 1, "{gone:?}");
    grouped.nothing_is_left().await;
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn files_in_a_tmpfs_are_memory_too() {
    let grouped = Grouped::new();
    let file = tempfile::Builder::new().tempfile_in("/dev/shm").unwrap();
    let script = format!("dd if=/dev/zero of={} bs=1048576 count=80; echo ended with $?", file.path().display());
    let mut process = grouped.start(&script, memory(32 * MIB)).await;
    let end = line(&mut process).await;
    let gone = process.gone().await;
    assert!(gone.events.oom_kills >= 1, "{end:?} {gone:?}");
    let size = file.as_file().metadata().unwrap().len();
    assert!(size < 32 * MIB, "{size} bytes of 80 MiB were written");
    grouped.nothing_is_left().await;
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn many_small_processes_share_one_limit() {
    let grouped = Grouped::new();
    let script = format!("for i in 1 2 3 4 5 6 7 8; do (exec sh -c '{}; sleep 1000; :') & done; sleep 1000; :", hog(6));
    let process = grouped.start(&script, memory(32 * MIB)).await;
    let events = process.handle().resource_events_beyond(ResourceEvents::default()).await;
    assert!(events.oom_kills >= 1, "{events:?}");
    process.kill(DEADLINE).await.unwrap();
    grouped.nothing_is_left().await;
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn a_fork_bomb_stops_at_the_limit_and_the_program_goes_on() {
    let grouped = Grouped::new();
    let script = r#"
        (i=0; while [ $i -lt 100 ]; do sleep 1000 & i=$((i+1)); done) 2>/dev/null
        echo refused; sleep 1000; :"#;
    let limits = Limits { pids: Some(20), ..Limits::default() };
    let mut process = grouped.start(script, limits).await;
    let events = process.handle().resource_events_beyond(ResourceEvents::default()).await;
    assert!(events.forks_refused >= 1 && events.oom_kills == 0, "{events:?}");
    assert!(process.handle().usage().pids.unwrap() <= 20);
    let _ = line(&mut process).await;
    let gone = process.kill(DEADLINE).await.unwrap();
    assert!(gone.usage.pids_peak.is_none_or(|peak| (10..=20).contains(&peak)), "{gone:?}");
    assert_eq!((gone.exhausted, gone.usage.pids), (None, Some(0)), "{gone:?}");
    grouped.nothing_is_left().await;
}

/// What a shell tap runs has a limit of its own, beneath that of its program, which so has some left.
#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn tools_that_fork_without_end_leave_their_program_some() {
    let grouped = Grouped::new();
    let directory = tempfile::tempdir().unwrap();
    let tap = directory.path().join(tap::NAME);
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_opencode-sidecar"), &tap).unwrap();
    let bomb = "i=0; while [ $i -lt 100 ]; do sleep 1000 & i=$((i+1)); done";
    // The program itself fails in the end, which is nothing that the tools' limit did to it.
    let script = format!(
        "{0} -c 'cat /proc/self/cgroup /proc/self/oom_score_adj' >tool; cat /proc/self/cgroup >own; {0} -c '{bomb}' 2>/dev/null; \
         for i in 1 2 3 4 5 6; do sleep 1000 & done; echo ready; read x; exit 3",
        tap.display()
    );
    let limits = Limits { pids: Some(20), tool_pids: Some(12), ..Limits::default() };
    let mut spec = grouped.spec(&script, limits);
    spec.cwd = directory.path().to_owned();
    spec.env.push((tap::ENV_URL.into(), "http://127.0.0.1:1/".into()));
    spec.env.push((tap::ENV_SHELL.into(), "/bin/sh".into()));
    let mut confinement = Confinement::default();
    confinement.files.execute = vec!["/".into()];
    confinement.files.write = vec![directory.path().to_owned(), "/dev".into()];
    spec.confinement = Some(confinement);
    let mut process = grouped.bench.sandbox.start(spec).await.unwrap();
    assert_eq!(line(&mut process).await, "ready\n");
    assert_eq!(process.exited().await.code, Some(3));
    let gone = process.gone().await;
    let ResourceEvents { forks_refused, tool_forks_refused, .. } = gone.events;
    assert!(tool_forks_refused >= 1 && forks_refused == tool_forks_refused, "{gone:?}");
    assert_eq!(gone.exhausted, None, "{gone:?}");
    let read = |name: &str| std::fs::read_to_string(directory.path().join(name)).unwrap();
    let (tool, own) = (read("tool"), read("own"));
    assert!(tool.ends_with(&format!("\n{MOST_OOM_SCORE_ADJ}\n")), "{tool}");
    assert!(tool.contains("/test-1/tools") && own.contains("/test-1") && !own.contains("tools"), "{tool}{own}");
    grouped.nothing_is_left().await;
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn a_program_that_fails_for_lack_of_processes_is_told_apart() {
    let grouped = Grouped::new();
    // The shell gives up by itself when it cannot fork.
    let script = "while :; do sleep 1000 & done";
    let process = grouped.start(script, Limits { pids: Some(10), ..Limits::default() }).await;
    let exit = process.exited().await;
    let gone = process.gone().await;
    assert!(!exit.success() && gone.exhausted == Some(Resource::Pids), "{exit:?} {gone:?}");
    grouped.nothing_is_left().await;
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn a_cpu_hog_gets_its_share_and_no_more() {
    let grouped = Grouped::new();
    let script = "spin() { timeout 2 sh -c 'while :; do :; done'; }; spin & spin & wait";
    let began = Instant::now();
    let process = grouped.start(script, Limits { cpu_millis: Some(250), ..Limits::default() }).await;
    let gone = process.gone().await;
    let (used, took) = (gone.usage.cpu_seconds.unwrap(), began.elapsed().as_secs_f64());
    assert!(used > 0.1, "{gone:?}");
    // The first share is there at once.
    assert!(used <= (took + 0.1) * 0.25 * 1.1, "{used} s of CPU in {took} s");
    grouped.nothing_is_left().await;
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn a_neighbour_is_not_touched() {
    let grouped = Grouped::new();
    let mut neighbour = grouped.start("read x; echo alive; sleep 1000; :", memory(32 * MIB)).await;
    let process = grouped.start(&format!("{}; echo never", hog(80)), memory(32 * MIB)).await;
    assert_eq!(process.gone().await.exhausted, Some(Resource::Memory));
    assert_eq!(line(&mut neighbour).await, "alive\n");
    let gone = neighbour.kill(DEADLINE).await.unwrap();
    assert_eq!(gone.events, ResourceEvents::default());
    grouped.nothing_is_left().await;
}

/// The group's doors are opened by the jail, which may; the program as another user may not, and goes through them.
#[tokio::test]
#[cfg_attr(not(as_root), ignore = "acts as another user, which takes root")]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn another_user_is_in_its_group_and_cannot_leave_it() {
    let grouped = Grouped::new();
    let directories = grouped.groups();
    let leave = directories.iter().map(|group| format!("echo $$ > {}/cgroup.procs", group.parent().unwrap().display()));
    let raise =
        "for f in $(find /sys/fs/cgroup -path '*INSTANCE/test-1/*.max' -o -path '*INSTANCE/test-1/*limit_in_bytes'); \
        do echo 100000 > $f && echo raised $f; done"
            .replace("INSTANCE", &grouped.instance);
    let leave: Vec<String> = leave.map(|line| format!("{{ {line} && echo left; }}")).collect();
    let script = format!("({}; {raise}) 2>/dev/null; echo tried; sleep 1000; :", leave.join("; "));
    let mut spec = grouped.spec(&script, memory(32 * MIB));
    spec.user = Some(User { uid: 65534, gid: 65534 });
    let mut process = grouped.bench.sandbox.start(spec).await.unwrap();
    assert_eq!(line(&mut process).await, "tried\n");
    let groups = membership(process.pid());
    assert!(groups.lines().any(|line| line.starts_with("0::") && line.ends_with("/test-1")), "{groups}");
    process.kill(DEADLINE).await.unwrap();
    grouped.nothing_is_left().await;
}
