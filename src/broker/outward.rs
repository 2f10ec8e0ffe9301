//! The way out to a provider: which addresses are dialled, what TLS trusts, and what of a session's call goes along.
//!
//! Nothing of a session decides where a call goes. Its path is one of three, its query is none, its headers are those
//! of a list, and no answer can send the call elsewhere: redirections are not followed.

use super::destination::{Names, Reach, Refused, Target};
use super::error::ModelError;
use super::observe::Api;
use super::{BrokerConfig, BrokerError, Inner, Upstream};
use crate::model::task::Provider;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use rustls_platform_verifier::BuilderVerifierExt;
use secrecy::{ExposeSecret, SecretString};
use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;
use url::Url;

/// Headers of a call that reach the provider; all others are the session's own affair.
const FORWARDED: [&str; 8] = [
    "accept",
    "anthropic-beta",
    "anthropic-version",
    "content-type",
    "http-referer",
    "openai-beta",
    "user-agent",
    "x-title",
];

/// The clients for all providers: one for each reach, so that no connection of the one is taken for the other.
#[derive(Debug)]
pub(super) struct Clients {
    anywhere: reqwest::Client,
    public: reqwest::Client,
}

impl Clients {
    /// # Errors
    /// Where TLS or a client cannot be set up. A host without any root certificate is no error: only calls over TLS
    /// fail there.
    pub(super) fn new(config: &BrokerConfig) -> Result<Self, BrokerError> {
        let tls = tls()?;
        let client = |reach| {
            reqwest::Client::builder()
                .tls_backend_preconfigured(tls.clone())
                .dns_resolver(Pinned { names: config.names.clone(), reach })
                .connect_timeout(config.connect_timeout)
                .redirect(reqwest::redirect::Policy::none())
                // Every call that reaches a provider is one that was counted.
                .retry(reqwest::retry::never())
                .no_proxy()
                .referer(false)
                .build()
                .map_err(BrokerError::Client)
        };
        Ok(Self { anywhere: client(Reach::Anywhere)?, public: client(Reach::Public)? })
    }

    fn of(&self, reach: Reach) -> &reqwest::Client {
        match reach {
            Reach::Anywhere => &self.anywhere,
            Reach::Public => &self.public,
        }
    }
}

/// The system's roots, HTTP/2 where the provider speaks it.
fn tls() -> Result<rustls::ClientConfig, BrokerError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = || {
        rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(BrokerError::Tls)
    };
    let mut tls = match builder()?.with_platform_verifier() {
        Ok(builder) => builder.with_no_client_auth(),
        Err(error) => {
            tracing::warn!(%error, "no root certificates: model providers cannot be reached over TLS");
            builder()?.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth()
        }
    };
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(tls)
}

/// What a client asks for the addresses of a name, once for each connection: it dials what it gets here. It does not
/// ask for addresses that stand in the URL; [`super::destination::Destinations::reach`] has judged those.
struct Pinned {
    names: Names,
    reach: Reach,
}

impl Resolve for Pinned {
    fn resolve(&self, name: Name) -> Resolving {
        let (names, reach) = (self.names.clone(), self.reach);
        Box::pin(async move {
            let addresses = names.addresses(name.as_str(), reach).await?;
            // The port 0 stands for that of the URL.
            Ok(Box::new(addresses.into_iter().map(|address| SocketAddr::new(address, 0))) as Addrs)
        })
    }
}

/// A call as it goes to the provider.
///
/// # Errors
/// [`ModelError`], where it may not go there or the key cannot be sent.
pub(super) fn call(
    inner: &Inner,
    upstream: &Upstream,
    api: Api,
    from: &HeaderMap,
) -> Result<reqwest::RequestBuilder, ModelError> {
    let reach = Target::of_url(&upstream.endpoint).and_then(|target| inner.config.destinations.reach(&target));
    let Some(reach) = reach else {
        return Err(ModelError::endpoint(&Refused::NotAllowed(host(&upstream.endpoint))));
    };
    let headers = headers(upstream, from)?;
    Ok(inner.clients.of(reach).post(url(&upstream.endpoint, api)).headers(headers))
}

fn host(endpoint: &Url) -> String {
    endpoint.host_str().unwrap_or("an endpoint without a host").to_owned()
}

fn url(endpoint: &Url, api: Api) -> Url {
    let mut url = endpoint.clone();
    let rest = match api {
        Api::Chat => "chat/completions",
        Api::Messages => "messages",
        Api::Responses => "responses",
    };
    let path = format!("{}/{rest}", endpoint.path().trim_end_matches('/'));
    url.set_path(&path);
    url.set_fragment(None);
    // A user and password in the URL would be sent as a credential beside the key. An HTTP URL can lose them.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url
}

fn headers(upstream: &Upstream, from: &HeaderMap) -> Result<HeaderMap, ModelError> {
    let mut headers = HeaderMap::new();
    for name in FORWARDED {
        for value in from.get_all(name) {
            headers.append(HeaderName::from_static(name), value.clone());
        }
    }
    // So that the answer can be read along.
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let key = upstream.api_key.expose_secret();
    if !key.is_empty() {
        let (name, value) = match upstream.provider {
            Provider::Anthropic => (HeaderName::from_static("x-api-key"), HeaderValue::from_str(key)),
            _ => {
                let bearer = SecretString::from(format!("Bearer {key}"));
                (header::AUTHORIZATION, HeaderValue::from_str(bearer.expose_secret()))
            }
        };
        let mut value = value.map_err(|_| ModelError::bad_key())?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    Ok(headers)
}

/// The error for a call that got no answer.
pub(super) fn unanswered(error: &reqwest::Error, endpoint: &Url) -> ModelError {
    if !error.is_connect() {
        return ModelError::closed_early();
    }
    let mut said = String::new();
    let mut cause: Option<&dyn Error> = Some(error);
    while let Some(error) = cause {
        match error.downcast_ref::<Refused>() {
            Some(Refused::Unknown { .. }) => return ModelError::unreachable(&host(endpoint), "its name is not known"),
            Some(refused) => return ModelError::endpoint(refused),
            None => {}
        }
        said.push_str(&error.to_string().to_lowercase());
        said.push(' ');
        cause = error.source();
    }
    let is = |word: &str| said.contains(word);
    let detail = if error.is_timeout() {
        "no connection in time"
    } else if is("certificate") || is("tls") || is("handshake") {
        "no TLS connection"
    } else if is("refused") {
        "connection refused"
    } else {
        "no connection"
    };
    ModelError::unreachable(&host(endpoint), detail)
}
