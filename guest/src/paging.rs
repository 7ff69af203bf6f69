//! The guest's page tables (Intel SDM volume 3, "Paging"): checked walks, and where they have the kernel's image.
//!
//! ```text
//!  root ─ (level 5) ─ level 4 ─ level 3 ─┬─ level 2: the image's, 1 GiB from 0xffffffff80000000 on
//!                        [511]    [510]  │   0 0 0 0 0 0 0 0 █ █ █ █ █ █ █ █ █ █ 0 0 0 0 0 0 0 …
//!                                        │   └ free slots ┘ └ image: base..end ┘ └ free slots
//!                                        └─ level 1, where an entry of 2 MiB was split
//! ```
//!
//! Linux maps its image by one table of 2 MiB entries that all tasks share (`level2_kernel_pgt`), and zeroes those before and behind it
//! (`cleanup_highmap`), so the image is the run of entries that are not zero around any address in its text. Inside it some may
//! be not present: with page table isolation the memory of freed init sections is unmapped. Physically it is one piece.
//!
//! With page table isolation (KPTI) a task has two roots: the kernel's, and the program's in the page behind it. That one has the entry
//! text too, and by a table of its own; that a walk succeeds proves nothing. `arch/x86/mm/pti.c`.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::memory::{Absent, Gpa, Gva, PhysicalMemory};
use crate::registers::Registers;

/// Where the kernel's image may be: 1 GiB, or the first half of it where the kernel does not randomize its place.
pub const IMAGE_WINDOW: Range<Gva> = Gva(0xffff_ffff_8000_0000)..Gva(0xffff_ffff_c000_0000);
/// The largest image that is looked at.
pub const MOST_IMAGE: u64 = 512 << 20;
/// What a level-2 entry maps, and what the image's addresses are multiples of.
pub const LARGE: u64 = 2 << 20;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const PAGE_SIZE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const FRAME: u64 = 0x000f_ffff_ffff_f000;
/// Entries in a table.
const ENTRIES: usize = 512;
/// The bit of CR3 that tells a program's root from its kernel's.
const USER_ROOT: u64 = 0x1000;
/// The fewest entries of an image: a small kernel of our own making has eight, a program's table of the entry text one or two.
const FEWEST: usize = 5;
/// In this half of the window's table modules are, where the kernel does not randomize its place.
const HALF: usize = 256;

/// Why an address has no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalkError {
    /// It is in neither half of the address space.
    #[error("{at} is not canonical with {levels} levels of page tables")]
    NotCanonical {
        /// The address.
        at: Gva,
        /// Levels of page tables.
        levels: u8,
    },
    /// An entry says that there is nothing.
    #[error("{at} is not mapped: the entry of level {level} is not present")]
    NotPresent {
        /// The address.
        at: Gva,
        /// The entry's level; 1 is the last.
        level: u8,
    },
    /// An entry is of a kind that its level does not have.
    #[error("{at} is not mapped: the entry of level {level} is malformed")]
    Malformed {
        /// The address.
        at: Gva,
        /// The entry's level.
        level: u8,
    },
    /// A table is not in RAM.
    #[error("a page table is not in RAM")]
    Table(#[from] Absent),
}

/// A page's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB.
    Large,
    /// 1 GiB.
    Huge,
}

impl PageSize {
    /// In bytes.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Small => 4 << 10,
            Self::Large => LARGE,
            Self::Huge => 1 << 30,
        }
    }
}

/// Where an address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The address's byte.
    pub at: Gpa,
    /// The size of its page.
    pub page: PageSize,
    /// Whether all levels allow writes.
    pub writable: bool,
    /// Whether all levels allow programs.
    pub user: bool,
    /// Whether no level forbids execution.
    pub executable: bool,
}

/// Page tables, by their root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressSpace {
    /// The table of the highest level.
    pub root: Gpa,
    /// 4 or 5.
    pub levels: u8,
}

fn index(at: Gva, level: u8) -> u64 {
    at.0 >> shift(level) & (ENTRIES as u64 - 1)
}

fn shift(level: u8) -> u32 {
    12 + 9 * (u32::from(level) - 1)
}

impl AddressSpace {
    /// The one in which the vCPU runs, unless it has no 64-bit mode on.
    pub fn of(registers: &Registers) -> Option<Self> {
        Some(Self { root: Gpa(registers.cr3 & FRAME), levels: registers.levels()? })
    }

    /// Where `at` leads.
    pub fn walk(&self, memory: &dyn PhysicalMemory, at: Gva) -> Result<Translation, WalkError> {
        let (mut table, mut flags, mut no_execute) = (self.top(at)?, WRITABLE | USER, 0);
        for level in (1..=self.levels).rev() {
            let entry = present(memory, table, at, level)?;
            (flags, no_execute) = (flags & entry, no_execute | entry & NO_EXECUTE);
            let page = match (level, entry & PAGE_SIZE != 0) {
                (1, _) => PageSize::Small,
                (2, true) => PageSize::Large,
                (3, true) => PageSize::Huge,
                (_, true) => return Err(WalkError::Malformed { at, level }),
                (_, false) => {
                    table = Gpa(entry & FRAME);
                    continue;
                }
            };
            let offset = page.bytes() - 1;
            return Ok(Translation {
                at: Gpa(entry & FRAME & !offset | at.0 & offset),
                page,
                writable: flags & WRITABLE != 0,
                user: flags & USER != 0,
                executable: no_execute == 0,
            });
        }
        Err(WalkError::Malformed { at, level: 1 })
    }

    /// The table that has the level-2 entry of `at`.
    fn level2(&self, memory: &dyn PhysicalMemory, at: Gva) -> Result<Gpa, WalkError> {
        let mut table = self.top(at)?;
        for level in (3..=self.levels).rev() {
            let entry = present(memory, table, at, level)?;
            if entry & PAGE_SIZE != 0 {
                return Err(WalkError::Malformed { at, level });
            }
            table = Gpa(entry & FRAME);
        }
        Ok(table)
    }

    fn top(&self, at: Gva) -> Result<Gpa, WalkError> {
        let unused = 64 - (12 + 9 * u32::from(self.levels));
        let canonical = ((at.0 << unused) as i64 >> unused) as u64;
        if canonical != at.0 {
            return Err(WalkError::NotCanonical { at, levels: self.levels });
        }
        Ok(self.root)
    }
}

fn present(memory: &dyn PhysicalMemory, table: Gpa, at: Gva, level: u8) -> Result<u64, WalkError> {
    let entry = memory.u64(table.plus(index(at, level) * 8))?;
    if entry & PRESENT == 0 {
        return Err(WalkError::NotPresent { at, level });
    }
    Ok(entry)
}

/// Why page tables have no kernel image at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoImage {
    /// The vCPU is not, or not yet, in 64-bit mode.
    #[error("the vCPU is not in 64-bit mode")]
    NotLongMode,
    /// An address that should be in the image is not.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// There is less than any kernel's image.
    #[error(
        "only {entries} entries of 2 MiB are mapped around {at}: these are a program's page tables, or no Linux kernel's"
    )]
    TooShort {
        /// The address that was said to be in it.
        at: Gva,
        /// How many there are.
        entries: usize,
    },
    /// There is more than [`MOST_IMAGE`].
    #[error("{entries} entries of 2 MiB are mapped around {at}: no kernel's image is as large")]
    TooLong {
        /// The address that was said to be in it.
        at: Gva,
        /// How many there are.
        entries: usize,
    },
    /// Its physical address is not a multiple of 2 MiB.
    #[error("{at} is mapped to {physical}: a kernel's image is aligned to 2 MiB in physical memory too")]
    Unaligned {
        /// The address that was said to be in it.
        at: Gva,
        /// Where it leads.
        physical: Gpa,
    },
}

/// Where the kernel's image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelImage {
    /// Its first byte, which is `_text`.
    pub base: Gva,
    /// Behind its last: `_brk_end`, or less than 2 MiB further.
    pub end: Gva,
    /// Its first byte in physical memory, where it is one piece.
    pub physical: Gpa,
    /// The table of its 2 MiB entries.
    pub pmd_table: Gpa,
    /// The kernel's root that led there.
    pub root: Gpa,
    /// Levels of page tables.
    pub levels: u8,
    /// Whether programs have page tables of their own (KPTI).
    pub isolated: bool,
}

/// An entry of the image's table that maps nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeSlot {
    /// The 2 MiB that it would map.
    pub at: Gva,
    /// The entry.
    pub entry: Gpa,
}

impl KernelImage {
    /// The image around `at`, an address in its text, as this vCPU's page tables have it.
    pub fn find(memory: &dyn PhysicalMemory, registers: &Registers, at: Gva) -> Result<Self, NoImage> {
        let active = AddressSpace::of(registers).ok_or(NoImage::NotLongMode)?;
        let paired = AddressSpace { root: Gpa(active.root.0 & !USER_ROOT), ..active };
        let image = match (Self::under(memory, paired, at), Self::under(memory, active, at)) {
            // Without isolation any page may be a root, and two of them may be neighbours: then the table is the same.
            (Ok(paired), Ok(active)) if paired.pmd_table == active.pmd_table => active,
            (Ok(paired), _) => paired,
            (Err(_), active) => active?,
        };
        Ok(Self { isolated: image.has_pair(memory, at), ..image })
    }

    fn under(memory: &dyn PhysicalMemory, space: AddressSpace, at: Gva) -> Result<Self, NoImage> {
        let pmd_table = space.level2(memory, at)?;
        let known = space.walk(memory, at)?.at;
        let window = (at.0 & !(PageSize::Huge.bytes() - 1), known.0.wrapping_sub(at.0 % PageSize::Huge.bytes()));
        if window.1 % LARGE != 0 {
            return Err(NoImage::Unaligned { at, physical: known });
        }
        let place = |slot: usize| window.1.wrapping_add(slot as u64 * LARGE);
        let entries = entries(memory, pmd_table).map_err(WalkError::Table)?;
        let of_image = |slot: usize| match entries[slot] {
            0 => false,
            _ if place(slot) & !FRAME != 0 => false,
            entry if entry & PRESENT != 0 && entry & PAGE_SIZE != 0 => entry & FRAME & !(LARGE - 1) == place(slot),
            _ => true,
        };
        let middle = index(at, 2) as usize;
        let first = (0..middle).rev().take_while(|slot| of_image(*slot)).last().unwrap_or(middle);
        let last = (middle + 1..ENTRIES).take_while(|slot| of_image(*slot)).last().unwrap_or(middle);
        match last - first + 1 {
            count if count < FEWEST => Err(NoImage::TooShort { at, entries: count }),
            count if count as u64 * LARGE > MOST_IMAGE => Err(NoImage::TooLong { at, entries: count }),
            count => Ok(Self {
                base: Gva(window.0 + first as u64 * LARGE),
                end: Gva(window.0 + (first + count) as u64 * LARGE),
                physical: Gpa(place(first)),
                pmd_table,
                root: space.root,
                levels: space.levels,
                isolated: false,
            }),
        }
    }

    /// Whether the page behind the root is a program's, which has `at`, in the entry text, by another table.
    fn has_pair(&self, memory: &dyn PhysicalMemory, at: Gva) -> bool {
        let space = self.address_space();
        let user = AddressSpace { root: Gpa(space.root.0 | USER_ROOT), ..space };
        let place = |space: &AddressSpace| space.walk(memory, at).map(|found| found.at);
        user.root != space.root
            && user.level2(memory, at).is_ok_and(|table| table != self.pmd_table)
            && place(&user) == place(&space)
    }

    /// The kernel's page tables. What is not the same in all tasks (programs' memory) is as in the task that ran, and may go with it.
    pub fn address_space(&self) -> AddressSpace {
        AddressSpace { root: self.root, levels: self.levels }
    }

    /// Bytes from its first to its last.
    pub fn bytes(&self) -> u64 {
        self.end.0 - self.base.0
    }

    /// Where an address in it is in physical memory.
    pub fn to_physical(&self, at: Gva) -> Option<Gpa> {
        (self.base..self.end).contains(&at).then(|| self.physical.plus(at.0 - self.base.0))
    }

    /// The address in it that leads to this physical one.
    pub fn to_virtual(&self, at: Gpa) -> Option<Gva> {
        let offset = at.0.checked_sub(self.physical.0)?;
        (offset < self.bytes()).then(|| self.base.plus(offset))
    }

    /// A sum over the image's table as it is now, but for the accessed and dirty bits, which processors set by themselves.
    pub(crate) fn mapping_crc32(&self, memory: &dyn PhysicalMemory) -> Result<u32, Absent> {
        const USED: u64 = 0x60;
        let mut sum = crc32fast::Hasher::new();
        entries(memory, self.pmd_table)?.iter().for_each(|entry| sum.update(&(entry & !USED).to_le_bytes()));
        Ok(sum.finalize())
    }

    /// Entries of the image's table that are free, lowest first: what is put there is seen by every task at once, within reach of the
    /// kernel's calls. None where modules could be.
    pub fn free_slots(&self, memory: &dyn PhysicalMemory) -> Result<Vec<FreeSlot>, Absent> {
        let (first, end) = (index(self.base, 2) as usize, index(Gva(self.end.0 - 1), 2) as usize + 1);
        let behind = if end <= HALF { end..HALF } else { end..ENTRIES };
        let entries = entries(memory, self.pmd_table)?;
        let window = self.base.0 & !(PageSize::Huge.bytes() - 1);
        let free = (0..first).chain(behind).filter(|slot| entries[*slot] == 0).map(|slot| FreeSlot {
            at: Gva(window + slot as u64 * LARGE),
            entry: self.pmd_table.plus(slot as u64 * 8),
        });
        Ok(free.collect())
    }
}

fn entries(memory: &dyn PhysicalMemory, table: Gpa) -> Result<[u64; ENTRIES], Absent> {
    let bytes: [u8; 8 * ENTRIES] = memory.bytes(table)?;
    let mut entries = [0; ENTRIES];
    for (entry, bytes) in entries.iter_mut().zip(bytes.as_chunks().0) {
        *entry = u64::from_le_bytes(*bytes);
    }
    Ok(entries)
}

#[cfg(test)]
mod tests;
