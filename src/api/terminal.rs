//! `WS /sessions/{session_id}/terminal`: an interactive shell inside a session.
//!
//! Bytes go both ways as they are; nothing is kept between the two, so whoever is slow stops the other. The route refuses
//! by itself, as the stream's does, and ends with its credential.

use crate::api::auth::{Admission, STREAM_PROTOCOL};
use crate::api::extract::ApiQuery;
use crate::api::problem::{Code, Problem};
use crate::api::server::ConnectionSlot;
use crate::api::sessions::{SessionsApi, find, not_found, parse_id};
use crate::api::sockets::{Broken, Closing, EXPIRED, PING, Pace, STUCK, close};
use crate::api::tasks::unavailable;
use crate::executions::{MAX_TERMINALS, OpenTerminalError, Terminal, TerminalSize};
use crate::model::SessionId;
use axum::Extension;
use axum::body::Bytes;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::extract::{FromRequestParts, Path, Request, State};
use axum::response::Response;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, interval_at, timeout};

/// The longest message that a client may send, in bytes: a paste comes as one.
const MAX_MESSAGE: usize = 1024 * 1024;
/// How much output goes into one frame at most, in bytes.
const CHUNK: usize = 16 * 1024;
/// How long a client may give no sign of life, answers to pings among them. Much longer than a ping, since its answer
/// waits behind the output that a slow reader has not had yet.
const SILENT: std::time::Duration = std::time::Duration::from_secs(180);
/// The largest terminal, in characters each way.
const MAX_SIZE: i64 = 1000;

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct TerminalQuery {
    /// Characters in a line.
    #[param(minimum = 1, maximum = 1000, default = 80)]
    #[serde(default)]
    cols: Option<i64>,
    /// Lines.
    #[param(minimum = 1, maximum = 1000, default = 24)]
    #[serde(default)]
    rows: Option<i64>,
}

fn size(cols: Option<i64>, rows: Option<i64>) -> Result<TerminalSize, Problem> {
    let measure = |field: &str, value: i64| {
        let fits = u16::try_from(value).ok().filter(|_| (1..=MAX_SIZE).contains(&value));
        fits.ok_or_else(|| Problem::invalid_field(field, format!("must be 1 to {MAX_SIZE}")))
    };
    Ok(TerminalSize { columns: measure("cols", cols.unwrap_or(80))?, rows: measure("rows", rows.unwrap_or(24))? })
}

/// A shell in a session, as a WebSocket
///
/// Confined as the session's agent is, in its workspace, and counted with it. Binary frames are what is typed and what is
/// shown. Text frames are JSON: the client sends `{"type":"input","data":"…"}` and `{"type":"resize","cols","rows"}`; the
/// server sends `{"type":"exit","code","signal"}` when the shell has ended, and `{"type":"error","code","message"}`. It
/// closes with 1000 after `exit`, 1012 at a restart, 4400 after a bad frame, 4401 without a good credential or when it
/// expires, 4403 with one that is not for this, 4404 where there is no such session, 4408 for a client that took nothing for 60 s or was silent for 180 s, 4409 for a session that
/// has ended, 4429 where 4 terminals of the session are open, 4502 where OpenCode did not start again, 4503 where there is no
/// room for it. Credentials and pings are those of a task's stream. The shell ends with the connection, and with the session's
/// OpenCode process.
#[utoipa::path(
    get, path = "/sessions/{session_id}/terminal", tag = "sessions", operation_id = "session_terminal", security(("bearer" = ["tasks:control"])),
    params(("session_id" = SessionId, Path), TerminalQuery),
    responses(
        (status = 101, description = "A WebSocket"),
        (status = 426, description = "A request without `Upgrade`", content_type = "application/problem+json", body = crate::api::problem::ProblemDocument),
    ),
)]
pub(crate) async fn terminal(
    State(api): State<SessionsApi>,
    Extension(admission): Extension<Admission>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let (mut parts, _) = request.into_parts();
    let upgrade = WebSocketUpgrade::from_request_parts(&mut parts, &()).await.ok();
    if upgrade.is_none() {
        admission.granted().await?;
    }
    let ApiQuery(query) = ApiQuery::<TerminalQuery>::from_request_parts(&mut parts, &()).await?;
    let id = parse_id(&id)?;
    let size = size(query.cols, query.rows)?;
    let Some(upgrade) = upgrade else {
        find(&api, id).await?;
        return Err(Problem::new(Code::UpgradeRequired, "A terminal is a WebSocket: ask for one with `Upgrade`."));
    };
    let slot = parts.extensions.get::<ConnectionSlot>().cloned();
    let upgrade = upgrade.protocols([STREAM_PROTOCOL]).max_message_size(MAX_MESSAGE).max_frame_size(MAX_MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let _slot = slot;
        let _ = serve(socket, &api, &admission, id, size).await;
    }))
}

async fn serve(
    mut socket: WebSocket,
    api: &SessionsApi,
    admission: &Admission,
    id: SessionId,
    size: TerminalSize,
) -> Result<(), Broken> {
    let caller = match api.sockets.admit(&mut socket, admission).await? {
        Ok(caller) => caller,
        Err(closing) => return bid_farewell(&mut socket, closing).await,
    };
    let opened = tokio::select! {
        opened = api.executions.open_terminal(id, size) => opened,
        () = api.sockets.shutdown.cancelled() => Err(OpenTerminalError::ShuttingDown),
    };
    let terminal = match opened {
        Ok(terminal) => terminal,
        Err(OpenTerminalError::ShuttingDown) => return bid_farewell(&mut socket, RESTARTS).await,
        Err(error) => {
            let problem = problem(error);
            let (mut sink, _) = socket.split();
            let told = send(&mut sink, Message::text(told(&problem).to_string())).await;
            return match told {
                Ok(()) => {
                    bid_farewell(&mut sink, (4000 + problem.code().status().as_u16(), "there is no terminal")).await
                }
                Err(_) => Err(Broken),
            };
        }
    };
    let (mut sink, stream) = socket.split();
    let end = tokio::select! {
        end = converse(&mut sink, stream, &terminal) => end,
        () = caller.expired() => End::Close(EXPIRED),
        () = api.sockets.shutdown.cancelled() => End::Close(RESTARTS),
    };
    // Before anybody is told: whoever does not listen must not keep it.
    drop(terminal);
    match end {
        End::Close(closing) => bid_farewell(&mut sink, closing).await,
        End::Broken => Err(Broken),
    }
}

const RESTARTS: Closing = (close::RESTART, "the sidecar restarts");

fn problem(error: OpenTerminalError) -> Problem {
    match error {
        OpenTerminalError::UnknownSession => not_found(),
        OpenTerminalError::SessionEnded => Problem::new(Code::Conflict, "The session has ended."),
        OpenTerminalError::TooMany => Problem::new(
            Code::TooManyTerminals,
            format!("{MAX_TERMINALS} terminals of this session are open. Close one first."),
        ),
        OpenTerminalError::Full => Problem::new(
            Code::Unavailable,
            "The session's process was ended to make room, and as many executions run as may. Try again later.",
        ),
        OpenTerminalError::Busy => {
            Problem::new(Code::Unavailable, "The session's process starts or ends just now. Try again.")
        }
        OpenTerminalError::ShuttingDown => Problem::new(Code::ShuttingDown, "The sidecar shuts down."),
        OpenTerminalError::Store(error) => unavailable(error),
        OpenTerminalError::Refused(why) => Problem::new(Code::Unavailable, why),
        OpenTerminalError::NotStarted(why) => Problem::new(Code::BadGateway, why),
    }
}

fn told(problem: &Problem) -> Value {
    json!({ "type": "error", "code": problem.code().as_str(), "message": problem.detail() })
}

/// How a connection ends.
enum End {
    Close(Closing),
    /// It is gone: nobody to tell.
    Broken,
}

type Sink = SplitSink<WebSocket, Message>;

/// Both directions at once, until one of them ends.
async fn converse(sink: &mut Sink, stream: SplitStream<WebSocket>, terminal: &Terminal) -> End {
    let (to_say, said) = mpsc::channel(1);
    tokio::select! {
        end = listen(stream, terminal, &to_say) => end,
        end = show(sink, terminal, said) => end,
    }
}

#[derive(Deserialize)]
struct ClientFrame {
    r#type: String,
    #[serde(default)]
    data: Option<String>,
    #[serde(default)]
    cols: Option<i64>,
    #[serde(default)]
    rows: Option<i64>,
}

/// From the client to the shell. Nothing more is read from the client while the shell does not take what there is.
async fn listen(mut stream: SplitStream<WebSocket>, terminal: &Terminal, to_say: &mpsc::Sender<Value>) -> End {
    let mut pace = Pace::of_input();
    loop {
        pace.turn().await;
        pace.read();
        let message = match timeout(SILENT, stream.next()).await {
            Ok(Some(Ok(message))) => message,
            Ok(Some(Err(_))) => {
                return End::Close((close::BAD_FRAME, "a frame is longer than 1 MiB, or cannot be read"));
            }
            Ok(None) => return End::Broken,
            Err(_) => return End::Close((close::STUCK, "no sign of life for 180 s")),
        };
        let answer = match message {
            Message::Binary(bytes) => {
                type_in(terminal, &bytes).await;
                continue;
            }
            Message::Text(text) => match serde_json::from_str::<ClientFrame>(&text) {
                Ok(frame) => obey(terminal, frame).await,
                Err(_) => return End::Close((close::BAD_FRAME, "a text frame must be a JSON object with a type")),
            },
            Message::Ping(_) | Message::Pong(_) => continue,
            Message::Close(_) => return End::Broken,
        };
        if let Some(answer) = answer {
            // The other direction ends the connection where it does not take this.
            let _ = to_say.send(answer).await;
        }
    }
}

/// Does what a frame says; gives what is to be said about it.
async fn obey(terminal: &Terminal, frame: ClientFrame) -> Option<Value> {
    let refused = |problem: &Problem| {
        let mut answer = told(problem);
        answer["of"] = json!(frame.r#type);
        Some(answer)
    };
    match (frame.r#type.as_str(), &frame.data) {
        ("input", Some(data)) => {
            type_in(terminal, data.as_bytes()).await;
            None
        }
        ("input", None) => refused(&Problem::invalid_field("data", "is required")),
        ("resize", _) => {
            let asked = match (frame.cols, frame.rows) {
                (None, _) => Err(Problem::invalid_field("cols", "is required")),
                (_, None) => Err(Problem::invalid_field("rows", "is required")),
                (cols, rows) => size(cols, rows),
            };
            match asked.map(|size| terminal.resize(size)) {
                Ok(_) => None,
                Err(problem) => refused(&problem),
            }
        }
        ("auth", _) => Some(json!({ "type": "ack", "of": "auth" })),
        _ => Some(json!({ "type": "error", "code": "unknown_type", "message": "There is no such frame." })),
    }
}

async fn type_in(terminal: &Terminal, bytes: &[u8]) {
    // Where nobody is left to read it: the other direction tells, when everything was shown.
    let _ = terminal.write_all(bytes).await;
}

/// From the shell to the client. The shell waits while the client does not take what there is.
async fn show(sink: &mut Sink, terminal: &Terminal, mut said: mpsc::Receiver<Value>) -> End {
    let mut buffer = vec![0; CHUNK];
    let mut ping = interval_at(Instant::now() + PING, PING);
    let mut open = true;
    loop {
        let message = tokio::select! {
            read = terminal.read(&mut buffer), if open => match read {
                Ok(count @ 1..) => Message::Binary(Bytes::copy_from_slice(&buffer[..count])),
                Ok(0) | Err(_) => {
                    open = false;
                    continue;
                }
            },
            exit = terminal.exited(), if !open => {
                let frame = json!({ "type": "exit", "code": exit.code, "signal": exit.signal });
                let why = match terminal.is_closing() {
                    true => "the session's process has ended",
                    false => "the shell has ended",
                };
                return match send(sink, Message::text(frame.to_string())).await {
                    Ok(()) => End::Close((close::DONE, why)),
                    Err(end) => end,
                };
            }
            Some(frame) = said.recv() => Message::text(frame.to_string()),
            _ = ping.tick() => Message::Ping(Bytes::new()),
        };
        if let Err(end) = send(sink, message).await {
            return end;
        }
    }
}

async fn send(sink: &mut Sink, message: Message) -> Result<(), End> {
    match timeout(STUCK, sink.send(message)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(End::Broken),
        Err(_) => Err(End::Close((close::STUCK, "nothing was taken for 60 s"))),
    }
}

async fn bid_farewell(
    sink: &mut (impl futures_util::Sink<Message> + Unpin),
    (code, reason): Closing,
) -> Result<(), Broken> {
    let frame = CloseFrame { code, reason: reason.into() };
    match timeout(STUCK, sink.send(Message::Close(Some(frame)))).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(Broken),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_1_to_1000_and_the_field_is_named() {
        assert_eq!(size(None, None).unwrap(), TerminalSize { columns: 80, rows: 24 });
        assert_eq!(size(Some(1), Some(1000)).unwrap(), TerminalSize { columns: 1, rows: 1000 });
        for (cols, rows, field) in
            [(0, 1, "cols"), (1001, 1, "cols"), (-1, 1, "cols"), (1, 0, "rows"), (1, 65537, "rows")]
        {
            let problem = size(Some(cols), Some(rows)).unwrap_err();
            assert_eq!(problem.document().details.unwrap().field, field, "{cols} {rows}");
        }
    }
}
