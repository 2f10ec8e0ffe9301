//! This process among others: what its subcommands share.
//!
//! Its own file, the signals that end it, and how an error is told to a person at a terminal.

use crate::telemetry::chain;
use std::path::PathBuf;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

/// Our own file, which jail and tap are started from. Not the link under `/proc`: a session could not follow that.
///
/// # Errors
/// Where the system does not say.
pub fn executable() -> Result<PathBuf, std::io::Error> {
    std::env::current_exe()
}

/// Completes at SIGTERM or SIGINT. From the call on neither ends the process by itself.
///
/// # Errors
/// Where they cannot be awaited.
pub fn stop_signal() -> Result<impl Future<Output = ()>, std::io::Error> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}

/// Prints an error with its causes, for a person at a terminal.
pub fn fail(what: &str, error: &dyn std::error::Error) -> ExitCode {
    eprintln!("opencode-sidecar: {what}: {}", chain(error));
    ExitCode::FAILURE
}
