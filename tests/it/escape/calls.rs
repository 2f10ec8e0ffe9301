//! The attacks that take a bare call of the kernel. Each runs in a process of its own, and gives the error that stopped
//! it.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::confine::program::{i386, raw};
use base64::Engine;
use nix::errno::Errno;
use nix::libc;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixStream};
use std::time::Duration;

type Outcome = Result<(), Errno>;

/// Makes an attack in a child. `Ok`: it got through; else what stopped it, an error or a signal.
#[expect(unsafe_code, reason = "what is tried may end the process that tries it")]
pub(super) fn tried(attack: fn() -> Outcome) -> Result<(), String> {
    // SAFETY: the other thread of this process is the test harness, which stands still and holds no lock.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let code = attack().err().map_or(0, |errno| errno as i32);
            // SAFETY: ends the child without what the harness has registered.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
            WaitStatus::Exited(_, 0) => Ok(()),
            WaitStatus::Exited(_, errno) => Err(format!("{:?}", Errno::from_raw(errno))),
            WaitStatus::Signaled(_, signal, _) => Err(signal.as_str().to_owned()),
            other => Err(format!("{other:?}")),
        },
    }
}

fn var(name: &str) -> String {
    std::env::var(name).unwrap()
}

fn pid(name: &str) -> u64 {
    var(name).parse().unwrap()
}

fn out(name: &str) -> String {
    format!("{}/{name}", var("OUT"))
}

fn text(text: &str) -> CString {
    CString::new(text).unwrap()
}

fn of<T>(result: std::io::Result<T>) -> Result<T, Errno> {
    result.map_err(|error| match (error.raw_os_error(), error.kind()) {
        (Some(number), _) => Errno::from_raw(number),
        (None, std::io::ErrorKind::TimedOut) => Errno::ETIMEDOUT,
        _ => Errno::EPROTO,
    })
}

fn make(number: i64, args: [u64; 6]) -> Outcome {
    raw(number, args).map(drop)
}

/// A call that gives a descriptor.
#[expect(unsafe_code, reason = "a descriptor that a bare call gives comes as a number")]
fn descriptor(number: i64, args: [u64; 6]) -> Result<OwnedFd, Errno> {
    // SAFETY: the kernel made it a moment ago, for nobody else.
    raw(number, args).map(|fd| unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap()) })
}

fn at(fd: &OwnedFd) -> u64 {
    fd.as_raw_fd() as u64
}

// Files.

pub(super) fn truncate() -> Outcome {
    make(libc::SYS_truncate, [text(&out("scratch")).as_ptr() as u64, 0, 0, 0, 0, 0])
}

pub(super) fn rename_in() -> Outcome {
    of(std::fs::rename(out("movable"), "moved-in"))
}

pub(super) fn rename_out() -> Outcome {
    of(std::fs::write("to-move", "").and_then(|()| std::fs::rename("to-move", out("moved"))))
}

pub(super) fn rename_exchange() -> Outcome {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    of(std::fs::write("to-swap", ""))?;
    renameat_with(CWD, "to-swap", CWD, out("swap"), RenameFlags::EXCHANGE)
        .map_err(|errno| Errno::from_raw(errno.raw_os_error()))
}

pub(super) fn bind_mount() -> Outcome {
    of(std::fs::create_dir_all("mounted"))?;
    let (from, to) = (text(&var("OUT")), text("mounted"));
    let none = text("none");
    make(libc::SYS_mount, [from.as_ptr() as u64, to.as_ptr() as u64, none.as_ptr() as u64, libc::MS_BIND, 0, 0])?;
    make(libc::SYS_umount2, [to.as_ptr() as u64, libc::MNT_DETACH as u64, 0, 0, 0, 0])
}

pub(super) fn new_mount() -> Outcome {
    descriptor(libc::SYS_fsopen, [text("tmpfs").as_ptr() as u64, 0, 0, 0, 0, 0]).map(drop)
}

pub(super) fn chroot() -> Outcome {
    make(libc::SYS_chroot, [text(".").as_ptr() as u64, 0, 0, 0, 0, 0])
}

pub(super) fn device_node() -> Outcome {
    let name = text("node");
    make(
        libc::SYS_mknodat,
        [libc::AT_FDCWD as u64, name.as_ptr() as u64, u64::from(libc::S_IFCHR) | 0o600, 0x103, 0, 0],
    )?;
    of(std::fs::remove_file("node"))
}

pub(super) fn by_handle() -> Outcome {
    let mut handle = [0u32; 64];
    handle[0] = 128;
    let (path, mut mount) = (text("."), 0i32);
    let args = [libc::AT_FDCWD as u64, path.as_ptr() as u64, handle.as_mut_ptr() as u64, (&raw mut mount) as u64, 0, 0];
    make(libc::SYS_name_to_handle_at, args)
}

pub(super) fn attributes() -> Outcome {
    rustix::fs::setxattr(out("private/file"), "user.escape", b"1", rustix::fs::XattrFlags::empty())
        .map_err(|errno| Errno::from_raw(errno.raw_os_error()))
}

pub(super) fn watch_directory() -> Outcome {
    let watch = descriptor(libc::SYS_inotify_init1, [0; 6])?;
    let private = text(&out("private"));
    make(libc::SYS_inotify_add_watch, [at(&watch), private.as_ptr() as u64, libc::IN_CREATE.into(), 0, 0, 0])
}

/// A terminal that somebody else types into.
pub(super) fn terminal() -> Outcome {
    let flags = (libc::O_RDWR | libc::O_NOCTTY) as u64;
    descriptor(libc::SYS_openat, [libc::AT_FDCWD as u64, text(&var("TERMINAL")).as_ptr() as u64, flags, 0, 0, 0])
        .map(drop)
}

// Other processes.

pub(super) fn sidecar_memory() -> Outcome {
    of(File::open(format!("/proc/{}/mem", pid("SIDECAR")))).map(drop)
}

pub(super) fn signal_value() -> Outcome {
    let mut info = [0u32; 32];
    // SI_QUEUE, which stands in the third number.
    info[2] = u32::MAX;
    make(libc::SYS_rt_sigqueueinfo, [pid("VICTIM"), 0, info.as_ptr() as u64, 0, 0, 0])
}

pub(super) fn signal_pidfd() -> Outcome {
    let victim = descriptor(libc::SYS_pidfd_open, [pid("VICTIM"), 0, 0, 0, 0, 0])?;
    make(libc::SYS_pidfd_send_signal, [at(&victim), 0, 0, 0, 0, 0])
}

/// The kernel sends a signal of one's choice to whoever is named the owner of a descriptor that has news.
pub(super) fn signal_by_io() -> Outcome {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    const F_SETSIG: u64 = 10;
    let victim = descriptor(libc::SYS_pidfd_open, [pid("SHOT"), 0, 0, 0, 0, 0])?;
    let (ours, mut theirs) = of(UnixStream::pair())?;
    let control = |command, value| make(libc::SYS_fcntl, [ours.as_raw_fd() as u64, command, value, 0, 0, 0]);
    control(F_SETSIG, libc::SIGKILL as u64)?;
    control(libc::F_SETOWN as u64, pid("SHOT"))?;
    control(libc::F_SETFL as u64, libc::O_ASYNC as u64)?;
    of(theirs.write_all(b"x"))?;
    match poll(&mut [PollFd::new(victim.as_fd(), PollFlags::POLLIN)], PollTimeout::from(10_000u16))? {
        0 => Err(Errno::ETIMEDOUT),
        _ => Ok(()),
    }
}

pub(super) fn ptrace() -> Outcome {
    const PTRACE_SEIZE: u64 = 0x4206;
    make(libc::SYS_ptrace, [PTRACE_SEIZE, pid("VICTIM"), 0, 0, 0, 0])
}

pub(super) fn read_memory() -> Outcome {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", pid("SIDECAR"))).unwrap_or_default();
    let first = maps.split('-').next().and_then(|first| u64::from_str_radix(first, 16).ok()).unwrap_or(0x40_0000);
    let mut bytes = [0u8; 16];
    let (local, remote) = ([bytes.as_mut_ptr() as u64, 16], [first, 16]);
    make(libc::SYS_process_vm_readv, [pid("SIDECAR"), local.as_ptr() as u64, 1, remote.as_ptr() as u64, 1, 0])
}

pub(super) fn take_descriptor() -> Outcome {
    let sidecar = descriptor(libc::SYS_pidfd_open, [pid("SIDECAR"), 0, 0, 0, 0, 0])?;
    descriptor(libc::SYS_pidfd_getfd, [at(&sidecar), 0, 0, 0, 0, 0]).map(drop)
}

pub(super) fn compare() -> Outcome {
    make(libc::SYS_kcmp, [std::process::id().into(), pid("SIDECAR"), 0, 0, 0, 0])
}

/// The limit is set to what it is: to nothing, it would end the sidecar.
pub(super) fn limits_of_sidecar() -> Outcome {
    let mut limit = [0u64; 2];
    let number = u64::from(libc::RLIMIT_CPU);
    make(libc::SYS_prlimit64, [pid("SIDECAR"), number, 0, limit.as_mut_ptr() as u64, 0, 0])?;
    make(libc::SYS_prlimit64, [pid("SIDECAR"), number, limit.as_ptr() as u64, 0, 0, 0])
}

pub(super) fn affinity() -> Outcome {
    let mut mask = [0u64; 128];
    make(libc::SYS_sched_getaffinity, [pid("NEIGHBOUR"), 1024, mask.as_mut_ptr() as u64, 0, 0, 0])?;
    make(libc::SYS_sched_setaffinity, [pid("NEIGHBOUR"), 1024, mask.as_ptr() as u64, 0, 0, 0])
}

pub(super) fn priority() -> Outcome {
    let nice = 20 - raw(libc::SYS_getpriority, [0, pid("NEIGHBOUR"), 0, 0, 0, 0])?;
    make(libc::SYS_setpriority, [0, pid("NEIGHBOUR"), nice as u64, 0, 0, 0])
}

// Privileges.

pub(super) fn capabilities() -> Outcome {
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
    let wanted = CapabilitySet::SYS_ADMIN;
    set_capabilities(None, CapabilitySets { effective: wanted, permitted: wanted, inheritable: CapabilitySet::empty() })
        .map_err(|errno| Errno::from_raw(errno.raw_os_error()))
}

pub(super) fn other_user() -> Outcome {
    make(libc::SYS_setresuid, [12_345, 12_345, 12_345, 0, 0, 0])
}

pub(super) fn other_groups() -> Outcome {
    make(libc::SYS_setgroups, [1, [12_345u32].as_ptr() as u64, 0, 0, 0, 0])
}

#[expect(unsafe_code, reason = "the child of a bare clone must not go on as this program")]
pub(super) fn clone_user() -> Outcome {
    let flags = (libc::CLONE_NEWUSER | libc::SIGCHLD) as u64;
    match raw(libc::SYS_clone, [flags, 0, 0, 0, 0, 0])? {
        // SAFETY: ends this copy at once.
        0 => unsafe { libc::_exit(0) },
        child => waitpid(Pid::from_raw(i32::try_from(child).unwrap()), None).map(drop),
    }
}

#[expect(unsafe_code, reason = "the child of a bare clone must not go on as this program")]
pub(super) fn clone3_user() -> Outcome {
    let mut args = [0u64; 11];
    (args[0], args[4]) = (libc::CLONE_NEWUSER as u64, libc::SIGCHLD as u64);
    match raw(libc::SYS_clone3, [args.as_ptr() as u64, size_of_val(&args) as u64, 0, 0, 0, 0])? {
        // SAFETY: ends this copy at once.
        0 => unsafe { libc::_exit(0) },
        child => waitpid(Pid::from_raw(i32::try_from(child).unwrap()), None).map(drop),
    }
}

pub(super) fn unshare_mount() -> Outcome {
    make(libc::SYS_unshare, [libc::CLONE_NEWNS as u64, 0, 0, 0, 0, 0])
}

pub(super) fn unshare_network() -> Outcome {
    make(libc::SYS_unshare, [libc::CLONE_NEWNET as u64, 0, 0, 0, 0, 0])
}

pub(super) fn keyring() -> Outcome {
    const PROCESS: u64 = -2i64 as u64;
    let (kind, name) = (text("user"), text("escape"));
    make(libc::SYS_add_key, [kind.as_ptr() as u64, name.as_ptr() as u64, b"x".as_ptr() as u64, 1, PROCESS, 0])
}

/// The keyring of the session that the sidecar may have been started in.
pub(super) fn keyring_look() -> Outcome {
    const SESSION: u64 = -3i64 as u64;
    make(libc::SYS_keyctl, [0, SESSION, 1, 0, 0, 0])
}

pub(super) fn bpf() -> Outcome {
    make(libc::SYS_bpf, [0; 6])
}

pub(super) fn perf() -> Outcome {
    make(libc::SYS_perf_event_open, [0; 6])
}

pub(super) fn io_uring() -> Outcome {
    make(libc::SYS_io_uring_setup, [1, 0, 0, 0, 0, 0])
}

pub(super) fn userfaultfd() -> Outcome {
    descriptor(libc::SYS_userfaultfd, [0; 6]).map(drop)
}

pub(super) fn system_v() -> Outcome {
    let id = raw(libc::SYS_shmget, [libc::IPC_PRIVATE as u64, 4096, 0o600, 0, 0, 0])?;
    make(libc::SYS_shmctl, [id as u64, libc::IPC_RMID as u64, 0, 0, 0, 0])
}

pub(super) fn posix_queue() -> Outcome {
    let name = text("escape");
    let flags = (libc::O_CREAT | libc::O_RDWR) as u64;
    descriptor(libc::SYS_mq_open, [name.as_ptr() as u64, flags, 0o600, 0, 0, 0])?;
    make(libc::SYS_mq_unlink, [name.as_ptr() as u64, 0, 0, 0, 0, 0])
}

pub(super) fn personality() -> Outcome {
    make(libc::SYS_personality, [libc::ADDR_NO_RANDOMIZE as u64, 0, 0, 0, 0, 0])
}

/// Changes nothing, and would be told how the clock is set.
pub(super) fn clock() -> Outcome {
    let mut state = [0u64; 64];
    make(libc::SYS_adjtimex, [state.as_mut_ptr() as u64, 0, 0, 0, 0, 0])
}

/// Without the numbers that it takes.
pub(super) fn reboot() -> Outcome {
    make(libc::SYS_reboot, [0; 6])
}

/// How much there is in the kernel's log.
pub(super) fn dmesg() -> Outcome {
    make(libc::SYS_syslog, [10, 0, 0, 0, 0, 0])
}

pub(super) fn host_name() -> Outcome {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let name = name.trim_end();
    make(libc::SYS_sethostname, [name.as_ptr() as u64, name.len() as u64, 0, 0, 0, 0])
}

pub(super) fn door_for_32_bit() -> Outcome {
    i386();
    // It is through the door, of which there is nothing to be had.
    Err(Errno::ENOENT)
}

// The network.

fn connect(host: &str, port: &str) -> Result<TcpStream, Errno> {
    let address: SocketAddr = format!("{host}:{}", var(port)).parse().unwrap();
    of(TcpStream::connect_timeout(&address, Duration::from_secs(2)))
}

pub(super) fn sidecar_api() -> Outcome {
    connect("127.0.0.1", "SIDECAR_PORT").map(drop)
}

/// Asks OpenCode for the permissions that it waits for, with the password from the session's own environment: whoever
/// gets this answer can give one.
fn api(host: &str, port: &str, password: &str) -> Outcome {
    let mut stream = connect(host, port)?;
    let credential = base64::engine::general_purpose::STANDARD.encode(format!("opencode:{password}"));
    let request = format!("GET /permission HTTP/1.0\r\nauthorization: Basic {credential}\r\n\r\n");
    of(stream.write_all(request.as_bytes()))?;
    let mut status = [0; 12];
    of(stream.read_exact(&mut status))?;
    if status.ends_with(b" 200") { Ok(()) } else { Err(Errno::EPROTO) }
}

fn own_password() -> String {
    let environment = std::fs::read_to_string(format!("/proc/{}/environ", var("OPENCODE_PID"))).unwrap();
    let password = environment.split('\0').find_map(|entry| entry.strip_prefix("OPENCODE_SERVER_PASSWORD="));
    password.unwrap().to_owned()
}

pub(super) fn own_api() -> Outcome {
    api("127.0.0.1", "OWN_PORT", &own_password())
}

pub(super) fn own_api_mapped() -> Outcome {
    api("[::ffff:127.0.0.1]", "OWN_PORT", &own_password())
}

pub(super) fn neighbour_api() -> Outcome {
    api("127.0.0.1", "NEIGHBOUR_PORT", &var("NEIGHBOUR_PASSWORD"))
}

pub(super) fn postgres() -> Outcome {
    connect("127.0.0.1", "POSTGRES_PORT").map(drop)
}

pub(super) fn postgres_socket() -> Outcome {
    of(UnixStream::connect(var("POSTGRES_SOCKET"))).map(drop)
}

pub(super) fn elsewhere() -> Outcome {
    connect("127.0.0.2", "BROKER_PORT").map(drop)
}

pub(super) fn elsewhere6() -> Outcome {
    connect("[::1]", "BROKER_PORT").map(drop)
}

pub(super) fn metadata() -> Outcome {
    of(TcpStream::connect_timeout(&"169.254.169.254:80".parse().unwrap(), Duration::from_millis(200))).map(drop)
}

pub(super) fn dns_tcp() -> Outcome {
    of(TcpStream::connect_timeout(&"198.51.100.1:53".parse().unwrap(), Duration::from_millis(200))).map(drop)
}

pub(super) fn dns_udp() -> Outcome {
    let socket = of(UdpSocket::bind("127.0.0.1:0"))?;
    of(socket.send_to(b"x", "127.0.0.1:53")).map(drop)
}

fn socket(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd, Errno> {
    descriptor(libc::SYS_socket, [family as u64, kind as u64, protocol as u64, 0, 0, 0])
}

/// Where the sidecar listens, as the kernel takes it.
fn sidecar() -> [u8; 16] {
    let mut address = [0; 16];
    address[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    address[2..4].copy_from_slice(&var("SIDECAR_PORT").parse::<u16>().unwrap().to_be_bytes());
    address[4..8].copy_from_slice(&[127, 0, 0, 1]);
    address
}

pub(super) fn mptcp() -> Outcome {
    let socket = socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP)?;
    make(libc::SYS_connect, [at(&socket), sidecar().as_ptr() as u64, 16, 0, 0, 0])
}

pub(super) fn fast_open_sendto() -> Outcome {
    let socket = socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let flags = libc::MSG_FASTOPEN as u64;
    make(libc::SYS_sendto, [at(&socket), b"x".as_ptr() as u64, 1, flags, sidecar().as_ptr() as u64, 16])
}

pub(super) fn fast_open_sendmsg() -> Outcome {
    let socket = socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let address = sidecar();
    let part = [b"x".as_ptr() as u64, 1];
    let message = [address.as_ptr() as u64, 16, part.as_ptr() as u64, 1, 0, 0, 0];
    make(libc::SYS_sendmsg, [at(&socket), message.as_ptr() as u64, libc::MSG_FASTOPEN as u64, 0, 0, 0])
}

fn option(level: i32, name: i32, value: &[u8]) -> Outcome {
    let socket = socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let length = value.len() as u64;
    make(libc::SYS_setsockopt, [at(&socket), level as u64, name as u64, value.as_ptr() as u64, length, 0])
}

pub(super) fn fast_open_option() -> Outcome {
    option(libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, &1u32.to_ne_bytes())
}

pub(super) fn bind_to_device() -> Outcome {
    option(libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo")
}

pub(super) fn source_route() -> Outcome {
    option(libc::IPPROTO_IP, libc::IP_OPTIONS, b"")
}

pub(super) fn vsock() -> Outcome {
    socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0).map(drop)
}

pub(super) fn abstract_socket() -> Outcome {
    let address = of(UnixAddr::from_abstract_name(var("ABSTRACT")))?;
    of(UnixStream::connect_addr(&address)).map(drop)
}

pub(super) fn path_socket() -> Outcome {
    of(UnixStream::connect(out("socket"))).map(drop)
}

pub(super) fn datagram_pair() -> Outcome {
    let mut pair = [0i32; 2];
    make(libc::SYS_socketpair, [libc::AF_UNIX as u64, libc::SOCK_DGRAM as u64, 0, pair.as_mut_ptr() as u64, 0, 0])
}

pub(super) fn netlink() -> Outcome {
    socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE).map(drop)
}

pub(super) fn raw_socket() -> Outcome {
    socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP).map(drop)
}

pub(super) fn packet_socket() -> Outcome {
    socket(libc::AF_PACKET, libc::SOCK_RAW, 0).map(drop)
}

pub(super) fn listen_elsewhere() -> Outcome {
    of(TcpListener::bind(format!("127.0.0.1:{}", var("FREE_PORT")))).map(drop)
}

pub(super) fn listen_as_neighbour() -> Outcome {
    of(TcpListener::bind(format!("127.0.0.1:{}", var("NEIGHBOUR_PORT")))).map(drop)
}
