//! Who a confined program is: a user and groups, and no capability in any set.

use super::Failed;
use nix::unistd::{Gid, Uid, getresgid, getresuid, setgroups, setresgid, setresuid};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits,
};

/// Takes away what an executed file or user 0 could give back: the bounding set, and root's privileges at exec. Whoever
/// may not do that (it needs CAP_SETPCAP) has no_new_privs to rely on, which comes later and does the same.
pub(super) fn shrink_bounding_set() -> Result<(), Failed> {
    let own = capabilities(None).map_err(|errno| Failed::new("capabilities", errno))?;
    if !own.effective.contains(CapabilitySet::SETPCAP) {
        return Ok(());
    }
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Beyond the last one that this kernel knows.
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(Failed::new("bounding_set", errno)),
        }
    }
    let bits = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    set_capabilities_secure_bits(bits).map_err(|errno| Failed::new("securebits", errno))
}

/// Whether this process may choose its groups.
pub(super) fn may_set_groups() -> bool {
    capabilities(None).is_ok_and(|own| own.effective.contains(CapabilitySet::SETGID))
}

/// Makes these the only supplementary groups.
pub(super) fn set_groups(groups: &[u32]) -> Result<(), Failed> {
    let groups: Vec<_> = groups.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups).map_err(|errno| Failed::new("groups", errno))
}

/// The group first, since only root may change it.
pub(super) fn become_user(uid: u32, gid: u32) -> Result<(), Failed> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(gid, gid, gid).map_err(|errno| Failed::new("gid", errno))?;
    setresuid(uid, uid, uid).map_err(|errno| Failed::new("uid", errno))?;
    let is = |uids: nix::unistd::ResUid, gids: nix::unistd::ResGid| {
        (uids.real, uids.effective, uids.saved, gids.real, gids.effective, gids.saved) == (uid, uid, uid, gid, gid, gid)
    };
    match (getresuid(), getresgid()) {
        (Ok(uids), Ok(gids)) if is(uids, gids) => Ok(()),
        _ => Err(Failed::new("uid", "the kernel did not change it")),
    }
}

/// Empties the sets of this process, and looks whether they are.
pub(super) fn drop_capabilities() -> Result<(), Failed> {
    let failed = |errno| Failed::new("capabilities", errno);
    clear_ambient_capability_set().map_err(failed)?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, sets).map_err(failed)?;
    if capabilities(None).map_err(failed)? == sets { Ok(()) } else { Err(Failed::new("capabilities", "some are left")) }
}

pub(super) fn set_no_new_privs() -> Result<(), Failed> {
    rustix::thread::set_no_new_privs(true).map_err(|errno| Failed::new("no_new_privs", errno))?;
    match rustix::thread::no_new_privs() {
        Ok(true) => Ok(()),
        _ => Err(Failed::new("no_new_privs", "the kernel did not set it")),
    }
}
