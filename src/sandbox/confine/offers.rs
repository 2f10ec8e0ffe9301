//! What of a confinement this host gives: tried in processes of their own, not guessed.

use super::super::{RunError, Sandbox, Spec, StartError};
use super::{Confined, Confinement, Namespace, seccomp};
use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Uid, fork, setgroups, setresgid, setresuid};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

/// The hidden subcommand that looks.
pub const SUBCOMMAND: &str = "jail-probe";

/// How long looking may take.
const DEADLINE: Duration = Duration::from_secs(20);
/// Nobody.
const OTHER: u32 = 65_534;

/// What this host gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offers {
    /// What was in force for a program that was confined to see it.
    pub confined: Confined,
    /// What else there is.
    pub host: Host,
}

/// What was tried without confinement, each in a process of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Programs can run as other users.
    pub switches_users: bool,
    /// The kernel can stop a call and ask about it. A listener above this process takes that away all the same: then
    /// [`Offers::confined`] has no `egress`.
    pub user_notification: bool,
    /// A user namespace can be made.
    pub user_namespace: bool,
    /// A mount namespace can be made, inside a user namespace where it takes one; the next two likewise.
    pub mount_namespace: bool,
    /// A namespace of process ids can be made.
    pub pid_namespace: bool,
    /// A network namespace can be made.
    pub network_namespace: bool,
}

/// Looks. Starts two short programs.
pub(in crate::sandbox) async fn ask(sandbox: &Sandbox) -> Result<Offers, RunError> {
    let spec = || {
        let mut spec = Spec::new("probe", sandbox.executable.as_path());
        spec.args = vec![SUBCOMMAND.into()];
        spec
    };
    let output = sandbox.run(spec(), DEADLINE).await?;
    let malformed = |error| RunError::Read { name: "probe".to_owned(), source: io::Error::other(error) };
    let host = serde_json::from_slice(&output.stdout).map_err(malformed)?;
    let mut confinement = Confinement::default();
    confinement.files.execute.push("/".into());
    confinement.network.namespace = Namespace::Own;
    let started = sandbox.start(Spec { confinement: Some(confinement.clone()), ..spec() }).await;
    let process = match started {
        // There is one, but nothing to lead out of it.
        Err(StartError::Step { step, .. }) if step == "netns" => {
            confinement.network.namespace = Namespace::Sidecars;
            sandbox.start(Spec { confinement: Some(confinement), ..spec() }).await?
        }
        started => started?,
    };
    let confined = process.confined().ok_or(StartError::Lost { name: "probe".to_owned() })?;
    process.gone().await;
    Ok(Offers { confined, host })
}

/// Looks, and prints what it found. Call it first in `main`, before any thread exists.
pub fn probe() -> ExitCode {
    let namespace =
        |flags: CloneFlags| works(|| unshare(flags)) || works(|| unshare(flags | CloneFlags::CLONE_NEWUSER));
    let host = Host {
        switches_users: works(|| {
            setgroups(&[])?;
            setresgid(Gid::from_raw(OTHER), Gid::from_raw(OTHER), Gid::from_raw(OTHER))?;
            setresuid(Uid::from_raw(OTHER), Uid::from_raw(OTHER), Uid::from_raw(OTHER))
        }),
        user_notification: seccomp::is_available(libc::SECCOMP_RET_USER_NOTIF),
        user_namespace: works(|| unshare(CloneFlags::CLONE_NEWUSER)),
        mount_namespace: namespace(CloneFlags::CLONE_NEWNS),
        pid_namespace: namespace(CloneFlags::CLONE_NEWPID),
        network_namespace: namespace(CloneFlags::CLONE_NEWNET),
    };
    match serde_json::to_writer(io::stdout(), &host).map_err(io::Error::from).and_then(|()| io::stdout().flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Whether something works, in a process that ends with it.
#[expect(unsafe_code, reason = "what is tried cannot be taken back, so it is tried in a fork")]
fn works(attempt: impl FnOnce() -> nix::Result<()>) -> bool {
    // SAFETY: this process has one thread (see `probe`), so the child has all there is and may do what it likes.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            let code = i32::from(attempt().is_err());
            // SAFETY: ends the child without running what the parent has registered for its own end.
            unsafe { libc::_exit(code) }
        }
        Ok(ForkResult::Parent { child }) => matches!(waitpid(child, None), Ok(WaitStatus::Exited(_, 0))),
        Err(_) => false,
    }
}
