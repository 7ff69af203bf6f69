//! Reads of a kernel's or initrd's file straight into guest memory, at an offset of their own: the descriptor may be shared with other
//! monitors, which a common position would have read each other's places.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// The bytes of `file` from `offset` on.
pub struct At<'a> {
    /// Read.
    pub file: &'a File,
    /// Where to go on.
    pub offset: u64,
}

impl ReadVolatile for At<'_> {
    fn read_volatile<B: BitmapSlice>(&mut self, buf: &mut VolatileSlice<'_, B>) -> Result<usize, VolatileMemoryError> {
        let failed = |e: io::Error| VolatileMemoryError::IOError(e);
        let offset = libc::off_t::try_from(self.offset).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
        let guard = buf.ptr_guard_mut();
        // SAFETY: the slice is this long and writable as long as its guard lives, and is only ever accessed as memory that others change.
        let read = unsafe { libc::pread(self.file.as_raw_fd(), guard.as_ptr().cast(), guard.len(), offset) };
        let read = Errno::result(read).map_err(|e| failed(e.into()))? as usize;
        self.offset += read as u64;
        buf.bitmap().mark_dirty(0, read);
        Ok(read)
    }
}
