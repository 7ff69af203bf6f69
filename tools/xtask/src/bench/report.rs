//! The table of results, the same as JSON, and which promises do not hold.

use std::fmt;

use serde_json::{Value, json};

use super::facts::Facts;
use super::stats::Samples;

/// What a figure has to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Promise {
    /// It is only shown.
    None,
    /// At most this share of QEMU's.
    RatioAtMost(f64),
    /// At least this share of QEMU's.
    RatioAtLeast(f64),
    /// At most this, whatever QEMU's is.
    AtMost(f64),
}

/// What a figure counts: a time and a rate measured in the testbed mean nothing, bytes and events do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Seconds, or per second.
    Timed,
    /// Bytes or events.
    Counted,
}

/// One thing measured on both monitors.
pub struct Row {
    /// `boot.userspace`, ….
    pub name: String,
    /// Of the values.
    pub unit: &'static str,
    /// See there.
    pub kind: Kind,
    /// See there.
    pub promise: Promise,
    /// Civic's.
    pub ours: Samples,
    /// QEMU's.
    pub peer: Samples,
    /// Which QEMU: a key of [`Report::commands`].
    pub peer_name: String,
    /// What of that QEMU, if there is a choice.
    pub how: String,
}

impl Row {
    /// The ratios of the rounds. What drifts from round to round, such as how busy the host is, is none of a ratio's.
    fn ratios(&self) -> Samples {
        self.ours.values().iter().zip(self.peer.values()).map(|(ours, peer)| ours / peer).collect()
    }

    /// The median of the rounds' ratios.
    pub fn ratio(&self) -> f64 {
        self.ratios().median()
    }

    /// In how many of the rounds, by themselves, the promise holds.
    fn held(&self) -> usize {
        let count = |of: &Samples, holds: &dyn Fn(f64) -> bool| of.values().iter().filter(|v| holds(**v)).count();
        match self.promise {
            Promise::None => 0,
            Promise::RatioAtMost(limit) => count(&self.ratios(), &|ratio| ratio <= limit),
            Promise::RatioAtLeast(limit) => count(&self.ratios(), &|ratio| ratio >= limit),
            Promise::AtMost(limit) => count(&self.ours, &|value| value <= limit),
        }
    }

    /// What is wrong, if the promise is broken. A figure that is not a number breaks every promise.
    fn broken(&self) -> Option<String> {
        let (ratio, name) = (self.ratio(), &self.name);
        let said = match self.promise {
            Promise::None => return None,
            Promise::RatioAtMost(limit) if ratio <= limit => return None,
            Promise::RatioAtMost(limit) => format!("{ratio:.2} of QEMU's, promised at most {limit}"),
            Promise::RatioAtLeast(limit) if ratio >= limit => return None,
            Promise::RatioAtLeast(limit) => format!("{ratio:.2} of QEMU's, promised at least {limit}"),
            Promise::AtMost(limit) if self.ours.median() <= limit => return None,
            Promise::AtMost(limit) => format!("{:.2} {}, promised at most {limit}", self.ours.median(), self.unit),
        };
        Some(format!("{name}: {said}"))
    }
}

/// All that was measured on a host.
pub struct Report {
    facts: Facts,
    rows: Vec<Row>,
    /// QEMU's command lines, and Civic's, by name.
    commands: Vec<(String, String)>,
    left_out: Vec<String>,
}

impl Report {
    /// An empty one.
    pub fn new(facts: Facts) -> Self {
        Self { facts, rows: Vec::new(), commands: Vec::new(), left_out: Vec::new() }
    }

    /// Adds a result.
    pub fn add(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Whether there is any.
    pub fn has_rows(&self) -> bool {
        !self.rows.is_empty()
    }

    /// Adds a command line.
    pub fn command(&mut self, name: &str, line: String) {
        if !self.commands.iter().any(|c| c.0 == name) {
            self.commands.push((name.to_owned(), line));
        }
    }

    /// Says what is not measured, and why; at once, and again below the table.
    pub fn leave_out(&mut self, what: &str) {
        super::progress(&format!("LEFT OUT: {what}"));
        self.left_out.push(what.to_owned());
    }

    /// The promises that do not hold, a line each.
    pub fn broken(&self) -> Vec<String> {
        self.rows.iter().filter_map(Row::broken).collect()
    }

    /// The rows for programs.
    pub fn json(&self) -> Value {
        let row = |r: &Row| {
            let command = self.commands.iter().find(|c| c.0 == r.peer_name).map(|c| c.1.as_str());
            json!({
                "name": r.name, "unit": r.unit, "n": r.ours.n(), "p50": r.ours.median(), "p90": r.ours.quantile(0.9),
                "p99": r.ours.quantile(0.99), "max": r.ours.max(), "peer": r.peer.median(), "ratio": r.ratio(),
                "ratio_p25": r.ratios().quantile(0.25), "ratio_p75": r.ratios().quantile(0.75),
                "where": self.facts.place(), "command": command, "samples": r.ours.values(), "peer_samples": r.peer.values(),
            })
        };
        self.rows.iter().map(row).collect()
    }
}

const COLUMNS: [&str; 13] = [
    "name",
    "unit",
    "n",
    "p50",
    "p90",
    "p99",
    "max",
    "peer's p50",
    "ratio",
    "from..to",
    "spread",
    "peer's spread",
    "held",
];

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f)?;
        for (name, fact) in &self.facts.lines {
            writeln!(f, "{name:>9}  {fact}")?;
        }
        let mut table = vec![COLUMNS.map(str::to_owned).to_vec()];
        for r in &self.rows {
            let mark = if self.facts.testbed && r.kind == Kind::Timed { "*" } else { "" };
            let value = |v: f64| format!("{}{mark}", three_digits(v));
            let percent = |v: f64| if v.is_finite() { format!("{:.0}%", v * 100.0) } else { "-".to_owned() };
            let quantiles =
                [r.ours.median(), r.ours.quantile(0.9), r.ours.quantile(0.99), r.ours.max(), r.peer.median()];
            let mut line = vec![r.name.clone(), r.unit.to_owned(), r.ours.n().to_string()];
            line.extend(quantiles.map(value));
            let ratios = r.ratios();
            line.push(format!("{:.2}", r.ratio()));
            line.push(format!("{:.2}..{:.2}", ratios.quantile(0.25), ratios.quantile(0.75)));
            line.extend([percent(r.ours.spread()), percent(r.peer.spread())]);
            let held = if r.promise == Promise::None { "-".to_owned() } else { format!("{}/{}", r.held(), r.ours.n()) };
            line.push(held);
            table.push(line);
        }
        let width = |column: usize| table.iter().map(|line| line[column].len()).max().unwrap_or(0);
        let widths: Vec<_> = (0..COLUMNS.len()).map(width).collect();
        writeln!(f)?;
        let peer = |r: &Row| format!("{} {}", r.peer_name, r.how).trim().to_owned();
        let peers = std::iter::once("peer".to_owned()).chain(self.rows.iter().map(peer));
        for (line, peer) in table.iter().zip(peers) {
            let cell = |(i, text): (usize, &String)| {
                let width = widths[i];
                if i < 2 { format!("{text:<width$}") } else { format!("{text:>width$}") }
            };
            let cells: Vec<_> = line.iter().enumerate().map(cell).collect();
            writeln!(f, "{}  {peer}", cells.join("  ").trim_end())?;
        }
        writeln!(
            f,
            "ratio: the median of the rounds' ratios, A to B each once; from..to: the middle half of those ratios"
        )?;
        writeln!(f, "spread: the middle half's width over the median; quantiles are of the values, by nearest rank")?;
        writeln!(f, "held: rounds in which the promise holds by itself; the ratio decides")?;
        if self.facts.testbed {
            writeln!(f, "*: MEANINGLESS but for the ratio: the host is emulated, and its time is the CPU time it had")?;
        }
        for (name, line) in &self.commands {
            writeln!(f, "\n{name}:\n  {line}")?;
        }
        writeln!(f)?;
        for what in &self.left_out {
            writeln!(f, "LEFT OUT: {what}")?;
        }
        for line in self.broken() {
            writeln!(f, "BROKEN: {line}")?;
        }
        let promised = self.rows.iter().filter(|r| r.promise != Promise::None).count();
        writeln!(f, "{} of {promised} promises hold", promised - self.broken().len())
    }
}

fn three_digits(v: f64) -> String {
    match v.abs() {
        x if x >= 100.0 => format!("{v:.0}"),
        x if x >= 10.0 => format!("{v:.1}"),
        _ => format!("{v:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(promise: Promise, kind: Kind, ours: f64, peer: f64) -> Row {
        let samples = |v: f64| [v].into_iter().collect();
        let (ours, peer) = (samples(ours), samples(peer));
        Row { name: "a.b".into(), unit: "MiB", kind, promise, ours, peer, peer_name: "q".into(), how: String::new() }
    }

    #[test]
    fn promises() {
        let check = |promise, ours, peer, holds: bool| {
            let said = row(promise, Kind::Timed, ours, peer).broken();
            assert_eq!(said.is_none(), holds, "{said:?}");
        };
        check(Promise::RatioAtMost(0.75), 75.0, 100.0, true);
        check(Promise::RatioAtMost(0.75), 76.0, 100.0, false);
        check(Promise::RatioAtLeast(0.9), 90.0, 100.0, true);
        check(Promise::RatioAtLeast(0.9), 89.0, 100.0, false);
        check(Promise::AtMost(8.0), 8.0, f64::NAN, true);
        check(Promise::AtMost(8.0), 8.1, 100.0, false);
        check(Promise::RatioAtLeast(0.9), f64::NAN, 1.0, false);
        check(Promise::RatioAtMost(0.9), 1.0, f64::NAN, false);
        check(Promise::None, f64::NAN, f64::NAN, true);
    }

    #[test]
    fn a_ratio_is_of_what_was_measured_in_the_same_round() {
        let row = Row {
            ours: [1.0, 20.0, 300.0, 4.0].into_iter().collect(),
            peer: [1.0, 10.0, 100.0, 8.0].into_iter().collect(),
            ..row(Promise::RatioAtLeast(1.0), Kind::Timed, 0.0, 0.0)
        };
        assert_eq!((row.ratio(), row.held(), row.broken()), (1.5, 3, None));
    }

    #[test]
    fn times_from_the_testbed_are_marked_and_counts_are_not() {
        let facts = |testbed| Facts { testbed, lines: vec![("host", "h".into())] };
        let mut report = Report::new(facts(true));
        report.add(row(Promise::RatioAtMost(0.75), Kind::Timed, 1.0, 2.0));
        report.add(row(Promise::AtMost(0.5), Kind::Counted, 1.0, 2.0));
        report.command("q", "qemu -x".into());
        let text = report.to_string();
        let lines: Vec<_> = text.lines().filter(|l| l.starts_with("a.b")).collect();
        assert!(lines[0].contains("1.00*") && lines[0].contains("2.00*") && lines[0].contains("0.50 "), "{text}");
        assert!(!lines[1].contains('*'), "{text}");
        assert!(text.contains("BROKEN: a.b: 1.00 MiB, promised at most 0.5\n1 of 2 promises hold"), "{text}");
        assert_eq!(report.json()[0]["command"], "qemu -x");
        assert_eq!(report.json()[0]["where"], "testbed");
        let mut report = Report::new(facts(false));
        report.add(row(Promise::None, Kind::Timed, 1.0, 2.0));
        assert!(!report.to_string().contains('*'));
    }
}
