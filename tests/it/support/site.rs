//! A site of a test's own: files over https, with a certificate that a CA of the test's own vouches for.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, header};
use hyper_util::rt::TokioIo;
use opencode_sidecar::tasks::Tasks;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::pki_types::PrivateKeyDer;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

/// An address of this machine's own that no tool takes for its neighbour: it goes by the proxy.
const HOST: &str = "127.0.0.2";

pub(crate) struct Site {
    /// `127.0.0.2:PORT`
    pub(crate) address: String,
    /// The same files under a name, `localhost:PORT`. Tools take it for their neighbour, unless they are told otherwise.
    pub(crate) name: String,
    /// The certificate of the CA.
    pub(crate) roots: String,
    /// How many connections have come.
    connections: watch::Receiver<usize>,
}

impl Site {
    /// How many connections have come so far.
    pub(crate) fn connections(&self) -> usize {
        *self.connections.borrow()
    }
}

/// Serves the files beneath a directory, until the tasks' shutdown. A path that ends with a slash is its `index.html`.
pub(crate) async fn serve(tasks: &Tasks, directory: &Path) -> Site {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.distinguished_name.push(DnType::CommonName, "A CA for tests");
    let roots = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate().unwrap();
    // npm, when it goes to an address by a proxy, looks for a certificate of `localhost`.
    let mut params = CertificateParams::new(vec![HOST.to_owned(), "localhost".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "A site for tests");
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, &issuer).unwrap().der().clone();
    let config = rustls::ServerConfig::builder().with_no_client_auth();
    let config = config.with_single_cert(vec![certificate], PrivateKeyDer::Pkcs8(key.serialize_der().into())).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));

    let listener = TcpListener::bind((HOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let named = TcpListener::bind("localhost:0").await.unwrap();
    let name = format!("localhost:{}", named.local_addr().unwrap().port());
    let (stop, spawner, directory) = (tasks.shutdown_token().clone(), tasks.clone(), directory.to_owned());
    let (count, connections) = watch::channel(0);
    let accept = async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                accepted = named.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else { break };
            count.send_modify(|count| *count += 1);
            let (acceptor, directory) = (acceptor.clone(), directory.clone());
            spawner.spawn("a connection of the site", async move {
                // Whoever does not trust it goes away.
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let service = service_fn(move |request| {
                    let answer = file(&directory, &request);
                    async move { Ok::<_, Infallible>(answer) }
                });
                let server = hyper::server::conn::http1::Builder::new();
                // A client that goes away is the client's business.
                let _ = server.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    };
    tasks.spawn("site", async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = accept => {}
        }
    });
    Site { address, name, roots, connections }
}

fn file(directory: &Path, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let mut path: PathBuf = directory.join(request.uri().path().trim_start_matches('/'));
    if request.uri().path().ends_with('/') {
        path.push("index.html");
    }
    let mut response = Response::new(Full::default());
    match std::fs::read(&path) {
        Ok(content) => *response.body_mut() = Full::from(content),
        Err(_) => *response.status_mut() = hyper::StatusCode::NOT_FOUND,
    }
    let kind = if path.extension().is_some_and(|e| e == "html") { "text/html" } else { "application/octet-stream" };
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}
