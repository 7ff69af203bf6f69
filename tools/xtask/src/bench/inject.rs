//! A program started from outside in a guest that stands still, until it has said its first word: beside the same done on QEMU as the
//! CIVIC paper did it.
//!
//! ```text
//!              not counted                             counted
//!  civic       fork --paused --store, console        │ resume, POST /v1/programs ………………………… the program ─▶ its word on the console
//!  paper       post-copy, device_add of the store    │ gdb: breakpoint, code, jump ─▶ loader script ─▶ the program ─▶ its word
//!  bare stub   stop, device_add of the store         │ GDB stub: code, jump ─▶ continue ……………… the program ─▶ its word
//! ```
//!
//! `paper` is what is promised against (`inject/paper.rs`, with the parts of `peer.rs`): the paper's pipeline with the paper's tools, on a clone. What
//! QEMU's part of it costs by itself, without clone, GDB and script, is `bare stub` (`inject/bare.rs`): no way to look into a VM, only shown.
//!
//! The same kernel, initramfs and store: an ext4 file system with a static program that does nothing but write a line to the console
//! (`inject/word.rs`). That is the first that can be seen of the program on all sides; Civic's loader also tells when it has executed it. Each round starts two
//! programs in the guest: one just after the store was plugged in, and one again, when the guest has found it. Who is not measured stands
//! still; Civic's guest is forked and the paper's cloned for each round, that of the bare stub is tidied up and goes on.
//!
//! A source looks for its kernel when it is first forked, and its later forks know it. So Civic finds the kernel within what is counted in
//! the first round only, which is shown by itself (`unknown`): one sample, and everything else in it is cold too. What forks need of memory is
//! brought beforehand once two have shown it, so the rounds up to then warm up. Both of QEMU's are told the addresses beforehand.
//!
//! A stage's row has all of the peer's time beside it, so that its ratio says how much of that it is. Stages of the loader are told in ticks
//! of the guest's time stamp counter, whose rate the guest's kernel tells.

mod bare;
mod paper;
mod word;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use civic_bench::report::{Peer, Promise, Report, Row};
use civic_bench::stats::Samples;
use civic_loader::{Exit, FromGuest, Stage, split};
use serde_json::{Value, json};

use super::clock::Clock;
use super::guest::{Guest, said};
use super::io::complaints;
use super::machine::{Image, Monitor, Spec, Tools, Userland, line};
use super::peer::clone::{Sockets, listens};
use super::peer::root_port;
use super::progress;
use super::store;
use bare::Bare;
use paper::Paper;

const MEMORY_MIB: u32 = 256;
const CPUS: u8 = 1;
/// How long anything may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// Rounds that are not counted.
const WARM_UP: usize = 3;
/// The time, as a share of the peer's.
const TIME: f64 = 0.1;
/// Where QEMU's guests have the store, and what is on it.
const FOLDER: &str = "/mnt";
const WORD: &str = "/mnt/word";
const LOADER: &str = "/mnt/loader";
/// The paper's loader: its argument is the program's.
const LOADER_SCRIPT: &str = "#!/bin/sh\nexec /mnt/word \"$1\"\n";
/// Who is measured.
const NAMES: [&str; 3] = ["civic", "paper", "bare stub"];
/// Civic's stages, as its monitor calls them.
const MONITORS: [&str; 7] = ["find", "place", "hook", "queue", "exec", "remove", "hello"];
/// And the loader's, each of which ends so.
const LOADERS: [(Stage, &str); 5] = [
    (Stage::Configured, "configured"),
    (Stage::Frozen, "frozen"),
    (Stage::Mounted, "mounted"),
    (Stage::NetworkUp, "network"),
    (Stage::Execed, "execed"),
];

/// A program that says a word of its own.
struct Program(String);

impl Program {
    fn line(&self) -> String {
        format!("{}\r\n", self.0)
    }
}

/// How long it took to start one, in milliseconds.
struct Run {
    took: f64,
    /// Of Civic only.
    stages: Vec<(&'static str, f64)>,
}

/// Measures and reports.
pub fn run(tools: &Tools, clock: &Clock, quick: bool, rounds: Option<u16>, report: &mut Report) -> Result<()> {
    let rounds = rounds.map_or(if quick { 5 } else { 30 }, usize::from);
    let stores = ["civic", "paper", "bare"].map(|who| tools.work.join(format!("store-{who}.img")));
    store::make(tools, &[], &[("loader", LOADER_SCRIPT.as_bytes()), ("word", &word::program())], &stores)?;
    let [civics_store, papers_store, bare_store] = stores;
    let spec = |monitor, cmdline: &str, more: Vec<String>| Spec {
        monitor,
        image: Image::BzImage,
        userland: Userland::Bench,
        cpus: CPUS,
        memory_mib: MEMORY_MIB,
        cmdline: cmdline.to_owned(),
        disks: Vec::new(),
        taps: Vec::new(),
        vsock: None,
        more,
    };
    // Who is not measured stands still for longer than a kernel finds usual.
    let cmdline = "civic.bench=inject nosoftlockup";
    let ours = spec(Monitor::Civic, cmdline, Vec::new());
    let qemu = |more: Vec<String>| {
        spec(Monitor::Q35, &format!("{cmdline} nokaslr"), root_port(0).into_iter().chain(more).collect())
    };
    let [source, bare] = ["source", "bare"].map(|who| Listening::new(tools, who));
    let (papers, bares) = (qemu(source.options()), qemu(bare.options()));
    let sockets = ["second", "clone"].map(|who| Sockets::new(&tools.work, who));
    let second = qemu(sockets[0].options());
    let clone = qemu(sockets[1].deferred_options().into_iter().chain(sockets[1].stub_options()).collect());
    let peers = [("qemu, source", &papers), ("qemu, second", &second), (CLONE, &clone), (BARE, &bares)];
    for (name, spec) in [("civic", &ours)].into_iter().chain(peers) {
        report.command(name, line(&tools.command(spec, "NAME")));
    }
    let mut civic = Civic::new(tools, booted(tools, &ours, "civic")?, civics_store)?;
    let guest = booted(tools, &papers, "source")?;
    let Listening { control, stub } = source;
    let mut paper =
        Paper::new(tools, paper::Parts { guest, control, stub, second, clone, sockets, store: papers_store })?;
    let mut bare = Bare::new(booted(tools, &bares, "bare")?, &bare.control, bare.stub, bare_store)?;

    let (mut firsts, mut agains): ([Vec<Run>; 3], [Vec<Run>; 3]) = Default::default();
    for round in 0..WARM_UP + rounds {
        progress(&format!("starting programs from outside: round {} of {}", round + 1, WARM_UP + rounds));
        for who in (0..NAMES.len()).map(|n| (n + round) % NAMES.len()) {
            let programs = ["first", "again"].map(|which| Program(format!("CIVIC-BENCH-PROGRAM-{which}-{round}")));
            let done = match who {
                0 => civic.round(round, &programs, clock),
                1 => paper.round(round, &programs, clock),
                _ => bare.round(&programs, clock),
            };
            let [first, again] = done.with_context(|| format!("round {round} of {}", NAMES[who]))?;
            firsts[who].push(first);
            agains[who].push(again);
        }
    }
    bare.finish()?;
    let mut table = Table(report);
    table.rows("", &firsts.each_ref().map(|runs| &runs[WARM_UP..]), Promise::RatioAtMost(TIME));
    table.rows(".again", &agains.each_ref().map(|runs| &runs[WARM_UP..]), Promise::None);
    table.rows(".unknown", &firsts.each_ref().map(|runs| &runs[..1]), Promise::None);
    Ok(())
}

/// The two of QEMU that are measured, in the report.
const CLONE: &str = "qemu, clone";
const BARE: &str = "qemu, bare stub";

/// Where a QEMU listens.
struct Listening {
    control: PathBuf,
    stub: PathBuf,
}

impl Listening {
    fn new(tools: &Tools, who: &str) -> Self {
        let socket = |what: &str| tools.work.join(format!("{who}.{what}"));
        Self { control: socket("qmp"), stub: socket("gdb") }
    }

    fn options(&self) -> Vec<String> {
        ["-qmp", &listens(&self.control), "-gdb", &listens(&self.stub)].map(str::to_owned).into()
    }
}

/// The rows.
struct Table<'a>(&'a mut Report);

impl Table<'_> {
    /// All, and then the stages of Civic: runs of [`NAMES`].
    fn rows(&mut self, name: &str, [ours, paper, bare]: &[&[Run]; 3], promise: Promise) {
        let took = |runs: &[Run]| runs.iter().map(|run| run.took).collect::<Samples>();
        let (whole, pipeline) = (format!("inject.first_instruction{name}"), "the paper's way: post-copy, gdb, script");
        self.row(whole.clone(), promise, took(ours), took(paper), CLONE, pipeline);
        self.row(format!("{whole}.beside_bare_stub"), Promise::None, took(ours), took(bare), BARE, "no clone, no gdb");
        for (at, (stage, _)) in ours.first().into_iter().flat_map(|run| run.stages.iter().enumerate()) {
            let of = ours.iter().map(|run| run.stages[at].1).collect();
            self.row(format!("inject{name}.{stage}"), Promise::None, of, took(paper), CLONE, pipeline);
        }
    }

    fn row(&mut self, name: String, promise: Promise, ours: Samples, peer: Samples, peer_name: &str, how: &str) {
        self.0.add(Row::new(name, "ms", ours).promised(promise).beside(Peer::in_turns(peer_name, how, peer)));
    }
}

fn booted<'a>(tools: &'a Tools, spec: &Spec, who: &str) -> Result<Guest<'a>> {
    progress(&format!("booting {}: {who}", spec.monitor.name()));
    let mut guest = Guest::start_as(tools, spec, format!("bench-{who}"))?;
    guest.wait_ready()?;
    Ok(guest)
}

/// Civic's source of forks.
struct Civic<'a> {
    tools: &'a Tools,
    source: Guest<'a>,
    store: PathBuf,
    /// Of the guest's time stamp counter, in a millisecond.
    ticks: f64,
}

impl<'a> Civic<'a> {
    /// Looks at a guest that is up, and has it stand still.
    fn new(tools: &'a Tools, mut source: Guest<'a>, store: PathBuf) -> Result<Self> {
        let ticks = ticks(&mut source)?;
        source.ask("POST", "/v1/pause", &Value::Null)?;
        Ok(Self { tools, source, store, ticks })
    }

    /// Has a fork start programs: with the store just plugged in, and then once more.
    fn round(&mut self, round: usize, programs: &[Program; 2], clock: &Clock) -> Result<[Run; 2]> {
        self.source.ask("POST", "/v1/resume", &Value::Null)?;
        self.source.run("true", PATIENCE)?;
        let name = format!("bench-child-{round}");
        let store = format!("{},overlay", self.store.display());
        let mut fork = self.tools.civic(&["fork", self.source.name(), "--name", &name, "--paused", "--store", &store]);
        said(fork.arg("--overlay-dir").arg(&self.tools.work))?;
        self.source.ask("POST", "/v1/pause", &Value::Null)?;
        let mut child = Guest::attach(self.tools, name)?;
        let first = self.start(&mut child, &programs[0], clock)?;
        child.ask("POST", "/v1/pause", &Value::Null)?;
        let again = self.start(&mut child, &programs[1], clock)?;
        complaints(&mut child)?;
        Ok([first, again])
    }

    /// From a fork that stands still until a program in it speaks; afterwards that has ended and the fork runs.
    fn start(&self, child: &mut Guest, program: &Program, clock: &Clock) -> Result<Run> {
        let argv = ["/word", &program.0];
        let (mark, call) = (clock.mark(), Instant::now());
        child.ask("POST", "/v1/resume", &Value::Null)?;
        let resumed = call.elapsed();
        let started = child.ask("POST", "/v1/programs", &json!({ "argv": argv }))?;
        let spoke = child.wait(&program.line(), PATIENCE);
        let stretch = clock.stretch(&mark)?;
        let told = child.listen(&format!("/v1/programs/{}", started["id"]), "civic-program", PATIENCE)?;
        // If there was no word, the loader knows why.
        let loaders = loaders(&told, self.ticks)?;
        let (_, spoke) = spoke.context("the program in Civic's fork")?;
        let mut stages = vec![("resume", resumed.as_secs_f64() * 1e3)];
        for stage in MONITORS {
            let us = started["stages"][format!("{stage}_us")].as_f64();
            stages.push((stage, us.with_context(|| format!("no {stage} in {started}"))? / 1e3));
        }
        stages.extend(loaders);
        stages.iter_mut().for_each(|(_, ms)| *ms /= stretch);
        Ok(Run { took: (spoke - call).as_secs_f64() * 1e3 / stretch, stages })
    }
}

/// How many ticks of a guest's time stamp counter are a millisecond.
pub fn ticks(guest: &mut Guest) -> Result<f64> {
    let rate = guest.run(RATE, PATIENCE)?;
    let mhz: f64 = rate.trim().parse().with_context(|| format!("the guest tells no rate of its counter: {rate}"))?;
    Ok(mhz * 1e3)
}

/// Prints the rate of the time stamp counter in MHz.
const RATE: &str = "dmesg | sed -n 's/.*tsc: Detected \\([0-9.]*\\) MHz.*/\\1/p' | head -n 1";

/// The loader's stages in what it said, in milliseconds.
fn loaders(said: &[u8], ticks: f64) -> Result<Vec<(&'static str, f64)>> {
    let (mut rest, mut told) = (said, Vec::new());
    loop {
        let (frame, len) = split(rest).ok().flatten().context("the loader's frames end without its last one")?;
        match FromGuest::decode(frame).ok().context("the loader's frames make no sense")? {
            FromGuest::Stage { stage, tsc } => told.push((stage, tsc)),
            FromGuest::Exited(how) => {
                ensure!(how == Exit::Code(0), "the program ended with {how:?}");
                break;
            }
            FromGuest::Failed { text, errno, .. } => bail!("the loader failed: {text} ({errno})"),
            FromGuest::Stderr(text) => bail!("the program complains: {}", String::from_utf8_lossy(text)),
            _ => {}
        }
        rest = &rest[len..];
    }
    let at = |wanted: Stage| told.iter().find(|(stage, _)| *stage == wanted).map(|(_, tsc)| *tsc);
    let mut last = at(Stage::Started).context("the loader has not told that it started")?;
    let mut stages = Vec::new();
    for (stage, name) in LOADERS {
        let tsc = at(stage).with_context(|| format!("the loader has not told that it was {name}"))?;
        stages.push((name, tsc.wrapping_sub(last) as f64 / ticks));
        last = tsc;
    }
    Ok(stages)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a loader says that has come through the stages at these times.
    fn said(stages: &[(Stage, u64)], last: FromGuest<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let stages = stages.iter().map(|&(stage, tsc)| FromGuest::Stage { stage, tsc });
        for frame in stages.chain([last]) {
            frame.encode(&mut bytes).unwrap();
        }
        bytes
    }

    const ALL: [(Stage, u64); 6] = [
        (Stage::Started, 1000),
        (Stage::Configured, 3000),
        (Stage::Frozen, 3000),
        (Stage::Mounted, 9000),
        (Stage::NetworkUp, 9500),
        (Stage::Execed, 11_000),
    ];

    #[test]
    fn a_stage_is_from_the_end_of_the_one_before() {
        let stages = loaders(&said(&ALL, FromGuest::Exited(Exit::Code(0))), 1000.0).unwrap();
        let expected = [("configured", 2.0), ("frozen", 0.0), ("mounted", 6.0), ("network", 0.5), ("execed", 1.5)];
        assert_eq!(stages, expected);
    }

    #[test]
    fn a_program_that_went_wrong_is_no_sample() {
        let bytes = said(&ALL, FromGuest::Exited(Exit::Code(0)));
        let check = |bytes: &[u8]| assert!(loaders(bytes, 1000.0).is_err());
        check(&bytes[..bytes.len() - 1]);
        check(&said(&ALL, FromGuest::Exited(Exit::Code(1))));
        check(&said(&ALL[..4], FromGuest::Exited(Exit::Code(0))));
        check(&said(&ALL, FromGuest::Warning("x")));
    }
}
