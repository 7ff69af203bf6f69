//! `cargo xtask test`: everything that has to pass.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::place::{Job, Place};
use crate::{assets, fuzz, setup, store};

/// Seconds an integration test target may take; the testbed is slow.
const TIMEOUT: u64 = 3600;
/// With those that take long: six of them save a Debian a hundred times.
const TIMEOUT_LONG: u64 = 12 * 3600;

/// Seconds for each fuzz target: enough for what is broken outright. More is for `cargo xtask fuzz`.
const FUZZ_SECONDS: u64 = 10;

/// What to test, and where.
#[derive(clap::Args)]
pub struct Args {
    /// Run only tests whose names contain this, and no format or lint checks or fuzz targets unless --only names them.
    filter: Option<String>,
    /// Run only these parts.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Also run tests that take long (those marked `ignored`).
    #[arg(long)]
    long: bool,
    /// Run guests on this machine, whatever its CPU flags say.
    #[arg(long, conflicts_with_all = ["testbed", "kvm"])]
    here: bool,
    /// Run guests in the testbed.
    #[arg(long, conflicts_with = "kvm")]
    testbed: bool,
    /// Run guests on this machine, and fail if it has no hardware virtualisation.
    #[arg(long)]
    kvm: bool,
}

/// A part of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Format and lints.
    Lints,
    /// What needs neither KVM nor root.
    Unit,
    /// Fuzz targets, each for a short while.
    Fuzz,
    /// Bare-metal guest code.
    Bare,
    /// Stock kernels.
    Guests,
}

impl Args {
    fn wants(&self, part: Part) -> bool {
        match part {
            _ if !self.only.is_empty() => self.only.contains(&part),
            Part::Lints | Part::Fuzz => self.filter.is_none(),
            _ => true,
        }
    }
}

/// Guests tested at a time: the emulated host has one processor, and a guest that boots keeps it busy.
const GUESTS_AT_A_TIME: &str = "--test-threads=1";

/// One line of the summary.
struct Outcome {
    name: String,
    passed: bool,
    seconds: u64,
}

/// Runs all; returns whether all passed.
pub fn run(args: &Args) -> Result<bool> {
    setup::room()?;
    setup::all()?;
    if args.long && args.wants(Part::Guests) {
        assets::every_kernel()?;
        store::examples()?;
    }
    let mut outcomes = Vec::new();
    let mut step = |name: &str, work: &mut dyn FnMut() -> Result<bool>| {
        println!("== {name}");
        let start = Instant::now();
        let passed = work().unwrap_or_else(|e| {
            println!("{name}: {e:#}");
            false
        });
        outcomes.push(Outcome { name: name.to_owned(), passed, seconds: start.elapsed().as_secs() });
        passed
    };
    if args.wants(Part::Lints) {
        step("format", &mut || cargo(&["fmt", "--all", "--check"], &[]));
        let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
        step("lints", &mut || cargo(&clippy, &[]));
    } else {
        println!("== format and lints: left out, as asked (they need a run without a filter)");
    }
    let tests = test_args(args);
    if args.wants(Part::Unit) {
        step("unit tests", &mut || {
            cargo(&["test", "--quiet", "--workspace", "--exclude", "civic-tests", "--"], &tests)
        });
        let own = ["test", "--quiet", "-p", "civic-tests", "--lib", "--test", "arrows", "--test", "frozen_disks", "--"];
        step("crate arrows, frozen disks and test harness", &mut || cargo(&own, &tests));
    }
    if args.wants(Part::Fuzz) {
        step("fuzz targets", &mut || fuzz::all(FUZZ_SECONDS));
    } else {
        println!("== fuzz targets: left out, as asked (they need a run without a filter)");
    }
    let targets = [
        ("bare", Part::Bare, choose(args, Place::for_bare)),
        ("kernels", Part::Guests, (Place::Here, "nothing runs")),
        ("guests", Part::Guests, choose(args, Place::for_guests)),
    ];
    let wanted: Vec<_> = targets.into_iter().filter(|(_, part, _)| args.wants(*part)).collect();
    if !wanted.is_empty()
        && step("release build", &mut || cargo(&["build", "--quiet", "--release", "--workspace", "--bins"], &[]))
    {
        for (target, _, (place, why)) in wanted {
            let at = if place == Place::Here { "on this machine" } else { "in the testbed" };
            let mut tests = tests.clone();
            let guests = target == "guests";
            if guests {
                tests.push(GUESTS_AT_A_TIME.to_owned());
            }
            step(&format!("{target} {at}: {why}"), &mut || {
                ensure!(!args.kvm || Place::for_guests().0 == Place::Here, "--kvm, but {}", Place::for_guests().1);
                let program = test_program(target)?;
                let timeout = if args.long { TIMEOUT_LONG } else { TIMEOUT };
                Job { program: &program, args: &tests, root_image: guests, timeout }.run(place)
            });
        }
    }
    println!("\n== summary");
    for o in &outcomes {
        println!("{}  {:>5} s  {}", if o.passed { "passed" } else { "FAILED" }, o.seconds, o.name);
    }
    let failed = outcomes.iter().filter(|o| !o.passed).count();
    println!(
        "{}",
        if failed == 0 { "all passed".to_owned() } else { format!("{failed} of {} FAILED", outcomes.len()) }
    );
    Ok(failed == 0)
}

fn choose(args: &Args, by_itself: fn() -> (Place, &'static str)) -> (Place, &'static str) {
    match args {
        Args { here: true, .. } => (Place::Here, "--here"),
        Args { testbed: true, .. } => (Place::Testbed, "--testbed"),
        Args { kvm: true, .. } => (Place::Here, "--kvm"),
        _ => by_itself(),
    }
}

fn test_args(args: &Args) -> Vec<String> {
    let long = args.long.then(|| "--include-ignored".to_owned());
    args.filter.iter().cloned().chain(long).collect()
}

/// Runs cargo and says whether it succeeded.
pub fn cargo(args: &[&str], more: &[String]) -> Result<bool> {
    Ok(Command::new("cargo").args(args).args(more).status().context("cannot run cargo")?.success())
}

/// Builds an integration test target and returns its program.
fn test_program(target: &str) -> Result<PathBuf> {
    program("test", target, &["test", "--release", "--no-run"])
}

/// Builds a target of `civic-tests`, of this kind, by `command`, and returns its program.
pub fn program(kind: &str, target: &str, command: &[&str]) -> Result<PathBuf> {
    let out = Command::new("cargo")
        .args(command)
        .args(["--quiet", "-p", "civic-tests", &format!("--{kind}"), target, "--message-format=json"])
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(out.status.success(), "cannot build the {kind} target {target}");
    let text = String::from_utf8(out.stdout)?;
    let mut programs = text.lines().filter_map(|l| {
        let message: serde_json::Value = serde_json::from_str(l).ok()?;
        let ours = message["target"]["name"] == target && message["target"]["kind"][0] == kind;
        ours.then(|| message["executable"].as_str().map(PathBuf::from)).flatten()
    });
    programs.next_back().with_context(|| format!("cargo names no program for the {kind} target {target}"))
}
