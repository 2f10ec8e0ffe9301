//! Who may in, and to what: the shared secret or a token as a bearer credential, or loopback where `AUTH=off` says so.
//!
//! The address is always the connection's own; headers that claim another are not read. [`scope`](Scope) says what an
//! operation needs, `jwt` what a token allows, `rotation` keeps the credentials, `slow` slows attempts that fail.

mod jwt;
mod rotation;
mod scope;
mod slow;

pub use jwt::STREAM_TOKEN_SECONDS;
pub use rotation::{CredentialError, CredentialErrors};
pub(crate) use scope::{Entry, Table};
pub use scope::{Scope, Scopes, Unscoped};
pub(crate) use slow::Origin;
pub use slow::Slowing;

use crate::api::problem::{Code, Problem};
use crate::model::ExecutionId;
use crate::secrets::{Sources, TokenError, TokenMaker};
use crate::tasks::Tasks;
use crate::telemetry::{AuthRefusal, Metrics};
use axum::extract::{ConnectInfo, FromRequestParts, MatchedPath, RawPathParams, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Utc};
use http::{Extensions, HeaderMap, header};
use rotation::Held;
use secrecy::SecretString;
use slow::Attempts;
use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use uuid::Uuid;

/// The subprotocol of streams.
pub const STREAM_PROTOCOL: &str = "opencode.stream.v1";
/// What stands before the base64url of a token in a list of subprotocols.
const BEARER_PROTOCOL: &str = "bearer.";
/// The variables that configure a credential, for those who have configured none.
const VARIABLES: &str = "OPENCODE_SHARED_SECRET, JWT_SECRET, JWT_PUBLIC_KEY or JWT_JWKS_FILE";

/// How a request's credential looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presented {
    /// There is none. A WebSocket may still send one as its first frame.
    None,
    /// It is good, or the caller needs none.
    Valid(Caller),
    /// It is wrong, or not one.
    Invalid(Refusal),
}

/// Why a credential is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Neither a shared secret nor a token of ours; nothing is said of how far it is from one.
    Unknown,
    /// A token that is refused.
    Token(TokenError),
    /// A token that is good in another project.
    Project,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Who {
    SharedSecret,
    Loopback,
    /// Has a token; the name that it has in the database.
    Token(String),
    /// Has a token that this sidecar made for one stream.
    Stream,
}

/// Who a request comes from, and what it may do. An extension of each request that was let in by [`require`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    who: Who,
    scopes: Scopes,
    /// The one execution that it may have to do with.
    execution: Option<ExecutionId>,
    expires: Option<DateTime<Utc>>,
}

impl Caller {
    fn unlimited(who: Who) -> Self {
        Self { who, scopes: Scopes::all(), execution: None, expires: None }
    }

    /// The name of whoever this is: the same for each of its requests, and nobody else's. It is stored.
    pub fn name(&self) -> Cow<'_, str> {
        match &self.who {
            Who::SharedSecret => Cow::Borrowed("shared-secret"),
            Who::Loopback => Cow::Borrowed("loopback"),
            Who::Token(name) => Cow::Borrowed(name),
            Who::Stream => Cow::Borrowed("stream"),
        }
    }

    /// Whether it may do what needs this scope, with the execution that it is about.
    ///
    /// # Errors
    /// 403
    pub(crate) fn may(&self, scope: Scope) -> Result<(), Problem> {
        if self.scopes.has(scope) {
            return Ok(());
        }
        Err(Problem::new(Code::Forbidden, format!("The credential has not the scope `{}`.", scope.as_str())))
    }

    /// Whether it may ask for a stream token: whoever has one cannot live on further ones.
    ///
    /// # Errors
    /// 403
    pub(crate) fn may_make_tokens(&self) -> Result<(), Problem> {
        match self.who {
            Who::Stream => {
                Err(Problem::new(Code::Forbidden, "A stream token opens a stream; it does not make further tokens."))
            }
            _ => Ok(()),
        }
    }

    /// Whether its credential ends by itself.
    pub(crate) fn expires(&self) -> bool {
        self.expires.is_some()
    }

    /// Completes when its credential ends; never where it does not.
    pub(crate) async fn expired(&self) {
        /// The clock may be set meanwhile.
        const LOOK: Duration = Duration::from_secs(60);
        let Some(expires) = self.expires else { return std::future::pending().await };
        // Zero once it is over.
        while let Ok(left) = (expires - Utc::now()).to_std() {
            tokio::time::sleep(left.min(LOOK)).await;
        }
    }
}

/// What a request wants to do, as far as a credential is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wish {
    entry: Entry,
    /// The execution in its path; `None` where it is about others too, or about none.
    execution: Option<ExecutionId>,
}

impl Wish {
    fn granted_to(self, caller: &Caller) -> Result<(), Problem> {
        match self.entry {
            Entry::Scope(scope) => caller.may(scope)?,
            Entry::NoSuchMethod => {}
            Entry::Unknown => {
                tracing::error!("a route is served that the document does not describe; nobody may have it");
                return Err(Problem::new(Code::Forbidden, "This path is not open to anybody."));
            }
        }
        if caller.execution.is_some() && caller.execution != self.execution {
            return Err(Problem::new(
                Code::Forbidden,
                "The credential is for one execution, and this is not about it.",
            ));
        }
        Ok(())
    }
}

/// What [`Auth`] is made of.
#[derive(Clone, Debug)]
pub struct AuthSettings {
    pub sources: Sources,
    /// `PROJECT_ID`: whose tokens are taken.
    pub project: String,
    /// `AUTH=off`: opens the sidecar to loopback, and only where no credential is configured: one always counts.
    pub off: bool,
    pub slowing: Slowing,
}

/// The credentials that are configured. Cheap to clone; shows nothing of them.
#[derive(Clone)]
pub struct Auth(Arc<Inner>);

struct Inner {
    held: Held,
    maker: TokenMaker,
    project: String,
    off: bool,
    attempts: Attempts,
    metrics: Metrics,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("configured", &self.0.held.variables()).field("off", &self.0.off).finish()
    }
}

impl Auth {
    /// Reads the credentials.
    ///
    /// # Errors
    /// Each one that cannot be used, by its variable.
    pub fn new(settings: AuthSettings, metrics: Metrics) -> Result<Self, CredentialErrors> {
        let AuthSettings { sources, project, off, slowing } = settings;
        let maker = TokenMaker::new().map_err(|error| {
            let problem = format!("the system gives no random bytes: {error}");
            CredentialErrors(vec![CredentialError { variable: "stream tokens", problem }])
        })?;
        let attempts = Attempts::new(slowing);
        Ok(Self(Arc::new(Inner { held: Held::new(sources)?, maker, project, off, attempts, metrics })))
    }

    /// Reads files with credentials again, at SIGHUP and when they change, until the sidecar ends.
    pub fn watch(&self, tasks: &Tasks) {
        rotation::watch_files(self, tasks);
    }

    fn held(&self) -> &Held {
        &self.0.held
    }

    /// Whether there is any credential.
    pub fn is_configured(&self) -> bool {
        !self.held().variables().is_empty()
    }

    /// For `/ready`: `ok`, `degraded` (a file could not be read again), `off` (loopback only), or `not configured`; and
    /// what there is to say about it.
    pub fn state(&self) -> (&'static str, Option<String>) {
        match (self.is_configured(), self.0.off) {
            (true, _) => match self.held().trouble() {
                None => ("ok", None),
                Some(trouble) => ("degraded", Some(format!("{trouble}; what was read before stays in force"))),
            },
            (false, true) => ("off", None),
            (false, false) => ("not configured", None),
        }
    }

    /// The shared secret as it is, and as it will be: for those whom the sidecar calls. `None` where there is none.
    pub fn shared_secret(&self) -> Option<watch::Receiver<SecretString>> {
        self.held().own()
    }

    /// A token for the stream of one execution, and when it ends. It dies with this process.
    pub(crate) fn stream_token(
        &self,
        execution: ExecutionId,
        asked_by: &Caller,
    ) -> Result<(SecretString, DateTime<Utc>), Problem> {
        asked_by.may_make_tokens()?;
        jwt::stream_token(&self.0.maker, &self.0.project, execution, asked_by).map_err(Problem::internal)
    }

    /// Judges a credential.
    ///
    /// # Errors
    /// [`Refusal`]
    pub fn check(&self, token: &str) -> Result<Caller, Refusal> {
        let credentials = self.held().now();
        if credentials.is_shared_secret(token) {
            return Ok(Caller::unlimited(Who::SharedSecret));
        }
        let own = jwt::caller(self.0.maker.keys(), token, &self.0.project);
        match (own, credentials.keys()) {
            (Ok(caller), _) => Ok(Caller { who: Who::Stream, ..caller }),
            // It says nothing that is not ours.
            (Err(Refusal::Token(TokenError::Unsigned)), Some(keys)) => jwt::caller(keys, token, &self.0.project),
            (Err(Refusal::Token(TokenError::Unsigned)), None) => Err(Refusal::Unknown),
            (Err(refusal), _) => Err(refusal),
        }
    }

    /// Judges the credential of a request, also that of a WebSocket, which may offer it as a subprotocol.
    /// `peer` is the connection's own address.
    pub fn presented(&self, headers: &HeaderMap, peer: Option<IpAddr>) -> Presented {
        if self.open_to(headers, peer) {
            return Presented::Valid(Caller::unlimited(Who::Loopback));
        }
        let judged = |token: Option<&str>| match token.ok_or(Refusal::Unknown).and_then(|token| self.check(token)) {
            Ok(caller) => Presented::Valid(caller),
            Err(refusal) => Presented::Invalid(refusal),
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

    /// Counts a request that is not let in, slows it where its credential is wrong, and gives the answer to it.
    async fn refuse(&self, why: Option<&Refusal>, peer: Option<IpAddr>) -> Problem {
        let Some(refusal) = why else {
            self.0.metrics.auth_refused(AuthRefusal::Missing);
            return self.answer(why);
        };
        let counted = match refusal {
            Refusal::Token(TokenError::Expired) => AuthRefusal::Expired,
            Refusal::Token(TokenError::Audience) | Refusal::Project => AuthRefusal::Elsewhere,
            Refusal::Unknown | Refusal::Token(_) => AuthRefusal::Invalid,
        };
        self.0.metrics.auth_refused(counted);
        tracing::warn!(peer = peer.map(tracing::field::display), why = counted.as_str(), "a credential was refused");
        if self.0.attempts.failed(peer).await {
            return self.answer(why);
        }
        self.0.metrics.auth_refused(AuthRefusal::TooMany);
        Problem::new(Code::TooManyAttempts, "Too many attempts with a wrong credential. Try again later.")
    }

    fn answer(&self, why: Option<&Refusal>) -> Problem {
        let variables = self.held().variables().join(" or ");
        let detail = match (self.state().0, why) {
            ("off", _) => {
                let detail = "AUTH=off opens this sidecar to callers on its own machine only.";
                return Problem::new(Code::AuthNotConfigured, format!("{detail} Set {VARIABLES}."));
            }
            ("not configured", _) => {
                let detail = "This sidecar has no credential configured.";
                return Problem::new(Code::AuthNotConfigured, format!("{detail} Set {VARIABLES}."));
            }
            (_, None) => "A credential is required.".to_owned(),
            (_, Some(Refusal::Unknown)) => "The credential is not valid.".to_owned(),
            (_, Some(Refusal::Token(error))) => error.to_string(),
            (_, Some(Refusal::Project)) => "The token is for another project: `project_id`.".to_owned(),
        };
        Problem::new(Code::Unauthorized, format!("{detail} Send one as `Authorization: Bearer …`; see {variables}."))
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
            && !self.is_configured()
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

/// What a request presented, and what it wants: an extension of each request to a stream, which is refused by whoever
/// takes it further.
#[derive(Clone, Debug)]
pub struct Admission {
    auth: Auth,
    presented: Presented,
    wish: Wish,
    peer: Option<IpAddr>,
}

impl Admission {
    async fn of(guard: &Guard, request: Request) -> (Self, Request) {
        let path = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
        let entry = path.map_or(Entry::Unknown, |path| guard.table.entry(&path, request.method()));
        let peer = peer(request.extensions());
        let presented = guard.auth.presented(request.headers(), peer);
        let (mut parts, body) = request.into_parts();
        let execution = match RawPathParams::from_request_parts(&mut parts, &()).await {
            Ok(params) => {
                params.iter().find(|(name, _)| *name == "execution_id").and_then(|(_, id)| Uuid::parse_str(id).ok())
            }
            Err(_) => None,
        };
        let wish = Wish { entry, execution: execution.map(ExecutionId) };
        (Self { auth: guard.auth.clone(), presented, wish, peer }, Request::from_parts(parts, body))
    }

    /// Whether nothing was presented: a WebSocket may still do so.
    pub fn is_open(&self) -> bool {
        self.presented == Presented::None
    }

    /// Who it is, if it may. An attempt that fails may take a moment to return.
    ///
    /// # Errors
    /// 401 and 403, and 429 after too many attempts.
    pub async fn granted(&self) -> Result<Caller, Problem> {
        match &self.presented {
            Presented::None => Err(self.auth.refuse(None, self.peer).await),
            Presented::Invalid(why) => Err(self.auth.refuse(Some(why), self.peer).await),
            Presented::Valid(caller) => self.permitted(caller.clone()),
        }
    }

    /// The same with a credential that comes later: the first frame of a WebSocket, or another one in place of the first.
    ///
    /// # Errors
    /// As [`Admission::granted`].
    pub async fn granted_to(&self, token: &str) -> Result<Caller, Problem> {
        match self.auth.check(token) {
            Ok(caller) => self.permitted(caller),
            Err(why) => Err(self.auth.refuse(Some(&why), self.peer).await),
        }
    }

    fn permitted(&self, caller: Caller) -> Result<Caller, Problem> {
        let granted = self.wish.granted_to(&caller);
        if granted.is_err() {
            self.auth.0.metrics.auth_refused(AuthRefusal::Scope);
        }
        granted.map(|()| caller)
    }
}

/// What the layers below need.
#[derive(Clone, Debug)]
pub(crate) struct Guard {
    pub(crate) auth: Auth,
    pub(crate) table: Table,
}

/// The layer of all protected routes: no valid credential with the operation's scope, no entry.
pub(crate) async fn require(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let (admission, mut request) = Admission::of(&guard, request).await;
    match admission.granted().await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(problem) => problem.into_response(),
    }
}

/// The layer of streams: they refuse by themselves, since a WebSocket may send its credential as its first frame.
pub(crate) async fn judge(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let (admission, mut request) = Admission::of(&guard, request).await;
    request.extensions_mut().insert(admission);
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secrets::Source;

    const SECRET: &str = "s3cr3t-token/with+odd=chars";

    fn auth() -> Auth {
        with(Some(SECRET), false)
    }

    fn with(secret: Option<&str>, off: bool) -> Auth {
        let shared_secret = secret.map(|secret| Source::Given(secret.into()));
        let sources = Sources { shared_secret, tokens: None };
        let settings = AuthSettings { sources, project: "p".to_owned(), off, slowing: Slowing::default() };
        Auth::new(settings, Metrics::new().unwrap()).unwrap()
    }

    /// Without who and why.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Judged {
        None,
        Valid,
        Invalid,
    }

    impl Auth {
        fn judged(&self, headers: &HeaderMap, peer: Option<IpAddr>) -> Judged {
            match self.presented(headers, peer) {
                Presented::None => Judged::None,
                Presented::Valid(_) => Judged::Valid,
                Presented::Invalid(_) => Judged::Invalid,
            }
        }
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
        let cases: &[(&[(&str, &str)], Judged)] = &[
            (&[], Judged::None),
            (&[("authorization", &bearer)], Judged::Valid),
            (&[("authorization", &bearer.to_lowercase())], Judged::Valid),
            (&[("authorization", &bearer), ("authorization", &bearer)], Judged::Invalid),
            (&[("authorization", SECRET)], Judged::Invalid),
            (&[("authorization", "Basic eDp5")], Judged::Invalid),
            (&[("authorization", "Bearer ")], Judged::Invalid),
            (&[("authorization", "Bearer wrong")], Judged::Invalid),
            (&[("authorization", &format!("{bearer}x"))], Judged::Invalid),
            (&[("authorization", "Bearer wrong"), ("sec-websocket-protocol", &offered)], Judged::Invalid),
            (&[("sec-websocket-protocol", STREAM_PROTOCOL)], Judged::None),
            (&[("sec-websocket-protocol", &offered)], Judged::Valid),
            (&[("sec-websocket-protocol", STREAM_PROTOCOL), ("sec-websocket-protocol", &offered)], Judged::Valid),
            (&[("sec-websocket-protocol", &wrong)], Judged::Invalid),
            (&[("sec-websocket-protocol", &both)], Judged::Invalid),
            (&[("sec-websocket-protocol", "bearer.%%%")], Judged::Invalid),
            (&[("sec-websocket-protocol", "bearer.")], Judged::Invalid),
        ];
        for (pairs, want) in cases {
            assert_eq!(auth().judged(&headers(pairs), None), *want, "{pairs:?}");
        }
    }

    #[test]
    fn off_is_for_loopback_without_a_secret() {
        let none = HeaderMap::new();
        let local = Some("127.0.0.1".parse().unwrap());
        let mapped = Some("::ffff:127.0.0.1".parse().unwrap());
        let away = Some("10.0.0.7".parse().unwrap());
        let off = with(None, true);
        assert_eq!(off.judged(&none, local), Judged::Valid);
        assert_eq!(off.judged(&none, mapped), Judged::Valid);
        assert_eq!(off.judged(&none, away), Judged::None);
        assert_eq!(off.judged(&none, None), Judged::None);
        assert_eq!(off.judged(&headers(&[("x-forwarded-for", "127.0.0.1")]), away), Judged::None);
        assert_eq!(with(None, false).judged(&none, local), Judged::None);
        assert_eq!(with(Some(SECRET), true).judged(&none, local), Judged::None);
        assert_eq!(off.judged(&headers(&[("authorization", "Bearer x")]), away), Judged::Invalid);
    }

    #[test]
    fn a_web_page_is_not_the_person_before_it() {
        let local = Some("::1".parse().unwrap());
        let off = with(None, true);
        for (name, value, want) in [
            ("host", "127.0.0.1:3003", Judged::Valid),
            ("host", "[::1]:3003", Judged::Valid),
            ("host", "LocalHost", Judged::Valid),
            ("host", "evil.example:3003", Judged::None),
            ("host", "127.0.0.1.evil.example", Judged::None),
            ("origin", "http://localhost:5173", Judged::Valid),
            ("origin", "https://evil.example", Judged::None),
            ("origin", "null", Judged::None),
        ] {
            assert_eq!(off.judged(&headers(&[(name, value)]), local), want, "{name}: {value}");
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let shown = format!("{:?}", auth());
        assert_eq!(shown, "Auth { configured: [\"OPENCODE_SHARED_SECRET\"], off: false }");
    }
}
