//! The way out of a session, over real sockets: what the broker's proxy lets through, what not, and what it tells of it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::FutureExt;
use opencode_sidecar::broker::destination::{Destinations, Names, Ports};
use opencode_sidecar::broker::{Broker, BrokerConfig, Budget, EgressConfig, Grant, Lease, Refusal, Upstream, Why};
use opencode_sidecar::model::task::Provider;
use opencode_sidecar::tasks::Tasks;
use opencode_sidecar::telemetry::Metrics;
use secrecy::{ExposeSecret, SecretString};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const SOON: Duration = Duration::from_secs(30);

struct World {
    tasks: Tasks,
    broker: Broker,
    lease: Lease,
    metrics: Metrics,
}

fn grant() -> Grant {
    Grant {
        upstream: Upstream {
            provider: Provider::Custom,
            endpoint: "http://127.0.0.1:1/v1".parse().unwrap(),
            api_key: SecretString::from("k"),
            model: String::new(),
        },
        limits: Budget { model_calls: 1, total_tokens: 1 },
    }
}

fn allow(list: &str) -> EgressConfig {
    EgressConfig { allow: Destinations::parse(list, Ports::Required).unwrap(), ..EgressConfig::default() }
}

impl World {
    async fn with(egress: EgressConfig) -> Self {
        Self::configured(BrokerConfig { egress, ..BrokerConfig::default() }).await
    }

    async fn named(names: Names, egress: EgressConfig) -> Self {
        Self::configured(BrokerConfig { egress, names, ..BrokerConfig::default() }).await
    }

    async fn configured(config: BrokerConfig) -> Self {
        let (tasks, metrics) = (Tasks::new(), Metrics::new().unwrap());
        let broker = Broker::start(&tasks, metrics.clone(), config).await.unwrap();
        let lease = broker.open(grant());
        Self { tasks, broker, lease, metrics }
    }

    /// The value of `Proxy-Authorization`.
    fn credential(&self) -> String {
        let url: url::Url = self.lease.proxy_url().expose_secret().parse().unwrap();
        assert_eq!(url.host_str(), Some("127.0.0.1"));
        basic(url.password().unwrap())
    }

    /// Sends bytes on a connection of its own, and gives the head of the answer.
    async fn send(&self, bytes: &str) -> (TcpStream, String) {
        let mut stream = TcpStream::connect(self.broker.address()).await.unwrap();
        stream.write_all(bytes.as_bytes()).await.unwrap();
        let head = head(&mut stream).await;
        (stream, head)
    }

    fn request(&self, target: &str) -> String {
        format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nProxy-Authorization: {}\r\n\r\n", self.credential())
    }

    async fn connect(&self, target: &str) -> (TcpStream, String) {
        self.send(&self.request(target)).await
    }

    /// The status, and what is said after the head, to the end of the connection.
    async fn refused(&self, target: &str) -> (u16, String) {
        let (stream, head) = self.connect(target).await;
        (status(&head), rest(stream).await)
    }

    fn metric(&self, line: &str) -> bool {
        self.metrics.render().unwrap().lines().any(|l| l == format!("opencode_sidecar_{line}"))
    }

    /// Ends everything; nothing may be left.
    async fn end(self) {
        let Self { tasks, broker, lease, .. } = self;
        drop((broker, lease));
        assert_eq!(tasks.stop(SOON).await, Ok(()));
    }
}

fn basic(token: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("session:{token}")))
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.unwrap()
}

async fn head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match soon(stream.read_u8()).await {
            Ok(byte) => head.push(byte),
            Err(error) => panic!("{error}: {}", String::from_utf8_lossy(&head)),
        }
    }
    String::from_utf8(head).unwrap()
}

fn status(head: &str) -> u16 {
    head.split(' ').nth(1).unwrap().parse().unwrap()
}

/// All that comes until the other side ends or breaks off.
async fn rest(mut stream: TcpStream) -> String {
    let mut text = Vec::new();
    let mut piece = [0; 4096];
    while let Ok(length @ 1..) = soon(stream.read(&mut piece)).await {
        text.extend_from_slice(&piece[..length]);
    }
    String::from_utf8(text).unwrap()
}

/// A server at an address of this machine's own that nobody else has.
async fn site() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

async fn accepted(listener: &TcpListener) -> TcpStream {
    soon(listener.accept()).await.unwrap().0
}

#[tokio::test]
async fn bytes_pass_both_ways_from_the_first_to_the_last() {
    let (listener, address) = site().await;
    let world = World::with(allow(&address)).await;
    // What comes right behind the request is for the server, and not a second request.
    let (mut inside, head) = world.send(&format!("{}GET /model/v1/x HTTP/1.1\r\n\r\n", world.request(&address))).await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(!head.to_lowercase().contains("content-length") && !head.to_lowercase().contains("transfer-encoding"));
    let mut outside = accepted(&listener).await;
    let mut early = [0; 28];
    soon(outside.read_exact(&mut early)).await.unwrap();
    assert_eq!(&early, b"GET /model/v1/x HTTP/1.1\r\n\r\n");
    outside.write_all(b"hello").await.unwrap();
    let mut hello = [0; 5];
    soon(inside.read_exact(&mut hello)).await.unwrap();
    // One side has said all, and the other one goes on.
    inside.write_all(b"last").await.unwrap();
    inside.shutdown().await.unwrap();
    let mut said = String::new();
    soon(outside.read_to_string(&mut said)).await.unwrap();
    assert_eq!(said, "last");
    outside.write_all(b"and yet more").await.unwrap();
    drop(outside);
    assert_eq!(rest(inside).await, "and yet more");
    assert!(world.metric("egress_total{outcome=\"opened\"} 1"));
    assert!(world.metric("egress_bytes_total{direction=\"sent\"} 32"));
    assert!(world.metric("egress_bytes_total{direction=\"received\"} 17"));
    assert_eq!(world.lease.refused_at_last(), []);
    world.end().await;
}

#[tokio::test]
async fn much_passes_as_it_was() {
    let (listener, address) = site().await;
    let world = World::with(allow(&address)).await;
    let (inside, _) = world.connect(&address).await;
    let outside = accepted(&listener).await;
    let sent: Vec<u8> = (0..5_000_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let (mut from, mut to) = inside.into_split();
    let (mut read, mut write) = outside.into_split();
    let mut back = vec![0; sent.len()];
    let echo = async {
        tokio::io::copy(&mut read, &mut write).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let send = async {
        to.write_all(&sent).await.unwrap();
        to.shutdown().await.unwrap();
    };
    soon(async { tokio::join!(echo, send, async { from.read_exact(&mut back).await.unwrap() }) }).await;
    assert!(back == sent);
    world.end().await;
}

#[tokio::test]
async fn nothing_is_let_out_without_the_sessions_own_credential() {
    let (listener, address) = site().await;
    let world = World::with(allow(&address)).await;
    let gone = world.broker.open(grant());
    let of_gone = gone.proxy_url().expose_secret().parse::<url::Url>().unwrap().password().unwrap().to_owned();
    drop(gone);
    let model = world.lease.token().expose_secret().to_owned();
    let own = world.credential();
    for wrong in [
        String::new(),
        format!("Proxy-Authorization: {}\r\n", basic("wrong")),
        format!("Proxy-Authorization: {}\r\n", basic(&of_gone)),
        // That of the model is another one, and each is good for its own alone.
        format!("Proxy-Authorization: {}\r\n", basic(&model)),
        format!("Proxy-Authorization: {}x\r\n", own),
        format!("Proxy-Authorization: Bearer {model}\r\n"),
        format!("Authorization: {own}\r\n"),
    ] {
        for line in [format!("CONNECT {address} HTTP/1.1"), format!("GET http://{address}/ HTTP/1.1")] {
            let (stream, head) = world.send(&format!("{line}\r\nHost: x\r\n{wrong}\r\n")).await;
            assert_eq!(status(&head), 407, "{line} {wrong}");
            assert!(head.contains("proxy-authenticate: Basic realm="), "{head}");
            rest(stream).await;
        }
    }
    let url: url::Url = world.lease.proxy_url().expose_secret().parse().unwrap();
    let call = format!("POST /model/v1/messages HTTP/1.1\r\nHost: x\r\nx-api-key: {}\r\n\r\n", url.password().unwrap());
    assert_eq!(status(&world.send(&call).await.1), 401);
    assert!(listener.accept().now_or_never().is_none());
    // Five wrong ones, each shown twice, and the one at the model's door; to show none is no attempt.
    assert!(world.metric("broker_refused_total{why=\"token\"} 11"));
    let shown = format!("{:?} {:?}", world.lease, world.broker);
    assert!(!shown.contains(url.password().unwrap()), "{shown}");
    world.end().await;
}

#[tokio::test]
async fn what_is_not_named_is_refused_in_words_and_told() {
    let (listener, address) = site().await;
    let names = Names::new(|name| panic!("asked for {name}"));
    let world = World::named(names, allow("a.example:443,*.b.example:443")).await;
    // A second request behind it is not answered: it may have been meant for a tunnel.
    let twice = format!("{0}{0}", world.request("C.example.:443"));
    let (stream, head) = world.send(&twice).await;
    assert_eq!(status(&head), 403);
    let said = rest(stream).await;
    assert_eq!(
        said,
        "opencode-sidecar: c.example:443 may not be reached from this session; \
         what is reached from here is, by EGRESS_ALLOW: a.example:443, *.b.example:443\n"
    );
    for other in [
        address.as_str(),
        "a.example:80",
        "b.example:443",
        "x.a.example:443",
        "xb.example:443",
        "[::1]:443",
        "2130706433:443",
        "0x7f000001:443",
        &world.broker.address().to_string(),
    ] {
        assert_eq!(world.refused(other).await.0, 403, "{other}");
    }
    let told = soon(world.lease.refused()).await;
    let named = |refusal: &Refusal| refusal.target.clone().unwrap();
    assert!(told.iter().all(|refusal| refusal.why == Why::NotAllowed && refusal.count == 1 || {
        // The same address, in two other forms.
        named(refusal) == ("127.0.0.1".to_owned(), 443) && refusal.count == 2
    }));
    let told: Vec<_> = told.iter().map(named).collect();
    for (host, port) in [("c.example", 443), ("a.example", 80), ("xb.example", 443), ("[::1]", 443)] {
        assert!(told.contains(&(host.to_owned(), port)), "{told:?}");
    }
    assert!(listener.accept().now_or_never().is_none());
    assert!(world.metric("egress_total{outcome=\"refused\"} 10"));
    world.end().await;
}

#[tokio::test]
async fn without_a_list_nothing_is_let_out() {
    let world = World::with(EgressConfig::default()).await;
    let (status, said) = world.refused("a.example:443").await;
    assert_eq!(status, 403);
    assert!(said.contains("EGRESS_ALLOW names no host"), "{said}");
    world.end().await;
}

#[tokio::test]
async fn a_request_that_is_not_just_a_connect_is_refused() {
    let (listener, address) = site().await;
    let world = World::with(allow(&address)).await;
    let credential = format!("Proxy-Authorization: {}\r\n", world.credential());
    for (line, headers) in [
        (format!("CONNECT {address} HTTP/1.1"), "Content-Length: 5\r\n"),
        (format!("CONNECT {address} HTTP/1.1"), "Content-Length: 0\r\n"),
        (format!("CONNECT {address} HTTP/1.1"), "Transfer-Encoding: chunked\r\n"),
        (format!("CONNECT {address} HTTP/1.1"), "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"),
        (format!("CONNECT {address} HTTP/1.1"), "Transfer-Encoding: identity\r\n"),
        (format!("CONNECT http://{address}/ HTTP/1.1"), ""),
        (format!("CONNECT {address}/path HTTP/1.1"), ""),
        (format!("CONNECT {address}:1 HTTP/1.1"), ""),
        (format!("CONNECT user@{address} HTTP/1.1"), ""),
        ("CONNECT 127.0.0.2 HTTP/1.1".to_owned(), ""),
        ("CONNECT 127.0.0.2:0 HTTP/1.1".to_owned(), ""),
        ("CONNECT %31%32%37.0.0.2:1 HTTP/1.1".to_owned(), ""),
        ("CONNECT a_\u{e4}.example:1 HTTP/1.1".to_owned(), ""),
        ("CONNECT /model/v1/messages HTTP/1.1".to_owned(), ""),
        ("CONNECT * HTTP/1.1".to_owned(), ""),
        (format!("CONNECT {address} HTTP/3.0"), ""),
    ] {
        let (stream, head) = world
            .send(&format!("{line}\r\nHost: x\r\n{credential}{headers}\r\nhello{}", world.request(&address)))
            .await;
        assert_eq!(status(&head), 400, "{line} {headers}");
        let said = rest(stream).await;
        assert!(!said.contains("HTTP/1.1"), "a second request was answered: {said}");
    }
    let long = format!("CONNECT {address} HTTP/1.1\r\nHost: x\r\n{credential}X: {}\r\n\r\n", "x".repeat(100_000));
    let mut stream = TcpStream::connect(world.broker.address()).await.unwrap();
    // It may be cut off before all of it is sent.
    let _ = stream.write_all(long.as_bytes()).await;
    let said = rest(stream).await;
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 431 "), "{said}");
    assert!(listener.accept().now_or_never().is_none());
    world.end().await;
}

#[tokio::test]
async fn plain_http_is_refused_in_words_and_told() {
    let (listener, address) = site().await;
    let world = World::with(allow(&address)).await;
    let credential = world.credential();
    for (line, body) in [
        (format!("GET http://{address}/x?y HTTP/1.1"), ""),
        (format!("POST http://{address}/ HTTP/1.1"), "Content-Length: 5\r\n"),
    ] {
        let request = format!("{line}\r\nHost: {address}\r\nProxy-Authorization: {credential}\r\n{body}\r\n");
        let (stream, head) = world.send(&request).await;
        assert_eq!(status(&head), 403);
        let said = rest(stream).await;
        assert!(said.contains("only https is let out") && said.contains(&address), "{said}");
    }
    let told = soon(world.lease.refused()).await;
    assert_eq!(told.iter().map(|refusal| refusal.why).collect::<Vec<_>>(), [Why::PlainHttp]);
    assert!(listener.accept().now_or_never().is_none());
    // The broker itself is no proxy's target, whichever form names it.
    let own = world.broker.address();
    let call = format!("GET http://{own}/model/v1/messages HTTP/1.1\r\nHost: {own}\r\n\r\n");
    assert_eq!(status(&world.send(&call).await.1), 401);
    world.end().await;
}

#[tokio::test]
async fn a_name_is_looked_up_once_and_what_was_judged_is_dialled() {
    let (listener, address) = site().await;
    let port = listener.local_addr().unwrap().port();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    // It answers otherwise each time: first somewhere, then with what nobody listens at.
    let names = Names::new(move |name| {
        assert_eq!(name, "localhost");
        let first = count.fetch_add(1, Ordering::Relaxed) == 0;
        let answer = if first { [127, 0, 0, 2] } else { [127, 0, 0, 3] };
        async move { Ok(vec![answer.into()]) }.boxed()
    });
    let world = World::named(names, allow(&format!("localhost:{port}"))).await;
    let (_inside, head) = world.connect(&format!("LOCALHOST.:{port}")).await;
    assert_eq!(status(&head), 200);
    let _outside = accepted(&listener).await;
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    assert_eq!(
        world.refused(&format!("localhost:{port}")).await,
        (502, format!("opencode-sidecar: localhost:{port} cannot be reached: connection refused\n"))
    );
    assert_eq!(asked.load(Ordering::Relaxed), 2);
    assert_eq!(world.refused(&address).await.0, 403, "an address that a name has is not named by that");
    assert!(world.metric("egress_total{outcome=\"failed\"} 1"));
    world.end().await;
}

#[tokio::test]
async fn a_name_that_leads_inside_gains_nothing() {
    let (listener, _) = site().await;
    let port = listener.local_addr().unwrap().port();
    let names = Names::new(|name| {
        let inside = match name.as_str() {
            "here.evil.example" => vec!["127.0.0.2", "::1"],
            "net.evil.example" => vec!["10.0.0.1", "192.168.1.1", "172.16.0.1", "fd00::1"],
            "cloud.evil.example" => vec!["169.254.169.254", "fd00:ec2::254"],
            // Named in full.
            _ => vec!["127.0.0.2", "169.254.169.254", "::ffff:127.0.0.2"],
        };
        async move { Ok(inside.into_iter().map(|text| text.parse().unwrap()).collect()) }.boxed()
    });
    let world = World::named(names, allow(&format!("*.evil.example:{port},full.example:{port}"))).await;
    for name in ["here.evil.example", "net.evil.example", "cloud.evil.example", "full.example"] {
        let (status, said) = world.refused(&format!("{name}:{port}")).await;
        assert_eq!(status, 403, "{name}");
        assert!(said.contains("has no address that may be reached by that name"), "{said}");
    }
    let told = soon(world.lease.refused()).await;
    assert_eq!(told.iter().filter(|refusal| refusal.why == Why::NotPublic).count(), 4, "{told:?}");
    assert!(listener.accept().now_or_never().is_none());
    world.end().await;
}

#[tokio::test]
async fn a_host_that_does_not_answer_is_given_up() {
    let names = Names::new(|_| std::future::pending().boxed());
    let egress = allow("slow.example:443");
    let connect_timeout = Duration::from_millis(50);
    let world = World::configured(BrokerConfig { egress, names, connect_timeout, ..BrokerConfig::default() }).await;
    let (status, said) = world.refused("slow.example:443").await;
    assert_eq!((status, said.ends_with("no connection in time\n")), (504, true), "{said}");
    let unknown = Names::new(|_| async { Err(std::io::ErrorKind::NotFound.into()) }.boxed());
    let other = World::named(unknown, allow("gone.example:443")).await;
    let (status, said) = other.refused("gone.example:443").await;
    assert_eq!((status, said.ends_with("its name is not known\n")), (502, true), "{said}");
    assert_eq!(other.lease.refused_at_last(), [], "it may be reached, if it were there");
    other.end().await;
    world.end().await;
}

#[tokio::test]
async fn a_session_has_so_many_connections_and_another_one_its_own() {
    let (listener, address) = site().await;
    let world = World::with(EgressConfig { max_tunnels: 2, ..allow(&address) }).await;
    let first = world.connect(&address).await;
    let _outside = (accepted(&listener).await, world.connect(&address).await, accepted(&listener).await);
    assert_eq!(world.refused(&address).await.0, 503);
    assert_eq!(soon(world.lease.refused()).await[0].why, Why::TooMany);
    let neighbour = World {
        lease: world.broker.open(grant()),
        broker: world.broker.clone(),
        tasks: world.tasks.clone(),
        metrics: world.metrics.clone(),
    };
    assert_eq!(status(&neighbour.connect(&address).await.1), 200);
    let _theirs = accepted(&listener).await;
    drop(neighbour);
    // One that ends makes room.
    drop(first);
    drop(_outside.0);
    soon(async {
        while status(&world.connect(&address).await.1) != 200 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    world.end().await;
}

#[tokio::test]
async fn a_silent_tunnel_ends() {
    let (listener, address) = site().await;
    let idle_timeout = Duration::from_millis(100);
    let world = World::with(EgressConfig { idle_timeout, ..allow(&address) }).await;
    let (inside, _) = world.connect(&address).await;
    let outside = accepted(&listener).await;
    assert_eq!((rest(inside).await, rest(outside).await), (String::new(), String::new()));
    world.end().await;
}

#[tokio::test]
async fn tunnels_end_with_their_session() {
    let (listener, address) = site().await;
    let world = World::with(allow(&address)).await;
    let (inside, _) = world.connect(&address).await;
    let outside = accepted(&listener).await;
    let request = world.request(&address);
    let World { tasks, broker, lease, .. } = world;
    drop(lease);
    assert_eq!((rest(inside).await, rest(outside).await), (String::new(), String::new()));
    let mut late = TcpStream::connect(broker.address()).await.unwrap();
    late.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(status(&head(&mut late).await), 407);
    drop((late, broker));
    assert_eq!(tasks.stop(SOON).await, Ok(()));
}

#[tokio::test]
async fn a_loop_of_attempts_is_told_a_few_times_and_counted_whole() {
    let world = World::with(EgressConfig::default()).await;
    let mut told = Vec::new();
    for _ in 0..25 {
        assert_eq!(world.refused("a.example:443").await.0, 403);
        told.extend(world.lease.refused().now_or_never().into_iter().flatten().map(|refusal| refusal.count));
    }
    assert_eq!(told, [1, 10]);
    assert_eq!(world.lease.refused_at_last().iter().map(|refusal| refusal.count).collect::<Vec<_>>(), [25]);
    assert_eq!(world.lease.refused_at_last(), []);
    // The next execution begins anew.
    world.lease.reset(Budget { model_calls: 1, total_tokens: 1 });
    assert_eq!(world.refused("a.example:443").await.0, 403);
    assert_eq!(soon(world.lease.refused()).await[0].count, 1);
    world.end().await;
}
