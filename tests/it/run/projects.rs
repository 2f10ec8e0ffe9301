//! Two projects in one schema, with a role each: sidecars that run real tasks, and what each of them could read.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::postgres::{bound_role, connect, fresh_database, new_role};
use crate::support::sidecar::{World, subcommand};
use opencode_sidecar::scripted::Script;
use serde_json::json;
use sqlx::{AssertSqlSafe, Executor, Row};
use std::time::Duration;

/// The ids of all executions that the sidecar's own login sees, and those of all events.
async fn seen(world: &World) -> Vec<String> {
    let mut connection = connect(&world.database().url).await;
    let mut ids = Vec::new();
    for (table, column) in [("executions", "id"), ("execution_events", "execution_id")] {
        let query = format!("SELECT DISTINCT {column}::text FROM opencode_sidecar.{table}");
        let rows = connection.fetch_all(AssertSqlSafe(query)).await.unwrap();
        ids.extend(rows.into_iter().map(|row| row.get::<String, _>(0)));
    }
    ids
}

#[tokio::test]
async fn sidecars_of_two_projects_share_a_schema_and_neither_reads_the_other() {
    let owner = fresh_database().await;
    let migrate = subcommand("migrate", World::with(owner.clone()).await.environment(&[]));
    let output = World::with(owner.clone()).await.sandbox().run(migrate, Duration::from_secs(60)).await.unwrap();
    assert_eq!(output.exit.code, Some(0), "{output:?}");
    let mut projects = Vec::new();
    for name in ["anna", "berta"] {
        let (_, its) = bound_role(&owner, name).await;
        projects.push((name, World::with(its).await));
    }
    let mut ids = Vec::new();
    for (name, world) in &projects {
        let mut sidecar = world.start(&[("PROJECT_ID", name)]).await;
        let script = Script::new().bash(&format!("echo the secret of {name}")).text("done");
        let id = sidecar.submit(&script).await;
        assert_eq!(sidecar.finished(&id).await["status"], "completed");
        let history = sidecar.get("/tasks").await;
        let history = history["executions"].as_array().unwrap();
        assert!(history.len() == 1 && history[0]["execution_id"] == json!(id), "{history:#?}");
        let said = sidecar.log_so_far();
        assert!(!said.iter().any(|line| line.contains("can read every project")), "{said:#?}");
        sidecar.stop().await;
        ids.push(id);
    }
    for ((_, world), id) in projects.iter().zip(&ids) {
        // Its execution, and the events of that.
        assert_eq!(seen(world).await, [id.clone(), id.clone()]);
    }
    // With the login of the one for the other's project nothing starts, nor with one that nobody has bound.
    let (name, world) = &projects[0];
    let said = world.start_in_vain(&[("PROJECT_ID", "berta")]).await;
    assert!(said.contains("is bound to project anna, and PROJECT_ID is berta"), "{said}");
    let (role, unbound) = new_role(&owner).await;
    let said = World::with(unbound).await.start_in_vain(&[("PROJECT_ID", name)]).await;
    let advice = format!("bind_role('{role}', '{name}')");
    assert!(said.contains("is bound to no project") && said.contains(&advice), "{said}");
    // A later life reads what was before, and removes it where it is asked to.
    let sidecar = world.start(&[("PROJECT_ID", name)]).await;
    assert_eq!(sidecar.get(&format!("/tasks/{}", ids[0])).await["status"], "completed");
    assert_eq!(sidecar.send(reqwest::Method::DELETE, &format!("/tasks/{}", ids[0]), None).await.0, 204);
    sidecar.stop().await;
    assert_eq!(seen(world).await, [""; 0]);
    assert_eq!(seen(&projects[1].1).await.len(), 2);
}
