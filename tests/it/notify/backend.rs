//! A backend to be told: a real HTTP server that can fail in every way that a real one does.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::sidecar::{PATIENCE, soon};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use opencode_sidecar::model::SessionId;
use opencode_sidecar::tasks::Tasks;
use serde_json::Value;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;

/// How a session's calls are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Status(u16),
    /// 429 with so many seconds of `Retry-After`.
    Busy(u64),
    /// To a place that would take it.
    Redirect,
    /// Not before the session gets another reply.
    Hang,
    /// The connection is closed.
    Cut,
}

/// A call that was answered, or was taken up and hangs.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) method: String,
    /// Whole, with what stands before `/api`.
    pub(crate) path: String,
    pub(crate) authorization: Option<String>,
    pub(crate) body: Value,
    /// What it was answered; `Hang` while it is not, and for ever where it was given up.
    pub(crate) reply: Reply,
}

impl Call {
    pub(crate) fn is_for(&self, session: SessionId, what: &str) -> bool {
        self.path.ends_with(&format!("/api/sessions/{session}/{what}"))
    }

    pub(crate) fn is_taken(&self) -> bool {
        matches!(self.reply, Reply::Status(200..=299))
    }
}

#[derive(Debug)]
struct Shared {
    calls: watch::Sender<Vec<Call>>,
    /// By the last but one part of the path; 204 where none is set.
    replies: watch::Sender<HashMap<String, Reply>>,
}

#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    /// Those of this life; `None` while it is dead.
    tasks: Option<Tasks>,
    /// Holds the port for it while it is: it is bound and does not listen, so it refuses.
    port: TcpSocket,
}

fn bound(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    // So that one can be bound for the next life before the last one ends.
    socket.set_reuseport(true).unwrap();
    socket.bind(address).unwrap();
    socket
}

impl Backend {
    /// One that refuses every connection, until it is started.
    pub(crate) fn dead() -> Self {
        let port = bound("127.0.0.1:0".parse().unwrap());
        let address = port.local_addr().unwrap();
        let shared = Arc::new(Shared { calls: watch::Sender::default(), replies: watch::Sender::default() });
        Self { address, shared, tasks: None, port }
    }

    pub(crate) fn alive() -> Self {
        let mut backend = Self::dead();
        backend.start();
        backend
    }

    pub(crate) fn start(&mut self) {
        let next = bound(self.address);
        let listener = std::mem::replace(&mut self.port, next).listen(64).unwrap();
        let tasks = Tasks::new();
        tasks.spawn("backend", serve(tasks.clone(), listener, Arc::clone(&self.shared)));
        self.tasks = Some(tasks);
    }

    /// Every connection breaks, also in the middle of a call, and no other is taken.
    pub(crate) async fn die(&mut self) {
        self.tasks.take().unwrap().stop(PATIENCE).await.unwrap();
    }

    pub(crate) fn url(&self, path: &str) -> url::Url {
        format!("http://{}{path}", self.address).parse().unwrap()
    }

    pub(crate) fn reply(&self, session: SessionId, reply: Reply) {
        self.shared.replies.send_modify(|replies| {
            replies.insert(session.to_string(), reply);
        });
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.shared.calls.borrow().clone()
    }

    /// Waits until the calls are as wanted.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&[Call]) -> bool) -> Vec<Call> {
        let mut calls = self.shared.calls.subscribe();
        soon(what, calls.wait_for(|calls| wanted(calls))).await.unwrap().clone()
    }

    /// Waits until it has taken this many statuses of the session; gives them.
    pub(crate) async fn told(&self, session: SessionId, count: usize) -> Vec<String> {
        let calls =
            self.until(&format!("{count} statuses"), |calls| taken(calls, session, "status").len() >= count).await;
        taken(&calls, session, "status").iter().map(|body| body["status"].as_str().unwrap().to_owned()).collect()
    }

    /// Waits until so many calls with a status of the session were not taken.
    pub(crate) async fn failed(&self, session: SessionId, count: usize) {
        let failed = |call: &&Call| call.is_for(session, "status") && !call.is_taken() && call.reply != Reply::Hang;
        self.until("a call that fails", |calls| calls.iter().filter(failed).count() >= count).await;
    }
}

/// The bodies of the session's calls that were taken.
pub(crate) fn taken(calls: &[Call], session: SessionId, what: &str) -> Vec<Value> {
    calls.iter().filter(|call| call.is_for(session, what) && call.is_taken()).map(|call| call.body.clone()).collect()
}

async fn serve(tasks: Tasks, listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let stream = tokio::select! {
            () = tasks.shutdown_token().cancelled() => return,
            accepted = listener.accept() => accepted.unwrap().0,
        };
        let (stop, shared) = (tasks.shutdown_token().clone(), Arc::clone(&shared));
        tasks.spawn("connection", async move {
            let service = service_fn(|request| answer(Arc::clone(&shared), request));
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = stop.cancelled() => {}
                // It ends as it was told to, or as the other side wants.
                _ = connection => {}
            }
        });
    }
}

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, io::Error> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let path = parts.uri.path().to_owned();
    let session = path.rsplit('/').nth(1).unwrap_or_default().to_owned();
    let authorization = parts.headers.get("authorization").map(|value| value.to_str().unwrap().to_owned());
    let call = Call {
        method: parts.method.to_string(),
        path,
        authorization,
        body: serde_json::from_slice(&body).unwrap(),
        reply: Reply::Hang,
    };
    let mut at = 0;
    shared.calls.send_modify(|calls| {
        at = calls.len();
        calls.push(call);
    });
    let mut replies = shared.replies.subscribe();
    let of = |replies: &HashMap<String, Reply>| replies.get(&session).copied().unwrap_or(Reply::Status(204));
    let reply = of(&replies.wait_for(|replies| of(replies) != Reply::Hang).await.unwrap());
    shared.calls.send_modify(|calls| calls[at].reply = reply);
    let response = Response::builder();
    let response = match reply {
        Reply::Status(status) => response.status(status),
        Reply::Busy(seconds) => response.status(429).header("retry-after", seconds),
        Reply::Redirect => response.status(307).header("location", "/elsewhere"),
        Reply::Hang | Reply::Cut => return Err(io::ErrorKind::ConnectionAborted.into()),
    };
    Ok(response.body(Full::from("what the backend says")).unwrap())
}
