//! HTTPS: the system's roots decide who is a sidecar.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use super::Caller;
use crate::support::sidecar::{Sidecar, World, assert_log};
use opencode_sidecar::scripted::Script;
use opencode_sidecar::tasks::Tasks;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

/// Ends TLS before a sidecar. Gives its address and the certificate of the authority that vouches for it.
async fn tls_before(sidecar: &Sidecar, tasks: &Tasks) -> (String, String) {
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let own = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![own.der().clone()], key).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let (upstream, all) = (sidecar.address().to_owned(), tasks.clone());
    tasks.spawn("tls", async move {
        while let Ok((client, _)) = listener.accept().await {
            let mut server = TcpStream::connect(&upstream).await.unwrap();
            let accepting = acceptor.accept(client);
            all.spawn("tls connection", async move {
                // A caller who does not trust us hangs up.
                if let Ok(mut client) = accepting.await {
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                }
            });
        }
    });
    (url, authority.pem())
}

#[tokio::test]
async fn a_sidecar_is_trusted_by_the_systems_roots() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let tasks = Tasks::new();
    let (url, authority) = tls_before(&sidecar, &tasks).await;
    let roots = world.file("roots.pem");
    std::fs::write(&roots, authority).unwrap();
    let prompt = Script::new().bash("echo hello").text("Done.").to_prompt("Go.");

    let trusting = Caller::new(&url, &sidecar.secret).with("SSL_CERT_FILE", roots.to_str().unwrap());
    let done = trusting.run(&["exec", "--json", &prompt]).await;
    assert_log(&done.assert(0).json());
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);

    // The secret is not told to somebody whom nobody vouches for.
    let strict = Caller::new(&url, &sidecar.secret);
    strict.run(&["exec", &prompt]).await.assert_told(7, &["the sidecar cannot be reached", "certificate"]);
    assert_eq!(sidecar.get("/tasks").await["executions"].as_array().unwrap().len(), 1);
    sidecar.stop().await;
}
