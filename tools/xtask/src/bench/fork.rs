//! A fork beside the nearest that QEMU has: a `background-snapshot`, streamed into a second QEMU that waits for it.
//!
//! ```text
//!  civic   POST /v1/fork ─▶ pause ─▶ run ─▶ the child runs ─▶ answer
//!  qemu    migrate ─▶ STOP ─▶ RESUME ─▶ … stream … ─▶ the second one's RESUME
//! ```
//!
//! Both sources are up all the time, the same guest with the same in its memory and the same job that goes on writing it; who is not
//! measured stands still. Whoever is to become the child waits beforehand, at both. A call is over when its child runs: by the API's
//! answer, by the second QEMU's word; and the child must then answer on its console and have the memory of its source.
//!
//! The pause is there twice: as each monitor tells it, Civic in the answer's stages (from asking the vCPUs to stop until they run) and
//! QEMU by its two events (from when they have stopped, so that QEMU's is told a little too short); and as the host's kernel saw it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use civic_bench::report::{Peer, Promise, Report, Row};
use civic_bench::stats::Samples;
use serde_json::{Value, json};

use super::clock::Clock;
use super::guest::Guest;
use super::machine::{Image, Monitor, Spec, Tools, Userland, line};
use super::peer::clone::{Sockets, Source, listens};
use super::progress;
use super::stillness::Tracer;

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

/// What one fork showed, in milliseconds.
struct Fork {
    pause: f64,
    still: Option<f64>,
    running: f64,
    answers: f64,
}

/// What forks of one monitor showed.
#[derive(Default)]
struct Forks {
    pause: Samples,
    still: Samples,
    running: Samples,
    answers: Samples,
}

impl Forks {
    fn add(&mut self, fork: &Fork) {
        self.pause.push(fork.pause);
        self.running.push(fork.running);
        self.answers.push(fork.answers);
        fork.still.into_iter().for_each(|still| self.still.push(still));
    }
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
    let (ours, peer) = (spec(Monitor::Civic, &[]), spec(Monitor::Q35, &["-qmp".to_owned(), listens(&control)]));
    let second = spec(Monitor::Q35, &sockets.options());
    for (name, spec) in [("civic, source", &ours), ("qemu, source", &peer), ("qemu, second", &second)] {
        report.command(name, line(&tools.command(spec, "NAME")));
    }

    let mut civic = Civic { tools, source: filled(tools, &ours)? };
    civic.halt()?;
    let guest = filled(tools, &peer)?;
    let mut qemu = Qemu { source: Source::new(tools, guest, &control, sockets, PATIENCE)?, second };
    qemu.source.halt()?;

    let mut forks = [Forks::default(), Forks::default()];
    // The first round warms up.
    for round in 0..=rounds {
        progress(&format!("forks beside QEMU's snapshots: round {round} of {rounds}"));
        for who in [round % 2, (round + 1) % 2] {
            let tracer = tracer.as_ref();
            let fork = if who == 0 { civic.fork(round, clock, tracer) } else { qemu.fork(round, clock, tracer) }
                .with_context(|| format!("round {round} of {}", ["civic", "qemu"][who]))?;
            if round > 0 {
                forks[who].add(&fork);
            }
        }
    }
    let mut row = |name: &str, promise, of: fn(&Forks) -> &Samples| {
        let [ours, peer] = [of(&forks[0]).clone(), of(&forks[1]).clone()];
        let peer = Peer::in_turns("qemu, source", "background-snapshot", peer);
        report.add(Row::new(format!("fork.{name}.beside_qemu"), "ms", ours).promised(promise).beside(peer));
    };
    row("pause", Promise::RatioAtMost(PAUSE), |forks| &forks.pause);
    if tracer.is_some() {
        row("still", Promise::RatioAtMost(PAUSE), |forks| &forks.still);
    }
    row("running", Promise::RatioAtMost(CALL), |forks| &forks.running);
    row("answers", Promise::None, |forks| &forks.answers);
    Ok(())
}

/// Boots a guest and fills its memory.
fn filled<'a>(tools: &'a Tools, spec: &Spec) -> Result<Guest<'a>> {
    progress(&format!("booting {} and filling its memory", spec.monitor.name()));
    let mut guest = Guest::start(tools, spec)?;
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

/// Civic's source.
struct Civic<'a> {
    tools: &'a Tools,
    source: Guest<'a>,
}

/// A process that is ended and waited for, whatever happens.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    /// Waits until it ends by itself.
    fn end(mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.0.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "process {} does not end", self.0.id());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Civic<'_> {
    fn halt(&mut self) -> Result<()> {
        self.ask("POST", "/v1/pause", &Value::Null).map(drop)
    }

    /// Asks the source's API.
    fn ask(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        self.source.ask(method, path, body)
    }

    /// Starts a monitor that waits.
    fn waiting(&self, name: &str) -> Result<Process> {
        let dir = self.tools.run_dir().join(name);
        std::fs::create_dir_all(&dir)?;
        let log = std::fs::File::create(dir.join("vmm.log"))?;
        let mut command = self.tools.civic_vmm(name);
        let mut process =
            Process(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log.try_clone()?).spawn()?);
        let source = self.tools.run_dir().join(self.source.name());
        let config = json!({ "name": name, "fork_of": source, "overlay_dir": self.tools.work });
        let stdin = process.0.stdin.take().context("a pipe")?;
        serde_json::to_writer(&stdin, &config)?;
        drop(stdin);
        let mut ready = String::new();
        BufReader::new(process.0.stdout.take().context("a pipe")?).read_line(&mut ready)?;
        ensure!(ready.contains("ready"), "no monitor waits: {ready}");
        Ok(process)
    }

    fn page_server(&self) -> Result<Process> {
        let process = Process(self.tools.civic_pager(self.source.name()).stdin(Stdio::null()).spawn()?);
        let deadline = Instant::now() + PATIENCE;
        while self.ask("GET", "/v1/info", &Value::Null)?["family"]["page_server"] != json!(true) {
            ensure!(Instant::now() < deadline, "the page server does not turn up");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(process)
    }

    fn fork(&mut self, round: usize, clock: &Clock, tracer: Option<&Tracer>) -> Result<Fork> {
        self.ask("POST", "/v1/resume", &Value::Null)?;
        let before = self.source.run(LOOK, PATIENCE)?;
        let name = format!("bench-child-{round}");
        let waiting = self.waiting(&name)?;
        let page_server = self.page_server()?;
        tracer.map_or(Ok(()), Tracer::begin)?;
        let (mark, call) = (clock.mark(), Instant::now());
        let report = self.ask("POST", "/v1/fork", &json!({ "children": [name], "paused": false }))?;
        let running = call.elapsed();
        let stretch = clock.stretch(&mark)?;
        tracer.map_or(Ok(()), Tracer::end)?;
        let pause = report["stages"]["pause_us"].as_f64().context("no pause in the answer")? / 1e3;
        ensure!(report["children"][0]["name"] == json!(name), "no child lives: {report}");
        let still = tracer.map(|tracer| tracer.longest(self.source.pid()?)).transpose()?;
        let mut child = Guest::attach(self.tools, name)?;
        let answers = look(&mut child, &before, call)?;
        drop(child);
        waiting.end()?;
        page_server.end()?;
        self.halt()?;
        Ok(Fork { pause, still, running: ms(running) / stretch, answers: ms(answers) })
    }
}

/// QEMU's source, and what a second QEMU is started with.
struct Qemu<'a> {
    source: Source<'a>,
    second: Spec,
}

impl Qemu<'_> {
    fn fork(&mut self, round: usize, clock: &Clock, tracer: Option<&Tracer>) -> Result<Fork> {
        self.source.go()?;
        let before = self.source.guest.run(LOOK, PATIENCE)?;
        let mut second = self.source.second(&self.second, format!("bench-second-{round}"))?;
        tracer.map_or(Ok(()), Tracer::begin)?;
        let (mark, call) = (clock.mark(), Instant::now());
        let [stopped, resumed] = self.source.snapshot()?;
        // Its vCPUs come after its word.
        std::thread::sleep(GRACE);
        tracer.map_or(Ok(()), Tracer::end)?;
        let running = second.runs(PATIENCE)? - call;
        let stretch = clock.stretch(&mark)?;
        let answers = look(&mut second.guest, &before, call)?;
        let still = tracer.map(|tracer| tracer.longest(self.source.guest.pid()?)).transpose()?;
        self.source.complete()?;
        drop(second);
        self.source.halt()?;
        let pause = resumed.happened.saturating_sub(stopped.happened);
        Ok(Fork { pause: ms(pause), still, running: ms(running) / stretch, answers: ms(answers) })
    }
}
