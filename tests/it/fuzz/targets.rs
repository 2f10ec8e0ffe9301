//! What a fuzzer may throw bytes at, and what has to hold whatever they are. `fuzz/` runs these for long, and `make test`
//! with each input of the corpus.

#![allow(clippy::expect_used, reason = "a target that fails is a finding")]

use chrono::DateTime;
use opencode_sidecar::api::extract::parse_json;
use opencode_sidecar::journal::Journal;
use opencode_sidecar::model::event::EventType;
use opencode_sidecar::model::request::TaskRequest;
use opencode_sidecar::opencode::translate::Translator;
use opencode_sidecar::opencode::wire::RawEvent;
use opencode_sidecar::sandbox::frames::{Decoder, Frame};
use opencode_sidecar::secrets::{Keyring, Redactor, Scanner, SealingKey};
use opencode_sidecar::sse::Parser;
use opencode_sidecar::workspace::files::FilePath;
use opencode_sidecar::workspace::{Workspace, is_plain_relative};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use std::io::Cursor;
use std::path::Path;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Message, WebSocket};

pub(crate) type Target = fn(&[u8]);

/// All of them, by the name of their corpus.
pub(crate) const ALL: &[(&str, Target)] = &[
    ("sse", sse),
    ("translator", translator),
    ("journal", journal),
    ("tap_frames", tap_frames),
    ("websocket", websocket),
    ("paths", paths),
    ("envelope", envelope),
    ("sealed", sealed),
    ("requests", requests),
    ("redaction", redaction),
];

/// The bytes in pieces, whose lengths come from the bytes themselves.
fn pieces(data: &[u8]) -> Vec<&[u8]> {
    let mut rest = data;
    let mut pieces = Vec::new();
    while let Some(first) = rest.first() {
        let (piece, after) = rest.split_at(rest.len().min(usize::from(first % 16) + 1));
        pieces.push(piece);
        rest = after;
    }
    pieces
}

/// A stream means the same however it was cut.
pub(crate) fn sse(data: &[u8]) {
    let read = |pieces: &[&[u8]]| {
        let (mut parser, mut events) = (Parser::default(), Vec::new());
        let ended = pieces.iter().try_for_each(|piece| parser.push(piece, &mut events));
        (events, ended)
    };
    assert_eq!(read(&[data]), read(&pieces(data)));
}

/// A line is an event of OpenCode. Whatever it says, ours have an envelope that can be read.
pub(crate) fn translator(data: &[u8]) {
    let mut translator = Translator::new("ses_root", "/workspace");
    let mut events = Vec::new();
    for (at, line) in (0i64..).zip(data.split(|byte| *byte == b'\n')) {
        if let Ok(event) = serde_json::from_slice::<RawEvent>(line) {
            events.extend(translator.translate(&event, at).events);
        }
    }
    events.extend(translator.abandon_texts());
    assert!(translator.progress().is_none_or(|progress| progress <= 100));
    for (seq, event) in (1..).zip(events) {
        let kind = event.kind;
        let sealed = event.seal(seq, DateTime::default());
        let read: Value = serde_json::from_str(&sealed.json).expect("an envelope is JSON");
        assert_eq!((read["seq"].as_u64(), read["type"].as_str()), (Some(seq), Some(kind.as_str())));
        assert!(!sealed.json.contains(['\n', '\r']), "an envelope is one line");
    }
}

/// A file of the journal that holds anything: what is no record is cut off, and what comes after it is safe.
pub(crate) fn journal(data: &[u8]) {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let open = || Journal::open(directory.path()).expect("damage is no error");
    let segment = {
        let (journal, _) = open();
        journal.append(b"first").expect("it takes a record");
        let files = std::fs::read_dir(directory.path()).expect("it is there").flatten().map(|entry| entry.path());
        files.filter(|path| path.extension().is_some_and(|kind| kind == "journal")).max().expect("there is a segment")
    };
    // The first byte says where in the file the bytes are to be: over its beginning, or behind what is there.
    let mut file = std::fs::read(&segment).expect("it can be read");
    let at = data.first().map_or(0, |first| usize::from(*first) % (file.len() + 1));
    file.truncate(at);
    file.extend_from_slice(data.get(1..).unwrap_or_default());
    std::fs::write(&segment, &file).expect("it can be written");

    let records = |journal: &Journal| {
        let (mut at, mut records) = (journal.start(), Vec::new());
        while let Some((record, next)) = journal.next(at).expect("what was left in is whole") {
            assert!(next > at);
            records.push(record);
            at = next;
        }
        records
    };
    let (journal, _) = open();
    let mut before = records(&journal);
    assert!(before.iter().map(Vec::len).sum::<usize>() <= file.len());
    journal.append(b"last").expect("it goes on");
    drop(journal);
    let (journal, damage) = open();
    assert_eq!(damage, [], "what is cut off is cut off once");
    before.push(b"last".to_vec());
    assert_eq!(records(&journal), before);
}

/// What a shell tap, or who plays one, sends out of a sandbox.
pub(crate) fn tap_frames(data: &[u8]) {
    let read = |pieces: &[&[u8]]| {
        let (mut decoder, mut frames) = (Decoder::new(), Vec::new());
        for piece in pieces {
            decoder.push(piece);
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break,
                    Err(error) => return (frames, Some(error.to_string())),
                }
            }
        }
        (frames, decoder.finish().err().map(|error| error.to_string()))
    };
    let whole = read(&[data]);
    assert_eq!(whole, read(&pieces(data)));
    if whole.1.is_none() {
        let mut again = Vec::new();
        whole.0.iter().for_each(|frame| frame.encode(&mut again));
        // Output of no bytes is not written.
        let is_something =
            |frame: &Frame| !matches!(frame, Frame::Stdout(bytes) | Frame::Stderr(bytes) if bytes.is_empty());
        let something = whole.0.into_iter().filter(is_something).collect();
        assert_eq!(read(&[&again]), (something, None), "what was read can be written");
    }
}

/// The frames of a client, with the limits that the sidecar's sockets have.
pub(crate) fn websocket(data: &[u8]) {
    const MAX: usize = 64 * 1024;
    let config = WebSocketConfig::default().max_message_size(Some(MAX)).max_frame_size(Some(MAX));
    let mut socket = WebSocket::from_raw_socket(Stream(Cursor::new(data.to_vec())), Role::Server, Some(config));
    while let Ok(message) = socket.read() {
        assert!(message.len() <= MAX);
        if let Message::Text(text) = message {
            let _ = serde_json::from_str::<Value>(&text);
        }
    }
}

struct Stream(Cursor<Vec<u8>>);

impl std::io::Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl std::io::Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A path from outside never leads outside, and makes nothing there.
pub(crate) fn paths(data: &[u8]) {
    files(data);
    let Ok(path) = std::str::from_utf8(data) else { return };
    if is_plain_relative(Path::new(path)) {
        assert!(!path.starts_with('/') && path.split('/').all(|name| name != ".."), "{path:?}");
    }
    let outside = tempfile::tempdir().expect("a directory can be made");
    let root = outside.path().join("workspace");
    let workspace = Workspace::open(&root).expect("it can be made");
    for (link, to) in [("up", ".."), ("out", "/etc"), ("loop", "loop")] {
        std::os::unix::fs::symlink(to, root.join(link)).expect("a link can be made");
    }
    if let Ok(workdir) = workspace.workdir(Some(path)) {
        let real = workdir.canonicalize().expect("it is there");
        assert!(real.starts_with(root.canonicalize().expect("it is there")), "{path:?} leads to {}", real.display());
    }
    let beside = std::fs::read_dir(outside.path()).expect("it can be read").count();
    assert_eq!(beside, 1, "{path:?} has made something outside");
}

/// What is read for others is what is there, and never what is outside.
fn files(data: &[u8]) {
    const OUTSIDE: &[u8] = b"what nobody here may read";
    let Ok(path) = FilePath::parse(data) else { return };
    assert!(!path.as_bytes().starts_with(b"/") && path.as_bytes().split(|b| *b == b'/').all(|name| name != b".."));
    let outside = tempfile::tempdir().expect("a directory can be made");
    std::fs::write(outside.path().join("x"), OUTSIDE).expect("it can be written");
    let root = outside.path().join("workspace");
    let workspace = Workspace::open(&root).expect("it can be made");
    std::fs::create_dir(root.join("a")).expect("it can be made");
    std::fs::write(root.join("a/b"), b"inside").expect("it can be written");
    for (link, to) in [("up", ".."), ("out", "../x"), ("in", "a"), ("a/up", "../.."), ("loop", "loop")] {
        std::os::unix::fs::symlink(to, root.join(link)).expect("a link can be made");
    }
    let tree = workspace.tree(None).expect("it is there");
    if let Ok(file) = tree.open(&path) {
        assert_eq!(file.read_at(0, 100).expect("it can be read"), b"inside");
    }
}

/// An event's envelope as the database has it, or a peer sends it.
pub(crate) fn envelope(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (kind, data) = text.split_once('\n').unwrap_or((text, ""));
    let Some(kind) = EventType::parse(kind) else { return };
    let value = serde_json::from_str(data).unwrap_or_else(|_| Value::String(data.to_owned()));
    let event = opencode_sidecar::model::NewEvent::new(kind, value.clone()).with("call_id", data);
    let sealed = event.seal(7, DateTime::default());
    let read: Value = serde_json::from_str(&sealed.json).expect("an envelope is JSON");
    assert_eq!((&read["data"], &read["call_id"]), (&value, &Value::String(data.to_owned())));
}

/// A key that comes encrypted, and one that the sidecar has sealed: opened by whoever has sealed it and nobody else.
pub(crate) fn sealed(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let key = |byte: u8| {
        use base64::Engine;
        SealingKey::parse(&base64::engine::general_purpose::STANDARD.encode([byte; 32])).expect("it is one")
    };
    let keyring = Keyring { current: key(1), previous: Some(key(2)) };
    // Nobody guesses a tag of 16 bytes.
    assert!(keyring.open(&SecretString::from(text)).is_err());
    assert!(key(1).unseal(text, b"row").is_err());
    let ours = key(1).seal(&SecretString::from(text), b"row").expect("there is randomness");
    assert_eq!(key(1).unseal(&ours, b"row").expect("it is ours").expose_secret(), text);
    assert!(key(1).unseal(&ours, b"another row").is_err());
    assert!(key(2).unseal(&ours, b"row").is_err());
}

/// The body of a submission.
pub(crate) fn requests(data: &[u8]) {
    if let Err(problem) = parse_json::<TaskRequest>(data) {
        assert_eq!(problem.code().status().as_u16(), 400);
        assert!(problem.detail().len() < 1024);
    }
}

/// No secret goes by because of where it was cut.
pub(crate) fn redaction(data: &[u8]) {
    const KEY: &str = "the-session-key-0123";
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut redactor = Redactor::new(true);
    redactor.hide(&SecretString::from(KEY));
    let mut scanner = Scanner::default();
    let (mut told, mut found) = (String::new(), 0);
    let mut rest = text;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.floor_char_boundary(usize::from(rest.as_bytes()[0] % 16) + 4));
        let cleaned = scanner.push(&redactor, piece);
        told.push_str(&cleaned.text);
        found += cleaned.found.len();
        rest = after;
    }
    let cleaned = scanner.finish(&redactor);
    told.push_str(&cleaned.text);
    found += cleaned.found.len();
    assert!(!told.contains(KEY), "{told}");
    match redactor.clean(text) {
        None => assert_eq!((told.as_str(), found), (text, 0)),
        Some(whole) => assert_eq!(found, whole.found.len(), "{told} {}", whole.text),
    }
}
