//! A front for the scripted model that speaks TLS, with a certificate that only a file vouches for.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use opencode_sidecar::tasks::Tasks;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::pki_types::PrivateKeyDer;
use std::io::Write;
use std::sync::Arc;
use tempfile::NamedTempFile;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

/// Where it listens, and the file for `SSL_CERT_FILE`.
pub(crate) struct Front {
    pub(crate) base_url: String,
    pub(crate) certificates: NamedTempFile,
}

/// Hands on to the server behind `http://address/path`, until the tasks' shutdown.
pub(crate) async fn front(tasks: &Tasks, behind: &str) -> Front {
    let (address, path) = behind.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let address = address.to_owned();
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(signing_key.serialize_der().into());
    let config = rustls::ServerConfig::builder().with_no_client_auth();
    let acceptor = TlsAcceptor::from(Arc::new(config.with_single_cert(vec![cert.der().clone()], key).unwrap()));
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let base_url = format!("https://{}/{path}", listener.local_addr().unwrap());
    let stop = tasks.shutdown_token().clone();
    let connections = tasks.clone();
    let serve = async move {
        while let Ok((outside, _)) = listener.accept().await {
            let (acceptor, address) = (acceptor.clone(), address.clone());
            connections.spawn("a connection of the TLS front", async move {
                let mut outside = acceptor.accept(outside).await.unwrap();
                let mut inside = TcpStream::connect(address).await.unwrap();
                // A side that goes away is the other one's business.
                let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
            });
        }
    };
    tasks.spawn("TLS front", async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = serve => {}
        }
    });
    let mut certificates = NamedTempFile::new().unwrap();
    certificates.write_all(cert.pem().as_bytes()).unwrap();
    Front { base_url, certificates }
}
