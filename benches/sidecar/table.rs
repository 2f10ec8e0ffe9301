//! Samples, and how they are printed.

/// A named row of samples.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    name: String,
    samples: Vec<f64>,
}

impl Row {
    pub(crate) fn new(name: &str, samples: Vec<f64>) -> Self {
        let mut samples = samples;
        samples.sort_by(f64::total_cmp);
        Self { name: name.to_owned(), samples }
    }

    /// The value below which `part` (0 to 1) of the samples lie.
    pub(crate) fn quantile(&self, part: f64) -> f64 {
        let last = self.samples.len().saturating_sub(1);
        self.samples.get((last as f64 * part).round() as usize).copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }
}

/// Which quantiles a table shows.
#[derive(Clone, Copy)]
pub(crate) enum Shown {
    /// min, median, max
    Spread,
    /// p50, p99, max
    Tail,
}

pub(crate) fn print(title: &str, unit: &str, shown: Shown, rows: &[Row]) {
    let columns: [(&str, f64); 3] = match shown {
        Shown::Spread => [("min", 0.0), ("median", 0.5), ("max", 1.0)],
        Shown::Tail => [("p50", 0.5), ("p99", 0.99), ("max", 1.0)],
    };
    let width = rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0).max(title.chars().count());
    let [a, b, c] = columns.map(|(name, _)| name);
    println!("{title:width$} {a:>10} {b:>10} {c:>10}  {unit:<4} n");
    for row in rows {
        let [a, b, c] = columns.map(|(_, part)| row.quantile(part));
        println!("{:width$} {a:>10.3} {b:>10.3} {c:>10.3}  {unit:<4} {}", row.name, row.samples.len());
    }
}

/// Says whether a target is met; `value` and `target` in the same unit.
pub(crate) fn target(what: &str, value: f64, target: f64, unit: &str) {
    let verdict = if value <= target { "met" } else { "MISSED" };
    println!("{what}: {value:.3}{unit}, target ≤ {target}{unit}: {verdict}");
}

/// The same where more is better; without a unit.
pub(crate) fn target_least(what: &str, value: f64, target: f64) {
    let verdict = if value >= target { "met" } else { "MISSED" };
    println!("{what}: {value:.3}, target ≥ {target}: {verdict}");
}
