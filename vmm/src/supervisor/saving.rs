//! A save that is under way: the machine is paused, a thread writes, the supervisor goes on answering.
//!
//! ```text
//!  supervisor: pause, take the state ──► thread: write memory, then state ──► Message::Saved ──► stop, resume or stay paused
//! ```
//!
//! A save that fails or is given up leaves the VM as it found it and nothing in the directory.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use civic_api::{AfterSave, SaveProgress, SaveReport, SaveRequest, VmState};

use crate::control::Reply;
use crate::memory::Memory;
use crate::saved::{Draft, SavedError, VmStateV1};
use crate::state::Sections;

/// How far the writing is; read by the API.
#[derive(Debug, Default)]
pub struct Meter {
    done: AtomicU64,
    total: AtomicU64,
}

impl Meter {
    /// For the API.
    pub fn read(&self) -> SaveProgress {
        SaveProgress { bytes_done: self.done.load(Ordering::Relaxed), bytes_total: self.total.load(Ordering::Relaxed) }
    }
}

/// What the thread says when it is done: bytes of memory and of state, or why there are none.
pub type Outcome = Result<(u64, u64), SavedError>;

/// A save under way.
pub struct Saving {
    request: SaveRequest,
    reply: Reply,
    /// The state to go back to.
    before: VmState,
    begun: Instant,
    paused: Instant,
    meter: Arc<Meter>,
    given_up: Arc<AtomicBool>,
}

/// What the supervisor has ready when a save begins.
pub struct Begin<'a> {
    /// Who asked for what.
    pub request: SaveRequest,
    /// Where the answer goes.
    pub reply: Reply,
    /// The VM's state before it was paused for this.
    pub before: VmState,
    /// When the client's request came.
    pub begun: Instant,
    /// When the machine was paused.
    pub paused: Instant,
    /// The machine's memory, all of it there.
    pub memory: &'a Memory,
    /// The machine's state.
    pub sections: Sections,
    /// The VM's.
    pub vm: VmStateV1,
}

impl Saving {
    /// Starts writing into `draft`; `done` is called on the writing thread.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn begin(
        begin: Begin<'_>,
        draft: Draft,
        done: impl FnOnce(Outcome) + Send + 'static,
    ) -> Result<Self, (io::Error, Reply)> {
        let Begin { request, reply, before, begun, paused, memory, sections, vm } = begin;
        let (meter, given_up) = (Arc::<Meter>::default(), Arc::<AtomicBool>::default());
        let (told, stop, memfd) = (Arc::clone(&meter), Arc::clone(&given_up), Arc::clone(&memory.memfd));
        let write = move || {
            let outcome = draft.write(&memfd, sections, vm, &mut |progress| {
                told.done.store(progress.done, Ordering::Relaxed);
                told.total.store(progress.total, Ordering::Relaxed);
                if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            done(outcome);
        };
        match std::thread::Builder::new().name("save".into()).spawn(write) {
            Ok(_) => Ok(Self { request, reply, before, begun, paused, meter, given_up }),
            Err(e) => Err((e, reply)),
        }
    }

    /// How far it is.
    pub fn meter(&self) -> Arc<Meter> {
        Arc::clone(&self.meter)
    }

    /// Has the thread stop and clear up.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// The state that the VM was in before.
    pub fn before(&self) -> VmState {
        self.before
    }

    /// What is to become of the VM.
    pub fn then(&self) -> AfterSave {
        self.request.then
    }

    /// What the client is told of a save that succeeded, and where.
    pub fn report(self, memory_bytes_written: u64, state_bytes: u64) -> (SaveReport, Reply) {
        let report = SaveReport {
            directory: self.request.directory,
            memory_bytes_written,
            state_bytes,
            pause_ms: self.paused.elapsed().as_millis() as u64,
            total_ms: self.begun.elapsed().as_millis() as u64,
        };
        (report, self.reply)
    }

    /// Where the client is told of one that did not.
    pub fn into_reply(self) -> Reply {
        self.reply
    }
}
