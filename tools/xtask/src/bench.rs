//! `cargo xtask bench`: the promises that are figures, measured side by side with QEMU.
//!
//! ```text
//!  cargo xtask bench ── set-up, release build ──► xtask bench-host      where guests run: here, or in the testbed
//!                                                  ├── boot             process start to user space; the monitor's own memory
//!                                                  ├── io               disks, network, vsock, what programs from outside say
//!                                                  ├── hotplug          a device until the guest uses it, beside device_add
//!                                                  ├── inject           a program started from outside, beside the CIVIC paper's way
//!                                                  ├── inspect          the whole of it: fork, devices, program; beside the CIVIC paper's pipeline
//!                                                  └── fork             forks beside QEMU's background-snapshot
//!                                   └► tests/benches/fork PART           bare-metal guests, forked, beside the machine's floors; Debian under load
//! ```
//!
//! `bench fork` has parts, each run where it can be; `--only` takes their names. `bench all` is all of them, one after the other: what fails
//! does not keep the others from being measured, and is said.
//!
//! The half on the KVM host measures, prints the table and writes the rows as JSON ([`civic_bench::record`]); its status says whether the
//! promises hold.
//!
//! Invariants: a figure of Civic's stands beside one of QEMU's taken in the same minutes, the two in turn (A, B, A, B, …); both
//! monitors get the same kernel, initramfs, memory, vCPUs and devices; nothing that was left out is left out silently; no
//! absolute time measured in the testbed is shown as if it meant something.

mod boot;
mod channel;
mod clock;
mod fio;
mod fork;
mod guest;
mod hotplug;
mod images;
mod inject;
mod inspect;
mod io;
mod machine;
mod memory;
mod net;
mod peer;
mod qmp;
mod stillness;
mod store;
mod vsock;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use civic_bench::facts::Facts;
use civic_bench::record::{Record, Where};
use civic_bench::report::Report;
use civic_bench::{figures, page};
use civic_testbed::apt::{self, Apt};
use civic_testbed::cache::{self, make_once};
use civic_testbed::{client, setup as testbed_setup};

use crate::place::{Job, Place};
use crate::setup;
use crate::test::{cargo, program};
use clock::{Clock, Ticker};
use machine::Tools;

/// What only benches need of the system: `qemu-img` makes their qcow2 images; the libraries of GDB; what looks around in forks.
const PACKAGES: [&str; 5] = ["qemu-utils", "gdb", "procps", "lsof", "iproute2"];
/// The parts of the bench of forks.
const FORK_PARTS: [&str; 4] = ["bare", "slowdown", "qemu", "load"];
/// And those of the CIVIC paper's evaluation.
const PAPER_PARTS: [&str; 2] = ["paper", "served"];
/// Seconds that a bench may take.
const TIMEOUT: u64 = 4 * 3600;

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum What {
    /// Time from process start to guest user space, and the monitor's own memory.
    Boot,
    /// Disks, network and vsock.
    Io,
    /// Forks: of bare-metal guests (pause, first instruction, many children, memory, writes of the source), beside QEMU's
    /// snapshots, and of Debian under load.
    Fork,
    /// A device that is plugged in, until the guest uses it.
    Hotplug,
    /// A program that is started in a fork from outside, until it runs.
    Inject,
    /// The whole of it: from the call until a program's first line, in a fork of a Debian under load, with a store and a network card.
    Inspect,
    /// The CIVIC paper's evaluation: what forks of idle, static and dirtying guests of 1, 2 and 4 GiB cost, and what their sources lose.
    Paper,
    /// All of them, and every figure that is promised must be there.
    All,
}

/// What to measure, how long and where.
#[derive(clap::Args)]
pub struct Args {
    #[arg(value_enum)]
    what: What,
    /// Fewer runs of fewer things: minutes, in the testbed too.
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    choice: Choice,
    /// Also write the rows there.
    #[arg(long, value_name = "OUT")]
    json: Option<PathBuf>,
    /// Also write a page with tables and plots of them there.
    #[arg(long, value_name = "PAGE")]
    markdown: Option<PathBuf>,
    /// In the testbed, even if this machine could.
    #[arg(long)]
    testbed: bool,
}

/// Which of a bench's rows, on what guests, and how often; what is not given is as the effort has it.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Choice {
    /// Of `io`, only rows whose names begin so: `net.tcp_tx`, `blk.rand`, `vsock`, `program`; of `fork`, only this part: `bare`, `slowdown`, `qemu`,
    /// `load`; of `paper`: `paper` or `served`. May be given several times.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Rounds of each of `io`'s rows, of forks beside QEMU's snapshots, of devices plugged in, of programs started and of looks into forks.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// Seconds of each run of them.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: Option<u32>,
    /// vCPUs of `io`'s guests.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    cpus: u8,
}

impl Choice {
    /// Whether a row called `name` is wanted, or one that begins so.
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| name.starts_with(only) || only.starts_with(name))
    }

    /// The options that say the same.
    fn options(&self) -> Vec<String> {
        let only = self.only.iter().map(|only| format!("--only={only}"));
        let rounds = self.rounds.map(|rounds| format!("--rounds={rounds}"));
        let seconds = self.seconds.map(|seconds| format!("--seconds={seconds}"));
        only.chain(rounds).chain(seconds).chain((self.cpus != 1).then(|| format!("--cpus={}", self.cpus))).collect()
    }
}

/// The half on the KVM host.
#[derive(clap::Args)]
pub struct HostArgs {
    #[arg(value_enum)]
    what: What,
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    choice: Choice,
    #[arg(long)]
    json: PathBuf,
    /// What measures it again.
    #[arg(long)]
    again: String,
    #[arg(long)]
    clock: Option<PathBuf>,
    #[arg(long)]
    qemu: PathBuf,
    #[arg(long)]
    qemu_data: Vec<PathBuf>,
    #[arg(long)]
    gdb: PathBuf,
}

/// Measures where guests can run; whether all promises hold.
pub fn run(args: &Args) -> Result<bool> {
    setup::all()?;
    ensure!(cargo(&["build", "--quiet", "--release", "--workspace", "--bins"], &[])?, "cannot build civic");
    let folder = client::workspace()?.join("target");
    fs::create_dir_all(&folder)?;
    let mut parts = Parts { args, folder, held: true, records: Vec::new() };
    if args.what == What::All {
        ensure!(args.choice.only.is_empty(), "all is all: without --only, or name a bench");
        use What::{Boot, Fork, Hotplug, Inject, Inspect, Io, Paper};
        for what in [Fork, Paper, Boot, Hotplug, Inject, Io, Inspect] {
            for part in parts_of(what, &Choice::default())? {
                if let Err(e) = parts.measure(what, part) {
                    println!("bench: FAILED: {}: {e:#}", parts.again(what, part)?);
                    parts.held = false;
                }
            }
        }
        parts.sum_up();
    } else {
        for part in parts_of(args.what, &args.choice)? {
            parts.measure(args.what, part)?;
        }
    }
    if let Some(to) = &args.markdown {
        page::write(&parts.records, to).with_context(|| format!("cannot write {}", to.display()))?;
    }
    Ok(parts.held)
}

/// The parts of a bench that are wanted; most benches are all one.
fn parts_of(what: What, choice: &Choice) -> Result<Vec<Option<&'static str>>> {
    let parts = match what {
        What::Fork => &FORK_PARTS[..],
        What::Paper => &PAPER_PARTS,
        _ => return Ok(vec![None]),
    };
    let wanted: Vec<_> = parts.iter().copied().filter(|part| choice.wants(part)).map(Some).collect();
    ensure!(!wanted.is_empty(), "this bench has the parts {parts:?}, not {:?}", choice.only);
    Ok(wanted)
}

/// A page of the rows that runs have written.
pub fn page(runs: &[PathBuf], to: &Path) -> Result<bool> {
    let mut records: Vec<Record> = Vec::new();
    for run in runs {
        let text = fs::read(run).with_context(|| format!("cannot read {}", run.display()))?;
        let rows: Vec<Record> = serde_json::from_slice(&text)
            .with_context(|| format!("{} is not what 'cargo xtask bench … --json' writes", run.display()))?;
        records.extend(rows);
    }
    page::write(&records, to).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(true)
}

/// Benches in parts, each in the place that it needs.
struct Parts<'a> {
    args: &'a Args,
    /// Of the workspace: both this machine and the testbed write there.
    folder: PathBuf,
    /// Whether every promise so far holds.
    held: bool,
    records: Vec<Record>,
}

impl Parts<'_> {
    fn measure(&mut self, what: What, part: Option<&'static str>) -> Result<()> {
        match part {
            None | Some("qemu") => self.beside_qemu(what, part),
            Some(part @ ("load" | "served")) => self.forks(what, part, Place::for_guests),
            Some(part) => self.forks(what, part, Place::for_bare),
        }
    }

    /// The command that measures it by itself.
    fn again(&self, what: What, part: Option<&str>) -> Result<String> {
        let mut words = vec!["cargo xtask bench".to_owned(), name(what)?];
        let Args { quick, testbed, choice, .. } = self.args;
        let all = self.args.what == What::All;
        let options = if all { Choice { only: Vec::new(), ..choice.clone() } } else { choice.clone() }.options();
        words.extend(part.filter(|_| choice.only.is_empty() || all).map(|part| format!("--only={part}")));
        words.extend(quick.then(|| "--quick".to_owned()));
        words.extend(options);
        words.extend(testbed.then(|| "--testbed".to_owned()));
        Ok(words.join(" "))
    }

    /// A program of its own: forks of bare-metal guests, which need no stock kernel, or of Debian.
    fn forks(&mut self, what: What, part: &'static str, by_itself: fn() -> (Place, &'static str)) -> Result<()> {
        let program = program("bench", "fork", &["bench", "--no-run"])?;
        let place = settle(self.args, by_itself);
        let (quick, again) = (self.args.quick, self.again(what, Some(part))?);
        self.part(|json| {
            let mut options = vec![part.to_owned(), "--json".to_owned(), json.display().to_string()];
            options.extend(["--again".to_owned(), again]);
            options.extend(quick.then(|| "--quick".to_owned()));
            let root_image = matches!(part, "load" | "served");
            Job { program: &program, args: &options, root_image, timeout: TIMEOUT }.run(place)
        })
    }

    /// What is measured side by side with QEMU: this program's other half.
    fn beside_qemu(&mut self, what: What, part: Option<&str>) -> Result<()> {
        let args = self.args;
        apt::install(&PACKAGES)?;
        let qemu = testbed_setup::parts()?.qemu;
        let gdb = gdb()?;
        let place = settle(args, Place::for_guests);
        let clock = self.folder.join(format!("bench-{}.clock", std::process::id()));
        let again = self.again(what, part)?;
        self.part(|json| {
            let mut host = vec!["bench-host".to_owned()];
            host.push(name(what)?);
            host.extend(args.quick.then(|| "--quick".to_owned()));
            host.extend(args.choice.options());
            host.extend([format!("--json={}", json.display()), format!("--again={again}")]);
            let clock = (place == Place::Testbed).then(|| Ticker::start(clock)).transpose()?;
            host.extend(clock.as_ref().map(|c| format!("--clock={}", c.path.display())));
            let program = if qemu.program.is_absolute() { qemu.program } else { in_path(&qemu.program)? };
            host.push(format!("--qemu={}", program.display()));
            host.extend(qemu.data.iter().map(|d| format!("--qemu-data={}", d.display())));
            host.push(format!("--gdb={}", gdb.display()));
            let myself = std::env::current_exe()?;
            let root_image = matches!(what, What::Io | What::Inspect);
            Job { program: &myself, args: &host, root_image, timeout: TIMEOUT }.run(place)
        })
    }

    /// Measures, with a file for the rows; all rows so far are then where they are wanted.
    fn part(&mut self, measure: impl FnOnce(&Path) -> Result<bool>) -> Result<()> {
        let json = self.folder.join(format!("bench-{}.json", std::process::id()));
        let load = fs::read_to_string("/proc/loadavg")?;
        self.held &= measure(&json)?;
        ensure!(json.exists(), "there are no rows");
        let mut records: Vec<Record> = serde_json::from_slice(&fs::read(&json)?)?;
        // The testbed tells its own load.
        for record in records.iter_mut().filter(|record| record.place == Where::Testbed) {
            let load = load.split(' ').next().unwrap_or_default();
            record.host.push(("machine's load".to_owned(), format!("{load} before it began (of a minute)")));
        }
        self.records.extend(records);
        cache::remove(&json)?;
        let Some(to) = &self.args.json else { return Ok(()) };
        let text = serde_json::to_vec_pretty(&self.records)?;
        fs::write(to, text).with_context(|| format!("cannot write {}", to.display()))
    }

    /// What of all is not there, or not as promised.
    fn sum_up(&mut self) {
        println!("\n== of all benches");
        for (figure, bench) in figures::missing(&self.records) {
            println!("MISSING: {figure}: 'cargo xtask bench {bench}' says why");
            self.held = false;
        }
        let broken: Vec<_> = self.records.iter().filter_map(|record| record.broken.as_ref()).collect();
        for line in &broken {
            println!("BROKEN: {line}");
        }
        let promised = self.records.iter().filter(|record| record.promised.is_some()).count();
        println!("{} of {promised} promises hold", promised - broken.len());
    }
}

fn name(what: What) -> Result<String> {
    Ok(clap::ValueEnum::to_possible_value(&what).context("no name")?.get_name().to_owned())
}

/// Where to measure, and says so.
fn settle(args: &Args, by_itself: fn() -> (Place, &'static str)) -> Place {
    let (place, why) = if args.testbed { (Place::Testbed, "--testbed") } else { by_itself() };
    let at = if place == Place::Here { "on this machine" } else { "in the testbed" };
    println!("== the bench runs {at}: {why}");
    place
}

/// Debian's smallest GDB. It excludes the usual one, so it is unpacked in the cache and installed nowhere; with that one it shares the libraries. The
/// usual one has Python in it, whose files it reads each time it starts.
fn gdb() -> Result<PathBuf> {
    let cache = cache::dir()?;
    let root = cache.join("gdb");
    make_once(&root, "1", |new| Apt::open(&cache)?.unpack(&["gdb-minimal"], None, new))?;
    Ok(root.join("usr/bin/gdb"))
}

fn in_path(program: &Path) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found = std::env::split_paths(&path).map(|dir| dir.join(program)).filter(|p| p.is_file());
    found.next().with_context(|| format!("no {} in PATH", program.display()))
}

/// The part on the KVM host.
pub fn host(args: &HostArgs) -> Result<bool> {
    let tools = Tools::new(&args.qemu, &args.qemu_data, &args.gdb)?;
    let clock = Clock::new(args.clock.clone());
    let vhost = if Path::new("/dev/vhost-net").exists() { "there" } else { "not there" };
    let version = guest::said(tools.qemu_version())?;
    let facts = Facts::gather(false).with("QEMU", version.lines().next().unwrap_or_default()).with("vhost", vhost);
    let mut report = Report::new(facts, &args.again);
    let (quick, rounds) = (args.quick, args.choice.rounds);
    let done = match args.what {
        What::Boot => boot::run(&tools, &clock, quick, &mut report),
        What::Io => io::run(&tools, &clock, quick, &args.choice, &mut report),
        What::Hotplug => hotplug::run(&tools, &clock, quick, rounds, &mut report),
        What::Inject => inject::run(&tools, &clock, quick, rounds, &mut report),
        What::Inspect => inspect::run(&tools, &clock, quick, rounds, &mut report),
        What::Fork => fork::run(&tools, &clock, quick, rounds, &mut report),
        What::Paper | What::All => bail!("{} is no bench beside QEMU", name(args.what)?),
    };
    // What was measured until then is told nevertheless.
    if let Err(e) = done {
        report.fail(&format!("{}: {e:#}", name(args.what)?));
    }
    fs::write(&args.json, serde_json::to_vec_pretty(&report.records())?)?;
    print!("{report}");
    Ok(report.broken().is_empty())
}

/// A line on stdout saying what is being measured. It never names a time.
fn progress(what: &str) {
    println!("bench: {what}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_how_they_begin() {
        let choice =
            |only: &[&str]| Choice { only: only.iter().map(|o| (*o).to_owned()).collect(), ..Choice::default() };
        assert!(choice(&[]).wants("net.tcp_tx"));
        let some = choice(&["blk.rand", "vsock"]);
        assert!(["blk", "blk.", "blk.randread4k", "vsock.rx"].iter().all(|name| some.wants(name)));
        assert!(!["blk.seqread1m", "qcow2.randread4k", "net"].iter().any(|name| some.wants(name)));
        let given = Choice { rounds: Some(3), seconds: Some(1), cpus: 2, ..some };
        assert_eq!(given.options(), ["--only=blk.rand", "--only=vsock", "--rounds=3", "--seconds=1", "--cpus=2"]);
    }

    fn args(line: &str) -> Args {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        <Line as clap::Parser>::parse_from(std::iter::once("bench").chain(line.split(' '))).args
    }

    #[test]
    fn a_row_says_the_command_that_measures_it_again() {
        let check = |line: &str, what, part, expected: &str| {
            let args = args(line);
            let parts = Parts { args: &args, folder: PathBuf::new(), held: true, records: Vec::new() };
            assert_eq!(parts.again(what, part).unwrap(), format!("cargo xtask bench {expected}"));
        };
        check("all --quick", What::Fork, Some("bare"), "fork --only=bare --quick");
        check("all", What::Boot, None, "boot");
        check("io --only=net --rounds=3 --testbed", What::Io, None, "io --only=net --rounds=3 --testbed");
        check("fork --only=qemu --rounds=2", What::Fork, Some("qemu"), "fork --only=qemu --rounds=2");
        check("fork --cpus=2", What::Fork, Some("load"), "fork --only=load --cpus=2");
    }

    #[test]
    fn benches_have_parts_that_can_be_chosen() {
        let parts = |line: &str| {
            let args = args(line);
            parts_of(args.what, &args.choice)
        };
        assert_eq!(parts("boot --only=x").unwrap(), [None]);
        assert_eq!(parts("fork").unwrap(), FORK_PARTS.map(Some));
        assert_eq!(parts("fork --only=load").unwrap(), [Some("load")]);
        assert_eq!(parts("paper").unwrap(), PAPER_PARTS.map(Some));
        assert!(parts("fork --only=nothing").unwrap_err().to_string().contains("slowdown"));
    }
}
