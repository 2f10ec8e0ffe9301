//! No key is anywhere in the sandbox that the agent can read: it looks for them everywhere, from its own shell, with a
//! program of its own, and finds everything that was hidden for it to find, and nothing else.
//!
//! The program is this test binary. What it looks for is a word that this run has made up: each secret of the sidecar
//! begins with it, each decoy too, and the program is told no more.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's own helpers fail like the test")]

use crate::escape::stage::patient;
use crate::support::sidecar::{World, text_of};
use opencode_sidecar::scripted::Script;
use serde_json::json;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

const PROGRAM: &str = "./program --exact run::key_search::the_search --nocapture";

/// Where no session and no sidecar writes, and where [`Search::processes`] looks in its own way.
const PASSED_OVER: &[&str] = &["/proc", "/sys", "/dev", "/usr", "/nix"];

/// Decoys, and what is done besides to make the sidecar's keys show: a program that crashes would leave its memory.
const SEARCH: &str = r#"
word=$(cat word)
echo "$word-decoy-file" > "$HOME/decoy"
env "DECOY=$word-decoy-environ" sleep 600 &
bash -c 'exec -a "$0-decoy-arguments" sleep 600' "$word" &
mkfifo held
(hidden="$word-decoy"; hidden="$hidden-memory"; read -r nothing < held) &
bash -c 'kill -SEGV $$'
echo "core: $(ulimit -c)"
KEY_SEARCH=$word PORT=$(tr '\0' '\n' < /proc/$OPENCODE_PID/cmdline | sed -n '/^--port$/{n;p}') \
  PASSWORD=$(tr '\0' '\n' < /proc/$OPENCODE_PID/environ | sed -n 's/^OPENCODE_SERVER_PASSWORD=//p') \
  PROGRAM 2>&1 | grep -a -e '^found: ' -e '^searched: ' -e '^asked: '
kill $(jobs -p)
echo the end
"#;

/// What was found where, and how much was looked at.
#[derive(Default)]
struct Search {
    word: Vec<u8>,
    found: BTreeSet<(String, String)>,
    files: usize,
    environments: usize,
    memories: usize,
    bytes: usize,
}

impl Search {
    /// Looks for the word with something behind it: alone it is what the search itself was told.
    fn look(&mut self, place: &str, bytes: &[u8]) {
        self.bytes += bytes.len();
        let Some(&first) = self.word.first() else { return };
        let mut at = 0;
        while let Some(next) = bytes[at..].iter().position(|byte| *byte == first) {
            at += next;
            if bytes[at..].starts_with(&self.word) {
                let rest = bytes[at + self.word.len()..].iter();
                let rest: Vec<u8> =
                    rest.copied().take_while(|b| b.is_ascii_alphanumeric() || *b == b'-').take(64).collect();
                if !rest.is_empty() {
                    self.found.insert((place.to_owned(), String::from_utf8(rest).unwrap()));
                }
            }
            at += 1;
        }
    }

    fn file(&mut self, place: &str, path: &Path) -> bool {
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|mut file| file.read_to_end(&mut bytes));
        self.look(place, &bytes);
        read.is_ok()
    }

    fn files(&mut self, directory: &Path) {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() && !PASSED_OVER.iter().any(|passed| path.starts_with(passed)) {
                self.files(&path);
            } else if kind.is_file() && path.file_name().is_some_and(|name| name != "program") {
                self.files += usize::from(self.file("file", &path));
            }
        }
    }

    fn processes(&mut self, opencode: &str) {
        let own = std::process::id().to_string();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let process = entry.path();
            let name = entry.file_name().into_string().unwrap();
            if !name.bytes().all(|b| b.is_ascii_digit()) || name == own {
                continue;
            }
            self.file("arguments", &process.join("cmdline"));
            self.environments += usize::from(self.file("environment", &process.join("environ")));
            let place = if name == opencode { "OpenCode's memory" } else { "memory" };
            self.memories += usize::from(self.memory(place, &process).is_some());
        }
    }

    /// Every page that a process has in memory.
    fn memory(&mut self, place: &str, process: &Path) -> Option<()> {
        const PAGE: u64 = 4096;
        let maps = std::fs::read_to_string(process.join("maps")).ok()?;
        let (memory, pages) = (File::open(process.join("mem")).ok()?, File::open(process.join("pagemap")).ok()?);
        let mut read_any = None;
        for map in maps.lines().filter(|map| !map.contains("[v")) {
            let (from, to) = map.split(' ').next()?.split_once('-')?;
            let (mut at, to) = (u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?);
            let mut run = Vec::new();
            // Present or swapped, by what the kernel notes of each page; 64 MiB of address space at a time.
            let mut notes = vec![0; 8 * 16_384];
            while at < to {
                let count = usize::try_from(((to - at) / PAGE).min(16_384)).unwrap();
                if pages.read_exact_at(&mut notes[..8 * count], at / PAGE * 8).is_err() {
                    break;
                }
                for note in notes[..8 * count].chunks(8) {
                    let mut page = [0; PAGE as usize];
                    if note[7] & 0xc0 != 0 && memory.read_exact_at(&mut page, at).is_ok() {
                        read_any = Some(());
                        run.extend_from_slice(&page);
                    } else if !run.is_empty() {
                        self.look(place, &run);
                        run.clear();
                    }
                    at += PAGE;
                    if run.len() >= 64 << 20 {
                        self.look(place, &run);
                        run.clear();
                    }
                }
            }
            self.look(place, &run);
        }
        read_any
    }

    /// What OpenCode itself tells of its configuration, where it can be asked.
    fn opencode(&mut self, port: &str, password: &str) {
        use base64::Engine;
        let credential = base64::engine::general_purpose::STANDARD.encode(format!("opencode:{password}"));
        for path in ["/config", "/config/providers", "/global/config", "/auth"] {
            let mut answer = Vec::new();
            let asked = TcpStream::connect(format!("127.0.0.1:{port}")).and_then(|mut stream| {
                stream.set_read_timeout(Some(Duration::from_secs(20)))?;
                write!(
                    stream,
                    "GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {credential}\r\nConnection: close\r\n\r\n"
                )?;
                stream.read_to_end(&mut answer)
            });
            let status = String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned();
            println!("\nasked: {path} {:?} {status}", asked.err().map(|error| error.kind()));
            self.look(path, &answer);
        }
    }
}

/// In the sandbox it searches; started as a test, it shows that it finds what is there.
#[test]
fn the_search() {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let word = variable("KEY_SEARCH");
    if word.is_empty() {
        let mut search = Search { word: b"word".to_vec(), ..Search::default() };
        search.look("here", b"word, word-a\0wword-b\nword");
        let found: Vec<_> = search.found.iter().map(|(_, word)| word.as_str()).collect();
        assert_eq!(found, ["-a", "-b"]);
        return;
    }
    let mut search = Search { word: word.into_bytes(), ..Search::default() };
    search.processes(&variable("OPENCODE_PID"));
    search.files(Path::new("/"));
    // The session's own directories, where `/` itself cannot be listed.
    for name in ["HOME", "TMPDIR", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "PWD"] {
        search.files(Path::new(&variable(name)));
    }
    search.files(&Path::new(&variable("HOME")).join(".."));
    search.opencode(&variable("PORT"), &variable("PASSWORD"));
    let Search { files, environments, memories, bytes, .. } = search;
    println!("\nsearched: {files} files, {environments} environments, {memories} memories, {bytes} bytes");
    for (place, word) in search.found {
        println!("\nfound: {place}: {word}");
    }
}

#[tokio::test]
async fn an_agent_that_searches_everything_it_can_read_finds_no_key() {
    let world = World::new().await;
    let word = format!("k{}", &uuid::Uuid::new_v4().simple().to_string()[..12]);
    let secret = |name: &str| format!("{word}-{name}-{}", "0123456789abcdef".repeat(2));
    let [default_key, own_key, shared, tokens] = ["default-key", "own-key", "shared", "tokens"].map(secret);
    // The base64 of 32 bytes, which begins so too.
    let sealing = format!("{word:A<43}=");
    let changes = [
        ("SANDBOX", ""),
        ("OPENCODE_API_KEY", default_key.as_str()),
        ("OPENCODE_SHARED_SECRET", shared.as_str()),
        ("JWT_SECRET", tokens.as_str()),
        ("ENCRYPTION_KEY", sealing.as_str()),
    ];
    let sidecar = world.start(&changes).await;
    std::fs::copy(std::env::current_exe().unwrap(), world.file("program")).unwrap();
    std::fs::write(world.file("word"), &word).unwrap();
    std::fs::write(world.file("search.sh"), SEARCH.replace("PROGRAM", PROGRAM)).unwrap();
    let script = Script::new().tool("bash", patient("bash search.sh")).text("done");
    let model =
        json!({ "provider": "custom", "model": "m", "api_key": own_key, "api_endpoint": world.model.base_url() });
    // What is said in the prompt is in OpenCode's memory and in its database.
    let more = json!({ "model_config": model, "context": format!("{word}-decoy-prompt") });
    let id = sidecar.submit_with(&script, more).await;
    let events = sidecar.follow(&id).await;
    assert_eq!(events.last().unwrap()["data"]["status"], "completed", "{:#?}", events.last());
    let said = text_of(&events, "stdout");
    assert!(said.contains("core: 0\n") && said.ends_with("the end\n"), "{said}");
    let found: BTreeSet<_> = said.lines().filter_map(|line| line.strip_prefix("found: ")?.split_once(": ")).collect();
    // By its first letters: what is freed in a memory is soon half of something else, which gives other words too.
    let secrets = ["-def", "-own", "-sha", "-tok", "AAAA"];
    assert!(
        [&default_key, &own_key, &shared, &tokens, &sealing]
            .iter()
            .zip(secrets)
            .all(|(secret, begins)| { secret.strip_prefix(&word).is_some_and(|rest| rest.starts_with(begins)) })
    );
    let leaked: Vec<_> =
        found.iter().filter(|(_, rest)| secrets.iter().any(|begins| rest.starts_with(begins))).collect();
    assert!(leaked.is_empty(), "{leaked:?}");
    for hidden in [
        ("file", "-decoy-file"),
        ("environment", "-decoy-environ"),
        ("arguments", "-decoy-arguments"),
        ("memory", "-decoy-memory"),
        // In its database, too.
        ("file", "-decoy-prompt"),
        ("OpenCode's memory", "-decoy-prompt"),
    ] {
        assert!(found.contains(&hidden), "{hidden:?}: {said}");
    }
    let looked_at = said.lines().find_map(|line| line.strip_prefix("searched: ")).unwrap();
    let looked_at: Vec<usize> = looked_at.split(' ').filter_map(|word| word.parse().ok()).collect();
    let [files, environments, memories, bytes] = looked_at[..] else { panic!("{said}") };
    // OpenCode, the shells, the decoys.
    assert!(files > 10 && environments >= 4 && memories >= 4 && bytes > 50 << 20, "{said}");
    // Confined, a command is not let to OpenCode's own port; `secrets` asks there without a sandbox.
    let asked: Vec<_> = said.lines().filter(|line| line.starts_with("asked: ")).collect();
    assert!(asked.len() == 4 && asked.iter().all(|line| line.contains("PermissionDenied")), "{asked:?}");
    // And yet it is what the provider got.
    assert!(world.model.calls() > 0);
    let expected = format!("Bearer {own_key}");
    assert!(world.model.authorization_values().iter().all(|value| *value == expected));
    sidecar.stop().await;
}
