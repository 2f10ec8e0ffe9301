//! The filter of system calls: the list in `calls` compiled, and the entry that stands before it.
//!
//! `seccompiler` gives a program one answer, so there is one part for each. Before them stands an entry that is written
//! by hand, for what that crate cannot say: numbers beyond the last one that was judged (x32's among them, which have
//! bit 30) do not exist, and three calls are referred to the gate. Whatever comes through another door than the 64-bit
//! one (`int 0x80` on x86) is killed: no program of this kind has a reason to. All of it is one filter, since the kernel
//! takes long over each.

use super::Failed;
use super::calls::{Answer, Condition, Denied, Test, denied};
use nix::errno::Errno;
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};
use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

#[cfg(target_arch = "x86_64")]
const OWN: TargetArch = TargetArch::x86_64;
#[cfg(target_arch = "aarch64")]
const OWN: TargetArch = TargetArch::aarch64;

/// The calls that the gate makes in the program's place.
const GATED: [&str; 3] = ["connect", "bind", "listen"];

/// Compiled, and not yet in force.
pub(super) struct Filter(BpfProgram);

/// Compiles the filter for this machine. `None`: its kernel has no filters.
pub(super) fn prepare() -> Result<Option<Filter>, Failed> {
    if !is_available(libc::SECCOMP_RET_ERRNO) {
        return Ok(None);
    }
    program(OWN, &GATED).map(|program| Some(Filter(program))).map_err(|error| Failed::new("seccomp", error))
}

/// Whether the kernel knows an action.
#[expect(unsafe_code, reason = "no crate has this call")]
pub(super) fn is_available(action: u32) -> bool {
    // SAFETY: the kernel reads one u32 from the address, which lives until the call returns, and keeps nothing.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    result == 0
}

impl Filter {
    /// Puts it in force for this process for good; needs no_new_privs. Gives the gate's end of what is referred to it,
    /// or `None` where this kernel, or another listener above, does not let it be.
    pub(super) fn apply(&self) -> Result<Option<OwnedFd>, Failed> {
        const LISTEN: libc::c_ulong = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        let failed = |errno| Failed::new("seccomp", errno);
        // Interrupted by nothing but death while the gate is at work: the gate's connect is not to be made twice.
        for flags in [LISTEN | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, LISTEN] {
            match install(&self.0, flags) {
                // A kernel without the flag; without listeners; somebody above who listens already.
                Err(Errno::EINVAL | Errno::EBUSY) => {}
                result => return result.map_err(failed),
            }
        }
        let program = program(OWN, &[]).map_err(|error| Failed::new("seccomp", error))?;
        install(&program, 0).map_err(failed)
    }
}

/// Installs a filter; gives its listener, where it was to have one.
#[expect(unsafe_code, reason = "the crate installs filters without a listener only")]
fn install(program: &BpfProgram, flags: libc::c_ulong) -> Result<Option<OwnedFd>, Errno> {
    #[repr(C)]
    struct Fprog {
        len: libc::c_ushort,
        filter: *const sock_filter,
    }
    let len = libc::c_ushort::try_from(program.len()).map_err(|_| Errno::E2BIG)?;
    let fprog = Fprog { len, filter: program.as_ptr() };
    // SAFETY: `fprog` is laid out as the kernel's sock_fprog and names `len` instructions of `program`, which outlives
    // the call; the kernel copies them.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const fprog) };
    let fd = RawFd::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
    let listens = flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER != 0;
    // SAFETY: with this flag the call returns a new descriptor, which nobody else has.
    Ok(listens.then(|| unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// A call's number. `None`: this architecture never had it.
fn number(arch: TargetArch, call: &str) -> Option<u32> {
    match arch {
        TargetArch::x86_64 => call.parse().ok().map(|call: syscalls::x86_64::Sysno| call as u32),
        TargetArch::aarch64 => call.parse().ok().map(|call: syscalls::aarch64::Sysno| call as u32),
        TargetArch::riscv64 => None,
    }
}

/// The last call that was looked at for the list.
const LAST: u32 = syscalls::x86_64::Sysno::file_setattr as u32;

/// The whole filter: the entry, and what it lets pass goes through the list.
fn program(arch: TargetArch, gated: &[&str]) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut program = entry(arch, gated);
    for part in denials(arch)? {
        // Its last instruction allows: instead it goes on. Jumps lead forward by a distance, so they lead where they
        // led, and a call is in one part only.
        program.pop();
        program.extend(part);
    }
    Ok(program)
}

/// The parts for the list, one for each answer.
fn denials(arch: TargetArch) -> Result<Vec<BpfProgram>, seccompiler::BackendError> {
    let mut answers: BTreeMap<Answer, BTreeMap<i64, Vec<SeccompRule>>> = BTreeMap::new();
    for denied in denied() {
        if let Some(number) = number(arch, denied.call) {
            answers.entry(denied.answer).or_default().insert(number.into(), rules(denied)?);
        }
    }
    let compile = |(answer, rules): (Answer, _)| {
        let errno = SeccompAction::Errno(answer.errno().unsigned_abs());
        SeccompFilter::new(rules, SeccompAction::Allow, errno, arch)?.try_into()
    };
    answers.into_iter().map(compile).collect()
}

fn rules(denied: &Denied) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let condition = |condition: &Condition| {
        let (operator, value) = match condition.test {
            Test::Is(value) => (SeccompCmpOp::Eq, value),
            Test::IsNot(value) => (SeccompCmpOp::Ne, value),
            Test::Masked(mask, value) => (SeccompCmpOp::MaskedEq(mask.into()), value),
        };
        // 32 bits: the kernel ignores the others, so whoever sets them must gain nothing.
        SeccompCondition::new(condition.argument, SeccompCmpArgLen::Dword, operator, value.into())
    };
    denied.when.iter().map(|all| SeccompRule::new(all.iter().map(condition).collect::<Result<_, _>>()?)).collect()
}

/// What stands before the list.
fn entry(arch: TargetArch, gated: &[&str]) -> BpfProgram {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const IF_GREATER: u32 = libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K;
    // Where `struct seccomp_data` has the number of the call, and the architecture.
    const NUMBER: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    let audit = match arch {
        TargetArch::x86_64 => 0xc000_003e,
        TargetArch::aarch64 => 0xc000_00b7,
        TargetArch::riscv64 => 0xc000_00f3,
    };
    // Each test skips the answer that follows it where it does not hold.
    let mut program = vec![
        instruction(LOAD, 0, 0, ARCHITECTURE),
        instruction(IF_EQUAL, 1, 0, audit),
        instruction(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        instruction(LOAD, 0, 0, NUMBER),
        instruction(IF_GREATER, 0, 1, LAST),
        instruction(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()),
    ];
    for number in gated.iter().filter_map(|call| number(arch, call)) {
        program.push(instruction(IF_EQUAL, 0, 1, number));
        program.push(instruction(RETURN, 0, 0, libc::SECCOMP_RET_USER_NOTIF));
    }
    program.push(instruction(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    program
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    // Every code is below 256.
    sock_filter { code: code as u16, jt, jf, k }
}

#[cfg(test)]
mod tests;
