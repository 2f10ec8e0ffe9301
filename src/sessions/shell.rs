//! The output of shell commands: from the shell taps of a session, through the broker, into the log.
//!
//! A tap (`sandbox::tap`) sends a copy of what a command writes, stdout and stderr apart. Which tool call it belongs
//! to is known from the command line: OpenCode announces the call with it just before it runs. The output waits
//! for that announcement, so that no reader sees output of a call that it has not seen begin.

use crate::broker::ShellCall;
use crate::events::Writer;
use crate::model::event::{EventType, NewEvent, Severity};
use crate::sandbox::frames::{Decoder, Frame, Start};
use serde_json::json;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// How long output waits for the announcement of its call. OpenCode sends it before it starts the command; what
/// is later than this was started by something else.
const CLAIM_WAIT: Duration = Duration::from_secs(5);

/// What the taps of one run have brought so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    pub(super) bytes: u64,
    pub(super) last: Instant,
}

/// The shell commands of one run. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Shells {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    calls: watch::Sender<Calls>,
    output: watch::Sender<Output>,
    by_pid: Mutex<HashMap<u32, Option<String>>>,
}

/// Calls that were announced and have no shell yet, oldest first.
#[derive(Debug, Default)]
struct Calls(Vec<(String, String)>);

impl Shells {
    pub(super) fn new() -> Self {
        let output = Output { bytes: 0, last: Instant::now() };
        Self {
            inner: Arc::new(Inner {
                calls: watch::Sender::new(Calls::default()),
                output: watch::Sender::new(output),
                by_pid: Mutex::default(),
            }),
        }
    }

    /// A call was announced (its `tool_call` event is in the log).
    pub(super) fn announced(&self, call_id: String, command: String) {
        self.inner.calls.send_modify(|calls| calls.0.push((call_id, command)));
    }

    /// A call has ended: nothing can claim it any more.
    pub(super) fn ended(&self, call_id: &str) {
        self.inner.calls.send_modify(|calls| calls.0.retain(|(id, _)| id != call_id));
    }

    /// Bytes of output so far, and when the last came.
    pub(super) fn output(&self) -> watch::Receiver<Output> {
        self.inner.output.subscribe()
    }

    /// Takes in one command's output until it ends. Events go to the log as they come; the tap is told when all
    /// of them are in it, and only then does the command end for OpenCode.
    pub(super) async fn take_in(self, mut call: ShellCall, writer: Writer) {
        let mut decoder = Decoder::default();
        let mut call_id = None;
        let mut started = false;
        let mut streams = [Text::default(), Text::default()];
        while let Some(chunk) = call.frames.recv().await {
            decoder.push(&chunk);
            loop {
                let frame = match decoder.next_frame() {
                    Ok(Some(frame)) => frame,
                    Ok(None) => break,
                    Err(error) => {
                        // Not the tap that we started. Its connection is dropped with the call.
                        let refused = format!("A shell tap sent something unreadable: {error}.");
                        writer.append(NewEvent::log(Severity::Warn, "shell_output_refused", &refused)).await;
                        return;
                    }
                };
                match frame {
                    Frame::Start(start) if !started => {
                        started = true;
                        call_id = self.claim(&start).await;
                    }
                    Frame::Stdout(bytes) => {
                        let text = streams[0].push(&bytes);
                        self.append(&writer, EventType::Stdout, text, bytes.len(), call_id.as_deref()).await;
                    }
                    Frame::Stderr(bytes) => {
                        let text = streams[1].push(&bytes);
                        self.append(&writer, EventType::Stderr, text, bytes.len(), call_id.as_deref()).await;
                    }
                    Frame::Start(_) | Frame::Exit(_) => {}
                }
            }
        }
        let [out, err] = streams;
        self.append(&writer, EventType::Stdout, out.finish(), 0, call_id.as_deref()).await;
        self.append(&writer, EventType::Stderr, err.finish(), 0, call_id.as_deref()).await;
        writer.output_ends(call_id.as_deref());
        // The tap may be gone; then there is nobody to tell.
        let _ = call.done.send(());
    }

    async fn append(&self, writer: &Writer, kind: EventType, text: String, bytes: usize, call_id: Option<&str>) {
        if !text.is_empty() {
            writer.append(NewEvent::new(kind, json!(text)).with("call_id", json!(call_id))).await;
        }
        self.inner.output.send_modify(|output| {
            output.bytes += bytes as u64;
            output.last = Instant::now();
        });
    }

    async fn claim(&self, start: &Start) -> Option<String> {
        let pids = || self.inner.by_pid.lock().unwrap_or_else(PoisonError::into_inner);
        // What a command leaves running in the background belongs to the same call.
        if start.background {
            return pids().get(&start.pid).cloned().flatten();
        }
        let mut calls = self.inner.calls.subscribe();
        let announced = calls.wait_for(|calls| calls.0.iter().any(|(_, command)| is_of(start, command)));
        let found = matches!(tokio::time::timeout(CLAIM_WAIT, announced).await, Ok(Ok(_)));
        let mut claimed = None;
        if found {
            self.inner.calls.send_modify(|calls| {
                if let Some(at) = calls.0.iter().position(|(_, command)| is_of(start, command)) {
                    claimed = Some(calls.0.remove(at).0);
                }
            });
        }
        pids().insert(start.pid, claimed.clone());
        claimed
    }
}

/// A very long command line comes cut.
fn is_of(start: &Start, command: &str) -> bool {
    if start.truncated { command.starts_with(&start.command) } else { command == start.command }
}

/// Bytes into text: a character that is cut by the end of a piece waits for the next one; what is no UTF-8 becomes
/// U+FFFD.
#[derive(Debug, Default)]
struct Text {
    carry: Vec<u8>,
}

impl Text {
    fn push(&mut self, bytes: &[u8]) -> String {
        self.carry.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&self.carry) {
            Ok(_) => self.carry.len(),
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            // Something in the middle is no UTF-8; only a cut character at the very end may wait.
            Err(_) => self.carry.len() - cut_at_end(&self.carry),
        };
        let rest = self.carry.split_off(whole);
        let text = String::from_utf8_lossy(&self.carry).into_owned();
        self.carry = rest;
        text
    }

    fn finish(self) -> String {
        String::from_utf8_lossy(&self.carry).into_owned()
    }
}

/// How many bytes at the end begin a character that is not complete.
fn cut_at_end(bytes: &[u8]) -> usize {
    (1..=3.min(bytes.len()))
        .find(|back| {
            let lead = bytes[bytes.len() - back];
            let length = match lead {
                0xc2..=0xdf => 2,
                0xe0..=0xef => 3,
                0xf0..=0xf4 => 4,
                _ => 0,
            };
            length > *back
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_the_same_whatever_the_pieces() {
        let bytes = "aä€\u{1f600}b".as_bytes();
        for size in 1..=bytes.len() {
            let mut text = Text::default();
            let mut got: String = bytes.chunks(size).map(|piece| text.push(piece)).collect();
            got.push_str(&text.finish());
            assert_eq!(got, "aä€\u{1f600}b", "{size}");
        }
    }

    #[test]
    fn what_is_no_text_is_marked_and_nothing_waits_for_ever() {
        let mut text = Text::default();
        assert_eq!(text.push(b"a\xffb\xe2\x82"), "a\u{fffd}b");
        assert_eq!(text.push(b"\xac."), "€.");
        assert_eq!(text.push(b"\xf0\x9f"), "");
        assert_eq!(text.finish(), "\u{fffd}");
    }
}
