//! A fork beside the nearest that QEMU has: a `background-snapshot`, streamed into a second QEMU that waits for it. And beside its other ways
//! to a second guest, about which nothing is promised.
//!
//! ```text
//!  civic       POST /v1/fork ─▶ pause ─▶ run ─▶ the child runs ─▶ answer
//!  snapshot    migrate ─▶ STOP ─▶ RESUME ─▶ … stream … ─▶ the second one's RESUME
//!  file        stop ─▶ STOP ─▶ migrate to a file ─▶ cont ─▶ RESUME; the second one reads it ─▶ its RESUME
//!  savevm      snapshot-save ─▶ STOP ─▶ … into a qcow2 image … ─▶ RESUME
//!  post-copy   migrate ─▶ STOP for ever; the second one's RESUME ─▶ … the rest as it is touched, and by itself …
//! ```
//!
//! All sources are up all the time, the same guest with the same in its memory and the same job that goes on writing it; who is not
//! measured stands still. Whoever is to become the child waits beforehand, at both. A call is over when its child runs: by the API's
//! answer, by the second QEMU's word; and the child must then answer on its console and have the memory of its source. After a post-copy the second is the source, for
//! the first can never run again.
//!
//! The pause is there twice: as each monitor tells it, Civic in the answer's stages (from asking the vCPUs to stop until they run) and
//! QEMU by its two events (from when they have stopped, so that QEMU's is told a little too short); and as the host's kernel saw it.

mod civic;
mod qemu;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use civic_bench::report::{Peer, Promise, Report, Row};
use civic_bench::stats::Samples;

use super::clock::Clock;
use super::guest::Guest;
use super::machine::{Image, Monitor, Spec, Tools, Userland, line};
use super::peer::clone::{Sockets, Source, listens};
use super::progress;
use super::stillness::Tracer;
use civic::Civic;
use qemu::{Qemu, Relay, image};

const MEMORY_MIB: u32 = 512;
/// What of it the guest fills with something that does not compress: [`PIECES`] times the same.
const PIECE_MIB: u32 = 16;
const PIECES: u32 = 16;
const CPUS: u8 = 2;
/// How long anything may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(300);
/// The pause, and the call until a child runs, as shares of QEMU's.
const PAUSE: f64 = 1.0;
const CALL: f64 = 0.1;
/// QEMU's ways, in the order in which they are measured.
const WAYS: [&str; 4] =
    ["background-snapshot", "migration to a file", "savevm", "post-copy, after which the source cannot run"];
const SNAPSHOT: usize = 0;
const FILE: usize = 1;
const SAVEVM: usize = 2;
const POST_COPY: usize = 3;
/// The QEMUs that are measured, in the report.
const SOURCE: &str = "qemu, source";
const RELAY: &str = "qemu, given on";
/// Until a vCPU that may run does, on a host whose one processor has other work too.
const GRACE: Duration = Duration::from_millis(200);

/// Fills memory, and goes on writing a megabyte of it ten times a second.
fn fill() -> String {
    format!(
        "dd if=/dev/urandom of=/tmp/piece bs=1M count={PIECE_MIB} 2>/dev/null; \
         for n in $(seq {PIECES}); do cat /tmp/piece; done > /tmp/filled; \
         (n=0; while :; do dd if=/tmp/piece of=/tmp/hot bs=64k count=16 conv=notrunc 2>/dev/null; n=$((n + 1)); echo $n > /tmp/round; \
         sleep 0.1; done) & true"
    )
}

/// What the child says of its memory: how far the job is, and the same of a part of what was filled as its source.
const LOOK: &str = "until read n 2>/dev/null < /tmp/round; do sleep 0.1; done; echo $n; dd if=/tmp/filled bs=1M skip=64 count=4 2>/dev/null | md5sum";

/// What one fork showed, in milliseconds: as far as there is such a thing.
#[derive(Clone, Copy, Default)]
struct Fork {
    /// How long the source stood still, by its monitor's word.
    pause: Option<f64>,
    /// And as the host's kernel saw it.
    still: Option<f64>,
    /// Until the child ran.
    running: Option<f64>,
    /// Until the child said what it has in memory.
    answers: Option<f64>,
}

/// Measures and reports.
pub fn run(tools: &Tools, clock: &Clock, quick: bool, rounds: Option<u16>, report: &mut Report) -> Result<()> {
    let rounds = rounds.map_or(if quick { 3 } else { 12 }, usize::from);
    let tracer = Tracer::new().inspect_err(|e| report.leave_out(&format!("fork.still.beside_qemu: {e:#}"))).ok();
    let spec = |monitor, more: &[String]| Spec {
        monitor,
        image: Image::BzImage,
        userland: Userland::Bench,
        cpus: CPUS,
        memory_mib: MEMORY_MIB,
        cmdline: "civic.bench=fork".to_owned(),
        disks: Vec::new(),
        taps: Vec::new(),
        vsock: None,
        more: more.to_vec(),
    };
    let (control, sockets) = (tools.work.join("source.qmp"), Sockets::new(&tools.work, "second"));
    let relays = ["one", "other"].map(|who| Sockets::new(&tools.work, who));
    let reads = Sockets::new(&tools.work, "reader");
    let reader = spec(Monitor::Q35, &reads.deferred_options());
    let ours = spec(Monitor::Civic, &[]);
    let peer = spec(Monitor::Q35, &[vec!["-qmp".to_owned(), listens(&control)], image(tools)?].concat());
    let second = spec(Monitor::Q35, &sockets.options());
    let deferred = relays.each_ref().map(|sockets| spec(Monitor::Q35, &sockets.deferred_options()));
    let relay = spec(Monitor::Q35, &relays[1].control_options());
    let peers = [
        (SOURCE, &peer),
        ("qemu, second", &second),
        ("qemu, reader", &reader),
        (RELAY, &relay),
        ("qemu, it takes it", &deferred[0]),
    ];
    for (name, spec) in [("civic, source", &ours)].into_iter().chain(peers) {
        report.command(name, line(&tools.command(spec, "NAME")));
    }

    let mut civic = Civic::new(tools, filled(tools, &ours, "civic")?)?;
    let guest = filled(tools, &peer, "source")?;
    let source = Source::new(tools, guest, &control, sockets, PATIENCE)?;
    let mut qemu = Qemu::new(tools, source, second, (reads, reader))?;
    let mut relay = Relay::new(tools, filled(tools, &relay, "relay")?, relays, deferred)?;

    let (mut ours, mut peers): (Vec<Fork>, [Vec<Fork>; 4]) = Default::default();
    // The first round warms up.
    for round in 0..=rounds {
        progress(&format!("forks beside QEMU's ways: round {round} of {rounds}"));
        for who in (0..WAYS.len() + 1).map(|n| (n + round) % (WAYS.len() + 1)) {
            let tracer = tracer.as_ref();
            let fork = match who.checked_sub(1) {
                None => civic.fork(round, clock, tracer),
                Some(SNAPSHOT) => qemu.snapshot(round, clock, tracer),
                Some(FILE) => qemu.file(round, clock),
                Some(SAVEVM) => qemu.savevm(),
                Some(_) => relay.fork(round, clock),
            };
            let fork = fork.with_context(|| {
                format!("round {round} of {}", ["civic"].iter().chain(&WAYS).nth(who).unwrap_or(&""))
            })?;
            if round > 0 {
                who.checked_sub(1).map_or(&mut ours, |way| &mut peers[way]).push(fork);
            }
        }
    }
    let mut row = |name: &str, beside: &str, way: usize, promise, of: fn(&Fork) -> Option<f64>| {
        let [ours, peer] = [&ours, &peers[way]].map(|forks| forks.iter().filter_map(of).collect::<Samples>());
        let peer = Peer::in_turns(if way == POST_COPY { RELAY } else { SOURCE }, WAYS[way], peer);
        report.add(Row::new(format!("fork.{name}.beside_{beside}"), "ms", ours).promised(promise).beside(peer));
    };
    row("pause", "qemu", SNAPSHOT, Promise::RatioAtMost(PAUSE), |fork| fork.pause);
    if tracer.is_some() {
        row("still", "qemu", SNAPSHOT, Promise::RatioAtMost(PAUSE), |fork| fork.still);
    }
    row("running", "qemu", SNAPSHOT, Promise::RatioAtMost(CALL), |fork| fork.running);
    row("answers", "qemu", SNAPSHOT, Promise::None, |fork| fork.answers);
    row("pause", "file", FILE, Promise::None, |fork| fork.pause);
    row("running", "file", FILE, Promise::None, |fork| fork.running);
    row("answers", "file", FILE, Promise::None, |fork| fork.answers);
    row("pause", "savevm", SAVEVM, Promise::None, |fork| fork.pause);
    row("running", "post_copy", POST_COPY, Promise::None, |fork| fork.running);
    row("answers", "post_copy", POST_COPY, Promise::None, |fork| fork.answers);
    Ok(())
}

/// Boots a guest and fills its memory.
fn filled<'a>(tools: &'a Tools, spec: &Spec, who: &str) -> Result<Guest<'a>> {
    progress(&format!("booting {} and filling its memory: {who}", spec.monitor.name()));
    let mut guest = Guest::start_as(tools, spec, format!("bench-{who}"))?;
    guest.wait_ready()?;
    guest.run(&fill(), PATIENCE)?;
    Ok(guest)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Has a child say what it has in memory, and fails if that is not its source's of the fork; how long after `call` it did.
fn look(child: &mut Guest, before: &str, call: Instant) -> Result<Duration> {
    let said = child.run(LOOK, PATIENCE)?;
    let after = call.elapsed();
    let parse = |said: &str| -> Option<(u64, String)> {
        let (round, sum) = said.trim().split_once('\n')?;
        Some((round.parse().ok()?, sum.to_owned()))
    };
    let (was, is) = (parse(before).context("no round")?, parse(&said).context("no round")?);
    ensure!(is.0 >= was.0 && is.1 == was.1, "the source said {before:?}, then its child {said:?}");
    Ok(after)
}
