//! Making room for the groups of sessions, beneath the group that this process is in.
//!
//! All of them are in one group that has the instance's name. What an earlier life of the same instance left there is
//! killed and removed first. On version 2 a group gives controllers to its children only while it holds no process
//! itself, so this process first moves into a leaf of its own; it goes back when the claim is dropped.

use super::super::resources::{KillMeans, Mechanism, Probe};
use super::detect::{self, Own};
use super::files;
use super::layout::{Layout, Place, Version};
use nix::unistd::AccessFlags;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How the group of an instance begins; its id follows.
const PREFIX: &str = "opencode-sidecar-";
/// The leaf for this process itself.
const LEAF: &str = "sidecar";
/// How long what an earlier life left may take to die.
const STALE: Duration = Duration::from_secs(10);
/// How often the group is emptied anew because something was born in it meanwhile.
const MOVES: usize = 20;

/// The group of this instance; drops with all beneath it.
#[derive(Debug)]
pub(in super::super) struct Claim {
    base: Layout,
    home: Option<Home>,
    next: AtomicU64,
}

/// The version-2 group that this process was in.
#[derive(Debug)]
struct Home {
    directory: PathBuf,
    base: PathBuf,
    /// What was enabled in it for its children.
    enabled: Vec<&'static str>,
    /// Whether its processes were moved into the leaf.
    moved: bool,
}

/// Claims what there is. Without a claim nothing can be had of groups; the probe says why.
pub(in super::super) fn claim(instance: &str) -> (Option<Claim>, Probe) {
    let mut missing = Vec::new();
    let own = detect::own().unwrap_or_else(|error| {
        missing.push(format!("the groups of this process are not known: {error}"));
        Own::default()
    });
    let name = format!("{PREFIX}{instance}");
    clear(&own, &name, &mut missing);
    let (mut base, mut home) = (Layout::default(), None);
    if let Some(directory) = own.unified.as_deref().map(home_of) {
        home = claim_v2(directory, own.is_namespace_root, &name, &mut base, &mut missing);
    } else {
        missing.push("cgroup v2 is not mounted".to_owned());
    }
    claim_v1(&own, &name, &mut base, &mut missing);
    let probe = probe(&base, missing);
    let claim = (!base.directories().is_empty()).then(|| Claim { base, home, next: AtomicU64::new(1) });
    (claim, probe)
}

impl Claim {
    /// The directories of a new group that is not made yet. No two are of the same name.
    pub(super) fn next(&self, name: &str) -> Layout {
        // A name is chosen here in the code, but a group may not lie anywhere else whatever it is.
        let plain: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
        self.base.child(&format!("{plain}-{}", self.next.fetch_add(1, Ordering::Relaxed)))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(home) = &self.home {
            home.leave();
        }
        if let Err(error) = self.base.remove() {
            tracing::warn!(%error, "the control groups of this instance could not be removed");
        }
    }
}

/// What an earlier life may have been moved to is a leaf of its own; the groups of this life belong beside that one's.
pub(super) fn home_of(own: &Path) -> &Path {
    let base = own.parent().filter(|_| own.file_name().is_some_and(|name| name == LEAF));
    let base = base.filter(|base| base.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX)));
    base.and_then(Path::parent).unwrap_or(own)
}

/// Kills and removes what an earlier life of this instance left, in every tree.
fn clear(own: &Own, name: &str, missing: &mut Vec<String>) {
    let base = |path: &Path| path.join(name);
    let v1 = |controller: &str| own.v1.get(controller).map(|path| base(path));
    let place = |controller| v1(controller).map(|directory| Place { directory, version: Version::V1 });
    let stale = Layout {
        unified: own.unified.as_deref().map(|own| base(home_of(own))),
        memory: place("memory"),
        pids: place("pids"),
        cpu: place("cpu"),
        io: None,
        freezer: v1("freezer"),
        cpuacct: v1("cpuacct"),
        tools: None,
    };
    let children = stale.directories().into_iter().flat_map(files::children);
    let names: BTreeSet<_> = children.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect();
    for name in names.into_iter().filter(|name| name != LEAF) {
        tracing::warn!(group = name, "an earlier life left a control group: killing what is in it, and removing it");
        let group = stale.child(&name);
        // A freezer of version 1 is only used where there is no version 2, but an earlier life may have known better.
        let emptied = group.empty(STALE);
        if let Err(error) = group.remove() {
            missing.push(format!("a group of an earlier life is left, empty: {emptied}: {error}"));
        }
    }
}

fn claim_v2(
    home: &Path,
    is_namespace_root: bool,
    name: &str,
    base: &mut Layout,
    missing: &mut Vec<String>,
) -> Option<Home> {
    let directory = home.join(name);
    let may_move = nix::unistd::eaccess(&home.join("cgroup.procs"), AccessFlags::W_OK);
    let ready = may_move.map_err(|error| format!("{}: {error}", home.join("cgroup.procs").display()));
    if let Err(error) = ready.and_then(|()| files::make(&directory).map_err(|error| error.to_string())) {
        missing.push(format!("cgroup v2 is not writable: {error}"));
        return None;
    }
    base.unified = Some(directory.clone());
    let offered = files::read(home, "cgroup.controllers").unwrap_or_default();
    let wanted =
        ["memory", "pids", "cpu", "io"].into_iter().filter(|name| offered.split_whitespace().any(|o| o == *name));
    let wanted: Vec<&str> = wanted.collect();
    let mut claimed = Home { directory: home.to_owned(), base: directory.clone(), enabled: Vec::new(), moved: false };
    // The root of all groups may have both processes and children with controllers; it alone has no type.
    let is_root = !home.join("cgroup.type").exists();
    if !wanted.is_empty() && !is_root && !files::processes(home).is_empty() {
        claimed.move_away(is_namespace_root, missing);
    }
    for controller in wanted {
        let already = files::read(home, "cgroup.subtree_control").unwrap_or_default();
        let already = already.split_whitespace().any(|enabled| enabled == controller);
        let enable = |group: &Path| files::write(group, "cgroup.subtree_control", &format!("+{controller}"));
        if let Err(error) = if already { Ok(()) } else { enable(home) }.and_then(|()| enable(&directory)) {
            missing.push(format!("cgroup v2 does not give the controller {controller}: {error}"));
            continue;
        }
        if !already {
            claimed.enabled.push(controller);
        }
        let place = || Some(Place { directory: directory.clone(), version: Version::V2 });
        match controller {
            "memory" => base.memory = place(),
            "pids" => base.pids = place(),
            "cpu" => base.cpu = place(),
            _ => base.io = Some(directory.clone()),
        }
    }
    Some(claimed)
}

impl Home {
    /// Moves this process into its leaf; in a container, whose group is nobody else's, all the others there too.
    fn move_away(&mut self, all: bool, missing: &mut Vec<String>) {
        let leaf = self.base.join(LEAF);
        if let Err(error) = files::make(&leaf) {
            missing.push(format!("cgroup v2 has no place for this process: {error}"));
            return;
        }
        self.moved = true;
        let own = nix::unistd::getpid().as_raw();
        for _ in 0..MOVES {
            let mut here = files::processes(&self.directory);
            here.retain(|pid| all || *pid == own);
            if here.is_empty() {
                return;
            }
            for pid in here {
                // One that has ended meanwhile need not move. What cannot move shows as EBUSY in what comes next.
                let _ = files::write(&leaf, "cgroup.procs", &pid.to_string());
            }
        }
    }

    /// Undoes what was done to the group that this process was in.
    fn leave(&self) {
        for controller in &self.enabled {
            let _ = files::write(&self.base, "cgroup.subtree_control", &format!("-{controller}"));
            let _ = files::write(&self.directory, "cgroup.subtree_control", &format!("-{controller}"));
        }
        if self.moved {
            for pid in files::processes(&self.base.join(LEAF)) {
                let _ = files::write(&self.directory, "cgroup.procs", &pid.to_string());
            }
        }
    }
}

/// Takes from version 1 what version 2 does not give.
fn claim_v1(own: &Own, name: &str, base: &mut Layout, missing: &mut Vec<String>) {
    let mut make = |controller: &str| {
        let directory = own.v1.get(controller)?.join(name);
        match files::make(&directory) {
            Ok(()) => Some(directory),
            Err(error) => {
                missing.push(format!("the cgroup v1 controller {controller} is not writable: {error}"));
                None
            }
        }
    };
    let mut place = |controller: &str| Some(Place { directory: make(controller)?, version: Version::V1 });
    base.memory = base.memory.take().or_else(|| place("memory"));
    base.pids = base.pids.take().or_else(|| place("pids"));
    base.cpu = base.cpu.take().or_else(|| place("cpu"));
    if base.unified.is_none() {
        base.freezer = make("freezer");
        base.cpuacct = make("cpuacct");
    }
}

fn probe(base: &Layout, mut missing: Vec<String>) -> Probe {
    let by = |place: &Option<Place>| {
        place.as_ref().map(|place| match place.version {
            Version::V1 => Mechanism::CgroupV1,
            Version::V2 => Mechanism::CgroupV2,
        })
    };
    let (memory, pids, cpu) = (by(&base.memory), by(&base.pids), by(&base.cpu));
    let what = [("memory", memory), ("pids", pids), ("cpu", cpu)];
    let without = what.into_iter().filter(|(_, by)| by.is_none()).map(|(name, _)| name).collect::<Vec<_>>();
    if !without.is_empty() {
        missing.push(format!("no group limits {}", without.join(", ")));
    }
    let has = |file: &str| base.unified.as_ref().is_some_and(|group| group.join(file).exists());
    let no_swap = base.memory.as_ref().map(|place| match place.version {
        Version::V1 => place.directory.join("memory.memsw.limit_in_bytes").exists(),
        Version::V2 => place.directory.join("memory.swap.max").exists(),
    });
    let kill = if has("cgroup.kill") {
        KillMeans::CgroupKill
    } else if base.has_freezer() {
        KillMeans::FreezeAndKill
    } else {
        KillMeans::OneByOne
    };
    Probe {
        mechanism: Mechanism::of(memory, pids),
        memory: memory.unwrap_or(Mechanism::Watched),
        no_swap,
        pids: pids.unwrap_or(Mechanism::Watched),
        cpu,
        io: base.io.is_some(),
        kill,
        freeze: base.has_freezer(),
        told_when_empty: has("cgroup.events"),
        missing,
    }
}
