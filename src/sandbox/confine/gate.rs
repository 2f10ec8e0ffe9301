//! The gate: makes the connects, binds and listens of a confined program in its place.
//!
//! The filter stops the calling thread and tells the gate, which is in the jail, outside of the confinement. The gate
//! copies the address out of the thread's memory once, judges the copy, and makes the call itself, with the copy, on
//! a duplicate of the thread's descriptor. The thread only gets the result. So it does not matter what becomes of that
//! memory or that descriptor in the meantime: nothing was looked at twice. The kernel is never told to go on with the
//! thread's own call.
//!
//! A program in a network namespace of its own has sockets that lead nowhere. Where it may connect to something outside,
//! or is to serve others, the gate makes a socket outside and puts it in the place of the program's, under the same
//! number. Then the kernel alone carries what goes through.
//!
//! It is part of the jail's one thread, so it never waits: a socket that blocks is connected without blocking, and the
//! answer is given when the kernel has one.
//!
//! A connect to [`ASIDE`] is no connect: with it the shell tap asks to be moved to the tools' part of its control group,
//! and to be what the kernel ends first when memory runs out. Less may be done there than outside of it, so everyone
//! may ask. The gate is the one that may do it.
//!
//! A connect that it refuses is counted, and told to the sidecar (see [`Refused`]).
//!
//! What is wildcard is made loopback: a program that listens on every address listens on those of this machine alone.

use super::Network;
use super::refused::Refused;
use crate::sandbox::MOST_OOM_SCORE_ADJ;
use crate::sandbox::cgroup::Layout;
use nix::libc::{self, seccomp_notif, seccomp_notif_addfd, seccomp_notif_resp};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::setfsuid;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, Result};
use rustix::net::{self, ipproto, sockopt};
use rustix::process::{Gid, Pid, PidfdFlags, PidfdGetfdFlags, Uid, getgid, getuid, pidfd_getfd, pidfd_open};
use rustix::thread::{set_thread_res_gid, set_thread_res_uid};
use std::io::IoSliceMut;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

/// Where nothing can listen.
const ASIDE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Asks for what this process will start to be counted with the tools, and to be ended before the program when memory
/// runs out. Without a gate it does nothing.
pub(in crate::sandbox) fn step_aside() {
    // Refused in any case.
    let _ = std::net::TcpStream::connect(ASIDE);
}

/// The most connects that may wait for the kernel's answer. Each holds a descriptor of the jail.
const MOST_PENDING: usize = 256;
/// The most calls that are answered before the jail looks at its other work.
const MOST_AT_ONCE: usize = 32;
/// A pidfd of a thread instead of a process (Linux 6.9).
const PIDFD_THREAD: u32 = libc::O_EXCL as u32;

/// Listens for one program's calls.
pub(in crate::sandbox) struct Gate {
    listener: OwnedFd,
    network: Network,
    /// Whose memory and descriptors it looks at, where that is another user than the jail's.
    user: Option<(u32, u32)>,
    /// The program's control group.
    group: Option<Layout>,
    /// The program is in a network namespace that is not the jail's.
    apart: bool,
    pending: Vec<Pending>,
    pub(in crate::sandbox) refused: Refused,
}

/// A connect that the kernel has not answered yet.
struct Pending {
    id: u64,
    socket: OwnedFd,
    /// Where it is put once it is connected.
    seat: Option<Seat>,
}

/// A descriptor of the program.
#[derive(Clone, Copy)]
struct Seat {
    number: RawFd,
    closes_at_exec: bool,
}

/// How a call goes on.
enum Next {
    Answer,
    /// The answer comes when the socket is writable.
    Wait(OwnedFd, Option<Seat>),
}

impl Gate {
    /// For a program that runs as `user`, if it is not the jail's own.
    pub(in crate::sandbox) fn new(
        listener: OwnedFd,
        network: Network,
        user: Option<(u32, u32)>,
        group: Option<Layout>,
        apart: bool,
    ) -> Self {
        Self { listener, network, user, group, apart, pending: Vec::new(), refused: Refused::default() }
    }

    /// What to poll for.
    pub(in crate::sandbox) fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        let listener = PollFd::new(self.listener.as_fd(), PollFlags::POLLIN);
        let pending = self.pending.iter().map(|pending| PollFd::new(pending.socket.as_fd(), PollFlags::POLLOUT));
        std::iter::once(listener).chain(pending)
    }

    /// Goes on with whatever is ready. Does not wait. False: nobody is left who could ask, so give it up, since its
    /// descriptor says so again at every poll.
    pub(in crate::sandbox) fn advance(&mut self) -> bool {
        let mut fds: Vec<PollFd<'_>> = self.poll_fds().collect();
        if !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..)) {
            return true;
        }
        if fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)) {
            return false;
        }
        // The listener comes first.
        let ready: Vec<bool> = fds.iter().skip(1).map(|fd| fd.any() == Some(true)).collect();
        for (pending, ready) in std::mem::take(&mut self.pending).into_iter().zip(ready) {
            if ready {
                let connected = sockopt::socket_error(&pending.socket).and_then(|result| result);
                let seated = connected.and_then(|()| match pending.seat {
                    Some(seat) => self.seat_blocking(pending.id, seat, &pending.socket),
                    None => Ok(()),
                });
                self.reply(pending.id, seated);
            } else {
                self.pending.push(pending);
            }
        }
        // Not all that there are: a program that calls without end must not keep the jail from its other work.
        for _ in 0..MOST_AT_ONCE {
            let mut listener = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            let asked = poll(&mut listener, PollTimeout::ZERO).is_ok()
                && listener[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN));
            if !asked {
                break;
            }
            // It may be gone between the two: its thread was killed.
            if let Some(call) = self.receive() {
                self.answer(&call);
            }
        }
        true
    }

    fn answer(&mut self, call: &seccomp_notif) {
        match self.make(call) {
            Ok(Next::Answer) => self.reply(call.id, Ok(())),
            Ok(Next::Wait(socket, seat)) if self.pending.len() < MOST_PENDING => {
                self.pending.push(Pending { id: call.id, socket, seat });
            }
            Ok(Next::Wait(..)) => self.reply(call.id, Err(Errno::AGAIN)),
            Err(errno) => self.reply(call.id, Err(errno)),
        }
    }

    fn make(&mut self, call: &seccomp_notif) -> Result<Next> {
        let [fd, address, length, ..] = call.data.args;
        let thread = i32::try_from(call.pid).map_err(|_| Errno::SRCH)?;
        // The kernel takes 32 bits of it, like this.
        let socket = self.socket(thread, fd as RawFd)?;
        if libc::c_long::from(call.data.nr) == libc::SYS_listen {
            self.still_there(call.id)?;
            return self.listen(&socket, address as i32).map(|()| Next::Answer);
        }
        let address = self.address(thread, address, length as u32)?;
        self.still_there(call.id)?;
        match libc::c_long::from(call.data.nr) {
            libc::SYS_connect if address == ASIDE => {
                // Its number cannot be another's by now but if all numbers were used up since the last line.
                if let Some(group) = &self.group {
                    let _ = group.move_to_tools(thread);
                }
                self.first_to_end(thread);
                Err(Errno::CONNREFUSED)
            }
            libc::SYS_connect => self.connect(call, socket, address),
            libc::SYS_bind if self.apart && self.network.serve.contains(&address.port()) => {
                self.bind_outside(call, &socket, address).map(|()| Next::Answer)
            }
            libc::SYS_bind => self.bind(&socket, address).map(|()| Next::Answer),
            _ => Err(Errno::NOSYS),
        }
    }

    /// A duplicate of a thread's descriptor: a TCP socket, or an error.
    fn socket(&self, thread: i32, fd: RawFd) -> Result<OwnedFd> {
        let socket = self.as_user(|| {
            let pidfd = pidfd(thread)?;
            pidfd_getfd(pidfd, fd, PidfdGetfdFlags::empty())
        })?;
        if sockopt::socket_protocol(&socket)? == Some(ipproto::TCP) { Ok(socket) } else { Err(Errno::ACCESS) }
    }

    /// A copy of the address that the thread names.
    fn address(&self, thread: i32, at: u64, length: u32) -> Result<SocketAddr> {
        let mut bytes = [0u8; size_of::<libc::sockaddr_storage>()];
        let length = usize::try_from(length).map_err(|_| Errno::INVAL)?;
        let copy = bytes.get_mut(..length).ok_or(Errno::INVAL)?;
        let remote = RemoteIoVec { base: usize::try_from(at).map_err(|_| Errno::FAULT)?, len: length };
        let thread = nix::unistd::Pid::from_raw(thread);
        let read = self.as_user(|| {
            process_vm_readv(thread, &mut [IoSliceMut::new(copy)], &[remote])
                .map_err(|errno| Errno::from_raw_os_error(errno as i32))
        })?;
        if read == length { parse(&bytes[..length]) } else { Err(Errno::FAULT) }
    }

    /// Whether the thread still waits for this answer: else its id may be another's by now, and with it the socket and
    /// the address.
    fn still_there(&self, id: u64) -> Result<()> {
        ioctl(&self.listener, libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &mut { id })
    }

    /// Looks at another process with the program's user as this process's own: that is what the kernel compares for it,
    /// unless one may look at everything (CAP_SYS_PTRACE), which a container's root may not.
    fn as_user<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some((uid, gid)) = self.user else { return work() };
        let (own_uid, own_gid) = (getuid(), getgid());
        set_thread_res_gid(Gid::from_raw(gid), None, None)?;
        let result = set_thread_res_uid(Uid::from_raw(uid), None, None).and_then(|()| work());
        // The effective user was root all the time, who may do that.
        set_thread_res_uid(own_uid, None, None)?;
        set_thread_res_gid(own_gid, None, None)?;
        result
    }

    /// Makes a process what the kernel ends first when memory runs out. Else it could be the program: it may be larger
    /// than each of many tools, and the kernel ends a second process while the first one is still ending.
    fn first_to_end(&self, process: i32) {
        // Even root may not write its user's file where it has no CAP_DAC_OVERRIDE.
        let own = self.user.map(|(uid, _)| setfsuid(nix::unistd::Uid::from_raw(uid)));
        let _ = std::fs::write(format!("/proc/{process}/oom_score_adj"), MOST_OOM_SCORE_ADJ.to_string());
        own.map(setfsuid);
    }

    fn connect(&mut self, call: &seccomp_notif, socket: OwnedFd, address: SocketAddr) -> Result<Next> {
        let to = loopback_for_wildcard(address);
        let canonical = SocketAddr::new(to.ip().to_canonical(), to.port());
        let local = canonical.ip().is_loopback() && self.network.local.contains(&to.port());
        if !local && !self.network.connect.contains(&canonical) {
            self.refused.note(canonical);
            return Err(Errno::ACCESS);
        }
        // One that has an address already was exchanged before: asked again, it is to answer for itself.
        if self.apart && !local && port_of(&socket)? == 0 {
            return self.connect_outside(call, &socket, to);
        }
        let flags = fcntl_getfl(&socket)?;
        if flags.contains(OFlags::NONBLOCK) {
            return net::connect(&socket, &to).map(|()| Next::Answer);
        }
        // The flag is the socket's, not the descriptor's, so it is the program's as well: only for this moment.
        fcntl_setfl(&socket, flags | OFlags::NONBLOCK)?;
        let result = net::connect(&socket, &to);
        fcntl_setfl(&socket, flags)?;
        match result {
            Ok(()) => Ok(Next::Answer),
            Err(Errno::INPROGRESS | Errno::ALREADY) => Ok(Next::Wait(socket, None)),
            Err(errno) => Err(errno),
        }
    }

    /// Connects a socket of the jail's own, and puts it in the place of the program's.
    fn connect_outside(&self, call: &seccomp_notif, socket: &OwnedFd, to: SocketAddr) -> Result<Next> {
        let seat = self.seat_of(call)?;
        let outside = twin(socket, to)?;
        let blocks = !fcntl_getfl(socket)?.contains(OFlags::NONBLOCK);
        let connected = net::connect(&outside, &to);
        match connected {
            Ok(()) if blocks => self.seat_blocking(call.id, seat, &outside).map(|()| Next::Answer),
            Err(Errno::INPROGRESS) if blocks => Ok(Next::Wait(outside, Some(seat))),
            Ok(()) | Err(Errno::INPROGRESS) => {
                self.seat(call.id, seat, &outside)?;
                connected.map(|()| Next::Answer)
            }
            Err(errno) => Err(errno),
        }
    }

    /// The server of the program, for those outside.
    fn bind_outside(&self, call: &seccomp_notif, socket: &OwnedFd, address: SocketAddr) -> Result<()> {
        let seat = self.seat_of(call)?;
        let outside = twin(socket, address)?;
        sockopt::set_socket_reuseaddr(&outside, sockopt::socket_reuseaddr(socket)?)?;
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&outside, sockopt::ipv6_v6only(socket)?)?;
        }
        self.bind(&outside, address)?;
        if fcntl_getfl(socket)?.contains(OFlags::NONBLOCK) {
            self.seat(call.id, seat, &outside)
        } else {
            self.seat_blocking(call.id, seat, &outside)
        }
    }

    /// The descriptor that a call is about.
    fn seat_of(&self, call: &seccomp_notif) -> Result<Seat> {
        // The kernel takes 32 bits of it, like this.
        let number = call.data.args[0] as RawFd;
        let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/{number}", call.pid)).unwrap_or_default();
        let flags = info.lines().find_map(|line| i32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
        // Where it may not be looked at: as nearly every program has it.
        let closes_at_exec = flags.is_none_or(|flags| flags & libc::O_CLOEXEC != 0);
        Ok(Seat { number, closes_at_exec })
    }

    /// Puts a socket in the place of the program's, for one that blocks.
    fn seat_blocking(&self, id: u64, seat: Seat, socket: &OwnedFd) -> Result<()> {
        fcntl_setfl(socket, fcntl_getfl(socket)? - OFlags::NONBLOCK)?;
        self.seat(id, seat, socket)
    }

    /// Puts a socket in the place of the program's.
    fn seat(&self, id: u64, seat: Seat, socket: &OwnedFd) -> Result<()> {
        let descriptor = |fd: RawFd| u32::try_from(fd).map_err(|_| Errno::BADF);
        let mut add = seccomp_notif_addfd {
            id,
            flags: u32::try_from(libc::SECCOMP_ADDFD_FLAG_SETFD).map_err(|_| Errno::INVAL)?,
            srcfd: descriptor(socket.as_raw_fd())?,
            newfd: descriptor(seat.number)?,
            newfd_flags: if seat.closes_at_exec { libc::O_CLOEXEC.unsigned_abs() } else { 0 },
        };
        ioctl(&self.listener, libc::SECCOMP_IOCTL_NOTIF_ADDFD, &mut add)
    }

    fn bind(&self, socket: &OwnedFd, address: SocketAddr) -> Result<()> {
        if !address.ip().is_unspecified() && !address.ip().to_canonical().is_loopback() {
            return Err(Errno::ACCESS);
        }
        let only_v6 = address.is_ipv6() && sockopt::ipv6_v6only(socket)?;
        let at = |port| match address.ip() {
            // Both families' wildcard. A client finds such a listener at 127.0.0.1, and by the name localhost.
            IpAddr::V6(ip) if ip.is_unspecified() && !only_v6 => {
                SocketAddr::from((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), port))
            }
            _ => loopback_for_wildcard(SocketAddr::new(address.ip(), port)),
        };
        match address.port() {
            0 => self.bind_to_any(socket, at),
            port if self.network.serve.contains(&port) || self.network.local.contains(&port) => {
                net::bind(socket, &at(port))
            }
            _ => Err(Errno::ACCESS),
        }
    }

    /// Any free port is one of the program's own.
    fn bind_to_any(&self, socket: &OwnedFd, at: impl Fn(u16) -> SocketAddr) -> Result<()> {
        for port in &self.network.local {
            match net::bind(socket, &at(*port)) {
                Err(Errno::ADDRINUSE) => {}
                result => return result,
            }
        }
        Err(Errno::ADDRINUSE)
    }

    fn listen(&self, socket: &OwnedFd, backlog: i32) -> Result<()> {
        // One that was not bound would get any port, at every address.
        let bound = SocketAddr::try_from(net::getsockname(socket)?)?;
        if bound.port() == 0 {
            self.bind(socket, bound)?;
        }
        net::listen(socket, backlog)
    }

    fn receive(&self) -> Option<seccomp_notif> {
        let data = libc::seccomp_data { nr: 0, arch: 0, instruction_pointer: 0, args: [0; 6] };
        let mut call = seccomp_notif { id: 0, pid: 0, flags: 0, data };
        ioctl(&self.listener, libc::SECCOMP_IOCTL_NOTIF_RECV, &mut call).ok().map(|()| call)
    }

    fn reply(&self, id: u64, result: Result<()>) {
        let error = result.err().map_or(0, |errno| -errno.raw_os_error());
        // Without the flag to continue: the thread's own call is never made. It may have been killed by now.
        let _ = ioctl(
            &self.listener,
            libc::SECCOMP_IOCTL_NOTIF_SEND,
            &mut seccomp_notif_resp { id, val: 0, error, flags: 0 },
        );
    }
}

/// The port that a socket has; 0 for one that has none yet.
fn port_of(socket: &OwnedFd) -> Result<u16> {
    Ok(SocketAddr::try_from(net::getsockname(socket)?)?.port())
}

/// A socket of this process, for an address of the same family, that does not block.
fn twin(of: &OwnedFd, address: SocketAddr) -> Result<OwnedFd> {
    let family = if address.is_ipv6() { net::AddressFamily::INET6 } else { net::AddressFamily::INET };
    let flags = net::SocketFlags::CLOEXEC | net::SocketFlags::NONBLOCK;
    let twin = net::socket_with(family, net::SocketType::STREAM, flags, Some(ipproto::TCP))?;
    sockopt::set_tcp_nodelay(&twin, sockopt::tcp_nodelay(of)?)?;
    sockopt::set_socket_keepalive(&twin, sockopt::socket_keepalive(of)?)?;
    Ok(twin)
}

/// One of the calls that a listener takes.
#[expect(unsafe_code, reason = "no crate has these calls")]
fn ioctl<T>(listener: &OwnedFd, request: libc::Ioctl, argument: &mut T) -> Result<()> {
    // SAFETY: the number of each request has its argument's size in it, which is that of the type it is called with
    // here; the kernel reads or writes that much at the address, which lives until the call returns.
    let result = unsafe { libc::ioctl(listener.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    // One of them gives a descriptor's number.
    if result >= 0 { Ok(()) } else { Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)) }
}

fn pidfd(thread: i32) -> Result<OwnedFd> {
    let pid = |number| Pid::from_raw(number).ok_or(Errno::SRCH);
    match pidfd_open(pid(thread)?, PidfdFlags::from_bits_retain(PIDFD_THREAD)) {
        Err(Errno::INVAL) => {}
        result => return result,
    }
    // An older kernel knows processes only. The threads of one have the same descriptors, unless it has gone out of its
    // way to part them: then the call is made on another socket of its own, with the same checks.
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).map_err(|_| Errno::SRCH)?;
    let group = status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    pidfd_open(pid(group.ok_or(Errno::SRCH)?)?, PidfdFlags::empty())
}

/// The address in the bytes of a `sockaddr`: of IPv4 or IPv6, whole.
fn parse(bytes: &[u8]) -> Result<SocketAddr> {
    let [low, high, ..] = *bytes else { return Err(Errno::INVAL) };
    let array = |from: usize, to: usize| bytes.get(from..to).ok_or(Errno::INVAL);
    let number = |from| array(from, from + 4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    let port = || array(2, 4).map(|b| u16::from_be_bytes([b[0], b[1]]));
    match i32::from(u16::from_ne_bytes([low, high])) {
        libc::AF_INET if bytes.len() >= size_of::<libc::sockaddr_in>() => {
            Ok(SocketAddrV4::new(Ipv4Addr::from(number(4)?.to_ne_bytes()), port()?).into())
        }
        libc::AF_INET6 if bytes.len() >= size_of::<libc::sockaddr_in6>() => {
            let ip: [u8; 16] = array(8, 24)?.try_into().map_err(|_| Errno::INVAL)?;
            Ok(SocketAddrV6::new(ip.into(), port()?, 0, 0).into())
        }
        libc::AF_INET | libc::AF_INET6 => Err(Errno::INVAL),
        _ => Err(Errno::AFNOSUPPORT),
    }
}

/// Linux takes the wildcard for loopback where something is to be reached.
fn loopback_for_wildcard(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
