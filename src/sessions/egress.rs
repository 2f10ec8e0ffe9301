//! What of the way out a session has in its environment, and an execution in its log. The way itself is the broker's.

use crate::broker::{Lease, Refusal};
use crate::model::event::{NewEvent, Severity};
use crate::sandbox::RefusedConnects;
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use std::ffi::OsString;

/// What is never asked of the proxy: the broker itself, and what the agent serves for itself.
const DIRECT: &str = "localhost,127.0.0.1,::1";

/// Where tools that do not read `SSL_CERT_FILE`, or read another setting before it, look for a file of roots.
const ROOTS: &[&str] = &[
    "CARGO_HTTP_CAINFO",
    "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "npm_config_cafile",
];

/// What tells a session's tools to go by the proxy: npm, pip, cargo, git and curl read these. The proxy is named where
/// nothing is allowed too: then it says so, in words, and the attempt is in the log.
///
/// Where something is allowed and the sidecar trusts another file of roots (`SSL_CERT_FILE`), so do those of the tools that
/// have a variable of their own for that.
pub(super) fn environment(
    proxy: &SecretString,
    open: bool,
    inherited: impl Fn(&str) -> Option<OsString>,
) -> Vec<(OsString, OsString)> {
    let mut env: Vec<(OsString, OsString)> = Vec::new();
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
        env.push((name.into(), proxy.expose_secret().into()));
    }
    for name in ["NO_PROXY", "no_proxy"] {
        env.push((name.into(), DIRECT.into()));
    }
    // Node's own client, from version 24 on; npm has always read the others.
    env.push(("NODE_USE_ENV_PROXY".into(), "1".into()));
    if let Some(roots) = inherited("SSL_CERT_FILE").filter(|_| open) {
        env.extend(ROOTS.iter().map(|name| (name.into(), roots.clone())));
    }
    env
}

/// Has what the sandbox refuses of a session counted with what the proxy refuses it.
pub(super) fn refused_by_sandbox(lease: &Lease) -> RefusedConnects {
    let direct = lease.direct();
    RefusedConnects::new(move |to, count| direct.refused(to, count))
}

/// What the log says of attempts that were refused.
pub(super) fn event(refusal: &Refusal) -> NewEvent {
    let Refusal { target, why, count } = refusal;
    let sentence = match target {
        Some((host, port)) => why.sentence(&format!("{host}:{port}")),
        None => "More hosts were tried than are named here, and refused".to_owned(),
    };
    let mut event = NewEvent::log(Severity::Warn, "egress_refused", &format!("{sentence}."));
    let (host, port) = target.as_ref().map(|(host, port)| (host, port)).unzip();
    event.data["host"] = json!(host);
    event.data["port"] = json!(port);
    event.data["why"] = json!(why.as_str());
    event.data["count"] = json!(count);
    event
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::Why;

    #[test]
    fn every_tool_is_told_of_the_proxy_and_of_the_operators_roots() {
        let proxy = SecretString::from("http://session:t@127.0.0.1:9");
        let roots = |name: &str| (name == "SSL_CERT_FILE").then(|| "/etc/roots.pem".into());
        let named = |open, name: &str| {
            let env = environment(&proxy, open, roots);
            env.iter().find(|(n, _)| n == name).map(|(_, value)| value.to_str().unwrap().to_owned())
        };
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
            assert_eq!(named(false, name).as_deref(), Some("http://session:t@127.0.0.1:9"));
        }
        assert_eq!(named(false, "no_proxy").as_deref(), Some("localhost,127.0.0.1,::1"));
        assert_eq!(named(true, "GIT_SSL_CAINFO").as_deref(), Some("/etc/roots.pem"));
        assert_eq!(named(false, "GIT_SSL_CAINFO"), None);
        assert!(!environment(&proxy, true, |_| None).iter().any(|(name, _)| name == "PIP_CERT"));
    }

    #[test]
    fn an_event_names_the_host_and_the_port() {
        let refusal = Refusal { target: Some(("a.example".into(), 443)), why: Why::NotAllowed, count: 3 };
        let told = event(&refusal);
        assert_eq!(told.severity, Severity::Warn);
        assert_eq!(
            told.data,
            json!({ "code": "egress_refused", "message": "a.example:443 may not be reached from this session.",
                "host": "a.example", "port": 443, "why": "not_allowed", "count": 3 })
        );
        let rest = event(&Refusal { target: None, ..refusal }).data;
        assert_eq!((&rest["host"], &rest["count"]), (&json!(null), &json!(3)));
    }
}
