//! Events into Postgres: by the store, in batches as the shipper makes them and with a role that row security holds to its
//! project, and by one raw `COPY` of the very same rows into a table that the same migrations made in another schema: in
//! binary, which costs the server the least, all at once, by the owner and without the trigger that row security needs.

use crate::World;
use crate::made::{event, record};
use crate::sidecar::directory;
use crate::table::{Row, Shown, print, target_least};
use chrono::Utc;
use futures_util::TryStreamExt;
use opencode_sidecar::model::ExecutionRecord;
use opencode_sidecar::store::{DatabaseOptions, Embedded, Store, Write};
use secrecy::ExposeSecret;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use std::time::Instant;

const EVENTS: usize = 200_000;
/// They write at the same time.
const EXECUTIONS: usize = 8;
/// What the shipper takes as one where much waits: of the 2000 that the committer takes at most, two fit into its 5000.
const BATCH: usize = 4000;
const COLUMNS: &str = "execution_events (execution_id, seq, type, severity, ts, envelope)";

/// What the owner of the tables does first. [`made::record`](crate::made::record) has the project.
const BOUND: &str = "CREATE ROLE pod LOGIN PASSWORD 'x'; SELECT bind_role('pod', 'bench')";
const BARE: &str = "DROP TRIGGER of_own_executions ON execution_events";

/// One side: a schema with the sidecar's tables.
struct Side {
    store: Store,
    connection: PgConnection,
}

impl Side {
    async fn new(postgres: &Embedded, schema: &str, set_up: &str) -> Self {
        let mut options = DatabaseOptions { url: postgres.url(), schema: schema.to_owned(), max_connections: 1 };
        let store = Store::connect(&options).await.unwrap();
        store.migrate().await.unwrap();
        // As the store has it, but for the limit of 10 s for a statement: all events are in one here.
        let mut connection = PgConnection::connect(options.url.expose_secret()).await.unwrap();
        connection.execute(AssertSqlSafe(format!("SET search_path TO {schema}; {set_up}"))).await.unwrap();
        let mut url = url::Url::parse(options.url.expose_secret()).unwrap();
        if set_up == BOUND {
            url.set_username("pod").unwrap();
            url.set_password(Some("x")).unwrap();
        }
        options.url = url.to_string().into();
        Self { store: Store::connect(&options).await.unwrap(), connection }
    }

    /// The executions are there, and no events. What was written before is on the disk and in nobody's way.
    async fn clear(&mut self, records: &[ExecutionRecord]) {
        self.connection.execute("TRUNCATE executions CASCADE").await.unwrap();
        let submissions: Vec<_> = records.iter().map(|record| Write::Submit(Box::new(record.clone()))).collect();
        self.store.commit(&submissions).await.unwrap();
        self.connection.execute("CHECKPOINT").await.unwrap();
    }

    /// Events a second.
    async fn commit(&mut self, batches: &[Vec<Write>]) -> f64 {
        let started = Instant::now();
        for batch in batches {
            self.store.commit(batch).await.unwrap();
        }
        rate(started)
    }

    /// Events a second.
    async fn copy_in(&mut self, rows: &[u8]) -> f64 {
        let statement = format!("COPY {COLUMNS} FROM STDIN WITH (FORMAT binary)");
        let started = Instant::now();
        let mut copy = self.connection.copy_in_raw(&statement).await.unwrap();
        copy.send(rows).await.unwrap();
        assert_eq!(copy.finish().await.unwrap(), EVENTS as u64);
        rate(started)
    }

    /// All events in the order in which they were written.
    async fn copy_out(&mut self) -> Vec<u8> {
        let statement = format!("COPY {COLUMNS} TO STDOUT WITH (FORMAT binary)");
        let mut rows = self.connection.copy_out_raw(&statement).await.unwrap();
        let mut all = Vec::new();
        while let Some(row) = rows.try_next().await.unwrap() {
            all.extend(row);
        }
        all
    }
}

fn rate(started: Instant) -> f64 {
    EVENTS as f64 / started.elapsed().as_secs_f64()
}

pub(crate) async fn run(world: &World) {
    let state = directory();
    let postgres = Embedded::start(&world.sandbox, &world.tasks, state.path()).await.unwrap();
    let (mut ours, mut raw) = (Side::new(&postgres, "ours", BOUND).await, Side::new(&postgres, "raw", BARE).await);
    assert!(ours.store.role().await.unwrap().is_some_and(|role| role.held && role.wider.is_none()));
    let records: Vec<_> = (0..EXECUTIONS).map(|_| record()).collect();
    let mut bytes = 0;
    let writes: Vec<_> = (0..EVENTS)
        .map(|number| {
            let event = event(number).seal((number / EXECUTIONS + 1) as u64, Utc::now());
            bytes += event.json.len();
            Write::Event { execution: records[number % EXECUTIONS].id, event }
        })
        .collect();
    let batches: Vec<_> = writes.chunks(BATCH).map(<[Write]>::to_vec).collect();
    println!("{EVENTS} events of {EXECUTIONS} executions, {} bytes of envelope on average", bytes / EVENTS);
    // The rows as the server itself writes them; this is the first round too, for what is made on first use.
    ours.clear(&records).await;
    ours.commit(&batches).await;
    let rows = ours.copy_out().await;
    let (mut committed, mut copied, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..world.rounds(7) {
        ours.clear(&records).await;
        raw.clear(&records).await;
        let (commit, copy) = if round % 2 == 0 {
            let commit = ours.commit(&batches).await;
            (commit, raw.copy_in(&rows).await)
        } else {
            let copy = raw.copy_in(&rows).await;
            (ours.commit(&batches).await, copy)
        };
        assert!(ours.copy_out().await == rows && raw.copy_out().await == rows, "both sides have the same rows");
        committed.push(commit / 1000.0);
        copied.push(copy / 1000.0);
        ratios.push(commit / copy);
    }
    let sides = [
        Row::new("by the store as a bound role, batches of 4000", committed),
        Row::new("one raw COPY (binary)", copied),
    ];
    print("events into Postgres, in thousands a second", "k/s", Shown::Spread, &sides);
    // What else the machine does meets both sides of a round.
    let ratio = Row::new("the store ÷ COPY", ratios);
    print("ratio, round by round", "", Shown::Spread, std::slice::from_ref(&ratio));
    target_least("its median", ratio.median(), 0.5);
    ours.store.close().await;
    raw.store.close().await;
    postgres.stop().await.unwrap();
}
