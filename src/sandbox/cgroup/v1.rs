//! The files of version 1 that are not as in version 2. Each controller has a tree of its own.
//!
//! `blkio` is not used: it counts nothing unless a device is throttled, and never what is written back later.

use super::super::resources::Usage;
use super::files::{keyed, number, read, write};
use super::v2::quota;
use std::io;
use std::path::Path;

pub(super) fn limit_memory(group: &Path, bytes: u64) -> io::Result<()> {
    write(group, "memory.limit_in_bytes", &bytes.to_string())?;
    // Memory and swap together, which may not be less than memory alone: so this comes second. Not there where the
    // kernel has no swap accounting.
    if group.join("memory.memsw.limit_in_bytes").exists() {
        write(group, "memory.memsw.limit_in_bytes", &bytes.to_string())?;
    }
    Ok(())
}

pub(super) fn limit_cpu(group: &Path, cpu_millis: u64) -> io::Result<()> {
    write(group, "cpu.cfs_quota_us", &quota(cpu_millis).to_string())
}

/// Of the tree of `cpuacct`.
pub(super) fn cpu_seconds(group: &Path) -> Option<f64> {
    Some(std::time::Duration::from_nanos(number(group, "cpuacct.usage")?).as_secs_f64())
}

pub(super) fn memory(group: &Path, usage: &mut Usage) {
    usage.memory_bytes = number(group, "memory.usage_in_bytes");
    usage.memory_peak_bytes = number(group, "memory.max_usage_in_bytes");
}

pub(super) fn oom_kills(group: &Path) -> Option<u64> {
    keyed(group, "memory.oom_control", "oom_kill")
}

/// Of the tree of `freezer`, which holds back even SIGKILL until it is thawed.
pub(super) fn freeze(group: &Path, frozen: bool) -> io::Result<()> {
    write(group, "freezer.state", if frozen { "FROZEN" } else { "THAWED" })
}

/// Not yet while it is still `FREEZING`. `None`: the group is gone.
pub(super) fn is_frozen(group: &Path) -> Option<bool> {
    Some(read(group, "freezer.state").ok()?.trim() == "FROZEN")
}
