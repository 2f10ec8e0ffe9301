//! `doctor`: prints what this host offers.

use crate::config::Config;
use crate::console::{DIM, one_line};
use crate::doctor::{self, Report};
use crate::host::{executable, fail};
use anstream::AutoStream;
use std::io::{self, Write};
use std::process::ExitCode;

/// The exit codes, as the help lists them.
pub(super) const EXIT_CODES: &str = "\
Exit codes:
  0  a session could start with the present configuration
  1  none could, for what is `failed`";

pub(super) async fn run(json: bool) -> ExitCode {
    let executable = match executable() {
        Ok(executable) => executable,
        Err(error) => return fail("our own executable cannot be found", &error),
    };
    let report = doctor::examine(executable, Config::from_env()).await;
    if let Err(error) = print(&report, json) {
        return fail("the report cannot be printed", &error);
    }
    if report.ready { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print(report: &Report, json: bool) -> io::Result<()> {
    let mut out = AutoStream::auto(io::stdout().lock());
    if json {
        serde_json::to_writer_pretty(&mut out, report)?;
        return writeln!(out);
    }
    let width = report.findings.iter().map(|finding| finding.name.len()).max().unwrap_or(0);
    for finding in &report.findings {
        let state = finding.state.as_str();
        writeln!(out, "{:width$}  {state:7}  {DIM}{}{DIM:#}", finding.name, one_line(&finding.detail))?;
    }
    writeln!(out)?;
    match report.ready {
        true => writeln!(out, "A session could start. It would have: {}", report.protections.join(", ")),
        false => {
            let failed: Vec<_> = report.failures().map(|finding| finding.name.as_str()).collect();
            writeln!(out, "No session could start: {}", failed.join(", "))
        }
    }
}
