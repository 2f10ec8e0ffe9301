//! What a session writes is there for others at once: another user of the workspace's group, as the pod's file browser
//! is, lists, reads, watches and edits it while the run goes on.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::sidecar::{World, soon, text_of};
use opencode_sidecar::sandbox::{Exit, Spec, User};
use opencode_sidecar::scripted::Script;
use serde_json::json;
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};

const GROUP: u32 = 54_321;
/// Of the group, and otherwise nobody.
const BROWSER: User = User { uid: 54_322, gid: GROUP };
const STRANGER: User = User { uid: 54_323, gid: 54_323 };
/// What the file browser watches with: coreutils' `tail`, which asks the kernel to be told of changes.
const TAIL: &str = "exec tail -n +1 -F work/made/shell.txt";

/// A shell command of another user's, in the workspace.
fn spec(world: &World, user: User, command: &str) -> Spec {
    let mut spec = Spec::new("another user", "/bin/sh");
    spec.args = vec!["-c".into(), command.into()];
    spec.env = vec![("PATH".into(), std::env::var_os("PATH").unwrap())];
    spec.cwd = world.workspace.path().to_path_buf();
    spec.user = Some(user);
    // Its own, as in a container.
    spec.umask = Some(0o022);
    spec
}

async fn run_as(world: &World, user: User, command: &str) -> (Exit, String) {
    let output = world.sandbox().run(spec(world, user, command), Duration::from_secs(60)).await.unwrap();
    (output.exit, String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap())
}

async fn browse(world: &World, command: &str) -> String {
    let (exit, said) = run_as(world, BROWSER, command).await;
    assert!(exit.success(), "{command}: {exit}: {said}");
    said
}

fn mode_and_group(path: &Path) -> (u32, u32) {
    let metadata = path.metadata().unwrap();
    (metadata.mode() & 0o7777, metadata.gid())
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "acts as another user, which takes root")]
async fn another_user_of_the_group_lists_reads_watches_and_edits() {
    let world = World::new().await;
    std::os::unix::fs::chown(world.workspace.path(), None, Some(GROUP)).unwrap();
    std::fs::set_permissions(world.workspace.path(), Permissions::from_mode(0o755)).unwrap();
    let sidecar = world.start(&[]).await;
    assert_eq!(mode_and_group(world.workspace.path()), (0o2775, GROUP));
    let ready = sidecar.http.get(format!("{}/ready", sidecar.base)).send().await.unwrap();
    assert_eq!(ready.json::<serde_json::Value>().await.unwrap()["checks"]["workspace"], json!({ "status": "ok" }));

    let wait = |gate: &str| format!("until [ -e {gate} ]; do sleep 0.02; done");
    let report = world.path("work/by/tool.txt");
    let script = Script::new()
        .bash(&wait("plain/ready"))
        .write(&world.path("work/plain/sub/tool.txt"), "x")
        .write(&report, "by the tool\n")
        .bash(&format!(
            "mkdir made; echo one > made/shell.txt; (umask 077; echo x > made/private; mktemp -p made temp.XXXXXX); \
             mkdir plain/made; echo x > plain/made/shell.txt; echo ready; {}; echo two >> made/shell.txt; {}; cat by/tool.txt made/new.txt",
            wait("made/first"),
            wait("made/second")
        ))
        .tool("edit", json!({ "filePath": report, "oldString": "by the browser", "newString": "by both" }))
        .tool("edit", json!({ "filePath": world.path("work/made/new.txt"), "oldString": "new", "newString": "newer" }))
        .text("done");
    let id = sidecar.submit_with(&script, json!({ "workdir": "work" })).await;
    // As on a file system without ACLs: here the umask alone has to do.
    std::fs::create_dir(world.file("work/plain")).unwrap();
    rustix::fs::removexattr(world.file("work/plain"), "system.posix_acl_default").unwrap();
    std::fs::write(world.file("work/plain/ready"), "").unwrap();
    let mut stream = sidecar.stream(&id, 0).await;
    stream.until("the files", |e| e["type"] == "stdout" && e["data"] == "ready\n").await;

    for (name, mode) in [
        ("work/plain/sub", 0o2775),
        ("work/plain/sub/tool.txt", 0o664),
        ("work/plain/made", 0o2775),
        ("work/plain/made/shell.txt", 0o664),
        ("work", 0o2775),
        ("work/by", 0o2775),
        ("work/by/tool.txt", 0o664),
        ("work/made", 0o2775),
        ("work/made/shell.txt", 0o664),
        // Made under a umask of its own, which does not count where there is an ACL.
        ("work/made/private", 0o664),
    ] {
        assert_eq!(mode_and_group(&world.file(name)), (mode, GROUP), "{name}: {mode:o}");
    }
    assert_eq!(browse(&world, "ls work/by work/made/shell.txt").await, "work/made/shell.txt\n\nwork/by:\ntool.txt\n");
    assert_eq!(browse(&world, "cat work/by/tool.txt work/made/shell.txt").await, "by the tool\none\n");
    let (exit, said) = run_as(&world, STRANGER, "cat work/by/tool.txt && echo x >> work/by/tool.txt").await;
    assert!(!exit.success() && said.starts_with("by the tool\n"), "others read and do not write: {said}");
    let (exit, _) = run_as(&world, BROWSER, "cat work/made/temp.*").await;
    assert!(!exit.success(), "a mode that a program asked for stays");

    // It watches while the session goes on to write.
    let mut watcher = world.sandbox().start(spec(&world, BROWSER, TAIL)).await.unwrap();
    let mut lines = BufReader::new(watcher.take_stdout().unwrap()).lines();
    assert_eq!(soon("what is there", lines.next_line()).await.unwrap().unwrap(), "one");
    // And edits: in place, and as an editor that makes a new file.
    browse(&world, "echo by the browser >> work/by/tool.txt && echo new > work/made/new.txt").await;
    assert_eq!(mode_and_group(&world.file("work/made/new.txt")), (0o664, GROUP), "a session could edit it");
    browse(&world, "touch work/made/first").await;
    assert_eq!(soon("what is written now", lines.next_line()).await.unwrap().unwrap(), "two");
    let watches = std::fs::read_dir(format!("/proc/{}/fd", watcher.pid())).unwrap();
    let watches = watches.filter(|fd| {
        std::fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|to| to.as_os_str() == "anon_inode:inotify")
    });
    assert_eq!(watches.count(), 1, "the kernel told it");
    watcher.kill(Duration::from_secs(60)).await.unwrap();

    browse(&world, "touch work/made/second").await;
    let events = sidecar.follow(&id).await;
    assert_eq!(events.last().unwrap()["data"]["status"], "completed", "{events:#?}");
    assert!(text_of(&events, "stdout").ends_with("by the tool\nby the browser\nnew\n"), "the session sees the edits");
    assert_eq!(browse(&world, "cat work/by/tool.txt work/made/new.txt").await, "by the tool\nby both\nnewer\n");
    assert_eq!(mode_and_group(&world.file("work/by/tool.txt")), (0o664, GROUP));
    sidecar.stop().await;
}
