//! Jobs in flight in an io_uring: begun without a system call, submitted together, done in any order.
//!
//! No buffer and no file is registered: nothing is pinned for longer than one request (the fork path needs that).
//!
//! ```text
//!  begin ──▶ submission queue ── submit ──▶ kernel ──▶ completion queue ──▶ next_done
//!    ▲                                                        │
//!    └────────────── the rest of a short read or write ───────┘
//! ```
//!
//! The ring's own descriptor becomes readable when something is done, so no eventfd is written and read for each.
//!
//! Invariant: a job's memory and file live in its slot until the kernel has answered for it, whatever becomes of the rest.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};

use super::job::{Action, Job};

/// A ring and the jobs in it.
pub struct Uring {
    ring: IoUring,
    /// By the number that the kernel answers with.
    slots: Vec<Option<(u32, Job)>>,
    free: Vec<usize>,
    /// Finished without the kernel's help.
    finished: Vec<(u32, io::Result<()>)>,
}

impl Uring {
    /// A ring for up to `jobs` jobs at a time.
    ///
    /// # Errors
    /// What io_uring_setup(2) says: ENOSYS, or EPERM where it is forbidden. `Unsupported` where the kernel is too old.
    pub fn new(jobs: u16) -> io::Result<Self> {
        // Without COOP_TASKRUN (Linux 5.19) completions interrupt the thread that would see them anyway.
        let ring = IoUring::builder().setup_coop_taskrun().build(jobs.into());
        let ring = match ring {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::new(jobs.into())?,
            ring => ring?,
        };
        // Linux 5.5: no completion is lost. Fallocate came with 5.6, RW_CUR_POS too.
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_rw_cur_pos() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let slots = (0..jobs).map(|_| None).collect();
        Ok(Self { ring, slots, free: (0..usize::from(jobs)).rev().collect(), finished: Vec::new() })
    }

    /// Takes a job to answer for as `tag`. It goes to the kernel with the next [`Uring::submit`].
    ///
    /// More than it was made for, or what the kernel must not be asked, is done on the spot.
    pub fn begin(&mut self, tag: u32, mut job: Job) {
        let reads = matches!(job.action, Action::Read { .. });
        let sound = job.file().is_some() && (job.areas.writable() || !reads);
        match self.free.pop() {
            Some(slot) if sound => {
                self.slots[slot] = Some((tag, job));
                self.enqueue(slot);
            }
            slot => {
                self.free.extend(slot);
                self.finished.push((tag, job.run()));
            }
        }
    }

    fn enqueue(&mut self, slot: usize) {
        let Some((_, job)) = &self.slots[slot] else { return };
        let Some(file) = job.file() else { return };
        let entry = entry(job, Fd(file.as_raw_fd())).user_data(slot as u64);
        let mut queue = self.ring.submission();
        // SAFETY: what the entry points to is the slot's: the iovecs and the memory behind them (which `HeldAreas` keeps in
        // place) and the open file. The slot is emptied only when the kernel has answered.
        let pushed = unsafe { queue.push(&entry) };
        drop(queue);
        // There are as many places as slots, so it fits. Were it not so, the job is done without the ring.
        if pushed.is_err() {
            self.finish_here(slot);
        }
    }

    fn finish_here(&mut self, slot: usize) {
        if let Some((tag, mut job)) = self.slots[slot].take() {
            self.free.push(slot);
            self.finished.push((tag, job.run()));
        }
    }

    /// Hands what was begun to the kernel. What it can do at once it does here.
    ///
    /// # Errors
    /// What io_uring_enter(2) says of a ring that is not as it should be.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            if let Err(e) = self.ring.submit() {
                passing(e)?;
            }
        }
        Ok(())
    }

    /// Hands over what was begun and returns when something is done.
    ///
    /// # Errors
    /// As [`Uring::submit`].
    pub fn wait(&mut self) -> io::Result<()> {
        while self.in_flight() > 0 && self.finished.is_empty() && self.ring.completion().is_empty() {
            if let Err(e) = self.ring.submit_and_wait(1) {
                passing(e)?;
            }
        }
        Ok(())
    }

    /// Jobs begun and not yet done.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The tag and result of a job that is done, in no order.
    pub fn next_done(&mut self) -> Option<(u32, io::Result<()>)> {
        loop {
            if let Some(done) = self.finished.pop() {
                return Some(done);
            }
            let answer = self.ring.completion().next()?;
            let slot = answer.user_data() as usize;
            let (_, job) = self.slots.get_mut(slot)?.as_mut()?;
            let result = match usize::try_from(answer.result()) {
                Ok(count) => match job.progress(count) {
                    // As far as it got.
                    Ok(false) => {
                        self.enqueue(slot);
                        continue;
                    }
                    Ok(true) => Ok(()),
                    Err(e) => Err(e),
                },
                // Interrupted, or would block although it may.
                Err(_) if matches!(-answer.result(), libc::EINTR | libc::EAGAIN) => job.run(),
                Err(_) => Err(io::Error::from_raw_os_error(-answer.result())),
            };
            let (tag, _) = self.slots[slot].take()?;
            self.free.push(slot);
            return Some((tag, result));
        }
    }
}

impl AsFd for Uring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            if self.wait().is_err() {
                // The kernel may still use the memory: better lost than given to someone else.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            while self.next_done().is_some() {}
        }
    }
}

/// The submission entry for what is left of a job.
fn entry(job: &Job, fd: Fd) -> squeue::Entry {
    let parts = job.areas.iovecs();
    let count = parts.len() as u32;
    match job.action {
        Action::Read { .. } => opcode::Readv::new(fd, parts.as_ptr(), count).offset(job.offset).build(),
        Action::Write { stable } => {
            let flags = if stable { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(fd, parts.as_ptr(), count).offset(job.offset).rw_flags(flags).build()
        }
        Action::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        Action::Discard { .. } | Action::Punch { .. } | Action::ZeroRange { .. } => {
            let (mode, len) = job.action.allocation().map_or((0, 0), |(mode, len)| (mode.bits(), len));
            opcode::Fallocate::new(fd, len).offset(job.offset).mode(mode).build()
        }
    }
}

/// Passes over what the kernel says when it only has to be asked again.
fn passing(error: io::Error) -> io::Result<()> {
    match error.raw_os_error() {
        Some(libc::EINTR) => Ok(()),
        // Short of memory, or completions wait to be taken in: those do not need this thread's help to come.
        Some(libc::EAGAIN | libc::EBUSY) => {
            std::thread::yield_now();
            Ok(())
        }
        _ => Err(error),
    }
}
