//! What the page server is about to do to the source, where the source can see it.
//!
//! A page that a child shares is copied to the store, punched out of the memfd and put back for the source. If the page server dies
//! between the last two, only the store still has it. So the journal says beforehand which page it is and in which slot, and the
//! source's watchdog puts it back. It also carries the page server's pulse.
//!
//! One page of shared memory: only the page server writes, only the source reads. Both are ours, but the page server is the one that
//! talks with children, so the source believes nothing in here without checking that it lies within bounds.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::store::Slot;
use crate::ram::PAGE;

#[repr(C)]
struct Shared {
    /// 0, or 1 + the page's number in the upper half and the slot in the lower.
    in_flight: AtomicU64,
    /// Changes as long as the page server gets round to its work.
    pulse: AtomicU64,
}

/// A page that is being put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// Its number in guest memory.
    pub page: u32,
    /// Where it is kept.
    pub slot: Slot,
}

/// The journal, mapped.
#[derive(Debug)]
pub struct Journal {
    shared: NonNull<Shared>,
}

// SAFETY: the mapping is this value's own, and what is in it is atomic.
unsafe impl Send for Journal {}
// SAFETY: as above.
unsafe impl Sync for Journal {}

impl Journal {
    /// Maps the journal in `memfd`, making it if it is not there.
    pub fn new(memfd: &File) -> io::Result<Self> {
        memfd.set_len(PAGE as u64)?;
        let len = NonZeroUsize::new(PAGE).ok_or(io::ErrorKind::InvalidInput)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start = unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, memfd, 0) }?;
        Ok(Self { shared: start.cast() })
    }

    fn shared(&self) -> &Shared {
        // SAFETY: a page is mapped here as long as this value lives, zeroed or written by another of these; any bits are valid.
        unsafe { self.shared.as_ref() }
    }

    /// Before the page is punched.
    pub fn begin(&self, in_flight: InFlight) {
        let entry = (u64::from(in_flight.page) + 1) << 32 | u64::from(in_flight.slot.0);
        // SeqCst: the next thing is a system call that takes the page away, which orders it in any case.
        self.shared().in_flight.store(entry, Ordering::SeqCst);
    }

    /// After it is back.
    pub fn end(&self) {
        self.shared().in_flight.store(0, Ordering::SeqCst);
    }

    /// The page that is in flight, if any. As the page server says.
    pub fn in_flight(&self) -> Option<InFlight> {
        let entry = self.shared().in_flight.load(Ordering::SeqCst);
        let page = (entry >> 32).checked_sub(1)?;
        Some(InFlight { page: page as u32, slot: Slot(entry as u32) })
    }

    /// Says that the page server is well.
    pub fn beat(&self) {
        self.shared().pulse.fetch_add(1, Ordering::Relaxed);
    }

    /// How often it has said so.
    pub fn pulse(&self) -> u64 {
        self.shared().pulse.load(Ordering::Relaxed)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrowed from it is left.
        let _ = unsafe { munmap(self.shared.cast(), PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memfd;

    #[test]
    fn says_across_mappings_what_is_in_flight() {
        let file = memfd(0);
        let (pager, source) = (Journal::new(&file).unwrap(), Journal::new(&file).unwrap());
        assert_eq!(source.in_flight(), None);
        for page in [0, 7, u32::MAX - 1] {
            let entry = InFlight { page, slot: Slot(9) };
            pager.begin(entry);
            assert_eq!(source.in_flight(), Some(entry));
            pager.end();
            assert_eq!(source.in_flight(), None);
        }
        pager.beat();
        assert_eq!(source.pulse(), 1);
    }
}
