//! Who sessions run as: each has a user of its own for as long as it exists, its process alive or parked.
//!
//! A user is given out again only when what had it before is proven to have ended and its directories are gone, and never
//! while any process of the machine has it.

use crate::sandbox::User;
use std::collections::{BTreeSet, VecDeque};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

/// The users of sessions. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Identities {
    free: Arc<Mutex<VecDeque<u32>>>,
}

/// A user that nobody else gets until it is given back. One that is only dropped is never given out again, since nobody
/// has said that nothing of it is left.
#[derive(Debug)]
pub(super) struct Identity {
    uid: u32,
    free: Arc<Mutex<VecDeque<u32>>>,
}

impl Identities {
    pub(super) fn new(range: RangeInclusive<u32>) -> Self {
        Self { free: Arc::new(Mutex::new(range.collect())) }
    }

    /// The one that has been free for longest and that no process has, of which `busy` tells; `None` where there is none.
    pub(super) fn take(&self, busy: impl FnOnce() -> BTreeSet<u32>) -> Option<Identity> {
        let busy = busy();
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let at = free.iter().position(|uid| !busy.contains(uid))?;
        let uid = free.remove(at)?;
        drop(free);
        Some(Identity { uid, free: Arc::clone(&self.free) })
    }

    /// One that an earlier life gave out and that its directories still have; `None` where it is not one of these, or in
    /// use.
    pub(super) fn take_back(&self, uid: u32, busy: impl FnOnce() -> BTreeSet<u32>) -> Option<Identity> {
        let busy = busy();
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let at = free.iter().position(|free| *free == uid && !busy.contains(free))?;
        free.remove(at)?;
        drop(free);
        Some(Identity { uid, free: Arc::clone(&self.free) })
    }
}

impl Identity {
    /// The user, with this group as its only one.
    pub(super) fn user(&self, gid: u32) -> User {
        User { uid: self.uid, gid }
    }

    /// Gives it back: nothing runs as it any more, and nothing private of it is left.
    pub(super) fn free(self) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push_back(self.uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_given_once_and_comes_back_last() {
        let identities = Identities::new(7..=9);
        let take = |busy: &[u32]| identities.take(|| busy.iter().copied().collect());
        let uid = |identity: Option<Identity>| identity.unwrap().user(1);
        let first = take(&[]).unwrap();
        assert_eq!(uid(take(&[])), User { uid: 8, gid: 1 }, "and is lost when nobody gives it back");
        first.free();
        assert_eq!(uid(take(&[9])).uid, 7, "not the one that some process has");
        assert!(take(&[9]).is_none());
        assert_eq!(uid(take(&[])).uid, 9);
        assert!(take(&[]).is_none());
    }
}
