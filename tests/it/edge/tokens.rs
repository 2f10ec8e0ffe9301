//! Tokens: which are taken, by which key, and for what.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a helper of tests fails its test")]

use super::{PROJECT, SECRET, Server, Setup, client, problem};
use crate::support::mint::{Signer, but, claims, in_seconds};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::future::select_all;
use opencode_sidecar::api::auth::{Auth, AuthSettings, Slowing};
use opencode_sidecar::api::openapi::{Edge, Routes, assemble};
use opencode_sidecar::api::probes::{Checks, Probes, Readiness};
use opencode_sidecar::model::ExecutionId;
use opencode_sidecar::secrets::{Source, Sources, TokenSource};
use opencode_sidecar::telemetry::Metrics;
use reqwest::RequestBuilder;
use serde_json::{Value, json};
use std::path::Path;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

const KEY: &str = "a-key-of-thirty-two-bytes-or-more";

fn given(text: &str) -> Source {
    Source::Given(text.into())
}

async fn with(tokens: TokenSource) -> Server {
    Server::start(Setup { secret: false, tokens: Some(tokens), ..Setup::default() }).await
}

/// Asks for what needs `tasks:read`.
fn ask(server: &Server, token: &str) -> RequestBuilder {
    server.client.get(server.url(&format!("/things/{}", ExecutionId::new()))).bearer_auth(token)
}

async fn is_taken(server: &Server, token: &str) -> bool {
    match ask(server, token).send().await.unwrap().status().as_u16() {
        200 => true,
        401 => false,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn each_algorithm_is_that_of_its_key() {
    let good = claims(PROJECT, "tasks:read");
    let signers = [Signer::hmac(KEY), Signer::rsa(), Signer::p256(), Signer::ed25519()];
    for (at, signer) in signers.iter().enumerate() {
        let source = match signer {
            Signer::Hmac(_) => TokenSource::Secret(given(KEY)),
            _ => TokenSource::PublicKey(given(&signer.public_pem())),
        };
        let server = with(source).await;
        assert!(is_taken(&server, &signer.token(&good)).await, "{}", signer.algorithm());
        for other in signers.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, other)| other) {
            assert!(!is_taken(&server, &other.token(&good)).await, "{} for {}", other.algorithm(), signer.algorithm());
            // Signed by the right key, under a wrong name.
            let header = json!({ "alg": other.algorithm() });
            assert!(!is_taken(&server, &signer.token_with(&header, &good)).await, "{header}");
        }
        for name in ["none", "None", "HS384", "RS512", "", "hs256"] {
            let header = json!({ "alg": name });
            assert!(!is_taken(&server, &signer.token_with(&header, &good)).await, "{header}");
            assert!(!is_taken(&server, &Signer::Nobody.token_with(&header, &good)).await, "{header}");
        }
        let header = json!({ "alg": signer.algorithm(), "crit": ["b64"], "b64": false });
        assert!(!is_taken(&server, &signer.token_with(&header, &good)).await, "an extension that is not understood");
        // Its claims changed afterwards; its signature cut off, or changed.
        let (token, wider) = (signer.token(&good), signer.token(&but(&good, json!({ "scope": "tasks:read admin" }))));
        let (head, signature) = token.rsplit_once('.').unwrap();
        let (wider, _) = wider.rsplit_once('.').unwrap();
        let reversed: String = signature.chars().rev().collect();
        for bad in [format!("{wider}.{signature}"), format!("{head}."), head.to_owned(), format!("{head}.{reversed}")] {
            assert!(!is_taken(&server, &bad).await, "{bad}");
        }
        server.stop().await;
    }
}

#[tokio::test]
async fn a_public_key_is_never_a_secret() {
    let good = claims(PROJECT, "tasks:read");
    for signer in [Signer::rsa(), Signer::p256(), Signer::ed25519()] {
        let pem = signer.public_pem();
        let jwk = signer.jwk("k");
        let set = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(set.path(), json!({ "keys": [jwk] }).to_string()).unwrap();
        let sources =
            [TokenSource::PublicKey(given(&pem)), TokenSource::KeySet(Source::File(set.path().to_path_buf()))];
        let raw: Vec<u8> = ["n", "x"].iter().find_map(|m| URL_SAFE_NO_PAD.decode(jwk[*m].as_str()?).ok()).unwrap();
        for source in sources {
            let server = with(source).await;
            for secret in [pem.as_bytes().to_vec(), pem.trim().as_bytes().to_vec(), raw.clone(), Vec::new()] {
                let forged = Signer::Hmac(secret);
                assert!(!is_taken(&server, &forged.token(&good)).await);
                assert!(!is_taken(&server, &forged.token_with(&json!({ "alg": "HS256", "kid": "k" }), &good)).await);
                let header = json!({ "alg": signer.algorithm(), "kid": "k" });
                assert!(!is_taken(&server, &forged.token_with(&header, &good)).await);
            }
            server.stop().await;
        }
    }
}

#[tokio::test]
async fn a_key_of_a_set_is_chosen_by_its_id() {
    let (one, two, rsa, ed) = (Signer::p256(), Signer::p256(), Signer::rsa(), Signer::ed25519());
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut encrypting = one.jwk("encrypting");
    encrypting["use"] = json!("enc");
    let keys = json!({ "keys": [one.jwk("one"), two.jwk("two"), rsa.jwk("rsa"), ed.jwk("ed"), encrypting,
        { "kty": "oct", "kid": "oct", "k": URL_SAFE_NO_PAD.encode(KEY) }, { "kty": "later", "kid": "later" }] });
    std::fs::write(file.path(), keys.to_string()).unwrap();
    let server = with(TokenSource::KeySet(Source::File(file.path().to_path_buf()))).await;
    let good = claims(PROJECT, "tasks:read");
    let named = |signer: &Signer, id: &str| signer.token_with(&json!({ "alg": signer.algorithm(), "kid": id }), &good);
    for (signer, id) in [(&one, "one"), (&two, "two"), (&rsa, "rsa"), (&ed, "ed")] {
        assert!(is_taken(&server, &named(signer, id)).await, "{id}");
        assert!(is_taken(&server, &signer.token(&good)).await, "{id}, without an id");
        for wrong in ["one", "two", "rsa", "ed", "other", "", "encrypting", "oct"].iter().filter(|w| **w != id) {
            assert!(!is_taken(&server, &named(signer, wrong)).await, "{id} as {wrong}");
        }
    }
    assert!(!is_taken(&server, &named(&Signer::hmac(KEY), "oct")).await, "a set has no secrets");
    server.stop().await;
}

#[tokio::test]
async fn claims_are_required_and_a_refusal_says_which() {
    let server = with(TokenSource::Secret(given(KEY))).await;
    let signer = Signer::hmac(KEY);
    let good = claims(PROJECT, "files:read tasks:read");
    for (changes, word) in [
        (json!({ "exp": in_seconds(-1) }), "expired"),
        (json!({ "exp": null }), "claims"),
        (json!({ "aud": null }), "`aud`"),
        (json!({ "aud": "opencode" }), "audience"),
        (json!({ "project_id": null }), "`project_id`"),
        (json!({ "project_id": "another" }), "project"),
        (json!({ "scope": null }), "`scope`"),
        (json!({ "nbf": in_seconds(600) }), "not valid yet"),
        (json!({ "execution_id": "" }), "`execution_id`"),
    ] {
        let got = problem(ask(&server, &signer.token(&but(&good, changes.clone()))), 401, "unauthorized").await;
        let detail = got["detail"].as_str().unwrap();
        assert!(detail.contains(word) && detail.contains("JWT_SECRET"), "{changes}: {detail}");
        // Whoever cannot sign learns none of it.
        let forged = Signer::hmac("another-key-of-thirty-two-bytes-or").token(&but(&good, changes));
        let got = problem(ask(&server, &forged), 401, "unauthorized").await;
        assert!(got["detail"].as_str().unwrap().starts_with("The token is not valid."), "{got}");
    }
    for scope in ["", "tasks:execute files:read admin", "tasks", "tasks:read,admin", "TASKS:READ"] {
        let token = signer.token(&but(&good, json!({ "scope": scope })));
        let got = problem(ask(&server, &token), 403, "forbidden").await;
        assert!(got["detail"].as_str().unwrap().contains("`tasks:read`"), "{got}");
    }
    let narrow = ExecutionId::new();
    let token = signer.token(&but(&good, json!({ "execution_id": narrow })));
    let of = |path: String| server.client.get(server.url(&path)).bearer_auth(&token);
    assert_eq!(of(format!("/things/{narrow}")).send().await.unwrap().status(), 200);
    for other in [format!("/things/{}", ExecutionId::new()), "/things/x".to_owned(), "/busy".to_owned()] {
        problem(of(other), 403, "forbidden").await;
    }
    server.stop().await;
}

#[utoipa::path(get, path = "/forgotten", responses((status = 200)))]
async fn forgotten() -> &'static str {
    "in"
}

#[utoipa::path(get, path = "/misspelt", security(("bearer" = ["tasks:reed"])), responses((status = 200)))]
async fn misspelt() -> &'static str {
    "in"
}

fn edge() -> Edge {
    let metrics = Metrics::new().unwrap();
    let sources = Sources { shared_secret: Some(given(SECRET)), tokens: None };
    let settings = AuthSettings { sources, project: PROJECT.to_owned(), off: false, slowing: Slowing::default() };
    let auth = Auth::new(settings, metrics.clone()).unwrap();
    let readiness = Readiness::new(|| std::future::ready(Checks::new()));
    Edge { auth, probes: Probes { metrics, readiness }, limits: Default::default(), metrics_auth: false }
}

/// So the sidecar with such a route does not start, and no other test passes.
#[tokio::test]
async fn an_operation_without_a_scope_is_none() {
    for (router, name) in [
        (OpenApiRouter::new().routes(routes!(forgotten)), "GET /forgotten"),
        (OpenApiRouter::new().routes(routes!(misspelt)), "GET /misspelt"),
    ] {
        let refused = assemble(&edge(), Routes { protected: router.clone(), ..Routes::default() });
        assert!(refused.err().unwrap().to_string().contains(name));
        assert!(assemble(&edge(), Routes { streams: router, ..Routes::default() }).is_err());
    }
}

/// Not even with the shared secret.
#[tokio::test]
async fn a_route_that_is_not_described_is_nobodys() {
    use tower::ServiceExt;
    let hidden = || OpenApiRouter::new().route("/hidden", axum::routing::get(async || "in"));
    let (router, _) = assemble(&edge(), Routes { protected: hidden(), ..Routes::default() }).unwrap();
    let request = http::Request::get("/hidden").header("authorization", format!("Bearer {SECRET}"));
    let answer = router.oneshot(request.body(axum::body::Body::empty()).unwrap()).await.unwrap();
    assert_eq!(answer.status().as_u16(), 403);
}

#[tokio::test]
async fn metrics_can_be_closed() {
    let setup = Setup { tokens: Some(TokenSource::Secret(given(KEY))), metrics_auth: true, ..Setup::default() };
    let server = Server::start(setup).await;
    assert_eq!(server.document["paths"]["/metrics"]["get"]["security"], json!([{ "bearer": ["admin"] }]));
    let metrics = || server.client.get(server.url("/metrics"));
    problem(metrics(), 401, "unauthorized").await;
    let signer = Signer::hmac(KEY);
    let reader = signer.token(&claims(PROJECT, "tasks:read tasks:execute tasks:control files:read"));
    problem(metrics().bearer_auth(reader), 403, "forbidden").await;
    for good in [SECRET.to_owned(), signer.token(&claims(PROJECT, "admin"))] {
        let text = metrics().bearer_auth(good).send().await.unwrap().text().await.unwrap();
        let count = |why: &str, n: u32| {
            let line = format!("opencode_sidecar_auth_refused_total{{why=\"{why}\"}} {n}");
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        };
        count("missing", 1);
        count("scope", 1);
        count("invalid", 0);
    }
    for path in ["/health", "/ready", "/openapi.json", "/docs"] {
        assert_eq!(server.client.get(server.url(path)).send().await.unwrap().status(), 200, "{path}");
    }
    server.stop().await;
}

/// With waits that never end, so that whoever is answered did not wait.
#[tokio::test]
async fn a_wrong_credential_waits_and_a_good_one_never_does() {
    let slowing = Slowing { free: 1, first: super::NEVER, longest: super::NEVER, per_address: 1, ..Slowing::default() };
    let server = Server::start(Setup { slowing, ..Setup::default() }).await;
    problem(ask(&server, "wrong"), 401, "unauthorized").await;
    let wrong = |address: &str| {
        let client = client().build().unwrap();
        let request = client.get(server.url("/maybe")).bearer_auth("wrong").header("x-forwarded-for", address);
        Box::pin(request.send())
    };
    // One of them has the place; another address that it claims is not its own.
    let (answer, _, waiting) = select_all([wrong("10.0.0.1"), wrong("10.0.0.2")]).await;
    let answer = answer.unwrap();
    assert_eq!((answer.status().as_u16(), answer.headers()["retry-after"].to_str().unwrap()), (429, "5"));
    let body: Value = answer.json().await.unwrap();
    assert_eq!(body["code"], "too_many_attempts");
    assert!(is_taken(&server, SECRET).await);
    // Whoever shows nothing guesses nothing.
    problem(server.client.get(server.url("/busy")), 401, "unauthorized").await;
    drop(waiting);
    server.stop().await;
}

/// The Go code in the pages makes such tokens. This one is of that code, as it stands there: it was run with
/// `github.com/golang-jwt/jwt/v5` v5.3.0, the key and the claims below, and a lifetime of ninety years.
const OF_GO: &str = include_str!("go.jwt");
/// The digest of that code.
const GO_CODE: &str = "M_EBQ7SC-6JntXp-RgoQRherQNKoPPUAbmdSY6h_7BY";

#[tokio::test]
async fn a_token_of_the_pages_go_code_is_taken() {
    use sha2::{Digest, Sha256};
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/integration.md")).unwrap();
    let code = page.split("```go\n").find(|block| block.contains("func MintToken(")).unwrap();
    let code = code.split("```").next().unwrap();
    let digest = URL_SAFE_NO_PAD.encode(Sha256::digest(code));
    assert_eq!(digest, GO_CODE, "the page's code is another one: run it, and put its token into go.jwt");

    let server = with(TokenSource::Secret(given(KEY))).await;
    let id = "0197c3a0-0000-7000-8000-0000000000e1";
    let get = |path: String| server.client.get(server.url(&path)).bearer_auth(OF_GO.trim());
    assert_eq!(get(format!("/things/{id}")).send().await.unwrap().status(), 200);
    problem(get(format!("/things/{}", ExecutionId::new())), 403, "forbidden").await;
    server.stop().await;
}
