//! How jobs get done: by an io_uring, and for disk images by helping threads, where there is one, else on the spot.
//!
//! A read that is alone, with nothing else in flight or begun, is tried on the spot also where there is a ring: what the page cache
//! has costs less so than on the way through the ring. Writing a little into the page cache is done on the spot always: many file
//! systems cannot do that without blocking, and then the kernel hands each write to a thread of its own. Measured with
//! `how_fast_the_engines_are` (block/tests/load.rs), 4 KiB on ext4: writes 28 instead of 35 µs of processor time, reads 5.2 instead
//! of 6.5; and in the testbed (`cargo xtask bench io`), where 32 writes at a time by the ring were 0.42 as fast as QEMU's.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Once;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::warn;

use super::helpers::Helpers;
use super::job::{Action, Job, Target};
use super::uring::Uring;

/// The longest write that is tried on the spot.
const SHORT: usize = 128 << 10;

/// Jobs begun and done.
pub struct Engine {
    ring: Option<Box<Uring>>,
    helpers: Option<Helpers>,
    /// The only job there is, not yet on its way.
    lone: Option<(u32, Job)>,
    /// Done, and not yet asked for.
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
        Self { ring: None, helpers: None, lone: None, done: Vec::new() }
    }

    /// Gets threads, called after `name`, for the jobs of disk images. Without them, or a ring, those are done on the spot.
    ///
    /// # Errors
    /// When there are none to be had.
    pub fn help(&mut self, name: &str) -> io::Result<()> {
        if self.ring.is_some() {
            self.helpers = Some(Helpers::new(name)?);
        }
        Ok(())
    }

    /// Whether what is begun is done at once.
    pub fn is_direct(&self) -> bool {
        self.ring.is_none()
    }

    /// The descriptors that become readable when something is done.
    pub fn sources(&self) -> Vec<RawFd> {
        let ring = self.ring.iter().map(|ring| ring.as_fd().as_raw_fd());
        ring.chain(self.helpers.iter().map(|helpers| helpers.as_fd().as_raw_fd())).collect()
    }

    /// Takes a job to answer for as `tag`.
    pub fn begin(&mut self, tag: u32, mut job: Job) {
        if !job.announce() {
            return self.done.push((tag, Ok(())));
        }
        if self.ring.is_none() {
            let result = job.run();
            return self.done.push((tag, result));
        }
        if is_short_write(&job) {
            let result = job.run();
            return self.done.push((tag, result));
        }
        match self.lone.take() {
            None if self.on_their_way() == 0 => self.lone = Some((tag, job)),
            first => first.into_iter().chain([(tag, job)]).for_each(|(tag, job)| self.send(tag, job)),
        }
    }

    fn on_their_way(&self) -> usize {
        let helpers = self.helpers.as_ref().map_or(0, Helpers::in_flight);
        helpers + self.ring.as_ref().map_or(0, |ring| ring.in_flight())
    }

    fn send(&mut self, tag: u32, job: Job) {
        let left = match (&job.target, &mut self.ring, &mut self.helpers) {
            (Target::File(_), Some(ring), _) => return ring.begin(tag, job),
            (Target::Image(_) | Target::Plugged(_), _, Some(helpers)) => helpers.begin(tag, job),
            _ => Some(job),
        };
        if let Some(mut job) = left {
            self.done.push((tag, job.run()));
        }
    }

    /// Gets going what was begun.
    ///
    /// # Errors
    /// When the ring is not as it should be.
    pub fn submit(&mut self) -> io::Result<()> {
        if let Some((tag, mut job)) = self.lone.take() {
            match at_once(&mut job) {
                Some(result) => self.done.push((tag, result)),
                None => self.send(tag, job),
            }
        }
        self.ring.as_mut().map_or(Ok(()), |ring| ring.submit())
    }

    /// Gets going what was begun and returns when something is done, or nothing is left to do.
    ///
    /// # Errors
    /// As [`Engine::submit`], and what poll(2) says.
    pub fn wait(&mut self) -> io::Result<()> {
        self.submit()?;
        match (&mut self.ring, &self.helpers) {
            _ if !self.done.is_empty() => Ok(()),
            // Whatever is done first has to be taken in: others may wait for the place that it holds in the image.
            (Some(ring), Some(helpers)) if helpers.in_flight() > 0 => either(ring, helpers),
            (Some(ring), _) => ring.wait(),
            (None, _) => Ok(()),
        }
    }

    /// The tag and result of a job that is done.
    pub fn next_done(&mut self) -> Option<(u32, io::Result<()>)> {
        if self.done.is_empty()
            && let Some(helpers) = &mut self.helpers
        {
            helpers.collect(&mut self.done);
        }
        self.done.pop().or_else(|| self.ring.as_mut()?.next_done())
    }
}

/// Returns when a ring or helpers have something done.
fn either(ring: &Uring, helpers: &Helpers) -> io::Result<()> {
    let mut fds = [PollFd::new(ring.as_fd(), PollFlags::POLLIN), PollFd::new(helpers.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            result => return Ok(result.map(drop)?),
        }
    }
}

/// Does a job that is alone, if that is soon done. Else some of it may be done.
fn at_once(job: &mut Job) -> Option<io::Result<()>> {
    match job.action {
        Action::Read { .. } => {
            let count = job.areas.read_cached(job.file()?.as_fd(), job.offset).ok()?;
            // At the file's end the ring finds the same again, and says so.
            job.progress(count).ok()?.then_some(Ok(()))
        }
        _ => None,
    }
}

/// Whether a job only puts a little into the page cache.
fn is_short_write(job: &Job) -> bool {
    job.action == Action::Write { stable: false } && job.areas.len() <= SHORT && matches!(job.target, Target::File(_))
}
