//! The whole of it: from the call until the first line of a program's output, in a fork of a Debian that serves pages meanwhile, with a store and
//! a network card of its own; beside the CIVIC paper's pipeline on QEMU, scripted as fast as its parts allow.
//!
//! ```text
//!  civic   civic fork --store --net ─▶ civic exec --ip ……………………………………………………………………………………………………… first line on its output
//!  paper   second QEMU started ─▶ background-snapshot ─▶ blockdev-snapshot … loaded ─▶ device_add (store, card) ─▶ gdb
//!             ─▶ loader script: own card up, source's down, chroot ─▶ the program …………………………………………… first line on its console
//! ```
//!
//! Both sources are up all the time, the same Debian with the same client; who is not measured stands still, and has no client. Civic's child
//! is looked at afterwards by `ps`, `lsof` and `ss` out of the store, and what it costs the host is counted then.
//!
//! Where the paper's pipeline leaves a choice, it is made for speed, so its time is not more than it must be:
//!
//! * Whatever can be made beforehand is: images, taps, GDB's script, the kernel's addresses. What each QEMU's devices are made of is there before
//!   they are plugged in.
//! * The disk's snapshot is taken as soon as QEMU says that its guest runs on, while its memory is still streamed. What the guest writes to
//!   the disk in those milliseconds the clone has too; without that, the guest would have to stand still until all of the snapshot is set up.
//! * Nothing waits by a pause: each step begins at the word of the one before.
//! * The paper's clone runs at once and fetches memory as it is touched, from a QEMU of its authors'; a stock one's has to have it all first. `load`
//!   says how much of the time that is.

mod civic;
mod load;
mod paper;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use civic_bench::report::{Kind, Peer, Promise, Report, Row};
use civic_bench::stats::Samples;

use super::clock::Clock;
use super::guest::{Guest, said};
use super::machine::{Image, Monitor, Spec, Tools, Userland, line};
use super::net::Tap;
use super::{progress, store};
use civic::Civic;
use load::Load;
use paper::Paper;

const CPUS: u8 = 2;
/// Of the sources, in GiB. Rows of the first have no number.
const MEMORIES: [u32; 3] = [1, 2, 4];
/// How long anything may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(300);
/// The time, and the source's pause, as shares of the peer's.
const TIME: f64 = 0.04;
const PAUSE: f64 = 1.0;
/// What a child may cost its host, in MiB.
const CHILD_MIB: &[(f64, f64)] = &[(0.5, 16.0)];
/// The time with more memory, as a share of that with the least: noise, in the testbed.
const INDEPENDENT: f64 = 1.25;
/// What looks around, from the store.
const LOOKERS: [&str; 3] = ["ps", "lsof", "ss"];
/// Of sources and clones, and of what is plugged in.
const TAPS: [u8; 4] = [11, 12, 13, 14];
/// Until a Debian is up: the testbed is slow, and may share its processor.
const BOOT: Duration = Duration::from_secs(900);

/// The moment, by the word that the program says first.
struct Program(String);

impl Program {
    fn script(&self) -> String {
        format!("echo {}; ps", self.0)
    }
}

/// One call, in milliseconds.
struct Run {
    took: f64,
    pause: f64,
    stages: Vec<(&'static str, f64)>,
    child_mib: f64,
}

/// Measures and reports.
pub fn run(tools: &Tools, clock: &Clock, quick: bool, rounds: Option<u16>, report: &mut Report) -> Result<()> {
    let rounds = rounds.map_or(if quick { 3 } else { 15 }, usize::from);
    let stores = ["civic", "paper"].map(|who| tools.work.join(format!("inspect-{who}.img")));
    let lookers: Vec<_> = LOOKERS.iter().map(|name| find(name)).collect::<Result<_>>()?;
    store::make(tools, &lookers, &[("loader", paper::LOADER.as_bytes())], &stores)?;
    let mut first = Samples::default();
    for memory in if quick { &MEMORIES[..1] } else { &MEMORIES } {
        let runs = of_memory(tools, clock, *memory, rounds, &stores, report)?;
        let suffix = if *memory == MEMORIES[0] { String::new() } else { format!(".{memory}gib") };
        let took = rows(report, &suffix, &runs);
        if suffix.is_empty() {
            first = took;
            continue;
        }
        let name = format!("inspect.first_output{suffix}_to_{}gib", MEMORIES[0]);
        let smaller = Peer::in_turns("civic", format!("with {} GiB", MEMORIES[0]), first.clone());
        report.add(Row::new(name, "ms", took).promised(Promise::RatioAtMost(INDEPENDENT)).beside(smaller));
    }
    if quick {
        report.leave_out("inspect with sources of 2 and 4 GiB: --quick");
    }
    Ok(())
}

fn of_memory(
    tools: &Tools,
    clock: &Clock,
    memory: u32,
    rounds: usize,
    [store, papers_store]: &[PathBuf; 2],
    report: &mut Report,
) -> Result<[Vec<Run>; 2]> {
    let taps = TAPS.map(Tap::new).into_iter().collect::<Result<Vec<_>>>()?;
    let [ours, peers, clones, plugged] = &taps[..] else { unreachable!("they are four") };
    let spec = |monitor, tap: &Tap, cmdline: &str| Spec {
        monitor,
        image: Image::BzImage,
        userland: Userland::Debian,
        cpus: CPUS,
        memory_mib: memory << 10,
        // Who is not measured stands still for longer than a kernel finds usual.
        cmdline: format!("ip={}::{}:255.255.255.0::eth0:off nosoftlockup{cmdline}", tap.guest, tap.host()),
        disks: Vec::new(),
        taps: vec![(tap.name.clone(), false)],
        vsock: None,
        more: Vec::new(),
    };
    let root = std::env::var_os("CIVIC_ROOT_IMAGE").map(PathBuf::from).context("no CIVIC_ROOT_IMAGE")?;
    let disk = ["--disk".to_owned(), format!("path={},overlay", root.display())];
    let ours_spec = Spec { more: disk.to_vec(), ..spec(Monitor::Civic, ours, "") };
    report.command("civic", line(&tools.command(&ours_spec, "NAME")));
    let mut civic = Civic::new(tools, up(tools, &ours_spec, ours)?, ours, store, plugged)?;
    civic.halt()?;
    let peers_spec = spec(Monitor::Q35, peers, " nokaslr");
    let mut paper = Paper::new(tools, peers_spec, &root, papers_store.clone(), [peers, clones, plugged], report)?;

    let mut runs: [Vec<Run>; 2] = Default::default();
    // The first round warms up.
    for round in 0..=rounds {
        progress(&format!("looking into forks, {memory} GiB: round {round} of {rounds}"));
        for who in [round % 2, (round + 1) % 2] {
            let program = Program(format!("CIVIC-BENCH-INSPECT-{round}"));
            let run = if who == 0 { civic.round(round, &program, clock) } else { paper.round(round, &program, clock) }
                .with_context(|| format!("round {round} of {}, {memory} GiB", ["civic", "paper"][who]))?;
            if round > 0 {
                runs[who].push(run);
            }
        }
    }
    civic.finish()?;
    paper.finish()?;
    Ok(runs)
}

/// A Debian that is up and serves pages.
fn up<'a>(tools: &'a Tools, spec: &Spec, tap: &Tap) -> Result<Guest<'a>> {
    progress(&format!("booting Debian: {}", spec.monitor.name()));
    let mut guest = Guest::start(tools, spec)?;
    guest.take_shell("root@civic-guest:", BOOT)?;
    guest.run("systemctl is-system-running --wait || systemctl --failed --no-legend --plain", PATIENCE)?;
    Load::start(tap)?.finish()?;
    Ok(guest)
}

/// The rows of sources of one size. Returns Civic's times.
fn rows(report: &mut Report, suffix: &str, [ours, peers]: &[Vec<Run>; 2]) -> Samples {
    let of = |runs: &[Run], what: fn(&Run) -> f64| runs.iter().map(what).collect::<Samples>();
    let stage = |runs: &[Run], at: usize| runs.iter().map(|run| run.stages[at].1).collect::<Samples>();
    let took = of(ours, |run| run.took);
    let mut add = |name: String, unit, kind, promise, ours: Samples, peer: Samples, how: &str| {
        let row = Row::new(format!("inspect.{name}{suffix}"), unit, ours).kind(kind).promised(promise);
        report.add(row.beside(Peer::in_turns(paper::SECOND, how, peer)));
    };
    let peer = || of(peers, |run| run.took);
    let (whole, timed) = ("the paper's way", Kind::Timed);
    add("first_output".into(), "ms", timed, Promise::RatioAtMost(TIME), took.clone(), peer(), whole);
    let pauses = [ours, peers].map(|runs| of(runs, |run| run.pause));
    let [pause, papers_pause] = pauses;
    add("pause".into(), "ms", timed, Promise::RatioAtMost(PAUSE), pause, papers_pause, "background-snapshot");
    let memories = [ours, peers].map(|runs| of(runs, |run| run.child_mib));
    let [child, clone] = memories;
    add("child_memory".into(), "MiB", Kind::Counted, Promise::AtMost(CHILD_MIB), child, clone, "the second's");
    for (at, (name, _)) in ours.first().into_iter().flat_map(|run| run.stages.iter().enumerate()) {
        add((*name).into(), "ms", timed, Promise::None, stage(ours, at), peer(), whole);
    }
    for (at, (name, _)) in peers.first().into_iter().flat_map(|run| run.stages.iter().enumerate()) {
        add(format!("peers_own.{name}"), "ms", timed, Promise::None, stage(peers, at), peer(), "the peer's share");
    }
    took
}

fn find(program: &str) -> Result<PathBuf> {
    Ok(said(Command::new("sh").args(["-c", &format!("command -v {program}")]))?.trim().into())
}
