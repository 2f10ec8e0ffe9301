//! Landlock: which files a confined program reaches, and what of the network and of other processes.
//!
//! What a kernel has, by the version of its interface. All that it has is used, and what it lacks is reported as
//! lacking:
//!
//! | version | Linux | adds | without it |
//! |---|---|---|---|
//! | 1 | 5.13 | files: read, list, execute, write, make, remove | nothing of it |
//! | 2 | 5.19 | links and renames between directories | these are refused (EXDEV) |
//! | 3 | 6.2 | truncate | what can be opened at all can be cut |
//! | 4 | 6.7 | TCP: bind and connect, by port | seccomp and the gate alone |
//! | 5 | 6.10 | ioctl on devices | devices that can be opened can be controlled |
//! | 6 | 6.12 | signals and abstract Unix sockets stay inside | a user of its own; else signals get out |
//! | 7, 8 | 6.15, 7.0 | logging, threads | nothing is missing |
//! | 9 | 7.1 | path-named Unix sockets | seccomp: no Unix sockets but pairs |
//!
//! Never covered: looking at a file's metadata, changing its mode, owner, times and attributes. That is what a user
//! of its own is for.

use super::{Confinement, Failed, Protection};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath, PathFd, PathFdError,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};
use nix::libc;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

/// A ruleset that the kernel has accepted.
pub(super) struct Rules {
    ruleset: RulesetCreated,
    gives: Vec<Protection>,
}

/// The version that the kernel has; 0 where it has none, or has it turned off.
#[expect(unsafe_code, reason = "the crate asks the kernel only when it restricts")]
pub(super) fn kernel_abi() -> u32 {
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the kernel takes no attribute, as the null pointer and its length 0 say, and only answers.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0usize, VERSION) };
    u32::try_from(version).unwrap_or(0)
}

/// The protections that a version gives: the table above.
pub(super) fn protections(abi: u32) -> Vec<Protection> {
    let since = [
        (1, Protection::LandlockFs),
        (2, Protection::LandlockRefer),
        (3, Protection::LandlockTruncate),
        (4, Protection::LandlockNet),
        (5, Protection::LandlockIoctlDev),
        (6, Protection::LandlockScope),
        (9, Protection::LandlockUnix),
    ];
    since.into_iter().filter(|(first, _)| abi >= *first).map(|(_, protection)| protection).collect()
}

/// Makes the ruleset. `None`: the kernel has no Landlock.
pub(super) fn prepare(confinement: &Confinement, abi: u32) -> Result<Option<Rules>, Failed> {
    if abi == 0 {
        return Ok(None);
    }
    let gives = protections(abi);
    let abi = ABI::from(i32::try_from(abi).unwrap_or(i32::MAX));
    let failed = |error| Failed::new("landlock", error);
    // Exactly what this version has: so whatever is refused is a fault, and never left out.
    let mut ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    ruleset = ruleset.handle_access(AccessFs::from_all(abi)).map_err(failed)?;
    if abi >= ABI::V4 {
        ruleset = ruleset.handle_access(AccessNet::from_all(abi)).map_err(failed)?;
    }
    if abi >= ABI::V6 {
        ruleset = ruleset.scope(Scope::from_all(abi)).map_err(failed)?;
    }
    let mut ruleset = ruleset.create().map_err(failed)?;

    let all = AccessFs::from_all(abi);
    let execute = AccessFs::from_read(abi);
    // Whatever can be made there is no device.
    let write = all & !(AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev);
    let devices = all & (AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::WriteFile | AccessFs::IoctlDev);
    let files = &confinement.files;
    for path in &files.execute {
        ruleset = allow(ruleset, path, execute, abi, false)?;
    }
    for path in &files.write {
        ruleset = allow(ruleset, path, write, abi, true)?;
    }
    for path in &files.devices {
        ruleset = allow(ruleset, path, devices, abi, false)?;
    }
    if abi >= ABI::V4 {
        let network = &confinement.network;
        let connect = network.connect.iter().map(|address| address.port()).chain(network.local.iter().copied());
        for port in connect {
            ruleset = ruleset.add_rule(NetPort::new(port, AccessNet::ConnectTcp)).map_err(failed)?;
        }
        for port in network.serve.iter().chain(&network.local) {
            ruleset = ruleset.add_rule(NetPort::new(*port, AccessNet::BindTcp)).map_err(failed)?;
        }
    }
    Ok(Some(Rules { ruleset, gives }))
}

fn allow(
    ruleset: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
    abi: ABI,
    required: bool,
) -> Result<RulesetCreated, Failed> {
    let failed = |error: String| Failed::new("landlock", format!("{}: {error}", path.display()));
    let fd = match PathFd::new(path) {
        Ok(fd) => fd,
        Err(PathFdError::OpenCall { source, .. }) if !required && source.kind() == io::ErrorKind::NotFound => {
            return Ok(ruleset);
        }
        Err(error) => return Err(failed(error.to_string())),
    };
    // What may be written is a directory that sessions may write beside: another one could have put a link in its place
    // since it was looked at, and the rule would be about wherever that leads.
    if required {
        let opened = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()));
        let opened = opened.map_err(|error| failed(error.to_string()))?;
        if opened != path {
            return Err(failed("it is not where it was: a symbolic link, or moved".to_owned()));
        }
    }
    let stat = rustix::fs::fstat(fd.as_fd()).map_err(|errno| failed(errno.to_string()))?;
    let is_directory = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory;
    let access = if is_directory { access } else { access & AccessFs::from_file(abi) };
    ruleset.add_rule(PathBeneath::new(fd, access)).map_err(|error| failed(error.to_string()))
}

impl Rules {
    /// Restricts this process, and says what that gives.
    pub(super) fn apply(&self) -> Result<&[Protection], Failed> {
        let failed = |error: String| Failed::new("landlock", error);
        // A copy of the descriptor for this process, which closes it.
        let ruleset = self.ruleset.try_clone().map_err(|error| failed(error.to_string()))?;
        let status = ruleset.restrict_self().map_err(|error| failed(error.to_string()))?;
        match status.ruleset {
            RulesetStatus::FullyEnforced => Ok(&self.gives),
            other => Err(failed(format!("the kernel says {other:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_gives_what_the_one_before_gave_and_more() {
        let mut before = Vec::new();
        for abi in 0..=9 {
            let gives = protections(abi);
            assert!(gives.starts_with(&before), "{abi}");
            before = gives;
        }
        assert_eq!(before.len(), 7);
        assert_eq!(protections(0), []);
        assert_eq!(protections(3).last(), Some(&Protection::LandlockTruncate));
    }

    /// Every older version's ruleset is one that this kernel takes: what an older kernel would be given.
    #[test]
    fn the_ruleset_of_each_version_up_to_the_kernels_is_accepted() {
        let mut confinement = Confinement::default();
        confinement.files.execute = vec!["/usr".into(), "/bin/sh".into(), "/does/not/exist".into()];
        confinement.files.write = vec!["/tmp".into()];
        confinement.files.devices = vec!["/dev/null".into(), "/dev/pts".into()];
        confinement.network.connect = vec!["127.0.0.1:1".parse().unwrap()];
        confinement.network.local = vec![2];
        assert!(prepare(&confinement, 0).is_ok_and(|rules| rules.is_none()));
        for abi in 1..=kernel_abi() {
            let rules = prepare(&confinement, abi);
            assert!(rules.is_ok_and(|rules| rules.is_some()), "{abi}");
        }
        confinement.files.write.push("/does/not/exist".into());
        let error = prepare(&confinement, 1).err().unwrap();
        assert!(error.step == "landlock" && error.error.contains("/does/not/exist"), "{}", error.error);
    }
}
