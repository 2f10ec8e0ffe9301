//! The binary: finds out as what it was started, and hands over to the library.

use opencode_sidecar::{cli, sandbox};
use std::process::ExitCode;

fn main() -> ExitCode {
    // The jail has to stay small and single-threaded, so it is told apart before a runtime or a parser exists.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == sandbox::jail::SUBCOMMAND) {
        return sandbox::jail::run();
    }
    cli::main()
}
