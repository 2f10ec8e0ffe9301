//! Errands: what is best done as the user of a program, by this same binary, started again as that user and confined.
//!
//! Whatever it does to files that are in hostile hands, it may do no more than the program itself could. So it takes no
//! capability to be root's, and a link that was put in its way leads nowhere that its user could not have gone.
//!
//! - `reach`: says whether the user reaches some places.
//! - `share`: opens what the user has made in a directory to its group. Umask and default ACL do that while a program
//!   runs, but for what it makes with a mode of its own (`mktemp`, `install -m 600`, `mkdir -m 700`).

use super::confine::{Confinement, Network, Protection};
use super::disk::walk::{MAX_ENTRIES, Walk};
use super::{RunError, Sandbox, Spec, User};
use nix::unistd::{AccessFlags, access};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, chmod, chownat, fstat, openat};
use rustix::process::Gid;
use rustix::thread::{CapabilitySet, capabilities};
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::ffi::{CStr, OsString};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The hidden subcommand that does them.
pub const SUBCOMMAND: &str = "errand";

const REACH: &str = "reach";
const SHARE: &str = "share";
/// How long one may take to start, and to end, beside its work.
const AROUND: Duration = Duration::from_secs(10);
/// What this process needs to start programs as other users, to give them files, and to end them.
const NEEDED: [(CapabilitySet, &str); 4] = [
    (CapabilitySet::SETUID, "CAP_SETUID"),
    (CapabilitySet::SETGID, "CAP_SETGID"),
    (CapabilitySet::CHOWN, "CAP_CHOWN"),
    (CapabilitySet::KILL, "CAP_KILL"),
];

/// What a user is to be able to do at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Execute a file, or pass through a directory.
    Pass,
    /// Read, write and pass through a directory.
    Work,
}

/// Why programs cannot be a user.
#[derive(Debug, thiserror::Error)]
pub enum NoUser {
    /// This process may not do it.
    #[error("this process does not have {0}")]
    Capability(&'static str),
    /// The kernel did not do it: a user namespace may not have this user, for one.
    #[error("no program could be started as the user {uid}")]
    Start {
        /// The user.
        uid: u32,
        /// Why.
        #[source]
        source: RunError,
    },
    /// The user does not get to a place that it needs.
    #[error("the user {uid} does not reach {}", .place.display())]
    OutOfReach {
        /// The user.
        uid: u32,
        /// The place.
        place: PathBuf,
    },
}

/// What was opened to the group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shared {
    /// Files and directories.
    pub changed: u64,
    /// Whether there was more than is looked at, in number or in time.
    pub cut: bool,
}

impl Sandbox {
    /// Tries whether programs can be a user, and whether the user reaches places. Starts a short program.
    ///
    /// # Errors
    /// [`NoUser`]
    pub async fn try_user(&self, user: User, places: &[(Reach, &Path)]) -> Result<(), NoUser> {
        let own = capabilities(None).map_or(CapabilitySet::empty(), |own| own.effective);
        if let Some((_, missing)) = NEEDED.iter().find(|(needed, _)| !own.contains(*needed)) {
            return Err(NoUser::Capability(missing));
        }
        let mut confinement = Confinement { require: [Protection::Uid].into(), ..Confinement::default() };
        confinement.files.execute.push("/".into());
        let mut args = vec![OsString::from(REACH)];
        for (reach, place) in places {
            args.push(match reach {
                Reach::Pass => "pass".into(),
                Reach::Work => "work".into(),
            });
            args.push(place.into());
        }
        let uid = user.uid;
        let told = self.errand(args, Some(user), confinement, Duration::ZERO).await;
        let out_of_reach: Option<usize> = told.map_err(|source| NoUser::Start { uid, source })?;
        match out_of_reach.and_then(|at| places.get(at)) {
            Some((_, place)) => Err(NoUser::OutOfReach { uid, place: place.to_path_buf() }),
            None => Ok(()),
        }
    }

    /// Gives each file and directory beneath `directory` that belongs to `user`, or to this process's own user without
    /// one, to the group of `directory`, and that group what the user has of it; and has what is made in these directories
    /// belong to it too. Looks at two million entries, and for as long as `within`; it is confined to `confinement`,
    /// without its network.
    ///
    /// # Errors
    /// It could not be started, or did not end as it should.
    pub async fn share(
        &self,
        user: Option<User>,
        confinement: &Confinement,
        directory: &Path,
        within: Duration,
    ) -> Result<Shared, RunError> {
        let confinement = Confinement { network: Network::default(), ..confinement.clone() };
        let args = vec![SHARE.into(), within.as_millis().to_string().into(), directory.into()];
        self.errand(args, user, confinement, within).await
    }

    async fn errand<T: for<'a> Deserialize<'a>>(
        &self,
        args: Vec<OsString>,
        user: Option<User>,
        mut confinement: Confinement,
        work: Duration,
    ) -> Result<T, RunError> {
        confinement.files.execute.push(self.executable.to_path_buf());
        let mut spec = Spec::new("errand", self.executable.as_path());
        spec.args = [vec![SUBCOMMAND.into()], args].concat();
        spec.user = user;
        spec.confinement = Some(confinement);
        let output = self.run(spec, work + AROUND).await?;
        let failed = |error| RunError::Read { name: "errand".to_owned(), source: error };
        if !output.exit.success() {
            return Err(failed(io::Error::other(output.exit.to_string())));
        }
        serde_json::from_slice(&output.stdout).map_err(io::Error::other).map_err(failed)
    }
}

/// Does one, and prints what became of it. Call it first in `main`, before any thread exists.
pub fn run() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(2).collect();
    let told = match args.split_first() {
        Some((name, rest)) if name == REACH => serde_json::to_vec(&out_of_reach(rest)).map_err(io::Error::from),
        Some((name, [within, directory])) if name == SHARE => {
            let within = within.to_str().and_then(|text| text.parse().ok()).map(Duration::from_millis);
            share(Path::new(directory), within.unwrap_or_default())
                .and_then(|shared| serde_json::to_vec(&shared).map_err(io::Error::from))
        }
        _ => return ExitCode::FAILURE,
    };
    let written = told.and_then(|told| {
        let mut stdout = io::stdout();
        stdout.write_all(&told).and_then(|()| stdout.flush())
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// The first place that this process does not reach.
fn out_of_reach(places: &[OsString]) -> Option<usize> {
    places.chunks(2).position(|pair| match pair {
        [reach, place] => {
            let work = AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK;
            let flags = if reach == "work" { work } else { AccessFlags::X_OK };
            access(Path::new(place), flags).is_err()
        }
        _ => true,
    })
}

fn share(directory: &Path, within: Duration) -> io::Result<Shared> {
    let (own, until) = (nix::unistd::geteuid().as_raw(), Instant::now() + within);
    let gid = rustix::fs::stat(directory)?.st_gid;
    let (changed, late) = (Cell::new(0), AtomicBool::new(false));
    let mut open = |here: &OwnedFd, name: &CStr, stat: &Stat| {
        if Instant::now() >= until {
            late.store(true, Ordering::Relaxed);
        }
        if stat.st_uid == own && is_due(stat, gid) && open_up(here, name, own, gid).is_ok() {
            changed.set(changed.get() + 1);
        }
    };
    let mut walk = Walk::new(None, MAX_ENTRIES, &late).visiting(&mut open);
    walk.trees(&[directory.to_path_buf()])?;
    let cut = walk.found().cut;
    Ok(Shared { changed: changed.get(), cut: cut || late.load(Ordering::Relaxed) })
}

fn is_due(stat: &Stat, gid: u32) -> bool {
    let kind = FileType::from_raw_mode(stat.st_mode);
    let shared = matches!(kind, FileType::RegularFile | FileType::Directory);
    shared && (stat.st_gid != gid || shared_mode(stat.st_mode).is_some())
}

/// Opens one of a directory's own. By descriptor: what is changed is what was looked at, whatever its name leads to by now.
fn open_up(here: &OwnedFd, name: &CStr, own: u32, gid: u32) -> rustix::io::Result<()> {
    let file = openat(here, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let stat = fstat(&file)?;
    if stat.st_uid != own || !is_due(&stat, gid) {
        return Ok(());
    }
    if stat.st_gid != gid {
        chownat(&file, c"", None, Some(Gid::from_raw(gid)), AtFlags::EMPTY_PATH)?;
    }
    match shared_mode(fstat(&file)?.st_mode) {
        Some(mode) => chmod(format!("/proc/self/fd/{}", file.as_raw_fd()), Mode::from_raw_mode(mode)),
        None => Ok(()),
    }
}

/// The permissions that a file or directory is to have; `None` where it has them.
fn shared_mode(mode: u32) -> Option<u32> {
    let before = mode & 0o7777;
    let group = before | (before & 0o700) >> 3;
    let after = match FileType::from_raw_mode(mode) {
        FileType::RegularFile => group,
        FileType::Directory => group | 0o2000,
        _ => before,
    };
    (after != before).then_some(after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn the_group_gets_what_the_owner_has_and_no_more() {
        const FILE: u32 = 0o100_000;
        const DIRECTORY: u32 = 0o040_000;
        for (before, after) in [
            (FILE | 0o600, Some(0o660)),
            (FILE | 0o700, Some(0o770)),
            (FILE | 0o644, Some(0o664)),
            (FILE | 0o400, Some(0o440)),
            (FILE | 0o444, None),
            (FILE | 0o664, None),
            (FILE | 0o006, None),
            (FILE | 0o4755, Some(0o4775)),
            (DIRECTORY | 0o700, Some(0o2770)),
            (DIRECTORY | 0o775, Some(0o2775)),
            (DIRECTORY | 0o2775, None),
            (DIRECTORY, Some(0o2000)),
            (0o120_777, None),
            (0o010_600, None),
        ] {
            assert_eq!(shared_mode(before), after, "{before:o}");
        }
    }

    #[test]
    fn all_beneath_is_opened_and_nothing_through_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let (outside, root) = (directory.path().join("outside"), directory.path().join("root"));
        let mode = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        let is = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        for file in [&outside, &root.join("a/b/file"), &root.join("done")] {
            std::fs::write(file, "").unwrap();
            mode(file, 0o600);
        }
        mode(&root.join("done"), 0o660);
        symlink("../outside", root.join("link")).unwrap();
        mode(&root.join("a/b"), 0o700);
        mode(&root.join("a"), 0o700);
        let late = share(&root, Duration::ZERO).unwrap();
        assert!(late.cut, "{late:?}");
        mode(&root.join("a"), 0o700);
        let shared = share(&root, Duration::from_secs(60)).unwrap();
        assert_eq!(shared, Shared { changed: 3, cut: false });
        assert_eq!((is(&root.join("a")), is(&root.join("a/b")), is(&root.join("a/b/file"))), (0o2770, 0o2770, 0o660));
        assert_eq!(is(&outside), 0o600);
        assert_eq!(share(&root, Duration::from_secs(60)).unwrap(), Shared::default());
    }

    #[test]
    fn the_first_place_that_is_out_of_reach_is_named() {
        let told = |places: &[&str]| out_of_reach(&places.iter().map(OsString::from).collect::<Vec<_>>());
        assert_eq!(told(&["pass", "/bin/sh", "work", "/tmp"]), None);
        assert_eq!(told(&["pass", "/bin/sh", "work", "/does/not/exist"]), Some(1));
        assert_eq!(told(&["pass"]), Some(0));
    }
}
