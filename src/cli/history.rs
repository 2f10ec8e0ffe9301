//! `history`: the executions that there were, newest first.

use super::connect::Connect;
use super::exit::{Exit, Trouble};
use super::tell::{remark, write_json};
use super::values;
use crate::client::ClientError;
use crate::console::table::table;
use crate::model::{Status, rfc3339};
use chrono::{DateTime, Utc};
use serde_json::Value;
use serde_json::value::RawValue;
use std::io::{self, IsTerminal};
use uuid::Uuid;

/// The most that one page may have.
const PAGE: u32 = 200;

pub(super) const EXAMPLES: &str = "\
Examples:
  opencode-sidecar history --since 2h
  opencode-sidecar history --status failed --since 2026-11-01 --until 2026-12-01 --all
  opencode-sidecar history --json --all | jq -r 'select(.reason == \"timeout\").execution_id'";

/// Which executions.
#[derive(Debug, clap::Args)]
pub(super) struct History {
    /// Those of this task
    #[arg(long, value_name = "UUID")]
    task_id: Option<Uuid>,
    /// Those of this session
    #[arg(long, value_name = "UUID")]
    session: Option<Uuid>,
    /// Those that stand so
    #[arg(long, value_name = "STATUS", value_parser = clap::builder::PossibleValuesParser::new(Status::ALL.iter().map(|s| s.as_str())))]
    status: Option<String>,
    /// Those created then or later: RFC 3339, a date, or a time ago such as 2h
    #[arg(long, value_name = "WHEN", value_parser = values::moment)]
    since: Option<DateTime<Utc>>,
    /// Those created before then
    #[arg(long, value_name = "WHEN", value_parser = values::moment)]
    until: Option<DateTime<Utc>>,
    /// How many at most
    #[arg(long, value_name = "NUMBER", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// All of them
    #[arg(long, conflicts_with = "limit")]
    all: bool,
    /// Print each as one line of JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connect: Connect,
}

impl History {
    fn query(&self, limit: u32, cursor: Option<String>) -> Vec<(&'static str, String)> {
        let members = [
            ("task_id", self.task_id.map(|id| id.to_string())),
            ("session_id", self.session.map(|id| id.to_string())),
            ("status", self.status.clone()),
            ("from", self.since.map(rfc3339)),
            ("to", self.until.map(rfc3339)),
            ("limit", Some(limit.to_string())),
            ("cursor", cursor),
        ];
        members.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    /// Does what was asked for.
    pub(super) async fn run(self) -> Result<Exit, Trouble> {
        let client = self.connect.client()?;
        let mut left = if self.all { u32::MAX } else { self.limit };
        let (mut rows, mut cursor) = (Vec::new(), None);
        loop {
            let asked = left.min(PAGE);
            let page = client.history(&self.query(asked, cursor.take())).await?;
            left -= asked;
            cursor = page.next_cursor;
            if self.json {
                print(&page.executions)?;
            } else {
                let parsed = page.executions.iter().map(|row| serde_json::from_str::<Value>(row.get()));
                let parsed = parsed.collect::<Result<Vec<_>, _>>();
                rows.extend(parsed.map_err(|error| ClientError::Unexpected(error.to_string()))?);
            }
            if cursor.is_none() || left == 0 {
                break;
            }
        }
        if !self.json {
            self.show(&rows)?;
        }
        if cursor.is_some() {
            remark("There are more: --limit NUMBER or --all.");
        }
        Ok(Exit::Done)
    }

    fn show(&self, rows: &[Value]) -> io::Result<()> {
        if rows.is_empty() {
            remark("There is no such execution.");
            return Ok(());
        }
        let width = io::stdout().is_terminal().then(terminal_size::terminal_size).flatten();
        let left_out = table(&mut anstream::stdout(), rows, width.map(|(width, _)| usize::from(width.0)))?;
        if !left_out.is_empty() {
            remark(&format!("No room here for {}; --json has everything.", left_out.join(", ")));
        }
        Ok(())
    }
}

fn print(rows: &[Box<RawValue>]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for row in rows {
        write_json(&mut out, row.get())?;
    }
    Ok(())
}
