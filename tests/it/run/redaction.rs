//! Secrets that a run brings to light go into no log: not to a reader, the journal, the database or the record; also where
//! they come in pieces.

use crate::support::sidecar::{API_KEY, World, text_of};
use opencode_sidecar::scripted::{Script, Step};
use serde_json::{Value, json};
use std::path::Path;

/// Nobody's: of the right shape, and no more.
const TOKEN: &str = "ghp_0123456789abcdefABCDEF0123456789abcd";
const PRIVATE: &str = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7";

#[tokio::test]
async fn no_secret_goes_into_a_log() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{PRIVATE}\n-----END PRIVATE KEY-----\n");
    std::fs::write(world.file("key.pem"), &pem).unwrap();
    std::fs::write(world.file("halves"), &TOKEN[20..]).unwrap();
    let path = world.file("key.pem").display().to_string();
    // The second half is written only when the first one can be seen to have been read.
    let split =
        format!("printf 'one {}'; until [ -e gate ]; do sleep 0.02; done; cat halves; echo ' two'", &TOKEN[..20]);
    let words = Step {
        text: Some(format!("It is {API_KEY}, said the model, and {TOKEN}.")),
        reasoning: Some(format!("The key: {API_KEY} is not to be told.")),
        chunk_chars: Some(3),
        ..Step::default()
    };
    let script = Script::new()
        .bash("cat key.pem")
        .bash(&split)
        .tool("read", json!({ "filePath": path }))
        .write("out.txt", &format!("token = {TOKEN}\n"))
        .step(words);
    let id = sidecar.submit(&script).await;
    let mut stream = sidecar.stream(&id, 0).await;
    stream.until("the first half, without what is held back", |e| e["type"] == "stdout" && e["data"] == "one ").await;
    std::fs::write(world.file("gate"), "").unwrap();
    let events = sidecar.follow(&id).await;
    assert_eq!(events.last().unwrap()["data"]["status"], "completed", "{:?}", events.last());

    // What is not a secret is there, and in the place of each secret what it was.
    let output = text_of(&events, "stdout");
    assert!(output.contains("[redacted: a private key]\n"), "{output}");
    assert!(output.contains("one [redacted: a GitHub token] two\n"), "{output}");
    let said = "It is [redacted: the session's key], said the model, and [redacted: a GitHub token].";
    assert_eq!(events.last().unwrap()["data"]["final_message"], said);
    let deltas = |kind: &str| -> String {
        let of_kind = events.iter().filter(|event| event["type"] == kind);
        of_kind.filter_map(|event| event["data"]["delta"].as_str()).collect()
    };
    // In pieces of three characters the first of them may be seen.
    assert_eq!(deltas("message"), said);
    assert_eq!(deltas("reasoning"), "The key: [redacted: the session's key] is not to be told.");
    let write = events.iter().find(|e| e["type"] == "tool_call" && e["data"]["tool"] == "write").unwrap();
    assert_eq!(write["data"]["args"]["content"], "token = [redacted: a GitHub token]\n");
    // The file itself is the session's business.
    assert_eq!(std::fs::read_to_string(world.file("out.txt")).unwrap(), format!("token = {TOKEN}\n"));

    let seqs: Vec<_> = events.iter().map(|event| event["seq"].as_u64().unwrap()).collect();
    assert_eq!(seqs, (1..=seqs.len() as u64).collect::<Vec<_>>(), "no number is lost with what is held back");
    let status = sidecar.get(&format!("/tasks/{id}/status")).await;
    let metrics = sidecar.http.get(format!("{}/metrics", sidecar.base)).send().await.unwrap().text().await.unwrap();
    let counted =
        metrics.lines().find(|line| line.contains("redacted_total{kind=\"a GitHub token\"}")).unwrap_or_default();
    assert!(counted.rsplit(' ').next().unwrap().parse::<u64>().unwrap() >= 4, "{counted}");
    sidecar.stop().await;

    // The prompt is kept as it was sent; what it brought is not.
    let secrets = [API_KEY, TOKEN, PRIVATE];
    for told in events.iter().chain([&status]).map(Value::to_string) {
        assert!(secrets.iter().all(|secret| !told.contains(secret)), "{told}");
    }
    let files = files_beneath(world.state.path());
    assert!(files.iter().any(|file| contains(file, b"redacted: a private key")), "the journal is there to be searched");
    assert!(!files.iter().any(|file| contains(file, PRIVATE.as_bytes())));
    // From the database, in another life.
    let sidecar = world.start(&[]).await;
    assert_eq!(sidecar.follow(&id).await, events);
    sidecar.stop().await;
}

fn contains(file: &[u8], text: &[u8]) -> bool {
    file.windows(text.len()).any(|window| window == text)
}

fn files_beneath(directory: &Path) -> Vec<Vec<u8>> {
    let paths = std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let (directories, files): (Vec<_>, Vec<_>) =
        paths.filter(|path| !path.is_symlink()).partition(|path| path.is_dir());
    let of_files = files.iter().filter(|path| path.is_file()).filter_map(|path| std::fs::read(path).ok());
    of_files.chain(directories.iter().flat_map(|directory| files_beneath(directory))).collect()
}

#[tokio::test]
async fn the_shapes_can_be_left_in_and_the_own_key_cannot() {
    let world = World::new().await;
    let sidecar = world.start(&[("REDACTION", "off")]).await;
    let command = format!("echo {TOKEN} {API_KEY}; echo $HTTPS_PROXY");
    let id = sidecar.submit(&Script::new().bash(&command).text("Done.")).await;
    let events = sidecar.follow(&id).await;
    let output = text_of(&events, "stdout");
    let proxy = output.strip_prefix(&format!("{TOKEN} [redacted: the session's key]\n")).unwrap();
    assert!(proxy.starts_with("http://session:[redacted: the session's key]@127.0.0.1:"), "{proxy}");
    sidecar.stop().await;
}
