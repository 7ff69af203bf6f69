//! What a fork costs, and what its source loses.
//!
//! ```text
//!  bare        bare-metal guests forked again and again, beside the machine's floors          bare.rs, footprint.rs, threads.rs
//!  slowdown    what a source's work loses to forks of it, ten times a second or less           slowdown.rs, work.rs
//!  paper       the CIVIC paper's memory cost and instantiation time, and its source's disk     paper.rs
//!  load        what clients of a Debian notice of its forks                                     load.rs
//!  served      what a Debian that serves as many pages as it can loses to its forks              served.rs
//! ```
//!
//! Run by `cargo xtask bench fork` and `bench paper`, each part where it can be; the status says whether the promises hold. `--quick` takes fewer
//! samples.

mod bare;
mod baseline;
mod footprint;
mod guest;
mod load;
mod paper;
mod served;
mod slowdown;
mod threads;
mod work;

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;

use civic_bench::facts::Facts;
use civic_bench::report::Report;

const GIB: u64 = 1 << 30;

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let (mut quick, mut json, mut again, mut part) = (false, None, String::new(), None);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => quick = true,
            "--json" => json = args.next().map(PathBuf::from),
            "--again" => again = args.next().unwrap_or_default(),
            "bare" | "slowdown" | "paper" | "load" | "served" => part = Some(arg),
            other => panic!("unknown argument {other:?}: PART, --quick, --json PATH, --again COMMAND"),
        }
    }
    let part = part.expect("a part: bare, slowdown, paper, load or served");
    let stock = matches!(part.as_str(), "load" | "served");
    let mut report = Report::new(Facts::gather(!stock), &again);
    let measured = std::panic::catch_unwind(AssertUnwindSafe(|| match part.as_str() {
        "bare" => bare::run(quick, &mut report),
        "slowdown" => slowdown::run(quick, &mut report),
        "paper" => paper::run(quick, &mut report),
        "load" => load::run(quick, &mut report),
        _ => served::run(quick, &mut report),
    }));
    // What was measured until then is told nevertheless.
    if measured.is_err() {
        report.fail(&format!("{part}: see above"));
    }
    print!("{report}");
    if let Some(path) = json {
        let text = serde_json::to_vec_pretty(&report.records()).expect("rows are JSON");
        std::fs::write(&path, text).expect("the rows can be written");
    }
    std::process::exit(i32::from(!report.broken().is_empty()));
}

fn say(what: &str) {
    println!("bench: {what}");
}

fn ms(us: u64) -> f64 {
    us as f64 / 1e3
}

/// The mean of all but the largest hundredth, which are the scheduler's; NaN of nothing.
fn mean(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.truncate(sorted.len() - sorted.len() / 100);
    sorted.iter().sum::<f64>() / sorted.len() as f64
}
