//! Guest RAM by its offset in the memfd, which is how images and faults name a page.
//!
//! Invariant: the regions cover the memfd from 0 to its end without gaps, mapped shared, at page boundaries. The mappings live
//! as long as a [`Ram`] does, so that nobody can be made to fill an address that has become something else's.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

pub use crate::mappings::{Hva, Mapping, Mappings};

/// A page of the host, and of the guest: 4 KiB, of which forks share memory. What the host puts together it splits for them: [`crate::huge`].
pub const PAGE: usize = 4096;

/// Why memory is not what this crate can watch and fill.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// A region without a file behind it, or one that is not mapped as it should be.
    #[error("the memory at guest address {gpa:#x} is no {} mapping of a memfd", if *shared { "shared" } else { "private" })]
    NotSo {
        /// Where the region begins.
        gpa: u64,
        /// Whether it should be shared, and not private.
        shared: bool,
    },
    /// A region that begins or ends within a page.
    #[error("the memory at guest address {gpa:#x} does not begin and end at pages")]
    Unaligned {
        /// Where the region begins.
        gpa: u64,
    },
    /// Regions that overlap, leave a part of the memfd out, or lie in several memfds.
    #[error("the memory regions do not cover one memfd without gaps (at offset {offset:#x})")]
    Gaps {
        /// The first offset that is not as it should be.
        offset: u64,
    },
    /// The memfd cannot be examined.
    #[error("cannot examine the memfd")]
    Memfd(#[source] io::Error),
}

/// All of a VM's RAM: one memfd, mapped shared.
#[derive(Debug)]
pub struct Ram {
    /// Keeps it mapped.
    memory: Arc<GuestMemoryMmap>,
    mappings: Mappings,
}

impl Ram {
    /// Takes the RAM in `memory`, if it is all of one memfd.
    pub fn new(memory: Arc<GuestMemoryMmap>) -> Result<Self, RamError> {
        let mappings = Mappings::of_sharing(&memory, libc::MAP_SHARED)?;
        Ok(Self { memory, mappings })
    }

    /// Size of the whole.
    pub fn bytes(&self) -> u64 {
        self.mappings.bytes()
    }

    /// The memfd.
    pub fn memfd(&self) -> &File {
        let region = self.memory.iter().next().and_then(|region| region.file_offset());
        region.expect("new() refuses memory without a file").file()
    }

    /// Where it is mapped.
    pub fn mappings(&self) -> &Mappings {
        &self.mappings
    }
}

impl Mappings {
    /// Where a child's memory is: one memfd, mapped privately.
    ///
    /// # Errors
    /// When it is not that.
    pub fn of_private(memory: &GuestMemoryMmap) -> Result<Self, RamError> {
        Self::of_sharing(memory, libc::MAP_PRIVATE)
    }

    fn of_sharing(memory: &GuestMemoryMmap, sharing: libc::c_int) -> Result<Self, RamError> {
        let mut regions = Vec::new();
        let mut file = None;
        for region in memory.iter() {
            let gpa = vm_memory::GuestMemoryRegion::start_addr(region).0;
            let backing = region.file_offset().filter(|_| region.flags() & sharing != 0);
            let backing = backing.ok_or(RamError::NotSo { gpa, shared: sharing == libc::MAP_SHARED })?;
            let (start, len, offset) = (region.as_ptr() as u64, region.size() as u64, backing.start());
            if [start, len, offset].iter().any(|n| n % PAGE as u64 != 0) {
                return Err(RamError::Unaligned { gpa });
            }
            let status = backing.file().metadata().map_err(RamError::Memfd)?;
            let this = (status.dev(), status.ino(), status.len());
            if *file.get_or_insert(this) != this {
                return Err(RamError::Gaps { offset });
            }
            regions.push(Mapping { start: Hva(start), len, offset });
        }
        let mappings = Self::new(regions).map_err(|wrong| RamError::Gaps { offset: wrong.offset })?;
        match file {
            Some((_, _, len)) if len == mappings.bytes() => Ok(mappings),
            _ => Err(RamError::Gaps { offset: mappings.bytes() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

    const P: u64 = PAGE as u64;

    #[test]
    fn it_is_mapped_by_offset() {
        let memory = testing::ram(&[3 * P, 2 * P]);
        let ram = Ram::new(Arc::clone(&memory)).unwrap();
        assert_eq!(ram.bytes(), 5 * P);
        assert_eq!(ram.memfd().metadata().unwrap().len(), 5 * P);
        let mapped: Vec<_> = ram.mappings().iter().map(|m| (m.offset, m.len)).collect();
        assert_eq!(mapped, [(0, 3 * P), (3 * P, 2 * P)]);
    }

    #[test]
    fn memory_that_is_not_one_shared_memfd_is_refused() {
        let anonymous = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), PAGE)]).unwrap();
        assert!(matches!(Ram::new(Arc::new(anonymous)), Err(RamError::NotSo { gpa: 0, shared: true })));

        let memfd = testing::memfd(4 * P);
        let region = |gpa, offset, flags| {
            let file = FileOffset::new(memfd.try_clone().unwrap(), offset);
            let region = MmapRegionBuilder::new(PAGE)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(flags)
                .with_file_offset(file);
            GuestRegionMmap::new(region.build().unwrap(), GuestAddress(gpa)).unwrap()
        };
        let memory = |regions| Ram::new(Arc::new(GuestMemoryMmap::from_regions(regions).unwrap()));
        let private = memory(vec![region(0x8000, 0, libc::MAP_PRIVATE)]);
        assert!(matches!(private, Err(RamError::NotSo { gpa: 0x8000, shared: true })));
        let gap = memory(vec![region(0, 0, libc::MAP_SHARED), region(P, 2 * P, libc::MAP_SHARED)]);
        assert!(matches!(gap, Err(RamError::Gaps { offset: P })), "{gap:?}");
        let short = memory(vec![region(0, 0, libc::MAP_SHARED)]);
        assert!(matches!(short, Err(RamError::Gaps { offset: P })), "{short:?}");
    }
}
