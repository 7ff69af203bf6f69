//! Guest memory that a request in flight needs, for longer than any borrow lasts: the system calls on it may come later, on
//! another thread, or be the kernel's own (io_uring).
//!
//! As in [`areas`](super::areas) nothing ever refers to these bytes but raw pointers, for the guest may write them at any time.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};

use super::GuestRam;
use super::areas::Areas;

/// What one vectored system call takes (UIO_MAXIOV).
const MAX_PARTS: usize = 1024;
/// Zeroes to write, repeated as often as it takes.
static ZEROES: [u8; 65536] = [0; 65536];

/// Memory that stays mapped as long as this lives.
#[derive(Default)]
pub struct HeldAreas {
    parts: Vec<libc::iovec>,
    /// The parts before it are dealt with.
    first: usize,
    len: usize,
    constant: bool,
    _ram: Option<GuestRam>,
}

// SAFETY: the pointers lead to memory that any thread may access by system calls and volatile copies, and that `_ram` (an
// `Arc`) or its being static keeps mapped wherever this goes.
unsafe impl Send for HeldAreas {}

impl HeldAreas {
    /// `areas`, which lie in `ram`; `None` when they do not.
    pub fn new(areas: &Areas<'_>, ram: &GuestRam) -> Option<Self> {
        let mut held = Self { _ram: Some(GuestRam::clone(ram)), len: areas.len(), ..Self::default() };
        held.parts.reserve_exact(areas.parts().len());
        for part in areas.parts().iter().filter(|part| !part.is_empty()) {
            let start = part.ptr_guard_mut().as_ptr() as usize;
            let inside = |region: &vm_memory::GuestRegionMmap| {
                let base = region.as_ptr() as usize;
                start >= base && start - base <= (region.len() as usize).saturating_sub(part.len())
            };
            if !ram.iter().any(inside) {
                return None;
            }
            held.parts.push(libc::iovec { iov_base: part.ptr_guard_mut().as_ptr().cast(), iov_len: part.len() });
        }
        Some(held)
    }

    /// `len` zeroes that nothing can be read into.
    pub fn zeroes(len: usize) -> Self {
        let piece = |at: usize| libc::iovec {
            iov_base: ZEROES.as_ptr().cast_mut().cast(),
            iov_len: (len - at).min(ZEROES.len()),
        };
        let parts = (0..len).step_by(ZEROES.len()).map(piece).collect();
        Self { parts, len, constant: true, ..Self::default() }
    }

    /// Bytes that are left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when no byte is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What is left, for one vectored call: at most as many parts as it takes. The pointers are good as long as this lives and
    /// is not changed.
    pub fn iovecs(&self) -> &[libc::iovec] {
        let end = self.parts.len().min(self.first + MAX_PARTS);
        &self.parts[self.first..end]
    }

    /// Whether something may be read into them.
    pub fn writable(&self) -> bool {
        !self.constant
    }

    /// Leaves out the first `count` bytes: they are dealt with.
    pub fn advance(&mut self, mut count: usize) {
        self.len = self.len.saturating_sub(count);
        while let Some(part) = self.parts.get_mut(self.first)
            && count > 0
        {
            let step = count.min(part.iov_len);
            part.iov_base = part.iov_base.cast::<u8>().wrapping_add(step).cast();
            part.iov_len -= step;
            count -= step;
            if part.iov_len == 0 {
                self.first += 1;
            }
        }
    }

    /// Splits off and returns the first `count` bytes, or all when there are fewer.
    pub fn take(&mut self, count: usize) -> Self {
        if count >= self.len {
            return std::mem::take(self);
        }
        let mut front = Self { len: count, constant: self.constant, _ram: self._ram.clone(), ..Self::default() };
        let mut left = count;
        for part in &self.parts[self.first..] {
            if left == 0 {
                break;
            }
            let len = part.iov_len.min(left);
            front.parts.push(libc::iovec { iov_base: part.iov_base, iov_len: len });
            left -= len;
        }
        self.advance(count);
        front
    }

    /// Copies as many of `bytes` as fit to the start.
    pub fn copy_from(&self, mut bytes: &[u8]) {
        if self.constant {
            return;
        }
        for part in &self.parts[self.first..] {
            let count = part.iov_len.min(bytes.len());
            // SAFETY: the part is mapped guest memory (not `constant`), kept so by `_ram`; nobody holds a reference to it.
            let target = unsafe { VolatileSlice::new(part.iov_base.cast(), count) };
            target.copy_from(&bytes[..count]);
            bytes = &bytes[count..];
        }
    }

    /// Fills `bytes` from the start, as far as there is something.
    pub fn copy_to(&self, mut bytes: &mut [u8]) {
        for part in &self.parts[self.first..] {
            let count = part.iov_len.min(bytes.len());
            let (here, rest) = bytes.split_at_mut(count);
            // SAFETY: the part is mapped guest memory, kept so by `_ram`, or static zeroes; it is only read, by volatile access.
            let source = unsafe { VolatileSlice::new(part.iov_base.cast(), count) };
            source.copy_to(here);
            bytes = rest;
        }
    }

    /// Fills them with zeroes.
    pub fn clear(&self) {
        let mut rest = Self { parts: self.parts.clone(), constant: self.constant, ..Self::default() };
        rest.first = self.first;
        rest.len = self.len;
        while !rest.is_empty() {
            let count = rest.len.min(ZEROES.len());
            rest.copy_from(&ZEROES[..count]);
            rest.advance(count);
        }
    }

    /// Fills what is left from `fd` at `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the file ends first; what preadv(2) says otherwise.
    pub fn read_at(&mut self, fd: BorrowedFd<'_>, mut offset: u64) -> io::Result<()> {
        if self.constant {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        while !self.is_empty() {
            let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            let parts = self.iovecs();
            // SAFETY: the iovecs point to guest memory that `self` keeps mapped and to which no reference exists.
            let got = unsafe { libc::preadv(fd.as_raw_fd(), parts.as_ptr(), parts.len() as libc::c_int, at) };
            match usize::try_from(got) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => {
                    self.advance(got);
                    offset += got as u64;
                }
                Err(_) => retry_interrupted()?,
            }
        }
        Ok(())
    }

    /// Reads what the page cache has of `fd` at `offset`, at once; returns how much that was.
    ///
    /// # Errors
    /// `WouldBlock` when the cache has nothing of it; what else preadv2(2) says.
    pub fn read_cached(&self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        if self.constant {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let parts = self.iovecs();
        let count = parts.len() as libc::c_int;
        // SAFETY: as in `read_at`.
        let got = unsafe { libc::preadv2(fd.as_raw_fd(), parts.as_ptr(), count, at, libc::RWF_NOWAIT) };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }

    /// Writes what is left to `fd` at `offset`; if `stable`, each part is on the disk on return.
    ///
    /// # Errors
    /// What pwritev2(2) says; part may have been written.
    pub fn write_at(&mut self, fd: BorrowedFd<'_>, mut offset: u64, stable: bool) -> io::Result<()> {
        let flags = if stable { libc::RWF_DSYNC } else { 0 };
        while !self.is_empty() {
            let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            let parts = self.iovecs();
            let count = parts.len() as libc::c_int;
            // SAFETY: as in `read_at`; the memory is only read.
            let put = unsafe { libc::pwritev2(fd.as_raw_fd(), parts.as_ptr(), count, at, flags) };
            match usize::try_from(put) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(put) => {
                    self.advance(put);
                    offset += put as u64;
                }
                Err(_) => retry_interrupted()?,
            }
        }
        Ok(())
    }
}

fn retry_interrupted() -> io::Result<()> {
    match io::Error::last_os_error() {
        e if e.kind() == io::ErrorKind::Interrupted => Ok(()),
        e => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;

    fn ram() -> GuestRam {
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap())
    }

    fn held(ram: &GuestRam, parts: &[(u64, usize)]) -> HeldAreas {
        let mut areas = Areas::default();
        for &(at, len) in parts {
            areas.push(ram.get_slice(GuestAddress(at), len).unwrap());
        }
        HeldAreas::new(&areas, ram).unwrap()
    }

    #[test]
    fn only_its_own_memory_is_held() {
        let (one, other) = (ram(), ram());
        let mut areas = Areas::default();
        areas.push(one.get_slice(GuestAddress(0xff00), 0x100).unwrap());
        assert!(HeldAreas::new(&areas, &one).is_some());
        assert!(HeldAreas::new(&areas, &other).is_none());
    }

    #[test]
    fn takes_and_copies_across_parts() {
        let ram = ram();
        let mut all = held(&ram, &[(0x10, 3), (0x18, 0), (0x20, 4), (0x30, 5)]);
        all.copy_from(b"abcdefghijklmnop");
        let front = all.take(5);
        assert_eq!((front.len(), all.len()), (5, 7));
        front.copy_from(b"ABCDEXX");
        all.advance(1);
        all.clear();
        let mut bytes = [0; 0x25];
        ram.read_slice(&mut bytes, GuestAddress(0x10)).unwrap();
        assert_eq!((&bytes[..3], &bytes[0x10..0x14], &bytes[0x20..]), (&b"ABC"[..], &b"DEf\0"[..], &[0; 5][..]));
        assert_eq!(all.take(100).len(), 6);
        assert!(all.is_empty() && all.take(1).is_empty() && all.iovecs().is_empty());
    }

    #[test]
    fn positional_io_fills_exactly_or_fails() {
        let ram = ram();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 5000], 100).unwrap();
        let many: Vec<_> = (0..2500).map(|i| (i * 2, 1)).collect();
        held(&ram, &many).read_at(file.as_fd(), 100).unwrap();
        let bytes: Vec<u8> = many.iter().map(|&(at, _)| ram.read_obj(GuestAddress(at)).unwrap()).collect();
        assert_eq!(bytes, vec![7; 2500]);
        let short = held(&ram, &[(0, 5000)]).read_at(file.as_fd(), 101);
        assert_eq!(short.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        held(&ram, &many).write_at(file.as_fd(), 10_000, true).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 12_500);
    }

    #[test]
    fn zeroes_are_written_and_never_read_into() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 200_000], 0).unwrap();
        let mut zeroes = HeldAreas::zeroes(150_000);
        zeroes.copy_from(&[1; 10]);
        assert!(zeroes.read_at(file.as_fd(), 0).is_err());
        zeroes.write_at(file.as_fd(), 10_000, false).unwrap();
        let mut bytes = vec![1; 200_000];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[10_000..160_000].iter().all(|byte| *byte == 0));
        assert!(bytes[..10_000].iter().chain(&bytes[160_000..]).all(|byte| *byte == 7));
    }
}
