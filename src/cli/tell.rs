//! What the client's subcommands say beside what was asked for: remarks to a person, JSON to a program.

use crate::console::{DIM, json, one_line};
use std::io::{self, IsTerminal, Write};

/// Writes a line of JSON, byte for byte as it came. A terminal gets no character that it could take for a command.
pub(super) fn write_json(out: &mut io::StdoutLock<'_>, text: &str) -> io::Result<()> {
    match out.is_terminal() {
        true => writeln!(out, "{}", json(text)),
        false => writeln!(out, "{text}"),
    }
}

/// Tells a person something that matters. Where the standard error is gone there is nobody to tell.
pub(super) fn say(text: &str) {
    let _ = writeln!(anstream::stderr(), "opencode-sidecar: {}", one_line(text));
}

/// Tells a person something by the way.
pub(super) fn remark(text: &str) {
    let _ = writeln!(anstream::stderr(), "{DIM}{}{DIM:#}", one_line(text));
}
