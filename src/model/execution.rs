//! The life of an execution: one pure state machine.
//!
//! [`apply`] is the only place that decides a status. It has no clock and does no I/O; the caller hands it the
//! time and carries out the [`Effect`]s. Whoever writes a status to a database names the one it replaces.

use super::ExecutionRecord;
use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// Every value.
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            /// The contract's word.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            /// The value for a word; `None` for an unknown one.
            pub fn parse(word: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|v| v.as_str() == word)
            }
        }
    };
}

words! {
    /// Where an execution stands.
    Status {
        /// Accepted, waiting for its turn.
        Pending = "pending",
        /// Its session is being started, or the agent works.
        Running = "running",
        /// The agent waits for an answer.
        WaitingInput = "waiting_input",
        /// Every process of the session is stopped.
        Paused = "paused",
        /// OpenCode said that it finished. Final.
        Completed = "completed",
        /// It ended otherwise. Final.
        Failed = "failed",
        /// Somebody asked for its end. Final.
        Cancelled = "cancelled",
    }
}

impl Status {
    /// Whether nothing can follow.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

words! {
    /// Why an execution ended: the contract's closed list.
    Reason {
        Finished = "finished",
        Cancelled = "cancelled",
        Timeout = "timeout",
        Stalled = "stalled",
        OomKilled = "oom_killed",
        PidsExhausted = "pids_exhausted",
        DiskExhausted = "disk_exhausted",
        BudgetExceeded = "budget_exceeded",
        ModelError = "model_error",
        PermissionDenied = "permission_denied",
        OpencodeCrashed = "opencode_crashed",
        OpencodeUnresponsive = "opencode_unresponsive",
        Interrupted = "interrupted",
        SandboxUnavailable = "sandbox_unavailable",
        Internal = "internal",
    }
}

impl Reason {
    /// The final status that goes with the reason. There is exactly one for each.
    pub fn status(self) -> Status {
        match self {
            Self::Finished => Status::Completed,
            Self::Cancelled => Status::Cancelled,
            _ => Status::Failed,
        }
    }
}

/// Everything that decides what may come next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub status: Status,
    /// Set with a final status, never before.
    pub reason: Option<Reason>,
    pub created_at: DateTime<Utc>,
    pub started_at: Option<DateTime<Utc>>,
    pub completed_at: Option<DateTime<Utc>>,
    /// Time spent in `paused` that is over.
    pub paused: TimeDelta,
    /// Since when it is paused now, and what it was before.
    pub paused_since: Option<(DateTime<Utc>, Status)>,
    /// Why its session is being ended. The first ask wins: what comes later changes nothing.
    pub ending: Option<Reason>,
}

impl State {
    /// A new execution, waiting for its turn.
    pub fn new(now: DateTime<Utc>) -> Self {
        Self {
            status: Status::Pending,
            reason: None,
            created_at: now,
            started_at: None,
            completed_at: None,
            paused: TimeDelta::zero(),
            paused_since: None,
            ending: None,
        }
    }

    /// That of an execution that was stored.
    pub fn of(record: &ExecutionRecord) -> Self {
        Self {
            status: record.status,
            reason: record.reason,
            started_at: record.started_at,
            completed_at: record.completed_at,
            paused: TimeDelta::milliseconds(i64::try_from(record.paused_ms).unwrap_or(i64::MAX)),
            ..Self::new(record.created_at)
        }
    }

    /// Time on the execution's own clock: from its start to `now` or its end, without what it was paused.
    pub fn running_time(&self, now: DateTime<Utc>) -> TimeDelta {
        let Some(started) = self.started_at else { return TimeDelta::zero() };
        let end = self.completed_at.unwrap_or(now);
        (end - started - self.paused_time(now)).max(TimeDelta::zero())
    }

    /// All time in `paused`, the present pause included.
    pub fn paused_time(&self, now: DateTime<Utc>) -> TimeDelta {
        self.paused + self.paused_since.map_or(TimeDelta::zero(), |(since, _)| (now - since).max(TimeDelta::zero()))
    }
}

/// What can happen to an execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Its turn has come: a session is being started for it.
    Start,
    /// It had started in an earlier life of the sidecar, and a session is being started for it again.
    Restart,
    /// The agent asks something.
    AwaitInput,
    /// It was answered.
    InputGiven,
    /// Stop every process of the session.
    Pause,
    /// Let them run again.
    Resume,
    /// End it for this reason: the session goes first, the final status follows ([`Command::Ended`]).
    End(Reason),
    /// Nothing of the session is left (or it never had one).
    Ended,
}

/// What the caller has to do after a transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Write `to` where `expected` stands, with its `status` event.
    Record { expected: Status, to: Status },
    /// Freeze the session.
    Freeze,
    /// Let the session run.
    Thaw,
    /// End the session and prove that nothing of it is left, then [`Command::Ended`].
    StopSession,
    /// Write the `complete` event; nothing may follow it.
    Complete,
}

/// Why a command was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    #[error("the execution has ended")]
    Final,
    #[error("that does not follow from the status {}", .0.as_str())]
    NotFrom(Status),
    #[error("the execution is ending")]
    Ending,
}

/// One step: the state that follows and what to do about it.
///
/// # Errors
/// [`Rejected`] where the command does not follow from the state, which is then unchanged.
pub fn apply(state: &State, command: Command, now: DateTime<Utc>) -> Result<(State, Vec<Effect>), Rejected> {
    if state.status.is_final() {
        return Err(Rejected::Final);
    }
    let mut next = state.clone();
    let from = state.status;
    match command {
        Command::End(_) if state.ending.is_some() => return Err(Rejected::Ending),
        Command::End(reason) => {
            next.ending = Some(reason);
            let mut effects = Vec::new();
            if from == Status::Paused {
                effects.push(Effect::Thaw);
            }
            effects.push(Effect::StopSession);
            return Ok((next, effects));
        }
        Command::Ended => {
            let Some(reason) = state.ending else { return Err(Rejected::NotFrom(from)) };
            next.paused = state.paused_time(now);
            next.paused_since = None;
            next.status = reason.status();
            next.reason = Some(reason);
            next.completed_at = Some(now);
            return Ok((next, vec![Effect::Record { expected: from, to: reason.status() }, Effect::Complete]));
        }
        _ if state.ending.is_some() => return Err(Rejected::Ending),
        Command::Start if from == Status::Pending => {
            next.status = Status::Running;
            next.started_at = Some(now);
        }
        Command::Restart if from == Status::Running => return Ok((next, Vec::new())),
        Command::Restart if matches!(from, Status::WaitingInput | Status::Paused) => {
            next.paused = state.paused_time(now);
            next.paused_since = None;
            next.status = Status::Running;
        }
        Command::AwaitInput if from == Status::Running => next.status = Status::WaitingInput,
        Command::InputGiven if from == Status::WaitingInput => next.status = Status::Running,
        Command::Pause if matches!(from, Status::Running | Status::WaitingInput) => {
            next.status = Status::Paused;
            next.paused_since = Some((now, from));
            return Ok((next, vec![Effect::Freeze, Effect::Record { expected: from, to: Status::Paused }]));
        }
        Command::Resume => {
            let Some((_, before)) = state.paused_since else { return Err(Rejected::NotFrom(from)) };
            next.paused = state.paused_time(now);
            next.paused_since = None;
            next.status = before;
            return Ok((next, vec![Effect::Thaw, Effect::Record { expected: from, to: before }]));
        }
        _ => return Err(Rejected::NotFrom(from)),
    }
    let to = next.status;
    Ok((next, vec![Effect::Record { expected: from, to }]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + seconds, 0).unwrap()
    }

    fn in_status(status: Status) -> State {
        let mut state = State::new(at(0));
        state.status = status;
        match status {
            Status::Pending => {}
            Status::Paused => {
                state.started_at = Some(at(1));
                state.paused_since = Some((at(2), Status::Running));
            }
            Status::Running | Status::WaitingInput => state.started_at = Some(at(1)),
            Status::Completed | Status::Failed | Status::Cancelled => {
                state.started_at = Some(at(1));
                state.completed_at = Some(at(3));
            }
        }
        state
    }

    /// Every status × every command: what follows, or that nothing does.
    #[test]
    fn the_whole_table() {
        use Command as C;
        use Status as S;
        let record = |expected, to| Effect::Record { expected, to };
        let commands = [
            C::Start,
            C::Restart,
            C::AwaitInput,
            C::InputGiven,
            C::Pause,
            C::Resume,
            C::End(Reason::Timeout),
            C::Ended,
        ];
        for &status in S::ALL {
            for command in commands {
                let got = apply(&in_status(status), command, at(10));
                let want: Result<(S, Vec<Effect>), Rejected> = match (status, command) {
                    (S::Completed | S::Failed | S::Cancelled, _) => Err(Rejected::Final),
                    (S::Pending, C::Start) => Ok((S::Running, vec![record(S::Pending, S::Running)])),
                    (S::Running, C::Restart) => Ok((S::Running, Vec::new())),
                    (S::WaitingInput | S::Paused, C::Restart) => Ok((S::Running, vec![record(status, S::Running)])),
                    (S::Running, C::AwaitInput) => Ok((S::WaitingInput, vec![record(S::Running, S::WaitingInput)])),
                    (S::WaitingInput, C::InputGiven) => Ok((S::Running, vec![record(S::WaitingInput, S::Running)])),
                    (S::Running | S::WaitingInput, C::Pause) => {
                        Ok((S::Paused, vec![Effect::Freeze, record(status, S::Paused)]))
                    }
                    (S::Paused, C::Resume) => Ok((S::Running, vec![Effect::Thaw, record(S::Paused, S::Running)])),
                    (S::Paused, C::End(_)) => Ok((S::Paused, vec![Effect::Thaw, Effect::StopSession])),
                    (_, C::End(_)) => Ok((status, vec![Effect::StopSession])),
                    _ => Err(Rejected::NotFrom(status)),
                };
                assert_eq!(got.map(|(s, e)| (s.status, e)), want, "{status:?} {command:?}");
            }
        }
    }

    #[test]
    fn the_first_reason_to_end_wins_and_decides_the_status() {
        for &reason in Reason::ALL {
            let (ending, _) = apply(&in_status(Status::Running), Command::End(reason), at(5)).unwrap();
            assert_eq!(ending.reason, None, "a reason is not shown before the end is true");
            assert_eq!(apply(&ending, Command::End(Reason::Finished), at(6)), Err(Rejected::Ending));
            assert_eq!(apply(&ending, Command::Pause, at(6)), Err(Rejected::Ending));
            let (ended, effects) = apply(&ending, Command::Ended, at(7)).unwrap();
            assert_eq!((ended.status, ended.reason), (reason.status(), Some(reason)));
            assert_eq!(ended.completed_at, Some(at(7)));
            assert_eq!(
                effects,
                vec![Effect::Record { expected: Status::Running, to: reason.status() }, Effect::Complete]
            );
        }
    }

    #[test]
    fn only_finished_is_completed_and_only_cancelled_is_cancelled() {
        for &reason in Reason::ALL {
            assert_eq!(reason.status() == Status::Completed, reason == Reason::Finished);
            assert_eq!(reason.status() == Status::Cancelled, reason == Reason::Cancelled);
            assert!(reason.status().is_final());
        }
    }

    #[test]
    fn the_clock_stops_while_paused() {
        let (running, _) = apply(&State::new(at(0)), Command::Start, at(10)).unwrap();
        let (paused, _) = apply(&running, Command::Pause, at(15)).unwrap();
        assert_eq!(paused.running_time(at(100)), TimeDelta::seconds(5));
        let (resumed, _) = apply(&paused, Command::Resume, at(100)).unwrap();
        assert_eq!(resumed.running_time(at(103)), TimeDelta::seconds(8));
        assert_eq!(resumed.paused_time(at(103)), TimeDelta::seconds(85));
        let (ending, _) = apply(&resumed, Command::End(Reason::Finished), at(104)).unwrap();
        let (ended, _) = apply(&ending, Command::Ended, at(105)).unwrap();
        assert_eq!(ended.running_time(at(9999)), TimeDelta::seconds(10));
    }

    fn command() -> impl Strategy<Value = Command> {
        prop_oneof![
            Just(Command::Start),
            Just(Command::Restart),
            Just(Command::AwaitInput),
            Just(Command::InputGiven),
            Just(Command::Pause),
            Just(Command::Resume),
            prop::sample::select(Reason::ALL.to_vec()).prop_map(Command::End),
            Just(Command::Ended),
        ]
    }

    proptest! {
        /// Whatever happens, in whatever order, and however the clock jumps.
        #[test]
        fn a_life_is_one(commands in prop::collection::vec((command(), -50i64..100), 0..40)) {
            let mut state = State::new(at(0));
            let (mut now, mut first_end, mut written) = (0, None, Status::Pending);
            for (command, jump) in commands {
                now += jump;
                let Ok((next, effects)) = apply(&state, command, at(now)) else { continue };
                prop_assert!(!state.status.is_final(), "an end is the end");
                if let Command::End(reason) = command {
                    prop_assert_eq!(first_end.replace(reason), None, "the first reason wins");
                }
                for effect in &effects {
                    if let Effect::Record { expected, to } = effect {
                        prop_assert_eq!((*expected, *to), (written, next.status), "a chain without a gap");
                        written = *to;
                    }
                }
                prop_assert_eq!(written, next.status, "no change that is not written");
                prop_assert_eq!(next.status.is_final(), effects.contains(&Effect::Complete));
                prop_assert_eq!(next.reason.is_some(), next.status.is_final());
                prop_assert_eq!(next.completed_at.is_some(), next.status.is_final());
                prop_assert_eq!(next.paused_since.is_some(), next.status == Status::Paused);
                prop_assert!(next.reason.is_none() || next.reason == first_end);
                prop_assert!(next.status != Status::Completed || first_end == Some(Reason::Finished));
                prop_assert!(next.running_time(at(now)) >= TimeDelta::zero());
                prop_assert!(next.paused_time(at(now)) >= TimeDelta::zero());
                state = next;
            }
        }
    }

    #[test]
    fn words_match_serde() {
        for status in Status::ALL {
            assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
            assert_eq!(Status::parse(status.as_str()), Some(*status));
        }
        for reason in Reason::ALL {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.as_str());
        }
    }
}
