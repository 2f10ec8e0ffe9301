//! `doctor`: what it says is what a sidecar then has, it changes nothing, and it says no where a session could not start.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::cgroup::{groups_of, membership};
use crate::escape::stage::{As, READ_ONLY_GROUPS, adjust};
use crate::support::postgres::{bound_role, fresh_database, new_role};
use crate::support::sidecar::{World, subcommand};
use opencode_sidecar::sandbox::{Output, Resources};
use opencode_sidecar::scripted::Script;
use opencode_sidecar::store::{DatabaseOptions, Store};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(100);

/// Asks it, as a sidecar of this kind would be started with these variables.
async fn ask(world: &World, who: As, changes: &[(&str, &str)], args: &[&str]) -> Output {
    let mut spec = subcommand("doctor", world.environment(changes));
    spec.args = ["doctor"].iter().chain(args).map(Into::into).collect();
    let programs = tempfile::Builder::new().prefix("oc-doctor-").tempdir().unwrap();
    std::fs::set_permissions(programs.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    adjust(who, programs.path(), &mut spec);
    if who == As::Container {
        let script = spec.args[3].to_str().unwrap().replace("\"$2\" serve", "\"$2\" doctor --json");
        spec.args[3] = script.into();
    }
    world.sandbox().run(spec, DEADLINE).await.unwrap()
}

fn report(output: &Output) -> Value {
    let said = || String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| unreachable!("{error}: {output:?} {}", said()))
}

fn finding<'a>(report: &'a Value, name: &str) -> (&'a str, &'a str) {
    let found = report["findings"].as_array().unwrap().iter().find(|finding| finding["name"] == name);
    let found = found.unwrap_or_else(|| unreachable!("no {name}: {report:#}"));
    (found["state"].as_str().unwrap(), found["detail"].as_str().unwrap())
}

/// Every file and directory beneath, with when it was changed.
fn tree(path: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![path.to_owned()];
    while let Some(next) = open.pop() {
        let metadata = std::fs::symlink_metadata(&next).unwrap();
        found.insert(format!("{} {:?}", next.display(), metadata.modified().unwrap()));
        if metadata.is_dir() {
            open.extend(std::fs::read_dir(next).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    found
}

/// Beside a sidecar that runs, in its very directories.
#[tokio::test]
async fn it_says_what_a_session_has_and_changes_nothing() {
    let world = World::new().await;
    // It notes six times in a term that it lives: not while this looks.
    let sidecar = world.start(&[("SANDBOX", ""), ("LEASE_SECONDS", "3600")]).await;
    let id = sidecar.submit(&Script::new().bash("echo hi").text("done")).await;
    let record = sidecar.finished(&id).await;
    let instance = std::fs::read_to_string(world.state.path().join("instance")).unwrap();
    let looks = || {
        (membership(sidecar.pid()), groups_of(instance.trim()), tree(world.state.path()), tree(world.workspace.path()))
    };
    let before = looks();
    let output = ask(&world, As::Here, &[("SANDBOX", "")], &["--json"]).await;
    assert_eq!(looks(), before);
    assert_eq!(output.exit.code, Some(0), "{output:?}");
    let report = report(&output);
    assert_eq!(report["ready"], true);
    assert_eq!(report["protections"], record["protections"], "{report:#}");
    assert_eq!(finding(&report, "database"), ("ok", "DATABASE_URL answers"));
    assert_eq!(finding(&report, "opencode").0, "ok");
    assert_eq!(finding(&report, "SANDBOX_REQUIRE").0, "ok");
    assert_eq!(finding(&report, "EGRESS_ALLOW"), ("ok", "nothing but the model is reached"));
    assert!(finding(&report, "STATE_DIR").1.ends_with("a sidecar uses it now"), "{report:#}");
    sidecar.stop().await;
    let again = ask(&world, As::Here, &[("SANDBOX", "")], &["--json"]).await;
    assert!(!finding(&self::report(&again), "STATE_DIR").1.contains("uses it"), "{again:?}");
    let open = ask(&world, As::Here, &[("SANDBOX", ""), ("EGRESS_ALLOW", "*.B.example:443,a.example:1")], &["--json"]);
    let open = self::report(&open.await);
    let reached = "beside the model these are reached: *.b.example:443, a.example:1";
    assert_eq!(finding(&open, "EGRESS_ALLOW"), ("ok", reached));
    // For people.
    let output = ask(&world, As::Here, &[("SANDBOX", "")], &[]).await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("\nlandlock_fs ") && text.contains("A session could start. It would have: "), "{text}");
    assert!(!text.contains('\u{1b}'), "colours, where there is no terminal");
}

#[tokio::test]
async fn it_says_whose_rows_the_database_role_sees() {
    let owner = fresh_database().await;
    let ask = async |options: &DatabaseOptions, project: &str| {
        let world = World::with(options.clone()).await;
        let output = ask(&world, As::Here, &[("PROJECT_ID", project)], &["--json"]).await;
        let report = report(&output);
        let (state, detail) = finding(&report, "database_role");
        (state.to_owned(), detail.to_owned())
    };
    let (state, detail) = ask(&owner, "anna").await;
    assert!(state == "unknown" && detail.contains("not there yet"), "{state}: {detail}");
    Store::connect(&owner).await.unwrap().migrate().await.unwrap();
    let (state, detail) = ask(&owner, "anna").await;
    assert!(state == "missing" && detail.contains("can read every project in the schema"), "{state}: {detail}");
    let (role, unbound) = new_role(&owner).await;
    let (state, detail) = ask(&unbound, "anna").await;
    let advice = format!("bind_role('{role}', 'anna')");
    assert!(state == "failed" && detail.contains(&advice), "{state}: {detail}");
    let (_, bound) = bound_role(&owner, "anna").await;
    let (state, detail) = ask(&bound, "anna").await;
    assert!(
        state == "ok" && detail.contains("is bound to project anna, and sees no other's rows"),
        "{state}: {detail}"
    );
    let (state, detail) = ask(&bound, "berta").await;
    assert!(state == "failed" && detail.contains("PROJECT_ID is berta"), "{state}: {detail}");
}

/// What is foreseen is what a claim then finds.
#[tokio::test]
async fn what_is_foreseen_is_what_is_claimed() {
    let foreseen = Resources::foresee();
    let claimed = Resources::claim(&uuid::Uuid::new_v4().to_string(), Duration::from_secs(1));
    let mut probe = claimed.probe().clone();
    assert_eq!(foreseen.probe.no_swap, None);
    probe.no_swap = None;
    assert_eq!(foreseen.probe, probe);
}

#[tokio::test]
async fn it_says_no_and_names_what_is_missing() {
    let world = World::new().await;
    let cases = [
        (("SANDBOX_REQUIRE", "landlock_unix,seccomp"), "SANDBOX_REQUIRE", "does not give landlock_unix"),
        (("OPENCODE_COMMAND", "/does/not/exist"), "opencode", "OPENCODE_COMMAND names /does/not/exist"),
        (("OPENCODE_COMMAND", "/bin/false"), "opencode", "/bin/false does not run"),
        (("DATABASE_URL", "postgres://u@127.0.0.1:9/d"), "database", "DATABASE_URL: "),
        (("STATE_DIR", "/dev/null/state"), "STATE_DIR", "/dev/null is no directory"),
        (("PORT", "many"), "configuration", "PORT"),
        (("EGRESS_ALLOW", "a.example:443,b"), "configuration", "entry 2 has no port"),
    ];
    for (change, name, says) in cases {
        let output = ask(&world, As::Here, &[("SANDBOX", "required"), change], &["--json"]).await;
        assert_eq!(output.exit.code, Some(1), "{change:?}: {output:?}");
        let report = report(&output);
        let (state, detail) = finding(&report, name);
        assert!(state == "failed" && detail.contains(says), "{change:?}: {state}, {detail}");
        assert_eq!(report["ready"], json!(false));
    }
    let output = ask(&world, As::Here, &[("SANDBOX", "required"), ("SANDBOX_REQUIRE", "landlock_unix")], &[]).await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.ends_with("No session could start: SANDBOX_REQUIRE\n"), "{text}");
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "acts as another user, which takes root")]
async fn an_ordinary_user_and_a_container_are_told_what_they_lack() {
    let world = World::new().await;
    let directory = tempfile::Builder::new().prefix("oc-doctor-").tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let (state, workspace) = (directory.path().join("state"), directory.path().join("ws"));
    let changes = [
        ("SANDBOX", "required"),
        ("STATE_DIR", state.to_str().unwrap()),
        ("WORKSPACE_DIR", workspace.to_str().unwrap()),
    ];
    for who in [As::OrdinaryUser, As::Container] {
        let output = ask(&world, who, &changes, &["--json"]).await;
        let report = report(&output);
        // Whatever else this user may not reach here, these are as they are.
        let (level, detail) = finding(&report, "cgroup");
        let why = "Permission denied";
        assert!(level == "missing" && detail.contains("watched") && detail.contains(why), "{who:?}: {detail}");
        assert_eq!(finding(&report, "SANDBOX_REQUIRE").0, "ok", "{report:#}");
        assert!(
            finding(&report, "uid").1.contains("run as the sidecar's own user: this process does not have"),
            "{report:#}"
        );
        assert!(finding(&report, "privileges").1.ends_with("user 65534 and holds: none"), "{report:#}");
        assert!(finding(&report, "STATE_DIR").1.contains("not there, and can be made"), "{report:#}");
        assert_eq!(finding(&report, "cpu"), ("missing", "nothing holds CPU time"));
        assert!(!state.exists() && !workspace.exists(), "it made something");
    }
}

/// Who is root, and may write there but for that.
#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn a_mount_that_can_be_read_alone_is_named() {
    let world = World::new().await;
    let mut spec = subcommand("doctor", world.environment(&[("SANDBOX", "required")]));
    let script = format!("{READ_ONLY_GROUPS} exec {} doctor --json", spec.program.display());
    spec.program = "unshare".into();
    spec.args = ["-m", "sh", "-c", &script].map(Into::into).into();
    let output = world.sandbox().run(spec, DEADLINE).await.unwrap();
    assert_eq!(output.exit.code, Some(0), "{output:?}");
    let report = report(&output);
    let (state, detail) = finding(&report, "cgroup");
    assert!(state == "missing" && detail.contains("watched") && detail.contains("Read-only file system"), "{detail}");
    assert!(report["protections"].as_array().unwrap().contains(&json!("watched")), "{report:#}");
}
