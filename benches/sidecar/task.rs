//! A whole task through the sidecar, and the same prompt sent straight to a warm `opencode serve`.

use crate::World;
use crate::direct::Direct;
use crate::machine::cpu;
use crate::sidecar::{Ran, Seen, Sidecar, directory};
use crate::table::{Row, Shown, print, target};
use chrono::{DateTime, Utc};
use opencode_sidecar::scripted::{Script, Step, ToolUse};
use serde_json::{Value, json};
use std::time::Duration;

/// How the model behaves.
#[derive(Clone, Copy)]
struct Pace {
    /// Milliseconds between two pieces of an answer.
    delay: Option<u64>,
    /// Pieces of reasoning before each answer.
    thoughts: usize,
}

/// 300 ms of thinking before each answer, 10 ms between two pieces.
const REALISTIC: Pace = Pace { delay: Some(10), thoughts: 30 };
/// A model that takes no time at all: what is left is OpenCode and the sidecar.
const HARSH: Pace = Pace { delay: None, thoughts: 0 };

/// Between the priming of an OpenCode and its task.
const REST: Duration = Duration::from_secs(5);

/// Six answers: a file, 200 lines of output, an edit, another command, the to-do list, 400 words of text. The file has
/// a name of its own in each run.
fn prompt(pace: Pace, name: &str) -> String {
    let step = |tool: Option<(&str, Value)>| Step {
        reasoning: (pace.thoughts > 0).then(|| "thinking ".repeat(pace.thoughts).trim_end().to_owned()),
        tools: tool.into_iter().map(|(name, args)| ToolUse { name: name.to_owned(), args }).collect(),
        delay_ms: pace.delay,
        ..Step::default()
    };
    let bash = |command: &str| Some(("bash", json!({ "command": command, "description": "A scripted command" })));
    let content = "fn main() {\n    println!(\"Hello.\");\n}\n".repeat(20);
    let edit = json!({ "filePath": name, "oldString": "// the end", "newString": "// the very end" });
    let text = "Every one of these words is a word. ".repeat(50);
    Script::new()
        .step(step(Some(("write", json!({ "filePath": name, "content": format!("{content}// the end\n") })))))
        .step(step(bash("for i in $(seq 200); do echo \"line $i of what the build says\"; done")))
        .step(step(Some(("edit", edit))))
        .step(step(bash(&format!("wc -l {name}"))))
        .step(step(Some((
            "todowrite",
            json!({ "todos": [{ "content": "All of it", "status": "completed", "priority": "high" }] }),
        ))))
        // 400 words in 100 pieces.
        .step(Step { chunk_chars: Some(text.len().div_ceil(100)), text: Some(text), reasoning: None, ..step(None) })
        .to_prompt("Do what there is to do.")
}

pub(crate) async fn run(world: &World) {
    let state = directory();
    let sidecar = Sidecar::start(world, state.path(), 1, None).await;
    for (title, pace, rounds, goal) in
        [("realistic", REALISTIC, world.rounds(5), Some(1.05)), ("harsh, no delays", HARSH, world.rounds(9), None)]
    {
        let (mut through, mut straight, mut again) = (Vec::new(), Vec::new(), Vec::new());
        let (mut own_cpu, mut opencode_cpu, mut first, mut runs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        // The first round is for the machine's caches.
        for round in 0..=rounds {
            sidecar.warm(1).await;
            let before = cpu(sidecar.pid());
            let ran = sidecar.run(&prompt(pace, &format!("{}-{round}.txt", title.len()))).await;
            let own = cpu(sidecar.pid()) - before;
            // The next warm session starts meanwhile; it shall not be in the other side's way.
            sidecar.warm(1).await;

            // A process for each round, as the sidecar has: started, primed, and then this prompt.
            let theirs = directory();
            let direct = Direct::start(world, theirs.path()).await;
            // The sidecar's warm session has had time to come to rest.
            tokio::time::sleep(REST).await;
            let before = cpu(direct.pid());
            let alone = direct.run(&prompt(pace, "first.txt")).await;
            let opencode = cpu(direct.pid()) - before;
            // And once more in the same process, which has compiled by now what it runs often.
            let hot = direct.run(&prompt(pace, "second.txt")).await;
            direct.stop().await;
            if round > 0 {
                through.push(ran.total.as_secs_f64());
                straight.push(alone.total.as_secs_f64());
                again.push(hot.total.as_secs_f64());
                first.push(alone.first.as_secs_f64() * 1000.0);
                own_cpu.push(own);
                opencode_cpu.push(opencode);
                runs.push(ran);
            }
        }
        let rows = [
            Row::new("through the sidecar", through),
            Row::new("straight to a warm OpenCode", straight),
            Row::new("the same once more, in the same process", again),
        ];
        print(title, "s", Shown::Spread, &rows);
        let ratio = rows[0].median() / rows[1].median();
        match goal {
            Some(goal) => target("ratio of the medians", ratio, goal, ""),
            None => println!("ratio of the medians: {ratio:.3}"),
        }
        println!("to one that has done the same before: {:.3}", rows[0].median() / rows[2].median());
        let rows = [Row::new("the sidecar's own process", own_cpu), Row::new("OpenCode, straight", opencode_cpu)];
        print("CPU of one task", "s", Shown::Spread, &rows);
        break_down(title, &runs, first);
    }
    sidecar.stop().await;
}

fn between(from: DateTime<Utc>, to: DateTime<Utc>) -> Duration {
    (to - from).to_std().unwrap_or_default()
}

/// A stretch of a run, and how long it took.
type Phase = (&'static str, fn(&Ran) -> Duration);

/// Where the time of a run went, by the timestamps of its events.
fn break_down(title: &str, runs: &[Ran], straight: Vec<f64>) {
    let phases: [Phase; 6] = [
        ("submit → its first event", |ran| between(ran.submitted, ran.events[0].at)),
        ("first event → session", |ran| between(ran.events[0].at, session(ran).at)),
        ("session → agent's first event", |ran| between(session(ran).at, agent(ran).0)),
        ("agent at work", |ran| between(agent(ran).0, agent(ran).1)),
        ("agent's last event → complete", |ran| between(agent(ran).1, ran.events[ran.events.len() - 1].at)),
        ("complete → client", |ran| between(ran.events[ran.events.len() - 1].at, ran.completed)),
    ];
    let mut rows: Vec<_> = phases
        .iter()
        .map(|(name, phase)| Row::new(name, runs.iter().map(|ran| phase(ran).as_secs_f64() * 1000.0).collect()))
        .collect();
    rows.push(Row::new("(straight: prompt → agent's first event)", straight));
    print(&format!("where it goes ({title})"), "ms", Shown::Spread, &rows);
    let warm = runs.iter().filter(|ran| session(ran).data["warm"] == true).count();
    println!("{warm} of {} in a warm session, {} events in each", runs.len(), runs[0].events.len());
}

fn session(ran: &Ran) -> &Seen {
    ran.events.iter().find(|event| event.data["code"] == "session_started").unwrap()
}

/// The agent's own first and last event.
fn agent(ran: &Ran) -> (DateTime<Utc>, DateTime<Utc>) {
    let is_agents =
        |event: &&Seen| matches!(event.kind.as_str(), "message" | "reasoning" | "tool_call" | "tool_result");
    let mut events = ran.events.iter().filter(is_agents);
    let first = events.next().unwrap().at;
    (first, events.next_back().map_or(first, |event| event.at))
}
