//! The process tree as `/proc` shows it: who descends from whom, and killing all of it.
//!
//! A look at `/proc` is never a proof that nothing is left, since it takes time and the tree goes on moving. The
//! proof is the kernel's word to the subreaper (`ECHILD`); what is here finds what has to be killed until then.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fmt;
use std::fs;

/// One process, from `/proc/<pid>/stat`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Its id.
    pub pid: i32,
    /// The name of its program, cut by the kernel at 15 bytes. The process may choose it freely.
    pub name: String,
    /// `R`, `S`, `D`, `Z` and so on.
    pub state: char,
    /// The parent, or the subreaper that took it over.
    pub parent: i32,
    /// The session it is in.
    pub session: i32,
    /// User and system time of it and of the children that it has waited for, in the kernel's ticks.
    pub(super) cpu_ticks: u64,
    /// How many threads it has.
    pub(super) threads: u64,
}

impl Stat {
    /// Reads the one line of a `stat` file.
    ///
    /// The name stands in parentheses and may itself hold parentheses, spaces and line ends; only the *last* `)` ends
    /// it, because nothing after it can hold one.
    pub fn parse(line: &str) -> Option<Self> {
        let (head, rest) = line.rsplit_once(')')?;
        let (pid, name) = head.split_once('(')?;
        let mut fields = rest.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let _group = fields.next()?;
        let session = fields.next()?.parse().ok()?;
        // Terminal, its group, flags and four kinds of page faults come before the times; priority and niceness after.
        let mut times = fields.skip(7).map(|field| field.parse().unwrap_or(0));
        let cpu_ticks = times.by_ref().take(4).sum();
        let threads = times.nth(2).unwrap_or(1);
        Some(Self { pid: pid.trim().parse().ok()?, name: name.to_owned(), state, parent, session, cpu_ticks, threads })
    }

    /// Whether it has ended and only waits to be reaped.
    pub fn is_zombie(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

impl fmt::Display for Stat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?}, state {})", self.pid, self.name, self.state)
    }
}

/// Visits every process for which `is_root` holds and every descendant of these, zombies included.
///
/// The kernel lists ids in ascending order and mostly gives a child a higher id than its parent, so one pass sees
/// nearly all, those included that are born while it runs. A child with a lower id (ids wrap around) needs another
/// pass.
pub(super) fn walk(is_root: impl Fn(&Stat) -> bool, mut visit: impl FnMut(&Stat)) {
    let mut seen = BTreeSet::new();
    let Ok(entries) = fs::read_dir("/proc") else { return };
    for entry in entries.flatten() {
        let is_process = entry.file_name().to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
        if !is_process {
            continue;
        }
        // It may be gone by now; that is what we want of it anyway.
        let Ok(bytes) = fs::read(entry.path().join("stat")) else { continue };
        let Some(stat) = Stat::parse(&String::from_utf8_lossy(&bytes)) else { continue };
        if is_root(&stat) || seen.contains(&stat.parent) {
            seen.insert(stat.pid);
            visit(&stat);
        }
    }
}

/// The users that processes have now: real, effective and saved ones.
pub(super) fn users() -> BTreeSet<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return BTreeSet::new() };
    // What is no process has no such file. The owner of the directory would not do: a process can make it root's.
    let statuses = entries.flatten().filter_map(|entry| fs::read(entry.path().join("status")).ok());
    statuses.flat_map(|status| users_in(&String::from_utf8_lossy(&status))).collect()
}

fn users_in(status: &str) -> Vec<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    line.unwrap_or_default().split_ascii_whitespace().filter_map(|uid| uid.parse().ok()).collect()
}

/// Kills as it walks (see [`walk`]), so that a parent is dead before its next child could be born. Returns whom it
/// signalled; zombies are left out.
pub(super) fn kill_all(is_root: impl Fn(&Stat) -> bool) -> BTreeSet<i32> {
    let mut killed = BTreeSet::new();
    walk(is_root, |stat| {
        if !stat.is_zombie() && kill_one(stat) {
            killed.insert(stat.pid);
        }
    });
    killed
}

/// Sends SIGKILL. False: it is gone already, or not ours to kill.
pub(super) fn kill_one(stat: &Stat) -> bool {
    kill(Pid::from_raw(stat.pid), Signal::SIGKILL).is_ok()
}

/// All that lives below `pid`, which itself is not part of it.
pub(super) fn living_below(pid: i32) -> Vec<Stat> {
    let mut living = Vec::new();
    walk(
        |stat| stat.parent == pid,
        |stat| {
            if !stat.is_zombie() {
                living.push(stat.clone());
            }
        },
    );
    living
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_line() {
        let line = "4242 (sleep) S 17 4242 4240 0 -1 4194304 95 0 0 0 11 22 33 44 20 0 5 0 123456 6000000 300 1844";
        let stat = Stat::parse(line).unwrap();
        let name = "sleep".to_owned();
        assert_eq!(stat, Stat { pid: 4242, name, state: 'S', parent: 17, session: 4240, cpu_ticks: 110, threads: 5 });
        assert!(!stat.is_zombie());
    }

    #[test]
    fn a_name_may_look_like_the_fields_behind_it() {
        let stat = Stat::parse("7 (a) Z 1 1 1 (b c) R 3 7 9 0 -1").unwrap();
        assert_eq!((stat.name.as_str(), stat.state, stat.parent, stat.session), ("a) Z 1 1 1 (b c", 'R', 3, 9));
        let stat = Stat::parse("8 (new\nline)) Z 3 8 9 0").unwrap();
        assert_eq!((stat.name.as_str(), stat.parent), ("new\nline)", 3));
        assert!(stat.is_zombie());
    }

    #[test]
    fn what_is_no_stat_line_is_refused() {
        for line in ["", "1", "1 (", "1 (a", "1 (a)", "1 (a) S", "1 (a) S x 1 1", "x (a) S 1 1 1", "1 (a) S 1 1"] {
            assert_eq!(Stat::parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn all_users_of_a_process_count() {
        assert_eq!(users_in("Name:\tUid: 7\nUid:\t1\t2\t3\t4\nGid:\t9\t9\t9\t9\n"), [1, 2, 3, 4]);
        assert!(users_in("Name:\tx\n").is_empty());
        assert!(users().contains(&nix::unistd::getuid().as_raw()));
    }

    #[test]
    fn this_process_is_found_below_its_parent() {
        let own = i32::try_from(std::process::id()).unwrap();
        let parent = i32::try_from(std::os::unix::process::parent_id()).unwrap();
        assert!(living_below(parent).iter().any(|stat| stat.pid == own));
    }
}
