//! What no group limits or counts, seen through `/proc`: the jail looks at everything below it now and then.
//!
//! A look is no limit. Between two of them a program may take as much as the machine gives it, so a limit that is
//! watched has to lie below the one of the pod. What is in a tmpfs without being mapped is nobody's memory here.

use super::resources::Resource;
use super::tree::{self, Stat};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::unistd;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::ops::{Add, Sub};
use std::time::{Duration, Instant};

/// How often memory is measured exactly while the inexact upper bound is within the limit.
const EXACT: Duration = Duration::from_secs(1);

/// What the jail is to watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Watch {
    pub(super) every_ms: u64,
    /// Whether memory and number are to be looked at, and not only what is read and written.
    pub(super) all: bool,
    /// Ends everything when the memory is more than this.
    pub(super) memory_bytes: Option<u64>,
    /// Ends everything when there are more processes and threads than this.
    pub(super) pids: Option<u64>,
}

/// What a look has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Sample {
    pub(super) cpu_seconds: f64,
    pub(super) io: Option<Io>,
    pub(super) memory_bytes: Option<u64>,
    pub(super) memory_peak_bytes: Option<u64>,
    pub(super) pids: Option<u64>,
    pub(super) pids_peak: Option<u64>,
}

/// Bytes that went to and from storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Io {
    pub(super) read: u64,
    pub(super) written: u64,
}

impl Io {
    /// The account of a process: its own and that of the children that it has waited for. `None`: the kernel keeps
    /// none, or does not show it.
    fn of(pid: &str) -> io::Result<Option<Self>> {
        let text = fs::read_to_string(format!("/proc/{pid}/io"))?;
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok());
        Ok((|| {
            // What was written to a file that was removed before it got to storage never gets there.
            let written = value("write_bytes:")?.saturating_sub(value("cancelled_write_bytes:")?);
            Some(Self { read: value("read_bytes:")?, written })
        })())
    }

    /// The calling process's.
    pub(super) fn own() -> Option<Self> {
        Self::of("self").ok().flatten()
    }
}

impl Add for Io {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { read: self.read.saturating_add(other.read), written: self.written.saturating_add(other.written) }
    }
}

impl Sub for Io {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self { read: self.read.saturating_sub(other.read), written: self.written.saturating_sub(other.written) }
    }
}

/// The jail's eyes.
pub(super) struct Watcher {
    watch: Watch,
    /// The jail's own account before it started anything.
    before: Option<Io>,
    next: Instant,
    exact: Option<Instant>,
    last: Sample,
}

impl Watcher {
    /// `before` is the jail's own account from before the program's start.
    pub(super) fn new(watch: Watch, before: Option<Io>) -> Self {
        Self { watch, before, next: Instant::now(), exact: None, last: Sample::default() }
    }

    /// How long until the next look.
    pub(super) fn due(&self) -> Duration {
        self.next.saturating_duration_since(Instant::now())
    }

    /// Looks; says what it saw where that is not what it was, and what has run out.
    pub(super) fn look(&mut self) -> (Option<Sample>, Option<Resource>) {
        let began = Instant::now();
        let (sample, exhausted) = self.measure(began);
        // A look at very many processes takes its time; no more than a tenth of it all is spent on looking.
        self.next = Instant::now() + Duration::from_millis(self.watch.every_ms.max(1)).max(began.elapsed() * 9);
        let news = (sample != self.last).then_some(sample);
        self.last = sample;
        (news, exhausted)
    }

    /// What was read and written by all that has ended, which is all of it at the end.
    pub(super) fn ended(before: Option<Io>) -> Option<Io> {
        Some(Io::own()? - before?)
    }

    fn measure(&mut self, now: Instant) -> (Sample, Option<Resource>) {
        // Those that have ended first: what ends between the two is missed this once, and never counted twice.
        let mut io = Self::ended(self.before);
        let mut cpu_seconds = reaped_cpu_seconds();
        let mut found = Vec::new();
        let own = unistd::getpid().as_raw();
        tree::walk(|stat| stat.parent == own, |stat| found.push(stat.clone()));
        for stat in &found {
            match Io::of(&stat.pid.to_string()) {
                Ok(more) => io = io.zip(more).map(|(sum, more)| sum + more),
                Err(error) if is_gone(&error) => {}
                Err(_) => io = None,
            }
        }
        let per_second = unistd::sysconf(unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
        cpu_seconds += found.iter().map(|stat| stat.cpu_ticks).sum::<u64>() as f64 / per_second as f64;
        // A process's time gets from it to the jail when it is waited for, which no look sees as one step.
        let cpu_seconds = cpu_seconds.max(self.last.cpu_seconds);
        let io = io.map(|io| match self.last.io {
            Some(last) => Io { read: io.read.max(last.read), written: io.written.max(last.written) },
            None => io,
        });
        let mut sample = Sample { cpu_seconds, io, ..self.last };
        if !self.watch.all {
            return (sample, None);
        }
        // One that has ended takes a place in the table until it is waited for, here as in a group.
        let pids = found.iter().map(|stat| stat.threads.max(1)).sum();
        sample.pids = Some(pids);
        sample.pids_peak = sample.pids_peak.max(sample.pids);
        if self.watch.pids.is_some_and(|limit| pids > limit) {
            return (sample, Some(Resource::Pids));
        }
        let above = |bytes: u64| self.watch.memory_bytes.is_some_and(|limit| bytes > limit);
        // Pages that several share count for each of them here, so this is never too little, and cheap.
        let most: u64 = found.iter().map(resident).sum();
        if above(most) || self.exact.is_none_or(|at| now.duration_since(at) >= EXACT) {
            self.exact = Some(now);
            let memory = found.iter().map(proportional).sum();
            sample.memory_bytes = Some(memory);
            sample.memory_peak_bytes = sample.memory_peak_bytes.max(sample.memory_bytes);
            if above(memory) {
                return (sample, Some(Resource::Memory));
            }
        }
        (sample, None)
    }
}

/// User and system time of all children that were waited for, and theirs, in seconds.
pub(super) fn reaped_cpu_seconds() -> f64 {
    getrusage(UsageWho::RUSAGE_CHILDREN).map_or(0.0, |usage| {
        let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
        Duration::from_micros(micros.unsigned_abs()).as_secs_f64()
    })
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ESRCH)
}

/// What a process has in memory, shared or not. 0 for one that has ended.
fn resident(stat: &Stat) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/statm", stat.pid)).unwrap_or_default();
    let pages: u64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    let page = unistd::sysconf(unistd::SysconfVar::PAGE_SIZE).ok().flatten();
    pages.saturating_mul(page.and_then(|page| u64::try_from(page).ok()).unwrap_or(4096))
}

/// Its part of what is shared and all that is not. Where the kernel does not show this, all of both.
fn proportional(stat: &Stat) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", stat.pid)).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kilobytes.map_or_else(|| resident(stat), |kilobytes| kilobytes.saturating_mul(1024))
}
