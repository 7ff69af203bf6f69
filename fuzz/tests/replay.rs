//! Runs every target on its seeds and on what was once found with it.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use civic_fuzz::{TARGETS, is_expected};

/// A device's thread that panics must fail its test, though nobody joins it with an error.
fn abort_on_panics_elsewhere() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if is_expected(info) {
            return;
        }
        hook(info);
        if std::thread::current().name() != Some("main") {
            std::process::abort();
        }
    }));
}

fn main() {
    abort_on_panics_elsewhere();
    let mut failed = 0;
    for target in TARGETS {
        let mut inputs: Vec<_> =
            (target.seeds)().into_iter().enumerate().map(|(n, seed)| (format!("seed {n}"), seed)).collect();
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("findings").join(target.name);
        for file in fs::read_dir(dir).into_iter().flatten() {
            let path = file.expect("findings can be listed").path();
            inputs.push((path.display().to_string(), fs::read(&path).expect("findings can be read")));
        }
        for (name, input) in &inputs {
            if catch_unwind(AssertUnwindSafe(|| (target.run)(input))).is_err() {
                println!("{}: {name} fails", target.name);
                failed += 1;
            }
        }
        println!("{}: {} inputs", target.name, inputs.len());
    }
    assert!(failed == 0, "{failed} inputs fail");
}
