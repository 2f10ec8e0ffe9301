//! The escape suite: what an agent's own shell tool can try, inside a whole session with the real OpenCode, beside a
//! neighbour.
//!
//! - `attacks`: the table, and `calls`, those of it that take a bare call of the kernel.
//! - `stage`: the sidecar, the neighbour, and what lies around for the attacker to reach.
//! - `hogs`: what takes all there is, or does not end.
//!
//! The whole table runs in one go of the attacker's shell, in each way of running the sidecar: as root, as an ordinary
//! user, and in what a default container of Kubernetes gives. With `SANDBOX=off` it gets through, which shows that it
//! could have.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

mod attacks;
mod calls;
mod hogs;
pub(crate) mod stage;

use attacks::{ATTACKS, Attack, By, Open, Outside};
use opencode_sidecar::scripted::Script;
use serde_json::json;
use stage::{As, Stage, patient};
use std::collections::{BTreeMap, BTreeSet};

const MARK: &str = "attack: ";

/// The attacks that are calls: one process each, named by the variable. Without it, it looks at the table.
#[test]
fn every_attack_has_a_name_of_its_own() {
    if std::env::var_os("ESCAPE").is_some() {
        for Attack { name, by, .. } in ATTACKS {
            if let By::Call(call) = by {
                match calls::tried(*call) {
                    Ok(()) => println!("\n{MARK}{name}: ESCAPED"),
                    Err(said) => println!("\n{MARK}{name}: contained {said}"),
                }
            }
        }
        return;
    }
    let names: BTreeSet<_> = ATTACKS.iter().map(|attack| attack.name).collect();
    assert_eq!(names.len(), ATTACKS.len());
    assert!(names.len() >= 60, "{} attacks", names.len());
}

/// What the attacker runs, with its variables before it.
fn script() -> String {
    let mut script = String::from(
        "OWN_PORT=$(tr '\\0' '\\n' < /proc/$OPENCODE_PID/cmdline | sed -n '/^--port$/{n;p}')\nexport OWN_PORT OPENCODE_PID\n\
         try() { if said=$(bash -c \"$2\" 2>&1); then echo \"attack: $1: ESCAPED\"; \
         else echo \"attack: $1: contained\" $said; fi; }\n",
    );
    for Attack { name, by, .. } in ATTACKS {
        if let By::Shell(line) = by {
            script.push_str(&format!("try {name} '{}'\n", line.replace('\'', r"'\''")));
        }
    }
    let program = "./program --exact escape::every_attack_has_a_name_of_its_own --nocapture";
    script.push_str(&format!("ESCAPE=1 {program} 2>&1 | grep -a '{MARK}'\necho the end\n"));
    script
}

/// What became of each attack: `None` where it got through, else what was said.
fn outcomes(said: &str) -> BTreeMap<&str, Option<&str>> {
    let lines = said.lines().filter_map(|line| line.strip_prefix(MARK)?.split_once(": "));
    lines.map(|(name, outcome)| (name, outcome.strip_prefix("contained"))).collect()
}

async fn attack(stage: &Stage) -> (String, BTreeSet<String>) {
    let sidecar = &stage.sidecar;
    // OpenCode itself denies a command that names places outside, and its own tools a path; what leads there by a link
    // is the sandbox's business.
    let script = Script::new()
        .tool("bash", patient("bash attack.sh 2>&1"))
        .tool("read", json!({ "filePath": stage.world.path("work/link-for-tools/file") }))
        .write(&stage.world.path("work/link-for-tools/by-tool"), "x")
        .tool("webfetch", json!({ "url": format!("http://127.0.0.1:{}/health", stage.port()), "format": "text" }))
        .text("done");
    let id = sidecar.submit_with(&script, json!({ "workdir": "work" })).await;
    let events = sidecar.follow(&id).await;
    assert_eq!(events.last().unwrap()["data"]["status"], "completed", "{events:#?}");
    let said = crate::support::sidecar::text_of(&events, "stdout");
    assert!(said.ends_with("the end\n"), "{said}");
    let record = sidecar.get(&format!("/tasks/{id}")).await;
    let protections = record["protections"].as_array().unwrap().iter();
    let protections = protections.map(|name| name.as_str().unwrap().to_owned()).collect();
    let tools: Vec<_> = events.iter().filter(|event| event["type"] == "tool_result").skip(1).collect();
    assert_eq!(tools.len(), 3, "{events:#?}");
    let tools = tools.iter().map(|event| if event["data"]["error"].is_null() { "ESCAPED" } else { "contained" });
    let mut said = said;
    for (name, outcome) in ["tool-read", "tool-write", "tool-fetch"].into_iter().zip(tools) {
        said.push_str(&format!("{MARK}{name}: {outcome}\n"));
    }
    (said, protections)
}

/// Every attack is contained, in the words of what contains it, but for what is known to be open.
async fn all_are_contained(who: As) {
    let stage = Stage::set(who, "required").await;
    let (said, protections) = attack(&stage).await;
    let outcomes = outcomes(&said);
    let has_uid = protections.contains("uid");
    let mut wrong = Vec::new();
    for attack in ATTACKS {
        let open = match attack.open {
            Open::No => false,
            Open::ToTheSameUser => !has_uid,
            Open::Always => true,
        };
        match outcomes.get(attack.name) {
            None => wrong.push(format!("{}: it said nothing", attack.name)),
            Some(None) if open => {}
            Some(None) => wrong.push(format!("{}: ESCAPED", attack.name)),
            Some(Some(said)) if open => wrong.push(format!("{}: it is known to be open, and said {said}", attack.name)),
            Some(Some(said)) if attack.says.iter().any(|word| said.contains(word)) => {}
            Some(Some(said)) => wrong.push(format!("{}: another thing stopped it: {said}", attack.name)),
        }
    }
    for tool in ["tool-read", "tool-write", "tool-fetch"] {
        if outcomes[tool].is_none() {
            wrong.push(format!("{tool}: ESCAPED"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), ATTACKS.len());
    for name in ["landlock_fs", "egress", "scope", "seccomp", "no_new_privs", "capabilities", "subreaper"] {
        assert!(protections.contains(name), "{protections:?}");
    }
    assert!(who != As::Container || protections.contains("watched"), "{protections:?}");
    stage.nobody_came();
    // A link that the agent has made leads nowhere as a workdir either.
    let body = json!({ "task_id": uuid::Uuid::new_v4(), "prompt": "x", "workdir": "work/link-for-tools" });
    let (status, refused) = stage.sidecar.post("/tasks/execute", body).await;
    assert_eq!((status, &refused["details"]["field"]), (400, &json!("workdir")), "{refused}");
    stage.strike().await;
}

#[tokio::test]
async fn as_the_sidecar_runs_here() {
    all_are_contained(As::Here).await;
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "acts as another user, which takes root")]
async fn as_an_ordinary_user() {
    all_are_contained(As::OrdinaryUser).await;
}

/// A user without any capability, and control groups that can be read alone.
#[tokio::test]
#[cfg_attr(not(as_root), ignore = "makes the container, which takes root")]
async fn in_a_default_container() {
    all_are_contained(As::Container).await;
}

/// The same table gets through, or is stopped by something else.
#[tokio::test]
#[cfg_attr(not(as_root), ignore = "tries what root alone may do")]
async fn without_the_sandbox_it_all_gets_through() {
    let stage = Stage::set(As::Here, "off").await;
    let (said, _) = attack(&stage).await;
    let outcomes = outcomes(&said);
    let mut wrong = Vec::new();
    for attack in ATTACKS {
        match (attack.outside, outcomes.get(attack.name)) {
            (Outside::Works | Outside::NotRefused, Some(None)) | (Outside::KeptByTheJail, Some(Some(_))) => {}
            (Outside::NotRefused, Some(Some(said))) if !attack.says.iter().any(|word| said.contains(word)) => {}
            (_, outcome) => wrong.push(format!("{}: {outcome:?}", attack.name)),
        }
    }
    for tool in ["tool-read", "tool-write", "tool-fetch"] {
        if outcomes[tool].is_some() {
            wrong.push(format!("{tool}: it is contained by something else"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    stage.strike().await;
}

/// What the jail takes from every program: without a jail there would be a core.
#[test]
fn without_a_jail_cores_are_written() {
    use std::os::unix::process::ExitStatusExt;
    let directory = tempfile::tempdir().unwrap();
    #[expect(clippy::disallowed_methods, reason = "a process without a jail is what this is about")]
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "ulimit -c unlimited; kill -SEGV $$"]).current_dir(directory.path());
    assert!(shell.status().unwrap().core_dumped());
}
