//! The tap's connection to the sidecar: one HTTP/1.1 request whose chunked body is frames, written without a runtime.
//!
//! It never makes a command fail. An uplink that cannot go on is `broken` and swallows what it is given.

use super::frames::{Frame, encode_output};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How much may wait to be sent before the command's output is left in its pipes, in bytes.
const FULL: usize = 256 * 1024;
/// How long the sidecar may take nothing before the copy is given up: a stuck sidecar must not hold commands for ever.
const STALLED: Duration = Duration::from_secs(60);
const CONNECT: Duration = Duration::from_secs(1);
/// How long to wait for the sidecar to say that it has everything.
const ANSWER: Duration = Duration::from_secs(60);

/// See the module. Made by [`Uplink::connect`], and usable whether that worked or not.
#[derive(Default)]
pub(super) struct Uplink {
    socket: Option<TcpStream>,
    queue: Vec<u8>,
    sent: usize,
    /// When the sidecar last took something, or the queue last was empty.
    progress: Option<Instant>,
    answer: Vec<u8>,
}

impl Uplink {
    /// `url` is `http://<ip>:<port>/<path>`: the sidecar is on loopback, so there is no name to resolve.
    pub(super) fn connect(url: &str, token: &str) -> Self {
        Self::try_connect(url, token).unwrap_or_default()
    }

    fn try_connect(url: &str, token: &str) -> Option<Self> {
        let rest = url.strip_prefix("http://")?;
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let path = if path.is_empty() { "/" } else { path };
        let visible = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        if !visible(rest) || !visible(token) {
            return None;
        }
        let address: SocketAddr = authority.parse().ok()?;
        let socket = TcpStream::connect_timeout(&address, CONNECT).ok()?;
        socket.set_nodelay(true).ok()?;
        socket.set_nonblocking(true).ok()?;
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: {authority}\r\nAuthorization: Bearer {token}\r\n\
             Content-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        );
        Some(Self { socket: Some(socket), queue: head.into_bytes(), ..Self::default() })
    }

    /// Sends a frame as soon as possible. Does not wait.
    pub(super) fn frame(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.chunk(&bytes);
    }

    /// The same for output.
    pub(super) fn output(&mut self, stderr: bool, output: &[u8]) {
        let mut bytes = Vec::with_capacity(output.len() + 16);
        encode_output(stderr, output, &mut bytes);
        self.chunk(&bytes);
    }

    fn chunk(&mut self, bytes: &[u8]) {
        if self.socket.is_some() {
            self.queue.extend_from_slice(format!("{:x}\r\n", bytes.len()).as_bytes());
            self.queue.extend_from_slice(bytes);
            self.queue.extend_from_slice(b"\r\n");
            self.write();
        }
    }

    /// Whether there is room for more output now.
    pub(super) fn has_room(&self) -> bool {
        self.pending() < FULL
    }

    fn pending(&self) -> usize {
        self.queue.len() - self.sent
    }

    /// What to poll for. None: it is broken.
    pub(super) fn poll_fd(&self) -> Option<PollFd<'_>> {
        let wanted = if self.pending() > 0 { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        self.socket.as_ref().map(|socket| PollFd::new(socket.as_fd(), wanted))
    }

    /// How long to poll at most.
    pub(super) fn poll_timeout(&self) -> PollTimeout {
        match self.progress {
            Some(progress) if self.socket.is_some() => {
                timeout((progress + STALLED).saturating_duration_since(Instant::now()))
            }
            _ => PollTimeout::NONE,
        }
    }

    /// Goes on with whatever the socket is ready for. Does not wait.
    pub(super) fn advance(&mut self) {
        self.write();
        self.read();
        // An answer before the end of the request is a refusal.
        if !self.answer.is_empty() || self.progress.is_some_and(|progress| progress.elapsed() >= STALLED) {
            self.give_up();
        }
    }

    /// Ends the request and waits, within limits, for the sidecar to say that it has everything.
    pub(super) fn finish(mut self) {
        if self.socket.is_none() {
            return;
        }
        self.queue.extend_from_slice(b"0\r\n\r\n");
        self.write();
        while self.pending() > 0 {
            self.wait(self.poll_timeout());
            self.advance();
        }
        let end = Instant::now() + ANSWER;
        while !self.answer.windows(2).any(|pair| pair == b"\r\n") {
            let left = end.saturating_duration_since(Instant::now());
            if self.socket.is_none() || left.is_zero() {
                return;
            }
            self.wait(timeout(left));
            self.read();
        }
    }

    fn wait(&self, limit: PollTimeout) {
        if let Some(fd) = self.poll_fd() {
            let _ = poll(&mut [fd], limit);
        }
    }

    fn write(&mut self) {
        while self.pending() > 0 {
            let Some(socket) = &mut self.socket else { return };
            match socket.write(&self.queue[self.sent..]) {
                Ok(count @ 1..) => {
                    self.sent += count;
                    self.progress = Some(Instant::now());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                _ => return self.give_up(),
            }
        }
        if self.pending() == 0 {
            self.queue.clear();
            self.sent = 0;
            self.progress = None;
        } else if self.sent >= FULL {
            self.queue.drain(..self.sent);
            self.sent = 0;
        }
        if self.pending() > 0 && self.progress.is_none() {
            self.progress = Some(Instant::now());
        }
    }

    fn read(&mut self) {
        let mut buffer = [0; 1024];
        let Some(socket) = &mut self.socket else { return };
        match socket.read(&mut buffer) {
            Ok(count @ 1..) => self.answer.extend_from_slice(&buffer[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            _ => self.give_up(),
        }
    }

    fn give_up(&mut self) {
        *self = Self::default();
    }
}

/// Rounded up, so that a wait never ends just before its time.
fn timeout(duration: Duration) -> PollTimeout {
    PollTimeout::from(u16::try_from(duration.as_millis() + 1).unwrap_or(u16::MAX))
}
