//! What clients of a busy Debian guest notice of its forks: nginx under an open-loop load, and a disk's writer.
//!
//! Without forks, with one every ten seconds, with one every second, and without again, on the same guest: what drifts is in both halves of
//! what the forks are compared with.

use std::time::Duration;

use civic_bench::report::{Kind, Peer, Promise, Report, Row};
use civic_tests::load::served::{Phase, Served, debian};

use super::{ms, say};

/// Seconds of each phase.
struct Lengths {
    plain: u64,
    seldom: u64,
    often: u64,
}

/// The phases' numbers, pooled.
#[derive(Default)]
struct Seen {
    latencies: Vec<f64>,
    answered: Vec<f64>,
    disk: Vec<f64>,
}

impl Seen {
    fn add(&mut self, phase: &Phase) {
        self.latencies.extend(phase.latencies());
        self.answered.push(100.0 * phase.answered());
        self.disk.push(phase.disk);
    }
}

/// Measures.
pub fn run(quick: bool, report: &mut Report) {
    let lengths = if quick {
        Lengths { plain: 20, seldom: 31, often: 30 }
    } else {
        Lengths { plain: 60, seldom: 120, often: 300 }
    };
    say("booting Debian with nginx, a disk's writer and clients");
    let mut guest = Served::start(&debian(2)).expect("Debian boots and serves");
    let rate = guest.rate().expect("it answers");
    say(&format!("{rate:.1} requests a second, a quarter of what it answers to one client"));
    let phases = [
        ("plain", None, lengths.plain),
        ("every_10s", Some(10), lengths.seldom),
        ("every_1s", Some(1), lengths.often),
        ("plain", None, lengths.plain),
    ];
    let (mut plain, mut forked, mut lost) = (Seen::default(), Vec::new(), 0);
    for (name, every, seconds) in phases {
        say(&format!("load, {name}: {seconds} s"));
        let length = Duration::from_secs(seconds);
        let phase = guest.phase(rate, every.map(Duration::from_secs), length).expect("it serves, and forks");
        for why in phase.lost() {
            say(&format!("LOST: {why}"));
            lost += 1;
        }
        if every.is_none() {
            plain.add(&phase);
            continue;
        }
        let mut seen = Seen::default();
        seen.add(&phase);
        let pauses = phase.forks.iter().map(|fork| ms(fork.stages.pause_us)).collect();
        forked.push((name, seen, pauses, phase.forks.len() as f64 / length.as_secs_f64()));
    }
    guest.end().expect("nothing went wrong in the guest");
    let each = |name: &str, what: &str| format!("load.{what}.{name}");
    report.add(
        Row::new("load.lost", "", vec![f64::from(lost)].into())
            .kind(Kind::Counted)
            .promised(Promise::AtMost(&[(1.0, 0.0)])),
    );
    let values = |seen: &Seen| {
        [("latency", "ms", &seen.latencies), ("answered", "%", &seen.answered), ("disk", "1/s", &seen.disk)]
            .map(|(what, unit, values)| (what, unit, values.clone()))
    };
    let kind = |what: &str| if what == "answered" { Kind::Counted } else { Kind::Timed };
    for (what, unit, values) in values(&plain) {
        report.add(Row::new(each("plain", what), unit, values.into()).kind(kind(what)));
    }
    for (name, seen, pauses, pace) in forked {
        for ((what, unit, ours), (_, _, peer)) in values(&seen).into_iter().zip(values(&plain)) {
            let peer = Peer::of(each("plain", what), peer.into());
            report.add(Row::new(each(name, what), unit, ours.into()).kind(kind(what)).beside(peer));
        }
        report.add(Row::new(each(name, "pause"), "ms", Vec::into(pauses)));
        report.add(Row::new(each(name, "forks"), "1/s", vec![pace].into()));
    }
}
