//! At a real terminal: a run as it goes, and what Ctrl-C does.

use super::{Caller, gated};
use crate::support::sidecar::{World, runs};
use opencode_sidecar::scripted::Script;

const CTRL_C: &str = "\u{3}";
const QUESTION: &str = "[c]ancel it, [l]eave it running, or [g]o on watching?";

fn prompt(mark: &str) -> String {
    let script = Script::new().bash(&gated(&["one", "two", "three"], &format!("sleep {mark}"))).text("x");
    script.to_prompt("Do what the script says.")
}

#[tokio::test]
async fn ctrl_c_asks_goes_on_and_cancels() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let caller = Caller::of(&sidecar);
    let mut terminal = caller.terminal(100, &["exec", &prompt("662001")]).await;
    // In colour, and before the command has ended.
    terminal.until("\u{1b}[36m▶ bash").await;
    terminal.until("│ \u{1b}[0mone").await;
    terminal.types(CTRL_C);
    terminal.until(QUESTION).await;
    // What happens meanwhile is not lost, and does not scroll the question away.
    std::fs::write(world.file("gate-1"), "").unwrap();
    let id = sidecar.get("/tasks").await["executions"][0]["execution_id"].as_str().unwrap().to_owned();
    sidecar.stream(&id, 0).await.until("two", |e| e["data"] == "two\n").await;
    terminal.types("what?\n");
    terminal.until(QUESTION).await;
    terminal.types("g\n");
    terminal.until("│ \u{1b}[0mtwo").await;
    std::fs::write(world.file("gate-2"), "").unwrap();
    terminal.until("│ \u{1b}[0mthree").await;
    assert_eq!(sidecar.status(&id).await["status"], "running");

    terminal.types(CTRL_C);
    terminal.until(QUESTION).await;
    terminal.types("c\n");
    terminal.until("Cancelling it …").await;
    terminal.until("● cancelled (cancelled)").await;
    let (exit, seen) = terminal.done().await;
    assert_eq!(exit.code, Some(4), "{exit}\n{seen}");
    assert!(!runs("sleep 662001"));
    let at = |words: &str| seen.find(words).unwrap();
    assert!(at("│ \u{1b}[0mtwo") > seen.rfind("what?").unwrap(), "nothing is shown while it is asked:\n{seen}");
    for word in ["one", "two", "three"] {
        assert_eq!(seen.matches(&format!("│ \u{1b}[0m{word}")).count(), 1, "{seen}");
    }
    sidecar.stop().await;
}

#[tokio::test]
async fn a_second_ctrl_c_cancels_at_once() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let caller = Caller::of(&sidecar);
    let mut terminal = caller.terminal(100, &["exec", &prompt("662002")]).await;
    terminal.until("│ \u{1b}[0mone").await;
    terminal.types(CTRL_C);
    terminal.until(QUESTION).await;
    terminal.types(CTRL_C);
    let (exit, seen) = terminal.done().await;
    assert_eq!(exit.code, Some(4), "{exit}\n{seen}");
    assert!(!runs("sleep 662002"));
    sidecar.stop().await;
}

#[tokio::test]
async fn a_run_is_left_and_taken_up_again() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let caller = Caller::of(&sidecar);
    let mut terminal = caller.terminal(100, &["exec", &prompt("662003")]).await;
    terminal.until("│ \u{1b}[0mone").await;
    terminal.types(CTRL_C);
    terminal.until(QUESTION).await;
    terminal.types("l\n");
    terminal.until("To watch it again: ").await;
    let (exit, seen) = terminal.done().await;
    assert_eq!(exit.code, Some(9), "{exit}\n{seen}");
    assert!(runs("sleep 0.02") || runs("gate-1"), "it runs on");

    // What is told can be typed as it stands.
    let plain = anstream::adapter::strip_str(&seen).to_string();
    let (_, command) = plain.split_once("To watch it again: opencode-sidecar ").unwrap();
    let command: Vec<&str> = command.split_whitespace().take(4).collect();
    let ["attach", id, "--after", seq] = command[..] else { panic!("{command:?}") };
    assert_eq!(sidecar.status(id).await["status"], "running");
    let mut terminal = caller.terminal(100, &["attach", id, "--after", seq]).await;
    std::fs::write(world.file("gate-1"), "").unwrap();
    terminal.until("│ \u{1b}[0mtwo").await;
    terminal.types(CTRL_C);
    terminal.until(QUESTION).await;
    terminal.types("cancel\n");
    let (exit, seen) = terminal.done().await;
    assert_eq!(exit.code, Some(4), "{exit}\n{seen}");
    assert!(!seen.contains("\u{1b}[0mone"), "it was shown before: {seen}");
    assert!(!runs("sleep 662003"));
    sidecar.stop().await;
}

/// A terminal is found although neither the prompt nor the events go through it.
#[tokio::test]
async fn ctrl_c_asks_between_pipes() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let caller = Caller::of(&sidecar).with("PROMPT", &prompt("662004"));
    // The shell and `cat` take no notice of Ctrl-C.
    let line = "trap '' INT; printf %s \"$PROMPT\" | \"$0\" exec --json | cat >events; echo over";
    let mut terminal = caller.terminal_with(100, world.workspace.path(), &["sh", "-c", line, super::BINARY]).await;
    terminal.until("Execution ").await;
    let id = sidecar.get("/tasks").await["executions"][0]["execution_id"].as_str().unwrap().to_owned();
    sidecar.stream(&id, 0).await.until("one", |e| e["data"] == "one\n").await;
    terminal.types(CTRL_C);
    terminal.until(QUESTION).await;
    terminal.types("c\n");
    terminal.until("over").await;
    let (exit, seen) = terminal.done().await;
    assert!(exit.success(), "{exit}\n{seen}");
    let events = std::fs::read_to_string(world.file("events")).unwrap();
    let last: serde_json::Value = serde_json::from_str(events.lines().last().unwrap()).unwrap();
    assert_eq!(last["data"]["status"], "cancelled");
    assert_eq!(events.lines().count() as u64, last["seq"].as_u64().unwrap());
    sidecar.stop().await;
}
