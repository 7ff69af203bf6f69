//! Memory and page tables.

use std::collections::HashMap;
use std::ops::Range;

use crate::memory::{Absent, Gpa, Gva, PhysicalMemory};
use crate::paging::PageSize;

const PAGE: usize = 4096;
const PRESENT: u64 = 1;
const TABLE_FLAGS: u64 = 0x67;
const LARGE: u64 = 1 << 7;
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Present, writable, accessed, dirty.
pub const ENTRY_FLAGS: u64 = 0x63;

/// RAM of which only what was written takes memory; the rest is zeros.
#[derive(Debug, Default)]
pub struct SparseMemory {
    ram: Vec<Range<u64>>,
    pages: HashMap<u64, Box<[u8; PAGE]>>,
}

impl SparseMemory {
    /// No RAM yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// RAM of so many bytes.
    pub fn add(&mut self, at: Gpa, bytes: u64) {
        self.ram.push(at.0..at.0.saturating_add(bytes));
    }

    /// Writes what falls into RAM.
    pub fn write(&mut self, at: Gpa, bytes: &[u8]) {
        for (place, byte) in pieces(at, bytes.len()) {
            if self.has(place) {
                let page = self.pages.entry(place.0 / PAGE as u64).or_insert_with(|| Box::new([0; PAGE]));
                let start = place.0 as usize % PAGE;
                page[start..start + byte.len()].copy_from_slice(&bytes[byte]);
            }
        }
    }

    fn has(&self, at: Gpa) -> bool {
        self.ram.iter().any(|ram| ram.contains(&at.0))
    }
}

/// So many bytes from `at` on, page by page: where each piece begins, and which of the bytes it is.
fn pieces(at: Gpa, len: usize) -> impl Iterator<Item = (Gpa, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let place = at.plus(done as u64);
        let piece = (PAGE - place.0 as usize % PAGE).min(len - done);
        done += piece;
        (piece > 0).then(|| (place, done - piece..done))
    })
}

impl PhysicalMemory for SparseMemory {
    fn read(&self, at: Gpa, buffer: &mut [u8]) -> Result<(), Absent> {
        let absent = Absent { at, len: buffer.len() };
        let end = at.0.checked_add(buffer.len() as u64).ok_or(absent)?;
        if !self.ram.iter().any(|ram| ram.start <= at.0 && end <= ram.end) {
            return Err(absent);
        }
        for (place, bytes) in pieces(at, buffer.len()) {
            let start = place.0 as usize % PAGE;
            match self.pages.get(&(place.0 / PAGE as u64)) {
                Some(page) => buffer[bytes.clone()].copy_from_slice(&page[start..start + bytes.len()]),
                None => buffer[bytes].fill(0),
            }
        }
        Ok(())
    }
}

/// Page tables in the making.
#[derive(Clone, Copy, Debug)]
pub struct PageTables {
    /// The root, which has a page behind it.
    pub root: Gpa,
    levels: u8,
    next: Gpa,
}

impl PageTables {
    /// Empty ones, from `at` on, which must be the first of two pages.
    pub fn new(at: Gpa, levels: u8) -> Self {
        Self { root: at, levels, next: at.plus(2 * PAGE as u64) }
    }

    /// Others in the same memory, whose root is the page behind this one's, as a program's is.
    pub fn pair(&self) -> Self {
        Self { root: self.root.plus(PAGE as u64), ..*self }
    }

    /// The first byte that is not used by tables.
    pub fn end(&self) -> Gpa {
        self.next
    }

    /// Makes tables from here on.
    pub fn continue_at(&mut self, at: Gpa) {
        self.next = at;
    }

    /// Maps one page.
    pub fn map(&mut self, memory: &mut SparseMemory, at: Gva, to: Gpa, page: PageSize, flags: u64) {
        let (level, large) = match page {
            PageSize::Small => (1, 0),
            PageSize::Large => (2, LARGE),
            PageSize::Huge => (3, LARGE),
        };
        let entry = self.entry(memory, at, level);
        memory.write(entry, &(to.0 | flags | large).to_le_bytes());
    }

    /// The entry of this level, with tables above it.
    pub fn entry(&mut self, memory: &mut SparseMemory, at: Gva, level: u8) -> Gpa {
        let mut table = self.root;
        let place = |table: Gpa, level: u8| table.plus((at.0 >> (3 + 9 * u32::from(level))) % 512 * 8);
        for upper in (level + 1..=self.levels).rev() {
            let entry = place(table, upper);
            let found = (memory as &dyn PhysicalMemory).u64(entry).unwrap_or_default();
            table = Gpa(found & FRAME);
            if found & PRESENT == 0 {
                table = self.next;
                self.next = table.plus(PAGE as u64);
                memory.write(entry, &(table.0 | TABLE_FLAGS).to_le_bytes());
            }
        }
        place(table, level)
    }
}
