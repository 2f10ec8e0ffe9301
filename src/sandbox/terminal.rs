//! A pseudo-terminal for a program: its own side of it, which is the program's standard three, and ours.

use super::User;
use nix::fcntl::OFlag;
use rustix::fs::{Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use tokio::io::unix::AsyncFd;

/// How large a terminal is, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

impl TerminalSize {
    fn to_kernel(self) -> Winsize {
        Winsize { ws_row: self.rows, ws_col: self.columns, ws_xpixel: 0, ws_ypixel: 0 }
    }
}

/// Our side of a program's terminal. When it is dropped, the terminal hangs up: the program is sent SIGHUP.
///
/// Nothing is kept here: what is not read stays in the kernel, which holds some KiB, and the program waits until there
/// is room again.
#[derive(Debug)]
pub struct Terminal {
    master: AsyncFd<OwnedFd>,
}

/// Makes a terminal. Gives our side and the program's, which belongs to `owner`, so that the program may open it by its
/// name too, and nobody else's user may.
///
/// # Errors
/// The kernel has no terminal left, or refuses one.
pub(super) fn open(size: TerminalSize, owner: Option<User>) -> io::Result<(Terminal, OwnedFd)> {
    // Never the controlling terminal of this process, and nothing that another child inherits.
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    rustix::termios::tcsetwinsize(&master, size.to_kernel())?;
    rustix::fs::fchmod(&slave, Mode::RUSR | Mode::WUSR)?;
    if let Some(User { uid, gid }) = owner {
        rustix::fs::fchown(&slave, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    nix::fcntl::fcntl(&master, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
    Ok((Terminal { master: register(master)? }, slave))
}

#[expect(unsafe_code, reason = "tokio cannot see that the descriptor stays open")]
fn register(master: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is open for as long as it lives and its number never changes; it is given to the
    // registration for good, and nothing takes it out or replaces it.
    Ok(unsafe { AsyncFd::register(master) }?)
}

impl Terminal {
    /// What the program has written: at least one byte of it, or 0 where it is gone and everything was read. Dropping
    /// the wait loses nothing.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.master.readable().await?;
            match rustix::io::read(self.master.get_ref(), &mut *buffer) {
                // Linux's word for a terminal whose other side nobody holds any more.
                Err(Errno::IO) => return Ok(0),
                // Somebody took it up again, which tokio does not know of: its word for the end is for good, and it
                // would never wait again.
                Err(Errno::AGAIN) if ready.ready().is_read_closed() => return Ok(0),
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                read => return Ok(read?),
            }
        }
    }

    /// Types all of it, and waits for as long as the program does not take it. Where the wait is dropped, some of it
    /// was typed.
    ///
    /// # Errors
    /// The program is gone.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.master.writable().await?;
            // The kernel goes on to take what nobody will read, until it has no room.
            if ready.ready().is_write_closed() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            match rustix::io::write(self.master.get_ref(), bytes) {
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                written => bytes = &bytes[written?..],
            }
        }
        Ok(())
    }

    /// Makes it larger or smaller; where it changes, the programs in its foreground get SIGWINCH.
    ///
    /// # Errors
    /// The kernel's.
    pub fn resize(&self, size: TerminalSize) -> io::Result<()> {
        Ok(rustix::termios::tcsetwinsize(self.master.get_ref(), size.to_kernel())?)
    }
}

/// Makes the terminal on this descriptor that of this process, in a session of its own. For a child that is about to
/// execute; allocates nothing.
pub(super) fn control(terminal: impl AsFd) -> nix::Result<()> {
    nix::unistd::setsid()?;
    let raw = |errno: Errno| nix::Error::from_raw(errno.raw_os_error());
    rustix::process::ioctl_tiocsctty(terminal).map_err(raw)
}
