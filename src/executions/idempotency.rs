//! Which submissions are known by their key: a submission that is sent again gets the first answer again.
//!
//! The keys of the last [`LIFE`] are in memory, so that a replay needs neither the queue nor the database. They are read
//! from the database at the start; a key that is submitted now joins them once its execution is durable. In between it is
//! *claimed*: whoever sends the same key meanwhile waits for what becomes of it.
//!
//! Whether a key's time is over is asked of the clock on the wall, since the time outlives this process. A clock that is
//! ahead for a while frees a key for as long as it is: the key is not forgotten sooner than this process has known it for
//! [`LIFE`] by a clock that never jumps.
//!
//! The keys are those of this sidecar's project. Two sidecars that serve one project at the same time do not know what the
//! other has taken since they started.

use crate::model::idempotency::KEY_LIFE as LIFE;
use crate::model::{ExecutionId, Fingerprint, Idempotency, IdempotencyKey, Submitted};
use chrono::{DateTime, Utc};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// The most keys that are remembered at once: some 30 MB, half as much again with the longest ones. Each stands for an
/// execution, so it takes a caller that submits more than one a second all day to get there.
pub(super) const MOST: u32 = 100_000;
/// How often those are forgotten that were known for so long.
const SWEEP: Duration = Duration::from_secs(3600);

/// A key with whose it is.
type Name = (String, IdempotencyKey);

/// All keys that are known.
#[derive(Debug)]
pub(super) struct Keys {
    most: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    slots: HashMap<Name, Slot>,
    swept: Instant,
}

#[derive(Debug)]
enum Slot {
    /// It is being submitted; the channel closes when that is decided.
    Claimed(watch::Receiver<()>),
    Taken {
        fingerprint: Fingerprint,
        submitted: Submitted,
        /// Since when it is known here.
        since: Instant,
    },
}

/// What is known of a submission's key.
#[derive(Debug)]
pub(super) enum Known {
    /// Nothing: the submission is the first one, and holds the key from now on.
    No(Claim),
    /// It was taken before.
    Yes(Submitted),
    /// It is being submitted; when the channel has closed, ask again.
    Soon(watch::Receiver<()>),
}

/// Why a key cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyError {
    /// It stands for a submission that asks for something else.
    Mismatch,
    /// As many keys are remembered as may.
    Full,
}

impl Keys {
    /// None yet, and never more than `most`.
    pub(super) fn new(most: u32) -> Self {
        let inner = Inner { slots: HashMap::new(), swept: Instant::now() };
        Self { most: usize::try_from(most).unwrap_or(usize::MAX), inner: Mutex::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers what was taken in an earlier life, the newest first: of several with one key it has it. A claim that
    /// was made before this was known is over: its submission is to be refused.
    pub(super) fn remember(&self, taken: Vec<(Idempotency, Submitted)>) {
        let mut inner = self.lock();
        for (idempotency, submitted) in taken {
            let slot = Slot::taken(idempotency.fingerprint, submitted);
            match inner.slots.entry(name(&idempotency)) {
                Entry::Occupied(known) if matches!(known.get(), Slot::Taken { .. }) => {}
                entry => drop(entry.insert_entry(slot)),
            }
        }
    }

    /// What is known of the key at this time; where that is nothing, it is claimed.
    ///
    /// # Errors
    /// [`KeyError`]
    pub(super) fn ask(self: &Arc<Self>, idempotency: Idempotency, now: DateTime<Utc>) -> Result<Known, KeyError> {
        let mut inner = self.lock();
        if inner.swept.elapsed() >= SWEEP {
            inner.swept = Instant::now();
            inner.slots.retain(|_, slot| !slot.is_long_known());
        }
        if inner.slots.len() >= self.most {
            inner.slots.retain(|_, slot| !slot.is_over(now));
        }
        let is_full = inner.slots.len() >= self.most;
        let (sender, receiver) = watch::channel(());
        match inner.slots.entry(name(&idempotency)) {
            Entry::Occupied(slot) if !slot.get().is_over(now) => match slot.get() {
                Slot::Claimed(decided) => return Ok(Known::Soon(decided.clone())),
                Slot::Taken { fingerprint, submitted, .. } if *fingerprint == idempotency.fingerprint => {
                    return Ok(Known::Yes(submitted.clone()));
                }
                Slot::Taken { .. } => return Err(KeyError::Mismatch),
            },
            Entry::Vacant(_) if is_full => return Err(KeyError::Full),
            entry => drop(entry.insert_entry(Slot::Claimed(receiver))),
        }
        drop(inner);
        Ok(Known::No(Claim { keys: Arc::clone(self), idempotency, _decided: sender }))
    }

    /// The execution is deleted: its key is free again, if it still has it.
    pub(super) fn forget(&self, idempotency: &Idempotency, id: ExecutionId) {
        if let Entry::Occupied(slot) = self.lock().slots.entry(name(idempotency))
            && matches!(slot.get(), Slot::Taken { submitted, .. } if submitted.id == id)
        {
            slot.remove();
        }
    }
}

fn name(idempotency: &Idempotency) -> Name {
    (idempotency.caller.clone(), idempotency.key.clone())
}

impl Slot {
    fn taken(fingerprint: Fingerprint, submitted: Submitted) -> Self {
        Self::Taken { fingerprint, submitted, since: Instant::now() }
    }

    fn is_over(&self, now: DateTime<Utc>) -> bool {
        matches!(self, Self::Taken { submitted, .. } if now - submitted.created_at >= LIFE)
    }

    fn is_long_known(&self) -> bool {
        matches!(self, Self::Taken { since, .. } if since.elapsed() >= LIFE.to_std().unwrap_or_default())
    }
}

/// A key whose first submission is on its way. Where this is dropped the submission was refused, and the key is free.
#[derive(Debug)]
pub(super) struct Claim {
    keys: Arc<Keys>,
    idempotency: Idempotency,
    /// Dropped last, after the key's slot has changed.
    _decided: watch::Sender<()>,
}

impl Claim {
    /// What goes into the execution's record.
    pub(super) fn idempotency(&self) -> &Idempotency {
        &self.idempotency
    }

    /// The submission was taken: from now on the key stands for it.
    pub(super) fn taken(self, submitted: Submitted) {
        let slot = Slot::taken(self.idempotency.fingerprint, submitted);
        self.keys.lock().slots.insert(name(&self.idempotency), slot);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Entry::Occupied(slot) = self.keys.lock().slots.entry(name(&self.idempotency))
            && matches!(slot.get(), Slot::Claimed(_))
        {
            slot.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{SessionId, TaskId};
    use chrono::TimeDelta;

    fn at(hours: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 0).unwrap() + TimeDelta::hours(hours)
    }

    fn asked(caller: &str, key: &str, body: u8) -> Idempotency {
        Idempotency { caller: caller.to_owned(), key: key.parse().unwrap(), fingerprint: Fingerprint([body; 32]) }
    }

    fn submitted(now: DateTime<Utc>) -> Submitted {
        Submitted { id: ExecutionId::new(), task_id: TaskId::new(), session_id: SessionId::new(), created_at: now }
    }

    fn claim(keys: &Arc<Keys>, idempotency: Idempotency, now: DateTime<Utc>) -> Claim {
        match keys.ask(idempotency, now).unwrap() {
            Known::No(claim) => claim,
            other => panic!("{other:?}"),
        }
    }

    fn take(keys: &Arc<Keys>, idempotency: Idempotency, now: DateTime<Utc>) -> Submitted {
        let submitted = submitted(now);
        claim(keys, idempotency, now).taken(submitted.clone());
        submitted
    }

    fn replayed(keys: &Arc<Keys>, idempotency: Idempotency, now: DateTime<Utc>) -> Submitted {
        match keys.ask(idempotency, now).unwrap() {
            Known::Yes(submitted) => submitted,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_key_stands_for_its_first_submission_for_24_hours() {
        let keys = Arc::new(Keys::new(10));
        let first = take(&keys, asked("me", "k", 1), at(0));
        let last_moment = at(24) - TimeDelta::milliseconds(1);
        for now in [at(0), at(12), last_moment] {
            assert_eq!(replayed(&keys, asked("me", "k", 1), now), first);
            assert!(matches!(keys.ask(asked("me", "k", 2), now), Err(KeyError::Mismatch)));
        }
        let second = take(&keys, asked("me", "k", 2), at(24));
        assert_eq!(replayed(&keys, asked("me", "k", 2), last_moment + TimeDelta::hours(24)), second);
        drop(claim(&keys, asked("me", "k", 1), at(48)));
    }

    #[test]
    fn keys_are_each_callers_own() {
        let keys = Arc::new(Keys::new(10));
        let mine = take(&keys, asked("me", "k", 1), at(0));
        let yours = take(&keys, asked("you", "k", 2), at(0));
        assert_eq!(replayed(&keys, asked("me", "k", 1), at(1)), mine);
        assert_eq!(replayed(&keys, asked("you", "k", 2), at(1)), yours);
    }

    #[tokio::test]
    async fn who_comes_meanwhile_waits_and_a_refusal_is_not_remembered() {
        let keys = Arc::new(Keys::new(10));
        let first = claim(&keys, asked("me", "k", 1), at(0));
        for body in [1, 2] {
            let Known::Soon(decided) = keys.ask(asked("me", "k", body), at(0)).unwrap() else { panic!() };
            assert!(decided.has_changed().is_ok(), "it is not decided yet");
        }
        let Known::Soon(mut decided) = keys.ask(asked("me", "k", 2), at(0)).unwrap() else { panic!() };
        drop(first);
        assert!(decided.changed().await.is_err());
        // Refused: the next one is the first, whatever it asks for.
        let second = claim(&keys, asked("me", "k", 2), at(0));
        let Known::Soon(mut decided) = keys.ask(asked("me", "k", 2), at(0)).unwrap() else { panic!() };
        let taken = submitted(at(0));
        second.taken(taken.clone());
        assert!(decided.changed().await.is_err());
        assert_eq!(replayed(&keys, asked("me", "k", 2), at(0)), taken);
    }

    #[test]
    fn what_becomes_known_while_it_is_claimed_stays_known() {
        let keys = Arc::new(Keys::new(10));
        let [newest, oldest] = [submitted(at(2)), submitted(at(1))];
        let claim = claim(&keys, asked("me", "k", 1), at(3));
        keys.remember(vec![(asked("me", "k", 1), newest.clone()), (asked("me", "k", 1), oldest)]);
        assert_eq!(replayed(&keys, asked("me", "k", 1), at(3)), newest);
        drop(claim);
        assert_eq!(replayed(&keys, asked("me", "k", 1), at(3)), newest);
    }

    #[test]
    fn a_deleted_execution_takes_its_key_with_it_and_no_other() {
        let keys = Arc::new(Keys::new(10));
        let first = take(&keys, asked("me", "k", 1), at(0));
        let second = take(&keys, asked("me", "k", 1), at(30));
        keys.forget(&asked("me", "k", 1), first.id);
        assert_eq!(replayed(&keys, asked("me", "k", 1), at(31)), second);
        keys.forget(&asked("me", "k", 1), second.id);
        keys.forget(&asked("me", "never", 1), second.id);
        drop(claim(&keys, asked("me", "k", 7), at(31)));
    }

    #[test]
    fn they_are_bounded_and_make_room_when_their_time_is_over() {
        let keys = Arc::new(Keys::new(2));
        let first = take(&keys, asked("me", "a", 1), at(0));
        let second = claim(&keys, asked("me", "b", 1), at(10));
        assert!(matches!(keys.ask(asked("me", "c", 1), at(10)), Err(KeyError::Full)));
        assert_eq!(replayed(&keys, asked("me", "a", 1), at(10)), first);
        second.taken(submitted(at(10)));
        assert!(matches!(keys.ask(asked("me", "c", 1), at(23)), Err(KeyError::Full)));
        take(&keys, asked("me", "c", 1), at(24));
        assert_eq!(keys.lock().slots.len(), 2);
    }

    #[test]
    fn of_an_earlier_life_the_newest_has_the_key() {
        let keys = Arc::new(Keys::new(10));
        let (newest, older) = (submitted(at(2)), submitted(at(0)));
        keys.remember(vec![(asked("me", "k", 2), newest.clone()), (asked("me", "k", 1), older)]);
        assert_eq!(replayed(&keys, asked("me", "k", 2), at(3)), newest);
        assert!(matches!(keys.ask(asked("me", "k", 1), at(3)), Err(KeyError::Mismatch)));
    }
}
