//! A history as a table: whole columns that fit the terminal, and no id that is cut.

use super::{DIM, one_line, status, status_style};
use chrono::{DateTime, Utc};
use serde_json::Value;
use std::io::{self, Write};

/// Between two columns.
const GAP: usize = 2;

/// The columns in their order. The number says which are given up first where the terminal is narrow, the highest; 0
/// stays whatever comes.
const COLUMNS: [(&str, u8); 7] =
    [("CREATED", 2), ("EXECUTION", 0), ("STATUS", 0), ("DURATION", 1), ("TOKENS", 3), ("TASK", 4), ("SESSION", 5)];

/// Which of [`COLUMNS`] has the status.
const STATUS: usize = 2;

fn cells(row: &Value) -> [String; COLUMNS.len()] {
    let text = |name: &str| one_line(row[name].as_str().unwrap_or("–"));
    let state = status(&text("status"), row["reason"].as_str().map(one_line).as_deref());
    let progress = row["progress"].as_u64().filter(|_| row["reason"].is_null());
    let usage = &row["usage"];
    [
        time(&text("created_at")),
        text("execution_id"),
        progress.map_or(state.clone(), |percent| format!("{state} {percent}%")),
        row["duration_ms"].as_u64().map_or("–".to_owned(), duration),
        format!("{}/{}", usage["input_tokens"].as_u64().unwrap_or(0), usage["output_tokens"].as_u64().unwrap_or(0)),
        text("task_id"),
        text("session_id"),
    ]
}

/// To the second; UTC, as everywhere.
fn time(text: &str) -> String {
    match text.parse::<DateTime<Utc>>() {
        Ok(time) => time.format("%Y-%m-%d %H:%M:%SZ").to_string(),
        Err(_) => text.to_owned(),
    }
}

fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..60 => format!("{seconds}.{} s", ms % 1000 / 100),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// Prints rows of the history. `width` is the terminal's, in columns; without one all columns are printed. Returns the
/// names of those that found no room.
///
/// # Errors
/// Where the output is gone.
pub fn table(out: &mut impl Write, rows: &[Value], width: Option<usize>) -> io::Result<Vec<&'static str>> {
    let rows: Vec<_> = rows.iter().map(cells).collect();
    let widths: Vec<usize> = (0..COLUMNS.len())
        .map(|i| rows.iter().map(|row| row[i].chars().count()).fold(COLUMNS[i].0.len(), usize::max))
        .collect();
    let mut shown: Vec<usize> = (0..COLUMNS.len()).collect();
    let needed = |shown: &[usize]| shown.iter().map(|i| widths[*i] + GAP).sum::<usize>() - GAP;
    while width.is_some_and(|width| needed(&shown) > width)
        && let Some(least) = shown.iter().copied().max_by_key(|i| COLUMNS[*i].1).filter(|i| COLUMNS[*i].1 > 0)
    {
        shown.retain(|i| *i != least);
    }
    let pad = |i: usize, last: bool, text: &str| match last {
        true => text.to_owned(),
        false => format!("{text:<width$}", width = widths[i] + GAP),
    };
    let is_last = |i: usize| shown.last() == Some(&i);
    let head: String = shown.iter().map(|i| pad(*i, is_last(*i), COLUMNS[*i].0)).collect();
    writeln!(out, "{DIM}{head}{DIM:#}")?;
    for row in &rows {
        for &i in &shown {
            let text = pad(i, is_last(i), &row[i]);
            if i == STATUS {
                let style = status_style(row[i].split(' ').next().unwrap_or_default());
                write!(out, "{style}{text}{style:#}")?;
            } else {
                write!(out, "{text}")?;
            }
        }
        writeln!(out)?;
    }
    Ok((0..COLUMNS.len()).filter(|i| !shown.contains(i)).map(|i| COLUMNS[i].0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const ID: &str = "01a1fbdc-a3e3-7549-9b4c-044938b8d484";

    fn print(width: Option<usize>) -> (String, Vec<&'static str>) {
        let row = |status: &str, reason: Option<&str>, ms: Option<u64>| {
            json!({ "created_at": "2026-11-21T02:08:23.523Z", "execution_id": ID, "task_id": ID, "session_id": ID,
                "status": status, "reason": reason, "progress": 40, "duration_ms": ms,
                "usage": { "input_tokens": 700, "output_tokens": 140 } })
        };
        let rows = [
            row("running", None, Some(125_000)),
            row("failed", Some("sandbox_unavailable"), None),
            row("completed", Some("finished"), Some(13_687)),
        ];
        let mut out = anstream::StripStream::new(Vec::new());
        let left_out = table(&mut out, &rows, width).unwrap();
        (String::from_utf8(out.into_inner()).unwrap(), left_out)
    }

    #[test]
    fn all_of_it_without_a_terminal() {
        let (text, left_out) = print(None);
        assert!(left_out.is_empty());
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("CREATED               EXECUTION "), "{text}");
        assert!(lines[1].contains(&format!("2026-11-21 02:08:23Z  {ID}  running 40% ")), "{text}");
        assert!(lines[1].contains("2 min 05 s  700/140  "), "{text}");
        assert!(lines[2].contains("failed (sandbox_unavailable)  –"), "{text}");
        assert!(lines[3].contains("13.6 s") && lines[3].ends_with(&format!("{ID}  {ID}")), "{text}");
    }

    #[test]
    fn whole_columns_fit_and_no_id_is_cut() {
        for width in [66, 80, 100, 120, 150, 200] {
            let (text, left_out) = print(Some(width));
            assert!(text.lines().all(|line| line.chars().count() <= width), "{width}:\n{text}");
            assert_eq!(text.matches("01a1fbdc").count(), text.matches(ID).count(), "{text}");
            assert_eq!(left_out.is_empty(), width >= 200, "{left_out:?}");
        }
        // Nothing is cut for a terminal that is narrower than an id and a status.
        let (text, left_out) = print(Some(20));
        assert_eq!(text.matches(ID).count(), 3, "{text}");
        assert_eq!(left_out, ["CREATED", "DURATION", "TOKENS", "TASK", "SESSION"]);
    }
}
