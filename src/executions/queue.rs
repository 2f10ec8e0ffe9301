//! Admission: how many executions run at once, and who waits behind them. Pure.

use crate::model::ExecutionId;
use std::collections::VecDeque;

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
    queue: VecDeque<(ExecutionId, T)>,
}

impl<T> Admission<T> {
    /// `max_running` at once and `max_queued` behind them.
    pub(super) fn new(max_running: usize, max_queued: usize) -> Self {
        Self { max_running, max_queued, running: 0, reserved: 0, queue: VecDeque::new() }
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
    pub(super) fn enqueue(&mut self, id: ExecutionId, item: T) {
        self.release();
        self.queue.push_back((id, item));
    }

    /// The next one whose turn it is, if a slot is free; the slot is taken then, until [`Self::finished`].
    pub(super) fn start_next(&mut self) -> Option<(ExecutionId, T)> {
        if self.running >= self.max_running {
            return None;
        }
        let next = self.queue.pop_front()?;
        self.running += 1;
        Some(next)
    }

    /// Gives a slot back.
    pub(super) fn finished(&mut self) {
        self.running = self.running.saturating_sub(1);
    }

    /// Takes one out of the queue that has not started; `None` where it is not in it.
    pub(super) fn remove(&mut self, id: ExecutionId) -> Option<T> {
        let at = self.queue.iter().position(|(queued, _)| *queued == id)?;
        self.queue.remove(at).map(|(_, item)| item)
    }

    /// Takes all out that have not started.
    pub(super) fn drain(&mut self) -> Vec<(ExecutionId, T)> {
        self.queue.drain(..).collect()
    }

    /// How many are before this one, itself counted: 1 is next. `None` where it does not wait.
    pub(super) fn position(&self, id: ExecutionId) -> Option<usize> {
        self.queue.iter().position(|(queued, _)| *queued == id).map(|at| at + 1)
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
        queue.enqueue(id, ());
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
        queue.finished();
        assert_eq!(queue.start_next().unwrap().0, ids[3]);
        assert_eq!(queue.drain().len(), 1);
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
        queue.finished();
        put(&mut queue, ExecutionId::new()).unwrap();
    }
}
