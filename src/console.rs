//! Showing things to a person at a terminal: a run as it goes ([`Printer`]), a log as a list ([`entry`]), a history as
//! a table ([`table`]).
//!
//! It gets the JSON that every reader gets, and prints. `anstream` leaves the colours out where the output is no
//! terminal, or `NO_COLOR` is set. Everything that comes from outside goes through `clean`, so that it cannot play with
//! the terminal.

mod clean;
pub mod table;

pub use clean::{json, one_line};

use anstyle::{AnsiColor, Style};
use clean::{Cleaner, Piece};
use serde_json::Value;
use std::io::{self, Write};

/// Remarks, and what matters less.
pub const DIM: Style = Style::new().dimmed();
const PLAIN: Style = Style::new();
const BOLD: Style = Style::new().bold();
const CYAN: Style = AnsiColor::Cyan.on_default();
const GREEN: Style = AnsiColor::Green.on_default();
const YELLOW: Style = AnsiColor::Yellow.on_default();
const RED: Style = AnsiColor::Red.on_default();

/// Text that comes in pieces and is put together on one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    Stdout,
    Stderr,
    Message,
    Reasoning,
}

impl Flow {
    fn style(self) -> Style {
        match self {
            Self::Stdout | Self::Message => PLAIN,
            Self::Stderr => YELLOW,
            Self::Reasoning => DIM,
        }
    }

    fn is_shell(self) -> bool {
        matches!(self, Self::Stdout | Self::Stderr)
    }
}

/// Prints events as they come.
#[derive(Debug)]
pub struct Printer<W: Write> {
    out: W,
    /// The text that was printed last, whose line is still open.
    open: Option<Flow>,
    /// In the order of [`Flow`].
    cleaners: [Cleaner; 4],
}

fn cleaners() -> [Cleaner; 4] {
    [Cleaner::new(true), Cleaner::new(true), Cleaner::new(false), Cleaner::new(false)]
}

impl<W: Write> Printer<W> {
    /// Prints to `out`.
    pub fn new(out: W) -> Self {
        Self { out, open: None, cleaners: cleaners() }
    }

    /// Ends the line where one is open, so that something else can be written.
    ///
    /// # Errors
    /// Where the output is gone, as for all of these.
    pub fn end_line(&mut self) -> io::Result<()> {
        if self.open.take().is_some() {
            writeln!(self.out)?;
            self.out.flush()?;
        }
        Ok(())
    }

    /// One line, or several where the text has several: those that follow stand below the first.
    fn line(&mut self, style: Style, text: &str) -> io::Result<()> {
        self.end_line()?;
        for (i, line) in clean::lines(text).iter().enumerate() {
            let indent = if i == 0 { "" } else { "    " };
            writeln!(self.out, "{indent}{style}{line}{style:#}")?;
        }
        self.out.flush()
    }

    /// Text that goes on where the last of the same flow ended.
    fn text(&mut self, flow: Flow, text: &str) -> io::Result<()> {
        let style = flow.style();
        for piece in self.cleaners[flow as usize].push(text.as_bytes()) {
            if self.open != Some(flow) {
                self.end_line()?;
                if flow.is_shell() {
                    let gutter = if flow == Flow::Stderr { YELLOW } else { DIM };
                    write!(self.out, "{gutter}  │ {gutter:#}")?;
                }
            }
            self.open = match piece {
                Piece::Text(text) => {
                    write!(self.out, "{style}{text}{style:#}")?;
                    Some(flow)
                }
                Piece::Break => {
                    writeln!(self.out)?;
                    None
                }
            };
        }
        self.out.flush()
    }

    /// Shell output alone, as it was written, for a person who asked for nothing else. Colours pass.
    ///
    /// # Errors
    /// Where the output is gone.
    pub fn output(&mut self, bytes: &[u8]) -> io::Result<()> {
        for piece in self.cleaners[Flow::Stdout as usize].push(bytes) {
            self.open = match piece {
                Piece::Text(text) => {
                    write!(self.out, "{text}")?;
                    Some(Flow::Stdout)
                }
                Piece::Break => {
                    writeln!(self.out)?;
                    None
                }
            };
        }
        self.out.flush()
    }

    /// One event's envelope.
    ///
    /// # Errors
    /// Where the output is gone.
    pub fn event(&mut self, event: &Value) -> io::Result<()> {
        let data = &event["data"];
        let text = data.as_str().unwrap_or_default();
        let what = summary(event);
        match kind(event) {
            "stdout" => self.text(Flow::Stdout, text),
            "stderr" => self.text(Flow::Stderr, text),
            "message" => self.part(Flow::Message, data),
            "reasoning" => self.part(Flow::Reasoning, data),
            "status" => self.line(status_style(text), &format!("● {what}")),
            "tool_call" => self.line(CYAN, &format!("▶ {what}")),
            "tool_result" => {
                // What a command left in force ends with it.
                self.cleaners = cleaners();
                match data["error"].is_string() {
                    true => self.line(RED, &format!("✗ {what}")),
                    false => self.line(DIM, &format!("✓ {what}")),
                }
            }
            "file" => self.line(GREEN, &format!("  {what}")),
            "todo" => {
                self.line(BOLD, &format!("To do: {what}"))?;
                for item in data["items"].as_array().into_iter().flatten() {
                    let (mark, style) = match item["status"].as_str() {
                        Some("completed") => ("✓", DIM),
                        Some("in_progress") => ("▸", PLAIN),
                        Some("cancelled") => ("–", DIM),
                        _ => ("·", PLAIN),
                    };
                    self.line(style, &format!("  {mark} {}", item["content"].as_str().unwrap_or_default()))?;
                }
                Ok(())
            }
            "log" => self.line(DIM, &format!("  {what}")),
            "error" => self.line(RED, &format!("! {what}")),
            "permission" | "question" => self.line(YELLOW, &format!("? {what}")),
            "complete" => self.line(DIM, &usage(&data["usage"], "model")),
            // A sum comes with the end; the others are for programs. `entry` shows them all.
            _ => self.end_line(),
        }
    }

    fn part(&mut self, flow: Flow, data: &Value) -> io::Result<()> {
        match data["delta"].as_str() {
            Some(delta) => self.text(flow, delta),
            // The whole part, which was shown piece by piece.
            None => {
                self.cleaners[flow as usize] = Cleaner::new(false);
                self.end_line()
            }
        }
    }
}

fn kind(event: &Value) -> &str {
    event["type"].as_str().unwrap_or_default()
}

fn status_style(status: &str) -> Style {
    match status {
        "completed" => GREEN,
        "failed" | "cancelled" => RED,
        _ => DIM,
    }
}

/// What an event says, as text that is not cleaned yet and may have several lines.
fn summary(event: &Value) -> String {
    let data = &event["data"];
    let text = |name: &str| data[name].as_str().unwrap_or_default();
    match kind(event) {
        "stdout" | "stderr" => data.as_str().unwrap_or_default().to_owned(),
        "message" | "reasoning" => match data["delta"].as_str() {
            Some(delta) => delta.to_owned(),
            None => format!("(whole) {}", text("text")),
        },
        "status" => status(data.as_str().unwrap_or_default(), event["reason"].as_str()),
        "tool_call" => {
            let args = &data["args"];
            let names = ["command", "filePath", "pattern", "url", "description"];
            let what = names.iter().find_map(|name| args[name].as_str()).unwrap_or_default();
            format!("{} {what}", text("tool")).trim_end().to_owned()
        }
        "tool_result" => {
            let took = data["duration_ms"].as_u64().map(|ms| format!(" in {ms} ms")).unwrap_or_default();
            let exit = data["exit_code"].as_i64().map(|code| format!(", exit code {code}")).unwrap_or_default();
            let error = data["error"].as_str().map(|error| format!(": {error}")).unwrap_or_default();
            format!("{}{took}{exit}{error}", text("tool"))
        }
        "file" => format!("{} {}", text("change"), text("path")),
        "diff" => match data["files"].as_array().map_or(0, Vec::len) {
            1 => "1 change of a file".to_owned(),
            count => format!("{count} changes of files"),
        },
        "todo" => {
            let items = data["items"].as_array().map(Vec::as_slice).unwrap_or_default();
            let done = items.iter().filter(|item| item["status"] == "completed").count();
            format!("{done} of {} done", items.len())
        }
        "log" => text("message").to_owned(),
        "error" => format!("{} [{}]", text("message"), text("code")),
        "usage" => usage(data, "model"),
        "complete" => {
            format!("{}; {}", status(text("status"), data["reason"].as_str()), usage(&data["usage"], "model"))
        }
        _ => data.to_string(),
    }
}

/// A status with its reason, where that says more.
pub fn status(status: &str, reason: Option<&str>) -> String {
    match reason {
        Some(reason) => format!("{status} ({reason})"),
        None => status.to_owned(),
    }
}

/// What a run has used. `model` is what its model is called.
pub fn usage(usage: &Value, model: &str) -> String {
    let count = |name: &str| usage[name].as_u64().unwrap_or_default();
    let calls = count("model_calls");
    let mut text = format!("{calls} {} of the {model}", if calls == 1 { "call" } else { "calls" });
    text.push_str(&format!(", {} tokens in, {} out", count("input_tokens"), count("output_tokens")));
    if let Some(cost) = usage["cost"].as_f64().filter(|cost| *cost > 0.0) {
        text.push_str(&format!(", ${cost:.4}"));
    }
    if let Some(seconds) = usage["cpu_seconds"].as_f64() {
        text.push_str(&format!(", {seconds:.1} s of CPU"));
    }
    text
}

/// An event as one line of a list: when, its number, how grave, its type, and what it says.
///
/// # Errors
/// Where the output is gone.
pub fn entry(out: &mut impl Write, event: &Value) -> io::Result<()> {
    let severity = event["severity"].as_str().unwrap_or_default();
    let style = match (severity, kind(event)) {
        ("error", _) => RED,
        ("warn", _) => YELLOW,
        ("debug", _) => DIM,
        (_, "tool_call") => CYAN,
        (_, "status") => status_style(event["data"].as_str().unwrap_or_default()),
        _ => PLAIN,
    };
    let time = one_line(event["timestamp"].as_str().unwrap_or_default());
    let seq = event["seq"].as_u64().unwrap_or_default();
    let (severity, kind) = (one_line(severity), one_line(kind(event)));
    let what = one_line(&summary(event));
    writeln!(out, "{DIM}{time} {seq:>5}{DIM:#} {style}{severity:<5} {kind:<11} {what}{style:#}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn print(events: &[Value]) -> String {
        let mut printer = Printer::new(anstream::StripStream::new(Vec::new()));
        for event in events {
            printer.event(event).unwrap();
        }
        String::from_utf8(printer.out.into_inner()).unwrap()
    }

    #[test]
    fn pieces_of_text_become_lines() {
        let text = print(&[
            json!({"type": "message", "data": {"part_id": "p", "delta": "Hel"}}),
            json!({"type": "message", "data": {"part_id": "p", "delta": "lo"}}),
            json!({"type": "message", "data": {"part_id": "p", "text": "Hello", "final": true}}),
            json!({"type": "tool_call", "data": {"tool": "bash", "args": {"command": "ls\u{7}\npwd"}}}),
            json!({"type": "stdout", "data": "a\nb"}),
            json!({"type": "stderr", "data": "oops\n"}),
            json!({"type": "tool_result", "data": {"tool": "bash", "exit_code": 1, "duration_ms": 5, "error": "no"}}),
            json!({"type": "todo", "data": {"items": [{"content": "x", "status": "completed"}, {"content": "y"}]}}),
            json!({"type": "status", "data": "completed", "reason": "finished"}),
            json!({"type": "complete", "data": {"status": "completed", "reason": "finished", "usage": {
                "model_calls": 1, "input_tokens": 20, "output_tokens": 3, "cost": 0.5, "cpu_seconds": null}}}),
        ]);
        assert_eq!(
            text,
            "Hello\n▶ bash ls\n    pwd\n  │ a\n  │ b\n  │ oops\n✗ bash in 5 ms, exit code 1: no\n\
             To do: 1 of 2 done\n  ✓ x\n  · y\n● completed (finished)\n\
             1 call of the model, 20 tokens in, 3 out, $0.5000\n"
        );
    }

    /// Each place where something from outside stands.
    #[test]
    fn nobody_can_play_with_the_terminal() {
        let evil = "\u{1b}]52;c;ZXZpbA==\u{7}\u{1b}[2J\u{1b}[1;1H\u{1b}[31m\u{9b}5n\u{8}\u{202e}gnp.exe";
        let events: Vec<Value> = vec![
            json!({"type": "message", "data": {"delta": evil}}),
            json!({"type": "reasoning", "data": {"delta": evil}}),
            json!({"type": "status", "data": evil, "reason": evil}),
            json!({"type": "tool_call", "data": {"tool": evil, "args": {"command": evil}}}),
            json!({"type": "tool_result", "data": {"tool": evil, "error": evil}}),
            json!({"type": "file", "data": {"path": evil, "change": evil}}),
            json!({"type": "diff", "data": {"files": [{"path": evil, "change": evil, "patch": evil}]}}),
            json!({"type": "todo", "data": {"items": [{"content": evil, "status": evil}]}}),
            json!({"type": "log", "data": {"message": evil}}),
            json!({"type": "error", "data": {"message": evil, "code": evil}}),
            json!({"type": "question", "data": {evil: evil}}),
            json!({"type": evil, "severity": evil, "timestamp": evil, "data": evil}),
        ];
        let (mut shown, mut listed) = (Printer::new(Vec::new()), Vec::new());
        for event in &events {
            shown.event(event).unwrap();
            entry(&mut listed, event).unwrap();
        }
        let own = [PLAIN, DIM, BOLD, CYAN, GREEN, YELLOW, RED];
        for text in [shown.out, listed] {
            let mut text = String::from_utf8(text).unwrap();
            assert!(text.contains("<U+202E>gnp.exe"), "{text:?}");
            for style in own {
                text = text.replace(&style.render().to_string(), "").replace(&style.render_reset().to_string(), "");
            }
            // RED, which is also the hostile one's, is taken out above: no colour but our own whole styles is left.
            assert!(!text.contains(|c: char| (c.is_control() && c != '\n') || c == '\u{202e}'), "{text:?}");
        }
        let mut printer = Printer::new(Vec::new());
        printer.event(&json!({"type": "message", "data": {"delta": evil}})).unwrap();
        assert_eq!(String::from_utf8(printer.out).unwrap(), "5n<U+202E>gnp.exe");
        let mut printer = Printer::new(Vec::new());
        printer.event(&json!({"type": "stdout", "data": evil})).unwrap();
        let want = format!("{DIM}  │ {DIM:#}\u{1b}[31m5n<U+202E>gnp.exe\u{1b}[0m");
        assert_eq!(String::from_utf8(printer.out).unwrap(), want);
    }

    #[test]
    fn a_list_has_one_line_for_each_event() {
        let mut out = anstream::StripStream::new(Vec::new());
        let envelope = json!({"seq": 7, "type": "stdout", "data": "a\nb\n", "severity": "info",
            "timestamp": "2026-11-21T02:08:23.523Z", "call_id": "c"});
        entry(&mut out, &envelope).unwrap();
        let text = String::from_utf8(out.into_inner()).unwrap();
        assert_eq!(text, "2026-11-21T02:08:23.523Z     7 info  stdout      a ⏎ b\n");
    }
}
