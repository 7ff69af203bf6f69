//! Guest RAM: one memfd, mapped shared, seen by the guest in the layout's regions.
//!
//! Invariants: every byte of guest RAM lies in the one memfd, so that a fork can protect, share and punch it as a whole; the
//! memfd's mode is 0600 and it is never executable, so that a descriptor of it cannot be reopened by another user; it is in huge pages only
//! while nobody is forked from it ([`civic_fork::huge`]).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use civic_devices::virtio::GuestRam;
use civic_devices::virtio::balloon::PageRelease;
use civic_fork::disk::reopen_read_only;
use civic_fork::huge;
use civic_fork::lazy::Progress;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fchmod};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::layout::Layout;

/// Why guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The memfd could not be made or sized.
    #[error("cannot allocate {bytes} bytes of guest memory")]
    Allocate {
        /// Size asked for.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It could not be mapped.
    #[error("cannot map {bytes} bytes of guest memory")]
    Map {
        /// Size asked for.
        bytes: u64,
        /// What vm-memory or the kernel said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A machine's RAM.
pub struct Memory {
    /// The whole of it, by offset; regions follow each other without gaps.
    pub memfd: Arc<File>,
    /// Mapped, by guest-physical address.
    pub ram: GuestRam,
    /// Set when it is being loaded while the machine runs.
    loading: Arc<OnceLock<Progress>>,
    /// Whether pages must stay that the guest gives back: children share them, or it is one and they are not its own. Held while a hole
    /// is punched.
    keep: Arc<RwLock<bool>>,
}

impl Memory {
    /// Allocates the RAM that `layout` describes; pages are populated on first touch.
    pub fn allocate(layout: &Layout) -> Result<Self, MemoryError> {
        let regions = layout.ram_regions();
        let bytes = regions.iter().map(|region| region.1).sum();
        let memfd = memfd(bytes).map_err(|source| MemoryError::Allocate { bytes, source })?;
        Self::map(layout, Arc::new(memfd), nix::libc::MAP_SHARED)
    }

    /// The RAM of a child of a VM that has the same `layout` and its RAM in `memfd`, which may be open for reading only: mapped
    /// privately, and to be watched before anybody touches it.
    pub fn of_parent(layout: &Layout, memfd: Arc<File>) -> Result<Self, MemoryError> {
        Self::map(layout, memfd, nix::libc::MAP_PRIVATE)
    }

    fn map(layout: &Layout, memfd: Arc<File>, sharing: i32) -> Result<Self, MemoryError> {
        let regions = layout.ram_regions();
        let bytes = regions.iter().map(|region| region.1).sum();
        let map = |source: Box<dyn std::error::Error + Send + Sync>| MemoryError::Map { bytes, source };
        let mut mapped = Vec::new();
        for &(start, len, offset) in &regions {
            let file = FileOffset::from_arc(Arc::clone(&memfd), offset);
            let region = MmapRegionBuilder::new(len as usize)
                .with_mmap_prot(nix::libc::PROT_READ | nix::libc::PROT_WRITE)
                .with_mmap_flags(sharing | nix::libc::MAP_NORESERVE)
                .with_file_offset(file)
                .build()
                .map_err(|e| map(e.into()))?;
            let mapped_at = NonNull::new(region.as_ptr()).ok_or_else(|| map("it is mapped at 0".into()))?;
            // A child's mapping must not have the kernel put its source's pages together.
            let private = sharing == nix::libc::MAP_PRIVATE;
            let advised =
                if private { huge::forbid(mapped_at, region.size()) } else { huge::begin(mapped_at, region.size()) };
            advised.map_err(|e| map(e.into()))?;
            let region = GuestRegionMmap::new(region, GuestAddress(start.0))
                .ok_or_else(|| map(format!("region {:#x} wraps around", start.0).into()))?;
            mapped.push(region);
        }
        let ram = GuestMemoryMmap::from_regions(mapped).map_err(|e| map(e.into()))?;
        let keep = Arc::new(RwLock::new(sharing == nix::libc::MAP_PRIVATE));
        Ok(Self { memfd, ram: Arc::new(ram), loading: Arc::default(), keep })
    }

    /// The way by which the guest's balloon gives pages back to the host.
    pub fn page_release(&self) -> Arc<dyn PageRelease> {
        Arc::new(HolePuncher {
            ram: Arc::clone(&self.ram),
            loading: Arc::clone(&self.loading),
            keep: Arc::clone(&self.keep),
        })
    }

    /// The switch that has pages stay which the guest gives back.
    pub fn keeper(&self) -> Keeper {
        Keeper(Arc::clone(&self.keep))
    }

    /// Another descriptor of the memfd, for reading: a child's.
    ///
    /// # Errors
    /// When the system does not let it be opened anew, through /proc.
    pub fn read_only(&self) -> io::Result<File> {
        reopen_read_only(&self.memfd)
    }

    /// Says that the memory is being loaded while the machine runs. Until it is all there no hole is punched: the loader would
    /// fill it with what the image has, which is older than what the guest gave up.
    pub fn set_loading(&self, progress: Progress) {
        // A machine's memory is loaded once.
        let _ = self.loading.set(progress);
    }
}

/// See [`Memory::keeper`].
#[derive(Clone)]
pub struct Keeper(Arc<RwLock<bool>>);

impl Keeper {
    /// From when this returns, pages that the guest gives back stay, or go again.
    pub fn keep(&self, keep: bool) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = keep;
    }
}

/// Punches the guest's pages out of the memfd, and with it out of every shared mapping: KVM's too.
struct HolePuncher {
    ram: GuestRam,
    loading: Arc<OnceLock<Progress>>,
    keep: Arc<RwLock<bool>>,
}

impl PageRelease for HolePuncher {
    fn release(&self, gpa: u64, len: u64) -> io::Result<bool> {
        if self.loading.get().is_some_and(|loading| !loading.done()) {
            return Ok(false);
        }
        let keep = self.keep.read().unwrap_or_else(PoisonError::into_inner);
        if *keep {
            return Ok(false);
        }
        let (region, MemoryRegionAddress(at)) =
            self.ram.to_region_addr(GuestAddress(gpa)).ok_or(io::ErrorKind::InvalidInput)?;
        let file = region.file_offset().ok_or(io::ErrorKind::Unsupported)?;
        let inside = at.checked_add(len).is_some_and(|end| end <= region.len());
        let offset = i64::try_from(file.start() + at).ok();
        let (Some(offset), Ok(len), true) = (offset, i64::try_from(len), inside) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(file.file(), mode, offset, len)?;
        Ok(true)
    }
}

fn memfd(bytes: u64) -> io::Result<File> {
    let fd = memfd_create(c"civic-ram", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    fchmod(fd.as_fd(), Mode::S_IRUSR | Mode::S_IWUSR)?;
    let file = File::from(fd);
    file.set_len(bytes)?;
    // Whoever gets hold of it cannot cut it under its machine, which would end that, nor seal more: the page server must punch holes.
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn memory_above_the_hole_follows_in_the_memfd() {
        let layout = Layout::new(4 << 30).unwrap();
        let memory = Memory::allocate(&layout).unwrap();
        assert_eq!(memory.memfd.metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(memory.memfd.metadata().unwrap().len(), 4 << 30);
        assert!(memory.memfd.set_len(0).is_err() && memory.memfd.set_len(5 << 30).is_err());
        assert!(fcntl(&*memory.memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_err());
        memory.ram.write_obj(0x1122_3344u32, GuestAddress((4 << 30) + 8)).unwrap();
        let mut word = [0; 4];
        memory.memfd.read_exact_at(&mut word, (3 << 30) + 8).unwrap();
        assert_eq!(u32::from_le_bytes(word), 0x1122_3344);
        assert!(!memory.ram.address_in_range(GuestAddress(3 << 30)));
        // Nothing but the touched page is there.
        assert!(memory.memfd.metadata().unwrap().blocks() * 512 <= 4096);
    }

    #[test]
    fn a_child_has_no_huge_pages_and_a_source_may() {
        let memory = Memory::allocate(&Layout::new(16 << 20).unwrap()).unwrap();
        let child = Memory::of_parent(&Layout::new(16 << 20).unwrap(), Arc::new(memory.read_only().unwrap())).unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let forbidden = |ram: &GuestRam| {
            let start = format!("{:x}-", ram.iter().next().unwrap().as_ptr() as usize);
            let mut of = smaps.lines().skip_while(|line| !line.starts_with(&start));
            let flags = of.find(|line| line.starts_with("VmFlags:")).unwrap();
            flags.split_whitespace().any(|flag| flag == "nh")
        };
        assert!(forbidden(&child.ram));
        assert_eq!(forbidden(&memory.ram), !huge::usable());
    }

    #[test]
    fn a_released_page_leaves_the_memfd_and_no_other_does() {
        const PAGE: u64 = 4096;
        let memory = Memory::allocate(&Layout::new((3 << 30) + (16 << 20)).unwrap()).unwrap();
        let release = memory.page_release();
        let high = 4 << 30;
        let pages = [0, PAGE, 2 * PAGE, (3 << 30) - PAGE, high, high + PAGE, high + 2 * PAGE];
        for page in pages {
            memory.ram.write_obj(page | 1, GuestAddress(page + 8)).unwrap();
        }
        let blocks = || memory.memfd.metadata().unwrap().blocks() * 512 / PAGE;
        assert_eq!(blocks(), 7);
        assert!(release.release(PAGE, PAGE).unwrap());
        assert!(release.release(high, 2 * PAGE).unwrap());
        assert_eq!(blocks(), 4);
        assert_eq!(memory.memfd.metadata().unwrap().len(), (3 << 30) + (16 << 20));
        let kept: Vec<u64> =
            pages.into_iter().filter(|page| memory.ram.read_obj::<u64>(GuestAddress(page + 8)).unwrap() != 0).collect();
        assert_eq!(kept, [0, 2 * PAGE, (3 << 30) - PAGE, high + 2 * PAGE]);
        for (gpa, len) in [((3 << 30) - PAGE, 2 * PAGE), (3 << 30, PAGE), (high, 17 << 20), (0, u64::MAX), (0, 0)] {
            assert!(release.release(gpa, len).is_err(), "{gpa:#x}");
        }
    }
}
