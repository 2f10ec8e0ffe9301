//! A small disk of a test's own, which can be full. Making it takes root.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// What takes the room that is to be missing.
const BALLAST: &str = "ballast";

/// A file system in memory. Dropped, it goes away at once, whoever uses it.
pub(crate) struct Disk {
    place: PathBuf,
}

impl Disk {
    /// Over an empty directory, with room for so many bytes.
    pub(crate) fn over(place: &Path, bytes: usize) -> Self {
        let options = format!("size={bytes},mode=0711");
        mount(Some("test"), place, Some("tmpfs"), MsFlags::empty(), Some(&*options)).unwrap();
        Self { place: place.to_owned() }
    }

    /// Takes all the room that is left, to the last page.
    pub(crate) fn fill(&self) {
        let mut file = File::options().append(true).create(true).open(self.place.join(BALLAST)).unwrap();
        let error = loop {
            if let Err(error) = file.write_all(&[0; 4096]) {
                break error;
            }
        };
        assert_eq!(error.kind(), ErrorKind::StorageFull);
    }

    /// Gives it back.
    pub(crate) fn make_room(&self) {
        fs::remove_file(self.place.join(BALLAST)).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let gone = umount2(&self.place, MntFlags::MNT_DETACH);
        assert!(gone.is_ok() || std::thread::panicking(), "{gone:?}");
    }
}
