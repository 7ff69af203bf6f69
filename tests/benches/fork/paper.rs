//! The CIVIC paper's evaluation (VEE'17, sections 4.1 to 4.3) with bare-metal guests, on the machine itself: what a fork costs its host and how long it
//! takes, by what its source does with its memory and how much it has; and what a source loses that reads and writes its disk.
//!
//! ```text
//!  paper              here
//!  fresh_idle         a guest that has touched next to nothing
//!  malloc_static      three quarters of its memory written once (`stress`)
//!  dirty_dynamic      three quarters of its memory written over and over, in source and fork; `.frozen`: the fork stands still, as the paper
//!                     proposes
//!  RSS                of the fork's whole process; most of it are its source's pages, which cost nothing more
//!  COW-ed             what is there twice: the fork's own pages and what is kept for it
//!  transferred        what was copied into the fork; all else it shares
//!  instantiation      a monitor started, given a disk of its own by hotplug and forked, until the fork runs: what the paper's needs 4.2 s for. Its
//!                     2.3 s more, until a program runs, need a kernel in the guest: `cargo xtask bench inspect`
//!  downtime           the pause, as the monitor tells it; the paper's by pings that were lost in steps of 0.1 s
//! ```

use std::fs;
use std::time::{Duration, Instant};

use civic_api::{DiskConfig, NewDevice};
use civic_bench::report::{Kind, Peer, Report, Row};
use civic_bench::stats::Samples;
use civic_tests::bare::vm::Vm;

use super::work::{Work, Worker};
use super::{GIB, baseline, ms, say, slowdown};

const MIB: f64 = (1 << 20) as f64;
/// GiB of sources.
const SIZES: [u64; 3] = [1, 2, 4];
/// How long a fork of a source that stands still lives before it is looked at.
const LIFE: Duration = Duration::from_secs(1);
/// Most that is waited for a fork of 4 GiB to write three of them, each page of which its source writes at the same time.
const PATIENCE: Duration = Duration::from_secs(600);
/// The paper's figures for sources that do not write: at most so many MB, whatever their size; and seconds, without injecting code.
const RSS: f64 = 80.0;
const COWED: f64 = 2.7;
const TRANSFERRED: f64 = 30.0;
const INSTANTIATION: f64 = 4200.0;
const DOWNTIME: f64 = 400.0;
/// What of a source's memory everything is in the paper where the source goes on writing.
const WORKING_SET: f64 = 0.75;

/// A source's use of its memory.
struct Use {
    name: &'static str,
    work: Work,
    /// Whether forks stand still.
    frozen: bool,
}

const USES: [Use; 4] = [
    Use { name: "fresh_idle", work: Work::Idle, frozen: false },
    Use { name: "malloc_static", work: Work::Static, frozen: false },
    Use { name: "dirty_dynamic", work: Work::Dirty, frozen: false },
    Use { name: "dirty_dynamic.frozen", work: Work::Dirty, frozen: true },
];

/// What forks of one source showed: in MiB and milliseconds.
#[derive(Default)]
struct Seen {
    rss: Samples,
    cowed: Samples,
    transferred: Samples,
    instantiation: Samples,
    pause: Samples,
}

/// Measures.
pub fn run(quick: bool, report: &mut Report) {
    let rounds = if quick { 2 } else { 7 };
    let floor: Samples = baseline::kvm_vm(GIB, 10).into();
    for size in SIZES {
        for what in &USES {
            let name = format!("{}.{size}gib", what.name);
            let seen = forks(&name, what, size * GIB, rounds);
            rows(&name, what, size as f64 * 1024.0, seen, &floor, report);
        }
    }
    slowdown::rows("paper.disk_slowdown", Work::Disk, 1.2, "bonnie++ (section 4.3)", quick, report);
}

fn rows(name: &str, what: &Use, mib: f64, seen: Seen, floor: &Samples, report: &mut Report) {
    let paper = |value: f64| Peer::of("the paper's", [value].into_iter().collect());
    // In the paper a fork that stands still is as lean as those of sources that do.
    let dirty = what.work == Work::Dirty && !what.frozen;
    let memory = |lean: f64| paper(if dirty { WORKING_SET * mib } else { lean * 1e6 / MIB });
    let (rss, cowed, transferred) = (memory(RSS), memory(COWED), memory(TRANSFERRED));
    for (kind, values, peer) in
        [("rss", seen.rss, rss), ("cowed", seen.cowed, cowed), ("transferred", seen.transferred, transferred)]
    {
        report.add(Row::new(format!("paper.{kind}.{name}"), "MiB", values).kind(Kind::Counted).beside(peer));
    }
    let row = Row::new(format!("paper.instantiation.{name}"), "ms", seen.instantiation).beside(paper(INSTANTIATION));
    report.add(row.above(Peer::of("a bare KVM VM of 1 GiB", floor.clone())));
    report.add(Row::new(format!("paper.downtime.{name}"), "ms", seen.pause).beside(paper(DOWNTIME)));
}

/// Forks a source that often, one after the other.
fn forks(name: &str, what: &Use, memory: u64, rounds: usize) -> Seen {
    let mut source = Worker::boot(what.work, memory);
    let disk = source.vm.setup().root().join("store.img");
    let file = fs::File::create(&disk).expect("an image can be made");
    file.set_len(64 << 20).expect("an image can be made");
    let store = NewDevice::Disk(DiskConfig { overlay: true, ..DiskConfig::new("store", disk) });
    let mut seen = Seen::default();
    for n in 0..rounds {
        say(&format!("{name}: fork {} of {rounds}", n + 1));
        let begun = Instant::now();
        let waiting = source.vm.waiting_with(&format!("c{n}"), std::slice::from_ref(&store));
        let (told, mut children) = source.vm.fork(vec![waiting], what.frozen);
        seen.instantiation.push(begun.elapsed().as_secs_f64() * 1e3);
        seen.pause.push(ms(told.stages.pause_us));
        let child = &mut children[0];
        if what.work == Work::Dirty && !what.frozen {
            // It goes on where its source was: one whole sweep ends at the second end of one.
            child.extend(PATIENCE);
            let before = Worker::done_by(child);
            child.until("the fork to write all of it", |child| Worker::done_by(child).wrapping_sub(before) >= 2);
        } else {
            std::thread::sleep(LIFE);
        }
        let pages = |series: &str| source.vm.metric(series) as f64 * baseline::PAGE as f64 / MIB;
        let own = mapped(child, "Anonymous:");
        seen.rss.push(status(child, "VmRSS:"));
        seen.cowed.push(own + pages("civic_fork_pages{kind=\"stored\"}"));
        seen.transferred.push(pages("civic_fork_page_events_total{event=\"copied\"}"));
        child.kill();
        assert!(child.ended().success());
        // Its page server goes too, and with it what it has counted.
        source.vm.extend(PATIENCE);
        source.vm.until("the fork to be forgotten", |vm| vm.info().family == civic_api::Family::default());
    }
    seen
}

/// MiB of a process, by its status.
fn status(vm: &Vm, field: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{}/status", vm.pid())).expect("it lives");
    let line = text.lines().find_map(|line| line.strip_prefix(field)).expect("its status has it");
    kib(line) / 1024.0
}

/// MiB of a process's guest RAM, by a field of its mappings.
fn mapped(vm: &Vm, field: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{}/smaps", vm.pid())).expect("it lives");
    let (mut ours, mut sum) = (false, 0.0);
    for line in text.lines() {
        match line.strip_prefix(field) {
            Some(number) if ours => sum += kib(number),
            None if !line.split(' ').next().is_some_and(|first| first.ends_with(':')) => {
                ours = line.contains("memfd:civic-ram");
            }
            _ => {}
        }
    }
    sum / 1024.0
}

fn kib(text: &str) -> f64 {
    text.trim().trim_end_matches("kB").trim().parse().expect("it is a number")
}
