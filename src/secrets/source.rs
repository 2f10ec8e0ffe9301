//! Where the credentials of callers come from: the environment, or files that may change.

use super::token::{KeyError, TokenKeys};
use secrecy::{ExposeSecret, SecretString};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The largest file with a credential, in bytes.
const MAX_FILE: u64 = 64 * 1024;
/// The fewest characters of a `JWT_SECRET`: HS256 wants a key as long as its hash (RFC 7518, 3.2).
const LEAST_SECRET: usize = 32;
/// The most secrets that a file may hold: the present one, and those that it replaces.
const MOST_SECRETS: usize = 4;

/// A value, or the file that has it.
#[derive(Clone, Debug)]
pub enum Source {
    /// From the environment, which does not change while the process lives.
    Given(SecretString),
    /// From a file, which is read again when it changes.
    File(PathBuf),
}

impl Source {
    /// The text as it is now.
    ///
    /// # Errors
    /// A file that cannot be read, is no regular one, has more than 64 KiB, or is not UTF-8. The text is not in it.
    pub fn read(&self) -> io::Result<SecretString> {
        let path = match self {
            Self::Given(text) => return Ok(text.clone()),
            Self::File(path) => path,
        };
        // Asked before it is opened: to open a pipe would wait for its other end.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_FILE) {
            return Err(io::Error::other("it has more than 64 KiB"));
        }
        let text = String::from_utf8(bytes).map_err(|_| io::Error::other("it is not UTF-8"))?;
        Ok(SecretString::from(text))
    }

    /// Whether it may change.
    pub fn is_file(&self) -> bool {
        self.path().is_some()
    }

    /// The file, where it is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Given(_) => None,
            Self::File(path) => Some(path),
        }
    }
}

/// What tokens are checked with.
#[derive(Clone, Debug)]
pub enum TokenSource {
    /// `JWT_SECRET`
    Secret(Source),
    /// `JWT_PUBLIC_KEY`
    PublicKey(Source),
    /// `JWT_JWKS_FILE`
    KeySet(Source),
}

impl TokenSource {
    /// Where it comes from.
    pub fn source(&self) -> &Source {
        match self {
            Self::Secret(source) | Self::PublicKey(source) | Self::KeySet(source) => source,
        }
    }

    /// The variable that says it.
    pub fn variable(&self) -> &'static str {
        match self {
            Self::Secret(Source::Given(_)) => "JWT_SECRET",
            Self::Secret(Source::File(_)) => "JWT_SECRET_FILE",
            Self::PublicKey(Source::Given(_)) => "JWT_PUBLIC_KEY",
            Self::PublicKey(Source::File(_)) => "JWT_PUBLIC_KEY_FILE",
            Self::KeySet(_) => "JWT_JWKS_FILE",
        }
    }

    /// The keys in a text that was read from it, and why others that are in it are not among them.
    ///
    /// # Errors
    /// Where there is none that can be used.
    pub fn keys(&self, text: &SecretString) -> Result<(TokenKeys, Vec<String>), KeyError> {
        let text = text.expose_secret();
        match self {
            Self::Secret(_) => {
                let secrets = secrets(text).ok_or(KeyError::Secret)?;
                if secrets.iter().any(|secret| secret.len() < LEAST_SECRET) {
                    return Err(KeyError::Secret);
                }
                Ok((TokenKeys::of_secrets(&secrets), Vec::new()))
            }
            Self::PublicKey(_) => Ok((TokenKeys::of_pem(text)?, Vec::new())),
            Self::KeySet(_) => TokenKeys::of_key_set(text),
        }
    }
}

/// The credentials of callers, as they are configured.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// `OPENCODE_SHARED_SECRET`
    pub shared_secret: Option<Source>,
    pub tokens: Option<TokenSource>,
}

/// The secrets of a text, one a line: visible ASCII, at least one, at most four. `None` for anything else.
pub fn secrets(text: &str) -> Option<Vec<&str>> {
    let lines: Vec<_> = text.lines().collect();
    let good = |line: &&str| !line.is_empty() && line.bytes().all(|b| b.is_ascii_graphic());
    ((1..=MOST_SECRETS).contains(&lines.len()) && lines.iter().all(good)).then_some(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_stand_one_a_line() {
        assert_eq!(secrets("one"), Some(vec!["one"]));
        assert_eq!(secrets("one\n"), Some(vec!["one"]));
        assert_eq!(secrets("new\nold\r\n"), Some(vec!["new", "old"]));
        for bad in ["", "\n", "one\n\ntwo", " one", "two words", "\u{e4}", "a\nb\nc\nd\ne"] {
            assert_eq!(secrets(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn only_a_regular_file_of_text_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| Source::File(directory.path().join(name));
        std::fs::write(directory.path().join("good"), "text").unwrap();
        assert_eq!(file("good").read().unwrap().expose_secret(), "text");
        std::fs::write(directory.path().join("large"), vec![b'x'; 64 * 1024 + 1]).unwrap();
        std::fs::write(directory.path().join("binary"), [0xff]).unwrap();
        nix::unistd::mkfifo(&directory.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for bad in ["absent", "large", "binary", "pipe", "."] {
            assert!(file(bad).read().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_token_secret_is_long() {
        let source = TokenSource::Secret(Source::Given(SecretString::default()));
        let keys = |text: &str| source.keys(&text.into());
        assert!(keys(&"x".repeat(32)).is_ok() && keys(&format!("{}\n{}\n", "x".repeat(32), "y".repeat(40))).is_ok());
        assert!(keys(&"x".repeat(31)).is_err() && keys(&format!("{}\nshort", "x".repeat(32))).is_err());
        assert!(keys("").is_err());
    }
}
