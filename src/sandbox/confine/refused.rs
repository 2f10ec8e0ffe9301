//! Connects that the gate refused: how many to which address, since they were last told.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long what was refused is gathered before it is told, once something was told: a loop of attempts must not become
/// one of reports.
const GATHER: Duration = Duration::from_millis(100);
/// How many addresses are told apart in that time; what is beyond is counted together.
const MOST: usize = 64;

/// See the module. The key `None` is for all that are not told apart.
#[derive(Default)]
pub(in crate::sandbox) struct Refused {
    counts: BTreeMap<Option<SocketAddr>, u64>,
    told: Option<Instant>,
}

impl Refused {
    /// One more.
    pub(super) fn note(&mut self, to: SocketAddr) {
        let key = Some(to);
        let key = if self.counts.len() < MOST || self.counts.contains_key(&key) { key } else { None };
        *self.counts.entry(key).or_default() += 1;
    }

    /// How long until there is something to tell. `None`: nothing was refused.
    pub(in crate::sandbox) fn due(&self) -> Option<Duration> {
        let wait = || self.told.map_or(Duration::ZERO, |told| GATHER.saturating_sub(told.elapsed()));
        (!self.counts.is_empty()).then(wait)
    }

    /// What was refused since the last time. It counts as told.
    pub(in crate::sandbox) fn take(&mut self) -> impl Iterator<Item = (Option<SocketAddr>, u64)> {
        self.told = Some(Instant::now());
        std::mem::take(&mut self.counts).into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gathered_is_bounded_and_counted_whole() {
        let mut refused = Refused::default();
        assert_eq!(refused.due(), None);
        for _ in 0..2 {
            for port in 0..1000 {
                refused.note(SocketAddr::from(([192, 0, 2, 1], port)));
            }
            // At once, where it is the first; and soon in any case.
            assert!(refused.due().is_some_and(|due| due <= GATHER && (due.is_zero() || refused.told.is_some())));
            let taken: Vec<_> = refused.take().collect();
            assert_eq!(taken.len(), MOST + 1);
            assert_eq!(taken.iter().map(|(_, count)| count).sum::<u64>(), 1000);
            assert_eq!(taken[0], (None, 1000 - MOST as u64));
            assert_eq!(refused.due(), None);
        }
    }
}
