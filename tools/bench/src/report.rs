//! The table of results, the same as [`Record`]s, and which promises do not hold.

use std::cmp::Ordering;
use std::fmt;

use crate::facts::Facts;
use crate::record::{Floor, Record, Where};
use crate::stats::Samples;

/// So many values at most go into a record.
const SAMPLES: usize = 500;

/// What a figure has to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Promise {
    /// It is only shown.
    None,
    /// At most this share of the peer's.
    RatioAtMost(f64),
    /// At least this share of the peer's.
    RatioAtLeast(f64),
    /// These quantiles are at most so much, whatever the peer's are.
    AtMost(&'static [(f64, f64)]),
}

/// What a figure counts: a time and a rate measured in the testbed mean nothing, bytes, events and shares do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Seconds, or per second.
    Timed,
    /// Bytes, events, or shares.
    Counted,
}

/// What a figure is compared with.
#[derive(Clone, Debug)]
pub struct Peer {
    name: String,
    how: String,
    values: Samples,
    /// Taken in turns with the figure's, so that each value belongs to one of them.
    in_turns: bool,
}

impl Peer {
    /// `name` may be a key of [`Report::command`]'s; `how` says what of it, if there is a choice. Its values were taken in turns.
    pub fn in_turns(name: impl Into<String>, how: impl Into<String>, values: Samples) -> Self {
        Self { name: name.into(), how: how.into(), values, in_turns: true }
    }

    /// Taken in the same run, but not in turns.
    pub fn of(name: impl Into<String>, values: Samples) -> Self {
        Self { name: name.into(), how: String::new(), values, in_turns: false }
    }

    fn words(&self) -> String {
        format!("{} {}", self.name, self.how).trim().to_owned()
    }
}

/// One thing measured.
#[derive(Clone, Debug)]
pub struct Row {
    name: String,
    unit: &'static str,
    kind: Kind,
    promise: Promise,
    ours: Samples,
    peer: Option<Peer>,
    floor: Option<Peer>,
}

impl Row {
    /// A time or a rate, of these values.
    pub fn new(name: impl Into<String>, unit: &'static str, ours: Samples) -> Self {
        Self { name: name.into(), unit, kind: Kind::Timed, promise: Promise::None, ours, peer: None, floor: None }
    }

    /// Something else.
    pub fn kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// With what it has to be.
    pub fn promised(mut self, promise: Promise) -> Self {
        self.promise = promise;
        self
    }

    /// With what it is compared with.
    pub fn beside(mut self, peer: Peer) -> Self {
        self.peer = Some(peer);
        self
    }

    /// With what of the machine's own there must be at least, in the same unit.
    pub fn above(mut self, floor: Peer) -> Self {
        self.floor = Some(floor);
        self
    }

    /// Another monitor's, or else the floor.
    fn compared(&self) -> Option<&Peer> {
        self.peer.as_ref().or(self.floor.as_ref())
    }

    /// The ratios of the rounds. What drifts from round to round, such as how busy the host is, is none of a ratio's. What was not
    /// taken in turns has one ratio, the medians'.
    fn ratios(&self) -> Samples {
        match self.compared() {
            Some(Peer { in_turns: true, values, .. }) => {
                self.ours.values().iter().zip(values.values()).map(|(ours, peer)| ours / peer).collect()
            }
            Some(peer) => [self.ours.median() / peer.values.median()].into_iter().collect(),
            None => Samples::default(),
        }
    }

    /// The median of the rounds' ratios.
    pub fn ratio(&self) -> f64 {
        self.ratios().median()
    }

    /// The quantile that is promised, if it is.
    fn at(&self, share: f64) -> f64 {
        if share == 0.5 { self.ours.median() } else { self.ours.quantile(share) }
    }

    /// In how many of the rounds, by themselves, the promise holds. None where that says nothing.
    fn held(&self) -> Option<String> {
        let count = |of: &Samples, holds: &dyn Fn(f64) -> bool| of.values().iter().filter(|v| holds(**v)).count();
        let ratios = self.ratios();
        let (held, of) = match self.promise {
            Promise::None => return None,
            Promise::RatioAtMost(limit) => (count(&ratios, &|ratio| ratio <= limit), ratios.n()),
            Promise::RatioAtLeast(limit) => (count(&ratios, &|ratio| ratio >= limit), ratios.n()),
            Promise::AtMost(limits) => {
                let (_, limit) = limits.iter().find(|(share, _)| *share == 0.5)?;
                (count(&self.ours, &|value| value <= *limit), self.ours.n())
            }
        };
        Some(format!("{held}/{of}"))
    }

    /// What is promised, in words.
    fn limits(&self) -> Option<String> {
        match self.promise {
            Promise::None => None,
            Promise::RatioAtMost(limit) => Some(format!("ratio <= {limit}")),
            Promise::RatioAtLeast(limit) => Some(format!("ratio >= {limit}")),
            Promise::AtMost(limits) => {
                let limits: Vec<_> = limits.iter().map(|(s, l)| format!("p{:.0} <= {l}", s * 100.0)).collect();
                Some(limits.join(", "))
            }
        }
    }

    /// What is wrong, if the promise is broken. A figure that is not a number breaks every promise.
    fn broken(&self) -> Option<String> {
        let (ratio, name) = (self.ratio(), &self.name);
        let said = match self.promise {
            Promise::None => return None,
            Promise::RatioAtMost(limit) if ratio <= limit => return None,
            Promise::RatioAtMost(limit) => format!("{ratio:.2} of the peer's, promised at most {limit}"),
            Promise::RatioAtLeast(limit) if ratio >= limit => return None,
            Promise::RatioAtLeast(limit) => format!("{ratio:.2} of the peer's, promised at least {limit}"),
            Promise::AtMost(limits) => {
                let within =
                    |value: f64, limit| matches!(value.partial_cmp(&limit), Some(Ordering::Less | Ordering::Equal));
                let over = limits.iter().filter(|(share, limit)| !within(self.at(*share), *limit));
                let text = |(share, limit): &(f64, f64)| {
                    format!("p{:.0} is {:.2} {}, promised at most {limit}", share * 100.0, self.at(*share), self.unit)
                };
                let over: Vec<_> = over.map(text).collect();
                if over.is_empty() {
                    return None;
                }
                over.join("; ")
            }
        };
        Some(format!("{name}: {said}"))
    }
}

/// All that was measured on a host.
pub struct Report {
    facts: Facts,
    /// The command that measures what is added now; and that of each row.
    command: String,
    rows: Vec<(Row, String)>,
    /// Command lines of the monitors, by name.
    commands: Vec<(String, String)>,
    left_out: Vec<String>,
    failed: Vec<String>,
}

impl Report {
    /// An empty one, of what `command` measures.
    pub fn new(facts: Facts, command: &str) -> Self {
        let command = command.to_owned();
        Self { facts, command, rows: Vec::new(), commands: Vec::new(), left_out: Vec::new(), failed: Vec::new() }
    }

    /// Adds a result.
    pub fn add(&mut self, row: Row) {
        self.rows.push((row, self.command.clone()));
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
        println!("bench: LEFT OUT: {what}");
        self.left_out.push(what.to_owned());
    }

    /// Says what could not be measured to its end: the report does not hold.
    pub fn fail(&mut self, what: &str) {
        println!("bench: FAILED: {what}");
        self.failed.push(what.to_owned());
    }

    /// What failed, and the promises that do not hold, a line each.
    pub fn broken(&self) -> Vec<String> {
        self.failed.iter().cloned().chain(self.rows.iter().filter_map(|(row, _)| row.broken())).collect()
    }

    /// The rows for programs.
    pub fn records(&self) -> Vec<Record> {
        let finite = |value: f64| value.is_finite().then_some(value);
        let few = |of: &Samples| if of.n() <= SAMPLES { of.values().to_vec() } else { Vec::new() };
        let record = |(row, command): &(Row, String)| {
            let (peer, ratios) = (row.compared(), row.ratios());
            let line = peer.and_then(|peer| self.commands.iter().find(|c| c.0 == peer.name)).map(|c| c.1.clone());
            let floor = |floor: &Peer| Floor {
                name: floor.words(),
                p50: finite(floor.values.median()),
                multiple: finite(row.ours.median() / floor.values.median()),
            };
            Record {
                name: row.name.clone(),
                unit: row.unit.to_owned(),
                n: row.ours.n(),
                p50: finite(row.ours.median()),
                p90: finite(row.ours.quantile(0.9)),
                p99: finite(row.ours.quantile(0.99)),
                max: finite(row.ours.max()),
                peer: peer.and_then(|peer| finite(peer.values.median())),
                ratio: finite(ratios.median()),
                place: self.facts.place,
                command: command.clone(),
                timed: row.kind == Kind::Timed,
                spread: finite(row.ours.spread()),
                beside: peer.map(Peer::words),
                peer_command: line,
                ratio_p25: finite(ratios.quantile(0.25)),
                ratio_p75: finite(ratios.quantile(0.75)),
                floor: row.floor.as_ref().map(floor),
                promised: row.limits(),
                broken: row.broken(),
                host: self.facts.lines.clone(),
                samples: few(&row.ours),
                peer_samples: peer.map_or_else(Vec::new, |peer| few(&peer.values)),
            }
        };
        self.rows.iter().map(record).collect()
    }
}

const COLUMNS: [&str; 15] = [
    "name",
    "unit",
    "n",
    "p50",
    "p90",
    "p99",
    "max",
    "spread",
    "peer's p50",
    "ratio",
    "from..to",
    "peer's spread",
    "x floor",
    "promised",
    "held",
];

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f)?;
        for (name, fact) in &self.facts.lines {
            writeln!(f, "{name:>9}  {fact}")?;
        }
        let testbed = self.facts.place == Where::Testbed;
        let mut table = vec![COLUMNS.map(str::to_owned).to_vec()];
        let none = || "-".to_owned();
        for (row, _) in &self.rows {
            let mark = if testbed && row.kind == Kind::Timed { "*" } else { "" };
            let value = |v: f64| if v.is_finite() { format!("{}{mark}", three_digits(v)) } else { none() };
            let percent = |v: f64| if v.is_finite() { format!("{:.0}%", v * 100.0) } else { none() };
            let share = |v: f64| if v.is_finite() { three_digits(v) } else { none() };
            let peer = row.compared();
            let mut line = vec![row.name.clone(), row.unit.to_owned(), row.ours.n().to_string()];
            line.extend(
                [row.ours.median(), row.ours.quantile(0.9), row.ours.quantile(0.99), row.ours.max()].map(value),
            );
            line.push(percent(row.ours.spread()));
            line.push(peer.map_or_else(none, |peer| value(peer.values.median())));
            let ratios = row.ratios();
            line.push(share(ratios.median()));
            let range = format!("{}..{}", share(ratios.quantile(0.25)), share(ratios.quantile(0.75)));
            line.push(if ratios.n() > 1 { range } else { none() });
            line.push(peer.map_or_else(none, |peer| percent(peer.values.spread())));
            let floor = row.floor.as_ref().map(|floor| share(row.ours.median() / floor.values.median()));
            line.extend([floor, row.limits(), row.held()].map(|cell| cell.unwrap_or_else(none)));
            table.push(line);
        }
        let width = |column: usize| table.iter().map(|line| line[column].len()).max().unwrap_or(0);
        let widths: Vec<_> = (0..COLUMNS.len()).map(width).collect();
        writeln!(f)?;
        let peer = |row: &Row| row.compared().map(Peer::words).unwrap_or_default();
        let peers = std::iter::once("peer".to_owned()).chain(self.rows.iter().map(|(row, _)| peer(row)));
        for (line, peer) in table.iter().zip(peers) {
            let cell = |(i, text): (usize, &String)| {
                let width = widths[i];
                if i < 2 { format!("{text:<width$}") } else { format!("{text:>width$}") }
            };
            let cells: Vec<_> = line.iter().enumerate().map(cell).collect();
            writeln!(f, "{}", format!("{}  {peer}", cells.join("  ")).trim_end())?;
        }
        writeln!(
            f,
            "ratio: the median of the rounds' ratios, A to B each once; from..to: the middle half of those ratios"
        )?;
        writeln!(f, "spread: the middle half's width over the median; quantiles are of the values, by nearest rank")?;
        writeln!(f, "held: rounds in which the promise holds by itself; the ratio, or the quantile, decides")?;
        if testbed {
            writeln!(f, "*: MEANINGLESS but for the ratio: the host is emulated, and its time is the CPU time it had")?;
        }
        for (name, line) in &self.commands {
            writeln!(f, "\n{name}:\n  {line}")?;
        }
        writeln!(f)?;
        for what in &self.left_out {
            writeln!(f, "LEFT OUT: {what}")?;
        }
        for what in &self.failed {
            writeln!(f, "FAILED: {what}")?;
        }
        let broken: Vec<_> = self.rows.iter().filter_map(|(row, _)| row.broken()).collect();
        for line in &broken {
            writeln!(f, "BROKEN: {line}")?;
        }
        let promised = self.rows.iter().filter(|(row, _)| row.promise != Promise::None).count();
        writeln!(f, "{} of {promised} promises hold", promised - broken.len())
    }
}

/// A number as it is shown in tables.
pub fn three_digits(v: f64) -> String {
    match v.abs() {
        x if x >= 100.0 => format!("{v:.0}"),
        x if x >= 10.0 => format!("{v:.1}"),
        x if x >= 0.1 || x == 0.0 => format!("{v:.2}"),
        _ => format!("{v:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        values.iter().copied().collect()
    }

    fn row(promise: Promise, kind: Kind, ours: f64, peer: f64) -> Row {
        let peer = Peer::in_turns("q", "", samples(&[peer]));
        Row::new("a.b", "MiB", samples(&[ours])).kind(kind).promised(promise).beside(peer)
    }

    fn facts(place: Where) -> Facts {
        Facts { place, lines: vec![("host".into(), "h".into())] }
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
        check(Promise::AtMost(&[(0.5, 8.0)]), 8.0, f64::NAN, true);
        check(Promise::AtMost(&[(0.5, 8.0)]), 8.1, 100.0, false);
        check(Promise::AtMost(&[(0.5, 9.0), (0.99, 8.0)]), 8.1, 100.0, false);
        check(Promise::AtMost(&[(0.5, 9.0)]), f64::NAN, 100.0, false);
        check(Promise::RatioAtLeast(0.9), f64::NAN, 1.0, false);
        check(Promise::RatioAtMost(0.9), 1.0, f64::NAN, false);
        check(Promise::None, f64::NAN, f64::NAN, true);
    }

    #[test]
    fn a_ratio_is_of_what_was_measured_in_the_same_round() {
        let ours = samples(&[1.0, 20.0, 300.0, 4.0]);
        let peers = samples(&[1.0, 10.0, 100.0, 8.0]);
        let row = Row::new("a", "s", ours.clone()).promised(Promise::RatioAtLeast(1.0));
        let in_turns = row.clone().beside(Peer::in_turns("q", "", peers.clone()));
        assert_eq!((in_turns.ratio(), in_turns.held(), in_turns.broken()), (1.5, Some("3/4".into()), None));
        let apart = row.beside(Peer::of("q", peers));
        assert_eq!((apart.ratio(), apart.held()), (12.0 / 9.0, Some("1/1".into())));
    }

    #[test]
    fn without_a_peer_a_figure_is_compared_with_its_floor() {
        let mut report = Report::new(facts(Where::Bare), "cargo xtask bench fork");
        let floor = || Peer::of("fork(2)", samples(&[20.0]));
        report.add(Row::new("fork.pause", "ms", samples(&[0.5, 0.5])).above(floor()));
        report
            .add(Row::new("fork.call", "ms", samples(&[1.0])).above(floor()).beside(Peer::of("q", samples(&[100.0]))));
        report.add(Row::new("fork.nothing", "ms", samples(&[])));
        let records = report.records();
        assert_eq!(
            (records[0].peer, records[0].ratio, records[0].beside.as_deref()),
            (Some(20.0), Some(0.025), Some("fork(2)"))
        );
        assert_eq!((records[1].ratio, records[1].floor.as_ref().unwrap().multiple), (Some(0.01), Some(0.05)));
        assert_eq!((records[2].n, records[2].p50, records[2].peer), (0, None, None));
    }

    #[test]
    fn the_list_has_what_readers_need_under_the_names_they_know() {
        let mut report = Report::new(facts(Where::Bare), "cargo xtask bench fork");
        report.add(row(Promise::None, Kind::Timed, 1.0, 2.0));
        let list = serde_json::to_value(report.records()).unwrap();
        for name in ["name", "unit", "n", "p50", "p90", "p99", "max", "peer", "ratio", "where", "command"] {
            assert!(!list[0][name].is_null(), "{name} in {list}");
        }
    }

    #[test]
    fn times_from_the_testbed_are_marked_and_counts_are_not() {
        let mut report = Report::new(facts(Where::Testbed), "cargo xtask bench boot");
        report.add(row(Promise::RatioAtMost(0.75), Kind::Timed, 1.0, 2.0));
        report.add(row(Promise::AtMost(&[(0.5, 0.5)]), Kind::Counted, 1.0, 2.0));
        report.command("q", "qemu -x".into());
        let text = report.to_string();
        let lines: Vec<_> = text.lines().filter(|l| l.starts_with("a.b")).collect();
        assert!(lines[0].contains("1.00*") && lines[0].contains("2.00*") && lines[0].contains("0.50 "), "{text}");
        assert!(!lines[1].contains('*'), "{text}");
        assert!(text.contains("BROKEN: a.b: p50 is 1.00 MiB, promised at most 0.5\n1 of 2 promises hold"), "{text}");
        let records = report.records();
        assert_eq!(records[0].peer_command.as_deref(), Some("qemu -x"));
        assert_eq!((records[0].command.as_str(), records[0].place), ("cargo xtask bench boot", Where::Testbed));
        let mut report = Report::new(facts(Where::Hardware), "cargo xtask bench boot");
        report.add(row(Promise::None, Kind::Timed, 1.0, 2.0));
        assert!(!report.to_string().contains('*'));
    }

    #[test]
    fn what_failed_breaks_the_report() {
        let mut report = Report::new(facts(Where::Bare), "cargo xtask bench all");
        assert!(report.broken().is_empty());
        report.fail("io: the guest does not boot");
        assert_eq!(report.broken(), ["io: the guest does not boot"]);
        assert!(report.to_string().contains("FAILED: io: the guest does not boot"));
    }
}
