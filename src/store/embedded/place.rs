//! The cluster's directories, its password, the user that it belongs to, and the lock on all of it.

use super::EmbeddedError;
use crate::sandbox::{RunError, Spec, User};
use nix::unistd::{self, Gid, Uid, geteuid};
use rand::TryRngCore;
use rand::rngs::OsRng;
use std::fmt::Write as _;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long to wait for an earlier sidecar, or its server, to be gone.
const EARLIER_LIMIT: Duration = Duration::from_secs(20);
/// How long to wait between two looks.
const AGAIN: Duration = Duration::from_millis(50);
/// The longest path of a socket that the kernel takes.
const MAX_SOCKET_PATH: usize = 107;
const SOCKET_NAME: &str = "/.s.PGSQL.5432";
const PASSWORD_BYTES: usize = 32;
const DRAFT_PREFIX: &str = "initdb-";

/// The cluster's place, locked for as long as this lives.
#[derive(Debug)]
pub(super) struct Place {
    root: PathBuf,
    data: PathBuf,
    /// The user that the server runs as, where it is not the sidecar's own.
    user: Option<User>,
    user_name: String,
    /// A socket directory elsewhere, removed at the end.
    elsewhere: Option<PathBuf>,
    _lock: File,
}

/// A cluster that is being made. Dropped before it is kept, it leaves nothing.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) data: PathBuf,
    pub(super) password_file: PathBuf,
}

impl Place {
    /// Makes the directories where they are missing, finds the user, and takes the lock, waiting up to 20 s for it.
    pub(super) async fn open(state_dir: &Path) -> Result<Self, EmbeddedError> {
        let (user, user_name) = server_user()?;
        let root = state_dir.join("postgres");
        fs::create_dir_all(&root).map_err(io_error("make", &root))?;
        let root = root.canonicalize().map_err(io_error("resolve", &root))?;
        // The other user has to pass through, and sees nothing.
        let mode = if user.is_some() { 0o711 } else { 0o700 };
        fs::set_permissions(&root, Permissions::from_mode(mode)).map_err(io_error("set the mode of", &root))?;
        if let Some(user) = user {
            passable(&root, user, &user_name)?;
        }
        let lock = lock(&root).await?;
        let place = Self { data: root.join("data"), root, user, user_name, elsewhere: None, _lock: lock };
        place.check_owner()?;
        Ok(place)
    }

    pub(super) fn data(&self) -> &Path {
        &self.data
    }

    /// Whether there is a cluster; it is put in its place whole.
    pub(super) fn is_made(&self) -> bool {
        self.data.symlink_metadata().is_ok()
    }

    /// The major version that made the cluster; `None` without one.
    pub(super) fn cluster_version(&self) -> Result<Option<String>, EmbeddedError> {
        if !self.is_made() {
            return Ok(None);
        }
        let path = self.data.join("PG_VERSION");
        let text = fs::read_to_string(&path).map_err(io_error("read", &path))?;
        Ok(Some(text.trim().to_owned()))
    }

    fn check_owner(&self) -> Result<(), EmbeddedError> {
        let Ok(meta) = self.data.symlink_metadata() else { return Ok(()) };
        let expected = self.user.map_or_else(|| geteuid().as_raw(), |user| user.uid);
        if meta.uid() == expected {
            return Ok(());
        }
        Err(EmbeddedError::OtherOwner { path: self.data.clone(), found: meta.uid(), expected })
    }

    /// A program of the server, as its user, with nothing of the sidecar's environment.
    pub(super) fn spec(&self, name: &str, program: &Path) -> Spec {
        let mut spec = Spec::new(name, program);
        spec.env =
            [("PATH", "/usr/bin:/bin"), ("LC_ALL", "C"), ("TZ", "UTC")].map(|(n, v)| (n.into(), v.into())).into();
        spec.user = self.user;
        spec
    }

    pub(super) fn unusable(&self, program: PathBuf, source: RunError) -> EmbeddedError {
        EmbeddedError::Unusable { program, user: self.user_name.clone(), source }
    }

    /// Directories for a new cluster, once the leftovers of interrupted attempts are removed.
    pub(super) fn draft(&self) -> Result<Draft, EmbeddedError> {
        for entry in fs::read_dir(&self.root).map_err(io_error("list", &self.root))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(DRAFT_PREFIX) {
                Draft::remove(&entry.path());
            }
        }
        let password = match fs::read_to_string(self.password_path()) {
            Ok(password) if password.len() == 2 * PASSWORD_BYTES => password,
            _ => self.make_password()?,
        };
        let name = format!("{DRAFT_PREFIX}{}", uuid::Uuid::now_v7().simple());
        let draft = Draft { data: self.root.join(&name), password_file: self.root.join(format!("{name}.password")) };
        DirBuilder::new().mode(0o700).create(&draft.data).map_err(io_error("make", &draft.data))?;
        write_private(&draft.password_file, &password)?;
        if let Some(user) = self.user {
            own(&draft.data, user)?;
            own(&draft.password_file, user)?;
        }
        Ok(draft)
    }

    fn password_path(&self) -> PathBuf {
        self.root.join("password")
    }

    fn make_password(&self) -> Result<String, EmbeddedError> {
        let path = self.password_path();
        let mut bytes = [0; PASSWORD_BYTES];
        OsRng.try_fill_bytes(&mut bytes).map_err(|e| io_error("make", &path)(io::Error::other(e)))?;
        let password = bytes.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        let draft = self.root.join("password.new");
        let _ = fs::remove_file(&draft);
        write_private(&draft, &password)?;
        fs::rename(&draft, &path).map_err(io_error("write", &path))?;
        Ok(password)
    }

    /// The password of the cluster.
    pub(super) fn password(&self) -> Result<String, EmbeddedError> {
        let path = self.password_path();
        match fs::read_to_string(&path) {
            Ok(password) if password.len() == 2 * PASSWORD_BYTES => Ok(password),
            Ok(_) => Err(EmbeddedError::Password(path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(EmbeddedError::Password(path)),
            Err(error) => Err(io_error("read", &path)(error)),
        }
    }

    /// Waits up to 20 s for a server of an earlier life. A pid file whose process is something else (its number was
    /// given out again) is removed: Postgres would take that process for itself.
    pub(super) async fn wait_until_unused(&self) -> Result<(), EmbeddedError> {
        let deadline = Instant::now() + EARLIER_LIMIT;
        while used(&self.data) {
            if Instant::now() >= deadline {
                return Err(EmbeddedError::InUse(self.data.clone()));
            }
            sleep(AGAIN).await;
        }
        let path = self.data.join("postmaster.pid");
        if pid_in(&path).is_some_and(|pid| Path::new(&format!("/proc/{pid}")).exists()) {
            tracing::info!(path = %path.display(), "removing the pid file of a server that is gone");
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
        Ok(())
    }

    /// A directory for the socket that nobody but the server's user (and root) can enter.
    pub(super) fn make_socket_dir(&mut self) -> Result<PathBuf, EmbeddedError> {
        let mut path = self.root.join("run");
        if path.as_os_str().len() + SOCKET_NAME.len() > MAX_SOCKET_PATH {
            // A fresh name: making it fails where somebody else was there first.
            let name = format!("opencode-sidecar-{}", uuid::Uuid::new_v4().simple());
            path = std::env::temp_dir().join(name);
            if path.as_os_str().len() + SOCKET_NAME.len() > MAX_SOCKET_PATH {
                return Err(EmbeddedError::SocketPath(path));
            }
            self.elsewhere = Some(path.clone());
        } else if path.symlink_metadata().is_ok() {
            fs::remove_dir_all(&path).map_err(io_error("remove", &path))?;
        }
        DirBuilder::new().mode(0o700).create(&path).map_err(io_error("make", &path))?;
        if let Some(user) = self.user {
            own(&path, user)?;
        }
        Ok(path)
    }

    /// Removes a socket directory that is not beneath the state directory.
    pub(super) fn remove_socket_dir(&self) {
        if let Some(path) = &self.elsewhere
            && let Err(error) = fs::remove_dir_all(path)
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove the socket's directory");
        }
    }
}

impl Draft {
    /// Puts the cluster in its place.
    pub(super) fn keep(self, place: &Place) -> Result<(), EmbeddedError> {
        fs::rename(&self.data, &place.data).map_err(io_error("make", &place.data))?;
        // The name has to survive a loss of power, as the files do.
        File::open(&place.root).and_then(|dir| dir.sync_all()).map_err(io_error("sync", &place.root))
    }

    fn remove(path: &Path) {
        let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove what an interrupted start left");
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        Self::remove(&self.password_file);
        Self::remove(&self.data);
    }
}

/// The user to run the server as, and the name of whoever runs it.
fn server_user() -> Result<(Option<User>, String), EmbeddedError> {
    let uid = geteuid();
    if !uid.is_root() {
        let entry = unistd::User::from_uid(uid).ok().flatten();
        return entry.map(|user| (None, user.name)).ok_or(EmbeddedError::NoPasswdEntry(uid.as_raw()));
    }
    ["postgres", "nobody"]
        .iter()
        .filter_map(|name| unistd::User::from_name(name).ok().flatten())
        .find(|user| !user.uid.is_root())
        .map(|user| (Some(User { uid: user.uid.as_raw(), gid: user.gid.as_raw() }), user.name))
        .ok_or(EmbeddedError::NoUser)
}

/// Whether the user can pass through a directory and all above it, by their modes.
fn passable(directory: &Path, user: User, name: &str) -> Result<(), EmbeddedError> {
    let mut above: Vec<&Path> = directory.ancestors().collect();
    above.reverse();
    for directory in above {
        let meta = directory.metadata().map_err(io_error("look at", directory))?;
        let bit = if meta.uid() == user.uid {
            0o100
        } else if meta.gid() == user.gid {
            0o010
        } else {
            0o001
        };
        if meta.mode() & bit == 0 {
            let (user, directory) = (name.to_owned(), directory.to_owned());
            return Err(EmbeddedError::Blocked { user, directory, mode: meta.mode() & 0o7777 });
        }
    }
    Ok(())
}

/// One sidecar at a time; the kernel lets go of it however that one ends.
async fn lock(root: &Path) -> Result<File, EmbeddedError> {
    let path = root.join("lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(io_error("open", &path))?;
    let deadline = Instant::now() + EARLIER_LIMIT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) if Instant::now() < deadline => sleep(AGAIN).await,
            Err(fs::TryLockError::WouldBlock) => return Err(EmbeddedError::InUse(root.to_owned())),
            Err(fs::TryLockError::Error(error)) => return Err(io_error("lock", &path)(error)),
        }
    }
}

fn pid_in(pid_file: &Path) -> Option<u32> {
    fs::read_to_string(pid_file).ok()?.lines().next()?.trim().parse().ok()
}

/// Whether a server uses the data: the process of the pid file was started with this directory (its command line can
/// always be read), or any process that can be looked into works in it (backends without their postmaster).
fn used(data: &Path) -> bool {
    let named = pid_in(&data.join("postmaster.pid"))
        .and_then(|pid| fs::read(format!("/proc/{pid}/cmdline")).ok())
        .is_some_and(|line| line.split(|byte| *byte == 0).any(|arg| arg == data.as_os_str().as_encoded_bytes()));
    named
        || fs::read_dir("/proc").is_ok_and(|processes| {
            processes.flatten().any(|process| fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == data))
        })
}

fn own(path: &Path, user: User) -> Result<(), EmbeddedError> {
    unistd::chown(path, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))
        .map_err(|error| io_error("change the owner of", path)(error.into()))
}

fn write_private(path: &Path, text: &str) -> Result<(), EmbeddedError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        })
        .map_err(io_error("write", path))
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> EmbeddedError {
    let path = path.to_owned();
    move |source| EmbeddedError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_that_blocks_is_named() {
        let root = tempfile::tempdir().unwrap();
        fs::set_permissions(root.path(), Permissions::from_mode(0o755)).unwrap();
        let (home, below) = (root.path().join("home"), root.path().join("home/state"));
        fs::create_dir_all(&below).unwrap();
        fs::set_permissions(&home, Permissions::from_mode(0o700)).unwrap();
        let stranger = User { uid: 64_999, gid: 64_999 };
        let error = passable(&below, stranger, "stranger").unwrap_err();
        assert!(matches!(error, EmbeddedError::Blocked { directory, mode: 0o700, .. } if directory == home));
        fs::set_permissions(&home, Permissions::from_mode(0o711)).unwrap();
        assert!(passable(&below, stranger, "stranger").is_ok());
    }

    #[test]
    fn a_process_that_works_in_the_data_or_was_started_with_it_uses_it() {
        let root = tempfile::tempdir().unwrap();
        assert!(!used(root.path()));
        // This process is in the pid file, as one that has a dead server's number: it is no server.
        fs::write(root.path().join("postmaster.pid"), format!("{}\n", std::process::id())).unwrap();
        assert!(!used(root.path()));
        let here = std::env::current_dir().unwrap();
        assert!(used(&here));
    }
}
