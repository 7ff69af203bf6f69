//! What one idle child costs its host: the memory of all processes of the family, with a child less without.
//!
//! The proportional set sizes of the monitors and the page server, and what of their memfds nobody has mapped.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

use civic_bench::report::{Kind, Promise, Row};

use super::{GIB, guest, say};

const MIB: f64 = (1 << 20) as f64;

/// Forks an idle guest of 1 GiB and 2 vCPUs.
pub fn idle_child() -> Row {
    let mut costs = Vec::new();
    let source = guest::idle(GIB);
    for n in 0..3 {
        say(&format!("an idle child's memory: fork {} of 3", n + 1));
        let alone = bytes(&[source.pid()]);
        let (_, mut children) = source.fork(vec![source.waiting(&format!("c{n}"))], false);
        let pids = [source.pid(), children[0].pid(), source.page_server()];
        costs.push((bytes(&pids) - alone) / MIB);
        children[0].kill();
        assert!(children[0].ended().success());
    }
    Row::new("fork.child_memory", "MiB", costs.into()).kind(Kind::Counted).promised(Promise::AtMost(&[(0.5, 6.0)]))
}

/// Of these processes, in all.
fn bytes(pids: &[u32]) -> f64 {
    let (mut all, mut shmem, mut memfds) = (0, 0, BTreeMap::new());
    for pid in pids {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it lives");
        let field = |name: &str| -> u64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("smaps_rollup has it");
            let kib: u64 = line.trim().trim_end_matches(" kB").trim().parse().expect("it is a number");
            kib << 10
        };
        all += field("Pss:");
        shmem += field("Pss_Shmem:");
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).expect("it lives").flatten() {
            let to = fs::read_link(entry.path()).unwrap_or_default();
            if to.to_string_lossy().starts_with("/memfd:")
                && let Ok(about) = fs::metadata(entry.path())
            {
                memfds.insert((about.dev(), about.ino()), about.blocks() * 512);
            }
        }
    }
    (all + memfds.values().sum::<u64>().saturating_sub(shmem)) as f64
}
