//! A session's own directory on disk: given to the session's user, and removed when nothing of the session runs.
//!
//! The sidecar may be root without the right to pass over permissions (CAP_DAC_OVERRIDE, CAP_FOWNER): what it gives away
//! it cannot even look into. It may change owners, though, so it takes back what it removes, directory by directory.

use crate::sandbox::User;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, chmodat, chownat, openat, renameat, statat, unlinkat};
use rustix::io::Errno;
use rustix::process::{Gid, Uid, getegid, geteuid};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::lchown;
use std::path::Path;

/// Gives a directory and all that is in it, which nobody else has touched yet.
pub(super) fn give(directory: &Path, user: User) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.symlink_metadata()?.is_dir() {
            give(&path, user)?;
        } else {
            lchown(&path, Some(user.uid), Some(user.gid))?;
        }
    }
    // Last: then it is out of reach.
    lchown(directory, Some(user.uid), Some(user.gid))
}

/// Removes a directory with all that is in it, whoever it belongs to and whatever its permissions are. Nothing may run
/// any more that could write there. It is no error where there is none.
pub(super) fn remove(directory: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (directory.parent(), directory.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let parent = rustix::fs::open(parent, flags(), Mode::empty())?;
    let name = CString::new(name.as_encoded_bytes())?;
    let top = match take(&parent, &name) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    // Directories within directories are brought up to the top one, so that two are open at a time however deep it goes.
    let mut brought = 0_u64;
    let mut left = empty(&top)?;
    while let Some(name) = left.pop() {
        let directory = take(&top, &name)?;
        for deeper in empty(&directory)? {
            let free = loop {
                brought += 1;
                let free = CString::new(format!("removed-{brought}"))?;
                match statat(&top, &free, AtFlags::SYMLINK_NOFOLLOW) {
                    Err(Errno::NOENT) => break free,
                    Err(errno) => return Err(errno.into()),
                    Ok(_) => {}
                }
            };
            // Moving a directory writes the name of its parent in it.
            own(&directory, &deeper)?;
            renameat(&directory, &deeper, &top, &free)?;
            left.push(free);
        }
        unlinkat(&top, &name, AtFlags::REMOVEDIR)?;
    }
    Ok(unlinkat(&parent, &name, AtFlags::REMOVEDIR)?)
}

/// Removes what is in a directory but for directories, whose names it gives.
fn empty(directory: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut directories = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => directories.push(name.to_owned()),
            _ => unlinkat(directory, name, AtFlags::empty())?,
        }
    }
    Ok(directories)
}

/// Makes a directory this process's own, and opens it.
fn take(parent: &impl AsFd, name: &CString) -> Result<OwnedFd, Errno> {
    own(parent, name)?;
    openat(parent, name, flags(), Mode::empty())
}

fn own(parent: &impl AsFd, name: &CString) -> Result<(), Errno> {
    let stat = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(Errno::NOTDIR);
    }
    if Uid::from_raw(stat.st_uid) != geteuid() {
        chownat(parent, name, Some(geteuid()), Some(Gid::from_raw(getegid().as_raw())), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    // It is a directory, and nobody is left who could make it something else.
    if stat.st_mode & 0o700 != 0o700 {
        chmodat(parent, name, Mode::RWXU, AtFlags::empty())?;
    }
    Ok(())
}

fn flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::PathBuf;

    /// A tree with all that could stand in the way; gives it, and a file outside to which a link of it leads.
    fn tree(around: &Path) -> (PathBuf, PathBuf) {
        let (root, outside) = (around.join("session"), around.join("outside"));
        fs::create_dir_all(root.join("closed/within/deeper")).unwrap();
        fs::create_dir_all(root.join("removed-1/removed-2")).unwrap();
        for file in [&outside, &root.join("file"), &root.join("closed/within/deeper/file"), &root.join("removed-3")] {
            fs::write(file, "x").unwrap();
        }
        symlink("../outside", root.join("link")).unwrap();
        symlink("..", root.join("up")).unwrap();
        (root, outside)
    }

    #[test]
    fn a_directory_is_removed_whatever_its_permissions_are_and_nothing_else_is() {
        let around = tempfile::tempdir().unwrap();
        let (root, outside) = tree(around.path());
        for (name, mode) in [("closed/within/deeper", 0o500), ("closed/within", 0o000), ("closed", 0o000)] {
            fs::set_permissions(root.join(name), PermissionsExt::from_mode(mode)).unwrap();
        }
        remove(&root).unwrap();
        assert!(!root.exists());
        assert_eq!(fs::read_to_string(&outside).unwrap(), "x");
        remove(&root).unwrap();
        symlink("outside", &root).unwrap();
        assert!(remove(&root).is_err() && outside.exists(), "a link is not followed");
    }

    #[test]
    fn depth_is_no_matter() {
        let around = tempfile::tempdir().unwrap();
        let root = around.path().join("deep");
        fs::create_dir(&root).unwrap();
        let mut here = rustix::fs::open(&root, flags(), Mode::empty()).unwrap();
        // Far longer than a path may be, and than there may be open files.
        for _ in 0..2000 {
            rustix::fs::mkdirat(&here, c"deeper", Mode::RWXU).unwrap();
            here = openat(&here, c"deeper", flags(), Mode::empty()).unwrap();
        }
        drop(here);
        remove(&root).unwrap();
        assert!(!root.exists());
    }

    #[test]
    #[cfg_attr(not(as_root), ignore = "gives files away, which takes root")]
    fn what_was_given_is_the_users_and_the_links_target_is_not() {
        let around = tempfile::tempdir().unwrap();
        let (root, outside) = tree(around.path());
        give(&root, User { uid: 61_001, gid: 61_002 }).unwrap();
        for name in ["", "file", "link", "closed/within/deeper/file"] {
            let metadata = root.join(name).symlink_metadata().unwrap();
            assert_eq!((metadata.uid(), metadata.gid()), (61_001, 61_002), "{name}");
        }
        assert_eq!(fs::metadata(outside).unwrap().uid(), 0);
        remove(&root).unwrap();
        assert!(!root.exists());
    }
}
