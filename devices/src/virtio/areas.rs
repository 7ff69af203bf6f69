//! Scattered guest memory as one run of bytes: copies to and from it, and vectored system calls straight on it.
//!
//! The guest may write to these bytes at any time, so no Rust reference to them ever exists: copies are volatile, and the
//! system calls get raw pointers.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;

/// What one vectored system call takes (UIO_MAXIOV).
const MAX_PARTS: usize = 1024;

/// Guest memory areas, in order.
#[derive(Clone, Default)]
pub struct Areas<'a> {
    parts: Vec<VolatileSlice<'a>>,
    len: usize,
}

impl<'a> Areas<'a> {
    /// Appends an area.
    pub fn push(&mut self, part: VolatileSlice<'a>) {
        self.len += part.len();
        self.parts.push(part);
    }

    /// The sum of the areas' lengths in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when no byte is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Removes and returns the first `count` bytes, or all when there are fewer.
    pub fn take(&mut self, count: usize) -> Areas<'a> {
        let mut front = Areas::default();
        let mut whole = 0;
        while let Some(part) = self.parts.get(whole)
            && front.len < count
        {
            let want = count - front.len;
            if want < part.len()
                && let Ok((head, tail)) = part.split_at(want)
            {
                front.push(head);
                self.parts[whole] = tail;
            } else {
                front.push(*part);
                whole += 1;
            }
        }
        self.parts.drain(..whole);
        self.len -= front.len;
        front
    }

    /// Copies as many bytes as fit into `bytes`; returns how many.
    pub fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for part in &self.parts {
            done += part.copy_to(&mut bytes[done..]);
        }
        done
    }

    /// Copies as many of `bytes` as fit into the areas; returns how many.
    pub fn copy_from(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for part in &self.parts {
            let count = part.len().min(bytes.len() - done);
            part.copy_from(&bytes[done..done + count]);
            done += count;
        }
        done
    }

    /// Fills the areas from `fd` at `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the file ends first; what preadv(2) says otherwise. Part of the areas may have been written.
    pub fn read_at(mut self, fd: BorrowedFd<'_>, mut offset: u64) -> io::Result<()> {
        while !self.is_empty() {
            let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            let parts = self.iovecs();
            // SAFETY: the iovecs point to guest memory that is mapped for writing and outlives `self`; it is shared, so
            // that no reference to it exists. Their count fits an int.
            let got = unsafe { libc::preadv(fd.as_raw_fd(), parts.as_ptr(), parts.len() as libc::c_int, at) };
            match usize::try_from(got) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => {
                    self.take(got).mark_dirty();
                    offset += got as u64;
                }
                Err(_) => retry_interrupted()?,
            }
        }
        Ok(())
    }

    /// Writes the areas to `fd` at `offset`.
    ///
    /// # Errors
    /// What pwritev(2) says; part may have been written.
    pub fn write_at(mut self, fd: BorrowedFd<'_>, mut offset: u64) -> io::Result<()> {
        while !self.is_empty() {
            let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            let parts = self.iovecs();
            // SAFETY: as in `read_at`; the memory is only read.
            let put = unsafe { libc::pwritev(fd.as_raw_fd(), parts.as_ptr(), parts.len() as libc::c_int, at) };
            match usize::try_from(put) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(put) => {
                    self.take(put);
                    offset += put as u64;
                }
                Err(_) => retry_interrupted()?,
            }
        }
        Ok(())
    }

    /// Writes the areas to `fd` as one message (a frame of a tap); returns what writev(2) took of it.
    ///
    /// # Errors
    /// `InvalidInput` for more parts than one call takes, else what writev(2) says.
    pub fn send(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let parts = self.iovecs();
        if parts.len() < self.parts.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        loop {
            // SAFETY: as in `write_at`.
            let put = unsafe { libc::writev(fd.as_raw_fd(), parts.as_ptr(), parts.len() as libc::c_int) };
            match usize::try_from(put) {
                Ok(put) => return Ok(put),
                Err(_) => retry_interrupted()?,
            }
        }
    }

    /// The areas for a vectored call, at most as many as it takes.
    fn iovecs(&self) -> Vec<libc::iovec> {
        let parts = self.parts.iter().take(MAX_PARTS);
        parts.map(|part| libc::iovec { iov_base: part.ptr_guard_mut().as_ptr().cast(), iov_len: part.len() }).collect()
    }

    /// Tells the memory's dirty bitmap, where there is one, that a system call wrote the areas.
    fn mark_dirty(&self) {
        for part in &self.parts {
            part.bitmap().mark_dirty(0, part.len());
        }
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
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    fn areas<'a>(ram: &'a GuestMemoryMmap, parts: &[(u64, usize)]) -> Areas<'a> {
        let mut areas = Areas::default();
        for &(at, len) in parts {
            areas.push(ram.get_slice(GuestAddress(at), len).unwrap());
        }
        areas
    }

    #[test]
    fn splits_and_copies_across_parts() {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let mut all = areas(&ram, &[(0x10, 3), (0x20, 4), (0x30, 5)]);
        assert_eq!(all.copy_from(b"abcdefghijklmnop"), 12);
        let front = all.take(5);
        let mut bytes = [0; 16];
        assert_eq!((front.len(), all.len()), (5, 7));
        assert_eq!(front.copy_to(&mut bytes), 5);
        assert_eq!(&bytes[..5], b"abcde");
        assert_eq!(all.copy_to(&mut bytes), 7);
        assert_eq!(&bytes[..7], b"fghijkl");
        assert_eq!(all.take(100).len(), 7);
        assert!(all.is_empty() && all.take(1).is_empty());
    }

    #[test]
    fn positional_io_fills_exactly_or_fails() {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 5000], 100).unwrap();
        let many: Vec<_> = (0..2500).map(|i| (i * 2, 1)).collect();
        areas(&ram, &many).read_at(file.as_fd(), 100).unwrap();
        let mut bytes = vec![0; 2500];
        areas(&ram, &many).copy_to(&mut bytes);
        assert_eq!(bytes, vec![7; 2500]);
        let short = areas(&ram, &[(0, 5000)]).read_at(file.as_fd(), 101);
        assert_eq!(short.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        areas(&ram, &many).write_at(file.as_fd(), 10_000).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 12_500);
        assert!(areas(&ram, &many).send(file.as_fd()).is_err());
    }
}
