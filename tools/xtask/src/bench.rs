//! `cargo xtask bench`: the promises that are figures, measured side by side with QEMU.
//!
//! ```text
//!  cargo xtask bench ── set-up, release build ──► xtask bench-host      where guests run: here, or in the testbed
//!                                                  ├── boot             process start to user space; the monitor's own memory
//!                                                  ├── io               disks, network, vsock
//!                                                  ├── hotplug          a device until the guest uses it, beside device_add
//!                                                  ├── inject           a program started from outside, beside the CIVIC paper's way
//!                                                  ├── inspect          the whole of it: fork, devices, program; beside the CIVIC paper's pipeline
//!                                                  └── fork             forks beside QEMU's background-snapshot
//!                                   ├► tests/benches/fork              bare-metal guests, forked; beside fork(2) and a copy
//!                                   └► tests/benches/fork --load       Debian under load, forked
//! ```
//!
//! `bench fork` has parts, each run where it can be; `--only` takes their names.
//!
//! The half on the KVM host measures, prints the table and writes the rows as JSON; its status says whether the promises hold.
//!
//! Invariants: a figure of Civic's stands beside one of QEMU's taken in the same minutes, the two in turn (A, B, A, B, …); both
//! monitors get the same kernel, initramfs, memory, vCPUs and devices; nothing that was left out is left out silently; no
//! absolute time measured in the testbed is shown as if it meant something.

mod boot;
mod clock;
mod facts;
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
mod report;
mod stats;
mod stillness;
mod store;
mod vsock;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use civic_testbed::apt::{self, Apt};
use civic_testbed::cache::{self, make_once};
use civic_testbed::{client, setup as testbed_setup};

use crate::place::{Job, Place};
use crate::setup;
use crate::test::{cargo, program};
use clock::{Clock, Ticker};
use machine::Tools;
use report::Report;

/// What only benches need of the system: `qemu-img` makes their qcow2 images; the libraries of GDB; what looks around in forks.
const PACKAGES: [&str; 5] = ["qemu-utils", "gdb", "procps", "lsof", "iproute2"];
/// The parts of the bench of forks.
const FORK_PARTS: [&str; 3] = ["bare", "qemu", "load"];
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
    /// `boot`, `io`, `hotplug`, `inject` and `inspect`.
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
    /// In the testbed, even if this machine could.
    #[arg(long)]
    testbed: bool,
}

/// Which of a bench's rows, on what guests, and how often; what is not given is as the effort has it.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Choice {
    /// Of `io`, only rows whose names begin so: `net.tcp_tx`, `blk.rand`, `vsock`; of `fork`, only this part: `bare`, `qemu`,
    /// `load`. May be given several times.
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
        only.chain(rounds).chain(seconds).chain([format!("--cpus={}", self.cpus)]).collect()
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
    let mut parts = Parts { args, folder, held: true, rows: Vec::new() };
    if args.what == What::Fork {
        let wanted: Vec<_> = FORK_PARTS.into_iter().filter(|part| args.choice.wants(part)).collect();
        ensure!(!wanted.is_empty(), "the bench of forks has the parts {FORK_PARTS:?}, not {:?}", args.choice.only);
        for part in wanted {
            match part {
                "qemu" => parts.beside_qemu()?,
                "load" => parts.forks(Place::for_guests, Some("--load"))?,
                _ => parts.forks(Place::for_bare, None)?,
            }
        }
    } else {
        parts.beside_qemu()?;
    }
    if let Some(to) = &args.json {
        let text = serde_json::to_vec_pretty(&parts.rows)?;
        fs::write(to, text).with_context(|| format!("cannot write {}", to.display()))?;
    }
    Ok(parts.held)
}

/// A bench in parts, each in the place that it needs.
struct Parts<'a> {
    args: &'a Args,
    /// Of the workspace: both this machine and the testbed write there.
    folder: PathBuf,
    /// Whether every promise so far holds.
    held: bool,
    rows: Vec<serde_json::Value>,
}

impl Parts<'_> {
    /// A program of its own: forks of bare-metal guests, which need no stock kernel, or of Debian.
    fn forks(&mut self, by_itself: fn() -> (Place, &'static str), load: Option<&str>) -> Result<()> {
        let program = program("bench", "fork", &["bench"])?;
        let place = settle(self.args, by_itself);
        let quick = self.args.quick;
        self.part(|json| {
            let mut options = vec!["--json".to_owned(), json.display().to_string()];
            options.extend(quick.then(|| "--quick".to_owned()));
            options.extend(load.map(str::to_owned));
            Job { program: &program, args: &options, root_image: load.is_some(), timeout: TIMEOUT }.run(place)
        })
    }

    /// What is measured side by side with QEMU: this program's other half.
    fn beside_qemu(&mut self) -> Result<()> {
        let args = self.args;
        apt::install(&PACKAGES)?;
        let qemu = testbed_setup::parts()?.qemu;
        let gdb = gdb()?;
        let place = settle(args, Place::for_guests);
        let clock = self.folder.join(format!("bench-{}.clock", std::process::id()));
        self.part(|json| {
            let mut host = vec!["bench-host".to_owned()];
            host.push(clap::ValueEnum::to_possible_value(&args.what).context("no name")?.get_name().to_owned());
            host.extend(args.quick.then(|| "--quick".to_owned()));
            host.extend(args.choice.options());
            host.push(format!("--json={}", json.display()));
            let clock = (place == Place::Testbed).then(|| Ticker::start(clock)).transpose()?;
            host.extend(clock.as_ref().map(|c| format!("--clock={}", c.path.display())));
            let program = if qemu.program.is_absolute() { qemu.program } else { in_path(&qemu.program)? };
            host.push(format!("--qemu={}", program.display()));
            host.extend(qemu.data.iter().map(|d| format!("--qemu-data={}", d.display())));
            host.push(format!("--gdb={}", gdb.display()));
            let myself = std::env::current_exe()?;
            let root_image = matches!(args.what, What::Io | What::Inspect | What::All);
            Job { program: &myself, args: &host, root_image, timeout: TIMEOUT }.run(place)
        })
    }

    /// Measures, with a file for the rows.
    fn part(&mut self, measure: impl FnOnce(&Path) -> Result<bool>) -> Result<()> {
        let json = self.folder.join(format!("bench-{}.json", std::process::id()));
        self.held &= measure(&json)?;
        if json.exists() {
            let rows: Vec<serde_json::Value> = serde_json::from_slice(&fs::read(&json)?)?;
            self.rows.extend(rows);
        }
        cache::remove(&json)
    }
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
    let mut report = Report::new(facts::gather(&tools)?);
    if matches!(args.what, What::Boot | What::All) {
        boot::run(&tools, &clock, args.quick, &mut report)?;
    }
    if matches!(args.what, What::Io | What::All) {
        io::run(&tools, &clock, args.quick, &args.choice, &mut report)?;
    }
    if matches!(args.what, What::Hotplug | What::All) {
        hotplug::run(&tools, &clock, args.quick, args.choice.rounds, &mut report)?;
    }
    if matches!(args.what, What::Inject | What::All) {
        inject::run(&tools, &clock, args.quick, args.choice.rounds, &mut report)?;
    }
    if matches!(args.what, What::Inspect | What::All) {
        inspect::run(&tools, &clock, args.quick, args.choice.rounds, &mut report)?;
    }
    if args.what == What::Fork {
        fork::run(&tools, &clock, args.quick, args.choice.rounds, &mut report)?;
    }
    fs::write(&args.json, serde_json::to_vec_pretty(&report.json())?)?;
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
}
