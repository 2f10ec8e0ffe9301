//! `logs`: what a run wrote, as text or event by event.

use super::connect::Connect;
use super::exit::{Exit, Trouble};
use super::tell::remark;
use super::values;
use crate::client::{Client, Followed, follow};
use crate::console::{Printer, entry};
use crate::model::{EventType, ExecutionId, Severity};
use crate::telemetry::chain;
use clap::ValueEnum;
use clap::builder::PossibleValuesParser;
use futures_util::StreamExt;
use serde_json::Value;
use std::io::{self, IsTerminal, Write};
use std::pin::pin;
use std::time::Duration;

/// Events per page.
const PAGE: u32 = 1000;

pub(super) const EXAMPLES: &str = "\
Examples:
  opencode-sidecar logs 01a1fbdc-a3e3-7549-9b4c-044938b8d484 > output.txt
  opencode-sidecar logs --events --severity warn,error 01a1fbdc-a3e3-7549-9b4c-044938b8d484
  opencode-sidecar logs --events --follow --type tool_call,tool_result 01a1fbdc-a3e3-7549-9b4c-044938b8d484

On a terminal nothing but colours passes of the escape sequences. What goes into a file or a pipe is as the shell \
wrote it (keep), or has them taken out (strip).";

/// What becomes of the escape sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Ansi {
    Keep,
    Strip,
}

/// Which log.
#[derive(Debug, clap::Args)]
pub(super) struct Logs {
    /// Its execution's id
    #[arg(value_parser = values::execution_id)]
    execution_id: ExecutionId,
    /// What becomes of the colours in the shell's output [default: keep on a terminal, else strip]
    #[arg(long, value_enum, conflicts_with = "events")]
    ansi: Option<Ansi>,
    /// List the events, each on one line with its time, instead of the shell's output alone
    #[arg(long)]
    events: bool,
    /// Only events of these types, with commas between them
    #[arg(long = "type", value_name = "TYPES", value_delimiter = ',', requires = "events",
        value_parser = PossibleValuesParser::new(EventType::ALL.iter().map(|t| t.as_str())))]
    types: Vec<String>,
    /// Only events of these severities, with commas between them
    #[arg(long, value_name = "SEVERITIES", value_delimiter = ',', requires = "events",
        value_parser = PossibleValuesParser::new(Severity::ALL.iter().map(|s| s.as_str())))]
    severity: Vec<String>,
    /// Go on until the run ends
    #[arg(long, short)]
    follow: bool,
    /// With --follow: how long to try to get a lost connection back
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = values::duration)]
    reconnect_for: Duration,
    #[command(flatten)]
    connect: Connect,
}

/// Where the shell's output goes.
enum Sink {
    /// As it is.
    Raw(io::Stdout),
    /// Without escape sequences; one for each of the two streams, since a sequence may be cut between two events.
    Stripped(io::Stdout, Box<[anstream::adapter::StripBytes; 2]>),
    Terminal(Box<Printer<anstream::AutoStream<io::Stdout>>>),
}

impl Sink {
    fn new(ansi: Option<Ansi>) -> Self {
        let out = io::stdout();
        match (out.is_terminal(), ansi) {
            (true, Some(Ansi::Strip)) => Self::Terminal(Box::new(Printer::new(anstream::AutoStream::never(out)))),
            (true, _) => Self::Terminal(Box::new(Printer::new(anstream::stdout()))),
            (false, Some(Ansi::Keep)) => Self::Raw(out),
            (false, _) => Self::Stripped(out, Box::default()),
        }
    }

    fn write(&mut self, bytes: &[u8], is_stderr: bool) -> io::Result<()> {
        match self {
            Self::Raw(out) => out.write_all(bytes).and_then(|()| out.flush()),
            Self::Stripped(out, strip) => {
                for text in strip[usize::from(is_stderr)].strip_next(bytes) {
                    out.write_all(text)?;
                }
                out.flush()
            }
            Self::Terminal(printer) => printer.output(bytes),
        }
    }

    /// A terminal's prompt begins on a line of its own.
    fn end(&mut self) -> io::Result<()> {
        match self {
            Self::Terminal(printer) => printer.end_line(),
            Self::Raw(_) | Self::Stripped(..) => Ok(()),
        }
    }
}

impl Logs {
    /// Does what was asked for.
    pub(super) async fn run(self) -> Result<Exit, Trouble> {
        let client = self.connect.client()?;
        match (self.events, self.follow) {
            (false, false) => {
                let mut sink = Sink::new(self.ansi);
                // A file gets what the sidecar sends; a terminal's colours are seen to here.
                let mut output = client.output(self.execution_id, matches!(sink, Sink::Stripped(..))).await?;
                while let Some(bytes) = output.next().await? {
                    sink.write(&bytes, false)?;
                }
                sink.end()?;
            }
            (true, false) => self.list(&client).await?,
            (false, true) => {
                let mut sink = Sink::new(self.ansi);
                self.follow(&client, |event| match event["type"].as_str() {
                    Some(kind @ ("stdout" | "stderr")) => {
                        sink.write(event["data"].as_str().unwrap_or_default().as_bytes(), kind == "stderr")
                    }
                    _ => Ok(()),
                })
                .await?;
                sink.end()?;
            }
            (true, true) => {
                let mut out = anstream::stdout();
                self.follow(&client, |event| match self.wants(event) {
                    true => entry(&mut out, event),
                    false => Ok(()),
                })
                .await?;
            }
        }
        Ok(Exit::Done)
    }

    fn wants(&self, event: &Value) -> bool {
        let listed = |words: &[String], name: &str| {
            words.is_empty() || event[name].as_str().is_some_and(|word| words.iter().any(|w| w == word))
        };
        listed(&self.types, "type") && listed(&self.severity, "severity")
    }

    async fn list(&self, client: &Client) -> Result<(), Trouble> {
        let mut out = anstream::stdout();
        let mut after = 0;
        loop {
            let mut query = vec![("after", after.to_string()), ("limit", PAGE.to_string())];
            for (name, words) in [("type", &self.types), ("severity", &self.severity)] {
                if !words.is_empty() {
                    query.push((name, words.join(",")));
                }
            }
            let page = client.events(self.execution_id, &query).await?;
            for event in &page.events {
                entry(&mut out, event)?;
            }
            if page.next_after <= after || page.next_after >= page.last_seq {
                return Ok(());
            }
            after = page.next_after;
        }
    }

    async fn follow(&self, client: &Client, mut show: impl FnMut(&Value) -> io::Result<()>) -> Result<(), Trouble> {
        client.status(self.execution_id).await?;
        let mut events = pin!(follow(client.clone(), self.execution_id, 0, self.reconnect_for));
        while let Some(event) = events.next().await {
            match event? {
                Followed::Event(event) => show(&event.value)?,
                Followed::Lost(error) => {
                    remark(&format!("The connection is lost ({}). Trying to get it back …", chain(&error)));
                }
                Followed::Back => remark("The connection is back."),
                Followed::Reset { .. } => remark("The log was lost in part: all of what is left follows."),
                Followed::Ended(_) => return Ok(()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_filtered_by_both_words() {
        let logs = |types: &[&str], severity: &[&str]| {
            let mut line = vec!["logs", "01a1fbdc-a3e3-7549-9b4c-044938b8d484", "--events"];
            let (types, severity) = (types.join(","), severity.join(","));
            if !types.is_empty() {
                line.extend(["--type", &types]);
            }
            if !severity.is_empty() {
                line.extend(["--severity", &severity]);
            }
            #[derive(Debug, clap::Parser)]
            struct Line {
                #[command(flatten)]
                logs: Logs,
            }
            <Line as clap::Parser>::try_parse_from(line).map(|line| line.logs)
        };
        let event = serde_json::json!({ "type": "stdout", "severity": "warn" });
        assert!(logs(&[], &[]).unwrap().wants(&event));
        assert!(logs(&["stderr", "stdout"], &["warn"]).unwrap().wants(&event));
        assert!(!logs(&["stdout"], &["error"]).unwrap().wants(&event));
        assert!(!logs(&["stderr"], &[]).unwrap().wants(&event));
        assert!(logs(&["nonsense"], &[]).is_err());
    }
}
