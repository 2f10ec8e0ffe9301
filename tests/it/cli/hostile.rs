//! What an agent, its tools and its files are called cannot play with the terminal of whoever watches.

use super::Caller;
use crate::support::sidecar::World;
use opencode_sidecar::scripted::Script;

/// A title, the clipboard, the screen, the cursor, a question that the terminal would answer, a bell, and characters
/// that turn what follows.
const EVIL: &str = "\u{1b}]0;owned\u{7}\u{1b}]52;c;b3duZWQ=\u{1b}\\\u{1b}[2J\u{1b}[1;1H\u{1b}[6n\u{1b}[?1049h\u{9b}c\u{7}\u{8}\u{202e}\u{2066}";

/// Whether nothing but text, line ends, and colours is in it.
fn is_harmless(text: &str) -> bool {
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c.is_control() && !matches!(c, '\n' | '\r' | '\t')) {
        let Some(sequence) = rest[at..].strip_prefix("\u{1b}[") else { return false };
        let end = sequence.find(|c: char| !c.is_ascii_digit() && c != ';').unwrap_or(sequence.len());
        let Some(after) = sequence[end..].strip_prefix('m') else { return false };
        rest = after;
    }
    !text.contains(['\u{202e}', '\u{2066}'])
}

#[tokio::test]
async fn nothing_hostile_reaches_the_terminal() {
    assert!(is_harmless("a\u{1b}[1;31mb\u{1b}[0m\r\n") && !is_harmless("\u{1b}[2J") && !is_harmless(EVIL));
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let caller = Caller::of(&sidecar);
    let name = "in\u{202e}txt.\u{1b}]0;owned\u{7}sh";
    let shell = format!("printf '%s' '{EVIL}'; printf '\\033[31mred\\033[0m\\033[2K\\n'; printf '{EVIL}err\\n' >&2");
    let script = Script::new()
        .write(&world.path(name), "x")
        .bash(&shell)
        .text(&format!("Said {EVIL}by the agent. \u{1b}[31mNot red.\u{1b}[0m"));
    let prompt = script.to_prompt("Go.");

    let (exit, seen) = caller.terminal(120, &["exec", &prompt]).await.done().await;
    assert!(exit.success(), "{exit}\n{seen}");
    assert!(is_harmless(&seen), "{seen:?}");
    // Nothing is lost of what can be read, and the shell's colours are there.
    for words in ["\u{1b}[31mred", "by the agent. Not red.", "in<U+202E>txt.", "<U+202E><U+2066>", "err"] {
        assert!(seen.contains(words), "{words:?} is not in {seen:?}");
    }

    // It did come from the agent like that: a program gets all of it.
    let id = sidecar.get("/tasks").await["executions"][0]["execution_id"].as_str().unwrap().to_owned();
    let json = caller.run(&["attach", "--json", &id]).await;
    let events = json.assert(0).json();
    let all = |kind: &str| -> String {
        events.iter().filter(|e| e["type"] == kind).map(|e| e["data"].as_str().unwrap_or_default()).collect()
    };
    assert!(all("stdout").contains("\u{1b}]52;c;b3duZWQ=\u{1b}\\\u{1b}[2J"), "{:?}", all("stdout"));
    let message: String =
        events.iter().filter(|e| e["type"] == "message").filter_map(|e| e["data"]["delta"].as_str()).collect();
    assert!(message.contains("\u{1b}]52;c;b3duZWQ=") && message.contains('\u{202e}'), "{message:?}");
    assert!(events.iter().any(|e| e["type"] == "file" && e["data"]["path"] == name), "{events:#?}");
    assert!(!json.stdout.contains('\u{1b}'), "JSON has it escaped");

    for args in [
        &["attach", &id] as &[&str],
        &["logs", &id],
        &["logs", "--follow", &id],
        &["logs", "--ansi", "strip", &id],
        &["logs", "--events", &id],
        &["logs", "--events", "--follow", &id],
        &["attach", "--json", &id],
        &["history"],
        &["history", "--json"],
        &["cancel", &id],
    ] {
        let (exit, seen) = caller.terminal(120, args).await.done().await;
        assert!(exit.success(), "{args:?}: {exit}\n{seen}");
        assert!(is_harmless(&seen), "{args:?}: {seen:?}");
    }
    sidecar.stop().await;
}
