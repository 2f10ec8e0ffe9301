//! Finding a Postgres server on this machine.

use super::EmbeddedError;
use super::place::Place;
use crate::sandbox::Sandbox;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The environment variable that names the directory with `postgres` and `initdb`.
const BIN_VARIABLE: &str = "OPENCODE_SIDECAR_POSTGRES_BIN";
/// Major versions that the sidecar is made for.
const MAJORS: std::ops::RangeInclusive<u32> = 14..=18;
/// How long a server may take to tell its version.
const VERSION_LIMIT: Duration = Duration::from_secs(20);

/// Where to look for a server.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// The one directory to take the server from; nothing else is looked at then.
    pub only: Option<PathBuf>,
    /// Directories to look in first.
    pub path: Vec<PathBuf>,
    /// Debian's directory of versions, each with a `bin` in it; the newest comes first.
    pub versions: Option<PathBuf>,
    /// Directories to look in last.
    pub last: Vec<PathBuf>,
}

impl Search {
    /// `OPENCODE_SIDECAR_POSTGRES_BIN` if it is set; else `PATH`, `/usr/lib/postgresql/*/bin`, `/usr/local/pgsql/bin`.
    pub fn from_env() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        Self {
            only: std::env::var_os(BIN_VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from),
            path: std::env::split_paths(&path).filter(|path| path.is_absolute()).collect(),
            versions: Some(PathBuf::from("/usr/lib/postgresql")),
            last: vec![PathBuf::from("/usr/local/pgsql/bin")],
        }
    }

    /// Directories that hold a server, best first, each once, symbolic links resolved.
    pub(super) fn candidates(&self) -> Vec<PathBuf> {
        let all = match &self.only {
            Some(only) => vec![only.clone()],
            None => {
                let debian = self.versions.as_deref().map(newest_first).unwrap_or_default();
                [self.path.clone(), debian, self.last.clone()].concat()
            }
        };
        let mut found: Vec<PathBuf> = Vec::new();
        for directory in all {
            if !(executable(&directory.join("postgres")) && executable(&directory.join("initdb"))) {
                continue;
            }
            // A link in PATH leads to the real directory, where the server's own files are found.
            let Ok(program) = directory.join("postgres").canonicalize() else { continue };
            let Some(real) = program.parent() else { continue };
            let real = if executable(&real.join("initdb")) { real.to_owned() } else { directory };
            if !found.contains(&real) {
                found.push(real);
            }
        }
        found
    }

    pub(super) fn looked(&self) -> String {
        match &self.only {
            Some(only) => format!("{} ({BIN_VARIABLE})", only.display()),
            None => {
                let versions = self.versions.iter().map(|path| format!("{}/*/bin", path.display()));
                let last = self.last.iter().map(|path| path.display().to_string());
                ["PATH".to_owned()].into_iter().chain(versions).chain(last).collect::<Vec<_>>().join(", ")
            }
        }
    }
}

fn executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn newest_first(versions: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(versions) else { return Vec::new() };
    let mut found: Vec<(u32, PathBuf)> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let major = entry.file_name().to_str()?.parse().ok()?;
            Some((major, entry.path().join("bin")))
        })
        .collect();
    found.sort_by_key(|(major, _)| std::cmp::Reverse(*major));
    found.into_iter().map(|(_, path)| path).collect()
}

/// A server that fits.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) bin: PathBuf,
    pub(super) version: String,
    pub(super) major: u32,
}

impl Server {
    /// The first server that the cluster, where there is one, can be used with.
    pub(super) async fn find(sandbox: &Sandbox, search: &Search, place: &Place) -> Result<Self, EmbeddedError> {
        let cluster = place.cluster_version()?;
        let mut unusable = None;
        let mut other = Vec::new();
        for bin in search.candidates() {
            let server = match Self::ask(sandbox, bin, place).await {
                Ok(server) => server,
                Err(error) => {
                    unusable.get_or_insert(error);
                    continue;
                }
            };
            if cluster.as_ref().is_some_and(|cluster| *cluster != server.major.to_string()) {
                other.push(server.version);
            } else if MAJORS.contains(&server.major) {
                return Ok(server);
            }
        }
        match (cluster, unusable) {
            (Some(cluster), _) if !other.is_empty() => {
                let (data, found) = (place.data().to_owned(), other.join(", "));
                Err(EmbeddedError::OtherVersion { data, cluster, found })
            }
            (_, Some(error)) => Err(error),
            _ => Err(EmbeddedError::NoServer { looked: search.looked() }),
        }
    }

    /// Asks as the user that it will run as, so that one that this user cannot read is noticed here.
    async fn ask(sandbox: &Sandbox, bin: PathBuf, place: &Place) -> Result<Self, EmbeddedError> {
        let mut spec = place.spec("postgres --version", &bin.join("postgres"));
        spec.args = vec![OsString::from("--version")];
        let program = spec.program.clone();
        let output = sandbox.run(spec, VERSION_LIMIT).await.map_err(|source| place.unusable(program, source))?;
        let text = String::from_utf8_lossy(&output.stdout);
        match parse_version(&text) {
            Some((version, major)) => Ok(Self { bin, version, major }),
            None => Err(EmbeddedError::Init {
                exit: output.exit.to_string(),
                log: format!(
                    "{} --version: {}",
                    bin.join("postgres").display(),
                    String::from_utf8_lossy(&output.stderr)
                ),
            }),
        }
    }
}

/// `postgres (PostgreSQL) 15.8 (Debian 15.8-0+deb12u1)` → `15.8`, 15; also `18beta1`.
fn parse_version(text: &str) -> Option<(String, u32)> {
    let version = text.strip_prefix("postgres (PostgreSQL) ")?.split_whitespace().next()?;
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    Some((version.to_owned(), digits.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn versions() {
        let parsed = |text| parse_version(text).map(|(version, major)| format!("{version} {major}"));
        assert_eq!(parsed("postgres (PostgreSQL) 15.8 (Debian 15.8-0+deb12u1)\n"), Some("15.8 15".to_owned()));
        assert_eq!(parsed("postgres (PostgreSQL) 18beta1\n"), Some("18beta1 18".to_owned()));
        assert_eq!(parsed("mysqld 8"), None);
    }

    fn install(bin: &Path, names: &[&str]) {
        fs::create_dir_all(bin).unwrap();
        for name in names {
            fs::write(bin.join(name), "").unwrap();
            fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
    }

    #[test]
    fn looks_in_path_then_in_debians_directories_newest_first_then_in_the_last() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        for version in ["9", "14", "15"] {
            install(&root.join("debian").join(version).join("bin"), &["postgres", "initdb"]);
        }
        install(&root.join("half"), &["postgres"]);
        install(&root.join("own"), &["postgres", "initdb"]);
        // What Debian's alternatives do: links in PATH.
        fs::create_dir(root.join("links")).unwrap();
        for name in ["postgres", "initdb"] {
            std::os::unix::fs::symlink(root.join("debian/14/bin").join(name), root.join("links").join(name)).unwrap();
        }
        let search = Search {
            only: None,
            path: vec![root.join("missing"), root.join("half"), root.join("links")],
            versions: Some(root.join("debian")),
            last: vec![root.join("own")],
        };
        let expected = ["debian/14/bin", "debian/15/bin", "debian/9/bin", "own"].map(|path| root.join(path));
        assert_eq!(search.candidates(), expected);
        let only = Search { only: Some(root.join("own")), ..search };
        assert_eq!(only.candidates(), [root.join("own")]);
    }
}
