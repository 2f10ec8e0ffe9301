//! The connection pool: how connections are made, what each of them is told, and how long one operation may take.

use super::StoreError;
use super::error::Cause;
use secrecy::{ExposeSecret, SecretString};
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions, Executor, PgConnection, Postgres};
use std::fmt;
use std::ops::DerefMut;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use uuid::Uuid;

/// How long an operation waits for a connection, one being made included.
const ACQUIRE_LIMIT: Duration = Duration::from_secs(3);
/// How long the server works on one statement before it gives up.
const STATEMENT_LIMIT: Duration = Duration::from_secs(10);
/// How long a whole operation may take. The driver sets no TCP keepalive, so this is also what notices that the
/// network to the server is gone.
const OPERATION_LIMIT: Duration = Duration::from_secs(20);
const SLOW_STATEMENT: Duration = Duration::from_secs(1);
/// How often is looked whether the server answers, and how long it has.
const LOOK_EVERY: Duration = Duration::from_secs(2);
const LOOK_LIMIT: Duration = Duration::from_secs(2);
/// Postgres cuts longer names off without a word.
const MAX_NAME_BYTES: usize = 63;

/// Parameters of a URL that the driver understands; it would log the values of others.
const URL_PARAMETERS: &[&str] = &[
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
];

/// Where the database is.
#[derive(Clone, Debug)]
pub struct DatabaseOptions {
    /// `postgres://user:password@host:port/database?sslmode=…`
    pub url: SecretString,
    /// The schema that holds every table of the sidecar; made by [`Store::migrate`] where it is missing.
    pub schema: String,
    /// Connections that are open at once, at least 1.
    pub max_connections: u32,
}

/// The sidecar's tables. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    pool: PgPool,
    pub(super) options: PgConnectOptions,
    pub(super) schema: String,
    /// Whether changes of status are kept for the backend.
    pub(super) callbacks: bool,
    /// Counts up with each of them that is committed here.
    pub(super) callbacks_written: watch::Sender<u64>,
    /// Whether it did not answer at the last look.
    away: watch::Sender<bool>,
    /// How many operations succeeded.
    answers: Arc<AtomicU64>,
    /// Which sidecar writes here, where that is known.
    pub(super) owner: Option<Uuid>,
    /// Whose rows it is there for, where the role is to be held against that.
    pub(super) project: Option<String>,
    /// Why its schema is not what this version needs yet; `None` where it is, or somebody else sees to that.
    unready: watch::Sender<Option<String>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("schema", &self.schema)
            .field("connections", &self.pool.size())
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Checks the options and makes the pool. No connection is made yet, so that a sidecar can start while its
    /// database is away; each later call connects as it needs, and again after an outage.
    ///
    /// # Errors
    /// [`StoreError::Options`] where URL or schema cannot be used.
    pub async fn connect(options: &DatabaseOptions) -> Result<Self, StoreError> {
        let schema = checked_schema(&options.schema)?;
        let connect = connect_options(&options.url)?;
        let search_path = quote(&schema);
        let pool = PgPoolOptions::new()
            .max_connections(options.max_connections.max(1))
            .acquire_timeout(ACQUIRE_LIMIT)
            .after_connect(move |connection, _| {
                let search_path = search_path.clone();
                Box::pin(async move { prepare(connection, &search_path, STATEMENT_LIMIT).await })
            })
            .connect_lazy_with(connect.clone());
        Ok(Self {
            pool,
            options: connect,
            schema,
            callbacks: false,
            callbacks_written: watch::Sender::new(0),
            away: watch::Sender::new(false),
            answers: Arc::default(),
            owner: None,
            project: None,
            unready: watch::Sender::new(None),
        })
    }

    /// Leaves the migrations to [`Store::watch`]: for a start while the server is away. Until they are done every call is
    /// [`StoreError::Unavailable`].
    pub fn migrate_later(&self) {
        self.unready.send_replace(Some("the database was not there at the start".to_owned()));
        self.set_away(true);
    }

    /// Waits until it can be used for the first time.
    pub async fn ready(&self) {
        // The sender lives as long as `self`.
        let _ = self.unready.subscribe().wait_for(Option::is_none).await;
    }

    /// Keeps each change of status of a caller's session for the backend, until [`Store::callback_taken`]. Off at first:
    /// where nobody takes them they would pile up.
    #[must_use]
    pub fn with_callbacks(mut self) -> Self {
        self.callbacks = true;
        self
    }

    /// Writes as this sidecar: of executions that were taken over from it no status is taken.
    #[must_use]
    pub fn as_owner(mut self, owner: Uuid) -> Self {
        self.owner = Some(owner);
        self
    }

    /// For this project: [`Store::migrate`] ends with an error where the role may not write its rows, and warns where it sees
    /// those of others too.
    #[must_use]
    pub fn for_project(mut self, project: &str) -> Self {
        self.project = Some(project.to_owned());
        self
    }

    pub(super) fn callbacks_are_written(&self, count: u64) {
        if count > 0 {
            self.callbacks_written.send_modify(|written| *written += count);
        }
    }

    /// Grows when a change for the backend is committed through this store or a clone of it. A commit whose outcome was
    /// lost may not show here.
    pub fn callbacks_written(&self) -> watch::Receiver<u64> {
        self.callbacks_written.subscribe()
    }

    /// Whether it did not answer at the last look of [`Store::watch`]. Asks nobody.
    pub fn is_away(&self) -> bool {
        *self.away.borrow()
    }

    /// Whether the database answers.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] or [`StoreError::Refused`] where it does not.
    pub async fn ping(&self) -> Result<(), StoreError> {
        let answer = self.insist(async |connection: &mut PgConnection| Ok(connection.execute("SELECT 1").await?));
        answer.await.map(drop)
    }

    /// Looks now and then whether it answers, until this is dropped. While it does not, whoever wants to read from it
    /// is refused at once and does not wait for a server that says nothing. Catches up on migrations too
    /// ([`Store::migrate_later`]).
    pub async fn watch(&self) {
        loop {
            if self.unready.borrow().is_some() {
                self.catch_up().await;
            } else {
                let before = self.answers.load(Ordering::SeqCst);
                let looked = tokio::time::timeout(LOOK_LIMIT, self.ping()).await;
                if !matches!(looked, Ok(Ok(()))) {
                    // A look that began before the server came back says nothing of it once another one had an answer.
                    self.away.send_if_modified(|away| {
                        self.answers.load(Ordering::SeqCst) == before && !std::mem::replace(away, true)
                    });
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn catch_up(&self) {
        match self.migrate().await {
            Ok(()) => {
                tracing::info!("the database is there now");
                self.unready.send_replace(None);
                self.set_away(false);
            }
            Err(error) => {
                let why = format!("the database could not be used yet: {error}");
                // Said once, and again when it is another reason.
                if self.unready.send_replace(Some(why.clone())) != Some(why) {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "the database cannot be used yet; the journal bridges it"
                    );
                }
            }
        }
    }

    pub(super) fn set_away(&self, away: bool) {
        self.away.send_if_modified(|before| std::mem::replace(before, away) != away);
    }

    /// Closes every connection, waiting for those in use. Later calls are [`StoreError::Unavailable`].
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// Runs one operation on a connection of the pool, within the time that one may take, and only until the server is
    /// known to be away.
    pub(super) async fn run<T>(
        &self,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut away = self.away.subscribe();
        tokio::select! {
            biased;
            // The sender lives as long as `self`.
            _ = away.wait_for(|away| *away && self.unready.borrow().is_none()) => Err(StoreError::Unavailable(Cause::Away)),
            done = self.insist(work) => done,
        }
    }

    /// The same, whatever is known; and where it answers it is there.
    pub(super) async fn insist<T>(
        &self,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        if let Some(why) = &*self.unready.borrow() {
            return Err(StoreError::Unavailable(Cause::Unready(why.clone())));
        }
        let mut lease = Lease { connection: self.pool.acquire().await?, answered: false };
        match tokio::time::timeout(OPERATION_LIMIT, work(lease.connection.deref_mut())).await {
            Ok(done) => {
                lease.answered = true;
                if done.is_ok() {
                    // Known at once, and not only at the next look: who ships is the first to see it come back. Both
                    // under the lock of `away`, so that no look comes between.
                    self.away.send_if_modified(|away| {
                        self.answers.fetch_add(1, Ordering::SeqCst);
                        std::mem::replace(away, false)
                    });
                }
                done
            }
            Err(_) => Err(StoreError::timeout(OPERATION_LIMIT)),
        }
    }
}

/// A connection in use. One whose operation was given up in the middle is closed, not handed to the next.
struct Lease {
    connection: PoolConnection<Postgres>,
    answered: bool,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.answered {
            self.connection.close_on_drop();
        }
    }
}

/// What every connection is told first.
pub(super) async fn prepare(
    connection: &mut PgConnection,
    search_path: &str,
    statement_limit: Duration,
) -> Result<(), sqlx::Error> {
    let limit = statement_limit.as_millis().to_string();
    // Unchecked, since it has to work before the schema exists.
    sqlx::query("SELECT set_config('search_path', $1, false), set_config('statement_timeout', $2, false)")
        .bind(search_path)
        .bind(limit)
        .execute(connection)
        .await?;
    Ok(())
}

/// A name as an SQL identifier.
pub(super) fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn checked_schema(schema: &str) -> Result<String, StoreError> {
    let wrong = if schema.is_empty() {
        "the schema has no name"
    } else if schema.len() > MAX_NAME_BYTES {
        "the schema's name is longer than 63 bytes"
    } else if schema.contains('\0') {
        "the schema's name contains NUL"
    } else if schema.starts_with("pg_") || schema == "information_schema" {
        "the schema's name is reserved by Postgres"
    } else {
        return Ok(schema.to_owned());
    };
    Err(StoreError::Options(wrong.to_owned()))
}

fn connect_options(url: &SecretString) -> Result<PgConnectOptions, StoreError> {
    // The parse errors of the driver may quote parts of the URL: none of them is passed on.
    let mut parsed =
        url::Url::parse(url.expose_secret()).map_err(|e| StoreError::Options(format!("the URL is malformed: {e}")))?;
    if !matches!(parsed.scheme(), "postgres" | "postgresql") {
        return Err(StoreError::Options("the URL does not begin with postgres://".to_owned()));
    }
    let pairs: Vec<_> = parsed.query_pairs().into_owned().collect();
    let (known, unknown): (Vec<_>, Vec<_>) =
        pairs.into_iter().partition(|(key, _)| URL_PARAMETERS.contains(&key.as_str()) || key.starts_with("options["));
    for (key, _) in &unknown {
        tracing::warn!(key, "ignoring an unknown parameter of the database URL");
    }
    if !unknown.is_empty() {
        parsed.query_pairs_mut().clear().extend_pairs(known);
    }
    let options = PgConnectOptions::from_str(parsed.as_str())
        .map_err(|_| StoreError::Options("the URL has a part that cannot be used".to_owned()))?;
    Ok(options
        .application_name("opencode-sidecar")
        .log_statements(tracing::log::LevelFilter::Trace)
        .log_slow_statements(tracing::log::LevelFilter::Warn, SLOW_STATEMENT))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(url: &str) -> String {
        let error = connect_options(&SecretString::from(url)).unwrap_err();
        assert!(matches!(error, StoreError::Options(_)));
        format!("{error} {error:?}")
    }

    #[test]
    fn a_bad_url_is_refused_without_showing_it() {
        for url in [
            "",
            "hunter2",
            "mysql://u:hunter2@h/d",
            "postgres://u:hunter2@h:hunter2/d",
            "postgres://u:p@h/d?sslmode=hunter2",
            "postgres://u:p@h/d?port=hunter2",
        ] {
            assert!(!refused(url).contains("hunter2"), "{url}");
        }
    }

    #[test]
    fn unknown_parameters_are_dropped_and_known_ones_kept() {
        let options = connect_options(&SecretString::from(
            "postgres://u:p%40@h:5433/d?channel_binding=x&host=%2Frun%2Fpg&options=-c%20jit%3Doff",
        ))
        .unwrap();
        assert_eq!(options.get_socket().unwrap().to_str(), Some("/run/pg"));
        assert_eq!(options.get_port(), 5433);
        assert_eq!(options.get_options(), Some("-c jit=off"));
        assert_eq!(options.get_application_name(), Some("opencode-sidecar"));
    }

    #[tokio::test]
    async fn debug_shows_no_secret() {
        let options = DatabaseOptions {
            url: SecretString::from("postgres://u:hunter2@h/d"),
            schema: "s".to_owned(),
            max_connections: 1,
        };
        let store = Store::connect(&options).await.unwrap();
        assert!(!format!("{options:?} {store:?}").contains("hunter2"));
    }

    #[test]
    fn schema_names() {
        assert_eq!(quote("a\"b"), "\"a\"\"b\"");
        for bad in ["", "pg_x", "information_schema", "a\0", &"x".repeat(64)] {
            assert!(checked_schema(bad).is_err(), "{bad:?}");
        }
        assert!(checked_schema("Opencode \"x\"").is_ok());
    }
}
