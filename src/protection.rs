//! What sessions are protected by on this host, and why none may start where that is too little.
//!
//! Looked at once, at the start: what the sandbox offers is tried and not guessed. What a session then really has is
//! told by its own jail and stands in the record of its execution.

use crate::config::{Config, SandboxMode};
use crate::sandbox::confine::{Namespace, Protection};
use crate::sandbox::errand::{NoUser, Reach};
use crate::sandbox::{Mechanism, Sandbox, User};
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What was found.
#[derive(Clone, Debug)]
pub struct Protections {
    /// What a session will have, by name.
    pub names: Vec<String>,
    /// The users that sessions run as, each one its own; `None`: as the sidecar's.
    pub users: Option<RangeInclusive<u32>>,
    /// Why they cannot have users of their own, for people.
    pub no_users: Option<String>,
    /// What the jail of each session has to have done, or it does not start.
    pub require: BTreeSet<Protection>,
    /// What is required and not to be had.
    pub missing: Vec<String>,
    /// Why no session may start, for people.
    pub refused: Option<String>,
    /// Why memory, processes and disk of a session are not bounded, for people; `None`: they are.
    pub unheld: Option<String>,
    /// The same of its CPU time.
    pub unheld_cpu: Option<String>,
}

impl Protections {
    /// Looks. The directories of `config` are to be there, and `command` is OpenCode's executable.
    pub async fn of(config: &Config, sandbox: &Sandbox, command: &Path) -> Self {
        if config.sandbox == SandboxMode::Off {
            tracing::warn!("SANDBOX=off: the agent can reach whatever this process can");
            let names = vec!["subreaper".to_owned()];
            let unheld = Some("SANDBOX=off".to_owned());
            let limits = &config.limits;
            let set = [limits.memory_bytes, limits.pids, limits.cpu_millis, limits.disk_bytes];
            if set.iter().any(Option::is_some) {
                tracing::warn!(
                    "SANDBOX=off: nothing holds SESSION_MEMORY_BYTES, SESSION_PIDS, SESSION_CPU_MILLIS, SESSION_DISK_BYTES"
                );
            }
            let (require, missing) = (BTreeSet::new(), Vec::new());
            return Self {
                names,
                users: None,
                no_users: None,
                require,
                missing,
                refused: None,
                unheld: unheld.clone(),
                unheld_cpu: unheld,
            };
        }
        let mut offered = match sandbox.offers().await {
            Ok(offers) => offers.confined.protections,
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "no program can be confined");
                BTreeSet::new()
            }
        };
        let (users, no_users) = match users(config, sandbox, command).await {
            Ok(users) => (Some(users), None),
            Err(why) => (None, Some(why)),
        };
        if users.is_some() {
            offered.insert(Protection::Uid);
        }
        let mut names: Vec<String> = offered.iter().map(|protection| protection.name().to_owned()).collect();
        let mechanism = sandbox.resources().probe().mechanism;
        names.push(mechanism.to_string());
        if config.limits.disk_bytes.is_some() {
            names.push("disk".to_owned());
        }
        names.push("subreaper".to_owned());
        let unheld_cpu = match sandbox.resources().probe().cpu {
            Some(_) => None,
            None => Some("this host has no control group for CPU time".to_owned()),
        };
        if let (Some(why), Some(_)) = (&unheld_cpu, config.limits.cpu_millis) {
            tracing::warn!(why, "nothing holds SESSION_CPU_MILLIS");
        }
        let has = |name: &String| match name.as_str() {
            "cgroup" => mechanism != Mechanism::Watched,
            name => names.iter().any(|other| other == name),
        };
        let missing: Vec<String> = config.sandbox_require.iter().filter(|name| !has(name)).cloned().collect();
        let require =
            Protection::ALL.into_iter().filter(|p| config.sandbox_require.iter().any(|name| name == p.name()));
        match (config.sandbox, missing.is_empty()) {
            (SandboxMode::Required, false) => {
                let refused = format!(
                    "SANDBOX=required, but this host does not give {} (SANDBOX_REQUIRE); no session starts.",
                    missing.join(", ")
                );
                tracing::error!("{refused}");
                let require = require.collect();
                Self { names, users, no_users, require, missing, refused: Some(refused), unheld: None, unheld_cpu }
            }
            (SandboxMode::Required, true) => {
                let require = require.collect();
                Self { names, users, no_users, require, missing, refused: None, unheld: None, unheld_cpu }
            }
            (_, complete) => {
                if !complete {
                    tracing::warn!(
                        missing = missing.join(", "),
                        "SANDBOX=best-effort: sessions have less than the usual protection"
                    );
                }
                let require = BTreeSet::new();
                Self { names, users, no_users, require, missing, refused: None, unheld: None, unheld_cpu }
            }
        }
    }

    /// Where the sockets of a session are.
    pub fn namespace(&self) -> Namespace {
        let own = self.names.iter().any(|name| name == Protection::Netns.name());
        if own { Namespace::Own } else { Namespace::Sidecars }
    }

    /// For `/ready`: a word, and what it is about.
    pub fn state(&self, mode: SandboxMode) -> (&'static str, String) {
        let names = self.names.join(", ");
        match (&self.refused, mode) {
            (Some(refused), _) => ("failed", format!("{refused} There is: {names}.")),
            (None, SandboxMode::Off) => ("off", "SANDBOX=off: the agent is not confined".to_owned()),
            (None, _) if !self.missing.is_empty() => {
                ("degraded", format!("not here: {}; there is: {names}", self.missing.join(", ")))
            }
            (None, _) => ("ok", names),
        }
    }
}

/// The users that sessions can have, which takes that this process may give them, and that they reach what they need.
/// Otherwise why not, for people.
async fn users(config: &Config, sandbox: &Sandbox, command: &Path) -> Result<RangeInclusive<u32>, String> {
    let range = config.session_uid_range.clone();
    // They are made at the start, so that before the first one what they will be made in counts.
    let existing = |path: &'_ Path| path.ancestors().find(|path| path.exists()).unwrap_or(path).to_owned();
    let (workspace, state) = (existing(&config.workspace_dir), existing(&config.state_dir));
    let work = if workspace == config.workspace_dir { Reach::Work } else { Reach::Pass };
    let places = [(work, &*workspace), (Reach::Pass, &*state), (Reach::Pass, command)];
    let gid = std::fs::metadata(&workspace).map_err(|error| format!("WORKSPACE_DIR: {error}"))?.gid();
    let (first, last) = (User { uid: *range.start(), gid }, User { uid: *range.end(), gid });
    match tokio::try_join!(sandbox.try_user(first, &places), sandbox.try_user(last, &places)) {
        Ok(_) => Ok(range),
        // As for every ordinary user.
        Err(why @ NoUser::Capability(_)) => {
            tracing::info!(%why, "sessions run as the sidecar's own user");
            Err(why.to_string())
        }
        Err(error) => {
            let cause: &dyn std::error::Error = &error;
            tracing::warn!(error = cause, "sessions run as the sidecar's own user, although it may choose others");
            Err(error.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PROTECTIONS;

    #[test]
    fn whatever_the_jail_can_do_can_be_required() {
        let others = ["cgroup", "disk"];
        let mut known: Vec<_> = Protection::ALL.iter().map(|p| p.name()).chain(others).collect();
        known.sort_unstable();
        assert_eq!(known, PROTECTIONS);
    }
}
