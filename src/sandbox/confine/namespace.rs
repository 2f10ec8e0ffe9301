//! A network namespace of its own for a confined program: whatever it makes of sockets leads nowhere but back to itself.
//!
//! Where it may reach something outside (what it may connect to, the server that others use), the gate gives it a
//! socket that was made outside in the place of its own; so nothing has to relay what goes through. Needs what a
//! container's root usually does not have (CAP_SYS_ADMIN, and CAP_NET_ADMIN for the loopback device). Without it the gate
//! and Landlock keep the program from the network as well, as far as the filter of calls is complete.

use super::{Failed, Namespace, Network};
use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

const OWN: &str = "/proc/self/ns/net";

/// Which one it gets.
pub(super) enum Wanted {
    New,
    /// That of another program.
    Of(OwnedFd),
}

/// `None`: it stays in the sidecar's.
pub(super) fn prepare(network: &Network) -> Result<Option<Wanted>, Failed> {
    match network.namespace {
        Namespace::Sidecars => Ok(None),
        Namespace::Own => Ok(Some(Wanted::New)),
        Namespace::Of(pid) => {
            let file = File::open(format!("/proc/{pid}/ns/net")).map_err(|error| Failed::new("netns", error))?;
            Ok(Some(Wanted::Of(file.into())))
        }
    }
}

impl Wanted {
    /// Brings this process, which has one thread, into it. `false`: this host has none to give, and it is where it was.
    ///
    /// # Errors
    /// It is not where it belongs.
    pub(super) fn enter(&self) -> Result<bool, Failed> {
        let failed = |errno| Failed::new("netns", errno);
        match self {
            Self::Of(other) => setns(other, CloneFlags::CLONE_NEWNET).map(|()| true).map_err(failed),
            Self::New => {
                let before = File::open(OWN).map_err(|error| Failed::new("netns", error))?;
                if unshare(CloneFlags::CLONE_NEWNET).is_err() {
                    return Ok(false);
                }
                // Without a loopback device not even its own servers would be there.
                match start_loopback() {
                    Ok(()) => Ok(true),
                    Err(_) => setns(before, CloneFlags::CLONE_NEWNET).map(|()| false).map_err(failed),
                }
            }
        }
    }
}

#[expect(unsafe_code, reason = "no crate of ours has this call")]
fn start_loopback() -> nix::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    let flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    let request = libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    // SAFETY: the kernel reads one `ifreq` from the address, which lives until the call returns, and keeps nothing.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as libc::Ioctl, &raw const request) };
    Errno::result(result).map(drop)
}
