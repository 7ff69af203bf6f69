//! Pages that were preserved, in slots of a memfd.
//!
//! ```text
//!  never used ── grow: fallocate ──▶ ready ── take ──▶ used (by so many generations) ── release ──▶ ready
//!       ▲                                                                                             │
//!       └─── too many are ready: some at a time are punched, their memory goes back to the host ◀──────┘
//! ```
//!
//! A slot has memory behind it, and is in this process's page table, before it is given out, so filling it cannot fail, nor waits for the
//! kernel to find it. Best before it is wanted: [`Store::prepare`]. Running out is an error on growing, and the limit
//! counts slots that have memory. The first slot is for a page that is only passing through. The memfd is the source's too: what is
//! in a slot survives the page server.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::ProtFlags;

use super::mapped::Mapped;
use crate::ram::PAGE;

/// A place for one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(pub u32);

impl Slot {
    /// In the memfd.
    pub fn offset(self) -> u64 {
        u64::from(self.0) * PAGE as u64
    }
}

/// Why there is no slot.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The limit is reached.
    #[error("the store of preserved pages is full ({limit} pages)")]
    Full {
        /// The limit.
        limit: u32,
    },
    /// The host has no memory for more.
    #[error("no memory for the store of preserved pages")]
    NoMemory(#[source] io::Error),
    /// The memory cannot be mapped.
    #[error("cannot map the store of preserved pages")]
    Map(#[source] io::Error),
    /// A page of guest memory cannot be read.
    #[error("cannot read guest memory at {offset:#x}")]
    Read {
        /// Where.
        offset: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// For a page that nobody needs kept, while it is exchanged.
const PASSAGE: Slot = Slot(0);
/// Slots that get memory at a time: a write that comes just then waits for all of them.
const GROWTH: u32 = 8;
/// Slots that are made ready beforehand, while something is kept.
const AHEAD: usize = 128;
/// Slots kept ready; of more than that, the memory goes back to the host.
const READY: usize = 1024;
/// So many at a time: whoever waits just then waits for all of them. 3 GiB at once took 1.1 s, after which a page server passes for dead.
const TRIM: usize = 512;

/// The slots.
#[derive(Debug)]
pub struct Store {
    memfd: File,
    map: Map,
    /// Slots that ever were; those from here on have no memory.
    end: u32,
    limit: u32,
    ready: Vec<u32>,
    /// Whether those are in order, the first to be given out last.
    sorted: bool,
    /// Before `end`, without memory.
    punched: Vec<u32>,
    /// By slot: generations that need it.
    users: Vec<u32>,
    used: u32,
}

impl Store {
    /// Of at most `limit` pages, in a memfd that nobody else grows.
    pub fn new(memfd: File, limit: u32) -> Result<Self, StoreError> {
        let limit = limit.clamp(1, u32::MAX - 8);
        let bytes = u64::from(limit + 1) * PAGE as u64;
        memfd.set_len(bytes).map_err(StoreError::NoMemory)?;
        let map = Map::new(&memfd, bytes as usize).map_err(StoreError::Map)?;
        let (ready, punched) = (vec![], vec![]);
        let store = Self { memfd, map, end: 1, limit, ready, sorted: false, punched, users: vec![0], used: 0 };
        store.back(PASSAGE.0, 1)?;
        Ok(store)
    }

    /// Slots in use.
    pub fn used(&self) -> u32 {
        self.used
    }

    /// Most slots there can be.
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// Whether [`Store::prepare`] has something to do.
    pub fn is_short(&self) -> bool {
        self.ready.len() < AHEAD && self.used + (self.ready.len() as u32) < self.limit
    }

    /// Gives memory to a few slots before they are wanted: whoever waits then need not wait for that. That there is none is told when they
    /// are; true if there was.
    pub fn prepare(&mut self) -> bool {
        let before = self.ready.len();
        self.grow().is_ok() && self.ready.len() > before
    }

    /// A slot with memory behind it; its content is anything. It is taken by [`Store::fill`].
    pub fn reserve(&mut self) -> Result<Slot, StoreError> {
        if self.ready.is_empty() {
            self.grow()?;
        }
        self.ready.last().map(|slot| Slot(*slot)).ok_or(StoreError::Full { limit: self.limit })
    }

    /// Copies the page at `offset` of `ram` into `slot`, which was reserved last, for `users` generations.
    pub fn fill(&mut self, slot: Slot, ram: &File, offset: u64, users: u32) -> Result<(), StoreError> {
        debug_assert_eq!(self.ready.last(), Some(&slot.0));
        self.map.read(slot, ram, offset).map_err(|source| StoreError::Read { offset, source })?;
        self.ready.pop();
        self.users[slot.0 as usize] = users;
        self.used += 1;
        Ok(())
    }

    /// Copies the page at `offset` of `ram` to where it stays until the next that passes through.
    pub fn pass(&mut self, ram: &File, offset: u64) -> Result<Slot, StoreError> {
        self.map.read(PASSAGE, ram, offset).map_err(|source| StoreError::Read { offset, source })?;
        Ok(PASSAGE)
    }

    /// What is in a slot that is in use.
    pub fn page(&self, slot: Slot) -> &[u8] {
        self.map.page(slot)
    }

    /// One generation less needs `slot`.
    pub fn release(&mut self, slot: Slot) {
        let users = &mut self.users[slot.0 as usize];
        *users -= 1;
        if *users == 0 {
            self.used -= 1;
            self.ready.push(slot.0);
            self.sorted = false;
        }
    }

    /// Slots whose memory may go back to the host.
    fn spare(&self, wanted: bool) -> usize {
        self.ready.len().saturating_sub(if wanted { READY } else { 0 })
    }

    /// Whether [`Store::trim`] has something to do; `wanted`, whether there is something that slots may be wanted for.
    pub fn is_long(&self, wanted: bool) -> bool {
        self.spare(wanted) > 0
    }

    /// Gives memory of some slots that nobody needs back to the host.
    pub fn trim(&mut self, wanted: bool) {
        if !self.is_long(wanted) {
            return;
        }
        if !std::mem::replace(&mut self.sorted, true) {
            self.ready.sort_unstable_by(|a, b| b.cmp(a));
        }
        let some = self.spare(wanted).min(TRIM);
        let mut rest = self.ready.drain(..some).rev().peekable();
        while let Some(first) = rest.next() {
            let mut len = 1;
            while rest.next_if_eq(&(first + len)).is_some() {
                len += 1;
            }
            let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            // What cannot be punched is memory that stays, and is counted no more.
            let _ = fallocate(&self.memfd, mode, Slot(first).offset() as i64, i64::from(len) * PAGE as i64);
            self.punched.extend(first..first + len);
        }
        drop(rest);
        if self.used == 0 && self.ready.is_empty() {
            (self.end, self.users, self.punched) = (1, vec![0], vec![]);
            self.ready.shrink_to_fit();
        }
    }

    fn grow(&mut self) -> Result<(), StoreError> {
        let fresh = GROWTH.min(self.limit + 1 - self.end);
        if fresh > 0 {
            self.back(self.end, fresh)?;
            self.users.resize((self.end + fresh) as usize, 0);
            // The first is given out first.
            self.ready.extend((self.end..self.end + fresh).rev());
            self.sorted = false;
            self.end += fresh;
            return Ok(());
        }
        for _ in 0..GROWTH {
            let Some(slot) = self.punched.pop() else { break };
            if let Err(e) = self.back(slot, 1) {
                self.punched.push(slot);
                return if self.ready.is_empty() { Err(e) } else { Ok(()) };
            }
            self.ready.push(slot);
            self.sorted = false;
        }
        Ok(())
    }

    fn back(&self, first: u32, len: u32) -> Result<(), StoreError> {
        let (offset, bytes) = (Slot(first).offset() as i64, i64::from(len) * PAGE as i64);
        let kept = fallocate(&self.memfd, FallocateFlags::empty(), offset, bytes);
        kept.map_err(|e| StoreError::NoMemory(e.into()))?;
        self.map.populate(Slot(first), len);
        Ok(())
    }
}

/// The memfd, mapped.
#[derive(Debug)]
struct Map(Mapped);

impl Map {
    fn new(memfd: &File, len: usize) -> io::Result<Self> {
        Mapped::new(memfd, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).map(Self)
    }

    fn at(&self, slot: Slot) -> *mut u8 {
        self.0.at(slot.0 as usize)
    }

    /// Puts these pages, which have memory, into the page table all at once.
    fn populate(&self, first: Slot, len: u32) {
        // SAFETY: it changes nothing of what is there, and the pages lie within the mapping: `at` checks the first, the store's limit bounds
        // the last. An older kernel (before Linux 5.14) does it at the first touch of each.
        let _ = unsafe { libc::madvise(self.at(first).cast(), len as usize * PAGE, libc::MADV_POPULATE_WRITE) };
    }

    fn read(&mut self, slot: Slot, from: &File, offset: u64) -> io::Result<()> {
        let at = self.at(slot);
        // SAFETY: `at` is a page of this mapping, which has memory behind it, and nobody holds a reference into it: `&mut self`.
        let read = unsafe { libc::pread(from.as_raw_fd(), at.cast(), PAGE, offset as i64) };
        match Errno::result(read)? {
            PAGE_READ => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn page(&self, slot: Slot) -> &[u8] {
        // SAFETY: a page of this mapping with memory behind it, which is written only through `&mut self`. The source, which has the
        // memfd too, only reads it.
        unsafe { std::slice::from_raw_parts(self.at(slot), PAGE) }
    }
}

const PAGE_READ: isize = PAGE as isize;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{contents, fill, memfd, populated};

    /// All that may go has gone, a little at a time.
    fn trimmed(store: &mut Store) {
        let wanted = store.used() > 0;
        while store.is_long(wanted) {
            let before = populated(&store.memfd);
            store.trim(wanted);
            let gone = before - populated(&store.memfd);
            assert!(gone > 0 && gone <= (TRIM * PAGE) as u64, "{gone} bytes at once");
        }
    }

    #[test]
    fn slots_are_shared_given_back_and_bounded() {
        let ram = memfd(8 * PAGE as u64);
        fill(&ram, 0..8);
        let mut store = Store::new(memfd(0), 100).unwrap();
        let put = |store: &mut Store, page: u64, users| {
            let slot = store.reserve().unwrap();
            store.fill(slot, &ram, page * PAGE as u64, users).unwrap();
            slot
        };
        let first = put(&mut store, 3, 2);
        let rest: Vec<_> = (0..99).map(|n| put(&mut store, n % 8, 1)).collect();
        assert!(matches!(store.reserve(), Err(StoreError::Full { limit: 100 })));
        assert_eq!(store.used(), 100);
        store.release(first);
        assert!(store.reserve().is_err(), "one generation still needs it");
        for (n, slot) in rest.iter().enumerate() {
            assert_eq!(store.page(*slot), contents(n as u64 % 8));
            store.release(*slot);
        }
        assert_eq!(store.page(first), contents(3));
        store.release(first);
        assert_eq!(populated(&store.memfd), 101 * PAGE as u64);
        trimmed(&mut store);
        assert_eq!(populated(&store.memfd), PAGE as u64);
        let again = put(&mut store, 5, 1);
        assert_eq!(store.page(again), contents(5));
    }

    #[test]
    fn memory_of_slots_goes_back_while_others_are_in_use() {
        let ram = memfd(PAGE as u64);
        fill(&ram, [0]);
        let limit = 3 * READY as u32;
        let mut store = Store::new(memfd(0), limit).unwrap();
        let mut slots = Vec::new();
        for _ in 0..limit {
            let slot = store.reserve().unwrap();
            store.fill(slot, &ram, 0, 1).unwrap();
            slots.push(slot);
        }
        for slot in slots.iter().skip(1) {
            store.release(*slot);
        }
        trimmed(&mut store);
        assert_eq!(populated(&store.memfd), (READY as u64 + 2) * PAGE as u64);
        assert_eq!(store.page(slots[0]), contents(0));
        for _ in 1..limit {
            let slot = store.reserve().unwrap();
            assert_ne!(slot, slots[0]);
            store.fill(slot, &ram, 0, 1).unwrap();
        }
        assert!(store.reserve().is_err());
    }
}
