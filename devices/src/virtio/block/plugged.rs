//! Disks whose bytes come from elsewhere than a file of the host: those of a forked VM.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::job::Action;
use super::watch::Watch;
use crate::virtio::held::HeldAreas;

/// What is moved between a guest's memory and a disk at a time.
const PIECE: usize = 1 << 20;

/// Bytes that any number of threads may read at a time.
pub trait ReadDisk: Send + Sync {
    /// How many.
    ///
    /// # Errors
    /// What the host says.
    fn size(&self) -> io::Result<u64>;

    /// Fills `buffer` from `offset` on, with zeroes past the end.
    ///
    /// # Errors
    /// What the host says.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

/// Bytes that any number of threads may read and write at a time. They are on no disk that outlives the VM: nothing is ever synced.
pub trait WriteDisk: ReadDisk {
    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// What the host says.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Has `len` bytes at `offset` read as zeroes.
    ///
    /// # Errors
    /// What the host says.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Gives up `len` bytes at `offset`, which may then read as they did or as zeroes.
    ///
    /// # Errors
    /// What the host says.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
}

/// Such a disk, and who is told before it changes.
pub struct Plugged {
    disk: Arc<dyn WriteDisk>,
    /// To be told.
    pub watch: Watch,
}

impl Plugged {
    /// `disk`, of which nobody wants to know.
    pub fn new(disk: Arc<dyn WriteDisk>) -> Self {
        Self { disk, watch: Watch::default() }
    }

    /// Does a job, which may take as long as the host's storage takes.
    pub fn run(&self, action: Action, mut offset: u64, areas: &mut HeldAreas) -> io::Result<()> {
        match action {
            Action::Read { .. } | Action::Write { .. } => {}
            Action::Sync => return Ok(()),
            Action::Discard { len } => return self.disk.discard(offset, len),
            Action::Punch { len } | Action::ZeroRange { len } => return self.disk.zero(offset, len),
        }
        let mut piece = vec![0; PIECE.min(areas.len())];
        while !areas.is_empty() {
            let count = piece.len().min(areas.len());
            let bytes = &mut piece[..count];
            if let Action::Read { .. } = action {
                self.disk.read_at(bytes, offset)?;
                areas.copy_from(bytes);
            } else {
                areas.copy_to(bytes);
                self.disk.write_at(bytes, offset)?;
            }
            areas.advance(count);
            offset += count as u64;
        }
        Ok(())
    }
}

impl fmt::Debug for Plugged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plugged").field("watch", &self.watch).finish_non_exhaustive()
    }
}
