//! A shell in a session: real bash on a real terminal, in the real sandbox.

use super::Client;
use crate::support::sidecar::{API_KEY, Sidecar, Socket, World, frame, runs, soon};
use futures_util::{SinkExt, StreamExt};
use opencode_sidecar::sandbox::Signal;
use opencode_sidecar::scripted::Script;
use reqwest::Method;
use serde_json::{Value, json};
use std::path::Path;
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

/// `SANDBOX` and what it requires are left at their defaults.
const REQUIRED: (&str, &str) = ("SANDBOX", "");

/// What a person at a terminal sees and does.
struct Shell {
    socket: Socket,
    /// What was shown and not looked at yet.
    shown: String,
}

impl Shell {
    /// Opens one and waits for its prompt.
    async fn open(sidecar: &Sidecar, id: &str) -> Self {
        let mut shell = Self::new(sidecar.socket(&format!("/sessions/{id}/terminal?cols=200")).await);
        shell.until("$ ", "# ").await;
        shell
    }

    fn new(socket: Socket) -> Self {
        Self { socket, shown: String::new() }
    }

    async fn send(&mut self, message: impl Into<Message>) {
        soon("a frame is taken", self.socket.send(message.into())).await.unwrap();
    }

    /// As bytes.
    async fn type_in(&mut self, text: &str) {
        self.send(text.as_bytes().to_vec()).await;
    }

    /// Everything that is shown up to one of the two, which is taken away too.
    async fn until(&mut self, one: &str, other: &str) -> String {
        let mut looked_at = 0;
        loop {
            let find = |mark: &&str| Some(looked_at + self.shown[looked_at..].find(mark)? + mark.len());
            let found = [one, other].iter().filter_map(find).min();
            if let Some(end) = found {
                let rest = self.shown.split_off(end);
                return std::mem::replace(&mut self.shown, rest);
            }
            // A mark may be cut by the end of a frame.
            looked_at = self.shown.len().saturating_sub(one.len().max(other.len()));
            while !self.shown.is_char_boundary(looked_at) {
                looked_at -= 1;
            }
            let tail = &self.shown[looked_at..];
            match soon(&format!("{one:?} after {tail:?}"), self.socket.next()).await.unwrap().unwrap() {
                Message::Binary(bytes) => self.shown.push_str(&String::from_utf8_lossy(&bytes)),
                Message::Ping(_) => {}
                unexpected => panic!("{unexpected:?} after {tail:?}"),
            }
        }
    }

    async fn sees(&mut self, mark: &str) -> String {
        self.until(mark, mark).await
    }

    /// Runs a script that lies in the workspace, in this very shell; gives what it showed, without the echo.
    async fn source(&mut self, world: &World, script: &str) -> String {
        std::fs::write(world.file("typed.sh"), script).unwrap();
        self.type_in(". ./typed.sh; echo \"<$?>\"\r").await;
        let shown = self.sees("<0>").await;
        // What is echoed is not what is shown then: `$?` is a number. It is echoed twice where it is typed early.
        let (_, shown) = shown.rsplit_once("\"<$?>\"").unwrap();
        shown.replace('\r', "").replace("\u{1b}[?2004l", "").trim_end_matches("<0>").trim().to_owned()
    }

    /// The next text frame. What is shown meanwhile is passed over.
    async fn note(&mut self) -> Value {
        frame(&mut self.socket).await.unwrap()
    }

    /// How it ended: the `exit` frame, and the close code after it.
    async fn end(&mut self) -> (Value, u16) {
        let exit = self.note().await;
        (exit, frame(&mut self.socket).await.unwrap_err())
    }
}

/// A session that waits for its first prompt.
async fn idle(client: &Client<'_>) -> String {
    let id = Uuid::new_v4().to_string();
    let (status, made) = client.send(Method::POST, "/sessions", Some(json!({ "session_id": id }))).await;
    assert_eq!(status, 201, "{made}");
    id
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    soon(what, async {
        while !holds() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// The shells below the sidecar.
fn shells(sidecar: &Sidecar) -> Vec<u32> {
    let bash = sidecar.descendants().into_iter().filter(|process| process.ends_with(" bash"));
    bash.map(|process| process.split(' ').next().unwrap().parse().unwrap()).collect()
}

#[tokio::test]
async fn it_is_a_terminal_of_the_asked_size_with_job_control() {
    let world = World::new().await;
    for sandbox in ["", "off"] {
        let sidecar = world.start(&[("SANDBOX", sandbox)]).await;
        let client = Client::of(&sidecar);
        let id = idle(&client).await;
        let mut shell = Shell::new(sidecar.socket(&format!("/session/{id}/pty/connect?cols=101&rows=33")).await);
        shell.until("$ ", "# ").await;
        let shown = shell.source(&world, "tty; stty size; pwd; echo $TERM; [ -t 0 ] && [ -t 1 ] && [ -t 2 ]").await;
        let lines: Vec<_> = shown.lines().collect();
        assert!(lines[0].starts_with("/dev/pts/"), "{sandbox}: {lines:?}");
        assert_eq!(lines[1..], ["33 101", world.path("").trim_end_matches('/'), "xterm-256color"], "{sandbox}");

        // A program in the foreground is told of a new size.
        std::fs::write(
            world.file("winch.sh"),
            "trap 'echo \"now $(stty size)\"; exit 0' WINCH; echo waits; while :; do sleep 0.02; done",
        )
        .unwrap();
        shell.type_in("bash winch.sh\r").await;
        shell.sees("waits").await;
        shell.send(json!({ "type": "resize", "cols": 120, "rows": 40 }).to_string()).await;
        shell.sees("now 40 120").await;

        // Ctrl-C ends the program and not the shell; Ctrl-Z stops it, and it can be taken up again.
        let program = format!("sleep 9876{}", 10 + sandbox.len());
        shell.type_in(&format!("{program}\r")).await;
        until("it sleeps", || runs(&program)).await;
        shell.type_in("\u{1a}").await;
        shell.sees("Stopped").await;
        shell.send(json!({ "type": "input", "data": "fg\r" }).to_string()).await;
        until("it has the terminal again", || in_foreground(&program)).await;
        shell.type_in("\u{3}").await;
        until("it is interrupted", || !runs(&program)).await;
        shell.type_in("echo \"<$?>\"\r").await;
        shell.sees("<130>").await;

        shell.type_in("exit 7\r").await;
        assert_eq!(shell.end().await, (json!({ "type": "exit", "code": 7, "signal": null }), 1000), "{sandbox}");
        let mut killed = Shell::open(&sidecar, &id).await;
        killed.type_in("kill -KILL $$\r").await;
        assert_eq!(killed.end().await, (json!({ "type": "exit", "code": null, "signal": 9 }), 1000), "{sandbox}");
        client.stop(&id).await;
        sidecar.stop().await;
    }
}

/// Each of these would say `through` where it is not kept. The numbers are in files beside it.
const ATTEMPTS: &str = r#"
try() { if out=$("$@" 2>&1); then echo "through: $*: $out"; else echo "kept: $1 $2 $3"; fi; }
try cat "$(cat state)/instance"
try ls "$(cat state)"
try ls "$(cat state)/sessions"
try cat /etc/shadow
try ls /root
try cat "/proc/$(cat sidecar-pid)/environ"
try cat "/proc/$(cat opencode-pid)/environ"
try kill -0 "$(cat sidecar-pid)"
try bash -c 'echo > /dev/tcp/127.0.0.1/'"$(cat sidecar-port)"
try bash -c 'echo > /dev/tcp/127.0.0.1/'"$(cat opencode-port)"
try bash -c 'echo > /dev/tcp/127.0.0.1/'"$(cat database-port)"
try bash -c 'echo > /dev/tcp/1.1.1.1/443'
try bash -c 'echo > /dev/udp/1.1.1.1/53'
try unshare -U true
try chown 1:1 state
"#;

/// What is left of the port that a process was told to serve on.
fn port_of(pid: u32) -> String {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    words[words.iter().position(|word| word == "--port").unwrap() + 1].to_string()
}

#[tokio::test]
async fn it_is_confined_as_the_agent_is_and_counted_with_it() {
    let world = World::new().await;
    let sidecar = world.start(&[REQUIRED]).await;
    let client = Client::of(&sidecar);
    let id = idle(&client).await;
    let opencode = sidecar.opencodes()[0];
    let database = world.database();
    let database = url_port(secrecy::ExposeSecret::expose_secret(&database.url));
    for (name, text) in [
        ("state", world.state.path().to_str().unwrap()),
        ("sidecar-pid", &sidecar.pid().to_string()),
        ("opencode-pid", &opencode.to_string()),
        ("sidecar-port", sidecar.address().rsplit(':').next().unwrap()),
        ("opencode-port", &port_of(opencode)),
        ("database-port", &database),
    ] {
        std::fs::write(world.file(name), text).unwrap();
    }
    let mut shell = Shell::open(&sidecar, &id).await;
    let said = shell.source(&world, ATTEMPTS).await;
    let through: Vec<_> = said.lines().filter(|line| line.starts_with("through")).collect();
    assert_eq!(through, Vec::<&str>::new());
    assert_eq!(said.lines().filter(|line| line.starts_with("kept")).count(), 15, "{said}");
    let status = shell
        .source(&world, "grep -E '^(NoNewPrivs|CapEff|CapPrm|CapBnd|Seccomp):' /proc/self/status | tr -d '\\t'")
        .await;
    assert_eq!(
        status.lines().collect::<Vec<_>>(),
        ["CapPrm:0000000000000000", "CapEff:0000000000000000", "CapBnd:0000000000000000", "NoNewPrivs:1", "Seccomp:2"]
    );
    // In its environment is what a shell needs, and nothing that opens anything.
    let env = shell.source(&world, "env; cat /proc/$$/environ | tr '\\0' '\\n'").await;
    assert!(env.contains("HOME=") && env.contains("PATH="), "{env}");
    for secret in ["OPENCODE", "TOKEN", "PASSWORD", "DATABASE", sidecar.secret.as_str(), API_KEY] {
        assert!(!env.contains(secret), "{secret}: {env}");
    }
    // The directories are the session's own.
    let place = shell.source(&world, "touch ~/mine $TMPDIR/mine && echo $HOME $TMPDIR").await;
    assert!(place.split(' ').all(|place| place.contains(&id)), "{place}");
    // The kernel counts it with the agent.
    let group = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let [bash] = shells(&sidecar)[..] else { panic!("{:?}", sidecar.descendants()) };
    assert_eq!(group(bash), group(opencode));
    let ready = sidecar.get("/ready").await;
    if ready["checks"]["sandbox"]["detail"].as_str().unwrap().contains("cgroup_v") {
        assert_ne!(group(bash), group(sidecar.pid()));
    }
    client.stop(&id).await;
    sidecar.stop().await;
}

fn url_port(url: &str) -> String {
    url::Url::parse(url).unwrap().port().unwrap().to_string()
}

#[tokio::test]
async fn shell_and_agent_work_on_the_same_files_at_once() {
    let world = World::new().await;
    let sidecar = world.start(&[REQUIRED]).await;
    let client = Client::of(&sidecar);
    let script =
        Script::new().bash("echo from-agent > theirs; until [ -e ours ]; do sleep 0.02; done; cat ours").text("Done.");
    let id = client.create(&script).await;
    let mut stream = client.stream(&id, None).await;
    stream.until("its call", |frame| frame.event == "tool_call").await;
    let has_written = || std::fs::read(world.file("theirs")).is_ok_and(|text| text.ends_with(b"\n"));
    until("the agent has written", has_written).await;
    // While it runs.
    let mut shell = Shell::open(&sidecar, &id).await;
    // It is there as a whole or not at all: the agent looks for it all the time.
    let ours = "cat theirs; echo from-shell > ours.new; mv ours.new ours";
    assert_eq!(shell.source(&world, ours).await, "from-agent");
    let frames = stream.until("its end", |frame| frame.event == "done").await;
    assert_eq!(super::output(&frames), "from-shell\nDone.");
    // And goes on when it has ended: the process is the same.
    assert_eq!(shell.source(&world, "echo still here").await, "still here");
    client.message(&id, &Script::new().bash("cat typed.sh").text("Again.")).await;
    let frames = client.frames(&id, super::last_id(&frames)).await;
    assert_eq!(super::output(&frames), "echo still hereAgain.");
    assert_eq!(shell.source(&world, "echo even now").await, "even now");
    client.stop(&id).await;
    sidecar.stop().await;
}

#[tokio::test]
async fn nothing_is_lost_whoever_is_slow() {
    let world = World::new().await;
    let sidecar = world.start(&[REQUIRED]).await;
    let client = Client::of(&sidecar);
    let id = idle(&client).await;
    let mut shell = Shell::open(&sidecar, &id).await;

    // A large paste into a program that takes its time.
    let paste: String = (0..20_000).map(|line| format!("{line:059}\n")).collect();
    std::fs::write(world.file("paste.sh"), "stty -echo; echo ta''kes; sleep 0.3; cat > pasted; stty echo").unwrap();
    shell.type_in(". ./paste.sh\r").await;
    shell.sees("takes").await;
    let (first, rest) = paste.split_at(200_001);
    shell.type_in(first).await;
    shell.send(json!({ "type": "input", "data": rest }).to_string()).await;
    shell.type_in("\u{4}").await;
    let whole = || std::fs::metadata(world.file("pasted")).is_ok_and(|file| file.len() >= paste.len() as u64);
    until("all of it has come", whole).await;
    assert!(std::fs::read_to_string(world.file("pasted")).unwrap() == paste, "it came changed");
    assert_eq!(shell.source(&world, "echo on").await, "on");

    // A reader that takes nothing stops the program, and gets everything when it reads on.
    const LAST: u32 = 3_000_000;
    shell.type_in(&format!("seq 1 {LAST}; echo \"<$?>\"\r")).await;
    let seq = format!("seq 1 {LAST}");
    until("it writes", || written_by(&seq).is_some()).await;
    let mut before = None;
    soon("it is stopped", async {
        loop {
            let now = written_by(&seq);
            if now == before {
                break;
            }
            before = now;
            for _ in 0..50 {
                sidecar.get("/health").await;
            }
        }
    })
    .await;
    let written = before.expect("it still runs");
    assert!(written < 15_000_000, "{written} bytes were taken from it, and nobody has read them");
    let shown = shell.sees("<0>").await;
    let shown = shown.replace("\u{1b}[?2004l\r", "");
    let numbers: Vec<u32> = shown.split("\r\n").filter_map(|line| line.parse().ok()).collect();
    let wrong = numbers.iter().zip(1..=LAST).find(|(shown, wanted)| *shown != wanted);
    assert_eq!((numbers.len(), wrong), (LAST as usize, None));

    // What floods the screen can be interrupted.
    shell.type_in("yes\r").await;
    shell.sees("y\r\ny\r\ny\r\n").await;
    shell.type_in("\u{3}").await;
    until("it is interrupted", || {
        shells(&sidecar).len() == 1 && !sidecar.descendants().iter().any(|p| p.ends_with(" yes"))
    })
    .await;
    assert_eq!(shell.source(&world, "echo on").await, "on");
    client.stop(&id).await;
    sidecar.stop().await;
}

/// A file of the process with this command line, where there is one.
fn of_process(line: &str, file: &str) -> Option<String> {
    let process = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path()).find(|path| {
        let command = std::fs::read(path.join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).replace('\0', " ").trim_end() == line
    })?;
    std::fs::read_to_string(process.join(file)).ok()
}

/// Whether it runs, and what is typed goes to it.
fn in_foreground(line: &str) -> bool {
    let Some(stat) = of_process(line, "stat") else { return false };
    // State, parent, group, session, terminal, the terminal's group.
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[0] != "T" && fields[2] == fields[5]
}

/// How many bytes it has written.
fn written_by(line: &str) -> Option<u64> {
    let io = of_process(line, "io")?;
    io.lines().find_map(|line| line.strip_prefix("wchar: "))?.parse().ok()
}

#[tokio::test]
async fn it_ends_with_its_client_and_with_its_session() {
    let world = World::new().await;
    let sidecar = world.start(&[REQUIRED]).await;
    let client = Client::of(&sidecar);
    let id = idle(&client).await;
    let rest = || sidecar.descendants().len();
    let before = rest();

    // A client that vanishes without a word, with something left behind that no hang-up reaches.
    let mut shell = Shell::open(&sidecar, &id).await;
    shell.type_in("trap '' HUP; setsid nohup sleep 987621 & sleep 987622\r").await;
    until("both run", || runs("sleep 987621") && runs("sleep 987622")).await;
    drop(shell);
    until("nothing of it is left", || rest() == before).await;
    assert!(!runs("sleep 987621") && !runs("sleep 987622"));

    // Four, and no fifth; one that is closed makes room.
    let mut open = Vec::new();
    for _ in 0..4 {
        open.push(Shell::open(&sidecar, &id).await);
    }
    let mut fifth = Shell::new(sidecar.socket(&format!("/sessions/{id}/terminal")).await);
    let (refused, code) = fifth.end().await;
    assert_eq!((&refused["type"], &refused["code"], code), (&json!("error"), &json!("too_many_terminals"), 4429));
    let mut closed = open.pop().unwrap();
    closed.socket.close(None).await.unwrap();
    drop(closed);
    until("its shell is gone", || shells(&sidecar).len() == 3).await;
    // Its place is free with the proof that nothing of it is left, a moment later.
    let fourth = soon("a place", async {
        loop {
            let mut next = Shell::new(sidecar.socket(&format!("/sessions/{id}/terminal")).await);
            match next.socket.next().await.unwrap().unwrap() {
                Message::Binary(_) => return next,
                refused => assert!(refused.to_string().contains("too_many_terminals"), "{refused}"),
            }
        }
    })
    .await;
    open.push(fourth);

    // The session's end is theirs.
    open[0].type_in("trap '' HUP TERM; setsid sleep 987623 & sleep 987624\r").await;
    until("both run", || runs("sleep 987623") && runs("sleep 987624")).await;
    client.stop(&id).await;
    assert_eq!(sidecar.descendants(), Vec::<String>::new());
    assert!(!runs("sleep 987623") && !runs("sleep 987624"));
    for shell in &mut open {
        assert_eq!(shell.end().await, (json!({ "type": "exit", "code": null, "signal": 9 }), 1000));
    }
    let mut late = Shell::new(sidecar.socket(&format!("/sessions/{id}/terminal")).await);
    let (refused, code) = late.end().await;
    assert_eq!((&refused["code"], code), (&json!("conflict"), 4409), "{refused}");
    sidecar.stop().await;
}

#[tokio::test]
async fn the_end_of_the_sidecar_and_of_opencode_is_its_end() {
    let world = World::new().await;
    let sidecar = world.start(&[REQUIRED]).await;
    let client = Client::of(&sidecar);
    let id = idle(&client).await;
    let mut shell = Shell::open(&sidecar, &id).await;
    shell.type_in("setsid sleep 987631 & sleep 987632\r").await;
    until("both run", || runs("sleep 987631") && runs("sleep 987632")).await;
    nix::sys::signal::kill(pid(sidecar.opencodes()[0]), nix::sys::signal::SIGKILL).unwrap();
    assert_eq!(shell.end().await, (json!({ "type": "exit", "code": null, "signal": 9 }), 1000));
    until("nothing is left", || sidecar.descendants().is_empty()).await;
    assert!(!runs("sleep 987631"));

    // The session goes on with another process.
    let mut shell = Shell::open(&sidecar, &id).await;
    shell.type_in("setsid sleep 987633 & sleep 987634\r").await;
    until("both run", || runs("sleep 987633") && runs("sleep 987634")).await;
    sidecar.signal(Signal::Term);
    let code = loop {
        match frame(&mut shell.socket).await {
            Ok(_) => {}
            Err(code) => break code,
        }
    };
    assert_eq!(code, 1012);
    assert_eq!(sidecar.exited().await.code, Some(0));
    assert!(!runs("sleep 987633") && !runs("sleep 987634"));
}

fn pid(pid: u32) -> nix::unistd::Pid {
    nix::unistd::Pid::from_raw(pid.cast_signed())
}

#[tokio::test]
async fn a_parked_session_is_awakened_for_it_where_there_is_room() {
    let world = World::new().await;
    let sidecar = world.start(&[REQUIRED, ("SESSION_IDLE_TIMEOUT", "10"), ("MAX_CONCURRENT_TASKS", "1")]).await;
    let client = Client::of(&sidecar);
    let id = client.create(&Script::new().text("First.")).await;
    let first = client.frames(&id, None).await;
    until("the process is parked", || sidecar.descendants().is_empty()).await;
    let mut shell = Shell::open(&sidecar, &id).await;
    assert_eq!(sidecar.opencodes().len(), 1);
    assert_eq!(shell.source(&world, "echo here").await, "here");
    // Nobody types any more: it is parked as without a terminal.
    assert_eq!(shell.end().await, (json!({ "type": "exit", "code": null, "signal": 9 }), 1000));
    until("the process is parked", || sidecar.descendants().is_empty()).await;
    // It is the same session all the while.
    client.message(&id, &Script::new().text("Second.")).await;
    assert_eq!(super::output(&client.frames(&id, super::last_id(&first)).await), "Second.");

    until("the process is parked", || sidecar.descendants().is_empty()).await;
    let other = client.create(&Script::new().bash("until [ -e gate ]; do sleep 0.02; done").text("Through.")).await;
    let mut none = Shell::new(sidecar.socket(&format!("/sessions/{id}/terminal")).await);
    let (refused, code) = none.end().await;
    assert_eq!((&refused["code"], code), (&json!("unavailable"), 4503), "{refused}");
    std::fs::write(world.file("gate"), "").unwrap();
    assert_eq!(super::output(&client.frames(&other, None).await), "Through.");
    for id in [&id, &other] {
        client.stop(id).await;
    }
    sidecar.stop().await;
}

#[tokio::test]
async fn who_may_not_is_told_why() {
    let world = World::new().await;
    let mut sidecar = world.start(&[REQUIRED]).await;
    let client = Client::of(&sidecar);
    let id = idle(&client).await;
    let path = format!("/sessions/{id}/terminal");
    let anonymous = soon("an answer", sidecar.http.get(format!("{}{path}", sidecar.base)).send()).await.unwrap();
    assert_eq!(anonymous.status(), 401);
    for query in ["cols=0", "cols=1001", "cols=x", "cols=-1"] {
        let (status, refused) = client.send(Method::GET, &format!("{path}?{query}"), None).await;
        assert_eq!((status, &refused["details"]["field"]), (400, &json!("cols")), "{query}: {refused}");
    }
    let (status, refused) = client.send(Method::GET, &format!("{path}?rows=70000"), None).await;
    assert_eq!((status, &refused["details"]["field"]), (400, &json!("rows")), "{refused}");
    let (status, refused) = client.send(Method::GET, &format!("{path}?width=1"), None).await;
    assert_eq!((status, &refused["code"]), (400, &json!("unknown_field")), "{refused}");
    let (status, refused) = client.send(Method::GET, "/sessions/x/terminal", None).await;
    assert_eq!((status, &refused["details"]["field"]), (400, &json!("session_id")), "{refused}");
    let unknown = format!("/sessions/{}/terminal", Uuid::new_v4());
    let (status, refused) = client.send(Method::GET, &unknown, None).await;
    assert_eq!((status, &refused["code"]), (404, &json!("not_found")), "{refused}");
    let bare = sidecar.http.get(format!("{}{path}", sidecar.base)).bearer_auth(&sidecar.secret).send();
    let bare = soon("an answer", bare).await.unwrap();
    assert_eq!((bare.status().as_u16(), bare.headers()["upgrade"].to_str().unwrap()), (426, "websocket"));

    // The same by WebSocket, as far as the handshake does not tell.
    let mut shell = Shell::new(sidecar.socket(&unknown).await);
    let (refused, code) = shell.end().await;
    assert_eq!((&refused["code"], code), (&json!("not_found"), 4404), "{refused}");
    let mut bad = sidecar.socket_with(&path, &[("authorization", "Bearer wrong")]).await;
    assert_eq!(frame(&mut bad).await, Err(4401));
    let mut bad = sidecar.socket_with(&path, &[]).await;
    bad.send(Message::text(json!({ "type": "auth", "token": "wrong" }).to_string())).await.unwrap();
    assert_eq!(frame(&mut bad).await, Err(4401));
    // Nothing was typed for whoever sends no credential first.
    let mut bad = sidecar.socket_with(&path, &[]).await;
    bad.send(Message::binary(b"touch typed\r".to_vec())).await.unwrap();
    assert_eq!(frame(&mut bad).await, Err(4401));
    assert_eq!(shells(&sidecar), Vec::<u32>::new());

    let mut by_frame = Shell::new(sidecar.socket_with(&path, &[]).await);
    by_frame.send(json!({ "type": "auth", "token": sidecar.secret }).to_string()).await;
    by_frame.until("$ ", "# ").await;
    for (bad, code, word) in [
        (json!({ "type": "resize", "cols": 0, "rows": 10 }), "invalid_field", "cols"),
        (json!({ "type": "resize", "cols": 10 }), "invalid_field", "rows"),
        (json!({ "type": "input" }), "invalid_field", "data"),
        (json!({ "type": "dance" }), "unknown_type", "no such frame"),
    ] {
        by_frame.send(bad.to_string()).await;
        let answer = by_frame.note().await;
        assert_eq!((&answer["type"], &answer["code"]), (&json!("error"), &json!(code)), "{answer}");
        assert!(answer["message"].as_str().unwrap().contains(word), "{answer}");
    }
    assert_eq!(by_frame.source(&world, "stty size").await, "24 80", "and it goes on");
    by_frame.send("no json").await;
    assert_eq!(frame(&mut by_frame.socket).await, Err(4400));
    let mut long = Shell::open(&sidecar, &id).await;
    long.send(vec![b'x'; 1024 * 1024 + 1]).await;
    assert_eq!(frame(&mut long.socket).await, Err(4400));
    drop((by_frame, long));
    client.stop(&id).await;
    assert!(!Path::new(&world.file("typed")).exists());
    assert!(sidecar.log_so_far().iter().all(|line| !line.contains(&sidecar.secret)), "the secret is in the log");
    sidecar.stop().await;
}
