//! A child's writes to its disk: a file without a name over the frozen disk. They vanish with it.
//!
//! The overlay's file has each block at its place in the disk, and is sparse; a bit per block says whether it is there. Bits are
//! only ever set, and after the block is in the file.
//!
//! Invariants:
//! * whoever writes a block whose bit is not set has the block's lock until it is: a block is brought from below once, and nothing
//!   that was written is overwritten by what came from below. Blocks that are there are written without a lock;
//! * a reader needs no lock: while a block is brought from below, it reads below.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::files::{Nameless, punch};
use super::words::{Words, WordsView};
use super::{Bytes, CLUSTER, OpenError, locked, read_padded};

/// What is in the overlay or not, in bytes: what guests write at a time at least, so that hardly anything is ever brought from below.
const BLOCK: u64 = 4096;
const BLOCKS_PER_WORD: u64 = 32;
/// So many clusters' blocks can be brought from below at a time.
const WRITERS: usize = 64;
static ZEROES: [u8; CLUSTER as usize] = [0; CLUSTER as usize];

/// What an overlay consists of. Descriptors: the file, the bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayStateV1 {
    /// The disk's bytes.
    pub len: u64,
    /// The blocks' bytes.
    pub block: u32,
}

/// An overlay on its way to a child of its user.
#[derive(Debug)]
pub struct OverlayParts {
    /// What it is.
    pub state: OverlayStateV1,
    /// What the state says, in its order; none can be written.
    pub fds: Vec<OwnedFd>,
}

impl OverlayParts {
    /// The same again, for another child.
    ///
    /// # Errors
    /// When no more descriptors are to be had.
    pub fn try_clone(&self) -> io::Result<Self> {
        let fds = self.fds.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>()?;
        Ok(Self { state: self.state, fds })
    }
}

/// A disk that can be written and starts as what is under it. Any number of threads may use it.
pub struct Overlay {
    below: Arc<dyn Bytes>,
    len: u64,
    files: Nameless,
    there: Words,
    /// A lock per cluster, in turns.
    writing: [Mutex<()>; WRITERS],
}

impl Overlay {
    /// Over `below`; its file is on the file system of the folder `dir`.
    ///
    /// # Errors
    /// When there is no place for the file, or no memory for the bits.
    pub fn new(below: Arc<dyn Bytes>, dir: &Path) -> io::Result<Self> {
        let len = below.size()?;
        let files = Nameless::new(dir)?;
        files.file.set_len(len)?;
        let there = Words::new(c"civic-overlay", words(len)?)?;
        Ok(Self { below, len, files, there, writing: [const { Mutex::new(()) }; WRITERS] })
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// What the system says; `InvalidInput` past the end.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.change(offset, bytes.len() as u64, |at, len| {
            let from = (at - offset) as usize;
            self.files.file.write_all_at(&bytes[from..from + len as usize], at)
        })
    }

    /// Has `len` bytes at `offset` read as zeroes, and gives back the space that they took.
    ///
    /// # Errors
    /// As [`Overlay::write_at`].
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(offset, len, |at, len| match punch(&self.files.file, at, len) {
            Err(e) if e.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {
                self.files.file.write_all_at(&ZEROES[..len as usize], at)
            }
            result => result,
        })
    }

    /// Gives back the space of `len` bytes at `offset`, as far as that costs nothing.
    ///
    /// # Errors
    /// As [`Overlay::write_at`].
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let from = offset.next_multiple_of(BLOCK);
        let to = offset.saturating_add(len) / BLOCK * BLOCK;
        if from < to { self.zero(from, to - from) } else { Ok(()) }
    }

    /// What a child of this VM needs to read it as it is, beside what is under it.
    ///
    /// # Errors
    /// When no more descriptors are to be had.
    pub fn parts(&self) -> io::Result<OverlayParts> {
        let fds = vec![self.files.reader.try_clone()?.into(), self.there.share()?];
        Ok(OverlayParts { state: OverlayStateV1 { len: self.len, block: BLOCK as u32 }, fds })
    }

    /// Changes a range by `write`, which is called for pieces of it that lie within a cluster each.
    fn change(&self, offset: u64, len: u64, write: impl Fn(u64, u64) -> io::Result<()>) -> io::Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len).ok_or(io::ErrorKind::InvalidInput)?;
        let mut at = offset;
        while at < end {
            let next = (at / CLUSTER + 1).saturating_mul(CLUSTER).min(end);
            if blocks(at, next).all(|block| self.has(block)) {
                write(at, next - at)?;
            } else {
                let _writing = locked(&self.writing[(at / CLUSTER % WRITERS as u64) as usize]);
                self.bring_edges(at, next)?;
                write(at, next - at)?;
                blocks(at, next).for_each(|block| self.add(block));
            }
            at = next;
        }
        Ok(())
    }

    /// Brings the blocks from below that are not there and only in part to be written.
    fn bring_edges(&self, from: u64, to: u64) -> io::Result<()> {
        let edges = [(from, from / BLOCK), (to.min(self.len), to / BLOCK)];
        let torn = edges.into_iter().filter(|(at, block)| at % BLOCK != 0 && *at < self.len && !self.has(*block));
        for (_, block) in torn {
            let start = block * BLOCK;
            let mut bytes = [0; BLOCK as usize];
            let bytes = &mut bytes[..BLOCK.min(self.len - start) as usize];
            self.below.read_at(bytes, start)?;
            self.files.file.write_all_at(bytes, start)?;
        }
        Ok(())
    }

    fn has(&self, block: u64) -> bool {
        has(self.there.get(word(block)), block)
    }

    fn add(&self, block: u64) {
        self.there.set_bits(word(block), 1 << (block % BLOCKS_PER_WORD));
    }
}

impl Bytes for Overlay {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        read(|block| self.has(block), self.len, &self.files.reader, &*self.below, buffer, offset)
    }
}

impl std::fmt::Debug for Overlay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Overlay").field("len", &self.len).finish_non_exhaustive()
    }
}

/// Another VM's overlay, as it is now. To be read by way of a [`FrozenFile`](super::FrozenFile) as it was at a fork point.
pub struct OverlayView {
    below: Arc<dyn Bytes>,
    len: u64,
    file: File,
    there: WordsView,
}

impl OverlayView {
    /// Opens an overlay; `below` is what is under it there.
    ///
    /// # Errors
    /// When the parts do not fit.
    pub fn open(parts: OverlayParts, below: Arc<dyn Bytes>) -> Result<Self, OpenError> {
        let OverlayStateV1 { len, block } = parts.state;
        if u64::from(block) != BLOCK {
            return Err(OpenError::Cluster(block));
        }
        let mut fds = parts.fds.into_iter();
        let (Some(file), Some(there), None) = (fds.next(), fds.next(), fds.next()) else {
            return Err(OpenError::Parts);
        };
        Ok(Self { below, len, file: file.into(), there: WordsView::open(there, words(len)?)? })
    }
}

impl Bytes for OverlayView {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let has = |block| has(self.there.get(word(block)), block);
        read(has, self.len, &self.file, &*self.below, buffer, offset)
    }
}

impl std::fmt::Debug for OverlayView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OverlayView").field("len", &self.len).finish_non_exhaustive()
    }
}

/// Fills `buffer` from the file where it has blocks, else from below; in as few pieces as there are.
fn read(
    has: impl Fn(u64) -> bool,
    len: u64,
    file: &File,
    below: &dyn Bytes,
    buffer: &mut [u8],
    offset: u64,
) -> io::Result<()> {
    let (buffer, past) = buffer.split_at_mut(len.saturating_sub(offset).min(buffer.len() as u64) as usize);
    past.fill(0);
    let end = offset + buffer.len() as u64;
    let mut at = offset;
    while at < end {
        let here = has(at / BLOCK);
        let run = blocks(at, end).skip(1).take_while(|block| has(*block) == here).count() as u64;
        let next = ((at / BLOCK + 1 + run) * BLOCK).min(end);
        let part = &mut buffer[(at - offset) as usize..(next - offset) as usize];
        if here {
            read_padded(file, part, at)?
        } else {
            below.read_at(part, at)?
        }
        at = next;
    }
    Ok(())
}

/// The blocks that a range touches.
fn blocks(from: u64, to: u64) -> std::ops::Range<u64> {
    from / BLOCK..to.div_ceil(BLOCK)
}

fn word(block: u64) -> usize {
    usize::try_from(block / BLOCKS_PER_WORD).unwrap_or(usize::MAX)
}

fn has(word: Option<u32>, block: u64) -> bool {
    word.is_some_and(|word| word & 1 << (block % BLOCKS_PER_WORD) != 0)
}

fn words(len: u64) -> io::Result<usize> {
    usize::try_from(len.div_ceil(BLOCK * BLOCKS_PER_WORD)).map_err(|_| io::ErrorKind::InvalidInput.into())
}
