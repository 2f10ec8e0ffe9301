//! The provider's key stays in the sidecar: a session that looks for it everywhere finds nothing.

use crate::support::sidecar::{API_KEY, World, text_of};
use opencode_sidecar::scripted::Script;
use std::path::Path;

/// What a hostile shell command can look at. The sandbox is another matter: here the agent is its own worst case. It
/// looks for whatever begins like the key, and for a marker of its own, to show that it would find it.
const SEARCH: &str = r#"
echo "sk-""the-marker" > "$HOME/marker"
look() { grep -a -o 'sk-the-[-a-z0-9]*'; }
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
                let found = content.windows(API_KEY.len()).any(|window| window == API_KEY.as_bytes());
                assert!(!found, "the key is in {}", path.display());
            }
            _ => {}
        }
    }
    files
}

#[tokio::test]
async fn the_key_is_nowhere_in_the_session() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let script = Script::new().bash(SEARCH).bash("echo searched; until [ -e gate ]; do sleep 0.02; done").text("done");
    let id = sidecar.submit(&script).await;
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
    assert!(!found.contains(API_KEY));
    for event in &events {
        assert!(!event.to_string().contains(API_KEY), "{event}");
    }
    let record = sidecar.get(&format!("/tasks/{id}")).await;
    assert!(!record.to_string().contains(API_KEY));
    // And yet it is what the provider got.
    assert!(world.model.calls() > 0);
    assert!(world.model.authorization_values().iter().all(|value| value == &format!("Bearer {API_KEY}")));
    sidecar.stop().await;
}
