//! The resources of one program and all that descends from it, on the real kernel: limits, ends, what was used.
//!
//! The same tests run on this host, whatever it gives, and in a guest with version 2 alone.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

mod beside;
mod disk;
mod ending;
mod guest;
mod limits;
mod usage;
mod watched;

use crate::sandbox::Bench;
use opencode_sidecar::sandbox::{Limits, Process, Resources, Spec};
use std::path::PathBuf;
use std::time::Duration;

const MIB: u64 = 1024 * 1024;

/// How often is looked at what is watched.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Groups for an instance of its own.
struct Grouped {
    bench: Bench,
    instance: String,
}

impl Grouped {
    fn new() -> Self {
        Self::of(&uuid::Uuid::new_v4().to_string())
    }

    fn of(instance: &str) -> Self {
        let mut bench = Bench::new();
        bench.sandbox = bench.sandbox.with_resources(Resources::claim(instance, LOOK_EVERY));
        Self { bench, instance: instance.to_owned() }
    }

    async fn start(&self, script: &str, limits: Limits) -> Process {
        self.bench.sandbox.start(self.spec(script, limits)).await.unwrap()
    }

    fn spec(&self, script: &str, limits: Limits) -> Spec {
        let mut spec = self.bench.sh(script);
        spec.limits = Some(limits);
        spec
    }

    /// Every group of this instance, in any tree.
    fn groups(&self) -> Vec<PathBuf> {
        groups_of(&self.instance)
    }

    /// No process and no group is left, when nothing of it is held any more.
    async fn nothing_is_left(self) {
        let Self { bench, instance } = self;
        bench.nothing_is_left().await;
        assert_eq!(groups_of(&instance), Vec::<PathBuf>::new());
    }
}

pub(crate) fn groups_of(instance: &str) -> Vec<PathBuf> {
    let mut open = vec![PathBuf::from("/sys/fs/cgroup")];
    let mut found = Vec::new();
    while let Some(next) = open.pop() {
        // Groups of other tests come and go meanwhile.
        let Ok(entries) = std::fs::read_dir(&next) else { continue };
        let directories = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        open.extend(directories.map(|entry| entry.path()));
        if next.components().any(|part| part.as_os_str().to_string_lossy().contains(instance)) {
            found.push(next);
        }
    }
    found
}

/// Watched, as where no group can be made.
fn watched() -> Bench {
    let mut bench = Bench::new();
    bench.sandbox = bench.sandbox.with_resources(Resources::watched(LOOK_EVERY));
    bench
}

/// The groups that a process is in, one line for each tree.
pub(crate) fn membership(pid: impl std::fmt::Display) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap()
}
