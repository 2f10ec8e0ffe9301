//! Files that are read for others: what is beneath a directory of the workspace, and nothing else.
//!
//! Everything here is in hostile hands while it is read: a session may put a link, a FIFO or another directory in the
//! place of any file at any time. So nothing is looked at by its name twice. One `openat2` beneath the directory that the
//! workspace is held open by (`RESOLVE_BENEATH`, no link on the way, `O_PATH`) gives a handle that is good for nothing but
//! to ask what it is; only a regular file or a directory is then opened through that same handle. So a FIFO or a device is
//! never opened, a link never followed, and what was asked about is what is read. `rustix` and not `cap-std`, which
//! follows links that stay within, and opens what it finds, of whatever kind. A kernel without `openat2` (before 5.6) reads
//! nothing.
//!
//! A hard link is the file itself, and cannot be told from it: that none leads out is for the sandbox to see to, which lets
//! no session link to what is not its own. A file system that the operator has mounted within the workspace is a part of
//! it. Nothing here may wait for long, but a disk that hangs: call it where that holds up nobody.

use super::Workspace;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RawDir, ResolveFlags, Stat, fstat, open, openat, openat2, readlinkat, statat,
};
use rustix::io::{Errno, pread, retry_on_intr};
use sha2::{Digest, Sha256};
use std::collections::BinaryHeap;
use std::io;
use std::mem::MaybeUninit;

/// The longest path, in bytes.
pub const LONGEST_PATH: usize = 4096;
/// The longest name in a path, in bytes.
const LONGEST_NAME: usize = 255;
/// What of a file tells whether it is text, in bytes.
const LOOK: usize = 8192;
/// How many names are read between two looks whether anybody still waits for them.
const NAMES: u32 = 1024;

/// Why nothing is read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It is no path of this form.
    #[error("the path {0}")]
    Path(&'static str),
    /// The directory that paths are relative to is not there.
    #[error("the working directory is gone")]
    NoTree,
    /// Nothing has this name.
    #[error("there is nothing at the path")]
    NotFound,
    /// It is a symbolic link, or leads through one.
    #[error("the path leads through a symbolic link")]
    Link,
    /// A directory was asked for, and it is something else.
    #[error("the path is no directory")]
    NotADirectory,
    /// A file was asked for, and it is a directory.
    #[error("the path is a directory")]
    Directory,
    /// It is a FIFO, a socket or a device.
    #[error("the path is neither a file nor a directory")]
    Special,
    /// Its permissions keep this process out.
    #[error("the file may not be read")]
    Denied,
    /// Somebody holds it (a lease), and would have to be waited for.
    #[error("the file is held by a process")]
    Held,
    /// Nobody waits for the answer any more.
    #[error("given up")]
    GivenUp,
    /// Something else.
    #[error("the file cannot be read")]
    Failed(#[source] io::Error),
}

impl From<Errno> for FileError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT => Self::NotFound,
            Errno::LOOP | Errno::XDEV => Self::Link,
            Errno::NOTDIR => Self::NotADirectory,
            Errno::NAMETOOLONG => Self::Path("has a name that is too long"),
            Errno::ACCESS | Errno::PERM => Self::Denied,
            Errno::AGAIN => Self::Held,
            other => Self::Failed(other.into()),
        }
    }
}

/// A relative path, byte for byte: names need not be UTF-8. It has no `..` and no NUL; the empty one is the directory
/// itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilePath(Vec<u8>);

impl FilePath {
    /// Takes a path: at most 4096 bytes, and 255 for each name.
    ///
    /// # Errors
    /// [`FileError::Path`], which says what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, FileError> {
        let wrong = |why| Err(FileError::Path(why));
        if bytes.len() > LONGEST_PATH {
            return wrong("may have at most 4096 bytes");
        }
        if bytes.contains(&0) {
            return wrong("may not contain NUL");
        }
        if bytes.starts_with(b"/") {
            return wrong("must be relative");
        }
        let mut plain = Vec::with_capacity(bytes.len());
        for name in bytes.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".") {
            if name == b".." {
                return wrong("may not contain `..`");
            }
            if name.len() > LONGEST_NAME {
                return wrong("has a name that is too long");
            }
            if !plain.is_empty() {
                plain.push(b'/');
            }
            plain.extend_from_slice(name);
        }
        // What ends like that is asked for as a directory.
        if !plain.is_empty() && (bytes.ends_with(b"/") || bytes.ends_with(b"/.")) {
            plain.push(b'/');
        }
        Ok(Self(plain))
    }

    /// Its bytes, without `.` and doubled slashes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The path of something in this directory.
    pub fn join(&self, name: &[u8]) -> Vec<u8> {
        let directory = self.0.strip_suffix(b"/").unwrap_or(&self.0);
        match directory {
            [] => name.to_vec(),
            _ => [directory, name].join(&b'/'),
        }
    }

    /// The last name in it; the directory itself has none.
    pub fn name(&self) -> &[u8] {
        let path = self.0.strip_suffix(b"/").unwrap_or(&self.0);
        path.rsplit(|&byte| byte == b'/').next().unwrap_or_default()
    }
}

/// What something in a directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link, which is never followed.
    Symlink,
    /// A FIFO, a socket, a device.
    Special,
}

impl Kind {
    fn of(stat: &Stat) -> Self {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Self::File,
            FileType::Directory => Self::Directory,
            FileType::Symlink => Self::Symlink,
            _ => Self::Special,
        }
    }
}

/// Something in a directory, as it was when it was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name, byte for byte.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// The size of a file in bytes; `None` for what is none.
    pub size: Option<u64>,
    /// When it was changed: seconds since 1970 and nanoseconds.
    pub modified: (i64, u32),
    /// Whether somebody may execute it; a file's.
    pub executable: bool,
    /// The text of a symbolic link, wherever it leads; not looked at.
    pub target: Option<Vec<u8>>,
}

/// A page of a directory, in the order of the names' bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// What it has.
    pub entries: Vec<Entry>,
    /// The name after which the next page begins; `None` on the last one.
    pub next: Option<Vec<u8>>,
}

/// A directory of the workspace, held open.
#[derive(Debug)]
pub struct Tree(OwnedFd);

impl Workspace {
    /// The directory that a task works in, to read what is in it: `workdir` beneath the workspace, or the workspace
    /// itself. Like for the task itself, a link on the way there may lead to another place in the workspace.
    ///
    /// # Errors
    /// [`FileError::NoTree`] where it is not there, or leads outside by now.
    pub fn tree(&self, workdir: Option<&str>) -> Result<Tree, FileError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let workdir = workdir.unwrap_or(".");
        match retry_on_intr(|| openat2(self.dir.as_fd(), workdir, flags, Mode::empty(), resolve)) {
            Ok(dir) => Ok(Tree(dir)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => Err(FileError::NoTree),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Tree {
    /// A handle on what is at a path, and what it is. It can be asked about and no more.
    fn find(&self, path: &FilePath) -> Result<(OwnedFd, Stat), FileError> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let path = if path.0.is_empty() { b"." } else { path.as_bytes() };
        let handle = retry_on_intr(|| openat2(&self.0, path, flags, Mode::empty(), resolve))?;
        let stat = fstat(&handle)?;
        Ok((handle, stat))
    }

    /// A page of a directory: what comes after the name `after`, at most `limit` of it. Each page reads all names of the
    /// directory, and holds no more than a page of them.
    ///
    /// Asks `wanted` from time to time, and gives up where it says no.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn list(
        &self,
        path: &FilePath,
        after: Option<&[u8]>,
        limit: usize,
        wanted: &dyn Fn() -> bool,
    ) -> Result<Listing, FileError> {
        let (handle, stat) = self.find(path)?;
        match Kind::of(&stat) {
            Kind::Directory => {}
            Kind::Symlink => return Err(FileError::Link),
            Kind::File | Kind::Special => return Err(FileError::NotADirectory),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = retry_on_intr(|| openat(&handle, c".", flags, Mode::empty()))?;
        let mut names = smallest(directory.as_fd(), after, limit.saturating_add(1), wanted)?;
        let more = names.len() > limit;
        names.truncate(limit);
        let next = names.last().filter(|_| more).cloned();
        let mut entries = Vec::with_capacity(names.len());
        for name in names {
            // What is gone meanwhile is left out.
            match entry(directory.as_fd(), name) {
                Err(FileError::NotFound) => {}
                entry => entries.push(entry?),
            }
        }
        Ok(Listing { entries, next })
    }

    /// Opens a regular file.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn open(&self, path: &FilePath) -> Result<OpenFile, FileError> {
        let (handle, stat) = self.find(path)?;
        match Kind::of(&stat) {
            Kind::File => {}
            Kind::Directory => return Err(FileError::Directory),
            Kind::Symlink => return Err(FileError::Link),
            Kind::Special => return Err(FileError::Special),
        }
        // The link of a handle of our own leads to just the file that it was opened for, whatever has its name by now.
        // O_NONBLOCK: nobody who holds a lease on it is waited for.
        let itself = format!("/proc/self/fd/{}", handle.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = match retry_on_intr(|| open(&*itself, flags, Mode::empty())) {
            Ok(file) => file,
            // There is no /proc; the file is there.
            Err(Errno::NOENT) => return Err(FileError::Failed(io::Error::other("/proc is not mounted"))),
            Err(errno) => return Err(errno.into()),
        };
        let stat = fstat(&file)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let mut file = OpenFile { file, size, is_text: false, version: version(&stat) };
        let beginning = file.read_at(0, LOOK)?;
        file.is_text = is_text(&beginning, beginning.len() as u64 >= size);
        Ok(file)
    }
}

/// The first `count` names of a directory that come after `after`, in order.
fn smallest(
    directory: BorrowedFd<'_>,
    after: Option<&[u8]>,
    count: usize,
    wanted: &dyn Fn() -> bool,
) -> Result<Vec<Vec<u8>>, FileError> {
    let mut found: BinaryHeap<Vec<u8>> = BinaryHeap::new();
    let mut buffer = vec![MaybeUninit::uninit(); 32 * 1024];
    let mut names = RawDir::new(directory, &mut buffer);
    let mut until_look = NAMES;
    while let Some(name) = names.next() {
        until_look -= 1;
        if until_look == 0 {
            until_look = NAMES;
            if !wanted() {
                return Err(FileError::GivenUp);
            }
        }
        let name = name?;
        let name = name.file_name().to_bytes();
        let is_wanted = !matches!(name, b"." | b"..")
            && after.is_none_or(|after| name > after)
            && (found.len() < count || found.peek().is_some_and(|last| name < last.as_slice()));
        if is_wanted {
            found.push(name.to_vec());
            if found.len() > count {
                found.pop();
            }
        }
    }
    Ok(found.into_sorted_vec())
}

fn entry(directory: BorrowedFd<'_>, name: Vec<u8>) -> Result<Entry, FileError> {
    let stat = statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = Kind::of(&stat);
    let target = match kind {
        Kind::Symlink => match readlinkat(directory, &name, Vec::new()) {
            Ok(target) => Some(target.into_bytes()),
            // It is something else by now.
            Err(Errno::INVAL | Errno::NOENT) => return Err(FileError::NotFound),
            Err(errno) => return Err(errno.into()),
        },
        _ => None,
    };
    Ok(Entry {
        name,
        kind,
        size: (kind == Kind::File).then(|| u64::try_from(stat.st_size).unwrap_or(0)),
        modified: (seconds(stat.st_mtime), nanoseconds(stat.st_mtime_nsec)),
        executable: kind == Kind::File && stat.st_mode & 0o111 != 0,
        target,
    })
}

/// The kernel's types of these differ between architectures.
fn seconds(value: impl TryInto<i64>) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}

fn nanoseconds(value: impl TryInto<u32>) -> u32 {
    value.try_into().unwrap_or(0)
}

/// A regular file, open for reading.
#[derive(Debug)]
pub struct OpenFile {
    file: OwnedFd,
    size: u64,
    is_text: bool,
    version: String,
}

impl OpenFile {
    /// Its size when it was opened, in bytes. It may be another one by now.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether its first 8 KiB are UTF-8 without a NUL.
    pub fn is_text(&self) -> bool {
        self.is_text
    }

    /// Another one for each file, and for the same file after each change that the kernel's clock of a few milliseconds
    /// tells apart, or that changes its size. Visible ASCII.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// At most `most` bytes from `offset` on; fewer only where the file ends.
    ///
    /// # Errors
    /// What the disk said.
    pub fn read_at(&self, offset: u64, most: usize) -> Result<Vec<u8>, FileError> {
        let mut bytes = vec![0; most];
        let mut read = 0;
        while read < most {
            match retry_on_intr(|| pread(&self.file, &mut bytes[read..], offset + read as u64))? {
                0 => break,
                more => read += more,
            }
        }
        bytes.truncate(read);
        Ok(bytes)
    }
}

/// What tells a file, in its present state, from all others.
fn version(stat: &Stat) -> String {
    let mut hash = Sha256::new();
    for number in [seconds(stat.st_size), seconds(stat.st_mtime), seconds(stat.st_ctime)] {
        hash.update(number.to_le_bytes());
    }
    for number in [nanoseconds(stat.st_mtime_nsec), nanoseconds(stat.st_ctime_nsec)] {
        hash.update(number.to_le_bytes());
    }
    for number in [stat.st_dev, stat.st_ino] {
        hash.update(number.to_le_bytes());
    }
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Whether the beginning of a file is text: UTF-8 without a NUL. Where it is not the whole file, its last character may be
/// cut.
fn is_text(beginning: &[u8], whole: bool) -> bool {
    if beginning.contains(&0) {
        return false;
    }
    match std::str::from_utf8(beginning) {
        Ok(_) => true,
        Err(error) => !whole && error.error_len().is_none(),
    }
}

#[cfg(test)]
mod tests;
