//! Brings the schema to what this version needs. Several pods may do it at once: one at a time does the work. A pod whose
//! role may not, because the tables are somebody else's, is content where there is nothing to do.

use super::connect::{Store, prepare, quote};
use super::role::role;
use super::{StoreError, error::Cause};
use sqlx::migrate::{Migrate, MigrateError, Migrator};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use std::time::Duration;

/// How long all of it may take, the wait for other pods included.
const LIMIT: Duration = Duration::from_secs(120);
/// Where sqlx notes what was applied.
const APPLIED: &str = "_sqlx_migrations";

/// What there is for this role, before anything is done.
#[derive(sqlx::FromRow)]
struct Found {
    role: String,
    /// The schema.
    schema: bool,
    /// The table of what was applied.
    table: bool,
    /// It may read that.
    readable: bool,
    /// It owns it, or may act as who does.
    owned: bool,
}

impl Store {
    /// Makes the schema where it is missing and applies the migrations that it lacks. Safe to call from several
    /// processes at once, and again. Takes at most two minutes. Where there is nothing to do, the right to read is enough.
    ///
    /// # Errors
    /// [`StoreError::Migration`] where an applied migration differs from this version's, the schema is newer than
    /// this version, or a right is missing; [`StoreError::Role`] where the role is not bound to the project that this is
    /// for ([`Store::for_project`]); [`StoreError::Unavailable`] and [`StoreError::Refused`] as elsewhere.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        tokio::time::timeout(LIMIT, self.migrate_unbounded()).await.map_err(|_| StoreError::timeout(LIMIT))?
    }

    async fn migrate_unbounded(&self) -> Result<(), StoreError> {
        // A connection of its own: the lock ends with it however this ends, and no statement limit of the pool
        // cuts the wait for another pod short.
        let mut connection = PgConnection::connect_with(&self.options).await?;
        prepare(&mut connection, &quote(&self.schema), LIMIT).await?;
        let mut migrator = sqlx::migrate!("./migrations");
        if !self.is_up_to_date(&mut connection, &migrator).await? {
            // Advisory locks belong to a database, so the schema's name is in the key.
            sqlx::query("SELECT pg_advisory_lock(hashtextextended('opencode-sidecar migrations ' || $1, 0))")
                .bind(&self.schema)
                .execute(&mut connection)
                .await?;
            migrator.set_locking(false); // the lock above does, and covers the schema too
            self.apply(&mut connection, &migrator).await?;
        }
        self.look_at_role(&mut connection).await?;
        connection.close().await?;
        Ok(())
    }

    async fn found(&self, connection: &mut PgConnection) -> Result<Found, StoreError> {
        // The catalogue is open to everybody; the schema may not be.
        let query = sqlx::query_as(
            "SELECT current_user::text AS role, n.oid IS NOT NULL AS schema, c.oid IS NOT NULL AS table,
                    COALESCE(has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT'), false) AS readable,
                    COALESCE(pg_has_role(c.relowner, 'USAGE'), false) AS owned
             FROM (SELECT) AS one
             LEFT JOIN pg_namespace n ON n.nspname = $1
             LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = $2",
        );
        Ok(query.bind(&self.schema).bind(APPLIED).fetch_one(connection).await?)
    }

    /// Whether everything was applied, and nothing else. Where it was not, somebody has to do it who may.
    async fn is_up_to_date(&self, connection: &mut PgConnection, migrator: &Migrator) -> Result<bool, StoreError> {
        let found = self.found(connection).await?;
        if !found.table {
            return Ok(false);
        }
        if !found.readable {
            return Err(StoreError::Role(self.unbound(&found.role)));
        }
        let applied = connection.list_applied_migrations(APPLIED).await?;
        let mut needed = 0;
        let mut is_complete = true;
        for migration in migrator.iter() {
            needed = needed.max(migration.version);
            match applied.iter().find(|applied| applied.version == migration.version) {
                Some(applied) if applied.checksum == migration.checksum => {}
                Some(_) => return Err(MigrateError::VersionMismatch(migration.version).into()),
                None => is_complete = false,
            }
        }
        let newest = applied.iter().map(|applied| applied.version).max().unwrap_or(0);
        if newest > needed {
            return Err(MigrateError::VersionMissing(newest).into());
        }
        if !is_complete && !found.owned {
            return Err(StoreError::Migration {
                what: format!(
                    "it is at version {newest}, this sidecar needs {needed}, and role {} does not own it: \
                     run `opencode-sidecar migrate` as its owner",
                    found.role
                ),
                source: None,
            });
        }
        Ok(is_complete)
    }

    async fn apply(&self, connection: &mut PgConnection, migrator: &Migrator) -> Result<(), StoreError> {
        // IF NOT EXISTS would ask for the right to make schemas even where ours is there already.
        if !self.found(connection).await?.schema {
            let statement = format!("CREATE SCHEMA IF NOT EXISTS {}", quote(&self.schema));
            connection.execute(AssertSqlSafe(statement)).await.map_err(without_right)?;
        }
        // Not `run`, which is the same: a future of that may not go to another thread, as far as the compiler can tell.
        migrator.run_direct(None, connection, false).await?;
        // What a migration has added, bound roles get too.
        let grant = "SELECT grant_rights(role) FROM project_roles WHERE role IN (SELECT rolname FROM pg_roles)";
        connection.execute(grant).await?;
        Ok(())
    }

    async fn look_at_role(&self, connection: &mut PgConnection) -> Result<(), StoreError> {
        let Some(project) = &self.project else { return Ok(()) };
        let role = role(connection).await?;
        if let Some(why) = role.refusal(project, &self.schema) {
            return Err(StoreError::Role(why));
        }
        if let Some(wider) = role.warning() {
            tracing::warn!("the database role {}: {wider}", role.name);
        }
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
