//! A program with a terminal of its own.

use super::{Bench, DEADLINE};
use opencode_sidecar::sandbox::confine::{Confinement, Files};
use opencode_sidecar::sandbox::{Process, Spec, Terminal, TerminalSize, User};
use std::time::Duration;

const SIZE: TerminalSize = TerminalSize { columns: 40, rows: 10 };

async fn start(bench: &Bench, spec: Spec) -> (Process, Terminal) {
    let mut process = bench.sandbox.start(Spec { terminal: Some(SIZE), ..spec }).await.unwrap();
    let terminal = process.take_terminal().unwrap();
    assert!(process.take_stdout().is_none() && process.take_stderr().is_none() && process.take_terminal().is_none());
    (process, terminal)
}

/// Everything up to the end.
async fn shown(terminal: &Terminal) -> String {
    let mut shown = Vec::new();
    let mut buffer = [0; 1000];
    loop {
        match tokio::time::timeout(DEADLINE, terminal.read(&mut buffer)).await.unwrap().unwrap() {
            0 => return String::from_utf8(shown).unwrap(),
            count => shown.extend_from_slice(&buffer[..count]),
        }
    }
}

/// The ways in which a program is started: free and confined.
fn ways() -> [Option<Confinement>; 2] {
    let paths = |paths: &[&str]| paths.iter().map(Into::into).collect();
    let files = Files {
        execute: paths(&["/usr", "/bin", "/lib", "/lib64", "/etc", "/proc"]),
        write: Vec::new(),
        devices: paths(&["/dev/null", "/dev/tty", "/dev/pts"]),
    };
    [None, Some(Confinement { files, ..Confinement::default() })]
}

#[tokio::test]
async fn it_is_what_the_program_reads_and_writes_and_is_controlled_by() {
    for confinement in ways() {
        let bench = Bench::new();
        let script = "read line; tty; stty size; echo to-tty > /dev/tty; echo err >&2; echo \"[$line]\"; ps -o tty=,sid=,pgid=,tpgid= -p $$; echo $$";
        let (process, terminal) = start(&bench, Spec { confinement, ..bench.sh(script) }).await;
        terminal.write_all(b"typed\n").await.unwrap();
        let shown = shown(&terminal).await;
        let lines: Vec<_> = shown.lines().collect();
        assert_eq!(lines[0], "typed", "the echo");
        let name = lines[1].strip_prefix("/dev/").unwrap();
        assert_eq!(lines[2..6], ["10 40", "to-tty", "err", "[typed]"]);
        let (leads, pid) = (lines[6].split_whitespace().collect::<Vec<_>>(), lines[7]);
        assert_eq!(leads, [name, pid, pid, pid], "it leads its session, and the terminal's foreground");
        assert!(process.exited().await.success());
        process.gone().await;
        bench.nothing_is_left().await;
    }
}

#[tokio::test]
async fn when_our_side_is_dropped_it_hangs_up() {
    let bench = Bench::new();
    let (process, terminal) = start(&bench, bench.sh("sleep 1000")).await;
    drop(terminal);
    let exit = tokio::time::timeout(DEADLINE, process.exited()).await.unwrap();
    assert_eq!(exit.signal, Some(nix::libc::SIGHUP));
    process.gone().await;
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn nothing_is_typed_to_a_program_that_is_gone() {
    let bench = Bench::new();
    let (process, terminal) = start(&bench, bench.sh("stty raw -echo; echo ready; exec sleep 1000")).await;
    let mut buffer = [0; 100];
    assert!(terminal.read(&mut buffer).await.unwrap() > 0);
    // More than a terminal keeps: it waits, and hears of the end.
    let much = vec![b'x'; 1 << 20];
    let typed = terminal.write_all(&much);
    tokio::pin!(typed);
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut typed).await.is_err(), "nobody reads it");
    process.kill(DEADLINE).await.unwrap();
    assert!(tokio::time::timeout(DEADLINE, typed).await.unwrap().is_err());
    bench.nothing_is_left().await;
}

/// Once nobody holds it, it has hung up for us, also where somebody takes it up again. Nobody waits without end for it, nor
/// asks without end.
#[tokio::test]
async fn what_everybody_let_go_of_is_over() {
    let bench = Bench::new();
    let directory = tempfile::tempdir().unwrap();
    let gate = directory.path().join("gate");
    let script = format!(
        "tty=$(tty); exec < /dev/null > /dev/null 2>&1; until [ -e {} ]; do sleep 0.02; done; echo again > $tty; \
         exec > $tty; sleep 1000",
        gate.display()
    );
    let (process, terminal) = start(&bench, bench.sh(&script)).await;
    assert_eq!(shown(&terminal).await, "");
    std::fs::write(&gate, "").unwrap();
    let again = async {
        let mut all = String::new();
        while all != "again\r\n" {
            all += &shown(&terminal).await;
        }
    };
    tokio::time::timeout(DEADLINE, again).await.unwrap();
    assert!(tokio::time::timeout(DEADLINE, terminal.write_all(b"x")).await.unwrap().is_err());
    process.kill(DEADLINE).await.unwrap();
    bench.nothing_is_left().await;
}

/// Another user's program may open its terminal by name, and nobody else's may.
#[tokio::test]
#[cfg_attr(not(as_root), ignore = "acts as another user, which takes root")]
async fn it_belongs_to_the_programs_user() {
    for confinement in ways() {
        let bench = Bench::new();
        let user = Some(User { uid: 65_534, gid: 65_534 });
        let script = "exec > $(tty); stat -c '%u %g %a' $(tty)";
        let (process, terminal) = start(&bench, Spec { user, confinement, ..bench.sh(script) }).await;
        assert_eq!(shown(&terminal).await, "65534 65534 600\r\n");
        assert!(process.exited().await.success());
        process.gone().await;
        bench.nothing_is_left().await;
    }
}
