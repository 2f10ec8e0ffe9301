//! Places where a test may end this process, to see what the next life makes of it.
//!
//! In builds for tests alone: a release has nothing of it. `OPENCODE_SIDECAR_FAILPOINT=name:3` ends the process as SIGKILL
//! does when it comes to that place for the third time.
//!
//! The `fail` crate does this and much more. Its last release is of 2022, it brings another `rand` into the binary, and
//! its switch is a feature, so that the program under test would have to be built once more.

/// The process is at a place.
#[cfg(not(debug_assertions))]
pub fn pass(_name: &str) {}

/// The process is at a place.
#[cfg(debug_assertions)]
pub fn pass(name: &str) {
    pass_after(name, || ());
}

/// The same; where the process is ended here, it does this before.
#[cfg(not(debug_assertions))]
pub fn pass_after(_name: &str, _last: impl FnOnce()) {}

/// The same; where the process is ended here, it does this before.
#[cfg(debug_assertions)]
pub fn pass_after(name: &str, last: impl FnOnce()) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};
    static WANTED: OnceLock<Option<(String, AtomicU32)>> = OnceLock::new();
    let wanted = WANTED.get_or_init(|| {
        let wanted = std::env::var("OPENCODE_SIDECAR_FAILPOINT").ok()?;
        let (name, times) = wanted.split_once(':').unwrap_or((&wanted, "1"));
        Some((name.to_owned(), AtomicU32::new(times.parse().ok()?)))
    });
    let Some((wanted, times)) = wanted else { return };
    if wanted == name && times.fetch_sub(1, Ordering::SeqCst) == 1 {
        last();
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::SIGKILL);
        // It takes no time that anybody could use, but for other threads.
        loop {
            std::thread::park();
        }
    }
}
