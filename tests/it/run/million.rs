//! A log of very many events, read to its end in every way there is: nothing is missing, and the sidecar's memory does
//! not grow with it, nor with readers that are slow.
//!
//! With `SOAK` set it is a million; without, as many as fit into the suite.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's own helpers fail like the test")]

use crate::support::sidecar::{Sidecar, Socket, World, soon};
use futures_util::StreamExt;
use opencode_sidecar::scripted::Script;
use opencode_sidecar::sse::Parser;
use reqwest::Response;
use secrecy::ExposeSecret;
use serde::Deserialize;
use serde_json::value::RawValue;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use std::collections::VecDeque;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::time::Instant;
use tokio_tungstenite::tungstenite::Message;

const SMALL: u64 = 10_000;
const LARGE: u64 = 60_000;
const MILLION: u64 = 1_000_000;
/// What reading may add to a sidecar's memory, however long the log is: 32 MiB.
const BOUND_KIB: u64 = 32 * 1024;
/// Readers of each kind that are slow.
const SLOW: usize = 4;
/// How many pages others read while a slow reader sleeps, and how many events it takes when it wakes up.
const NAP: u64 = 10;
const SIP: u64 = 500;

/// What follows `line 7` in each line.
const REST: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// A log that really ended, and its length.
struct Log {
    id: String,
    len: u64,
    /// Where the lines that were put into it are.
    lines: std::ops::RangeInclusive<u64>,
}

/// What a reader has seen: every event once, in order, and the same bytes as any other reader.
#[derive(Default)]
struct Seen {
    seq: u64,
    bytes: DefaultHasher,
}

impl Seen {
    fn take(&mut self, envelope: &str) {
        self.seq += 1;
        let start = format!("{{\"seq\":{},", self.seq);
        assert!(envelope.starts_with(&start), "{start} {envelope}");
        self.bytes.write(envelope.as_bytes());
    }

    /// The digest of all, where it is all.
    fn all_of(&self, log: &Log) -> u64 {
        assert_eq!(self.seq, log.len);
        self.bytes.finish()
    }
}

/// Puts so many more lines behind the first line of a run that has ended, in the form that this line has.
async fn fill(world: &World, id: &str, more: u64) -> Log {
    let mut database = PgConnection::connect(world.database().url.expose_secret()).await.unwrap();
    database.execute("SET search_path = opencode_sidecar").await.unwrap();
    let first = format!(
        "SELECT seq, envelope::text, last_seq FROM execution_events e JOIN executions x ON x.id = execution_id
         WHERE execution_id = '{id}' AND type = 'stdout'"
    );
    let (at, line, last): (i64, String, i64) =
        sqlx::query_as(AssertSqlSafe(first)).fetch_one(&mut database).await.unwrap();
    let (from, to) = (u64::try_from(at).unwrap() + 1, u64::try_from(at).unwrap() + more);
    let template = line.replace(&format!("{{\"seq\":{at},"), "{\"seq\":#,").replace("line 0 ", "line # ");
    assert_eq!(template.matches('#').count(), 2, "{line}");
    let statements = format!(
        "UPDATE execution_events SET seq = seq + {more},
                envelope = regexp_replace(envelope::text, '^.\"seq\":[0-9]+', '{{\"seq\":' || (seq + {more}))::json
         WHERE execution_id = '{id}' AND seq > {at};
         INSERT INTO execution_events SELECT '{id}', s, 'stdout', severity, ts, replace('{template}', '#', s::text)::json
         FROM execution_events, generate_series({from}, {to}) s WHERE execution_id = '{id}' AND seq = {at};
         UPDATE executions SET last_seq = last_seq + {more} WHERE id = '{id}'"
    );
    soon("a long log", database.execute(AssertSqlSafe(statements))).await.unwrap();
    Log { id: id.to_owned(), len: u64::try_from(last).unwrap() + more, lines: from..=to }
}

/// A number of `/proc/<pid>/status`, in KiB.
fn memory(sidecar: &Sidecar, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", sidecar.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_matches([':', ' ', '\t', 'k', 'B']).parse().unwrap()
}

/// From now on the peak of its memory is counted anew.
fn forget_peak(sidecar: &Sidecar) {
    fs::write(format!("/proc/{}/clear_refs", sidecar.pid()), "5").unwrap();
}

#[derive(Deserialize)]
struct Page {
    events: Vec<Box<RawValue>>,
    next_after: u64,
    last_seq: u64,
}

/// All pages, the largest there are; `meanwhile` is called after each, with its number.
async fn pages(sidecar: &Sidecar, log: &Log, mut meanwhile: impl AsyncFnMut(u64)) -> u64 {
    let mut seen = Seen::default();
    for number in 1.. {
        let url = format!("{}/tasks/{}/events?limit=1000&after={}", sidecar.base, log.id, seen.seq);
        let answer = soon("a page", sidecar.http.get(url).bearer_auth(&sidecar.secret).send()).await.unwrap();
        if answer.status() == 503 {
            continue;
        }
        let page: Page = serde_json::from_slice(&soon("its body", answer.bytes()).await.unwrap()).unwrap();
        assert_eq!(page.last_seq, log.len);
        if page.events.is_empty() {
            break;
        }
        page.events.iter().for_each(|event| seen.take(event.get()));
        assert_eq!(page.next_after, seen.seq);
        meanwhile(number).await;
    }
    seen.all_of(log)
}

/// A stream of server-sent events or a WebSocket, read bit by bit. As every client it goes on where it was, where a very
/// busy database could not be asked in time; the sidecar's log says so then.
struct Reader<'a> {
    sidecar: &'a Sidecar,
    log: &'a Log,
    seen: Seen,
    from: From,
    cuts: usize,
}

enum From {
    Sse { response: Box<Response>, parser: Parser, waiting: VecDeque<String> },
    Socket(Box<Socket>),
}

impl From {
    async fn sse(sidecar: &Sidecar, log: &Log, after: u64) -> Self {
        let url = format!("{}/tasks/{}/stream?after={after}", sidecar.base, log.id);
        let request = sidecar.http.get(url).bearer_auth(&sidecar.secret).header("accept", "text/event-stream");
        let response = Box::new(soon("a stream", request.send()).await.unwrap());
        Self::Sse { response, parser: Parser::default(), waiting: VecDeque::new() }
    }

    async fn socket(sidecar: &Sidecar, log: &Log, after: u64) -> Self {
        Self::Socket(Box::new(sidecar.socket(&format!("/tasks/{}/stream?after={after}", log.id)).await))
    }

    /// The next event; where there is none, whether that is the end as far as the stream says so.
    async fn next(&mut self) -> Result<String, Option<bool>> {
        match self {
            Self::Sse { response, parser, waiting } => loop {
                if let Some(event) = waiting.pop_front() {
                    return Ok(event);
                }
                let chunk = soon("a piece", response.chunk()).await.unwrap().ok_or(None)?;
                let mut events = Vec::new();
                parser.push(&chunk, &mut events).unwrap();
                waiting.extend(events);
            },
            Self::Socket(socket) => loop {
                match soon("a frame", socket.next()).await {
                    Some(Ok(Message::Text(text))) => return Ok(text.as_str().to_owned()),
                    Some(Ok(Message::Close(Some(close)))) => return Err(Some(u16::from(close.code) == 1000)),
                    Some(Ok(Message::Ping(_))) => {}
                    other => panic!("{other:?}"),
                }
            },
        }
    }
}

impl<'a> Reader<'a> {
    fn new(sidecar: &'a Sidecar, log: &'a Log, from: From) -> Self {
        Self { sidecar, log, seen: Seen::default(), from, cuts: 0 }
    }

    /// At most so many events; `false` where there is no more.
    async fn take(&mut self, most: u64) -> bool {
        for _ in 0..most {
            match self.from.next().await {
                Ok(event) => self.seen.take(&event),
                Err(end) => {
                    let is_whole = self.seen.seq == self.log.len;
                    assert!(end.is_none_or(|end| end == is_whole), "{end:?} after {}", self.seen.seq);
                    if is_whole {
                        return false;
                    }
                    self.cuts += 1;
                    self.from = match self.from {
                        From::Sse { .. } => From::sse(self.sidecar, self.log, self.seen.seq).await,
                        From::Socket(_) => From::socket(self.sidecar, self.log, self.seen.seq).await,
                    };
                }
            }
        }
        true
    }

    /// The digest of all.
    async fn until_the_end(&mut self) -> u64 {
        while self.take(u64::MAX).await {}
        std::mem::take(&mut self.seen).all_of(self.log)
    }
}

/// The download: each line, in order.
async fn output(sidecar: &Sidecar, log: &Log) {
    let url = format!("{}/tasks/{}/output", sidecar.base, log.id);
    let open = async || soon("it", sidecar.http.get(&url).bearer_auth(&sidecar.secret).send()).await.unwrap();
    let all = || std::iter::once(0).chain(log.lines.clone());
    let (mut response, mut rest, mut expected) = (open().await, Vec::new(), all());
    loop {
        let chunk = match soon("a piece", response.chunk()).await {
            Ok(Some(chunk)) if response.status() == 200 => chunk,
            Ok(None) if response.status() == 200 => break,
            // It was cut, and is seen to be: again from the start.
            _ => {
                (response, rest, expected) = (open().await, Vec::new(), all());
                continue;
            }
        };
        rest.extend_from_slice(&chunk);
        let end = rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        for line in std::str::from_utf8(&rest[..end]).unwrap().lines() {
            assert_eq!(line, format!("line {} {REST}", expected.next().unwrap()));
        }
        rest.drain(..end);
    }
    assert!(rest.is_empty() && expected.next().is_none(), "the download is not whole");
}

/// Reads all of it in each way, one after another, beside readers that are slow. Gives the peak of the memory, in KiB.
async fn read_in_every_way(sidecar: &mut Sidecar, log: &Log) -> u64 {
    let (peak, cuts) = read(sidecar, log).await;
    let mut told = 0;
    soon("the sidecar says why it cut a stream", async {
        while told < cuts {
            told += sidecar.log_so_far().iter().filter(|line| line.contains("a stream could not be read on")).count();
            tokio::task::yield_now().await;
        }
    })
    .await;
    peak
}

async fn read(sidecar: &Sidecar, log: &Log) -> (u64, usize) {
    forget_peak(sidecar);
    let mut slow = Vec::new();
    for _ in 0..SLOW {
        slow.push(Reader::new(sidecar, log, From::sse(sidecar, log, 0).await));
        slow.push(Reader::new(sidecar, log, From::socket(sidecar, log, 0).await));
    }
    let timed = |name: &str, begun: Instant| {
        let rate = log.len as f64 / begun.elapsed().as_secs_f64();
        println!("{name}: {} events, {rate:.0} a second", log.len);
    };
    let begun = Instant::now();
    let digest = pages(sidecar, log, async |number| {
        if number % NAP == 0 {
            for reader in &mut slow {
                reader.take(SIP).await;
            }
        }
    })
    .await;
    timed("pages, beside slow readers", begun);
    let peak_beside_slow = memory(sidecar, "VmHWM");
    // Those that were slow have missed nothing.
    let begun = Instant::now();
    let mut cuts: usize = slow.drain(2..).map(|reader| reader.cuts).sum();
    assert_eq!(slow[0].until_the_end().await, digest);
    timed("server-sent events", begun);
    let begun = Instant::now();
    assert_eq!(slow[1].until_the_end().await, digest);
    cuts += slow[0].cuts + slow[1].cuts;
    timed("WebSocket", begun);
    let begun = Instant::now();
    output(sidecar, log).await;
    timed("download", begun);
    let peak = memory(sidecar, "VmHWM");
    println!("memory: {} KiB now, at most {peak}, {peak_beside_slow} beside slow readers", memory(sidecar, "VmRSS"));
    (peak, cuts)
}

#[tokio::test]
async fn a_very_long_log_is_read_in_constant_memory() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let script = Script::new().bash(&format!("echo line 0 {REST}")).text("done");
    let (small, large) = (sidecar.submit(&script).await, sidecar.submit(&script).await);
    for id in [&small, &large] {
        assert_eq!(sidecar.finished(id).await["status"], "completed");
    }
    sidecar.stop().await;
    let size = if std::env::var_os("SOAK").is_some() { MILLION } else { LARGE };
    let small = fill(&world, &small, SMALL).await;
    let large = fill(&world, &large, size).await;

    let mut sidecar = world.start(&[]).await;
    let before = memory(&sidecar, "VmRSS");
    let peaks = [read_in_every_way(&mut sidecar, &small).await, read_in_every_way(&mut sidecar, &large).await];
    for (peak, log) in peaks.iter().zip([&small, &large]) {
        let grown = peak.saturating_sub(before);
        assert!(grown <= BOUND_KIB, "{} events took {grown} KiB more than the {before} before", log.len);
    }
    sidecar.stop().await;
}
