//! Taking secrets out of what goes into a log: the session's own key, and what looks like somebody's.
//!
//! Text comes in pieces, and a secret may be cut anywhere. So a [`Scanner`] goes along with a stream: it holds back an end
//! that may be the beginning of a secret (never more than [`MAX_HELD`] bytes, mostly nothing), and once it has seen enough of
//! one it swallows the rest as it comes. Its output does not depend on where the text was cut, but for one thing: of a
//! secret that is cut after one or two characters, those stay, since nearly every text ends like that.
//!
//! It finds what is written as it is. What somebody has encoded, reversed or spelt is not found: whoever holds a secret
//! and a shell can always write it so that no filter knows it. The shapes are in `shapes`.

mod shapes;

use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use shapes::{Found, Rest};

/// The most of a text that is held back, in bytes: an own key of the longest that is taken, or a shape's beginning.
const MAX_HELD: usize = 4096;
/// An own key that is shorter is not looked for: it would be found in every text.
const MIN_OWN: usize = 8;
/// The least of a beginning that is held back.
const MIN_BEGINNING: usize = 3;
/// How much of what was given out is remembered: what stands before a secret tells whether it is one.
const MAX_BEFORE: usize = 24;

const OWN: &str = "the session's key";

/// What is looked for.
#[derive(Clone, Debug, Default)]
pub struct Redactor {
    own: Vec<SecretString>,
    shapes: bool,
}

/// A text without its secrets, and what they were.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    pub text: String,
    /// The kind of each secret, once where it begins.
    pub found: Vec<&'static str>,
}

impl Redactor {
    /// Looks for the usual shapes, where `shapes` says so, and for nobody's own key yet.
    pub fn new(shapes: bool) -> Self {
        Self { own: Vec::new(), shapes }
    }

    /// What there is to be found, each once.
    pub fn kinds() -> impl Iterator<Item = &'static str> {
        std::iter::once(OWN).chain(shapes::kinds())
    }

    /// Whether it looks for the usual shapes from now on.
    pub fn look_for_shapes(&mut self, shapes: bool) {
        self.shapes = shapes;
    }

    /// Looks for this very text too, from now on.
    pub fn hide(&mut self, own: &SecretString) {
        let is_known = self.own.iter().any(|known| known.expose_secret() == own.expose_secret());
        if (MIN_OWN..=MAX_HELD).contains(&own.expose_secret().len()) && !is_known {
            self.own.push(own.clone());
        }
    }

    /// A text that is whole; `None` where there is no secret in it.
    pub fn clean(&self, text: &str) -> Option<Cleaned> {
        // Most texts have none, and are not copied.
        if !matches!(self.find(text, 0, true), Found::Nothing) {
            let mut scanner = Scanner::default();
            let mut cleaned = Cleaned::default();
            scanner.run(self, text, true, &mut cleaned);
            return Some(cleaned);
        }
        None
    }

    /// Every text of a value, the names of members among them; adds what was found to `found`.
    pub fn clean_value(&self, value: &mut Value, found: &mut Vec<&'static str>) {
        match value {
            Value::String(text) => {
                if let Some(cleaned) = self.clean(text) {
                    *text = cleaned.text;
                    found.extend(cleaned.found);
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.clean_value(item, found)),
            Value::Object(members) => {
                let is_clean = members.keys().all(|name| self.clean(name).is_none());
                if !is_clean {
                    let all = std::mem::take(members);
                    members.extend(all.into_iter().map(|(name, value)| match self.clean(&name) {
                        Some(cleaned) => {
                            found.extend(cleaned.found);
                            (cleaned.text, value)
                        }
                        None => (name, value),
                    }));
                }
                members.values_mut().for_each(|member| self.clean_value(member, found));
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// The first secret at or after `from`, by where it begins.
    fn find(&self, text: &str, from: usize, whole: bool) -> Found {
        let own = self.own.iter().map(|own| find_own(own.expose_secret(), text, from, whole));
        let shape = if self.shapes { shapes::find(text, from, whole) } else { Found::Nothing };
        own.chain([shape]).filter(|found| found.at().is_some()).min_by_key(Found::at).unwrap_or(Found::Nothing)
    }
}

fn find_own(own: &str, text: &str, from: usize, whole: bool) -> Found {
    if let Some(at) = text[from..].find(own) {
        let at = from + at;
        return Found::Secret { at, until: at + own.len(), kind: OWN, rest: Rest::None };
    }
    if !whole {
        let most = (own.len() - 1).min(text.len() - from);
        let begins = |length: &usize| own.as_bytes().starts_with(&text.as_bytes()[text.len() - length..]);
        if let Some(length) = (MIN_BEGINNING..=most).rev().find(begins) {
            return Found::Undecided { at: text.len() - length };
        }
    }
    Found::Nothing
}

/// Goes along with one stream of text.
#[derive(Debug, Default)]
pub struct Scanner {
    /// The end of what was given out.
    before: String,
    /// What is not given out yet.
    held: String,
    /// What is left of a secret that has begun.
    rest: Rest,
}

impl Scanner {
    /// The next piece; returns what can be given out, which may be nothing.
    pub fn push(&mut self, redactor: &Redactor, piece: &str) -> Cleaned {
        let mut cleaned = Cleaned::default();
        self.run(redactor, piece, false, &mut cleaned);
        cleaned
    }

    /// Nothing follows: what was held back.
    pub fn finish(&mut self, redactor: &Redactor) -> Cleaned {
        let mut cleaned = Cleaned::default();
        self.run(redactor, "", true, &mut cleaned);
        *self = Self::default();
        cleaned
    }

    fn run(&mut self, redactor: &Redactor, piece: &str, whole: bool, cleaned: &mut Cleaned) {
        let before = self.before.len();
        let mut text = std::mem::take(&mut self.before);
        text.push_str(&self.held);
        text.push_str(piece);
        self.held.clear();
        // Up to here all is given out; a secret that begins a little before it has lost its first characters to the reader.
        let mut done = before;
        let mut secret_until = 0;
        loop {
            let swallowed = self.rest.swallow(&text[done..]);
            if swallowed > 0 {
                done += swallowed;
                secret_until = done;
            }
            if !self.rest.is_over() {
                // All of it belonged to the secret.
                break;
            }
            let mut from = done.saturating_sub(if done == before { MIN_BEGINNING - 1 } else { 0 });
            while !text.is_char_boundary(from) {
                from += 1;
            }
            // What follows a secret stands for itself, as it does where the secret was given out before.
            match redactor.find(&text[secret_until..], from - secret_until, whole).moved(secret_until) {
                Found::Nothing => {
                    cleaned.text.push_str(&text[done..]);
                    done = text.len();
                    break;
                }
                Found::Undecided { at } => {
                    let at = at.max(done);
                    cleaned.text.push_str(&text[done..at]);
                    self.held.push_str(&text[at..]);
                    done = at;
                    break;
                }
                Found::Secret { at, until, kind, rest } => {
                    cleaned.text.push_str(&text[done..at.max(done)]);
                    cleaned.text.push_str("[redacted: ");
                    cleaned.text.push_str(kind);
                    cleaned.text.push(']');
                    cleaned.found.push(kind);
                    (done, secret_until) = (until, until);
                    self.rest = rest;
                }
            }
        }
        let mut keep = done.saturating_sub(MAX_BEFORE).max(secret_until);
        while !text.is_char_boundary(keep) {
            keep += 1;
        }
        text.truncate(done);
        text.drain(..keep);
        self.before = text;
    }
}

#[cfg(test)]
mod tests;
