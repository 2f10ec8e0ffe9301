//! Holds the pages of `docs/` to what is there: routes, variables, commands, codes, links, examples.
//!
//! What a page names has to exist, or to stand in a paragraph that begins with "Not in this version:"; what stands in
//! one must not exist. So whoever adds or removes something hears of the pages that speak of it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's own helpers fail like the test")]

mod curl;
mod text;

use crate::support::postgres::sandbox;
use crate::support::sidecar::{PATIENCE, Sidecar, World, soon};
use curl::{Call, calls};
use opencode_sidecar::api::Code as ErrorCode;
use opencode_sidecar::api::extract::parse_json;
use opencode_sidecar::config::{not_yet, reference};
use opencode_sidecar::model::Reason;
use opencode_sidecar::model::request::{ModelConfig, TaskRequest};
use opencode_sidecar::sandbox::Spec;
use opencode_sidecar::tasks::Tasks;
use reqwest::Method;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use text::{Page, Place, pages};

/// Paths in the pages that are none of the sidecar's routes.
const OTHER_PATHS: &[&str] = &["/workspace", "/tmp", "/run", "/usr", "/opt", "/etc"];
/// Variables in the pages that are none of `serve`'s: a recipe's own, and the client's.
const OTHER_VARIABLES: &[&str] =
    &["HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "OPENAI_API_KEY", "OPENCODE_SIDECAR_URL", "SSL_CERT_FILE"];
/// What the broker tells OpenCode and no caller ever sees.
const INNER_CODES: &[&str] = &["model_quota"];

fn is_template(segment: &str) -> bool {
    segment.starts_with('{') && segment.ends_with('}')
}

/// A path as a template: without query, with `{}` for whatever differs from call to call.
fn normal(path: &str) -> String {
    let path = path.split(['?', '#']).next().unwrap();
    let segments = path.split('/').map(|segment| {
        let differs = segment.starts_with('$') || is_template(segment) || uuid::Uuid::parse_str(segment).is_ok();
        if differs { "{}" } else { segment }
    });
    segments.collect::<Vec<_>>().join("/")
}

/// Whether a path that a page names is of this route.
fn is_of(path: &str, route: &str) -> bool {
    let (path, route): (Vec<_>, Vec<_>) = (path.split('/').collect(), route.split('/').collect());
    path.len() == route.len() && path.iter().zip(&route).all(|(named, known)| is_template(known) || named == known)
}

/// The sidecar's routes: method and path.
struct Routes {
    served: BTreeSet<(String, String)>,
}

impl Routes {
    fn new(document: &Value) -> Self {
        let mut served = BTreeSet::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            let methods = item.as_object().unwrap().iter().filter(|(_, operation)| operation["responses"].is_object());
            served.extend(methods.map(|(method, _)| (method.to_uppercase(), path.clone())));
        }
        Self { served }
    }

    fn has(&self, method: Option<&str>, path: &str) -> bool {
        let path = normal(path);
        // A WebSocket begins as one.
        let method = method.map(|method| if method == "WS" { "GET" } else { method });
        self.served.iter().any(|(m, route)| method.is_none_or(|method| method == m) && is_of(&path, route))
    }

    /// What is wrong with naming a route, if anything.
    fn judge(&self, method: Option<&str>, path: &str, place: Place) -> Option<&'static str> {
        match (self.has(method, path), place) {
            (true, Place::Marked) => Some("is there: it is not to be marked as missing"),
            (false, Place::Plain) => Some("is no route"),
            _ => None,
        }
    }

    /// First segments of all paths.
    fn roots(&self) -> BTreeSet<&str> {
        self.served.iter().map(|(_, path)| path.split('/').nth(1).unwrap()).collect()
    }
}

/// The route in a piece of code: with its method where it has one.
fn route_in(code: &str) -> Option<(Option<&str>, &str)> {
    let (method, path) = match code.split_once(' ') {
        Some((method, path)) => (Some(method), path),
        None => (None, code),
    };
    let known = ["GET", "POST", "PUT", "PATCH", "DELETE", "WS"];
    (path.starts_with('/') && !path.contains(' ') && method.is_none_or(|m| known.contains(&m)))
        .then_some((method, path))
}

/// Paths within a block whose first segment is one of `roots`.
fn paths_in<'a>(block: &'a str, roots: &'a BTreeSet<&str>) -> impl Iterator<Item = &'a str> {
    block.match_indices('/').filter_map(|(at, _)| {
        let path = &block[at..];
        let end = path.find(|c: char| c.is_whitespace() || "\"'`?),\\".contains(c)).unwrap_or(path.len());
        let path = path[..end].trim_end_matches('/');
        // `${base}/tasks` begins one, `/api/sessions` does not.
        let begins = !block[..at].ends_with(|c: char| c.is_alphanumeric());
        let port = block[..at].ends_with(":3003");
        ((begins || port) && roots.contains(path.split('/').nth(1)?)).then_some(path)
    })
}

fn values(sidecar: &Sidecar, id: &str) -> BTreeMap<&'static str, String> {
    BTreeMap::from([
        ("url", String::new()),
        ("auth", format!("Authorization: Bearer {}", sidecar.secret)),
        ("json", "Content-Type: application/json".to_owned()),
        ("id", id.to_owned()),
        ("session", "0197c3a0-0000-7000-8000-0000000000a1".to_owned()),
        ("last", "1".to_owned()),
        ("after", "0".to_owned()),
        ("OPENAI_API_KEY", "sk-example".to_owned()),
    ])
}

async fn send(sidecar: &Sidecar, call: &Call) -> (u16, String) {
    let method: Method = call.method.parse().unwrap();
    let mut request = sidecar.http.request(method, format!("{}{}", sidecar.base, call.path));
    for (name, value) in &call.headers {
        request = request.header(name, value);
    }
    if let Some(body) = &call.body {
        request = request.body(body.clone());
    }
    let answer = soon(&call.path, request.send()).await.unwrap();
    (answer.status().as_u16(), soon("a body", answer.text()).await.unwrap())
}

fn on_default_model(mut call: Call) -> Call {
    if let Some(body) = &call.body {
        let mut body: Value = serde_json::from_str(body).unwrap();
        body.as_object_mut().unwrap().remove("model_config");
        call.body = Some(body.to_string());
    }
    call
}

/// With protection required no task's session starts, so each task ends at once: what is tried is the API. The calls of
/// sessions are sent to a sidecar where they start.
#[tokio::test]
async fn routes_exist_and_every_curl_command_is_taken() {
    let (world, other) = (World::new().await, World::new().await);
    // The pages' own endpoints, which nobody calls here.
    let endpoints = ("MODEL_ENDPOINT_ALLOW", "api.openai.com:443,models.internal:8000");
    let sidecar = world.start(&[("SANDBOX", "required"), ("SANDBOX_REQUIRE", "landlock_unix"), endpoints]).await;
    let open = other.start(&[("OPENCODE_SHARED_SECRET", &sidecar.secret)]).await;
    let routes = Routes::new(&sidecar.get("/openapi.json").await);
    let roots = routes.roots();
    let mut wrong = Vec::new();
    let (_, api) = sidecar.send(Method::GET, "/docs", None).await;
    for schema in api.as_str().unwrap().split(" href=\"#").skip(1).map(|rest| rest.split('"').next().unwrap()) {
        assert!(api.as_str().unwrap().contains(&format!(" id=\"{schema}\"")), "/docs: #{schema} leads nowhere");
    }
    let mut sent = 0;
    for page in pages() {
        let judge = |method: Option<&str>, path: &str, place: Place| {
            // The backend's own.
            if path.starts_with("/api/") || (method.is_none() && OTHER_PATHS.contains(&path)) {
                return None;
            }
            let why = routes.judge(method, path, place)?;
            Some(format!("{}: {} {path} {why}", page.name, method.unwrap_or_default()))
        };
        for code in &page.code {
            match &code.language {
                None => {
                    wrong.extend(route_in(&code.text).and_then(|(method, path)| judge(method, path, code.place)));
                }
                Some(_) => wrong.extend(paths_in(&code.text, &roots).filter_map(|path| judge(None, path, code.place))),
            }
        }
        // An execution for the commands that need one.
        let id = sidecar.submit(&opencode_sidecar::scripted::Script::new().text("x")).await;
        sidecar.follow(&id).await;
        for call in page.blocks("sh").flat_map(|block| calls(&block.text, &values(&sidecar, &id))) {
            if let Some(body) = call.body.as_deref().filter(|_| call.path == "/tasks/execute") {
                let parsed = parse_json::<TaskRequest>(body.as_bytes());
                parsed.unwrap_or_else(|problem| panic!("{}: {}: {body}", page.name, problem.detail()));
            }
            wrong.extend(judge(Some(&call.method), &call.path, Place::Plain));
            // A session has to run; on the scripted model, whatever model the page names.
            let (status, answer) = match call.path.starts_with("/session") {
                true => send(&open, &on_default_model(call.clone())).await,
                false => send(&sidecar, &call).await,
            };
            // Readiness says what is true here.
            let wanted = if call.path == "/ready" { 503..504 } else { 200..300 };
            if !wanted.contains(&status) {
                wrong.push(format!("{}: {call:?} is answered with {status}: {answer}", page.name));
            }
            sent += 1;
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(sent > 20, "only {sent} commands were found");
    sidecar.stop().await;
    open.stop().await;
}

#[tokio::test]
async fn checks_and_metrics_are_named() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let pages = pages();
    let page = |name: &str| pages.iter().find(|page| page.name == name).unwrap();
    for check in sidecar.get("/ready").await["checks"].as_object().unwrap().keys() {
        assert!(page("troubleshooting").names(check), "the check `{check}` of /ready is not in troubleshooting.md");
    }
    let metrics = soon("metrics", sidecar.http.get(format!("{}/metrics", sidecar.base)).send()).await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let families: Vec<_> =
        metrics.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split_once(' ')).map(|(name, _)| name).collect();
    for family in &families {
        assert!(page("operations").names(family), "the metric `{family}` is not in operations.md");
    }
    for code in pages.iter().flat_map(|page| &page.code) {
        if code.language.is_none() && (code.text.starts_with("opencode_sidecar_") || code.text.starts_with("process_"))
        {
            assert!(families.contains(&code.text.as_str()), "there is no metric `{}`", code.text);
        }
    }
    sidecar.stop().await;
}

/// Names of variables in a piece of code: words in capitals with an underscore, or before an equals sign, or alone.
fn variables_in(code: &str) -> Vec<&str> {
    let is_part = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    let mut found = Vec::new();
    let mut rest = code;
    while let Some(at) = rest.find(|c: char| c.is_ascii_alphanumeric() || c == '_') {
        let word = &rest[at..];
        let end = word.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(word.len());
        let (word, after) = word.split_at(end);
        let capitals = word.starts_with(|c: char| c.is_ascii_uppercase()) && word.chars().all(is_part);
        if capitals && (word.contains('_') || after.starts_with('=') || word.len() == code.len()) {
            found.push(word);
        }
        rest = after;
    }
    found
}

#[test]
fn variables_exist() {
    let known: BTreeSet<_> = reference().iter().map(|variable| variable.name).collect();
    let missing: BTreeSet<_> = not_yet().collect();
    let mut seen = BTreeSet::new();
    for page in pages() {
        for code in &page.code {
            for name in variables_in(&code.text) {
                let is_other = OTHER_VARIABLES.contains(&name);
                let is_missing = missing.contains(name) && code.place != Place::Plain;
                let page = &page.name;
                assert!(
                    known.contains(name) || is_other || is_missing,
                    "{page}: {name} is no variable of this version"
                );
                seen.insert(name.to_owned());
            }
        }
    }
    assert!(seen.len() > 30, "only {seen:?} were found");
    assert_eq!(variables_in("`A_B=${C_D}` E f G=1 Hij K_l"), ["A_B", "C_D", "G"]);
    assert_eq!(variables_in("PORT"), ["PORT"]);
}

#[tokio::test]
async fn commands_exist() {
    let tasks = Tasks::new();
    let mut spec = Spec::new("help", env!("CARGO_BIN_EXE_opencode-sidecar"));
    spec.args = vec!["help".into()];
    let help = sandbox(&tasks).run(spec, PATIENCE).await.unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let known: BTreeSet<_> = help.lines().filter_map(|l| l.strip_prefix("  ")?.split(' ').next()).collect();
    assert!(known.contains("serve"), "{help}");
    for page in pages() {
        for code in &page.code {
            for (at, name) in code.text.match_indices("opencode-sidecar ") {
                let word = code.text[at + name.len()..].split_whitespace().next().unwrap_or_default();
                let is_command = word.starts_with(|c: char| c.is_ascii_lowercase());
                let there = known.contains(word);
                assert!(!is_command || there, "{}: there is no `opencode-sidecar {word}`", page.name);
            }
        }
    }
}

/// Codes of the events `error` and `log`: the first word in quotes of the calls that make one.
fn event_codes() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let program = text.split("#[cfg(test)]").next().unwrap();
        for maker in ["Failure::new(", "NewEvent::log(", "NewEvent::error(", "ModelError::new("] {
            for (at, _) in program.match_indices(maker) {
                // Up to the first call within it: a code that is made there is none of ours.
                let call = program[at..].split(')').next().unwrap();
                found.extend(call.split('"').nth(1).filter(|code| is_code(code)).map(str::to_owned));
            }
        }
        if path.ends_with("broker/error.rs") {
            let quoted = program.split('"').skip(1).step_by(2);
            found.extend(quoted.filter(|code| is_code(code) && code.starts_with("model_")).map(str::to_owned));
        }
    }
    found
}

fn is_code(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
}

#[test]
fn every_reason_and_code_is_explained() {
    let pages = pages();
    let page = pages.iter().find(|page| page.name == "troubleshooting").unwrap();
    let codes = ErrorCode::ALL.iter().map(|code| code.as_str().to_owned());
    let reasons = Reason::ALL.iter().map(|reason| reason.as_str().to_owned());
    let events = event_codes();
    for known in ["model_auth", "model_cut", "opencode_crashed", "session_started", "model_retry", "log_lost"] {
        assert!(events.contains(known), "{known} is not found in the sources: {events:?}");
    }
    let missing: Vec<_> = codes
        .chain(reasons)
        .chain(events)
        .filter(|word| !INNER_CODES.contains(&word.as_str()) && !page.names(word))
        .collect();
    assert!(missing.is_empty(), "troubleshooting.md says nothing of {missing:?}");
}

#[test]
fn examples_are_json_of_the_right_shape() {
    let mut count = 0;
    for Page { name, code, .. } in pages() {
        let is_json = |language: &Option<String>, text: &str| match language {
            Some(language) => language == "json",
            None => text.starts_with("{\""),
        };
        for code in code.iter().filter(|code| is_json(&code.language, &code.text)) {
            let text = &code.text;
            let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{name}: {error}: {text}"));
            if value["task_id"].is_string() && value["execution_id"].is_null() {
                parse_json::<TaskRequest>(text.as_bytes()).unwrap_or_else(|p| panic!("{name}: {}: {text}", p.detail()));
            }
            if value["provider"].is_string() {
                parse_json::<ModelConfig>(text.as_bytes()).unwrap_or_else(|p| panic!("{name}: {}: {text}", p.detail()));
            }
            count += 1;
        }
    }
    assert!(count > 10, "only {count} were found");
}

/// Whether there is a test of this name, such as `run::walk::every_route`, or a module of tests.
fn is_a_test(name: &str) -> bool {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it");
    let (module, function) = name.rsplit_once("::").unwrap();
    let holds = |module: &str, text: &str| {
        let path = tests.join(module.replace("::", "/"));
        let sources = [path.with_extension("rs"), path.join("mod.rs")];
        sources.iter().any(|source| std::fs::read_to_string(source).is_ok_and(|source| source.contains(text)))
    };
    holds(module, &format!("fn {function}()")) || holds(module, &format!("mod {function};"))
}

#[test]
fn the_tests_that_the_threat_model_names_exist() {
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/threat-model.md")).unwrap();
    let names: BTreeSet<_> = page.split('`').skip(1).step_by(2).filter(|name| name.contains("::")).collect();
    assert!(names.len() > 40, "{names:?}");
    let missing: Vec<_> = names.into_iter().filter(|name| !is_a_test(name)).collect();
    assert!(missing.is_empty(), "there is no test {missing:?}");
}

#[test]
fn links_between_the_files_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pages = pages();
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    for page in &pages {
        for link in page.links.iter().filter(|link| !link.starts_with("https://")) {
            let file = link.split('#').next().unwrap();
            // Others would lead nowhere when the page is served.
            let leads = file.is_empty() || pages.iter().any(|page| format!("{}.md", page.name) == file);
            assert!(leads, "{}: {link}", page.name);
        }
        assert!(readme.contains(&format!("(docs/{}.md)", page.name)), "README.md has no link to docs/{}.md", page.name);
    }
}
