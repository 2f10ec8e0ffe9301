//! Builds the crate again when a migration is added: `sqlx::migrate!` reads the directory at compile time. And says
//! whether it is built as root, where control groups can be made, and with a guest to boot: tests that act as another
//! user, that are about a group's limits, or that boot the guest are reported as ignored otherwise.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=migrations");
    println!("cargo::rustc-check-cfg=cfg(as_root)");
    if std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0) {
        println!("cargo::rustc-cfg=as_root");
    }
    println!("cargo::rustc-check-cfg=cfg(cgroups)");
    if groups_can_be_made() {
        println!("cargo::rustc-cfg=cgroups");
    }
    println!("cargo::rustc-check-cfg=cfg(guest)");
    println!("cargo::rerun-if-env-changed=OPENCODE_SIDECAR_GUEST");
    if std::env::var_os("OPENCODE_SIDECAR_GUEST").is_some() {
        println!("cargo::rustc-cfg=guest");
    }
}

/// Whether a group for memory can be made beneath the one that this process is in. Roughly what `sandbox::cgroup`
/// finds out in detail, for hosts where trees are where they usually are. A group of version 2 that is not the root of all
/// holds either processes or other groups that count something, so sidecars side by side, as in the tests, cannot share
/// it: that version is tested in the guest.
fn groups_can_be_made() -> bool {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let places = own.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        match (fields.next()?, fields.next()?.trim_start_matches('/')) {
            ("", path) => Some(Path::new("/sys/fs/cgroup").join(path)),
            ("memory", path) => Some(Path::new("/sys/fs/cgroup/memory").join(path)),
            _ => None,
        }
    });
    places.filter(|place| place.join("cgroup.procs").exists() && !place.join("cgroup.type").exists()).any(|place| {
        let group = place.join(format!("opencode-sidecar-build-{}", std::process::id()));
        std::fs::create_dir(&group).is_ok() && std::fs::remove_dir(&group).is_ok()
    })
}
