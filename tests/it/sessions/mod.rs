//! `/sessions`, as the backend calls it. The client here was written with the contract's table of sessions and nothing
//! else.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test's own helpers fail like the test")]

mod callback;
mod contract;
mod faults;
mod life;
mod shapes;
mod terminal;

use crate::support::sidecar::{Sidecar, answer, soon};
use opencode_sidecar::scripted::Script;
use reqwest::{Method, Response};
use serde_json::{Value, json};
use uuid::Uuid;

/// One frame of a session's stream.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Frame {
    pub(crate) id: Option<String>,
    pub(crate) event: String,
    pub(crate) data: Value,
}

/// What the backend knows how to do.
pub(crate) struct Client<'a> {
    sidecar: &'a Sidecar,
}

impl<'a> Client<'a> {
    pub(crate) fn of(sidecar: &'a Sidecar) -> Self {
        Self { sidecar }
    }

    pub(crate) async fn send(&self, method: Method, path: &str, body: Option<Value>) -> (u16, Value) {
        self.sidecar.send(method, path, body).await
    }

    /// Creates a session that plays the script; gives its id.
    pub(crate) async fn create(&self, script: &Script) -> String {
        let id = Uuid::new_v4().to_string();
        let (status, made) = self
            .send(Method::POST, "/sessions", Some(json!({ "session_id": id, "prompt": script.to_prompt("Do it.") })))
            .await;
        assert_eq!((status, &made["session_id"]), (201, &json!(id)), "{made}");
        // The latter on a machine that was slow to write the former.
        assert!(["running", "pending"].contains(&made["status"].as_str().unwrap()), "{made}");
        assert!(made["remote_session_id"].as_str().unwrap().starts_with("ses_"), "{made}");
        id
    }

    pub(crate) async fn message(&self, id: &str, script: &Script) -> Value {
        let body = json!({ "text": script.to_prompt("Go on.") });
        let (status, taken) = self.send(Method::POST, &format!("/sessions/{id}/messages"), Some(body)).await;
        assert_eq!(status, 202, "{taken}");
        taken
    }

    pub(crate) async fn status(&self, id: &str) -> Value {
        self.sidecar.get(&format!("/sessions/{id}/status")).await
    }

    pub(crate) async fn stop(&self, id: &str) -> Value {
        let (status, stopped) = self.send(Method::POST, &format!("/sessions/{id}/stop"), None).await;
        assert_eq!(status, 200, "{stopped}");
        stopped
    }

    /// The stream, from its start or after a frame.
    pub(crate) async fn stream(&self, id: &str, last: Option<&str>) -> Stream {
        let mut request = self
            .sidecar
            .http
            .get(format!("{}/sessions/{id}/stream", self.sidecar.base))
            .bearer_auth(&self.sidecar.secret)
            .header("accept", "text/event-stream");
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        Stream::open(soon("the stream opens", request.send()).await.unwrap()).await
    }

    /// Every frame from the start, or after one, to the end of the connection.
    pub(crate) async fn frames(&self, id: &str, last: Option<&str>) -> Vec<Frame> {
        let mut stream = self.stream(id, last).await;
        let mut frames = Vec::new();
        while let Some(frame) = stream.next().await {
            // They come where a machine is slow.
            if frame.event != "heartbeat" {
                frames.push(frame);
            }
        }
        frames
    }
}

/// A connection that reads server-sent events.
pub(crate) struct Stream {
    response: Response,
    text: String,
}

impl Stream {
    pub(crate) async fn open(response: Response) -> Self {
        if response.status() != 200 {
            panic!("{:?}", answer(response).await);
        }
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { response, text: String::new() }
    }

    /// The next frame; `None` where the connection ended.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(end) = self.text.find("\n\n") {
                let block: String = self.text.drain(..end + 2).collect();
                let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
                let Some(data) = field("data: ") else { continue };
                let data: Value = serde_json::from_str(&data).unwrap();
                assert!(data["timestamp"].as_str().unwrap().ends_with('Z'), "each frame has its time: {block}");
                return Some(Frame { id: field("id: "), event: field("event: ").unwrap(), data });
            }
            let chunk = soon("a frame", self.response.chunk()).await.unwrap()?;
            self.text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    }

    /// Frames up to the one that is wanted, and that one.
    pub(crate) async fn until(&mut self, what: &str, wanted: impl Fn(&Frame) -> bool) -> Vec<Frame> {
        let mut frames = Vec::new();
        loop {
            let frame = self.next().await.unwrap_or_else(|| panic!("the stream ended before {what}: {frames:#?}"));
            let found = wanted(&frame);
            frames.push(frame);
            if found {
                return frames;
            }
        }
    }
}

pub(crate) fn last_id(frames: &[Frame]) -> Option<&str> {
    frames.iter().rev().find_map(|frame| frame.id.as_deref())
}

/// The text of all `output` frames.
pub(crate) fn output(frames: &[Frame]) -> String {
    frames
        .iter()
        .filter(|frame| frame.event == "output")
        .map(|frame| {
            assert_eq!(frame.data["line"], frame.data["text"]);
            frame.data["text"].as_str().unwrap()
        })
        .collect()
}

pub(crate) fn names(frames: &[Frame]) -> Vec<&str> {
    frames.iter().map(|frame| frame.event.as_str()).collect()
}
