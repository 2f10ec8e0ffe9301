//! Who is let in.

use super::{SECRET, Server, Setup, problem};
use base64::Engine;
use futures_util::{SinkExt, StreamExt};
use opencode_sidecar::api::auth::STREAM_PROTOCOL;
use serde_json::json;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

/// Each route × what is configured × what is sent.
#[tokio::test]
async fn the_authorization_matrix() {
    for (secret, auth_off) in [(true, false), (true, true), (false, false), (false, true)] {
        let server = Server::start(Setup { secret, auth_off, ..Setup::default() }).await;
        for operation in &server.operations {
            let (method, path) = operation.split_once(' ').unwrap();
            let url = server.url(&path.replace("{execution_id}", "x").replace("{number}", "x"));
            let open = server.document["paths"][path][method.to_lowercase()]["security"] == json!([]);
            // It would stay in there, or take all; that it is refused is enough.
            let dangerous = matches!(path, "/gate" | "/flood");
            for token in [None, Some("wrong"), Some(SECRET)] {
                let lets_in = open || (secret && token == Some(SECRET)) || (!secret && auth_off);
                if dangerous && lets_in {
                    continue;
                }
                let request = server.client.request(method.parse().unwrap(), &url);
                let request = if let Some(token) = token { request.bearer_auth(token) } else { request };
                if lets_in || (path == "/socket" && token.is_none()) {
                    assert_ne!(request.send().await.unwrap().status(), 401, "{operation} {token:?}");
                } else if path == "/socket" {
                    // Not an upgrade here; its own test is below.
                    assert!(request.send().await.unwrap().status().is_client_error());
                } else {
                    let code = if secret { "unauthorized" } else { "auth_not_configured" };
                    let challenge = request.try_clone().unwrap().send().await.unwrap();
                    assert!(challenge.headers()["www-authenticate"].to_str().unwrap().starts_with("Bearer"));
                    let got = problem(request, 401, code).await;
                    assert!(got["detail"].as_str().unwrap().contains("OPENCODE_SHARED_SECRET"));
                    assert!(!got.to_string().contains(SECRET));
                }
            }
        }
        server.stop().await;
    }
}

#[tokio::test]
async fn a_websocket_brings_its_credential_in_three_ways() {
    let server = Server::start(Setup::default()).await;
    let url = format!("ws://{}/socket", server.address);
    let token = |token: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(token);
    let open = |headers: Vec<(&'static str, String)>| {
        let mut request = url.as_str().into_client_request().unwrap();
        for (name, value) in headers {
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        tokio_tungstenite::connect_async(request)
    };
    let offered = |t: &str| vec![("sec-websocket-protocol", format!("{STREAM_PROTOCOL}, bearer.{}", token(t)))];
    let ways = [
        (vec![("authorization", format!("Bearer {SECRET}"))], "hi", "true"),
        (offered(SECRET), "hi", "true"),
        (vec![], SECRET, "true"),
        (vec![], "wrong", "false"),
    ];
    for (headers, first, want) in ways {
        let (mut socket, response) = open(headers.clone()).await.unwrap();
        let protocol = response.headers().get("sec-websocket-protocol").map(|p| p.to_str().unwrap());
        let asked = headers.iter().any(|(name, _)| *name == "sec-websocket-protocol");
        assert_eq!(protocol, asked.then_some(STREAM_PROTOCOL), "the token is not sent back");
        socket.send(first.into()).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap().into_text().unwrap(), want);
        socket.close(None).await.unwrap();
    }
    for headers in [offered("wrong"), vec![("authorization", "Bearer wrong".to_owned())]] {
        let Err(tokio_tungstenite::tungstenite::Error::Http(refused)) = open(headers).await else {
            panic!("let in");
        };
        assert_eq!(refused.status().as_u16(), 401);
    }
    server.stop().await;
}
