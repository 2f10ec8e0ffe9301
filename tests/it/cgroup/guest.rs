//! The same tests in a small Linux guest: with version 2 alone, in a container of its own, and where the mount is
//! read-only.
//!
//! The guest is this very test binary, the sidecar's and the libraries of both, with busybox for the shell, in one
//! initial file system. QEMU emulates all of it, so it runs anywhere and takes its time. It ends with status 0 whatever
//! became of the guest, so only what the guest says last counts.

use crate::sandbox::Bench;
use cpio::newc::{Builder, ModeFileType, trailer};
use opencode_sidecar::sandbox::{Output, Spec};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

const BOOT: Duration = Duration::from_secs(500);

/// Runs the tests that are named by the rest of its arguments, says `NAME: passed` if they have.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin HOME=/tmp
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mkdir -p /dev/shm /tmp
mount -t tmpfs none /dev/shm
mount -t tmpfs none /tmp
cd /sys/fs/cgroup
mount -t cgroup2 none .
cd /sys/fs/cgroup
echo '+memory +pids +cpu +io' > cgroup.subtree_control
# Runs the tests in a group that is not the top one, as in every pod.
in_group() {
    name=$1; shift
    mkdir /sys/fs/cgroup/$name
    sh -c "echo \$\$ > /sys/fs/cgroup/$name/cgroup.procs; exec \"\$@\"" sh "$@" && echo "$name: passed"
}
export CGROUP_TEST_EXPECTS=cgroup_v2
in_group alone TESTS cgroup::limits cgroup::ending cgroup::usage::a_group
# A group namespace, its own mount, and a first process beside the sidecar's.
in_group container /usr/bin/unshare -C -m sh -c 'umount -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; sleep 1000 & exec "$@"' sh \
    TESTS cgroup::limits::the_ cgroup::limits::a_tool cgroup::limits::a_fork cgroup::ending::killing
export CGROUP_TEST_EXPECTS=watched
in_group default /usr/bin/unshare -C -m sh -c 'umount -l /sys/fs/cgroup; mount -t cgroup2 -o ro none /sys/fs/cgroup; exec "$@"' sh \
    TESTS cgroup::limits::the_host cgroup::watched::too_much
poweroff -f
"#;

/// What the kernel unpacks and starts.
struct Image {
    to: BufWriter<File>,
    directories: BTreeSet<PathBuf>,
}

impl Image {
    fn entry(&mut self, path: &Path, kind: ModeFileType, mode: u32, device: (u32, u32), content: &[u8]) {
        let parent = path.parent().unwrap();
        if parent != Path::new("/") && self.directories.insert(parent.to_owned()) {
            self.entry(parent, ModeFileType::Directory, 0o755, (0, 0), b"");
        }
        let name = path.to_str().unwrap().trim_start_matches('/');
        let entry = Builder::new(name).mode(mode).set_mode_file_type(kind).rdev_major(device.0).rdev_minor(device.1);
        let mut writer = entry.write(&mut self.to, u32::try_from(content.len()).unwrap());
        writer.write_all(content).unwrap();
        writer.finish().unwrap();
    }

    fn program(&mut self, path: impl AsRef<Path>, content: &[u8]) {
        self.entry(path.as_ref(), ModeFileType::Regular, 0o755, (0, 0), content);
    }

    fn directory(&mut self, path: &str) {
        if self.directories.insert(path.into()) {
            self.entry(Path::new(path), ModeFileType::Directory, 0o755, (0, 0), b"");
        }
    }
}

async fn run(bench: &Bench, program: &str, args: &[&str], deadline: Duration) -> Output {
    let mut spec = Spec::new("guest", program);
    spec.args = args.iter().map(Into::into).collect();
    spec.env = vec![("PATH".into(), "/usr/bin:/bin".into())];
    bench.sandbox.run(spec, deadline).await.unwrap()
}

/// The libraries that a program needs, as the loader finds them.
async fn libraries(bench: &Bench, program: &str) -> Vec<String> {
    let output = run(bench, "ldd", &[program], Duration::from_secs(20)).await;
    assert!(output.exit.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let paths = text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned);
    paths.collect()
}

#[tokio::test]
#[cfg_attr(not(guest), ignore = "boots a virtual machine: make guest")]
async fn the_same_holds_in_a_guest_with_version_2_alone() {
    let from = std::env::var_os("OPENCODE_SIDECAR_GUEST").map(PathBuf::from);
    let from = from.expect("OPENCODE_SIDECAR_GUEST is what scripts/setup-guest prints; make guest sets it");
    let bench = Bench::new();
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let (tests, sidecar) = (std::env::current_exe().unwrap(), env!("CARGO_BIN_EXE_opencode-sidecar"));
    let mut to = Image { to: BufWriter::new(File::create(&image).unwrap()), directories: BTreeSet::new() };
    let mut needed = BTreeSet::new();
    for (program, place) in
        [(tests.to_str().unwrap(), "/tests"), (sidecar, sidecar), ("/usr/bin/unshare", "/usr/bin/unshare")]
    {
        let small = directory.path().join("small");
        let small = small.to_str().unwrap();
        let stripped = run(&bench, "strip", &["-o", small, program], Duration::from_secs(60)).await;
        assert!(stripped.exit.success(), "{stripped:?}");
        to.program(place, &fs::read(small).unwrap());
        needed.extend(libraries(&bench, program).await);
    }
    for library in needed {
        to.program(&library, &fs::read(&library).unwrap());
    }
    for path in ["/proc", "/sys", env!("CARGO_TARGET_TMPDIR")] {
        to.directory(path);
    }
    to.entry(Path::new("/dev/console"), ModeFileType::Char, 0o600, (5, 1), b"");
    to.program("/bin/busybox", &fs::read(from.join("busybox")).unwrap());
    to.program("/init", INIT.replace("TESTS", "/tests --include-ignored --test-threads=1").as_bytes());
    trailer(&mut to.to).unwrap().flush().unwrap();

    let kernel = from.join("vmlinuz");
    let args = "-accel tcg,thread=multi -cpu max -smp 2 -m 1024 -nographic -no-reboot -nodefaults -serial";
    let mut args: Vec<&str> = args.split(' ').collect();
    // A file, so that what a guest that hangs has said is there to be read.
    let console = directory.path().join("console");
    let serial = format!("file:{}", console.display());
    args.push(&serial);
    args.extend(["-append", "console=ttyS0 cgroup_no_v1=all panic=-1 quiet"]);
    args.extend(["-kernel", kernel.to_str().unwrap(), "-initrd", image.to_str().unwrap()]);
    let mut spec = Spec::new("guest", from.join("qemu"));
    spec.args = args.into_iter().map(Into::into).collect();
    spec.env = vec![("PATH".into(), "/usr/bin:/bin".into())];
    let ended = bench.sandbox.run(spec, BOOT).await;
    let said = String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()).into_owned();
    for name in ["alone", "container", "default"] {
        let passed = said.lines().any(|line| line.trim_end() == format!("{name}: passed"));
        assert!(passed, "{name} has not passed: {ended:?}\n{said}");
    }
    bench.nothing_is_left().await;
}
