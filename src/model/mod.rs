//! The words of the domain: ids, tasks, the life of an execution, events.
//!
//! Pure: nothing here knows a runtime, a database, a socket or a clock. What needs the time of day gets it
//! as an argument.

pub mod destination;
pub mod event;
pub mod execution;
pub mod id;
pub mod idempotency;
pub mod record;
pub mod request;
pub mod session;
pub mod task;

pub use event::{Event, EventType, NewEvent, Severity};
pub use execution::{Reason, Status};
pub use id::{ExecutionId, SessionId, TaskId};
pub use idempotency::{Fingerprint, Idempotency, IdempotencyKey, Submitted};
pub use record::{ExecutionRecord, Usage};
pub use session::{SessionEventId, SessionRecord};
pub use task::Task;

use chrono::{DateTime, SecondsFormat, Utc};

/// A time as the contract writes it: RFC 3339, UTC, milliseconds.
pub fn rfc3339(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// Whether a character turns the direction of the text around it: what is shown then is not what is there (Unicode's
/// `Bidi_Control`).
pub fn turns_text(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Serde for a `DateTime<Utc>` in the contract's form (see [`rfc3339`]).
pub mod millis {
    use super::{DateTime, Utc, rfc3339};
    use serde::Serializer;

    /// Writes the time with milliseconds and `Z`.
    pub fn serialize<S: Serializer>(time: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&rfc3339(*time))
    }

    /// The same for a time that may be absent.
    pub mod option {
        use super::{DateTime, Utc, rfc3339};
        use serde::Serializer;

        /// Writes the time with milliseconds and `Z`, or `null`.
        pub fn serialize<S: Serializer>(time: &Option<DateTime<Utc>>, serializer: S) -> Result<S::Ok, S::Error> {
            match time {
                Some(time) => serializer.serialize_some(&rfc3339(*time)),
                None => serializer.serialize_none(),
            }
        }
    }
}
