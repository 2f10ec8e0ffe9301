//! Opens keys that the backend stored encrypted (AES-256-GCM, without additional data), and seals what the sidecar itself
//! has to keep: the same with a key of its own, each value bound to what it belongs to.
//!
//! `ring` does the cryptography. It is in this binary already, under all TLS, so nothing new has to be trusted; the
//! `aes-gcm` crate would bring eight more for the same. What it adds, that the cipher's expanded key is wiped, is of no
//! use here: the key itself stays in memory for as long as the process lives.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use secrecy::zeroize::Zeroizing;
use secrecy::{ExposeSecret, SecretBox, SecretString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

const KEY_LEN: usize = 32;
/// Nonce and tag, around nothing.
const SHORTEST: usize = NONCE_LEN + 16;

/// A key of 32 bytes.
#[derive(Clone, Debug)]
pub struct SealingKey(Arc<SecretBox<[u8; KEY_LEN]>>);

impl SealingKey {
    /// Reads the base64 of 32 bytes; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = Zeroizing::new(STANDARD.decode(text).ok()?);
        let mut key = Box::new([0; KEY_LEN]);
        if bytes.len() != KEY_LEN {
            return None;
        }
        key.copy_from_slice(&bytes);
        Some(Self(Arc::new(SecretBox::new(key))))
    }

    fn open(&self, nonce: [u8; NONCE_LEN], sealed: &[u8], belongs_to: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, self.0.expose_secret()).ok()?);
        let mut text = Zeroizing::new(sealed.to_vec());
        let nonce = Nonce::assume_unique_for_key(nonce);
        let length = key.open_in_place(nonce, Aad::from(belongs_to), &mut text).ok()?.len();
        text.truncate(length);
        Some(text)
    }

    /// The key that a file holds; `None` where there is none.
    ///
    /// # Errors
    /// It cannot be read; `InvalidData` where the file holds something else.
    pub(super) fn of_file(path: &Path) -> io::Result<Option<Self>> {
        let bytes = match fs::read(path) {
            Ok(bytes) => Zeroizing::new(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut key = Box::new([0; KEY_LEN]);
        if bytes.len() != KEY_LEN {
            let what = format!("{} does not hold a key of 32 bytes", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        key.copy_from_slice(&bytes);
        Ok(Some(Self(Arc::new(SecretBox::new(key)))))
    }

    /// A new one of 32 random bytes, in a new file for this user alone, on the disk.
    ///
    /// # Errors
    /// No random bytes, or the file cannot be made.
    pub(super) fn make(path: &Path) -> io::Result<Self> {
        let mut key = Box::new([0; KEY_LEN]);
        SystemRandom::new().fill(&mut key[..]).map_err(|_| io::Error::other("no random bytes"))?;
        let key = SecretBox::new(key);
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        file.write_all(&key.expose_secret()[..])?;
        file.sync_all()?;
        Ok(Self(Arc::new(key)))
    }

    /// Seals a text so that it opens only together with what it belongs to. The base64 of
    /// `nonce(12) ‖ ciphertext ‖ tag(16)`; the nonce is random, which is safe for 2³² values under one key: whoever has the
    /// key counts them.
    ///
    /// # Errors
    /// No random bytes.
    pub fn seal(&self, text: &SecretString, belongs_to: &[u8]) -> io::Result<String> {
        let failed = |_| io::Error::other("it could not be sealed");
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).map_err(failed)?;
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, self.0.expose_secret()).map_err(failed)?);
        let mut bytes = Zeroizing::new(text.expose_secret().as_bytes().to_vec());
        let tag = key
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(belongs_to), &mut bytes)
            .map_err(failed)?;
        Ok(STANDARD.encode([&nonce[..], &bytes, tag.as_ref()].concat()))
    }

    /// Opens what was sealed for the same.
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn unseal(&self, sealed: &str, belongs_to: &[u8]) -> Result<SecretString, OpenError> {
        open(sealed, |nonce, rest| self.open(nonce, rest, belongs_to)).map_err(|error| match error {
            OpenError::Unopened => OpenError::Foreign,
            other => other,
        })
    }
}

fn open(
    sealed: &str,
    with: impl FnOnce([u8; NONCE_LEN], &[u8]) -> Option<Zeroizing<Vec<u8>>>,
) -> Result<SecretString, OpenError> {
    let bytes = STANDARD.decode(sealed).map_err(|_| OpenError::Base64)?;
    let (nonce, rest) = bytes.split_first_chunk().ok_or(OpenError::Short)?;
    if bytes.len() < SHORTEST {
        return Err(OpenError::Short);
    }
    let text = with(*nonce, rest).ok_or(OpenError::Unopened)?;
    std::str::from_utf8(&text).map(SecretString::from).map_err(|_| OpenError::NoText)
}

/// What opens sealed values: the key that they are sealed under now, and the one before it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Keyring {
    pub current: SealingKey,
    pub previous: Option<SealingKey>,
}

/// Why a sealed value could not be opened. No more is said than that: which key, or which byte, helps nobody but an
/// attacker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error("must be base64")]
    Base64,
    #[error("is too short: it must be the base64 of a nonce of 12 bytes, the ciphertext and a tag of 16 bytes")]
    Short,
    #[error("cannot be opened with the configured keys (ENCRYPTION_KEY, ENCRYPTION_KEY_PREVIOUS)")]
    Unopened,
    /// Of what the sidecar has sealed itself.
    #[error("was sealed under another key than those in STATE_DIR, or for something else, or was changed")]
    Foreign,
    #[error("holds no text")]
    NoText,
}

impl Keyring {
    /// Opens the base64 of `nonce(12) ‖ ciphertext ‖ tag(16)`.
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn open(&self, sealed: &SecretString) -> Result<SecretString, OpenError> {
        open(sealed.expose_secret(), |nonce, rest| {
            let mut keys = std::iter::once(&self.current).chain(&self.previous);
            keys.find_map(|key| key.open(nonce, rest, &[]))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by two other implementations, `tests/vectors/seal.py` and `seal.go`, which write the very same: name, key, what it
    /// is bound to, text, and the sealed form.
    const VECTORS: &str = include_str!("../../tests/vectors/sealed.tsv");

    struct Vector {
        key: SealingKey,
        row: Vec<u8>,
        text: Vec<u8>,
        sealed: &'static str,
    }

    fn vector(name: &str) -> Vector {
        let line = VECTORS.lines().find(|line| line.split('\t').next() == Some(name)).unwrap();
        let [_, key, row, text, sealed] = line.split('\t').collect::<Vec<_>>().try_into().unwrap();
        let byte = |hex: &str, at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        let bytes = |hex: &str| (0..hex.len()).step_by(2).map(|at| byte(hex, at)).collect();
        let (row, text) = (bytes(row), bytes(text));
        Vector { key: SealingKey::parse(key).unwrap(), row, text, sealed }
    }

    fn sealed(name: &str) -> &'static str {
        vector(name).sealed
    }

    /// Of the first key, and where asked for the one before it.
    fn keyring(with_previous: bool) -> Keyring {
        Keyring { current: vector("current").key, previous: with_previous.then(|| vector("previous").key) }
    }

    fn open(keyring: &Keyring, sealed: &str) -> Result<String, OpenError> {
        keyring.open(&sealed.into()).map(|text| text.expose_secret().to_owned())
    }

    #[test]
    fn what_others_sealed_is_opened() {
        for name in ["current", "previous", "empty", "lines", "long"] {
            let Vector { text, sealed, .. } = vector(name);
            assert_eq!(open(&keyring(true), sealed).unwrap().as_bytes(), text, "{name}");
        }
        assert!(open(&keyring(false), sealed("current")).is_ok());
        assert_eq!(open(&keyring(false), sealed("previous")), Err(OpenError::Unopened));
        assert_eq!(open(&keyring(true), sealed("other")), Err(OpenError::Unopened));
        assert_eq!(open(&keyring(true), sealed("no-text")), Err(OpenError::NoText));
        assert!(OpenError::Unopened.to_string().contains("ENCRYPTION_KEY"));
        // What is bound to a row is not taken for something of the backend's.
        assert_eq!(open(&keyring(true), sealed("row")), Err(OpenError::Unopened));
    }

    #[test]
    fn what_is_bound_to_a_row_opens_with_that_row_alone() {
        let (one, other, before) = (vector("row"), vector("other-row"), vector("row-previous"));
        let open = |key: &SealingKey, sealed: &str, row: &[u8]| {
            key.unseal(sealed, row).map(|text| text.expose_secret().as_bytes().to_vec())
        };
        assert_eq!(open(&one.key, one.sealed, &one.row), Ok(one.text));
        assert_eq!(open(&before.key, before.sealed, &before.row), Ok(before.text));
        assert_eq!(open(&other.key, other.sealed, &other.row), Ok(other.text));
        // Swapped, without any, cut, and under the key of another life.
        for (key, sealed, row) in [
            (&one.key, one.sealed, &other.row[..]),
            (&one.key, other.sealed, &one.row),
            (&one.key, one.sealed, b""),
            (&one.key, one.sealed, &one.row[..15]),
            (&one.key, before.sealed, &before.row),
            (&one.key, sealed("current"), &one.row),
        ] {
            assert_eq!(open(key, sealed, row), Err(OpenError::Foreign));
        }
    }

    /// Each single bit counts, wherever it is: in the nonce, the ciphertext or the tag.
    #[test]
    fn what_was_changed_is_not_opened() {
        let bytes = STANDARD.decode(sealed("current")).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&keyring(true), &STANDARD.encode(changed)), Err(OpenError::Unopened), "bit {bit}");
        }
        for length in 0..bytes.len() {
            let error = if length < SHORTEST { OpenError::Short } else { OpenError::Unopened };
            assert_eq!(open(&keyring(false), &STANDARD.encode(&bytes[..length])), Err(error), "{length} bytes");
        }
        let good = sealed("current");
        for text in ["!", "AAEC AwQF", &good[..good.len() - 1], &good.replace('+', "-"), &format!("{good}\n")] {
            assert_eq!(open(&keyring(false), text), Err(OpenError::Base64), "{text}");
        }
        assert_eq!(open(&keyring(false), ""), Err(OpenError::Short));
        // As much as a request can hold, and more.
        assert_eq!(open(&keyring(true), &"A".repeat(16 << 20)), Err(OpenError::Unopened));
        assert_eq!(open(&keyring(true), &"=".repeat(16 << 20)), Err(OpenError::Base64));
    }

    #[test]
    fn a_key_has_32_bytes_and_is_not_shown() {
        let good = STANDARD.encode([1; 32]);
        assert!(SealingKey::parse(&good).is_some());
        for text in ["", "x", "AAEC", &good[..43], &STANDARD.encode([1; 31]), &STANDARD.encode([1; 33])] {
            assert!(SealingKey::parse(text).is_none(), "{text}");
        }
        let shown = format!("{:?}", keyring(true));
        assert_eq!(shown.matches("REDACTED").count(), 2, "{shown}");
    }

    #[test]
    fn what_is_sealed_here_opens_with_the_same_key_for_the_same_thing_only() {
        let (key, other) = (vector("current").key, vector("other").key);
        let text = SecretString::from("sk-of-a-task-that-waits");
        let (one, two) = (key.seal(&text, b"a").unwrap(), key.seal(&text, b"a").unwrap());
        let nonce = |sealed: &str| STANDARD.decode(sealed).unwrap()[..NONCE_LEN].to_vec();
        assert_ne!(nonce(&one), nonce(&two), "a nonce of its own for each");
        for sealed in [&one, &two] {
            assert_eq!(key.unseal(sealed, b"a").unwrap().expose_secret(), text.expose_secret());
            assert!(matches!(key.unseal(sealed, b"b"), Err(OpenError::Foreign)));
            assert!(matches!(other.unseal(sealed, b"a"), Err(OpenError::Foreign)));
        }
        let bytes = STANDARD.decode(&one).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(key.unseal(&STANDARD.encode(changed), b"a"), Err(OpenError::Foreign)), "bit {bit}");
        }
    }
}
