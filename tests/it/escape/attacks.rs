//! The table of attacks: what each tries, what must be said where it is contained, and how it is known that it could
//! have worked.
//!
//! Shell lines are what an agent would type; calls are those of `calls`, each made in a process of its own. What an
//! attack needs to know stands in variables, which the test writes: what the attacker would have to guess is given to
//! it.

use super::calls;
use nix::errno::Errno;

/// What tries it.
pub(super) enum By {
    /// A line that ends with 0 where it got through.
    Shell(&'static str),
    Call(fn() -> Result<(), Errno>),
}

/// What becomes of it with `SANDBOX=off`, as root: an attack that cannot work there either proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outside {
    Works,
    /// It works, or something else than the sandbox stands in the way, and says so in other words: no network, say.
    NotRefused,
    /// The jail takes it from every program, confined or not.
    KeptByTheJail,
}

/// What is known to be open, and what closes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Open {
    No,
    /// Between processes of one user: a user of its own closes it.
    ToTheSameUser,
    /// To whoever sees the same `/proc`; it shows nothing secret.
    Always,
}

pub(super) struct Attack {
    pub(super) name: &'static str,
    pub(super) by: By,
    /// One of these is said where it is contained.
    pub(super) says: &'static [&'static str],
    pub(super) outside: Outside,
    pub(super) open: Open,
}

const KEPT: &[&str] = &["Permission denied", "Operation not permitted", "ross-device link", "Read-only file system"];
const ACCES: &[&str] = &["EACCES"];
const PERM: &[&str] = &["EPERM"];
const NO_SOCKET: &[&str] = &["EAFNOSUPPORT"];
const MISSING: &[&str] = &["ENOSYS"];

const fn sh(name: &'static str, line: &'static str) -> Attack {
    Attack { name, by: By::Shell(line), says: KEPT, outside: Outside::Works, open: Open::No }
}

const fn call(name: &'static str, call: fn() -> Result<(), Errno>, says: &'static [&'static str]) -> Attack {
    Attack { name, by: By::Call(call), says, outside: Outside::Works, open: Open::No }
}

impl Attack {
    const fn not_refused(self) -> Self {
        Self { outside: Outside::NotRefused, ..self }
    }

    const fn kept_by_the_jail(self) -> Self {
        Self { outside: Outside::KeptByTheJail, ..self }
    }

    const fn open(self, open: Open) -> Self {
        Self { open, ..self }
    }
}

use Open::{Always, ToTheSameUser};

/// All of them. `OUT` is everybody's, `WS` the workspace, of which the session has `work` alone.
pub(super) static ATTACKS: &[Attack] = &[
    // Files outside, by every kind of name.
    sh("read", "cat $OUT/file"),
    sh("list", "ls $OUT"),
    sh("overwrite", "echo x > $OUT/scratch"),
    sh("append", "echo x >> $OUT/scratch"),
    sh("make", "echo x > $OUT/new"),
    sh("make-directory", "mkdir $OUT/newdir"),
    sh("remove", "rm -f $OUT/removable"),
    sh("execute", "$OUT/run"),
    call("truncate", calls::truncate, ACCES),
    sh("dots", "cat ../outside"),
    sh("list-above", "ls .."),
    sh("symlink-read", "ln -sfn $OUT/file link && cat link"),
    sh("symlink-write", "ln -sfn $OUT/scratch scratch-link && echo x > scratch-link"),
    sh("symlink-directory", "ln -sfn $OUT outlink && ls outlink/"),
    sh("hard-link-in", "ln $OUT/file hard"),
    sh("hard-link-out", "touch mine && ln mine $OUT/hard"),
    call("rename-in", calls::rename_in, &["EXDEV", "EACCES"]),
    call("rename-out", calls::rename_out, &["EXDEV", "EACCES"]),
    call("rename-exchange", calls::rename_exchange, &["EXDEV", "EACCES"]),
    sh("proc-root", "cat /proc/self/root$OUT/file"),
    sh("proc-cwd", "cat /proc/self/cwd/../outside"),
    call("bind-mount", calls::bind_mount, PERM),
    call("new-mount", calls::new_mount, PERM),
    call("chroot", calls::chroot, PERM),
    call("device-node", calls::device_node, &["EACCES", "EPERM"]),
    call("by-handle", calls::by_handle, PERM),
    sh("workspace-read", "cat $WS/other/secret"),
    sh("workspace-write", "echo x > $WS/made"),
    sh("state-read", "cat $STATE/instance"),
    sh("state-list", "ls $STATE/sessions"),
    sh("neighbour-directory", "ls $NEIGHBOUR_ROOT"),
    sh("neighbour-write", "touch $NEIGHBOUR_ROOT/tmp/touched"),
    sh("root-home", "ls /root"),
    sh("shadow", "cat /etc/shadow"),
    sh("etc-write", ": > /etc/ld.so.preload-escape && rm /etc/ld.so.preload-escape"),
    sh("tmp-list", "ls /tmp"),
    sh("shared-memory", ": > /dev/shm/escape-$$ && rm /dev/shm/escape-$$"),
    sh("devices", "ls /dev"),
    sh("kernel-log", "dd if=/dev/kmsg of=/dev/null bs=8192 count=1 iflag=nonblock"),
    sh("kernel-settings", "v=$(cat /proc/sys/vm/swappiness) && echo $v > /proc/sys/vm/swappiness"),
    sh("sysfs", "ls /sys/class"),
    sh("oom-score", "echo 0 > /proc/self/oom_score_adj"),
    sh(
        "cgroup-make",
        "for d in /sys/fs/cgroup /sys/fs/cgroup/*; do mkdir $d/escape-$$ && rmdir $d/escape-$$ && exit; done; exit 1",
    ),
    sh("cgroup-leave", "for d in /sys/fs/cgroup /sys/fs/cgroup/*; do echo $$ > $d/cgroup.procs && exit; done; exit 1"),
    sh("sidecar-executable", "d=$(dirname $SIDECAR_EXE) && touch $d/escape-$$ && rm $d/escape-$$"),
    // What Landlock does not cover: in a directory of its owner alone, as every session has one.
    sh("stat", "stat $OUT/private/file").open(ToTheSameUser),
    sh("chmod", "chmod 666 $OUT/private/file").open(ToTheSameUser),
    sh("times", "touch -d 2001-01-01 $OUT/private").open(ToTheSameUser),
    call("attributes", calls::attributes, ACCES).open(ToTheSameUser),
    call("watch-directory", calls::watch_directory, ACCES).open(ToTheSameUser),
    call("terminal", calls::terminal, ACCES).open(ToTheSameUser),
    // Other processes: the sidecar, a neighbour's jail, a neighbour, and one that has nothing to do with it.
    sh("command-line", "grep -q . /proc/$NEIGHBOUR/cmdline").open(Always),
    sh("sidecar-environment", "cat /proc/$SIDECAR/environ"),
    sh("sidecar-root", "cat /proc/$SIDECAR/root$OUT/file"),
    sh("sidecar-cwd", "ls /proc/$SIDECAR/cwd/"),
    sh("sidecar-fd", "ls -l /proc/$SIDECAR/fd/"),
    sh("sidecar-maps", "cat /proc/$SIDECAR/maps"),
    call("sidecar-memory", calls::sidecar_memory, ACCES),
    sh("jail-environment", "cat /proc/$JAIL/environ"),
    sh("neighbour-environment", "cat /proc/$NEIGHBOUR/environ"),
    sh("neighbour-root", "ls -L /proc/$NEIGHBOUR/root"),
    sh("neighbour-cwd", "cat /proc/$NEIGHBOUR/cwd/secret"),
    sh("neighbour-fd", "ls -l /proc/$NEIGHBOUR/fd/"),
    sh("neighbour-fd-numbers", "ls /proc/$NEIGHBOUR/fd/").open(ToTheSameUser),
    sh("signal-sidecar", "kill -0 $SIDECAR"),
    sh("signal-jail", "kill -0 $JAIL"),
    sh("signal-neighbour", "kill -0 $NEIGHBOUR"),
    call("signal-value", calls::signal_value, PERM),
    call("signal-pidfd", calls::signal_pidfd, PERM),
    call("signal-by-io", calls::signal_by_io, &["ETIMEDOUT"]),
    call("ptrace", calls::ptrace, PERM),
    call("read-memory", calls::read_memory, PERM),
    call("take-descriptor", calls::take_descriptor, PERM),
    call("compare-processes", calls::compare, PERM),
    call("limits-of-sidecar", calls::limits_of_sidecar, PERM),
    call("affinity", calls::affinity, PERM).open(ToTheSameUser),
    call("priority", calls::priority, PERM).open(ToTheSameUser),
    sh("namespace-of-sidecar", "nsenter -t $SIDECAR -m true"),
    // Privileges.
    sh(
        "setuid-program",
        "./suid-cat /proc/self/status | grep CapEff | grep -qv 0000000000000000 || { echo Permission denied: none; false; }",
    ),
    call("capabilities", calls::capabilities, PERM),
    call("other-user", calls::other_user, PERM),
    call("other-groups", calls::other_groups, PERM),
    sh("user-namespace", "unshare -U true"),
    call("user-namespace-clone", calls::clone_user, PERM),
    call("user-namespace-clone3", calls::clone3_user, MISSING),
    call("mount-namespace", calls::unshare_mount, PERM),
    call("network-namespace", calls::unshare_network, PERM),
    call("keyring", calls::keyring, PERM),
    call("keyring-look", calls::keyring_look, PERM),
    call("bpf", calls::bpf, PERM).not_refused(),
    call("perf", calls::perf, PERM).not_refused(),
    call("io-uring", calls::io_uring, MISSING).not_refused(),
    call("userfaultfd", calls::userfaultfd, PERM),
    call("system-v-memory", calls::system_v, MISSING),
    call("posix-queue", calls::posix_queue, MISSING),
    call("personality", calls::personality, PERM),
    call("clock", calls::clock, PERM),
    call("reboot", calls::reboot, PERM).not_refused(),
    call("dmesg", calls::dmesg, PERM),
    call("host-name", calls::host_name, PERM),
    call("door-for-32-bit", calls::door_for_32_bit, &["SIGSYS"]).not_refused(),
    sh("core-dump", "ulimit -c unlimited && { sh -c 'kill -SEGV $$'; ls core* && rm core*; }").kept_by_the_jail(),
    // The network.
    call("sidecar-api", calls::sidecar_api, ACCES),
    call("own-api", calls::own_api, ACCES),
    call("own-api-mapped", calls::own_api_mapped, ACCES),
    call("neighbour-api", calls::neighbour_api, ACCES),
    call("postgres", calls::postgres, ACCES),
    call("postgres-socket", calls::postgres_socket, NO_SOCKET),
    call("allowed-port-elsewhere", calls::elsewhere, ACCES),
    call("allowed-port-elsewhere-6", calls::elsewhere6, ACCES).not_refused(),
    call("instance-metadata", calls::metadata, ACCES).not_refused(),
    call("dns-tcp", calls::dns_tcp, ACCES).not_refused(),
    call("dns-udp", calls::dns_udp, NO_SOCKET),
    call("mptcp", calls::mptcp, NO_SOCKET),
    call("fast-open-sendto", calls::fast_open_sendto, PERM),
    call("fast-open-sendmsg", calls::fast_open_sendmsg, PERM),
    call("fast-open-option", calls::fast_open_option, PERM),
    call("vsock", calls::vsock, NO_SOCKET),
    call("abstract-socket", calls::abstract_socket, NO_SOCKET),
    call("path-socket", calls::path_socket, NO_SOCKET),
    call("datagram-pair", calls::datagram_pair, NO_SOCKET),
    call("netlink", calls::netlink, NO_SOCKET),
    call("raw-socket", calls::raw_socket, NO_SOCKET),
    call("packet-socket", calls::packet_socket, NO_SOCKET),
    call("listen-elsewhere", calls::listen_elsewhere, ACCES),
    call("listen-as-neighbour", calls::listen_as_neighbour, ACCES).not_refused(),
    call("bind-to-device", calls::bind_to_device, PERM),
    call("source-route", calls::source_route, PERM),
    sh("shell-connect", "exec 3<> /dev/tcp/127.0.0.1/$SIDECAR_PORT"),
];
