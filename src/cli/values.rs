//! Values of arguments: how they are written, and what is wrong with them.

use crate::model::ExecutionId;
use chrono::{DateTime, NaiveDate, NaiveTime, TimeDelta, Utc};
use std::time::Duration;
use uuid::Uuid;

/// An execution's id.
pub(super) fn execution_id(text: &str) -> Result<ExecutionId, String> {
    text.parse::<Uuid>().map(ExecutionId).map_err(|_| "an execution's id is a UUID".to_owned())
}

/// A time: `90` or `90s`, `15m`, `2h`, `3d`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match &text[digits.len()..] {
        "" | "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3600),
        "d" => Some(86_400),
        _ => None,
    };
    let seconds = digits.parse::<u64>().ok().zip(unit).and_then(|(number, unit)| number.checked_mul(unit));
    seconds.map(Duration::from_secs).ok_or_else(|| "expected seconds, or a number with s, m, h or d".to_owned())
}

/// A point in time: as RFC 3339, as a date (its beginning, UTC), or as a time ago such as `2h`.
pub(super) fn moment(text: &str) -> Result<DateTime<Utc>, String> {
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Ok(time.to_utc());
    }
    if let Ok(date) = text.parse::<NaiveDate>() {
        return Ok(date.and_time(NaiveTime::MIN).and_utc());
    }
    let ago = duration(text).ok().filter(|_| !text.ends_with(|c: char| c.is_ascii_digit()));
    ago.and_then(|ago| Utc::now().checked_sub_signed(TimeDelta::from_std(ago).ok()?)).ok_or_else(|| {
        "expected a time (RFC 3339), a date (2026-11-21), or a time ago such as 90m, 2h or 3d".to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("15m", 900), ("2h", 7200), ("3d", 259_200), ("0", 0)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "m", "-5", "1.5h", "5 m", "5w", "5ü", "99999999999999999999", "9999999999999999999d"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn moments_are_times_dates_and_ago() {
        let text = |text: &str| moment(text).unwrap().to_rfc3339();
        assert_eq!(text("2026-11-21T02:08:23+02:00"), "2026-11-21T00:08:23+00:00");
        assert_eq!(text("2026-11-21"), "2026-11-21T00:00:00+00:00");
        let then = moment("2h").unwrap();
        let ago = Utc::now() - then;
        assert!((7200..7260).contains(&ago.num_seconds()), "{ago}");
        for bad in ["", "yesterday", "2026", "2026-13-01", "9999999999d"] {
            assert!(moment(bad).is_err(), "{bad}");
        }
    }
}
