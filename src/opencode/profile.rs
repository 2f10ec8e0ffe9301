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

/// OpenCode's tools, as of 1.18.33. What a task does not enable is denied by name.
pub const TOOLS: &[&str] = &[
    "bash",
    "edit",
    "glob",
    "grep",
    "list",
    "patch",
    "question",
    "read",
    "skill",
    "task",
    "todoread",
    "todowrite",
    "webfetch",
    "websearch",
    "write",
];

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
    let name = format!("{PROVIDER_ID}/{}", model.model);
    let mut models = Map::new();
    models.insert(
        model.model.clone(),
        json!({
            "name": model.model,
            "temperature": true,
            "tool_call": true,
            "limit": { "context": 128_000, "output": model.max_tokens.unwrap_or(8192) },
        }),
    );
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
                "headerTimeout": later(endpoints.header_timeout),
                "chunkTimeout": later(endpoints.idle_timeout),
            },
            "models": models,
        }),
    );
    let mut agents = json!({ "title": { "disable": true } });
    if let Some(temperature) = model.temperature {
        for agent in ["build", "plan", "general", "explore"] {
            agents[agent] = json!({ "temperature": temperature });
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

/// No rule asks: nobody could answer (OPENCODE.md: an ask waits for ever). The agent's own questions are denied for
/// the same reason.
fn permissions(enabled: Option<&[String]>) -> Value {
    let mut rules = Map::new();
    rules.insert("*".to_owned(), json!("allow"));
    if let Some(enabled) = enabled {
        for tool in TOOLS {
            if !enabled.iter().any(|name| name == tool) {
                rules.insert((*tool).to_owned(), json!("deny"));
            }
        }
    }
    for name in ["external_directory", "doom_loop", "question"] {
        rules.insert(name.to_owned(), json!("deny"));
    }
    Value::Object(rules)
}

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

    /// Makes them, with the shell tap, and with what keeps OpenCode from running `npm install` at its first start
    /// (OPENCODE.md "Network at boot").
    ///
    /// # Errors
    /// What the file system said.
    pub fn create(&self, sidecar: &Path) -> std::io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for name in ["home", "data", "config/opencode/node_modules", "cache", "state", "tmp", "bin"] {
            builder.create(self.root.join(name))?;
        }
        std::fs::write(
            self.root.join("config/opencode/package-lock.json"),
            r#"{"packages":{"":{"dependencies":{"@opencode-ai/plugin":"*"}}}}"#,
        )?;
        std::os::unix::fs::symlink(sidecar, self.shell())
    }
}

/// The whole environment of the process: nothing of the sidecar's own is handed down but `PATH`, language and zone.
pub fn environment(
    dirs: &Directories,
    config: &Value,
    password: &str,
    shell_url: &str,
    token: &str,
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
    set("OPENCODE_SERVER_PASSWORD", password.into());
    set("OPENCODE_CONFIG_CONTENT", config.to_string().into());
    set("OPENCODE_CLIENT", "opencode-sidecar".into());
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
        assert_eq!(config["permission"]["*"], "allow");
        assert_eq!(config["permission"]["external_directory"], "deny");
        assert_eq!(config["permission"]["question"], "deny");
        assert!(!config["permission"].to_string().contains("ask\""));
    }

    #[test]
    fn what_is_not_enabled_is_denied() {
        let config = config(&profile(Some(vec!["read".into(), "grep".into()])), &endpoints(Path::new("/b")));
        for tool in TOOLS {
            let rule = &config["permission"][tool];
            let enabled = ["read", "grep"].contains(tool);
            assert_eq!(rule.as_str(), if enabled { None } else { Some("deny") }, "{tool}");
        }
    }

    #[test]
    fn the_environment_is_made_and_not_inherited() {
        let dirs = Directories::new("/state/s1".into());
        let env =
            environment(&dirs, &json!({}), "pw", "http://b/shell", "tok", |name| Some(format!("host-{name}").into()));
        let names: Vec<_> = env.iter().map(|(n, _)| n.to_str().unwrap()).collect();
        for name in ["OPENCODE_API_KEY", "DATABASE_URL", "OPENCODE_SHARED_SECRET", "HTTP_PROXY"] {
            assert!(!names.contains(&name), "{name}");
        }
        let home = env.iter().find(|(n, _)| n == "HOME").unwrap();
        assert_eq!(home.1, "/state/s1/home");
    }
}
