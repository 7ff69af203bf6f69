//! A memfd's pages, mapped into this process: the store's, and those that a child brings.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::ram::PAGE;

/// So many bytes from the file's beginning, shared with whoever else has it. Pages beyond are refused by a panic.
#[derive(Debug)]
pub struct Mapped {
    start: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, and is used only through it.
unsafe impl Send for Mapped {}

impl Mapped {
    /// With this access.
    ///
    /// # Errors
    /// What mmap(2) says.
    pub fn new(memfd: &File, len: usize, access: ProtFlags) -> io::Result<Self> {
        let size = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping, at an address that the kernel chooses, of a file that lives as long as it is mapped.
        let start = unsafe { mmap(None, size, access, flags, memfd, 0) }?;
        Ok(Self { start, len })
    }

    /// Where a page is.
    pub fn at(&self, page: usize) -> *mut u8 {
        let offset = page * PAGE;
        assert!(offset + PAGE <= self.len, "page {page} lies outside the mapping");
        // SAFETY: the offset lies within the mapping, as has just been checked.
        unsafe { self.start.as_ptr().cast::<u8>().add(offset) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrowed from it is left.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}
