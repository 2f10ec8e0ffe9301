//! From an event's timestamp to its frame on a WebSocket, at some 500 events a second; and the same without redaction.

use crate::World;
use crate::sidecar::{Sidecar, directory, seen};
use crate::table::{Row, Shown, print, target};
use chrono::Utc;
use futures_util::{SinkExt, StreamExt};
use opencode_sidecar::scripted::{Script, Step};
use secrecy::ExposeSecret;
use std::io::Write;
use std::path::Path;
use std::time::Instant;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

/// Pieces of text of the run.
const EVENTS: usize = 5000;

pub(crate) async fn run(world: &World) {
    let state = directory();
    // Timestamps are cut to milliseconds: half of one is added by that on average.
    let row = Row::new("event → WebSocket frame", delays(world, state.path(), &[]).await);
    let bare = directory();
    let plain = delays(world, bare.path(), &[("REDACTION", "off")]).await;
    let plain = Row::new("the same with REDACTION=off", plain);
    let p99 = row.quantile(0.99);
    // An event is shown once it is durable: the disk is the least that this can take.
    let sync = Row::new("write and fdatasync of 4 KiB there", fdatasync(state.path()));
    let spread = [0.01, 0.25, 0.5, 0.75].map(|part| format!("{:.1}", row.quantile(part))).join(" ");
    print("delay", "ms", Shown::Tail, &[row, plain, sync]);
    println!("p1 p25 p50 p75: {spread} ms");
    target("p99", p99, 10.0, " ms");
}

/// Of one sidecar, in milliseconds.
async fn delays(world: &World, state: &Path, more: &[(&str, &str)]) -> Vec<f64> {
    let sidecar = Sidecar::start_with(world, state, 1, None, more).await;
    sidecar.warm(1).await;
    let script = Script::new().step(Step {
        text: Some("word ".repeat(EVENTS)),
        // With what the timer adds, some 500 pieces a second.
        delay_ms: Some(1),
        ..Step::default()
    });
    let id = sidecar.submit(&script.to_prompt("Speak.")).await;
    let url = format!("{}/tasks/{id}/stream", sidecar.base.replace("http:", "ws:"));
    let mut request = url.into_client_request().unwrap();
    let bearer = format!("Bearer {}", sidecar.secret.expose_secret());
    request.headers_mut().insert("authorization", bearer.parse().unwrap());
    request.headers_mut().insert("sec-websocket-protocol", "opencode.stream.v1".parse().unwrap());
    let address = sidecar.base.trim_start_matches("http://");
    let socket = tokio::net::TcpStream::connect(address).await.unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async(request, socket).await.unwrap();
    let mut frames = Vec::with_capacity(EVENTS + 100);
    while let Some(Ok(message)) = socket.next().await {
        match message {
            Message::Text(text) => {
                let arrived = Utc::now();
                let last = text.contains("\"type\":\"complete\"");
                frames.push((arrived, text));
                if last {
                    break;
                }
            }
            Message::Ping(data) => socket.send(Message::Pong(data)).await.unwrap(),
            _ => {}
        }
    }
    let deltas: Vec<_> = frames
        .iter()
        .map(|(arrived, text)| (*arrived, seen(text)))
        .filter(|(_, event)| event.kind == "message" && event.data["delta"].is_string())
        .collect();
    let span = (deltas[deltas.len() - 1].1.at - deltas[0].1.at).as_seconds_f64();
    println!("{} events in {span:.1} s: {:.0} a second", deltas.len(), deltas.len() as f64 / span);
    let delays = deltas.iter().map(|(arrived, event)| (*arrived - event.at).as_seconds_f64() * 1000.0);
    let delays = delays.collect();
    sidecar.stop().await;
    delays
}

/// In milliseconds.
fn fdatasync(directory: &Path) -> Vec<f64> {
    let mut file = std::fs::File::create(directory.join("sync")).unwrap();
    let one = |_| {
        let started = Instant::now();
        file.write_all(&[0; 4096]).unwrap();
        file.sync_data().unwrap();
        started.elapsed().as_secs_f64() * 1000.0
    };
    (0..100).map(one).collect()
}
