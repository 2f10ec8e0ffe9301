//! The credentials in force, and how they are replaced without a restart.
//!
//! What comes from a file is read again at SIGHUP, and when the file changes. A file that cannot be used changes nothing:
//! what was read before stays in force, the log and `/ready` say so. What a new file does not have any more is refused
//! from then on; streams that are open go on until their own token ends.

use crate::api::auth::Auth;
use crate::secrets::{Source, Sources, TokenKeys, TokenSource, secrets};
use crate::tasks::Tasks;
use crate::telemetry::chain;
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest as _, Sha256};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;
use subtle::{Choice, ConstantTimeEq};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(2);

/// A credential that cannot be used. Nothing of it is in here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable}: {problem}")]
pub struct CredentialError {
    /// The variable that says it.
    pub variable: &'static str,
    /// What is wrong with what it says.
    pub problem: String,
}

/// Everything that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CredentialErrors(pub Vec<CredentialError>);

impl std::fmt::Display for CredentialErrors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let errors: Vec<_> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&errors.join("; "))
    }
}

impl std::error::Error for CredentialErrors {}

type Digest = [u8; 32];

/// What is in force.
#[derive(Clone, Default)]
pub(super) struct Credentials {
    /// Digests, so that a comparison tells neither content nor length.
    shared: Vec<Digest>,
    keys: Option<TokenKeys>,
}

impl Credentials {
    /// Whether the token is a shared secret. Takes the same time for each wrong one.
    pub(super) fn is_shared_secret(&self, token: &str) -> bool {
        let token: Digest = Sha256::digest(token.as_bytes()).into();
        let same = self.shared.iter().fold(Choice::from(0), |same, secret| same | secret.ct_eq(&token));
        same.into()
    }

    /// What tokens are checked with.
    pub(super) fn keys(&self) -> Option<&TokenKeys> {
        self.keys.as_ref()
    }
}

/// The two kinds of credentials, which are read apart from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Shared,
    Tokens,
}

/// What was read last of one kind.
#[derive(Clone, Debug, Default)]
struct Read {
    /// Of the text, or of the error.
    seen: Option<Digest>,
    /// The same of a change that was seen once: a file that is just written may not be whole.
    once: Option<Digest>,
    trouble: Option<String>,
}

/// The credentials and where they come from.
pub(super) struct Held {
    sources: Sources,
    now: RwLock<Arc<Credentials>>,
    reads: Mutex<[Read; 2]>,
    /// The shared secret for callbacks.
    own: watch::Sender<SecretString>,
}

impl Held {
    /// # Errors
    /// Every source that cannot be used.
    pub(super) fn new(sources: Sources) -> Result<Self, CredentialErrors> {
        let held = Self {
            sources,
            now: RwLock::default(),
            reads: Mutex::default(),
            own: watch::channel(SecretString::default()).0,
        };
        let errors = held.read(true);
        if errors.is_empty() { Ok(held) } else { Err(CredentialErrors(errors)) }
    }

    pub(super) fn now(&self) -> Arc<Credentials> {
        Arc::clone(&self.now.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The variables that say them.
    pub(super) fn variables(&self) -> Vec<&'static str> {
        let shared = self.sources.shared_secret.as_ref().map(shared_variable);
        shared.into_iter().chain(self.sources.tokens.as_ref().map(TokenSource::variable)).collect()
    }

    /// The shared secret as it is, and as it will be.
    pub(super) fn own(&self) -> Option<watch::Receiver<SecretString>> {
        self.sources.shared_secret.as_ref().map(|_| self.own.subscribe())
    }

    /// What could not be read again.
    pub(super) fn trouble(&self) -> Option<String> {
        let reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        let troubles: Vec<_> = reads.iter().filter_map(|read| read.trouble.clone()).collect();
        (!troubles.is_empty()).then(|| troubles.join("; "))
    }

    fn has_files(&self) -> bool {
        let shared = self.sources.shared_secret.as_ref().is_some_and(Source::is_file);
        shared || self.sources.tokens.as_ref().is_some_and(|tokens| tokens.source().is_file())
    }

    /// Reads what there is, and puts it in force where it can be used. `at_once`: also what was not seen before.
    pub(super) fn read(&self, at_once: bool) -> Vec<CredentialError> {
        let mut errors = Vec::new();
        if let Some(source) = &self.sources.shared_secret {
            errors.extend(self.read_kind(Kind::Shared, source, shared_variable(source), at_once));
        }
        if let Some(tokens) = &self.sources.tokens {
            errors.extend(self.read_kind(Kind::Tokens, tokens.source(), tokens.variable(), at_once));
        }
        errors
    }

    fn read_kind(&self, kind: Kind, source: &Source, variable: &'static str, at_once: bool) -> Option<CredentialError> {
        let text = source.read().map_err(|error| format!("the file cannot be read: {}", chain(&error)));
        let digest = |bytes: &[u8]| Digest::from(Sha256::digest(bytes));
        let seen = match &text {
            Ok(text) => digest(text.expose_secret().as_bytes()),
            Err(problem) => digest(problem.as_bytes()),
        };
        let mut reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        let read = &mut reads[usize::from(kind == Kind::Tokens)];
        let (known, begun) = (read.seen == Some(seen), read.seen.is_some());
        if !at_once && (known || read.once != Some(seen)) {
            read.once = (!known).then_some(seen);
            return None;
        }
        read.seen = Some(seen);
        read.once = None;
        let taken = text.and_then(|text| self.put_in_force(kind, &text));
        read.trouble = taken.as_ref().err().map(|problem| format!("{variable}: {problem}"));
        match taken {
            Ok(left_out) => {
                for why in left_out {
                    tracing::warn!(variable, "a part of it is not used: {why}");
                }
                if begun {
                    tracing::info!(variable, changed = !known, "credentials were read again");
                }
                None
            }
            Err(problem) => {
                if begun {
                    tracing::error!(variable, problem, "what was read before stays in force");
                }
                Some(CredentialError { variable, problem })
            }
        }
    }

    /// Gives what of the text is not used, and why.
    fn put_in_force(&self, kind: Kind, text: &SecretString) -> Result<Vec<String>, String> {
        let mut next = Credentials::clone(&self.now());
        let mut left_out = Vec::new();
        match (kind, &self.sources.tokens) {
            (Kind::Shared, _) => {
                let all = secrets(text.expose_secret())
                    .ok_or("expected up to four secrets of visible ASCII characters, one a line")?;
                next.shared = all.iter().map(|secret| Sha256::digest(secret.as_bytes()).into()).collect();
                self.own.send_replace(SecretString::from(all[0]));
            }
            (Kind::Tokens, Some(tokens)) => {
                let (keys, unused) = tokens.keys(text).map_err(|error| error.to_string())?;
                next.keys = Some(keys);
                left_out = unused;
            }
            (Kind::Tokens, None) => {}
        }
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        Ok(left_out)
    }
}

fn shared_variable(source: &Source) -> &'static str {
    if source.is_file() { "OPENCODE_SHARED_SECRET_FILE" } else { "OPENCODE_SHARED_SECRET" }
}

/// Follows the files until the sidecar ends. Without any, SIGHUP keeps its usual meaning.
pub(super) fn watch_files(auth: &Auth, tasks: &Tasks) {
    if !auth.held().has_files() {
        return;
    }
    let (auth, on) = (auth.clone(), tasks.clone());
    tasks.spawn("credentials", async move {
        let mut hangup = match signal(SignalKind::hangup()) {
            Ok(hangup) => Some(hangup),
            Err(error) => {
                tracing::warn!(%error, "SIGHUP cannot be awaited; files are still looked at");
                None
            }
        };
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let asked = async {
                match &mut hangup {
                    Some(hangup) => hangup.recv().await,
                    None => std::future::pending().await,
                }
            };
            let at_once = tokio::select! {
                _ = asked => true,
                _ = look.tick() => false,
                () = on.shutdown_token().cancelled() => return,
            };
            let auth = auth.clone();
            // What went wrong is in the log, and held for `/ready`.
            let _ = on.spawn_blocking(move || auth.held().read(at_once)).await;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    fn held(shared: &Path, tokens: &Path) -> Result<Held, CredentialErrors> {
        let file = |path: &Path| Source::File(PathBuf::from(path));
        Held::new(Sources { shared_secret: Some(file(shared)), tokens: Some(TokenSource::Secret(file(tokens))) })
    }

    #[test]
    fn a_bad_file_changes_nothing_and_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let (shared, tokens) = (directory.path().join("shared"), directory.path().join("tokens"));
        let errors = held(&shared, &tokens).err().unwrap();
        let variables: Vec<_> = errors.0.iter().map(|error| error.variable).collect();
        assert_eq!(variables, ["OPENCODE_SHARED_SECRET_FILE", "JWT_SECRET_FILE"]);

        std::fs::write(&shared, "first\n").unwrap();
        std::fs::write(&tokens, "k".repeat(32)).unwrap();
        let held = held(&shared, &tokens).unwrap();
        let own = held.own().unwrap();
        let own = || own.borrow().expose_secret().to_owned();
        assert!(held.now().is_shared_secret("first") && !held.now().is_shared_secret("first\n"));
        assert_eq!(own(), "first");

        std::fs::write(&shared, "hidden word").unwrap();
        assert_eq!(held.read(true).len(), 1);
        assert!(held.now().is_shared_secret("first") && held.trouble().unwrap().contains("_SECRET_FILE"));
        assert!(!held.trouble().unwrap().contains("hidden"));

        std::fs::write(&shared, "second\nfirst").unwrap();
        assert!(held.read(true).is_empty() && held.trouble().is_none());
        assert!(held.now().is_shared_secret("first") && held.now().is_shared_secret("second"));
        assert_eq!(own(), "second");
        std::fs::write(&shared, "second").unwrap();
        assert!(held.read(true).is_empty() && !held.now().is_shared_secret("first"));
        assert!(held.now().keys().is_some(), "the other kind stays as it is");
    }

    #[test]
    fn a_change_is_taken_when_it_was_seen_twice() {
        let directory = tempfile::tempdir().unwrap();
        let (shared, tokens) = (directory.path().join("shared"), directory.path().join("tokens"));
        std::fs::write(&shared, "first").unwrap();
        std::fs::write(&tokens, "k".repeat(32)).unwrap();
        let held = held(&shared, &tokens).unwrap();
        let looked = |secret: &str| {
            assert!(held.read(false).is_empty());
            held.now().is_shared_secret(secret)
        };
        std::fs::write(&shared, "sec").unwrap();
        assert!(!looked("sec"));
        std::fs::write(&shared, "second").unwrap();
        assert!(!looked("second"));
        assert!(looked("second") && looked("second"));
        // A file that is gone, and comes back as it was, is no change.
        std::fs::remove_file(&shared).unwrap();
        assert!(looked("second"));
        std::fs::write(&shared, "second").unwrap();
        assert!(looked("second") && held.trouble().is_none());
        std::fs::remove_file(&shared).unwrap();
        assert!(looked("second") && held.read(false).len() == 1);
        assert!(held.now().is_shared_secret("second") && held.trouble().is_some());
    }
}
