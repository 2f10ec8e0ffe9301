//! Reads the `curl` commands of a shell block: what they would send.

use std::collections::BTreeMap;

/// What a command sends.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Call {
    pub(super) method: String,
    /// Path and query.
    pub(super) path: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Option<String>,
}

/// All of a block. `$url` is left out of paths; other variables have the values of `variables`.
pub(super) fn calls(block: &str, variables: &BTreeMap<&str, String>) -> Vec<Call> {
    let starts = block.match_indices("curl ").filter(|(at, _)| {
        // A command of its own, not the word in a comment or in an argument.
        let line = block[..*at].rsplit('\n').next().unwrap();
        !line.contains('#') && (line.trim().is_empty() || line.ends_with("$("))
    });
    starts.map(|(at, word)| call(&words(&block[at + word.len()..], variables))).collect()
}

fn call(words: &[String]) -> Call {
    let mut call = Call { method: String::new(), path: String::new(), headers: Vec::new(), body: None };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_else(|| panic!("{word} has no value")).clone();
        match word.as_str() {
            "-sS" | "-sSN" | "--fail-with-body" => {}
            "-X" => call.method = value(),
            "-H" => {
                let header = value();
                let (name, value) = header.split_once(": ").unwrap_or_else(|| panic!("no header: {header}"));
                call.headers.push((name.to_owned(), value.to_owned()));
            }
            "-d" => call.body = Some(value()),
            "-o" | "--max-time" => drop(value()),
            path if path.starts_with('/') && call.path.is_empty() => call.path = path.to_owned(),
            other => panic!("what is `{other}`, in {words:?}?"),
        }
    }
    if call.method.is_empty() {
        call.method = if call.body.is_some() { "POST" } else { "GET" }.to_owned();
    }
    call
}

/// The words of a command, up to its end, as a shell splits them.
fn words(text: &str, variables: &BTreeMap<&str, String>) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut rest = text.chars().peekable();
    let mut double = false;
    while let Some(c) = rest.next() {
        match c {
            '"' => {
                double = !double;
                word.get_or_insert_default();
            }
            '$' => {
                let mut name = String::new();
                while let Some(c) = rest.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
                    name.push(c);
                }
                let value = variables.get(name.as_str()).unwrap_or_else(|| panic!("what is ${name}?"));
                word.get_or_insert_default().push_str(value);
            }
            '\'' if !double => word.get_or_insert_default().extend(rest.by_ref().take_while(|c| *c != '\'')),
            '\\' if !double && rest.peek() == Some(&'\n') => drop(rest.next()),
            ' ' if !double => words.extend(word.take()),
            '\n' | '|' | ')' | '>' | '<' | ';' | '&' if !double => break,
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

#[test]
fn commands_are_read() {
    let variables = BTreeMap::from([("url", String::new()), ("auth", "A: b c".to_owned()), ("key", "k".to_owned())]);
    let block = "# curl is no command here\nid=$(curl -sS \"$url/a?x=1&y\" -H \"$auth\" -d '{\n \"k\": \"'\"$key\"'\" }' | jq)\ncurl -sS \\\n  -X DELETE \"$url/b\" >x\n";
    let got = calls(block, &variables);
    assert_eq!(got.len(), 2);
    assert_eq!((got[0].method.as_str(), got[0].path.as_str()), ("POST", "/a?x=1&y"));
    assert_eq!(got[0].headers, [("A".to_owned(), "b c".to_owned())]);
    assert_eq!(got[0].body.as_deref(), Some("{\n \"k\": \"k\" }"));
    assert_eq!((got[1].method.as_str(), got[1].path.as_str()), ("DELETE", "/b"));
}
