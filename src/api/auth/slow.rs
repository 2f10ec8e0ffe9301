//! Slows attempts that fail, by the address that they come from.
//!
//! Only the answer to a failed attempt waits, after it was judged, so a good credential never does. Waiting costs memory
//! and a connection: so few may wait, and beyond that there is an answer at once. The table is bounded, and whoever has
//! a network of his own counts as one.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// How failed attempts are slowed.
#[derive(Clone, Copy, Debug)]
pub struct Slowing {
    /// Failures of an address that cost nothing: a mistake, or a credential that was just replaced.
    pub free: u32,
    /// The wait of the first one after them; each further one waits twice as long.
    pub first: Duration,
    /// The longest wait.
    pub longest: Duration,
    /// How many of one address may wait at once.
    pub per_address: usize,
    /// How many may wait in all.
    pub waiting: usize,
    /// An address without a failure for so long is forgotten.
    pub forget: Duration,
    /// The most addresses that are remembered.
    pub addresses: usize,
}

impl Default for Slowing {
    fn default() -> Self {
        Self {
            free: 5,
            first: Duration::from_millis(100),
            longest: Duration::from_secs(1),
            per_address: 8,
            waiting: 128,
            forget: Duration::from_secs(300),
            addresses: 4096,
        }
    }
}

/// Who it is: one IPv4 address, or one IPv6 network of 64 bits, since whoever has one address of it has them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Origin {
    V4(u32),
    V6(u64),
    /// The connection did not say.
    Unknown,
}

impl Origin {
    pub(crate) fn of(peer: Option<IpAddr>) -> Self {
        match peer.map(|ip| ip.to_canonical()) {
            None => Self::Unknown,
            Some(IpAddr::V4(ip)) => Self::V4(ip.to_bits()),
            Some(IpAddr::V6(ip)) => {
                let [a, b, c, d, ..] = ip.segments().map(u64::from);
                Self::V6(a << 48 | b << 32 | c << 16 | d)
            }
        }
    }
}

#[derive(Debug)]
struct Failures {
    count: u32,
    last: Instant,
    places: Arc<Semaphore>,
}

/// The failures of late. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Attempts {
    limits: Slowing,
    table: Arc<Mutex<HashMap<Origin, Failures>>>,
    places: Arc<Semaphore>,
}

/// What becomes of the answer to a failed attempt.
#[derive(Debug)]
enum Turn {
    At(Instant, [OwnedSemaphorePermit; 2]),
    Now,
    /// As many wait as may.
    TooMany,
}

impl Attempts {
    pub(super) fn new(limits: Slowing) -> Self {
        Self { limits, table: Arc::default(), places: Arc::new(Semaphore::new(limits.waiting)) }
    }

    /// Counts a failure, and returns when it may be answered. False: at once, and as one too many.
    pub(super) async fn failed(&self, peer: Option<IpAddr>) -> bool {
        match self.turn(Origin::of(peer), Instant::now()) {
            Turn::At(when, _places) => {
                tokio::time::sleep_until(when).await;
                true
            }
            Turn::Now => true,
            Turn::TooMany => false,
        }
    }

    fn turn(&self, origin: Origin, now: Instant) -> Turn {
        // Whoever panicked while he held it, left the table whole.
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if !table.contains_key(&origin) && table.len() >= self.limits.addresses {
            self.make_room(&mut table, now);
        }
        let failures = table.entry(origin).or_insert_with(|| Failures {
            count: 0,
            last: now,
            places: Arc::new(Semaphore::new(self.limits.per_address)),
        });
        if now.duration_since(failures.last) >= self.limits.forget {
            failures.count = 0;
        }
        failures.count = failures.count.saturating_add(1);
        failures.last = now;
        let Some(beyond) = failures.count.checked_sub(self.limits.free.saturating_add(1)) else { return Turn::Now };
        let places = Arc::clone(&failures.places).try_acquire_owned();
        let (Ok(own), Ok(all)) = (places, Arc::clone(&self.places).try_acquire_owned()) else { return Turn::TooMany };
        let wait = self.limits.first.saturating_mul(2u32.saturating_pow(beyond)).min(self.limits.longest);
        Turn::At(now + wait, [own, all])
    }

    /// Forgets whom it may, else the one whose last failure is the oldest.
    fn make_room(&self, table: &mut HashMap<Origin, Failures>, now: Instant) {
        table.retain(|_, failures| now.duration_since(failures.last) < self.limits.forget);
        if table.len() >= self.limits.addresses {
            let oldest = table.iter().min_by_key(|(_, failures)| failures.last).map(|(origin, _)| *origin);
            oldest.map(|origin| table.remove(&origin));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(ip: &str) -> Origin {
        Origin::of(Some(ip.parse().unwrap()))
    }

    /// How long the answer waits; `None` where too many do.
    fn wait(attempts: &Attempts, ip: &str, now: Instant) -> Option<Duration> {
        match attempts.turn(origin(ip), now) {
            Turn::At(when, _) => Some(when - now),
            Turn::Now => Some(Duration::ZERO),
            Turn::TooMany => None,
        }
    }

    #[test]
    fn an_address_is_a_network() {
        assert_eq!(origin("10.0.0.1"), origin("::ffff:10.0.0.1"));
        assert_ne!(origin("10.0.0.1"), origin("10.0.0.2"));
        assert_eq!(origin("2001:db8:1:2::1"), origin("2001:db8:1:2:ffff::9"));
        assert_ne!(origin("2001:db8:1:2::1"), origin("2001:db8:1:3::1"));
    }

    #[test]
    fn waits_grow_to_a_second_and_are_forgotten() {
        let attempts = Attempts::new(Slowing::default());
        let now = Instant::now();
        let waits: Vec<_> = (0..12).map(|_| wait(&attempts, "10.0.0.1", now).unwrap().as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 0, 0, 100, 200, 400, 800, 1000, 1000, 1000]);
        assert_eq!(wait(&attempts, "10.0.0.2", now), Some(Duration::ZERO), "another one is another one");
        let later = now + Slowing::default().forget;
        assert_eq!(wait(&attempts, "10.0.0.1", later), Some(Duration::ZERO));
    }

    #[test]
    fn few_wait() {
        let limits = Slowing { free: 0, per_address: 2, waiting: 3, ..Slowing::default() };
        let attempts = Attempts::new(limits);
        let now = Instant::now();
        let turn = |ip: &str| attempts.turn(origin(ip), now);
        let held = [turn("10.0.0.1"), turn("10.0.0.1")];
        assert!(matches!(turn("10.0.0.1"), Turn::TooMany), "of one address");
        let other = turn("10.0.0.2");
        assert!(matches!(other, Turn::At(..)));
        assert!(matches!(turn("10.0.0.3"), Turn::TooMany), "of all");
        drop(held);
        assert!(matches!(turn("10.0.0.3"), Turn::At(..)));
    }

    #[test]
    fn the_table_is_bounded() {
        let limits = Slowing { free: 0, addresses: 3, ..Slowing::default() };
        let attempts = Attempts::new(limits);
        let now = Instant::now();
        for (second, ip) in ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"].into_iter().enumerate() {
            wait(&attempts, ip, now + Duration::from_secs(second as u64));
        }
        let table = attempts.table.lock().unwrap();
        assert!(table.len() == 3 && !table.contains_key(&origin("10.0.0.1")), "{table:?}");
        drop(table);
        wait(&attempts, "10.0.0.5", now + Duration::from_secs(3) + limits.forget);
        assert_eq!(attempts.table.lock().unwrap().len(), 1);
    }
}
