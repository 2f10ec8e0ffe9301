//! The ways that this host would not take by itself.

use super::super::{claim, detect};
use super::*;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};

#[expect(clippy::disallowed_methods, reason = "a process that no jail knows")]
fn sleeper(group: &Layout) -> Child {
    let child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
    for directory in group.directories() {
        files::write(directory, "cgroup.procs", &child.id().to_string()).unwrap();
    }
    child
}

fn is_killed(mut child: Child) -> bool {
    child.wait().unwrap().signal() == Some(9)
}

/// Version 1 alone: nothing but its freezer, beneath the own group there.
#[test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
fn a_freezer_of_version_1_holds_nothing_back_in_the_end() {
    // A host without one has nothing to show here.
    let Some(own) = detect::own().unwrap().v1.remove("freezer") else { return };
    let group =
        Layout { freezer: Some(own.join(format!("opencode-sidecar-{}", uuid::Uuid::new_v4()))), ..Layout::default() };
    group.make().unwrap();
    let child = sleeper(&group);
    group.freeze(true).unwrap();
    while group.is_frozen() == Some(false) {
        std::thread::yield_now();
    }
    assert!(group.is_populated() && group.has_freezer());
    assert!(group.empty(Duration::from_secs(20)));
    assert!(is_killed(child));
    group.remove().unwrap();
}

/// A kernel from before 5.14.
#[test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
fn without_one_kill_for_all_each_is_killed() {
    let (claim, probe) = claim(&uuid::Uuid::new_v4().to_string());
    assert!(probe.freeze, "{probe:?}");
    let claim = claim.unwrap();
    let group = claim.next("test");
    group.make().unwrap();
    let children: Vec<Child> = (0..20).map(|_| sleeper(&group)).collect();
    for frozen in [false, true] {
        group.freeze(frozen).unwrap();
    }
    group.kill_each();
    assert!(children.into_iter().all(is_killed));
    // Thawed again.
    while group.is_frozen() == Some(true) || group.is_populated() {
        std::thread::yield_now();
    }
    group.remove().unwrap();
}
