//! Each session has a user of its own where the sidecar may choose: apart from the others in what is private, and at one
//! with them, and with the file browser, in the workspace. Where it may not, what stays open is known.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::sessions::Client;
use crate::support::sidecar::{As, NOBODY, Sidecar, World, soon, text_of};
use opencode_sidecar::sandbox::{Spec, User};
use opencode_sidecar::scripted::Script;
use reqwest::Method;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::time::Duration;

const GROUP: u32 = 54_331;
/// The pod's file browser: of the workspace's group, and otherwise nobody.
const BROWSER: User = User { uid: 54_332, gid: GROUP };
const REQUIRED: [(&str, &str); 2] = [("SANDBOX", "required"), ("SANDBOX_REQUIRE", "uid,capabilities,no_new_privs")];

/// A script of the agent's that runs what is in a file: OpenCode itself refuses command lines that name other places.
fn running(world: &World, name: &str, commands: &str) -> Script {
    Script::new().write(&world.path(name), commands).bash(&format!("sh {name}"))
}

/// Real, effective, saved and file system's user of a process.
fn users_of(pid: u32) -> Vec<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap();
    line.split_whitespace().map(|uid| uid.parse().unwrap()).collect()
}

async fn sandbox_check(sidecar: &Sidecar) -> (u16, Value) {
    let (status, ready) = sidecar.send(Method::GET, "/ready", None).await;
    (status, ready["checks"]["sandbox"].clone())
}

fn names(record: &Value) -> Vec<&str> {
    record["protections"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect()
}

/// Lines of what commands said: `name: word`.
fn said(events: &[Value]) -> Vec<String> {
    text_of(events, "stdout").lines().map(str::to_owned).collect()
}

/// What a session tries with its neighbour, whose home and process are in files of the workspace.
const PROBES: &str = r#"
home=$(cat neighbour-home) pid=$(cat neighbour-pid)
try() { name=$1; shift; if "$@" >/dev/null 2>&1; then echo "$name: yes"; else echo "$name: no"; fi; }
try stat stat "$home/secret"
try touch touch -c "$home/secret"
try chmod chmod 644 "$home/secret"
try read cat "$home/secret"
try list ls "$home"
try write sh -c "echo x > $home/new"
try signal kill -0 "$pid"
try environ cat "/proc/$pid/environ"
try memory cat "/proc/$pid/maps"
try files ls "/proc/$pid/fd/"
try cmdline grep -q . "/proc/$pid/cmdline"
try others ls "${HOME%/*/*}"
"#;

const NEIGHBOUR: &str = "echo s > $HOME/secret; chmod 600 $HOME/secret; echo $HOME > neighbour-home; echo $$ > neighbour-pid; \
     id -u; : > ready; until [ -e done ]; do sleep 0.05; done";

/// Runs a session, and another one that tries [`PROBES`] on it; gives what both said, and the users of both.
async fn neighbours(world: &World, sidecar: &Sidecar) -> (Vec<String>, Vec<String>, Vec<Vec<u32>>, [String; 2]) {
    let first = sidecar.submit(&running(world, "neighbour.sh", NEIGHBOUR).text("done")).await;
    let probes = format!(
        "until [ -e ready ]; do sleep 0.05; done; {PROBES}id -u; echo told; until [ -e done ]; do sleep 0.05; done"
    );
    let second = sidecar.submit(&running(world, "probes.sh", &probes).text("done")).await;
    let mut stream = sidecar.stream(&second, 0).await;
    stream.until("the probes", |e| e["type"] == "stdout" && e["data"].as_str().unwrap().contains("told\n")).await;
    let users = sidecar.opencodes().into_iter().map(users_of).collect();
    std::fs::write(world.file("done"), "").unwrap();
    let (first_said, second_said) = (said(&sidecar.follow(&first).await), said(&sidecar.follow(&second).await));
    (first_said, second_said, users, [first, second])
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "other users take root")]
async fn two_sessions_have_users_of_their_own_and_nothing_of_each_other() {
    let world = World::new().await;
    let sidecar = world.start(&REQUIRED).await;
    let (status, check) = sandbox_check(&sidecar).await;
    assert!(status == 200 && check["detail"].as_str().unwrap().contains("uid"), "{check}");
    let (first, second, users, ids) = neighbours(&world, &sidecar).await;
    let probes = second.iter().filter(|line| line.contains(": ")).map(String::as_str).collect::<Vec<_>>();
    let open: Vec<_> = probes.iter().filter(|line| !line.ends_with(": no")).copied().collect();
    // Command lines are everybody's to read, and hold nothing that matters.
    assert_eq!((probes.len(), open), (12, vec!["cmdline: yes"]), "{second:?}");
    let distinct: BTreeSet<u32> = users.iter().flatten().copied().collect();
    assert_eq!((users.len(), distinct.len()), (2, 2), "{users:?}");
    assert!(distinct.iter().all(|uid| world.uids().contains(uid)), "{distinct:?}");
    let told: BTreeSet<u32> = [&first[0], &second[12]].iter().map(|line| line.parse().unwrap()).collect();
    assert_eq!(told, distinct);
    for id in ids {
        let record = sidecar.get(&format!("/tasks/{id}")).await;
        assert_eq!(record["status"], "completed", "{record:#}");
        assert!(names(&record).contains(&"uid"), "{record:#}");
    }
    assert!(world.private_directories().is_empty());
    sidecar.stop().await;
}

/// One ordinary user for all: this is what is known to be open between its sessions, and nothing else is. It stands in
/// `docs/operations.md`; a kernel or a version that closes more of it is to be written down there.
#[tokio::test]
#[cfg_attr(not(as_root), ignore = "becomes an ordinary user, which takes root")]
async fn what_stays_open_between_sessions_of_one_ordinary_user_is_known() {
    let world = World::new().await;
    let sidecar = world.start_as(As::Nobody, &[("SANDBOX_REQUIRE", "")]).await;
    let (_, check) = sandbox_check(&sidecar).await;
    assert!(!check["detail"].as_str().unwrap().contains("uid"), "{check}");
    let (_, second, users, ids) = neighbours(&world, &sidecar).await;
    assert_eq!(users, [[NOBODY.uid; 4]; 2]);
    let open: Vec<_> = second.iter().filter(|line| line.ends_with(": yes")).map(String::as_str).collect();
    assert_eq!(open, ["stat: yes", "touch: yes", "chmod: yes", "files: yes", "cmdline: yes"], "{second:?}");
    let record = sidecar.get(&format!("/tasks/{}", ids[1])).await;
    assert!(!names(&record).contains(&"uid"), "{record:#}");
    for name in ["capabilities", "no_new_privs", "scope", "landlock_fs", "seccomp"] {
        assert!(names(&record).contains(&name), "{record:#}");
    }
    sidecar.stop().await;
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "becomes an ordinary user, which takes root")]
async fn a_required_user_that_cannot_be_had_is_refused_by_its_name() {
    let world = World::new().await;
    let sidecar = world.start_as(As::Nobody, &REQUIRED).await;
    let (status, check) = sandbox_check(&sidecar).await;
    assert_eq!((status, &check["status"]), (503, &json!("failed")), "{check}");
    assert!(check["detail"].as_str().unwrap().contains("does not give uid (SANDBOX_REQUIRE)"), "{check}");
    let id = sidecar.submit(&Script::new().text("never")).await;
    let events = sidecar.follow(&id).await;
    let complete = &events.last().unwrap()["data"];
    assert_eq!((&complete["status"], &complete["reason"]), (&json!("failed"), &json!("sandbox_unavailable")));
    let error = events.iter().find(|e| e["type"] == "error").unwrap();
    assert!(error["data"]["message"].as_str().unwrap().contains("uid"), "{error}");
    let body = json!({ "session_id": uuid::Uuid::new_v4() });
    let (status, refused) = sidecar.post("/sessions", body).await;
    assert!(status == 503 && refused["detail"].as_str().unwrap().contains("uid"), "{status} {refused}");
    sidecar.stop().await;
}

/// Root may choose, but its own directory lets nobody pass: then sessions are root without its powers, as they were, and
/// where a user is required there are none.
#[tokio::test]
#[cfg_attr(not(as_root), ignore = "other users take root")]
async fn users_that_would_not_reach_their_files_are_not_taken() {
    let world = World::new().await;
    std::fs::set_permissions(world.state.path(), PermissionsExt::from_mode(0o700)).unwrap();
    let state = world.state.path().join("inner");
    for (require, status) in [("capabilities", 200), ("uid", 503)] {
        let changes = [("STATE_DIR", state.to_str().unwrap()), REQUIRED[0], ("SANDBOX_REQUIRE", require)];
        let sidecar = world.start(&changes).await;
        let (ready, check) = sandbox_check(&sidecar).await;
        assert_eq!(ready, status, "{check}");
        let there = check["detail"].as_str().unwrap().rsplit("here is: ").next().unwrap();
        assert!(!there.contains("uid"), "{check}");
        sidecar.stop().await;
    }
}

/// What an agent makes: a repository, a clone, and what package managers leave, in directories and with permissions of
/// all kinds.
const MAKE: &str = r#"
set -e
for place in acl plain; do
    until [ -w $place ]; do sleep 0.05; done
    cd $place
    git init -q repo
    cd repo
    git config user.name a; git config user.email a@example.invalid
    mkdir src; echo one > src/a; echo two > b; git add -A; git commit -qm first
    cd ..
    git clone -q repo clone
    mkdir -p node_modules/.bin node_modules/p; echo x > node_modules/p/index.js
    install -m 600 b /dev/null 2>/dev/null || :
    install -m 600 repo/b node_modules/p/private; install -m 444 repo/b node_modules/p/fixed
    install -m 755 repo/b node_modules/.bin/run; mkdir -m 700 closed; echo in > closed/file; chmod 500 closed
    made=$(mktemp); echo t > $made; mv $made moved
    mkdir -p $TMPDIR/tree/deep; echo t > $TMPDIR/tree/deep/file; mv $TMPDIR/tree moved-tree
    cd ..
done
echo made
"#;

/// What another one does with it.
const WORK: &str = r#"
set -e
for place in acl plain; do
    cd $place/repo
    test -z "$(git status --short)"
    echo more >> src/a; echo more >> b; git mv b c; git commit -qam second
    git gc -q; git fsck --strict; git checkout -q -b other; git commit -q --allow-empty -m third
    test $(git log --oneline | wc -l) = 3
    cd ..
    git -C clone pull -q; test $(git -C clone log --oneline | wc -l) = 2
    git clone -q clone again
    echo y >> node_modules/p/index.js; echo y >> node_modules/p/private; echo y >> node_modules/.bin/run
    rm -f node_modules/p/fixed; echo y > node_modules/p/fixed
    test "$(cat closed/file)" = in; echo y >> moved; echo y >> moved-tree/deep/file; rm -r moved-tree/deep
    mkdir moved-tree/new
    cd ..
done
echo worked
"#;

/// And what is left is taken away.
const CLEAR: &str = r#"
set -e
for place in acl plain; do
    echo z >> $place/repo/src/a; echo z >> $place/node_modules/p/fixed
    rm -rf $place/repo $place/clone $place/again $place/node_modules $place/moved $place/moved-tree
    ls $place
done
echo cleared
"#;

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "other users take root")]
async fn what_one_session_makes_another_one_and_the_file_browser_commit_edit_and_delete() {
    let world = World::new().await;
    chown(world.workspace.path(), None, Some(GROUP)).unwrap();
    // There before the sidecar was: without a default ACL, and root's alone.
    std::fs::create_dir(world.file("plain")).unwrap();
    let sidecar = world.start(&REQUIRED).await;
    let maker = sidecar.submit(&running(&world, "make.sh", &format!("mkdir acl\n{MAKE}")).text("made")).await;
    let events = sidecar.follow(&maker).await;
    assert!(said(&events).contains(&"made".to_owned()), "{events:#?}");
    assert!(rustix::fs::getxattr(world.file("acl"), "system.posix_acl_default", &mut [0; 0][..]).is_ok());
    assert!(rustix::fs::getxattr(world.file("plain"), "system.posix_acl_default", &mut [0; 0][..]).is_err());
    let owner = |name: &str| {
        let metadata = std::fs::symlink_metadata(world.file(name)).unwrap();
        (metadata.uid(), metadata.gid())
    };
    let maker = owner("plain/repo/.git/HEAD");
    assert!(world.uids().contains(&maker.0) && maker.1 == GROUP, "{maker:?}");

    let worker = running(&world, "work.sh", WORK)
        .tool("edit", json!({ "filePath": world.path("plain/moved"), "oldString": "t\ny", "newString": "edited" }))
        .text("worked");
    let worker = sidecar.submit(&worker).await;
    let events = sidecar.follow(&worker).await;
    assert!(
        said(&events).contains(&"worked".to_owned()),
        "{} {}",
        text_of(&events, "stdout"),
        text_of(&events, "stderr")
    );
    assert_eq!(std::fs::read_to_string(world.file("plain/moved")).unwrap(), "edited\n");
    let worker = owner("plain/again/.git/HEAD");
    assert!(world.uids().contains(&worker.0) && worker.1 == GROUP && worker.0 != maker.0, "{maker:?} {worker:?}");

    let mut spec = Spec::new("file browser", "/bin/sh");
    spec.args = vec!["-c".into(), CLEAR.into()];
    spec.env = vec![("PATH".into(), std::env::var_os("PATH").unwrap())];
    spec.cwd = world.workspace.path().to_path_buf();
    (spec.user, spec.umask) = (Some(BROWSER), Some(0o022));
    let output = world.sandbox().run(spec, Duration::from_secs(60)).await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    // A directory that its owner may not write to is not opened to write for others either.
    assert!(output.exit.success() && text == "closed\nclosed\ncleared\n", "{text}");
    sidecar.stop().await;
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "other users take root")]
async fn a_parked_session_comes_back_as_the_same_user_and_is_gone_in_the_end() {
    let world = World::new().await;
    let sidecar = world.start(&[("SESSION_IDLE_TIMEOUT", "1")]).await;
    let client = Client::of(&sidecar);
    let id = client.create(&running(&world, "first.sh", "id -u > first; echo kept > $HOME/kept").text("One.")).await;
    client.frames(&id, None).await;
    soon("the process is parked", async {
        while !sidecar.opencodes().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(world.private_directories().len(), 1, "its conversation stays");
    // Meanwhile another one, which gets another user.
    let other = sidecar.submit(&running(&world, "other.sh", "id -u > other").text("done")).await;
    sidecar.follow(&other).await;
    let read = |name: &str| std::fs::read_to_string(world.file(name)).unwrap();
    assert_ne!(read("first"), read("other"));
    let again = running(&world, "again.sh", "id -u > again; cat $HOME/kept >> again").text("Two.");
    let again = client.message(&id, &again).await["execution_id"].as_str().unwrap().to_owned();
    assert_eq!(sidecar.follow(&again).await.last().unwrap()["data"]["status"], "completed");
    assert_eq!(read("again"), format!("{}kept\n", read("first")));
    client.stop(&id).await;
    assert!(world.private_directories().is_empty());
    sidecar.stop().await;
}

/// Root with CAP_SETUID, CAP_SETGID, CAP_CHOWN and CAP_KILL and nothing else: it cannot look into what belongs to a
/// session, and counts, ends and removes it all the same.
#[tokio::test]
#[cfg_attr(not(as_root), ignore = "other users take root")]
async fn four_capabilities_are_enough() {
    const HIDE: &str = "mkdir -p $HOME/a/b kept; echo x > $HOME/a/b/c; chmod 0 $HOME/a/b $HOME/a; chmod 700 kept; (setsid sleep 543211 &)";
    let world = World::new().await;
    let sidecar = world.start_as(As::PodRoot, &REQUIRED).await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", sidecar.pid())).unwrap();
    assert!(status.contains("CapEff:\t00000000000000e1\n"), "{status}");
    let hide = |more: &str| running(&world, "hide.sh", &format!("{HIDE}; id -u; {more}"));

    // What runs now is ended before OpenCode when memory runs out.
    let fine = sidecar.submit(&hide("git init -q x; cat /proc/self/oom_score_adj").text("done")).await;
    let record = sidecar.finished(&fine).await;
    assert_eq!(record["status"], "completed", "{record:#}");
    assert!(text_of(&sidecar.follow(&fine).await, "stdout").ends_with("\n1000\n"));
    for name in ["uid", "capabilities", "egress", "scope", "landlock_fs"] {
        assert!(names(&record).contains(&name), "{record:#}");
    }
    assert!(world.private_directories().is_empty());

    let cancelled = sidecar.submit(&hide("sleep 543212").text("never")).await;
    let mut stream = sidecar.stream(&cancelled, 0).await;
    stream.until("the command", |e| e["type"] == "stdout").await;
    let (status, answer) = sidecar.post(&format!("/tasks/{cancelled}/cancel"), json!({})).await;
    assert_eq!((status, &answer["status"]), (200, &json!("cancelled")), "{answer}");
    assert!(sidecar.opencodes().is_empty() && !crate::support::sidecar::runs("sleep 54321"));

    for place in ["kept", "$HOME/tree"] {
        // In a directory that is the session's alone, and in a file that has no name any more.
        let fill = format!(
            "mkdir -p {place}; chmod 700 {place}; head -c 100M /dev/zero > {place}/big; exec 9>&1; sleep 543213"
        );
        let full =
            sidecar.submit_with(&hide(&fill).text("never"), json!({ "limits": { "disk_bytes": 50_000_000 } })).await;
        let events = sidecar.follow(&full).await;
        assert_eq!(events.last().unwrap()["data"]["reason"], "disk_exhausted", "{place}");
    }
    let nameless = "exec 9> $HOME/big; rm $HOME/big; head -c 100M /dev/zero >&9; sleep 543214";
    let full =
        sidecar.submit_with(&hide(nameless).text("never"), json!({ "limits": { "disk_bytes": 50_000_000 } })).await;
    assert_eq!(sidecar.follow(&full).await.last().unwrap()["data"]["reason"], "disk_exhausted", "a removed file");
    assert!(world.private_directories().is_empty());

    // What an unexpected end leaves is gone after the next start.
    let lost = sidecar.submit(&hide("sleep 543215").text("never")).await;
    sidecar.stream(&lost, 0).await.until("the command", |e| e["type"] == "stdout").await;
    let left = world.private_directories();
    assert_eq!(left.len(), 1);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(sidecar.pid().cast_signed()), nix::sys::signal::SIGKILL).unwrap();
    sidecar.exited().await;
    drop(sidecar);
    let sidecar = world.start_as(As::PodRoot, &REQUIRED).await;
    assert!(world.private_directories().is_empty(), "{left:?}");
    soon("nothing of it runs", async {
        while crate::support::sidecar::runs("sleep 54321") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let record = sidecar.finished(&sidecar.submit(&Script::new().text("done")).await).await;
    assert_eq!(record["status"], "completed", "{record:#}");
    sidecar.stop().await;
}

/// As many as the range has: the next one is told that it is full, until the one that is unused for longest has ended.
#[tokio::test]
#[cfg_attr(not(as_root), ignore = "other users take root")]
async fn sessions_that_are_open_are_no_more_than_there_are_users() {
    let world = World::new().await;
    let first = *world.uids().start();
    let range = format!("{first}-{}", first + 1);
    // Two users for one task at a time: one for a session that rests, one for what runs.
    let sidecar = world.start(&[("SESSION_UID_RANGE", &range), ("MAX_CONCURRENT_TASKS", "1")]).await;
    let client = Client::of(&sidecar);
    let mut ids = Vec::new();
    for number in 0..3 {
        let id = uuid::Uuid::new_v4().to_string();
        let create = || client.send(Method::POST, "/sessions", Some(json!({ "session_id": id })));
        soon("a session is made", async {
            loop {
                let (status, answer) = create().await;
                match status {
                    201 => break,
                    503 => assert!(number > 0, "{answer}"),
                    other => unreachable!("{other}: {answer}"),
                }
            }
        })
        .await;
        ids.push(id);
        assert!(world.private_directories().len() <= 2);
    }
    for id in &ids {
        client.stop(id).await;
    }
    assert!(world.private_directories().is_empty());
    sidecar.stop().await;
}
