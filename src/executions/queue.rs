//! Admission: how many executions run at once, and who waits behind them. Pure.

use crate::model::{ExecutionId, SessionId};
use std::collections::{HashSet, VecDeque};

/// The queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

/// Who runs and who waits, in the order of arrival.
#[derive(Debug)]
pub(super) struct Admission<T> {
    max_running: usize,
    max_queued: usize,
    /// Slots given out, by `start_next` or `reserve`.
    running: usize,
    /// Places held for submissions that are not durable yet.
    reserved: usize,
    queue: VecDeque<Waiting<T>>,
    /// Sessions that run an execution now: the next one of each waits for it.
    busy: HashSet<SessionId>,
}

#[derive(Debug)]
struct Waiting<T> {
    id: ExecutionId,
    /// The session that it has to run in; `None` where it gets one of its own.
    session: Option<SessionId>,
    item: T,
}

impl<T> Admission<T> {
    /// `max_running` at once and `max_queued` behind them.
    pub(super) fn new(max_running: usize, max_queued: usize) -> Self {
        Self { max_running, max_queued, running: 0, reserved: 0, queue: VecDeque::new(), busy: HashSet::new() }
    }

    /// Holds a place for one more, until [`Self::enqueue`] or [`Self::release`].
    ///
    /// # Errors
    /// [`Full`] where it would neither run nor find room in the queue.
    pub(super) fn reserve(&mut self) -> Result<(), Full> {
        let room = self.max_queued + self.max_running.saturating_sub(self.running);
        if self.queue.len() + self.reserved >= room {
            return Err(Full);
        }
        self.reserved += 1;
        Ok(())
    }

    /// Gives a held place back.
    pub(super) fn release(&mut self) {
        self.reserved = self.reserved.saturating_sub(1);
    }

    /// Puts one at the end of the line, on a place that was held for it.
    pub(super) fn enqueue(&mut self, id: ExecutionId, session: Option<SessionId>, item: T) {
        self.release();
        self.queue.push_back(Waiting { id, session, item });
    }

    /// Puts one at the end of the line that had its place in an earlier life, whether there is room or not.
    pub(super) fn put_back(&mut self, id: ExecutionId, item: T) {
        self.queue.push_back(Waiting { id, session: None, item });
    }

    /// The next one whose turn it is, if a slot is free; the slot is taken then, until [`Self::finished`]. One whose
    /// session is busy lets the others pass.
    pub(super) fn start_next(&mut self) -> Option<(ExecutionId, T)> {
        if self.running >= self.max_running {
            return None;
        }
        let free = |waiting: &Waiting<T>| waiting.session.is_none_or(|session| !self.busy.contains(&session));
        let at = self.queue.iter().position(free)?;
        let next = self.queue.remove(at)?;
        self.running += 1;
        self.busy.extend(next.session);
        Some((next.id, next.item))
    }

    /// Takes a slot at once, past nobody who waits; for a session, where it is to run an execution on it.
    ///
    /// # Errors
    /// [`Full`] where it would have to wait.
    pub(super) fn start_now(&mut self, session: Option<SessionId>) -> Result<(), Full> {
        if self.queue.len() + self.reserved + self.running >= self.max_running {
            return Err(Full);
        }
        self.running += 1;
        self.busy.extend(session);
        Ok(())
    }

    /// Gives a slot back.
    pub(super) fn finished(&mut self, session: Option<SessionId>) {
        self.running = self.running.saturating_sub(1);
        if let Some(session) = session {
            self.busy.remove(&session);
        }
    }

    /// Takes one out of the queue that has not started; `None` where it is not in it.
    pub(super) fn remove(&mut self, id: ExecutionId) -> Option<T> {
        let at = self.queue.iter().position(|waiting| waiting.id == id)?;
        self.queue.remove(at).map(|waiting| waiting.item)
    }

    /// Takes all out that have not started.
    pub(super) fn drain(&mut self) -> Vec<T> {
        self.queue.drain(..).map(|waiting| waiting.item).collect()
    }

    /// How many are before this one, itself counted: 1 is next. `None` where it does not wait.
    pub(super) fn position(&self, id: ExecutionId) -> Option<usize> {
        self.queue.iter().position(|waiting| waiting.id == id).map(|at| at + 1)
    }

    /// How many run.
    pub(super) fn running(&self) -> usize {
        self.running
    }

    /// How many wait.
    pub(super) fn queued(&self) -> usize {
        self.queue.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(queue: &mut Admission<()>, id: ExecutionId) -> Result<(), Full> {
        queue.reserve()?;
        queue.enqueue(id, None, ());
        Ok(())
    }

    #[test]
    fn first_come_first_served_and_no_more_than_allowed() {
        let ids: Vec<_> = (0..6).map(|_| ExecutionId::new()).collect();
        let mut queue = Admission::new(2, 2);
        for id in &ids[..4] {
            put(&mut queue, *id).unwrap();
        }
        assert_eq!(put(&mut queue, ids[4]), Err(Full));
        assert_eq!(queue.start_next().unwrap().0, ids[0]);
        assert_eq!(queue.start_next().unwrap().0, ids[1]);
        assert!(queue.start_next().is_none());
        assert_eq!((queue.running(), queue.queued()), (2, 2));
        assert_eq!(put(&mut queue, ids[4]), Err(Full));
        assert_eq!(queue.position(ids[3]), Some(2));
        assert_eq!(queue.remove(ids[2]), Some(()));
        assert_eq!(queue.remove(ids[2]), None);
        put(&mut queue, ids[4]).unwrap();
        assert_eq!(put(&mut queue, ids[5]), Err(Full));
        queue.finished(None);
        assert_eq!(queue.start_next().unwrap().0, ids[3]);
        assert_eq!(queue.drain().len(), 1);
    }

    #[test]
    fn a_session_runs_one_after_another_and_holds_up_nobody_else() {
        let ids: Vec<_> = (0..4).map(|_| ExecutionId::new()).collect();
        let (one, two) = (SessionId::new(), SessionId::new());
        let mut queue = Admission::new(3, 5);
        for (id, session) in ids.iter().zip([Some(one), Some(one), Some(two), None]) {
            queue.reserve().unwrap();
            queue.enqueue(*id, session, ());
        }
        let started: Vec<_> = std::iter::from_fn(|| queue.start_next()).map(|(id, ())| id).collect();
        assert_eq!(started, [ids[0], ids[2], ids[3]]);
        queue.finished(None);
        assert!(queue.start_next().is_none(), "the session is busy");
        assert_eq!(queue.start_now(Some(SessionId::new())), Err(Full), "somebody waits");
        queue.finished(Some(one));
        assert_eq!(queue.start_next().unwrap().0, ids[1]);
        queue.start_now(Some(SessionId::new())).unwrap();
        assert_eq!(queue.start_now(Some(SessionId::new())), Err(Full));
    }

    #[test]
    fn a_held_place_counts() {
        let mut queue: Admission<()> = Admission::new(1, 1);
        queue.reserve().unwrap();
        queue.reserve().unwrap();
        assert_eq!(queue.reserve(), Err(Full));
        queue.release();
        queue.reserve().unwrap();
        assert_eq!(queue.queued(), 0);
    }

    #[test]
    fn without_a_queue_only_free_slots_count() {
        let mut queue = Admission::new(1, 0);
        put(&mut queue, ExecutionId::new()).unwrap();
        assert_eq!(put(&mut queue, ExecutionId::new()), Err(Full));
        queue.start_next().unwrap();
        assert_eq!(put(&mut queue, ExecutionId::new()), Err(Full));
        queue.finished(None);
        put(&mut queue, ExecutionId::new()).unwrap();
    }
}
