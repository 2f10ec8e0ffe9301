//! What was refused: each host and port once, with a count.

use super::Target;
use std::collections::BTreeMap;

/// How many hosts and ports are told apart; what is beyond is counted together.
const MOST: usize = 64;
/// An attempt is told when there were so many times more than were told.
const STEP: u64 = 10;

/// Why a host is not reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// No entry of the list is about it.
    NotAllowed,
    /// It is at no address that the entry about it can mean.
    NotPublic,
    /// It was asked for without TLS.
    PlainHttp,
    /// The session has as many connections as it may.
    TooMany,
    /// It was not asked of the proxy: the sandbox refused it.
    Direct,
}

impl Why {
    /// The word, for programs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotAllowed => "not_allowed",
            Self::NotPublic => "not_public",
            Self::PlainHttp => "plain_http",
            Self::TooMany => "too_many_connections",
            Self::Direct => "direct",
        }
    }

    /// A sentence without its end, for people.
    pub fn sentence(self, target: &str) -> String {
        match self {
            Self::NotAllowed => format!("{target} may not be reached from this session"),
            Self::NotPublic => format!("{target} has no address that may be reached by that name"),
            Self::PlainHttp => format!("{target} was asked for by http, and only https is let out"),
            Self::TooMany => format!("{target} may not be reached now: the session has too many connections"),
            Self::Direct => format!("{target} was tried without the proxy, which is the session's one way out"),
        }
    }
}

/// Attempts that were refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The host, in normal form, and the port; `None` for all beyond those that are told apart.
    pub target: Option<(String, u16)>,
    /// Why the last one was.
    pub why: Why,
    /// How many there were so far.
    pub count: u64,
}

#[derive(Debug)]
struct Seen {
    why: Why,
    count: u64,
    told: u64,
}

impl Seen {
    fn is_due(&self) -> bool {
        self.told == 0 || self.count >= self.told.saturating_mul(STEP)
    }
}

/// Those of one execution. The key `None` is for all that are not told apart.
#[derive(Debug, Default)]
pub(super) struct Refusals(BTreeMap<Option<(String, u16)>, Seen>);

impl Refusals {
    /// So many more; `None` for some that nobody told apart. Gives whether it is to be told now.
    pub(super) fn note(&mut self, target: Option<&Target>, why: Why, count: u64) -> bool {
        let key = target.map(|target| (target.host().to_string(), target.port()));
        let key = if self.0.len() < MOST || self.0.contains_key(&key) { key } else { None };
        let seen = self.0.entry(key).or_insert(Seen { why, count: 0, told: 0 });
        seen.why = why;
        seen.count += count;
        seen.is_due()
    }

    /// Whether anything is to be told now.
    pub(super) fn has_due(&self) -> bool {
        self.0.values().any(Seen::is_due)
    }

    /// What is to be told now, or all that was not told. It counts as told then.
    pub(super) fn take(&mut self, all: bool) -> Vec<Refusal> {
        let wanted = self.0.iter_mut().filter(|(_, seen)| seen.is_due() || all && seen.count > seen.told);
        let taken = wanted.map(|(target, seen)| {
            seen.told = seen.count;
            Refusal { target: target.clone(), why: seen.why, count: seen.count }
        });
        taken.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(text: &str) -> Target {
        Target::parse(text).unwrap()
    }

    #[test]
    fn a_loop_of_attempts_is_told_a_few_times_and_counted_whole() {
        let mut refusals = Refusals::default();
        let mut told = Vec::new();
        for _ in 0..12_345 {
            if refusals.note(Some(&target("a.example:443")), Why::NotAllowed, 1) {
                told.extend(refusals.take(false).iter().map(|refusal| refusal.count));
            }
            assert!(!refusals.has_due());
        }
        assert_eq!(told, [1, 10, 100, 1_000, 10_000]);
        let last = refusals.take(true);
        let target = Some(("a.example".to_owned(), 443));
        assert_eq!(last, [Refusal { target, why: Why::NotAllowed, count: 12_345 }]);
        assert_eq!(refusals.take(true), []);
    }

    #[test]
    fn many_hosts_are_told_apart_up_to_a_bound() {
        let mut refusals = Refusals::default();
        let mut told = 0;
        for at in 0..10_000 {
            if refusals.note(Some(&target(&format!("h{at}.example:1"))), Why::NotPublic, 1) {
                told += refusals.take(false).len();
            }
        }
        // One each, and the rest at 1, 10, 100, 1000.
        assert_eq!((refusals.0.len(), told), (MOST + 1, MOST + 4));
        let rest = refusals.take(true);
        let count = 10_000 - MOST as u64;
        assert_eq!(rest, [Refusal { target: None, why: Why::NotPublic, count }]);
    }

    #[test]
    fn ports_of_a_host_are_told_apart() {
        let mut refusals = Refusals::default();
        let mut note = |text: &str, why| refusals.note(Some(&target(text)), why, 1);
        assert!(note("A.example:1", Why::NotAllowed));
        assert!(note("a.example:2", Why::PlainHttp));
        assert!(note("a.example.:1", Why::TooMany), "the first is not told yet");
        let counts: Vec<_> = refusals.take(false).into_iter().map(|r| (r.target.unwrap().1, r.count, r.why)).collect();
        assert_eq!(counts, [(1, 2, Why::TooMany), (2, 1, Why::PlainHttp)]);
    }
}
