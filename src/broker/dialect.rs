//! What a call has to be put differently for one provider alone.

use crate::model::task::Provider;
use bytes::Bytes;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use url::Url;

/// OpenAI itself calls the limit of an answer `max_completion_tokens`, and its newer models refuse the older name, which
/// is the one that everybody else knows and OpenCode writes. All but that one name stays as it was.
pub(super) fn spoken(provider: Provider, endpoint: &Url, body: Bytes) -> Bytes {
    let at_openai =
        endpoint.host_str().is_some_and(|host| host == "api.openai.com" || host.ends_with(".api.openai.com"));
    if provider != Provider::Openai || !at_openai {
        return body;
    }
    // Members that are not looked at, and their order within, are handed on byte for byte.
    let Ok(mut call) = serde_json::from_slice::<BTreeMap<String, &RawValue>>(&body) else { return body };
    match call.remove("max_tokens") {
        Some(limit) => {
            call.entry("max_completion_tokens".to_owned()).or_insert(limit);
            serde_json::to_vec(&call).map_or_else(|_| body.clone(), Bytes::from)
        }
        None => body,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_openai_itself_gets_the_newer_name() {
        let body = Bytes::from(r#"{"model":"m","max_tokens":7,"tools":[{"z":1,"a":2.50}]}"#);
        let said = |provider, endpoint: &str| spoken(provider, &endpoint.parse().unwrap(), body.clone());
        let newer = r#"{"max_completion_tokens":7,"model":"m","tools":[{"z":1,"a":2.50}]}"#;
        for endpoint in ["https://api.openai.com/v1", "https://eu.api.openai.com/v1"] {
            assert_eq!(said(Provider::Openai, endpoint), newer);
            assert_eq!(said(Provider::Custom, endpoint), body);
        }
        for endpoint in ["https://openai.example/v1", "https://api.openai.com.example/v1", "http://127.0.0.1:1/v1"] {
            assert_eq!(said(Provider::Openai, endpoint), body);
        }
        let without = Bytes::from(r#"{"model":"m"}"#);
        assert_eq!(spoken(Provider::Openai, &"https://api.openai.com/v1".parse().unwrap(), without.clone()), without);
    }
}
