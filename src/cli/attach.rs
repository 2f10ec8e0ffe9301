//! `attach` and `cancel`: an execution that exists.

use super::ask::Signals;
use super::connect::Connect;
use super::exit::{Exit, Trouble};
use super::tell::say;
use super::values;
use super::watch::{Watching, watch};
use crate::console::{one_line, status};
use crate::model::ExecutionId;
use std::io::Write;

pub(super) const ATTACH_EXAMPLES: &str = "\
Examples:
  opencode-sidecar attach 01a1fbdc-a3e3-7549-9b4c-044938b8d484
  opencode-sidecar attach --json --after 120 01a1fbdc-a3e3-7549-9b4c-044938b8d484";

pub(super) const CANCEL_EXAMPLES: &str = "\
Examples:
  opencode-sidecar cancel 01a1fbdc-a3e3-7549-9b4c-044938b8d484
  opencode-sidecar cancel --reason 'the wrong branch' 01a1fbdc-a3e3-7549-9b4c-044938b8d484";

/// Which execution to follow.
#[derive(Debug, clap::Args)]
pub(super) struct Attach {
    /// Its id
    #[arg(value_parser = values::execution_id)]
    execution_id: ExecutionId,
    /// Show only what comes after this event
    #[arg(long, value_name = "SEQ", default_value_t = 0)]
    after: u64,
    #[command(flatten)]
    watching: Watching,
    #[command(flatten)]
    connect: Connect,
}

impl Attach {
    pub(super) async fn run(self) -> Result<Exit, Trouble> {
        let client = self.connect.client()?;
        // Whoever cannot be reached now is not waited for.
        client.status(self.execution_id).await?;
        watch(&client, self.execution_id, self.after, &self.watching, Signals::new()?, None).await
    }
}

/// Which execution to cancel.
#[derive(Debug, clap::Args)]
pub(super) struct Cancel {
    /// Its id
    #[arg(value_parser = values::execution_id)]
    execution_id: ExecutionId,
    /// Why, for the sidecar's log
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    connect: Connect,
}

impl Cancel {
    pub(super) async fn run(self) -> Result<Exit, Trouble> {
        let standing = self.connect.client()?.cancel(self.execution_id, self.reason.as_deref()).await?;
        let text = status(standing.status.as_str(), standing.reason.as_deref());
        writeln!(anstream::stdout(), "{}", one_line(&text))?;
        if standing.status.is_final() {
            return Ok(Exit::Done);
        }
        say("it is being cancelled, but has not ended yet");
        Ok(Exit::RunsOn)
    }
}
