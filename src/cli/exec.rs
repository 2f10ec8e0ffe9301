//! `exec`: submits a task to a running sidecar and follows it.

use super::ask::Signals;
use super::connect::{Connect, secret_file, secret_variable};
use super::exit::{Exit, Trouble};
use super::tell::{remark, say};
use super::values;
use super::watch::{AGAIN, Watching, watch};
use crate::client::{Client, ClientError};
use crate::model::{ExecutionId, TaskId};
use secrecy::SecretString;
use serde_json::{Map, Value, json};
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;
use tokio::time::Instant;
use uuid::Uuid;

/// The longest file or standard input that is read, in bytes. The sidecar takes less.
const MAX_TEXT: u64 = 16 * 1024 * 1024;
/// The variable with the key of `--provider`, unless another one is named.
const API_KEY: &str = "OPENCODE_API_KEY";

pub(super) const EXAMPLES: &str = "\
Examples:
  opencode-sidecar exec 'Write hello.sh, which prints the date, and run it.'
  git diff | opencode-sidecar exec --context-file notes.md -
  opencode-sidecar exec --json 'Fix the failing test.' | jq -r 'select(.type == \"stdout\").data'
  id=$(opencode-sidecar exec --detach --timeout 20m --workdir app 'Update the dependencies.')
  ANTHROPIC_API_KEY=… opencode-sidecar exec --provider anthropic --model <name> \\
      --api-key-env ANTHROPIC_API_KEY 'Explain this repository.'";

/// A task, and how to follow it.
#[derive(Debug, clap::Args)]
pub(super) struct Exec {
    /// What to do; `-`, or none where the standard input is a pipe or a file, reads it from there
    prompt: Option<String>,
    #[command(flatten)]
    watching: Watching,
    /// End as soon as the task is taken; print its execution id alone
    #[arg(long, conflicts_with = "json")]
    detach: bool,

    /// File with source or instructions that the task is about
    #[arg(long, value_name = "FILE", help_heading = "Task")]
    code: Option<PathBuf>,
    /// File with more for the model to know
    #[arg(long, value_name = "FILE", help_heading = "Task")]
    context_file: Option<PathBuf>,
    /// Added to the agent's system prompt
    #[arg(long, value_name = "TEXT", help_heading = "Task")]
    system_prompt: Option<String>,
    /// The OpenCode agent that takes it: build (default) or plan
    #[arg(long, value_name = "NAME", help_heading = "Task")]
    agent: Option<String>,
    /// Directory to work in, relative to the sidecar's workspace
    #[arg(long, value_name = "DIRECTORY", help_heading = "Task")]
    workdir: Option<String>,
    /// Your own id of the task, a UUID; without it one is made
    #[arg(long, value_name = "UUID", help_heading = "Task")]
    task_id: Option<Uuid>,
    /// Run in this session instead of one of its own
    #[arg(long, value_name = "UUID", help_heading = "Task")]
    session: Option<Uuid>,
    /// Your own JSON, kept with the execution
    #[arg(long, value_name = "JSON", value_parser = parse_json, help_heading = "Task")]
    metadata: Option<Value>,

    /// Longest run: seconds, or 15m, 2h
    #[arg(long, value_name = "TIME", value_parser = values::duration, help_heading = "Limits")]
    timeout: Option<Duration>,
    /// Most calls of the model
    #[arg(long, value_name = "NUMBER", help_heading = "Limits")]
    max_model_calls: Option<u64>,
    /// Most tokens, in and out, of all calls together
    #[arg(long, value_name = "NUMBER", help_heading = "Limits")]
    max_total_tokens: Option<u64>,
    /// Most bytes of shell output
    #[arg(long, value_name = "BYTES", help_heading = "Limits")]
    max_output_bytes: Option<u64>,

    /// The model's provider: openai, anthropic, local or custom; without it the sidecar's default model is used
    #[arg(long, value_name = "NAME", requires = "model", help_heading = "Model")]
    provider: Option<String>,
    /// The provider's name of the model
    #[arg(long, value_name = "NAME", requires = "provider", help_heading = "Model")]
    model: Option<String>,
    /// Base URL of the provider's API with its version; needed for local and custom
    #[arg(long, value_name = "URL", requires = "provider", help_heading = "Model")]
    api_endpoint: Option<String>,
    /// Variable with the provider's key [default: OPENCODE_API_KEY]
    #[arg(
        long,
        value_name = "VARIABLE",
        requires = "provider",
        conflicts_with = "api_key_file",
        help_heading = "Model"
    )]
    api_key_env: Option<String>,
    /// File with the provider's key
    #[arg(long, value_name = "FILE", requires = "provider", help_heading = "Model")]
    api_key_file: Option<PathBuf>,
    /// 0 to 2
    #[arg(long, value_name = "NUMBER", requires = "provider", help_heading = "Model")]
    temperature: Option<f64>,
    /// Longest answer of the model, in tokens
    #[arg(long, value_name = "NUMBER", requires = "provider", help_heading = "Model")]
    max_tokens: Option<u32>,
    /// Tools that the agent may use, with commas between them; without it all
    #[arg(long, value_name = "TOOLS", value_delimiter = ',', requires = "provider", help_heading = "Model")]
    tools: Vec<String>,

    #[command(flatten)]
    connect: Connect,
}

fn parse_json(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

fn read(what: &str, from: impl Read) -> Result<String, Trouble> {
    let mut bytes = Vec::new();
    let read = from.take(MAX_TEXT + 1).read_to_end(&mut bytes);
    read.map_err(|error| Trouble::Usage(format!("{what} cannot be read: {error}")))?;
    if bytes.len() as u64 > MAX_TEXT {
        return Err(Trouble::Usage(format!("{what} has more than {MAX_TEXT} bytes")));
    }
    String::from_utf8(bytes).map_err(|_| Trouble::Usage(format!("{what} is not text (UTF-8)")))
}

fn read_file(file: &Path) -> Result<String, Trouble> {
    let what = format!("the file {}", file.display());
    let open = std::fs::File::open(file).map_err(|error| Trouble::Usage(format!("{what} cannot be read: {error}")))?;
    read(&what, open)
}

impl Exec {
    /// What to do; `None` where a file with code says it.
    fn prompt(&self) -> Result<Option<String>, Trouble> {
        let input = std::io::stdin();
        let prompt = match self.prompt.as_deref() {
            Some("-") => read("the standard input", input)?,
            Some(prompt) => prompt.to_owned(),
            None if self.code.is_some() => return Ok(None),
            None if input.is_terminal() => {
                let text = "what is to be done? Give a prompt, or `-` and the prompt on the standard input";
                return Err(Trouble::Usage(text.to_owned()));
            }
            None => read("the standard input", input)?,
        };
        if prompt.trim().is_empty() {
            return Err(Trouble::Usage("the prompt is empty".to_owned()));
        }
        Ok(Some(prompt))
    }

    /// The body of the request, without a key.
    fn body(&self, task_id: TaskId) -> Result<Value, Trouble> {
        let file = |file: &Option<PathBuf>| file.as_deref().map(read_file).transpose();
        let limits = some([
            ("model_calls", json!(self.max_model_calls)),
            ("total_tokens", json!(self.max_total_tokens)),
            ("output_bytes", json!(self.max_output_bytes)),
        ]);
        let model = some([
            ("provider", json!(self.provider)),
            ("model", json!(self.model)),
            ("api_endpoint", json!(self.api_endpoint)),
            ("temperature", json!(self.temperature)),
            ("max_tokens", json!(self.max_tokens)),
            ("enabled_tools", json!((!self.tools.is_empty()).then_some(&self.tools))),
        ]);
        let body = some([
            ("task_id", json!(task_id)),
            ("prompt", json!(self.prompt()?)),
            ("code", json!(file(&self.code)?)),
            ("context", json!(file(&self.context_file)?)),
            ("system_prompt", json!(self.system_prompt)),
            ("agent", json!(self.agent)),
            ("workdir", json!(self.workdir)),
            ("session_id", json!(self.session)),
            ("metadata", json!(self.metadata)),
            ("timeout_seconds", json!(self.timeout.map(|timeout| timeout.as_secs()))),
            ("limits", json!((!limits.is_empty()).then_some(limits))),
            ("model_config", json!((!model.is_empty()).then_some(model))),
        ]);
        Ok(Value::Object(body))
    }

    /// The key for the model that is named.
    fn api_key(&self) -> Result<Option<SecretString>, Trouble> {
        if self.provider.is_none() {
            return Ok(None);
        }
        match (&self.api_key_file, &self.api_key_env) {
            (Some(file), _) => secret_file(file).map(Some),
            (None, None) => secret_variable(API_KEY),
            (None, Some(name)) => match secret_variable(name)? {
                Some(key) => Ok(Some(key)),
                None => Err(Trouble::Usage(format!("the variable {name} (--api-key-env) is not set"))),
            },
        }
    }

    /// Does what was asked for.
    pub(super) async fn run(self) -> Result<Exit, Trouble> {
        let client = self.connect.client()?;
        let task_id = TaskId(self.task_id.unwrap_or_else(Uuid::now_v7));
        let (body, key) = (self.body(task_id)?, self.api_key()?);
        if self.detach {
            let id = submit(&client, body, key.as_ref(), task_id, self.watching.reconnect_for).await?;
            writeln!(std::io::stdout(), "{id}")?;
            return Ok(Exit::Done);
        }
        let mut signals = Signals::new()?;
        let mut asked = None;
        let mut submitting = pin!(submit(&client, body, key.as_ref(), task_id, self.watching.reconnect_for));
        let id = loop {
            tokio::select! {
                submitted = &mut submitting => break submitted?,
                signal = signals.next() => {
                    if asked.is_some() {
                        say(&not_known(task_id));
                        return Ok(Exit::Unreachable);
                    }
                    remark("The task is being submitted. Another signal gives up on the answer.");
                    asked = Some(signal);
                }
            }
        };
        remark(&format!("Execution {id}"));
        watch(&client, id, 0, &self.watching, signals, asked).await
    }
}

/// The members that are there.
fn some<const N: usize>(members: [(&str, Value); N]) -> Map<String, Value> {
    members.into_iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name.to_owned(), value)).collect()
}

fn not_known(task_id: TaskId) -> String {
    format!("it is not known whether the task was taken: `opencode-sidecar history --task-id {task_id}` tells")
}

/// Submits it. Where no answer comes it is submitted again, for `patience` and under the same key, so that it is taken once.
async fn submit(
    client: &Client,
    body: Value,
    key: Option<&SecretString>,
    task_id: TaskId,
    patience: Duration,
) -> Result<ExecutionId, Trouble> {
    let idempotency_key = Uuid::now_v7().to_string();
    let mut lost: Option<Instant> = None;
    loop {
        let error = match client.submit(body.clone(), key, &idempotency_key).await {
            Ok(accepted) => return Ok(accepted.execution_id),
            Err(error) => error,
        };
        // Once a try may have been taken, only an answer says whether it was.
        let in_doubt = match &error {
            ClientError::Unreachable(_) => lost.is_some() || !error.was_not_sent(),
            ClientError::Refused(refusal) => lost.is_some() && refusal.status >= 500,
            ClientError::Unexpected(_) => return Err(Trouble::Told(not_known(task_id), error)),
            _ => false,
        };
        if !in_doubt {
            return Err(error.into());
        }
        let since = *lost.get_or_insert_with(|| {
            remark(&format!("No answer ({error}). The task is submitted again, as the same one."));
            Instant::now()
        });
        if since.elapsed() >= patience {
            return Err(Trouble::Told(not_known(task_id), error));
        }
        tokio::time::sleep(AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        exec: Exec,
    }

    fn body(args: &[&str]) -> Value {
        let line = Line::try_parse_from([&["exec"], args].concat()).unwrap();
        line.exec.body(TaskId(Uuid::nil())).unwrap()
    }

    #[test]
    fn only_what_was_given_is_sent() {
        let nil = Uuid::nil();
        assert_eq!(body(&["do it"]), json!({ "task_id": nil, "prompt": "do it" }));
        let id = "01a1fbdc-a3e3-7549-9b4c-044938b8d484";
        let all = body(&[
            "do it",
            "--system-prompt",
            "s",
            "--agent",
            "plan",
            "--workdir",
            "w",
            "--session",
            id,
            "--timeout",
            "2m",
            "--metadata",
            "{\"a\":[1]}",
            "--max-model-calls",
            "3",
            "--max-total-tokens",
            "4",
            "--max-output-bytes",
            "5",
            "--provider",
            "custom",
            "--model",
            "m",
            "--api-endpoint",
            "http://e/v1",
            "--temperature",
            "0.5",
            "--max-tokens",
            "6",
            "--tools",
            "terminal,read",
        ]);
        let want = json!({
            "task_id": nil, "prompt": "do it", "system_prompt": "s", "agent": "plan", "workdir": "w",
            "session_id": id, "timeout_seconds": 120, "metadata": {"a": [1]},
            "limits": {"model_calls": 3, "total_tokens": 4, "output_bytes": 5},
            "model_config": {"provider": "custom", "model": "m", "api_endpoint": "http://e/v1", "temperature": 0.5,
                "max_tokens": 6, "enabled_tools": ["terminal", "read"]},
        });
        assert_eq!(all, want);
        // The server's own reader of requests knows all of it.
        serde_json::from_value::<crate::model::request::TaskRequest>(all).unwrap();
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for args in [
            &["x", "--model", "m"] as &[&str],
            &["x", "--tools", "read"],
            &["x", "--detach", "--json"],
            &["x", "--metadata", "{"],
            &["x", "--timeout", "soon"],
            &["x", "--task-id", "7"],
            &["x", "--api-key-env", "A", "--api-key-file", "b", "--provider", "openai", "--model", "m"],
        ] {
            assert!(Line::try_parse_from([&["exec"], args].concat()).is_err(), "{args:?}");
        }
        let line = Line::try_parse_from(["exec", " \n"]).unwrap();
        assert!(line.exec.body(TaskId(Uuid::nil())).is_err());
    }
}
