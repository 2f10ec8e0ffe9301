//! What befalls a Postgres server in the middle of runs, each time a server of the test's own.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use super::outage::{Fault, goes_on_without};
use crate::support::disk::Disk;
use crate::support::server::OwnServer;
use crate::support::sidecar::World;
use secrecy::ExposeSecret;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

/// A fast shutdown, as an operator's.
struct Stopped(OwnServer);

impl Fault for Stopped {
    async fn begin(&mut self) {
        self.0.stop().await;
    }

    async fn end(&mut self) {
        self.0.start_again().await;
    }
}

/// All of its processes are stopped where they are: connections stay, and new ones wait.
struct Frozen(OwnServer);

impl Fault for Frozen {
    async fn begin(&mut self) {
        self.0.freeze();
    }

    async fn end(&mut self) {
        self.0.thaw();
    }
}

/// All of its processes are killed; at the next start it recovers from its log.
struct Killed(OwnServer);

impl Fault for Killed {
    async fn begin(&mut self) {
        self.0.kill().await;
    }

    async fn end(&mut self) {
        self.0.start_again().await;
    }
}

/// It is there again before anybody could say that it is away.
struct Restarted(OwnServer);

impl Fault for Restarted {
    const LASTS: bool = false;

    async fn begin(&mut self) {
        self.0.stop().await;
        self.0.start_again().await;
    }

    async fn end(&mut self) {}
}

/// As a standby after a failover, or a provider's answer to a full disk: connections are cut off, and the next ones can
/// only read.
struct ReadOnly(OwnServer);

impl Fault for ReadOnly {
    const READABLE: bool = true;

    async fn begin(&mut self) {
        let mut admin = self.0.admin().await;
        admin.execute("ALTER SYSTEM SET default_transaction_read_only = on").await.unwrap();
        admin.execute("SELECT pg_reload_conf()").await.unwrap();
        let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                      WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'";
        admin.execute(others).await.unwrap();
    }

    async fn end(&mut self) {
        let mut admin = self.0.admin().await;
        admin.execute("ALTER SYSTEM RESET default_transaction_read_only").await.unwrap();
        admin.execute("SELECT pg_reload_conf()").await.unwrap();
    }
}

/// The disk of the database has no room.
struct Full {
    disk: Disk,
    /// The database's URL.
    url: String,
}

impl Fault for Full {
    const READABLE: bool = true;

    async fn begin(&mut self) {
        self.disk.fill();
        let mut connection = PgConnection::connect(&self.url).await.unwrap();
        let more = "CREATE TABLE more AS SELECT repeat('x', 1000) FROM generate_series(1, 100)";
        let error = connection.execute(more).await.unwrap_err();
        assert_eq!(error.as_database_error().unwrap().code().as_deref(), Some("53100"), "{error}");
    }

    async fn end(&mut self) {
        self.disk.make_room();
    }
}

/// A sidecar whose database is on a server of its own, of which `fault` makes what befalls it.
async fn goes_on_with<F: Fault>(fault: impl FnOnce(OwnServer) -> F) {
    let server = OwnServer::start().await;
    let world = World::with(server.database("").await).await;
    goes_on_without(&world, &[], &mut fault(server)).await;
}

#[tokio::test]
async fn a_server_that_is_stopped_stops_nothing() {
    goes_on_with(Stopped).await;
}

#[tokio::test]
async fn a_server_that_is_frozen_stops_nothing() {
    goes_on_with(Frozen).await;
}

#[tokio::test]
async fn a_server_that_is_killed_stops_nothing() {
    goes_on_with(Killed).await;
}

#[tokio::test]
async fn a_server_that_is_restarted_stops_nothing() {
    goes_on_with(Restarted).await;
}

#[tokio::test]
async fn a_server_that_can_only_be_read_stops_nothing() {
    goes_on_with(ReadOnly).await;
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "makes a disk that can be full, which takes root")]
async fn a_server_whose_disk_is_full_stops_nothing() {
    let server = OwnServer::start().await;
    let place = server.beside().join("small");
    std::fs::create_dir(&place).unwrap();
    // Room for the template and for what is written before.
    let disk = Disk::over(&place, 48 * 1024 * 1024);
    std::os::unix::fs::chown(&place, Some(server.uid()), None).unwrap();
    let tablespace = format!("CREATE TABLESPACE small LOCATION '{}'", place.display());
    server.admin().await.execute(AssertSqlSafe(tablespace)).await.unwrap();
    let world = World::with(server.database("TABLESPACE small").await).await;
    let url = world.database().url.expose_secret().to_owned();
    goes_on_without(&world, &[], &mut Full { disk, url }).await;
}
