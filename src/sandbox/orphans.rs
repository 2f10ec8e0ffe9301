//! What this process may find among its children although it never started it: descendants of a jail that was
//! killed. The kernel hands these to the next subreaper, which is this process.
//!
//! Being a parent is a matter of the whole process, so this table is one per process, however many sandboxes it has.

use super::tree::{self, Stat};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, getpid, getsid};
use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

static TABLE: Mutex<Table> = Mutex::new(Table { jails: BTreeSet::new(), lost: false });

struct Table {
    /// Jails that were started and not yet reaped.
    jails: BTreeSet<i32>,
    /// Whether a jail has ended without its proof since the last sweep that found nothing. There is no other way to
    /// get an orphan of ours, so without one nothing is looked for, and nothing can be killed by mistake.
    lost: bool,
}

fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a jail and notes its id in one step, so that no sweep sees it without knowing it.
pub(super) fn register<C>(start: impl FnOnce() -> io::Result<C>, pid: impl FnOnce(&C) -> Option<u32>) -> io::Result<C> {
    let mut table = table();
    let child = start()?;
    if let Some(pid) = pid(&child).and_then(|pid| i32::try_from(pid).ok()) {
        table.jails.insert(pid);
    }
    Ok(child)
}

/// Forgets a jail that was reaped. `proven`: it reported that nothing is left below it.
pub(super) fn forget(pid: i32, proven: bool) {
    let mut table = table();
    table.jails.remove(&pid);
    table.lost |= !proven;
}

/// Runs `work` if this jail is not reaped yet, so that its id is still its own.
pub(super) fn while_registered(pid: i32, work: impl FnOnce()) {
    let table = table();
    if table.jails.contains(&pid) {
        work();
    }
}

/// Kills and reaps the orphans of lost jails and all below them. Returns how many it found; 0 means that none is left.
///
/// An orphan is a child of this process that is in another session and is no jail. Whatever runs below a jail is in
/// the jail's session or in one that it made itself, and nobody can join a session that exists; so a plain child of
/// this process is never taken for one.
pub(super) fn sweep() -> usize {
    let mut table = table();
    if !table.lost {
        return 0;
    }
    let orphans = find(&table, true);
    if orphans.is_empty() {
        table.lost = false;
    }
    orphans.len()
}

/// The orphans of lost jails and all below them that still live.
pub(super) fn living() -> Vec<Stat> {
    let table = table();
    if table.lost { find(&table, false) } else { Vec::new() }
}

fn find(table: &Table, kill: bool) -> Vec<Stat> {
    let own = getpid().as_raw();
    let own_session = getsid(None).map_or(own, Pid::as_raw);
    let is_orphan = |stat: &Stat| stat.parent == own && stat.session != own_session && !table.jails.contains(&stat.pid);
    let mut found = Vec::new();
    tree::walk(is_orphan, |stat| {
        if kill && !stat.is_zombie() {
            tree::kill_one(stat);
        }
        if kill && stat.parent == own {
            // Only this very process: a wait for any child would take the jails from the runtime.
            let _ = waitpid(Pid::from_raw(stat.pid), Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL));
        }
        if kill || !stat.is_zombie() {
            found.push(stat.clone());
        }
    });
    found
}
