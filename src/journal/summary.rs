//! What is left of records that were released: one file, replaced as a whole.

use super::segment;
use crate::failpoint;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const FILE: &str = "summary";
/// One that is being written; of no worth to a later life.
const NEW: &str = "summary.new";

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

/// Replaces it. Afterwards it is on the disk.
pub(super) fn write(directory: &Path, summary: &[u8]) -> io::Result<()> {
    let new = directory.join(NEW);
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&segment::frame(summary)?)?;
    file.sync_all()?;
    failpoint::pass("summary-new");
    fs::rename(new, path(directory))?;
    File::open(directory)?.sync_all()
}
