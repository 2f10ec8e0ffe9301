//! Who may in: the shared secret as a bearer token, or loopback where `AUTH=off` says so.
//!
//! The address is always the connection's own; headers that claim another are not read.

use crate::api::problem::{Code, Problem};
use axum::extract::{ConnectInfo, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{Extensions, HeaderMap, header};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use subtle::ConstantTimeEq;

/// The subprotocol of streams.
pub const STREAM_PROTOCOL: &str = "opencode.stream.v1";
/// What stands before the base64url of a token in a list of subprotocols.
const BEARER_PROTOCOL: &str = "bearer.";

/// How a request's credential looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presented {
    /// There is none. A WebSocket may still send one as its first frame.
    None,
    /// It is good, or the caller needs none.
    Valid,
    /// It is wrong, or not one.
    Invalid,
}

/// Who a request comes from. An extension of each request that was let in by [`require`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Caller {
    /// Holds the shared secret.
    SharedSecret,
    /// On this machine, with `AUTH=off`.
    Loopback,
}

impl Caller {
    /// The name of whoever this is: the same for each of its requests, and nobody else's. It is stored.
    pub fn name(&self) -> Cow<'_, str> {
        match self {
            Self::SharedSecret => Cow::Borrowed("shared-secret"),
            Self::Loopback => Cow::Borrowed("loopback"),
        }
    }
}

/// The credentials that are configured. Cheap to clone; shows nothing of them.
#[derive(Clone)]
pub struct Auth(Arc<Inner>);

struct Inner {
    /// The digest, so that a comparison tells neither content nor length.
    shared_secret: Option<[u8; 32]>,
    off: bool,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let configured = self.0.shared_secret.is_some();
        f.debug_struct("Auth").field("configured", &configured).field("off", &self.0.off).finish()
    }
}

impl Auth {
    /// `auth_off` opens the sidecar to loopback, and only where no secret is configured: a secret always counts.
    pub fn new(shared_secret: Option<SecretString>, auth_off: bool) -> Self {
        let shared_secret = shared_secret.map(|secret| Sha256::digest(secret.expose_secret().as_bytes()).into());
        Self(Arc::new(Inner { shared_secret, off: auth_off }))
    }

    /// For `/ready`: `ok`, `off` (loopback only), or `not configured`.
    pub fn state(&self) -> &'static str {
        match (self.0.shared_secret.is_some(), self.0.off) {
            (true, _) => "ok",
            (false, true) => "off",
            (false, false) => "not configured",
        }
    }

    /// Whether the token is a valid credential. Takes the same time for each wrong one.
    pub fn check(&self, token: &str) -> bool {
        let Some(secret) = &self.0.shared_secret else { return false };
        let token: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        secret.ct_eq(&token).into()
    }

    /// Judges the credential of a request, also that of a WebSocket, which may offer it as a subprotocol.
    /// `peer` is the connection's own address.
    pub fn presented(&self, headers: &HeaderMap, peer: Option<IpAddr>) -> Presented {
        if self.open_to(headers, peer) {
            return Presented::Valid;
        }
        let judged = |token: Option<&str>| match token {
            Some(token) if self.check(token) => Presented::Valid,
            _ => Presented::Invalid,
        };
        let mut authorizations = headers.get_all(header::AUTHORIZATION).iter();
        if let Some(first) = authorizations.next() {
            let token = first.to_str().ok().and_then(bearer_token);
            return judged(token.filter(|_| authorizations.next().is_none()));
        }
        let protocols = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL);
        let mut offered = protocols
            .iter()
            .filter_map(|v| v.to_str().ok())
            .flat_map(|v| v.split(','))
            .filter_map(|protocol| protocol.trim().strip_prefix(BEARER_PROTOCOL));
        let Some(first) = offered.next() else { return Presented::None };
        let token = URL_SAFE_NO_PAD.decode(first).ok().and_then(|token| String::from_utf8(token).ok());
        judged(token.as_deref().filter(|_| offered.next().is_none()))
    }

    /// The answer to a request that was not let in.
    pub fn refusal(&self) -> Problem {
        match self.state() {
            "ok" => Problem::new(
                Code::Unauthorized,
                "Send the shared secret as `Authorization: Bearer <OPENCODE_SHARED_SECRET>`.",
            ),
            "off" => Problem::new(
                Code::AuthNotConfigured,
                "AUTH=off opens this sidecar to callers on its own machine only. Set OPENCODE_SHARED_SECRET.",
            ),
            _ => Problem::new(
                Code::AuthNotConfigured,
                "This sidecar has no credential configured. Set OPENCODE_SHARED_SECRET.",
            ),
        }
    }

    /// Whether a request needs no credential: nothing configured, `AUTH=off`, and the peer on this machine.
    ///
    /// A web page that a browser on this machine shows is not the person in front of it: what it sends has another
    /// origin, or, after DNS rebinding, another host.
    fn open_to(&self, headers: &HeaderMap, peer: Option<IpAddr>) -> bool {
        let local = |name| match headers.get(name) {
            None => true,
            Some(value) => value.to_str().is_ok_and(names_this_machine),
        };
        self.0.off
            && self.0.shared_secret.is_none()
            && peer.is_some_and(|ip| ip.to_canonical().is_loopback())
            && local(header::HOST)
            && local(header::ORIGIN)
    }
}

/// Whether a `Host` or `Origin` is loopback by name or address.
fn names_this_machine(value: &str) -> bool {
    let host = value.split_once("://").map_or(value, |(_, host)| host);
    let Ok(authority) = host.parse::<http::uri::Authority>() else { return false };
    let host = authority.host();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|ip| ip.to_canonical().is_loopback())
}

fn bearer_token(value: &str) -> Option<&str> {
    let (scheme, token) = value.trim().split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// The address of a request's peer, from the connection.
pub fn peer(extensions: &Extensions) -> Option<IpAddr> {
    extensions.get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(address)| address.ip())
}

/// The layer of all protected routes: no valid credential, no entry.
pub async fn require(State(auth): State<Auth>, mut request: Request, next: Next) -> Response {
    match auth.presented(request.headers(), peer(request.extensions())) {
        Presented::Valid => {
            let caller = if auth.0.shared_secret.is_some() { Caller::SharedSecret } else { Caller::Loopback };
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Presented::None | Presented::Invalid => auth.refusal().into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "s3cr3t-token/with+odd=chars";

    fn auth() -> Auth {
        Auth::new(Some(SECRET.into()), false)
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn credentials_are_judged() {
        let bearer = format!("Bearer {SECRET}");
        let offered = format!("{STREAM_PROTOCOL}, bearer.{}", URL_SAFE_NO_PAD.encode(SECRET));
        let wrong = format!("bearer.{}", URL_SAFE_NO_PAD.encode("wrong"));
        let both = format!("{offered}, {wrong}");
        let cases: &[(&[(&str, &str)], Presented)] = &[
            (&[], Presented::None),
            (&[("authorization", &bearer)], Presented::Valid),
            (&[("authorization", &bearer.to_lowercase())], Presented::Valid),
            (&[("authorization", &bearer), ("authorization", &bearer)], Presented::Invalid),
            (&[("authorization", SECRET)], Presented::Invalid),
            (&[("authorization", "Basic eDp5")], Presented::Invalid),
            (&[("authorization", "Bearer ")], Presented::Invalid),
            (&[("authorization", "Bearer wrong")], Presented::Invalid),
            (&[("authorization", &format!("{bearer}x"))], Presented::Invalid),
            (&[("authorization", "Bearer wrong"), ("sec-websocket-protocol", &offered)], Presented::Invalid),
            (&[("sec-websocket-protocol", STREAM_PROTOCOL)], Presented::None),
            (&[("sec-websocket-protocol", &offered)], Presented::Valid),
            (&[("sec-websocket-protocol", STREAM_PROTOCOL), ("sec-websocket-protocol", &offered)], Presented::Valid),
            (&[("sec-websocket-protocol", &wrong)], Presented::Invalid),
            (&[("sec-websocket-protocol", &both)], Presented::Invalid),
            (&[("sec-websocket-protocol", "bearer.%%%")], Presented::Invalid),
            (&[("sec-websocket-protocol", "bearer.")], Presented::Invalid),
        ];
        for (pairs, want) in cases {
            assert_eq!(auth().presented(&headers(pairs), None), *want, "{pairs:?}");
        }
    }

    #[test]
    fn off_is_for_loopback_without_a_secret() {
        let none = HeaderMap::new();
        let local = Some("127.0.0.1".parse().unwrap());
        let mapped = Some("::ffff:127.0.0.1".parse().unwrap());
        let away = Some("10.0.0.7".parse().unwrap());
        let off = Auth::new(None, true);
        assert_eq!(off.presented(&none, local), Presented::Valid);
        assert_eq!(off.presented(&none, mapped), Presented::Valid);
        assert_eq!(off.presented(&none, away), Presented::None);
        assert_eq!(off.presented(&none, None), Presented::None);
        assert_eq!(off.presented(&headers(&[("x-forwarded-for", "127.0.0.1")]), away), Presented::None);
        assert_eq!(Auth::new(None, false).presented(&none, local), Presented::None);
        assert_eq!(Auth::new(Some(SECRET.into()), true).presented(&none, local), Presented::None);
        assert_eq!(off.presented(&headers(&[("authorization", "Bearer x")]), away), Presented::Invalid);
    }

    #[test]
    fn a_web_page_is_not_the_person_before_it() {
        let local = Some("::1".parse().unwrap());
        let off = Auth::new(None, true);
        for (name, value, want) in [
            ("host", "127.0.0.1:3003", Presented::Valid),
            ("host", "[::1]:3003", Presented::Valid),
            ("host", "LocalHost", Presented::Valid),
            ("host", "evil.example:3003", Presented::None),
            ("host", "127.0.0.1.evil.example", Presented::None),
            ("origin", "http://localhost:5173", Presented::Valid),
            ("origin", "https://evil.example", Presented::None),
            ("origin", "null", Presented::None),
        ] {
            assert_eq!(off.presented(&headers(&[(name, value)]), local), want, "{name}: {value}");
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let shown = format!("{:?}", auth());
        assert_eq!(shown, "Auth { configured: true, off: false }");
    }
}
