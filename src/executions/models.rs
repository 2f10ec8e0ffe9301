//! `model_config`: which model a task runs on, with which key, at which temperature, with which tools.
//!
//! What a provider would get otherwise than it was asked for is refused here, by the field's name.

use super::admit::{FieldError, name, non_empty, refuse};
use crate::model::destination::{Destinations, Target};
use crate::model::request::ModelConfig;
use crate::model::task::{ModelChoice, Provider};
use crate::opencode::profile::{MAX_OUTPUT, TOOLS, WRITING};
use crate::secrets::Keyring;
use secrecy::{ExposeSecret, SecretString};

/// The longest key, in bytes.
const MAX_KEY: usize = 4096;

/// Checks a model and its key.
///
/// # Errors
/// The first field that cannot be taken.
pub(super) fn choose(
    config: ModelConfig,
    endpoints: &Destinations,
    keyring: Option<&Keyring>,
) -> Result<(ModelChoice, SecretString), FieldError> {
    let Some(provider) = Provider::parse(&config.provider) else {
        return refuse("model_config.provider", "must be one of openai, anthropic, local, custom");
    };
    model_name("model_config.model", &config.model)?;
    let version = non_empty(config.model_version);
    if let Some(version) = &version {
        model_name("model_config.model_version", version)?;
    }
    let endpoint = match (non_empty(config.api_endpoint), provider.default_endpoint()) {
        (Some(endpoint), _) => check_endpoint(&endpoint, "model_config.api_endpoint", endpoints)?,
        // What is wrong with it is who was asked for.
        (None, Some(default)) => check_endpoint(default, "model_config.provider", endpoints)?,
        (None, None) => {
            return refuse("model_config.api_endpoint", "is required for the providers local and custom");
        }
    };
    let hottest = provider.max_temperature();
    if let Some(temperature) = config.temperature
        && !(0.0..=hottest).contains(&temperature)
    {
        let of = if provider == Provider::Anthropic { " for the provider anthropic" } else { "" };
        return refuse("model_config.temperature", format!("must be between 0 and {hottest}{of}"));
    }
    if let Some(tokens) = config.max_tokens
        && !(1..=MAX_OUTPUT).contains(&tokens)
    {
        return refuse("model_config.max_tokens", format!("must be between 1 and {MAX_OUTPUT}"));
    }
    let api_key = key(provider, config.api_key, config.api_key_encrypted, keyring)?;
    let choice = ModelChoice {
        provider,
        model: config.model,
        version,
        endpoint,
        temperature: config.temperature,
        max_tokens: config.max_tokens,
        enabled_tools: tools(config.enabled_tools)?,
    };
    Ok((choice, api_key))
}

fn model_name(field: &str, value: &str) -> Result<(), FieldError> {
    if value.trim().is_empty() {
        return refuse(field, "must not be empty");
    }
    // OpenCode puts the content of a variable or a file in the place of `{env:…}` and `{file:…}` in its configuration.
    if value.contains(['{', '}']) {
        return refuse(field, "may not contain braces");
    }
    name(field, value)
}

/// The key in clear, from whichever of the two fields has one.
fn key(
    provider: Provider,
    plain: Option<SecretString>,
    sealed: Option<SecretString>,
    keyring: Option<&Keyring>,
) -> Result<SecretString, FieldError> {
    let given = |key: &SecretString| !key.expose_secret().is_empty();
    let (plain, sealed) = (plain.filter(given), sealed.filter(given));
    let field = if sealed.is_some() { "model_config.api_key_encrypted" } else { "model_config.api_key" };
    let key = match (plain, sealed) {
        (Some(_), Some(_)) => return refuse(field, "cannot be given together with api_key"),
        (plain, None) => plain.unwrap_or_default(),
        (None, Some(sealed)) => match keyring {
            None => return refuse(field, "cannot be opened: this sidecar has no ENCRYPTION_KEY"),
            Some(keyring) => match keyring.open(&sealed) {
                Ok(key) => key,
                Err(error) => return refuse(field, error.to_string()),
            },
        },
    };
    let of = if field.ends_with("encrypted") { "the key in it " } else { "" };
    let text = key.expose_secret();
    if text.is_empty() && matches!(provider, Provider::Openai | Provider::Anthropic) {
        return refuse(field, format!("{of}is required for the providers openai and anthropic"));
    }
    if text.len() > MAX_KEY || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return refuse(field, format!("{of}must be at most {MAX_KEY} visible ASCII characters"));
    }
    Ok(key)
}

/// Only what can be told without a look at the addresses of a name: the broker has that, at each connection.
fn check_endpoint(endpoint: &str, field: &str, allowed: &Destinations) -> Result<String, FieldError> {
    let Ok(url) = url::Url::parse(endpoint) else { return refuse(field, "must be an absolute URL") };
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return refuse(field, "must be an http or https URL");
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return refuse(field, "may not carry credentials, a query or a fragment");
    }
    if Target::of_url(&url).and_then(|target| allowed.reach(&target)).is_none() {
        return refuse(field, "is not allowed: its host and port are not among those of MODEL_ENDPOINT_ALLOW");
    }
    Ok(endpoint.trim_end_matches('/').to_owned())
}

/// The backend's words stand for several tools of OpenCode each; OpenCode's own names are understood too.
fn tools(asked: Option<Vec<String>>) -> Result<Option<Vec<String>>, FieldError> {
    let Some(asked) = asked.filter(|tools| !tools.is_empty()) else { return Ok(None) };
    let mut enabled: Vec<String> = Vec::new();
    for (i, word) in asked.iter().enumerate() {
        let own = [word.as_str()];
        let stands_for = match word.as_str() {
            "file_ops" => &["read", "write", "edit", "patch", "glob", "grep", "list"][..],
            "terminal" | "code_exec" => &["bash"],
            "web_search" => &["webfetch", "websearch"],
            // One right in OpenCode: who may do one of them may do all.
            own if WRITING.contains(&own) => WRITING,
            known if TOOLS.contains(&known) => &own,
            _ => return refuse(&format!("model_config.enabled_tools[{i}]"), "is no tool that is known here"),
        };
        for tool in stands_for {
            if !enabled.iter().any(|e| e == tool) {
                enabled.push((*tool).to_owned());
            }
        }
    }
    Ok(Some(enabled))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::destination::Ports;
    use crate::secrets::SealingKey;
    use serde_json::{Value, json};

    /// The bytes 0 to 31. The rest was sealed with other implementations; see `tests/vectors`.
    const KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    const SEALED: &str = "AAECAwQFBgcICQoLNGn7aKCErn7pbOLl1YwKQPe+4hmTDi0OXQmRqHYMeYwGH6Bo76jk1W4kSnMpmY4=";
    /// Of nothing.
    const SEALED_EMPTY: &str = "JCUmJygpKissLS4vGbZHQ5gjtDJ9T6hNDNsSEA==";
    /// Of `two lines`, a line end, and more.
    const SEALED_LINES: &str = "PD0+P0BBQkNERUZHA6lW0Jgmu9LfqA5CSmoRTtd52yZO9Ix0f+0x8BvXfbTclw==";
    /// Of two bytes that are no UTF-8.
    const SEALED_BYTES: &str = "MDEyMzQ1Njc4OTo7TMsGMJrksrMajYil0LiWdYIP";

    fn keyring() -> Keyring {
        Keyring { current: SealingKey::parse(KEY).unwrap(), previous: None }
    }

    fn chosen(changes: &Value, keyring: Option<&Keyring>) -> Result<(ModelChoice, SecretString), FieldError> {
        let mut config = json!({"provider": "custom", "model": "m", "api_endpoint": "http://127.0.0.1:1/v1//"});
        for (name, value) in changes.as_object().unwrap() {
            config[name] = value.clone();
        }
        let endpoints = "127.0.0.1:1,api.openai.com:443,api.anthropic.com:443,x,*.models.example:443";
        let endpoints = Destinations::parse(endpoints, Ports::Optional).unwrap();
        choose(serde_json::from_value(config).unwrap(), &endpoints, keyring)
    }

    #[test]
    fn defaults() {
        let (model, key) = chosen(&json!({}), None).unwrap();
        assert_eq!(model.endpoint, "http://127.0.0.1:1/v1");
        assert_eq!((model.version, model.temperature, model.max_tokens, model.enabled_tools), (None, None, None, None));
        assert_eq!(key.expose_secret(), "");
        let public = json!({"provider": "anthropic", "api_endpoint": "", "api_key": "k"});
        assert_eq!(chosen(&public, None).unwrap().0.endpoint, "https://api.anthropic.com/v1");
    }

    #[test]
    fn every_bad_field_is_named() {
        let long = "x".repeat(1025);
        let cases = [
            ("provider", json!({"provider": "acme"})),
            ("model", json!({"model": " "})),
            ("model", json!({"model": "a\u{202e}b"})),
            ("model", json!({"model": "m-{env:HOME}"})),
            ("model_version", json!({"model_version": "{file:/etc/passwd}"})),
            ("model_version", json!({"model_version": " "})),
            ("model_version", json!({"model_version": "a\nb"})),
            ("model_version", json!({"model_version": long})),
            ("api_endpoint", json!({"api_endpoint": "ftp://x"})),
            ("api_endpoint", json!({"api_endpoint": "http://u:p@x/"})),
            ("api_endpoint", json!({"api_endpoint": "http://x/v1?key=1"})),
            ("api_endpoint", json!({"api_endpoint": null})),
            ("api_endpoint", json!({"api_endpoint": "http://127.0.0.1:2/v1"})),
            ("api_endpoint", json!({"api_endpoint": "http://169.254.169.254/latest"})),
            ("api_endpoint", json!({"api_endpoint": "http://[::ffff:127.0.0.1]:1/v1"})),
            ("api_endpoint", json!({"api_endpoint": "http://localhost:1/v1"})),
            ("api_endpoint", json!({"api_endpoint": "https://models.example/v1"})),
            ("api_endpoint", json!({"api_endpoint": "http://a.models.example/v1"})),
            ("api_endpoint", json!({"provider": "openai", "api_key": "k", "api_endpoint": "http://api.openai.com/v1"})),
            ("temperature", json!({"temperature": 2.1})),
            ("temperature", json!({"temperature": -0.1})),
            ("temperature", json!({"provider": "anthropic", "api_key": "k", "temperature": 1.1})),
            ("max_tokens", json!({"max_tokens": 0})),
            ("max_tokens", json!({"max_tokens": 128_001})),
            ("api_key", json!({"provider": "openai"})),
            ("api_key", json!({"api_key": "a\nb"})),
            ("api_key", json!({"api_key": "x".repeat(4097)})),
            ("enabled_tools[1]", json!({"enabled_tools": ["bash", "x"]})),
            ("enabled_tools[0]", json!({"enabled_tools": ["*"]})),
            ("enabled_tools[0]", json!({"enabled_tools": [""]})),
        ];
        for (field, changes) in cases {
            let error = chosen(&changes, None).map(|(model, _)| model).unwrap_err();
            assert_eq!(error.field, format!("model_config.{field}"), "{changes}: {error}");
        }
        for endpoint in
            ["http://2130706433:1/v1", "https://a.models.example/v1", "https://A.Models.Example.:443", "http://x"]
        {
            assert!(chosen(&json!({"api_endpoint": endpoint}), None).is_ok(), "{endpoint}");
        }
        let none = Destinations::default();
        let openai = json!({"provider": "openai", "model": "m", "api_key": "k"});
        let error = choose(serde_json::from_value(openai).unwrap(), &none, None).map(|(model, _)| model).unwrap_err();
        assert_eq!(error.field, "model_config.provider", "its own endpoint is not allowed");
        for good in [json!({"temperature": 0}), json!({"temperature": 2}), json!({"max_tokens": 128_000})] {
            assert!(chosen(&good, None).is_ok(), "{good}");
        }
    }

    #[test]
    fn an_encrypted_key_is_opened() {
        let (_, key) = chosen(&json!({"api_key_encrypted": SEALED, "api_key": ""}), Some(&keyring())).unwrap();
        assert_eq!(key.expose_secret(), "sk-sealed-under-the-current-key");
        assert_eq!(
            chosen(&json!({"api_key_encrypted": SEALED_EMPTY}), Some(&keyring())).unwrap().1.expose_secret(),
            ""
        );
        assert_eq!(chosen(&json!({"api_key_encrypted": ""}), None).unwrap().1.expose_secret(), "");

        let refused = |changes: Value, keyring: Option<&Keyring>| {
            let error = chosen(&changes, keyring).map(|(model, _)| model).unwrap_err();
            assert_eq!(error.field, "model_config.api_key_encrypted", "{changes}");
            error.reason
        };
        assert!(refused(json!({"api_key_encrypted": SEALED}), None).contains("ENCRYPTION_KEY"));
        let with = |sealed: &str| refused(json!({"api_key_encrypted": sealed}), Some(&keyring()));
        assert_eq!(with("not base64"), "must be base64");
        assert!(with("AAEC").starts_with("is too short"));
        let tampered = SEALED.replace("NGn7", "NGn8");
        assert!(with(&tampered).starts_with("cannot be opened with the configured keys"));
        assert_eq!(with(SEALED_BYTES), "holds no text");
        assert!(with(SEALED_LINES).starts_with("the key in it must be"));
        let openai = json!({"provider": "openai", "api_key_encrypted": SEALED_EMPTY});
        assert!(refused(openai, Some(&keyring())).starts_with("the key in it is required"));
        let both = json!({"api_key": "sk-plain", "api_key_encrypted": SEALED});
        assert!(refused(both, Some(&keyring())).contains("together"));
    }

    #[test]
    fn the_version_pins_the_name() {
        let name_of = |version: Value| {
            chosen(&json!({"model": "claude-x", "model_version": version}), None).unwrap().0.name().into_owned()
        };
        assert_eq!(name_of(json!(null)), "claude-x");
        assert_eq!(name_of(json!("")), "claude-x");
        assert_eq!(name_of(json!("20300101")), "claude-x-20300101");
        assert_eq!(name_of(json!("claude-x-20300101")), "claude-x-20300101");
        assert_eq!(name_of(json!("claude-x")), "claude-x");
    }

    #[test]
    fn the_backends_words_for_tools() {
        let tools_of = |words: Value| chosen(&json!({ "enabled_tools": words }), None).unwrap().0.enabled_tools;
        assert_eq!(tools_of(json!(null)), None);
        assert_eq!(tools_of(json!([])), None);
        assert_eq!(tools_of(json!(["terminal", "code_exec", "bash"])), Some(vec!["bash".to_owned()]));
        assert_eq!(tools_of(json!(["web_search", "todowrite"])).unwrap(), ["webfetch", "websearch", "todowrite"]);
        assert_eq!(tools_of(json!(["file_ops"])).unwrap().len(), 7);
        for one in ["write", "edit", "patch", "apply_patch"] {
            assert_eq!(tools_of(json!([one])).unwrap(), WRITING, "{one}");
        }
    }
}
