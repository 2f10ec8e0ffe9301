//! What is left of records that were released: one file, replaced as a whole.
//!
//! Segments are removed after it is written, and it may be a full disk that they are to be removed from. So a file of no
//! worth keeps the room that it takes.

use super::segment;
use crate::failpoint;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const FILE: &str = "summary";
/// One that is being written; of no worth to a later life.
const NEW: &str = "summary.new";
/// What keeps the room for the next one, and how long it is at least, in bytes.
const ROOM: &str = "summary.room";
const LEAST_ROOM: usize = 128 * 1024;

pub(super) fn path(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

/// The one that is there; `InvalidData` for one that is damaged.
pub(super) fn read(directory: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path(directory)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let record = segment::record(&file, 0, file.metadata()?.len())?;
    record.map(Some).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the journal's summary is damaged"))
}

/// Keeps the room that the next one may take, where there is some. `length`: that of the last one.
pub(super) fn keep_room(directory: &Path, length: usize) -> io::Result<()> {
    let file = directory.join(ROOM);
    let wanted = LEAST_ROOM.max(length.saturating_mul(2));
    if fs::metadata(&file).is_ok_and(|file| file.len() >= wanted as u64) {
        return Ok(());
    }
    match fs::write(&file, vec![0; wanted]) {
        Err(error) if error.kind() == io::ErrorKind::StorageFull => fs::remove_file(file),
        done => done,
    }
}

/// Replaces it. Afterwards it is on the disk.
pub(super) fn write(directory: &Path, summary: &[u8]) -> io::Result<()> {
    match replace(directory, summary) {
        Err(error) if error.kind() == io::ErrorKind::StorageFull => {
            // What is half there is in the way, too.
            for file in [NEW, ROOM] {
                match fs::remove_file(directory.join(file)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            replace(directory, summary)
        }
        done => done,
    }
}

fn replace(directory: &Path, summary: &[u8]) -> io::Result<()> {
    let new = directory.join(NEW);
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&segment::frame(summary)?)?;
    file.sync_all()?;
    failpoint::pass("summary-new");
    fs::rename(new, path(directory))?;
    File::open(directory)?.sync_all()
}
