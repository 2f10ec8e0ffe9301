//! The command line against a real sidecar that drives the real OpenCode: as scripts call it, and at a real terminal.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's own helpers fail like the test")]

mod hostile;
mod lists;
mod resume;
mod runs;
mod terminal;
mod tls;

use crate::support::postgres::sandbox;
use crate::support::sidecar::{PATIENCE, Sidecar, soon};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::unistd::ttyname;
use opencode_sidecar::sandbox::{Exit, Process, Signal, Spec};
use opencode_sidecar::tasks::Tasks;
use serde_json::Value;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines};
use tokio::process::{ChildStderr, ChildStdout};
use tokio::sync::mpsc;

const BINARY: &str = env!("CARGO_BIN_EXE_opencode-sidecar");

/// The command line of somebody who uses a sidecar.
struct Caller {
    tasks: Tasks,
    env: Vec<(OsString, OsString)>,
}

/// What a command did.
struct Done {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Done {
    /// Its standard output as one JSON value a line.
    fn json(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn assert(&self, code: i32) -> &Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.stdout, self.stderr);
        self
    }

    /// That it ended with the code and told the person this.
    fn assert_told(&self, code: i32, words: &[&str]) {
        self.assert(code);
        for word in words {
            assert!(self.stderr.contains(word), "{word} is not in {}", self.stderr);
        }
        assert_eq!(self.stdout, "");
    }
}

impl Caller {
    /// One with the secret of this sidecar.
    fn of(sidecar: &Sidecar) -> Self {
        Self::new(&sidecar.base, &sidecar.secret)
    }

    fn new(url: &str, secret: &str) -> Self {
        let path = std::env::var_os("PATH").unwrap();
        let env = vec![
            ("PATH".into(), path),
            ("TERM".into(), "xterm-256color".into()),
            ("OPENCODE_SIDECAR_URL".into(), url.into()),
            ("OPENCODE_SHARED_SECRET".into(), secret.into()),
        ];
        Self { tasks: Tasks::new(), env }
    }

    /// With one more variable.
    fn with(mut self, name: &str, value: &str) -> Self {
        self.env.retain(|(known, _)| known != name);
        self.env.push((name.into(), value.into()));
        self
    }

    fn spec(&self, program: &str, args: &[&str]) -> Spec {
        let mut spec = Spec::new("command line", program);
        spec.args = args.iter().map(OsString::from).collect();
        spec.env = self.env.clone();
        spec
    }

    /// Runs a command without a terminal to its end.
    async fn run(&self, args: &[&str]) -> Done {
        self.run_program(BINARY, args).await
    }

    /// Runs it in a shell, as `$0` with the arguments `$@`.
    async fn run_in_shell(&self, line: &str, args: &[&str]) -> Done {
        self.run_program("sh", &[&["-c", line, BINARY], args].concat()).await
    }

    async fn run_program(&self, program: &str, args: &[&str]) -> Done {
        let output = sandbox(&self.tasks).run(self.spec(program, args), PATIENCE).await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Done { code: output.exit.code, stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Starts a command without a terminal.
    async fn start(&self, args: &[&str]) -> Running {
        let mut process = sandbox(&self.tasks).start(self.spec(BINARY, args)).await.unwrap();
        let lines = BufReader::new(process.take_stdout().unwrap()).lines();
        let stderr = process.take_stderr().unwrap();
        Running { process, lines, stderr, seen: String::new() }
    }

    /// Starts a command at a terminal of its own, as its foreground.
    async fn terminal(&self, columns: u16, args: &[&str]) -> Terminal {
        self.terminal_with(columns, Path::new("/"), &[&[BINARY], args].concat()).await
    }

    /// The same for any program in any directory.
    async fn terminal_with(&self, columns: u16, cwd: &Path, command: &[&str]) -> Terminal {
        let size = Winsize { ws_row: 40, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(&size, None).unwrap();
        let name = ttyname(&slave).unwrap();
        let line = "exec setsid --ctty --wait \"$@\" <\"$0\" >\"$0\" 2>\"$0\"";
        let mut spec = self.spec("sh", &[&["-c", line, name.to_str().unwrap()], command].concat());
        spec.cwd = cwd.to_path_buf();
        let process = sandbox(&self.tasks).start(spec).await.unwrap();
        let master = File::from(master);
        let mut reader = master.try_clone().unwrap();
        let (sender, chunks) = mpsc::unbounded_channel();
        let thread = std::thread::Builder::new().name("terminal".to_owned()).spawn(move || {
            let mut buffer = [0; 4096];
            // Ends with an error once nobody has the other side.
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        thread.unwrap();
        Terminal { process, master, slave, chunks, bytes: Vec::new(), at: 0 }
    }
}

/// A command on its way, without a terminal.
struct Running {
    process: Process,
    lines: Lines<BufReader<ChildStdout>>,
    stderr: ChildStderr,
    seen: String,
}

impl Running {
    /// Reads its standard output to a line with these words.
    async fn until(&mut self, words: &str) -> String {
        loop {
            let line = soon(words, self.lines.next_line()).await.unwrap();
            let line = line.unwrap_or_else(|| panic!("it ended before {words:?}: {}", self.seen));
            self.seen.push_str(&line);
            self.seen.push('\n');
            if line.contains(words) {
                return line;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    async fn done(mut self) -> Done {
        while let Some(line) = soon("the command's output", self.lines.next_line()).await.unwrap() {
            self.seen.push_str(&line);
            self.seen.push('\n');
        }
        let mut stderr = String::new();
        soon("the command's errors", self.stderr.read_to_string(&mut stderr)).await.unwrap();
        let exit = soon("the command's end", self.process.exited()).await;
        Done { code: exit.code, stdout: self.seen, stderr }
    }
}

/// A command at a terminal, and the person in front of it.
struct Terminal {
    process: Process,
    master: File,
    /// Kept, so that the terminal is there before the command has opened it.
    slave: OwnedFd,
    chunks: mpsc::UnboundedReceiver<Vec<u8>>,
    bytes: Vec<u8>,
    /// Up to where it was read.
    at: usize,
}

impl Terminal {
    /// Waits until these words appear after the last ones.
    async fn until(&mut self, words: &str) {
        loop {
            let text = &self.bytes[self.at..];
            if let Some(found) = text.windows(words.len()).position(|window| window == words.as_bytes()) {
                self.at += found + words.len();
                return;
            }
            let more = soon(words, self.chunks.recv()).await;
            self.bytes.extend(more.unwrap_or_else(|| panic!("the terminal is gone before {words:?}")));
        }
    }

    fn types(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// How it ended, and all that came to the terminal.
    async fn done(mut self) -> (Exit, String) {
        let exit = soon("the command's end", self.process.exited()).await;
        drop(self.slave);
        while let Some(more) = soon("the terminal's rest", self.chunks.recv()).await {
            self.bytes.extend(more);
        }
        (exit, String::from_utf8(self.bytes).unwrap())
    }
}

/// A shell command that writes a word, waits for a file, and writes the next one.
fn gated(words: &[&str], end: &str) -> String {
    let mut command = format!("echo {}", words[0]);
    for (i, word) in words.iter().enumerate().skip(1) {
        command.push_str(&format!("; until [ -e gate-{i} ]; do sleep 0.02; done; echo {word}"));
    }
    format!("{command}; {end}")
}
