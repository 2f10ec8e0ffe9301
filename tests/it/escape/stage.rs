//! Where attacks take place: a sidecar that runs in one of three ways, a neighbour that works all the time, and what
//! lies around.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::sidecar::{Sidecar, World, opencode, soon};
use nix::unistd::{Gid, Uid, chown};
use opencode_sidecar::sandbox::{Process, Spec, User};
use opencode_sidecar::scripted::Script;
use opencode_sidecar::tasks::Tasks;
use secrecy::ExposeSecret;
use serde_json::json;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// Who the sidecar is where it is not root.
const NOBODY: u32 = 65_534;

/// How the sidecar runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum As {
    /// As whoever runs the tests.
    Here,
    /// Another user than root, without capabilities. Nothing else is taken away.
    OrdinaryUser,
    /// The same, with nothing in the bounding set, and with every tree of control groups mounted read-only.
    Container,
}

pub(super) struct Stage {
    pub(super) world: World,
    pub(super) sidecar: Sidecar,
    neighbour: String,
    outside: TempDir,
    /// One that no attack may end, and one that some try to.
    victims: [Process; 2],
    listeners: Vec<TcpListener>,
    sockets: Vec<UnixListener>,
    _terminal: [std::os::fd::OwnedFd; 2],
    tasks: Tasks,
}

/// Gives everything beneath to the sidecar's user.
fn give(path: &Path, who: As) {
    if who != As::Here {
        chown(path, Some(Uid::from_raw(NOBODY)), Some(Gid::from_raw(NOBODY))).unwrap();
        for entry in fs::read_dir(path).into_iter().flatten() {
            give(&entry.unwrap().path(), who);
        }
    }
}

/// A file where everybody can execute it.
fn public(from: &Path, directory: &Path) -> PathBuf {
    let to = directory.join(from.file_name().unwrap());
    if fs::hard_link(from, &to).is_err() {
        fs::copy(from, &to).unwrap();
    }
    to
}

fn file(path: &Path, content: &str, mode: u32) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// Postgres by TCP, for a sidecar that may not enter its directory, and for the attacker to find.
async fn relay(tasks: &Tasks, socket: PathBuf) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (stop, connections) = (tasks.shutdown_token().clone(), tasks.clone());
    let serve = async move {
        while let Ok((mut outside, _)) = listener.accept().await {
            let socket = socket.clone();
            connections.spawn("a connection to Postgres", async move {
                let Ok(mut inside) = tokio::net::UnixStream::connect(socket).await else { return };
                // A side that goes away is the other one's business.
                let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
            });
        }
    };
    tasks.spawn("relay", async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = serve => {}
        }
    });
    port
}

fn environment(pid: u32) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    text.split('\0').filter_map(|entry| entry.split_once('=')).map(|(n, v)| (n.to_owned(), v.to_owned())).collect()
}

/// The number that follows a mark.
fn number_after(text: &str, mark: &str) -> u16 {
    let digits: String = text.split_once(mark).unwrap().1.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

/// A mount namespace of its own in which every tree of control groups can be read alone.
pub(crate) const READ_ONLY_GROUPS: &str = "mount --make-rprivate / && \
    for at in $(awk '$3 ~ /^cgroup2?$/ { print $2 }' /proc/mounts); do mount -o remount,bind,ro $at || exit; done && ";

/// What starts the sidecar of this kind in the place of `spec`'s own program.
pub(crate) fn adjust(who: As, programs: &Path, spec: &mut Spec) {
    if who == As::Here {
        return;
    }
    let sidecar = public(Path::new(env!("CARGO_BIN_EXE_opencode-sidecar")), programs);
    spec.cwd = "/".into();
    if who == As::OrdinaryUser {
        spec.program = sidecar;
        spec.user = Some(User { uid: NOBODY, gid: NOBODY });
        return;
    }
    let script = READ_ONLY_GROUPS.to_owned()
        + "exec setpriv --reuid \"$1\" --regid \"$1\" --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs \
        \"$2\" serve";
    spec.program = "unshare".into();
    let uid = NOBODY.to_string();
    let args: [&str; 6] = ["-m", "sh", "-c", &script, "sh", &uid];
    spec.args = args.iter().map(OsString::from).chain([sidecar.into()]).collect();
}

/// The arguments of OpenCode's shell tool for a command that takes its time: it would be ended after two minutes.
pub(crate) fn patient(command: &str) -> serde_json::Value {
    json!({ "command": command, "timeout": 900_000, "description": "A scripted command" })
}

impl Stage {
    pub(super) async fn set(who: As, sandbox: &str) -> Self {
        let world = World::new().await;
        let tasks = Tasks::new();
        let outside = tempfile::Builder::new().prefix("oc-escape-").tempdir().unwrap();
        let out = |name: &str| outside.path().join(name);
        for name in ["file", "scratch", "removable", "movable", "swap", "dir/inner", "private/file"] {
            fs::create_dir_all(out(name).parent().unwrap()).unwrap();
            file(&out(name), "outside", 0o666);
        }
        file(&out("run"), "#!/bin/sh\n", 0o777);
        fs::set_permissions(out("private"), Permissions::from_mode(0o700)).unwrap();
        for directory in ["work", "other"] {
            fs::create_dir(world.file(directory)).unwrap();
        }
        file(&world.file("outside"), "not of this workdir", 0o666);
        file(&world.file("other/secret"), "the neighbour's", 0o666);
        fs::copy(std::env::current_exe().unwrap(), world.file("work/program")).unwrap();
        std::os::unix::fs::symlink(outside.path(), world.file("work/link-for-tools")).unwrap();
        for directory in [outside.path(), world.workspace.path(), world.state.path()] {
            give(directory, who);
            fs::set_permissions(directory, Permissions::from_mode(0o777)).unwrap();
        }
        fs::copy("/bin/cat", world.file("work/suid-cat")).unwrap();
        fs::set_permissions(world.file("work/suid-cat"), Permissions::from_mode(0o4755)).unwrap();

        let url = url::Url::parse(world.database().url.expose_secret()).unwrap();
        let (_, directory) = url.query_pairs().find(|(name, _)| name == "host").unwrap();
        let socket = Path::new(&*directory).join(".s.PGSQL.5432");
        let postgres = relay(&tasks, socket.clone()).await;
        let mut by_tcp = url.clone();
        by_tcp.set_query(None);
        by_tcp.set_host(Some("127.0.0.1")).unwrap();
        by_tcp.set_port(Some(postgres)).unwrap();

        let programs = out("programs");
        fs::create_dir(&programs).unwrap();
        fs::set_permissions(&programs, Permissions::from_mode(0o755)).unwrap();
        let command = public(&opencode(), &programs);
        let changes =
            [("SANDBOX", sandbox), ("DATABASE_URL", by_tcp.as_str()), ("OPENCODE_COMMAND", command.to_str().unwrap())];
        let sidecar = world.start_by(&changes, |spec| adjust(who, &programs, spec)).await;

        let wait = "echo up; until [ -e done ]; do sleep 0.05; done";
        let script = Script::new().tool("bash", patient(wait)).text("fine");
        let neighbour = sidecar.submit_with(&script, json!({ "workdir": "other" })).await;
        let mut events = sidecar.stream(&neighbour, 0).await;
        events.until("the neighbour's word", |event| event["type"] == "stdout").await;
        let [pid] = sidecar.opencodes()[..] else { unreachable!("{:?}", sidecar.descendants()) };
        let theirs = environment(pid);
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let jail = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim();
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        let broker = number_after(&theirs["OPENCODE_CONFIG_CONTENT"], "http://127.0.0.1:");

        let listen = |at: (&str, u16)| {
            let listener = TcpListener::bind(at).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        };
        let listeners = vec![listen(("127.0.0.2", broker))];
        let name = uuid::Uuid::new_v4().to_string();
        let sockets = vec![
            UnixListener::bind(out("socket")).unwrap(),
            UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap(),
        ];
        fs::set_permissions(out("socket"), Permissions::from_mode(0o777)).unwrap();
        let free = listen(("127.0.0.1", 0)).local_addr().unwrap().port();
        let terminal = nix::pty::openpty(None, None).unwrap();
        let path = nix::unistd::ttyname(&terminal.slave).unwrap();
        give(&path, who);
        let victims = [victim(&world, who).await, victim(&world, who).await];

        let executable = fs::read_link(format!("/proc/{}/exe", sidecar.pid())).unwrap();
        let text = |text: &Path| text.to_str().unwrap().to_owned();
        let variables = [
            ("OUT", text(outside.path())),
            ("WS", world.path("")),
            ("STATE", text(world.state.path())),
            ("SIDECAR", sidecar.pid().to_string()),
            ("SIDECAR_PORT", sidecar.address().rsplit(':').next().unwrap().to_owned()),
            ("SIDECAR_EXE", text(&executable)),
            ("JAIL", jail.to_owned()),
            ("NEIGHBOUR", pid.to_string()),
            ("NEIGHBOUR_ROOT", text(Path::new(&theirs["HOME"]).parent().unwrap())),
            ("NEIGHBOUR_PORT", number_after(&line, "--port\0").to_string()),
            ("NEIGHBOUR_PASSWORD", theirs["OPENCODE_SERVER_PASSWORD"].clone()),
            ("VICTIM", victims[0].pid().to_string()),
            ("SHOT", victims[1].pid().to_string()),
            ("POSTGRES_PORT", postgres.to_string()),
            ("POSTGRES_SOCKET", text(&socket)),
            ("BROKER_PORT", broker.to_string()),
            ("FREE_PORT", free.to_string()),
            ("ABSTRACT", name),
            ("TERMINAL", text(&path)),
        ];
        let variables: String = variables.iter().map(|(name, value)| format!("export {name}='{value}'\n")).collect();
        file(&world.file("work/attack.sh"), &(variables + &super::script()), 0o755);
        let terminal = [terminal.master, terminal.slave];
        Self { world, sidecar, neighbour, outside, victims, listeners, sockets, _terminal: terminal, tasks }
    }

    pub(super) fn port(&self) -> &str {
        self.sidecar.address().rsplit(':').next().unwrap()
    }

    /// Nobody has connected where nobody may, nothing outside is changed, and both who were shot at live.
    pub(super) fn nobody_came(&self) {
        for listener in &self.listeners {
            assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        }
        for socket in &self.sockets {
            socket.set_nonblocking(true).unwrap();
            assert_eq!(socket.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        }
        for victim in &self.victims {
            assert!(Path::new(&format!("/proc/{}/exe", victim.pid())).exists());
        }
        for name in ["file", "scratch", "removable", "movable", "swap", "dir/inner"] {
            assert_eq!(fs::read_to_string(self.outside.path().join(name)).unwrap(), "outside", "{name}");
        }
        let names = fs::read_dir(self.outside.path()).unwrap().count();
        assert_eq!(names, 10, "something was made outside");
    }

    /// The neighbour has not noticed anything, the sidecar neither, and nothing is left.
    pub(super) async fn strike(self) {
        File::create(self.world.file("other/done")).unwrap();
        let events = self.sidecar.follow(&self.neighbour).await;
        assert_eq!(events.last().unwrap()["data"]["status"], "completed", "{:#?}", events.last());
        assert_eq!(self.sidecar.get("/health").await["status"], "ok");
        for victim in self.victims {
            soon("the end of a victim", victim.kill(Duration::from_secs(30))).await.unwrap();
        }
        self.sidecar.stop().await;
        self.tasks.shutdown_token().cancel();
    }
}

/// A process of the sidecar's own user that has nothing to do with it.
async fn victim(world: &World, who: As) -> Process {
    let mut spec = Spec::new("victim", "/bin/sleep");
    spec.args = vec!["1000".into()];
    spec.user = (who != As::Here).then_some(User { uid: NOBODY, gid: NOBODY });
    world.sandbox().start(spec).await.unwrap()
}
