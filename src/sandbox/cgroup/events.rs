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

#[cfg(test)]
mod tests {
    use super::super::{claim, files};
    use super::*;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    #[tokio::test]
    #[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
    #[expect(clippy::disallowed_methods, reason = "a process that no jail knows")]
    async fn the_end_of_the_last_process_is_told() {
        let claim = claim(&uuid::Uuid::new_v4().to_string()).0.unwrap();
        let group = claim.next("test");
        group.make().unwrap();
        let directory = group.unified.as_deref().unwrap();
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        files::write(directory, "cgroup.procs", &child.id().to_string()).unwrap();
        let notice = Notice::open(directory, "cgroup.events").unwrap();
        notice.changed().await.unwrap();
        let told = tokio::time::timeout(Duration::from_secs(20), async {
            while group.is_populated() {
                notice.changed().await.unwrap();
            }
        });
        assert!(group.is_populated());
        child.kill().unwrap();
        // Nobody looks now and then here: without the kernel's word this does not end.
        told.await.unwrap();
        child.wait().unwrap();
        group.remove().unwrap();
    }
}
