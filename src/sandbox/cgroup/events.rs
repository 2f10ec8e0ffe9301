//! Waiting for what the kernel tells about a group: a file of its own is marked as changed (POLLPRI).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A file of version 2 that tells when it changes, such as `cgroup.events`.
#[derive(Debug)]
pub(super) struct Notice(AsyncFd<File>);

impl Notice {
    /// # Errors
    /// The file is not there, or does not tell.
    #[expect(unsafe_code, reason = "there is no safe way to wait for a descriptor of another kind")]
    pub(super) fn open(directory: &Path, file: &str) -> io::Result<Self> {
        let file = File::open(directory.join(file))?;
        // SAFETY: a file has one descriptor, the same all its life, and closes it only when it is dropped, which is
        // after it is deregistered.
        let notice = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) };
        Ok(Self(notice?))
    }

    /// Waits for a change since the last call. Returns at once the first time, and now and then for nothing: look at
    /// the level itself after it. Dropping the wait loses nothing.
    pub(super) async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        // The kernel counts a change as seen when it is read through this very descriptor. Read after clearing, a
        // change in between is told again.
        match self.0.get_ref().read_at(&mut [0; 1024], 0) {
            Err(error) if error.raw_os_error() != Some(nix::libc::ENODEV) => Err(error),
            _ => Ok(()),
        }
    }
}
