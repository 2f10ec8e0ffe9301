//! The workspace: the one door to paths that come from outside.
//!
//! A path from a caller or an agent is only ever resolved beneath the workspace's directory handle (`cap-std`:
//! openat2 with `RESOLVE_BENEATH` where the kernel has it), never by comparing strings. What is read for others goes through
//! [`files`].
//!
//! What sessions make in it belongs to its group, which a file browser beside the sidecar may have too, as another user:
//! it sees and edits each file at once. Two things do that. Sessions run with umask 0002, which holds everywhere. And the
//! directory has a default ACL, which everything that is made below it inherits, and which counts in the place of a
//! umask: so what the *other* side makes, with whatever umask, can be edited by sessions. An ACL cannot widen a mode that
//! a program asks for by itself (`mktemp`, a private key): that stays as it is.

pub mod files;

use cap_std::ambient_authority;
use cap_std::fs::{Dir, PermissionsExt as _};
use rustix::fs::{XattrFlags, getxattr, setxattr};
use rustix::io::Errno;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// The group reads, writes and enters a directory, and what is made in it is the group's too (setgid).
const SHARED: u32 = 0o2070;
/// The attribute that holds a directory's default ACL.
const DEFAULT_ACL: &str = "system.posix_acl_default";
/// What umask 0002 gives, as the kernel's version 2 of an ACL: entries of tag, permissions and an id that these three
/// have none of. Owner and group `rwx`, others `r-x`.
#[rustfmt::skip]
const GROUP_WRITES: [u8; 28] = [
    2, 0, 0, 0,
    0x01, 0, 7, 0, 0xff, 0xff, 0xff, 0xff,
    0x04, 0, 7, 0, 0xff, 0xff, 0xff, 0xff,
    0x20, 0, 5, 0, 0xff, 0xff, 0xff, 0xff,
];

/// Why a path was not taken.
#[derive(Debug, thiserror::Error)]
pub enum WorkspaceError {
    #[error("the path leads outside of the workspace")]
    Outside,
    #[error("the path is not a directory, or cannot be made one")]
    NotADirectory(#[source] io::Error),
    #[error("the workspace cannot be used")]
    Unusable(#[source] io::Error),
}

/// The directory that all sessions of the pod work in. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Workspace {
    root: PathBuf,
    dir: Arc<Dir>,
    unshared: Option<Arc<str>>,
}

impl Workspace {
    /// Opens it; makes it where it is missing. Opens it to its group, where it is ours to do that: the directory itself
    /// and nothing that is in it already, which may be a large tree.
    ///
    /// # Errors
    /// Where it is no directory that can be opened.
    pub fn open(path: &Path) -> Result<Self, WorkspaceError> {
        std::fs::create_dir_all(path).map_err(WorkspaceError::Unusable)?;
        let root = path.canonicalize().map_err(WorkspaceError::Unusable)?;
        let dir = Dir::open_ambient_dir(&root, ambient_authority()).map_err(WorkspaceError::Unusable)?;
        let unshared = share(&root).err().map(|why| {
            let group = "others of the workspace's group may not see, or not edit, what sessions write";
            Arc::from(format!("{group}: the directory's mode cannot be changed to setgid and rwx for the group: {why}"))
        });
        inherit(&root);
        Ok(Self { root, dir: Arc::new(dir), unshared })
    }

    /// Why what sessions write may be out of reach for others of the workspace's group; `None` where it is not.
    pub fn unshared(&self) -> Option<&str> {
        self.unshared.as_deref()
    }

    /// Its canonical path: the one spelling that is used with OpenCode.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether something can be written in it now.
    ///
    /// # Errors
    /// What stands against it.
    pub fn check_writable(&self) -> Result<(), WorkspaceError> {
        use nix::unistd::{AccessFlags, access};
        access(&self.root, AccessFlags::W_OK | AccessFlags::X_OK)
            .map_err(|errno| WorkspaceError::Unusable(io::Error::from(errno)))
    }

    /// The directory that a task works in: `workdir` beneath the workspace, made where it is missing and then open to
    /// the group, or the workspace itself. Canonical.
    ///
    /// # Errors
    /// Where it would lead outside, by `..`, from the root, or through a symbolic link.
    pub fn workdir(&self, workdir: Option<&str>) -> Result<PathBuf, WorkspaceError> {
        let Some(relative) = workdir.map(Path::new) else { return Ok(self.root.clone()) };
        if !is_plain_relative(relative) {
            return Err(WorkspaceError::Outside);
        }
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::PermissionDenied => WorkspaceError::Outside,
            _ => WorkspaceError::NotADirectory(error),
        };
        let mut made = PathBuf::new();
        for name in relative.components().filter(|component| *component != Component::CurDir) {
            made.push(name);
            match self.dir.create_dir(&made) {
                Ok(()) => {
                    let mode = self.dir.metadata(&made).map_err(failed)?.permissions().mode();
                    let shared = cap_std::fs::Permissions::from_mode(mode & 0o7777 | SHARED);
                    self.dir.set_permissions(&made, shared).map_err(failed)?;
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed(error)),
            }
        }
        let canonical = self.dir.canonicalize(relative).map_err(failed)?;
        self.dir.open_dir(&canonical).map_err(failed)?;
        // One spelling: `.` adds nothing to the root.
        Ok(self.root.join(canonical).components().collect())
    }
}

/// Opens a directory to its group.
fn share(path: &Path) -> io::Result<()> {
    let mode = || Ok::<_, io::Error>(std::fs::metadata(path)?.permissions().mode() & 0o7777);
    let before = mode()?;
    if before & SHARED != SHARED {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(before | SHARED))?;
        // The kernel leaves the setgid bit out for whoever is not in the group, and says nothing.
        if mode()? & SHARED != SHARED {
            return Err(io::Error::other("it is the directory of a group that this process is not in"));
        }
    }
    Ok(())
}

/// Gives a directory the default ACL, unless it has one. Without it the umask has to do, so it is no fault where there
/// are no ACLs.
fn inherit(path: &Path) {
    let set = match getxattr(path, DEFAULT_ACL, &mut [0; 0]) {
        Ok(_) => return,
        Err(Errno::NODATA) => setxattr(path, DEFAULT_ACL, &GROUP_WRITES, XattrFlags::CREATE),
        Err(errno) => Err(errno),
    };
    if let Err(errno) = set {
        tracing::info!(error = %io::Error::from(errno), "the workspace has no default ACL: what others make in it has the permissions that their umask leaves");
    }
}

/// Whether a path is relative and consists of names only. (What links on its way do is seen when it is resolved.)
pub fn is_plain_relative(path: &Path) -> bool {
    !path.as_os_str().is_empty() && path.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn it_is_open_to_its_group_and_so_are_the_directories_that_are_made() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("ws");
        std::fs::create_dir_all(root.join("old")).unwrap();
        for closed in [&root.join("old"), &root] {
            std::fs::set_permissions(closed, std::fs::Permissions::from_mode(0o700)).unwrap();
        }
        for _ in 0..2 {
            let workspace = Workspace::open(&root).unwrap();
            assert_eq!((workspace.unshared(), mode(&root)), (None, 0o2770));
            workspace.workdir(Some("./old/new/er")).unwrap();
        }
        assert_eq!(mode(&root.join("old")), 0o700, "what was there stays as it was");
        assert_eq!(mode(&root.join("old/new")) & SHARED, SHARED);
        assert_eq!(mode(&root.join("old/new/er")) & SHARED, SHARED);
    }

    #[test]
    fn what_cannot_be_opened_to_the_group_is_said() {
        // A directory whose mode not even root may change.
        let workspace = Workspace::open(Path::new("/proc/self/task")).unwrap();
        assert!(workspace.unshared().unwrap().contains("others of the workspace's group"));
    }

    #[test]
    fn a_workdir_stays_beneath_the_workspace() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("ws");
        let workspace = Workspace::open(&root).unwrap();
        let canonical = root.canonicalize().unwrap();
        assert_eq!(workspace.workdir(None).unwrap(), canonical);
        assert_eq!(workspace.workdir(Some(".")).unwrap().as_os_str(), canonical.as_os_str());
        assert_eq!(workspace.workdir(Some("a/b")).unwrap(), canonical.join("a/b"));
        assert!(canonical.join("a/b").is_dir());
        std::os::unix::fs::symlink("a", canonical.join("inside")).unwrap();
        assert_eq!(workspace.workdir(Some("inside/b")).unwrap(), canonical.join("a/b"));

        std::os::unix::fs::symlink("/etc", canonical.join("out")).unwrap();
        std::os::unix::fs::symlink("..", canonical.join("up")).unwrap();
        for bad in ["../x", "/etc", "a/../../x", "out", "out/x", "up", "up/x", ""] {
            assert!(workspace.workdir(Some(bad)).is_err(), "{bad}");
        }
        assert!(!dir.path().join("x").exists());
        std::fs::write(canonical.join("file"), "").unwrap();
        assert!(matches!(workspace.workdir(Some("file")), Err(WorkspaceError::NotADirectory(_))));
    }
}
