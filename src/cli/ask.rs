//! The signals that end a run's watching, and the question that Ctrl-C asks at a terminal.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

const QUESTION: &str = "\nThe task runs. [c]ancel it, [l]eave it running, or [g]o on watching? (Ctrl-C again cancels) ";

/// Between two looks at a terminal at which nobody has typed anything. A person does not notice.
const LOOK: Duration = Duration::from_millis(30);

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// Ctrl-C, or SIGINT otherwise.
    Interrupt,
    /// SIGTERM.
    Terminate,
}

/// SIGINT and SIGTERM, which from now on do not end the process by themselves.
#[derive(Debug)]
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    pub(super) async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.interrupt.recv() => Asked::Interrupt,
            _ = self.terminate.recv() => Asked::Terminate,
        }
    }
}

/// What a person wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Cancel,
    Leave,
    GoOn,
}

/// The process's own terminal, whatever its standard input and output are.
#[derive(Debug)]
pub(super) struct Terminal(File);

impl Terminal {
    /// `None` where there is nobody to ask: no terminal, or this process is in its background.
    pub(super) fn open() -> Option<Self> {
        // An open file of its own, so that nobody else's reads and writes stop blocking.
        let flags = nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY;
        let file = File::options().read(true).write(true).custom_flags(flags).open("/dev/tty").ok()?;
        let foreground = nix::unistd::tcgetpgrp(&file).ok()?;
        (foreground == nix::unistd::getpgrp()).then_some(Self(file))
    }

    /// Asks until there is an answer. The empty one, and the end of the input, go on.
    pub(super) async fn ask(&self) -> io::Result<Answer> {
        loop {
            self.write(QUESTION).await?;
            let mut line = [0; 256];
            // A terminal gives out whole lines.
            let read = retry(|| (&self.0).read(&mut line)).await?;
            let text = String::from_utf8_lossy(&line[..read]).trim().to_lowercase();
            match text.as_str() {
                "c" | "cancel" => return Ok(Answer::Cancel),
                "l" | "leave" => return Ok(Answer::Leave),
                "" | "g" | "go" | "go on" => return Ok(Answer::GoOn),
                _ => {}
            }
        }
    }

    /// Ends the line of a question that is not waited for any more.
    pub(super) async fn end_question(&self) -> io::Result<()> {
        self.write("\n").await
    }

    async fn write(&self, text: &str) -> io::Result<()> {
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let written = retry(|| (&self.0).write(rest)).await?;
            rest = &rest[written..];
        }
        Ok(())
    }
}

/// Does again what would block.
async fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                tokio::time::sleep(LOOK).await;
            }
            done => return done,
        }
    }
}
