//! One embedded server for the whole test binary, and a database of its own for each test.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use super::sidecar::PATIENCE;
use opencode_sidecar::sandbox::Sandbox;
use opencode_sidecar::store::{DatabaseOptions, Embedded};
use opencode_sidecar::tasks::Tasks;
use secrecy::{ExposeSecret, SecretString};
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use std::fs::File;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::mpsc::channel;
use tokio::net::{TcpListener, UnixStream};

const PREFIX: &str = "opencode-sidecar-test-";

/// A sandbox that starts the binary under test as its jail.
pub(crate) fn sandbox(tasks: &Tasks) -> Sandbox {
    Sandbox::new(PathBuf::from(env!("CARGO_BIN_EXE_opencode-sidecar")), tasks.clone()).unwrap()
}

/// A connection of a test's own. While the server has no place for it, this waits for one, as a pool does.
pub(crate) async fn connect(url: &SecretString) -> PgConnection {
    let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(PATIENCE);
    pool.connect(url.expose_secret()).await.unwrap().acquire().await.unwrap().detach()
}

/// The options for a new, empty database. `max_connections` is 4.
pub(crate) async fn fresh_database() -> DatabaseOptions {
    new_database(server(), "").await
}

/// The same on a server; `clause` goes on with `CREATE DATABASE name`.
pub(crate) async fn new_database(server: &SecretString, clause: &str) -> DatabaseOptions {
    let name = format!("test_{}", uuid::Uuid::new_v4().simple());
    let mut connection = connect(server).await;
    connection.execute(AssertSqlSafe(format!("CREATE DATABASE {name} {clause}"))).await.unwrap();
    connection.close().await.unwrap();
    let url = server.expose_secret().replace("/postgres?", &format!("/{name}?"));
    DatabaseOptions { url: SecretString::from(url), schema: "opencode_sidecar".to_owned(), max_connections: 4 }
}

/// A new role that may log in and no more, with the options by which it does.
pub(crate) async fn new_role(options: &DatabaseOptions) -> (String, DatabaseOptions) {
    let role = format!("role_{}", uuid::Uuid::new_v4().simple());
    let mut connection = connect(&options.url).await;
    connection.execute(AssertSqlSafe(format!("CREATE ROLE {role} LOGIN PASSWORD 'x'"))).await.unwrap();
    connection.close().await.unwrap();
    let mut url = url::Url::parse(options.url.expose_secret()).unwrap();
    url.set_username(&role).unwrap();
    url.set_password(Some("x")).unwrap();
    (role, DatabaseOptions { url: SecretString::from(url.to_string()), ..options.clone() })
}

/// One that is bound to a project, in a schema that is there.
pub(crate) async fn bound_role(options: &DatabaseOptions, project: &str) -> (String, DatabaseOptions) {
    let (role, its) = new_role(options).await;
    let mut connection = connect(&options.url).await;
    let bind = format!("SELECT {}.bind_role('{role}', '{project}')", options.schema);
    connection.execute(AssertSqlSafe(bind)).await.unwrap();
    connection.close().await.unwrap();
    (role, its)
}

/// A URL by which every user reaches the database of `options`: the server's socket is for its own and root only.
pub(crate) async fn for_everybody(options: &DatabaseOptions, tasks: &Tasks) -> String {
    let mut url = url::Url::parse(options.url.expose_secret()).unwrap();
    let parameter = |name: &str| url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned());
    let port = parameter("port").unwrap_or_else(|| "5432".to_owned());
    let socket = PathBuf::from(parameter("host").unwrap()).join(format!(".s.PGSQL.{port}"));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = tasks.clone();
    tasks.spawn("database relay", async move {
        while let Ok((mut from, _)) = listener.accept().await {
            let socket = socket.clone();
            connections.spawn("database connection", async move {
                if let Ok(mut to) = UnixStream::connect(socket).await {
                    let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
                }
            });
        }
    });
    url.set_host(Some("127.0.0.1")).unwrap();
    url.set_port(Some(address.port())).unwrap();
    url.set_query(None);
    url.into()
}

/// The shared server's URL; started by whoever asks first.
fn server() -> &'static SecretString {
    static SERVER: OnceLock<SecretString> = OnceLock::new();
    SERVER.get_or_init(|| {
        remove_leftovers();
        let state_dir = tempfile::Builder::new().prefix(PREFIX).tempdir().unwrap().keep();
        // The server's user passes through it.
        std::fs::set_permissions(&state_dir, std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
        let (sender, receiver) = channel();
        // A runtime of its own, since each test's ends with the test. When the process ends, the jail ends the server.
        let thread = std::thread::Builder::new().name("postgres".to_owned()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let tasks = Tasks::new();
                let embedded = Embedded::start(&sandbox(&tasks), &tasks, &state_dir).await;
                sender.send(embedded.as_ref().map(Embedded::url).map_err(|error| format!("{error:?}"))).unwrap();
                std::future::pending::<()>().await;
            });
        });
        thread.unwrap();
        receiver.recv().unwrap().unwrap()
    })
}

/// Removes the directories of test runs that are over: a process that ends cannot remove what its server still uses.
fn remove_leftovers() {
    for entry in std::fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX)
            && let Ok(lock) = File::open(entry.path().join("postgres/lock"))
            && lock.try_lock().is_ok()
        {
            // Several runs may do the same at once, and a server may still be writing.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
