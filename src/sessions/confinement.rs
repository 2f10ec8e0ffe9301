//! What a session is confined to: its own directories, its workdir, the system's programs, and the broker.

use crate::opencode::profile::Directories;
use crate::sandbox::confine::{Confinement, Files, Network};
use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The system's programs and libraries, and what they read about the machine.
const SYSTEM: &[&str] = &[
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/opt",
    "/nix/store",
    "/proc",
    // How many CPUs there are, and how much of the machine this container may use.
    "/sys/devices/system/cpu",
    "/sys/fs/cgroup",
    "/sys/kernel/mm/transparent_hugepage",
];

/// Devices without a device behind them, and terminals of its own.
const DEVICES: &[&str] =
    &["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx", "/dev/pts"];

/// Directories of people, whose programs and secrets are no session's business.
const PRIVATE: &[&str] = &["/root", "/home"];

/// What a session's programs come from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Programs<'a> {
    /// OpenCode's executable.
    pub opencode: &'a Path,
    /// Our own, for the shell tap.
    pub sidecar: &'a Path,
    /// The search path that the session gets: see [`search_path`].
    pub path: &'a OsStr,
}

/// The confinement of one session, but for its ports, which the launch gives.
pub(super) fn confinement(
    programs: Programs<'_>,
    directories: &Directories,
    workdir: &Path,
    broker: SocketAddr,
) -> Confinement {
    let mut execute: Vec<PathBuf> = SYSTEM.iter().map(PathBuf::from).collect();
    public_files(Path::new("/etc"), &mut execute);
    for program in [programs.opencode, programs.sidecar] {
        // A name in PATH is often a link to where it really lies, with what belongs to it beside it.
        execute.extend(program.canonicalize());
    }
    execute.extend(programs.opencode.canonicalize().ok().and_then(|path| path.parent().map(Path::to_path_buf)));
    execute.extend(std::env::split_paths(programs.path));
    Confinement {
        files: Files {
            execute,
            // Nobody inside reaches what lies above the session's own directory, so its path stays what it is now.
            write: vec![
                directories.root().canonicalize().unwrap_or_else(|_| directories.root().to_path_buf()),
                workdir.to_path_buf(),
            ],
            devices: DEVICES.iter().map(PathBuf::from).collect(),
        },
        groups: group_of(workdir),
        network: Network { connect: vec![broker], ..Network::default() },
        ..Confinement::default()
    }
}

/// For what only looks after the workspace.
pub(super) fn workspace_only(workspace: &Path) -> Confinement {
    let execute = SYSTEM.iter().map(PathBuf::from).collect();
    Confinement {
        files: Files { execute, write: vec![workspace.to_path_buf()], devices: Vec::new() },
        groups: group_of(workspace),
        ..Confinement::default()
    }
}

/// Where a program is root without its powers, or another user than the workspace's, it is its group that counts.
fn group_of(workdir: &Path) -> Vec<u32> {
    std::fs::metadata(workdir).map(|workdir| workdir.gid()).into_iter().collect()
}

/// The search path without what lies in a person's own directory: found there, a program could not be executed.
pub(super) fn search_path(path: OsString) -> OsString {
    let private = |entry: &PathBuf| PRIVATE.iter().any(|private| entry.starts_with(private)) || !entry.is_absolute();
    std::env::join_paths(std::env::split_paths(&path).filter(|entry| !private(entry))).unwrap_or(path)
}

/// What everybody may read below a directory, in as few entries as that takes: a session that runs as root owns
/// `/etc/shadow`, so that the file's mode would not keep it out.
fn public_files(directory: &Path, found: &mut Vec<PathBuf>) {
    let before = found.len();
    if below(directory, found) {
        found.truncate(before);
        found.push(directory.to_path_buf());
    }
}

/// Collects them; true where that is everything in the directory.
fn below(directory: &Path, found: &mut Vec<PathBuf>) -> bool {
    let Ok(entries) = std::fs::read_dir(directory) else { return false };
    let mut all = true;
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(metadata) = std::fs::symlink_metadata(&path) else { continue };
        let mode = metadata.permissions().mode();
        if metadata.is_symlink() {
            // Its target counts, and has an entry of its own if it lies here.
        } else if metadata.is_dir() && mode & 0o005 == 0o005 {
            let before = found.len();
            if below(&path, found) {
                found.truncate(before);
                found.push(path);
            } else {
                all = false;
            }
        } else if metadata.is_file() && mode & 0o004 != 0 {
            found.push(path);
        } else {
            all = false;
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{Permissions, create_dir, set_permissions, write};

    #[test]
    fn only_what_everybody_may_read_is_public() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let mode = |name: &str, mode| set_permissions(at(name), Permissions::from_mode(mode)).unwrap();
        for name in ["ssl", "ssl/certs", "ssl/private", "open"] {
            create_dir(at(name)).unwrap();
            mode(name, 0o755);
        }
        for name in ["hosts", "shadow", "ssl/certs/a.pem", "ssl/private/key", "open/a", "open/b"] {
            write(at(name), "").unwrap();
            mode(name, 0o644);
        }
        std::os::unix::fs::symlink("shadow", at("link")).unwrap();
        mode("ssl/private", 0o710);
        mode("shadow", 0o640);
        let mut found = Vec::new();
        public_files(directory.path(), &mut found);
        found.sort();
        assert_eq!(found, [at("hosts"), at("open"), at("ssl/certs")]);

        set_permissions(at("shadow"), Permissions::from_mode(0o644)).unwrap();
        set_permissions(at("ssl/private"), Permissions::from_mode(0o755)).unwrap();
        found.clear();
        public_files(directory.path(), &mut found);
        assert_eq!(found, [directory.path()]);
    }

    #[test]
    fn the_search_path_leaves_peoples_directories_out() {
        let path = format!("/usr/bin:{}/a/bin:.:/opt/x:{}less/bin:{}", PRIVATE[1], PRIVATE[0], PRIVATE[0]);
        assert_eq!(search_path(path.into()), OsString::from(format!("/usr/bin:/opt/x:{}less/bin", PRIVATE[0])));
    }
}
