//! The command line.

use std::process::ExitCode;

/// Reads the arguments and runs the subcommand that they name.
pub fn main() -> ExitCode {
    ExitCode::SUCCESS
}
