//! Scattered guest memory as one run of bytes: copies to and from it, and vectored system calls straight on it. What a system
//! call needs after the borrow ends is in [`held`](super::held).
//!
//! The guest may write to these bytes at any time, so no Rust reference to them ever exists: copies are volatile, and the
//! system calls get raw pointers.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress, VolatileSlice};

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

    /// Where in `ram`, which they were taken from, the areas lie.
    pub fn ranges(&self, ram: &GuestMemoryMmap) -> impl Iterator<Item = Range<u64>> {
        self.parts.iter().filter_map(|part| {
            let host = part.ptr_guard().as_ptr().addr();
            ram.iter().find_map(|region| {
                let base = region.get_host_address(MemoryRegionAddress(0)).ok()?.addr();
                let offset = host.checked_sub(base)? as u64;
                let start = region.start_addr().0 + offset;
                (offset < region.len()).then(|| start..start + part.len() as u64)
            })
        })
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

    /// The areas.
    pub fn parts(&self) -> &[VolatileSlice<'a>] {
        &self.parts
    }

    /// Sends to the stream socket `fd` as much as it takes at once; returns how much that was. A peer that is gone is an
    /// error and no signal.
    ///
    /// # Errors
    /// What sendmsg(2) says.
    pub fn send_stream(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let mut parts = self.iovecs();
        let message = message(&mut parts);
        loop {
            // SAFETY: `message` names no address and no control data, only `parts`, which outlives the call; they point to
            // guest memory that is mapped and outlives `self`, and is only read.
            let put = unsafe { libc::sendmsg(fd.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
            match usize::try_from(put) {
                Ok(put) => return Ok(put),
                Err(_) => retry_interrupted()?,
            }
        }
    }

    /// The areas for a vectored call, at most as many as it takes.
    fn iovecs(&self) -> Vec<libc::iovec> {
        self.parts.iter().take(MAX_PARTS).map(|part| iovec(*part)).collect()
    }
}

/// Receives from the stream socket `fd` what waits there, at most `most` bytes, into `parts`; returns how much that was, zero at
/// the stream's end, and whether it was as much as one call can take here: there may be more.
///
/// # Errors
/// What recvmsg(2) says.
pub fn receive_stream<'a>(
    fd: BorrowedFd<'_>,
    parts: impl Iterator<Item = VolatileSlice<'a>>,
    most: usize,
) -> io::Result<(usize, bool)> {
    let mut left = most;
    let limited = parts.map_while(|part| {
        let mut iovec = iovec(part);
        iovec.iov_len = iovec.iov_len.min(left);
        left -= iovec.iov_len;
        (iovec.iov_len > 0).then_some(iovec)
    });
    let mut parts: Vec<_> = limited.take(MAX_PARTS).collect();
    let asked: usize = parts.iter().map(|part| part.iov_len).sum();
    let mut message = message(&mut parts);
    loop {
        // SAFETY: as in `send_stream`, with memory that is mapped for writing for 'a and shared, so that no reference to it exists.
        let got = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
        match usize::try_from(got) {
            Ok(got) => return Ok((got, got == asked)),
            Err(_) => retry_interrupted()?,
        }
    }
}

fn iovec(part: VolatileSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: part.ptr_guard_mut().as_ptr().cast(), iov_len: part.len() }
}

/// A message for a connected socket without control data.
fn message(parts: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: a msghdr is integers and pointers, for which zero is a value; on some systems it has padding that has no name.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len() as _;
    message
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
    use vm_memory::GuestAddress;

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
    fn knows_where_its_parts_lie() {
        let regions = [(GuestAddress(0x1000), 0x1000), (GuestAddress(0x2000), 0x1000), (GuestAddress(1 << 40), 0x1000)];
        let ram = GuestMemoryMmap::from_ranges(&regions).unwrap();
        let mut all = areas(&ram, &[(0x1ff0, 0x10), (0x2000, 0x1000), ((1 << 40) + 0xfff, 1)]);
        let ranges = |areas: &Areas<'_>| areas.ranges(&ram).collect::<Vec<_>>();
        assert_eq!(ranges(&all), [0x1ff0..0x2000, 0x2000..0x3000, (1 << 40) + 0xfff..(1 << 40) + 0x1000]);
        all.take(0x11);
        assert_eq!(ranges(&all)[0], 0x2001..0x3000);
    }

    #[test]
    fn streams_take_and_give_what_they_can() {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        let text: Vec<u8> = (0..3000_u32).map(|i| (i % 251) as u8).collect();
        let many: Vec<_> = (0..1500).map(|i| (i * 4, 2)).collect();
        areas(&ram, &many).copy_from(&text);
        let mut all = areas(&ram, &many);
        assert_eq!(all.send_stream(near.as_fd()).unwrap(), 2 * MAX_PARTS);
        all.take(2 * MAX_PARTS);
        assert_eq!(all.send_stream(near.as_fd()).unwrap(), 3000 - 2 * MAX_PARTS);
        let into = |most, parts: &[(u64, usize)]| {
            receive_stream(far.as_fd(), areas(&ram, parts).parts().iter().copied(), most)
        };
        assert_eq!(into(2900, &[(0x8000, 1000), (0x9000, 2900)]).unwrap(), (2900, true));
        assert_eq!(into(200, &[(0xa000, 200)]).unwrap(), (100, false));
        assert_eq!(into(200, &[(0xa000, 200)]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let mut got = vec![0; 3000];
        areas(&ram, &[(0x8000, 1000), (0x9000, 1900), (0xa000, 100)]).copy_to(&mut got);
        assert_eq!(got, text);
        // Not dropped: a program that another test is just starting has it too for a moment.
        near.shutdown(std::net::Shutdown::Both).unwrap();
        assert_eq!(into(200, &[(0xa000, 200)]).unwrap(), (0, false));
        assert_eq!(areas(&ram, &many).send_stream(far.as_fd()).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
