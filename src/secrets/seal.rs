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

    /// The key in a file of the sidecar's own, which is made where there is none: 32 random bytes, for this user alone.
    ///
    /// # Errors
    /// It cannot be read or made; `InvalidData` where the file holds something else.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        let bytes = match fs::read(path) {
            Ok(bytes) => Zeroizing::new(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::make(path)?,
            Err(error) => return Err(error),
        };
        let mut key = Box::new([0; KEY_LEN]);
        if bytes.len() != KEY_LEN {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it does not hold a key of 32 bytes"));
        }
        key.copy_from_slice(&bytes);
        Ok(Self(Arc::new(SecretBox::new(key))))
    }

    fn make(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
        let mut bytes = Zeroizing::new(vec![0; KEY_LEN]);
        SystemRandom::new().fill(&mut bytes).map_err(|_| io::Error::other("no random bytes"))?;
        // Whole or not at all: half a key would open nothing of what another half had sealed.
        let new = path.with_extension("new");
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(new, path)?;
        path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())?;
        Ok(bytes)
    }

    /// Seals a text so that it opens only together with what it belongs to. The base64 of
    /// `nonce(12) ‖ ciphertext ‖ tag(16)`; the nonce is random, which is safe for 2³² values under one key.
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
        open(sealed, |nonce, rest| self.open(nonce, rest, belongs_to))
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

    // Made by two other implementations. Python's `cryptography`:
    //
    //     key, old, other = (bytes(range(n, n + 32)) for n in (0, 100, 200))
    //     def seal(k, text, nonce): return b64encode(nonce + AESGCM(k).encrypt(nonce, text, None)).decode()
    //     seal(key, b"sk-sealed-under-the-current-key", bytes(range(12)))
    //     seal(old, b"sk-sealed-under-the-previous-key", bytes(range(12, 24)))
    //     seal(other, b"sk-sealed-under-another-key", bytes(range(24, 36)))
    //     seal(key, b"", bytes(range(36, 48))), seal(key, b"\xff\xfe", bytes(range(48, 60)))
    //
    // and Go's crypto/cipher, as the backend has it, for `GO` (key as above, nonce 84, 85 … 95):
    //
    //     gcm.Seal(nonce, nonce, []byte("sk-sealed-as-the-backend-does"), nil)
    const KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    const OLD: &str = "ZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXp7fH1+f4CBgoM=";
    const CURRENT: &str = "AAECAwQFBgcICQoLNGn7aKCErn7pbOLl1YwKQPe+4hmTDi0OXQmRqHYMeYwGH6Bo76jk1W4kSnMpmY4=";
    const PREVIOUS: &str = "DA0ODxAREhMUFRYX5zS4Bu22iUp0pKAQnCt8DDMAPLDtHGoCbOjZpomgD9dYydSizkGKusfArxVeOWBf";
    const OTHER: &str = "GBkaGxwdHh8gISIjxk7kK0fxsn556joBQrP7wXY94d0Qk/MjhD8FlNZOOXlI3o0yfB14HcdVbQ==";
    const EMPTY: &str = "JCUmJygpKissLS4vGbZHQ5gjtDJ9T6hNDNsSEA==";
    const NO_TEXT: &str = "MDEyMzQ1Njc4OTo7TMsGMJrksrMajYil0LiWdYIP";
    const GO: &str = "VFVWV1hZWltcXV5fHaiyyXVhEIk2zkb5NPHi4wWCIZe9e8FVPYHCR/r6YLXQjKPp7Z006eRTF5yM";

    fn keyring(previous: Option<&str>) -> Keyring {
        let previous = previous.map(|key| SealingKey::parse(key).unwrap());
        Keyring { current: SealingKey::parse(KEY).unwrap(), previous }
    }

    fn open(keyring: &Keyring, sealed: &str) -> Result<String, OpenError> {
        keyring.open(&sealed.into()).map(|text| text.expose_secret().to_owned())
    }

    #[test]
    fn what_others_sealed_is_opened() {
        let both = keyring(Some(OLD));
        assert_eq!(open(&both, CURRENT).unwrap(), "sk-sealed-under-the-current-key");
        assert_eq!(open(&both, GO).unwrap(), "sk-sealed-as-the-backend-does");
        assert_eq!(open(&both, PREVIOUS).unwrap(), "sk-sealed-under-the-previous-key");
        assert_eq!(open(&both, EMPTY).unwrap(), "");
        assert_eq!(open(&keyring(None), CURRENT).unwrap(), "sk-sealed-under-the-current-key");
        assert_eq!(open(&keyring(None), PREVIOUS), Err(OpenError::Unopened));
        assert_eq!(open(&both, OTHER), Err(OpenError::Unopened));
        assert_eq!(open(&both, NO_TEXT), Err(OpenError::NoText));
    }

    /// Each single bit counts, wherever it is: in the nonce, the ciphertext or the tag.
    #[test]
    fn what_was_changed_is_not_opened() {
        let bytes = STANDARD.decode(CURRENT).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&keyring(Some(OLD)), &STANDARD.encode(changed)), Err(OpenError::Unopened), "bit {bit}");
        }
        for length in 0..bytes.len() {
            let error = if length < SHORTEST { OpenError::Short } else { OpenError::Unopened };
            assert_eq!(open(&keyring(None), &STANDARD.encode(&bytes[..length])), Err(error), "{length} bytes");
        }
        for text in ["!", "AAEC AwQF", &CURRENT[..CURRENT.len() - 1], &CURRENT.replace('+', "-")] {
            assert_eq!(open(&keyring(None), text), Err(OpenError::Base64), "{text}");
        }
    }

    #[test]
    fn a_key_has_32_bytes_and_is_not_shown() {
        for text in ["", "x", "AAEC", &KEY[..43], &STANDARD.encode([1; 31]), &STANDARD.encode([1; 33])] {
            assert!(SealingKey::parse(text).is_none(), "{text}");
        }
        let shown = format!("{:?}", keyring(Some(OLD)));
        assert_eq!(shown.matches("REDACTED").count(), 2, "{shown}");
    }

    #[test]
    fn what_is_sealed_here_opens_with_the_same_key_for_the_same_thing_only() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sealing.key");
        let key = SealingKey::of_file(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let text = SecretString::from("sk-of-a-task-that-waits");
        let (one, two) = (key.seal(&text, b"a").unwrap(), key.seal(&text, b"a").unwrap());
        assert_ne!(one, two, "a nonce of its own for each");
        let again = SealingKey::of_file(&path).unwrap();
        for sealed in [one, two] {
            assert_eq!(again.unseal(&sealed, b"a").unwrap().expose_secret(), text.expose_secret());
            assert!(matches!(again.unseal(&sealed, b"b"), Err(OpenError::Unopened)));
        }
        let other = SealingKey::of_file(&directory.path().join("other")).unwrap();
        assert!(matches!(other.unseal(&key.seal(&text, b"a").unwrap(), b"a"), Err(OpenError::Unopened)));
        fs::write(&path, "short").unwrap();
        assert_eq!(SealingKey::of_file(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
