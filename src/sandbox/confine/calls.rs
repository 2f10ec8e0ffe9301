//! The calls that a confined program does not have, each with its reason.
//!
//! A list of what is denied, not of what is allowed: what runs inside is whatever an agent installs. A call that is
//! newer than this list was judged by nobody: it does not exist either (see `seccomp`).

use nix::libc;

/// What a denied call answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    /// EPERM: as to whoever lacks the right.
    NotPermitted,
    /// ENOSYS: as on a kernel without it, so that libraries use what there was before.
    Missing,
    /// EAFNOSUPPORT: as on a kernel without this kind of socket.
    NoSuchSocket,
}

impl Answer {
    /// The error's number.
    pub fn errno(self) -> i32 {
        match self {
            Self::NotPermitted => libc::EPERM,
            Self::Missing => libc::ENOSYS,
            Self::NoSuchSocket => libc::EAFNOSUPPORT,
        }
    }
}

/// A denied call.
#[derive(Clone, Copy, Debug)]
pub struct Denied {
    /// Its name.
    pub call: &'static str,
    /// What it answers.
    pub answer: Answer,
    /// Denied where all conditions of one of these lists hold. Empty: always.
    pub when: &'static [&'static [Condition]],
    /// Why.
    pub why: &'static str,
}

/// A condition on one argument. The kernel reads all of these as 32 bits.
#[derive(Clone, Copy, Debug)]
pub struct Condition {
    /// Which argument, from 0.
    pub argument: u8,
    /// How it is compared.
    pub test: Test,
}

/// How an argument is compared.
#[derive(Clone, Copy, Debug)]
pub enum Test {
    /// It is this.
    Is(u32),
    /// It is not this.
    IsNot(u32),
    /// Of the bits of the first, it has those of the second and no others.
    Masked(u32, u32),
}

/// Every denied call.
pub fn denied() -> &'static [Denied] {
    DENIED
}

/// Calls of the list that aarch64 never had.
#[cfg(test)]
pub(super) const NOT_ON_AARCH64: &[&str] = &["iopl", "ioperm", "modify_ldt", "uselib", "_sysctl"];

const fn is(argument: u8, value: u32) -> Condition {
    Condition { argument, test: Test::Is(value) }
}

const fn is_not(argument: u8, value: u32) -> Condition {
    Condition { argument, test: Test::IsNot(value) }
}

const fn has(argument: u8, bits: u32) -> Condition {
    Condition { argument, test: Test::Masked(bits, bits) }
}

const fn lacks(argument: u8, bits: u32) -> Condition {
    Condition { argument, test: Test::Masked(bits, 0) }
}

const fn always(call: &'static str, answer: Answer, why: &'static str) -> Denied {
    Denied { call, answer, when: &[], why }
}

const fn when(call: &'static str, answer: Answer, when: &'static [&'static [Condition]], why: &'static str) -> Denied {
    Denied { call, answer, when, why }
}

// Bits and numbers of the kernel's interface, the same on every architecture.
const CLONE_NEWTIME: u32 = 0x80;
const CLONE_NEWNS: u32 = 0x2_0000;
const CLONE_NEWCGROUP: u32 = 0x200_0000;
const CLONE_NEWUTS: u32 = 0x400_0000;
const CLONE_NEWIPC: u32 = 0x800_0000;
const CLONE_NEWUSER: u32 = 0x1000_0000;
const CLONE_NEWPID: u32 = 0x2000_0000;
const CLONE_NEWNET: u32 = 0x4000_0000;
const MSG_FASTOPEN: u32 = 0x2000_0000;
const NEW_LISTENER: u32 = 1 << 3;
const AF_UNIX: u32 = 1;
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const TCP: u32 = 6;
const SOL_SOCKET: u32 = 1;
const SOL_IP: u32 = 0;
const SOL_IPV6: u32 = 41;

/// The low four bits of a socket's type are its kind, of which SOCK_STREAM is 1: each of these holds for other kinds.
const NOT_STREAM: [Condition; 4] = [lacks(1, 1), has(1, 2), has(1, 4), has(1, 8)];

use Answer::{Missing, NoSuchSocket, NotPermitted};

static DENIED: &[Denied] = &[
    // The file system: mounts would change what the paths of Landlock's rules mean to others, and need no right inside
    // a user namespace.
    always("mount", NotPermitted, "mounts"),
    always("umount2", NotPermitted, "mounts"),
    always("pivot_root", NotPermitted, "mounts"),
    always("fsopen", NotPermitted, "mounts, by descriptor"),
    always("fsconfig", NotPermitted, "mounts, by descriptor"),
    always("fsmount", NotPermitted, "mounts, by descriptor"),
    always("fspick", NotPermitted, "mounts, by descriptor"),
    always("open_tree", NotPermitted, "mounts, by descriptor"),
    always("open_tree_attr", NotPermitted, "mounts, by descriptor"),
    always("move_mount", NotPermitted, "mounts, by descriptor"),
    always("mount_setattr", NotPermitted, "mounts, by descriptor"),
    always("chroot", NotPermitted, "changes what paths mean"),
    always("open_by_handle_at", NotPermitted, "opens a file past all directories above it"),
    always("name_to_handle_at", NotPermitted, "makes what the one before takes"),
    always("fanotify_init", NotPermitted, "watches what others do with files"),
    always("fanotify_mark", NotPermitted, "watches what others do with files"),
    always("quotactl", NotPermitted, "the limits of disks"),
    always("quotactl_fd", NotPermitted, "the limits of disks"),
    always("swapon", NotPermitted, "the machine's memory"),
    always("swapoff", NotPermitted, "the machine's memory"),
    // Namespaces: a new one of users gives every capability inside, and with them most of the kernel's surface.
    when(
        "unshare",
        NotPermitted,
        &[
            &[has(0, CLONE_NEWTIME)],
            &[has(0, CLONE_NEWNS)],
            &[has(0, CLONE_NEWCGROUP)],
            &[has(0, CLONE_NEWUTS)],
            &[has(0, CLONE_NEWIPC)],
            &[has(0, CLONE_NEWUSER)],
            &[has(0, CLONE_NEWPID)],
            &[has(0, CLONE_NEWNET)],
        ],
        "new namespaces",
    ),
    when(
        "clone",
        NotPermitted,
        // Its lowest byte is a signal; that of a time namespace cannot be asked for here.
        &[
            &[has(0, CLONE_NEWNS)],
            &[has(0, CLONE_NEWCGROUP)],
            &[has(0, CLONE_NEWUTS)],
            &[has(0, CLONE_NEWIPC)],
            &[has(0, CLONE_NEWUSER)],
            &[has(0, CLONE_NEWPID)],
            &[has(0, CLONE_NEWNET)],
        ],
        "new namespaces",
    ),
    always("clone3", Missing, "its flags are in memory, where no filter sees them; libraries fall back to clone"),
    always("setns", NotPermitted, "others' namespaces"),
    // Other processes: Landlock keeps it to its own, the oldest kernels too.
    always("ptrace", NotPermitted, "takes over a process"),
    always("process_vm_readv", NotPermitted, "another process's memory"),
    always("process_vm_writev", NotPermitted, "another process's memory"),
    always("process_madvise", NotPermitted, "another process's memory"),
    always("process_mrelease", NotPermitted, "another process's memory"),
    always("pidfd_getfd", NotPermitted, "another process's descriptors"),
    when(
        "prlimit64",
        NotPermitted,
        // 0 is the calling process, which is all that libraries ask for.
        &[&[is_not(0, 0)]],
        "another process's limits: one of CPU time or files ends the sidecar, which Landlock does not keep from its user",
    ),
    always("kcmp", NotPermitted, "compares what two processes have in the kernel"),
    always("move_pages", NotPermitted, "another process's memory, and where it lies"),
    always("migrate_pages", NotPermitted, "another process's memory"),
    always("mbind", NotPermitted, "where memory lies: the machine's business"),
    always("set_mempolicy", NotPermitted, "where memory lies: the machine's business"),
    always("set_mempolicy_home_node", NotPermitted, "where memory lies: the machine's business"),
    always("lookup_dcookie", NotPermitted, "paths for a profiler of the whole machine"),
    // Much kernel behind one call.
    always("bpf", NotPermitted, "programs inside the kernel"),
    always("perf_event_open", NotPermitted, "measures others, and has been a way into the kernel"),
    always("userfaultfd", NotPermitted, "stops the kernel in the middle of a copy, which exploits need"),
    always("io_uring_setup", Missing, "opens, connects and sends past every filter of calls"),
    always("io_uring_enter", Missing, "opens, connects and sends past every filter of calls"),
    always("io_uring_register", Missing, "opens, connects and sends past every filter of calls"),
    always("add_key", NotPermitted, "keys are not kept apart by user namespaces or sessions"),
    always("request_key", NotPermitted, "keys are not kept apart by user namespaces or sessions"),
    always("keyctl", NotPermitted, "keys are not kept apart by user namespaces or sessions"),
    when(
        "seccomp",
        NotPermitted,
        &[&[is(0, libc::SECCOMP_SET_MODE_FILTER), has(1, NEW_LISTENER)]],
        "a second listener would be asked in the place of the gate, once that is gone",
    ),
    when(
        "personality",
        NotPermitted,
        // 0 is Linux as it is; all ones only ask.
        &[&[is_not(0, 0), is_not(0, u32::MAX)]],
        "takes protections of memory away, and brings rarely used code of the kernel",
    ),
    when(
        "ioctl",
        NotPermitted,
        &[&[is(1, 0x5412)], &[is(1, 0x541c)]],
        "TIOCSTI and TIOCLINUX type into somebody else's terminal",
    ),
    // What would be left of it after its end: these belong to no process.
    always("shmget", Missing, "System V memory outlives its processes, and is shared by all of one user"),
    always("semget", Missing, "System V semaphores outlive their processes, and are shared by all of one user"),
    always("msgget", Missing, "System V queues outlive their processes, and are shared by all of one user"),
    always("mq_open", Missing, "POSIX queues outlive their processes, and are shared by all of one user"),
    // The machine.
    always("init_module", NotPermitted, "kernel modules"),
    always("finit_module", NotPermitted, "kernel modules"),
    always("delete_module", NotPermitted, "kernel modules"),
    always("kexec_load", NotPermitted, "another kernel"),
    always("kexec_file_load", NotPermitted, "another kernel"),
    always("reboot", NotPermitted, "the machine's power"),
    always("settimeofday", NotPermitted, "the machine's clock"),
    always("clock_settime", NotPermitted, "the machine's clock"),
    always("clock_adjtime", NotPermitted, "the machine's clock"),
    always("adjtimex", NotPermitted, "the machine's clock"),
    always("sethostname", NotPermitted, "the machine's name"),
    always("setdomainname", NotPermitted, "the machine's name"),
    always("acct", NotPermitted, "the machine's accounting"),
    always("syslog", NotPermitted, "the kernel's log"),
    always("vhangup", NotPermitted, "somebody else's terminal"),
    always("nfsservctl", NotPermitted, "a server inside the kernel, long gone"),
    always("iopl", NotPermitted, "the machine's ports"),
    always("ioperm", NotPermitted, "the machine's ports"),
    always("modify_ldt", NotPermitted, "16-bit segments, which only exploits and old Windows programs use"),
    always("uselib", NotPermitted, "loads a library past everything that is new"),
    always("_sysctl", NotPermitted, "the machine's settings, long gone"),
    // The network: TCP, and pairs of Unix sockets.
    when(
        "socket",
        NoSuchSocket,
        &[
            &[is_not(0, AF_INET), is_not(0, AF_INET6)],
            &[NOT_STREAM[0]],
            &[NOT_STREAM[1]],
            &[NOT_STREAM[2]],
            &[NOT_STREAM[3]],
            &[is_not(2, 0), is_not(2, TCP)],
        ],
        "UDP, raw, MPTCP, SCTP, SMC, vsock, packet, netlink and the rest connect past Landlock and the gate; and a \
         path-named Unix socket leads to whoever listens there",
    ),
    when(
        "socketpair",
        NoSuchSocket,
        &[
            &[is_not(0, AF_UNIX)],
            // Streams (1) and sequenced packets (5) are connected for good. A pair of datagrams (2, and 3 means the
            // same) can be sent from to any path or abstract name.
            &[lacks(1, 1)],
            &[has(1, 2)],
            &[has(1, 8)],
        ],
        "half a pair of datagrams reaches every Unix socket",
    ),
    when("sendto", NotPermitted, &[&[has(3, MSG_FASTOPEN)]], "TCP Fast Open connects without connect"),
    when("sendmsg", NotPermitted, &[&[has(2, MSG_FASTOPEN)]], "TCP Fast Open connects without connect"),
    when("sendmmsg", NotPermitted, &[&[has(3, MSG_FASTOPEN)]], "TCP Fast Open connects without connect"),
    when(
        "setsockopt",
        NotPermitted,
        &[
            // TCP_FASTOPEN_CONNECT
            &[is(1, TCP), is(2, 30)],
            // SO_BINDTODEVICE, SO_BINDTOIFINDEX
            &[is(1, SOL_SOCKET), is(2, 25)],
            &[is(1, SOL_SOCKET), is(2, 62)],
            // IP_OPTIONS, IP_UNICAST_IF
            &[is(1, SOL_IP), is(2, 4)],
            &[is(1, SOL_IP), is(2, 50)],
            // IPV6_2292RTHDR, IPV6_2292PKTOPTIONS, IPV6_RTHDR, IPV6_UNICAST_IF
            &[is(1, SOL_IPV6), is(2, 5)],
            &[is(1, SOL_IPV6), is(2, 6)],
            &[is(1, SOL_IPV6), is(2, 57)],
            &[is(1, SOL_IPV6), is(2, 76)],
        ],
        "source routes and devices send what is addressed to this machine out of it; Fast Open connects later",
    ),
];
