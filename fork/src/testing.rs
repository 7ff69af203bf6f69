//! Guest RAM for this crate's tests.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::ram::PAGE;

/// An empty memfd.
pub fn memfd(bytes: u64) -> File {
    let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file
}

/// Regions of these sizes, in one empty memfd, 1 TiB apart for the guest.
pub fn ram(sizes: &[u64]) -> Arc<GuestMemoryMmap> {
    map(Arc::new(memfd(sizes.iter().sum())), sizes, libc::MAP_SHARED)
}

/// The same regions of this memfd, mapped privately.
pub fn private(memfd: &File, sizes: &[u64]) -> Arc<GuestMemoryMmap> {
    map(Arc::new(memfd.try_clone().unwrap()), sizes, libc::MAP_PRIVATE)
}

fn map(memfd: Arc<File>, sizes: &[u64], sharing: libc::c_int) -> Arc<GuestMemoryMmap> {
    let mut offset = 0;
    let regions = sizes.iter().enumerate().map(|(n, &len)| {
        let region = MmapRegionBuilder::new(len as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(sharing | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(Arc::clone(&memfd), offset))
            .build()
            .unwrap();
        offset += len;
        GuestRegionMmap::new(region, GuestAddress((n as u64) << 40)).unwrap()
    });
    let regions = regions.collect();
    Arc::new(GuestMemoryMmap::from_regions(regions).unwrap())
}

/// Numbers that look random and are the same each time.
pub struct Random(pub u64);

impl Random {
    /// The next one below `end` (xorshift64*).
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % end
    }
}

/// What page number `page` holds in these tests: never all zero, different for each page.
pub fn contents(page: u64) -> [u8; PAGE] {
    let mut random = Random(page + 1);
    let mut bytes = [0; PAGE];
    for word in bytes.as_chunks_mut::<8>().0 {
        *word = random.below(u64::MAX).to_le_bytes();
    }
    bytes
}

/// Writes [`contents`] into these pages, behind every mapping.
pub fn fill(memfd: &File, pages: impl IntoIterator<Item = u64>) {
    for page in pages {
        memfd.write_all_at(&contents(page), page * PAGE as u64).unwrap();
    }
}

/// The bytes that a memfd has pages for.
pub fn populated(memfd: &File) -> u64 {
    use std::os::unix::fs::MetadataExt;
    memfd.metadata().unwrap().blocks() * 512
}
