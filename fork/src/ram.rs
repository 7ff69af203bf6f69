//! Guest RAM by its offset in the memfd, which is how images and faults name a page.
//!
//! Invariant: the regions cover the memfd from 0 to its end without gaps, mapped shared, at page boundaries. The mappings live
//! as long as a [`Ram`] does, so that nobody can be made to fill an address that has become something else's.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

/// A page of the host, and of the guest: 4 KiB. RAM on huge pages has no place here yet.
pub const PAGE: usize = 4096;

/// An address in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hva(pub u64);

/// Why memory is not what this crate can watch and fill.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// A region without a file behind it, or a private mapping of one.
    #[error("the memory at guest address {gpa:#x} is no shared mapping of a memfd")]
    NotShared {
        /// Where the region begins.
        gpa: u64,
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

#[derive(Debug)]
struct Region {
    start: Hva,
    len: u64,
    /// In the memfd.
    offset: u64,
}

/// All of a VM's RAM: one memfd, mapped shared.
#[derive(Debug)]
pub struct Ram {
    /// Holds the mappings.
    memory: Arc<GuestMemoryMmap>,
    /// By offset; never empty.
    regions: Vec<Region>,
}

impl Ram {
    /// Takes the RAM in `memory`, if it is all of one memfd.
    pub fn new(memory: Arc<GuestMemoryMmap>) -> Result<Self, RamError> {
        let mut regions = Vec::new();
        let mut file = None;
        for region in memory.iter() {
            let gpa = vm_memory::GuestMemoryRegion::start_addr(region).0;
            let backing = region.file_offset().filter(|_| region.flags() & libc::MAP_SHARED != 0);
            let backing = backing.ok_or(RamError::NotShared { gpa })?;
            let (start, len, offset) = (region.as_ptr() as u64, region.size() as u64, backing.start());
            if [start, len, offset].iter().any(|n| n % PAGE as u64 != 0) {
                return Err(RamError::Unaligned { gpa });
            }
            let status = backing.file().metadata().map_err(RamError::Memfd)?;
            let this = (status.dev(), status.ino(), status.len());
            if *file.get_or_insert(this) != this {
                return Err(RamError::Gaps { offset });
            }
            regions.push(Region { start: Hva(start), len, offset });
        }
        regions.sort_by_key(|region| region.offset);
        let mut end = 0;
        for region in &regions {
            if region.offset != end {
                return Err(RamError::Gaps { offset: end.min(region.offset) });
            }
            end += region.len;
        }
        match file {
            Some((_, _, len)) if len == end => Ok(Self { memory, regions }),
            _ => Err(RamError::Gaps { offset: end }),
        }
    }

    /// Size of the whole.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum()
    }

    /// The memfd.
    pub fn memfd(&self) -> &File {
        let region = self.memory.iter().next().and_then(|region| region.file_offset());
        region.expect("new() refuses memory without a file").file()
    }

    /// Where each region is mapped, and its length.
    pub(crate) fn mappings(&self) -> impl Iterator<Item = (Hva, u64)> {
        self.regions.iter().map(|region| (region.start, region.len))
    }

    /// The offset in the memfd of what is mapped at `address`, if it is RAM.
    pub(crate) fn offset_of(&self, address: Hva) -> Option<u64> {
        let within = |region: &Region| address.0.checked_sub(region.start.0).filter(|distance| *distance < region.len);
        self.regions.iter().find_map(|region| Some(region.offset + within(region)?))
    }

    /// Where `len` bytes from `offset` on are mapped: as many pieces as there are regions under them. What lies beyond the
    /// end of RAM is left out.
    pub(crate) fn spans(&self, offset: u64, len: u64) -> impl Iterator<Item = (Hva, u64)> {
        let end = offset.saturating_add(len);
        self.regions.iter().filter_map(move |region| {
            let from = offset.max(region.offset);
            let to = end.min(region.offset + region.len);
            (from < to).then(|| (Hva(region.start.0 + (from - region.offset)), to - from))
        })
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
    fn offsets_and_addresses_belong_together() {
        let memory = testing::ram(&[3 * P, 2 * P]);
        let ram = Ram::new(Arc::clone(&memory)).unwrap();
        assert_eq!(ram.bytes(), 5 * P);
        assert_eq!(ram.memfd().metadata().unwrap().len(), 5 * P);
        let starts: Vec<_> = ram.mappings().map(|(start, _)| start.0).collect();
        // A range over the seam of two regions is two pieces.
        let spans: Vec<_> = ram.spans(2 * P, 2 * P).collect();
        assert_eq!(spans, [(Hva(starts[0] + 2 * P), P), (Hva(starts[1]), P)]);
        assert_eq!(ram.offset_of(Hva(starts[1] + 5)), Some(3 * P + 5));
        assert_eq!(ram.spans(4 * P, u64::MAX).collect::<Vec<_>>(), [(Hva(starts[1] + P), P)]);
        assert_eq!(ram.spans(5 * P, P).count(), 0);
        assert_eq!(ram.offset_of(Hva(0)), None);
    }

    #[test]
    fn memory_that_is_not_one_shared_memfd_is_refused() {
        let anonymous = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), PAGE)]).unwrap();
        assert!(matches!(Ram::new(Arc::new(anonymous)), Err(RamError::NotShared { gpa: 0 })));

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
        assert!(matches!(private, Err(RamError::NotShared { gpa: 0x8000 })));
        let gap = memory(vec![region(0, 0, libc::MAP_SHARED), region(P, 2 * P, libc::MAP_SHARED)]);
        assert!(matches!(gap, Err(RamError::Gaps { offset: P })), "{gap:?}");
        let short = memory(vec![region(0, 0, libc::MAP_SHARED)]);
        assert!(matches!(short, Err(RamError::Gaps { offset: P })), "{short:?}");
    }
}
