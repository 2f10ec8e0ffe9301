//! A log's stream to its end, through every connection that it takes.
//!
//! Each connection asks for what comes after the last event that was given out, so none is missed and none comes twice.
//! The whole state is that number.

use super::{Client, ClientError, Standing};
use crate::model::ExecutionId;
use crate::sse::Parser;
use futures_util::Stream;
use reqwest::{Method, Response};
use serde_json::Value;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// How long a stream may be silent. A live one sends a comment every 15 s.
const SILENCE: Duration = Duration::from_secs(45);
/// How long a stream may take to open.
const OPEN: Duration = Duration::from_secs(30);
/// The first and the longest wait before the next attempt.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// An event.
#[derive(Clone, Debug)]
pub struct Envelope {
    /// Its place in the log.
    pub seq: u64,
    /// The envelope, byte for byte as the sidecar wrote it. No line break in it.
    pub text: String,
    /// The same, parsed.
    pub value: Value,
}

/// What happens while a log is followed.
#[derive(Debug)]
pub enum Followed {
    /// The next event. `complete` is the last one.
    Event(Envelope),
    /// The log ends before the event after which it was to be shown: it comes from its start.
    Reset {
        /// Where it ends.
        last_seq: u64,
    },
    /// The connection is gone; it is tried again.
    Lost(ClientError),
    /// It is there again.
    Back,
    /// There is no event after the one that was named, and there will be none.
    Ended(Standing),
}

/// Follows a log from after an event (0: from its start) until `complete`, and gives everything out once and in order.
/// Where the connection drops, it is made again; `patience` is how long that may take each time.
///
/// The stream ends after the first error: [`ClientError::GivenUp`], or a refusal that will not pass.
pub fn follow(
    client: Client,
    id: ExecutionId,
    after: u64,
    patience: Duration,
) -> impl Stream<Item = Result<Followed, ClientError>> + Send {
    async_stream::stream! {
        let mut last = after;
        let mut lost_since: Option<Instant> = None;
        let mut backoff = BACKOFF.0;
        loop {
            let failed = match Frames::open(&client, id, last).await {
                Err(error) => error,
                Ok(mut frames) => {
                    if lost_since.take().is_some() {
                        yield Ok(Followed::Back);
                    }
                    loop {
                        match frames.next().await {
                            Ok(Frame::Event(event)) if event.seq == last + 1 => {
                                last = event.seq;
                                backoff = BACKOFF.0;
                                let complete = event.value["type"] == "complete";
                                yield Ok(Followed::Event(event));
                                if complete {
                                    return;
                                }
                            }
                            Ok(Frame::Event(event)) => {
                                let text = format!("event {} came after event {last}", event.seq);
                                break ClientError::Unexpected(text);
                            }
                            Ok(Frame::Reset { last_seq }) => {
                                last = 0;
                                yield Ok(Followed::Reset { last_seq });
                            }
                            Ok(Frame::End) => match client.status(id).await {
                                Ok(standing) if standing.status.is_final() && standing.last_seq == last => {
                                    yield Ok(Followed::Ended(standing));
                                    return;
                                }
                                Ok(_) => break ClientError::Ended,
                                Err(error) => break error,
                            },
                            Err(error) => break error,
                        }
                    }
                }
            };
            if !failed.is_transient() {
                yield Err(failed);
                return;
            }
            let first = lost_since.is_none();
            let since = *lost_since.get_or_insert_with(Instant::now);
            let left = patience.saturating_sub(since.elapsed());
            if left.is_zero() {
                yield Err(ClientError::GivenUp { patience, last: Box::new(failed) });
                return;
            }
            if first {
                yield Ok(Followed::Lost(failed));
            }
            sleep(backoff.min(left)).await;
            backoff = (backoff * 2).min(BACKOFF.1);
        }
    }
}

enum Frame {
    Event(Envelope),
    Reset { last_seq: u64 },
    End,
}

/// One connection.
struct Frames {
    response: Response,
    parser: Parser,
    waiting: VecDeque<String>,
}

impl Frames {
    async fn open(client: &Client, id: ExecutionId, after: u64) -> Result<Self, ClientError> {
        let request =
            client.request(Method::GET, &["tasks", &id.to_string(), "stream"], &[("after", after.to_string())]);
        let sent = timeout(OPEN, client.send(request.header("accept", "text/event-stream"))).await;
        let response = sent.map_err(|_| ClientError::Silent(OPEN))??;
        Ok(Self { response, parser: Parser::default(), waiting: VecDeque::new() })
    }

    async fn next(&mut self) -> Result<Frame, ClientError> {
        loop {
            while let Some(text) = self.waiting.pop_front() {
                let value: Value =
                    serde_json::from_str(&text).map_err(|error| ClientError::Unexpected(error.to_string()))?;
                match (value["seq"].as_u64(), value["type"].as_str()) {
                    (Some(seq), _) => return Ok(Frame::Event(Envelope { seq, text, value })),
                    (None, Some("reset")) => {
                        return Ok(Frame::Reset { last_seq: value["last_seq"].as_u64().unwrap_or_default() });
                    }
                    // Not part of the log, such as a heartbeat.
                    (None, _) => {}
                }
            }
            let chunk = timeout(SILENCE, self.response.chunk()).await.map_err(|_| ClientError::Silent(SILENCE))?;
            let Some(chunk) = chunk.map_err(ClientError::unreachable)? else { return Ok(Frame::End) };
            let mut events = Vec::new();
            self.parser.push(&chunk, &mut events).map_err(|error| ClientError::Unexpected(error.to_string()))?;
            self.waiting.extend(events);
        }
    }
}
