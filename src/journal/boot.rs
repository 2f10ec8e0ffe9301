//! Tells a loss of power from the mere death of the process: what was written and not synced survives the latter.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Holds the id of the machine's boot while the journal is open.
const FILE: &str = "boot";
/// Another one at each boot of each machine.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Says that the journal is open. Returns whether it was so in another boot, and never closed.
pub(super) fn begin(directory: &Path) -> io::Result<bool> {
    let now = fs::read_to_string(BOOT_ID)?;
    let path = directory.join(FILE);
    let before = match fs::read_to_string(&path) {
        Ok(before) => Some(before),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    if before.as_ref() == Some(&now) {
        return Ok(false);
    }
    // One that is half written is of another boot, too.
    let mut file = File::create(&path)?;
    file.write_all(now.as_bytes())?;
    file.sync_all()?;
    File::open(directory)?.sync_all()?;
    Ok(before.is_some())
}

/// Says that it is closed, and everything in it synced.
pub(super) fn end(directory: &Path) -> io::Result<()> {
    match fs::remove_file(directory.join(FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
