//! The machine, and what `/proc` says of a process on it.

use nix::unistd::{SysconfVar, sysconf};
use std::fmt;
use std::fs::read_to_string;

/// What the numbers were measured on.
pub(crate) struct Machine {
    cores: usize,
    kernel: String,
}

impl Machine {
    pub(crate) fn now() -> Self {
        Self {
            cores: cores(),
            kernel: read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cores, Linux {}, load {}", self.cores, self.kernel, load())
    }
}

pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Load averages over 1, 5 and 15 minutes.
pub(crate) fn load() -> String {
    let text = read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

/// Memory of a process, in bytes.
pub(crate) struct Memory {
    pub(crate) rss: u64,
    /// What is shared counted in parts. 0 where we may not look.
    pub(crate) pss: u64,
    /// What is its own alone.
    pub(crate) anonymous: u64,
    pub(crate) threads: u64,
}

/// The number in the line that begins with `name`.
fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

pub(crate) fn memory(pid: u32) -> Memory {
    let status = read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let rollup = read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    Memory {
        rss: field(&status, "VmRSS:") * 1024,
        pss: field(&rollup, "Pss:") * 1024,
        anonymous: field(&status, "RssAnon:") * 1024,
        threads: field(&status, "Threads:"),
    }
}

/// User and system time of a process, in seconds.
pub(crate) fn cpu(pid: u32) -> f64 {
    let stat = read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything.
    let after = stat.rsplit(')').next().unwrap_or_default();
    let ticks: u64 = after.split_whitespace().skip(11).take(2).filter_map(|word| word.parse::<u64>().ok()).sum();
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    ticks as f64 / per_second as f64
}
