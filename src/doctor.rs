//! What this host offers, and what a session would get: for a person or a script, beside a sidecar or before one.
//!
//! It tries what can be tried without a trace, asks for rights where trying would leave one, and says so where neither
//! tells. It makes nothing that stays, moves no process, and takes no lock.

use crate::app::is_ephemeral;
use crate::config::{Config, SandboxMode};
use crate::opencode::OPENCODE_VERSION;
use crate::opencode::launch::find_command;
use crate::protection::Protections;
use crate::sandbox::confine::{Offers, Protection};
use crate::sandbox::{KillMeans, Resources, RunError, Sandbox, Spec};
use crate::store::{DatabaseOptions, Embedded, Role, Store, StoreError};
use crate::tasks::Tasks;
use crate::telemetry::chain;
use nix::unistd::{AccessFlags, eaccess};
use rustix::thread::{CapabilitySet, capabilities};
use serde::Serialize;
use std::error::Error;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long OpenCode may take to tell its version, and the database to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// How one thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It is there.
    Ok,
    /// It is not there, or less than it could be; a session starts all the same.
    Missing,
    /// It cannot be told from here; the detail says why.
    Unknown,
    /// No session could start, for this.
    Failed,
}

impl State {
    /// The word in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Missing => "missing",
            Self::Unknown => "unknown",
            Self::Failed => "failed",
        }
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about; the names of protections are those of `SANDBOX_REQUIRE`.
    pub name: String,
    /// How it stands.
    pub state: State,
    /// What was seen; nothing secret.
    pub detail: String,
}

/// All findings, in the order in which a person wants them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether a session could start with the present configuration.
    pub ready: bool,
    /// What a session would be protected by, by name.
    pub protections: Vec<String>,
    /// The findings.
    pub findings: Vec<Finding>,
}

impl Report {
    fn add(&mut self, name: &str, state: State, detail: impl Into<String>) {
        self.findings.push(Finding { name: name.to_owned(), state, detail: detail.into() });
    }

    /// What keeps sessions from starting.
    pub fn failures(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.state == State::Failed)
    }
}

/// Looks. `executable` is our own file; `config` is as it was read, or what is wrong with it.
pub async fn examine(executable: PathBuf, config: Result<Config, impl Error>) -> Report {
    let mut report = Report::default();
    let tasks = Tasks::new();
    match &config {
        Ok(_) => report.add("configuration", State::Ok, "every variable is valid"),
        Err(errors) => report.add("configuration", State::Failed, errors.to_string()),
    }
    let foreseen = Resources::foresee();
    let sandbox = Sandbox::new(executable, tasks.clone());
    let sandbox = sandbox.map(|sandbox| sandbox.with_resources(Resources::foreseen(foreseen.probe.clone())));
    match &sandbox {
        Ok(sandbox) => {
            let offers = sandbox.offers().await;
            kernel(&mut report, offers.as_ref());
            resources(&mut report, &foreseen);
            match &config {
                Ok(config) => {
                    required(&mut report, config, sandbox).await;
                    egress(&mut report, config);
                }
                Err(_) => unread(&mut report, "SANDBOX_REQUIRE"),
            }
        }
        Err(error) => report.add("supervision", State::Failed, format!("processes cannot be supervised here: {error}")),
    }
    match &config {
        Ok(config) => {
            places(&mut report, config);
            match &sandbox {
                Ok(sandbox) => opencode(&mut report, config, sandbox).await,
                Err(_) => report.add("opencode", State::Unknown, "not known, because no process can be started"),
            }
            database(&mut report, config).await;
        }
        Err(_) => {
            for name in ["WORKSPACE_DIR", "STATE_DIR", "opencode", "database"] {
                unread(&mut report, name);
            }
        }
    }
    let _ = tasks.stop(PATIENCE).await;
    report.ready = report.findings.iter().all(|finding| finding.state != State::Failed);
    report
}

fn unread(report: &mut Report, name: &str) {
    report.add(name, State::Unknown, "not known, because the environment is not valid");
}

/// What the kernel gives to confine with.
fn kernel(report: &mut Report, offers: Result<&Offers, &RunError>) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    match release {
        Ok(release) => report.add("kernel", State::Ok, format!("Linux {}", release.trim())),
        Err(error) => report.add("kernel", State::Unknown, format!("not known, because /proc says nothing: {error}")),
    }
    match capabilities(None) {
        Ok(own) => {
            let names = |set: CapabilitySet| set.iter_names().map(|(name, _)| name).collect::<Vec<_>>().join(", ");
            let held = if own.effective.is_empty() { "none".to_owned() } else { names(own.effective) };
            let user = format!("this process is user {} and holds: {held}", nix::unistd::geteuid());
            report.add("privileges", State::Ok, user);
        }
        Err(errno) => report.add("privileges", State::Unknown, format!("not known, because the kernel says: {errno}")),
    }
    let offers = match offers {
        Ok(offers) => offers,
        Err(error) => {
            let why = format!("no program can be confined: {}", chain(error));
            return report.add("confinement", State::Missing, why);
        }
    };
    let confined = &offers.confined;
    let version = match confined.landlock_abi {
        0 => (State::Missing, "the kernel has none, or has it turned off".to_owned()),
        abi => (State::Ok, format!("version {abi} of its interface")),
    };
    report.add("landlock", version.0, version.1);
    for (protection, gives, without) in LEVELS {
        let state = if confined.has(*protection) { State::Ok } else { State::Missing };
        let detail = if state == State::Ok { (*gives).to_owned() } else { format!("{gives}; without it: {without}") };
        report.add(protection.name(), state, detail);
    }
    if !offers.host.user_notification {
        report.add("user_notification", State::Missing, "the kernel cannot stop a call and ask about it (Linux 5.0)");
    } else if confined.has(Protection::Egress) {
        report.add("user_notification", State::Ok, "the kernel stops a call and asks about it");
    } else {
        report.add(
            "user_notification",
            State::Missing,
            "the kernel has it, but a listener above this process takes it",
        );
    }
}

/// Protections with what they give, and what there is without them.
const LEVELS: &[(Protection, &str, &str)] = &[
    (
        Protection::Netns,
        "a network namespace with nobody else's sockets (CAP_SYS_ADMIN, CAP_NET_ADMIN)",
        "the gate, Landlock and the filter of calls alone keep it from the network",
    ),
    (Protection::LandlockFs, "files outside are not read, written or executed (Linux 5.13)", "the user's rights alone"),
    (Protection::LandlockRefer, "links and renames between directories (5.19)", "these are refused, inside too"),
    (Protection::LandlockTruncate, "cutting a file is writing it (6.2)", "what can be opened can be cut"),
    (Protection::LandlockNet, "TCP by port (6.7)", "egress alone keeps to the broker"),
    (Protection::LandlockIoctlDev, "control of devices (6.10)", "devices that can be opened can be controlled"),
    (
        Protection::LandlockScope,
        "signals and abstract sockets stay inside (6.12)",
        "a user of its own, else signals get out",
    ),
    (Protection::LandlockUnix, "Unix sockets by path (7.1)", "seccomp: no Unix sockets but pairs"),
    (Protection::Seccomp, "calls of the kernel that no session needs are refused", "they are not"),
    (Protection::NoNewPrivs, "no program gives more rights", "setuid programs do"),
    (Protection::Capabilities, "no capability", "those of this process"),
    (Protection::Egress, "connects to the broker alone, by address and port", "by port at most"),
    (Protection::Scope, "no signals beyond its own processes", "every process of the same user can be signalled"),
];

/// What limits and measures.
fn resources(report: &mut Report, foreseen: &crate::sandbox::Foreseen) {
    let probe = &foreseen.probe;
    let watched = |mechanism: crate::sandbox::Mechanism| match mechanism {
        crate::sandbox::Mechanism::Watched => {
            (State::Missing, "watched: looked at several times a second, and all is ended at the limit".to_owned())
        }
        group => (State::Ok, format!("held by {group}")),
    };
    let (state, detail) = watched(probe.mechanism);
    let why = if probe.missing.is_empty() { String::new() } else { format!("; {}", probe.missing.join("; ")) };
    report.add("cgroup", state, format!("{detail}{why}"));
    let ((memory, detail), (pids, of_pids)) = (watched(probe.memory), watched(probe.pids));
    report.add("memory", memory, detail);
    report.add("pids", pids, of_pids);
    match probe.cpu {
        Some(mechanism) => report.add("cpu", State::Ok, format!("held by {mechanism}")),
        None => report.add("cpu", State::Missing, "nothing holds CPU time"),
    }
    match probe.io {
        true => report.add("io", State::Ok, "counted by the group"),
        false => report.add("io", State::Missing, "no controller: the kernel's account of each process is added up"),
    }
    match probe.freeze {
        true => report.add("freeze", State::Ok, "a session can be frozen and thawed"),
        false => report.add("freeze", State::Missing, "there is nothing to freeze a session with"),
    }
    let kill = match probe.kill {
        KillMeans::CgroupKill => (State::Ok, "one write ends all of a session"),
        KillMeans::FreezeAndKill => (State::Ok, "a session is frozen, then each of its processes is ended"),
        KillMeans::OneByOne => (State::Ok, "each process is ended, until there is none"),
    };
    report.add("kill", kill.0, format!("{}; its jail proves that nothing is left", kill.1));
    if !foreseen.unknown.is_empty() {
        report.add("cgroup_unknown", State::Unknown, format!("not known: {}", foreseen.unknown.join("; ")));
    }
}

/// Whether what is required is there.
async fn required(report: &mut Report, config: &Config, sandbox: &Sandbox) {
    match config.limits.disk_bytes {
        Some(bytes) => report.add("disk", State::Ok, format!("counted; a session may add {bytes} bytes")),
        None => report.add("disk", State::Missing, "not limited: SESSION_DISK_BYTES is not set"),
    }
    let here = std::env::current_dir().unwrap_or_default();
    // Where it is not there, that is a finding of its own.
    let command = find_command(config.opencode_command.as_deref(), std::env::var_os("PATH"), &here);
    let protections = Protections::of(config, sandbox, &command.unwrap_or_else(|_| "/".into())).await;
    match (&protections.users, config.sandbox) {
        (Some(users), _) => {
            let range = format!("{}-{}", users.start(), users.end());
            report.add("uid", State::Ok, format!("each session has a user of its own, of {range} (SESSION_UID_RANGE)"));
        }
        (None, SandboxMode::Off) => {
            report.add("uid", State::Missing, "SANDBOX=off: sessions run as the sidecar's user")
        }
        (None, _) => {
            let why = protections.no_users.as_deref().unwrap_or("it is not known why");
            report.add("uid", State::Missing, format!("sessions run as the sidecar's own user: {why}"));
        }
    }
    let list = config.sandbox_require.join(", ");
    match (&protections.refused, config.sandbox) {
        (Some(refused), _) => report.add("SANDBOX_REQUIRE", State::Failed, refused.clone()),
        (None, SandboxMode::Off) => report.add("SANDBOX_REQUIRE", State::Missing, "SANDBOX=off: nothing is confined"),
        (None, _) if !protections.missing.is_empty() => {
            let missing = format!("SANDBOX=best-effort, and not here: {}", protections.missing.join(", "));
            report.add("SANDBOX_REQUIRE", State::Missing, missing);
        }
        (None, _) => report.add("SANDBOX_REQUIRE", State::Ok, format!("all of it is here: {list}")),
    }
    report.protections = protections.names;
}

/// What a session reaches beside its model.
fn egress(report: &mut Report, config: &Config) {
    let allow = &config.egress_allow;
    let detail = match (allow.is_empty(), config.sandbox) {
        (_, SandboxMode::Off) => "SANDBOX=off: whatever this machine reaches".to_owned(),
        (true, _) => "nothing but the model is reached".to_owned(),
        (false, _) => format!("beside the model these are reached: {allow}"),
    };
    report.add("EGRESS_ALLOW", State::Ok, detail);
}

/// The two directories.
fn places(report: &mut Report, config: &Config) {
    match may_write(&config.workspace_dir) {
        Ok(there) => report.add("WORKSPACE_DIR", State::Ok, format!("{}: {there}", config.workspace_dir.display())),
        Err(why) => report.add("WORKSPACE_DIR", State::Failed, why),
    }
    let state = &config.state_dir;
    match may_write(state) {
        Err(why) => report.add("STATE_DIR", State::Failed, why),
        Ok(there) => {
            let lasts = match existing(state).and_then(is_ephemeral) {
                Some(false) => (State::Ok, "on a volume or a disk"),
                Some(true) => (State::Missing, "ephemeral: it goes with the container"),
                None => (State::Unknown, "whether it lasts is not known, because the kernel does not say"),
            };
            let used = if is_in_use(state) { "; a sidecar uses it now" } else { "" };
            report.add("STATE_DIR", lasts.0, format!("{}: {there}, {}{used}", state.display(), lasts.1));
        }
    }
}

/// The directory, or the next one above that is there.
fn existing(path: &Path) -> Option<&Path> {
    path.ancestors().find(|path| path.exists())
}

/// Asks for the right to write, and writes nothing.
fn may_write(path: &Path) -> Result<&'static str, String> {
    let Some(there) = existing(path) else { return Err(format!("{} is nowhere", path.display())) };
    if !there.is_dir() {
        return Err(format!("{} is no directory", there.display()));
    }
    match eaccess(there, AccessFlags::W_OK | AccessFlags::X_OK) {
        Ok(()) if there == path => Ok("writable"),
        Ok(()) => Ok("not there, and can be made"),
        Err(errno) => Err(format!("{} is not writable: {}", there.display(), errno.desc())),
    }
}

/// Whether the lock of the directory is held, by the kernel's list: taking it would be in the way of a start.
fn is_in_use(state: &Path) -> bool {
    let Ok(lock) = std::fs::metadata(state.join("lock")) else { return false };
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let (major, minor) = (rustix::fs::major(lock.dev()), rustix::fs::minor(lock.dev()));
    let id = format!("{major:02x}:{minor:02x}:{}", lock.ino());
    locks.lines().any(|line| line.split_whitespace().any(|field| field == id))
}

/// The executable, and what it says of itself.
async fn opencode(report: &mut Report, config: &Config, sandbox: &Sandbox) {
    let here = std::env::current_dir().unwrap_or_default();
    let command = match find_command(config.opencode_command.as_deref(), std::env::var_os("PATH"), &here) {
        Ok(command) => command,
        Err(why) => return report.add("opencode", State::Failed, why),
    };
    // It makes directories in its home before it says anything.
    let home = std::env::temp_dir().join(format!("opencode-sidecar-doctor-{}", std::process::id()));
    if let Err(error) = std::fs::create_dir(&home) {
        let why = format!(
            "{}; its version is not known, because {} cannot be made: {error}",
            command.display(),
            home.display()
        );
        return report.add("opencode", State::Unknown, why);
    }
    let mut spec = Spec::new("opencode", &command);
    spec.args = vec!["--version".into()];
    spec.env =
        vec![("HOME".into(), home.clone().into()), ("PATH".into(), std::env::var_os("PATH").unwrap_or_default())];
    let told = sandbox.run(spec, PATIENCE).await;
    let _ = std::fs::remove_dir_all(&home);
    let command = command.display();
    match told {
        Ok(told) if told.exit.success() => {
            let version = String::from_utf8_lossy(&told.stdout).trim().to_owned();
            match version == OPENCODE_VERSION {
                true => report.add("opencode", State::Ok, format!("{version}, {command}")),
                false => report.add(
                    "opencode",
                    State::Missing,
                    format!("{command} is {version}; tested is {OPENCODE_VERSION}"),
                ),
            }
        }
        Ok(told) => report.add("opencode", State::Failed, format!("{command} does not run: {}", told.exit)),
        Err(error) => report.add("opencode", State::Failed, format!("{command} does not run: {}", chain(&error))),
    }
}

/// Whether the database answers. It is not brought up to date here.
async fn database(report: &mut Report, config: &Config) {
    let Some(url) = &config.database_url else {
        return match Embedded::installed() {
            Ok(server) => {
                let detail = format!(
                    "embedded: {} would be started; whether it fits is not known, because only a start shows it",
                    server.display()
                );
                report.add("database", State::Unknown, detail);
            }
            Err(looked) => {
                let why = format!("no DATABASE_URL, and no Postgres server is installed: {looked}");
                report.add("database", State::Failed, why);
            }
        };
    };
    let options = DatabaseOptions { url: url.clone(), schema: config.database_schema.clone(), max_connections: 1 };
    let asked = async {
        let store = Store::connect(&options).await?.for_project(&config.project_id);
        store.ping().await?;
        let role = store.role().await;
        store.close().await;
        Ok::<_, StoreError>(role)
    };
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(role)) => {
            report.add("database", State::Ok, "DATABASE_URL answers");
            database_role(report, config, role);
        }
        Ok(Err(error)) => report.add("database", State::Failed, format!("DATABASE_URL: {}", chain(&error))),
        Err(_) => report.add("database", State::Failed, "DATABASE_URL does not answer"),
    }
}

/// Whose rows whoever takes over the sidecar could read.
fn database_role(report: &mut Report, config: &Config, role: Result<Option<Role>, StoreError>) {
    let name = "database_role";
    match role {
        Err(error) => report.add(name, State::Failed, chain(&error)),
        Ok(None) => {
            let why =
                "not known, because the tables are not there yet, or not those of this version: a start sees to that";
            report.add(name, State::Unknown, why);
        }
        Ok(Some(role)) => {
            if let Some(why) = role.refusal(&config.project_id, &config.database_schema) {
                report.add(name, State::Failed, why);
            } else if let Some(wider) = role.warning() {
                report.add(name, State::Missing, format!("role {}: {wider}", role.name));
            } else {
                let bound =
                    format!("role {} is bound to project {}, and sees no other's rows", role.name, config.project_id);
                report.add(name, State::Ok, bound);
            }
        }
    }
}
