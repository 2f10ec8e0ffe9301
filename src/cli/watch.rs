//! Following a run to its end, for `exec` and `attach`: what is shown, what Ctrl-C does, how it ends.

use super::ask::{Answer, Asked, Signals, Terminal};
use super::exit::{Exit, Trouble};
use super::tell::{remark, say, write_json};
use super::values;
use crate::client::{Client, ClientError, Envelope, Followed, Standing, follow};
use crate::console::{Printer, status};
use crate::model::{ExecutionId, Status};
use crate::telemetry::chain;
use futures_util::StreamExt;
use std::future::pending;
use std::io::{self, Write};
use std::pin::{Pin, pin};
use std::time::Duration;

/// Between two attempts to cancel, or to submit.
pub(super) const AGAIN: Duration = Duration::from_secs(1);

/// What Ctrl-C does, as the helps say it.
pub(super) const CTRL_C: &str = "\
Ctrl-C asks whether to cancel the run, leave it running, or go on; a second one cancels at once. Without a terminal \
SIGINT cancels; SIGTERM always does. Once it is being cancelled, another signal stops waiting for that. A terminal \
that goes away leaves it running.";

/// How a run is followed.
#[derive(Debug, clap::Args)]
pub(super) struct Watching {
    /// Print each event's envelope as one line of JSON and nothing else; remarks go to the standard error
    #[arg(long)]
    pub(super) json: bool,
    /// How long to try to get a lost connection back
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = values::duration)]
    pub(super) reconnect_for: Duration,
}

enum Output {
    Json(io::Stdout),
    Person(Box<Printer<anstream::AutoStream<io::Stdout>>>),
}

impl Output {
    fn event(&mut self, event: &Envelope) -> io::Result<()> {
        match self {
            Self::Json(out) => {
                let mut out = out.lock();
                write_json(&mut out, &event.text)?;
                out.flush()
            }
            Self::Person(printer) => printer.event(&event.value),
        }
    }

    /// So that a remark has a line of its own.
    fn end_line(&mut self) -> io::Result<()> {
        match self {
            Self::Json(_) => Ok(()),
            Self::Person(printer) => printer.end_line(),
        }
    }
}

/// The request to cancel, on its way.
type Cancelling<'a> = Pin<Box<dyn Future<Output = Result<Standing, ClientError>> + Send + 'a>>;

/// Tries until the sidecar has an answer.
async fn cancel(client: &Client, id: ExecutionId) -> Result<Standing, ClientError> {
    loop {
        match client.cancel(id, Some("asked for at the command line")).await {
            Err(error) if error.is_transient() => tokio::time::sleep(AGAIN).await,
            answer => return answer,
        }
    }
}

/// What to do after a signal. Nothing is read while somebody thinks about it: the log keeps it.
async fn after(asked: Asked, signals: &mut Signals) -> Answer {
    let terminal = match asked {
        Asked::Interrupt => Terminal::open(),
        Asked::Terminate => None,
    };
    let Some(terminal) = terminal else { return Answer::Cancel };
    tokio::select! {
        // A terminal that is gone cannot be asked.
        answer = terminal.ask() => answer.unwrap_or(Answer::Cancel),
        _ = signals.next() => {
            let _ = terminal.end_question().await;
            Answer::Cancel
        }
    }
}

/// How to see more of a run that goes on.
fn attach_again(id: ExecutionId, last: u64) -> String {
    format!("To watch it again: opencode-sidecar attach {id} --after {last}")
}

/// Shows a run from after an event to its end. `asked` is a signal that came before.
pub(super) async fn watch(
    client: &Client,
    id: ExecutionId,
    after_seq: u64,
    watching: &Watching,
    mut signals: Signals,
    mut asked: Option<Asked>,
) -> Result<Exit, Trouble> {
    let mut output = match watching.json {
        true => Output::Json(io::stdout()),
        false => Output::Person(Box::new(Printer::new(anstream::stdout()))),
    };
    let mut events = pin!(follow(client.clone(), id, after_seq, watching.reconnect_for));
    let mut last = after_seq;
    let mut cancelling: Option<Cancelling<'_>> = None;
    let mut was_cancelled = false;
    loop {
        if let Some(signal) = asked.take() {
            output.end_line()?;
            if was_cancelled {
                say(&format!("not waited for its end any more. {}", attach_again(id, last)));
                return Ok(Exit::RunsOn);
            }
            match after(signal, &mut signals).await {
                Answer::Cancel => {
                    remark("Cancelling it …");
                    was_cancelled = true;
                    cancelling = Some(Box::pin(cancel(client, id)));
                }
                Answer::Leave => {
                    remark(&format!("It runs on. {}", attach_again(id, last)));
                    return Ok(Exit::RunsOn);
                }
                Answer::GoOn => {}
            }
        }
        let answered = async {
            match &mut cancelling {
                Some(request) => request.await,
                None => pending().await,
            }
        };
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(Followed::Event(event))) => {
                    if let Err(error) = output.event(&event) {
                        say(&format!("the output is gone; the run goes on. {}", attach_again(id, last)));
                        return if error.kind() == io::ErrorKind::BrokenPipe { Ok(Exit::RunsOn) } else { Err(error.into()) };
                    }
                    last = event.seq;
                    if let Some(exit) = end_of(&event) {
                        return exit;
                    }
                }
                Some(Ok(Followed::Ended(standing))) => {
                    let stands = status(standing.status.as_str(), standing.reason.as_deref());
                    remark(&format!("It has ended before: {stands}. There is nothing after event {last}."));
                    return Ok(Exit::of_run(standing.status, standing.reason.as_deref()));
                }
                Some(Ok(Followed::Reset { last_seq })) => {
                    output.end_line()?;
                    say(&format!("the log ends with event {last_seq}, before event {last}: all of it follows"));
                    last = 0;
                }
                Some(Ok(Followed::Lost(error))) => {
                    output.end_line()?;
                    remark(&format!("The connection is lost ({}). Trying to get it back …", chain(&error)));
                }
                Some(Ok(Followed::Back)) => remark("The connection is back."),
                Some(Err(error @ ClientError::GivenUp { .. })) => {
                    output.end_line()?;
                    let fate = match was_cancelled {
                        true => "whether the run was cancelled is not known",
                        false => "nothing was cancelled: the run goes on if its sidecar does",
                    };
                    say(&format!("{fate}. {}", attach_again(id, last)));
                    return Err(error.into());
                }
                Some(Err(error)) => {
                    output.end_line()?;
                    return Err(error.into());
                }
                None => return Err(ClientError::Ended.into()),
            },
            signal = signals.next() => asked = Some(signal),
            answer = answered => {
                cancelling = None;
                match answer {
                    // The stream shows the end.
                    Ok(standing) if standing.status.is_final() => {}
                    Ok(standing) => {
                        output.end_line()?;
                        say(&format!("it did not end yet: {}. Still watching", standing.status.as_str()));
                    }
                    Err(error) => {
                        output.end_line()?;
                        was_cancelled = false;
                        say(&format!("it could not be cancelled: {}", chain(&error)));
                    }
                }
            }
        }
    }
}

/// For the last event: how the run ended.
fn end_of(event: &Envelope) -> Option<Result<Exit, Trouble>> {
    if event.value["type"] != "complete" {
        return None;
    }
    let data = &event.value["data"];
    let word = data["status"].as_str().unwrap_or_default();
    Some(match Status::parse(word) {
        Some(status) => Ok(Exit::of_run(status, data["reason"].as_str())),
        None => Err(ClientError::Unexpected(format!("`{word}` is no status")).into()),
    })
}
