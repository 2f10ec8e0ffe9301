//! The keys under which the sidecar seals what it has to keep itself: a new one in each life, and that of the life before for
//! as long as something is still sealed under it.
//!
//! So a key that somebody has copied opens what is kept for no longer than until the next start, and no key seals more than
//! one life does, which is counted: nonces are random, and safe for 2³² values under one key (NIST SP 800-38D, 8.3).

use super::seal::{OpenError, SealingKey};
use secrecy::SecretString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Values that one life seals at most.
const MOST: u64 = 1 << 32;

/// The sidecar's own keys. Cheap to clone.
#[derive(Clone, Debug)]
pub struct OwnKeys {
    current: SealingKey,
    previous: Option<SealingKey>,
    /// The file of `previous`.
    previous_path: PathBuf,
    sealed: Arc<AtomicU64>,
}

impl OwnKeys {
    /// Makes a key for this life in a file, for this user alone. What was there before opens what it has sealed until
    /// [`OwnKeys::forget_previous`]; it is beside it under the name `….previous`. A start that was cut off before that goes
    /// on with the two that are there, and so does one without room for a new file.
    ///
    /// # Errors
    /// A file cannot be read, made or renamed; `InvalidData` where one holds something else than a key.
    pub fn open(path: &Path) -> io::Result<Self> {
        let previous_path = path.with_extension("previous");
        let (current, previous) = match (SealingKey::of_file(path)?, SealingKey::of_file(&previous_path)?) {
            (Some(current), Some(previous)) => (current, Some(previous)),
            (None, previous) => (take_over(path, make(path)?)?, previous),
            (Some(before), None) => match make(path) {
                Ok(made) => {
                    fs::rename(path, &previous_path)?;
                    (take_over(path, made)?, Some(before))
                }
                Err(error) => {
                    tracing::warn!(%error, "no new sealing key can be made: the one of the last life is used on");
                    (before, None)
                }
            },
        };
        Ok(Self { current, previous, previous_path, sealed: Arc::default() })
    }

    /// Seals a text so that it opens only together with what it belongs to.
    ///
    /// # Errors
    /// No random bytes, or this life has sealed as much as one key may.
    pub fn seal(&self, text: &SecretString, belongs_to: &[u8]) -> io::Result<String> {
        if self.sealed.fetch_add(1, Ordering::Relaxed) >= MOST {
            return Err(io::Error::other("the key has sealed as much as it may: the next start makes a new one"));
        }
        self.current.seal(text, belongs_to)
    }

    /// Opens what was sealed for the same, in this life or the one before.
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn unseal(&self, sealed: &str, belongs_to: &[u8]) -> Result<SecretString, OpenError> {
        let opened = self.current.unseal(sealed, belongs_to);
        match (&self.previous, opened) {
            (Some(previous), Err(OpenError::Foreign)) => previous.unseal(sealed, belongs_to),
            (_, opened) => opened,
        }
    }

    /// Nothing that is still needed is sealed under the key of the life before: it is removed.
    ///
    /// # Errors
    /// The file cannot be removed. The next start then makes no new key, and tries this again.
    pub fn forget_previous(&self) -> io::Result<()> {
        match fs::remove_file(&self.previous_path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => sync_directory(&self.previous_path),
        }
    }
}

/// A new key, on the disk beside the file that it is for.
fn make(path: &Path) -> io::Result<SealingKey> {
    SealingKey::make(&path.with_extension("new"))
}

/// Whole or not at all: half a key would open nothing of what another half had sealed.
fn take_over(path: &Path, made: SealingKey) -> io::Result<SealingKey> {
    fs::rename(path.with_extension("new"), path)?;
    sync_directory(path)?;
    Ok(made)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;
    use secrecy::ExposeSecret;
    use std::os::unix::fs::PermissionsExt;

    const ROW: &[u8] = b"row";

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn opens(keys: &OwnKeys, sealed: &str) -> bool {
        match keys.unseal(sealed, ROW) {
            Ok(text) => text.expose_secret() == "sk-of-a-task-that-waits",
            Err(error) => {
                assert_eq!(error, OpenError::Foreign);
                false
            }
        }
    }

    #[test]
    fn each_life_has_a_key_of_its_own_and_opens_what_the_one_before_has_sealed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sealing.key");
        let text = SecretString::from("sk-of-a-task-that-waits");
        let first = OwnKeys::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let sealed = first.seal(&text, ROW).unwrap();
        first.forget_previous().unwrap();

        let second = OwnKeys::open(&path).unwrap();
        assert_eq!(names(directory.path()), ["sealing.key", "sealing.previous"]);
        assert_eq!(
            fs::metadata(directory.path().join("sealing.previous")).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(opens(&second, &sealed));
        let again = second.seal(&second.unseal(&sealed, ROW).unwrap(), ROW).unwrap();
        assert!(!opens(&first, &again), "it is sealed under another key now");
        // Cut off here: what either has sealed stays open, however often that happens.
        for _ in 0..2 {
            let third = OwnKeys::open(&path).unwrap();
            assert!(opens(&third, &sealed) && opens(&third, &again));
        }
        // Cut off between the two renames.
        fs::remove_file(&path).unwrap();
        let fourth = OwnKeys::open(&path).unwrap();
        assert!(opens(&fourth, &sealed) && !opens(&fourth, &again));
        fourth.forget_previous().unwrap();
        assert_eq!(names(directory.path()), ["sealing.key"]);
        let fifth = OwnKeys::open(&path).unwrap();
        assert!(!opens(&fifth, &sealed), "two lives later it is gone");
        let shown = format!("{fifth:?}");
        assert_eq!(shown.matches("REDACTED").count(), 2, "{shown}");
    }

    #[test]
    fn a_file_that_holds_no_key_is_refused_and_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sealing.key");
        for name in ["sealing.key", "sealing.previous"] {
            for content in [&b""[..], b"half", &[1; 31], &[1; 33]] {
                fs::write(directory.path().join(name), content).unwrap();
                let error = OwnKeys::open(&path).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                assert!(error.to_string().contains(name), "{error}");
                assert_eq!(fs::read(directory.path().join(name)).unwrap(), content);
            }
            fs::remove_file(directory.path().join(name)).unwrap();
        }
    }

    #[test]
    fn a_key_seals_no_more_than_it_may() {
        let directory = tempfile::tempdir().unwrap();
        let keys = OwnKeys::open(&directory.path().join("sealing.key")).unwrap();
        keys.sealed.store(MOST - 1, Ordering::Relaxed);
        let text = SecretString::from("text");
        assert!(keys.seal(&text, ROW).is_ok());
        assert!(keys.seal(&text, ROW).unwrap_err().to_string().contains("as much as it may"));
    }
}
