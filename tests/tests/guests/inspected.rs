//! `civic inspect` of stock guests: forks, programs of a store in them, what they say, and that nothing is left but what they wrote there.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use civic_tests::linux::{STEP, Spec, Vm, run};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::injected::{expect, store, text};

/// Counts its rounds in the store, and leaves a process behind there.
const COUNT: &str = "n=$(/tools/busybox cat /count 2>/dev/null || echo 0); n=$((n + 1)); echo $n > /count; echo $n; \
    (/tools/busybox setsid /tools/busybox sh -c 'exec > /log 2>&1; while :; do echo x; /tools/busybox sleep 1; done' &)";
/// Whether what a guest does goes on.
const MOVES: &str = "wc -l < /tmp/counts; sleep 1; wc -l < /tmp/counts";

/// A guest, and a store.
struct Inspected {
    vm: Vm,
    store: PathBuf,
    _dir: tempfile::TempDir,
}

impl Inspected {
    fn new(spec: &Spec) -> Result<Self> {
        let vm = Vm::start(spec)?;
        let dir = tempfile::tempdir()?;
        let store = store(dir.path())?;
        Ok(Self { vm, store, _dir: dir })
    }

    fn command(&self, options: &[&str], program: &[&str]) -> Result<Command> {
        let mut command = self.vm.inspecting()?;
        command.args(options).arg("--").args(program);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    }

    /// With the store, to be written to.
    fn with_store(&self, options: &[&str], script: &str) -> Result<Command> {
        let store = self.store.display().to_string();
        self.command(&[&["--store", &store], options].concat(), &["/tools/busybox", "sh", "-c", script])
    }

    /// The store has a file system without a fault that needs no recovery.
    fn check_store(&self) -> Result<()> {
        let said = run("e2fsck", &["-f", "-n", &self.store.display().to_string()])?;
        ensure!(!said.contains("recovery"), "the store was not unmounted: {said}");
        Ok(())
    }

    /// Nothing is left but the guest itself.
    fn check_rest(&self) -> Result<()> {
        let run_dir = self.vm.dir().parent().context("it is in a run directory")?.to_owned();
        let entries = || -> Result<Vec<_>> {
            Ok(fs::read_dir(&run_dir)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?)
        };
        ensure!(entries()? == [self.vm.dir()], "{:?}", entries()?);
        // The page server goes when it has heard that nobody is left.
        let deadline = Instant::now() + STEP;
        while processes(&run_dir)?.len() > 1 {
            ensure!(Instant::now() < deadline, "processes are left: {:?}", processes(&run_dir)?);
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Those of a run directory, with their arguments.
fn processes(run_dir: &Path) -> Result<BTreeMap<i32, String>> {
    let run_dir = run_dir.display().to_string();
    let pids = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let lines = pids.filter_map(|pid| Some((pid, fs::read(format!("/proc/{pid}/cmdline")).ok()?)));
    let lines = lines.map(|(pid, line)| (pid, text(&line).replace('\0', " ")));
    // The commands themselves are none of it.
    Ok(lines.filter(|(_, line)| line.contains(&run_dir) && !line.contains("--run-dir")).collect())
}

/// Everything once, and what is left of it.
pub fn tiny(spec: &Spec) -> Result<()> {
    let mut inspected = Inspected::new(spec)?;
    once(&inspected).context("once")?;
    frozen(&mut inspected).context("with the guest frozen")?;
    again(&inspected).context("again and again")?;
    several(&inspected).context("several at once")?;
    reported(&inspected).context("as JSON")?;
    kept(&inspected).context("kept")?;
    interrupted(&inspected).context("interrupted")?;
    inspected.check_rest()?;
    inspected.vm.check_kernel_log()?;
    inspected.vm.stop()
}

/// Output, input and exit status are the program's.
fn once(this: &Inspected) -> Result<()> {
    let seen = "echo out; echo err >&2; /tools/busybox cat /note /guest/www/index.html; exit 7";
    let out = this.with_store(&[], seen)?.output()?;
    expect(&out, 7, "out\nof the store\nhello from the tiny guest\n", "err\n")?;
    this.check_store()?;
    this.check_rest()?;
    let mut command = this.command(&[], &["/bin/cat"])?;
    let mut running = command.stdin(Stdio::piped()).spawn()?;
    running.stdin.take().context("its input is a pipe")?.write_all(b"typed\n")?;
    expect(&running.wait_with_output()?, 0, "typed\n", "")?;
    expect(&this.command(&[], &["/bin/sh", "-c", "kill -9 $$"])?.output()?, 137, "", "")?;
    let out = this.command(&["--timeout", "1"], &["/bin/sleep", "1000"])?.output()?;
    ensure!(out.status.code() == Some(124), "{out:?}");
    let out = this.command(&[], &["strace"])?.output()?;
    ensure!(out.status.code() == Some(127) && text(&out.stderr).contains("--store FILE"), "{out:?}");
    let out = this.command(&["--store", &this.store.display().to_string()], &["/bin/sh"])?.output()?;
    ensure!(out.status.code() == Some(127) && text(&out.stderr).contains("--root guest"), "{out:?}");
    // Nobody reads on: it is not run for ever.
    let mut running = this.command(&[], &["/bin/yes"])?.spawn()?;
    let mut line = String::new();
    BufReader::new(running.stdout.take().context("its output is a pipe")?).read_line(&mut line)?;
    ensure!(line == "y\n" && ended(running, STEP)?.status.code() == Some(128 + Signal::SIGPIPE as i32), "{line}");
    this.check_store()?;
    this.check_rest()
}

fn frozen(this: &mut Inspected) -> Result<()> {
    this.vm.sh(
        "(while :; do echo >> /tmp/counts; usleep 20000; done) & until [ -s /tmp/counts ]; do usleep 20000; done",
    )?;
    for (options, moves) in [(&["--freeze"][..], false), (&[], true)] {
        let out = this.command(options, &["/bin/sh", "-c", MOVES])?.output()?;
        let seen = text(&out.stdout);
        let (first, second) = seen.trim().split_once('\n').with_context(|| format!("{out:?}"))?;
        ensure!((first != second) == moves, "{options:?}: from {first} to {second}");
    }
    this.check_rest()
}

/// What is written to the store is there in the next round, though a process was left there.
fn again(this: &Inspected) -> Result<()> {
    let out = this.with_store(&["--every", "10ms", "--rounds", "3"], COUNT)?.output()?;
    let told = text(&out.stderr);
    ensure!(out.status.success() && text(&out.stdout) == "1\n2\n3\n", "{out:?}");
    ensure!((1..=3).all(|round| told.contains(&format!("civic: round {round}: status 0\n"))), "{told}");
    ensure!(told.contains("round 2 begins") && told.contains("late"), "{told}");
    this.check_store()?;
    this.check_rest()?;
    // The last one's.
    let out = this.with_store(&["--every", "1s", "--rounds", "2"], &format!("{COUNT}; [ $n = 4 ]"))?.output()?;
    ensure!(out.status.code() == Some(1) && text(&out.stdout) == "4\n5\n", "{out:?}");
    this.check_store()
}

fn several(this: &Inspected) -> Result<()> {
    let store = format!("{},overlay", this.store.display());
    let script = "echo child {n}; echo {n} > /mine; /tools/busybox cat /mine /count; exit $(({n} - 1))";
    let out = this.command(&["--count", "2", "--store", &store], &["/tools/busybox", "sh", "-c", script])?.output()?;
    let mut lines: Vec<_> = text(&out.stdout).lines().map(str::to_owned).collect();
    lines.sort();
    ensure!(lines == ["1: 1", "1: 5", "1: child 1", "2: 2", "2: 5", "2: child 2"], "{out:?}");
    ensure!(out.status.code() == Some(1), "{out:?}");
    // What they wrote went with them.
    expect(&this.with_store(&[], "[ -e /mine ] || echo none")?.output()?, 0, "none\n", "")?;
    this.check_rest()
}

fn reported(this: &Inspected) -> Result<()> {
    let script = "echo out; /tools/busybox printf '\\377' >&2; kill -15 $$";
    let out = this.with_store(&["--json", "--every", "1ms", "--rounds", "2"], script)?.output()?;
    ensure!(out.status.code() == Some(143) && out.stderr.is_empty(), "{out:?}");
    let lines: Vec<Value> = text(&out.stdout).lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(lines.len() == 2, "{lines:?}");
    for (line, round) in lines.iter().zip(1..) {
        ensure!(line["round"] == round && line["child"] == 1 && line["error"].is_null(), "{line}");
        ensure!(line["status"] == 143 && line["signal"] == 15, "{line}");
        ensure!(line["stdout"]["text"] == "out\n" && line["stderr"]["text"] == "\u{ff}", "{line}");
        ensure!(line["stdout"]["encoding"] == "utf-8" && line["stderr"]["encoding"] == "latin-1", "{line}");
        let stages = &line["stages"];
        let when = |name: &str| stages[name].as_u64().with_context(|| format!("no {name}: {line}"));
        let times = ["waiting_us", "alive_us", "started_us", "first_output_us", "ended_us", "discarded_us"];
        let times = times.into_iter().map(when).collect::<Result<Vec<_>>>()?;
        ensure!(times.is_sorted() && line["pause_us"].as_u64() > Some(0), "{line}");
        ensure!(stages["inject"]["total_us"].as_u64() > Some(0) && stages["fork"]["arm_us"].is_u64(), "{line}");
        eprintln!("{stages}");
    }
    this.check_store()?;
    this.check_rest()
}

/// A child that is kept goes on, with what the program has left in it.
fn kept(this: &Inspected) -> Result<()> {
    let out = this.with_store(&["--keep"], COUNT)?.output()?;
    let told = text(&out.stderr);
    let name =
        told.strip_prefix("civic: ").and_then(|told| told.split_once(" is kept: ")).with_context(|| told.clone())?.0;
    ensure!(out.status.success() && text(&out.stdout) == "6\n", "{out:?}");
    expect(&this.vm.civic_with(&["exec", name, "--", "/tools/busybox", "cat", "/count"])?, 0, "6\n", "")?;
    // As long as it is there, nobody else gets the store.
    let refused = this.with_store(&[], "true")?.output()?;
    ensure!(refused.status.code() == Some(125) && text(&refused.stderr).contains(",overlay"), "{refused:?}");
    expect(&this.vm.civic_with(&["kill", name])?, 0, "", "")?;
    this.check_rest()?;
    // It was unplugged with a process in it: the next one finds all of it again, and leaves it in order.
    let out = this.with_store(&[], "/tools/busybox cat /count")?.output()?;
    expect(&out, 0, "6\n", "")?;
    this.check_store()
}

/// Its output and status; it must end within `limit`.
fn ended(mut command: Child, limit: Duration) -> Result<Output> {
    let deadline = Instant::now() + limit;
    while command.try_wait()?.is_none() {
        if Instant::now() > deadline {
            let _ = command.kill();
            return Err(anyhow!("it does not end: {:?}", command.wait_with_output()?));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(command.wait_with_output()?)
}

/// Whatever the program makes of signals, they end it in order, and a second one ends all at once.
fn interrupted(this: &Inspected) -> Result<()> {
    let cases = [
        ("echo begun; echo more >> /log; exec /tools/busybox sleep 1000", 1, Signal::SIGINT),
        ("trap '' INT TERM HUP; echo begun; while :; do echo more >> /log; done", 1, Signal::SIGTERM),
        ("trap '' INT TERM HUP; echo begun; while :; do echo more > /log; done", 2, Signal::SIGHUP),
    ];
    for (script, signals, signal) in cases {
        let mut running = this.with_store(&[], script)?.spawn()?;
        let mut stdout = BufReader::new(running.stdout.take().context("its output is a pipe")?);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        ensure!(line == "begun\n", "{line:?}");
        let begun = Instant::now();
        for _ in 0..signals {
            kill(Pid::from_raw(running.id() as i32), signal)?;
            std::thread::sleep(Duration::from_millis(100));
        }
        let out = ended(running, STEP)?;
        eprintln!("{signal}, {signals} times: it ended within {:?}", begun.elapsed());
        ensure!(out.status.code() == Some(128 + signal as i32), "{out:?}");
        this.check_rest()?;
        if signals == 1 {
            this.check_store()?;
        }
    }
    expect(&this.with_store(&[], "/tools/busybox cat /count")?.output()?, 0, "6\n", "")?;
    this.check_store()
}

/// What may not grow.
#[derive(Clone, Copy, Debug)]
struct Weight {
    descriptors: usize,
    threads: usize,
    kib: u64,
}

impl Weight {
    fn of(pid: u32) -> Result<Self> {
        let entries = |of: &str| Ok::<_, anyhow::Error>(fs::read_dir(format!("/proc/{pid}/{of}"))?.count());
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
        let kib = anonymous.trim().trim_end_matches(" kB").parse()?;
        Ok(Self { descriptors: entries("fd")?, threads: entries("task")?, kib })
    }

    /// Of what is lost each time so many rounds would show it; a heap has its caches.
    fn check(&self, first: &Self, rounds: u32, what: &str) -> Result<()> {
        ensure!(self.descriptors <= first.descriptors + 3, "{what}: {self:?} after {first:?}");
        ensure!(self.threads <= first.threads + 3, "{what}: {self:?} after {first:?}");
        let most = first.kib + 2048 + 4 * u64::from(rounds);
        ensure!(self.kib <= most, "{what}: {self:?} after {first:?}");
        Ok(())
    }
}

/// How many rounds one command does.
const BATCH: u32 = 25;

/// Round after round, with deaths of children and of the page server thrown in: nothing grows, the store loses no space, and stays in order.
pub fn often(spec: &Spec, rounds: u32) -> Result<()> {
    let mut this = Inspected::new(spec)?;
    this.vm
        .sh("(while :; do dd if=/dev/urandom of=/tmp/busy bs=64k count=9 2>/dev/null; usleep 70000; done) & true")?;
    ensure!(this.with_store(&[], COUNT)?.status()?.success(), "the first round failed");
    this.check_rest()?;
    let pid = this.vm.info()?.pid;
    let (mut first, space) = (None, free_blocks(&this.store)?);
    let (mut done, mut lost, mut count) = (0, 0, 1);
    while done < rounds {
        let (ran, failed, last) = batch(&this, done, count)?;
        (done, lost, count) = (done + ran, lost + failed, last);
        // One that was killed has left its journal to the next.
        let out = this.with_store(&[], "/tools/busybox cat /count")?.output()?;
        ensure!(out.status.success() && text(&out.stdout).trim().parse::<u32>()? >= count, "{count}, but {out:?}");
        count = text(&out.stdout).trim().parse()?;
        this.check_store().with_context(|| format!("after {done} rounds"))?;
        this.check_rest().with_context(|| format!("after {done} rounds"))?;
        let now = Weight::of(pid)?;
        eprintln!("{done} rounds, {lost} of them lost, {count} counted: the source's monitor has {now:?}");
        now.check(first.get_or_insert(now), done, "the source")?;
    }
    ensure!(lost > 0 && count > rounds / 2, "{lost} of {done} rounds were lost, {count} counted");
    let left = free_blocks(&this.store)?;
    ensure!(left + 16 >= space, "the store had {space} free blocks, and has {left}");
    this.vm.check_kernel_log()?;
    this.vm.stop()
}

fn free_blocks(store: &Path) -> Result<u64> {
    let told = run("dumpe2fs", &["-h", &store.display().to_string()])?;
    let free = told.lines().find_map(|line| line.strip_prefix("Free blocks:")).context("no free blocks are told")?;
    Ok(free.trim().parse()?)
}

/// So many rounds by one command, of which some are lost to deaths: how many there were, how many were lost, and what was counted last.
fn batch(this: &Inspected, seed: u32, mut count: u32) -> Result<(u32, u32, u32)> {
    let rounds = BATCH.to_string();
    let mut command = this.with_store(&["--every", "1ms", "--rounds", &rounds, "--json"], COUNT)?;
    let mut running = command.stderr(Stdio::null()).spawn()?;
    let pid = running.id();
    let stdout = BufReader::new(running.stdout.take().context("its output is a pipe")?);
    let (mut ran, mut lost, mut first, mut deaths) = (0, 0, None, None);
    for line in stdout.lines() {
        let line = line?;
        let told: Value = serde_json::from_str(&line)?;
        ran += 1;
        match told["status"].as_u64() {
            Some(0) => {
                let counted: u32 = told["stdout"]["text"].as_str().context("no output")?.trim().parse()?;
                // A round that was lost may have counted or not.
                ensure!(counted > count && counted <= count + 1 + lost, "{counted} after {count}: {line}");
                count = counted;
            }
            _ => {
                ensure!(told["error"].is_string(), "{line}");
                eprintln!("round {}: {}", seed + ran, told["error"]);
                lost += 1;
            }
        }
        let now = Weight::of(pid);
        if ran == 3 {
            first = Some(now?);
            deaths = Some(Deaths::begin(this, seed));
        } else if let (Some(first), Ok(now)) = (&first, now) {
            now.check(first, ran, "the command")?;
        }
    }
    drop(deaths);
    let status = running.wait()?;
    ensure!(ran == BATCH && matches!(status.code(), Some(0 | 125)), "{ran} rounds, {status}");
    Ok((ran, lost, count))
}

/// Kills a child or the page server now and then, until dropped.
struct Deaths {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Deaths {
    fn begin(this: &Inspected, seed: u32) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (stop, run_dir) = (Arc::clone(&over), this.vm.dir().parent().map(Path::to_owned).unwrap_or_default());
        let mut random = u64::from(seed) * 2 + 0x9e37_79b9;
        let thread = std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                // xorshift64
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                std::thread::sleep(Duration::from_millis(random % 20_000));
                let sought = if random & 1 << 40 == 0 { "-inspect-" } else { "civic-pager" };
                let victim =
                    processes(&run_dir).ok().and_then(|all| all.into_iter().find(|(_, line)| line.contains(sought)));
                if let Some((pid, _)) = victim {
                    // It may have ended by itself.
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
            }
        });
        Self { over, thread: Some(thread) }
    }
}

impl Drop for Deaths {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
