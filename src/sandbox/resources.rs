//! What a program may use and has used: the words for it, whoever measures it.

use super::cgroup::{self, Claim, Group};
use super::watch::Watch;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// How often is looked at what only the kernel's account of each process says.
const ACCOUNT: Duration = Duration::from_secs(1);

/// What there is to limit and measure programs with. Cheap to clone; the groups are removed with the last one.
#[derive(Clone, Debug)]
pub struct Resources(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    claim: Option<Arc<Claim>>,
    probe: Probe,
    look_every: Duration,
}

impl Resources {
    /// Makes room for groups beneath the group that this process is in, after killing and removing what an earlier
    /// life of the same instance left there. Where no group can be made, programs are watched instead, with a look
    /// every `look_every`. Never fails: [`Resources::probe`] says what is there.
    ///
    /// Call it once, before anything else runs, and only for an instance that is nobody else's. It may block for some
    /// seconds where there is much to kill. On version 2 it moves this process into a group of its own; in a
    /// container, everything else in the container's group too.
    pub fn claim(instance: &str, look_every: Duration) -> Self {
        let (claim, probe) = cgroup::claim(instance);
        Self(Arc::new(Inner { claim: claim.map(Arc::new), probe, look_every }))
    }

    /// Watches, with a look every `look_every`, and makes no group.
    pub fn watched(look_every: Duration) -> Self {
        let probe = Probe {
            mechanism: Mechanism::Watched,
            memory: Mechanism::Watched,
            no_swap: None,
            pids: Mechanism::Watched,
            cpu: None,
            io: false,
            kill: KillMeans::OneByOne,
            freeze: false,
            told_when_empty: false,
            missing: vec!["no group was asked for".to_owned()],
        };
        Self(Arc::new(Inner { claim: None, probe, look_every }))
    }

    /// Tells what [`Resources::claim`] would find, without one: nothing is made, moved or killed, so it may be asked
    /// beside a sidecar that runs.
    pub fn foresee() -> Foreseen {
        cgroup::foresee()
    }

    /// Says that this is what there is, and limits nothing: for whoever starts no program with limits.
    pub fn foreseen(probe: Probe) -> Self {
        Self(Arc::new(Inner { claim: None, probe, look_every: ACCOUNT }))
    }

    /// What this host gives.
    pub fn probe(&self) -> &Probe {
        &self.0.probe
    }

    /// Makes the group of a program, where there can be one. Blocks for a moment.
    pub(super) fn group(&self, name: &str, limits: &Limits) -> io::Result<Option<Group>> {
        self.0.claim.as_ref().map(|claim| Group::make(claim, name, limits)).transpose()
    }

    /// What of the limits and the account the jail has to see to.
    pub(super) fn watch(&self, limits: &Limits) -> Option<Watch> {
        let Inner { probe, look_every, .. } = &*self.0;
        let (memory, pids) = (probe.memory == Mechanism::Watched, probe.pids == Mechanism::Watched);
        let all = memory || pids;
        (all || !probe.io).then(|| Watch {
            every_ms: u64::try_from(if all { *look_every } else { ACCOUNT }.as_millis()).unwrap_or(u64::MAX),
            all,
            memory_bytes: limits.memory_bytes.filter(|_| memory),
            pids: limits.pids.filter(|_| pids),
        })
    }
}

/// What a program and all that descends from it may use together. `None`: no limit of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Memory, in bytes, without swap. In a group this is all that the kernel charges to it: files in a tmpfs, page
    /// cache, and what the kernel itself keeps for it. Watched, it is what the processes have mapped, shared pages
    /// counted once.
    pub memory_bytes: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// How many of these the program's tools may be together: whatever a shell tap runs. So a tool that forks without
    /// end leaves the program some to go on with. Only a control group holds it, and only a confined program's tools
    /// are told apart from it.
    pub tool_pids: Option<u64>,
    /// Thousandths of one CPU; at least 10. Nothing holds it without a group.
    pub cpu_millis: Option<u64>,
}

/// What a program and all that descends from it have used. `None`: this host does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Usage {
    /// User and system time, in seconds.
    pub cpu_seconds: Option<f64>,
    /// Memory now, in bytes; counted as in [`Limits::memory_bytes`].
    pub memory_bytes: Option<u64>,
    /// The most memory at any time; watched, the most that a look has met.
    pub memory_peak_bytes: Option<u64>,
    /// Processes and threads now.
    pub pids: Option<u64>,
    /// The most at any time; watched, the most that a look has met.
    pub pids_peak: Option<u64>,
    /// Bytes that were fetched from storage. Without a controller for it this is the kernel's account of the
    /// processes: it lacks those whose parent did not wait for them because it ignores SIGCHLD.
    pub read_bytes: Option<u64>,
    /// Bytes that were, or are still to be, written to storage; measured likewise.
    pub written_bytes: Option<u64>,
}

impl Usage {
    /// Fills in from `other` what this one does not say.
    pub(super) fn or(self, other: Self) -> Self {
        Self {
            cpu_seconds: self.cpu_seconds.or(other.cpu_seconds),
            memory_bytes: self.memory_bytes.or(other.memory_bytes),
            memory_peak_bytes: self.memory_peak_bytes.or(other.memory_peak_bytes),
            pids: self.pids.or(other.pids),
            pids_peak: self.pids_peak.or(other.pids_peak),
            read_bytes: self.read_bytes.or(other.read_bytes),
            written_bytes: self.written_bytes.or(other.written_bytes),
        }
    }
}

/// How often a limit was felt, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceEvents {
    /// Processes that the kernel killed because the memory limit was reached.
    pub oom_kills: u64,
    /// Times that a new process or thread was refused because there were too many.
    pub forks_refused: u64,
    /// How many of these were refused to tools by [`Limits::tool_pids`], and not to the program.
    pub tool_forks_refused: u64,
}

impl ResourceEvents {
    /// Whether more was felt than then. None of the counts ever falls.
    pub(super) fn exceed(self, known: Self) -> bool {
        self.oom_kills > known.oom_kills || self.forks_refused > known.forks_refused
    }
}

/// What can run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// [`Limits::memory_bytes`].
    Memory,
    /// [`Limits::pids`].
    Pids,
}

/// What holds the limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mechanism {
    /// A control group of version 2.
    CgroupV2,
    /// Control groups of version 1, for some or all of it.
    CgroupV1,
    /// No group can be made: the jail looks at memory and number several times a second, and ends everything at the
    /// limit.
    Watched,
}

impl Mechanism {
    /// What holds both, by what holds each.
    pub(super) fn of(memory: Option<Self>, pids: Option<Self>) -> Self {
        match (memory, pids) {
            (Some(Self::CgroupV2), Some(Self::CgroupV2)) => Self::CgroupV2,
            (Some(_), Some(_)) => Self::CgroupV1,
            _ => Self::Watched,
        }
    }

    /// The word in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CgroupV2 => "cgroup_v2",
            Self::CgroupV1 => "cgroup_v1",
            Self::Watched => "watched",
        }
    }
}

impl fmt::Display for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How everything in a group is killed, beside the jail's own search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KillMeans {
    /// One write to `cgroup.kill`.
    CgroupKill,
    /// The group is frozen and each process in it is killed, until it is empty.
    FreezeAndKill,
    /// There is no group, or none that can be frozen: each process is killed until the group, or the jail, has none.
    OneByOne,
}

/// What this host gives to limit and measure with, as it was found when the groups were claimed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Probe {
    /// What holds the limits of memory and processes.
    pub mechanism: Mechanism,
    /// What limits and measures memory.
    pub memory: Mechanism,
    /// Whether swap is kept from a session too. `None`: this is known only with a group.
    pub no_swap: Option<bool>,
    /// What limits and counts processes.
    pub pids: Mechanism,
    /// What limits CPU time. `None`: nothing does.
    pub cpu: Option<Mechanism>,
    /// Whether a controller counts what is read and written; else the kernel's account of each process is added up.
    pub io: bool,
    /// How everything is killed.
    pub kill: KillMeans,
    /// Whether everything can be frozen and thawed.
    pub freeze: bool,
    /// Whether the kernel tells when a group is empty; else it is looked at.
    pub told_when_empty: bool,
    /// Why it is no better than this; nothing where nothing is missing.
    pub missing: Vec<String>,
}

/// What a claim would find.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreseen {
    /// As far as it shows. [`Probe::no_swap`] never does.
    pub probe: Probe,
    /// What shows only when it is done, and why.
    pub unknown: Vec<String>,
}
