//! Holds the map in `src/lib.rs`: what each module may use, what stands in one place only, how files look.
//!
//! It reads the sources as text. An exception is listed here with its reason, and one that nothing needs any more fails
//! as loudly as a breach.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use opencode_sidecar::config::reference;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Every module, from the ground up, with the modules that it may use: only such as stand above it in this list.
const LAYERS: &[(&str, &[&str])] = &[
    // Pure.
    ("model", &[]),
    ("sse", &[]),
    // Base.
    ("failpoint", &[]),
    ("tasks", &[]),
    ("secrets", &[]),
    ("telemetry", &["model"]),
    ("config", &["model", "secrets", "telemetry"]),
    // Owners of I/O.
    ("sandbox", &["tasks"]),
    ("workspace", &[]),
    ("journal", &["failpoint"]),
    ("store", &["failpoint", "model", "tasks", "sandbox"]),
    // Services.
    ("events", &["failpoint", "model", "tasks", "secrets", "telemetry", "journal", "store"]),
    ("opencode", &["model", "sse", "tasks", "sandbox"]),
    ("broker", &["model", "tasks", "telemetry"]),
    // Orchestration.
    ("sessions", &["failpoint", "model", "tasks", "secrets", "telemetry", "sandbox", "events", "opencode", "broker"]),
    (
        "executions",
        &[
            "failpoint",
            "model",
            "tasks",
            "secrets",
            "telemetry",
            "workspace",
            "store",
            "events",
            "opencode",
            "sessions",
        ],
    ),
    // Edges.
    ("api", &["model", "tasks", "secrets", "telemetry", "store", "events", "executions"]),
    ("client", &["model", "sse"]),
    ("notify", &["model", "tasks", "telemetry", "store"]),
    ("console", &["model"]),
    ("scripted", &["tasks"]),
    // Wiring.
    ("protection", &["config", "sandbox"]),
    (
        "app",
        &[
            "model",
            "tasks",
            "secrets",
            "telemetry",
            "config",
            "sandbox",
            "workspace",
            "journal",
            "store",
            "events",
            "opencode",
            "broker",
            "sessions",
            "executions",
            "api",
            "notify",
            "protection",
        ],
    ),
    ("doctor", &["tasks", "telemetry", "config", "sandbox", "store", "opencode", "protection", "app"]),
    ("host", &["telemetry"]),
    ("demo", &["host", "model", "tasks", "secrets", "telemetry", "config", "client", "console", "scripted", "app"]),
    (
        "cli",
        &["host", "model", "tasks", "telemetry", "config", "sandbox", "client", "console", "app", "doctor", "demo"],
    ),
    ("main", &["sandbox", "cli"]),
];

/// Words of code, and the only places below `src` where they may stand.
const ONLY_IN: &[(&str, &[&str])] = &[
    ("sqlx", &["store"]),
    ("axum", &["api", "broker", "scripted"]),
    ("StatusCode", &["api", "broker", "scripted", "notify", "opencode/client.rs"]),
    ("unsafe", &["sandbox"]),
    ("unsafe_code", &["sandbox"]),
    ("process::Command", &["sandbox"]),
    ("Command::new", &["sandbox"]),
    ("process::exit", &["sandbox"]),
    ("tokio::spawn", &["tasks.rs"]),
    ("task::spawn", &["tasks.rs"]),
    ("task::spawn_blocking", &["tasks.rs"]),
    ("task::spawn_local", &["tasks.rs"]),
    ("JoinSet", &["tasks.rs"]),
    ("thread::spawn", &["tasks.rs"]),
    ("thread::Builder", &["tasks.rs"]),
    ("disallowed_methods", &["sandbox", "tasks.rs"]),
];

/// Breaches that are known: the file, what it uses, and why that stands.
const EXCEPTIONS: &[(&str, &str, &str)] = &[];

/// Tests that wait for time to pass: the file and why no level can be waited for.
const SLEEPS: &[(&str, &str)] = &[];

/// The ways in which a test may not run: it is reported, with its reason.
const ONLY_WITH: [&str; 3] =
    ["cfg_attr(not(as_root), ignore =", "cfg_attr(not(cgroups), ignore =", "cfg_attr(not(guest), ignore ="];

/// Longest file, in lines.
const LONGEST: usize = 700;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

struct Source {
    /// Below `src` or the root.
    path: String,
    text: String,
    /// Comments and what is in quotes blanked out, line by line the same.
    code: String,
    /// The code without its test modules.
    program: String,
}

/// Every Rust file below a directory, in order.
fn sources(directory: &str) -> Vec<Source> {
    let base = root().join(directory);
    let mut found = Vec::new();
    let mut open = vec![base.clone()];
    while let Some(next) = open.pop() {
        let Ok(entries) = fs::read_dir(next) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let code = blank(&text);
                // A file of its own, declared under `#[cfg(test)]`.
                let program = if path.ends_with("tests.rs") { String::new() } else { without_tests(&code) };
                let path = path.strip_prefix(&base).unwrap().to_string_lossy().into_owned();
                found.push(Source { path, text, code, program });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// Blanks comments, string literals and character literals; keeps the lines.
fn blank(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let word_before = code.ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let gone = match first {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => block_comment(rest),
            '"' => quoted(rest),
            'r' if !word_before || code.ends_with('b') => raw_string(rest).unwrap_or(0),
            '\'' => character(rest).unwrap_or(0),
            _ => 0,
        };
        if gone == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.push(' ');
            code.extend(rest[..gone].chars().filter(|&c| c == '\n'));
            rest = &rest[gone..];
        }
    }
    code
}

fn block_comment(text: &str) -> usize {
    let (mut at, mut depth) = (0, 0);
    while at < text.len() {
        if text[at..].starts_with("/*") {
            (at, depth) = (at + 2, depth + 1);
        } else if text[at..].starts_with("*/") {
            (at, depth) = (at + 2, depth - 1);
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn quoted(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

fn raw_string(text: &str) -> Option<usize> {
    let hashes = text[1..].bytes().take_while(|&b| b == b'#').count();
    let body = text[1 + hashes..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(hashes));
    let length = body.find(&close).map_or(body.len(), |at| at + close.len());
    Some(2 + hashes + length)
}

/// The length of a character literal; `None` for a lifetime.
fn character(text: &str) -> Option<usize> {
    let body = &text[1..];
    if body.starts_with('\\') {
        return body[2..].find('\'').map(|at| at + 4);
    }
    let c = body.chars().next()?;
    body[c.len_utf8()..].starts_with('\'').then(|| c.len_utf8() + 2)
}

/// The code without what stands in the braces of test modules.
fn without_tests(code: &str) -> String {
    let mut kept = String::new();
    let mut rest = code;
    while let Some(at) = rest.find("#[cfg(test)]") {
        kept.push_str(&rest[..at]);
        let item = &rest[at..];
        let end = item.find(['{', ';']).unwrap_or(item.len() - 1);
        let mut depth = 0;
        let mut after = item.len();
        for (at, c) in item.char_indices().skip_while(|(at, _)| *at < end) {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                after = at + 1;
                break;
            }
        }
        rest = &item[after..];
    }
    kept + rest
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether the code has the words as they are, and not as parts of longer ones.
fn mentions(code: &str, words: &str) -> bool {
    code.match_indices(words)
        .any(|(at, _)| !code[..at].ends_with(is_word) && !code[at + words.len()..].starts_with(is_word))
}

/// The modules of this crate that the code names, as `crate::x` or in `crate::{x, y::Z}`.
fn uses(program: &str, crate_name: &str) -> BTreeSet<String> {
    let name = |text: &str| text.trim_start().chars().take_while(|&c| is_word(c)).collect::<String>();
    let mut used = BTreeSet::new();
    let prefix = format!("{crate_name}::");
    for (at, _) in program.match_indices(&prefix) {
        if program[..at].ends_with(is_word) {
            continue;
        }
        let rest = &program[at + prefix.len()..];
        let Some(list) = rest.strip_prefix('{') else {
            used.insert(name(rest));
            continue;
        };
        let mut depth = 0;
        used.insert(name(list));
        for (at, c) in list.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => drop(used.insert(name(&list[at + 1..]))),
                _ => {}
            }
        }
    }
    used.remove("");
    used
}

/// Fails with all that was found; takes out what is an exception, and fails too where one is not needed.
fn judge(found: Vec<(String, String, String)>, mine: impl Fn(&str) -> bool) {
    let excused = |file: &str, what: &str| EXCEPTIONS.iter().any(|(f, w, _)| *f == file && *w == what);
    let breaches: Vec<_> = found.iter().filter(|(file, what, _)| !excused(file, what)).map(|(.., text)| text).collect();
    assert!(breaches.is_empty(), "{breaches:#?}");
    for (file, what, _) in EXCEPTIONS.iter().filter(|(_, what, _)| mine(what)) {
        assert!(found.iter().any(|(f, w, _)| f == file && w == what), "no exception is needed for {what} in {file}");
    }
}

fn is_module(name: &str) -> bool {
    LAYERS.iter().any(|(module, _)| *module == name)
}

#[test]
fn imports_go_downward() {
    for (at, (module, allowed)) in LAYERS.iter().enumerate() {
        for lower in *allowed {
            assert!(
                LAYERS[..at].iter().any(|(m, _)| m == lower),
                "{module} may not use {lower}, which is not below it"
            );
        }
    }
    let mut found = Vec::new();
    let mut needed = BTreeSet::new();
    for source in sources("src") {
        let module = source.path.split(['/', '.']).next().unwrap();
        if module == "lib" {
            continue;
        }
        let (_, allowed) = LAYERS.iter().find(|(m, _)| *m == module).expect("each module has its layer in LAYERS");
        let crate_name = if module == "main" { "opencode_sidecar" } else { "crate" };
        for used in uses(&source.program, crate_name).into_iter().filter(|used| used != module) {
            assert!(is_module(&used), "{}: {crate_name}::{used} is no module of LAYERS", source.path);
            if allowed.contains(&used.as_str()) {
                needed.insert((module.to_owned(), used));
            } else {
                let text = format!("{}: `{module}` may not use `{used}`", source.path);
                found.push((source.path.clone(), used, text));
            }
        }
    }
    judge(found, is_module);
    // A permission that nothing needs would hide a wrong turn later. The wiring may know all that there is.
    for (module, allowed) in LAYERS.iter().take_while(|(module, _)| *module != "app") {
        for used in *allowed {
            assert!(needed.contains(&((*module).to_owned(), (*used).to_owned())), "{module} does not use {used}");
        }
    }
}

#[test]
fn each_thing_has_its_place() {
    let mut found = Vec::new();
    for source in sources("src") {
        for (words, places) in ONLY_IN {
            let home =
                places.iter().any(|place| source.path == *place || source.path.starts_with(&format!("{place}/")));
            if !home && mentions(&source.program, words) {
                let text = format!("{}: `{words}` stands only in {}", source.path, places.join(", "));
                found.push((source.path.clone(), (*words).to_owned(), text));
            }
        }
    }
    judge(found, |what| !is_module(what));
}

#[test]
fn queries_are_in_the_library() {
    // scripts/sqlx-prepare compiles nothing else against the database.
    for source in sources("tests").into_iter().chain(sources("benches")) {
        for query in ["query", "query_as", "query_scalar"] {
            assert!(!mentions(&source.code, query) || !source.code.contains(&format!("{query}!")), "{}", source.path);
        }
    }
}

#[test]
fn files_can_be_read() {
    for directory in ["src", "tests", "benches"] {
        for source in sources(directory) {
            let path = format!("{directory}/{}", source.path);
            let lines = source.text.lines().count();
            assert!(lines <= LONGEST, "{path} has {lines} lines; split it at {LONGEST}");
            let is_part = source.path.ends_with("tests.rs");
            assert!(is_part || source.text.starts_with("//!"), "{path} does not begin with what it is for (`//!`)");
            let without = ONLY_WITH.iter().fold(source.code.clone(), |code, with| code.replace(with, ""));
            assert!(!mentions(&without, "ignore"), "{path}: a test that does not run shows nothing");
        }
    }
}

#[test]
fn tests_wait_for_levels() {
    let mut waiting = Vec::new();
    for source in sources("tests") {
        if mentions(&source.code, "sleep") && !SLEEPS.iter().any(|(file, _)| *file == source.path) {
            waiting.push(format!("tests/{}", source.path));
        }
    }
    for source in sources("src") {
        // What is left of the code when the program is taken away.
        let all = source.code.matches("sleep(").count();
        if all > source.program.matches("sleep(").count() && !source.path.ends_with("tests.rs") {
            waiting.push(format!("src/{}", source.path));
        }
    }
    assert!(waiting.is_empty(), "wait for a condition instead of sleeping: {waiting:?}");
    for (file, _) in SLEEPS {
        let source = fs::read_to_string(root().join("tests").join(file)).unwrap();
        assert!(mentions(&blank(&source), "sleep"), "no exception is needed for {file}");
    }
}

/// Files that a person reads or a tool runs.
fn texts() -> Vec<(PathBuf, String)> {
    let mut paths: Vec<PathBuf> =
        ["src", "tests", "benches", "docs", "scripts", "sidecars", "migrations", ".ci"].map(|d| root().join(d)).into();
    paths.extend(["README.md", "Makefile", "Cargo.toml", "deny.toml", "clippy.toml"].map(|f| root().join(f)));
    let mut found = Vec::new();
    while let Some(path) = paths.pop() {
        if path.is_dir() {
            if !path.ends_with("node_modules") {
                paths.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
        } else if let Ok(text) = fs::read_to_string(&path) {
            found.push((path, text));
        }
    }
    found
}

#[test]
fn nothing_leads_to_one_machine() {
    let directories = ["home", "root", "work", "Users"].map(|name| format!("/{name}/"));
    for (path, text) in texts() {
        for (number, line) in text.lines().enumerate() {
            // Inside a Bun executable every file is below this, on each machine.
            let line = line.replace("/$bunfs/root/", "");
            let found = directories.iter().find(|directory| line.contains(directory.as_str()));
            assert!(found.is_none(), "{}:{}: a path of one machine: {line}", path.display(), number + 1);
        }
    }
}

#[test]
fn packages_are_pinned() {
    let read = |path: PathBuf| serde_json::from_str::<Value>(&fs::read_to_string(path).unwrap()).unwrap();
    for entry in fs::read_dir(root().join("sidecars")).unwrap() {
        let directory = entry.unwrap().path();
        let package = read(directory.join("package.json"));
        let lock = read(directory.join("package-lock.json"));
        let mut count = 0;
        for kind in ["dependencies", "optionalDependencies", "devDependencies"] {
            for (name, version) in package[kind].as_object().into_iter().flatten() {
                let version = version.as_str().unwrap();
                let exact = version.starts_with(|c: char| c.is_ascii_digit())
                    && version
                        .split(['-', '+'])
                        .next()
                        .unwrap()
                        .split('.')
                        .filter(|n| n.parse::<u32>().is_ok())
                        .count()
                        == 3;
                assert!(exact, "{name} is not pinned: {version}");
                let locked = &lock["packages"][format!("node_modules/{name}")];
                assert_eq!(locked["version"], version, "{name} in the lockfile of {}", directory.display());
                count += 1;
            }
        }
        assert!(count > 0, "{} pins nothing", directory.display());
        for (name, locked) in lock["packages"].as_object().unwrap() {
            assert!(locked["resolved"].is_null(), "{name}: the lockfile names the host of a registry");
            assert!(name.is_empty() || locked["integrity"].is_string(), "{name}: the lockfile has no digest");
        }
    }
}

/// The README's table of variables is written from the code: `UPDATE=1 cargo test --test it tidy`.
#[test]
fn the_readme_lists_the_configuration() {
    const BEGIN: &str = "<!-- configuration: written from src/config/reference.rs -->\n";
    const END: &str = "<!-- end of configuration -->\n";
    let mut table = String::from("| Variable | Default | |\n|---|---|---|\n");
    for variable in reference() {
        let default = if variable.default.is_empty() { String::new() } else { format!("`{}`", variable.default) };
        table.push_str(&format!("| `{}` | {default} | {} |\n", variable.name, variable.meaning.replace('|', "\\|")));
    }
    let path = root().join("README.md");
    let readme = fs::read_to_string(&path).unwrap();
    let (before, rest) = readme.split_once(BEGIN).expect("README.md has the table's first mark");
    let (_, after) = rest.split_once(END).expect("README.md has the table's last mark");
    let wanted = format!("{before}{BEGIN}{table}{END}{after}");
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, &wanted).unwrap();
    } else {
        assert!(readme == wanted, "README.md's configuration is not the code's: UPDATE=1 cargo test --test it tidy");
    }
}

#[test]
fn the_reader_of_sources_reads_them_right() {
    let text = r##"use crate::{a, b::{C, D}, e}; // crate::no
/* crate::no /* "*/ */ let x = "crate::no \" sleep("; let c = '"'; let l: &'static str = r#"unsafe " "#;
#[cfg(test)] mod tests { use crate::t; fn f() { } }
#[cfg(test)]
mod more;
fn g() { unsafe_code(); crate::h::i() }"##;
    let code = blank(text);
    assert_eq!(code.lines().count(), text.lines().count());
    assert!(!code.contains("no") && !mentions(&code, "unsafe") && mentions(&code, "unsafe_code"));
    let program = without_tests(&code);
    let used = uses(&program, "crate");
    assert_eq!(used, ["a", "b", "e", "h"].map(str::to_owned).into());
}
