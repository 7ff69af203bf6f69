//! A page of tables and plots, made of records: `docs/performance.md`.
//!
//! Invariants: a time from the testbed is never on it, only its ratio to what was measured beside it; what is missing is named; every table has
//! the host's facts and the command that measures it again.

use std::fmt::{self, Write};
use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::figures::FIGURES;
use crate::plot::{self, Line};
use crate::record::{Record, Where};
use crate::report::three_digits;

/// How what is beside a figure begins where that is out of the paper.
const PAPER: &str = "the paper's";

const HEAD: &str = "# Performance

Written by `cargo xtask performance` out of what `cargo xtask bench … --json` has measured; whoever edits it is overwritten.

* **ratio**: of what is named *beside* it, measured in the same run, in turns where that can be: the median of the rounds' ratios, and the middle
  half of them.
* **x floor**: as a multiple of what the machine itself needs for the like, by the same run: `fork(2)` of as much memory, a bare KVM VM, the
  kernel's copy on write, a bare userfaultfd round trip.
* Times of the *testbed*, an emulated host, are not shown: only ratios between programs that ran in it side by side mean anything.
* *bare-metal guest code*: the guest is a few instructions of our own on this machine's KVM. Times are real, though a KVM without hardware
  virtualisation may interpret what runs in a guest kernel's place.
";

const INCOMPARABLE: &str = "What cannot be compared:

* The paper's host (4 cores at 2.8 GHz, 16 GB, Linux 3.19, QEMU 2.1.50 with post-copy) is not there any more: times of two machines stand side by
  side here. `cargo xtask bench inspect` and `bench inject` measure the paper's pipeline, scripted on a stock QEMU, in the same minutes on the same host.
* The paper's instantiation ends when a program runs; a bare-metal guest has no kernel to start one. So it stands here beside the paper's 4.2 s for
  starting the VM, its disk and hotplug; the 2.3 s for code injection are `inject.first_instruction`'s.
* The paper's resident set is the clone's own; that of a fork consists mostly of pages of its source's, which cost the host nothing more.
  What it does cost is `cowed`. Nothing is transferred to a fork on the same host.
* A fork that goes on writing all its source's memory is looked at after one whole sweep, the paper's when its tools had run.
* `stress`, x264 and bonnie++ need a kernel: here a guest writes its memory; computes on 350 MiB; reads and writes 64 MiB of disk in turns through the
  host's page cache. The web server is a Debian's nginx, its clients on the same host, its page one of counters; in the testbed all share one
  processor, forks included.
* The paper's clones ran monitoring tasks; these forks go on with their source's work, or stand still (`frozen`).
* The paper could not clone more often than every 10 s, and counted lost pings in steps of 0.1 s.
* Copies to another host are not there yet.
";

/// Writes the page, and its plots into a folder of its name beside it.
pub fn write(records: &[Record], to: &Path) -> io::Result<()> {
    let folder = to.with_extension("");
    // Those of a page before, which may have had others.
    for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "svg") {
            fs::remove_file(entry.path())?;
        }
    }
    let page = make(records, &folder.file_name().unwrap_or_default().to_string_lossy());
    for (name, plot) in &page.plots {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap_or(&folder))?;
        fs::write(path, plot)?;
    }
    fs::write(to, page.text)
}

/// A page, and files that it shows.
struct Page {
    text: String,
    folder: String,
    plots: Vec<(PathBuf, String)>,
}

/// Rows of one table: one command's, on one host.
struct Group<'a> {
    title: &'a str,
    rows: Vec<&'a Record>,
}

fn make(records: &[Record], folder: &str) -> Page {
    let mut page = Page { text: HEAD.to_owned(), folder: folder.to_owned(), plots: Vec::new() };
    // Writing to a string cannot fail.
    let _ = page.figures(records).and_then(|()| page.papers(records)).and_then(|()| {
        let groups = groups(records);
        groups.iter().enumerate().try_for_each(|(n, group)| page.group(n, group))
    });
    page
}

fn groups(records: &[Record]) -> Vec<Group<'_>> {
    let mut groups: Vec<Group> = Vec::new();
    for record in records {
        let of = |group: &&mut Group| {
            group.title == record.command && group.rows.first().is_some_and(|row| row.host == record.host)
        };
        match groups.iter_mut().find(of) {
            Some(group) => group.rows.push(record),
            None => groups.push(Group { title: &record.command, rows: vec![record] }),
        }
    }
    groups
}

fn number(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), three_digits)
}

/// One that may mean nothing.
fn shown(record: &Record, value: Option<f64>) -> String {
    number(value.filter(|_| record.absolute()))
}

/// The ratio, and the middle half of the rounds'.
fn ratio(record: &Record) -> String {
    match (record.ratio, record.ratio_p25, record.ratio_p75) {
        (Some(ratio), Some(low), Some(high)) if low != high => {
            format!("{} ({}..{})", three_digits(ratio), three_digits(low), three_digits(high))
        }
        (ratio, ..) => number(ratio),
    }
}

fn promised(record: &Record) -> String {
    match (&record.promised, &record.broken) {
        (None, _) => String::new(),
        (Some(promised), None) => promised.clone(),
        (Some(promised), Some(_)) => format!("{promised}: **broken**"),
    }
}

fn multiple(record: &Record) -> String {
    record.floor.as_ref().map_or_else(|| "–".to_owned(), |floor| number(floor.multiple))
}

impl Page {
    /// A plot, if there is anything on it.
    fn plot(&mut self, name: &str, title: &str, axis: &str, lines: &[Line], one: bool) -> fmt::Result {
        let Some(svg) = plot::svg(title, axis, lines, one) else { return Ok(()) };
        self.plots.push((PathBuf::from(name), svg));
        writeln!(self.text, "\n![{title}]({}/{name})", self.folder)
    }

    /// The figures that have names.
    fn figures(&mut self, records: &[Record]) -> fmt::Result {
        writeln!(self.text, "\n## The figures\n")?;
        writeln!(self.text, "| figure | p50 | unit | ratio | beside | x floor | where | promised |")?;
        writeln!(self.text, "|---|---:|---|---:|---|---:|---|---|")?;
        let mut lines = Vec::new();
        for (name, bench) in FIGURES {
            let Some(record) = records.iter().find(|record| record.name == name) else {
                writeln!(self.text, "| {name} | not measured: `cargo xtask bench {bench}` | | | | | | |")?;
                continue;
            };
            let beside = record.beside.as_deref().unwrap_or_default();
            let (ratio, floor, promised) = (ratio(record), multiple(record), promised(record));
            let (value, unit, place) = (shown(record, record.p50), &record.unit, record.place);
            writeln!(self.text, "| {name} | {value} | {unit} | {ratio} | {beside} | {floor} | {place} | {promised} |")?;
            lines.extend(ratios(record));
        }
        self.plot("figures.svg", "The figures, as shares of what they are compared with", "ratio", &lines, true)
    }

    /// The paper's evaluation.
    fn papers(&mut self, records: &[Record]) -> fmt::Result {
        let of_paper = |record: &&Record| record.beside.as_ref().is_some_and(|beside| beside.starts_with(PAPER));
        let rows: Vec<_> = records.iter().filter(of_paper).filter(|record| record.absolute()).collect();
        if rows.is_empty() {
            return Ok(());
        }
        writeln!(self.text, "\n## The CIVIC paper's evaluation\n")?;
        writeln!(
            self.text,
            "| what | unit | paper | here | ratio | beside | where |\n|---|---|---:|---:|---:|---|---|"
        )?;
        let mut lines = Vec::new();
        for record in rows {
            let (name, unit, peer) = (&record.name, &record.unit, number(record.peer));
            let (here, ratio, place) = (number(record.p50), number(record.ratio), record.place);
            let beside = record.beside.as_deref().unwrap_or_default();
            writeln!(self.text, "| {name} | {unit} | {peer} | {here} | {ratio} | {beside} | {place} |")?;
            lines.extend(ratios(record));
        }
        self.plot("paper.svg", "As shares of the paper's", "ratio", &lines, true)?;
        write!(self.text, "\n{INCOMPARABLE}")
    }

    /// A command's rows.
    fn group(&mut self, n: usize, group: &Group) -> fmt::Result {
        let Some(first) = group.rows.first() else { return Ok(()) };
        writeln!(self.text, "\n## `{}`\n\nWhere: {}", group.title, first.place)?;
        for (name, fact) in first.host.iter().filter(|(name, _)| name != "host") {
            writeln!(self.text, "· {name}: {fact}")?;
        }
        writeln!(self.text, "\n| name | unit | n | p50 | p90 | p99 | max | ratio | beside | x floor | promised |")?;
        writeln!(self.text, "|---|---|---:|---:|---:|---:|---:|---:|---|---:|---|")?;
        let mut hidden = Vec::new();
        for record in &group.rows {
            if !record.absolute() && record.ratio.is_none() {
                hidden.push(format!("`{}`", record.name));
                continue;
            }
            let values = [record.p50, record.p90, record.p99, record.max].map(|value| shown(record, value)).join(" | ");
            let (name, unit, n, beside) = (&record.name, &record.unit, record.n, record.beside.as_deref());
            let (ratio, beside, floor) = (ratio(record), beside.unwrap_or_default(), multiple(record));
            let promised = promised(record);
            writeln!(self.text, "| {name} | {unit} | {n} | {values} | {ratio} | {beside} | {floor} | {promised} |")?;
        }
        if !hidden.is_empty() {
            writeln!(
                self.text,
                "\nNot shown, as times of the testbed with nothing beside them: {}.",
                hidden.join(", ")
            )?;
        }
        for line in group.rows.iter().filter_map(|record| record.broken.as_ref()) {
            // A time of the testbed may be in it.
            if first.place != Where::Testbed || line.contains("of the peer's") {
                writeln!(self.text, "\nBroken: {line}.")?;
            }
        }
        let mut commands: Vec<_> =
            group.rows.iter().filter_map(|row| Some((row.beside.as_ref()?, row.peer_command.as_ref()?))).collect();
        commands.dedup_by_key(|(_, command)| *command);
        for (beside, command) in commands {
            writeln!(self.text, "\n{beside}:\n\n```\n{command}\n```")?;
        }
        let times: Vec<_> = group.rows.iter().filter_map(|record| quantiles(record)).collect();
        let axis = "us: the median, up to 99 of 100; diamond: what it is compared with";
        self.plot(&format!("{n}-times.svg"), &format!("{}: times", group.title), axis, &times, false)?;
        let shares: Vec<_> = group.rows.iter().filter_map(|record| ratios(record)).collect();
        let axis = "ratio: the median, and the middle half of the rounds";
        self.plot(&format!("{n}-ratios.svg"), &format!("{}: ratios", group.title), axis, &shares, true)
    }
}

/// A row of ratios.
fn ratios(record: &Record) -> Option<Line> {
    let at = record.ratio?;
    let range = (record.ratio_p25.unwrap_or(at), record.ratio_p75.unwrap_or(at));
    Some(Line { label: record.name.clone(), at, range, peer: None })
}

/// A row of times, in microseconds, where they mean anything.
fn quantiles(record: &Record) -> Option<Line> {
    let scale = match record.unit.as_str() {
        "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        _ => return None,
    };
    let at = record.p50.filter(|_| record.absolute())? * scale;
    let range = (at, record.p99? * scale);
    Some(Line { label: record.name.clone(), at, range, peer: record.peer.map(|peer| peer * scale) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::Facts;
    use crate::report::{Kind, Peer, Promise, Report, Row};
    use crate::stats::Samples;

    fn samples(values: &[f64]) -> Samples {
        values.iter().copied().collect()
    }

    fn records(place: Where) -> Vec<Record> {
        let facts = Facts { place, lines: vec![("host".into(), "h".into()), ("CPU".into(), "2 x a".into())] };
        let mut report = Report::new(facts, "cargo xtask bench fork");
        report.command("QEMU", "qemu -x".into());
        let peer = || Peer::in_turns("QEMU", "", samples(&[777.0, 777.0]));
        report.add(Row::new("fork.pause", "ms", samples(&[555.0, 555.0])).beside(peer()));
        report.add(Row::new("fork.arm", "ms", samples(&[333.0])).promised(Promise::AtMost(&[(0.5, 1.0)])));
        let paper = Peer::of("the paper's", samples(&[80.0]));
        report.add(Row::new("paper.rss", "MiB", samples(&[20.0])).kind(Kind::Counted).beside(paper));
        report.records()
    }

    #[test]
    fn times_of_the_testbed_are_not_on_the_page() {
        let page = make(&records(Where::Testbed), "performance");
        for time in ["555", "777", "333"] {
            assert!(!page.text.contains(time), "{}", page.text);
        }
        assert!(page.text.contains("| fork.pause | – | ms | 0.71 |"), "{}", page.text);
        assert!(page.text.contains("with nothing beside them: `fork.arm`"), "{}", page.text);
        // Bytes are bytes there too.
        assert!(page.text.contains("| paper.rss | MiB | 80.0 | 20.0 | 0.25 |"), "{}", page.text);
        assert!(!page.plots.iter().any(|(name, _)| name.ends_with("0-times.svg")));
    }

    #[test]
    fn every_table_has_its_command_its_host_and_what_is_beside() {
        let page = make(&records(Where::Bare), "performance");
        for text in [
            "## `cargo xtask bench fork`",
            "Where: bare-metal guest code\n· CPU: 2 x a",
            "| fork.pause | ms | 2 | 555 | 555 | 555 | 555 | 0.71 | QEMU |",
            "QEMU:\n\n```\nqemu -x\n```",
            "p50 <= 1: **broken**",
            "Broken: fork.arm: p50 is 333.00 ms, promised at most 1.",
            "| boot.userspace | not measured: `cargo xtask bench boot` |",
            "What cannot be compared:",
            "(performance/0-times.svg)",
        ] {
            assert!(page.text.contains(text), "{text}\n{}", page.text);
        }
        assert_eq!(page.plots.len(), 4);
    }

    #[test]
    fn the_page_and_its_plots_are_written() {
        let folder = std::env::temp_dir().join(format!("civic-page-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        write(&records(Where::Bare), &folder.join("page.md")).unwrap();
        write(&records(Where::Testbed), &folder.join("page.md")).unwrap();
        assert!(!folder.join("page/0-times.svg").exists(), "it is of a page before");
        write(&records(Where::Bare), &folder.join("page.md")).unwrap();
        let text = fs::read_to_string(folder.join("page.md")).unwrap();
        assert!(text.contains("](page/figures.svg)"));
        assert!(folder.join("page/figures.svg").is_file() && folder.join("page/0-times.svg").is_file());
        fs::remove_dir_all(folder).unwrap();
    }
}
