//! What is in this process's page table: `PAGEMAP_SCAN` (Linux 6.7). Which pages of a private mapping are there, which are the process's own, and
//! which of those it has written since it was asked last, on memory whose userfaultfd lifts write protection by itself; and what is mapped by
//! huge pages.
//!
//! The kernel reports a page as written as long as it is not protected, and protects what it reports in the same step: whoever copies
//! a page after it was reported, and asks again until nothing is left, has all of it.
//!
//! `Documentation/admin-guide/mm/pagemap.rst`, `include/uapi/linux/fs.h`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::mappings::{Hva, Mappings};
use crate::ram::PAGE;

/// `struct pm_scan_arg`.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96 && size_of::<Region>() == 24);

const WP_MATCHING: u64 = 1 << 0;
const CHECK_WPASYNC: u64 = 1 << 1;
const WRITTEN: u64 = 1 << 1;
const FILE: u64 = 1 << 2;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const PFNZERO: u64 = 1 << 5;
const HUGE: u64 = 1 << 6;

/// Regions reported at a time.
const REGIONS: usize = 1024;

mod ioctl {
    #![allow(missing_docs, clippy::undocumented_unsafe_blocks)] // nix's macro writes the function.

    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, super::ScanArg);
}

/// This process's page table, to be asked.
#[derive(Debug)]
pub struct PageMap(File);

impl PageMap {
    /// Opens it.
    ///
    /// # Errors
    /// When there is no /proc, or not for us.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// Whether the kernel has the call.
    pub fn scans(&self) -> bool {
        let here = (&raw const *self as u64) & !(PAGE as u64 - 1);
        self.scan(here, here + PAGE as u64, &Wanted::HUGE, &mut [Region::default()]).is_ok()
    }

    /// What of `len` bytes from `start` on is mapped by huge pages.
    ///
    /// # Errors
    /// When the kernel cannot.
    pub fn huge(&self, start: Hva, len: u64) -> io::Result<Vec<(Hva, Hva)>> {
        self.regions(start, len, &Wanted::HUGE)
    }

    /// The pages of `mappings`, as runs, that are this process's own, not the file's nor the zero page, and were written since they were
    /// reported last.
    ///
    /// # Errors
    /// When the kernel cannot, or the memory is not watched by a userfaultfd with `UFFD_FEATURE_WP_ASYNC`.
    pub fn written(&self, mappings: &Mappings) -> io::Result<Vec<(u32, u32)>> {
        self.runs(mappings, &Wanted::WRITTEN)
    }

    /// The pages of `mappings`, as runs, that are this process's own, not the file's nor the zero page, whenever they were written.
    ///
    /// # Errors
    /// When the kernel cannot.
    pub fn own(&self, mappings: &Mappings) -> io::Result<Vec<(u32, u32)>> {
        self.runs(mappings, &Wanted::OWN)
    }

    /// The pages of `mappings`, as runs, that are there: no access to them waits for anybody.
    ///
    /// # Errors
    /// When the kernel cannot.
    pub fn present(&self, mappings: &Mappings) -> io::Result<Vec<(u32, u32)>> {
        self.runs(mappings, &Wanted::PRESENT)
    }

    fn runs(&self, mappings: &Mappings, wanted: &Wanted) -> io::Result<Vec<(u32, u32)>> {
        let mut runs = Vec::new();
        for piece in mappings.iter() {
            for (from, to) in self.regions(piece.start, piece.len, wanted)? {
                let offset = mappings.offset_of(from).ok_or(io::ErrorKind::InvalidData)?;
                let pages = (to.0 - from.0) / PAGE as u64;
                runs.push(((offset / PAGE as u64) as u32, pages as u32));
            }
        }
        Ok(runs)
    }

    fn regions(&self, start: Hva, len: u64, wanted: &Wanted) -> io::Result<Vec<(Hva, Hva)>> {
        let (mut start, end) = (start.0, start.0 + len);
        let mut all = Vec::new();
        while start < end {
            let mut regions = [Region::default(); REGIONS];
            let (walked, found) = self.scan(start, end, wanted, &mut regions)?;
            all.extend(regions[..found].iter().map(|region| (Hva(region.start), Hva(region.end))));
            start = walked;
        }
        Ok(all)
    }

    fn scan(&self, start: u64, end: u64, wanted: &Wanted, regions: &mut [Region]) -> io::Result<(u64, usize)> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: wanted.flags,
            start,
            end,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            max_pages: 0,
            category_inverted: wanted.not,
            category_mask: wanted.all | wanted.not,
            category_anyof_mask: wanted.any,
            return_mask: wanted.told,
        };
        // SAFETY: `arg` is a live `struct pm_scan_arg`, and its vector a live slice of as many regions as it says, borrowed for writing.
        let found = unsafe { ioctl::pagemap_scan(self.0.as_raw_fd(), &raw mut arg) }?;
        if arg.walk_end <= start || arg.walk_end > end {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok((arg.walk_end, found as usize))
    }
}

/// Which pages are reported: those that are all of `all`, none of `not` and, if it says anything, one of `any`; neighbours as one if they are
/// equal in `told`, which must say something.
struct Wanted {
    flags: u64,
    all: u64,
    not: u64,
    any: u64,
    told: u64,
}

impl Wanted {
    const WRITTEN: Self = Self {
        flags: WP_MATCHING | CHECK_WPASYNC,
        all: WRITTEN,
        not: FILE | PFNZERO,
        any: PRESENT | SWAPPED,
        told: WRITTEN,
    };
    const OWN: Self = Self { flags: 0, all: 0, not: FILE | PFNZERO, any: PRESENT | SWAPPED, told: FILE };
    const PRESENT: Self = Self { flags: 0, all: PRESENT, not: 0, any: 0, told: PRESENT };
    const HUGE: Self = Self { flags: 0, all: HUGE, not: 0, any: 0, told: HUGE };
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::pager::{CHILD_FEATURES, watch_child};
    use crate::testing;
    use crate::uffd::Userfault;

    const P: u64 = PAGE as u64;

    #[test]
    fn what_was_written_is_reported_once_until_it_is_written_again() {
        let memfd = testing::memfd(64 * P);
        testing::fill(&memfd, 0..32);
        let memory = testing::private(&memfd, &[40 * P, 24 * P]);
        let mappings = Mappings::of_private(&memory).unwrap();
        let uffd = Userfault::open(CHILD_FEATURES).unwrap();
        watch_child(&uffd, &mappings).unwrap();
        // There, and not its own.
        uffd.map_cached(&mappings, 0, 32 * P).unwrap();
        uffd.zero(&mappings, 40 * P).unwrap();
        let map = PageMap::open().unwrap();
        assert_eq!(map.written(&mappings).unwrap(), []);
        let second = 1 << 40;
        let write = |page: u64| {
            let at = if page < 40 { page * P } else { second + (page - 40) * P };
            memory.store(7u64, GuestAddress(at), Ordering::Relaxed).unwrap();
        };
        uffd.copy(&mappings, 63 * P, &[1; PAGE]).unwrap();
        [3, 4, 5, 31, 40].into_iter().for_each(write);
        assert_eq!(map.present(&mappings).unwrap(), [(0, 32), (40, 1), (63, 1)]);
        let runs = map.written(&mappings).unwrap();
        assert_eq!(runs, [(3, 3), (31, 1), (40, 1), (63, 1)]);
        assert_eq!(map.written(&mappings).unwrap(), []);
        // A write waits for nobody, and is reported.
        [4, 6, 63].into_iter().for_each(write);
        assert_eq!(map.written(&mappings).unwrap(), [(4, 1), (6, 1), (63, 1)]);
        assert_eq!(map.written(&mappings).unwrap(), []);
        // But its own they all are.
        assert_eq!(map.own(&mappings).unwrap(), [(3, 4), (31, 1), (40, 1), (63, 1)]);
    }

    #[test]
    fn memory_that_is_not_watched_so_is_refused() {
        let memfd = testing::memfd(4 * P);
        let memory = testing::private(&memfd, &[4 * P]);
        let mappings = Mappings::of_private(&memory).unwrap();
        assert!(PageMap::open().unwrap().written(&mappings).is_err());
    }
}
