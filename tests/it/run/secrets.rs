//! The provider's key stays in the sidecar, also one that came encrypted, and with it what it was encrypted under: a
//! session that looks for them everywhere finds nothing.

use crate::support::sidecar::{API_KEY, World, text_of};
use opencode_sidecar::scripted::Script;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::Path;

/// The pod's own key, which this task does not use.
const DEFAULT_KEY: &str = "sk-the-default-key-9876543210";
/// The bytes 0 to 31, in base64.
const ENCRYPTION_KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
/// [`API_KEY`] under it, made with Python's `cryptography`:
/// `nonce = bytes(range(72, 84)); b64encode(nonce + AESGCM(bytes(range(32))).encrypt(nonce, API_KEY, None))`
const SEALED: &str = "SElKS0xNTk9QUVJTvUamFx2END29IVtQBUVQXw+LPGIK7oKayw3Shb73xdyni/1yWZ4kpGt777iKedv7";
const SECRETS: [&str; 4] = [API_KEY, DEFAULT_KEY, ENCRYPTION_KEY, SEALED];

/// What a hostile shell command can look at. The sandbox is another matter: here the agent is its own worst case. It
/// looks for whatever begins like one of them, and for a marker of its own, to show that it would find it.
const SEARCH: &str = r#"
echo "sk-""the-marker" > "$HOME/marker"
look() { grep -a -o -e 'sk-the-[-a-z0-9]*' -e 'AAECAwQF''BgcI' -e 'SElKS0xN''Tk9Q'; }
{ env; for p in $OPENCODE_PID $PPID $$; do cat /proc/$p/environ /proc/$p/cmdline; done; } | look
find "$HOME/.." -type f -exec cat {} + 2>/dev/null | look | sort -u
password=$(tr '\0' '\n' < /proc/$OPENCODE_PID/environ | sed -n 's/^OPENCODE_SERVER_PASSWORD=//p')
port=$(tr '\0' '\n' < /proc/$OPENCODE_PID/cmdline | sed -n '/^--port$/{n;p}')
auth=$(printf 'opencode:%s' "$password" | base64 -w0)
for path in /config /config/providers; do
  exec 3<>/dev/tcp/127.0.0.1/$port
  printf 'GET %s HTTP/1.1\r\nHost: x\r\nAuthorization: Basic %s\r\nConnection: close\r\n\r\n' "$path" "$auth" >&3
  answer=$(timeout 10 cat <&3 | tr -d '\0')
  echo "$path: ${#password} $(head -n1 <<< "$answer")"
  look <<< "$answer"
done
"#;

fn assert_absent(directory: &Path) -> usize {
    let mut files = 0;
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files += assert_absent(&path),
            Ok(kind) if kind.is_file() => {
                let Ok(content) = std::fs::read(&path) else { continue };
                files += 1;
                for secret in SECRETS {
                    let found = content.windows(secret.len()).any(|window| window == secret.as_bytes());
                    assert!(!found, "{secret} is in {}", path.display());
                }
            }
            _ => {}
        }
    }
    files
}

#[tokio::test]
async fn the_key_is_nowhere_in_the_session() {
    let world = World::new().await;
    // Not confined, so that it may ask OpenCode's own interface too.
    let changes = [
        ("SANDBOX", "off"),
        ("ENCRYPTION_KEY", ENCRYPTION_KEY),
        ("OPENCODE_API_KEY", DEFAULT_KEY),
        ("LOG_LEVEL", "debug"),
    ];
    let mut sidecar = world.start(&changes).await;
    let script = Script::new().bash(SEARCH).bash("echo searched; until [ -e gate ]; do sleep 0.02; done").text("done");
    let model_config = json!({ "provider": "custom", "model": "lamp", "api_key_encrypted": SEALED,
        "api_endpoint": world.model.base_url() });
    let id = sidecar.submit_with(&script, json!({ "model_config": model_config })).await;
    let mut stream = sidecar.stream(&id, 0).await;
    stream.until("the search's end", |e| e["type"] == "stdout" && e["data"] == "searched\n").await;
    assert!(assert_absent(world.state.path()) > 5, "the session's files are there to be searched");
    assert_absent(world.workspace.path());
    std::fs::write(world.file("gate"), "").unwrap();
    let events = sidecar.follow(&id).await;
    let found = text_of(&events, "stdout") + &text_of(&events, "stderr");
    assert_eq!(events.last().unwrap()["data"]["status"], "completed");
    for proof in ["sk-the-marker", "/config: 43 HTTP/1.1 200", "/config/providers: 43 HTTP/1.1 200"] {
        assert!(found.contains(proof), "the search did not work: no {proof} in {found}");
    }
    let record = sidecar.get(&format!("/tasks/{id}")).await;
    let log = sidecar.log_so_far();
    assert!(log.len() > 50, "the log is there to be searched");
    let told = events.iter().chain([&record]).map(ToString::to_string).chain(log);
    for line in told {
        assert!(SECRETS.iter().all(|secret| !line.contains(secret)), "{line}");
    }
    // Nothing but the marker, the word that the command line itself looks for, and what the script says.
    let found: BTreeSet<_> = found.lines().filter(|line| !line.starts_with('/')).collect();
    assert_eq!(found, BTreeSet::from(["searched", "sk-the-", "sk-the-marker"]));
    // And yet it is what the provider got.
    assert!(world.model.calls() > 0);
    assert!(world.model.authorization_values().iter().all(|value| value == &format!("Bearer {API_KEY}")));
    sidecar.stop().await;
}
