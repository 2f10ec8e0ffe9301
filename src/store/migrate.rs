//! Brings the schema to what this version needs. Several pods may do it at once: one at a time does the work.

use super::connect::{Store, prepare, quote};
use super::{StoreError, error::Cause};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use std::time::Duration;

/// How long all of it may take, the wait for other pods included.
const LIMIT: Duration = Duration::from_secs(120);

impl Store {
    /// Makes the schema where it is missing and applies the migrations that it lacks. Safe to call from several
    /// processes at once, and again. Takes at most two minutes.
    ///
    /// # Errors
    /// [`StoreError::Migration`] where an applied migration differs from this version's, the schema is newer than
    /// this version, or a right is missing; [`StoreError::Unavailable`] and [`StoreError::Refused`] as elsewhere.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        tokio::time::timeout(LIMIT, self.migrate_unbounded()).await.map_err(|_| StoreError::timeout(LIMIT))?
    }

    async fn migrate_unbounded(&self) -> Result<(), StoreError> {
        // A connection of its own: the lock ends with it however this ends, and no statement limit of the pool
        // cuts the wait for another pod short.
        let mut connection = PgConnection::connect_with(&self.options).await?;
        let schema = quote(&self.schema);
        prepare(&mut connection, &schema, LIMIT).await?;
        // Advisory locks belong to a database, so the schema's name is in the key.
        sqlx::query("SELECT pg_advisory_lock(hashtextextended('opencode-sidecar migrations ' || $1, 0))")
            .bind(&self.schema)
            .execute(&mut connection)
            .await?;
        // IF NOT EXISTS would ask for the right to make schemas even where ours is there already.
        let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = $1)")
            .bind(&self.schema)
            .fetch_one(&mut connection)
            .await?;
        if !exists {
            let statement = format!("CREATE SCHEMA IF NOT EXISTS {schema}");
            connection.execute(AssertSqlSafe(statement)).await.map_err(without_right)?;
        }
        let mut migrations = sqlx::migrate!("./migrations");
        migrations.set_locking(false); // the lock above does, and covers the schema too
        // Not `run`, which is the same: a future of that may not go to another thread, as far as the compiler can tell.
        migrations.run_direct(None, &mut connection, false).await?;
        connection.close().await?;
        Ok(())
    }
}

fn without_right(error: sqlx::Error) -> StoreError {
    match StoreError::from(error) {
        StoreError::Other(Cause::Database(cause)) => StoreError::Migration {
            what: "the schema does not exist and this user may not make it".to_owned(),
            source: Some(Box::new((*cause).into())),
        },
        other => other,
    }
}
