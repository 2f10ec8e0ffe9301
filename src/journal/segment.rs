//! One file of the journal: a header, then records, each with its length and checksum before it.

use super::Position;
use crate::failpoint;
use crc::{CRC_32_ISCSI, Crc};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What each file begins with; the number is the version of the format.
const MAGIC: &[u8; 8] = b"OCJRNL01";
/// The header's length, in bytes.
pub(super) const HEADER: u64 = MAGIC.len() as u64;
/// Length and checksum.
const PREFIX: usize = 8;
/// The longest record, in bytes. A length beyond it is damage.
const LONGEST: usize = 256 * 1024 * 1024;
const SUFFIX: &str = ".journal";
const CHECKSUM: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// A segment that is there.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) number: u64,
    /// Up to here there are whole records.
    pub(super) length: u64,
}

impl Segment {
    /// Whether all of its records are before a place.
    pub(super) fn is_before(&self, place: Position) -> bool {
        self.number < place.segment || self.number == place.segment && self.length <= place.offset
    }

    /// Reads all of it, to the first that is no record. Gives its file's size too: what is beyond `length` is damaged.
    pub(super) fn check(directory: &Path, number: u64) -> io::Result<(Self, u64)> {
        let file = File::open(path(directory, number))?;
        let size = file.metadata()?.len();
        let mut length = 0;
        let mut magic = [0; MAGIC.len()];
        if size >= HEADER && file.read_exact_at(&mut magic, 0).is_ok() && magic == *MAGIC {
            length = HEADER;
            while let Some(record) = record(&file, length, size)? {
                length += framed(record.len());
            }
        }
        Ok((Self { number, length }, size))
    }

    /// Cuts off what is beyond its length.
    pub(super) fn cut(&self, directory: &Path) -> io::Result<()> {
        let file = File::options().write(true).open(path(directory, self.number))?;
        file.set_len(self.length)?;
        file.sync_data()
    }
}

pub(super) fn path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:016x}{SUFFIX}"))
}

/// The numbers of the segments, in order. Other files are left alone.
pub(super) fn list(directory: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)).filter(|digits| digits.len() == 16);
        numbers.extend(number.and_then(|digits| u64::from_str_radix(digits, 16).ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Makes a new one, which is there after a loss of power too.
pub(super) fn create(directory: &Path, number: u64) -> io::Result<File> {
    // One of this number can only be left of a creation that failed half way.
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path(directory, number))?;
    file.write_all_at(MAGIC, 0)?;
    file.sync_data()?;
    File::open(directory)?.sync_all()?;
    Ok(file)
}

/// How long a record is with what stands before it, in bytes.
pub(super) fn framed(record: usize) -> u64 {
    (PREFIX + record) as u64
}

/// A record with what stands before it.
pub(super) fn frame(record: &[u8]) -> io::Result<Vec<u8>> {
    let too_long = || io::Error::new(io::ErrorKind::InvalidInput, "a record is too long for the journal");
    let length = u32::try_from(record.len()).ok().filter(|_| record.len() <= LONGEST).ok_or_else(too_long)?;
    let mut frame = Vec::with_capacity(PREFIX + record.len());
    frame.extend(length.to_le_bytes());
    frame.extend(checksum(length, record).to_le_bytes());
    frame.extend(record);
    Ok(frame)
}

pub(super) fn write(file: &File, offset: u64, frame: &[u8]) -> io::Result<()> {
    failpoint::pass_after("append-torn", || {
        let _ = file.write_all_at(&frame[..frame.len() / 2], offset);
    });
    file.write_all_at(frame, offset)
}

/// The record at a place.
pub(super) fn read(directory: &Path, number: u64, offset: u64) -> io::Result<Vec<u8>> {
    let file = File::open(path(directory, number))?;
    let size = file.metadata()?.len();
    record(&file, offset, size)?.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a record is damaged"))
}

/// The record at a place. `None`: what is there is none.
pub(super) fn record(file: &File, offset: u64, size: u64) -> io::Result<Option<Vec<u8>>> {
    let mut prefix = [0; PREFIX];
    if offset + PREFIX as u64 > size {
        return Ok(None);
    }
    file.read_exact_at(&mut prefix, offset)?;
    let [a, b, c, d, e, f, g, h] = prefix;
    let (length, sum) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
    let long = length as usize;
    // Looked at before there is memory for it.
    if long > LONGEST || offset + framed(long) > size {
        return Ok(None);
    }
    let mut record = vec![0; long];
    file.read_exact_at(&mut record, offset + PREFIX as u64)?;
    Ok((checksum(length, &record) == sum).then_some(record))
}

/// Of the length too, so that a stretch of zeros is no record.
fn checksum(length: u32, record: &[u8]) -> u32 {
    let mut digest = CHECKSUM.digest();
    digest.update(&length.to_le_bytes());
    digest.update(record);
    digest.finalize()
}
