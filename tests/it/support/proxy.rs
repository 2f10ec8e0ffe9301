//! Stands between a sidecar and its database, and can be cut or hold its breath.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use opencode_sidecar::store::DatabaseOptions;
use opencode_sidecar::tasks::Tasks;
use secrecy::ExposeSecret;
use std::path::Path;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::watch;

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Open,
    /// Connections end, and none is made.
    Cut,
    /// Connections stay and are made, and nothing comes through.
    Frozen,
}

pub(crate) struct Proxy {
    mode: watch::Sender<Mode>,
}

impl Proxy {
    /// Gives the options that lead through it. It runs until the end of the test, whose runtime ends it.
    pub(crate) async fn before(options: DatabaseOptions) -> (Self, DatabaseOptions) {
        let mut url = url::Url::parse(options.url.expose_secret()).unwrap();
        let (_, directory) = url.query_pairs().find(|(name, _)| name == "host").unwrap();
        let server = Path::new(&*directory).join(".s.PGSQL.5432");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        url.set_query(Some("sslmode=disable"));
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(listener.local_addr().unwrap().port())).unwrap();
        let sender = watch::Sender::new(Mode::Open);
        let mode = sender.subscribe();
        let tasks = Tasks::new();
        tasks.clone().spawn("proxy", async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let (mut mode, server) = (mode.clone(), server.clone());
                tasks.spawn("connection", async move {
                    if *mode.borrow() == Mode::Cut {
                        return;
                    }
                    let (read, write) = client.into_split();
                    let (from, to) = UnixStream::connect(server).await.unwrap().into_split();
                    let (there, back) = (mode.clone(), mode.clone());
                    tokio::select! {
                        () = copy(read, to, there) => {}
                        () = copy(from, write, back) => {}
                        _ = mode.wait_for(|mode| *mode == Mode::Cut) => {}
                    }
                });
            }
        });
        (Self { mode: sender }, DatabaseOptions { url: url.to_string().into(), ..options })
    }

    pub(crate) fn cut(&self) {
        self.mode.send_replace(Mode::Cut);
    }

    pub(crate) fn freeze(&self) {
        self.mode.send_replace(Mode::Frozen);
    }

    pub(crate) fn mend(&self) {
        self.mode.send_replace(Mode::Open);
    }
}

/// To the end of either.
async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, mut mode: watch::Receiver<Mode>) {
    let mut buffer = [0; 16384];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if mode.wait_for(|mode| *mode != Mode::Frozen).await.is_err() || to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
