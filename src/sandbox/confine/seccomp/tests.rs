//! What the filters answer: the very bytes that the kernel gets, run by a small interpreter, for both architectures.

use super::*;
use crate::sandbox::confine::calls::NOT_ON_AARCH64;

const X86_64: u32 = 0xc000_003e;
const AARCH64: u32 = 0xc000_00b7;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
const GATE: u32 = libc::SECCOMP_RET_USER_NOTIF;

fn errno(number: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | number.unsigned_abs()
}

/// One call, as the kernel shows it to a filter.
#[derive(Clone, Copy)]
struct Call {
    number: u32,
    arch: u32,
    args: [u64; 6],
}

impl Call {
    fn word(&self, offset: u32) -> u32 {
        let arg = |offset: u32| self.args[offset as usize / 8];
        match offset {
            0 => self.number,
            4 => self.arch,
            // The address of the instruction.
            8 | 12 => 0,
            _ if (offset - 16).is_multiple_of(8) => arg(offset - 16) as u32,
            _ => (arg(offset - 20) >> 32) as u32,
        }
    }
}

/// Runs one program. What is not used in these filters is not here.
fn run(program: &[sock_filter], call: &Call) -> u32 {
    let (mut at, mut accumulator) = (0, 0u32);
    loop {
        let sock_filter { code, jt, jf, k } = program[at].clone();
        at += 1;
        let jump = |holds: bool| usize::from(if holds { jt } else { jf });
        match u32::from(code) {
            0x20 => accumulator = call.word(k),
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => at += jump(accumulator == k),
            0x25 => at += jump(accumulator > k),
            0x35 => at += jump(accumulator >= k),
            0x06 => return k,
            other => unreachable!("no filter has the instruction {other:#x}"),
        }
    }
}

struct Machine {
    arch: u32,
    target: TargetArch,
    program: BpfProgram,
}

impl Machine {
    fn new(target: TargetArch, gated: &[&str]) -> Self {
        let arch = if target == TargetArch::x86_64 { X86_64 } else { AARCH64 };
        Self { arch, target, program: program(target, gated).unwrap() }
    }

    fn both() -> [Self; 2] {
        [TargetArch::x86_64, TargetArch::aarch64].map(|target| Self::new(target, &GATED))
    }

    fn raw(&self, call: &Call) -> u32 {
        run(&self.program, call)
    }

    fn ask(&self, call: &str, args: &[u64]) -> u32 {
        let number = number(self.target, call).unwrap_or_else(|| panic!("no call {call}"));
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        self.raw(&Call { number, arch: self.arch, args: all })
    }
}

#[test]
fn each_call_of_the_list_answers_as_it_says() {
    for machine in Machine::both() {
        for denied in denied() {
            let Some(number) = number(machine.target, denied.call) else {
                let known = machine.target == TargetArch::aarch64 && NOT_ON_AARCH64.contains(&denied.call);
                assert!(known, "{:?} has no {}", machine.target, denied.call);
                continue;
            };
            assert!(number <= LAST, "{}", denied.call);
            let wanted = errno(denied.answer.errno());
            // Every way in which it is denied, with arguments that meet just these conditions, and the upper halves of
            // the registers, which the kernel ignores, empty and full.
            let ways: Vec<&[Condition]> = if denied.when.is_empty() { vec![&[]] } else { denied.when.to_vec() };
            for way in ways {
                for upper in [0, u64::MAX << 32] {
                    let mut args = [upper; 6];
                    for condition in way {
                        let at = usize::from(condition.argument);
                        match condition.test {
                            Test::Is(value) | Test::Masked(_, value) => args[at] |= u64::from(value),
                            // One that is none of those that the list makes exceptions for.
                            Test::IsNot(_) => args[at] = upper | 0x77,
                        }
                    }
                    let call = Call { number, arch: machine.arch, args };
                    assert_eq!(machine.raw(&call), wanted, "{} {way:?} {upper:#x}", denied.call);
                }
            }
        }
        for call in NOT_ON_AARCH64.iter().filter(|_| machine.target == TargetArch::aarch64) {
            assert!(number(machine.target, call).is_none(), "aarch64 has {call}");
        }
    }
}

/// Each part ends by allowing, which is where the next one begins.
#[test]
fn the_parts_are_put_together_where_they_allow() {
    for target in [TargetArch::x86_64, TargetArch::aarch64] {
        for part in denials(target).unwrap().iter().chain([&entry(target, &GATED)]) {
            assert!(part.last().is_some_and(|last| last.code == 0x06 && last.k == ALLOW));
        }
        let whole = program(target, &GATED).unwrap();
        assert!(whole.len() < 4096, "{}", whole.len());
    }
}

#[test]
fn a_call_is_on_the_list_once() {
    let mut names: Vec<_> = denied().iter().map(|denied| denied.call).collect();
    names.sort_unstable();
    let all = names.len();
    names.dedup();
    assert_eq!(names.len(), all);
    assert!(denied().iter().all(|denied| !denied.why.is_empty() && !GATED.contains(&denied.call)));
}

#[test]
fn what_programs_need_is_there() {
    const CLOEXEC: u64 = 0o2_000_000;
    for machine in Machine::both() {
        for call in ["read", "openat", "execve", "wait4", "prctl", "futex", "pidfd_open", "kill", "accept4", "recvmsg"]
        {
            assert_eq!(machine.ask(call, &[]), ALLOW, "{call}");
        }
        let allowed: &[(&str, &[u64])] = &[
            // A thread, and fork.
            ("clone", &[0x3d_0f00]),
            ("clone", &[0x120_0011]),
            ("unshare", &[0x400]),
            ("socket", &[2, 1, 0]),
            ("socket", &[10, 1 | CLOEXEC | 0o4000, 6]),
            ("socketpair", &[1, 1 | CLOEXEC, 0]),
            ("socketpair", &[1, 5, 0]),
            ("sendto", &[3, 0, 0, 0x4000]),
            ("sendmsg", &[3, 0, 0x4000]),
            // TCP_NODELAY, SO_KEEPALIVE, TCP_FASTOPEN of a listener, and one of IP whose number is another's at TCP.
            ("setsockopt", &[3, 6, 1]),
            ("setsockopt", &[3, 1, 9]),
            ("setsockopt", &[3, 6, 23]),
            ("setsockopt", &[3, 6, 4]),
            ("personality", &[0xffff_ffff]),
            ("personality", &[0]),
            ("ioctl", &[0, 0x5413]),
            ("seccomp", &[1, 0]),
            ("seccomp", &[2, 8]),
        ];
        for (call, args) in allowed {
            assert_eq!(machine.ask(call, args), ALLOW, "{call} {args:x?}");
        }
    }
}

#[test]
fn sockets_are_of_tcp_or_pairs() {
    let no = errno(libc::EAFNOSUPPORT);
    for machine in Machine::both() {
        // Families: netlink, packet, vsock, SMC and all others, Unix included.
        for family in (0..64).filter(|family| ![2, 10].contains(family)) {
            assert_eq!(machine.ask("socket", &[family, 1, 0]), no, "family {family}");
        }
        for family in [2, 10] {
            for kind in 0..16 {
                for flags in [0, 0o2_000_000, 0o4000] {
                    let wanted = if kind == 1 { ALLOW } else { no };
                    assert_eq!(machine.ask("socket", &[family, kind | flags, 0]), wanted, "kind {kind}");
                }
            }
            // UDP, SCTP, UDP-Lite, raw, SMC, MPTCP.
            for protocol in [17, 132, 136, 255, 256, 262] {
                assert_eq!(machine.ask("socket", &[family, 1, protocol]), no, "protocol {protocol}");
            }
        }
        for kind in 0..16 {
            let wanted = if [1, 5].contains(&kind) { ALLOW } else { no };
            // The kernel knows no such kinds as 7 and above.
            if kind < 7 || kind == 10 {
                assert_eq!(machine.ask("socketpair", &[1, kind, 0]), wanted, "kind {kind}");
            }
        }
        assert_eq!(machine.ask("socketpair", &[2, 1, 0]), no);
    }
}

#[test]
fn three_calls_are_referred_to_the_gate_where_there_is_one() {
    for machine in Machine::both() {
        for call in GATED {
            assert_eq!(machine.ask(call, &[]), GATE);
            assert_eq!(Machine::new(machine.target, &[]).ask(call, &[]), ALLOW, "ports are Landlock's business then");
        }
    }
}

#[test]
fn other_doors_into_the_kernel_are_closed() {
    let [x86_64, aarch64] = Machine::both();
    let call = |number, arch| Call { number, arch, args: [0; 6] };
    let missing = errno(libc::ENOSYS);
    // x32: getpid, and mount by its number there.
    assert_eq!(x86_64.raw(&call(0x4000_0000 | 39, X86_64)), missing);
    assert_eq!(x86_64.raw(&call(0x4000_0000 | 165, X86_64)), missing);
    for machine in [&x86_64, &aarch64] {
        assert_eq!(machine.raw(&call(LAST, machine.arch)), ALLOW);
        assert_eq!(machine.raw(&call(LAST + 1, machine.arch)), missing, "newer than the list");
        assert_eq!(machine.raw(&call(u32::MAX, machine.arch)), missing);
    }
    // 32 bits: i386 and arm.
    assert_eq!(x86_64.raw(&call(20, 0x4000_0003)), KILL);
    assert_eq!(aarch64.raw(&call(20, 0x4000_0028)), KILL);
    assert_eq!(aarch64.raw(&call(20, X86_64)), KILL);
}

#[test]
fn numbers_are_this_machines() {
    let own = [("mount", libc::SYS_mount), ("connect", libc::SYS_connect), ("clone3", libc::SYS_clone3)];
    for (call, wanted) in own {
        assert_eq!(number(OWN, call).map(libc::c_long::from), Some(wanted));
    }
}
