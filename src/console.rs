//! Showing a run to a person at a terminal: one event after another, in colour where the terminal has it.
//!
//! It gets the envelopes that every reader gets, and prints. `anstream` leaves the colours out where the output is no
//! terminal, or `NO_COLOR` is set.

use anstyle::{AnsiColor, Style};
use serde_json::Value;
use std::io::{self, Write};

const DIM: Style = Style::new().dimmed();
const BOLD: Style = Style::new().bold();
const CYAN: Style = AnsiColor::Cyan.on_default();
const GREEN: Style = AnsiColor::Green.on_default();
const YELLOW: Style = AnsiColor::Yellow.on_default();
const RED: Style = AnsiColor::Red.on_default();

/// Prints events. Text that comes in pieces is put together on one line.
#[derive(Debug)]
pub struct Printer<W: Write> {
    out: W,
    /// The stream whose text was printed last and whose line is still open.
    open: Option<&'static str>,
}

impl<W: Write> Printer<W> {
    /// Prints to `out`.
    pub fn new(out: W) -> Self {
        Self { out, open: None }
    }

    fn close(&mut self) -> io::Result<()> {
        if self.open.take().is_some() {
            writeln!(self.out)?;
        }
        Ok(())
    }

    /// A line of its own.
    ///
    /// # Errors
    /// Where the output is gone, as for all of these.
    pub fn line(&mut self, style: Style, text: &str) -> io::Result<()> {
        self.close()?;
        writeln!(self.out, "{style}{}{style:#}", clean(text, false))?;
        self.out.flush()
    }

    /// Text that goes on where the last of the same kind ended.
    fn text(&mut self, kind: &'static str, style: Style, gutter: &str, text: &str) -> io::Result<()> {
        if self.open != Some(kind) {
            self.close()?;
        }
        for piece in text.split_inclusive('\n') {
            if self.open.is_none() {
                write!(self.out, "{gutter}")?;
            }
            let line = piece.strip_suffix('\n');
            write!(self.out, "{style}{}{style:#}", clean(line.unwrap_or(piece), true))?;
            self.open = match line {
                Some(_) => {
                    writeln!(self.out)?;
                    None
                }
                None => Some(kind),
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
        let text = |name: &str| data[name].as_str().unwrap_or_default();
        match event["type"].as_str().unwrap_or_default() {
            "stdout" => {
                self.text("stdout", Style::new(), &format!("{DIM}  │ {DIM:#}"), data.as_str().unwrap_or_default())
            }
            "stderr" => {
                self.text("stderr", YELLOW, &format!("{YELLOW}  │ {YELLOW:#}"), data.as_str().unwrap_or_default())
            }
            "message" => match data["delta"].as_str() {
                Some(delta) => self.text("message", Style::new(), "", delta),
                None => self.close(),
            },
            "reasoning" => match data["delta"].as_str() {
                Some(delta) => self.text("reasoning", DIM, "", delta),
                None => self.close(),
            },
            "status" => {
                let status = data.as_str().unwrap_or_default();
                let style = match status {
                    "completed" => GREEN,
                    "failed" | "cancelled" => RED,
                    _ => DIM,
                };
                let reason = event["reason"].as_str().map(|reason| format!(" ({reason})")).unwrap_or_default();
                self.line(style, &format!("● {status}{reason}"))
            }
            "tool_call" => {
                let args = &data["args"];
                let what = ["command", "filePath", "pattern", "url", "description"]
                    .iter()
                    .find_map(|name| args[name].as_str());
                self.line(CYAN, &format!("▶ {} {}", text("tool"), what.unwrap_or_default()))
            }
            "tool_result" => {
                let exit = data["exit_code"].as_i64().map(|code| format!(", exit code {code}")).unwrap_or_default();
                let took = data["duration_ms"].as_u64().map(|ms| format!(" in {ms} ms")).unwrap_or_default();
                match data["error"].as_str() {
                    Some(error) => self.line(RED, &format!("✗ {}{took}: {error}", text("tool"))),
                    None => self.line(DIM, &format!("✓ {}{took}{exit}", text("tool"))),
                }
            }
            "file" => self.line(GREEN, &format!("  {} {}", text("change"), text("path"))),
            "todo" => {
                self.line(BOLD, "To do")?;
                for item in data["items"].as_array().into_iter().flatten() {
                    let mark = match item["status"].as_str() {
                        Some("completed") => "✓",
                        Some("in_progress") => "▸",
                        Some("cancelled") => "–",
                        _ => "·",
                    };
                    self.line(Style::new(), &format!("  {mark} {}", item["content"].as_str().unwrap_or_default()))?;
                }
                Ok(())
            }
            "log" => self.line(DIM, &format!("  {}", text("message"))),
            "error" => self.line(RED, &format!("! {} [{}]", text("message"), text("code"))),
            "permission" | "question" => self.line(YELLOW, &format!("? {data}")),
            // The sum comes with the end.
            _ => Ok(()),
        }
    }
}

/// Output of tools goes to the person's terminal: colours may pass, whatever moves the cursor, sets a title or
/// answers back may not.
fn clean(text: &str, colours: bool) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c.is_control() && c != '\t') {
        clean.push_str(&rest[..at]);
        let from = &rest[at..];
        let sequence = from.strip_prefix("\u{1b}[").and_then(|body| {
            let end = body.find(|c: char| !(c.is_ascii_digit() || c == ';'))?;
            body[end..].starts_with('m').then_some(&from[..end + 3])
        });
        match sequence {
            Some(sequence) => {
                if colours {
                    clean.push_str(sequence);
                }
                rest = &from[sequence.len()..];
            }
            None => rest = &from[from.chars().next().map_or(1, char::len_utf8)..],
        }
    }
    clean.push_str(rest);
    clean
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
            json!({"type": "tool_call", "data": {"tool": "bash", "args": {"command": "ls\u{7}"}}}),
            json!({"type": "stdout", "data": "a\nb"}),
            json!({"type": "stderr", "data": "oops\n"}),
            json!({"type": "status", "data": "completed", "reason": "finished"}),
        ]);
        assert_eq!(text, "Hello\n▶ bash ls\n  │ a\n  │ b\n  │ oops\n● completed (finished)\n");
    }

    #[test]
    fn a_tool_cannot_play_with_the_terminal() {
        assert_eq!(
            clean("\u{1b}]0;title\u{7}x\u{1b}[2Jy\u{1b}[31mred\u{1b}[0m\u{9b}z", true),
            "]0;titlex[2Jy\u{1b}[31mred\u{1b}[0mz"
        );
        assert_eq!(clean("\u{1b}[31mred", false), "red");
        assert_eq!(clean("\u{1b}[", true), "[");
    }
}
