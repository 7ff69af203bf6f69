//! Measures saving and loading memory: `cargo run --release -p civic-fork --example memory_image -- DIR [MIB]`.
//!
//! DIR is on the disk to measure and has room for MIB (1024 unless told) MiB. "Cold" is after the image was dropped from the
//! host's page cache.

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use civic_fork::image::{self, CHUNK, Image, MEMORY};
use civic_fork::lazy::{FEATURES, LazyMemory};
use civic_fork::uffd::Userfault;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// What a vCPU computes between two pages that are new to it, in this measurement.
const BETWEEN_FAULTS: Duration = Duration::from_micros(100);

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().ok_or("usage: memory_image DIR [MIB]")?).join("memory_image");
    let bytes = args.next().map_or(Ok(1024), |mib| mib.parse::<u64>())? << 20;
    fs::create_dir(&dir)?;
    let measured = measure(&dir, bytes);
    fs::remove_dir_all(&dir)?;
    measured
}

fn measure(dir: &Path, bytes: u64) -> Result<()> {
    let rate = |what: &str, took: Duration| {
        println!("{what:<24}{:>8.2} GB/s  ({took:.0?})", bytes as f64 / took.as_secs_f64() / 1e9);
    };
    let ram = memfd(bytes)?;
    let mut buffer = vec![0; CHUNK as usize];
    for start in (0..bytes).step_by(CHUNK as usize) {
        for (n, word) in buffer.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = (start + n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        }
        ram.write_all_at(&buffer, start)?;
    }
    let began = Instant::now();
    for start in (0..bytes).step_by(CHUNK as usize) {
        ram.read_exact_at(&mut buffer, start)?;
    }
    rate("reading the memfd", began.elapsed());

    let began = Instant::now();
    let mut copied = None;
    image::save(&ram, dir, &mut |progress| {
        if progress.done == progress.total {
            copied = Some(began.elapsed());
        }
        ControlFlow::Continue(())
    })?;
    let took = began.elapsed();
    rate("save, before sync", copied.unwrap_or(took));
    rate("save", took);
    drop(ram);

    for cold in [true, false] {
        let state = if cold { "cold" } else { "warm" };
        forget(dir, cold)?;
        let ram = memfd(bytes)?;
        let began = Instant::now();
        Image::open(dir, bytes)?.load_all(&ram, &mut |_| ControlFlow::Continue(()))?;
        rate(&format!("load at once, {state}"), began.elapsed());

        forget(dir, cold)?;
        let (_memory, lazy) = start(dir, bytes)?;
        let began = Instant::now();
        lazy.finish()?;
        rate(&format!("load by itself, {state}"), began.elapsed());

        forget(dir, cold)?;
        let began = Instant::now();
        let (memory, lazy) = start(dir, bytes)?;
        println!("{:<24}{:>8.0?}", format!("start, {state}"), began.elapsed());
        let mut waits = Vec::new();
        // From the far end, a chunk at a time, until the loader has been there.
        for offset in (0..bytes / CHUNK).rev().map(|chunk| chunk * CHUNK) {
            if lazy.counters().bytes_left < bytes / 8 {
                break;
            }
            let began = Instant::now();
            memory.read_obj::<u64>(GuestAddress(offset))?;
            waits.push(began.elapsed());
            let rest = Instant::now();
            while rest.elapsed() < BETWEEN_FAULTS {
                std::hint::spin_loop();
            }
        }
        waits.sort();
        let at = |share: f64| waits[((waits.len() - 1) as f64 * share) as usize];
        let counters = lazy.counters();
        println!(
            "{:<24}{:>8.0?} median, {:.0?} 99 %, {:.0?} longest; {} touched, {} faults, {} chunks loaded",
            format!("fault, {state}"),
            at(0.5),
            at(0.99),
            at(1.0),
            waits.len(),
            counters.faults,
            counters.chunks
        );
        lazy.finish()?;
    }
    Ok(())
}

fn memfd(bytes: u64) -> Result<File> {
    let file = File::from(memfd_create(c"memory_image", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(bytes)?;
    Ok(file)
}

fn start(dir: &Path, bytes: u64) -> Result<(Arc<GuestMemoryMmap>, LazyMemory)> {
    let region = MmapRegionBuilder::new(bytes as usize)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(memfd(bytes)?, 0))
        .build()?;
    let region = GuestRegionMmap::new(region, GuestAddress(0)).ok_or("too large")?;
    let memory = Arc::new(GuestMemoryMmap::from_regions(vec![region])?);
    let failed = |e| panic!("{e:?}");
    let lazy = LazyMemory::start(Userfault::open(FEATURES)?, Arc::clone(&memory), Image::open(dir, bytes)?, failed)?;
    Ok((memory, lazy))
}

/// Drops the image from the page cache if `cold`, reads it into it if not.
fn forget(dir: &Path, cold: bool) -> Result<()> {
    let file = File::open(dir.join(MEMORY))?;
    match cold {
        true => posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?,
        false => drop(std::io::copy(&mut &file, &mut std::io::sink())?),
    }
    Ok(())
}
