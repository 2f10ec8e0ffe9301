//! How the secrets of the common providers look.
//!
//! From their own pages and from what secret scanners look for (gitleaks, GitHub's list of partner patterns). A shape is a
//! literal beginning and a least number of characters after it; it must not begin in the middle of a word, and what
//! follows must have a digit or a capital, as random characters have: `sk-` begins many a name in a style sheet.

use aho_corasick::{AhoCorasick, Input, MatchKind};
use std::sync::LazyLock;

/// What a look into a text has found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    /// The text ends before it can be said.
    Undecided {
        at: usize,
    },
    /// From `at` to `until`, and after that what `rest` takes.
    Secret {
        at: usize,
        until: usize,
        kind: &'static str,
        rest: Rest,
    },
}

impl Found {
    pub(super) fn at(&self) -> Option<usize> {
        match self {
            Self::Nothing => None,
            Self::Undecided { at } | Self::Secret { at, .. } => Some(*at),
        }
    }

    /// The same in a text that begins so many bytes earlier.
    pub(super) fn moved(self, by: usize) -> Self {
        match self {
            Self::Nothing => Self::Nothing,
            Self::Undecided { at } => Self::Undecided { at: at + by },
            Self::Secret { at, until, kind, rest } => Self::Secret { at: at + by, until: until + by, kind, rest },
        }
    }
}

/// What is still to come of a secret.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum Rest {
    #[default]
    None,
    /// All that may be in a token.
    Token(Body),
    /// Up to the line that ends it. The end of what was swallowed, and how much more may be.
    Pem { last: String, left: usize },
}

/// Longest armoured key: an RSA key of 16,384 bits has some 13 KB.
const MAX_PEM: usize = 32 * 1024;
/// Longest label of one, as in `-----BEGIN OPENSSH PRIVATE KEY-----`.
const MAX_LABEL: usize = 48;

impl Rest {
    pub(super) fn is_over(&self) -> bool {
        *self == Self::None
    }

    /// How many bytes at the beginning of the text belong to it.
    pub(super) fn swallow(&mut self, text: &str) -> usize {
        let taken = match self {
            Self::None => return 0,
            Self::Token(body) => text.bytes().take_while(|byte| body.takes(*byte)).count(),
            Self::Pem { last, left } => match of_pem(text, last, left) {
                (taken, false) => taken,
                (taken, true) => {
                    *self = Self::None;
                    return taken;
                }
            },
        };
        if taken < text.len() {
            *self = Self::None;
        }
        taken
    }
}

/// How much of the text is in the armour, and whether that ends there.
fn of_pem(text: &str, last: &mut String, left: &mut usize) -> (usize, bool) {
    for (at, byte) in text.bytes().enumerate() {
        // Also what stands before a line where it is numbered or compared, and a line's end as a program writes it.
        let is_inside = byte.is_ascii_alphanumeric() || byte.is_ascii_whitespace() || b"+/=-\\:,.|".contains(&byte);
        if !is_inside || *left == 0 {
            return (at, true);
        }
        *left -= 1;
        last.push(char::from(byte));
        if byte == b'-' && last.rfind("-----END ").is_some_and(|end| last[end + 9..].ends_with("-----")) {
            return (at + 1, true);
        }
        if last.len() > 4 * MAX_LABEL {
            last.drain(..2 * MAX_LABEL);
        }
    }
    (text.len(), false)
}

/// The characters of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    Alphanumeric,
    /// Those of base64 in URLs.
    Url,
    /// The same and dots.
    Dotted,
    /// RFC 6750's `b64token`.
    Bearer,
}

impl Body {
    fn takes(self, byte: u8) -> bool {
        byte.is_ascii_alphanumeric()
            || match self {
                Self::Alphanumeric => false,
                Self::Url => byte == b'-' || byte == b'_',
                Self::Dotted => b"-_.".contains(&byte),
                Self::Bearer => b"-._~+/=".contains(&byte),
            }
    }
}

struct Shape {
    kind: &'static str,
    begins: &'static str,
    body: Body,
    /// So many characters of `body` follow at least.
    least: usize,
}

impl Shape {
    /// Whether it may begin at `at`, by what stands before.
    fn may_begin(&self, bytes: &[u8], at: usize) -> bool {
        // No word has an armour's dashes in its middle.
        self.kind == PEM || stands_alone(bytes, at)
    }
}

const fn shape(kind: &'static str, begins: &'static str, body: Body, least: usize) -> Shape {
    Shape { kind, begins, body, least }
}

const SHAPES: &[Shape] = &[
    // OpenAI, Anthropic (`sk-ant-`), OpenRouter (`sk-or-`), DeepSeek and others.
    shape("a provider's key", "sk-", Body::Url, 20),
    shape("a Google key", "AIza", Body::Url, 35),
    shape("a Google token", "ya29.", Body::Url, 20),
    shape("a Groq key", "gsk_", Body::Alphanumeric, 40),
    shape("an xAI key", "xai-", Body::Alphanumeric, 40),
    shape("a Perplexity key", "pplx-", Body::Alphanumeric, 40),
    shape("a Hugging Face token", "hf_", Body::Alphanumeric, 30),
    shape("a Replicate token", "r8_", Body::Alphanumeric, 36),
    shape("a GitHub token", "ghp_", Body::Alphanumeric, 36),
    shape("a GitHub token", "gho_", Body::Alphanumeric, 36),
    shape("a GitHub token", "ghu_", Body::Alphanumeric, 36),
    shape("a GitHub token", "ghs_", Body::Alphanumeric, 36),
    shape("a GitHub token", "ghr_", Body::Alphanumeric, 36),
    shape("a GitHub token", "github_pat_", Body::Url, 22),
    shape("a GitLab token", "glpat-", Body::Dotted, 20),
    shape("an AWS key", "AKIA", Body::Alphanumeric, 16),
    shape("an AWS key", "ASIA", Body::Alphanumeric, 16),
    shape("a Slack token", "xoxb-", Body::Url, 20),
    shape("a Slack token", "xoxp-", Body::Url, 20),
    shape("a Slack token", "xoxa-", Body::Url, 20),
    shape("a Slack token", "xoxs-", Body::Url, 20),
    shape("a Slack token", "xapp-", Body::Url, 20),
    shape("an npm token", "npm_", Body::Alphanumeric, 36),
    shape("a PyPI token", "pypi-", Body::Url, 50),
    shape("a Stripe key", "sk_live_", Body::Alphanumeric, 20),
    shape("a Stripe key", "rk_live_", Body::Alphanumeric, 20),
    shape("a Stripe key", "sk_test_", Body::Alphanumeric, 20),
    shape("a SendGrid key", "SG.", Body::Dotted, 40),
    shape("a DigitalOcean token", "dop_v1_", Body::Alphanumeric, 40),
    shape(BEARER, "Bearer ", Body::Bearer, 20),
    shape(BEARER, "bearer ", Body::Bearer, 20),
    shape(BEARER, "BEARER ", Body::Bearer, 20),
    // The payload is an object too, so the second part begins as the first.
    shape(JWT, "eyJ", Body::Dotted, 0),
    shape(PEM, "-----BEGIN ", Body::Dotted, 0),
];

const BEARER: &str = "a bearer token";
const JWT: &str = "a signed token";
const PEM: &str = "a private key";
/// The longest header of a signed token that is known as one.
const MAX_HEADER: usize = 1024;

/// Finds the beginnings. The literals are the program's own, so there is no other way to fail than for a wrong one.
static BEGINNINGS: LazyLock<Option<AhoCorasick>> = LazyLock::new(|| {
    let begins = SHAPES.iter().map(|shape| shape.begins);
    AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(begins).ok()
});

/// Their kinds, each once.
pub(super) fn kinds() -> impl Iterator<Item = &'static str> {
    SHAPES
        .iter()
        .enumerate()
        .filter(|(at, shape)| !SHAPES[..*at].iter().any(|s| s.kind == shape.kind))
        .map(|(_, s)| s.kind)
}

/// How they begin.
#[cfg(test)]
pub(super) fn beginnings() -> impl Iterator<Item = &'static str> {
    SHAPES.iter().map(|shape| shape.begins)
}

/// The first of the shapes at or after `from`. Without `whole`, more may follow the text.
pub(super) fn find(text: &str, from: usize, whole: bool) -> Found {
    let Some(beginnings) = BEGINNINGS.as_ref() else { return Found::Nothing };
    let mut at = from;
    while let Some(found) = beginnings.find(Input::new(text).range(at..)) {
        let shape = &SHAPES[found.pattern().as_usize()];
        match follow(shape, text, found.start(), found.end(), whole) {
            Found::Nothing => at = found.start() + 1,
            other => return other,
        }
    }
    if whole {
        return Found::Nothing;
    }
    let (bytes, longest) = (text.as_bytes(), SHAPES.iter().map(|shape| shape.begins.len()).max().unwrap_or(0));
    let begins = |at: &usize| {
        let end = &bytes[*at..];
        let begins = |shape: &Shape| shape.begins.as_bytes().starts_with(end);
        SHAPES.iter().any(|shape| begins(shape) && shape.may_begin(bytes, *at))
    };
    let earliest = (bytes.len() + 1).saturating_sub(longest).max(at.min(bytes.len()));
    let latest = bytes.len().saturating_sub(super::MIN_BEGINNING - 1);
    (earliest..latest).find(begins).map_or(Found::Nothing, |at| Found::Undecided { at })
}

/// What it is that begins at `at`, and whose beginning ends at `end`.
fn follow(shape: &Shape, text: &str, at: usize, end: usize, whole: bool) -> Found {
    let bytes = text.as_bytes();
    if !shape.may_begin(bytes, at) {
        return Found::Nothing;
    }
    if shape.kind == PEM {
        return private_key(text, at, end, whole);
    }
    if shape.kind == JWT {
        return signed_token(text, at, end, whole);
    }
    let body = &bytes[end..];
    let length = body.iter().take(shape.least).take_while(|byte| shape.body.takes(**byte)).count();
    if length < shape.least {
        return undecided(!whole && length == body.len(), at);
    }
    let is_random = body[..length].iter().any(|byte| byte.is_ascii_digit() || byte.is_ascii_uppercase());
    if !is_random {
        return Found::Nothing;
    }
    // The word before the token is no secret.
    let at = if shape.kind == BEARER { end } else { at };
    Found::Secret { at, until: end + length, kind: shape.kind, rest: Rest::Token(shape.body) }
}

/// `header.payload.signature`, of which the first two are objects.
fn signed_token(text: &str, at: usize, end: usize, whole: bool) -> Found {
    let rest = &text.as_bytes()[end..];
    let header = rest.iter().take(MAX_HEADER).take_while(|byte| Body::Url.takes(**byte)).count();
    let after = &rest[header..];
    let next = b".eyJ";
    if after.len() < next.len() && next.starts_with(after) {
        return undecided(!whole, at);
    }
    if header < 10 || !after.starts_with(next) {
        return Found::Nothing;
    }
    Found::Secret { at, until: end + header + next.len(), kind: JWT, rest: Rest::Token(Body::Dotted) }
}

fn private_key(text: &str, at: usize, end: usize, whole: bool) -> Found {
    let rest = &text.as_bytes()[end..];
    let label = rest.iter().take(MAX_LABEL).take_while(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || **b == b' ');
    let label = label.count();
    let dashes = rest[label..].iter().take(5).take_while(|byte| **byte == b'-').count();
    if dashes < 5 {
        return undecided(!whole && label + dashes == rest.len(), at);
    }
    if !text[end..end + label].contains("PRIVATE KEY") {
        return Found::Nothing;
    }
    let rest = Rest::Pem { last: String::new(), left: MAX_PEM };
    Found::Secret { at, until: end + label + dashes, kind: PEM, rest }
}

fn undecided(more_may_follow: bool, at: usize) -> Found {
    if more_may_follow { Found::Undecided { at } } else { Found::Nothing }
}

/// Whether what begins at `at` is not the middle of a word. A colour and a written line's end (`\n`) belong to no word.
fn stands_alone(bytes: &[u8], at: usize) -> bool {
    let before = &bytes[..at];
    let Some((last, before)) = before.split_last() else { return true };
    if !last.is_ascii_alphanumeric() {
        return true;
    }
    if before.last() == Some(&b'\\') && b"nrt".contains(last) {
        return true;
    }
    let digits = before.iter().rev().take_while(|byte| byte.is_ascii_digit() || **byte == b';').count();
    last.is_ascii_alphabetic() && before[..before.len() - digits].ends_with(b"\x1b[")
}
