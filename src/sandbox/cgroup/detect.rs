//! Which groups this process is in, and where these are to be found as directories.
//!
//! The kernel says the first in `/proc/self/cgroup` and the second in `/proc/self/mountinfo`. Neither a mount point nor
//! a path is ever guessed: a container may see a part of a tree only, or none.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The groups of this process that it can see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Own {
    /// In the version-2 tree.
    pub(super) unified: Option<PathBuf>,
    /// In the version-1 tree of each controller, by its name.
    pub(super) v1: BTreeMap<String, PathBuf>,
    /// Whether the version-2 one is the top of what can be seen: in a container, the container's own.
    pub(super) is_namespace_root: bool,
}

/// Reads them.
///
/// # Errors
/// `/proc` is not there.
pub(super) fn own() -> io::Result<Own> {
    let mut own = parse(&fs::read_to_string("/proc/self/cgroup")?, &fs::read_to_string("/proc/self/mountinfo")?);
    own.unified = own.unified.filter(|path| path.join("cgroup.procs").exists());
    own.v1.retain(|_, path| path.join("cgroup.procs").exists());
    Ok(own)
}

fn parse(cgroup: &str, mountinfo: &str) -> Own {
    let mounts: Vec<Mount> = mountinfo.lines().filter_map(Mount::parse).collect();
    let mut own = Own::default();
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let path = Path::new(path);
        if controllers.is_empty() {
            own.is_namespace_root = path == Path::new("/");
            own.unified = mounts.iter().filter(|mount| mount.controllers.is_none()).find_map(|mount| mount.find(path));
        }
        for name in controllers.split(',').filter(|name| !name.is_empty()) {
            let mut fitting = mounts.iter().filter(|mount| mount.has(name));
            if let Some(found) = fitting.find_map(|mount| mount.find(path)) {
                own.v1.insert(name.to_owned(), found);
            }
        }
    }
    own
}

struct Mount {
    /// What of the tree is mounted.
    root: PathBuf,
    at: PathBuf,
    /// `None` for version 2.
    controllers: Option<Vec<String>>,
}

impl Mount {
    /// A line of `mountinfo`; `None` for anything but a tree of groups.
    fn parse(line: &str) -> Option<Self> {
        let (head, tail) = line.split_once(" - ")?;
        let mut head = head.split(' ').skip(3);
        let (root, at) = (unescape(head.next()?), unescape(head.next()?));
        let mut tail = tail.split(' ');
        let controllers = match tail.next()? {
            "cgroup2" => None,
            "cgroup" => Some(tail.nth(1)?.split(',').map(str::to_owned).collect()),
            _ => return None,
        };
        Some(Self { root: root.into(), at: at.into(), controllers })
    }

    fn has(&self, controller: &str) -> bool {
        self.controllers.iter().flatten().any(|name| name == controller)
    }

    /// The directory of a group. `None` where it lies outside of what is mounted, which a group namespace shows as
    /// `/..`, or was removed.
    fn find(&self, group: &Path) -> Option<PathBuf> {
        let below = group.strip_prefix(&self.root).ok()?;
        let deleted = group.to_str().is_some_and(|path| path.ends_with(" (deleted)"));
        let outside = below.components().any(|part| part == std::path::Component::ParentDir);
        (!deleted && !outside).then(|| self.at.join(below))
    }
}

/// Spaces and the like stand as three octal digits.
fn unescape(field: &str) -> String {
    let mut plain = Vec::new();
    let mut rest = field.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(byte) = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            plain.push(byte);
            rest = &after[3..];
        } else {
            plain.push(first);
            rest = after;
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_2_alone() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let own = parse("0::/system.slice/x.service\n", mounts);
        assert_eq!(own.unified, Some("/sys/fs/cgroup/system.slice/x.service".into()));
        assert!(own.v1.is_empty());
    }

    #[test]
    fn a_container_with_a_namespace_and_one_without() {
        let mounts = "9 8 0:26 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n";
        let own = parse("0::/\n", mounts);
        assert_eq!((own.unified, own.is_namespace_root), (Some("/sys/fs/cgroup/".into()), true));
        let mounts = "9 8 0:26 /kubepods/pod1/c1 /sys/fs/cgroup/pids ro - cgroup cgroup rw,pids\n";
        let own = parse("4:pids:/kubepods/pod1/c1\n", mounts);
        assert_eq!(own.v1["pids"], Path::new("/sys/fs/cgroup/pids/"));
        // Somebody moved it out of what it can see.
        assert_eq!(parse("4:pids:/kubepods/pod1\n", mounts), Own::default());
        let mounts = "9 8 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        assert_eq!(parse("0::/../other\n", mounts), Own::default());
        assert_eq!(parse("0::/gone (deleted)\n", mounts), Own::default());
    }

    #[test]
    fn version_1_beside_an_empty_version_2() {
        let mounts = "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
            35 31 0:32 / /mnt/with\\040space rw shared:1 master:2 - cgroup cgroup rw,memory\n\
            36 31 0:33 / /mnt/none rw - cgroup cgroup rw,xattr,name=systemd\n\
            38 31 0:35 / / rw - ext4 /dev/vda rw\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let own = parse("4:memory:/a/b\n3:cpu,cpuacct:/\n2:name=systemd:/\n5:pids:/x\n0::/u\nnonsense\n", mounts);
        assert_eq!(own.unified, Some("/sys/fs/cgroup/unified/u".into()));
        assert_eq!(own.v1["memory"], Path::new("/mnt/with space/a/b"));
        assert_eq!(own.v1["cpu"], own.v1["cpuacct"]);
        assert_eq!(own.v1.get("pids"), None, "it is mounted nowhere");
    }
}
