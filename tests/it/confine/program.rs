//! The program that is confined: this test binary again, started with one test alone. It tries something with the
//! kernel's bare calls, and tells how it went in lines that begin with a mark.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use nix::errno::Errno;
use nix::libc;
use opencode_sidecar::sandbox::confine::{Denied, Test, denied};
use std::ffi::OsString;
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

const WHAT: &str = "CONFINED_PROGRAM";
const ARGS: &str = "CONFINED_PROGRAM_ARGS";
const MARK: &str = "told: ";

pub(super) fn executable() -> PathBuf {
    std::env::current_exe().unwrap()
}

pub(super) fn arguments() -> Vec<OsString> {
    ["--exact", "confine::program::a_program_tells_what_it_was_started_for", "--nocapture"].map(Into::into).into()
}

pub(super) fn environment(what: &str, args: &[String]) -> Vec<(OsString, OsString)> {
    vec![(WHAT.into(), what.into()), (ARGS.into(), args.join(" ").into())]
}

/// What a program has told, from all that it wrote.
pub(super) fn told(text: &str) -> Vec<String> {
    // Whole lines only.
    let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    // The first of them may stand behind what the test harness has written.
    lines.filter_map(|line| Some(line.split_once(MARK)?.1.trim_end().to_owned())).collect()
}

fn tell(line: impl std::fmt::Display) {
    println!("{MARK}{line}");
}

/// Without a word what for, it starts itself with one.
#[tokio::test]
async fn a_program_tells_what_it_was_started_for() {
    let Ok(what) = std::env::var(WHAT) else {
        let bench = super::bench::Bench::new();
        let mut spec = bench.program("echo", &["hello".to_owned(), "there".to_owned()]);
        assert_eq!(bench.told(spec.clone()).await, ["hello", "there"]);
        spec.confinement = None;
        assert_eq!(bench.told(spec).await, ["hello", "there"]);
        bench.stop().await;
        return;
    };
    let args = std::env::var(ARGS).unwrap();
    let args: Vec<&str> = args.split(' ').filter(|arg| !arg.is_empty()).collect();
    match what.as_str() {
        "echo" => args.iter().for_each(tell),
        "denied" => list(&args),
        "sockets" => sockets(),
        "connect" => args.iter().for_each(|to| tell(outcome(TcpStream::connect(address(to))))),
        "bind" => args.iter().for_each(|at| tell(bound(TcpListener::bind(address(at))))),
        "listen" => listen_unbound(),
        "serve" => serve(address(args[0])),
        "hold" => hold(&TcpListener::bind(address(args[0])).unwrap()),
        "race" => race(address(args[0]), address(args[1])),
        "full" => full(address(args[0]), address(args[1])),
        "nonblocking" => nonblocking(address(args[0])),
        "kill" => tell(named(nix::sys::signal::kill(nix::unistd::Pid::from_raw(args[0].parse().unwrap()), None))),
        "descriptors" => descriptors(),
        "i386" => tell(i386()),
        "unprivileged" => super::identity::as_an_ordinary_user(&args).await,
        other => unreachable!("{other}"),
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn named<T>(result: Result<T, Errno>) -> String {
    match result {
        Ok(_) => "ok".to_owned(),
        Err(errno) => format!("{errno:?}"),
    }
}

fn outcome<T>(result: std::io::Result<T>) -> String {
    named(result.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap())))
}

fn bound(result: std::io::Result<TcpListener>) -> String {
    match result {
        Ok(listener) => listener.local_addr().unwrap().to_string(),
        Err(error) => outcome::<()>(Err(error)),
    }
}

/// A call by its number.
#[expect(unsafe_code, reason = "the calls under test have no safe form")]
pub(crate) fn raw(number: i64, args: [u64; 6]) -> Result<i64, Errno> {
    let [a, b, c, d, e, f] = args;
    // SAFETY: called with zeros, flags, and addresses of values that outlive the call. Those that could harm this
    // process are what is refused, and where they are not, the test fails.
    Errno::result(unsafe { libc::syscall(number, a, b, c, d, e, f) })
}

/// Every denied call, or those that are named, in each way in which it is denied.
fn list(only: &[&str]) {
    for Denied { call, when, .. } in denied().iter().filter(|denied| only.is_empty() || only.contains(&denied.call)) {
        let Ok(number) = call.parse::<syscalls::Sysno>() else { continue };
        let ways = if when.is_empty() { vec![&[][..]] } else { when.to_vec() };
        for way in ways {
            let mut args = [0; 6];
            for condition in way {
                args[usize::from(condition.argument)] |= match condition.test {
                    Test::Is(value) | Test::Masked(_, value) => u64::from(value),
                    // None of those that the list makes exceptions for.
                    Test::IsNot(_) => 0x77,
                };
            }
            tell(format_args!("{call} {}", named(raw(number.id().into(), args))));
        }
    }
    if !only.is_empty() {
        return;
    }
    // Numbers beyond the list, and of x32.
    for number in [470, 9_999, 0x4000_0000 | 39] {
        tell(format_args!("{number} {}", named(raw(number, [0; 6]))));
    }
}

/// Ways to a network that are not a plain TCP socket.
fn sockets() {
    let socket = |family: i32, kind: i32, protocol: i32| {
        named(raw(libc::SYS_socket, [family as u64, kind as u64, protocol as u64, 0, 0, 0]))
    };
    let inet = libc::AF_INET;
    tell(format_args!("tcp {}", socket(inet, libc::SOCK_STREAM, 0)));
    tell(format_args!("tcp6 {}", socket(libc::AF_INET6, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, libc::IPPROTO_TCP)));
    tell(format_args!("mptcp {}", socket(inet, libc::SOCK_STREAM, libc::IPPROTO_MPTCP)));
    tell(format_args!("sctp {}", socket(inet, libc::SOCK_STREAM, libc::IPPROTO_SCTP)));
    tell(format_args!("smc {}", socket(inet, libc::SOCK_STREAM, 256)));
    tell(format_args!("udp {}", socket(inet, libc::SOCK_DGRAM, 0)));
    tell(format_args!("ping {}", socket(inet, libc::SOCK_DGRAM, libc::IPPROTO_ICMP)));
    tell(format_args!("raw {}", socket(inet, libc::SOCK_RAW, libc::IPPROTO_ICMP)));
    tell(format_args!("vsock {}", socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)));
    tell(format_args!("netlink {}", socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)));
    tell(format_args!("packet {}", socket(libc::AF_PACKET, libc::SOCK_RAW, 0)));
    tell(format_args!("crypto {}", socket(libc::AF_ALG, libc::SOCK_SEQPACKET, 0)));
    tell(format_args!("unix {}", socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)));
    let pair = |kind: i32| {
        let mut fds = [0i32; 2];
        named(raw(libc::SYS_socketpair, [1, kind as u64, 0, fds.as_mut_ptr() as u64, 0, 0]))
    };
    tell(format_args!("pair {}", pair(libc::SOCK_STREAM)));
    tell(format_args!("packets {}", pair(libc::SOCK_SEQPACKET)));
    tell(format_args!("datagrams {}", pair(libc::SOCK_DGRAM)));
    tell(format_args!("raw-pair {}", pair(libc::SOCK_RAW)));
}

fn listen_unbound() {
    use rustix::net::{AddressFamily, SocketType, getsockname, listen, socket};
    let sockets =
        [AddressFamily::INET, AddressFamily::INET6].map(|family| socket(family, SocketType::STREAM, None).unwrap());
    for socket in &sockets {
        let listening = listen(socket, 1).map(|()| getsockname(socket).unwrap());
        match listening {
            Ok(at) => tell(SocketAddr::try_from(at).unwrap()),
            Err(errno) => tell(format_args!("{errno:?}")),
        }
    }
}

/// Listens, answers one client, and tries to be its own client before.
fn serve(at: SocketAddr) {
    let listener = TcpListener::bind(at).unwrap();
    tell(outcome(TcpStream::connect(at)));
    hold(&listener);
}

fn hold(listener: &TcpListener) {
    tell("serving");
    let (mut client, _) = listener.accept().unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    tell(text);
}

/// One thread changes the address while the other connects with it.
fn race(allowed: SocketAddr, forbidden: SocketAddr) {
    let port = |address: SocketAddr| {
        let port = address.port().to_be_bytes();
        let family = (libc::AF_INET as u16).to_ne_bytes();
        u32::from_ne_bytes([family[0], family[1], port[0], port[1]])
    };
    let (yes, no) = (port(allowed), port(forbidden));
    let memory: Arc<[AtomicU32; 4]> = Arc::new([yes, u32::from_ne_bytes([127, 0, 0, 1]), 0, 0].map(AtomicU32::new));
    let stop = Arc::new(AtomicBool::new(false));
    let flipping = {
        let (memory, stop) = (Arc::clone(&memory), Arc::clone(&stop));
        thread(move || {
            while !stop.load(Ordering::Relaxed) {
                memory[0].store(no, Ordering::Relaxed);
                memory[0].store(yes, Ordering::Relaxed);
            }
        })
    };
    let (mut connected, mut refused) = (0, 0);
    while connected < 200 || refused < 200 {
        use rustix::net::{AddressFamily, SocketType, socket};
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        let args = [socket.as_raw_fd() as u64, memory.as_ptr() as u64, 16, 0, 0, 0];
        match raw(libc::SYS_connect, args) {
            Ok(_) => connected += 1,
            Err(Errno::EACCES) => refused += 1,
            Err(other) => unreachable!("{other:?}"),
        }
    }
    stop.store(true, Ordering::Relaxed);
    flipping.join().unwrap();
    tell("raced");
}

/// A connect that has to wait holds up no other.
fn full(own: SocketAddr, broker: SocketAddr) {
    use rustix::net::{AddressFamily, SocketType, bind, listen, socket};
    let listener = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    // A run just before this one may have used the port.
    rustix::net::sockopt::set_socket_reuseaddr(&listener, true).unwrap();
    bind(&listener, &own).unwrap();
    listen(&listener, 0).unwrap();
    let _first = TcpStream::connect(own).unwrap();
    let began = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicBool::new(false));
    let waiting = {
        let (began, done) = (Arc::clone(&began), Arc::clone(&done));
        thread(move || {
            // The queue takes one: of these, at least the last one waits.
            began.store(true, Ordering::Release);
            let more = [(); 2].map(|()| TcpStream::connect(own).unwrap());
            done.store(true, Ordering::Release);
            drop(more);
        })
    };
    while !began.load(Ordering::Acquire) {
        std::thread::yield_now();
    }
    for _ in 0..50 {
        TcpStream::connect(broker).unwrap();
    }
    tell(if done.load(Ordering::Acquire) { "nothing waited" } else { "waiting" });
    // Room: the kernel tries the waiting ones again by itself.
    for _ in 0..3 {
        rustix::net::accept(&listener).unwrap();
    }
    waiting.join().unwrap();
    tell("connected");
}

#[expect(clippy::disallowed_methods, reason = "this program has no runtime to spawn on")]
fn thread(work: impl FnOnce() + Send + 'static) -> std::thread::JoinHandle<()> {
    std::thread::spawn(work)
}

fn nonblocking(to: SocketAddr) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};
    use std::os::fd::AsFd;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
    tell(match connect(&socket, &to) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => "begun".to_owned(),
        Err(errno) => format!("{errno:?}"),
    });
    let patience = PollTimeout::try_from(Duration::from_secs(30)).unwrap();
    assert_eq!(poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], patience), Ok(1));
    tell(format_args!("{:?}", sockopt::socket_error(&socket).unwrap()));
    let flags = rustix::fs::fcntl_getfl(&socket).unwrap();
    tell(flags.contains(rustix::fs::OFlags::NONBLOCK));
}

fn descriptors() {
    let mut open: Vec<i32> = Vec::new();
    for number in 0..1024 {
        if std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok() {
            let target = std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap();
            // The runtime of this program opens some of its own.
            if number < 3 || !target.to_string_lossy().starts_with("anon_inode:") && !is_socket(&target) {
                open.push(number);
            }
        }
    }
    tell(format_args!("{open:?}"));
}

fn is_socket(target: &std::path::Path) -> bool {
    target.to_string_lossy().starts_with("socket:")
}

/// A call through the door for 32-bit programs: getpid.
#[expect(unsafe_code, reason = "there is no other way through that door")]
pub(crate) fn i386() -> i64 {
    #[cfg(target_arch = "x86_64")]
    {
        let result: i64;
        // SAFETY: getpid (20) touches no memory; the registers that the kernel changes are named.
        unsafe {
            std::arch::asm!("int 0x80", inlateout("rax") 20i64 => result, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
        }
        result
    }
    #[cfg(not(target_arch = "x86_64"))]
    0
}
