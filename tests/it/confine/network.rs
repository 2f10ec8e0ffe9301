//! What of the network a confined program reaches. What listens outside is in this process: `broker` is what the
//! program may connect to, everything else belongs to others.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use super::bench::{Bench, until_told};
use opencode_sidecar::sandbox::confine::{Namespace, Network, Protection};
use opencode_sidecar::sandbox::{RefusedConnects, Spec};
use std::collections::BTreeMap;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Ports for programs, so that tests side by side do not meet.
fn ports<const N: usize>() -> [u16; N] {
    static NEXT: AtomicU16 = AtomicU16::new(12_000);
    let first = NEXT.fetch_add(u16::try_from(N).unwrap(), Ordering::Relaxed);
    std::array::from_fn(|at| first + u16::try_from(at).unwrap())
}

struct Outside {
    broker: TcpListener,
    /// At the broker's port, but not at its address: stands for another machine.
    elsewhere: TcpListener,
    neighbour: TcpListener,
    serve: u16,
    local: [u16; 2],
    namespace: Namespace,
}

/// The namespaces that a program can have here: what it reaches is the same in each.
fn namespaces() -> &'static [Namespace] {
    if cfg!(as_root) { &[Namespace::Sidecars, Namespace::Own] } else { &[Namespace::Sidecars] }
}

impl Outside {
    fn new() -> Self {
        Self::with(Namespace::Sidecars)
    }

    fn with(namespace: Namespace) -> Self {
        let broker = TcpListener::bind("127.0.0.1:0").unwrap();
        let elsewhere = TcpListener::bind(("127.0.0.2", broker.local_addr().unwrap().port())).unwrap();
        let neighbour = TcpListener::bind("127.0.0.1:0").unwrap();
        for listener in [&broker, &elsewhere, &neighbour] {
            listener.set_nonblocking(true).unwrap();
        }
        let [serve, a, b] = ports();
        Self { broker, elsewhere, neighbour, serve, local: [a, b], namespace }
    }

    fn at(listener: &TcpListener) -> SocketAddr {
        listener.local_addr().unwrap()
    }

    fn broker(&self) -> SocketAddr {
        Self::at(&self.broker)
    }

    fn spec(&self, bench: &Bench, what: &str, args: &[String]) -> Spec {
        let mut spec = bench.program(what, args);
        let network = Network {
            connect: vec![self.broker()],
            serve: vec![self.serve],
            local: self.local.into(),
            namespace: self.namespace,
        };
        spec.confinement.as_mut().unwrap().network = network;
        spec
    }
}

fn nobody_came(listener: &TcpListener) {
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

async fn connects(bench: &Bench, as_user: bool, namespace: Namespace) {
    let outside = Outside::with(namespace);
    let tries = [
        (outside.broker().to_string(), "ok"),
        // The same, as IPv6 writes it, and as Linux takes the wildcard.
        (format!("[::ffff:127.0.0.1]:{}", outside.broker().port()), "ok"),
        (format!("0.0.0.0:{}", outside.broker().port()), "ok"),
        (Outside::at(&outside.elsewhere).to_string(), "EACCES"),
        (format!("[::1]:{}", outside.broker().port()), "EACCES"),
        (Outside::at(&outside.neighbour).to_string(), "EACCES"),
        ("169.254.169.254:80".to_owned(), "EACCES"),
        ("1.1.1.1:53".to_owned(), "EACCES"),
        ("[2606:4700:4700::1111]:443".to_owned(), "EACCES"),
        (format!("127.0.0.1:{}", outside.serve), "EACCES"),
        // Its own: only that nobody listens there.
        (format!("127.0.0.1:{}", outside.local[0]), "ECONNREFUSED"),
        (format!("[::1]:{}", outside.local[0]), "ECONNREFUSED"),
        (format!("10.0.0.1:{}", outside.local[0]), "EACCES"),
    ];
    let addresses: Vec<_> = tries.iter().map(|(address, _)| address.clone()).collect();
    let mut spec = outside.spec(bench, "connect", &addresses);
    if as_user {
        spec = bench.as_user(spec);
    }
    let seen = Arc::new(Mutex::new(BTreeMap::new()));
    let seeing = Arc::clone(&seen);
    spec.refused = Some(RefusedConnects::new(move |to, count| *seeing.lock().unwrap().entry(to).or_default() += count));
    let told = bench.told(spec).await;
    let wanted: Vec<_> = tries.iter().map(|(_, wanted)| *wanted).collect();
    assert_eq!(told, wanted, "{addresses:?}");
    let refused = tries.iter().filter(|(_, wanted)| *wanted == "EACCES");
    let refused = refused.map(|(address, _)| (Some(address.parse::<SocketAddr>().unwrap()), 1_u64));
    assert_eq!(*seen.lock().unwrap(), refused.collect::<BTreeMap<_, _>>());
    nobody_came(&outside.elsewhere);
    nobody_came(&outside.neighbour);
    for _ in 0..3 {
        outside.broker.accept().unwrap();
    }
    nobody_came(&outside.broker);
}

#[tokio::test]
async fn only_the_broker_is_connected_to() {
    let bench = Bench::new();
    for namespace in namespaces() {
        connects(&bench, false, *namespace).await;
    }
    bench.stop().await;
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "acts as another user, which takes root")]
async fn only_the_broker_is_connected_to_by_a_user_of_its_own() {
    let bench = Bench::new();
    for namespace in namespaces() {
        connects(&bench, true, *namespace).await;
    }
    bench.stop().await;
}

#[tokio::test]
async fn a_flood_of_refused_connects_is_counted_whole_and_told_seldom() {
    let bench = Bench::new();
    let outside = Outside::new();
    let mut spec = outside.spec(&bench, "connect", &vec!["192.0.2.1:443".to_owned(); 3000]);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let seeing = Arc::clone(&seen);
    spec.refused = Some(RefusedConnects::new(move |to, count| seeing.lock().unwrap().push((to, count))));
    let began = Instant::now();
    assert_eq!(bench.told(spec).await.len(), 3000);
    let tenths = began.elapsed().as_millis() / 100;
    let seen = seen.lock().unwrap();
    assert_eq!(seen.iter().map(|(_, count)| count).sum::<u64>(), 3000);
    assert!(seen.iter().all(|(to, _)| *to == Some("192.0.2.1:443".parse().unwrap())), "{seen:?}");
    // The first, one in each tenth of a second, and the last.
    assert!(seen.len() as u128 <= tenths + 2, "{} reports in {tenths} tenths of a second", seen.len());
}

#[tokio::test]
async fn a_program_listens_on_its_own_ports_at_loopback() {
    let bench = Bench::new();
    for namespace in namespaces() {
        let outside = Outside::with(*namespace);
        let (serve, [one, other]) = (outside.serve, outside.local);
        let tries = [
            (format!("127.0.0.1:{serve}"), format!("127.0.0.1:{serve}")),
            (format!("0.0.0.0:{one}"), format!("127.0.0.1:{one}")),
            (format!("[::]:{one}"), format!("[::ffff:127.0.0.1]:{one}")),
            (format!("[::1]:{other}"), format!("[::1]:{other}")),
            ("0.0.0.0:0".to_owned(), format!("127.0.0.1:{one}")),
            (Outside::at(&outside.neighbour).to_string(), "EACCES".to_owned()),
            (format!("0.0.0.0:{}", outside.broker().port()), "EACCES".to_owned()),
            (format!("10.0.0.1:{one}"), "EACCES".to_owned()),
            ("127.0.0.1:3003".to_owned(), "EACCES".to_owned()),
        ];
        let addresses: Vec<_> = tries.iter().map(|(address, _)| address.clone()).collect();
        let told = bench.told(outside.spec(&bench, "bind", &addresses)).await;
        assert_eq!(told, tries.map(|(_, wanted)| wanted), "{addresses:?}");
        // One that never asked for an address would be at all of them.
        let told = bench.told(outside.spec(&bench, "listen", &[])).await;
        assert_eq!(told, [format!("127.0.0.1:{one}"), format!("[::ffff:127.0.0.1]:{other}")]);
    }
    bench.stop().await;
}

/// As a session's tools and OpenCode's own API.
#[tokio::test]
async fn its_server_is_there_for_others_and_not_for_itself() {
    let bench = Bench::new();
    for namespace in namespaces() {
        let outside = Outside::with(*namespace);
        let at = SocketAddr::from(([127, 0, 0, 1], outside.serve));
        let mut process = bench.sandbox.start(outside.spec(&bench, "serve", &[at.to_string()])).await.unwrap();
        let stdout = until_told(&mut process, "serving").await;
        let mut client = TcpStream::connect(at).unwrap();
        client.write_all(b"from outside").unwrap();
        drop(client);
        let mut rest = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut { stdout }, &mut rest).await.unwrap();
        assert_eq!(super::program::told(&rest), ["from outside"]);
        process.gone().await;
    }
    bench.stop().await;
}

#[tokio::test]
async fn an_address_that_changes_while_it_is_judged_gains_nothing() {
    let bench = Bench::new();
    for namespace in namespaces() {
        let outside = Outside::with(*namespace);
        let args = [outside.broker().to_string(), Outside::at(&outside.neighbour).to_string()];
        let broker = outside.broker.try_clone().unwrap();
        let spec = outside.spec(&bench, "race", &args);
        let mut process = bench.sandbox.start(spec).await.unwrap();
        let mut stdout = process.take_stdout().unwrap();
        // Room for those that are let through.
        let broker = tokio::net::TcpListener::from_std(broker).unwrap();
        let mut text = String::new();
        let accept = async {
            loop {
                broker.accept().await.unwrap();
            }
        };
        tokio::select! {
            () = accept => {}
            _ = tokio::io::AsyncReadExt::read_to_string(&mut stdout, &mut text) => {}
        }
        assert_eq!(super::program::told(&text), ["raced"]);
        nobody_came(&outside.neighbour);
        process.gone().await;
    }
    bench.stop().await;
}

#[tokio::test]
async fn a_connect_that_waits_holds_up_no_other() {
    let bench = Bench::new();
    for namespace in namespaces() {
        let outside = Outside::with(*namespace);
        let own = SocketAddr::from(([127, 0, 0, 1], outside.local[0]));
        let args = [own.to_string(), outside.broker().to_string()];
        let told = bench.told(outside.spec(&bench, "full", &args)).await;
        assert_eq!(told, ["waiting", "connected"]);
    }
    bench.stop().await;
}

#[tokio::test]
async fn a_socket_that_does_not_block_stays_so() {
    let bench = Bench::new();
    for namespace in namespaces() {
        let outside = Outside::with(*namespace);
        let told = bench.told(outside.spec(&bench, "nonblocking", &[outside.broker().to_string()])).await;
        assert_eq!(told, ["begun", "Ok(())", "true"]);
        let told = bench.told(outside.spec(&bench, "nonblocking", &[format!("127.0.0.1:{}", outside.local[0])])).await;
        assert!(told[0] == "begun" && told[1].contains("ConnectionRefused") && told[2] == "true", "{told:?}");
    }
    bench.stop().await;
}

#[tokio::test]
async fn without_a_network_there_is_none() {
    let bench = Bench::new();
    let outside = Outside::new();
    let told = bench.told(bench.program("connect", &[outside.broker().to_string()])).await;
    assert_eq!(told, ["EACCES"]);
    let told = bench.told(bench.program("bind", &["127.0.0.1:0".to_owned()])).await;
    assert_eq!(told, ["EADDRINUSE"]);
    assert!(bench.confined(bench.sh("sleep 1000")).await.has(Protection::Egress));
    bench.stop().await;
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "makes a network namespace, which takes root")]
async fn in_a_namespace_of_its_own_there_is_nobody_else() {
    let bench = Bench::new();
    let outside = Outside::with(Namespace::Own);
    let local = SocketAddr::from(([127, 0, 0, 1], outside.local[0]));
    let mut process = bench.sandbox.start(outside.spec(&bench, "hold", &[local.to_string()])).await.unwrap();
    let stdout = until_told(&mut process, "serving").await;
    let confined = process.confined().unwrap();
    assert!(confined.has(Protection::Netns) && confined.has(Protection::Egress), "{confined:?}");
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_ne!(namespace(&process.pid().to_string()), namespace("self"));
    // Its own ports are its own: nobody outside gets there, and what stands beside it does.
    assert!(TcpStream::connect(local).is_err());
    let mut beside = outside.spec(&bench, "connect", &[local.to_string(), outside.broker().to_string()]);
    beside.confinement.as_mut().unwrap().network.namespace = Namespace::Of(process.pid());
    assert_eq!(bench.told(beside).await, ["ok", "ok"]);
    outside.broker.accept().unwrap();
    let mut rest = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut { stdout }, &mut rest).await.unwrap();
    assert_eq!(super::program::told(&rest), [""]);
    process.gone().await;
    bench.stop().await;
}
