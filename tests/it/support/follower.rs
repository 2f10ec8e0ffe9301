//! A reader that outlives the sidecar: it goes on where it was, and keeps what it saw byte for byte.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's own helpers fail like the test")]

use super::sidecar::{Sidecar, soon};
use opencode_sidecar::sse::Parser;
use serde_json::Value;

/// What it takes to reach a sidecar.
#[derive(Clone, Debug)]
pub(crate) struct Address {
    pub(crate) base: String,
    pub(crate) secret: String,
    pub(crate) http: reqwest::Client,
}

impl Address {
    pub(crate) fn of(sidecar: &Sidecar) -> Self {
        Self { base: sidecar.base.clone(), secret: sidecar.secret.clone(), http: sidecar.http.clone() }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Follower {
    pub(crate) id: String,
    /// Every envelope, as it came.
    pub(crate) seen: Vec<String>,
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With the execution.
    Complete,
    /// The sidecar went away, or said that it does.
    Cut,
    /// There is no such execution (any more), or it cannot be read now; the status of the answer.
    Refused(u16),
}

impl Follower {
    pub(crate) fn new(id: &str) -> Self {
        Self { id: id.to_owned(), seen: Vec::new() }
    }

    /// Reads on from where it was. `None` where the sidecar is gone.
    pub(crate) async fn follow(&mut self, sidecar: &Sidecar) -> Option<()> {
        match soon("a stream", self.read(&Address::of(sidecar))).await {
            Ended::Complete => Some(()),
            Ended::Cut => None,
            Ended::Refused(status) => panic!("{}: {status}", self.id),
        }
    }

    /// The same, with how it ended.
    pub(crate) async fn read(&mut self, at: &Address) -> Ended {
        let request = at
            .http
            .get(format!("{}/tasks/{}/stream", at.base, self.id))
            .bearer_auth(&at.secret)
            .header("accept", "text/event-stream")
            .header("last-event-id", self.seen.len().to_string());
        let Ok(mut response) = request.send().await else { return Ended::Cut };
        if response.status() != 200 {
            return Ended::Refused(response.status().as_u16());
        }
        let (mut parser, mut frames) = (Parser::default(), Vec::new());
        loop {
            let Ok(Some(chunk)) = response.chunk().await else { return Ended::Cut };
            parser.push(&chunk, &mut frames).unwrap();
            for frame in frames.drain(..) {
                let event: Value = serde_json::from_str(&frame).unwrap();
                assert_ne!(event["type"], "reset", "{}: what was seen is gone", self.id);
                let Some(seq) = event["seq"].as_u64() else { continue };
                assert_eq!(seq, self.seen.len() as u64 + 1, "{}: {event}", self.id);
                let is_last = event["type"] == "complete";
                self.seen.push(frame);
                if is_last {
                    return Ended::Complete;
                }
            }
        }
    }
}

/// The whole log of an execution that ends.
pub(crate) async fn raw_log(sidecar: &Sidecar, id: &str) -> Vec<String> {
    let mut reader = Follower::new(id);
    reader.follow(sidecar).await.unwrap();
    reader.seen
}
