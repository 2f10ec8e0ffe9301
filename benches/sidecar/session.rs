//! The next prompt of a conversation: through `/sessions/{id}/messages`, and straight at an `opencode serve` that has the
//! same conversation.

use crate::World;
use crate::direct::Direct;
use crate::sidecar::{Sidecar, directory};
use crate::table::{Row, Shown, print, target};
use opencode_sidecar::model::SessionId;
use opencode_sidecar::scripted::Script;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

impl Sidecar {
    async fn create_session(&self) -> SessionId {
        let id = SessionId::new();
        let answer = self.send("/sessions", json!({ "session_id": id })).await;
        assert_eq!(answer["session_id"], json!(id), "{answer}");
        id
    }

    /// From the prompt to `done`, for one who follows the session; `last` is the id of the `done` before.
    async fn prompt_in(&self, id: SessionId, last: &mut String, prompt: &str) -> Duration {
        let started = Instant::now();
        self.send(&format!("/sessions/{id}/messages"), json!({ "text": prompt })).await;
        let mut stream =
            self.get(&format!("/sessions/{id}/stream")).header("last-event-id", &*last).send().await.unwrap();
        let mut text = String::new();
        while !text.contains("event: done") {
            let chunk = stream.chunk().await.unwrap().expect("the stream goes on until `done`");
            text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
        let took = started.elapsed();
        assert!(text.contains("\"reason\":\"finished\""), "{text}");
        let id = text.lines().rev().find_map(|line| line.strip_prefix("id: "));
        id.unwrap().clone_into(last);
        took
    }

    async fn send(&self, path: &str, body: Value) -> Value {
        let request = self.http.post(format!("{}{path}", self.base)).json(&body);
        request.bearer_auth(self.secret.expose_secret()).send().await.unwrap().json().await.unwrap()
    }
}

pub(crate) async fn run(world: &World) {
    let (state, theirs) = (directory(), directory());
    let sidecar = Sidecar::start(world, state.path(), 0, None).await;
    let session = sidecar.create_session().await;
    let direct = Direct::start(world, theirs.path()).await;
    let conversation = direct.conversation().await;
    let (mut through, mut straight) = (Vec::new(), Vec::new());
    let mut last = "1.0".to_owned();
    // The first round is for what each side loads on first use.
    for round in 0..=world.rounds(20) {
        let prompt = Script::new().text("Every one of these words is a word.").to_prompt("Go on.");
        let took = sidecar.prompt_in(session, &mut last, &prompt).await;
        let alone = direct.run_in(&conversation, &prompt).await;
        if round > 0 {
            through.push(took.as_secs_f64() * 1000.0);
            straight.push(alone.total.as_secs_f64() * 1000.0);
        }
    }
    let rows = [Row::new("through the sidecar", through), Row::new("straight at OpenCode", straight)];
    print("the next prompt of a conversation, to its end", "ms", Shown::Spread, &rows);
    println!("ratio of the medians: {:.3}", rows[0].median() / rows[1].median());
    target("more than OpenCode alone", rows[0].median() - rows[1].median(), 50.0, " ms");
    direct.stop().await;
    sidecar.stop().await;
}
