//! The CIVIC paper's web server at saturation (VEE'17, section 4.3): a Debian whose nginx serves as many pages as clients that never wait can
//! have, forked at a pace, beside itself left alone, in turns.

use std::time::{Duration, Instant};

use civic_bench::report::{Kind, Peer, Report, Row};
use civic_tests::load::served::{Served, debian};

use super::{ms, say};

/// Forks in a second.
const PACES: [f64; 3] = [0.1, 1.0, 10.0];
/// Of its maximum, in percent, at 0.1 Hz.
const PAPERS: f64 = 10.0;

/// Measures.
pub fn run(quick: bool, report: &mut Report) {
    let (rounds, least) = if quick { (2, 10) } else { (8, 30) };
    say("booting Debian with nginx");
    let mut guest = Served::start(&debian(1)).expect("Debian boots and serves");
    for hz in PACES {
        let every = Duration::from_secs_f64(1.0 / hz);
        let length = every.max(Duration::from_secs(least));
        let (mut losses, mut pauses, mut paces) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..rounds {
            say(&format!("served, forks at {hz} Hz: round {} of {rounds}", round + 1));
            let mut rates = [0.0; 2];
            for forked in [round % 2, (round + 1) % 2] {
                let begun = Instant::now();
                let every = (forked == 1).then_some(every);
                let (served, forks) = guest.saturated(length, every).expect("it serves, and forks");
                rates[forked] = served as f64 / begun.elapsed().as_secs_f64();
                pauses.extend(forks.iter().map(|fork| ms(fork.stages.pause_us)));
                if forked == 1 {
                    paces.push(100.0 * forks.len() as f64 / begun.elapsed().as_secs_f64() / hz);
                }
            }
            losses.push(100.0 * (1.0 - rates[1] / rates[0]));
        }
        let name = format!("paper.web_slowdown_{hz}hz");
        let row = Row::new(&*name, "%", losses.into()).kind(Kind::Counted);
        let paper = Peer::of("the paper's web server at 0.1 Hz", [PAPERS].into_iter().collect());
        report.add(if hz == 0.1 { row.beside(paper) } else { row });
        report.add(Row::new(format!("{name}.on_time"), "%", paces.into()).kind(Kind::Counted));
        report.add(Row::new(format!("{name}.pause"), "ms", pauses.into()));
    }
    guest.end().expect("nothing went wrong in the guest");
}
