//! Limits of connections, and their end.

use super::{NEVER, SECRET, Server, Setup, client, problem, read_to_end};
use reqwest::StatusCode;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

#[tokio::test]
async fn a_slow_body_is_cut() {
    let mut setup = Setup::default();
    setup.edge.body.deadline = Duration::from_millis(50);
    let server = Server::start(setup).await;
    let head = format!(
        "POST /echo HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {SECRET}\r\ncontent-type: application/json\r\n\
         content-length: 20\r\n\r\n{{\"na"
    );
    let answer = server.raw(head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("\"code\":\"request_timeout\""), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn slow_headers_are_cut() {
    let mut setup = Setup::default();
    setup.server.header_timeout = Duration::from_millis(50);
    let server = Server::start(setup).await;
    // Nothing, half a request, half of HTTP/2's preface, the preface and no more.
    for start in ["", "GET / HTTP/1.1\r\nhost: x\r\nx-slow: ", "PRI * HTTP/2.0\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    {
        let answer = server.raw(start.as_bytes()).await;
        assert!(!answer.contains("HTTP/1.1 200"), "{answer}");
    }
    server.stop().await;
}

#[tokio::test]
async fn headers_have_limits() {
    let mut setup = Setup::default();
    // hyper's own limit is 100.
    setup.server.headers = 20;
    let server = Server::start(setup).await;
    let many: String = (0..21).map(|n| format!("x-{n}: y\r\n")).collect();
    let long = format!("x-long: {}\r\n", "y".repeat(40_000));
    for headers in [many, long] {
        let answer = server.raw(format!("GET /health HTTP/1.1\r\nhost: x\r\n{headers}\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }
    let answer = server.raw(b"GET /health HTTP/1.1\r\nhost: x\r\nx bad\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn a_peer_that_takes_nothing_is_cut() {
    let mut setup = Setup::default();
    setup.server.stall = Duration::from_millis(100);
    setup.server.connections = 1;
    let server = Server::start(setup).await;
    let mut stream = server.connect().await;
    let request = format!("GET /flood HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {SECRET}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    // There is one place: this is answered only when the first connection has lost it, without having read anything.
    assert_eq!(server.client.get(server.url("/health")).send().await.unwrap().status(), 200);
    assert!(read_to_end(&mut stream).await.len() < 64 << 20);
    server.stop().await;
}

#[tokio::test]
async fn shutdown_lets_requests_finish_and_takes_no_more() {
    let server = Server::start(Setup::default()).await;
    let mut idle = server.connect().await;
    let running = server.tasks.spawn("client", server.get("/gate").send());
    server.gate.entered.acquire().await.unwrap().forget();
    server.shutdown.cancel();
    assert_eq!(read_to_end(&mut idle).await, "", "an idle connection is ended");
    // Nobody new, as soon as the listener is gone.
    while TcpStream::connect(server.address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    assert!(!server.served.is_finished());
    server.gate.open.notify_waiters();
    let answer = running.await.unwrap().unwrap();
    assert_eq!((answer.status().as_u16(), answer.text().await.unwrap().as_str()), (200, "through"));
    server.stop().await;
}

#[tokio::test]
async fn what_does_not_finish_is_cut_and_counted() {
    let mut setup = Setup::default();
    setup.server.drain = Duration::from_millis(50);
    let server = Server::start(setup).await;
    let stuck = server.tasks.spawn("client", server.get("/gate").send());
    server.gate.entered.acquire().await.unwrap().forget();
    server.shutdown.cancel();
    assert_eq!(server.served.await.unwrap(), 1);
    assert!(stuck.await.unwrap().is_err());
    server.tasks.stop(NEVER).await.unwrap();
}

#[tokio::test]
async fn http2_is_served_with_prior_knowledge() {
    let server = Server::start(Setup::default()).await;
    let client = client().http2_prior_knowledge().build().unwrap();
    let many = (0..50).map(|_| client.get(server.url("/health")).send());
    for response in futures_util::future::join_all(many).await {
        let response = response.unwrap();
        assert_eq!((response.version(), response.status()), (reqwest::Version::HTTP_2, StatusCode::OK));
    }
    let answer = client.post(server.url("/echo")).bearer_auth(SECRET).header("content-type", "application/json");
    problem(answer.body("{"), 400, "malformed_json").await;
    drop(client);
    server.stop().await;
}
