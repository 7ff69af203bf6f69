//! 32-bit words that one process writes and others read: a memfd, sealed so that the writer's own mapping is the only one through
//! which it can ever change.
//!
//! Words start as 0 and take no memory until they are touched.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

const WORD: u64 = size_of::<AtomicU32>() as u64;

/// No size, no content, no seal can change but through mappings that are there already.
fn seals() -> SealFlag {
    SealFlag::from_bits_retain(libc::F_SEAL_SEAL | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_FUTURE_WRITE)
}

/// A shared mapping of a whole memfd.
#[derive(Debug)]
struct Mapping {
    start: NonNull<AtomicU32>,
    words: usize,
    memfd: File,
}

// SAFETY: the memory is accessed through atomics only, and stays mapped as long as this lives, in whichever thread.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(memfd: File, words: usize, protection: ProtFlags) -> io::Result<Self> {
        let bytes = words.checked_mul(WORD as usize).and_then(NonZeroUsize::new).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping where the kernel finds room hurts nobody.
        let start = unsafe { mmap(None, bytes, protection, flags, &memfd, 0) }?;
        Ok(Self { start: start.cast(), words, memfd })
    }

    fn word(&self, index: usize) -> Option<&AtomicU32> {
        if index >= self.words {
            return None;
        }
        // SAFETY: within the mapping, as was checked.
        let word = unsafe { self.start.add(index) };
        // SAFETY: mapped as long as `self` lives, aligned, and never shorter than it was when it was mapped: the memfd is sealed
        // against shrinking. Atomics may change under a shared reference, also by other processes.
        Some(unsafe { word.as_ref() })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the mapping that `new` made, and nothing refers to it any more.
        let _ = unsafe { munmap(self.start.cast(), self.words * WORD as usize) };
    }
}

/// The writer's side.
#[derive(Debug)]
pub struct Words(Mapping);

impl Words {
    /// So many words, all 0. `name` shows in the process's list of mappings.
    pub fn new(name: &CStr, words: usize) -> io::Result<Self> {
        let memfd = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
        memfd.set_len((words as u64).checked_mul(WORD).ok_or(io::ErrorKind::InvalidInput)?)?;
        let mapping = Mapping::new(memfd, words, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        fcntl(&mapping.memfd, FcntlArg::F_ADD_SEALS(seals()))?;
        Ok(Self(mapping))
    }

    /// A word, with all that its writer did before it wrote it; `None` beyond the end.
    pub fn get(&self, index: usize) -> Option<u32> {
        Some(self.0.word(index)?.load(Ordering::Acquire))
    }

    /// Writes a word: who reads it also sees all that was done before.
    pub fn set(&self, index: usize, value: u32) {
        if let Some(word) = self.0.word(index) {
            word.store(value, Ordering::Release);
        }
    }

    /// Sets bits in a word, likewise.
    pub fn set_bits(&self, index: usize, bits: u32) {
        if let Some(word) = self.0.word(index) {
            word.fetch_or(bits, Ordering::Release);
        }
    }

    /// A descriptor for readers, through which nothing can be changed.
    pub fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.0.memfd.try_clone()?.into())
    }
}

/// A reader's side.
#[derive(Debug)]
pub struct WordsView(Mapping);

impl WordsView {
    /// Opens what [`Words::share`] gave, if it is so many words that nobody can take away.
    pub fn open(memfd: OwnedFd, words: usize) -> io::Result<Self> {
        let memfd = File::from(memfd);
        let has = SealFlag::from_bits_retain(fcntl(&memfd, FcntlArg::F_GET_SEALS)?);
        if !has.contains(seals()) || Some(memfd.metadata()?.len()) != (words as u64).checked_mul(WORD) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a sealed memfd of the right size"));
        }
        Ok(Self(Mapping::new(memfd, words, ProtFlags::PROT_READ)?))
    }

    /// A word, with all that its writer did before it wrote it; `None` beyond the end.
    pub fn get(&self, index: usize) -> Option<u32> {
        Some(self.0.word(index)?.load(Ordering::Acquire))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use nix::errno::Errno;
    use nix::fcntl::{FallocateFlags, fallocate};

    use super::*;

    #[test]
    fn only_their_maker_can_change_them() {
        let words = Words::new(c"test", 3000).unwrap();
        let view = WordsView::open(words.share().unwrap(), 3000).unwrap();
        words.set(2999, 7);
        words.set_bits(2999, 8);
        assert_eq!((view.get(2999), view.get(0), view.get(3000)), (Some(15), Some(0), None));
        assert_eq!((words.get(2999), words.get(3000)), (Some(15), None));
        words.set(3000, 1);

        let mut memfd = File::from(words.share().unwrap());
        assert!(memfd.write_all(&[1]).is_err() && memfd.write_all_at(&[1], 0).is_err());
        assert!(memfd.set_len(0).is_err() && memfd.set_len(1 << 20).is_err());
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        assert_eq!(fallocate(&memfd, punch, 0, 4096), Err(Errno::EPERM));
        assert!(Mapping::new(memfd.try_clone().unwrap(), 1, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).is_err());
        // Reopened for writing, where that is allowed, it is no different.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memfd));
        let mut again = File::options().read(true).write(true).open(path).unwrap();
        assert!(again.write_all(&[1]).is_err());
        assert!(fcntl(&memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_err());
    }

    #[test]
    fn what_could_shrink_is_refused() {
        let memfd = File::from(memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        memfd.set_len(4000).unwrap();
        assert!(WordsView::open(memfd.into(), 1000).is_err());
        let words = Words::new(c"test", 1000).unwrap();
        assert!(WordsView::open(words.share().unwrap(), 1001).is_err());
        assert!(WordsView::open(words.share().unwrap(), usize::MAX).is_err());
        assert!(WordsView::open(tempfile::tempfile().unwrap().into(), 0).is_err());
        assert!(Words::new(c"test", 0).is_err() && Words::new(c"test", usize::MAX).is_err());
    }
}
