//! The journal: what has to survive the death of this process before anybody else has it.
//!
//! An append-only log of opaque records in segments beneath one directory. A record is checked by a checksum, and is
//! there wholly or not at all: a tail that was torn by a loss of power, or changed by its disk, is cut off when the
//! journal is opened. What is appended survives this process at once, and the machine with [`Journal::sync`]. Whoever has
//! brought a record to where it belongs says so with [`Journal::release`], which removes the segments before it.
//!
//! One writer, many readers. Everything here blocks, and belongs on a thread that may.
//!
//! # Why not an existing store
//! What is needed is one ordered file: append, sync, read at a place, drop the head. `fjall` and `redb` are stores of
//! keys: they write each record twice (their own log, then a tree), and compact what lives for a second. SQLite does
//! likewise and would need a second driver beside that of Postgres. `okaywal`, which is the right shape, is no longer
//! maintained (its last release is of 2023). What is left to do by hand is a length and a checksum.

mod boot;
mod segment;

use segment::{HEADER, Segment};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How long a segment gets, in bytes, before the next one is begun; one record may be longer than that.
const SEGMENT: u64 = 8 * 1024 * 1024;
/// A last segment of which nothing is needed any more is replaced when it is longer than this, in bytes.
const STALE: u64 = 256 * 1024;

/// Where a record is. Later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    segment: u64,
    offset: u64,
}

/// The open journal. Its directory must be this process's alone.
#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
    inner: Mutex<Inner>,
    /// All segments together.
    bytes: AtomicU64,
    lost: bool,
}

#[derive(Debug)]
struct Inner {
    /// In order; the last one is written to.
    segments: VecDeque<Segment>,
    file: Arc<File>,
    /// Whether something was appended since the last sync was begun.
    dirty: bool,
    /// The last segment may end with something that is no record, and cannot be cut.
    torn: bool,
}

/// What was wrong when the journal was opened, for the log.
#[derive(Debug, PartialEq, Eq)]
pub struct Damage {
    /// The segment's file.
    pub file: PathBuf,
    /// How many bytes at its end are no records, and were cut off.
    pub bytes: u64,
    /// Whether records of a later segment follow: then it was no loss of power that tore it.
    pub in_the_middle: bool,
}

impl Journal {
    /// Opens it, or makes it. What an earlier life has left is there to be read from [`Journal::start`].
    ///
    /// # Errors
    /// The directory or a file in it cannot be read or written.
    pub fn open(directory: &Path) -> io::Result<(Self, Vec<Damage>)> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let numbers = segment::list(directory)?;
        let checked =
            numbers.iter().map(|number| Segment::check(directory, *number)).collect::<io::Result<Vec<_>>>()?;
        let is_damaged = |(segment, size): &(Segment, u64)| segment.length < *size;
        if checked.iter().any(is_damaged) {
            // Known from here on, also to a later start: once it is cut off nothing shows it any more.
            boot::doubt(directory)?;
        }
        let lost = boot::was_lost(directory)?;
        let (mut segments, mut damage) = (VecDeque::new(), Vec::new());
        for (at, (segment, size)) in checked.into_iter().enumerate() {
            if segment.length < size {
                segment.cut(directory)?;
                let file = segment::path(directory, segment.number);
                let in_the_middle = at + 1 < numbers.len();
                damage.push(Damage { file, bytes: size - segment.length, in_the_middle });
            }
            segments.push_back(segment);
        }
        let next = numbers.last().map_or(1, |last| last + 1);
        let file = segment::create(directory, next)?;
        segments.push_back(Segment { number: next, length: HEADER });
        let bytes = AtomicU64::new(segments.iter().map(|segment| segment.length).sum());
        let inner = Mutex::new(Inner { segments, file: Arc::new(file), dirty: false, torn: false });
        Ok((Self { directory: directory.to_owned(), inner, bytes, lost }, damage))
    }

    /// Whether something of it may be lost: the machine went down, or the directory came to another one, while an earlier
    /// life had it open and not everything synced; or a part of it was damaged. Said again at each opening until
    /// [`Journal::begin`].
    pub fn has_lost(&self) -> bool {
        self.lost
    }

    /// Whatever an earlier life has left is dealt with, a loss too: from here on this life may have its own. Before
    /// anything is appended that anybody sees and that is not synced.
    ///
    /// # Errors
    /// It could not be noted.
    pub fn begin(&self) -> io::Result<()> {
        boot::begin(&self.directory)
    }

    /// Syncs it for the last time, so that nothing can be lost any more.
    ///
    /// # Errors
    /// As [`Journal::sync`].
    pub fn close(&self) -> io::Result<()> {
        self.sync()?;
        boot::end(&self.directory)
    }

    /// The place of the first record that is still there.
    pub fn start(&self) -> Position {
        let inner = self.lock();
        Position { segment: inner.segments.front().map_or(0, |segment| segment.number), offset: HEADER }
    }

    /// All of it, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Appends a record, and gives its place and the one after it. It survives this process from here on.
    ///
    /// # Errors
    /// Nothing is appended. The disk may be full: the same may work later.
    pub fn append(&self, record: &[u8]) -> io::Result<(Position, Position)> {
        let frame = segment::frame(record)?;
        let mut inner = self.lock();
        let length = inner.segments.back().map_or(0, |segment| segment.length);
        if inner.torn || (length > HEADER && length + frame.len() as u64 > SEGMENT) {
            self.rotate(&mut inner)?;
        }
        let Some(&Segment { number, length }) = inner.segments.back() else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let (at, after) = (length, length + frame.len() as u64);
        if let Err(error) = segment::write(&inner.file, at, &frame) {
            // A part of it may be there.
            inner.torn = inner.file.set_len(at).is_err();
            return Err(error);
        }
        inner.segments.back_mut().into_iter().for_each(|last| last.length = after);
        inner.dirty = true;
        self.bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
        Ok((Position { segment: number, offset: at }, Position { segment: number, offset: after }))
    }

    /// Brings everything that was appended before this call to the disk. Appending goes on meanwhile.
    ///
    /// # Errors
    /// Not known to be there. What was appended since the last sync has to be appended again: the kernel may have
    /// dropped it, and would not say so twice.
    pub fn sync(&self) -> io::Result<()> {
        let file = {
            let mut inner = self.lock();
            if !std::mem::take(&mut inner.dirty) {
                return Ok(());
            }
            Arc::clone(&inner.file)
        };
        file.sync_data().inspect_err(|_| self.lock().torn = true)
    }

    /// The record that was appended at a place.
    ///
    /// # Errors
    /// It cannot be read; `NotFound` where it was released, `InvalidData` where it is damaged.
    pub fn get(&self, at: Position) -> io::Result<Vec<u8>> {
        segment::read(&self.directory, at.segment, at.offset)
    }

    /// The first record at or after a place, and the place after it. `None`: that is the end.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub fn next(&self, at: Position) -> io::Result<Option<(Vec<u8>, Position)>> {
        let place = self.lock().segments.iter().find_map(|segment| {
            let offset = if segment.number == at.segment { at.offset } else { HEADER };
            let ahead = segment.number >= at.segment && offset < segment.length;
            ahead.then_some(Position { segment: segment.number, offset })
        });
        let Some(place) = place else { return Ok(None) };
        let record = self.get(place)?;
        let after = Position { offset: place.offset + segment::framed(record.len()), ..place };
        Ok(Some((record, after)))
    }

    /// Everything before a place is no more needed. Segments that are wholly before it are removed; the last one is too,
    /// where it is long, and with `all` in any case. Returns whether nothing of what came before the place is on the disk
    /// any more.
    ///
    /// # Errors
    /// One cannot be removed. It is tried again with the next call.
    pub fn release(&self, before: Position, all: bool) -> io::Result<bool> {
        let mut inner = self.lock();
        // Before the rest, which may need the room.
        self.remove_before(&mut inner, before)?;
        let end = inner.segments.back().map(|last| Position { segment: last.number, offset: last.length });
        let longest = if all { HEADER } else { STALE };
        if end.is_some_and(|end| before >= end && end.offset > longest) {
            self.replace(&mut inner)?;
            self.remove_before(&mut inner, before)?;
        }
        Ok(inner.segments.front().is_none_or(|first| first.number > before.segment || before.offset <= HEADER))
    }

    fn remove_before(&self, inner: &mut Inner, before: Position) -> io::Result<()> {
        while let Some(first) = inner.segments.front() {
            let done = first.number < before.segment || first.length <= before.offset && first.number == before.segment;
            if inner.segments.len() == 1 || !done {
                break;
            }
            match fs::remove_file(segment::path(&self.directory, first.number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => self.bytes.fetch_sub(first.length, Ordering::Relaxed),
            };
            inner.segments.pop_front();
        }
        Ok(())
    }

    /// Begins a new segment in place of the last one, of which nothing is needed any more.
    fn replace(&self, inner: &mut Inner) -> io::Result<()> {
        let Err(error) = self.rotate(inner) else { return Ok(()) };
        if error.kind() != io::ErrorKind::StorageFull {
            return Err(error);
        }
        // The room that it lacks may be what the old one takes: that goes first. Nothing may be appended to it any more.
        inner.torn = true;
        if let Some(last) = inner.segments.back_mut() {
            fs::remove_file(segment::path(&self.directory, last.number))?;
            self.bytes.fetch_sub(std::mem::take(&mut last.length), Ordering::Relaxed);
        }
        // It is open, and would keep its room.
        inner.file.set_len(0)?;
        self.rotate(inner)
    }

    /// Begins a new segment. The old one is synced first: what follows it must not be there without it.
    fn rotate(&self, inner: &mut Inner) -> io::Result<()> {
        if !inner.torn {
            inner.file.sync_data()?;
        }
        let number = inner.segments.back().map_or(1, |last| last.number + 1);
        inner.file = Arc::new(segment::create(&self.directory, number)?);
        inner.segments.push_back(Segment { number, length: HEADER });
        (inner.dirty, inner.torn) = (false, false);
        self.bytes.fetch_add(HEADER, Ordering::Relaxed);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
