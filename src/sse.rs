//! An incremental parser of server-sent events: OpenCode's `/event`, and our own streams where we are the client.
//!
//! Our own, although there are crates for it (`eventsource-stream`, `sse-stream`): they buffer a line without a
//! bound, and what is on the other end of `/event` is a process that runs a stranger's code. It reads bytes and
//! nothing else; what an event means is for the module that asked.

/// The longest event that is taken, in bytes, with the comments before it. A tool part carries the tool's whole input and
/// output, so it may be large; but not endless.
pub const MAX_EVENT: usize = 32 * 1024 * 1024;

/// What can be wrong with a stream.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SseError {
    #[error("no event ends within {MAX_EVENT} bytes")]
    TooLong,
    #[error("a line is no field of an event")]
    NotAField,
    #[error("an event is not UTF-8")]
    NotUtf8,
}

/// Collects bytes into events; gives out the `data` of each.
#[derive(Debug, Default)]
pub struct Parser {
    line: Vec<u8>,
    data: Vec<u8>,
    /// Bytes since the last event.
    taken: usize,
    has_data: bool,
    after_cr: bool,
}

impl Parser {
    /// Takes the next bytes and appends the data of each event that they complete to `events`.
    ///
    /// # Errors
    /// [`SseError`]; the parser is of no use after one.
    pub fn push(&mut self, mut bytes: &[u8], events: &mut Vec<String>) -> Result<(), SseError> {
        while !bytes.is_empty() {
            if std::mem::take(&mut self.after_cr) && bytes[0] == b'\n' {
                bytes = &bytes[1..];
                continue;
            }
            match bytes.iter().position(|b| matches!(b, b'\n' | b'\r')) {
                Some(end) => {
                    self.extend_line(&bytes[..end])?;
                    self.after_cr = bytes[end] == b'\r';
                    bytes = &bytes[end + 1..];
                    self.end_of_line(events)?;
                }
                None => {
                    self.extend_line(bytes)?;
                    break;
                }
            }
        }
        Ok(())
    }

    fn extend_line(&mut self, bytes: &[u8]) -> Result<(), SseError> {
        // An empty line counts too, as its end.
        self.taken += bytes.len() + 1;
        if self.taken > MAX_EVENT {
            return Err(SseError::TooLong);
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    fn end_of_line(&mut self, events: &mut Vec<String>) -> Result<(), SseError> {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            let data = std::mem::take(&mut self.data);
            if std::mem::take(&mut self.has_data) {
                self.taken = 0;
                events.push(String::from_utf8(data).map_err(|_| SseError::NotUtf8)?);
            }
            return Ok(());
        }
        let (name, value) = match line.iter().position(|b| *b == b':') {
            Some(end) => (&line[..end], &line[end + 1..]),
            None => (&line[..], &[] as &[u8]),
        };
        match name {
            b"data" => {
                if self.has_data {
                    self.data.push(b'\n');
                }
                self.has_data = true;
                self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
                Ok(())
            }
            // Comments, and the other fields, say nothing to us.
            b"" | b"event" | b"id" | b"retry" => Ok(()),
            // The specification lets it pass. But an event may be in it, and would be gone.
            _ => Err(SseError::NotAField),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_in(pieces: usize, text: &[u8]) -> Vec<String> {
        let mut parser = Parser::default();
        let mut events = Vec::new();
        for piece in text.chunks(pieces) {
            parser.push(piece, &mut events).unwrap();
        }
        events
    }

    #[test]
    fn the_same_whatever_the_pieces() {
        let text = "data: {\"a\":1}\n\n: comment\n\ndata:zwei\r\n\r\nevent: x\nid: 4\ndata: l1\ndata: l2\n\nretry: 1000\n\ndata\n\ndata: ü\u{1f600}\n\ndata: never ended\n";
        let want = vec!["{\"a\":1}", "zwei", "l1\nl2", "", "ü\u{1f600}"];
        for pieces in [1, 2, 3, 5, 7, 1000] {
            assert_eq!(parse_in(pieces, text.as_bytes()), want, "{pieces}");
        }
    }

    #[test]
    fn too_long_and_not_text_are_errors() {
        let mut parser = Parser::default();
        let mut events = Vec::new();
        assert_eq!(parser.push(b"data: \xff\n\n", &mut events), Err(SseError::NotUtf8));
        for line in ["database: no", "xdata: {}", "HTTP/1.1 200 OK", "{}", "\0"] {
            let mut parser = Parser::default();
            let text = format!("{line}\n");
            assert_eq!(parser.push(text.as_bytes(), &mut events), Err(SseError::NotAField), "{line}");
        }
        let mut parser = Parser::default();
        let block = vec![b'x'; MAX_EVENT / 2 + 1];
        parser.push(b"data: ", &mut events).unwrap();
        parser.push(&block, &mut events).unwrap();
        assert_eq!(parser.push(&block, &mut events), Err(SseError::TooLong));
        // In small pieces too, with an event now and then, and in what is no event at all.
        for (name, end, is_too_long) in [("", "\n", true), ("", "\n\n", true), ("data", "\n\n", false)] {
            let mut parser = Parser::default();
            let piece = format!("{name}: {}{end}", "x".repeat(1000));
            let pushed = (0..MAX_EVENT / 1000).try_for_each(|_| parser.push(piece.as_bytes(), &mut Vec::new()));
            assert_eq!(pushed, if is_too_long { Err(SseError::TooLong) } else { Ok(()) }, "{piece:?}");
        }
    }
}
