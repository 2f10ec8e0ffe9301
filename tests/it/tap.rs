//! The shell tap with the real shell and a receiver on a real socket.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use futures_util::StreamExt;
use opencode_sidecar::sandbox::Exit;
use opencode_sidecar::sandbox::frames::{Decoder, Frame, Start};
use opencode_sidecar::sandbox::tap;
use opencode_sidecar::tasks::Tasks;
use std::path::Path;
use std::process::Stdio;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::sync::watch;

const TOKEN: &str = "a-token";

/// What one request has brought so far.
#[derive(Clone, Debug, Default)]
struct Copy {
    start: Option<Start>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exit: Option<Exit>,
    ended: bool,
}

type Copies = watch::Sender<Vec<Copy>>;

struct Receiver {
    url: String,
    copies: watch::Receiver<Vec<Copy>>,
    directory: TempDir,
    _tasks: Tasks,
}

async fn receive(State(copies): State<Copies>, headers: HeaderMap, body: Body) -> StatusCode {
    assert_eq!(headers["authorization"], format!("Bearer {TOKEN}"));
    assert_eq!(headers["content-type"], "application/octet-stream");
    let mut at = 0;
    copies.send_modify(|copies| {
        at = copies.len();
        copies.push(Copy::default());
    });
    let mut decoder = Decoder::new();
    let mut body = body.into_data_stream();
    while let Some(bytes) = body.next().await {
        decoder.push(&bytes.unwrap());
        while let Some(frame) = decoder.next_frame().unwrap() {
            copies.send_modify(|copies| {
                let copy = &mut copies[at];
                assert!(copy.exit.is_none() && copy.start.is_some() != matches!(frame, Frame::Start(_)));
                match frame {
                    Frame::Start(start) => copy.start = Some(start),
                    Frame::Stdout(bytes) => copy.stdout.extend_from_slice(&bytes),
                    Frame::Stderr(bytes) => copy.stderr.extend_from_slice(&bytes),
                    Frame::Exit(exit) => copy.exit = Some(exit),
                }
            });
        }
    }
    decoder.finish().unwrap();
    copies.send_modify(|copies| copies[at].ended = true);
    StatusCode::NO_CONTENT
}

impl Receiver {
    async fn new() -> Self {
        let (sender, copies) = watch::channel(Vec::new());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/shell", listener.local_addr().unwrap());
        let router = Router::new().route("/shell", post(receive)).with_state(sender);
        let tasks = Tasks::new();
        tasks.spawn("receiver", async move { axum::serve(listener, router).await.unwrap() });
        Self { url, copies, directory: tempfile::tempdir().unwrap(), _tasks: tasks }
    }

    fn bash(&self, script: &str) -> Command {
        bash(self.directory.path(), &self.url, script)
    }

    /// The copy of the only command so far. Not waited for: the tap ends only when the receiver has everything.
    fn only(&self) -> Copy {
        let copies = self.copies.borrow();
        assert_eq!(copies.len(), 1, "{copies:?}");
        assert!(copies[0].ended);
        copies[0].clone()
    }

    async fn until(&self, level: impl FnMut(&Vec<Copy>) -> bool) -> Vec<Copy> {
        self.copies.clone().wait_for(level).await.unwrap().clone()
    }
}

/// Started as OpenCode starts its shell, in a process group of its own.
#[expect(clippy::disallowed_methods, reason = "the tap is started by OpenCode, not by the sandbox")]
fn bash(directory: &Path, url: &str, script: &str) -> Command {
    let link = directory.join(tap::NAME);
    if !link.exists() {
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_opencode-sidecar"), &link).unwrap();
    }
    let mut command = Command::new(link);
    command.args(["-c", script]).current_dir(directory).process_group(0).kill_on_drop(true);
    command.env(tap::ENV_URL, url).env(tap::ENV_TOKEN, TOKEN);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn code(code: i32) -> Option<Exit> {
    Some(Exit { code: Some(code), signal: None })
}

#[tokio::test]
async fn both_streams_arrive_on_both_sides_told_apart() {
    let receiver = Receiver::new().await;
    let script = "echo out; echo err >&2; printf 'no end, not UTF-8: \\377'; exit 3";
    let output = receiver.bash(script).output().await.unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(output.stdout, b"out\nno end, not UTF-8: \xff");
    assert_eq!(output.stderr, b"err\n");
    let copy = receiver.only();
    assert_eq!((copy.stdout, copy.stderr, copy.exit), (output.stdout, output.stderr, code(3)));
    let start = copy.start.unwrap();
    assert_eq!(start.command, script);
    assert_eq!(Path::new(&start.cwd), receiver.directory.path().canonicalize().unwrap());
    assert!(start.pid > 0 && !start.background && !start.truncated);
}

#[tokio::test]
async fn a_command_killed_by_a_signal_is_an_exit_code_as_shells_have_it() {
    let receiver = Receiver::new().await;
    let output = receiver.bash("echo before; kill -TERM $$").output().await.unwrap();
    // OpenCode would not notice that the tap was ended by a signal.
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(143), b"before\n".as_slice()));
    let copy = receiver.only();
    assert_eq!(
        (copy.stdout.as_slice(), copy.exit),
        (b"before\n".as_slice(), Some(Exit { code: None, signal: Some(15) }))
    );
}

#[tokio::test]
async fn an_abort_of_the_whole_group_is_seen_to_its_end() {
    let receiver = Receiver::new().await;
    let script = "trap 'echo last words; exit 4' TERM; echo ready; while :; do sleep 0.05; done";
    let child = receiver.bash(script).spawn().unwrap();
    receiver.until(|copies| copies.first().is_some_and(|copy| copy.stdout == b"ready\n")).await;
    let group = nix::unistd::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap());
    nix::sys::signal::killpg(group, nix::sys::signal::SIGTERM).unwrap();
    let output = child.wait_with_output().await.unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(4), b"ready\nlast words\n".as_slice()));
    let copy = receiver.only();
    assert_eq!((copy.stdout, copy.exit), (output.stdout, code(4)));
}

#[tokio::test]
async fn a_megabyte_is_complete_and_in_order_on_both_sides() {
    let receiver = Receiver::new().await;
    let script = "i=0; while [ $i -lt 65536 ]; do printf '%015d\\n' $i; i=$((i+1)); done";
    let output = receiver.bash(script).output().await.unwrap();
    let expected: String = (0..65536).map(|i| format!("{i:015}\n")).collect();
    assert!(output.stdout == expected.as_bytes());
    let copy = receiver.only();
    assert!(copy.stdout == output.stdout);
    assert_eq!(copy.exit, code(0));
}

#[tokio::test]
async fn a_line_arrives_while_the_command_still_runs() {
    let receiver = Receiver::new().await;
    let child = receiver.bash("echo first; while [ ! -e gate ]; do sleep 0.01; done; echo second").spawn().unwrap();
    receiver.until(|copies| copies.first().is_some_and(|copy| copy.stdout == b"first\n")).await;
    std::fs::write(receiver.directory.path().join("gate"), "").unwrap();
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.stdout, b"first\nsecond\n");
    assert_eq!(receiver.only().stdout, output.stdout);
}

#[tokio::test]
async fn a_background_child_does_not_hold_the_command_and_is_still_heard() {
    let receiver = Receiver::new().await;
    let script = "(while [ ! -e gate ]; do sleep 0.01; done; echo late; echo late error >&2) & echo now";
    // Returns only when the output is closed, like OpenCode.
    let output = receiver.bash(script).output().await.unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), b"now\n".as_slice()));
    let copies = receiver.until(|copies| copies.get(1).is_some_and(|copy| copy.start.is_some())).await;
    assert_eq!((copies[0].stdout.as_slice(), copies[0].exit), (b"now\n".as_slice(), code(0)));
    assert!(copies[0].ended);
    let start = copies[0].start.clone().unwrap();
    assert_eq!(copies[1].start, Some(Start { background: true, ..start }));
    std::fs::write(receiver.directory.path().join("gate"), "").unwrap();
    let copies = receiver.until(|copies| copies[1].ended).await;
    assert_eq!(
        (copies[1].stdout.as_slice(), copies[1].stderr.as_slice()),
        (b"late\n".as_slice(), b"late error\n".as_slice())
    );
    assert_eq!(copies[1].exit, None);
}

#[tokio::test]
async fn a_background_child_with_its_own_output_needs_no_drain() {
    let receiver = Receiver::new().await;
    // A named pipe is the gate: writing to it waits for the child, so that none is left behind.
    let output = receiver.bash("mkfifo gate; (read line <gate) >log 2>&1 & echo now").output().await.unwrap();
    assert_eq!(output.stdout, b"now\n");
    receiver.only();
    tokio::fs::write(receiver.directory.path().join("gate"), "go\n").await.unwrap();
}

#[tokio::test]
async fn without_a_receiver_the_command_runs_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = format!("http://{}/shell", listener.local_addr().unwrap());
    drop(listener);
    for url in [closed.as_str(), "", "http://", "http://nowhere/", "https://127.0.0.1:1/", "ftp"] {
        let output = bash(directory.path(), url, "echo out; echo err >&2; exit 3").output().await.unwrap();
        assert_eq!(output.status.code(), Some(3), "{url}");
        assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (b"out\n".as_slice(), b"err\n".as_slice()));
    }
}

/// Accepts one connection and reads until the first byte of output is there.
async fn accept_until(listener: &TcpListener, wanted: &[u8]) -> (TcpStream, Vec<u8>) {
    let (mut socket, _) = listener.accept().await.unwrap();
    let mut read = Vec::new();
    while !read.windows(wanted.len()).any(|window| window == wanted) {
        assert!(socket.read_buf(&mut read).await.unwrap() > 0);
    }
    (socket, read)
}

#[tokio::test]
async fn a_receiver_that_goes_away_or_refuses_changes_nothing() {
    for answer in ["", "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "garbage"] {
        let directory = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/shell", listener.local_addr().unwrap());
        let script = "echo first; while [ ! -e gate ]; do sleep 0.01; done; head -c 1048576 /dev/zero; exit 5";
        let child = bash(directory.path(), &url, script).spawn().unwrap();
        let (mut socket, _) = accept_until(&listener, b"\x01\0\0\0\x06first\n").await;
        socket.write_all(answer.as_bytes()).await.unwrap();
        drop(socket);
        std::fs::write(directory.path().join("gate"), "").unwrap();
        let output = child.wait_with_output().await.unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(5), 6 + 1_048_576), "{answer:?}");
        assert_eq!(output.stderr, b"");
    }
}

#[tokio::test]
async fn a_slow_receiver_loses_nothing() {
    const SIZE: usize = 16 * 1024 * 1024;
    let directory = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/shell", listener.local_addr().unwrap());
    // More than all the buffers on the way hold: the receiver reads nothing until the command is held back.
    let script = format!("echo first; head -c {SIZE} /dev/zero | tr '\\0' x");
    let mut child = bash(directory.path(), &url, &script).spawn().unwrap();
    let (mut socket, mut read) = accept_until(&listener, b"first\n").await;
    let mut stdout = child.stdout.take().unwrap();
    let tap = child.id().unwrap();
    let mut out = Vec::new();
    // Held back: the tap waits and OpenCode's side has nothing to read. The pause is only how often that is looked at.
    loop {
        let quiet = std::time::Duration::from_millis(20);
        match tokio::time::timeout(quiet, stdout.read_buf(&mut out)).await {
            Ok(count) => assert!(count.unwrap() > 0, "all of it passed, and the receiver has read nothing"),
            Err(_) if sleeps(tap) => break,
            Err(_) => {}
        }
    }
    assert!(out.len() < SIZE);
    let rest = async {
        while !read.ends_with(b"\r\n0\r\n\r\n") {
            assert!(socket.read_buf(&mut read).await.unwrap() > 0);
        }
        socket.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
    };
    let (_, count) = tokio::join!(rest, stdout.read_to_end(&mut out));
    count.unwrap();
    assert_eq!(child.wait().await.unwrap().code(), Some(0));
    assert_eq!(out.len(), SIZE + 6);
    let frames = frames_of(&read);
    let copied = frames.iter().map(|frame| match frame {
        Frame::Stdout(bytes) => bytes.as_ref(),
        _ => b"",
    });
    assert!(copied.collect::<Vec<_>>().concat() == out);
    assert_eq!(frames.last(), Some(&Frame::Exit(Exit { code: Some(0), signal: None })));
}

/// Takes a whole request with a chunked body apart.
fn frames_of(request: &[u8]) -> Vec<Frame> {
    let line_end = |bytes: &[u8]| bytes.windows(2).position(|pair| pair == b"\r\n").unwrap();
    let mut rest = &request[request.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4..];
    let (mut decoder, mut frames) = (Decoder::new(), Vec::new());
    loop {
        let end = line_end(rest);
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
        if size == 0 {
            decoder.finish().unwrap();
            return frames;
        }
        decoder.push(&rest[end + 2..end + 2 + size]);
        rest = &rest[end + 2 + size + 2..];
        while let Some(frame) = decoder.next_frame().unwrap() {
            frames.push(frame);
        }
    }
}

fn sleeps(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") S ")
}

#[tokio::test]
async fn the_shell_sees_nothing_of_the_taps_environment() {
    let receiver = Receiver::new().await;
    let mut command = receiver.bash("env; echo $0");
    for name in tap::SCRUBBED {
        if name != tap::ENV_URL && name != tap::ENV_TOKEN {
            command.env(name, "/bin/sh");
        }
    }
    command.env("KEPT", "kept");
    let output = command.output().await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("KEPT=kept\n"));
    for name in tap::SCRUBBED {
        assert!(!text.lines().any(|line| line.starts_with(&format!("{name}="))), "{name} in {text}");
    }
    assert!(text.ends_with("/bin/sh\n"), "the shell that was named: {text}");
}

#[tokio::test]
async fn a_shell_that_is_not_there_is_reported_like_one() {
    let receiver = Receiver::new().await;
    let output = receiver.bash("true").env(tap::ENV_SHELL, "/does/not/exist").output().await.unwrap();
    assert_eq!(output.status.code(), Some(127));
    let copy = receiver.only();
    assert!(output.stderr.starts_with(b"/does/not/exist: ") && copy.stderr == output.stderr);
    assert_eq!(copy.exit, code(127));
}

#[tokio::test]
async fn output_that_nobody_reads_ends_the_writer() {
    let receiver = Receiver::new().await;
    let mut child = receiver.bash("echo first; while :; do echo more; done").spawn().unwrap();
    drop(child.stdout.take());
    // The shell dies of SIGPIPE.
    assert_eq!(child.wait().await.unwrap().code(), Some(141));
    assert_eq!(receiver.only().exit, Some(Exit { code: None, signal: Some(13) }));
}
