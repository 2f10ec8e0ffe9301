//! Checks and makes signed tokens (JWT): that a key of ours signed it, for us, for now. What a token allows is not known
//! here.
//!
//! `alg` is a property of the key: the token's own only chooses among the keys of that algorithm, so a public key can
//! never be taken for a secret.

use super::provider;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind, EncodingKey, Header, Validation};
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::sync::Arc;

/// Whom tokens are for (`aud`).
pub const AUDIENCE: &str = "opencode-sidecar";
/// How far the clock of whoever made a token may be ahead of ours, in seconds: for `nbf`.
const CLOCKS: u64 = 30;
/// The longest token, in bytes.
const LONGEST: usize = 8 * 1024;
/// The shortest DER of an RSA key of 2048 bits, and of its modulus, in bytes.
const LEAST_RSA_DER: usize = 264;
const LEAST_RSA: usize = 256;

/// Why keys cannot be used. Nothing of them is in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("expected a secret of 32 or more visible ASCII characters; in a file up to four, one a line")]
    Secret,
    #[error("expected one public key in PEM (`BEGIN PUBLIC KEY`): RSA of 2048 bits or more, P-256, or Ed25519")]
    Pem,
    #[error("expected a JSON Web Key Set (`{{\"keys\":[…]}}`)")]
    KeySet,
    #[error("no key of the set can be used: {0}")]
    NoKey(String),
}

/// Why a token is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// No token, or none that a key of ours has signed. No more is said of it.
    #[error("The token is not valid.")]
    Unsigned,
    #[error("The token is for another audience: `aud` must be `{AUDIENCE}`.")]
    Audience,
    #[error("The token has expired.")]
    Expired,
    #[error("The token is not valid yet.")]
    Early,
    /// The claim is missing, or not of its type.
    #[error("The token has no good `{0}`.")]
    Claim(String),
    #[error("The token's claims cannot be read.")]
    Unreadable,
}

#[derive(Clone)]
struct Key {
    /// `kid`, where it has one.
    id: Option<String>,
    algorithm: Algorithm,
    key: DecodingKey,
}

/// Keys that tokens are checked with. Cheap to clone; shows nothing of them.
#[derive(Clone)]
pub struct TokenKeys(Arc<[Key]>);

impl fmt::Debug for TokenKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|key| key.algorithm)).finish()
    }
}

impl TokenKeys {
    /// HS256, with any of these: their characters as they are.
    pub fn of_secrets(secrets: &[&str]) -> Self {
        let key = |secret: &&str| Key {
            id: None,
            algorithm: Algorithm::HS256,
            key: DecodingKey::from_secret(secret.as_bytes()),
        };
        Self::of(secrets.iter().map(key).collect())
    }

    /// RS256, ES256 or EdDSA, by what the key is.
    ///
    /// # Errors
    /// Anything but one public key of these kinds; a private one, too.
    pub fn of_pem(text: &str) -> Result<Self, KeyError> {
        let text = text.trim();
        let labels = ["PUBLIC KEY", "RSA PUBLIC KEY"].map(|label| format!("-----BEGIN {label}-----"));
        // The library would take private keys and certificates too, and of several the first.
        if text.matches("-----BEGIN ").count() != 1 || !labels.iter().any(|label| text.starts_with(label)) {
            return Err(KeyError::Pem);
        }
        let bytes = text.as_bytes();
        let read = DecodingKey::from_rsa_pem(bytes)
            .map(|key| (Algorithm::RS256, key))
            .or_else(|_| DecodingKey::from_ec_pem(bytes).map(|key| (Algorithm::ES256, key)))
            .or_else(|_| DecodingKey::from_ed_pem(bytes).map(|key| (Algorithm::EdDSA, key)));
        let (algorithm, key) = read.map_err(|_| KeyError::Pem)?;
        if !is_sound(algorithm, &key) {
            return Err(KeyError::Pem);
        }
        Ok(Self::of(vec![Key { id: None, algorithm, key }]))
    }

    /// The keys of a set that are for signatures of RS256, ES256 or EdDSA; and of each other, why it is left out.
    ///
    /// # Errors
    /// No set, or none of these in it.
    pub fn of_key_set(text: &str) -> Result<(Self, Vec<String>), KeyError> {
        let set: JwkSet = serde_json::from_str(text).map_err(|_| KeyError::KeySet)?;
        let (mut keys, mut left_out) = (Vec::new(), Vec::new());
        for (at, jwk) in set.keys.iter().enumerate() {
            match of_jwk(jwk) {
                Ok((algorithm, key)) => keys.push(Key { id: jwk.common.key_id.clone(), algorithm, key }),
                Err(why) => left_out.push(format!("key {} {why}", at + 1)),
            }
        }
        if keys.is_empty() {
            let why = if left_out.is_empty() { "it is empty".to_owned() } else { left_out.join("; ") };
            return Err(KeyError::NoKey(why));
        }
        Ok((Self::of(keys), left_out))
    }

    fn of(keys: Vec<Key>) -> Self {
        provider::install();
        Self(keys.into())
    }

    /// The claims of a token that one of these keys has signed, for [`AUDIENCE`], and that has not expired.
    ///
    /// # Errors
    /// [`TokenError`]. More than that it is not valid is only said of a token that one of them has signed.
    pub fn claims<T: DeserializeOwned>(&self, token: &str) -> Result<T, TokenError> {
        let header = Some(token).filter(|token| token.len() <= LONGEST);
        let header = header.and_then(|token| jsonwebtoken::decode_header(token).ok()).ok_or(TokenError::Unsigned)?;
        // An extension that has to be understood: we know none (RFC 7515, 4.1.11).
        if header.crit.is_some() {
            return Err(TokenError::Unsigned);
        }
        let mut why = TokenError::Unsigned;
        for key in self.0.iter().filter(|key| fits(key, &header)) {
            match decode(token, key) {
                Ok(claims) => return Ok(claims),
                Err(TokenError::Unsigned) => {}
                Err(signed) => why = signed,
            }
        }
        Err(why)
    }
}

/// Whether a key may have signed a token with this header.
fn fits(key: &Key, header: &Header) -> bool {
    let named = match (&header.kid, &key.id) {
        (Some(wanted), Some(id)) => wanted == id,
        _ => true,
    };
    key.algorithm == header.alg && named
}

fn decode<T: DeserializeOwned>(token: &str, key: &Key) -> Result<T, TokenError> {
    let mut validation = Validation::new(key.algorithm);
    validation.set_required_spec_claims(&["exp", "aud"]);
    validation.set_audience(&[AUDIENCE]);
    validation.validate_nbf = true;
    // For `nbf`. Of `exp` whoever uses the claims looks again, without it: a token ends when it says.
    validation.leeway = CLOCKS;
    let decoded = jsonwebtoken::decode(token, &key.key, &validation).map_err(|error| match error.into_kind() {
        ErrorKind::ExpiredSignature => TokenError::Expired,
        ErrorKind::ImmatureSignature => TokenError::Early,
        ErrorKind::InvalidAudience => TokenError::Audience,
        ErrorKind::MissingRequiredClaim(name) | ErrorKind::InvalidClaimFormat(name) => TokenError::Claim(name),
        // The header was read before, so these are the claims, and the signature is good.
        ErrorKind::Json(_) => TokenError::Unreadable,
        _ => TokenError::Unsigned,
    });
    decoded.map(|decoded| decoded.claims)
}

fn of_jwk(jwk: &Jwk) -> Result<(Algorithm, DecodingKey), &'static str> {
    if jwk.common.public_key_use.as_ref().is_some_and(|purpose| *purpose != PublicKeyUse::Signature) {
        return Err("is not for signatures");
    }
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => Algorithm::RS256,
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => Algorithm::ES256,
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => Algorithm::EdDSA,
        AlgorithmParameters::OctetKey(_) => return Err("is a secret, which belongs into JWT_SECRET_FILE"),
        _ => return Err("is not RSA, P-256 or Ed25519"),
    };
    if jwk.common.key_algorithm.is_some_and(|named| named != KeyAlgorithm::from(algorithm)) {
        return Err("is for an algorithm other than RS256, ES256 or EdDSA");
    }
    let key = DecodingKey::from_jwk(jwk).map_err(|_| "cannot be read")?;
    if is_sound(algorithm, &key) { Ok((algorithm, key)) } else { Err("has not the length of its kind") }
}

/// Whether a key has a length that its algorithm takes: with another one every token would be refused.
fn is_sound(algorithm: Algorithm, key: &DecodingKey) -> bool {
    match (algorithm, key.kind()) {
        (Algorithm::RS256, DecodingKeyKind::RsaModulusExponent { n, .. }) => n.len() >= LEAST_RSA,
        (Algorithm::RS256, DecodingKeyKind::SecretOrDer(der)) => der.len() >= LEAST_RSA_DER,
        (Algorithm::ES256, DecodingKeyKind::SecretOrDer(point)) => point.len() == 65 && point.first() == Some(&4),
        (Algorithm::EdDSA, DecodingKeyKind::SecretOrDer(point)) => point.len() == 32,
        _ => false,
    }
}

/// Makes tokens with a random key of its own, and has what checks them. The key goes with it.
#[derive(Clone)]
pub struct TokenMaker {
    key: EncodingKey,
    keys: TokenKeys,
}

impl fmt::Debug for TokenMaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenMaker")
    }
}

impl TokenMaker {
    /// With a new key.
    ///
    /// # Errors
    /// Where the system gives no random bytes.
    pub fn new() -> Result<Self, std::io::Error> {
        let secret = super::random_token()?;
        let secret = secret.expose_secret();
        Ok(Self { key: EncodingKey::from_secret(secret.as_bytes()), keys: TokenKeys::of_secrets(&[secret]) })
    }

    /// What checks its tokens.
    pub fn keys(&self) -> &TokenKeys {
        &self.keys
    }

    /// A token with these claims; `exp` and `aud` are the caller's to set.
    ///
    /// # Errors
    /// Claims that are no JSON object.
    pub fn make(&self, claims: &impl Serialize) -> Result<SecretString, jsonwebtoken::errors::Error> {
        let token = jsonwebtoken::encode(&Header::new(Algorithm::HS256), claims, &self.key)?;
        Ok(SecretString::from(token))
    }
}
