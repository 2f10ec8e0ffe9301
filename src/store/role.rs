//! As whom the connections are made: what that role sees, and what an operator has to do where it is the wrong one.
//!
//! A role that is bound to a project sees the rows of that project (`migrations/0006_projects.sql`): that is decided by the
//! server, by who has logged in, and by nothing that this process says. A role that owns the tables sees everything.

use super::connect::quote;
use super::{Store, StoreError};
use sqlx::PgConnection;

/// The role that `DATABASE_URL` logs in as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Role {
    /// Its name.
    pub name: String,
    /// The project that it is bound to.
    pub project: Option<String>,
    /// Whether it sees no more than that project's rows.
    pub held: bool,
    /// Why it could see the rows of every project all the same, as the end of a sentence about it.
    pub wider: Option<String>,
}

impl Role {
    /// Why a sidecar of this project cannot work with it, and what to do; `None` where it can.
    pub fn refusal(&self, project: &str, schema: &str) -> Option<String> {
        match &self.project {
            _ if !self.held => None,
            Some(bound) if bound == project => None,
            Some(bound) => Some(format!(
                "role {} is bound to project {bound}, and PROJECT_ID is {project}: correct one of the two",
                self.name
            )),
            None => Some(unbound(&self.name, project, schema)),
        }
    }

    /// What somebody who takes over this process could read beyond its project; `None` for nothing.
    pub fn warning(&self) -> Option<String> {
        let wider = self.wider.as_deref()?;
        Some(format!(
            "{wider}: whoever takes over this process can read every project in the schema; bind_role gives a project a role \
             of its own"
        ))
    }
}

/// What to do for a role that has no project.
fn unbound(role: &str, project: &str, schema: &str) -> String {
    let literal = |text: &str| format!("'{}'", text.replace('\'', "''"));
    format!(
        "role {role} is bound to no project: run `opencode-sidecar migrate`, and then \
         SELECT {}.bind_role({}, {}), as the owner of the schema",
        quote(schema),
        literal(role),
        literal(project)
    )
}

impl Store {
    /// What to do for a role that has no project, nor any right.
    pub(super) fn unbound(&self, role: &str) -> String {
        unbound(role, self.project.as_deref().unwrap_or("<PROJECT_ID>"), &self.schema)
    }

    /// As whom it is connected; `None` where the tables are not there yet, or older than this version's.
    ///
    /// # Errors
    /// [`StoreError`]; `Role` where it may not even look at them.
    pub async fn role(&self) -> Result<Option<Role>, StoreError> {
        self.run(async |connection: &mut PgConnection| {
            // Asked by name, and of the catalogue, which everybody may read: the schema may be closed to the role.
            let found: Option<(String, bool)> = sqlx::query_as(
                "SELECT current_user::text, has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
                 FROM pg_namespace n JOIN pg_class c ON c.relnamespace = n.oid
                 WHERE n.nspname = $1 AND c.relname = 'project_roles'",
            )
            .bind(&self.schema)
            .fetch_optional(&mut *connection)
            .await?;
            match found {
                None => Ok(None),
                Some((_, true)) => role(connection).await.map(Some),
                Some((name, false)) => Err(StoreError::Role(self.unbound(&name))),
            }
        })
        .await
    }
}

/// The same where the tables are there and may be read.
pub(super) async fn role(connection: &mut PgConnection) -> Result<Role, StoreError> {
    let row = sqlx::query!(
        r#"SELECT current_user::text AS "name!", row_security_active('executions') AS "held!",
                  sees_every_project(current_user) AS wider,
                  (SELECT project_id FROM project_roles WHERE role = current_user) AS project"#
    )
    .fetch_one(connection)
    .await?;
    Ok(Role { name: row.name, project: row.project, held: row.held, wider: row.wider })
}
