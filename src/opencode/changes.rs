//! What a run changed in its working directory, out of what OpenCode says while it runs. Pure, like
//! [`super::translate`].
//!
//! Two things are told, of which the first is the better one:
//! - **Snapshots.** In a git repository OpenCode records the work tree before and after each step, by git, inside the
//!   sandbox, and adds to the prompt's message what is different: everything, whoever changed it, but for what git
//!   ignores and for new files over 2 MiB. It does so beside the step, so that the last word comes some time after OpenCode is
//!   idle: one for each step, and one before the first.
//! - **File tools.** Elsewhere, what `edit`, `write` and `apply_patch` say that they did. What a shell command changed is
//!   not in it, and of a file that was written over it is not known what it was.

use super::wire::Part;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashSet;

/// Bytes of patches that are kept of a run.
const MAX_PATCHES: usize = 512 * 1024;
/// Changed files that are kept of a run.
const MAX_FILES: usize = 1000;
/// Lines around a change.
const CONTEXT: usize = 3;

/// One file, changed once.
#[derive(Clone, Debug, PartialEq)]
struct Change {
    path: String,
    change: &'static str,
    patch: Option<String>,
    additions: Option<u64>,
    deletions: Option<u64>,
}

/// Changes within their bounds.
#[derive(Clone, Debug, Default, PartialEq)]
struct Kept {
    files: Vec<Change>,
    bytes: usize,
    /// Something was left out.
    cut: bool,
}

impl Kept {
    fn add(&mut self, mut change: Change) {
        if self.files.len() == MAX_FILES {
            self.cut = true;
            return;
        }
        let bytes = change.patch.as_ref().map_or(0, String::len);
        if self.bytes + bytes > MAX_PATCHES {
            self.cut = true;
            change.patch = None;
        } else {
            self.bytes += bytes;
        }
        self.files.push(change);
    }
}

/// Gathers the changes of one run.
#[derive(Clone, Debug, Default)]
pub(super) struct Changes {
    /// The prompts of this run, each with what changed after it; there are more where the conversation was summed up.
    prompts: Vec<(String, Kept)>,
    by_tools: Kept,
    /// Snapshots are made here.
    has_snapshots: bool,
    steps_ended: HashSet<String>,
    /// How often the snapshots were compared.
    compared: usize,
    ended_tools: HashSet<String>,
}

#[derive(Deserialize)]
struct FileDiff {
    #[serde(alias = "filePath")]
    file: String,
    #[serde(default)]
    patch: String,
    #[serde(default)]
    additions: f64,
    #[serde(default)]
    deletions: f64,
    #[serde(default, alias = "type")]
    status: String,
    #[serde(default, rename = "movePath")]
    moved_to: Option<String>,
}

impl Changes {
    /// A message of a user in the run's own conversation: its id, and its `summary`.
    pub(super) fn prompt(&mut self, id: &str, summary: &Value) {
        let known = self.prompts.iter().position(|(known, _)| known == id);
        let Some(diffs) = summary.get("diffs").and_then(Value::as_array) else {
            // A new one. One that comes with a summary is of an earlier run, whose last word came late.
            if known.is_none() {
                self.prompts.push((id.to_owned(), Kept::default()));
            }
            return;
        };
        let Some((_, kept)) = known.and_then(|at| self.prompts.get_mut(at)) else { return };
        self.compared += 1;
        *kept = Kept::default();
        for diff in diffs.iter().filter_map(|diff| FileDiff::deserialize(diff).ok()) {
            let change = match diff.status.as_str() {
                "added" => "added",
                "deleted" => "deleted",
                _ => "modified",
            };
            kept.add(changed(&diff, diff.file.clone(), change));
        }
    }

    /// A part of the run's own conversation that is a step's beginning or end.
    pub(super) fn step(&mut self, part: &Part) {
        match part.kind.as_str() {
            "step-start" => self.has_snapshots |= part.snapshot.is_some(),
            "step-finish" => drop(self.steps_ended.insert(part.id.clone())),
            _ => {}
        }
    }

    /// A tool that has ended well, the agent's or a sub-agent's. `shown` gives a path as it is shown.
    pub(super) fn tool(&mut self, part: &Part, shown: impl Fn(&str) -> String) {
        let state = &part.state;
        if state.status != "completed" || !self.ended_tools.insert(part.id.clone()) {
            return;
        }
        match part.tool.as_str() {
            "edit" => {
                let diff = state.metadata.get("filediff").and_then(|diff| FileDiff::deserialize(diff).ok());
                if let Some(diff) = diff {
                    self.by_tools.add(changed(&diff, shown(&diff.file), "modified"));
                }
            }
            "write" => {
                let (Some(file), Some(content)) = (state.input["filePath"].as_str(), state.input["content"].as_str())
                else {
                    return;
                };
                let path = shown(file);
                // What was there before is not told.
                let is_new = state.metadata.get("exists").is_some_and(|exists| exists == false);
                self.by_tools.add(match is_new {
                    true => added(path, content),
                    false => Change { path, change: "modified", patch: None, additions: None, deletions: None },
                });
            }
            "apply_patch" => {
                let files = state.metadata.get("files").and_then(Value::as_array);
                for diff in files.into_iter().flatten().filter_map(|diff| FileDiff::deserialize(diff).ok()) {
                    let change = match diff.status.as_str() {
                        "add" => "added",
                        "delete" => "deleted",
                        _ => "modified",
                    };
                    match &diff.moved_to {
                        None => self.by_tools.add(changed(&diff, shown(&diff.file), change)),
                        Some(to) => {
                            let old = shown(&diff.file);
                            self.by_tools.add(Change {
                                path: old,
                                change: "deleted",
                                patch: None,
                                additions: None,
                                deletions: None,
                            });
                            self.by_tools.add(Change { patch: None, ..changed(&diff, shown(to), "added") });
                        }
                    }
                }
            }
            _ => {}
        }
    }

    /// Whether everything was told that there is to tell, once OpenCode is idle.
    pub(super) fn settled(&self) -> bool {
        !self.has_snapshots || self.compared > self.steps_ended.len()
    }

    /// The data of an event `diff`; `None` where there is nothing to tell. `ended` where OpenCode was idle at the end.
    pub(super) fn told(&self, ended: bool) -> Option<Value> {
        let complete = ended && self.settled();
        let parts: Vec<&Kept> = match self.has_snapshots {
            true => self.prompts.iter().map(|(_, kept)| kept).collect(),
            false => vec![&self.by_tools],
        };
        let files: Vec<&Change> = parts.iter().flat_map(|kept| &kept.files).collect();
        if files.is_empty() && !self.has_snapshots {
            return None;
        }
        let files: Vec<_> = files
            .into_iter()
            .map(|Change { path, change, patch, additions, deletions }| {
                json!({ "path": path, "change": change, "patch": patch, "additions": additions, "deletions": deletions })
            })
            .collect();
        Some(json!({
            "basis": if self.has_snapshots { "snapshots" } else { "file_tools" },
            "complete": complete && !parts.iter().any(|kept| kept.cut),
            "files": files,
        }))
    }
}

fn changed(diff: &FileDiff, path: String, change: &'static str) -> Change {
    let patch = with_head(&path, change, &diff.patch);
    let count = |number: f64| Some(super::translate::whole(number));
    Change { path, change, patch, additions: count(diff.additions), deletions: count(diff.deletions) }
}

/// A file that was not there before.
fn added(path: String, content: &str) -> Change {
    let lines = content.split_inclusive('\n').count();
    let mut hunk = format!("@@ -0,0 +1,{lines} @@\n");
    for line in content.split_inclusive('\n') {
        hunk.push('+');
        hunk.push_str(line);
    }
    if !content.is_empty() && !content.ends_with('\n') {
        hunk.push_str("\n\\ No newline at end of file\n");
    }
    let patch = (lines > 0).then_some(hunk).and_then(|hunk| with_head(&path, "added", &hunk));
    Change { path, change: "added", patch, additions: Some(lines as u64), deletions: Some(0) }
}

/// The hunks of a patch, under a head that names the file as everything else does. `None` where there are none.
fn with_head(path: &str, change: &str, patch: &str) -> Option<String> {
    let at = if patch.starts_with("@@ ") { 0 } else { patch.find("\n@@ ")? + 1 };
    let hunks = shortened(&patch[at..]).unwrap_or_else(|| patch[at..].to_owned());
    let old = if change == "added" { "/dev/null".to_owned() } else { format!("a/{path}") };
    let new = if change == "deleted" { "/dev/null".to_owned() } else { format!("b/{path}") };
    Some(format!("--- {old}\n+++ {new}\n{hunks}"))
}

/// One line of a hunk, with what belongs to it (that it has no newline), and its number in both files.
struct Line<'a> {
    text: String,
    is_change: bool,
    old: usize,
    new: usize,
    kind: &'a str,
}

/// The same hunks with no more than [`CONTEXT`] lines around each change: OpenCode's are of the whole file. `None` where
/// they have another form than we know.
fn shortened(hunks: &str) -> Option<String> {
    let mut lines: Vec<Line<'_>> = Vec::new();
    let (mut old, mut new) = (0, 0);
    for line in hunks.split_inclusive('\n') {
        match line.get(..1)? {
            "@" => (old, new) = begins(line)?,
            "\\" => lines.last_mut()?.text.push_str(line),
            kind @ (" " | "+" | "-") => {
                lines.push(Line { text: line.to_owned(), is_change: kind != " ", old, new, kind });
                old += usize::from(kind != "+");
                new += usize::from(kind != "-");
            }
            // Some write an empty line of context without its space.
            "\n" => {
                lines.push(Line { text: " \n".to_owned(), is_change: false, old, new, kind: " " });
                (old, new) = (old + 1, new + 1);
            }
            _ => return None,
        }
    }
    let mut wanted = vec![false; lines.len()];
    for at in lines.iter().enumerate().filter(|(_, line)| line.is_change).map(|(at, _)| at) {
        let end = (at + CONTEXT + 1).min(lines.len());
        wanted[at.saturating_sub(CONTEXT)..end].fill(true);
    }
    let mut text = String::new();
    let mut at = 0;
    while at < lines.len() {
        if !wanted[at] {
            at += 1;
            continue;
        }
        // To where nothing is wanted, or another hunk has begun.
        let mut end = at + 1;
        while end < lines.len() && wanted[end] && follows(&lines[end - 1], &lines[end]) {
            end += 1;
        }
        let hunk = &lines[at..end];
        let count = |other: &str| hunk.iter().filter(|line| line.kind != other).count();
        let (olds, news) = (count("+"), count("-"));
        // A hunk with no lines on one side names the line before it there.
        let (old, new) = (
            hunk[0].old - usize::from(olds == 0 && hunk[0].old > 0),
            hunk[0].new - usize::from(news == 0 && hunk[0].new > 0),
        );
        text.push_str(&format!("@@ -{old},{olds} +{new},{news} @@\n"));
        text.extend(hunk.iter().map(|line| line.text.as_str()));
        at = end;
    }
    Some(text)
}

/// Whether a line comes right after another one in the files.
fn follows(before: &Line<'_>, line: &Line<'_>) -> bool {
    line.old == before.old + usize::from(before.kind != "+") && line.new == before.new + usize::from(before.kind != "-")
}

/// The numbers of the first lines after a hunk's head, old and new.
fn begins(head: &str) -> Option<(usize, usize)> {
    let mut words = head.split(' ').skip(1);
    let mut number = |sign: char| {
        let (first, count) = {
            let range = words.next()?.strip_prefix(sign)?;
            range.split_once(',').unwrap_or((range, "1"))
        };
        let first: usize = first.parse().ok()?;
        // Where there is no line, the one before is named.
        Some(if count == "0" { first.checked_add(1)? } else { first })
    };
    Some((number('-')?, number('+')?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(value: Value) -> Part {
        Part::deserialize(value).unwrap()
    }

    fn step(changes: &mut Changes, id: &str) {
        changes.step(&part(json!({ "id": format!("{id}-start"), "type": "step-start", "snapshot": "abc" })));
        changes.step(&part(json!({ "id": id, "type": "step-finish", "snapshot": "def" })));
    }

    fn summary(patch: &str) -> Value {
        json!({ "diffs": [{ "file": "a", "patch": patch, "additions": 1, "deletions": 0, "status": "modified" }] })
    }

    #[test]
    fn snapshots_are_settled_when_the_last_step_was_compared() {
        let mut changes = Changes::default();
        assert!(changes.settled() && changes.told(true).is_none());
        // The last word of the run before comes late.
        changes.prompt("before", &summary("@@ -1,1 +1,1 @@\n-x\n+y\n"));
        changes.prompt("own", &Value::Null);
        changes.prompt("own", &json!({ "diffs": [] }));
        step(&mut changes, "one");
        step(&mut changes, "two");
        changes.prompt("own", &json!({ "diffs": [] }));
        assert!(!changes.settled());
        assert_eq!(changes.told(true).unwrap()["complete"], false);
        changes.prompt("own", &summary("@@ -1,1 +1,1 @@\n-a\n+b\n"));
        assert!(changes.settled());
        assert_eq!(changes.told(false).unwrap()["complete"], false, "it did not end well");
        let told = changes.told(true).unwrap();
        assert_eq!((&told["basis"], &told["complete"]), (&json!("snapshots"), &json!(true)));
        assert_eq!(told["files"][0]["patch"], "--- a/a\n+++ b/a\n@@ -1,1 +1,1 @@\n-a\n+b\n");
        assert_eq!(told["files"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn what_is_too_much_is_left_out_and_said() {
        let mut changes = Changes::default();
        changes.prompt("own", &Value::Null);
        step(&mut changes, "one");
        let large = format!("@@ -0,0 +1,1 @@\n+{}\n", "x".repeat(MAX_PATCHES));
        let file = |n: usize, patch: &str| json!({ "file": format!("f{n}"), "patch": patch, "status": "added" });
        let mut diffs = vec![file(0, &large)];
        diffs.extend((1..MAX_FILES + 5).map(|n| file(n, "@@ -0,0 +1,1 @@\n+x\n")));
        for _ in 0..2 {
            changes.prompt("own", &json!({ "diffs": diffs }));
        }
        let told = changes.told(true).unwrap();
        assert_eq!(told["complete"], false);
        let files = told["files"].as_array().unwrap();
        assert_eq!((files.len(), &files[0]["patch"]), (MAX_FILES, &Value::Null));
        assert!(files[1]["patch"].is_string() && told.to_string().len() < 2 * MAX_PATCHES);
    }

    #[test]
    fn tools_say_what_they_did() {
        let mut changes = Changes::default();
        let mut tool = |id: &str, tool: &str, status: &str, input: Value, metadata: Value| {
            let state = json!({ "status": status, "input": input, "metadata": metadata });
            changes.tool(&part(json!({ "id": id, "type": "tool", "tool": tool, "state": state })), |file| {
                file.replace("/ws/", "")
            });
        };
        let new = json!({ "filePath": "/ws/new", "content": "one\n\ntwo" });
        tool("1", "write", "running", new.clone(), json!({ "exists": false }));
        for _ in 0..2 {
            tool("1", "write", "completed", new.clone(), json!({ "exists": false }));
        }
        tool("2", "write", "error", new.clone(), json!({}));
        tool("3", "write", "completed", json!({ "filePath": "/ws/empty", "content": "" }), json!({ "exists": false }));
        tool("4", "write", "completed", new, json!({ "exists": true }));
        let patch = "Index: /ws/p\n====\n--- /ws/p\n+++ /ws/p\n@@ -1,1 +1,1 @@\n-a\n+b\n";
        let files = json!({ "files": [
            { "filePath": "/ws/p", "type": "update", "patch": patch, "additions": 1, "deletions": 1 },
            { "filePath": "/ws/old", "type": "move", "movePath": "/ws/moved", "patch": patch, "additions": 1, "deletions": 1 },
            { "filePath": "/ws/gone", "type": "delete", "patch": "", "additions": 0, "deletions": 3 },
        ]});
        tool("5", "apply_patch", "completed", json!({}), files);
        tool("6", "bash", "completed", json!({ "command": "x" }), json!({}));
        let told = changes.told(true).unwrap();
        assert_eq!((&told["basis"], &told["complete"]), (&json!("file_tools"), &json!(true)));
        let files: Vec<_> = told["files"]
            .as_array()
            .unwrap()
            .iter()
            .map(|f| (f["path"].as_str().unwrap(), f["change"].as_str().unwrap(), f["patch"].as_str()))
            .collect();
        let added = "--- /dev/null\n+++ b/new\n@@ -0,0 +1,3 @@\n+one\n+\n+two\n\\ No newline at end of file\n";
        assert_eq!(
            files,
            [
                ("new", "added", Some(added)),
                ("empty", "added", None),
                ("new", "modified", None),
                ("p", "modified", Some("--- a/p\n+++ b/p\n@@ -1,1 +1,1 @@\n-a\n+b\n")),
                ("old", "deleted", None),
                ("moved", "added", None),
                ("gone", "deleted", None),
            ]
        );
    }

    #[test]
    fn hunks_are_cut_to_what_is_around_a_change() {
        let line = |n: usize| format!(" {n}\n");
        let lines = |range: std::ops::RangeInclusive<usize>| range.map(line).collect::<String>();
        // Two changes near each other, and one at the end, which has no newline.
        let whole = format!(
            "@@ -1,30 +1,30 @@\n{}-10\n+ten\n{}+eleven and a half\n{}-30\n\\ No newline at end of file\n+thirty\n",
            lines(1..=9),
            lines(11..=14),
            lines(15..=29),
        );
        let want = format!(
            "@@ -7,11 +7,12 @@\n{}-10\n+ten\n{}+eleven and a half\n{}@@ -27,4 +28,4 @@\n{}-30\n\\ No newline at end of file\n+thirty\n",
            lines(7..=9),
            lines(11..=14),
            lines(15..=17),
            lines(27..=29),
        );
        assert_eq!(shortened(&whole).unwrap(), want);
        for same in ["@@ -0,0 +1,2 @@\n+a\n+b\n", "@@ -1,2 +0,0 @@\n-a\n-b\n", "@@ -5,0 +6,1 @@\n+x\n"] {
            assert_eq!(shortened(same).unwrap(), same);
        }
        assert_eq!(shortened("@@ -1 +1 @@\n-a\n+b\n").unwrap(), "@@ -1,1 +1,1 @@\n-a\n+b\n");
        for unknown in ["@@ x @@\n-a\n", "@@ -1,1 +1,1 @@\nü\n", "\\ No newline\n", "@@ -1,1\n"] {
            assert_eq!(shortened(unknown), None, "{unknown}");
        }
    }
}
