//! The way out of a session in the sandbox, with the real OpenCode and real tools: what `EGRESS_ALLOW` names is reached
//! by the broker's proxy, and the log says what was refused. The servers are the test's own, and so are the packages.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::sidecar::{As, Sidecar, World, text_of};
use crate::support::site::{self, Site};
use opencode_sidecar::sandbox::Spec;
use opencode_sidecar::scripted::Script;
use opencode_sidecar::tasks::Tasks;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// `SANDBOX` and what it requires are left at their defaults.
const REQUIRED: (&str, &str) = ("SANDBOX", "");

/// A site, and a directory that is in the search path of the sessions, where they find its roots.
struct Outside {
    tasks: Tasks,
    site: Site,
    files: TempDir,
    tools: TempDir,
}

impl Outside {
    async fn new() -> Self {
        let files = tempfile::tempdir().unwrap();
        let tools = tempfile::Builder::new().prefix("oc-tools-").tempdir().unwrap();
        fs::set_permissions(tools.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let tasks = Tasks::new();
        let site = site::serve(&tasks, files.path()).await;
        fs::write(tools.path().join("roots.pem"), &site.roots).unwrap();
        Self { tasks, site, files, tools }
    }

    /// A sidecar that trusts the site's roots, and has these directories before the others in its search path.
    async fn sidecar(&self, world: &World, allow: &str, path: &[&Path]) -> Sidecar {
        let roots = self.tools.path().join("roots.pem");
        let changes = [REQUIRED, ("EGRESS_ALLOW", allow), ("SSL_CERT_FILE", roots.to_str().unwrap())];
        let own = std::env::var_os("PATH").unwrap();
        let all = path.iter().copied().map(Path::to_path_buf).chain([self.tools.path().into()]);
        let path = std::env::join_paths(all.chain(std::env::split_paths(&own))).unwrap();
        world
            .start_by(&changes, |spec| {
                spec.env.retain(|(name, _)| name != "PATH");
                spec.env.push(("PATH".into(), path));
            })
            .await
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.files.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        self.tasks.shutdown_token().cancel();
    }
}

/// What the log says last of each refused `host:port`: why, and how often. How many of the attempts are told together
/// depends on who is faster.
fn refusals(events: &[Value]) -> BTreeMap<String, (String, u64)> {
    let mut refusals = BTreeMap::new();
    for event in events.iter().filter(|event| event["data"]["code"] == "egress_refused") {
        assert_eq!((&event["type"], &event["severity"]), (&json!("log"), &json!("warn")), "{event}");
        let data = &event["data"];
        let text = |name: &str| data[name].as_str().unwrap().to_owned();
        let target = format!("{}:{}", text("host"), data["port"]);
        assert!(text("message").contains(&target), "{event}");
        let count = data["count"].as_u64().unwrap();
        let before = refusals.insert(target, (text("why"), count));
        assert!(before.is_none_or(|(_, before)| before < count), "{events:#?}");
    }
    refusals
}

/// The same, as it is expected.
fn attempts<const N: usize>(expected: [(&str, &str, u64); N]) -> BTreeMap<String, (String, u64)> {
    expected.map(|(target, why, count)| (target.to_owned(), (why.to_owned(), count))).into()
}

/// The arguments of OpenCode's shell tool for a command that may take its time on a busy machine.
fn patient(command: &str) -> Value {
    json!({ "command": command, "timeout": 600_000, "description": "A scripted command" })
}

#[tokio::test]
async fn what_is_named_is_reached_and_the_log_says_what_was_refused() {
    let world = World::new().await;
    let outside = Outside::new().await;
    outside.file("hello", "hello from outside\n");
    let (address, name) = (&outside.site.address, &outside.site.name);
    let probe = format!(
        "curl -sS https://{address}/hello\n\
         curl -sS --noproxy '' https://{name}/hello\n\
         curl -sS https://not.named.example/ || echo \"refused $?\"\n\
         curl -sS https://not.named.example/ || echo \"again $?\"\n\
         curl -sS http://plain.example/\n\
         curl -sS --noproxy '*' https://{address}/hello || echo \"directly $?\"\n\
         curl -sS -x \"http://session:wrong@${{HTTPS_PROXY##*@}}\" https://{address}/hello || echo \"stranger $?\"\n"
    );
    let script = || {
        Script::new()
            .write(&world.path("probe.sh"), &probe)
            .tool("bash", patient("sh probe.sh"))
            .tool("webfetch", json!({ "url": format!("https://{address}/hello"), "format": "text" }))
            .text("done")
    };
    let sidecar = outside.sidecar(&world, &format!("{address},{name}"), &[]).await;
    let ready = sidecar.get("/ready").await["checks"]["sandbox"].clone();
    assert_eq!(ready["status"], "ok", "{ready}");
    let detail = ready["detail"].as_str().unwrap();
    assert!(detail.ends_with("EGRESS_ALLOW opens other hosts (entries: 2)"), "{detail}");
    let events = sidecar.follow(&sidecar.submit(&script()).await).await;
    assert_eq!(events.last().unwrap()["data"]["status"], "completed", "{events:#?}");
    let (said, errors) = (text_of(&events, "stdout"), text_of(&events, "stderr"));
    // 56: the proxy says no; 7: there is no connection.
    let lines: Vec<_> = said.lines().collect();
    let [hello, by_name, refused, again, plain, directly, stranger] = lines[..] else {
        unreachable!("{said} {errors}")
    };
    let wanted = ["hello from outside", "hello from outside", "refused 56", "again 56"];
    assert_eq!([hello, by_name, refused, again], wanted, "{errors}");
    assert!(plain.contains("only https is let out") && plain.contains(address.as_str()), "{plain}");
    assert_eq!([directly, stranger], ["directly 7", "stranger 56"], "{errors}");
    assert_eq!(
        refusals(&events),
        attempts([
            ("not.named.example:443", "not_allowed", 2),
            ("plain.example:80", "plain_http", 1),
            (address, "direct", 1),
        ])
    );
    // OpenCode's own tools go the same way.
    let fetched = events.iter().rfind(|event| event["type"] == "tool_result").unwrap();
    assert!(fetched["data"]["result"].to_string().contains("hello from outside"), "{fetched}");
    assert_eq!(outside.site.connections(), 3, "nobody came directly");
    let metrics = sidecar.http.get(format!("{}/metrics", sidecar.base)).send().await.unwrap().text().await.unwrap();
    for line in ["egress_total{outcome=\"opened\"} 3", "egress_total{outcome=\"refused\"} 4"] {
        assert!(metrics.lines().any(|l| l == format!("opencode_sidecar_{line}")), "{line}\n{metrics}");
    }
    sidecar.stop().await;

    // Without a list nothing is reached, and the model all the same.
    let sidecar = outside.sidecar(&world, "", &[]).await;
    let events = sidecar.follow(&sidecar.submit(&script()).await).await;
    assert_eq!(events.last().unwrap()["data"]["status"], "completed", "{events:#?}");
    let said = text_of(&events, "stdout");
    assert!(said.starts_with("refused 56\nagain 56\n"), "{said}");
    let mut told = refusals(&events);
    // By the proxy, without it, and by OpenCode's own tool.
    let (why, count) = told.remove(address).unwrap();
    assert!(why == "not_allowed" && count >= 3, "{count} {why}");
    assert_eq!(
        told,
        attempts([
            (name.as_str(), "not_allowed", 1),
            ("not.named.example:443", "not_allowed", 2),
            ("plain.example:80", "plain_http", 1),
        ])
    );
    assert_eq!(outside.site.connections(), 3);
    sidecar.stop().await;
}

/// Without a network namespace and without a user of its own, as in a pod of the profile `restricted`.
#[tokio::test]
#[cfg_attr(not(as_root), ignore = "acts as another user, which takes root")]
async fn it_is_the_same_for_an_ordinary_user() {
    let world = World::new().await;
    let outside = Outside::new().await;
    outside.file("hello", "hello from outside\n");
    let address = &outside.site.address;
    let sidecar = world.start_as(As::Nobody, &[REQUIRED, ("EGRESS_ALLOW", address)]).await;
    let probe = format!(
        "curl -sSk https://{address}/hello\n\
         curl -sSk https://not.named.example/ || echo \"refused $?\"\n\
         curl -sSk --noproxy '*' https://{address}/hello || echo \"directly $?\"\n"
    );
    let script = Script::new().write(&world.path("probe.sh"), &probe).tool("bash", patient("sh probe.sh")).text("done");
    let events = sidecar.follow(&sidecar.submit(&script).await).await;
    let said = text_of(&events, "stdout");
    assert_eq!(said, "hello from outside\nrefused 56\ndirectly 7\n", "{}", text_of(&events, "stderr"));
    assert_eq!(refusals(&events), attempts([("not.named.example:443", "not_allowed", 1), (address, "direct", 1)]));
    assert_eq!(outside.site.connections(), 1);
    sidecar.stop().await;
}

/// A person's shell in a session goes the same way.
#[tokio::test]
async fn a_terminal_has_the_way_out_and_not_the_model() {
    use futures_util::SinkExt;
    let world = World::new().await;
    let outside = Outside::new().await;
    outside.file("hello", "hello from outside\n");
    let sidecar = outside.sidecar(&world, &outside.site.address, &[]).await;
    let id = uuid::Uuid::new_v4();
    let (status, made) = sidecar.post("/sessions", json!({ "session_id": id })).await;
    assert_eq!(status, 201, "{made}");
    let mut socket = sidecar.socket(&format!("/sessions/{id}/terminal")).await;
    let line = format!(
        "curl -sS https://{}/hello; env | grep -c OPENCODE_SIDECAR; \
         curl -s -o /dev/null -w '%{{http_code}}\\n' -H \"x-api-key: $(echo $HTTPS_PROXY | sed 's/.*session:\\(.*\\)@.*/\\1/')\" \
         \"http://${{HTTPS_PROXY##*@}}/model/v1/messages\"; echo the-\"\"end\n",
        outside.site.address
    );
    socket.send(line.into_bytes().into()).await.unwrap();
    let mut shown = String::new();
    while !shown.contains("\nthe-end") {
        use futures_util::StreamExt;
        use tokio_tungstenite::tungstenite::Message;
        match crate::support::sidecar::soon("the shell's words", socket.next()).await.unwrap().unwrap() {
            Message::Binary(bytes) => shown.push_str(&String::from_utf8_lossy(&bytes)),
            Message::Close(why) => unreachable!("{why:?} {shown}"),
            _ => {}
        }
    }
    let lines: Vec<_> = shown.lines().map(str::trim).collect();
    // Before it stands what the terminal is told at the end of a line that was typed.
    let at =
        lines.iter().position(|line| line.ends_with("hello from outside")).unwrap_or_else(|| unreachable!("{shown}"));
    assert_eq!(lines[at + 1..at + 4], ["0", "401", "the-end"], "{shown}");
    drop(socket);
    let (status, stopped) = sidecar.post(&format!("/sessions/{id}/stop"), json!({})).await;
    assert_eq!(status, 200, "{stopped}");
    sidecar.stop().await;
}

/// One package of each kind, and where its tool finds it. The files that need no other tool to be made.
fn packages(outside: &Outside, work: &Path) -> String {
    let url = format!("https://{}", outside.site.address);
    let make = |name: &str, content: &str| {
        let path = work.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    make("npm/package/package.json", r#"{"name":"greeting","version":"1.0.0","main":"index.js"}"#);
    make("npm/package/index.js", "module.exports = 'hello from npm';");
    let document = json!({ "name": "greeting", "dist-tags": { "latest": "1.0.0" }, "versions": { "1.0.0": {
        "name": "greeting", "version": "1.0.0", "dist": { "tarball": format!("{url}/files/greeting-1.0.0.tgz") } } } });
    outside.file("npm/greeting", document.to_string());

    make("wheel/greeting.py", "HELLO = 'hello from pip'\n");
    make("wheel/greeting-1.0.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0.0\n");
    make("wheel/greeting-1.0.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n");
    make(
        "wheel/greeting-1.0.0.dist-info/RECORD",
        "greeting.py,,\ngreeting-1.0.0.dist-info/METADATA,,\ngreeting-1.0.0.dist-info/WHEEL,,\ngreeting-1.0.0.dist-info/RECORD,,\n",
    );
    let wheel = "greeting-1.0.0-py3-none-any.whl";
    outside.file("simple/greeting/index.html", format!("<!DOCTYPE html><a href=\"/files/{wheel}\">{wheel}</a>"));

    make("greeting-1.0.0/Cargo.toml", "[package]\nname = \"greeting\"\nversion = \"1.0.0\"\nedition = \"2024\"\n");
    make("greeting-1.0.0/src/lib.rs", "pub const HELLO: &str = \"hello from cargo\";\n");
    outside.file("index/config.json", json!({ "dl": format!("{url}/files/{{crate}}-{{version}}.crate") }).to_string());

    make("repository/hello", "hello from git\n");
    outside.file("files/none", "");
    url
}

/// Packs them, with the tools that everybody packs them with.
const PACK: &str = r#"set -e
tar -C npm -czf "$FILES/files/greeting-1.0.0.tgz" package
(cd wheel && python3 -m zipfile -c "$FILES/files/greeting-1.0.0-py3-none-any.whl" greeting.py greeting-1.0.0.dist-info)
tar -czf "$FILES/files/greeting-1.0.0.crate" greeting-1.0.0
cd repository
git init -q -b main . && git add . && git -c user.name=a -c user.email=a@b.example commit -qm hello
git clone -q --bare . "$FILES/greeting.git" && git -C "$FILES/greeting.git" update-server-info
"#;

/// What the agent runs: nothing in it knows of a proxy or of roots.
const WORK: &str = r#"
echo "== npm"
mkdir js && cd js && echo '{}' > package.json
npm install --loglevel error --registry "$URL/npm/" greeting >&2 && node -p 'require("greeting")'
cd ..
echo "== pip"
python3 -m pip install -q --target py --index-url "$URL/simple/" greeting \
  && PYTHONPATH=py python3 -c 'import greeting; print(greeting.HELLO)'
echo "== cargo"
mkdir -p rs/src rs/.cargo && cd rs
printf '[registries.site]\nindex = "sparse+%s/index/"\n' "$URL" > .cargo/config.toml
printf '[package]\nname = "app"\nversion = "1.0.0"\nedition = "2024"\n[dependencies]\ngreeting = { version = "1", registry = "site" }\n' > Cargo.toml
echo 'fn main() { println!("{}", greeting::HELLO); }' > src/main.rs
cargo run -q
cd ..
echo "== git"
git clone -q "$URL/greeting.git" cloned && cat cloned/hello
echo "== refused"
npm install --loglevel error --fetch-retries 0 --registry https://npm.example/ greeting || echo npm
python3 -m pip install -q --retries 0 --target none --index-url https://pip.example/simple/ greeting || echo pip
git clone -q https://git.example/x.git || echo git
"#;

/// The Rust toolchain that builds this test, where sessions may read it: that of `rustup` lies in a person's directory.
fn toolchain(to: &Path) -> [PathBuf; 2] {
    let cargo = Path::new(env!("CARGO"));
    let from = cargo.parent().unwrap().parent().unwrap();
    let (bin, lib) = (to.join("bin"), to.join("lib"));
    fs::create_dir_all(&bin).unwrap();
    for program in ["cargo", "rustc"] {
        same(&from.join("bin").join(program), &bin.join(program));
    }
    same(&from.join("lib"), &lib);
    [bin, lib]
}

/// The same files at another place.
fn same(from: &Path, to: &Path) {
    if from.is_dir() {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            same(&entry.path(), &to.join(entry.file_name()));
        }
    } else if fs::hard_link(from, to).is_err() {
        fs::copy(from, to).unwrap();
    }
}

#[tokio::test]
async fn npm_pip_cargo_and_git_work_through_it() {
    let world = World::new().await;
    let outside = Outside::new().await;
    let work = tempfile::tempdir().unwrap();
    let url = packages(&outside, work.path());
    let mut pack = Spec::new("pack", "sh");
    pack.args = vec!["-c".into(), PACK.into()];
    pack.env = vec![
        ("PATH".into(), std::env::var_os("PATH").unwrap()),
        ("HOME".into(), work.path().into()),
        ("FILES".into(), OsString::from(outside.files.path())),
    ];
    pack.cwd = work.path().into();
    let packed = world.sandbox().run(pack, Duration::from_secs(60)).await.unwrap();
    assert!(packed.exit.success(), "{}", String::from_utf8_lossy(&packed.stderr));
    let checksum = fs::read(outside.files.path().join("files/greeting-1.0.0.crate")).unwrap();
    let checksum: String = Sha256::digest(checksum).iter().map(|byte| format!("{byte:02x}")).collect();
    let line =
        json!({ "name": "greeting", "vers": "1.0.0", "deps": [], "cksum": checksum, "features": {}, "yanked": false });
    outside.file("index/gr/ee/greeting", line.to_string());

    let rust = toolchain(outside.tools.path());
    let sidecar = outside.sidecar(&world, &outside.site.address, &[&rust[0], &rust[1]]).await;
    let script = Script::new()
        .write(&world.path("work.sh"), &format!("URL={url}\n{WORK}"))
        .tool("bash", patient("sh work.sh"))
        .text("done");
    let events = sidecar.follow(&sidecar.submit(&script).await).await;
    assert_eq!(events.last().unwrap()["data"]["status"], "completed", "{events:#?}");
    let (said, errors) = (text_of(&events, "stdout"), text_of(&events, "stderr"));
    let wanted = "== npm\nhello from npm\n== pip\nhello from pip\n== cargo\nhello from cargo\n== git\nhello from git\n\
                  == refused\nnpm\npip\ngit\n";
    assert_eq!(said, wanted, "{errors}");
    assert_eq!(
        refusals(&events).into_keys().collect::<Vec<_>>(),
        ["git.example:443", "npm.example:443", "pip.example:443"]
    );
    sidecar.stop().await;
}
