//! A clock for the testbed, which other work on this machine does not disturb.
//!
//! The emulated host's one processor is a thread of QEMU's. When this machine has other work, that thread waits, and the emulated
//! host's own clocks run on: a guest seems slow that was not served. What that thread has really run is its CPU time
//! (`/proc/PID/task/TID/schedstat`, `Documentation/scheduler/sched-stats.rst`); L1 never sleeps while it runs (`idle=poll`), so undisturbed both
//! are the same. This machine's half writes it into a file of the workspace, over and over; the other half divides by it.
//! On hardware there is nothing to correct.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use civic_testbed::client;
use civic_testbed::frame::What;

/// How often the file is written: far less than what is measured takes, and cheap.
const TICK: Duration = Duration::from_millis(20);
/// Digits of nanoseconds in the file, so that each text overwrites the one before.
const DIGITS: usize = 20;

/// The half on this machine; ends when dropped.
pub struct Ticker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// The file.
    pub path: PathBuf,
}

impl Ticker {
    /// Writes the CPU time of the testbed's processor into `path`, once there is one.
    pub fn start(path: PathBuf) -> Result<Self> {
        let file = File::create(&path)?;
        let workspace = client::workspace()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut pid = None;
            while !stopped.load(Ordering::Relaxed) {
                // A machine that died is followed by another.
                let ran = pid.and_then(|pid| processor(&PathBuf::from(format!("/proc/{pid}/task"))));
                match ran {
                    Some(nanoseconds) => drop(file.write_at(format!("{nanoseconds:0DIGITS$}").as_bytes(), 0)),
                    None => pid = emulator(&workspace),
                }
                std::thread::park_timeout(TICK);
            }
        });
        Ok(Self { stop, thread: Some(thread), path })
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
        let _ = fs::remove_file(&self.path);
    }
}

/// The process that is the testbed.
fn emulator(workspace: &Path) -> Option<u64> {
    let status: serde_json::Value = serde_json::from_str(&client::query(workspace, What::Status).ok()??).ok()?;
    status["qemu_pid"].as_u64()
}

/// The CPU time of the thread that had most: the processor.
fn processor(tasks: &Path) -> Option<u64> {
    let ran = |task: PathBuf| fs::read_to_string(task.join("schedstat")).ok()?.split(' ').next()?.parse().ok();
    fs::read_dir(tasks).ok()?.flatten().filter_map(|task| ran(task.path())).max()
}

/// The half where guests run.
pub struct Clock(Option<PathBuf>);

/// A moment.
pub struct Mark {
    wall: Instant,
    ran: Option<u64>,
}

impl Clock {
    /// Reads the file, if there is one.
    pub fn new(file: Option<PathBuf>) -> Self {
        Self(file)
    }

    fn ran(&self) -> Option<u64> {
        fs::read_to_string(self.0.as_ref()?).ok()?.trim().parse().ok()
    }

    /// Now.
    pub fn mark(&self) -> Mark {
        Mark { wall: Instant::now(), ran: self.ran() }
    }

    /// How many times longer than it ought to have the time since then taken: 1 where nothing disturbs.
    pub fn stretch(&self, since: &Mark) -> Result<f64> {
        let Some(before) = since.ran else { return Ok(1.0) };
        let ran = self.ran().and_then(|now| now.checked_sub(before)).context("the testbed's clock went back")?;
        Ok(stretch(since.wall.elapsed(), ran))
    }
}

/// Both are read some ticks apart, so what seems to have taken too little took what it ought to.
fn stretch(wall: Duration, ran: u64) -> f64 {
    (wall.as_secs_f64() / Duration::from_nanos(ran.max(1)).as_secs_f64()).max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_that_ran_half_the_time_stretches_it_twice() {
        assert_eq!(stretch(Duration::from_secs(4), 2_000_000_000), 2.0);
        assert_eq!(stretch(Duration::from_secs(4), 4_010_000_000), 1.0);
    }

    #[test]
    fn this_process_has_run() {
        assert!(processor(Path::new("/proc/self/task")).unwrap() > 0);
        assert_eq!(processor(Path::new("/nowhere")), None);
    }

    #[test]
    fn without_a_file_time_is_time() {
        let clock = Clock::new(None);
        assert_eq!(clock.stretch(&clock.mark()).unwrap(), 1.0);
    }

    #[test]
    fn the_file_is_read() {
        let path = std::env::temp_dir().join(format!("xtask-clock-{}", std::process::id()));
        fs::write(&path, "00000000000000000005").unwrap();
        let clock = Clock::new(Some(path.clone()));
        let mark = clock.mark();
        assert_eq!(mark.ran, Some(5));
        fs::write(&path, "00000000000000000004").unwrap();
        assert!(clock.stretch(&mark).is_err());
        fs::remove_file(path).unwrap();
    }
}
