//! The files of an execution over HTTP, and what it changed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test's own helpers fail like the test")]

use crate::support::sidecar::{Sidecar, World, answer, soon};
use opencode_sidecar::scripted::Script;
use reqwest::{Method, Response};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};

async fn ask(sidecar: &Sidecar, method: Method, id: &str, rest: &str, headers: &[(&str, &str)]) -> Response {
    let mut request = sidecar.http.request(method, format!("{}/tasks/{id}/{rest}", sidecar.base));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    soon(rest, request.bearer_auth(&sidecar.secret).send()).await.unwrap()
}

async fn content(sidecar: &Sidecar, id: &str, path: &str, headers: &[(&str, &str)]) -> Response {
    ask(sidecar, Method::GET, id, &format!("files/content?path={path}"), headers).await
}

async fn bytes(response: Response) -> Vec<u8> {
    soon("a body", response.bytes()).await.unwrap().to_vec()
}

fn header<'a>(response: &'a Response, name: &str) -> &'a str {
    response.headers().get(name).unwrap_or_else(|| panic!("no {name}: {response:?}")).to_str().unwrap()
}

async fn list(sidecar: &Sidecar, id: &str, query: &str) -> Value {
    sidecar.get(&format!("/tasks/{id}/files{query}")).await
}

fn names(list: &Value) -> Vec<&str> {
    list["entries"].as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn files_are_listed_and_read_while_it_runs_and_after() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let script = Script::new()
        .write(&world.path("app/src/hello.txt"), "Hello, file\n")
        .bash("mkdir -p bin && printf '\\0\\1\\2' > bin/data && chmod +x bin/data; touch written; until [ -e go ]; do sleep 0.02; done")
        .text("done");
    let id = sidecar.submit_with(&script, json!({ "workdir": "app" })).await;
    let mut stream = sidecar.stream(&id, 0).await;
    stream.until("the command", |e| e["type"] == "tool_call" && e["data"]["tool"] == "bash").await;
    soon("the files", async {
        while !world.file("app/written").exists() {
            tokio::task::yield_now().await
        }
    })
    .await;

    let running = list(&sidecar, &id, "").await;
    assert_eq!(names(&running), ["bin", "src", "written"]);
    assert_eq!(running["execution_id"], json!(id));
    assert_eq!(bytes(content(&sidecar, &id, "src/hello.txt", &[]).await).await, b"Hello, file\n");
    let so_far = sidecar.get(&format!("/tasks/{id}/diff")).await;
    assert_eq!(
        (&so_far["status"], &so_far["complete"], &so_far["basis"]),
        (&json!("running"), &json!(false), &Value::Null)
    );
    assert_eq!(
        so_far["files"],
        json!([{ "path": "src/hello.txt", "change": null, "patch": null, "additions": null, "deletions": null }])
    );

    fs::write(world.file("app/go"), "").unwrap();
    stream.until("the end", |e| e["type"] == "complete").await;
    let after = list(&sidecar, &id, "?path=bin/").await;
    let entry = &after["entries"][0];
    assert_eq!((&entry["name"], &entry["path"], &entry["type"]), (&json!("data"), &json!("bin/data"), &json!("file")));
    assert_eq!((&entry["size"], &entry["executable"]), (&json!(3), &json!(true)));
    assert_eq!(entry["modified_at"].as_str().unwrap().len(), "2026-11-21T01:56:13.686Z".len());
    let response = content(&sidecar, &id, "bin/data", &[]).await;
    assert_eq!(header(&response, "content-type"), "application/octet-stream");
    assert_eq!(bytes(response).await, [0, 1, 2]);

    let paths = [format!("/tasks/{id}/files"), format!("/tasks/{id}/files/content?path=bin/data")];
    fs::rename(world.file("app"), world.file("elsewhere")).unwrap();
    for path in &paths {
        let (status, body) = sidecar.send(Method::GET, path, None).await;
        assert_eq!(
            (status, body["detail"].as_str()),
            (404, Some("The execution's working directory is gone.")),
            "{path}"
        );
    }
    // What was changed is in the log, and stays.
    assert_eq!(sidecar.get(&format!("/tasks/{id}/diff")).await["complete"], true);
    fs::rename(world.file("elsewhere"), world.file("app")).unwrap();
    assert_eq!(sidecar.send(Method::DELETE, &format!("/tasks/{id}"), None).await.0, 204);
    for path in paths.iter().chain([&format!("/tasks/{id}/diff")]) {
        let (status, body) = sidecar.send(Method::GET, path, None).await;
        let detail = "There is no execution with this id in this project.";
        assert_eq!((status, body["detail"].as_str()), (404, Some(detail)), "{path}");
    }
    sidecar.stop().await;
}

#[tokio::test]
async fn content_comes_for_download_in_ranges_up_to_the_limit() {
    let world = World::new().await;
    let sidecar = world.start(&[("MAX_TASK_FILE_SIZE", "300000")]).await;
    let id = sidecar.submit(&Script::new().text("nothing")).await;
    sidecar.follow(&id).await;
    let text: Vec<u8> = (0..60_000).flat_map(|n: u32| format!("{n:04x}\n").into_bytes()).take(300_000).collect();
    fs::write(world.file("just.txt"), &text).unwrap();
    let page = "<script>alert(1)</script>";
    fs::write(world.file("page.html"), page).unwrap();
    fs::write(world.file("latin.txt"), b"gr\xfcn").unwrap();
    fs::write(world.file("empty"), "").unwrap();
    let large = fs::File::create(world.file("large")).unwrap();
    large.set_len(5_000_000_000).unwrap();
    std::os::unix::fs::FileExt::write_at(&large, b"the end", 4_999_999_993).unwrap();

    let whole = content(&sidecar, &id, "just.txt", &[]).await;
    assert_eq!((whole.status().as_u16(), header(&whole, "content-length")), (200, "300000"));
    assert_eq!((header(&whole, "accept-ranges"), header(&whole, "cache-control")), ("bytes", "no-store"));
    let tag = header(&whole, "etag").to_owned();
    assert!(bytes(whole).await == text, "the bytes differ");

    // A page of a hostile agent is no page of ours.
    let html = content(&sidecar, &id, "page.html", &[]).await;
    assert_eq!(header(&html, "content-type"), "text/plain; charset=utf-8");
    assert_eq!(header(&html, "x-content-type-options"), "nosniff");
    assert_eq!(header(&html, "content-disposition"), "attachment; filename*=UTF-8''page.html");
    assert_eq!(header(&html, "content-security-policy"), "default-src 'none'; sandbox");
    assert_eq!(bytes(html).await, page.as_bytes());
    assert_eq!(header(&content(&sidecar, &id, "latin.txt", &[]).await, "content-type"), "application/octet-stream");
    let empty = content(&sidecar, &id, "empty", &[]).await;
    assert_eq!((empty.status().as_u16(), header(&empty, "content-length")), (200, "0"));

    let ranges: [(&str, std::ops::Range<usize>); 4] = [
        ("bytes=0-0", 0..1),
        ("bytes=131071-131073", 131_071..131_074),
        ("bytes=299990-999999", 299_990..300_000),
        ("bytes=-5", 299_995..300_000),
    ];
    for (range, want) in ranges {
        let part = content(&sidecar, &id, "just.txt", &[("range", range), ("if-range", &tag)]).await;
        assert_eq!((part.status().as_u16(), header(&part, "etag")), (206, &*tag), "{range}");
        let of = format!("bytes {}-{}/300000", want.start, want.end - 1);
        assert_eq!((header(&part, "content-range"), header(&part, "content-length")), (&*of, &*want.len().to_string()));
        assert_eq!(bytes(part).await, text[want], "{range}");
    }
    // Of another state, of another unit, several: the whole.
    for (range, state) in [("bytes=0-0", "\"another\""), ("lines=0-0", &*tag), ("bytes=0-0,2-3", &*tag)] {
        let whole = content(&sidecar, &id, "just.txt", &[("range", range), ("if-range", state)]).await;
        assert_eq!((whole.status().as_u16(), bytes(whole).await.len()), (200, 300_000), "{range}, {state}");
    }
    let beyond = content(&sidecar, &id, "just.txt", &[("range", "bytes=300000-")]).await;
    assert_eq!(header(&beyond, "content-range"), "bytes */300000");
    let (status, problem) = answer(beyond).await;
    assert_eq!((status, problem["code"].as_str()), (416, Some("range_not_satisfiable")));

    for headers in [&[][..], &[("range", "bytes=1-")], &[("range", "bytes=0-300000")]] {
        let (status, problem) = answer(content(&sidecar, &id, "large", headers).await).await;
        assert_eq!((status, problem["code"].as_str()), (413, Some("file_too_large")), "{headers:?}");
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains("300000 (MAX_TASK_FILE_SIZE)"), "{detail}");
    }
    let end = content(&sidecar, &id, "large", &[("range", "bytes=4999999993-")]).await;
    assert_eq!((end.status().as_u16(), bytes(end).await), (206, b"the end".to_vec()));
    let most = content(&sidecar, &id, "large", &[("range", "bytes=4294967296-4295267295")]).await;
    assert_eq!((most.status().as_u16(), bytes(most).await), (206, vec![0; 300_000]));

    let head = ask(&sidecar, Method::HEAD, &id, "files/content?path=just.txt", &[]).await;
    assert_eq!(
        (head.status().as_u16(), header(&head, "content-length"), header(&head, "etag")),
        (200, "300000", &*tag)
    );
    assert_eq!(bytes(head).await, b"");
    fs::write(world.file("just.txt"), "another").unwrap();
    assert_ne!(header(&content(&sidecar, &id, "just.txt", &[]).await, "etag"), tag);
    sidecar.stop().await;
}

#[tokio::test]
async fn what_leads_out_or_is_no_file_is_refused_by_name() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "what is outside").unwrap();
    // As an agent can make them.
    let script = Script::new()
        .bash(&format!("ln -s {} out; ln -s /etc/passwd passwd; ln -s /proc/self/root root; mkfifo pipe; mkdir real; ln -s real inside; touch real/file", outside.path().display()))
        .text("done");
    let id = sidecar.submit(&script).await;
    sidecar.follow(&id).await;
    mknodat(CWD, world.file("pipe-2"), FileType::Fifo, Mode::from(0o600), 0).unwrap();
    let odd: [&[u8]; 3] = [b"new\nline", b"evil\xe2\x80\xaegnp.exe", b"\xff\xfe %2e%2e&+"];
    for name in odd {
        fs::write(world.workspace.path().join(std::ffi::OsStr::from_bytes(name)), name).unwrap();
    }

    let listing = list(&sidecar, &id, "").await;
    let entry = |name: &str| listing["entries"].as_array().unwrap().iter().find(|e| e["name"] == name).unwrap();
    for (name, target) in [("passwd", "/etc/passwd"), ("root", "/proc/self/root"), ("inside", "real")] {
        assert_eq!((&entry(name)["type"], &entry(name)["target"]), (&json!("symlink"), &json!(target)), "{name}");
    }
    assert_eq!(entry("pipe")["type"], "special");
    // Each is shown so that it deceives nobody, and can be asked for.
    for (name, shown) in odd.into_iter().zip(["new\u{fffd}line", "evil\u{fffd}gnp.exe", "\u{fffd}\u{fffd} %2e%2e&+"]) {
        let path = entry(shown)["path"].as_str().unwrap().to_owned();
        let response = content(&sidecar, &id, &path, &[]).await;
        assert_eq!(response.status(), 200, "{path}");
        assert_eq!(bytes(response).await, name);
    }

    let link = "path: is a symbolic link or leads through one, and those are not followed";
    let long = "x/".repeat(2050);
    for (path, status, detail) in [
        ("passwd", 400, link),
        ("out/secret", 400, link),
        ("root/etc/passwd", 400, link),
        ("inside/file", 400, link),
        ("pipe", 400, "path: is a FIFO, a socket or a device, and only files are read"),
        ("real", 400, "path: is a directory; GET /tasks/{execution_id}/files lists it"),
        ("real/file/x", 400, "path: is no directory, or leads through something that is none"),
        ("../x", 400, "path: may not contain `..`"),
        ("real/%2e%2e/%2e%2e/x", 400, "path: may not contain `..`"),
        ("%2fetc/passwd", 400, "path: must be relative"),
        ("a%00b", 400, "path: may not contain NUL"),
        (&long, 400, "path: may have at most 4096 bytes"),
        ("missing", 404, "There is nothing at this path in the execution's working directory."),
    ] {
        let (got, problem) = answer(content(&sidecar, &id, path, &[]).await).await;
        assert_eq!((got, problem["detail"].as_str()), (status, Some(detail)), "{path}");
        assert!(!problem.to_string().contains("what is outside"));
    }
    for (query, field) in [
        ("?path=inside", "path"),
        ("?cursor=!", "cursor"),
        ("?limit=0", "limit"),
        ("?path=a&path=b", "path"),
        ("?deep=1", "deep"),
    ] {
        let (status, problem) = sidecar.send(Method::GET, &format!("/tasks/{id}/files{query}"), None).await;
        assert_eq!((status, problem["details"]["field"].as_str()), (400, Some(field)), "{query}: {problem}");
    }
    let (status, problem) = sidecar.send(Method::GET, &format!("/tasks/{id}/files/content"), None).await;
    assert_eq!((status, problem["details"]["field"].as_str()), (400, Some("path")), "{problem}");

    // By pages, all of it once and in order.
    let (mut paged, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = list(&sidecar, &id, &format!("?limit=2{cursor}")).await;
        paged.extend(page["entries"].as_array().unwrap().clone());
        let Some(next) = page["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(json!(paged), listing["entries"]);
    sidecar.stop().await;
}

/// A file that changes under its reader: the answer ends, and does not pretend to be whole.
#[tokio::test]
async fn an_answer_ends_whatever_becomes_of_its_file() {
    const SIZE: u64 = 64 << 20;
    let world = World::new().await;
    let sidecar = world.start(&[("MAX_TASK_FILE_SIZE", "64 MiB")]).await;
    let id = sidecar.submit(&Script::new().text("nothing")).await;
    sidecar.follow(&id).await;
    let file = fs::File::create(world.file("file")).unwrap();
    file.set_len(SIZE).unwrap();

    let mut growing = content(&sidecar, &id, "file", &[]).await;
    let mut read = soon("a chunk", growing.chunk()).await.unwrap().unwrap().len() as u64;
    file.set_len(SIZE + 1000).unwrap();
    while let Some(chunk) = soon("a chunk", growing.chunk()).await.unwrap() {
        read += chunk.len() as u64;
    }
    assert_eq!(read, SIZE, "as much as was announced");

    file.set_len(SIZE).unwrap();
    let mut shrinking = content(&sidecar, &id, "file", &[]).await;
    soon("a chunk", shrinking.chunk()).await.unwrap().unwrap();
    file.set_len(0).unwrap();
    let cut = loop {
        match soon("a chunk", shrinking.chunk()).await {
            Ok(Some(_)) => {}
            end => break end,
        }
    };
    assert!(cut.is_err(), "it is cut, and not ended");

    // So many read at once and no more; who is done makes room.
    file.set_len(SIZE).unwrap();
    let mut readers = Vec::new();
    for _ in 0..opencode_sidecar::executions::MAX_READERS {
        let reader = content(&sidecar, &id, "file", &[]).await;
        assert_eq!(reader.status(), 200);
        readers.push(reader);
    }
    let full = ask(&sidecar, Method::GET, &id, "files", &[]).await;
    assert_eq!((full.status().as_u16(), header(&full, "retry-after")), (503, "5"));
    drop(readers);
    soon("a place", async { while ask(&sidecar, Method::GET, &id, "files", &[]).await.status() != 200 {} }).await;
    sidecar.stop().await;
}

#[cfg_attr(not(as_root), ignore = "needs root: it starts the sidecar as another user")]
#[tokio::test]
async fn what_may_not_be_read_is_said() {
    let world = World::new().await;
    let sidecar = world.start_as(crate::support::sidecar::As::Nobody, &[]).await;
    let id = sidecar.submit(&Script::new().text("nothing")).await;
    sidecar.follow(&id).await;
    fs::write(world.file("closed"), "x").unwrap();
    fs::set_permissions(world.file("closed"), fs::Permissions::from_mode(0o600)).unwrap();
    let (status, problem) = answer(content(&sidecar, &id, "closed", &[]).await).await;
    assert_eq!(
        (status, problem["code"].as_str(), &problem["details"]["field"]),
        (409, Some("conflict"), &json!("path"))
    );
    symlink("x", world.file("shown")).unwrap();
    assert_eq!(names(&list(&sidecar, &id, "").await), ["closed", "shown"]);
    sidecar.stop().await;
}

/// In a git repository: all that is different, whoever changed it.
#[tokio::test]
async fn a_repositorys_changes_are_told_whoever_made_them() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let lines = |changed: &str| {
        (1..=20).map(|n| if n == 10 { changed.to_owned() } else { format!("line {n}\n") }).collect::<String>()
    };
    fs::write(world.file("long.txt"), lines("line 10\n")).unwrap();
    fs::write(world.file("gone.txt"), "gone\n").unwrap();
    let init = Script::new()
        .bash("git init -q . && git add . && git -c user.name=a -c user.email=a@b commit -qm one && echo made")
        .text("done");
    let id = sidecar.submit(&init).await;
    sidecar.follow(&id).await;
    assert!(world.file(".git/HEAD").exists());

    let script = Script::new()
        .write(&world.path("new.txt"), "one\ntwo")
        .tool(
            "edit",
            json!({ "filePath": world.path("long.txt"), "oldString": "line 10\n", "newString": "line ten\n" }),
        )
        .bash("rm gone.txt; printf '\\0' > binary; git add -A; git -c user.name=a -c user.email=a@b commit -qm two")
        .text("done");
    // Two in one conversation: the second one hears of what the first one did, and takes it for none of its own.
    let session = json!({ "session_id": uuid::Uuid::new_v4() });
    assert_eq!(sidecar.post("/sessions", session.clone()).await.0, 201);
    let id = sidecar.submit_with(&script, session.clone()).await;
    let events = sidecar.follow(&id).await;
    let diff = sidecar.get(&format!("/tasks/{id}/diff")).await;
    let mut files = diff["files"].as_array().unwrap().clone();
    files.sort_by_key(|file| file["path"].as_str().unwrap().to_owned());
    let file = |path: &str, change: &str, patch: Option<&str>, additions: u64, deletions: u64| json!({ "path": path, "change": change, "patch": patch, "additions": additions, "deletions": deletions });
    let long = "--- a/long.txt\n+++ b/long.txt\n@@ -7,7 +7,7 @@\n line 7\n line 8\n line 9\n-line 10\n+line ten\n line 11\n line 12\n line 13\n";
    let new = "--- /dev/null\n+++ b/new.txt\n@@ -0,0 +1,2 @@\n+one\n+two\n\\ No newline at end of file\n";
    let gone = "--- a/gone.txt\n+++ /dev/null\n@@ -1,1 +0,0 @@\n-gone\n";
    let want = [
        file("binary", "added", None, 0, 0),
        file("gone.txt", "deleted", Some(gone), 0, 1),
        file("long.txt", "modified", Some(long), 1, 1),
        file("new.txt", "added", Some(new), 2, 0),
    ];
    assert_eq!(files, want, "{diff:#}");
    assert_eq!(
        (&diff["basis"], &diff["complete"], &diff["status"]),
        (&json!("snapshots"), &json!(true), &json!("completed"))
    );
    let told: Vec<_> = events.iter().filter(|event| event["type"] == "diff").collect();
    assert_eq!((told.len(), &told[0]["data"]["files"]), (1, &diff["files"]));

    // One that changes nothing says so.
    let id = sidecar.submit_with(&Script::new().bash("cat new.txt").text("done"), session.clone()).await;
    sidecar.follow(&id).await;
    let diff = sidecar.get(&format!("/tasks/{id}/diff")).await;
    assert_eq!((&diff["basis"], &diff["complete"], &diff["files"]), (&json!("snapshots"), &json!(true), &json!([])));
    let path = format!("/sessions/{}/stop", session["session_id"].as_str().unwrap());
    assert_eq!(sidecar.post(&path, json!({})).await.0, 200);
    sidecar.stop().await;
}

/// Elsewhere: what the file tools say that they did, in order.
#[tokio::test]
async fn without_a_repository_the_file_tools_changes_are_told() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    fs::write(world.file("old.txt"), "old\n").unwrap();
    let script = Script::new()
        .write(&world.path("a.txt"), "one\ntwo\n")
        .tool("edit", json!({ "filePath": world.path("a.txt"), "oldString": "two", "newString": "2" }))
        .tool("read", json!({ "filePath": world.path("old.txt") }))
        .write(&world.path("old.txt"), "new\n")
        .bash("echo shell > shell.txt")
        .text("done");
    let id = sidecar.submit(&script).await;
    sidecar.follow(&id).await;
    let diff = sidecar.get(&format!("/tasks/{id}/diff")).await;
    let added = "--- /dev/null\n+++ b/a.txt\n@@ -0,0 +1,2 @@\n+one\n+two\n";
    let edited = "--- a/a.txt\n+++ b/a.txt\n@@ -1,2 +1,2 @@\n one\n-two\n+2\n";
    let want = json!([
        { "path": "a.txt", "change": "added", "patch": added, "additions": 2, "deletions": 0 },
        { "path": "a.txt", "change": "modified", "patch": edited, "additions": 1, "deletions": 1 },
        { "path": "old.txt", "change": "modified", "patch": null, "additions": null, "deletions": null },
    ]);
    assert_eq!(diff["files"], want, "{diff:#}");
    assert_eq!((&diff["basis"], &diff["complete"]), (&json!("file_tools"), &json!(true)));
    sidecar.stop().await;
}
