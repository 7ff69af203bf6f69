//! `cargo xtask fuzz`: the targets of `fuzz/`, built with libFuzzer's instrumentation by the ordinary toolchain, and run.
//!
//! ```text
//! target/fuzz/                              build, logs (TARGET.log) and what was found (artifacts/TARGET/)
//! $CIVIC_CACHE/fuzz/TARGET/                 the corpus: seeds and what earlier runs found worth keeping
//! fuzz/findings/TARGET/                     inputs that once failed, run first each time
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread::available_parallelism;

use anyhow::{Context, Result, bail, ensure};
use civic_testbed::cache;

const PROFILE: &str = "fuzz";
/// What cargo-fuzz has rustc do. Stable: code generation options of LLVM's, which promise nothing but have not changed in years.
const INSTRUMENTATION: [&str; 7] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    // Panics in a backtrace need no more than this.
    "-Cforce-frame-pointers=yes",
];
/// Seconds for one input. All take milliseconds, but other work on this machine may hold one up.
const INPUT_TIMEOUT: u64 = 60;
const MEMORY_LIMIT_MIB: u64 = 2048;
/// Lines of a failed run's log that are shown.
const SHOWN: usize = 40;

/// Which targets to run, and for how long.
#[derive(clap::Args)]
pub struct Args {
    /// Targets; all, if none is named.
    targets: Vec<String>,
    /// Seconds for each.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Targets run at a time (default: one for each processor).
    #[arg(long)]
    jobs: Option<usize>,
    /// Run the target on this input only, again and again until it fails or 100 times are over.
    #[arg(long, requires = "targets")]
    input: Option<PathBuf>,
}

/// Runs all targets for so long; returns whether nothing was found.
pub fn all(seconds: u64) -> Result<bool> {
    run(&Args { targets: Vec::new(), seconds, jobs: None, input: None })
}

/// Runs what `args` say; returns whether nothing was found.
pub fn run(args: &Args) -> Result<bool> {
    let known = targets()?;
    for target in &args.targets {
        ensure!(known.contains(target), "there is no target '{target}', but: {}", known.join(", "));
    }
    let wanted = if args.targets.is_empty() { &known } else { &args.targets };
    let programs = build(wanted)?;
    if let Some(input) = &args.input {
        let [target] = &wanted[..] else { bail!("an input is for one target") };
        return repeat(&programs.join(target), input);
    }
    let jobs = args.jobs.or_else(|| available_parallelism().ok().map(usize::from)).unwrap_or(1);
    let (queue, failed) = (Mutex::new(wanted.iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(wanted.len()) {
            scope.spawn(|| {
                while let Some(target) = queue.lock().ok().and_then(|mut queue| queue.next()) {
                    match fuzz(&programs.join(target), target, args.seconds) {
                        Ok(line) => println!("{line}"),
                        Err(e) => {
                            println!("{target}: {e:#}");
                            failed.lock().map(|mut failed| failed.push(target.as_str())).unwrap_or_default();
                        }
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_default();
    if !failed.is_empty() {
        println!("FAILED: {}", failed.join(", "));
    }
    Ok(failed.is_empty())
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// The names of all targets.
fn targets() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for file in fs::read_dir(root().join("fuzz/fuzz_targets"))? {
        let path = file?.path();
        names.extend(path.file_stem().and_then(|stem| stem.to_str()).map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

/// Where all of this is built and kept.
fn place() -> Result<PathBuf> {
    Ok(std::path::absolute(root().join("target/fuzz"))?)
}

/// Builds the targets' programs and returns their folder.
fn build(targets: &[String]) -> Result<PathBuf> {
    let about = Command::new("rustc").arg("-vV").output().context("cannot run rustc")?;
    let about = String::from_utf8(about.stdout)?;
    let host = about.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc does not name its host")?;
    let mut cargo = Command::new("cargo");
    // With a target named, build scripts and macros are left as they are.
    cargo.args(["build", "--quiet", "--package", "civic-fuzz", "--features", "libfuzzer"]);
    cargo.args(["--profile", PROFILE, "--target", host, "--target-dir"]).arg(place()?);
    for target in targets {
        cargo.args(["--bin", target]);
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", INSTRUMENTATION.join("\x1f")).current_dir(root());
    ensure!(cargo.status().context("cannot run cargo")?.success(), "cannot build the fuzz targets");
    Ok(place()?.join(host).join(PROFILE))
}

/// Looks for new inputs; returns a line about the run. An error says what was found and how to see it again.
fn fuzz(program: &Path, target: &str, seconds: u64) -> Result<String> {
    let corpus = cache::dir()?.join("fuzz").join(target);
    let artifacts = place()?.join("artifacts").join(target);
    for dir in [&corpus, &artifacts] {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    let log = place()?.join(format!("{target}.log"));
    let file = File::create(&log)?;
    let mut c = Command::new(program);
    c.arg(format!("-max_total_time={seconds}")).arg(format!("-timeout={INPUT_TIMEOUT}"));
    c.arg(format!("-rss_limit_mb={MEMORY_LIMIT_MIB}")).arg(format!("-artifact_prefix={}/", artifacts.display()));
    c.args(["-print_final_stats=1", "-max_len=4096", "-report_slow_units=60"]).arg(&corpus);
    let findings = root().join("fuzz/findings").join(target);
    if findings.is_dir() {
        c.arg(findings);
    }
    c.env("CIVIC_FUZZ_SEEDS", &corpus).env("RUST_BACKTRACE", "1");
    let status = c.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).status().context("cannot run it")?;
    let said = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    if status.success() {
        return Ok(summary(target, &said));
    }
    let lines: Vec<_> = said.lines().collect();
    let first = lines.iter().position(|line| line.contains("panicked at") || line.contains("ERROR: libFuzzer"));
    let shown = lines[first.unwrap_or(lines.len().saturating_sub(SHOWN))..].iter().take(SHOWN);
    for line in shown {
        println!("{target}: {line}");
    }
    let written = lines.iter().find_map(|line| line.split_once("Test unit written to ").map(|(_, path)| path));
    let (Some(input), Some(base64)) = (written, lines.iter().rfind(|line| line.starts_with("Base64: "))) else {
        bail!("{status}; see {}", log.display());
    };
    bail!("found {input}\n  {base64}\n  again: cargo xtask fuzz {target} --input {input}")
}

/// What a run came to, by libFuzzer's last words.
fn summary(target: &str, said: &str) -> String {
    let stat = |name: &str| {
        let line = said.lines().rfind(|line| line.starts_with(&format!("stat::{name}:")));
        line.and_then(|line| line.split_whitespace().nth(1)).unwrap_or("?")
    };
    let state = said.lines().rfind(|line| line.contains(" cov: ")).unwrap_or_default();
    let word = |after: &str| {
        let mut words = state.split_whitespace().skip_while(|word| *word != after);
        words.nth(1).unwrap_or("?").to_owned()
    };
    let (runs, rate, found) = (stat("number_of_executed_units"), stat("average_exec_per_sec"), stat("new_units_added"));
    format!("{target}: {runs} runs, {rate}/s, coverage {}, corpus {}, {found} of it new", word("cov:"), word("corp:"))
}

/// Runs one input until it fails: what depends on threads may not at once.
fn repeat(program: &Path, input: &Path) -> Result<bool> {
    let status = Command::new(program).arg("-runs=100").arg(input).env("RUST_BACKTRACE", "1").status()?;
    Ok(status.success())
}
