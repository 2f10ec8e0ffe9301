//! What one OpenCode process is configured with: its configuration document and its environment.
//!
//! Nothing here is secret outside the session: the only credential is the broker's token for this session. The
//! provider's key never gets here (the type that holds it is not even known to this module).

use crate::model::task::{ModelChoice, Provider};
use serde_json::{Map, Value, json};
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

/// The provider's name inside OpenCode. Not a built-in one: those bring SDKs and endpoints of their own.
pub const PROVIDER_ID: &str = "sidecar";

/// The tools that a task may name, as of OpenCode 1.18.33. `list` and `patch` are older names that callers know:
/// there is no tool `list` any more, and `apply_patch` is what `patch` has become.
pub const TOOLS: &[&str] = &[
    "apply_patch",
    "bash",
    "edit",
    "glob",
    "grep",
    "list",
    "patch",
    "read",
    "skill",
    "task",
    "todowrite",
    "webfetch",
    "websearch",
    "write",
];

/// The tools that change files. OpenCode asks one and the same permission for all of them, `edit`, and gives some models
/// `apply_patch` in place of the other two.
pub const WRITING: &[&str] = &["write", "edit", "patch", "apply_patch"];

/// The most tokens that an answer may be limited to. OpenCode would cut off at 32,000 by itself.
pub const MAX_OUTPUT: u32 = 128_000;
/// The limit of an answer, in tokens, where the task has none.
const DEFAULT_OUTPUT: u32 = 8192;
/// The window that a model is taken to have, in tokens, and what of it is left for the conversation at least. OpenCode
/// shortens the conversation when it is longer than the window without the answer.
const CONTEXT: u32 = 128_000;
const LEAST_INPUT: u32 = 64_000;

/// Every agent of OpenCode's that calls the model; `title` is off.
const AGENTS: &[&str] = &["build", "plan", "general", "explore", "compaction", "summary"];

/// Everything that a process is started with and that cannot change while it lives.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    pub model: ModelChoice,
}

/// Where the process finds what it may talk to.
#[derive(Clone, Copy, Debug)]
pub struct Endpoints<'a> {
    /// The broker's base URL for this session's model calls.
    pub model_url: &'a str,
    /// The session's token at the broker.
    pub token: &'a str,
    /// The file named `bash` that OpenCode runs its shell commands with.
    pub shell: &'a Path,
    /// How long the broker may take at most before the first byte of an answer, and between two.
    pub header_timeout: Duration,
    pub idle_timeout: Duration,
}

/// OpenCode's configuration (`OPENCODE_CONFIG_CONTENT`).
pub fn config(profile: &Profile, endpoints: &Endpoints<'_>) -> Value {
    let model = &profile.model;
    let npm = match model.provider {
        Provider::Anthropic => "@ai-sdk/anthropic",
        Provider::Openai | Provider::Local | Provider::Custom => "@ai-sdk/openai-compatible",
    };
    // The broker's clocks are the ones that count, since it says what happened; OpenCode's come after them.
    let later = |timeout: Duration| u64::try_from((timeout + Duration::from_secs(15)).as_millis()).unwrap_or(u64::MAX);
    let name = model.name();
    let output = model.max_tokens.unwrap_or(DEFAULT_OUTPUT);
    let mut models = Map::new();
    models.insert(
        name.clone().into_owned(),
        json!({
            "name": name,
            "temperature": true,
            "tool_call": true,
            "limit": { "context": CONTEXT.max(output + LEAST_INPUT), "output": output },
        }),
    );
    let name = format!("{PROVIDER_ID}/{name}");
    let mut providers = Map::new();
    providers.insert(
        PROVIDER_ID.to_owned(),
        json!({
            "npm": npm,
            "name": "opencode-sidecar",
            "options": {
                "baseURL": endpoints.model_url,
                "apiKey": endpoints.token,
                "timeout": 3_600_000,
                // The broker's headers come with the first event.
                "headerTimeout": later(endpoints.header_timeout + endpoints.idle_timeout),
                "chunkTimeout": later(endpoints.idle_timeout),
            },
            "models": models,
        }),
    );
    let mut agents = json!({ "title": { "disable": true } });
    if let Some(temperature) = model.temperature {
        for agent in AGENTS {
            agents[agent]["temperature"] = json!(temperature);
        }
    }
    if let Some(enabled) = &model.enabled_tools {
        for (agent, permissions) in own_denials(enabled) {
            agents[agent]["permission"] = permissions;
        }
    }
    json!({
        "model": name,
        "small_model": name,
        "enabled_providers": [PROVIDER_ID],
        "share": "disabled",
        "autoupdate": false,
        "shell": endpoints.shell,
        "provider": providers,
        "agent": agents,
        "permission": permissions(model.enabled_tools.as_deref()),
    })
}

/// What holds for all agents. The last rule that fits decides, and these come after each agent's own. So nothing is
/// allowed here that an agent denies itself, unless a list of tools forces it; see [`own_denials`].
///
/// No rule asks: nobody could answer (OPENCODE.md: an ask waits for ever). The agent's own questions are denied for
/// the same reason, and `read` is allowed because OpenCode asks before it reads a `.env`.
fn permissions(enabled: Option<&[String]>) -> Value {
    // Sorted by name, so `*` is the first rule.
    let mut rules = Map::new();
    match enabled {
        None => {
            rules.insert("read".to_owned(), json!("allow"));
        }
        Some(enabled) => {
            rules.insert("*".to_owned(), json!("deny"));
            for tool in enabled {
                let permission = if WRITING.contains(&tool.as_str()) { "edit" } else { tool };
                rules.insert(permission.to_owned(), json!("allow"));
            }
        }
    }
    for name in ["external_directory", "doom_loop", "question"] {
        rules.insert(name.to_owned(), json!("deny"));
    }
    Value::Object(rules)
}

/// What OpenCode's agents deny by themselves, again: a list of tools overrules that.
fn own_denials(enabled: &[String]) -> [(&'static str, Value); 3] {
    let mut plan = json!({ "edit": "deny" });
    // A tool whose last rule is about a part of it is offered, even where all the rest is denied.
    if enabled.iter().any(|tool| tool == "task") {
        plan["task"] = json!({ "general": "deny" });
    }
    [
        ("plan", plan),
        ("general", json!({ "todowrite": "deny" })),
        ("explore", json!({ "edit": "deny", "skill": "deny", "task": "deny", "todowrite": "deny" })),
    ]
}

/// What git is configured with, for a workspace that several users of one group work in: it takes repositories that another
/// one has made, and makes its own so that others can commit to them. In a file of the user's, since what git starts
/// itself (`upload-pack` of a clone, for one) does not get a configuration from the environment.
const GIT: &str = "[safe]\n\tdirectory = *\n[core]\n\tsharedRepository = group\n";

/// The directories of one session, all below one that is its own.
#[derive(Clone, Debug)]
pub struct Directories {
    root: std::path::PathBuf,
}

impl Directories {
    /// The session's directories below `root`; nothing is made yet.
    pub fn new(root: std::path::PathBuf) -> Self {
        Self { root }
    }

    /// The session's own directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A directory or file below it.
    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.root.join(name)
    }

    /// The shell that OpenCode is told to use.
    pub fn shell(&self) -> std::path::PathBuf {
        self.root.join("bin/bash")
    }

    /// Makes them, with the shell tap, with what keeps OpenCode from running `npm install` at its first start
    /// (OPENCODE.md "Network at boot"), and with [`GIT`].
    ///
    /// # Errors
    /// What the file system said.
    pub fn create(&self, sidecar: &Path) -> std::io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for name in ["home", "data", "config/opencode/node_modules", "config/git", "cache", "state", "tmp", "bin"] {
            builder.create(self.root.join(name))?;
        }
        std::fs::write(self.root.join("config/git/config"), GIT)?;
        std::fs::write(
            self.root.join("config/opencode/package-lock.json"),
            r#"{"packages":{"":{"dependencies":{"@opencode-ai/plugin":"*"}}}}"#,
        )?;
        std::os::unix::fs::symlink(sidecar, self.shell())
    }
}

/// What is in the environment of everything that a session runs, without a secret: nothing of the sidecar's own is handed
/// down but `PATH`, language and zone.
pub fn common_environment(
    dirs: &Directories,
    inherited: impl Fn(&str) -> Option<OsString>,
) -> Vec<(OsString, OsString)> {
    let mut env: Vec<(OsString, OsString)> = Vec::new();
    let mut set = |name: &str, value: OsString| env.push((name.into(), value));
    set("PATH", inherited("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into()));
    for name in ["LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR"] {
        if let Some(value) = inherited(name) {
            set(name, value);
        }
    }
    set("HOME", dirs.path("home").into());
    set("TMPDIR", dirs.path("tmp").into());
    for (name, dir) in [("DATA", "data"), ("CONFIG", "config"), ("CACHE", "cache"), ("STATE", "state")] {
        set(&format!("XDG_{name}_HOME"), dirs.path(dir).into());
    }
    env
}

/// The whole environment of the process: what is common, and what makes it this session's OpenCode.
pub fn environment(
    dirs: &Directories,
    config: &Value,
    password: &str,
    shell_url: &str,
    token: &str,
    inherited: impl Fn(&str) -> Option<OsString>,
) -> Vec<(OsString, OsString)> {
    let mut env = common_environment(dirs, inherited);
    let mut set = |name: &str, value: OsString| env.push((name.into(), value));
    set("OPENCODE_SERVER_PASSWORD", password.into());
    set("OPENCODE_CONFIG_CONTENT", config.to_string().into());
    set("OPENCODE_CLIENT", "opencode-sidecar".into());
    set("OPENCODE_EXPERIMENTAL_OUTPUT_TOKEN_MAX", MAX_OUTPUT.to_string().into());
    for what in [
        "AUTOUPDATE",
        "MODELS_FETCH",
        "LSP_DOWNLOAD",
        "DEFAULT_PLUGINS",
        "SHARE",
        "PROJECT_CONFIG",
        "EXTERNAL_SKILLS",
        "CLAUDE_CODE",
    ] {
        set(&format!("OPENCODE_DISABLE_{what}"), "1".into());
    }
    set("OPENCODE_EXPERIMENTAL_DISABLE_FILEWATCHER", "1".into());
    // Bun sizes its heap by this; 600 to 850 MB otherwise (OPENCODE.md "Start").
    set("BUN_JSC_forceRAMSize", "268435456".into());
    set("OPENCODE_SIDECAR_TAP", shell_url.into());
    set("OPENCODE_SIDECAR_TOKEN", token.into());
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(tools: Option<Vec<String>>) -> Profile {
        Profile {
            model: ModelChoice {
                provider: Provider::Custom,
                model: "m".into(),
                version: None,
                endpoint: "https://x.example/v1".into(),
                temperature: Some(0.25),
                max_tokens: Some(321),
                enabled_tools: tools,
            },
        }
    }

    fn endpoints(shell: &Path) -> Endpoints<'_> {
        let second = Duration::from_secs(1);
        Endpoints { model_url: "http://b/v1", token: "tok", shell, header_timeout: second, idle_timeout: second }
    }

    #[test]
    fn the_configuration_names_the_broker_and_not_the_provider() {
        let config = config(&profile(None), &endpoints(Path::new("/s/bin/bash")));
        assert!(!config.to_string().contains("x.example"), "{config}");
        assert_eq!(config["provider"]["sidecar"]["options"]["baseURL"], "http://b/v1");
        assert_eq!(config["provider"]["sidecar"]["models"]["m"]["limit"]["output"], 321);
        assert_eq!(config["agent"]["build"]["temperature"], 0.25);
        let denied = json!({"read": "allow", "external_directory": "deny", "doom_loop": "deny", "question": "deny"});
        assert_eq!(config["permission"], denied, "no agent's own denial is overruled");
        assert_eq!(config["agent"]["plan"], json!({"temperature": 0.25}));
    }

    #[test]
    fn the_longest_answer_leaves_room_for_the_conversation() {
        let mut profile = profile(None);
        for (asked, output, context) in
            [(None, 8192, 128_000), (Some(64_000), 64_000, 128_000), (Some(MAX_OUTPUT), MAX_OUTPUT, 192_000)]
        {
            profile.model.max_tokens = asked;
            let config = config(&profile, &endpoints(Path::new("/b")));
            let limit = &config["provider"]["sidecar"]["models"]["m"]["limit"];
            assert_eq!(*limit, json!({ "context": context, "output": output }));
        }
    }

    #[test]
    fn a_pinned_version_is_what_is_called() {
        let mut profile = profile(None);
        profile.model.version = Some("m-2030".into());
        let config = config(&profile, &endpoints(Path::new("/b")));
        assert_eq!((&config["model"], &config["small_model"]), (&json!("sidecar/m-2030"), &json!("sidecar/m-2030")));
        assert!(config["provider"]["sidecar"]["models"]["m-2030"].is_object());
    }

    #[test]
    fn what_is_not_enabled_is_denied() {
        let rules = |tools: &[&str]| {
            let tools = tools.iter().map(|tool| (*tool).to_owned()).collect();
            config(&profile(Some(tools)), &endpoints(Path::new("/b")))
        };
        let config = rules(&["read", "grep"]);
        // OpenCode takes them in this order, and the last that fits decides.
        let permission = r#"{"*":"deny","doom_loop":"deny","external_directory":"deny","grep":"allow","question":"deny","read":"allow"}"#;
        assert_eq!(config["permission"].to_string(), permission);
        let config = rules(WRITING);
        assert_eq!(config["permission"]["edit"], "allow");
        assert_eq!(config["agent"]["plan"]["permission"], json!({ "edit": "deny" }));
        assert_eq!(config["agent"]["explore"]["permission"]["edit"], "deny");
        assert!(config["agent"]["build"]["permission"].is_null());
        let plan = &rules(&["task"])["agent"]["plan"]["permission"];
        assert_eq!(*plan, json!({ "edit": "deny", "task": { "general": "deny" } }));
    }

    #[test]
    fn the_environment_is_made_and_not_inherited() {
        let dirs = Directories::new("/state/s1".into());
        let inherited = |name: &str| Some(format!("host-{name}").into());
        let common = common_environment(&dirs, inherited);
        assert!(common.iter().all(|(name, _)| !name.to_string_lossy().starts_with("OPENCODE")), "{common:?}");
        let env = environment(&dirs, &json!({}), "pw", "http://b/shell", "tok", inherited);
        let names: Vec<_> = env.iter().map(|(n, _)| n.to_str().unwrap()).collect();
        for name in ["OPENCODE_API_KEY", "DATABASE_URL", "OPENCODE_SHARED_SECRET", "HTTP_PROXY"] {
            assert!(!names.contains(&name), "{name}");
        }
        let home = env.iter().find(|(n, _)| n == "HOME").unwrap();
        assert_eq!(home.1, "/state/s1/home");
    }
}
