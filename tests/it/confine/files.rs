//! What of the file system a confined program reaches.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use super::bench::Bench;
use opencode_sidecar::sandbox::Spec;
use opencode_sidecar::sandbox::confine::{Confined, Protection};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Each line is tried alone. What it needs is in `$OUT` and `$OWN`.
async fn tries(bench: &Bench, lines: &[&str], free: bool) -> Vec<String> {
    let mut results = Vec::new();
    for line in lines {
        let mut spec = bench.sh(line);
        spec.env.push(("OUT".into(), bench.outside("").into()));
        spec.env.push(("OWN".into(), bench.own.clone().into()));
        if free {
            spec.confinement = None;
        }
        let output = bench.sandbox.run(spec, super::bench::DEADLINE).await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        results.push(if output.exit.success() { String::new() } else { format!("{}: {said}", output.exit) });
    }
    results
}

/// What lies outside, open to everybody as far as the file system goes.
fn prepare(bench: &Bench) {
    let file = |name: &str| {
        fs::write(bench.outside(name), "outside").unwrap();
        fs::set_permissions(bench.outside(name), Permissions::from_mode(0o666)).unwrap();
    };
    fs::create_dir(bench.outside("dir")).unwrap();
    for directory in ["", "dir"] {
        fs::set_permissions(bench.outside(directory), Permissions::from_mode(0o777)).unwrap();
    }
    for name in ["file", "other", "movable", "stealable", "dir/inner", "cut"] {
        file(name);
    }
    fs::write(bench.outside("run"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(bench.outside("run"), Permissions::from_mode(0o777)).unwrap();
    fs::write(bench.own.join("mine"), "mine").unwrap();
    let link = |to: &str, name: &str| std::os::unix::fs::symlink(bench.outside(to), bench.own.join(name)).unwrap();
    link("file", "link");
    link("dir", "linked");
}

/// All of these work without confinement, in this order.
const REFUSED: &[&str] = &[
    "cat $OUT/file",
    "cat link",
    "cat $OWN/../file",
    "cat /proc/self/cwd/../file",
    "cat /proc/self/root$OUT/file",
    "ls $OUT",
    "ls $OUT/dir",
    "ls linked/",
    "echo x > $OUT/file",
    "echo x >> $OUT/file",
    "echo x > link",
    "echo x > $OUT/new",
    "mkdir $OUT/newdir",
    "mkfifo $OUT/pipe",
    "ln -s /etc/passwd $OUT/symlink",
    "ln $OUT/other hardlink",
    "ln mine $OUT/hardlink",
    "mv mine $OUT/moved",
    "mv $OUT/movable mine",
    "mv $OUT/stealable stolen",
    "cp mine $OUT/other",
    "$OUT/run",
    "sh $OUT/run",
    "truncate -s 1 $OUT/cut",
    "rm $OUT/dir/inner",
    "rmdir $OUT/dir",
    "cat /etc/hostname || cat /etc/passwd",
    "ls /",
    "ls /tmp",
    "ls /sys",
    "ls /dev",
    "head -c1 /dev/zero",
];

const ALLOWED: &[&str] = &[
    "cat mine",
    "echo x > new && echo y >> new && test \"$(cat new)\" = 'x\ny'",
    "mkdir -p a/b && mv new a/b/new && ln a/b/new a/hard && ln -s b/new a/soft && cat a/soft && rm -r a",
    "mkfifo pipe && rm pipe",
    "printf '#!/bin/sh\\nexit 0\\n' > run && chmod +x run && ./run",
    "echo x > /dev/null && cat /dev/null",
    "cat /proc/self/status /proc/meminfo > /dev/null",
    "ls /usr > /dev/null",
    "echo x | cat > out && cat < out && rm out",
    "sh -c 'sleep 0 & wait'",
];

#[tokio::test]
async fn only_what_is_named_is_reached() {
    let bench = Bench::new();
    prepare(&bench);
    for (line, result) in REFUSED.iter().zip(tries(&bench, REFUSED, false).await) {
        let refused = ["Permission denied", "cross-device", "Cross-device"].iter().any(|word| result.contains(word));
        assert!(refused, "{line}: {result:?}");
    }
    for (line, result) in ALLOWED.iter().zip(tries(&bench, ALLOWED, false).await) {
        assert_eq!(result, "", "{line}");
    }
    assert_eq!(fs::read_to_string(bench.outside("file")).unwrap(), "outside");
    // They are refused by nothing else.
    for (line, result) in REFUSED.iter().zip(tries(&bench, REFUSED, true).await) {
        assert_eq!(result, "", "without confinement: {line}");
    }
    bench.stop().await;
}

#[tokio::test]
async fn what_is_reported_is_what_the_kernel_has() {
    let bench = Bench::new();
    let confined: Confined = bench.confined(bench.sh("sleep 1000")).await;
    // The table of `landlock.rs`, once more.
    for (abi, protection) in [
        (1, Protection::LandlockFs),
        (2, Protection::LandlockRefer),
        (3, Protection::LandlockTruncate),
        (4, Protection::LandlockNet),
        (5, Protection::LandlockIoctlDev),
        (6, Protection::LandlockScope),
        (9, Protection::LandlockUnix),
    ] {
        assert_eq!(confined.has(protection), confined.landlock_abi >= abi, "{protection} of {confined:?}");
    }
    bench.stop().await;
}

#[tokio::test]
async fn a_step_that_fails_is_named_and_nothing_runs() {
    let bench = Bench::new();
    let with = |change: &dyn Fn(&mut Spec)| {
        let mut spec = bench.sh("touch ran");
        change(&mut spec);
        spec
    };
    let missing = Path::new("/does/not/exist");
    let confinement = |spec: &mut Spec| spec.confinement.take().unwrap();
    let (step, detail) = bench
        .refused(with(&|spec| {
            let mut changed = confinement(spec);
            changed.files.write.push(missing.into());
            spec.confinement = Some(changed);
        }))
        .await;
    assert_eq!(step, "landlock");
    assert!(detail.contains("/does/not/exist"), "{detail}");
    // Somebody has put a link in its place, or in its path.
    std::os::unix::fs::symlink(bench.outside(""), bench.outside("swapped")).unwrap();
    for path in ["swapped", "swapped/own"] {
        let (step, detail) = bench
            .refused(with(&|spec| {
                let mut changed = confinement(spec);
                changed.files.write.push(bench.outside(path));
                spec.confinement = Some(changed);
            }))
            .await;
        assert!(step == "landlock" && detail.contains("a symbolic link"), "{step}: {detail}");
    }
    // What is only to be read or executed may be missing.
    let mut spec = bench.sh("echo fine");
    let mut changed = confinement(&mut spec);
    changed.files.execute.push(missing.into());
    spec.confinement = Some(changed);
    assert_eq!(bench.run(spec).await, "fine\n");
    // Required, and not there: it was given no user.
    let (step, detail) = bench
        .refused(with(&|spec| {
            let mut changed = confinement(spec);
            changed.require = [Protection::Seccomp, Protection::Uid].into();
            spec.confinement = Some(changed);
        }))
        .await;
    assert_eq!(step, "uid", "{detail}");
    // A program that is out of its own reach.
    let (step, detail) = bench
        .refused(with(&|spec| {
            let mut changed = confinement(spec);
            changed.files.execute.retain(|path| path != Path::new("/bin") && path != Path::new("/usr"));
            spec.confinement = Some(changed);
        }))
        .await;
    assert_eq!(step, "exec");
    assert!(detail.contains("/bin/sh") && detail.contains("Permission denied"), "{detail}");
    let (step, _) = bench
        .refused(with(&|spec| {
            let mut changed = confinement(spec);
            changed.limits.open_files = Some(u64::MAX - 1);
            spec.confinement = Some(changed);
        }))
        .await;
    assert_eq!(step, "rlimit_nofile");
    assert!(!bench.own.join("ran").exists());
    bench.stop().await;
}

#[tokio::test]
async fn descriptors_that_leak_into_the_jail_do_not_reach_the_program() {
    let bench = Bench::new();
    fs::write(bench.outside("file"), "leaked").unwrap();
    let leaked = fs::File::open(bench.outside("file")).unwrap();
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    assert_eq!(bench.told(bench.program("descriptors", &[])).await, ["[0, 1, 2]"]);
    drop(leaked);
    bench.stop().await;
}

#[tokio::test]
async fn limits_hold_for_each_process() {
    let bench = Bench::new();
    let mut spec =
        bench.sh("ulimit -c; ulimit -n; head -c 2000000 /proc/self/exe /usr/bin/* 2>/dev/null > big; stat -c %s big");
    let mut confinement = bench.confinement();
    confinement.limits.open_files = Some(99);
    confinement.limits.file_size = Some(1_000_000);
    spec.confinement = Some(confinement);
    let text = bench.run(spec).await;
    assert!(text.starts_with("0\n99\n") && text.contains("\n1000000\n"), "{text}");
    bench.stop().await;
}

/// What Landlock does not cover, as far as a user of its own does not: known, and no more than this.
#[tokio::test]
async fn metadata_is_the_users_business() {
    let bench = Bench::new();
    prepare(&bench);
    let lines = [
        "stat $OUT/file",
        "test -e $OUT/dir/inner",
        "readlink $OUT/../proc/self/cwd || readlink /proc/self/cwd",
        "chmod 600 $OUT/file",
        "touch -d 2001-01-01 $OUT/dir",
        "cd $OUT/dir",
    ];
    let open: Vec<_> = tries(&bench, &lines, false).await.iter().map(String::is_empty).collect();
    assert_eq!(open, [true; 6], "of its own user's files");
    bench.stop().await;
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "acts as another user, which takes root")]
async fn a_user_of_its_own_changes_no_metadata_of_others() {
    let bench = Bench::new();
    prepare(&bench);
    fs::set_permissions(bench.outside("dir"), Permissions::from_mode(0o700)).unwrap();
    let out = bench.outside("");
    for line in ["chmod 600 $OUT/file", "touch -d 2001-01-01 $OUT/file", "stat $OUT/dir/inner", "cd $OUT/dir"] {
        let spec = bench.as_user(bench.sh(&line.replace("$OUT", out.to_str().unwrap())));
        let said = bench.run(spec).await;
        assert!(said.contains("ermi") || said.contains("can't cd"), "{line}: {said:?}");
    }
    bench.stop().await;
}
