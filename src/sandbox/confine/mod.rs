//! Confinement: what one program, and all that it starts, may not do.
//!
//! One file per mechanism:
//! - `identity`: its user and groups, without any capability.
//! - `namespace`: a network of its own, with nothing in it.
//! - `landlock`: which files it reaches, and what of the network and of other processes.
//! - `seccomp`: which calls of the kernel it has (`calls` is the list, each with its reason).
//! - `gate`: connects, binds and listens in its place, so that address and port are checked; moves tools aside.
//! - `offers`: what of it this host gives.
//!
//! - `spawn`: starts the program.
//!
//! The jail prepares everything, and its child applies it to itself in one straight line before it becomes the program. The jail itself stays outside. What the kernel does not have is left out and reported by its name; what is
//! required, and left out, ends the start under that name, and so does everything that should work and does not.

mod calls;
mod gate;
mod identity;
mod landlock;
mod namespace;
mod offers;
mod refused;
mod seccomp;
mod spawn;

pub use calls::{Answer, Condition, Denied, Test, denied};
pub use offers::{Offers, SUBCOMMAND as PROBE_SUBCOMMAND, probe};

pub(super) use gate::{Gate, step_aside};
pub(super) use offers::ask as ask_offers;
pub(super) use spawn::Program;

use super::cgroup;
use super::protocol::paths;
use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

/// What a program is confined to. Whatever is not named here is out of its reach, as far as the kernel can do that:
/// see [`Confined`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// The files that it reaches.
    pub files: Files,
    /// The network that it reaches.
    pub network: Network,
    /// Its supplementary groups. They stay as they are where the sidecar may not set them.
    pub groups: Vec<u32>,
    /// Limits of each of its processes.
    pub limits: Limits,
    /// What has to be in force: the program is not started where one of these is not.
    pub require: BTreeSet<Protection>,
}

/// Files and directories, as absolute paths. A directory stands for all that is beneath it. The permissions of the
/// file system hold besides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// To read and to execute. What is not there is left out.
    #[serde(with = "paths")]
    pub execute: Vec<PathBuf>,
    /// To read, execute, write, make and remove. Each has to be there, and to be canonical: a symbolic link, or one in
    /// its path, ends the start.
    #[serde(with = "paths")]
    pub write: Vec<PathBuf>,
    /// Devices, or directories of devices, to read, write and control. What is not there is left out.
    #[serde(with = "paths")]
    pub devices: Vec<PathBuf>,
}

/// TCP. There is no other network for a confined program.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Where it may connect to.
    pub connect: Vec<SocketAddr>,
    /// Ports that it may listen on, but never connect to: its own server, for the use of others.
    pub serve: Vec<u16>,
    /// Ports that it may listen on and connect to, at loopback addresses. One that asks for any free port gets one
    /// of these.
    pub local: Vec<u16>,
    /// Where its sockets are.
    pub namespace: Namespace,
}

/// Which network namespace a program is in. Whichever it is, it reaches what [`Network`] says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Namespace {
    /// The sidecar's.
    #[default]
    Sidecars,
    /// One of its own, where one can be made: see [`Protection::Netns`].
    Own,
    /// That of the process with this id, which runs.
    Of(u32),
}

/// Limits of each process. What is absent stays as it is. No confined program writes core files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Open files.
    pub open_files: Option<u64>,
    /// The largest file that it can write, in bytes.
    pub file_size: Option<u64>,
}

/// A protection, by the name under which it is required and reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protection {
    /// A user of its own.
    Uid,
    /// A network namespace without a way out but through the gate, and nobody else's sockets in it.
    Netns,
    /// No capability, and none to be had.
    Capabilities,
    /// No program gives it more rights than it has.
    NoNewPrivs,
    /// Only the files of [`Files`] can be read, listed, executed, written, made and removed (Landlock, Linux 5.13).
    LandlockFs,
    /// Linking and renaming between directories follows the same rules (5.19); before, it is refused altogether.
    LandlockRefer,
    /// Cutting a file counts as writing it (6.2); before, whatever can be opened can be cut.
    LandlockTruncate,
    /// TCP ports that are not in [`Network`] are refused by Landlock (6.7). It knows no addresses.
    LandlockNet,
    /// Only the devices of [`Files`] can be controlled (6.10).
    LandlockIoctlDev,
    /// No signals and no abstract Unix sockets beyond its own processes, by Landlock (6.12).
    LandlockScope,
    /// No Unix sockets outside of the directories of [`Files`], by Landlock (7.1).
    LandlockUnix,
    /// The calls of [`denied`] are refused.
    Seccomp,
    /// It connects to the addresses and ports of [`Network`] and to nothing else.
    Egress,
    /// No signals and no abstract Unix sockets beyond its own processes, by whatever means.
    Scope,
}

impl Protection {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Uid,
        Self::Netns,
        Self::Capabilities,
        Self::NoNewPrivs,
        Self::LandlockFs,
        Self::LandlockRefer,
        Self::LandlockTruncate,
        Self::LandlockNet,
        Self::LandlockIoctlDev,
        Self::LandlockScope,
        Self::LandlockUnix,
        Self::Seccomp,
        Self::Egress,
        Self::Scope,
    ];

    /// Its name, as in `SANDBOX_REQUIRE`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uid => "uid",
            Self::Netns => "netns",
            Self::Capabilities => "capabilities",
            Self::NoNewPrivs => "no_new_privs",
            Self::LandlockFs => "landlock_fs",
            Self::LandlockRefer => "landlock_refer",
            Self::LandlockTruncate => "landlock_truncate",
            Self::LandlockNet => "landlock_net",
            Self::LandlockIoctlDev => "landlock_ioctl_dev",
            Self::LandlockScope => "landlock_scope",
            Self::LandlockUnix => "landlock_unix",
            Self::Seccomp => "seccomp",
            Self::Egress => "egress",
            Self::Scope => "scope",
        }
    }
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is in force for a started program: seen to be done by its jail, not planned.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confined {
    /// The version of Landlock's interface that the kernel has; 0 for none.
    pub landlock_abi: u32,
    /// The protections.
    pub protections: BTreeSet<Protection>,
}

impl Confined {
    /// Whether a protection is in force.
    pub fn has(&self, protection: Protection) -> bool {
        self.protections.contains(&protection)
    }

    /// The first of `wanted` that is not in force.
    pub fn lacks(&self, wanted: &BTreeSet<Protection>) -> Option<Protection> {
        wanted.difference(&self.protections).next().copied()
    }
}

/// A step that failed, by its name.
pub(super) struct Failed {
    pub(super) step: String,
    pub(super) error: String,
}

impl Failed {
    fn new(step: impl Into<String>, error: impl fmt::Display) -> Self {
        Self { step: step.into(), error: error.to_string() }
    }
}

/// What the child tells its jail before it becomes the program.
#[derive(Serialize, Deserialize)]
enum Told {
    Confined(Confined),
    Failed { step: String, error: String },
}

/// All that can be done before there is a child.
struct Prepared {
    /// Those of the control group that it joins first, while it may; none where there is no group.
    doors: Vec<OwnedFd>,
    user: Option<(u32, u32)>,
    groups: Vec<u32>,
    limits: Limits,
    require: BTreeSet<Protection>,
    namespace: Option<namespace::Wanted>,
    landlock: Option<landlock::Rules>,
    seccomp: Option<seccomp::Filter>,
    /// The child's end of the socket on which it tells the jail how it went.
    socket: OwnedFd,
}

/// Starts a program, confined, as `user`. Gives its id, what is in force for it, and what it asks the gate with.
///
/// # Errors
/// The step that failed. Nothing runs then.
pub(super) fn start(
    confinement: &Confinement,
    user: Option<(u32, u32)>,
    program: &Program,
    doors: Vec<OwnedFd>,
) -> Result<(Pid, Confined, Option<OwnedFd>), Failed> {
    let landlock = landlock::prepare(confinement, landlock::kernel_abi())?;
    let seccomp = seccomp::prepare()?;
    let namespace = namespace::prepare(&confinement.network)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
        .map_err(|errno| Failed::new("confinement", errno))?;
    let Confinement { groups, limits, require, .. } = confinement.clone();
    let prepared = Prepared { doors, user, groups, limits, require, namespace, landlock, seccomp, socket: theirs };
    let spawned = spawn::spawn(program, &prepared);
    match (told(&ours), spawned) {
        // It says more than an error's number.
        (Some(Err(failed)), _) | (_, Err(failed)) => Err(failed),
        (Some(Ok((confined, listener))), Ok(pid)) => Ok((pid, confined, listener)),
        (None, Ok(pid)) => {
            // It runs, and nobody knows as what.
            let _ = kill(pid, Signal::SIGKILL).and_then(|()| waitpid(pid, None));
            Err(Failed::new("confinement", "it told nothing"))
        }
    }
}

impl Prepared {
    /// Confines this process for good, and tells the jail. For the child, last before exec.
    ///
    /// # Errors
    /// A step failed; the jail is told which. The program must not be executed then.
    fn apply(&self) -> nix::Result<()> {
        let (told, listener) = match self.steps() {
            Ok((confined, listener)) => (Told::Confined(confined), listener),
            Err(Failed { step, error }) => (Told::Failed { step, error }, None),
        };
        let line = serde_json::to_vec(&told).map_err(|_| Errno::EINVAL)?;
        let listener: Vec<RawFd> = listener.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&listener)];
        let rights = if listener.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(&line)], rights, MsgFlags::empty(), None)?;
        match told {
            Told::Confined(_) => Ok(()),
            Told::Failed { .. } => Err(Errno::EPERM),
        }
    }

    /// The straight line, in the only order that works: each step needs rights that a later one takes away.
    fn steps(&self) -> Result<(Confined, Option<OwnedFd>), Failed> {
        let mut confined = Confined { landlock_abi: landlock::kernel_abi(), ..Confined::default() };
        let mut on = |protections: &[Protection]| confined.protections.extend(protections);
        cgroup::join(&self.doors).map_err(|errno| Failed::new("cgroup", errno))?;
        if self.namespace.as_ref().map_or(Ok(false), namespace::Wanted::enter)? {
            on(&[Protection::Netns]);
        }
        limit(Resource::RLIMIT_CORE, "rlimit_core", Some(0))?;
        limit(Resource::RLIMIT_NOFILE, "rlimit_nofile", self.limits.open_files)?;
        limit(Resource::RLIMIT_FSIZE, "rlimit_fsize", self.limits.file_size)?;
        identity::shrink_bounding_set()?;
        if self.user.is_some() || identity::may_set_groups() {
            identity::set_groups(&self.groups)?;
        }
        if let Some((uid, gid)) = self.user {
            identity::become_user(uid, gid)?;
            on(&[Protection::Uid]);
        }
        identity::drop_capabilities()?;
        on(&[Protection::Capabilities]);
        identity::set_no_new_privs()?;
        on(&[Protection::NoNewPrivs]);
        if let Some(rules) = &self.landlock {
            on(rules.apply()?);
        }
        let mut listener = None;
        if let Some(filter) = &self.seccomp {
            listener = filter.apply()?;
            on(&[Protection::Seccomp]);
        }
        match listener {
            Some(_) => on(&[Protection::Egress]),
            None if confined.has(Protection::Netns) => {
                return Err(Failed::new(
                    "netns",
                    "nothing leads out of it, since this host does not let the gate listen",
                ));
            }
            None => {}
        }
        // A user of its own takes signals, and no socket of the family takes the rest.
        if confined.has(Protection::LandlockScope) || confined.has(Protection::Uid) && confined.has(Protection::Seccomp)
        {
            confined.protections.insert(Protection::Scope);
        }
        match confined.lacks(&self.require) {
            None => Ok((confined, listener)),
            Some(missing) => Err(Failed::new(missing.name(), "it is required, and this host does not give it")),
        }
    }
}

fn limit(resource: Resource, step: &str, limit: Option<u64>) -> Result<(), Failed> {
    match limit {
        Some(limit) => setrlimit(resource, limit, limit).map_err(|errno| Failed::new(step, errno)),
        None => Ok(()),
    }
}

/// What the child has told, once it has become the program or ended. `None`: not a word.
#[expect(unsafe_code, reason = "a received descriptor comes as a number")]
fn told(socket: &OwnedFd) -> Option<Result<(Confined, Option<OwnedFd>), Failed>> {
    let mut buffer = [0; 8192];
    let mut iov = [IoSliceMut::new(&mut buffer)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).ok()?;
    let mut listener = None;
    for message in received.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(fds) = message {
            // SAFETY: the kernel made these descriptors for this process a moment ago, and gave them to nobody else.
            listener = fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).next();
        }
    }
    let length = received.bytes;
    match serde_json::from_slice(&buffer[..length]).ok()? {
        Told::Confined(confined) => Some(Ok((confined, listener))),
        Told::Failed { step, error } => Some(Err(Failed { step, error })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protection_has_one_name() {
        for protection in Protection::ALL {
            assert_eq!(serde_json::to_value(protection).unwrap(), protection.name());
        }
        assert_eq!(BTreeSet::from(Protection::ALL).len(), Protection::ALL.len());
    }
}
