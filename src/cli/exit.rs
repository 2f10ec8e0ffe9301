//! How the client's subcommands end: their exit codes, and why they could not do what they were asked for.

use super::tell::{remark, say};
use crate::client::ClientError;
use crate::model::Status;
use crate::telemetry::chain;
use std::io;
use std::process::ExitCode;

/// The exit codes of what follows a run, as the helps list them.
pub(super) const OF_RUNS: &str = "\
Exit codes:
  0  the run was completed (or, with --detach, the task was taken)
  1  something else went wrong
  2  the command line is not right
  3  the run failed
  4  the run was cancelled
  5  the run took longer than it may
  6  the sidecar refused the request, or knows no such execution
  7  the sidecar cannot be reached, or not any more
  8  the secret is missing or wrong
  9  the run goes on, unwatched";

/// The exit codes of the others. They are the same.
pub(super) const OF_CALLS: &str = "\
Exit codes:
  0  done
  1  something else went wrong
  2  the command line is not right
  6  the sidecar refused the request, or knows no such execution
  7  the sidecar cannot be reached, or not any more
  8  the secret is missing or wrong
  9  of cancel: the run has not ended yet";

/// How a subcommand ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Exit {
    Done = 0,
    Error = 1,
    Usage = 2,
    Failed = 3,
    Cancelled = 4,
    Timeout = 5,
    Refused = 6,
    Unreachable = 7,
    Unauthorized = 8,
    RunsOn = 9,
}

impl Exit {
    /// For how a run ended. One that has not is one that goes on.
    pub(super) fn of_run(status: Status, reason: Option<&str>) -> Self {
        match (status, reason) {
            (Status::Completed, _) => Self::Done,
            (Status::Cancelled, _) => Self::Cancelled,
            (Status::Failed, Some("timeout")) => Self::Timeout,
            (Status::Failed, _) => Self::Failed,
            _ => Self::RunsOn,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a subcommand could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
    /// A call failed.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A call failed, and more has to be said about it.
    #[error("{0}")]
    Told(String, #[source] ClientError),
    /// The standard output is gone, or signals cannot be had.
    #[error("the output is gone")]
    Output(#[from] io::Error),
}

impl Trouble {
    fn exit(&self) -> Exit {
        match self {
            Self::Usage(_) => Exit::Usage,
            Self::Client(error) | Self::Told(_, error) => of_error(error),
            Self::Output(_) => Exit::Error,
        }
    }

    /// Says it, and ends with its code.
    pub(super) fn report(self) -> ExitCode {
        // A reader that has enough, such as `head`, is told nothing.
        if !matches!(&self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe) {
            say(&chain(&self));
        }
        if self.exit() == Exit::Unauthorized {
            remark(
                "The secret is taken from the variable OPENCODE_SHARED_SECRET, or the file that --token-file names.",
            );
        }
        self.exit().into()
    }
}

fn of_error(error: &ClientError) -> Exit {
    match error {
        ClientError::Setup(_) => Exit::Usage,
        ClientError::Http(_) => Exit::Error,
        ClientError::Refused(refusal) if matches!(refusal.status, 401 | 403) => Exit::Unauthorized,
        ClientError::Refused(_) => Exit::Refused,
        ClientError::Unreachable(_)
        | ClientError::Silent(_)
        | ClientError::Ended
        | ClientError::GivenUp { .. }
        | ClientError::Unexpected(_) => Exit::Unreachable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Refusal;

    #[test]
    fn each_end_has_its_code() {
        use Status::*;
        for (status, reason, code) in [
            (Completed, Some("finished"), 0),
            (Failed, Some("model_error"), 3),
            (Failed, Some("stalled"), 3),
            (Cancelled, Some("cancelled"), 4),
            (Failed, Some("timeout"), 5),
            (Running, None, 9),
            (Paused, None, 9),
        ] {
            assert_eq!(Exit::of_run(status, reason) as u8, code);
        }
        let refused = |status| ClientError::Refused(Box::new(Refusal { status, ..Refusal::default() }));
        for (error, code) in [
            (refused(400), 6),
            (refused(401), 8),
            (refused(403), 8),
            (refused(404), 6),
            (refused(503), 6),
            (ClientError::Ended, 7),
            (ClientError::Setup(String::new()), 2),
        ] {
            assert_eq!(of_error(&error) as u8, code, "{error:?}");
        }
        let listed = |text: &str| -> Vec<u8> {
            text.lines().filter_map(|line| line.trim().split(' ').next()?.parse().ok()).collect()
        };
        assert_eq!(listed(OF_RUNS), (0..=Exit::RunsOn as u8).collect::<Vec<_>>());
        assert!(listed(OF_CALLS).iter().all(|code| listed(OF_RUNS).contains(code)));
    }
}
