//! Memory that is loaded from an image while the VM runs.
//!
//! ```text
//!   start ──▶ loading ──── all is there ────▶ loaded ┐
//!                │                                   ├──▶ dropped
//!                └── an image that is damaged ─▶ failed ┘
//!
//!   the loader's thread:   a page fault?  ── yes ──▶ load its chunk, or a zero page where there is none
//!                            ▲    └── no ──▶ load the next chunk ─┐
//!                            └──────────── until there is none ◀──┘
//! ```
//!
//! All of RAM is registered `MISSING`, so the first access to a page that is not in the memfd waits for the loader. Faults come
//! first: between two looks at the userfaultfd at most one chunk is loaded ahead. A chunk is put with `UFFDIO_COPY`, which leaves
//! pages alone that are there already, so nothing that a vCPU or a device has written is ever overwritten. Zero pages stay holes.
//!
//! Afterwards the VM is as if it had never been saved: everything that the image has is in the memfd, holes are holes and
//! read as zero, nothing is registered any more; the userfaultfd and the image are closed, and the thread is gone.
//!
//! What the owner owes:
//! * The memfd is empty at the start ([`LazyMemory::start`] checks).
//! * **Only accesses through the mappings that were handed in wait for pages.** Another mapping of the memfd, and `read(2)` or
//!   `write(2)` on it, see a hole where a page is not loaded yet, and a page that they put there is kept instead of the image's. So
//!   nobody uses those before [`LazyMemory::finish`] has returned; nor punches holes, which the loader would fill again.
//! * A [`LazyMemory`] is dropped while it loads only when every vCPU and device thread that could touch the memory has ended.
//!   Whatever is still waiting for a page then goes on with zeros in it.
//! * The function that is told of a failure returns only when nothing the VM does can reach the outside any more, its disks above
//!   all: from then on pages that are missing read as zero.
//!
//! Locks: `end` is held while waiting for the thread; the thread takes none.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use vm_memory::GuestMemoryMmap;

use crate::image::{Image, LoadError, data_runs};
use crate::ram::{PAGE, Ram, RamError};
use crate::uffd::{EventBuffer, Fault, FeatureFlags, UffdError, Userfault};

/// What the userfaultfd for [`LazyMemory::start`] must have been opened with.
pub const FEATURES: FeatureFlags = FeatureFlags::MISSING_SHMEM;

/// Why memory cannot be loaded while the VM runs. It is untouched then: the image may be opened again for [`Image::load_all`].
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It is not of the kind that can be watched.
    #[error("cannot load the memory while the VM runs")]
    Ram(#[from] RamError),
    /// It has another size than the image.
    #[error("the memory image is of {image} bytes of RAM, the VM has {ram}")]
    Size {
        /// Of the image.
        image: u64,
        /// Of the VM.
        ram: u64,
    },
    /// Something has been put there already.
    #[error("guest memory is not empty (at {offset:#x}): it would hide what the image has there")]
    NotEmpty {
        /// The first page that is there.
        offset: u64,
    },
    /// The kernel does not let us.
    #[error("cannot watch guest memory")]
    Userfault(#[from] UffdError),
    /// The memfd cannot be examined, or no thread be started.
    #[error("cannot start loading the memory")]
    System(#[source] io::Error),
}

/// How far loading is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Page faults that were answered. Several of one page may count as one.
    pub faults: u64,
    /// Chunks loaded.
    pub chunks: u64,
    /// Bytes in chunks that are not.
    pub bytes_left: u64,
}

/// Guest RAM that is being loaded, or has been.
pub struct LazyMemory {
    shared: Arc<Shared>,
    end: Mutex<End>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    faults: AtomicU64,
    chunks: AtomicU64,
    bytes_left: AtomicU64,
}

type Outcome = Result<(), Arc<LoadError>>;

enum End {
    Pending(JoinHandle<Outcome>),
    Known(Outcome),
}

impl LazyMemory {
    /// Has `image` appear in `memory`. When this returns, the VM may run.
    ///
    /// `failed` is called at most once, by the loader's thread, if a part of the image cannot be had. The VM's memory is lost then.
    /// Threads that wait for pages keep waiting until it returns, so it must not wait for one that touches guest memory, nor use
    /// the `LazyMemory`: it tells the owner and sees to it that nothing leaves the VM.
    pub fn start(
        userfault: Userfault,
        memory: Arc<GuestMemoryMmap>,
        image: Image,
        failed: impl FnOnce(Arc<LoadError>) + Send + 'static,
    ) -> Result<Self, StartError> {
        let ram = Ram::new(memory)?;
        if ram.bytes() != image.ram() {
            return Err(StartError::Size { image: image.ram(), ram: ram.bytes() });
        }
        match lseek(ram.memfd(), 0, Whence::SeekData) {
            Err(Errno::ENXIO) => (),
            Ok(offset) => return Err(StartError::NotEmpty { offset: offset as u64 }),
            Err(e) => return Err(StartError::System(e.into())),
        }
        userfault.register_missing(ram.mappings())?;
        let shared = Arc::new(Shared::default());
        shared.bytes_left.store(image.data(), Ordering::Relaxed);
        let loader = Loader {
            loaded: vec![false; image.chunks()],
            next: 0,
            buffer: Vec::new(),
            events: EventBuffer::new(EVENTS),
            shared: Arc::clone(&shared),
            userfault,
            ram,
            image,
        };
        let thread = std::thread::Builder::new().name("ram-loader".into());
        let thread = thread.spawn(move || loader.run(failed)).map_err(StartError::System)?;
        Ok(Self { shared, end: Mutex::new(End::Pending(thread)) })
    }

    /// Waits until everything is loaded. The memory is then ordinary memory: it may be saved, mapped elsewhere, punched.
    pub fn finish(&self) -> Result<(), Arc<LoadError>> {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = match std::mem::replace(&mut *end, End::Known(Ok(()))) {
            // What it may panic in is caught in the thread, but for the function that is told of a failure.
            End::Pending(thread) => thread.join().unwrap_or_else(|_| Err(Arc::new(LoadError::Panicked))),
            End::Known(outcome) => outcome,
        };
        *end = End::Known(outcome.clone());
        outcome
    }

    /// How far it is.
    pub fn counters(&self) -> Counters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Shared { faults, chunks, bytes_left, .. } = &*self.shared;
        Counters { faults: get(faults), chunks: get(chunks), bytes_left: get(bytes_left) }
    }

    /// For those who only need to know whether it is over.
    pub fn progress(&self) -> Progress {
        Progress(Arc::clone(&self.shared))
    }
}

/// A view of a [`LazyMemory`] that does not keep it.
#[derive(Clone)]
pub struct Progress(Arc<Shared>);

impl Progress {
    /// Whether every chunk is there: a hole punched from now on stays one, and reads as zero.
    pub fn done(&self) -> bool {
        // Acquire: what the loader put, it put before.
        self.0.bytes_left.load(Ordering::Acquire) == 0
    }
}

impl Drop for LazyMemory {
    /// Stops loading. See the module's documentation for who must have ended before.
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Whoever wanted to know how it ended has asked.
        let _ = self.finish();
    }
}

/// Faults read at a time. More are there at the next look.
const EVENTS: usize = 64;

/// What the thread has. Everything in it goes when the thread ends.
struct Loader {
    userfault: Userfault,
    ram: Ram,
    image: Image,
    /// By position in the image.
    loaded: Vec<bool>,
    /// All before are loaded.
    next: usize,
    buffer: Vec<u8>,
    events: EventBuffer,
    shared: Arc<Shared>,
}

impl Loader {
    fn run(mut self, failed: impl FnOnce(Arc<LoadError>)) -> Outcome {
        // After a panic nothing is used but the userfaultfd and the RAM, which are not changed.
        let outcome = catch_unwind(AssertUnwindSafe(|| self.load_all())).unwrap_or(Err(LoadError::Panicked));
        let outcome = outcome.map_err(Arc::new);
        if let Err(e) = &outcome {
            failed(Arc::clone(e));
        }
        // Closing does the same, but not while a child that is about to exec still holds a copy of the descriptor.
        let _ = self.userfault.unregister(self.ram.mappings());
        outcome
    }

    /// Until everything is loaded, or the owner wants no more.
    fn load_all(&mut self) -> Result<(), LoadError> {
        while !self.shared.stop.load(Ordering::Relaxed) {
            if self.answer()? {
                continue;
            }
            match self.loaded[self.next..].iter().position(|loaded| !loaded) {
                Some(skipped) => {
                    self.next += skipped;
                    self.load(self.next, None)?;
                }
                None => break,
            }
        }
        Ok(())
    }

    /// Answers the faults there are. False if there are none.
    fn answer(&mut self) -> Result<bool, LoadError> {
        let faults = self.userfault.faults(self.ram.mappings(), &mut self.events)?;
        for &Fault { offset, .. } in &faults {
            match self.image.find(offset).filter(|&position| !self.loaded[position]) {
                Some(position) => self.load(position, Some(offset))?,
                // Zero, or loaded since. Every page with data of a loaded chunk is there.
                None => self.userfault.zero(self.ram.mappings(), offset)?,
            }
            self.shared.faults.fetch_add(1, Ordering::Relaxed);
        }
        Ok(!faults.is_empty())
    }

    /// Loads a chunk, and the page of it that somebody waits for before its neighbours.
    fn load(&mut self, position: usize, awaited: Option<u64>) -> Result<(), LoadError> {
        let offset = self.image.read(position, &mut self.buffer)?;
        if let Some(awaited) = awaited {
            let page = &self.buffer[(awaited - offset) as usize..][..PAGE];
            self.userfault.copy(self.ram.mappings(), awaited, page)?;
        }
        for run in data_runs(&self.buffer) {
            self.userfault.copy(self.ram.mappings(), offset + run.start as u64, &self.buffer[run])?;
        }
        self.loaded[position] = true;
        self.shared.chunks.fetch_add(1, Ordering::Relaxed);
        self.shared.bytes_left.fetch_sub(self.buffer.len() as u64, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
