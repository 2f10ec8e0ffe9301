//! The binary: finds out as what it was started, and hands over to the library.

use opencode_sidecar::{cli, sandbox};
use std::process::ExitCode;

fn main() -> ExitCode {
    // Jail and tap have to stay small and single-threaded, so they are told apart before a runtime or a parser exists.
    if sandbox::tap::is_called() {
        return sandbox::tap::run();
    }
    let subcommand = std::env::args_os().nth(1);
    if subcommand.as_deref().is_some_and(|name| name == sandbox::jail::SUBCOMMAND) {
        return sandbox::jail::run();
    }
    if subcommand.as_deref().is_some_and(|name| name == sandbox::confine::PROBE_SUBCOMMAND) {
        return sandbox::confine::probe();
    }
    if subcommand.as_deref().is_some_and(|name| name == sandbox::errand::SUBCOMMAND) {
        return sandbox::errand::run();
    }
    if subcommand.as_deref().is_some_and(|name| name == sandbox::tap::DRAIN_SUBCOMMAND) {
        return sandbox::tap::drain();
    }
    cli::main()
}
