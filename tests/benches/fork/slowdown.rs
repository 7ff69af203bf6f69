//! What a source's work loses to forks of it: a guest that computes, forked at a pace, beside itself left alone, in turns.
//!
//! A fork does the same work as its source, for half of the time until the next, a second at most; so a host needs a processor for each of
//! them and one for the page server. What a host with fewer, or a busy one, shows is more than the source loses by being forked. Forks that stand
//! still for as long (`frozen`) need none.

use std::time::Duration;

use civic_bench::report::{Kind, Peer, Report, Row};

use super::say;
use super::work::{Forking, Losses, Work, Worker, usual};

/// Forks in a second, how long a stretch is, and rounds of two.
pub const PACES: [Pace; 3] = [
    Pace { hz: 0.1, seconds: 10, rounds: (3, 12) },
    Pace { hz: 1.0, seconds: 4, rounds: (5, 20) },
    Pace { hz: 10.0, seconds: 2, rounds: (5, 20) },
];

/// How often a source is forked.
pub struct Pace {
    pub hz: f64,
    seconds: u64,
    /// Few, and enough.
    rounds: (usize, usize),
}

impl Pace {
    /// Measures it.
    pub fn losses(&self, worker: &Worker, frozen: bool, quick: bool) -> Losses {
        let rounds = if quick { self.rounds.0 } else { self.rounds.1 };
        let forking = Forking { every: Duration::from_secs_f64(1.0 / self.hz), frozen };
        worker.losses(Duration::from_secs(self.seconds), forking, rounds)
    }
}

/// The rows of one kind of work: what it loses, beside what the paper's lost, and whether the pace was kept.
pub fn rows(name: &str, work: Work, papers: f64, what: &str, quick: bool, report: &mut Report) {
    let worker = usual(work);
    for pace in &PACES {
        for frozen in [false, true] {
            let (hz, suffix) = (pace.hz, if frozen { ".frozen" } else { "" });
            let name = format!("{name}_{hz}hz{suffix}");
            say(&name);
            let losses = pace.losses(&worker, frozen, quick);
            let on_time = [100.0 * losses.on_time(hz)].into_iter().collect();
            let row = Row::new(&*name, "%", losses.percent.into()).kind(Kind::Counted);
            // It could not be faster.
            let paper = Peer::of(format!("the paper's {what} at 0.1 Hz"), [papers].into_iter().collect());
            report.add(if hz == 0.1 { row.beside(paper) } else { row });
            report.add(Row::new(format!("{name}.on_time"), "%", on_time).kind(Kind::Counted));
            report.add(Row::new(format!("{name}.pause"), "ms", losses.pauses.into()));
        }
    }
}

/// Measures a guest that computes.
pub fn run(quick: bool, report: &mut Report) {
    rows("fork.source_slowdown", Work::Cpu, 5.2, "x264 (section 4.3)", quick, report);
}
