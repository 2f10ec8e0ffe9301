//! What a stranger wrote, made harmless for a terminal: the agent's text, the names of tools and files, shell output,
//! and what a server says.
//!
//! Characters pass, and where it is asked for colours (SGR). Whatever moves the cursor, sets a title or the clipboard,
//! or has the terminal answer, does not. Characters that turn the direction of text or cannot be seen are spelled out,
//! so that no name looks like another one.

use crate::model::turns_text;
use anstyle_parse::{Params, Parser, Perform};

/// How long an escape sequence may be, in bytes. What is longer, or goes on in the next line, was none.
const MAX_SEQUENCE: usize = 4096;
/// How much of the colours in force is kept for the next piece of text, in bytes.
const MAX_COLOURS: usize = 256;

/// A part of a cleaned text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Text without a line break.
    Text(String),
    /// The end of a line.
    Break,
}

/// Cleans one text that comes in pieces, which may be cut anywhere: in a character, in a sequence.
#[derive(Debug)]
pub(super) struct Cleaner {
    parser: Parser,
    reader: Reader,
}

impl Cleaner {
    /// `colours` lets SGR sequences pass.
    pub(super) fn new(colours: bool) -> Self {
        Self { parser: <Parser>::new(), reader: Reader { colours, ..Reader::default() } }
    }

    /// Takes the next bytes. Each text begins with the colours that are in force and leaves none behind.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Vec<Piece> {
        for &byte in bytes {
            if byte == b'\n' {
                // No sequence goes on over a line: one that is never ended would hide all that follows.
                self.parser = <Parser>::new();
                self.reader.line_feed();
                continue;
            }
            self.reader.unread += 1;
            self.parser.advance(&mut self.reader, byte);
            if self.reader.unread > MAX_SEQUENCE {
                self.parser = <Parser>::new();
                self.reader.unread = 0;
            }
        }
        self.reader.end_text();
        std::mem::take(&mut self.reader.pieces)
    }
}

#[derive(Debug, Default)]
struct Reader {
    colours: bool,
    pieces: Vec<Piece>,
    text: String,
    /// The SGR sequences since the last reset.
    active: String,
    /// A carriage return came, and nothing after it yet.
    returned: bool,
    /// Whether the line has characters.
    filled: bool,
    /// Bytes since the parser last said anything.
    unread: usize,
}

impl Reader {
    fn put(&mut self, c: char) {
        self.unread = 0;
        // What would be written over is kept: as a line of its own.
        if std::mem::take(&mut self.returned) && self.filled {
            self.line_feed();
        }
        if self.text.is_empty() {
            self.text.push_str(&self.active);
        }
        self.filled = true;
        if is_hidden(c) {
            self.text.push_str(&format!("<U+{:04X}>", u32::from(c)));
        } else {
            self.text.push(c);
        }
    }

    fn end_text(&mut self) {
        if self.text.is_empty() {
            return;
        }
        if self.text.contains('\u{1b}') {
            self.text.push_str("\u{1b}[0m");
        }
        self.pieces.push(Piece::Text(std::mem::take(&mut self.text)));
    }

    fn line_feed(&mut self) {
        self.end_text();
        self.pieces.push(Piece::Break);
        (self.returned, self.filled, self.unread) = (false, false, 0);
    }
}

impl Perform for Reader {
    fn print(&mut self, c: char) {
        // The control characters beyond ASCII come here too.
        if !c.is_control() {
            self.put(c);
        }
    }

    fn execute(&mut self, byte: u8) {
        self.unread = 0;
        match byte {
            b'\t' => self.put('\t'),
            b'\r' => self.returned = true,
            _ => {}
        }
    }

    fn csi_dispatch(&mut self, params: &Params, intermediates: &[u8], overlong: bool, action: u8) {
        self.unread = 0;
        if !self.colours || action != b'm' || !intermediates.is_empty() || overlong {
            return;
        }
        let groups = params.iter().map(|group| group.iter().map(u16::to_string).collect::<Vec<_>>().join(":"));
        let sequence = format!("\u{1b}[{}m", groups.collect::<Vec<_>>().join(";"));
        let resets = params.iter().next().is_none_or(|group| group == [0]);
        if resets || self.active.len() + sequence.len() > MAX_COLOURS {
            self.active.clear();
        }
        if !resets || params.len() > 1 {
            self.active.push_str(&sequence);
        }
        if !self.text.is_empty() {
            self.text.push_str(&sequence);
        }
    }

    fn osc_dispatch(&mut self, _params: &[&[u8]], _bell: bool) {
        self.unread = 0;
    }

    fn esc_dispatch(&mut self, _intermediates: &[u8], _overlong: bool, _byte: u8) {
        self.unread = 0;
    }
}

/// Characters that turn the direction of text, break lines behind a terminal's back, or are not seen at all.
fn is_hidden(c: char) -> bool {
    turns_text(c)
        || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200b}' | '\u{2060}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}')
}

/// A whole text as one line without colours: line breaks become `⏎`.
pub fn one_line(text: &str) -> String {
    let mut line = lines(text).join(" ⏎ ");
    line.truncate(line.trim_end_matches([' ', '⏎']).len());
    line
}

/// JSON for a terminal: the same value, with the characters that JSON may have as they are and a terminal should not
/// get (it has no others) written as escapes.
pub fn json(text: &str) -> String {
    let mut json = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || is_hidden(c) {
            json.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
        } else {
            json.push(c);
        }
    }
    json
}

/// A whole text as lines without colours; at least one.
pub(super) fn lines(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for piece in Cleaner::new(false).push(text.as_bytes()) {
        match (piece, lines.last_mut()) {
            (Piece::Text(text), Some(last)) => last.push_str(&text),
            _ => lines.push(String::new()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(pieces: &[Piece]) -> String {
        let each = pieces.iter().map(|piece| match piece {
            Piece::Text(text) => text.as_str(),
            Piece::Break => "\n",
        });
        each.collect()
    }

    fn cleaned(colours: bool, dirty: &str) -> String {
        let whole = text(&Cleaner::new(colours).push(dirty.as_bytes()));
        // Without colours the pieces do not matter; with them there are more resets.
        for size in [1, 2, 3, 7] {
            let mut cleaner = Cleaner::new(false);
            let pieces: Vec<_> = dirty.as_bytes().chunks(size).flat_map(|chunk| cleaner.push(chunk)).collect();
            assert_eq!(text(&pieces), text(&Cleaner::new(false).push(dirty.as_bytes())), "in pieces of {size}");
        }
        whole
    }

    #[test]
    fn only_characters_and_colours_pass() {
        // Titles, the clipboard, links, the screen, the cursor, modes, questions to the terminal, device strings,
        // characters beyond ASCII that begin sequences, and bells.
        for hostile in [
            "\u{1b}]0;title\u{7}",
            "\u{1b}]52;c;ZXZpbA==\u{1b}\\",
            "\u{1b}]8;;http://evil\u{1b}\\",
            "\u{1b}[2J\u{1b}[H",
            "\u{1b}[5A\u{1b}[3D\u{1b}[s\u{1b}[u\u{1b}[K",
            "\u{1b}[?1049h\u{1b}[?25l\u{1b}[?2004h",
            "\u{1b}[6n\u{1b}[c\u{1b}[>c\u{1b}[>4;2m",
            "\u{1b}P1$r0m\u{1b}\\\u{1b}_apc\u{1b}\\\u{1b}^pm\u{1b}\\\u{1b}Xsos\u{1b}\\",
            "\u{1b}c\u{1b}7\u{1b}8\u{1b}D\u{1b}M\u{1b}(0\u{1b}#8",
            "\u{9b}2J\u{9d}0;t\u{9c}\u{85}",
            "\u{7}\u{8}\u{b}\u{c}\u{e}\u{f}\u{7f}\0",
        ] {
            let clean = cleaned(true, &format!("a{hostile}b"));
            assert!(!clean.contains(|c: char| c.is_control()), "{hostile:?} became {clean:?}");
            assert!(clean.starts_with('a') && clean.ends_with('b'), "{hostile:?} became {clean:?}");
        }
        assert_eq!(cleaned(true, "a\u{1b}[31mred\u{1b}[0mb"), "a\u{1b}[31mred\u{1b}[0mb\u{1b}[0m");
        assert_eq!(cleaned(false, "a\u{1b}[31mred\u{1b}[0mb"), "aredb");
        assert_eq!(cleaned(true, "a\u{1b}[38:2::1:2:3mb"), "a\u{1b}[38:2:0:1:2:3mb\u{1b}[0m");
        assert_eq!(cleaned(true, "tab\there ü 👩‍💻"), "tab\there ü 👩‍💻");
    }

    #[test]
    fn a_colour_goes_on_in_the_next_piece_and_nowhere_else() {
        let mut cleaner = Cleaner::new(true);
        assert_eq!(text(&cleaner.push(b"\x1b[1;31mred")), "\u{1b}[1;31mred\u{1b}[0m");
        assert_eq!(text(&cleaner.push(b" still\nso")), "\u{1b}[1;31m still\u{1b}[0m\n\u{1b}[1;31mso\u{1b}[0m");
        assert_eq!(text(&cleaner.push(b"\x1b[mplain")), "plain");
        for _ in 0..1000 {
            cleaner.push(b"\x1b[31mx");
        }
        assert!(cleaner.reader.active.len() <= MAX_COLOURS);
    }

    #[test]
    fn a_sequence_without_an_end_hides_its_line_at_most() {
        assert_eq!(cleaned(true, "a\u{1b}]52;c;hidden\nseen"), "a\nseen");
        let clean = cleaned(true, &format!("\u{1b}]0;{}", "x".repeat(MAX_SEQUENCE * 2)));
        assert!(clean.len() >= MAX_SEQUENCE, "{}", clean.len());
    }

    #[test]
    fn what_would_be_written_over_stays() {
        assert_eq!(cleaned(true, "10%\r20%\r\n"), "10%\n20%\n");
        assert_eq!(cleaned(true, "\rrm -rf\rls\r\r\n\r"), "rm -rf\nls\n");
    }

    #[test]
    fn json_stays_the_same_value() {
        let value = serde_json::json!({ "a\u{202e}": "\u{1b}\u{9b}\u{7f}ü👩‍💻\u{e0041}\u{feff}\"" });
        let text = json(&value.to_string());
        assert!(!text.contains(|c: char| c.is_control() || is_hidden(c)), "{text:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }

    #[test]
    fn what_cannot_be_seen_is_spelled_out() {
        assert_eq!(one_line("a\u{202e}txt.exe"), "a<U+202E>txt.exe");
        assert_eq!(one_line("x\u{2066}y\u{200b}\u{e0041}"), "x<U+2066>y<U+200B><U+E0041>");
        assert_eq!(one_line("one\r\ntwo\n"), "one ⏎ two");
        assert_eq!(lines("one\n\nthree"), ["one", "", "three"]);
    }
}
