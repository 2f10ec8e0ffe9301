//! Leases: this sidecar counts up in the database while it lives, and watches the counts of the others of its project.
//!
//! One whose count stands still for a whole term, in which this one could write all the time, is gone: what it has left
//! unfinished is ended as interrupted. Where this one cannot write, the term begins anew, so that an outage of the database
//! ends nobody, and no clock has to agree with another. A sidecar that comes back finds that the database takes no status
//! of what was taken over from it.

use super::Executions;
use super::recovery::GONE;
use crate::events::{OpenTool, open_tools};
use crate::model::event::{EventType, NewEvent};
use crate::model::execution::{Command, State, apply};
use crate::model::{ExecutionRecord, Reason};
use crate::store::{Beats, EventQuery, StoreError, Write};
use chrono::{DateTime, Utc};
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior};
use uuid::Uuid;

/// How many beats there are in a term.
const BEATS: u32 = 6;
/// How many events are read at once.
const PAGE: u32 = 1000;

/// What was seen of the others. Pure.
#[derive(Debug, Default)]
struct Watch {
    /// How far each count is, and since when.
    seen: HashMap<Uuid, (i64, Instant)>,
}

impl Watch {
    /// Takes a look in, and gives those whose term is over.
    fn look(&mut self, now: Instant, term: Duration, others: &[Beats]) -> Vec<Beats> {
        self.seen.retain(|owner, _| others.iter().any(|other| other.owner == *owner));
        let mut over = Vec::new();
        for other in others {
            let (beats, since) = self.seen.entry(other.owner).or_insert((other.beats, now));
            if *beats != other.beats {
                (*beats, *since) = (other.beats, now);
            } else if now.duration_since(*since) >= term {
                over.push(*other);
            }
        }
        over
    }

    /// It was not possible to look, or to write: nothing that was seen counts any more.
    fn begin_anew(&mut self) {
        self.seen.clear();
    }
}

impl Executions {
    /// Holds this sidecar's lease and watches the others', until shutdown.
    pub async fn hold_lease(self) {
        let settings = &self.shared.settings;
        let (project, owner, term) = (&settings.project, settings.owner, settings.lease);
        let shutdown = self.shared.tasks.shutdown_token().clone();
        let work = async {
            let mut watch = Watch::default();
            let mut tick = tokio::time::interval(term / BEATS);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut tidied = false;
            loop {
                tick.tick().await;
                self.show_life().await;
                let begun = Instant::now();
                let looked = async {
                    let others = self.shared.store.beat(project, owner).await?;
                    if !tidied {
                        self.shared.store.forget_owners(project).await?;
                        tidied = true;
                    }
                    for gone in watch.look(begun, term, &others) {
                        self.end_those_of(gone).await?;
                    }
                    Ok(())
                };
                let looked: Result<(), StoreError> = looked.await;
                if let Err(error) = looked {
                    if !error.is_transient() {
                        tracing::error!(error = &error as &dyn std::error::Error, "the lease cannot be held");
                    }
                    watch.begin_anew();
                }
            }
        };
        tokio::select! {
            () = work => {}
            () = shutdown.cancelled() => {}
        }
    }

    /// Notes on disk that this one lives: who starts again within a term has lost nothing to others.
    async fn show_life(&self) {
        let alive = self.shared.settings.alive.clone();
        let written = self.shared.tasks.spawn_blocking(move || std::fs::write(alive, "")).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(%error, "that this sidecar lives cannot be noted in STATE_DIR");
        }
    }

    /// Ends what a sidecar that is gone has left.
    async fn end_those_of(&self, gone: Beats) -> Result<(), StoreError> {
        let settings = &self.shared.settings;
        let left = self.shared.store.unfinished(&settings.project, gone.owner).await?;
        let mut writes = Vec::new();
        for record in &left {
            writes.extend(self.ending(record.clone(), Utc::now()).await?);
        }
        if self.shared.store.take_over(&settings.project, gone, settings.owner, &left, &writes).await? {
            tracing::warn!(owner = %gone.owner, executions = left.len(), "another sidecar is gone: what it had left was ended as interrupted");
        }
        Ok(())
    }

    /// What is written to end an execution that another sidecar has left.
    async fn ending(&self, mut record: ExecutionRecord, now: DateTime<Utc>) -> Result<Vec<Write>, StoreError> {
        let mut calls = Vec::new();
        let mut query = EventQuery {
            after: 0,
            limit: PAGE,
            types: Some(vec![EventType::ToolCall, EventType::ToolResult]),
            severities: None,
        };
        loop {
            let page = self.shared.store.events(record.id, &query).await?;
            let Some(last) = page.last() else { break };
            query.after = last.seq;
            calls.extend(page);
        }
        let expected = record.status;
        let mut state = State::of(&record);
        for command in [Command::End(Reason::Interrupted), Command::Ended] {
            match apply(&state, command, now) {
                Ok((next, _)) => state = next,
                // It has none that is final.
                Err(rejected) => return Err(StoreError::Corrupt(format!("execution {}: {rejected}", record.id))),
            }
        }
        record.set_state(&state, now);
        record.owner = self.shared.settings.owner;
        record.generation = record.generation.saturating_add(1);
        // Its owner may have shown more than the database has.
        record.epoch = record.epoch.saturating_add(1);
        record.error = Some(GONE.to_owned());
        let mut events: Vec<_> = open_tools(&calls).iter().map(OpenTool::interrupted).collect();
        events.push(NewEvent::error(Reason::Interrupted.as_str(), GONE, true, None));
        events.push(NewEvent::status(record.status, record.reason, record.progress));
        events.push(NewEvent::complete(
            record.status,
            Reason::Interrupted,
            record.final_message.as_deref(),
            &record.files_modified,
            &record.usage,
        ));
        let mut writes = Vec::new();
        for event in events {
            record.last_seq += 1;
            writes.push(Write::Event { execution: record.id, event: event.seal(record.last_seq, now) });
        }
        writes.push(Write::Change { expected, record: Box::new(record) });
        Ok(writes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERM: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn a_lease_runs_out_only_where_it_stands_still_for_a_whole_term_that_was_watched() {
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let beats = |owner, beats| Beats { owner, beats };
        let mut watch = Watch::default();
        assert_eq!(watch.look(at(0), TERM, &[beats(one, 7), beats(two, 1)]), []);
        assert_eq!(watch.look(at(29), TERM, &[beats(one, 7), beats(two, 2)]), []);
        assert_eq!(watch.look(at(30), TERM, &[beats(one, 7), beats(two, 2)]), [beats(one, 7)], "once and for all");
        assert_eq!(watch.look(at(40), TERM, &[beats(one, 8), beats(two, 2)]), [], "it came back");
        watch.begin_anew();
        assert_eq!(watch.look(at(100), TERM, &[beats(one, 8), beats(two, 2)]), [], "an outage ends nobody");
        assert_eq!(watch.look(at(129), TERM, &[beats(one, 8)]), []);
        assert_eq!(
            watch.look(at(130), TERM, &[beats(one, 8), beats(two, 2)]),
            [beats(one, 8)],
            "one that was away is new"
        );
    }
}
