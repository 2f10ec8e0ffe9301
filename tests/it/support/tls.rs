//! Fronts for the scripted model that speak TLS, with certificates of an authority that only a file vouches for.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use opencode_sidecar::tasks::Tasks;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use tempfile::NamedTempFile;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

/// Who vouches for fronts.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    certificates: NamedTempFile,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let mut certificates = NamedTempFile::new().unwrap();
        certificates.write_all(issuer.pem().as_bytes()).unwrap();
        Self { issuer, certificates }
    }

    /// The file for `SSL_CERT_FILE`.
    pub(crate) fn file(&self) -> &Path {
        self.certificates.path()
    }

    /// Hands on to the server behind `http://address/path`, until the tasks' shutdown; both speak this protocol and no
    /// other (`h2` or `http/1.1`). Gives the base URL.
    pub(crate) async fn front(&self, tasks: &Tasks, behind: &str, protocol: &str) -> String {
        let (address, path) = behind.strip_prefix("http://").unwrap().split_once('/').unwrap();
        let address = address.to_owned();
        let key = KeyPair::generate().unwrap();
        let own = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let config = rustls::ServerConfig::builder().with_no_client_auth();
        let mut config = config.with_single_cert(vec![own.der().clone()], key).unwrap();
        config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let base_url = format!("https://{}/{path}", listener.local_addr().unwrap());
        let stop = tasks.shutdown_token().clone();
        let connections = tasks.clone();
        let serve = async move {
            while let Ok((outside, _)) = listener.accept().await {
                let (acceptor, address) = (acceptor.clone(), address.clone());
                connections.spawn("a connection of the TLS front", async move {
                    // Who does not trust us hangs up.
                    let Ok(mut outside) = acceptor.accept(outside).await else { return };
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
        base_url
    }
}
