//! Several projects in one schema, each with a role of its own: what somebody who has the URL of one of them gets at.

use super::sessions::{ended, in_session, put, session};
use super::{at, change, completed, event, execute, migrated, pending, row, submit, write};
use crate::support::postgres::{bound_role, connect, new_role};
use crate::support::sidecar::soon;
use futures_util::TryStreamExt;
use opencode_sidecar::model::{EventType, ExecutionRecord, SessionRecord, Severity, Status};
use opencode_sidecar::store::{DatabaseOptions, EventQuery, Forgotten, HistoryFilter, Role, Store, StoreError, Write};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Row};
use std::collections::BTreeSet;

/// What a bound role may not do.
const NO_RIGHT: &str = "42501";
/// Without rows of any project. A role may read it, and not write it.
const NOBODYS: &str = "_sqlx_migrations";

/// A project with a role, and some of everything in the tables, written by the role itself.
struct Project {
    name: &'static str,
    role: String,
    options: DatabaseOptions,
    store: Store,
    execution: ExecutionRecord,
}

impl Project {
    async fn new(owner: &DatabaseOptions, name: &'static str) -> Self {
        let (role, options) = bound_role(owner, name).await;
        let store = Store::connect(&options).await.unwrap().for_project(name).with_callbacks();
        store.migrate().await.unwrap();
        let mine = |record| ExecutionRecord { project_id: name.to_owned(), ..record };
        let execution = mine(pending());
        let session = SessionRecord { project_id: name.to_owned(), ..session() };
        let prompt = mine(in_session(session.id, 1));
        let mut end = completed(&prompt);
        end.final_message = Some(format!("said to {name}"));
        let events = (1..=3).map(|seq| write(&execution, &event(seq, EventType::Stdout, Severity::Info)));
        let writes = [vec![submit(&execution), put(&session), submit(&prompt)], events.collect()].concat();
        store.commit(&writes).await.unwrap();
        store.commit(&[change(Status::Pending, &end), put(&ended(&session))]).await.unwrap();
        store.beat(name, execution.owner).await.unwrap();
        assert_eq!(store.callbacks_waiting(name).await.unwrap(), 1);
        Self { name, role, options, store, execution }
    }

    /// What somebody has who took its sidecar over: the login, and psql.
    async fn login(&self) -> PgConnection {
        login(&self.options).await
    }
}

async fn login(options: &DatabaseOptions) -> PgConnection {
    let mut connection = connect(&options.url).await;
    connection.execute("SET search_path TO opencode_sidecar").await.unwrap();
    connection
}

async fn two() -> (DatabaseOptions, Project, Project) {
    let (_, owner) = migrated().await;
    let (anna, berta) = (Project::new(&owner, "anna").await, Project::new(&owner, "berta").await);
    (owner, anna, berta)
}

/// Every row of a table that somebody sees, with its version.
async fn rows(connection: &mut PgConnection, table: &str) -> BTreeSet<String> {
    let query = format!("SELECT t.xmin::text || ' ' || t.ctid::text || ' ' || t::text FROM {table} t");
    let rows = connection.fetch_all(AssertSqlSafe(query)).await.unwrap();
    rows.into_iter().map(|row| row.get(0)).collect()
}

/// The SQLSTATE of a statement that fails; "" for one that does not. What it did is undone.
async fn refusal(connection: &mut PgConnection, statement: &str) -> String {
    let mut transaction = connection.begin().await.unwrap();
    let done = transaction.execute(AssertSqlSafe(statement.to_owned())).await;
    transaction.rollback().await.unwrap();
    match done {
        Ok(_) => String::new(),
        Err(error) => error.as_database_error().unwrap().code().unwrap().into_owned(),
    }
}

/// How many rows a statement touches, where it is allowed at all. What it did is undone.
async fn touched(connection: &mut PgConnection, statement: String) -> Option<u64> {
    let mut transaction = connection.begin().await.unwrap();
    let done = transaction.execute(AssertSqlSafe(statement.clone())).await;
    transaction.rollback().await.unwrap();
    match done {
        Ok(done) => Some(done.rows_affected()),
        Err(error) => {
            assert_eq!(error.as_database_error().unwrap().code().unwrap(), NO_RIGHT, "{statement}: {error}");
            None
        }
    }
}

/// Whatever table there is, also one that comes later.
#[tokio::test]
async fn no_table_shows_or_takes_another_projects_rows() {
    let (owner, anna, berta) = two().await;
    let mut all = login(&owner).await;
    let (mut mine, mut hers) = (anna.login().await, berta.login().await);
    let tables =
        all.fetch_all("SELECT tablename, rowsecurity FROM pg_tables WHERE schemaname = 'opencode_sidecar'").await;
    let tables: Vec<(String, bool)> = tables.unwrap().into_iter().map(|row| (row.get(0), row.get(1))).collect();
    assert!(tables.len() >= 7, "{tables:?}");
    for (table, has_row_security) in tables {
        let copy = format!("COPY {table} TO STDOUT");
        if table == NOBODYS {
            for (verb, rest) in [("UPDATE", "SET success = true"), ("DELETE FROM", ""), ("TRUNCATE", "")] {
                assert_eq!(refusal(&mut mine, &format!("{verb} {table} {rest}")).await, NO_RIGHT, "{verb}");
            }
            continue;
        }
        assert!(has_row_security, "{table} has no row security: whose are its rows?");
        let (whole, a, b) =
            (rows(&mut all, &table).await, rows(&mut mine, &table).await, rows(&mut hers, &table).await);
        assert!(!a.is_empty() && !b.is_empty(), "{table}: neither project has a row in it, so this shows nothing");
        assert!(a.is_disjoint(&b), "{table}");
        assert_eq!(whole, a.union(&b).cloned().collect(), "{table}");

        let mut copied = mine.copy_out_raw(&copy).await.unwrap();
        let mut lines = 0;
        while let Some(piece) = copied.try_next().await.unwrap() {
            lines += piece.iter().filter(|byte| **byte == b'\n').count();
        }
        drop(copied);
        assert_eq!(lines, a.len(), "{copy}");

        let column = format!(
            "SELECT quote_ident(attname) FROM pg_attribute
             WHERE attrelid = '{table}'::regclass AND attnum > 0 AND attidentity = '' AND NOT attisdropped LIMIT 1"
        );
        let column: String = all.fetch_one(AssertSqlSafe(column)).await.unwrap().get(0);
        for statement in [format!("UPDATE {table} SET {column} = {column}"), format!("DELETE FROM {table}")] {
            if let Some(count) = touched(&mut mine, statement.clone()).await {
                assert_eq!(count, a.len() as u64, "{statement}");
            }
        }
        // One that is hers, but for what makes it a row of its own.
        let row = format!("SELECT row_to_json(t)::text FROM {table} t LIMIT 1");
        let mut row: serde_json::Value =
            serde_json::from_str(&hers.fetch_one(AssertSqlSafe(row)).await.unwrap().get::<String, _>(0)).unwrap();
        // Postgres keeps an escaped NUL, but reads none.
        for member in ["task", "envelope"] {
            if row.get(member).is_some() {
                row[member] = serde_json::json!({});
            }
        }
        if table == "executions" {
            row["session_id"] = uuid::Uuid::new_v4().to_string().into();
        }
        match &*table {
            "execution_events" => row["seq"] = 999.into(),
            "callbacks" => row["id"] = 999_999.into(),
            "project_roles" => row["role"] = anna.role.clone().into(),
            "owners" => row["owner"] = uuid::Uuid::new_v4().to_string().into(),
            _ => row["id"] = uuid::Uuid::new_v4().to_string().into(),
        }
        let row = row.to_string().replace('\'', "''");
        let insert = format!(
            "INSERT INTO {table} OVERRIDING SYSTEM VALUE SELECT * FROM json_populate_record(NULL::{table}, '{row}')"
        );
        assert_eq!(refusal(&mut mine, &insert).await, NO_RIGHT, "{insert}");
        if table != "project_roles" {
            assert_eq!(refusal(&mut hers, &insert).await, "", "the same by her: {insert}");
        }
        assert_eq!(refusal(&mut mine, &format!("TRUNCATE {table} CASCADE")).await, NO_RIGHT);
        assert_eq!(rows(&mut all, &table).await, whole, "{table}");
    }
}

#[tokio::test]
async fn no_row_changes_hands() {
    let (owner, anna, berta) = two().await;
    let mut mine = anna.login().await;
    let hers = berta.execution.id;
    let statements = [
        "UPDATE executions SET project_id = 'berta'".to_owned(),
        "UPDATE sessions SET project_id = 'berta'".to_owned(),
        "UPDATE owners SET project_id = 'berta'".to_owned(),
        "UPDATE callbacks SET project_id = 'berta'".to_owned(),
        format!("UPDATE execution_events SET execution_id = '{hers}', seq = 100"),
        format!(
            "INSERT INTO executions SELECT * FROM executions ON CONFLICT (id) DO UPDATE SET project_id = 'berta', id = '{hers}'"
        ),
        format!(
            "INSERT INTO execution_events (execution_id, seq, type, severity, ts, envelope)
             SELECT '{hers}', 100, type, severity, ts, envelope FROM execution_events LIMIT 1"
        ),
        // Nobody's temporary table is taken for one of ours.
        format!(
            "CREATE TEMP TABLE executions (id uuid); INSERT INTO pg_temp.executions VALUES ('{hers}');
             INSERT INTO opencode_sidecar.execution_events VALUES ('{hers}', 100, 'log', 'info', now(), '{{}}')"
        ),
        "CREATE TEMP TABLE project_roles (role name, project_id text);
         INSERT INTO pg_temp.project_roles VALUES (current_user, 'berta');
         UPDATE opencode_sidecar.executions SET project_id = 'berta'"
            .to_owned(),
    ];
    for statement in statements {
        assert_eq!(refusal(&mut mine, &statement).await, NO_RIGHT, "{statement}");
    }
    // What the store itself is asked for in her name is not done either, and not half.
    let before = rows(&mut login(&owner).await, "executions").await;
    let stolen = Write::Delete { project: berta.name.to_owned(), execution: hers };
    anna.store.commit(&[stolen]).await.unwrap();
    assert_eq!(anna.store.history(berta.name, &HistoryFilter::default(), None, 10).await.unwrap(), []);
    let query = EventQuery { after: 0, limit: 10, types: None, severities: None };
    assert_eq!(anna.store.events(hers, &query).await.unwrap(), []);
    assert_eq!(berta.store.events(hers, &query).await.unwrap().len(), 3);
    let forged = ExecutionRecord { project_id: berta.name.to_owned(), ..pending() };
    assert!(matches!(anna.store.commit(&[submit(&forged)]).await, Err(StoreError::Other(_))));
    assert_eq!(rows(&mut login(&owner).await, "executions").await, before);
}

#[tokio::test]
async fn a_role_gets_no_further_by_any_other_way() {
    let (owner, anna, berta) = two().await;
    execute(&owner, "ANALYZE").await;
    let mut mine = anna.login().await;
    let (me, her) = (&anna.role, &berta.role);
    let owns: String = login(&owner).await.fetch_one("SELECT current_user::text").await.unwrap().get(0);
    // More than it needs to have.
    execute(&owner, &format!("CREATE SCHEMA of_anna AUTHORIZATION {me}")).await;
    let refused = [
        // The mapping.
        format!("INSERT INTO project_roles VALUES ('{me}', 'berta')"),
        "UPDATE project_roles SET project_id = 'berta'".to_owned(),
        "DELETE FROM project_roles".to_owned(),
        format!("SELECT bind_role('{me}', 'berta')"),
        format!("SELECT unbind_role('{her}')"),
        format!("SELECT grant_rights('{me}')"),
        // Row security itself.
        "ALTER TABLE executions DISABLE ROW LEVEL SECURITY".to_owned(),
        "ALTER TABLE project_roles DISABLE ROW LEVEL SECURITY".to_owned(),
        "DROP POLICY own_project ON executions".to_owned(),
        "CREATE POLICY mine ON executions USING (true)".to_owned(),
        "ALTER POLICY own_project ON executions USING (true)".to_owned(),
        "ALTER TABLE execution_events DISABLE TRIGGER ALL".to_owned(),
        "DROP TRIGGER of_own_executions ON execution_events".to_owned(),
        "SET session_replication_role = replica".to_owned(),
        format!("ALTER TABLE executions OWNER TO {me}"),
        "SET row_security = off; SELECT count(*) FROM executions".to_owned(),
        // Becoming somebody else.
        format!("SET ROLE {her}"),
        format!("SET ROLE {owns}"),
        format!("SET SESSION AUTHORIZATION {her}"),
        format!("SET SESSION AUTHORIZATION {owns}"),
        format!("GRANT {her} TO {me}"),
        format!("ALTER ROLE {me} BYPASSRLS"),
        format!("ALTER ROLE {me} CREATEROLE"),
        format!("ALTER ROLE {her} PASSWORD 'y'"),
        "CREATE ROLE somebody".to_owned(),
        // Programs that others run, or that the planner trusts.
        "CREATE FUNCTION opencode_sidecar.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'".to_owned(),
        "CREATE OR REPLACE FUNCTION refuse_events_of_others() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
            .to_owned(),
        "ALTER FUNCTION sees_every_project(name) OWNER TO CURRENT_USER".to_owned(),
        "CREATE FUNCTION pg_temp.sure(text) RETURNS bool LANGUAGE sql LEAKPROOF AS 'SELECT true'".to_owned(),
        "CREATE TABLE opencode_sidecar.mine ()".to_owned(),
        "CREATE VIEW opencode_sidecar.mine AS SELECT 1".to_owned(),
        "CREATE TRIGGER mine AFTER INSERT ON executions EXECUTE FUNCTION suppress_redundant_updates_trigger()".to_owned(),
        "CREATE RULE mine AS ON INSERT TO executions DO ALSO NOTHING".to_owned(),
        "CREATE SCHEMA mine".to_owned(),
        // A foreign key asks whether a row is there, and row security does not answer.
        "CREATE TABLE of_anna.mine (id uuid REFERENCES opencode_sidecar.executions)".to_owned(),
        // The server's own view of things.
        "SELECT * FROM pg_statistic".to_owned(),
        "SELECT * FROM pg_authid".to_owned(),
        "SELECT last_value FROM callbacks_id_seq".to_owned(),
        "SELECT pg_read_file('PG_VERSION')".to_owned(),
        "COPY executions TO '/tmp/opencode-sidecar-stolen'".to_owned(),
        "COPY executions TO PROGRAM 'cat'".to_owned(),
    ];
    for statement in refused {
        assert_eq!(refusal(&mut mine, &statement).await, NO_RIGHT, "{statement}");
    }
    let sees = async |connection: &mut PgConnection, query: String| -> i64 {
        connection.fetch_one(AssertSqlSafe(query)).await.unwrap().get(0)
    };
    // Statistics hold values out of the rows.
    let statistics = "SELECT count(*) FROM pg_stats WHERE schemaname = 'opencode_sidecar' AND tablename = 'executions'";
    assert!(sees(&mut login(&owner).await, statistics.to_owned()).await > 0, "there is something to be seen");
    assert_eq!(sees(&mut mine, statistics.to_owned()).await, 0);
    assert_eq!(sees(&mut mine, "SELECT count(*) FROM project_roles".to_owned()).await, 1);
    // A condition of the role's own is asked of no row that row security would hide, however cheap it says that it is.
    mine.execute(
        "CREATE TEMP TABLE seen (message text);
         CREATE FUNCTION pg_temp.look(message text) RETURNS bool LANGUAGE plpgsql COST 0.0000001 AS
             'BEGIN INSERT INTO pg_temp.seen VALUES (message); RETURN true; END'",
    )
    .await
    .unwrap();
    sees(&mut mine, "SELECT count(*) FROM executions WHERE pg_temp.look(final_message)".to_owned()).await;
    let seen = mine.fetch_all("SELECT DISTINCT message FROM pg_temp.seen WHERE message IS NOT NULL").await.unwrap();
    let seen: Vec<String> = seen.into_iter().map(|row| row.get(0)).collect();
    assert_eq!(seen, ["said to anna"]);
}

#[tokio::test]
async fn roles_that_could_see_more_are_not_bound() {
    let (owner, anna, _) = two().await;
    let mut all = login(&owner).await;
    let bind = async |all: &mut PgConnection, role: &str, project: &str| {
        let done = all.execute(AssertSqlSafe(format!("SELECT bind_role('{role}', '{project}')"))).await;
        done.err().map(|error| error.as_database_error().unwrap().message().to_owned()).unwrap_or_default()
    };
    let owns: String = all.fetch_one("SELECT current_user::text").await.unwrap().get(0);
    assert!(bind(&mut all, "nobody there", "anna").await.contains("there is no role"));
    assert!(bind(&mut all, &owns, "anna").await.contains("would see every project"));
    for (attribute, why) in [
        ("SUPERUSER", "it is a superuser"),
        ("BYPASSRLS", "it has BYPASSRLS"),
        ("CREATEROLE", "it has CREATEROLE"),
        ("REPLICATION", "it has REPLICATION"),
    ] {
        let (role, _) = new_role(&owner).await;
        execute(&owner, &format!("ALTER ROLE {role} {attribute}")).await;
        let said = bind(&mut all, &role, "anna").await;
        assert!(said.contains(why), "{attribute}: {said}");
    }
    for (member, of, why) in [
        ("CREATE ROLE", owns.as_str(), "it may act as"),
        ("CREATE ROLE", "pg_execute_server_program", "reaches the files of the server"),
    ] {
        let (role, _) = new_role(&owner).await;
        execute(&owner, &format!("GRANT \"{of}\" TO {role}")).await;
        let said = bind(&mut all, &role, "anna").await;
        assert!(said.contains(why), "{member}: {said}");
    }
    // Who may act as a role of another project, or the other way round.
    let (role, _) = new_role(&owner).await;
    execute(&owner, &format!("GRANT {} TO {role}", anna.role)).await;
    assert!(bind(&mut all, &role, "berta").await.contains("bound to project anna"));
    assert_eq!(bind(&mut all, &role, "anna").await, "", "two roles of one project, one within the other");
    let (role, _) = new_role(&owner).await;
    execute(&owner, &format!("GRANT {role} TO {}", anna.role)).await;
    assert!(bind(&mut all, &role, "berta").await.contains("bound to project anna"));
    // A role has one project; the same again changes nothing.
    assert!(bind(&mut all, &anna.role, "berta").await.contains("unbind_role first"));
    assert_eq!(bind(&mut all, &anna.role, "anna").await, "");
    anna.store.migrate().await.unwrap();
    // Unbound, it is nobody, and can be dropped.
    anna.store.close().await;
    execute(&owner, &format!("SELECT opencode_sidecar.unbind_role('{}')", anna.role)).await;
    assert_eq!(refusal(&mut anna.login().await, "SELECT FROM opencode_sidecar.executions").await, NO_RIGHT);
    let (lonely, _) = bound_role(&owner, "carla").await;
    execute(&owner, &format!("SELECT opencode_sidecar.unbind_role('{lonely}'); DROP ROLE {lonely}")).await;
    // The other way round: whoever comes later under its name has not its project.
    let (dropped, _) = bound_role(&owner, "carla").await;
    execute(&owner, &format!("DROP OWNED BY {dropped}; DROP ROLE {dropped}; CREATE ROLE {dropped}")).await;
    assert!(bind(&mut all, &dropped, "berta").await.contains("unbind_role first"));
    let no_right = format!("SET ROLE {dropped}; SELECT FROM opencode_sidecar.executions");
    assert_eq!(refusal(&mut login(&owner).await, &no_right).await, NO_RIGHT);
    execute(&owner, &format!("DROP ROLE {dropped}; SELECT opencode_sidecar.unbind_role('{dropped}')")).await;
}

/// The end of a start, and what it says.
async fn start(options: &DatabaseOptions, project: &str) -> String {
    let store = Store::connect(options).await.unwrap().for_project(project);
    let error = store.migrate().await.unwrap_err();
    assert!(!error.is_transient(), "{error:?}");
    error.to_string()
}

#[tokio::test]
async fn a_role_that_will_not_do_ends_the_start_and_says_what_to_do() {
    let (owner, anna, _) = two().await;
    let (role, its) = new_role(&owner).await;
    let said = start(&its, "carla").await;
    let advice = format!("SELECT \"opencode_sidecar\".bind_role('{role}', 'carla')");
    assert!(said.contains("is bound to no project") && said.contains(&advice), "{said}");
    assert!(matches!(Store::connect(&its).await.unwrap().role().await, Err(StoreError::Role(_))));
    // What it says is what helps.
    execute(&owner, &advice).await;
    let store = Store::connect(&its).await.unwrap().for_project("carla");
    store.migrate().await.unwrap();
    let bound = Role { name: role, project: Some("carla".to_owned()), held: true, wider: None };
    assert_eq!(store.role().await.unwrap(), Some(bound));
    // Rights alone are not enough, nor is another project.
    execute(&owner, "DELETE FROM opencode_sidecar.project_roles WHERE project_id = 'carla'").await;
    assert!(start(&its, "carla").await.contains(&advice));
    let said = start(&anna.options, "carla").await;
    assert!(said.contains("is bound to project anna, and PROJECT_ID is carla"), "{said}");
    // Who owns the tables, or came to more than it had, works and is told so.
    let store = Store::connect(&owner).await.unwrap().for_project("carla");
    store.migrate().await.unwrap();
    let role = store.role().await.unwrap().unwrap();
    assert!(!role.held && role.warning().unwrap().contains("can read every project"), "{role:?}");
    execute(&owner, &format!("ALTER ROLE {} CREATEROLE", anna.role)).await;
    anna.store.migrate().await.unwrap();
    let warning = anna.store.role().await.unwrap().unwrap().warning().unwrap();
    assert!(warning.starts_with("it has CREATEROLE"), "{warning}");
}

#[tokio::test]
async fn a_role_that_does_not_own_an_older_schema_says_who_has_to_bring_it_up_to_date() {
    let (owner, anna, _) = two().await;
    execute(
        &owner,
        "DELETE FROM opencode_sidecar._sqlx_migrations
         WHERE version = (SELECT max(version) FROM opencode_sidecar._sqlx_migrations)",
    )
    .await;
    let said = start(&anna.options, "anna").await;
    assert!(said.contains("it is at version 5, this sidecar needs 6"), "{said}");
    assert!(said.contains("run `opencode-sidecar migrate` as its owner"), "{said}");
}

#[tokio::test]
async fn what_is_forgotten_is_ones_own() {
    let (owner, anna, berta) = two().await;
    // Everything is old.
    let cutoff = at(1_000_000);
    for (project, sessions) in [(anna.name, 1), (berta.name, 0)] {
        assert_eq!(anna.store.expire(project, cutoff, 100).await.unwrap().sessions, sessions);
    }
    let hers = || rows_of(&owner, "executions", berta.name);
    let before = hers().await;
    let gone = anna.store.purge(anna.name, 100).await.unwrap();
    assert_eq!(gone, Forgotten { executions: 1, ..Forgotten::default() });
    assert_eq!(anna.store.purge(berta.name, 100).await.unwrap(), Forgotten::default());
    anna.store.forget_owners(berta.name).await.unwrap();
    assert_eq!(hers().await, before);
    assert_eq!(row(&berta.store, &berta.execution).await.status, Status::Pending);
    // In her own hands it goes on.
    assert_eq!(berta.store.expire(berta.name, cutoff, 100).await.unwrap().sessions, 1);
}

async fn rows_of(owner: &DatabaseOptions, table: &str, project: &str) -> BTreeSet<String> {
    rows(&mut login(owner).await, &format!("(SELECT xmin, ctid, * FROM {table} WHERE project_id = '{project}')")).await
}

/// How often a table was read from its beginning to its end, and by an index.
async fn scans(owner: &DatabaseOptions, table: &str) -> (i64, i64) {
    let query = format!(
        "SELECT COALESCE(seq_scan, 0), COALESCE(idx_scan, 0) FROM pg_stat_user_tables
         WHERE schemaname = 'opencode_sidecar' AND relname = '{table}'"
    );
    let row = login(owner).await.fetch_one(AssertSqlSafe(query)).await.unwrap();
    (row.get(0), row.get(1))
}

#[tokio::test]
async fn what_a_bound_role_asks_goes_by_the_indexes() {
    let (owner, anna, berta) = two().await;
    // A connection hands over its counts when it ends.
    anna.store.close().await;
    berta.store.close().await;
    execute(
        &owner,
        "SET search_path TO opencode_sidecar;
         INSERT INTO executions (id, project_id, owner, task_id, session_id, status, last_seq, task, protections,
                                 files_modified, usage, created_at, paused_ms)
         SELECT gen_random_uuid(), 'project ' || i % 50, gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 'running', 0,
                task, '{}', '{}', usage, created_at, 0
         FROM generate_series(1, 10000) i, (SELECT * FROM executions LIMIT 1) x;
         INSERT INTO execution_events
         SELECT id, seq, 'log', 'info', now(), '{}'
         FROM (SELECT id FROM executions LIMIT 500) x, generate_series(101, 140) seq;
         ANALYZE",
    )
    .await;
    let others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                  AND pid <> pg_backend_pid() AND backend_type = 'client backend'";
    let mut look = login(&owner).await;
    soon("the others' end", async { while look.fetch_one(others).await.unwrap().get::<i64, _>(0) > 0 {} }).await;
    let tables = ["executions", "execution_events"];
    let mut before = Vec::new();
    for table in tables {
        before.push(scans(&owner, table).await);
    }
    let store = Store::connect(&anna.options).await.unwrap();
    let query = EventQuery { after: 0, limit: 100, types: None, severities: None };
    for _ in 0..10 {
        store.history(anna.name, &HistoryFilter::default(), None, 10).await.unwrap();
        assert_eq!(row(&store, &anna.execution).await.id, anna.execution.id);
        assert_eq!(store.unfinished(anna.name, anna.execution.owner).await.unwrap().len(), 1);
        assert!(!store.events(anna.execution.id, &query).await.unwrap().is_empty());
        store.commit(&[write(&anna.execution, &event(4, EventType::Log, Severity::Info))]).await.unwrap();
        store.expire(anna.name, at(-1_000_000), 10).await.unwrap();
        store.purge(anna.name, 10).await.unwrap();
    }
    store.close().await;
    for (table, (whole, by_index)) in tables.into_iter().zip(before) {
        let now = soon("the counts", async {
            loop {
                let now = scans(&owner, table).await;
                if now.1 >= by_index + 20 {
                    return now;
                }
            }
        });
        assert_eq!(now.await.0, whole, "{table} was read from its beginning to its end");
    }
}
