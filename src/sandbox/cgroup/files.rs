//! Reading and writing the files of a group. Every error names the file.

use std::fs;
use std::io;
use std::path::Path;

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Writes a value, with one call, as these files need it. Makes no file.
pub(super) fn write(directory: &Path, file: &str, value: &str) -> io::Result<()> {
    let path = directory.join(file);
    let written = fs::OpenOptions::new().write(true).open(&path).and_then(|mut file| {
        // A value is short, so a part of it is never written alone.
        io::Write::write_all(&mut file, value.as_bytes())
    });
    written.map_err(|error| named(&path, &error))
}

/// The whole text of a file.
pub(super) fn read(directory: &Path, file: &str) -> io::Result<String> {
    let path = directory.join(file);
    fs::read_to_string(&path).map_err(|error| named(&path, &error))
}

/// A file that holds one number. `None`: it is not there, or holds none, such as `max`.
pub(super) fn number(directory: &Path, file: &str) -> Option<u64> {
    read(directory, file).ok()?.trim().parse().ok()
}

/// The value of a key in a file of lines `key value`. `None`: the file or the key is not there.
pub(super) fn keyed(directory: &Path, file: &str, key: &str) -> Option<u64> {
    value(&read(directory, file).ok()?, key)
}

/// The same, of a text.
pub(super) fn value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// The ids in `cgroup.procs`, of this group alone. None where the group is gone.
pub(super) fn processes(directory: &Path) -> Vec<i32> {
    let text = read(directory, "cgroup.procs").unwrap_or_default();
    // 0 stands for a process that this pid namespace cannot see.
    text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).collect()
}

/// Makes a group. One that is there already is as good.
pub(super) fn make(directory: &Path) -> io::Result<()> {
    match fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(named(directory, &error)),
        _ => Ok(()),
    }
}

/// The groups directly beneath one.
pub(super) fn children(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

/// Removes a group and all beneath it, none of which may hold a process any more. One that is not there is removed.
///
/// # Errors
/// Something is in it (EBUSY), or it is not ours to remove.
pub(super) fn remove(directory: &Path) -> io::Result<()> {
    for child in children(directory) {
        remove(&child)?;
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(named(directory, &error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_not_the_beginning_of_another() {
        let text = "oom 7\noom_kill 3\noom_group_kill 1\n";
        assert_eq!((value(text, "oom_kill"), value(text, "oom"), value(text, "kill")), (Some(3), Some(7), None));
    }
}
