//! Who a confined program is, and whom it can do something to.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use super::bench::{Bench, SESSION, public_copy};
use super::program;
use opencode_sidecar::sandbox::confine::{Confined, Namespace, Protection};
use opencode_sidecar::sandbox::{Sandbox, Spec, User};
use opencode_sidecar::tasks::Tasks;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

const STATUS: &str = "grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp):' /proc/self/status";

fn field<'a>(status: &'a str, name: &str) -> Vec<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap().split_whitespace().collect()
}

fn assert_powerless(status: &str) {
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(status, set), ["0000000000000000"], "{status}");
    }
    assert_eq!((field(status, "NoNewPrivs"), field(status, "Seccomp")), (vec!["1"], vec!["2"]), "{status}");
}

#[tokio::test]
async fn there_is_no_capability_left_for_root_either() {
    let bench = Bench::new();
    let status = bench.run(bench.sh(STATUS)).await;
    assert_powerless(&status);
    if cfg!(as_root) {
        assert_eq!(field(&status, "CapBnd"), ["0000000000000000"], "{status}");
    }
    let confined = bench.confined(bench.sh("sleep 1000")).await;
    assert!(confined.has(Protection::Capabilities) && confined.has(Protection::NoNewPrivs));
    assert!(!confined.has(Protection::Uid), "it has no user of its own");
    bench.stop().await;
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "acts as another user, which takes root")]
async fn a_user_of_its_own_with_the_groups_that_it_is_given() {
    let bench = Bench::new();
    let mut spec = bench.as_user(bench.sh(STATUS));
    spec.confinement.as_mut().unwrap().groups = vec![54_500, 54_501];
    spec.confinement.as_mut().unwrap().require = [Protection::Uid].into();
    let status = bench.run(spec.clone()).await;
    assert_powerless(&status);
    let (uid, gid) = (SESSION.uid.to_string(), SESSION.gid.to_string());
    assert_eq!(field(&status, "Uid"), [uid.as_str(); 4]);
    assert_eq!(field(&status, "Gid"), [gid.as_str(); 4]);
    assert_eq!(field(&status, "Groups"), ["54500", "54501"]);
    spec.args[1] = "sleep 1000".into();
    let confined = bench.confined(spec).await;
    assert!(confined.has(Protection::Uid) && confined.has(Protection::Scope), "{confined:?}");
    bench.stop().await;
}

/// A setuid program gives nothing: it runs as who started it.
#[tokio::test]
#[cfg_attr(not(as_root), ignore = "makes a program of root's, which takes root")]
async fn a_setuid_program_gives_nothing() {
    let bench = Bench::new();
    let id = public_copy("/usr/bin/id".as_ref(), &bench.own);
    std::fs::set_permissions(&id, PermissionsExt::from_mode(0o4755)).unwrap();
    let spec = bench.as_user(bench.sh("./id -u"));
    // Giving the directory away has left the file root's.
    assert_eq!(bench.run(spec.clone()).await.trim(), SESSION.uid.to_string());
    assert_eq!(bench.run(Spec { confinement: None, ..spec }).await.trim(), "0", "the program works otherwise");
    bench.stop().await;
}

#[tokio::test]
async fn no_signal_reaches_a_process_outside() {
    let bench = Bench::new();
    let mut other = bench.sh("sleep 1000");
    other.confinement = None;
    let other = bench.sandbox.start(other).await.unwrap();
    let spec = bench.program("kill", &[other.pid().to_string()]);
    assert_eq!(bench.told(spec.clone()).await, ["EPERM"]);
    assert_eq!(bench.told(Spec { confinement: None, ..spec }).await, ["ok"]);
    for script in [
        "cat /proc/{}/environ",
        "cat /proc/{}/mem",
        "readlink /proc/{}/fd/0 || echo permission denied",
        "ls /proc/{}/cwd/",
        "cat /proc/{}/maps",
    ] {
        let script = script.replace("{}", &other.pid().to_string());
        let said = bench.run(bench.sh(&script)).await;
        assert!(said.contains("ermission denied"), "{script}: {said}");
    }
    // A neighbour that is confined itself is no nearer.
    let neighbour = bench.sandbox.start(bench.sh("sleep 1000")).await.unwrap();
    assert_eq!(bench.told(bench.program("kill", &[neighbour.pid().to_string()])).await, ["EPERM"]);
    for process in [other, neighbour] {
        process.kill(super::bench::DEADLINE).await.unwrap();
    }
    bench.stop().await;
}

#[tokio::test]
async fn a_host_offers_what_a_confined_program_gets() {
    let bench = Bench::new();
    let offers = bench.sandbox.offers().await.unwrap();
    let mut spec = bench.sh("sleep 1000");
    spec.confinement.as_mut().unwrap().network.namespace = Namespace::Own;
    assert_eq!(offers.confined, bench.confined(spec).await);
    assert_eq!(offers.host.switches_users, cfg!(as_root));
    assert_eq!(offers.host.user_notification, offers.confined.has(Protection::Egress));
    // The same question, asked with a program that is not ours.
    for (flag, offered) in [("-U", offers.host.user_namespace), ("-Un", offers.host.network_namespace)] {
        let mut spec = bench.sh(&format!("unshare {flag} true"));
        spec.confinement = None;
        let works = bench.sandbox.run(spec, super::bench::DEADLINE).await.unwrap().exit.success();
        assert_eq!(works, offered, "{flag}: {offers:?}");
    }
    bench.stop().await;
}

/// The whole of it under a sidecar that is an ordinary user: no other user for its programs, and the rest as it was.
#[tokio::test]
#[cfg_attr(not(as_root), ignore = "acts as another user, which takes root")]
async fn an_ordinary_user_confines_as_well() {
    const NOBODY: User = User { uid: 65_534, gid: 65_534 };
    let bench = Bench::new();
    std::os::unix::fs::chown(&bench.own, Some(NOBODY.uid), Some(NOBODY.gid)).unwrap();
    let jail = public_copy(env!("CARGO_BIN_EXE_opencode-sidecar").as_ref(), &bench.outside(""));
    let broker = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let elsewhere = std::net::TcpListener::bind(("127.0.0.2", broker.local_addr().unwrap().port())).unwrap();
    let addresses = [&broker, &elsewhere].map(|listener| listener.local_addr().unwrap().to_string());
    let mut spec = bench.program("unprivileged", &[]);
    // Where this test's own binary lies, nobody else may look.
    spec.program = public_copy(&program::executable(), &bench.outside(""));
    let args = [jail.to_str().unwrap(), bench.own.to_str().unwrap(), &addresses[0], &addresses[1]].map(str::to_owned);
    spec.env = program::environment("unprivileged", &args);
    spec.user = Some(NOBODY);
    spec.confinement = None;
    let told = bench.told(spec).await;
    assert_eq!(told, ["65534", "secret kept", "ok EACCES", "EPERM", "no uid"]);
    bench.stop().await;
}

/// The program of the test above: a sidecar's sandbox in a process of an ordinary user.
pub(super) async fn as_an_ordinary_user(args: &[&str]) {
    let [jail, own, broker, elsewhere] = args else { unreachable!("{args:?}") };
    let tasks = Tasks::new();
    let sandbox = Sandbox::new(PathBuf::from(jail), tasks.clone()).unwrap();
    let mut bench = Bench::at(tasks, own.into());
    bench.sandbox = sandbox;
    let status = bench.run(bench.sh(STATUS)).await;
    assert_powerless(&status);
    println!("told: {}", field(&status, "Uid")[0]);
    std::fs::write(bench.outside("secret"), "s").unwrap();
    let said = bench.run(bench.sh(&format!("cat {}", bench.outside("secret").display()))).await;
    println!("told: {}", if said.contains("Permission denied") { "secret kept" } else { "secret told" });
    let mut spec = bench.program("connect", &[(*broker).to_owned(), (*elsewhere).to_owned()]);
    spec.confinement.as_mut().unwrap().network.connect = vec![broker.parse().unwrap()];
    println!("told: {}", bench.told(spec).await.join(" "));
    println!("told: {}", bench.told(bench.program("kill", &[std::process::id().to_string()])).await.join(" "));
    let confined: Confined = bench.confined(bench.sh("sleep 1000")).await;
    println!("told: {}", if confined.has(Protection::Uid) { "uid" } else { "no uid" });
}
