//! Threads that do what may have to wait: the jobs of a disk image that its file alone cannot do.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use civic_confine::Kind;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::job::Job;
use crate::virtio::courtesy::wait_for_turns;

/// Threads of one queue. Requests of a guest that allocate are few at a time, and wait for one another in the image.
const THREADS: usize = 4;

type Results = Mutex<Vec<(u32, io::Result<()>)>>;

/// A queue's helpers. Dropping them waits for what they do.
pub struct Helpers {
    jobs: Option<Sender<(u32, Job)>>,
    threads: Vec<JoinHandle<()>>,
    results: Arc<Results>,
    event: Arc<EventFd>,
    in_flight: usize,
}

impl Helpers {
    /// Starts the threads.
    ///
    /// # Errors
    /// When one cannot be had, or the eventfd.
    pub fn new(name: &str) -> io::Result<Self> {
        let event = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let (jobs, inbox) = channel();
        let inbox = Arc::new(Mutex::new(inbox));
        let results = Arc::new(Results::default());
        let mut helpers = Self { jobs: Some(jobs), threads: Vec::new(), results, event, in_flight: 0 };
        // The kernel keeps 15 bytes of a thread's name.
        let short = name.get(..14).unwrap_or(name);
        for _ in 0..THREADS {
            let (inbox, results) = (Arc::clone(&inbox), Arc::clone(&helpers.results));
            let event = Arc::clone(&helpers.event);
            let thread = std::thread::Builder::new().name(format!("{short}+"));
            let run = move || {
                civic_confine::thread(Kind::Device);
                // They serve as well if it cannot be.
                let _ = wait_for_turns();
                work(&inbox, &results, &event);
            };
            helpers.threads.push(thread.spawn(run)?);
        }
        Ok(helpers)
    }

    /// Has a job done; gives it back when there is nobody to do it.
    pub fn begin(&mut self, tag: u32, job: Job) -> Option<Job> {
        let Some(jobs) = &self.jobs else { return Some(job) };
        match jobs.send((tag, job)) {
            Ok(()) => {
                self.in_flight += 1;
                None
            }
            Err(refused) => Some(refused.0.1),
        }
    }

    /// Jobs begun and not asked for.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Moves what is done to `done`.
    pub fn collect(&mut self, done: &mut Vec<(u32, io::Result<()>)>) {
        if self.in_flight > 0 {
            // Before looking, so that what comes after is told of again.
            let _ = self.event.read();
            let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
            self.in_flight -= results.len();
            done.append(&mut results);
        }
    }
}

impl AsFd for Helpers {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // What it does cannot panic: an image's jobs catch that.
            let _ = thread.join();
        }
    }
}

fn work(inbox: &Mutex<Receiver<(u32, Job)>>, results: &Results, event: &EventFd) {
    loop {
        let next = inbox.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((tag, mut job)) = next else { return };
        let result = job.run();
        // The memory and the place in the image are given up before anyone hears of it.
        drop(job);
        results.lock().unwrap_or_else(PoisonError::into_inner).push((tag, result));
        let _ = event.write(1);
    }
}
