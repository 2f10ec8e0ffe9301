//! What can go wrong with the database, told apart by what the caller can do about it.

use crate::model::{ExecutionId, Status};
use sqlx::migrate::MigrateError;

/// Why the store could not do what was asked. Never shows the URL, the password, or a stored value.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// `DATABASE_URL` or `DATABASE_SCHEMA` cannot be used as it stands.
    #[error("the database options are not valid: {0}")]
    Options(String),
    /// The server is away, shutting down, read-only, out of room or too slow. The same call may succeed later.
    #[error("the database is not available")]
    Unavailable(#[source] Cause),
    /// The server answers but refuses the login or does not have the database. An operator has to act; at the
    /// start that is an end, later it is an outage like any other.
    #[error("the database refuses the connection")]
    Refused(#[source] Cause),
    /// The row shows neither the status that the write expects nor one that it leads to. Nothing was written.
    #[error("execution {execution} is {found}, not {expected}", found = found.as_str(), expected = expected.as_str())]
    Conflict { execution: ExecutionId, expected: Status, found: Status },
    /// The schema cannot be brought to what this version needs.
    #[error("the database schema cannot be migrated: {what}")]
    Migration {
        what: String,
        #[source]
        source: Option<Box<MigrateError>>,
    },
    /// The role of the connections is not the one that this project's sidecars are to have. An operator has to act.
    #[error("the database role is not right: {0}")]
    Role(String),
    /// A row holds something that this version cannot read.
    #[error("a stored row cannot be read: {0}")]
    Corrupt(String),
    /// Anything else: a bug here, or rights that are missing.
    #[error("the database failed")]
    Other(#[source] Cause),
}

/// What the database or its driver said.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    #[error(transparent)]
    Database(Box<sqlx::Error>),
    #[error("no answer within {0} s")]
    Timeout(u64),
    #[error("it did not answer a moment ago")]
    Away,
    #[error("{0}")]
    Unready(String),
    #[error("it takes nothing now, and may lack what was told")]
    Behind,
}

impl StoreError {
    /// Whether the same call may succeed later with nothing changed in it.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Refused(_))
    }

    /// What it has may not be how things stand: it takes nothing now.
    pub fn behind() -> Self {
        Self::Unavailable(Cause::Behind)
    }

    /// The database did not do it within this time.
    pub fn timeout(limit: std::time::Duration) -> Self {
        Self::Unavailable(Cause::Timeout(limit.as_secs()))
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        use sqlx::Error as E;
        let sort: fn(Cause) -> Self = match &error {
            // `Protocol` is a connection that broke in the middle of an answer.
            E::Io(_)
            | E::Tls(_)
            | E::Protocol(_)
            | E::PoolTimedOut
            | E::PoolClosed
            | E::WorkerCrashed
            | E::BeginFailed => Self::Unavailable,
            E::Database(database) => by_code(database.code().as_deref().unwrap_or_default()),
            // The text of these names a column or a type, never a value.
            E::ColumnDecode { .. } | E::Decode(_) => return Self::Corrupt(error.to_string()),
            _ => Self::Other,
        };
        sort(Cause::Database(Box::new(error)))
    }
}

/// What a SQLSTATE means for the caller (<https://www.postgresql.org/docs/current/errcodes-appendix.html>).
fn by_code(code: &str) -> fn(Cause) -> StoreError {
    match code {
        // Login refused; no such database.
        c if c.starts_with("28") || c == "3D000" => StoreError::Refused,
        // Read-only (a standby after a failover), serialization, deadlock, lock timeout, idle in transaction.
        "25006" | "40001" | "40P01" | "55P03" | "25P03" => StoreError::Unavailable,
        // Connection, resources (disk, memory, connections), operator (shutdown, statement timeout), system (I/O).
        c if ["08", "53", "57", "58"].iter().any(|class| c.starts_with(class)) => StoreError::Unavailable,
        _ => StoreError::Other,
    }
}

impl From<MigrateError> for StoreError {
    fn from(error: MigrateError) -> Self {
        let what = match error {
            MigrateError::Execute(source) => return source.into(),
            MigrateError::ExecuteMigration(source, version) => {
                let sorted = Self::from(source);
                if sorted.is_transient() {
                    return sorted;
                }
                let why = std::error::Error::source(&sorted).map(ToString::to_string).unwrap_or_default();
                return Self::Migration { what: format!("migration {version} failed: {why}"), source: None };
            }
            MigrateError::VersionMissing(version) => {
                format!("it has migration {version}, which this version does not know: a newer sidecar made it")
            }
            MigrateError::VersionMismatch(version) => {
                format!("migration {version} was applied in another form than this version has")
            }
            _ => "unexpected state of its migration table".to_owned(),
        };
        Self::Migration { what, source: Some(Box::new(error)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_tell_an_outage_from_a_bug() {
        let sorted = |code| by_code(code)(Cause::Timeout(1));
        for outage in ["08006", "53100", "53300", "57014", "57P01", "57P03", "58030", "25006", "40P01"] {
            assert!(matches!(sorted(outage), StoreError::Unavailable(_)), "{outage}");
        }
        for refused in ["28P01", "28000", "3D000"] {
            assert!(matches!(sorted(refused), StoreError::Refused(_)), "{refused}");
        }
        for bug in ["42P01", "42601", "22P05", "23514", "42501", ""] {
            assert!(matches!(sorted(bug), StoreError::Other(_)), "{bug}");
        }
    }
}
