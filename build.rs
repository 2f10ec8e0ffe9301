//! Builds the crate again when a migration is added: `sqlx::migrate!` reads the directory at compile time. And says
//! whether it is built as root: tests that act as another user are reported as ignored otherwise.

use std::os::unix::fs::MetadataExt;

fn main() {
    println!("cargo:rerun-if-changed=migrations");
    println!("cargo::rustc-check-cfg=cfg(as_root)");
    if std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0) {
        println!("cargo::rustc-cfg=as_root");
    }
}
