//! Frozen disks: what a disk held at a fork point, for the children, while its VM goes on writing the same file in place.
//!
//! ```text
//!        source                                          child
//!   guest's write                                    guest's read
//!        │ Freezer::before_write                          │
//!        ▼                                                ▼        its own writes
//!   old cluster ──▶ store ──▶ Table: slot            Overlay ◀────────────────────
//!        │                                                │ not there
//!        ▼                                                ▼
//!   the file, in place                               FrozenFile ── slot? ──▶ store
//!                                                         │ none yet
//!                                                         ▼
//!                                                    the file, then slot? again ──▶ store
//! ```
//!
//! A *generation* is one fork point. The source's file is dealt with in clusters of [`CLUSTER`] bytes. Each generation has a
//! [`Table`](table): a word per cluster that says where in the store its old content is, 0 as long as the file still has it. A
//! cluster that several generations lack is stored once and named in all their tables; the count of its users is the source's own.
//!
//! What a write does, in this order: content of the store, slot in the tables (release), overwriting the file. What a child does:
//! slot (acquire), file, fence, slot again. So whoever read a byte that was written after the fork point finds the slot set.
//!
//! What crosses to the child are descriptors and a small plain description ([`FrozenParts`], [`OverlayParts`]). None of the
//! descriptors can be written through: the files are opened for reading, the tables are sealed memfds whose only writable mapping
//! is the source's. So a child can be another user's.
//!
//! An [`Overlay`] is the source of its own children: a [`Freezer`] over it, and an [`OverlayView`] in the grandchild. It needs no
//! copy of what the overlay had at the fork point, for a cluster without a slot was not written since, there as in a file.
//!
//! Invariants:
//! * The source's writes neither fail nor wait because of a generation, but for the copying itself: where a cluster cannot be
//!   preserved, generations are given up ([`Lost`]), oldest first. A reader that still used one gets an error, never wrong bytes:
//!   it looks whether the generation lives after it has read, and what is stored is replaced only after that was set.
//! * Slots of a table are set once and never change.
//! * A cluster that has a slot in a generation has one in all older ones.
//! * No write is in flight at a fork point: [`Freezer::freeze`] is called with all writers drained.
//!
//! Lock order: a cluster's copying lock → the freezer's state → the newest table. No I/O under the latter two.

mod files;
mod freezer;
mod frozen;
mod overlay;
mod store;
mod table;
#[cfg(test)]
mod tests;
mod words;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

pub use files::reopen_read_only;
pub use freezer::{Freezer, FreezerOptions, Generation, GenerationId, OnLost, Usage};
pub use frozen::{FrozenFile, FrozenParts, FrozenStateV1, OpenError};
pub use overlay::{Overlay, OverlayParts, OverlayStateV1, OverlayView};
pub use table::Lost;

/// What is preserved at a time, in bytes.
///
/// Larger ones cost more at the first write, smaller ones at all others that go on from there; and the tables grow.
/// `cargo run --release -p civic-fork --example disk_freeze` measures it.
pub const CLUSTER: u64 = 64 << 10;

/// Bytes by their offset, which any number of threads may read at a time: a file, or what stands for one.
pub trait Bytes: Send + Sync {
    /// How many bytes.
    ///
    /// # Errors
    /// What the system says.
    fn size(&self) -> io::Result<u64>;

    /// Fills `buffer` from `offset` on. What lies past the end reads as zeroes.
    ///
    /// # Errors
    /// What the system says; [`Lost`] inside of it when that is the reason.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

/// A file or block device of the host.
#[derive(Debug)]
pub struct HostBytes(File);

impl HostBytes {
    /// `file`, whose position others must not rely on.
    pub fn new(file: File) -> Self {
        Self(file)
    }

    /// It.
    pub fn file(&self) -> &File {
        &self.0
    }
}

impl Bytes for HostBytes {
    fn size(&self) -> io::Result<u64> {
        let metadata = self.0.metadata()?;
        // A block device's size is where its end is.
        if metadata.is_file() { Ok(metadata.len()) } else { (&self.0).seek(SeekFrom::End(0)) }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        read_padded(&self.0, buffer, offset)
    }
}

/// Fills `buffer` from `offset` of a file on, with zeroes past its end.
fn read_padded(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, offset) {
            Ok(0) => {
                buffer.fill(0);
                break;
            }
            Ok(count) => {
                buffer = &mut buffer[count..];
                offset += count as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Takes a lock. Nothing panics with one of ours in hand; if it did, what it guards would still be whole.
fn locked<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
