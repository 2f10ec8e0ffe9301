//! The list of denied calls, in force.

use super::bench::Bench;
use opencode_sidecar::sandbox::Spec;
use opencode_sidecar::sandbox::confine::{Denied, Protection, denied};

/// What every denied call has to answer.
fn wanted() -> Vec<String> {
    let mut wanted = Vec::new();
    for Denied { call, answer, when, .. } in denied() {
        if call.parse::<syscalls::Sysno>().is_ok() {
            let errno = nix::errno::Errno::from_raw(answer.errno());
            wanted.extend(std::iter::repeat_n(format!("{call} {errno:?}"), when.len().max(1)));
        }
    }
    wanted.extend([470, 9_999, 0x4000_0000 | 39].map(|number: i64| format!("{number} ENOSYS")));
    wanted
}

#[tokio::test]
async fn every_denied_call_answers_as_the_list_says() {
    let bench = Bench::new();
    let spec = bench.program("denied", &[]);
    assert_eq!(bench.told(spec.clone()).await, wanted());
    // Without the filter the kernel itself says otherwise, where it can be asked: this test can tell the difference.
    let harmless = ["unshare", "seccomp", "personality", "sendto", "clone3", "keyctl", "name_to_handle_at", "shmget"];
    let names: Vec<String> = harmless.map(str::to_owned).into();
    let free = bench.told(Spec { confinement: None, ..bench.program("denied", &names) }).await;
    for call in harmless {
        let name = format!("{call} ");
        let denied = wanted().into_iter().find(|line| line.starts_with(&name));
        assert!(free.iter().any(|line| line.starts_with(&name) && Some(line) != denied.as_ref()), "{call}: {free:?}");
    }
    bench.stop().await;
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "acts as another user, which takes root")]
async fn every_denied_call_answers_so_to_a_user_of_its_own() {
    let bench = Bench::new();
    let spec = bench.as_user(bench.program("denied", &[]));
    assert_eq!(bench.told(spec).await, wanted());
    bench.stop().await;
}

/// What the filter lets through still works: threads (whose clone3 is refused first), processes, sockets.
#[tokio::test]
async fn sockets_are_of_tcp_or_pairs() {
    let bench = Bench::new();
    let told = bench.told(bench.program("sockets", &[])).await;
    let none = ["mptcp", "sctp", "smc", "udp", "ping", "raw", "vsock", "netlink", "packet", "crypto", "unix"];
    let mut wanted = vec!["tcp ok".to_owned(), "tcp6 ok".to_owned()];
    wanted.extend(none.map(|kind| format!("{kind} EAFNOSUPPORT")));
    wanted.extend(["pair ok", "packets ok", "datagrams EAFNOSUPPORT", "raw-pair EAFNOSUPPORT"].map(str::to_owned));
    assert_eq!(told, wanted);
    let free = bench.told(Spec { confinement: None, ..bench.program("sockets", &[]) }).await;
    for open in ["udp ok", "netlink ok", "unix ok", "datagrams ok", "raw-pair ok"] {
        assert!(free.iter().any(|line| line == open), "without confinement: {free:?}");
    }
    assert!(bench.confined(bench.sh("sleep 1000")).await.has(Protection::Seccomp));
    bench.stop().await;
}

#[tokio::test]
#[cfg_attr(not(target_arch = "x86_64"), allow(unused, reason = "only x86 has that door"))]
async fn the_door_for_32_bit_programs_kills() {
    let bench = Bench::new();
    let exit = |spec| async { bench.sandbox.run(spec, super::bench::DEADLINE).await.map(|output| output.exit) };
    #[cfg(target_arch = "x86_64")]
    {
        let free = exit(Spec { confinement: None, ..bench.program("i386", &[]) }).await;
        // A kernel without that door ends it by another signal.
        assert!(free.is_ok_and(|exit| exit.signal != Some(nix::libc::SIGSYS)));
        let confined = exit(bench.program("i386", &[])).await;
        assert!(confined.is_ok_and(|exit| exit.signal == Some(nix::libc::SIGSYS)));
    }
    bench.stop().await;
}
