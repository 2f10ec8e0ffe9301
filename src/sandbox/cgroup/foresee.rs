//! What a claim would find, without one: nothing is made, moved, killed or written.
//!
//! The kernel is asked for rights and for what it offers. Some things show only when they are done; these are told
//! apart from what is missing.

use super::super::resources::{Foreseen, KillMeans, Mechanism, Probe};
use super::claim::home_of;
use super::detect::{self, Own};
use super::files;
use nix::unistd::{AccessFlags, eaccess};
use std::path::Path;

/// Looks.
pub(in super::super) fn foresee() -> Foreseen {
    let mut missing = Vec::new();
    let mut unknown = Vec::new();
    let own = detect::own().unwrap_or_else(|error| {
        missing.push(format!("the groups of this process are not known: {error}"));
        Own::default()
    });
    let (mut memory, mut pids, mut cpu, mut io) = (None, None, None, false);
    let home = match own.unified.as_deref().map(home_of) {
        None => {
            missing.push("cgroup v2 is not mounted".to_owned());
            None
        }
        Some(home) => match writable(home, &["", "cgroup.procs"]) {
            Ok(()) => Some(home),
            Err(error) => {
                missing.push(format!("cgroup v2 is not writable: {error}"));
                None
            }
        },
    };
    if let Some(home) = home {
        let offered = files::read(home, "cgroup.controllers").unwrap_or_default();
        let offers = |name: &str| offered.split_whitespace().any(|offered| offered == name);
        if ["memory", "pids", "cpu", "io"].into_iter().any(offers) {
            match writable(home, &["cgroup.subtree_control"]) {
                Ok(()) => {
                    let by = |name| offers(name).then_some(Mechanism::CgroupV2);
                    (memory, pids, cpu, io) = (by("memory"), by("pids"), by("cpu"), offers("io"));
                    if !own.is_namespace_root && others_are_in(home) {
                        unknown.push(
                            "whether cgroup v2 gives its controllers: another process is in the same group".to_owned(),
                        );
                    }
                }
                Err(error) => missing.push(format!("cgroup v2 does not give its controllers: {error}")),
            }
        }
    }
    let mut v1 = |controller: &str| {
        let directory = own.v1.get(controller)?;
        match writable(directory, &[""]) {
            Ok(()) => Some(Mechanism::CgroupV1),
            Err(error) => {
                missing.push(format!("the cgroup v1 controller {controller} is not writable: {error}"));
                None
            }
        }
    };
    memory = memory.or_else(|| v1("memory"));
    pids = pids.or_else(|| v1("pids"));
    cpu = cpu.or_else(|| v1("cpu"));
    let v1_freezer = home.is_none() && v1("freezer").is_some();
    let what = [("memory", memory), ("pids", pids), ("cpu", cpu)];
    let without: Vec<&str> = what.into_iter().filter(|(_, by)| by.is_none()).map(|(name, _)| name).collect();
    if !without.is_empty() {
        missing.push(format!("no group limits {}", without.join(", ")));
    }
    // The top of all groups has none of these files, its children do: there the kernel's version says it.
    let has = |file: &str, since: (u32, u32)| {
        home.is_some_and(|home| match home.join("cgroup.type").exists() {
            true => home.join(file).exists(),
            false => kernel().is_some_and(|kernel| kernel >= since),
        })
    };
    let freeze = v1_freezer || has("cgroup.freeze", (5, 2));
    let kill = if has("cgroup.kill", (5, 14)) {
        KillMeans::CgroupKill
    } else if freeze {
        KillMeans::FreezeAndKill
    } else {
        KillMeans::OneByOne
    };
    if memory.is_some() {
        unknown.push("whether swap is kept from a session too: that shows in a group".to_owned());
    }
    let probe = Probe {
        mechanism: Mechanism::of(memory, pids),
        memory: memory.unwrap_or(Mechanism::Watched),
        no_swap: None,
        pids: pids.unwrap_or(Mechanism::Watched),
        cpu,
        io,
        kill,
        freeze,
        told_when_empty: has("cgroup.events", (4, 5)),
        missing,
    };
    Foreseen { probe, unknown }
}

/// Whether this process may write to a group's directory or files. A read-only mount is among what speaks against it.
fn writable(directory: &Path, names: &[&str]) -> Result<(), String> {
    names.iter().try_for_each(|name| {
        let path = if name.is_empty() { directory.to_owned() } else { directory.join(name) };
        eaccess(&path, AccessFlags::W_OK).map_err(|errno| format!("{}: {}", path.display(), errno.desc()))
    })
}

/// Whether there is anybody but this process and whoever waits for it.
fn others_are_in(home: &Path) -> bool {
    let own = nix::unistd::getpid().as_raw();
    home.join("cgroup.type").exists() && files::processes(home).iter().any(|pid| *pid != own)
}

/// The two numbers of the kernel's version that count.
fn kernel() -> Option<(u32, u32)> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}
