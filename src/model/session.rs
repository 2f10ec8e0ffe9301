//! What is kept of a session that outlives its executions.

use super::SessionId;
use super::task::ModelChoice;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use uuid::Uuid;

/// A session that a caller made: a conversation that takes one prompt after another. Its status is that of its latest
/// execution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionRecord {
    /// The caller's own id.
    pub id: SessionId,
    /// The pod's project; sessions are looked up within one only.
    pub project_id: String,
    /// The sidecar instance (its state directory) that runs it.
    pub owner: Uuid,
    /// OpenCode's id of the conversation.
    pub remote_id: String,
    /// The model of all its executions, without its key.
    pub model: ModelChoice,
    /// Goes with each prompt that brings none of its own.
    pub system_prompt: Option<String>,
    pub created_at: DateTime<Utc>,
    /// It takes no more prompts since then.
    pub ended_at: Option<DateTime<Utc>>,
}

/// A place in the log of a session: an execution by its place among the session's, and an event of it.
/// Written `<ordinal>.<seq>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SessionEventId {
    pub ordinal: NonZeroU32,
    /// 0 stands before the first event.
    pub seq: u64,
}

impl fmt::Display for SessionEventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.ordinal, self.seq)
    }
}

/// The text is no place in a session's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be the id of an event: <ordinal>.<seq>, such as 1.42")]
pub struct BadEventId;

impl FromStr for SessionEventId {
    type Err = BadEventId;

    fn from_str(text: &str) -> Result<Self, BadEventId> {
        let (ordinal, seq) = text.split_once('.').ok_or(BadEventId)?;
        // `parse` would take a sign.
        if !text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
            return Err(BadEventId);
        }
        Ok(Self { ordinal: ordinal.parse().map_err(|_| BadEventId)?, seq: seq.parse().map_err(|_| BadEventId)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_ids_are_read_back_and_nothing_else_is() {
        for text in ["1.0", "1.1", "4294967295.18446744073709551615"] {
            assert_eq!(text.parse::<SessionEventId>().unwrap().to_string(), text);
        }
        for text in ["", "1", "0.1", "1.", ".1", "1.1.1", "+1.1", "1.-1", "a.b", "1.1 ", "4294967296.1"] {
            assert_eq!(text.parse::<SessionEventId>(), Err(BadEventId), "{text}");
        }
        assert!("2.1".parse::<SessionEventId>().unwrap() > "1.99".parse().unwrap());
    }
}
