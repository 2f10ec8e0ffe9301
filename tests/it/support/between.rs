//! Stands between a sidecar and each real OpenCode that it starts, and does to them what a broken one would: lets a call
//! hang, says something else on the event stream, cuts it, says nothing any more.
//!
//! The sidecar starts a script in OpenCode's place, which starts the real one on another port. What is done to a run
//! is named by its prompt ([`Between::prompt`]), so that several runs side by side each have a fault of their own.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's own helpers fail like the test")]

use super::sidecar::{Sidecar, World, opencode, soon};
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use opencode_sidecar::scripted::Script;
use opencode_sidecar::tasks::Tasks;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Ports for the OpenCodes of one sidecar, where they are, and how far behind each the real one listens: where no other
/// test's sessions have theirs.
const PORTS: u16 = 16;
const FROM: u16 = 14_000;
const BEHIND: u16 = 3_000;

/// After which event a fault begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum After {
    /// A tool runs.
    Tool,
    /// A piece of the answer.
    Text,
    /// The agent has stopped.
    Idle,
}

#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// These bytes on the event stream, and nothing more.
    Bytes(Vec<u8>),
    /// These as well (`SESSION` stands for OpenCode's session); then it goes on as it would.
    Among(String),
    /// These on and on.
    Endless(&'static str),
    /// The connection ends in the middle of an event: at once without a word, or as TCP does it in good order. Only once
    /// the test says so ([`Between::cut`]): what was said before may else be lost with it.
    Cut { reset: bool },
    /// The answer ends in the middle of an event, as HTTP does it in good order.
    End,
    /// Nothing more on the event stream.
    Silence,
    /// Nothing more at all: ports are open, and nothing is said.
    Wedge,
}

/// A fault by its name.
pub(crate) type Named = (&'static str, After, Fault);

pub(crate) struct Between {
    shared: Arc<Shared>,
    command: String,
    ports: String,
}

struct Shared {
    faults: Vec<Named>,
    /// Of those that are started, each has one call that hangs, until there is none left here.
    hang: Mutex<VecDeque<(&'static str, &'static str)>>,
    opencodes: Mutex<HashMap<u16, Behind>>,
    /// Calls that hang.
    hanging: watch::Sender<usize>,
    /// The names of the faults that may cut.
    cut: watch::Sender<Vec<&'static str>>,
    http: reqwest::Client,
}

/// An OpenCode behind one of the ports.
#[derive(Default)]
struct Behind {
    hang: Option<(&'static str, &'static str)>,
    session: String,
    fault: Option<Named>,
    wedged: bool,
}

impl Between {
    /// `hang` are calls by method and end of the path.
    pub(crate) async fn start(world: &World, faults: &[Named], hang: &[(&'static str, &'static str)]) -> Self {
        let shared = Arc::new(Shared {
            faults: faults.to_vec(),
            hang: Mutex::new(hang.iter().copied().collect()),
            opencodes: Mutex::default(),
            hanging: watch::Sender::new(0),
            cut: watch::Sender::default(),
            http: reqwest::Client::builder().no_proxy().build().unwrap(),
        });
        let (first, listeners) = listen().await;
        let tasks = Tasks::new();
        for (port, listener) in (first..).zip(listeners) {
            let (shared, connections) = (Arc::clone(&shared), tasks.clone());
            tasks.spawn("between", async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let (shared, reset) = (Arc::clone(&shared), Arc::new(AtomicBool::new(false)));
                    let io = TokioIo::new(Socket { stream, reset: Arc::clone(&reset) });
                    connections.spawn("a connection between", async move {
                        let service = service_fn(|request| answer(&shared, port, &reset, request));
                        // The other side may go, and a cut is an error here.
                        let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
                    });
                }
            });
        }
        let command = world.state.path().join("opencode-between");
        let script = format!(
            "#!/bin/sh\nbehind=$(($3 + {BEHIND}))\n\
             '{}' serve --port $behind --hostname 127.0.0.1 --print-logs | sed -u \"s/:$behind/:$3/\"\n",
            opencode().display()
        );
        std::fs::write(&command, script).unwrap();
        std::fs::set_permissions(&command, PermissionsExt::from_mode(0o755)).unwrap();
        let ports = format!("{first}-{}", first + PORTS - 1);
        Self { shared, command: command.to_str().unwrap().to_owned(), ports }
    }

    /// A sidecar whose OpenCodes are all behind this.
    pub(crate) async fn sidecar(&self, world: &World, changes: &[(&str, &str)]) -> Sidecar {
        let mine = [("SANDBOX", "off"), ("OPENCODE_COMMAND", &self.command), ("SESSION_PORT_RANGE", &self.ports)];
        world.start(&[&mine, changes].concat()).await
    }

    /// A prompt that plays the script and meets the fault of this name.
    pub(crate) fn prompt(name: &str, script: &Script) -> String {
        script.to_prompt(&format!("Do what the script says, with the fault {name}."))
    }

    /// Has the fault of this name cut, now or when it comes to it.
    pub(crate) fn cut(&self, name: &'static str) {
        self.shared.cut.send_modify(|names| names.push(name));
    }

    /// Waits until so many calls hang.
    pub(crate) async fn hanging(&self, count: usize) {
        soon("a call that hangs", self.shared.hanging.subscribe().wait_for(|hanging| *hanging >= count)).await.unwrap();
    }
}

/// A block of ports that nobody listens on; other tests look for theirs at the same time.
async fn listen() -> (u16, Vec<TcpListener>) {
    let blocks = BEHIND / PORTS;
    let begin = u16::try_from(std::process::id() % u32::from(blocks)).unwrap();
    for block in (0..blocks).map(|block| (begin + block) % blocks) {
        let first = FROM + block * PORTS;
        let mut listeners = Vec::new();
        for port in first..first + PORTS {
            listeners.extend(TcpListener::bind(("127.0.0.1", port)).await);
        }
        if listeners.len() == usize::from(PORTS) {
            return (first, listeners);
        }
    }
    panic!("no block of {PORTS} free ports");
}

impl Shared {
    fn behind<T>(&self, port: u16, look: impl FnOnce(&mut Behind) -> T) -> T {
        let mut opencodes = self.opencodes.lock().unwrap();
        let new = || Behind { hang: self.hang.lock().unwrap().pop_front(), ..Behind::default() };
        look(opencodes.entry(port).or_insert_with(new))
    }

    /// The fault of a port and its name, where this frame is the one after which it begins.
    fn begins(&self, port: u16, frame: &str) -> Option<(&'static str, Fault)> {
        self.behind(port, |behind| {
            let (_, after, _) = behind.fault.as_ref()?;
            let is_it = match after {
                After::Tool => frame.contains(r#""type":"tool""#) && frame.contains(r#""status":"running""#),
                After::Text => frame.contains(r#""message.part.delta""#),
                After::Idle => frame.contains(r#""session.idle""#),
            };
            behind.fault.take_if(|_| is_it).map(|(name, _, fault)| (name, fault))
        })
    }

    async fn hang(&self) -> ! {
        self.hanging.send_modify(|hanging| *hanging += 1);
        std::future::pending().await
    }
}

type Body = UnsyncBoxBody<Bytes, io::Error>;

async fn answer(
    shared: &Arc<Shared>,
    port: u16,
    reset: &Arc<AtomicBool>,
    request: Request<Incoming>,
) -> Result<Response<Body>, reqwest::Error> {
    let (parts, body) = request.into_parts();
    let (method, path) = (parts.method.as_str(), parts.uri.path().to_owned());
    let hangs = shared.behind(port, |behind| {
        behind.wedged || behind.hang.is_some_and(|(of, end)| method == of && path.ends_with(end))
    });
    if hangs {
        shared.hang().await;
    }
    // Who sent it may be gone; then nobody misses an answer.
    let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    if path.ends_with("/prompt_async") {
        let text = String::from_utf8_lossy(&body).into_owned();
        shared.behind(port, |behind| {
            behind.session = path.split('/').nth(2).unwrap().to_owned();
            behind.fault = shared.faults.iter().find(|(name, ..)| text.contains(&format!("fault {name}."))).cloned();
        });
    }
    let url = format!("http://127.0.0.1:{}{}", port + BEHIND, parts.uri);
    let mut forwarded = shared.http.request(parts.method.clone(), url).body(body);
    for name in ["authorization", "x-opencode-directory", "content-type"] {
        if let Some(value) = parts.headers.get(name) {
            forwarded = forwarded.header(name, value);
        }
    }
    let response = forwarded.send().await?;
    let status = response.status();
    let body = if path == "/event" {
        event_stream(Arc::clone(shared), port, Arc::clone(reset), response)
    } else {
        Full::new(response.bytes().await?).map_err(|never| match never {}).boxed_unsync()
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    Ok(response)
}

fn event_stream(shared: Arc<Shared>, port: u16, reset: Arc<AtomicBool>, mut from: reqwest::Response) -> Body {
    let data = |bytes: Vec<u8>| Ok(Frame::data(Bytes::from(bytes)));
    let stream = async_stream::stream! {
        let mut rest = Vec::new();
        while let Ok(Some(chunk)) = from.chunk().await {
            rest.extend_from_slice(&chunk);
            while let Some(end) = rest.windows(2).position(|two| two == b"\n\n") {
                let frame: Vec<u8> = rest.drain(..end + 2).collect();
                let (name, fault) = shared.begins(port, &String::from_utf8_lossy(&frame)).unzip();
                if matches!(fault, Some(Fault::Wedge)) {
                    shared.behind(port, |behind| behind.wedged = true);
                }
                let half = frame[..frame.len() / 2].to_vec();
                yield data(frame);
                match fault {
                    None => {}
                    Some(Fault::Among(text)) => {
                        let session = shared.behind(port, |behind| behind.session.clone());
                        yield data(text.replace("SESSION", &session).into_bytes());
                    }
                    Some(Fault::Bytes(bytes)) => {
                        yield data(bytes);
                        std::future::pending::<()>().await;
                    }
                    Some(Fault::Endless(text)) => loop {
                        yield data(text.repeat(1_000).into_bytes());
                    },
                    Some(Fault::Cut { reset: by_reset }) => {
                        yield data(half);
                        let _ = shared.cut.subscribe().wait_for(|names| names.iter().any(|of| Some(*of) == name)).await;
                        reset.store(by_reset, Ordering::SeqCst);
                        yield Err(io::Error::other("cut by the test"));
                        return;
                    }
                    Some(Fault::End) => {
                        yield data(half);
                        return;
                    }
                    Some(Fault::Silence | Fault::Wedge) => std::future::pending::<()>().await,
                }
            }
        }
    };
    StreamBody::new(stream).boxed_unsync()
}

/// A connection that can end with a reset.
struct Socket {
    stream: TcpStream,
    reset: Arc<AtomicBool>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.reset.load(Ordering::SeqCst) {
            self.stream.set_zero_linger().unwrap();
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
