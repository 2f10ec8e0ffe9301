//! A whole session inside: the real OpenCode, its tools, and what agents commonly run.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::sidecar::{Sidecar, World, text_of};
use opencode_sidecar::scripted::Script;
use serde_json::{Value, json};

/// What a shell command of the agent wrote, and the events of its run.
async fn shell(world: &World, sidecar: &Sidecar, script: &str, more: Value) -> (String, Vec<Value>) {
    // In a file: OpenCode itself denies a command that names places outside, and this asks the kernel.
    std::fs::create_dir_all(world.file("work")).unwrap();
    std::fs::write(world.file("work/script.sh"), script).unwrap();
    let id = sidecar.submit_with(&Script::new().bash("bash script.sh 2>&1").text("done"), more).await;
    let events = sidecar.follow(&id).await;
    assert_eq!(events.last().unwrap()["data"]["status"], "completed", "{events:#?}");
    (text_of(&events, "stdout"), events)
}

fn work() -> Value {
    json!({ "workdir": "work" })
}

const ATTEMPTS: &str = r#"
try() { if out=$("$@" 2>&1); then echo "through: $*: $out"; else echo "kept: $*"; fi; }
port=$(tr '\0' '\n' < /proc/$OPENCODE_PID/cmdline | sed -n '/^--port$/{n;p}')
try cat /etc/shadow
try cat ../outside
try ls ..
try ls /root
try ls /tmp
try cat /proc/$SIDECAR/environ
try bash -c "echo > /dev/tcp/127.0.0.1/$port"
try bash -c 'echo > /dev/tcp/127.0.0.1/'"$(cat sidecar-port)"
try bash -c 'echo > /dev/tcp/1.1.1.1/443'
try bash -c 'echo > /dev/udp/1.1.1.1/53'
try unshare -U true
try kill -0 "$(cat sidecar-pid)"
try cat "/proc/$(cat sidecar-pid)/environ"
grep -E '^(NoNewPrivs|CapEff|Seccomp):' /proc/self/status | tr -d '\t'
"#;

#[tokio::test]
async fn a_session_is_kept_to_its_own() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    std::fs::create_dir(world.file("work")).unwrap();
    std::fs::write(world.file("outside"), "not of this workdir").unwrap();
    let port = sidecar.address().rsplit(':').next().unwrap();
    std::fs::write(world.file("work/sidecar-port"), port).unwrap();
    std::fs::write(world.file("work/sidecar-pid"), sidecar.pid().to_string()).unwrap();
    let (said, _) = shell(&world, &sidecar, ATTEMPTS, work()).await;
    let through: Vec<_> = said.lines().filter(|line| line.starts_with("through")).collect();
    assert_eq!(through, Vec::<&str>::new());
    assert_eq!(said.lines().filter(|line| line.starts_with("kept")).count(), 13, "{said}");
    assert!(said.ends_with("CapEff:0000000000000000\nNoNewPrivs:1\nSeccomp:2\n"), "{said}");
    sidecar.stop().await;

    // The same, unconfined: each of them could have failed.
    let sidecar = world.start(&[("SANDBOX", "off")]).await;
    std::fs::write(world.file("work/sidecar-pid"), sidecar.pid().to_string()).unwrap();
    std::fs::write(world.file("work/sidecar-port"), sidecar.address().rsplit(':').next().unwrap()).unwrap();
    let (said, _) = shell(&world, &sidecar, ATTEMPTS, work()).await;
    for open in ["../outside", "ls ..", "ls /tmp", "kill -0", "bash -c echo > /dev/tcp/127.0.0.1/"] {
        assert!(said.lines().any(|line| line.starts_with("through") && line.contains(open)), "{open}: {said}");
    }
    sidecar.stop().await;
}

/// Each line says its own word when it has worked. What is not installed says so, and is left out by the shell.
const WORK: &str = r#"
have() { command -v "$1" >/dev/null; }
git init -q . && git config user.email a@example.invalid && git config user.name a && git add -A && git commit -qm one && echo git works
git checkout -qb other && git mv script.sh moved.sh && git commit -qm two && git checkout -q - && echo branches work
mkdir -p a/b && echo x > a/b/file && mv a/b/file a/file && ln -s file a/link && ln a/file a/hard && rm -r a && echo files work
mktemp > /dev/null && cat <<EOF && echo temporary files work
here
EOF
seq 1000 | sort -R | sort -n | tail -1 | grep -q 1000 && echo pipes work
(sleep 0.01 & wait) && echo jobs work
find /usr/share -maxdepth 1 > /dev/null && rg --version > /dev/null && echo search works
! have python3 || python3 - <<'EOF'
import http.server, sqlite3, subprocess, tempfile, threading, urllib.request
server = http.server.HTTPServer(("", 0), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=server.handle_request).start()
assert urllib.request.urlopen("http://localhost:%d/" % server.server_address[1]).status == 200
sqlite3.connect("x.db").execute("create table t (a)")
assert subprocess.run(["true"]).returncode == 0
tempfile.NamedTemporaryFile().write(b"x")
EOF
echo "python3 $?"
! have node || node -e '
const server = require("http").createServer((_, answer) => answer.end("hi")).listen(0, async () => {
  const text = await (await fetch(`http://localhost:${server.address().port}`)).text();
  require("child_process").execSync("true");
  new (require("worker_threads").Worker)("require(`worker_threads`).parentPort.postMessage(1)", { eval: true })
    .on("message", () => process.exit(text === "hi" ? 0 : 1));
});'
echo "node $?"
! have npm || npm --version > /dev/null
echo "npm $?"
"#;

#[tokio::test]
async fn what_agents_do_works_inside() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let (said, _) = shell(&world, &sidecar, WORK, work()).await;
    let wanted = ["git", "branches", "files", "temporary files", "pipes", "jobs", "search"];
    for what in wanted {
        let found = said.lines().any(|line| line == format!("{what} work") || line == format!("{what} works"));
        assert!(found, "{what}: {said}");
    }
    for what in ["python3", "node", "npm"] {
        assert!(said.lines().any(|line| line == format!("{what} 0")), "{what}: {said}");
    }
    // OpenCode's own tools, which are OpenCode itself.
    let script = Script::new()
        .write(&world.path("work/by/tool.txt"), "one\n")
        .tool("edit", json!({ "filePath": world.path("work/by/tool.txt"), "oldString": "one", "newString": "two" }))
        .tool("read", json!({ "filePath": world.path("work/by/tool.txt") }))
        .tool("glob", json!({ "pattern": "**/*.txt" }))
        .tool("grep", json!({ "pattern": "two" }))
        .text("done");
    let id = sidecar.submit_with(&script, work()).await;
    let events = sidecar.follow(&id).await;
    let results: Vec<_> = events.iter().filter(|event| event["type"] == "tool_result").collect();
    let failed: Vec<_> = results.iter().filter(|event| !event["data"]["error"].is_null()).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert_eq!(results.len(), 5, "{events:#?}");
    assert_eq!(std::fs::read_to_string(world.file("work/by/tool.txt")).unwrap(), "two\n");
    sidecar.stop().await;
}
