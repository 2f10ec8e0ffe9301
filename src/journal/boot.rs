//! Tells a loss, of power or of what was damaged, from the mere death of the process: what was written and not synced
//! survives the latter.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Holds the id of the machine's boot while the journal is open.
const FILE: &str = "boot";
/// Another one at each boot of each machine.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Whether the journal was open in another boot and never closed, or was damaged.
pub(super) fn was_lost(directory: &Path) -> io::Result<bool> {
    match fs::read_to_string(directory.join(FILE)) {
        // One that is half written is of another boot, too.
        Ok(before) => Ok(before != fs::read_to_string(BOOT_ID)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Says that the journal is open in this boot.
pub(super) fn begin(directory: &Path) -> io::Result<()> {
    write(directory, &fs::read_to_string(BOOT_ID)?)
}

/// Says that something of the journal was lost, whatever boot this is.
pub(super) fn doubt(directory: &Path) -> io::Result<()> {
    write(directory, "damaged\n")
}

fn write(directory: &Path, text: &str) -> io::Result<()> {
    let mut file = File::create(directory.join(FILE))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    File::open(directory)?.sync_all()
}

/// Says that it is closed, and everything in it synced.
pub(super) fn end(directory: &Path) -> io::Result<()> {
    match fs::remove_file(directory.join(FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
