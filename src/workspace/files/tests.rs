use super::*;
use rustix::fs::{CWD, RenameFlags, makedev, mknodat, renameat_with};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use tempfile::TempDir;

const SECRET: &str = "what is outside";

/// A workspace with a file outside beside it.
struct World {
    dir: TempDir,
    workspace: Workspace,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/secret"), SECRET).unwrap();
        let workspace = Workspace::open(&dir.path().join("ws")).unwrap();
        Self { dir, workspace }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join("ws").join(name)
    }

    fn outside(&self, name: &str) -> PathBuf {
        self.dir.path().join("outside").join(name)
    }

    fn tree(&self) -> Tree {
        self.workspace.tree(None).unwrap()
    }

    fn read(&self, path: &[u8]) -> Result<Vec<u8>, FileError> {
        self.tree().open(&FilePath::parse(path)?)?.read_at(0, 1 << 20)
    }

    fn page(&self, path: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Listing, FileError> {
        self.tree().list(&FilePath::parse(path)?, after, limit, &|| true)
    }

    fn names(&self, path: &[u8]) -> Result<Vec<Vec<u8>>, FileError> {
        Ok(self.page(path, None, 1000)?.entries.into_iter().map(|entry| entry.name).collect())
    }
}

/// The name of an error, to compare.
fn word<T>(result: Result<T, FileError>) -> String {
    match result {
        Ok(_) => "it was read".to_owned(),
        Err(error) => format!("{error:?}").split(['(', ' ']).next().unwrap().to_owned(),
    }
}

fn fifo(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, Mode::from(0o666), 0).unwrap();
}

#[test]
fn a_path_that_cannot_be_one_is_refused() {
    let long = [b"x/".repeat(2049), b"y".to_vec()].concat();
    for bad in [&b".."[..], b"../x", b"a/../b", b"a/..", b"/", b"/etc/passwd", b"a\0b", &long, &b"n".repeat(256)] {
        assert_eq!(word(FilePath::parse(bad)), "Path", "{:?}", String::from_utf8_lossy(bad));
    }
    for (given, plain) in [
        (&b""[..], &b""[..]),
        (b".", b""),
        (b"./", b""),
        (b"./a//b/.", b"a/b/"),
        (b"a/", b"a/"),
        (b"...", b"..."),
        (b"..a/b..", b"..a/b.."),
        (b"\xff\n\xe2\x80\xae", b"\xff\n\xe2\x80\xae"),
    ] {
        assert_eq!(FilePath::parse(given).unwrap().as_bytes(), plain);
    }
    assert_eq!(FilePath::parse(b"a/b/").unwrap().join(b"c"), b"a/b/c");
    assert_eq!(FilePath::parse(b"").unwrap().join(b"c"), b"c");
    assert_eq!(FilePath::parse(b"a/b/").unwrap().name(), b"b");
}

#[test]
fn files_are_read_and_listed_whatever_their_names() {
    let world = World::new();
    let names: [&[u8]; 5] = [b" ", b"a\nb", b"evil\xe2\x80\xaegnp.exe", b"not utf-8 \xff", b"z"];
    for name in names {
        fs::write(world.at("").join(std::ffi::OsStr::from_bytes(name)), name).unwrap();
        assert_eq!(world.read(name).unwrap(), name);
    }
    fs::create_dir_all(world.at("d/e")).unwrap();
    let mut sorted: Vec<_> = names.map(<[u8]>::to_vec).to_vec();
    sorted.push(b"d".to_vec());
    sorted.sort();
    assert_eq!(world.names(b"").unwrap(), sorted);
    assert_eq!(world.names(b"d/./").unwrap(), [b"e"]);
    assert_eq!(word(world.read(b"d")), "Directory");
    assert_eq!(word(world.read(b"")), "Directory");
    assert_eq!(word(world.names(b"z")), "NotADirectory");
    assert_eq!(word(world.read(b"z/x")), "NotADirectory");
    assert_eq!(word(world.read(b"z/")), "NotADirectory");
    assert_eq!(word(world.read(b"missing")), "NotFound");
    assert_eq!(word(world.names(b"d/missing")), "NotFound");
}

#[test]
fn no_link_is_followed_and_each_is_shown() {
    let world = World::new();
    fs::create_dir(world.at("d")).unwrap();
    fs::write(world.at("d/file"), "inside").unwrap();
    let links = [
        ("absolute", "/etc/passwd"),
        ("directory", "../outside"),
        ("etc", "/etc"),
        ("inside", "d"),
        ("magic", "/proc/self/root"),
        ("file", "d/file"),
        ("itself", "itself"),
    ];
    for (name, target) in links {
        symlink(target, world.at(name)).unwrap();
    }
    for path in [
        "absolute",
        "directory",
        "directory/secret",
        "etc/passwd",
        "inside/file",
        "magic",
        "magic/etc/passwd",
        "file",
        "file/",
        "itself",
        "itself/x",
    ] {
        assert_eq!(word(world.read(path.as_bytes())), "Link", "{path}");
        assert_eq!(word(world.names(path.as_bytes())), "Link", "{path}");
    }
    for entry in world.page(b"", None, 100).unwrap().entries {
        let target = links.iter().find(|(name, _)| name.as_bytes() == entry.name).map(|(_, target)| target.as_bytes());
        assert_eq!(entry.target.as_deref(), target);
        assert_eq!(entry.kind, if target.is_some() { Kind::Symlink } else { Kind::Directory });
        assert_eq!(entry.size, None);
    }
}

/// An open of a FIFO would wake whoever writes to it; of a device, do whatever it does.
#[test]
fn what_is_no_file_is_shown_and_never_opened() {
    let world = World::new();
    fifo(&world.at("fifo"));
    let _listener = UnixListener::bind(world.at("socket")).unwrap();
    assert_eq!(word(world.read(b"fifo")), "Special");
    assert_eq!(word(world.read(b"socket")), "Special");
    assert_eq!(word(world.names(b"fifo")), "NotADirectory");
    // Nobody has opened it for reading: a writer that does not wait finds none.
    let mut writer = fs::OpenOptions::new();
    let error = writer.write(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(world.at("fifo"));
    assert_eq!(error.unwrap_err().raw_os_error(), Some(Errno::NXIO.raw_os_error()));
    let kinds: Vec<_> = world.page(b"", None, 100).unwrap().entries.into_iter().map(|e| (e.kind, e.size)).collect();
    assert_eq!(kinds, [(Kind::Special, None), (Kind::Special, None)]);
}

#[test]
#[cfg_attr(not(as_root), ignore = "needs root")]
fn a_device_is_never_opened() {
    let world = World::new();
    // The kernel's log: reading it would wait, and opening it as a terminal or a tape would do something.
    mknodat(CWD, world.at("zero"), FileType::CharacterDevice, Mode::from(0o666), makedev(1, 5)).unwrap();
    assert_eq!(word(world.read(b"zero")), "Special");
    assert_eq!(world.page(b"", None, 9).unwrap().entries[0].kind, Kind::Special);
}

/// Documented: it is the file itself. That no session can make one to what is not its own, is for the sandbox to see to.
#[test]
fn a_hard_link_is_the_file_itself() {
    let world = World::new();
    fs::hard_link(world.outside("secret"), world.at("hard")).unwrap();
    assert_eq!(world.read(b"hard").unwrap(), SECRET.as_bytes());
}

#[test]
fn the_workspace_stays_the_one_that_was_opened() {
    let world = World::new();
    fs::write(world.at("file"), "inside").unwrap();
    fs::create_dir_all(world.at("app/sub")).unwrap();
    fs::write(world.at("app/sub/own"), "own").unwrap();
    let inner = |workdir: &str| world.workspace.tree(Some(workdir));
    let own = |workdir: &str| inner(workdir)?.open(&FilePath::parse(b"own")?)?.read_at(0, 99);
    assert_eq!(own("app/sub").unwrap(), b"own");
    // A directory of the task is replaced by a way out, by one to another place in the workspace, and is gone.
    fs::rename(world.at("app"), world.at("moved")).unwrap();
    symlink("../outside", world.at("app")).unwrap();
    assert_eq!(word(own("app")), "NoTree");
    fs::remove_file(world.at("app")).unwrap();
    symlink("moved", world.at("app")).unwrap();
    assert_eq!(own("app/sub").unwrap(), b"own", "a link that stays within is as good as when the task began");
    fs::remove_file(world.at("app")).unwrap();
    assert_eq!(word(own("app/sub")), "NoTree");
    for gone in ["../outside", "/etc", "file"] {
        assert_eq!(word(inner(gone)), "NoTree", "{gone}");
    }
    // The workspace's own name leads elsewhere.
    fs::rename(world.at(""), world.dir.path().join("old")).unwrap();
    symlink("outside", world.dir.path().join("ws")).unwrap();
    assert_eq!(world.read(b"file").unwrap(), b"inside");
    assert_eq!(word(world.read(b"secret")), "NotFound");
}

/// The name of a directory, and of a file, is the inside's and the outside's in turn, without being neither for a moment.
#[test]
fn a_race_never_leads_outside() {
    const ROUNDS: usize = 3000;
    let world = World::new();
    fs::create_dir(world.at("d")).unwrap();
    fs::write(world.at("d/secret"), "inside").unwrap();
    fs::write(world.at("f"), "inside").unwrap();
    symlink(world.outside(""), world.at("way-out")).unwrap();
    symlink(world.outside("secret"), world.at("link-out")).unwrap();
    fifo(&world.at("fifo"));
    // Set also where an assertion fails, or the other thread would go on for ever.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    let (mut read, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let exchange =
                |a: &str, b: &str| renameat_with(CWD, world.at(a), CWD, world.at(b), RenameFlags::EXCHANGE).unwrap();
            while !over.load(Ordering::Relaxed) {
                exchange("d", "way-out");
                exchange("f", "link-out");
                exchange("f", "fifo");
                std::thread::yield_now();
            }
        });
        let _over = Over(&over);
        // Until each side of the race was met, but not for ever.
        for round in 0.. {
            for path in [&b"d/secret"[..], b"f"] {
                match world.read(path) {
                    Ok(content) => {
                        assert_eq!(content, b"inside");
                        read += 1;
                    }
                    Err(FileError::Link | FileError::Special | FileError::NotFound) => refused += 1,
                    Err(other) => panic!("{other:?}"),
                }
            }
            match world.page(b"d", None, 10) {
                Ok(listing) => assert_eq!(listing.entries[0].size, Some(6), "it is the inside's"),
                Err(error) => assert!(matches!(error, FileError::Link), "{error:?}"),
            }
            if round >= ROUNDS && (read > 0 && refused > 0 || round > 100 * ROUNDS) {
                break;
            }
        }
    });
    assert!(read > 0 && refused > 0, "both sides of the race were met: {read}, {refused}");
}

#[test]
fn a_directory_is_paged_in_order() {
    let world = World::new();
    fs::create_dir(world.at("many")).unwrap();
    let mut all: Vec<Vec<u8>> =
        (0..2500).map(|n: u32| format!("{:x}-{n}", n.wrapping_mul(2_654_435_761)).into_bytes()).collect();
    for name in &all {
        fs::write(world.at("many").join(std::ffi::OsStr::from_bytes(name)), "").unwrap();
    }
    all.sort();
    for limit in [1000, 999, 2500, 2499, 1250] {
        let (mut paged, mut after, mut pages) = (Vec::new(), None, 0);
        loop {
            let page = world.page(b"many", after.as_deref(), limit).unwrap();
            assert!(page.entries.len() <= limit);
            paged.extend(page.entries.into_iter().map(|entry| entry.name));
            pages += 1;
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        assert_eq!(pages, 2500_usize.div_ceil(limit));
        assert_eq!(paged, all, "{limit}");
    }
    // Whoever does not wait any more is not worked for.
    let path = FilePath::parse(b"many").unwrap();
    assert_eq!(word(world.tree().list(&path, None, 10, &|| false)), "GivenUp");
    let before = world.page(b"many", Some(b"8"), 1).unwrap().entries.remove(0).name;
    fs::remove_file(world.at("many").join(std::ffi::OsStr::from_bytes(&before))).unwrap();
    let next = world.page(b"many", Some(&before), 1).unwrap().entries.remove(0).name;
    assert!(next > before, "a name that is gone is as good a place as any");
}

#[test]
fn a_deep_tree_is_reached_to_its_end() {
    let world = World::new();
    let deep = vec!["d"; 2000].join("/");
    fs::create_dir_all(world.at(&deep)).unwrap();
    fs::write(world.at(&deep).join("file"), "deep").unwrap();
    assert_eq!(world.read(format!("{deep}/file").as_bytes()).unwrap(), b"deep");
    assert_eq!(world.names(deep.as_bytes()).unwrap(), [b"file"]);
}

#[test]
fn pieces_are_read_where_they_are() {
    let world = World::new();
    let path = world.at("sparse");
    let file = fs::File::create(&path).unwrap();
    let size = 1 << 42;
    file.set_len(size).unwrap();
    std::os::unix::fs::FileExt::write_at(&file, b"end", size - 3).unwrap();
    let open = world.tree().open(&FilePath::parse(b"sparse").unwrap()).unwrap();
    assert_eq!((open.size(), open.is_text()), (size, false));
    assert_eq!(open.read_at(size - 4, 100).unwrap(), b"\0end");
    assert_eq!(open.read_at(size, 100).unwrap(), b"");
    // It grows and shrinks under its reader, who is never held up.
    file.set_len(size + 1).unwrap();
    assert_eq!((open.size(), open.read_at(size, 100).unwrap()), (size, vec![0]));
    file.set_len(2).unwrap();
    assert_eq!(open.read_at(1, 100).unwrap(), b"\0");
    assert_eq!(open.read_at(5, 100).unwrap(), b"");
}

#[test]
fn a_version_goes_with_the_state() {
    let world = World::new();
    let version =
        |name: &str| world.tree().open(&FilePath::parse(name.as_bytes()).unwrap()).unwrap().version().to_owned();
    fs::write(world.at("a"), "one").unwrap();
    fs::write(world.at("b"), "one").unwrap();
    let first = version("a");
    assert_eq!(first, version("a"));
    assert_ne!(first, version("b"), "another file");
    fs::write(world.at("a"), "three").unwrap();
    assert_ne!(first, version("a"), "another size");
    let then = version("a");
    fs::File::options().write(true).open(world.at("a")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    assert_ne!(then, version("a"), "another time");
    let then = version("a");
    fs::rename(world.at("b"), world.at("a")).unwrap();
    assert_ne!(then, version("a"), "another one in its place");
}

#[test]
fn text_is_told_from_what_is_none() {
    for (bytes, whole, want) in [
        (&b""[..], true, true),
        (b"plain\r\n\x1b[31m\t", true, true),
        ("ümlaut 👩‍💻".as_bytes(), true, true),
        (b"a\0b", true, false),
        (b"\xff\xfeU\0", true, false),
        (b"latin \xe4 1", true, false),
        // Cut in the middle of a character.
        (b"cut \xe2\x82", false, true),
        (b"cut \xe2\x82", true, false),
        (b"\xe2\x82 not at the end", false, false),
    ] {
        assert_eq!(is_text(bytes, whole), want, "{:?}, {whole}", String::from_utf8_lossy(bytes));
    }
}
