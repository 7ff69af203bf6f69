//! One thing for the host's storage to do, and how it is done at once, on the spot.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};

use crate::virtio::held::HeldAreas;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Fill the areas.
    Read,
    /// Write the areas.
    Write {
        /// They are to be on the disk when it is done.
        stable: bool,
    },
    /// Bring everything written to the disk.
    Sync,
    /// Deallocate `len` bytes, which then read as zeroes.
    Punch {
        /// Bytes.
        len: u64,
    },
    /// Have `len` bytes read as zeroes without writing them, and without losing their place on the disk.
    ZeroRange {
        /// Bytes.
        len: u64,
    },
}

impl Action {
    /// For fallocate(2): its mode and length.
    pub fn allocation(self) -> Option<(FallocateFlags, u64)> {
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match self {
            Self::Punch { len } => Some((keep | FallocateFlags::FALLOC_FL_PUNCH_HOLE, len)),
            Self::ZeroRange { len } => Some((keep | FallocateFlags::FALLOC_FL_ZERO_RANGE, len)),
            _ => None,
        }
    }
}

/// One thing for a file or block device to do.
pub struct Job {
    /// Which.
    pub file: Arc<File>,
    /// What.
    pub action: Action,
    /// Where, in bytes.
    pub offset: u64,
    /// The memory to read into or to write: what is left of it.
    pub areas: HeldAreas,
}

impl Job {
    /// A job without memory.
    pub fn bare(file: &Arc<File>, action: Action, offset: u64) -> Self {
        Self { file: Arc::clone(file), action, offset, areas: HeldAreas::default() }
    }

    /// Does what is left of it.
    ///
    /// # Errors
    /// `UnexpectedEof` when the file ends before the areas are full, else what the system says.
    pub fn run(&mut self) -> io::Result<()> {
        match self.action {
            Action::Read => self.areas.read_at(self.file.as_fd(), self.offset),
            Action::Write { stable } => self.areas.write_at(self.file.as_fd(), self.offset, stable),
            Action::Sync => self.file.sync_data(),
            Action::Punch { .. } | Action::ZeroRange { .. } => {
                let (mode, len) = self.action.allocation().ok_or(io::ErrorKind::InvalidInput)?;
                let place = |n: u64| libc::off_t::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
                Ok(fallocate(&*self.file, mode, place(self.offset)?, place(len)?)?)
            }
        }
    }

    /// Takes note of what a system call did; true when nothing is left to do.
    ///
    /// # Errors
    /// As [`Job::run`].
    pub fn progress(&mut self, done: usize) -> io::Result<bool> {
        match self.action {
            Action::Read if done == 0 && !self.areas.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
            Action::Write { .. } if done == 0 && !self.areas.is_empty() => Err(io::ErrorKind::WriteZero.into()),
            Action::Read | Action::Write { .. } => {
                self.areas.advance(done);
                self.offset += done as u64;
                Ok(self.areas.is_empty())
            }
            _ => Ok(true),
        }
    }
}
