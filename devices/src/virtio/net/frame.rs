//! Frames between a link and guest memory, without a copy in between: vectored system calls straight on the guest's buffers.
//!
//! The guest may write to these bytes at any time, so no Rust reference to them ever exists: the system calls get raw pointers,
//! and copies are volatile.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;

/// What one vectored system call takes (UIO_MAXIOV).
const MAX_PARTS: usize = 1024;

/// A frame that the guest sends, as the areas in which it lies. Made once for many frames.
#[derive(Default)]
pub struct Outgoing<'a> {
    parts: Vec<libc::iovec>,
    len: usize,
    ram: PhantomData<VolatileSlice<'a>>,
}

impl<'a> Outgoing<'a> {
    /// Forgets the frame.
    pub fn clear(&mut self) {
        self.parts.clear();
        self.len = 0;
    }

    /// Appends an area.
    pub fn push(&mut self, part: VolatileSlice<'a>) {
        self.len += part.len();
        self.parts.push(iovec(part));
    }

    /// Bytes of the frame with its header.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Writes the frame to `fd` as one message.
    ///
    /// # Errors
    /// What writev(2) says; `InvalidInput` when it lies in more areas than one call takes.
    pub fn send(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        loop {
            // SAFETY: the iovecs point to guest memory that stays mapped for 'a; it is only read. A count that does not fit
            // was refused by the kernel long before an int overflows: a chain has fewer parts than that.
            let put = unsafe { libc::writev(fd.as_raw_fd(), self.parts.as_ptr(), self.parts.len() as libc::c_int) };
            if put >= 0 {
                return Ok(());
            }
            retry_interrupted()?;
        }
    }
}

/// A receive buffer: a chain of the receive queue.
struct Buffer {
    head: u16,
    parts: usize,
    room: usize,
}

/// Receive buffers taken from the ring and not given back yet, in order.
#[derive(Default)]
pub struct Stock<'a> {
    buffers: VecDeque<Buffer>,
    parts: VecDeque<VolatileSlice<'a>>,
    room: usize,
    /// For the system call.
    iovecs: Vec<libc::iovec>,
}

impl<'a> Stock<'a> {
    /// How many buffers it has.
    pub fn len(&self) -> usize {
        self.buffers.len()
    }

    /// Bytes that fit into all of them.
    pub fn room(&self) -> usize {
        self.room
    }

    /// Adds an area to the buffer that is being taken.
    pub fn push_part(&mut self, part: VolatileSlice<'a>) {
        self.parts.push_back(part);
    }

    /// The last `parts` areas added are the buffer `head`; returns its room.
    pub fn push_buffer(&mut self, head: u16, parts: usize) -> usize {
        let room = self.parts.iter().rev().take(parts).map(VolatileSlice::len).sum();
        self.buffers.push_back(Buffer { head, parts, room });
        self.room += room;
        room
    }

    /// Reads one message from `fd` into the buffers and what they cannot hold into `rest`; returns the message's length and
    /// how much of it went into the buffers.
    ///
    /// # Errors
    /// What readv(2) says.
    pub fn receive(&mut self, fd: BorrowedFd<'_>, rest: &mut [u8]) -> io::Result<(usize, usize)> {
        self.iovecs.clear();
        let mut room = 0;
        for part in self.parts.iter().take(MAX_PARTS - 1) {
            // No message is longer than what `rest` takes.
            if room >= rest.len() {
                break;
            }
            room += part.len();
            self.iovecs.push(iovec(*part));
        }
        self.iovecs.push(libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
        loop {
            // SAFETY: all iovecs but the last point to guest memory that is mapped for writing for 'a and shared, so that no
            // reference to it exists; the last is `rest`, borrowed for this call. Their count fits an int.
            let got = unsafe { libc::readv(fd.as_raw_fd(), self.iovecs.as_ptr(), self.iovecs.len() as libc::c_int) };
            if let Ok(got) = usize::try_from(got) {
                let direct = got.min(room);
                self.mark_dirty(direct);
                return Ok((got, direct));
            }
            retry_interrupted()?;
        }
    }

    /// Copies `bytes` to offset `at` of the buffers as one run; what does not fit is left out.
    pub fn write(&self, mut at: usize, mut bytes: &[u8]) {
        for part in &self.parts {
            if bytes.is_empty() {
                return;
            }
            let Ok(place) = part.offset(at.min(part.len())) else { return };
            let count = place.len().min(bytes.len());
            place.copy_from(&bytes[..count]);
            bytes = &bytes[count..];
            at = at.saturating_sub(part.len());
        }
    }

    /// The first `len` bytes, or all when there are fewer.
    pub fn read(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len.min(self.room)];
        self.copy_to(&mut bytes);
        bytes
    }

    /// Copies as many of the first bytes as `bytes` takes and there are.
    pub fn copy_to(&self, bytes: &mut [u8]) {
        let mut done = 0;
        for part in &self.parts {
            done += part.copy_to(&mut bytes[done..]);
        }
    }

    /// How many buffers `len` bytes take.
    pub fn count_for(&self, len: usize) -> usize {
        let mut before = 0;
        let starts = self.buffers.iter().map(|buffer| {
            before += buffer.room;
            before - buffer.room
        });
        starts.take_while(|start| *start < len).count()
    }

    /// Takes out the buffers that the first `len` bytes fill, with how much of each.
    pub fn fill(&mut self, len: usize) -> impl Iterator<Item = (u16, u32)> {
        let count = self.count_for(len);
        let parts: usize = self.buffers.iter().take(count).map(|buffer| buffer.parts).sum();
        self.parts.drain(..parts);
        let (mut left, room) = (len, &mut self.room);
        self.buffers.drain(..count).map(move |buffer| {
            *room -= buffer.room;
            let filled = left.min(buffer.room);
            left -= filled;
            (buffer.head, filled as u32)
        })
    }

    /// Tells the memory's dirty bitmap, where there is one, that a system call wrote the first `len` bytes.
    fn mark_dirty(&self, mut len: usize) {
        for part in &self.parts {
            if len == 0 {
                return;
            }
            let count = part.len().min(len);
            part.bitmap().mark_dirty(0, count);
            len -= count;
        }
    }
}

fn iovec(part: VolatileSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: part.ptr_guard_mut().as_ptr().cast(), iov_len: part.len() }
}

fn retry_interrupted() -> io::Result<()> {
    match io::Error::last_os_error() {
        e if e.kind() == io::ErrorKind::Interrupted => Ok(()),
        e => Err(e),
    }
}
