//!
//! The only module that knows SQL. Nothing here decides a status or a `seq`: it keeps what it is handed and gives
//! the same back. Everything above it may retry [`Store::commit`]; nothing above it sees a `sqlx` type.
//!
//! Table names are unqualified and each connection's `search_path` is `DATABASE_SCHEMA`, so that several sidecars
//! can share a database, each in its own schema; and sidecars of several projects a schema, each with a role that is bound
//! to its project (see [`Role`]). Times are kept to the microsecond.

mod callbacks;
mod connect;
pub mod embedded;
mod error;
mod lease;
mod migrate;
mod read;
mod retention;
mod role;
mod row;
mod sessions;
mod write;

pub use callbacks::Callback;
pub use connect::{DatabaseOptions, Store};
pub use embedded::{Embedded, EmbeddedError};
pub use error::StoreError;
pub use lease::Beats;
pub use read::{Cursor, EventQuery, HistoryFilter};
pub use retention::Forgotten;
pub use role::Role;
pub use sessions::{SessionCursor, SessionView};
pub use write::{Committed, Fact, Outcome, OutcomeFailure, Write};
