//! A child's own pages as they were when it was forked itself, in a memfd that it made: the pages, and after them their numbers.
//!
//! The child may be hostile, so the memfd must be sealed: nobody can cut it any more, and nobody who has not mapped it before can change it.
//! One that has harms its own children, as it could by what it puts in. Against that too there is a seal (`F_SEAL_WRITE`); but Linux waits for
//! it until nobody else has a reference to any of the pages, and gives up (`EBUSY`) if one that it is moving about stays busy for 150 ms
//! (`memfd_wait_for_pins`): the seal is put on while a VM is paused.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::mman::ProtFlags;
use vm_memory::VolatileSlice;

use super::GenerationId;
use super::mapped::Mapped;
use crate::ram::PAGE;

/// What nobody may be able to do to it any more.
pub const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_FUTURE_WRITE);

/// Of what `st_blocks` counts.
const BLOCK: u64 = 512;

/// Why a snapshot is none.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Somebody could still change it.
    #[error("it is not sealed")]
    Unsealed,
    /// It names a page that there is not, or one twice.
    #[error("it has a page {0:#x} that it cannot have")]
    Page(u32),
    /// Some of it is not there.
    #[error("it has holes")]
    Hole,
    /// It is too short, or cannot be mapped.
    #[error("it cannot be read")]
    System(#[from] io::Error),
}

/// A child's own pages at a fork point of its own.
#[derive(Debug)]
pub struct Snapshot {
    /// The fork point that it is of itself: what is not in here is as it was there.
    pub above: GenerationId,
    /// By page: 0, or one more than its place.
    places: Vec<u32>,
    count: u32,
    /// None of an empty one.
    map: Option<Mapped>,
}

impl Snapshot {
    /// The first `count` pages of `memfd`, of a memory of `pages`.
    ///
    /// # Errors
    /// When it is not what it should be.
    pub fn open(memfd: &File, count: u32, pages: usize, above: GenerationId) -> Result<Self, SnapshotError> {
        let mut places = vec![0; pages];
        if count == 0 {
            return Ok(Self { above, places, count, map: None });
        }
        let seals = fcntl(memfd, FcntlArg::F_GET_SEALS).map_err(io::Error::from)?;
        if !SealFlag::from_bits_retain(seals).contains(SEALS) {
            return Err(SnapshotError::Unsealed);
        }
        let len = u64::from(count) * PAGE as u64;
        let (meta, whole) = (memfd.metadata()?, len + u64::from(count) * 4);
        if count as usize > pages || meta.len() < whole {
            return Err(SnapshotError::System(io::ErrorKind::UnexpectedEof.into()));
        }
        // A hole would become a page at the first look, and be the memory of whoever looks. The seals keep any from being made later.
        if meta.blocks() * BLOCK < whole {
            return Err(SnapshotError::Hole);
        }
        let mut numbers = vec![0; count as usize * 4];
        memfd.read_exact_at(&mut numbers, len)?;
        for (place, number) in numbers.as_chunks().0.iter().enumerate() {
            let page = u32::from_le_bytes(*number);
            match places.get_mut(page as usize) {
                Some(free @ 0) => *free = place as u32 + 1,
                _ => return Err(SnapshotError::Page(page)),
            }
        }
        let map = Some(Mapped::new(memfd, len as usize, ProtFlags::PROT_READ)?);
        Ok(Self { above, places, count, map })
    }

    /// Whether it has a page.
    pub fn has(&self, page: u32) -> bool {
        self.places[page as usize] != 0
    }

    /// What a page was, if it has it.
    pub fn page(&self, page: u32) -> Option<VolatileSlice<'_>> {
        let place = self.places[page as usize].checked_sub(1)?;
        let start = self.map.as_ref()?.at(place as usize);
        // SAFETY: a page of this mapping, which lives as long as it is borrowed, of a file that cannot become shorter.
        Some(unsafe { VolatileSlice::new(start, PAGE) })
    }

    /// How many it has.
    pub fn count(&self) -> u32 {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::testing::contents;

    fn memfd(pages: &[u32], seals: SealFlag) -> File {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        for (place, page) in pages.iter().enumerate() {
            file.write_all_at(&contents(u64::from(*page)), (place * PAGE) as u64).unwrap();
        }
        let numbers: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        file.write_all_at(&numbers, (pages.len() * PAGE) as u64).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        file
    }

    fn bytes(snapshot: &Snapshot, page: u32) -> Option<Vec<u8>> {
        let mut bytes = vec![0; PAGE];
        snapshot.page(page).map(|page| {
            page.copy_to(&mut bytes[..]);
            bytes
        })
    }

    #[test]
    fn it_has_what_was_put_in_and_nothing_else() {
        let snapshot = Snapshot::open(&memfd(&[7, 0, 31], SEALS), 3, 32, 5).unwrap();
        for page in 0..32 {
            let there = [7, 0, 31].contains(&page);
            assert_eq!(snapshot.has(page), there);
            assert_eq!(bytes(&snapshot, page), there.then(|| contents(page.into()).to_vec()));
        }
        let empty = Snapshot::open(&memfd(&[], SealFlag::empty()), 0, 32, 5).unwrap();
        assert_eq!((empty.count(), bytes(&empty, 3)), (0, None));
    }

    #[test]
    fn one_that_could_change_or_makes_no_sense_is_refused() {
        let open = |file: &File, count| Snapshot::open(file, count, 32, 1).unwrap_err();
        for seals in [SealFlag::empty(), SEALS - SealFlag::F_SEAL_SHRINK, SEALS - SealFlag::F_SEAL_FUTURE_WRITE] {
            assert!(matches!(open(&memfd(&[1], seals), 1), SnapshotError::Unsealed));
        }
        assert!(matches!(open(&memfd(&[1, 32], SEALS), 2), SnapshotError::Page(32)));
        assert!(matches!(open(&memfd(&[1, 1], SEALS), 2), SnapshotError::Page(1)));
        assert!(matches!(open(&memfd(&[1, 2], SEALS), 3), SnapshotError::System(_)));
        assert!(matches!(open(&memfd(&[1, 2], SEALS), u32::MAX), SnapshotError::System(_)));
        let hollow = File::from(memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        hollow.set_len(3 * PAGE as u64).unwrap();
        hollow.write_all_at(&[1, 0, 0, 0, 2, 0, 0, 0], 2 * PAGE as u64).unwrap();
        fcntl(&hollow, FcntlArg::F_ADD_SEALS(SEALS)).unwrap();
        assert!(matches!(open(&hollow, 2), SnapshotError::Hole));
        let pipe = File::from(nix::unistd::pipe().unwrap().0);
        assert!(matches!(open(&pipe, 1), SnapshotError::System(_)));
    }
}
