//! Making secrets, reading them from where they are (`source`), opening sealed ones (`seal`; with the sidecar's own keys,
//! `own`), checking what was signed with one (`token`, over `provider`), and taking them out of texts (`redact`). Keeping
//! them is the business of whoever holds them, as `SecretString`.

mod own;
mod provider;
mod redact;
mod seal;
mod source;
mod token;

pub use own::OwnKeys;
pub use redact::{Cleaned, Redactor, Scanner};
pub use seal::{Keyring, OpenError, SealingKey};
pub use source::{Source, Sources, TokenSource, secrets};
pub use token::{AUDIENCE, KeyError, TokenError, TokenKeys, TokenMaker};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::TryRngCore;
use secrecy::SecretString;

/// A new random secret of 32 bytes from the system's generator, as 43 characters that need no quoting anywhere.
///
/// # Errors
/// Where the system gives no random bytes.
pub fn random_token() -> Result<SecretString, std::io::Error> {
    let mut bytes = [0u8; 32];
    rand::rngs::OsRng.try_fill_bytes(&mut bytes).map_err(std::io::Error::other)?;
    Ok(SecretString::from(URL_SAFE_NO_PAD.encode(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use secrecy::ExposeSecret;

    #[test]
    fn tokens_differ_and_are_plain() {
        let (a, b) = (random_token().unwrap(), random_token().unwrap());
        assert_ne!(a.expose_secret(), b.expose_secret());
        assert_eq!(a.expose_secret().len(), 43);
        assert!(a.expose_secret().bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_'));
    }
}
