//! What the sidecar and a jail say to each other over their socket: one JSON value per line.

use super::cgroup::Layout;
use super::confine::{Confined, Confinement};
use super::resources::Resource;
use super::watch::{Io, Sample, Watch};
use super::{Exit, Signal, Spec};
use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// What the jail is to enforce and start: the first line it reads.
#[derive(Serialize, Deserialize)]
pub(super) struct Policy {
    program: Text,
    args: Vec<Text>,
    env: Vec<(Text, Text)>,
    cwd: Text,
    pub(super) uid_gid: Option<(u32, u32)>,
    pub(super) stop_signal: Signal,
    pub(super) stop_grace_ms: u64,
    pub(super) oom_score_adj: Option<i32>,
    pub(super) umask: Option<u32>,
    pub(super) confinement: Option<Confinement>,
    /// The group that the program joins.
    pub(super) group: Option<Layout>,
    /// That group is another program's, which outlives this one: it is not killed with it.
    pub(super) beside: bool,
    /// The jail's standard output is a terminal, which the program gets.
    pub(super) terminal: bool,
    pub(super) watch: Option<Watch>,
    /// Where the jail says that it lives (see `roll`).
    roll: Option<Text>,
}

impl Policy {
    pub(super) fn of(spec: &Spec) -> Self {
        Self {
            program: Text::of(spec.program.as_os_str()),
            args: spec.args.iter().map(|arg| Text::of(arg)).collect(),
            env: spec.env.iter().map(|(name, value)| (Text::of(name), Text::of(value))).collect(),
            cwd: Text::of(spec.cwd.as_os_str()),
            uid_gid: spec.user.map(|user| (user.uid, user.gid)),
            stop_signal: spec.stop_signal,
            stop_grace_ms: u64::try_from(spec.stop_grace.as_millis()).unwrap_or(u64::MAX),
            oom_score_adj: spec.oom_score_adj,
            umask: spec.umask,
            confinement: spec.confinement.clone(),
            group: None,
            beside: false,
            terminal: spec.terminal.is_some(),
            watch: None,
            roll: None,
        }
    }

    pub(super) fn set_roll(&mut self, path: &Path) {
        self.roll = Some(Text::of(path.as_os_str()));
    }

    pub(super) fn roll(&self) -> Option<PathBuf> {
        self.roll.as_ref().map(|path| path.to_os().into())
    }

    pub(super) fn program(&self) -> PathBuf {
        self.program.to_os().into()
    }

    pub(super) fn args(&self) -> impl Iterator<Item = OsString> {
        self.args.iter().map(Text::to_os)
    }

    pub(super) fn env(&self) -> impl Iterator<Item = (OsString, OsString)> {
        self.env.iter().map(|(name, value)| (name.to_os(), value.to_os()))
    }

    pub(super) fn cwd(&self) -> PathBuf {
        self.cwd.to_os().into()
    }
}

/// A string of the operating system: JSON text where it is UTF-8, else its bytes.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Text {
    Utf8(String),
    Bytes(Vec<u8>),
}

impl Text {
    fn of(value: &OsStr) -> Self {
        match value.to_str() {
            Some(text) => Self::Utf8(text.to_owned()),
            None => Self::Bytes(value.as_bytes().to_vec()),
        }
    }

    fn to_os(&self) -> OsString {
        match self {
            Self::Utf8(text) => text.into(),
            Self::Bytes(bytes) => OsString::from_vec(bytes.clone()),
        }
    }
}

/// Lists of paths as [`Text`].
pub(super) mod paths {
    use super::Text;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::path::PathBuf;

    pub(in crate::sandbox) fn serialize<S: Serializer>(paths: &[PathBuf], to: S) -> Result<S::Ok, S::Error> {
        paths.iter().map(|path| Text::of(path.as_os_str())).collect::<Vec<_>>().serialize(to)
    }

    pub(in crate::sandbox) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<PathBuf>, D::Error> {
        Ok(Vec::<Text>::deserialize(from)?.iter().map(|text| text.to_os().into()).collect())
    }
}

/// What the sidecar asks of a jail.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Command {
    /// Signal the main program alone.
    Signal(Signal),
    /// Kill everything and report when nothing is left.
    Kill(bool),
}

/// What a jail tells the sidecar.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Report {
    /// What is in force for the program that is about to be reported as started, if it is confined.
    Confined(Confined),
    /// The program runs.
    Started { pid: u32 },
    /// A step failed; nothing runs.
    Failed { step: String, error: String },
    /// The main program has ended.
    Exited(Exit),
    /// What was seen when it changed.
    Seen(Sample),
    /// A limit that is watched is reached: everything is killed.
    Exhausted(Resource),
    /// Connects of the program that were refused since the last report: where to, or `None` for more addresses than are told
    /// apart, and how many.
    Refused { to: Option<SocketAddr>, count: u64 },
    /// From here on the jail kills, the program too if it still runs.
    Killing(bool),
    /// Nothing is left.
    Empty { cpu_seconds: f64, io: Option<Io> },
}

/// One line, with its end.
pub(super) fn line<T: Serialize>(value: &T) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_on_the_wire() {
        assert_eq!(line(&Command::Signal(Signal::Term)).unwrap(), b"{\"signal\":\"term\"}\n");
        assert_eq!(line(&Command::Kill(true)).unwrap(), b"{\"kill\":true}\n");
        let exit = Exit { code: Some(3), signal: None };
        assert_eq!(line(&Report::Exited(exit)).unwrap(), b"{\"exited\":{\"code\":3,\"signal\":null}}\n");
        assert_eq!(line(&Report::Exhausted(Resource::Pids)).unwrap(), b"{\"exhausted\":\"pids\"}\n");
        assert_eq!(line(&Report::Started { pid: 5 }).unwrap(), b"{\"started\":{\"pid\":5}}\n");
    }

    #[test]
    fn what_is_not_utf8_arrives_as_it_was() {
        let mut spec = Spec::new("test", "/bin/\u{fffd}");
        let odd = OsString::from_vec(vec![b'a', 0xff, b'b']);
        spec.args = vec![odd.clone(), "plain".into()];
        spec.env = vec![("NAME".into(), odd.clone())];
        let mut confinement = Confinement::default();
        confinement.files.write = vec![odd.clone().into(), "/plain".into()];
        spec.confinement = Some(confinement);
        let read: Policy = serde_json::from_slice(&line(&Policy::of(&spec)).unwrap()).unwrap();
        assert_eq!(read.args().collect::<Vec<_>>(), spec.args);
        assert_eq!(read.env().collect::<Vec<_>>(), spec.env);
        assert_eq!(read.program(), spec.program);
        assert_eq!(read.confinement, spec.confinement);
    }
}
