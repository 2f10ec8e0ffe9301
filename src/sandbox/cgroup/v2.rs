//! The files of version 2. One directory holds all of them.

use super::super::resources::Usage;
use super::files::{keyed, number, read, value, write};
use std::io;
use std::path::Path;

/// The period that CPU time is shared out in, in microseconds: the kernel's own default.
const PERIOD: u64 = 100_000;

/// Thousandths of one CPU as microseconds in a period.
pub(super) fn quota(cpu_millis: u64) -> u64 {
    cpu_millis.saturating_mul(PERIOD / 1000)
}

pub(super) fn limit_memory(group: &Path, bytes: u64) -> io::Result<()> {
    write(group, "memory.max", &bytes.to_string())?;
    // Not there where the kernel has no swap accounting; the probe says so.
    if group.join("memory.swap.max").exists() {
        write(group, "memory.swap.max", "0")?;
    }
    // A tool that takes too much dies alone. Kubernetes sets this on the container's own group; ours is asked first.
    if group.join("memory.oom.group").exists() {
        write(group, "memory.oom.group", "0")?;
    }
    Ok(())
}

/// Version 1 has the same file.
pub(super) fn limit_pids(group: &Path, pids: u64) -> io::Result<()> {
    write(group, "pids.max", &pids.to_string())
}

pub(super) fn limit_cpu(group: &Path, cpu_millis: u64) -> io::Result<()> {
    write(group, "cpu.max", &format!("{} {PERIOD}", quota(cpu_millis)))
}

/// Every version-2 group says this, whichever controllers it has.
pub(super) fn cpu_seconds(group: &Path) -> Option<f64> {
    Some(std::time::Duration::from_micros(keyed(group, "cpu.stat", "usage_usec")?).as_secs_f64())
}

pub(super) fn memory(group: &Path, usage: &mut Usage) {
    usage.memory_bytes = number(group, "memory.current");
    // Linux 5.19 and later.
    usage.memory_peak_bytes = number(group, "memory.peak");
}

/// Version 1 has the same files.
pub(super) fn pids(group: &Path, usage: &mut Usage) {
    usage.pids = number(group, "pids.current");
    // Linux 6.1 and later.
    usage.pids_peak = number(group, "pids.peak");
}

/// The sum over all devices.
pub(super) fn io(group: &Path, usage: &mut Usage) {
    let Ok(text) = read(group, "io.stat") else { return };
    let sum =
        |key: &str| text.split_ascii_whitespace().filter_map(|word| word.strip_prefix(key)?.parse::<u64>().ok()).sum();
    usage.read_bytes = Some(sum("rbytes="));
    usage.written_bytes = Some(sum("wbytes="));
}

pub(super) fn oom_kills(group: &Path) -> Option<u64> {
    keyed(group, "memory.events", "oom_kill")
}

/// Version 1 has the same file.
pub(super) fn forks_refused(group: &Path) -> Option<u64> {
    keyed(group, "pids.events", "max")
}

/// Whether any process is in the group or beneath it. `None`: the group is gone.
pub(super) fn is_populated(group: &Path) -> Option<bool> {
    Some(value(&read(group, "cgroup.events").ok()?, "populated")? != 0)
}

pub(super) fn is_frozen(group: &Path) -> Option<bool> {
    Some(value(&read(group, "cgroup.events").ok()?, "frozen")? != 0)
}
