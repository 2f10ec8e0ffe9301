//! The journal: what has to survive the death of this process before anybody else has it.
//!
//! An append-only log of opaque records in segments beneath one directory. A record is checked by a checksum, and is
//! there wholly or not at all: a tail that was torn by a loss of power, or changed by its disk, is cut off when the
//! journal is opened. What is appended survives this process at once, and the machine with [`Journal::sync`]. Whoever has
//! brought a record to where it belongs says so with [`Journal::release`], which removes the segments before it. What of
//! them is still needed is in the *summary*, which replaces the one before it as a whole.
//!
//! One writer, many readers. Everything here blocks, and belongs on a thread that may.
//!
//! # Why not an existing store
//! What is needed is one ordered file: append, sync, read at a place, drop the head; and a note of some hundred lines
//! that is replaced now and then. `fjall` and `redb` are stores of
//! keys: they write each record twice (their own log, then a tree), and compact what lives for a second. SQLite does
//! likewise and would need a second driver beside that of Postgres. `okaywal`, which is the right shape, is no longer
//! maintained (its last release is of 2023). What is left to do by hand is a length and a checksum.

mod boot;
mod segment;
mod summary;

use crate::failpoint;
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
/// The number of the first one.
const FIRST: u64 = 1;
/// A last segment of which nothing is needed any more is replaced when it is longer than this, in bytes.
const STALE: u64 = 256 * 1024;

/// Where a record is. Later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    segment: u64,
    offset: u64,
}

impl Position {
    /// Some place, for those who check what is done with places.
    #[cfg(all(test, feature = "shuttle"))]
    pub(crate) fn at(number: u64) -> Self {
        Self { segment: number, offset: 0 }
    }

    /// The place of the record of this length that ends here.
    pub fn before(self, length: usize) -> Self {
        Self { offset: self.offset.saturating_sub(segment::framed(length)), ..self }
    }
}

/// The open journal. Its directory must be this process's alone.
#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
    inner: Mutex<Inner>,
    /// All segments together.
    bytes: AtomicU64,
    lost: bool,
    /// That of an earlier life, until it is taken.
    summary: Mutex<Option<Vec<u8>>>,
    /// How long the last one was, in bytes.
    summary_bytes: AtomicU64,
    /// Whether anything that was appended since it was made is missing here.
    is_whole: bool,
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
        let (summary, summary_damage) = match summary::read(directory) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                (None, Some(fs::metadata(summary::path(directory)).map_or(0, |file| file.len())))
            }
            summary => (summary?, None),
        };
        let checked =
            numbers.iter().map(|number| Segment::check(directory, *number)).collect::<io::Result<Vec<_>>>()?;
        let is_damaged = |(segment, size): &(Segment, u64)| segment.length < *size;
        if summary_damage.is_some() || checked.iter().any(is_damaged) {
            // Known from here on, also to a later start: once it is cut off nothing shows it any more.
            boot::doubt(directory)?;
        }
        let lost = boot::was_lost(directory)?;
        let (mut segments, mut damage) = (VecDeque::new(), Vec::new());
        if let Some(bytes) = summary_damage {
            damage.push(Damage { file: summary::path(directory), bytes, in_the_middle: true });
        }
        for (at, (segment, size)) in checked.into_iter().enumerate() {
            if segment.length < size {
                segment.cut(directory)?;
                let file = segment::path(directory, segment.number);
                let in_the_middle = at + 1 < numbers.len();
                damage.push(Damage { file, bytes: size - segment.length, in_the_middle });
            }
            segments.push_back(segment);
        }
        let next = numbers.last().map_or(FIRST, |last| last + 1);
        let file = segment::create(directory, next)?;
        segments.push_back(Segment { number: next, length: HEADER });
        let bytes = AtomicU64::new(segments.iter().map(|segment| segment.length).sum());
        let inner = Mutex::new(Inner { segments, file: Arc::new(file), dirty: false, torn: false });
        summary::keep_room(directory, summary.as_ref().map_or(0, Vec::len))?;
        let is_whole = summary.is_some() || numbers.first() == Some(&FIRST);
        let journal = Self {
            directory: directory.to_owned(),
            inner,
            bytes,
            lost,
            summary_bytes: AtomicU64::new(summary.as_ref().map_or(0, |summary| summary.len() as u64)),
            summary: Mutex::new(summary),
            is_whole,
        };
        Ok((journal, damage))
    }

    /// What an earlier life noted of the records that it released; once. `None` where there is none: all records since
    /// the beginning are here, or [`Journal::is_whole`] says otherwise.
    pub fn take_summary(&self) -> Option<Vec<u8>> {
        self.summary.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether summary and records together tell of everything that was ever appended by earlier lives. Not so in a new
    /// directory, or where the summary is damaged.
    pub fn is_whole(&self) -> bool {
        self.is_whole
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

    /// Everything before a place is no more needed but for what `summary` makes of it, which may tell of later records
    /// too. Segments that are wholly before it are removed; the last one is too, where it is long, and with `all` in any
    /// case. Returns whether nothing of what came before the place is on the disk any more.
    ///
    /// # Errors
    /// The summary cannot be written, or a segment cannot be removed. It is tried again with the next call.
    pub fn release(&self, before: Position, all: bool, summary: impl FnOnce() -> Vec<u8>) -> io::Result<bool> {
        let longest = match all {
            true => HEADER,
            // So that it is not for ever rewritten for a few records.
            false => STALE.max(self.summary_bytes.load(Ordering::Relaxed).saturating_mul(2)),
        };
        let is_stale = |inner: &Inner| {
            let end = inner.segments.back().map(|last| Position { segment: last.number, offset: last.length });
            end.is_some_and(|end| before >= end && end.offset > longest)
        };
        let removes = {
            let inner = self.lock();
            is_stale(&inner) || inner.segments.len() > 1 && inner.segments.front().is_some_and(|s| s.is_before(before))
        };
        let mut written = 0;
        if removes {
            let summary = summary();
            // What it tells of must not be there without the records that it does not tell of.
            self.sync()?;
            summary::write(&self.directory, &summary)?;
            written = summary.len();
            self.summary_bytes.store(summary.len() as u64, Ordering::Relaxed);
            failpoint::pass("release-summed");
        }
        let mut inner = self.lock();
        if removes {
            // Before the rest, which may need the room.
            self.remove_before(&mut inner, before)?;
            if is_stale(&inner) {
                self.replace(&mut inner)?;
                failpoint::pass("release-rotated");
            }
            self.remove_before(&mut inner, before)?;
        }
        let first = inner.segments.front().map(|first| first.number);
        drop(inner);
        if removes {
            summary::keep_room(&self.directory, written)?;
        }
        Ok(first.is_none_or(|first| first > before.segment || before.offset <= HEADER))
    }

    fn remove_before(&self, inner: &mut Inner, before: Position) -> io::Result<()> {
        while let Some(first) = inner.segments.front() {
            if inner.segments.len() == 1 || !first.is_before(before) {
                break;
            }
            match fs::remove_file(segment::path(&self.directory, first.number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => self.bytes.fetch_sub(first.length, Ordering::Relaxed),
            };
            inner.segments.pop_front();
            failpoint::pass("release-removed");
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
