//! What an earlier life left in the journal: read once at the start, before anything is appended.
//!
//! Nothing of it is kept in memory but where it is: the shipper reads each record again when its turn comes, and so do
//! the readers of the logs. So a start needs no database, however much the journal bridges.

use super::commit::Whose;
use super::ledger::Ledger;
use super::live::Live;
use super::ship::{self, Parcel};
use crate::journal::Journal;
use crate::model::ExecutionId;
use crate::store::Write;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Left {
    pub(super) ledger: Ledger,
    /// Records that the database may not have, in their order.
    pub(super) parcels: Vec<Parcel>,
    /// The logs that they belong to, and those of executions without an end.
    pub(super) logs: HashMap<ExecutionId, Arc<Live>>,
}

/// Reads it. Blocks.
///
/// # Errors
/// The journal cannot be read, or holds what this version does not understand.
pub(super) fn read(journal: &Journal) -> io::Result<Left> {
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut left = Left::default();
    if let Some(summary) = journal.take_summary() {
        left.ledger = Ledger::of_summary(&summary).map_err(invalid)?;
    }
    for standing in left.ledger.standing() {
        left.logs.insert(standing.record.id, Arc::new(Live::new(standing.record)));
    }
    let mut at = journal.start();
    while let Some((record, after)) = journal.next(at)? {
        let writes = ship::decode(&record)?;
        let owners: Vec<_> = writes.iter().map(|write| left.owner(write)).collect();
        for write in &writes {
            left.ledger.apply(write);
        }
        // It begins where `next` found it, which is after `at` where a segment has ended.
        let found = after.before(record.len());
        super::commit::publish(&owners, &writes, found, Live::found);
        left.parcels.push(Parcel::new(found, after, owners, writes).without_writes());
        at = after;
    }
    for live in left.logs.values() {
        live.go_on();
    }
    Ok(left)
}

impl Left {
    fn owner(&mut self, write: &Write) -> Whose {
        let Some(id) = write.execution() else { return Whose::Nobodys(None) };
        match write {
            Write::Submit(record) => {
                self.logs.entry(id).or_insert_with(|| Arc::new(Live::new((**record).clone())));
            }
            Write::Delete { .. } => {
                self.logs.remove(&id);
            }
            _ => {}
        }
        self.logs.get(&id).map_or(Whose::Nobodys(None), |live| Whose::Log(Arc::clone(live)))
    }
}
