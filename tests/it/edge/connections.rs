//! Limits of connections, and their end.

use super::{NEVER, SECRET, Server, Setup, client, problem, read_to_end};
use reqwest::StatusCode;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};

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

/// Shapes in which one reader may see one request and another one two. `{next}` is what would be the second.
const SMUGGLERS: &[&str] = &[
    // A length twice, in other words, or none at all.
    "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ncontent-length: 200\r\n\r\n{}{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 2, 200\r\n\r\n{}{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: +2\r\n\r\n{}{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: -2\r\n\r\n{}{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 0x2\r\n\r\n{}{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 18446744073709551618\r\n\r\n{}{next}",
    // A length and chunks, in both orders.
    "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n{next}",
    // What some take for chunks and others do not.
    "POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: identity\r\n\r\n{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\nx: y\r\n transfer-encoding: chunked\r\ncontent-length: 0\r\n\r\n{next}",
    "POST /echo HTTP/1.0\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n0\r\n\r\n{next}",
    // Chunks whose sizes are no sizes.
    "POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n-0\r\n\r\n{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0x0\r\n\r\n{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n\r\n{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n{next}",
    // Heads with what does not belong there.
    "POST /echo HTTP/1.1\r\nhost: x\r\nx\0: y\r\ncontent-length: 0\r\n\r\n{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\nx: \0\r\ncontent-length: 0\r\n\r\n{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\nx: a\rb: c\r\ncontent-length: 0\r\n\r\n{next}",
    "POST /echo HTTP/1.1\r\nhost: x\r\n: y\r\ncontent-length: 0\r\n\r\n{next}",
    "POST /echo HTTP/9.9\r\nhost: x\r\n\r\n{next}",
    "POST /echo\r\n\r\n{next}",
    "POST  /echo  HTTP/1.1\r\nhost: x\r\n\r\n{next}",
];

#[tokio::test]
async fn a_request_that_could_be_two_is_refused_and_ends_the_connection() {
    let server = Server::start(Setup::default()).await;
    let next = "GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let good = format!("GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n{next}");
    assert_eq!(
        server.raw(good.as_bytes()).await.matches("HTTP/1.1 200 ").count(),
        2,
        "the second one is seen where it is one"
    );
    for shape in SMUGGLERS {
        let sent = shape.replace("{next}", next);
        let answer = server.raw(sent.as_bytes()).await;
        assert!(answer.matches("HTTP/1.").count() <= 1, "{sent:?} is two requests: {answer}");
        assert!(!answer.contains(" 200 "), "{sent:?}: {answer}");
    }
    // In chunks alone it is one request, and the last of its connection.
    let head = format!(
        "POST /echo HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {SECRET}\r\ncontent-type: application/json\r\n"
    );
    let answer =
        server.raw(format!("{head}transfer-encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n{next}").as_bytes()).await;
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn a_path_and_a_query_have_limits() {
    let server = Server::start(Setup::default()).await;
    for path in [format!("/{}", "x".repeat(1024)), format!("/health?{}", "x".repeat(16 * 1024 + 1))] {
        problem(server.get(&path), 414, "uri_too_long").await;
    }
    problem(server.get(&format!("/{}", "x".repeat(1023))), 404, "not_found").await;
    server.stop().await;
}

#[tokio::test]
async fn one_address_takes_not_all_places() {
    let mut setup = Setup::default();
    setup.server.connections_per_address = 2;
    let server = Server::start(setup).await;
    let (mut first, _second) = (server.connect().await, server.connect().await);
    let mut third = server.connect().await;
    assert_eq!(read_to_end(&mut third).await, "");
    let mut other = connect_from("127.0.0.2", server.address).await;
    other.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    assert!(read_to_end(&mut other).await.starts_with("HTTP/1.1 200 "), "another address is let in");
    first.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    assert!(read_to_end(&mut first).await.starts_with("HTTP/1.1 200 "));
    drop(first);
    server.stop().await;
}

async fn connect_from(address: &str, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(address.parse().unwrap(), 0)).unwrap();
    socket.connect(to).await.unwrap()
}
