use super::*;
use secrecy::ExposeSecret;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

fn read(set: &[(&str, &str)]) -> Result<Config, ConfigErrors> {
    let set: BTreeMap<_, _> = set.iter().copied().collect();
    Config::from_source(&|name| set.get(name).map(OsString::from))
}

/// The variables of each error.
fn bad(set: &[(&str, &str)]) -> Vec<Vec<&'static str>> {
    read(set).unwrap_err().0.into_iter().map(|error| error.variables).collect()
}

const MODEL: [(&str, &str); 3] =
    [("OPENCODE_PROVIDER", "openai"), ("OPENCODE_MODEL", "gpt-x"), ("OPENCODE_API_KEY", "sk-hidden")];

/// Of Ed25519 (RFC 8410, 10).
const PUBLIC_KEY: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----\n";
const PRIVATE_KEY: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n-----END PRIVATE KEY-----\n";

/// The base64 of 32 bytes.
const KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

#[test]
fn an_empty_environment_gives_the_contracts_defaults() {
    for config in [read(&[]), read(&[("PORT", ""), ("OPENCODE_SHARED_SECRET", ""), ("AUTH", "")])] {
        let c = config.unwrap();
        assert_eq!((c.port, c.host.to_string().as_str()), (3003, "0.0.0.0"));
        assert_eq!(c.workspace_dir, PathBuf::from("/workspace"));
        assert_eq!(c.state_dir, PathBuf::from("/var/lib/opencode-sidecar"));
        assert!(c.database_url.is_none() && c.default_model.is_none() && !c.metrics_auth);
        assert!(c.credentials.shared_secret.is_none() && c.credentials.tokens.is_none());
        assert!(c.opencode_command.is_none() && c.backend_api_url.is_none() && !c.auth_off);
        assert_eq!((c.database_schema.as_str(), c.project_id.as_str()), ("opencode_sidecar", "default"));
        assert_eq!((c.log_level.as_str(), c.log_format), ("info", LogFormat::Json));
        assert_eq!(c.retention, Some(TimeDelta::days(30)));
        assert_eq!((c.max_concurrent_tasks, c.max_queued_tasks, c.warm_pool_size), (5, 100, 0));
        assert_eq!((c.max_prompt_length, c.model_max_failures, c.model_calls_per_minute), (50_000, 5, 300));
        assert_eq!(c.session_port_range, 20000..=20999);
        assert_eq!((c.session_uid_range.clone(), c.session_uids()), (61000..=63999, 3000));
        assert_eq!(c.sandbox, SandboxMode::Required);
        assert_eq!(
            c.limits,
            Limits { output_bytes: 64 << 20, model_calls: 200, total_tokens: 5_000_000, ..Limits::default() }
        );
        let seconds = [
            (c.task_timeout, 3600),
            (c.stall_timeout, 300),
            (c.unresponsive_timeout, 45),
            (c.session_idle_timeout, 900),
            (c.start_timeout, 60),
            (c.first_event_timeout, 60),
            (c.shutdown_grace, 25),
            (c.model_header_timeout, 60),
            (c.model_idle_timeout, 120),
        ];
        for (got, want) in seconds {
            assert_eq!(got, Duration::from_secs(want));
        }
    }
}

/// Of each variable: a good value, and values that are refused by its name.
#[test]
fn each_variable_is_read_and_checked() {
    let long = "x".repeat(129);
    let long_schema = "a".repeat(64);
    let cases: &[(&'static str, &str, &[&str])] = &[
        ("PORT", "8080", &["65536", "-1", "+1", "x", "3003 "]),
        ("HOST", "::1", &["localhost", "1.2.3", "0.0.0.0:1"]),
        ("WORKSPACE_DIR", "/w", &["w", "./w", "../w"]),
        ("STATE_DIR", "/s", &["s"]),
        ("DATABASE_URL", "postgres://u:p@h/db", &["mysql://h/db", "h/db", "postgres"]),
        ("DATABASE_SCHEMA", "_a1", &["1a", "A", "a-b", "a\";drop", &long_schema]),
        ("PROJECT_ID", "p-1", &["a b", "ä", &long]),
        ("JOURNAL_MAX_BYTES", "64 MiB", &["0", "1 MiB", "lots", "-1"]),
        ("LEASE_SECONDS", "60", &["0", "-1", "3601", "x"]),
        ("RETENTION_DAYS", "0", &["-1", "1.5", "30d", "36501", "never"]),
        ("LOG_LEVEL", "info,opencode_sidecar=debug", &["inof", "loud=very", "a=b=c"]),
        ("LOG_FORMAT", "text", &["JSON", "xml"]),
        ("OPENCODE_SHARED_SECRET", "s3cret", &["two words", "line\n", "ä"]),
        ("OPENCODE_SHARED_SECRET_FILE", "/run/secret", &["secret", "./secret"]),
        ("JWT_SECRET", &"x".repeat(32), &[&"x".repeat(31), &format!("{} ", "x".repeat(32)), &"\u{e4}".repeat(40)]),
        ("JWT_SECRET_FILE", "/run/jwt", &["jwt"]),
        (
            "JWT_PUBLIC_KEY",
            PUBLIC_KEY,
            &["hidden", PRIVATE_KEY, &PUBLIC_KEY.repeat(2), &PUBLIC_KEY.replace("MCow", "MCox")],
        ),
        ("JWT_PUBLIC_KEY_FILE", "/run/key.pem", &["key.pem"]),
        ("JWT_JWKS_FILE", "/run/jwks.json", &["jwks.json"]),
        ("AUTH", "off", &["on", "false", "OFF"]),
        ("REDACTION", "off", &["on", "0"]),
        ("METRICS_AUTH", "required", &["on", "1", "optional"]),
        (
            "BACKEND_API_URL",
            "https://backend:8443/base/",
            &[
                "backend",
                "backend:80",
                "ftp://h",
                "http://u@h",
                "http://u:p@h",
                "http://h?key=x",
                "http://h#x",
                "http://",
            ],
        ),
        ("MAX_CONCURRENT_TASKS", "7", &["0", "1001", "x"]),
        ("MAX_CONCURRENT_SESSIONS", "7", &["0", "x"]),
        ("MAX_QUEUED_TASKS", "0", &["-1", "1000001"]),
        ("TASK_TIMEOUT", "10", &["0", "10s", "2592001"]),
        ("SESSION_TIMEOUT", "10", &["0", "1.5"]),
        ("STALL_TIMEOUT", "10", &["0", "86401"]),
        ("UNRESPONSIVE_TIMEOUT", "15", &["14", "3601", "x"]),
        ("START_TIMEOUT", "10", &["0", "3601"]),
        ("FIRST_EVENT_TIMEOUT", "10", &["0", "x"]),
        ("SHUTDOWN_GRACE_SECONDS", "5", &["0", "x"]),
        ("MAX_PROMPT_LENGTH", "10", &["0", "x"]),
        ("MAX_TASK_FILE_SIZE", "2 MiB", &["0", "1 MB", "-1"]),
        ("WARM_POOL_SIZE", "2", &["-1", "x"]),
        ("SESSION_PORT_RANGE", "30000-30100", &["30000", "30100-30000", "80-90", "1-65536", "a-b", "-"]),
        (
            "SESSION_UID_RANGE",
            "100000 - 100999",
            &[
                "61000",
                "0-100",
                "0",
                "999-2000",
                "62000-61000",
                "61000-65534",
                "65535-70000",
                "61000-4294967295",
                "+61000-62000",
                "61000-",
                "-62000",
                "a-b",
            ],
        ),
        ("SESSION_IDLE_TIMEOUT", "5", &["0", "x"]),
        ("SESSIONS_STREAM_UNAUTHENTICATED", "1", &["0", "true"]),
        ("SANDBOX", "best-effort", &["none", "REQUIRED"]),
        ("ENCRYPTION_KEY", KEY, &["hidden", "AAEC", &KEY[..43], &format!("{KEY}\n")]),
        ("MODEL_HEADER_TIMEOUT", "5", &["0", "x"]),
        ("MODEL_IDLE_TIMEOUT", "5", &["0", "x"]),
        ("MODEL_MAX_FAILURES", "1", &["0", "x"]),
        ("MODEL_CALLS_PER_MINUTE", "1", &["0", "100001", "x"]),
        ("MODEL_ENDPOINT_ALLOW", "models.example, *.a.example:443,[::1]:8080", &["*", "http://h", "h,", "h:0", "::1"]),
        ("SESSION_MODEL_CALLS", "1", &["0", "x"]),
        ("SESSION_TOTAL_TOKENS", "1", &["0", "x"]),
        ("SESSION_OUTPUT_BYTES", "1 MiB", &["0", "x"]),
        ("SESSION_MEMORY_BYTES", "1 GiB", &["0", "255 MiB", "x"]),
        ("SESSION_PIDS", "64", &["63", "x"]),
        ("SESSION_CPU_MILLIS", "1500", &["9", "x"]),
        ("SESSION_DISK_BYTES", "1 GiB", &["1", "x"]),
        (
            "EGRESS_ALLOW",
            "registry.npmjs.org:443, *.example.com:443,10.0.0.1:8443,[::1]:80",
            &[
                "a.example",
                "https://a.example:443",
                "a.example:0",
                "*:443",
                "*.10.0.0.1:443",
                "a.example:443,",
                "a b:1",
            ],
        ),
        ("SANDBOX_REQUIRE", "cgroup, uid", &["landlock", "cgroup,"]),
    ];
    for (name, good, bads) in cases {
        assert!(read(&[(name, good)]).is_ok(), "{name}={good}: {:?}", read(&[(name, good)]).err());
        for value in *bads {
            assert_eq!(bad(&[(name, value)]), vec![vec![*name]], "{name}={value}");
        }
    }
    assert!(read(&[("OPENCODE_COMMAND", "/opt/opencode")]).unwrap().opencode_command.is_some());

    let tested: BTreeSet<_> = cases.iter().map(|(name, ..)| *name).chain(["OPENCODE_COMMAND"]).collect();
    let model = BTreeSet::from([
        "ENCRYPTION_KEY_PREVIOUS",
        "OPENCODE_PROVIDER",
        "OPENCODE_MODEL",
        "OPENCODE_API_KEY",
        "OPENCODE_API_ENDPOINT",
    ]);
    let all: BTreeSet<_> = reference().iter().map(|v| v.name).collect();
    assert_eq!(tested.union(&model).copied().collect::<BTreeSet<_>>(), all);
}

#[test]
fn what_is_read_is_what_is_documented() {
    let asked = RefCell::new(BTreeSet::new());
    Config::from_source(&|name| {
        asked.borrow_mut().insert(name.to_owned());
        None
    })
    .unwrap();
    let known: BTreeSet<_> = reference().iter().map(|v| v.name).chain(not_yet()).map(str::to_owned).collect();
    assert_eq!(*asked.borrow(), known);
    assert_eq!(known.len(), reference().len() + not_yet().count(), "no name twice");
    assert!(reference().iter().all(|v| !v.meaning.is_empty()));
}

#[test]
fn the_default_model_is_all_or_nothing() {
    let config = read(&MODEL).unwrap().default_model.unwrap();
    assert_eq!((config.provider, config.model.as_str()), (Provider::Openai, "gpt-x"));
    assert_eq!(config.endpoint.as_str(), "https://api.openai.com/v1");
    assert_eq!(config.api_key.expose_secret(), "sk-hidden");

    let with = |changes: &[(&'static str, &'static str)]| {
        let mut set: BTreeMap<_, _> = MODEL.into_iter().collect();
        set.extend(changes.iter().copied());
        set.into_iter().collect::<Vec<_>>()
    };
    let local = with(&[("OPENCODE_PROVIDER", "local"), ("OPENCODE_API_ENDPOINT", "http://127.0.0.1:8000/v1")]);
    assert_eq!(read(&local).unwrap().default_model.unwrap().endpoint.as_str(), "http://127.0.0.1:8000/v1");

    for missing in ["OPENCODE_PROVIDER", "OPENCODE_MODEL", "OPENCODE_API_KEY"] {
        assert_eq!(bad(&with(&[(missing, "")])), vec![vec![missing]]);
    }
    for provider in ["local", "custom"] {
        assert_eq!(bad(&with(&[("OPENCODE_PROVIDER", provider)])), vec![vec!["OPENCODE_API_ENDPOINT"]]);
    }
    assert_eq!(bad(&[("OPENCODE_API_ENDPOINT", "http://h/v1")]).len(), 3);
    assert_eq!(bad(&with(&[("OPENCODE_PROVIDER", "OpenAI")])), vec![vec!["OPENCODE_PROVIDER"]]);
    assert_eq!(bad(&with(&[("OPENCODE_MODEL", "a b")])), vec![vec!["OPENCODE_MODEL"]]);
    assert_eq!(bad(&with(&[("OPENCODE_API_KEY", "a\nb")])), vec![vec!["OPENCODE_API_KEY"]]);
    for url in ["ftp://h/v1", "h/v1", "http://u:p@h/v1", "http://h/v1?key=x", "file:///etc/passwd", "http://"] {
        assert_eq!(bad(&with(&[("OPENCODE_API_ENDPOINT", url)])), vec![vec!["OPENCODE_API_ENDPOINT"]], "{url}");
    }
}

#[test]
fn models_are_called_where_it_is_allowed() {
    let reach = |set: &[(&'static str, &'static str)], target: &str| {
        read(set).unwrap().model_endpoints().reach(&Target::parse(target).unwrap())
    };
    for own in ["api.openai.com:443", "api.anthropic.com:443"] {
        assert_eq!(reach(&[], own), Some(Reach::Public));
        assert_eq!(reach(&[("MODEL_ENDPOINT_ALLOW", "h")], own), None);
        assert_eq!(reach(&[("MODEL_ENDPOINT_ALLOW", own)], own), Some(Reach::Anywhere));
    }
    for other in ["api.openai.com:80", "eu.api.openai.com:443", "127.0.0.1:443", "localhost:80"] {
        assert_eq!(reach(&[], other), None, "{other}");
    }
    // The default model can always be called.
    let mut model = MODEL.to_vec();
    model.push(("MODEL_ENDPOINT_ALLOW", "h"));
    assert_eq!(reach(&model, "api.openai.com:443"), Some(Reach::Public));
    model.push(("OPENCODE_API_ENDPOINT", "http://127.0.0.1:8000/v1"));
    assert_eq!(reach(&model, "127.0.0.1:8000"), Some(Reach::Anywhere));
    assert_eq!((reach(&model, "127.0.0.1:8001"), reach(&model, "api.openai.com:443")), (None, None));
    let errors = read(&[("MODEL_ENDPOINT_ALLOW", "h,hidden.*")]).unwrap_err().to_string();
    assert!(errors.contains("entry 2 is no host") && !errors.contains("hidden"), "{errors}");
}

#[test]
fn a_previous_key_needs_a_present_one() {
    let (name, older) = ("ENCRYPTION_KEY", "ENCRYPTION_KEY_PREVIOUS");
    assert!(read(&[]).unwrap().keyring.is_none());
    assert!(read(&[(name, KEY)]).unwrap().keyring.unwrap().previous.is_none());
    assert!(read(&[(name, KEY), (older, KEY)]).unwrap().keyring.unwrap().previous.is_some());
    assert_eq!(bad(&[(older, KEY)]), vec![vec![older, name]]);
    assert_eq!(bad(&[(name, KEY), (older, "hidden")]), vec![vec![older]]);
    assert_eq!(bad(&[(name, "hidden"), (older, KEY)]), vec![vec![name]]);
}

#[test]
fn a_credential_has_one_form_and_tokens_one_kind_of_key() {
    let long = "x".repeat(32);
    let forms: [(&'static str, &str, &'static str); 3] = [
        ("OPENCODE_SHARED_SECRET", "s", "OPENCODE_SHARED_SECRET_FILE"),
        ("JWT_SECRET", &long, "JWT_SECRET_FILE"),
        ("JWT_PUBLIC_KEY", PUBLIC_KEY, "JWT_PUBLIC_KEY_FILE"),
    ];
    for (name, value, file) in forms {
        assert_eq!(bad(&[(name, value), (file, "/f")]), vec![vec![name, file]]);
    }
    let kinds = [("JWT_SECRET", &*long), ("JWT_PUBLIC_KEY_FILE", "/f"), ("JWT_JWKS_FILE", "/g")];
    assert_eq!(bad(&kinds), vec![kinds.map(|(name, _)| name).to_vec()]);
    for file in ["OPENCODE_SHARED_SECRET_FILE", "JWT_SECRET_FILE", "JWT_PUBLIC_KEY_FILE", "JWT_JWKS_FILE"] {
        assert_eq!(bad(&[("WORKSPACE_DIR", "/w"), (file, "/w/keys/f")]), vec![vec![file, "WORKSPACE_DIR"]]);
        assert!(read(&[("WORKSPACE_DIR", "/w"), (file, "/wide/f")]).is_ok());
    }
    let read = read(&[("OPENCODE_SHARED_SECRET_FILE", "/f"), ("JWT_JWKS_FILE", "/g")]).unwrap().credentials;
    assert!(read.shared_secret.unwrap().is_file());
    assert_eq!(read.tokens.unwrap().variable(), "JWT_JWKS_FILE");
}

#[test]
fn two_names_of_one_setting_must_agree() {
    for (name, other) in [("TASK_TIMEOUT", "SESSION_TIMEOUT"), ("MAX_CONCURRENT_TASKS", "MAX_CONCURRENT_SESSIONS")] {
        assert!(read(&[(name, "9"), (other, "9")]).is_ok());
        assert_eq!(bad(&[(name, "9"), (other, "8")]), vec![vec![name, other]]);
    }
    assert_eq!(read(&[("SESSION_TIMEOUT", "9")]).unwrap().task_timeout, Duration::from_secs(9));
    assert_eq!(read(&[("MAX_CONCURRENT_SESSIONS", "9")]).unwrap().max_concurrent_tasks, 9);
}

#[test]
fn ports_must_not_collide_or_run_out() {
    assert_eq!(bad(&[("PORT", "20005")]), vec![vec!["PORT", "SESSION_PORT_RANGE"]]);
    assert_eq!(bad(&[("SESSION_PORT_RANGE", "30000-30003")])[0][0], "SESSION_PORT_RANGE");
    assert!(read(&[("SESSION_PORT_RANGE", "30000-30003"), ("MAX_CONCURRENT_TASKS", "4")]).is_ok());
}

#[test]
fn every_bad_host_is_told_by_its_place() {
    let errors = read(&[("EGRESS_ALLOW", "a.example:443,hidden,*.b.example:443,hidden:0")]).unwrap_err();
    assert_eq!(
        errors.to_string(),
        "the environment is not valid\n  EGRESS_ALLOW: entry 2 has no port; \
         entry 4 has no port from 1 to 65535 after its colon; expected host:port or *.suffix:port, separated by commas"
    );
    let read = read(&[("EGRESS_ALLOW", "A.example:443,*.b.example:443")]).unwrap();
    assert_eq!(read.egress_allow.to_string(), "a.example:443, *.b.example:443");
}

#[test]
fn what_cannot_be_honoured_is_refused() {
    for name in not_yet() {
        let errors = read(&[(name, "hidden-value")]).unwrap_err();
        assert_eq!(
            errors.to_string(),
            format!("the environment is not valid\n  {name}: is set, but this version does not support it yet")
        );
    }
}

#[test]
fn all_errors_come_at_once_in_order_and_show_no_value() {
    let set = [
        ("SESSION_OUTPUT_BYTES", "hidden-1"),
        ("EGRESS_ALLOW", "hidden-2"),
        ("JWT_SECRET", "hidden-11"),
        ("PORT", "hidden-3"),
        ("DATABASE_URL", "hidden-4"),
        ("OPENCODE_SHARED_SECRET", "hidden 5"),
        ("OPENCODE_API_KEY", "hidden 6"),
        ("ENCRYPTION_KEY", "hidden-10"),
        ("LOG_LEVEL", "hidden=7"),
        ("SANDBOX", "hidden-8"),
        ("WORKSPACE_DIR", "hidden-9"),
    ];
    let errors = read(&set).unwrap_err();
    let names: Vec<_> = errors.0.iter().map(|e| e.variables[0]).collect();
    assert_eq!(
        names,
        [
            "PORT",
            "WORKSPACE_DIR",
            "DATABASE_URL",
            "LOG_LEVEL",
            "OPENCODE_SHARED_SECRET",
            "JWT_SECRET",
            "SANDBOX",
            "EGRESS_ALLOW",
            "OPENCODE_PROVIDER",
            "OPENCODE_MODEL",
            "OPENCODE_API_KEY",
            "ENCRYPTION_KEY",
            "SESSION_OUTPUT_BYTES"
        ]
    );
    assert!(!format!("{errors} {errors:?}").contains("hidden"), "{errors}");
}

#[test]
fn secrets_are_not_in_debug() {
    let mut set = MODEL.to_vec();
    set.extend([
        ("OPENCODE_SHARED_SECRET", "hidden"),
        ("JWT_SECRET", "hidden-hidden-hidden-hidden-hidden-"),
        ("DATABASE_URL", "postgres://u:hidden@h/db"),
        ("ENCRYPTION_KEY", KEY),
    ]);
    let shown = format!("{:?}", read(&set).unwrap());
    assert!(!shown.contains("hidden") && !shown.contains(KEY), "{shown}");
}

#[cfg(unix)]
#[test]
fn a_value_that_is_not_utf8_is_refused_except_in_paths() {
    use std::os::unix::ffi::OsStringExt;
    let odd = |wanted: &'static str, prefix: &'static [u8]| {
        Config::from_source(&move |name| (name == wanted).then(|| OsString::from_vec([prefix, &b"\xff"[..]].concat())))
    };
    assert!(odd("WORKSPACE_DIR", b"/w").is_ok());
    assert_eq!(odd("PROJECT_ID", b"p").unwrap_err().0[0].variables, ["PROJECT_ID"]);
}
