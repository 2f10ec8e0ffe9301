//! How the shell tap tells the sidecar what a command does: a stream of frames, each 1 byte kind, 4 bytes big-endian
//! length, payload. Pure: bytes in, frames out.
//!
//! What the sidecar decodes comes from inside a sandbox, so nothing in it is trusted and nothing is unbounded.

use super::Exit;
use bytes::{Buf, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

/// The longest payload of one frame, in bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;

const HEADER: usize = 5;
const START: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const EXIT: u8 = 3;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A command begins. Always the first frame.
    Start(Start),
    /// It wrote this to its standard output.
    Stdout(Bytes),
    /// It wrote this to its standard error.
    Stderr(Bytes),
    /// It has ended. Always the last frame; without it the command was killed together with its tap. The output of
    /// background children has none.
    Exit(Exit),
}

/// What was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The command as the shell was given it.
    pub command: String,
    /// Where.
    pub cwd: String,
    /// The id of the shell.
    pub pid: u32,
    /// Not the command itself, but what its background children write after its end.
    #[serde(default)]
    pub background: bool,
    /// `command` is only its beginning, since the whole does not fit into a frame.
    #[serde(default)]
    pub truncated: bool,
}

/// Bytes that are no frames.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// There is no such kind.
    #[error("unknown kind of frame: {0}")]
    Kind(u8),
    /// The payload is longer than [`MAX_PAYLOAD`].
    #[error("a frame of {0} bytes is too long")]
    TooLong(usize),
    /// The payload is not what its kind says.
    #[error("the payload of a frame is malformed")]
    Payload(#[source] serde_json::Error),
    /// The stream ended in the middle of a frame.
    #[error("the stream ended in the middle of a frame")]
    Cut,
}

impl Start {
    /// Cuts `command` and `cwd` so that the frame keeps to [`MAX_PAYLOAD`].
    pub fn fit(mut self) -> Self {
        while serde_json::to_vec(&self).is_ok_and(|payload| payload.len() > MAX_PAYLOAD) {
            let longest = if self.command.len() >= self.cwd.len() { &mut self.command } else { &mut self.cwd };
            longest.truncate(longest.floor_char_boundary(longest.len() / 2));
            self.truncated = true;
        }
        self
    }
}

impl Frame {
    /// Appends the frame to `out`. Output longer than [`MAX_PAYLOAD`] becomes several frames; a [`Start`] has to
    /// [`fit`](Start::fit).
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Start(start) => json(START, start, out),
            Self::Stdout(bytes) => encode_output(false, bytes, out),
            Self::Stderr(bytes) => encode_output(true, bytes, out),
            Self::Exit(exit) => json(EXIT, exit, out),
        }
    }
}

/// The same as [`Frame::encode`] for output that is not to be copied first.
pub fn encode_output(stderr: bool, bytes: &[u8], out: &mut Vec<u8>) {
    for payload in bytes.chunks(MAX_PAYLOAD) {
        put(if stderr { STDERR } else { STDOUT }, payload, out);
    }
}

fn json<T: Serialize>(kind: u8, value: &T, out: &mut Vec<u8>) {
    // Strings and numbers only: this cannot fail.
    if let Ok(payload) = serde_json::to_vec(value) {
        put(kind, &payload, out);
    }
}

fn put(kind: u8, payload: &[u8], out: &mut Vec<u8>) {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    out.push(kind);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(payload);
}

/// Takes a stream of frames apart. Holds at most one frame and what was last pushed.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
}

impl Decoder {
    /// At the beginning of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes. Follow it with [`Decoder::next_frame`] until that has none.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete frame, if there is one.
    ///
    /// # Errors
    /// The bytes are no frame. The stream cannot be read any further then: give it up.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let [kind, a, b, c, d, ..] = *self.buffer else { return Ok(None) };
        if kind > EXIT {
            return Err(FrameError::Kind(kind));
        }
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > MAX_PAYLOAD {
            return Err(FrameError::TooLong(length));
        }
        if self.buffer.len() < HEADER + length {
            return Ok(None);
        }
        self.buffer.advance(HEADER);
        let payload = self.buffer.split_to(length).freeze();
        Ok(Some(match kind {
            START => Frame::Start(serde_json::from_slice(&payload).map_err(FrameError::Payload)?),
            STDOUT => Frame::Stdout(payload),
            STDERR => Frame::Stderr(payload),
            _ => Frame::Exit(serde_json::from_slice(&payload).map_err(FrameError::Payload)?),
        }))
    }

    /// Call it at the end of the stream.
    ///
    /// # Errors
    /// Part of a frame is left.
    pub fn finish(self) -> Result<(), FrameError> {
        if self.buffer.is_empty() { Ok(()) } else { Err(FrameError::Cut) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Start {
        Start { command: "echo \"hé\"".into(), cwd: "/w".into(), pid: 7, background: false, truncated: false }
    }

    fn frames() -> Vec<Frame> {
        vec![
            Frame::Start(start()),
            Frame::Stdout(Bytes::from_static(b"out\xff\0")),
            Frame::Stderr(Bytes::from_static(b"err")),
            Frame::Exit(Exit { code: Some(3), signal: None }),
        ]
    }

    fn decode(chunks: impl IntoIterator<Item = Vec<u8>>) -> Result<Vec<Frame>, FrameError> {
        let (mut decoder, mut frames) = (Decoder::new(), Vec::new());
        for chunk in chunks {
            decoder.push(&chunk);
            while let Some(frame) = decoder.next_frame()? {
                frames.push(frame);
            }
        }
        decoder.finish()?;
        Ok(frames)
    }

    #[test]
    fn frames_arrive_however_they_are_split() {
        let mut bytes = Vec::new();
        frames().iter().for_each(|frame| frame.encode(&mut bytes));
        for size in 1..=bytes.len() {
            assert_eq!(decode(bytes.chunks(size).map(<[u8]>::to_vec)).unwrap(), frames(), "in pieces of {size}");
        }
    }

    #[test]
    fn a_frame_on_the_wire() {
        let mut bytes = Vec::new();
        Frame::Stderr(Bytes::from_static(b"no")).encode(&mut bytes);
        assert_eq!(bytes, [2, 0, 0, 0, 2, b'n', b'o']);
        bytes.clear();
        Frame::Exit(Exit { code: None, signal: Some(9) }).encode(&mut bytes);
        assert_eq!(&bytes[5..], br#"{"code":null,"signal":9}"#);
    }

    #[test]
    fn long_output_becomes_several_frames() {
        let long = Bytes::from(vec![b'x'; 2 * MAX_PAYLOAD + 1]);
        let mut bytes = Vec::new();
        Frame::Stdout(long).encode(&mut bytes);
        let lengths: Vec<_> = decode([bytes])
            .unwrap()
            .iter()
            .map(|frame| match frame {
                Frame::Stdout(bytes) => bytes.len(),
                _ => 0,
            })
            .collect();
        assert_eq!(lengths, [MAX_PAYLOAD, MAX_PAYLOAD, 1]);
    }

    #[test]
    fn garbage_is_refused() {
        assert!(matches!(decode([b"GET / HTTP/1.1".to_vec()]), Err(FrameError::Kind(b'G'))));
        assert!(matches!(decode([vec![4, 0, 0, 0, 0]]), Err(FrameError::Kind(4))));
        // Refused by its header: nobody waits for, or keeps, 4 GiB.
        assert!(matches!(decode([vec![1, 0xff, 0xff, 0xff, 0xff]]), Err(FrameError::TooLong(_))));
        assert!(matches!(decode([vec![1, 0, 1, 0, 1]]), Err(FrameError::TooLong(65537))));
        assert!(matches!(decode([vec![0, 0, 0, 0, 2, b'[', b']']]), Err(FrameError::Payload(_))));
        let nested = [vec![0, 0, 0, 0xff, 0xff], vec![b'['; 0xffff]].concat();
        assert!(matches!(decode([nested]), Err(FrameError::Payload(_))));
        assert!(matches!(decode([vec![1, 0, 0]]), Err(FrameError::Cut)));
        assert!(matches!(decode([vec![1, 0, 0, 0, 2, b'x']]), Err(FrameError::Cut)));
    }

    #[test]
    fn a_command_that_does_not_fit_is_cut() {
        let short = start().fit();
        assert_eq!(short, start());
        // A control character takes six bytes in JSON.
        let long = Start { command: "\u{1}".repeat(100_000), ..start() }.fit();
        assert!(long.truncated && long.command.len() > 5_000);
        let mut bytes = Vec::new();
        Frame::Start(long.clone()).encode(&mut bytes);
        assert_eq!(decode([bytes]).unwrap(), [Frame::Start(long)]);
        let wide = Start { command: "é".repeat(60_001), ..start() }.fit();
        assert!(wide.truncated && wide.command.chars().all(|c| c == 'é'));
    }
}
