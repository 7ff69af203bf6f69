//! What a frozen disk costs its source: a write of 4 KiB into the page cache, first with no generation alive, then the first one
//! to each cluster since the fork point, then a later one; and the fork point itself.
//!
//! ```text
//! cargo run --release -p civic-fork --example disk_freeze [FOLDER [MiB]]
//! ```
//!
//! `FOLDER` (default: the folder for temporary files) says which file system the disk and the store are on. All of it should fit
//! into the page cache.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use civic_fork::disk::{Bytes, CLUSTER, Freezer, FreezerOptions, FrozenFile, reopen_read_only};

const LEN: usize = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let dir = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let mib: u64 = args.next().map_or(Ok(256), |arg| arg.to_string_lossy().parse())?;
    let clusters = mib * (1 << 20) / CLUSTER;
    let file = tempfile::tempfile_in(&dir)?;
    for cluster in 0..clusters {
        file.write_all_at(&[1; CLUSTER as usize], cluster * CLUSTER)?;
    }
    let options = FreezerOptions { store: dir, limit: u64::MAX, reflink: None };
    let freezer = Freezer::over_file(reopen_read_only(&file)?, options, Box::new(|_, _| {}))?;
    let writes = |hooked: bool, at: u64| -> std::io::Result<Duration> {
        let start = Instant::now();
        for cluster in 0..clusters {
            // Every seventh, so that no two neighbours follow each other.
            let at = cluster * 7 % clusters * CLUSTER + at;
            if hooked {
                freezer.before_write(at..at + LEN as u64);
            }
            file.write_all_at(&[2; LEN], at)?;
        }
        Ok(start.elapsed())
    };
    let show =
        |what: &str, took: Duration| println!("{what:<44}{:>9.2} µs", took.as_secs_f64() * 1e6 / clusters as f64);
    writes(false, 0)?;
    show("write without the hook", writes(false, 0)?);
    show("write, no generation alive", writes(true, 0)?);
    let start = Instant::now();
    let generation = freezer.freeze()?;
    let froze = start.elapsed();
    show("first write to a cluster", writes(true, 4096)?);
    show("later write to a cluster", writes(true, 8192)?);
    let second = freezer.freeze()?;
    show("first write, two generations alive", writes(true, 12_288)?);
    println!("{:<44}{:>9.2} µs", "fork point", froze.as_secs_f64() * 1e6);
    let start = Instant::now();
    drop(second);
    println!("{:<44}{:>9.2} µs", "giving back a generation", start.elapsed().as_secs_f64() * 1e6);

    let child = FrozenFile::open(generation.parts()?)?;
    let reads = |bytes: &dyn Bytes| -> std::io::Result<Duration> {
        let mut buffer = [0; LEN];
        let start = Instant::now();
        for cluster in 0..clusters {
            bytes.read_at(&mut buffer, cluster * 7 % clusters * CLUSTER)?;
        }
        Ok(start.elapsed())
    };
    struct Plain(File);
    impl Bytes for Plain {
        fn size(&self) -> std::io::Result<u64> {
            Ok(self.0.metadata()?.len())
        }
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
            self.0.read_exact_at(buffer, offset)
        }
    }
    show("read of the file", reads(&Plain(file.try_clone()?))?);
    show("child's read of what is in the store", reads(&child)?);
    let third = freezer.freeze()?;
    show("child's read of what is in the file", reads(&FrozenFile::open(third.parts()?)?)?);
    Ok(())
}
