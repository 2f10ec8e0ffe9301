//! The seam between memory, journal and database, over interleavings of those who write, ship, forget and read.
//!
//! Journal and database are lists here, behind locks of the checker; what is checked is when a log says that something is
//! where. `make test` runs it with `--features shuttle`, which puts the checker's locks into [`super`].

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use super::*;
use crate::events::{page_of, page_of_stored};
use crate::model::event::EventType;
use crate::model::task::{Limits, ModelChoice, Provider};
use crate::model::{Task, TaskId};
use serde_json::json;
use shuttle::thread::{spawn, yield_now};

/// Random schedules that are tried.
const SCHEDULES: usize = 3_000;
const RECORDS: u64 = 5;

fn record() -> ExecutionRecord {
    let model = ModelChoice::new(Provider::Local, "m", "http://127.0.0.1:1/v1");
    let task = Task::new(TaskId::new(), "x", model, 1, Limits::default());
    ExecutionRecord::new("p", uuid::Uuid::nil(), task, Vec::new(), Utc::now())
}

/// The journal: records by their place; those that were forgotten are gone.
type Journal = Arc<Mutex<VecDeque<(Position, Option<Vec<Write>>)>>>;
/// The database: events in order.
type Stored = Arc<Mutex<Vec<Event>>>;

/// Reads the log as `Events::read` does, until it has `last`.
fn read(live: &Live, journal: &Journal, stored: &Stored, limit: u32, last: u64) {
    let mut after = 0;
    while after < last {
        let head = live.subscribe().borrow().last_seq;
        if head == after {
            // As a reader that waits for the head to move.
            yield_now();
            continue;
        }
        let query = ReadQuery { after, limit, ..ReadQuery::default() };
        let page = match live.find(&query, limit) {
            Found::Here(page) => page,
            Found::Shipped(upto) => {
                let events = stored
                    .lock()
                    .unwrap()
                    .iter()
                    .filter(|event| event.seq > after)
                    .take(limit as usize)
                    .cloned()
                    .collect();
                page_of_stored(events, head, Some(upto), after, limit)
            }
            Found::Journal(at) => {
                let held =
                    journal.lock().unwrap().iter().find(|(place, _)| *place == at).and_then(|(_, held)| held.clone());
                match held {
                    Some(writes) => page_of(live.id, head, writes, &query, limit),
                    // It was shipped in the meantime.
                    None => continue,
                }
            }
        };
        assert!(
            page.events.iter().map(|event| event.seq).eq(after + 1..=page.next_after),
            "a gap after {after}: {page:?}"
        );
        assert!(page.next_after > after, "no way on from {after}: {page:?}");
        after = page.next_after;
    }
}

#[test]
fn a_reader_finds_each_event_once_wherever_it_is() {
    shuttle::check_random(
        || {
            let live = Arc::new(Live::new(record()));
            let (journal, stored): (Journal, Stored) = (Arc::default(), Arc::default());
            let (sender, receiver) = shuttle::sync::mpsc::channel::<(Position, u64)>();
            let writer = {
                let (live, journal) = (Arc::clone(&live), Arc::clone(&journal));
                spawn(move || {
                    let mut seq = 0;
                    for number in 1..=RECORDS {
                        let events: Vec<_> = (0..2)
                            .map(|_| {
                                seq += 1;
                                NewEvent::new(EventType::Stdout, json!(seq)).seal(seq, Utc::now())
                            })
                            .collect();
                        let execution = live.id;
                        let writes = events.iter().cloned().map(|event| Write::Event { execution, event }).collect();
                        let at = Position::at(number);
                        journal.lock().unwrap().push_back((at, Some(writes)));
                        live.publish(events, None, at);
                        sender.send((at, seq)).unwrap();
                    }
                })
            };
            let shipper = {
                let (live, journal, stored) = (Arc::clone(&live), Arc::clone(&journal), Arc::clone(&stored));
                spawn(move || {
                    while let Ok((at, last)) = receiver.recv() {
                        let held = journal.lock().unwrap().iter().find(|(place, _)| *place == at).unwrap().1.clone();
                        let events = held.unwrap().into_iter().filter_map(|write| match write {
                            Write::Event { event, .. } => Some(event),
                            _ => None,
                        });
                        stored.lock().unwrap().extend(events);
                        live.shipped(last);
                        for (place, held) in journal.lock().unwrap().iter_mut() {
                            if *place <= at {
                                *held = None;
                            }
                        }
                    }
                })
            };
            let readers: Vec<_> = [1, 3, 100]
                .map(|limit| {
                    let (live, journal, stored) = (Arc::clone(&live), Arc::clone(&journal), Arc::clone(&stored));
                    spawn(move || read(&live, &journal, &stored, limit, RECORDS * 2))
                })
                .into();
            for thread in [writer, shipper].into_iter().chain(readers) {
                thread.join().unwrap();
            }
        },
        SCHEDULES,
    );
}
