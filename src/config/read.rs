//! Reads single variables and gathers what is wrong with them. A value never gets into a message.

use super::reference::{self, REFERENCE};
use super::{ConfigError, ConfigErrors, VISIBLE_ASCII, is_visible_ascii};
use crate::model::destination::{Destinations, Ports};
use crate::secrets::Source;
use secrecy::SecretString;
use std::ffi::OsString;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

pub(super) struct Reader<'a> {
    source: &'a dyn Fn(&str) -> Option<OsString>,
    errors: Vec<ConfigError>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(source: &'a dyn Fn(&str) -> Option<OsString>) -> Self {
        Self { source, errors: Vec::new() }
    }

    pub(super) fn fail(&mut self, variables: &[&'static str], problem: impl Into<String>) {
        self.errors.push(ConfigError { variables: variables.to_vec(), problem: problem.into() });
    }

    /// The value, or all errors in the reference's order.
    pub(super) fn finish<T>(mut self, value: T) -> Result<T, ConfigErrors> {
        if self.errors.is_empty() {
            return Ok(value);
        }
        let place = |error: &ConfigError| {
            let first = error.variables.first().copied().unwrap_or_default();
            REFERENCE.iter().position(|v| v.name == first).unwrap_or(usize::MAX)
        };
        self.errors.sort_by_key(place);
        Err(ConfigErrors(self.errors))
    }

    fn raw(&self, name: &str) -> Option<OsString> {
        (self.source)(name).filter(|value| !value.is_empty())
    }

    pub(super) fn is_set(&self, name: &str) -> bool {
        self.raw(name).is_some()
    }

    /// Whether nothing is wrong with any of them so far.
    pub(super) fn is_good(&self, names: &[&str]) -> bool {
        !self.errors.iter().any(|error| error.variables.iter().any(|v| names.contains(v)))
    }

    pub(super) fn refuse_if_set(&mut self, name: &'static str, problem: &str) {
        if self.is_set(name) {
            self.fail(&[name], problem);
        }
    }

    /// A variable without a default.
    pub(super) fn optional<T>(
        &mut self,
        name: &'static str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let parsed = self.raw(name)?.to_str().and_then(parse);
        if parsed.is_none() {
            self.fail(&[name], format!("expected {expected}"));
        }
        parsed
    }

    /// A variable with the default of the reference; `spare` only stands in until the errors are reported.
    fn required<T>(&mut self, name: &'static str, spare: T, expected: &str, parse: impl Fn(&str) -> Option<T>) -> T {
        if self.is_set(name) {
            return self.optional(name, expected, parse).unwrap_or(spare);
        }
        match reference::default_of(name).and_then(parse) {
            Some(value) => value,
            // A mistake in the reference; a test reads all defaults.
            None => {
                self.fail(&[name], "has no default that can be read");
                spare
            }
        }
    }

    pub(super) fn parsed<T: FromStr>(&mut self, name: &'static str, spare: T, expected: &str) -> T {
        self.required(name, spare, expected, |text| text.parse().ok())
    }

    pub(super) fn matching(&mut self, name: &'static str, expected: &str, fits: impl Fn(&str) -> bool) -> String {
        self.required(name, String::new(), expected, |text| fits(text).then(|| text.to_owned()))
    }

    pub(super) fn number<T: FromStr + PartialOrd + Copy + Display>(
        &mut self,
        name: &'static str,
        least: T,
        most: T,
    ) -> T {
        let expected = format!("a whole number from {least} to {most}");
        self.required(name, least, &expected, |text| number(text, least, most))
    }

    /// A number that goes by two names. Both may be set if they agree.
    pub(super) fn either<T: FromStr + PartialOrd + Copy + Display>(
        &mut self,
        name: &'static str,
        other: &'static str,
        least: T,
        most: T,
    ) -> T {
        let expected = format!("a whole number from {least} to {most}");
        let parse = |text: &str| number(text, least, most);
        let second = self.optional(other, &expected, parse);
        if !self.is_set(name) {
            return second.unwrap_or_else(|| self.number(name, least, most));
        }
        let first = self.optional(name, &expected, parse);
        if let (Some(first), Some(second)) = (first, second)
            && first != second
        {
            self.fail(&[name, other], "are two names of one setting and differ; set one of them");
        }
        first.unwrap_or(least)
    }

    pub(super) fn seconds(&mut self, name: &'static str, most: u64) -> Duration {
        let expected = format!("whole seconds from 1 to {most}");
        self.required(name, Duration::ZERO, &expected, |text| number(text, 1, most).map(Duration::from_secs))
    }

    pub(super) fn bytes(&mut self, name: &'static str, least: u64, most: u64) -> u64 {
        let expected = format!("bytes from {least} to {most}, such as 33554432 or 32 MiB");
        self.required(name, 0, &expected, |text| bytes(text).filter(|bytes| (least..=most).contains(bytes)))
    }

    pub(super) fn optional_bytes(&mut self, name: &'static str, least: u64, most: u64) -> Option<u64> {
        let expected = format!("bytes from {least} to {most}, such as 1073741824 or 1 GiB");
        self.optional(name, &expected, |text| bytes(text).filter(|bytes| (least..=most).contains(bytes)))
    }

    pub(super) fn optional_number(&mut self, name: &'static str, least: u64, most: u64) -> Option<u64> {
        let expected = format!("a whole number from {least} to {most}");
        self.optional(name, &expected, |text| number(text, least, most))
    }

    /// Words of a list, separated by commas.
    pub(super) fn words(&mut self, name: &'static str, known: &[&str]) -> Vec<String> {
        let expected = format!("names separated by commas, each one of {}", known.join(", "));
        self.required(name, Vec::new(), &expected, |text| {
            let words: Vec<String> = text.split(',').map(|word| word.trim().to_owned()).collect();
            words.iter().all(|word| known.contains(&word.as_str())).then_some(words)
        })
    }

    /// Hosts, separated by commas. Those of the default, which no operator has written, only where they are public. Each bad
    /// one is told by its place.
    pub(super) fn destinations(&mut self, name: &'static str, ports: Ports) -> Destinations {
        let is_set = self.is_set(name);
        let Some(list) = self.raw(name).or_else(|| reference::default_of(name).map(OsString::from)) else {
            return Destinations::default();
        };
        // What is not UTF-8 is no host either way.
        let list = list.to_string_lossy();
        match Destinations::parse(&list, ports) {
            Ok(destinations) if is_set => destinations,
            Ok(destinations) => destinations.public_only(),
            Err(_) => {
                let bad: Vec<_> = Destinations::faults(&list, ports).iter().map(ToString::to_string).collect();
                let expected = match ports {
                    Ports::Required => "host:port or *.suffix:port, separated by commas",
                    Ports::Optional => "hosts separated by commas, as models.example, 10.0.0.7:8080 or *.example:443",
                };
                self.fail(&[name], format!("{}; expected {expected}", bad.join("; ")));
                Destinations::default()
            }
        }
    }

    pub(super) fn word<T: Copy>(&mut self, name: &'static str, words: &[(&str, T)]) -> T {
        // The words are constants of the caller, never none.
        let spare = words[0].1;
        self.required(name, spare, &one_of(words), |text| find(words, text))
    }

    pub(super) fn optional_word<T: Copy>(&mut self, name: &'static str, words: &[(&str, T)]) -> Option<T> {
        self.optional(name, &one_of(words), |text| find(words, text))
    }

    /// True where the variable says `word`, false where it is not set.
    pub(super) fn flag(&mut self, name: &'static str, word: &str) -> bool {
        let expected = format!("`{word}`, or not set");
        self.optional(name, &expected, |text| (text == word).then_some(())).is_some()
    }

    pub(super) fn path(&self, name: &'static str) -> Option<PathBuf> {
        self.raw(name).map(PathBuf::from)
    }

    pub(super) fn directory(&mut self, name: &'static str) -> PathBuf {
        let path = self.path(name).or_else(|| reference::default_of(name).map(PathBuf::from)).unwrap_or_default();
        if !path.is_absolute() {
            self.fail(&[name], "expected an absolute path");
        }
        path
    }

    pub(super) fn secret(&mut self, name: &'static str) -> Option<SecretString> {
        self.optional(name, VISIBLE_ASCII, |text| is_visible_ascii(text).then(|| SecretString::from(text)))
    }

    /// A credential that is given, or the file that has it; not both.
    pub(super) fn credential(
        &mut self,
        name: &'static str,
        file: &'static str,
        expected: &str,
        fits: impl Fn(&str) -> bool,
    ) -> Option<Source> {
        let given = self.optional(name, expected, |text| fits(text).then(|| Source::Given(SecretString::from(text))));
        let from = self.credential_file(file);
        if self.is_set(name) && self.is_set(file) {
            self.fail(&[name, file], "are two forms of one setting; set one of them");
        }
        given.or(from)
    }

    /// A file that is read later, and again when it changes.
    pub(super) fn credential_file(&mut self, name: &'static str) -> Option<Source> {
        let path = self.path(name)?;
        if !path.is_absolute() {
            self.fail(&[name], "expected an absolute path");
        }
        Some(Source::File(path))
    }

    pub(super) fn database_url(&mut self, name: &'static str) -> Option<SecretString> {
        self.optional(name, "a URL of postgres:// or postgresql://", |text| {
            let url = url::Url::parse(text).ok()?;
            matches!(url.scheme(), "postgres" | "postgresql").then(|| SecretString::from(text))
        })
    }

    pub(super) fn port_range(&mut self, name: &'static str) -> RangeInclusive<u16> {
        let expected = "a range of ports from 1024 to 65535, such as 20000-20999";
        self.required(name, 1024..=1024, expected, |text| {
            let (from, to) = text.split_once('-')?;
            let (from, to) = (from.trim().parse::<u16>().ok()?, to.trim().parse::<u16>().ok()?);
            (from >= 1024 && from <= to).then_some(from..=to)
        })
    }

    /// No user that a system gives to people or services (below 1000), and not those that mean nobody.
    pub(super) fn uid_range(&mut self, name: &'static str) -> RangeInclusive<u32> {
        const NOBODY: [u32; 2] = [65_534, 65_535];
        let most = u32::MAX - 1;
        let expected = format!("a range of user ids from 1000 to {most} without 65534 and 65535, such as 61000-63999");
        self.required(name, 1000..=1000, &expected, |text| {
            let (from, to) = text.split_once('-')?;
            let (from, to) = (number(from.trim(), 1000, most)?, number(to.trim(), 1000, most)?);
            let range = from..=to;
            (!range.is_empty() && !NOBODY.iter().any(|nobody| range.contains(nobody))).then_some(range)
        })
    }
}

fn number<T: FromStr + PartialOrd>(text: &str, least: T, most: T) -> Option<T> {
    // `parse` takes a plus sign too.
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|number| digits && (least..=most).contains(number))
}

/// `1048576`, `1 MiB`, `1Mi`.
fn bytes(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let factor = match unit.trim() {
        "" | "B" => 1,
        "KiB" | "Ki" => 1 << 10,
        "MiB" | "Mi" => 1 << 20,
        "GiB" | "Gi" => 1 << 30,
        "TiB" | "Ti" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

fn find<T: Copy>(words: &[(&str, T)], text: &str) -> Option<T> {
    words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value)
}

fn one_of<T>(words: &[(&str, T)]) -> String {
    let words: Vec<_> = words.iter().map(|(word, _)| format!("`{word}`")).collect();
    format!("one of {}", words.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, want) in [
            ("0", Some(0)),
            ("1000000", Some(1_000_000)),
            ("1 KiB", Some(1024)),
            ("64Mi", Some(64 << 20)),
            ("2GiB", Some(2 << 30)),
            ("1 TiB", Some(1 << 40)),
            ("", None),
            ("MiB", None),
            ("-1", None),
            ("1.5 MiB", None),
            ("1 MB", None),
            ("99999999999999999999", None),
            ("99999999999 TiB", None),
        ] {
            assert_eq!(bytes(text), want, "{text}");
        }
    }
}
