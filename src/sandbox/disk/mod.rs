//! How many bytes a program adds beneath some directories, and that it is too many.
//!
//! Nothing here holds a write back: it is counted, and whoever waits for [`Disk::exhausted`] ends the program. So a
//! program can go over: by what it writes between two looks (a quarter of a second, and the walk itself), and by all
//! that one `fallocate` takes, which is at once. Counting is a walk over the files, which is dear where there are many.
//! So the filesystem is asked first, often and for next to nothing, how much of it is in use; a walk follows when that
//! has grown so much that the limit might be near, and otherwise now and then. However many files there are, the walks
//! take no more than a fifth of the time of one thread, which is none of the runtime's own.
//!
//! What is counted: allocated blocks, of a file with several names once; also of files that were removed and are still
//! open in the program. Not counted: what is removed and closed, but still mapped; and what is in a directory that this
//! process may not read ([`Added::unreadable`]). What somebody else adds beneath the same directories counts too,
//! unless only what one user owns is counted.
//!
//! A project quota would hold writes back where ext4 or XFS is mounted with them, which no usual volume of a pod is; it
//! takes capabilities that a pod does not have, and is not used.

pub(super) mod walk;

use super::process::ProcessHandle;
use super::{User, tree};
use crate::tasks::Tasks;
use nix::unistd::{Gid, Uid, getegid, geteuid, setfsgid, setfsuid};
use rustix::fs::{FileType, StatVfs, statvfs};
use rustix::thread::{CapabilitySet, capabilities};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::{CancellationToken, DropGuard};
use walk::{Found, MAX_ENTRIES, Walk};

/// How often the filesystem is asked.
const LOOK: Duration = Duration::from_millis(250);
/// How often is counted where the filesystem shows no reason to.
const CALM: Duration = Duration::from_secs(10);
/// At least so many times as long as a walk took, there is none.
const PAUSE: u32 = 4;
/// The same where there is no reason to.
const CALM_PAUSE: u32 = 20;
/// Growth of a filesystem that is no reason to count.
const LITTLE: u64 = 1024 * 1024;

/// What to count.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// Directories that exist. One within another is not counted twice.
    pub roots: Vec<PathBuf>,
    /// How many bytes may be added beneath all of them together.
    pub limit: Option<u64>,
    /// Counts only what this user owns.
    pub owner: Option<u32>,
    /// Whose open files without a name count too.
    pub process: Option<ProcessHandle>,
    /// The user that looks, where this process itself may not look into another one's directories and processes.
    pub user: Option<User>,
}

/// What was added since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Added {
    /// Allocated bytes more than at the start; 0 where there are fewer.
    pub bytes: u64,
    /// Directories that could not be looked into.
    pub unreadable: u64,
    /// Whether there are more files than are counted (two million), so that the bytes are too few.
    pub cut: bool,
    /// Whether it is over the limit; or, where there is one, over the number of files that are counted, and was not at
    /// the start.
    pub exhausted: bool,
}

/// Counts until it is dropped.
#[derive(Debug)]
pub struct Disk {
    state: watch::Receiver<Added>,
    _stop: DropGuard,
}

impl Disk {
    /// Counts what is there, and starts to count what is added. Returns when the first count is done.
    ///
    /// # Errors
    /// A root cannot be opened, or the sidecar shuts down.
    pub(super) async fn start(tasks: &Tasks, spec: DiskSpec) -> io::Result<Self> {
        let stop = CancellationToken::new();
        let guard = stop.clone().drop_guard();
        let mut counter = Counter::new(tasks.clone(), spec, stop.clone());
        let before = counter.in_use();
        let (baseline, took) = counter.count().await?;
        let (sender, state) =
            watch::channel(Added { unreadable: baseline.unreadable, cut: baseline.cut, ..Added::default() });
        counter.baseline = baseline;
        counter.counted = (before, Instant::now(), took);
        let work = async move {
            tokio::select! {
                () = counter.run(&sender) => {}
                () = stop.cancelled() => {}
            }
        };
        tasks.spawn("disk", work);
        Ok(Self { state, _stop: guard })
    }

    /// What was added, as of the last count.
    pub fn added(&self) -> Added {
        *self.state.borrow()
    }

    /// Waits until it is over the limit; for ever where it never is.
    pub async fn exhausted(&self) -> Added {
        self.reached(|added| added.exhausted).await
    }

    /// Waits until at least so many bytes were added.
    pub async fn reached_bytes(&self, bytes: u64) -> Added {
        self.reached(|added| added.bytes >= bytes).await
    }

    async fn reached(&self, level: impl FnMut(&Added) -> bool) -> Added {
        let mut state = self.state.clone();
        let reached = state.wait_for(level).await.map(|added| *added);
        match reached {
            Ok(added) => added,
            // The count has ended with the sidecar.
            Err(_) => std::future::pending().await,
        }
    }
}

struct Counter {
    tasks: Tasks,
    spec: Arc<DiskSpec>,
    stop: CancellationToken,
    baseline: Found,
    /// How much was in use at the last count, when that was done, and how long it took.
    counted: (u64, Instant, Duration),
}

impl Counter {
    fn new(tasks: Tasks, spec: DiskSpec, stop: CancellationToken) -> Self {
        let counted = (0, Instant::now(), Duration::ZERO);
        Self { tasks, spec: Arc::new(spec), stop, baseline: Found::default(), counted }
    }

    async fn run(&mut self, sender: &watch::Sender<Added>) {
        loop {
            let added = *sender.borrow();
            self.reason_to_count(added).await;
            let before = self.in_use();
            match self.count().await {
                Ok((found, took)) => {
                    self.counted = (before, Instant::now(), took);
                    let bytes = found.bytes.saturating_sub(self.baseline.bytes);
                    let over = self.spec.limit.is_some_and(|limit| bytes > limit);
                    let uncountable = found.cut && !self.baseline.cut;
                    let exhausted = over || (uncountable && self.spec.limit.is_some());
                    sender.send_if_modified(|added| {
                        let now = Added { bytes, unreadable: found.unreadable, cut: found.cut, exhausted };
                        std::mem::replace(added, now) != now
                    });
                }
                // A root is gone. What is there next time is counted then.
                Err(error) => {
                    tracing::warn!(%error, "what a session adds to the disk could not be counted");
                    self.counted.1 = Instant::now();
                }
            }
        }
    }

    /// Waits until it is time for the next count.
    async fn reason_to_count(&self, added: Added) {
        let (in_use, at, took) = self.counted;
        let (soonest, latest) = (at + took * PAUSE, at + CALM.max(took * CALM_PAUSE));
        let near = self.spec.limit.map_or(u64::MAX, |limit| limit.saturating_sub(added.bytes) / 4).max(LITTLE);
        loop {
            sleep_until((Instant::now() + LOOK).max(soonest).min(latest.max(soonest))).await;
            let grown = self.in_use().saturating_sub(in_use);
            if grown >= near || Instant::now() >= latest {
                return;
            }
        }
    }

    /// Bytes that are in use on the filesystems of the roots, whoever uses them. One of several roots counts several
    /// times, which does no harm: it is only a reason to count.
    fn in_use(&self) -> u64 {
        let used = |stat: StatVfs| stat.f_blocks.saturating_sub(stat.f_bfree).saturating_mul(stat.f_frsize);
        self.spec.roots.iter().filter_map(|root| statvfs(root).ok()).map(used).sum()
    }

    async fn count(&self) -> io::Result<(Found, Duration)> {
        let (spec, stop) = (Arc::clone(&self.spec), Arc::new(AtomicBool::new(false)));
        let flag = Arc::clone(&stop);
        let work = self.tasks.spawn_blocking(move || {
            let began = std::time::Instant::now();
            let mut walk = Walk::new(spec.owner, MAX_ENTRIES, &flag);
            let eyes = spec.user.filter(|_| !passes_over_permissions()).map(Eyes::of);
            walk.trees(&spec.roots)?;
            drop(eyes);
            let _eyes = spec.user.map(Eyes::of);
            if let Some(jail) = spec.process.as_ref().and_then(ProcessHandle::jail) {
                nameless(jail, &spec.roots, &mut walk);
            }
            Ok((walk.found(), began.elapsed()))
        });
        let shutdown = self.tasks.shutdown_token();
        tokio::select! {
            done = work => done.unwrap_or_else(|lost| Err(io::Error::other(lost))),
            () = self.stop.cancelled() => {
                stop.store(true, Ordering::Relaxed);
                Err(io::ErrorKind::Interrupted.into())
            }
            () = shutdown.cancelled() => {
                stop.store(true, Ordering::Relaxed);
                Err(io::ErrorKind::Interrupted.into())
            }
        }
    }
}

/// Whether this process looks into every directory.
fn passes_over_permissions() -> bool {
    let enough = CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
    capabilities(None).is_ok_and(|own| own.effective.intersects(enough))
}

/// This thread looks at files, and at `/proc`, as another user, until this is dropped.
struct Eyes;

impl Eyes {
    fn of(user: User) -> Self {
        // Only the thread, and only for what it does with files. Whoever may not, goes on as before.
        setfsgid(Gid::from_raw(user.gid));
        setfsuid(Uid::from_raw(user.uid));
        Self
    }
}

impl Drop for Eyes {
    fn drop(&mut self) {
        // To its own it may always return.
        setfsuid(geteuid());
        setfsgid(getegid());
    }
}

/// Counts the files on the filesystems of the roots that were removed and are still open in a process below the jail.
fn nameless(jail: i32, roots: &[PathBuf], walk: &mut Walk<'_>) {
    let devices: Vec<u64> = roots.iter().filter_map(|root| Some(rustix::fs::stat(root).ok()?.st_dev)).collect();
    tree::walk(
        |stat| stat.parent == jail,
        |stat| {
            let Ok(entries) = std::fs::read_dir(format!("/proc/{}/fd", stat.pid)) else { return };
            for path in entries.flatten().map(|entry| entry.path()).filter(|path| is_removed(path)) {
                // Looks at the file itself without opening it.
                let Ok(file) = rustix::fs::stat(&path) else { continue };
                let is_file = FileType::from_raw_mode(file.st_mode) == FileType::RegularFile;
                if is_file && file.st_nlink == 0 && devices.contains(&file.st_dev) {
                    walk.nameless(&file);
                }
            }
        },
    );
}

/// Most descriptors are no such file, and this spares a look at each.
fn is_removed(descriptor: &Path) -> bool {
    std::fs::read_link(descriptor).is_ok_and(|target| target.as_os_str().as_bytes().ends_with(b" (deleted)"))
}
