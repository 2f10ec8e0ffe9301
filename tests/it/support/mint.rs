//! Makes tokens as a backend would, and as one should not: by hand, with `ring`, so that nothing of what checks them takes
//! part.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, PublicKeyData};
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256, RsaKeyPair,
};
use ring::{hmac, rsa};
use serde_json::{Value, json};

/// Made for these tests and nothing else: `ring` makes none.
const RSA_KEY: &str = include_str!("rsa.pem");

/// What signs.
pub(crate) enum Signer {
    Hmac(Vec<u8>),
    Rsa(KeyPair),
    P256(KeyPair),
    Ed25519(KeyPair),
    /// Nothing: the signature is empty.
    Nobody,
}

impl Signer {
    pub(crate) fn hmac(secret: &str) -> Self {
        Self::Hmac(secret.as_bytes().to_vec())
    }

    pub(crate) fn rsa() -> Self {
        Self::Rsa(KeyPair::from_pem(RSA_KEY).unwrap())
    }

    pub(crate) fn p256() -> Self {
        Self::P256(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap())
    }

    pub(crate) fn ed25519() -> Self {
        Self::Ed25519(KeyPair::generate_for(&PKCS_ED25519).unwrap())
    }

    pub(crate) fn algorithm(&self) -> &'static str {
        match self {
            Self::Hmac(_) => "HS256",
            Self::Rsa(_) => "RS256",
            Self::P256(_) => "ES256",
            Self::Ed25519(_) => "EdDSA",
            Self::Nobody => "none",
        }
    }

    fn pair(&self) -> &KeyPair {
        match self {
            Self::Rsa(pair) | Self::P256(pair) | Self::Ed25519(pair) => pair,
            Self::Hmac(_) | Self::Nobody => unreachable!("it has no public key"),
        }
    }

    pub(crate) fn public_pem(&self) -> String {
        self.pair().public_key_pem()
    }

    /// The public key as a member of a set.
    pub(crate) fn jwk(&self, id: &str) -> Value {
        let raw = self.pair().der_bytes();
        let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        match self {
            Self::Rsa(pair) => {
                let key = RsaKeyPair::from_pkcs8(&pair.serialize_der()).unwrap();
                let parts: rsa::PublicKeyComponents<Vec<u8>> = key.public().into();
                json!({ "kty": "RSA", "kid": id, "use": "sig", "alg": "RS256", "n": text(&parts.n), "e": text(&parts.e) })
            }
            Self::P256(_) => {
                json!({ "kty": "EC", "kid": id, "crv": "P-256", "x": text(&raw[1..33]), "y": text(&raw[33..65]) })
            }
            _ => json!({ "kty": "OKP", "kid": id, "crv": "Ed25519", "alg": "EdDSA", "x": text(raw) }),
        }
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match self {
            Self::Hmac(secret) => hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), message).as_ref().to_vec(),
            Self::Rsa(pair) => {
                let key = RsaKeyPair::from_pkcs8(&pair.serialize_der()).unwrap();
                let mut signature = vec![0; key.public().modulus_len()];
                key.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).unwrap();
                signature
            }
            Self::P256(pair) => {
                let der = pair.serialize_der();
                let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &der, &random).unwrap();
                key.sign(&random, message).unwrap().as_ref().to_vec()
            }
            Self::Ed25519(pair) => {
                let key = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&pair.serialize_der()).unwrap();
                assert!(!key.public_key().as_ref().is_empty());
                key.sign(message).as_ref().to_vec()
            }
            Self::Nobody => Vec::new(),
        }
    }

    /// A token with this header and these claims.
    pub(crate) fn token_with(&self, header: &Value, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(header), part(claims));
        let signature = URL_SAFE_NO_PAD.encode(self.sign(message.as_bytes()));
        format!("{message}.{signature}")
    }

    /// A token as it should be.
    pub(crate) fn token(&self, claims: &Value) -> String {
        self.token_with(&json!({ "alg": self.algorithm(), "typ": "JWT" }), claims)
    }
}

/// Seconds since the epoch, some of them from now.
pub(crate) fn in_seconds(seconds: i64) -> i64 {
    chrono::Utc::now().timestamp() + seconds
}

/// Claims that are good for ten minutes.
pub(crate) fn claims(project: &str, scope: &str) -> Value {
    json!({ "aud": "opencode-sidecar", "exp": in_seconds(600), "project_id": project, "scope": scope })
}

/// The same with some changed, or left out where they are null.
pub(crate) fn but(claims: &Value, changes: Value) -> Value {
    let mut claims = claims.clone();
    for (name, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(claims.as_object_mut().unwrap().remove(name)),
            value => claims[name] = value.clone(),
        }
    }
    claims
}
