//! What the files beneath some directories take of their filesystems: allocated blocks, each file once.
//!
//! Whoever writes there may be hostile and may write meanwhile. So nothing is opened but directories, no link is
//! followed, one descriptor is open at a time however deep it goes, and a directory that is moved away under the walk
//! only ends that branch. Names are kept for the directories on the way down only.

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, openat, statat};
use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

/// A block, as `stat` counts them, whatever the filesystem's own are.
const BLOCK: u64 = 512;
/// More entries than this are not counted one by one.
pub(in crate::sandbox) const MAX_ENTRIES: u64 = 2_000_000;

/// What a walk has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::sandbox) struct Found {
    /// Allocated bytes.
    pub(super) bytes: u64,
    /// Files and directories.
    pub(super) entries: u64,
    /// Directories that could not be looked into.
    pub(super) unreadable: u64,
    /// Whether there was more than a walk looks at.
    pub(in crate::sandbox) cut: bool,
}

/// Tells a file from all others.
type Id = (u64, u64);

fn id(stat: &Stat) -> Id {
    (stat.st_dev, stat.st_ino)
}

/// A directory on the way down, and which of its own are still to be entered.
struct Level {
    id: Id,
    name: CString,
    left: Vec<CString>,
}

/// Is shown what is found: the directory that it is in, its name, and what it was when it was looked at. Called before
/// a directory is entered.
type Visit<'a> = &'a mut dyn FnMut(&OwnedFd, &CStr, &Stat);

/// Counts.
pub(in crate::sandbox) struct Walk<'a> {
    /// Only what this user owns, if there is one.
    owner: Option<u32>,
    stop: &'a AtomicBool,
    max_entries: u64,
    /// Whether each of the roots has been counted: one may lie within another.
    roots: HashMap<Id, bool>,
    /// Files with more than one name, of which each counts once.
    seen: HashSet<Id>,
    visit: Option<Visit<'a>>,
    found: Found,
}

impl<'a> Walk<'a> {
    /// Ends early when `stop` is set.
    pub(in crate::sandbox) fn new(owner: Option<u32>, max_entries: u64, stop: &'a AtomicBool) -> Self {
        let (roots, seen) = (HashMap::new(), HashSet::new());
        Self { owner, stop, max_entries, roots, seen, visit: None, found: Found::default() }
    }

    /// Shows it all to somebody who may change it.
    pub(in crate::sandbox) fn visiting(mut self, visit: Visit<'a>) -> Self {
        self.visit = Some(visit);
        self
    }

    pub(in crate::sandbox) fn found(&self) -> Found {
        self.found
    }

    /// Counts directories and all beneath them.
    ///
    /// # Errors
    /// One of these directories cannot be opened.
    pub(in crate::sandbox) fn trees(&mut self, roots: &[PathBuf]) -> io::Result<()> {
        let mut opened = Vec::new();
        for path in roots {
            let named = |error: rustix::io::Errno| {
                let error = io::Error::from(error);
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            };
            let root = rustix::fs::open(path, flags(), Mode::empty()).map_err(named)?;
            let stat = fstat(&root).map_err(named)?;
            self.roots.insert(id(&stat), false);
            opened.push((root, stat));
        }
        for (root, stat) in opened {
            if self.is_due(id(&stat)) {
                self.count(&stat);
                self.tree(&root, id(&stat))?;
            }
        }
        Ok(())
    }

    /// Whether a directory is still to be counted; it is, then.
    fn is_due(&mut self, directory: Id) -> bool {
        self.roots.get_mut(&directory).is_none_or(|counted| !std::mem::replace(counted, true))
    }

    fn tree(&mut self, root: &OwnedFd, root_id: Id) -> io::Result<()> {
        let mut here = root.try_clone()?;
        let mut level = Level { id: root_id, name: CString::default(), left: self.entries(&here) };
        let mut above: Vec<Level> = Vec::new();
        loop {
            if self.found.cut || self.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            if let Some(name) = level.left.pop() {
                if let Some((child, child_id)) = self.enter(&here, &name) {
                    let left = self.entries(&child);
                    above.push(std::mem::replace(&mut level, Level { id: child_id, name, left }));
                    here = child;
                }
            } else if let Some(parent) = above.pop() {
                match openat(&here, c"..", flags(), Mode::empty()).ok().filter(|fd| is(fd, parent.id)) {
                    Some(fd) => (here, level) = (fd, parent),
                    // It was moved. Whatever of the way down is still as it was is gone on with.
                    None => {
                        above.push(parent);
                        match descend(root, &mut above) {
                            Some((fd, last)) => (here, level) = (fd, last),
                            None => return Ok(()),
                        }
                    }
                }
            } else {
                return Ok(());
            }
        }
    }

    /// Counts a file that has no name any more, which somebody has open.
    pub(super) fn nameless(&mut self, stat: &Stat) {
        if self.seen.insert(id(stat)) {
            self.count(stat);
        }
    }

    /// Opens a directory. One that was put in the place of another meanwhile is as good.
    fn enter(&mut self, here: &OwnedFd, name: &CString) -> Option<(OwnedFd, Id)> {
        match openat(here, name.as_c_str(), flags(), Mode::empty()) {
            Ok(child) => {
                let id = id(&fstat(&child).ok()?);
                Some((child, id))
            }
            Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => {
                self.found.unreadable += 1;
                None
            }
            // It is gone, or something else by now.
            Err(_) => None,
        }
    }

    /// Counts what is in a directory, and gives the names of the directories in it.
    fn entries(&mut self, directory: &OwnedFd) -> Vec<CString> {
        let mut directories = Vec::new();
        let Ok(entries) = Dir::read_from(directory) else {
            self.found.unreadable += 1;
            return directories;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            if self.found.entries >= self.max_entries {
                self.found.cut = true;
                return directories;
            }
            let Ok(stat) = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if is_directory {
                if !self.is_due(id(&stat)) {
                    continue;
                }
                directories.push(name.to_owned());
            } else if stat.st_nlink > 1 && !self.seen.insert(id(&stat)) {
                continue;
            }
            if let Some(visit) = &mut self.visit {
                visit(directory, name, &stat);
            }
            self.count(&stat);
        }
        directories
    }

    fn count(&mut self, stat: &Stat) {
        self.found.entries += 1;
        if self.owner.is_none_or(|owner| owner == stat.st_uid) {
            let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
            self.found.bytes = self.found.bytes.saturating_add(blocks.saturating_mul(BLOCK));
        }
    }
}

fn flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

fn is(fd: &impl AsFd, wanted: Id) -> bool {
    fstat(fd).is_ok_and(|stat| id(&stat) == wanted)
}

/// Goes down from the root again, as far as everything is where it was; what lies deeper is given up.
fn descend(root: &OwnedFd, above: &mut Vec<Level>) -> Option<(OwnedFd, Level)> {
    let mut here = root.try_clone().ok()?;
    let mut depth = 1;
    for level in above.iter().skip(1) {
        match openat(&here, level.name.as_c_str(), flags(), Mode::empty()).ok().filter(|fd| is(fd, level.id)) {
            Some(fd) => here = fd,
            None => break,
        }
        depth += 1;
    }
    above.truncate(depth);
    Some((here, above.pop()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{FileExt, MetadataExt, symlink};

    const MIB: u64 = 1024 * 1024;

    fn walk(roots: &[&std::path::Path]) -> Found {
        let stop = AtomicBool::new(false);
        let mut walk = Walk::new(None, MAX_ENTRIES, &stop);
        walk.trees(&roots.iter().map(|root| root.to_path_buf()).collect::<Vec<_>>()).unwrap();
        walk.found()
    }

    fn megabyte(path: &std::path::Path) {
        fs::write(path, vec![1; 1024 * 1024]).unwrap();
    }

    #[test]
    fn blocks_count_and_holes_and_names_do_not() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let empty = walk(&[root]).bytes;
        fs::create_dir_all(root.join("a/b")).unwrap();
        megabyte(&root.join("a/b/file"));
        fs::hard_link(root.join("a/b/file"), root.join("a/again")).unwrap();
        let sparse = fs::File::create(root.join("sparse")).unwrap();
        sparse.set_len(1024 * MIB).unwrap();
        sparse.write_at(b"x", 512 * MIB).unwrap();
        symlink("/usr", root.join("link")).unwrap();
        let found = walk(&[root]);
        assert!((MIB..MIB + MIB / 4).contains(&(found.bytes - empty)), "{found:?}");
        assert_eq!((found.entries, found.unreadable, found.cut), (6, 0, false));
        // A root within another one is not counted twice.
        assert_eq!(walk(&[root, &root.join("a")]), found);
        assert_eq!(walk(&[&root.join("a"), root]), found);
    }

    #[test]
    fn depth_costs_no_descriptors_and_has_no_end() {
        let directory = tempfile::tempdir().unwrap();
        let mut here = rustix::fs::open(directory.path(), flags(), Mode::empty()).unwrap();
        // Far longer than a path may be.
        for _ in 0..1200 {
            rustix::fs::mkdirat(&here, c"deeper", Mode::RWXU).unwrap();
            here = openat(&here, c"deeper", flags(), Mode::empty()).unwrap();
        }
        let file = openat(&here, c"file", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
        rustix::io::write(&file, &vec![1; 1024 * 1024]).unwrap();
        let found = walk(&[directory.path()]);
        assert!(found.bytes >= MIB && found.entries == 1202, "{found:?}");
    }

    #[test]
    fn a_branch_that_is_moved_is_given_up_and_the_rest_is_counted() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::create_dir_all(root.join("a/b/c")).unwrap();
        let id_of = |path: &str| fs::metadata(root.join(path)).map(|meta| (meta.dev(), meta.ino())).unwrap();
        let level = |path: &str, name: &str| Level { id: id_of(path), name: CString::new(name).unwrap(), left: vec![] };
        let levels = || vec![level("", ""), level("a", "a"), level("a/b", "b")];
        let opened = rustix::fs::open(root, flags(), Mode::empty()).unwrap();
        let mut above = levels();
        let (here, last) = descend(&opened, &mut above).unwrap();
        assert!(is(&here, id_of("a/b")) && last.id == id_of("a/b") && above.len() == 2);
        let mut above = levels();
        fs::rename(root.join("a/b"), root.join("elsewhere")).unwrap();
        let (here, last) = descend(&opened, &mut above).unwrap();
        assert!(is(&here, id_of("a")) && last.id == id_of("a") && above.len() == 1);
    }

    #[test]
    fn too_many_entries_are_said_to_be_too_many() {
        let directory = tempfile::tempdir().unwrap();
        for number in 0..20 {
            fs::write(directory.path().join(number.to_string()), "").unwrap();
        }
        let stop = AtomicBool::new(false);
        let mut walk = Walk::new(None, 10, &stop);
        walk.trees(&[directory.path().to_path_buf()]).unwrap();
        assert!(walk.found().cut);
        let mut nobodys = Walk::new(Some(4_000_000_000), 100, &stop);
        nobodys.trees(&[directory.path().to_path_buf()]).unwrap();
        assert_eq!((nobodys.found().bytes, nobodys.found().entries), (0, 21));
    }
}
