//! How jobs get done: by an io_uring where there is one, else on the spot.
//!
//! A job that is alone, with nothing else in flight or begun, is tried on the spot also where there is a ring: reading what the
//! page cache has, and writing a little into it, costs less than the way through the ring and makes nobody wait. Measured with
//! `how_fast_the_engines_are` (block/tests/load.rs), 4 KiB on ext4: writes 28 instead of 35 µs of processor time, reads 5.2 instead
//! of 6.5.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Once;

use tracing::warn;

use super::job::{Action, Job};
use super::uring::Uring;

/// The longest write that is tried on the spot.
const SHORT: usize = 128 << 10;

/// Jobs begun and done.
pub struct Engine {
    ring: Option<Box<Uring>>,
    /// The only job there is, not yet in the ring.
    lone: Option<(u32, Job)>,
    /// Done on the spot.
    done: Vec<(u32, io::Result<()>)>,
}

impl Engine {
    /// The best that this host offers, for up to `jobs` at a time.
    pub fn new(jobs: u16) -> Self {
        static SAID: Once = Once::new();
        let ring = Uring::new(jobs);
        if let Err(e) = &ring {
            SAID.call_once(|| warn!("no io_uring ({e}): disks serve one request at a time"));
        }
        Self { ring: ring.ok().map(Box::new), ..Self::direct() }
    }

    /// Without an io_uring.
    pub fn direct() -> Self {
        Self { ring: None, lone: None, done: Vec::new() }
    }

    /// Whether what is begun is done at once.
    pub fn is_direct(&self) -> bool {
        self.ring.is_none()
    }

    /// The descriptor that becomes readable when something is done.
    pub fn source(&self) -> Option<RawFd> {
        self.ring.as_ref().map(|ring| ring.as_raw_fd())
    }

    /// Takes a job to answer for as `tag`.
    pub fn begin(&mut self, tag: u32, mut job: Job) {
        let Some(ring) = &mut self.ring else {
            let result = job.run();
            return self.done.push((tag, result));
        };
        match self.lone.take() {
            None if ring.in_flight() == 0 => self.lone = Some((tag, job)),
            first => first.into_iter().chain([(tag, job)]).for_each(|(tag, job)| ring.begin(tag, job)),
        }
    }

    /// Gets going what was begun.
    ///
    /// # Errors
    /// When the ring is not as it should be.
    pub fn submit(&mut self) -> io::Result<()> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        if let Some((tag, mut job)) = self.lone.take() {
            match at_once(&mut job) {
                Some(result) => self.done.push((tag, result)),
                None => ring.begin(tag, job),
            }
        }
        ring.submit()
    }

    /// Gets going what was begun and returns when something is done, or nothing is left to do.
    ///
    /// # Errors
    /// As [`Engine::submit`].
    pub fn wait(&mut self) -> io::Result<()> {
        self.submit()?;
        match &mut self.ring {
            Some(ring) if self.done.is_empty() => ring.wait(),
            _ => Ok(()),
        }
    }

    /// The tag and result of a job that is done.
    pub fn next_done(&mut self) -> Option<(u32, io::Result<()>)> {
        self.done.pop().or_else(|| self.ring.as_mut()?.next_done())
    }
}

/// Does a job that is alone, if that is soon done. Else some of it may be done.
fn at_once(job: &mut Job) -> Option<io::Result<()>> {
    match job.action {
        Action::Read => {
            let count = job.areas.read_cached(job.file.as_fd(), job.offset).ok()?;
            // At the file's end the ring finds the same again, and says so.
            job.progress(count).ok()?.then_some(Ok(()))
        }
        Action::Write { stable: false } if job.areas.len() <= SHORT => Some(job.run()),
        _ => None,
    }
}
