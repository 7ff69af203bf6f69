//! One thing for the host's storage to do, and how it is done at once, on the spot.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};

use super::image::{Image, Lease};
use super::plugged::Plugged;
use super::watch::{HostFile, Watch};
use crate::virtio::held::HeldAreas;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Fill the areas.
    Read {
        /// What lies past the file's end reads as zeroes, else it is an error.
        padded: bool,
    },
    /// Write the areas.
    Write {
        /// They are to be on the disk when it is done.
        stable: bool,
    },
    /// Bring everything written to the disk.
    Sync,
    /// Deallocate `len` bytes as far as that costs nothing.
    Discard {
        /// Bytes.
        len: u64,
    },
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
            Self::Punch { len } | Self::Discard { len } => Some((keep | FallocateFlags::FALLOC_FL_PUNCH_HOLE, len)),
            Self::ZeroRange { len } => Some((keep | FallocateFlags::FALLOC_FL_ZERO_RANGE, len)),
            _ => None,
        }
    }
}

/// Who is to do it.
pub enum Target {
    /// A file or block device.
    File(Arc<HostFile>),
    /// A disk image, where its file alone will not do.
    Image(Arc<Image>),
    /// Bytes that are elsewhere.
    Plugged(Arc<Plugged>),
}

/// One thing for a file, a block device or a disk image to do.
pub struct Job {
    /// Which.
    pub target: Target,
    /// What.
    pub action: Action,
    /// Where, in bytes.
    pub offset: u64,
    /// The memory to read into or to write: what is left of it.
    pub areas: HeldAreas,
    /// What keeps the place in the file from becoming another's.
    #[expect(dead_code, reason = "it has only to be there")]
    pub lease: Option<Lease>,
}

impl Job {
    /// A job without memory.
    pub fn bare(target: Target, action: Action, offset: u64) -> Self {
        Self { target, action, offset, areas: HeldAreas::default(), lease: None }
    }

    /// The file, where the target is one.
    pub fn file(&self) -> Option<&HostFile> {
        match &self.target {
            Target::File(file) => Some(file),
            Target::Image(_) | Target::Plugged(_) => None,
        }
    }

    /// Tells whoever wants to know that it is about to be done; false when it is better left out. Of an image's jobs the image tells,
    /// which knows what they come to.
    pub fn announce(&self) -> bool {
        let watch: &Watch = match &self.target {
            Target::File(file) => &file.watch,
            Target::Plugged(plugged) => &plugged.watch,
            Target::Image(_) => return true,
        };
        match self.action {
            Action::Read { .. } | Action::Sync => {}
            Action::Discard { len } => return !watch.needs(self.offset, len),
            Action::Write { .. } => watch.before_write(self.offset, self.areas.len() as u64),
            Action::Punch { len } | Action::ZeroRange { len } => watch.before_write(self.offset, len),
        }
        true
    }

    /// Does what is left of it.
    ///
    /// # Errors
    /// `UnexpectedEof` when the file ends before the areas are full, else what the system says.
    pub fn run(&mut self) -> io::Result<()> {
        let file = match &self.target {
            Target::File(file) => file,
            Target::Image(image) => return image.run(self.action, self.offset, &mut self.areas),
            Target::Plugged(plugged) => return plugged.run(self.action, self.offset, &mut self.areas),
        };
        match self.action {
            Action::Read { padded } => match self.areas.read_at(file.as_fd(), self.offset) {
                Err(e) if padded && e.kind() == io::ErrorKind::UnexpectedEof => {
                    self.areas.clear();
                    Ok(())
                }
                result => result,
            },
            Action::Write { stable } => self.areas.write_at(file.as_fd(), self.offset, stable),
            Action::Sync => file.sync_data(),
            Action::Discard { .. } | Action::Punch { .. } | Action::ZeroRange { .. } => {
                let (mode, len) = self.action.allocation().ok_or(io::ErrorKind::InvalidInput)?;
                let place = |n: u64| libc::off_t::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
                Ok(fallocate(&**file, mode, place(self.offset)?, place(len)?)?)
            }
        }
    }

    /// Takes note of what a system call did; true when nothing is left to do.
    ///
    /// # Errors
    /// As [`Job::run`].
    pub fn progress(&mut self, done: usize) -> io::Result<bool> {
        match self.action {
            Action::Read { padded: true } if done == 0 => {
                self.areas.clear();
                Ok(true)
            }
            Action::Read { .. } if done == 0 && !self.areas.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
            Action::Write { .. } if done == 0 && !self.areas.is_empty() => Err(io::ErrorKind::WriteZero.into()),
            Action::Read { .. } | Action::Write { .. } => {
                self.areas.advance(done);
                self.offset += done as u64;
                Ok(self.areas.is_empty())
            }
            _ => Ok(true),
        }
    }
}
