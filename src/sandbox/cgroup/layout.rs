//! The directories that make up one group, wherever they are, and what can be done with it at once.
//!
//! On version 2 that is one directory. With version-1 controllers it is one in each controller's tree, and one in the
//! version-2 tree for what only that can: kill, freeze, and tell when nothing is left. The jail has one of these too.

use super::super::resources::{Limits, ResourceEvents, Usage};
use super::{files, v1, v2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a group may take to freeze before its processes are killed one by one all the same.
const FREEZE: Duration = Duration::from_millis(100);

/// The part of a group that its program's tools move to, and on version 2 that of the program itself.
const TOOLS: &str = "tools";
const MAIN: &str = "main";

/// Which of the two a controller's directory is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in super::super) enum Version {
    V1,
    V2,
}

/// A directory where a controller is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in super::super) struct Place {
    pub(in super::super) directory: PathBuf,
    pub(in super::super) version: Version,
}

/// The directories of one group. What is `None` cannot be had here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in super::super) struct Layout {
    /// In the version-2 tree.
    pub(in super::super) unified: Option<PathBuf>,
    pub(in super::super) memory: Option<Place>,
    pub(in super::super) pids: Option<Place>,
    pub(in super::super) cpu: Option<Place>,
    /// Version 2 only.
    pub(in super::super) io: Option<PathBuf>,
    /// Version 1, and only where there is no version-2 tree.
    pub(in super::super) freezer: Option<PathBuf>,
    /// Likewise.
    pub(in super::super) cpuacct: Option<PathBuf>,
    /// The part of the group that its program's tools move to, where they have a limit of their own. Only processes
    /// are counted there; whatever else they use is the whole group's.
    pub(in super::super) tools: Option<Place>,
}

impl Layout {
    /// The group of this name beneath this one.
    pub(super) fn child(&self, name: &str) -> Self {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.join(name));
        let place = |place: &Option<Place>| {
            place.as_ref().map(|place| Place { directory: place.directory.join(name), version: place.version })
        };
        Self {
            unified: path(&self.unified),
            memory: place(&self.memory),
            pids: place(&self.pids),
            cpu: place(&self.cpu),
            io: path(&self.io),
            freezer: path(&self.freezer),
            cpuacct: path(&self.cpuacct),
            tools: None,
        }
    }

    /// Each directory once.
    pub(super) fn directories(&self) -> Vec<&Path> {
        let places = [&self.memory, &self.pids, &self.cpu].into_iter().flatten().map(|place| &place.directory);
        let paths = [&self.unified, &self.io, &self.freezer, &self.cpuacct].into_iter().flatten();
        let mut found: Vec<&Path> = Vec::new();
        for directory in paths.chain(places) {
            if !found.contains(&directory.as_path()) {
                found.push(directory);
            }
        }
        found
    }

    /// Makes all of it, or nothing.
    pub(super) fn make(&self) -> io::Result<()> {
        let made = self.directories().into_iter().try_for_each(files::make);
        if made.is_err() {
            let _ = self.remove();
        }
        made
    }

    /// Removes it and all beneath it.
    ///
    /// # Errors
    /// A process is in it.
    pub(super) fn remove(&self) -> io::Result<()> {
        self.directories().into_iter().try_for_each(files::remove)
    }

    pub(super) fn limit(&self, limits: &Limits) -> io::Result<()> {
        if let (Some(place), Some(bytes)) = (&self.memory, limits.memory_bytes) {
            match place.version {
                Version::V1 => v1::limit_memory(&place.directory, bytes)?,
                Version::V2 => v2::limit_memory(&place.directory, bytes)?,
            }
        }
        if let (Some(place), Some(pids)) = (&self.pids, limits.pids) {
            v2::limit_pids(&place.directory, pids)?;
        }
        if let (Some(place), Some(millis)) = (&self.cpu, limits.cpu_millis) {
            match place.version {
                Version::V1 => v1::limit_cpu(&place.directory, millis)?,
                Version::V2 => v2::limit_cpu(&place.directory, millis)?,
            }
        }
        Ok(())
    }

    /// Makes the part for tools, of which there may be so many, in a group that is made and empty.
    pub(super) fn make_tools(&mut self, pids: u64) -> io::Result<()> {
        let Some(Place { directory, version }) = &self.pids else { return Ok(()) };
        if *version == Version::V2 {
            files::make(&directory.join(MAIN))?;
            files::write(directory, "cgroup.subtree_control", "+pids")?;
        }
        let tools = Place { directory: directory.join(TOOLS), version: *version };
        files::make(&tools.directory)?;
        v2::limit_pids(&tools.directory, pids)?;
        self.tools = Some(tools);
        Ok(())
    }

    /// Moves a process of this group to its tools.
    pub(in super::super) fn move_to_tools(&self, pid: i32) -> io::Result<()> {
        let tools = self.tools.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        files::write(&tools.directory, "cgroup.procs", &pid.to_string())
    }

    /// Where in a directory of the group its program is: on version 2 no process is beside a part that has a
    /// controller.
    pub(super) fn main_in(&self, directory: &Path) -> PathBuf {
        let split = self
            .tools
            .as_ref()
            .is_some_and(|tools| tools.version == Version::V2 && tools.directory.parent() == Some(directory));
        if split { directory.join(MAIN) } else { directory.to_owned() }
    }

    /// Opens what a process writes to in order to join, for [`join`]. The kernel asks the rights of whoever opened it.
    pub(in super::super) fn doors(&self) -> io::Result<Vec<OwnedFd>> {
        let open = |directory: &Path| {
            let path = self.main_in(directory).join("cgroup.procs");
            let file = fs::OpenOptions::new().write(true).open(&path);
            file.map(OwnedFd::from)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
        };
        self.directories().into_iter().map(open).collect()
    }

    /// Sends SIGKILL to all that is in it and beneath it. What forks meanwhile may escape where there is no
    /// `cgroup.kill` and no freezer: call it until the group is empty.
    pub(in super::super) fn kill(&self) {
        let in_one_go = self.unified.as_ref().is_some_and(|group| files::write(group, "cgroup.kill", "1").is_ok());
        if !in_one_go {
            self.kill_each();
        }
    }

    /// The same without `cgroup.kill`, which came with Linux 5.14.
    fn kill_each(&self) {
        if self.freeze(true).is_ok() {
            let end = Instant::now() + FREEZE;
            while self.is_frozen() == Some(false) && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        for directory in self.directories() {
            signal_all(directory);
        }
        // Version 1 delivers the signal only now.
        let _ = self.freeze(false);
    }

    /// Whether a process is in it or beneath it.
    pub(super) fn is_populated(&self) -> bool {
        match self.unified.as_deref().and_then(v2::is_populated) {
            Some(populated) => populated,
            None => self.directories().into_iter().any(holds_processes),
        }
    }

    /// Kills until it is empty. False: it is not, after this long.
    pub(super) fn empty(&self, within: Duration) -> bool {
        let end = Instant::now() + within;
        while self.is_populated() {
            if Instant::now() >= end {
                return false;
            }
            self.kill();
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Whether there is something to freeze it with.
    pub(super) fn has_freezer(&self) -> bool {
        self.freezer.is_some() || self.unified.as_ref().is_some_and(|group| group.join("cgroup.freeze").exists())
    }

    /// Asks for it; [`Layout::is_frozen`] tells when it is done.
    pub(super) fn freeze(&self, frozen: bool) -> io::Result<()> {
        match (&self.unified, &self.freezer) {
            (Some(group), _) => files::write(group, "cgroup.freeze", if frozen { "1" } else { "0" }),
            (None, Some(group)) => v1::freeze(group, frozen),
            (None, None) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Whether nothing in it runs or can run. `None`: the group is gone, or cannot be frozen.
    pub(super) fn is_frozen(&self) -> Option<bool> {
        match (&self.unified, &self.freezer) {
            (Some(group), _) => v2::is_frozen(group),
            (None, Some(group)) => v1::is_frozen(group),
            (None, None) => None,
        }
    }

    /// User and system time of all that ever ran in it, in seconds.
    pub(super) fn cpu_seconds(&self) -> Option<f64> {
        match (&self.unified, &self.cpuacct) {
            (Some(group), _) => v2::cpu_seconds(group),
            (None, Some(group)) => v1::cpu_seconds(group),
            (None, None) => None,
        }
    }

    /// What its controllers say, and nothing for what has none.
    pub(super) fn usage(&self) -> Usage {
        let mut usage = Usage { cpu_seconds: self.cpu_seconds(), ..Usage::default() };
        if let Some(place) = &self.memory {
            match place.version {
                Version::V1 => v1::memory(&place.directory, &mut usage),
                Version::V2 => v2::memory(&place.directory, &mut usage),
            }
        }
        if let Some(place) = &self.pids {
            v2::pids(&place.directory, &mut usage);
        }
        if let Some(group) = &self.io {
            v2::io(group, &mut usage);
        }
        usage
    }

    /// How often its limits were felt. `before` stands in for what cannot be read any more.
    pub(super) fn events(&self, before: ResourceEvents) -> ResourceEvents {
        let oom_kills = self.memory.as_ref().and_then(|place| match place.version {
            Version::V1 => v1::oom_kills(&place.directory),
            Version::V2 => v2::oom_kills(&place.directory),
        });
        let (forks_refused, tool_forks_refused) =
            self.forks_refused().unwrap_or((before.forks_refused, before.tool_forks_refused));
        ResourceEvents { oom_kills: oom_kills.unwrap_or(before.oom_kills), forks_refused, tool_forks_refused }
    }

    /// In all, and of these to the tools.
    fn forks_refused(&self) -> Option<(u64, u64)> {
        let group = self.pids.as_ref()?;
        let all = v2::forks_refused(&group.directory)?;
        let Some(tools) = &self.tools else { return Some((all, 0)) };
        let of_tools = v2::forks_refused(&tools.directory)?;
        let all = match tools.version {
            Version::V1 => all + of_tools,
            // The group says it for its parts too, but before Linux 6.11 only where the process was that forked.
            Version::V2 => all.max(v2::forks_refused(&self.main_in(&group.directory))? + of_tools),
        };
        Some((all, of_tools))
    }
}

/// Moves the calling process, which must have one thread, into the group of these [`Layout::doors`]. Allocates
/// nothing and takes no lock, so a forked child may call it.
pub(in super::super) fn join(doors: &[OwnedFd]) -> nix::Result<()> {
    doors.iter().try_for_each(|door| nix::unistd::write(door, b"0").map(drop))
}

fn holds_processes(directory: &Path) -> bool {
    !files::processes(directory).is_empty() || files::children(directory).iter().any(|child| holds_processes(child))
}

fn signal_all(directory: &Path) {
    for pid in files::processes(directory) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    for child in files::children(directory) {
        signal_all(&child);
    }
}

#[cfg(test)]
mod tests;
