//! Starts the confined program.
//!
//! The child borrows this process's memory until it executes, while this process waits: what `posix_spawn` does. A fork
//! would take longer than all of the confinement, since each page that the child then touches has to be found again.

use super::{Failed, Prepared};
use crate::sandbox::terminal;
use nix::libc;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{self, Pid};
use std::ffi::{CString, NulError, OsStr, OsString};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::ptr;

/// Enough for the steps, none of which recurses.
const STACK: usize = 256 * 1024;

/// What to execute.
pub(in crate::sandbox) struct Program {
    /// Its path; a bare name is looked up in the `PATH` of `env`.
    pub(in crate::sandbox) path: PathBuf,
    pub(in crate::sandbox) args: Vec<OsString>,
    pub(in crate::sandbox) env: Vec<(OsString, OsString)>,
    pub(in crate::sandbox) cwd: PathBuf,
    /// Whether it gets this process's standard output, which is a terminal, as its own.
    pub(in crate::sandbox) terminal: bool,
}

/// All that the child needs, made before it is there.
struct Child<'a> {
    prepared: &'a Prepared,
    /// What it reads where it has no terminal.
    null: File,
    terminal: bool,
    cwd: CString,
    /// Where the program may be, in order.
    candidates: Vec<CString>,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    /// Where the child stopped, if it did not become the program, and has not told itself.
    failed: Option<(&'static str, nix::Error)>,
}

/// Starts it, and returns when it has been executed. Its output is that of this process. Its standard input is empty, and
/// it is in a process group of its own; or that is the terminal too, and it is in a session of its own.
///
/// # Errors
/// The step that failed. The child has ended and is reaped then.
#[expect(unsafe_code, reason = "no safe interface confines a child before it executes")]
pub(super) fn spawn(program: &Program, prepared: &Prepared) -> Result<Pid, Failed> {
    let failed = |error: NulError| Failed::new("exec", error);
    let string = |text: &OsStr| CString::new(text.as_bytes()).map_err(failed);
    let mut args = vec![string(program.path.as_os_str())?];
    for arg in &program.args {
        args.push(string(arg)?);
    }
    let mut env = Vec::new();
    for (name, value) in &program.env {
        let entry = [name.as_bytes(), b"=", value.as_bytes()].concat();
        env.push(CString::new(entry).map_err(failed)?);
    }
    let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect();
    let mut child = Child {
        prepared,
        null: File::open("/dev/null").map_err(|error| Failed::new("stdin", error))?,
        terminal: program.terminal,
        cwd: string(program.cwd.as_os_str())?,
        candidates: candidates(program).iter().map(|path| string(path.as_os_str())).collect::<Result<_, _>>()?,
        argv: pointers(&args),
        envp: pointers(&env),
        failed: None,
    };
    // As the C library wants it, aligned and growing downwards.
    let mut stack = vec![0u128; STACK / size_of::<u128>()];
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: with these two flags the child runs on its own stack in this memory while this process, which has no other
    // thread, stands still until the child has executed or ended. So at every moment one of the two runs, as if the one
    // called the other, and nothing that it is given dies before. What the child opens and closes is its own, since the
    // table of descriptors is not shared; so it drops no descriptor that was made outside of it.
    let pid =
        unsafe { libc::clone(become_program, stack.as_mut_ptr_range().end.cast(), flags, (&raw mut child).cast()) };
    drop(stack);
    let pid = nix::errno::Errno::result(pid).map(Pid::from_raw).map_err(|errno| Failed::new("fork", errno))?;
    match child.failed {
        None => Ok(pid),
        Some((step, errno)) => {
            let _ = nix::sys::wait::waitpid(pid, None);
            let detail = match step {
                "exec" => format!("cannot execute {}: {}", program.path.display(), std::io::Error::from(errno)),
                _ => errno.to_string(),
            };
            Err(Failed::new(step, detail))
        }
    }
}

/// The child. Never returns where all goes well.
#[expect(unsafe_code, reason = "called by the C library with an address")]
extern "C" fn become_program(child: *mut libc::c_void) -> libc::c_int {
    // SAFETY: the address of the `Child` in `spawn`, whose frame stands still while this runs.
    let child = unsafe { &mut *child.cast::<Child<'_>>() };
    let Err(failed) = child.run();
    child.failed = Some(failed);
    // SAFETY: ends the child at once, without what the C library does at the end of a process: that is the jail's.
    unsafe { libc::_exit(127) }
}

impl Child<'_> {
    #[expect(unsafe_code, reason = "there is no safe way to execute a program with an environment that is given")]
    fn run(&self) -> Result<std::convert::Infallible, (&'static str, nix::Error)> {
        let at = |step| move |errno| (step, errno);
        if self.terminal {
            unistd::dup2_stdin(std::io::stdout()).map_err(at("stdin"))?;
            terminal::control(std::io::stdin()).map_err(at("terminal"))?;
        } else {
            unistd::dup2_stdin(self.null.as_fd()).map_err(at("stdin"))?;
            unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0)).map_err(at("group"))?;
        }
        unistd::chdir(self.cwd.as_c_str()).map_err(at("cwd"))?;
        // SAFETY: the default action runs no code of ours. The jail ignores this one, and programs expect that it is not.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map_err(at("signal_actions"))?;
        self.prepared.apply().map_err(at("confinement"))?;
        let mut found = nix::Error::ENOENT;
        for candidate in &self.candidates {
            // SAFETY: strings that end with zero, and lists of them that end with null, all of which `spawn` holds.
            unsafe { libc::execve(candidate.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()) };
            match nix::Error::last() {
                nix::Error::ENOENT | nix::Error::ENOTDIR => {}
                // Found, and of no use; there may be another.
                nix::Error::EACCES => found = nix::Error::EACCES,
                other => return Err(("exec", other)),
            }
        }
        Err(("exec", found))
    }
}

fn candidates(program: &Program) -> Vec<PathBuf> {
    if program.path.as_os_str().as_bytes().contains(&b'/') {
        return vec![program.path.clone()];
    }
    let path = program.env.iter().rev().find(|(name, _)| name == "PATH").map(|(_, path)| path.clone());
    let path = path.unwrap_or_else(|| OsString::from_vec(b"/bin:/usr/bin".to_vec()));
    std::env::split_paths(&path).map(|directory: PathBuf| Path::new(&directory).join(&program.path)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_name_is_looked_up_in_the_programs_own_path() {
        let mut program =
            Program { path: "sh".into(), args: Vec::new(), env: Vec::new(), cwd: "/".into(), terminal: false };
        assert_eq!(candidates(&program), ["/bin/sh", "/usr/bin/sh"].map(PathBuf::from));
        program.env = vec![("PATH".into(), "/a:/b c".into())];
        assert_eq!(candidates(&program), ["/a/sh", "/b c/sh"].map(PathBuf::from));
        program.path = "./sh".into();
        assert_eq!(candidates(&program), [PathBuf::from("./sh")]);
    }
}
