//! Whether anything of an earlier life of the sidecar is still at work: each jail holds a lock on one file for as long as it
//! lives, and it lives until nothing is left below it. So whoever gets the whole lock knows that there is none.

use nix::sys::socket::{MsgFlags, recv};
use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(5);

fn open(path: &Path) -> io::Result<File> {
    File::options().create(true).read(true).write(true).truncate(false).mode(0o600).open(path)
}

/// Says for a jail that it is at work, until what this returns is dropped.
///
/// # Errors
/// Another life of the sidecar has begun, or the one that this belongs to has ended: nothing may be started any more.
pub(super) fn join(path: &Path, sidecar: BorrowedFd<'_>) -> io::Result<File> {
    let file = open(path)?;
    file.try_lock_shared()?;
    // Only now: had the sidecar ended before, the next one may have looked before the lock was there.
    match recv(sidecar.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(0) => Err(io::Error::other("the sidecar has ended")),
        _ => Ok(file),
    }
}

/// Waits until no jail of an earlier life is left; `false` where one still is after `limit`. Blocks.
///
/// # Errors
/// The file cannot be used.
pub fn wait_for_earlier_jails(path: &Path, limit: Duration) -> io::Result<bool> {
    let (file, begun) = (open(path)?, Instant::now());
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::WouldBlock) if begun.elapsed() < limit => std::thread::sleep(LOOK),
            Err(TryLockError::WouldBlock) => return Ok(false),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn who_waits_meets_all_that_is_left_and_nothing_begins_after_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("jails");
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (one, two) = (join(&path, theirs.as_fd()).unwrap(), join(&path, theirs.as_fd()).unwrap());
        assert!(!wait_for_earlier_jails(&path, Duration::ZERO).unwrap());
        drop(one);
        assert!(!wait_for_earlier_jails(&path, Duration::ZERO).unwrap());
        drop(two);
        assert!(wait_for_earlier_jails(&path, Duration::ZERO).unwrap());
        drop(ours);
        assert!(join(&path, theirs.as_fd()).is_err(), "its sidecar is gone");
        assert!(wait_for_earlier_jails(&path, Duration::ZERO).unwrap());
    }
}
