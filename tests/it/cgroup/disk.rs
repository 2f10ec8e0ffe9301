//! What a program adds to the disk is counted while it writes, and found to be too much.

use super::MIB;
use crate::sandbox::{Bench, DEADLINE, line};
use opencode_sidecar::sandbox::{Disk, DiskSpec, Process};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// On a disk: what is removed or has holes is no different there.
fn directory() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

async fn start(bench: &Bench, script: &str, cwd: &Path) -> Process {
    let mut spec = bench.sh(script);
    spec.cwd = cwd.to_path_buf();
    bench.sandbox.start(spec).await.unwrap()
}

async fn watch(bench: &Bench, directory: &Path, limit: u64, process: Option<&Process>) -> Disk {
    let roots = vec![directory.to_path_buf()];
    let process = process.map(Process::handle);
    bench.sandbox.watch_disk(DiskSpec { roots, limit: Some(limit), owner: None, process, user: None }).await.unwrap()
}

#[tokio::test]
async fn a_large_file_is_noticed_while_it_grows() {
    let (bench, directory) = (Bench::new(), directory());
    fs::write(directory.path().join("before"), vec![1; 8 * 1024 * 1024]).unwrap();
    let disk = watch(&bench, directory.path(), 16 * MIB, None).await;
    assert_eq!(disk.added().bytes, 0, "what was there before is not added");
    // It goes on until it is ended, or has written four gigabytes.
    let script =
        "i=0; while [ $i -lt 4096 ]; do dd if=/dev/zero bs=1048576 count=1 2>/dev/null; i=$((i+1)); done > file";
    let process = start(&bench, script, directory.path()).await;
    let added = tokio::time::timeout(DEADLINE, disk.exhausted()).await.unwrap();
    assert!(added.bytes > 16 * MIB && added.exhausted, "{added:?}");
    process.kill(DEADLINE).await.unwrap();
    let size = fs::metadata(directory.path().join("file")).unwrap().len();
    assert!(size < 4096 * MIB, "it was noticed too late");
    drop(disk);
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn what_is_within_the_limit_is_counted_and_no_more() {
    let (bench, directory) = (Bench::new(), directory());
    let disk = watch(&bench, directory.path(), 64 * MIB, None).await;
    // A hole of a gigabyte, something removed at once, and a file with three names: when that is counted, all is done.
    let script = "dd if=/dev/zero of=hole bs=1 count=1 seek=1073741824 2>/dev/null
        dd if=/dev/zero of=gone bs=1048576 count=10 2>/dev/null; rm gone
        dd if=/dev/zero of=file bs=1048576 count=20 2>/dev/null; ln file second; ln file third";
    let process = start(&bench, script, directory.path()).await;
    process.gone().await;
    let added = tokio::time::timeout(DEADLINE, disk.reached_bytes(20 * MIB)).await.unwrap();
    assert!(added.bytes < 22 * MIB && !added.exhausted, "{added:?}");
    drop(disk);
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn a_file_that_was_removed_and_is_open_counts() {
    let (bench, directory) = (Bench::new(), directory());
    let script = "exec 9> file; rm file; mkfifo go; echo removed; read x < go
        dd if=/dev/zero bs=1048576 count=40 >&9 2>/dev/null; sleep 1000; :";
    let mut process = start(&bench, script, directory.path()).await;
    assert_eq!(line(&mut process).await, "removed\n");
    let disk = watch(&bench, directory.path(), 16 * MIB, Some(&process)).await;
    fs::write(directory.path().join("go"), "go\n").unwrap();
    let added = tokio::time::timeout(DEADLINE, disk.exhausted()).await.unwrap();
    assert!(added.bytes > 16 * MIB, "{added:?}");
    process.kill(DEADLINE).await.unwrap();
    drop(disk);
    bench.nothing_is_left().await;
}

/// The runtime has one thread here: had the count taken it, nothing else would go on.
#[tokio::test]
async fn very_many_files_stop_nobody() {
    let (bench, directory) = (Bench::new(), directory());
    for number in 0..50_000 {
        fs::write(directory.path().join(number.to_string()), "").unwrap();
    }
    let mut counting = Box::pin(watch(&bench, directory.path(), MIB, None));
    let mut turns = 0;
    let disk = loop {
        tokio::select! {
            biased;
            disk = &mut counting => break disk,
            () = tokio::task::yield_now() => turns += 1,
        }
    };
    assert!(turns > 20, "others had {turns} turns");
    drop((counting, disk));
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn a_directory_that_is_not_there_is_an_error() {
    let bench = Bench::new();
    let spec = DiskSpec { roots: vec!["/does/not/exist".into()], limit: None, owner: None, process: None, user: None };
    let error = bench.sandbox.watch_disk(spec).await.unwrap_err();
    assert!(error.to_string().contains("/does/not/exist"), "{error}");
    bench.nothing_is_left().await;
}
