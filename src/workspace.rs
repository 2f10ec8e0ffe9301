//! The workspace: the one door to paths that come from outside.
//!
//! A path from a caller or an agent is only ever resolved beneath the workspace's directory handle (`cap-std`:
//! openat2 with `RESOLVE_BENEATH` where the kernel has it), never by comparing strings.

use cap_std::ambient_authority;
use cap_std::fs::Dir;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Why a path was not taken.
#[derive(Debug, thiserror::Error)]
pub enum WorkspaceError {
    #[error("the path leads outside of the workspace")]
    Outside,
    #[error("the path is not a directory, or cannot be made one")]
    NotADirectory(#[source] std::io::Error),
    #[error("the workspace cannot be used")]
    Unusable(#[source] std::io::Error),
}

/// The directory that all sessions of the pod work in. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Workspace {
    root: PathBuf,
    dir: Arc<Dir>,
}

impl Workspace {
    /// Opens it; makes it where it is missing.
    ///
    /// # Errors
    /// Where it is no directory that can be opened.
    pub fn open(path: &Path) -> Result<Self, WorkspaceError> {
        std::fs::create_dir_all(path).map_err(WorkspaceError::Unusable)?;
        let root = path.canonicalize().map_err(WorkspaceError::Unusable)?;
        let dir = Dir::open_ambient_dir(&root, ambient_authority()).map_err(WorkspaceError::Unusable)?;
        Ok(Self { root, dir: Arc::new(dir) })
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
            .map_err(|errno| WorkspaceError::Unusable(std::io::Error::from(errno)))
    }

    /// The directory that a task works in: `workdir` beneath the workspace, made where it is missing, or the
    /// workspace itself. Canonical.
    ///
    /// # Errors
    /// Where it would lead outside, by `..`, from the root, or through a symbolic link.
    pub fn workdir(&self, workdir: Option<&str>) -> Result<PathBuf, WorkspaceError> {
        let Some(relative) = workdir.map(Path::new) else { return Ok(self.root.clone()) };
        if !is_plain_relative(relative) {
            return Err(WorkspaceError::Outside);
        }
        let failed = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::PermissionDenied => WorkspaceError::Outside,
            _ => WorkspaceError::NotADirectory(error),
        };
        self.dir.create_dir_all(relative).map_err(failed)?;
        let canonical = self.dir.canonicalize(relative).map_err(failed)?;
        self.dir.open_dir(&canonical).map_err(failed)?;
        // One spelling: `.` adds nothing to the root.
        Ok(self.root.join(canonical).components().collect())
    }
}

/// Whether a path is relative and consists of names only. (What links on its way do is seen when it is resolved.)
pub fn is_plain_relative(path: &Path) -> bool {
    !path.as_os_str().is_empty() && path.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir))
}

#[cfg(test)]
mod tests {
    use super::*;

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
