//! A child's side: the disk as it was at the fork point, to be read.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, fcntl};
use serde::{Deserialize, Serialize};

use super::table::{Kept, Lost, Slot, TableView, clusters};
use super::{Bytes, CLUSTER, HostBytes};

/// What a frozen disk consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FrozenStateV1 {
    /// A file that nobody writes. Descriptor: the file.
    File {
        /// The disk's bytes.
        len: u64,
    },
    /// A file that its source goes on writing. Descriptors: the file, the table, the store.
    Preserved {
        /// The disk's bytes.
        len: u64,
        /// The clusters' bytes.
        cluster: u32,
    },
    /// The source's own overlay, which it goes on writing. Descriptors: the table, the store.
    Layer {
        /// The disk's bytes.
        len: u64,
        /// The clusters' bytes.
        cluster: u32,
    },
}

/// A frozen disk on its way to a child.
#[derive(Debug)]
pub struct FrozenParts {
    /// What it is.
    pub state: FrozenStateV1,
    /// What the state says, in its order; none can be written.
    pub fds: Vec<OwnedFd>,
}

impl FrozenParts {
    /// The same again, for another child.
    ///
    /// # Errors
    /// When no more descriptors are to be had.
    pub fn try_clone(&self) -> io::Result<Self> {
        let fds = self.fds.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>()?;
        Ok(Self { state: self.state, fds })
    }
}

/// Why parts are no disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Too many or too few, or they want another way of opening.
    #[error("the parts of a frozen disk are not those that its description asks for")]
    Parts,
    /// Made for another version of this.
    #[error("the frozen disk's clusters are {0} bytes")]
    Cluster(u32),
    /// A part is not what it should be.
    #[error("cannot use a part of a frozen disk")]
    Part(#[from] io::Error),
}

/// A disk as it was at a fork point. Any number of threads may read it.
pub struct FrozenFile {
    len: u64,
    base: FrozenBase,
    preserved: Option<Preserved>,
}

enum FrozenBase {
    File(HostBytes),
    Layers(Arc<dyn Bytes>),
}

struct Preserved {
    table: TableView,
    store: File,
}

impl FrozenFile {
    /// Opens a frozen file.
    ///
    /// # Errors
    /// When the parts do not fit, or are those of a [layer](FrozenFile::open_layer).
    pub fn open(parts: FrozenParts) -> Result<Self, OpenError> {
        let mut fds = parts.fds.into_iter();
        let (len, base, preserved) = match (parts.state, fds.next(), fds.next(), fds.next(), fds.next()) {
            (FrozenStateV1::File { len }, Some(file), None, ..) => (len, file, None),
            (FrozenStateV1::Preserved { len, cluster }, Some(file), Some(table), Some(store), None) => {
                (len, file, Some(Preserved::open(len, cluster, table, store)?))
            }
            _ => return Err(OpenError::Parts),
        };
        Ok(Self { len, base: FrozenBase::File(HostBytes::new(base.into())), preserved })
    }

    /// Opens a frozen overlay; `base` is how this process reads it as it is now: an [`OverlayView`](super::OverlayView).
    ///
    /// # Errors
    /// When the parts do not fit.
    pub fn open_layer(parts: FrozenParts, base: Arc<dyn Bytes>) -> Result<Self, OpenError> {
        let mut fds = parts.fds.into_iter();
        let (FrozenStateV1::Layer { len, cluster }, Some(table), Some(store), None) =
            (parts.state, fds.next(), fds.next(), fds.next())
        else {
            return Err(OpenError::Parts);
        };
        let preserved = Some(Preserved::open(len, cluster, table, store)?);
        Ok(Self { len, base: FrozenBase::Layers(base), preserved })
    }

    /// Why it cannot be read any more, if so. Then all that was read before was right, and nothing is from now on.
    pub fn lost(&self) -> Option<Lost> {
        self.preserved.as_ref()?.table.lost()
    }

    /// Keeps writers off the file from now on, so that this outlives its source; for when that has ended, and its lock with it.
    /// As long as the source lives, this fails.
    ///
    /// # Errors
    /// `WouldBlock` when someone has the file open to write it: then what this reads will be wrong before long.
    pub fn keep_writers_off(&self) -> io::Result<()> {
        let FrozenBase::File(file) = &self.base else { return Ok(()) };
        let whole = libc::flock {
            l_type: libc::F_RDLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(file.file(), FcntlArg::F_OFD_SETLK(&whole))?;
        Ok(())
    }

    fn base(&self) -> &dyn Bytes {
        match &self.base {
            FrozenBase::File(file) => file,
            FrozenBase::Layers(base) => &**base,
        }
    }
}

impl std::fmt::Debug for FrozenFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrozenFile").field("len", &self.len).field("lost", &self.lost()).finish_non_exhaustive()
    }
}

impl Bytes for FrozenFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let there = self.len.saturating_sub(offset).min(buffer.len() as u64) as usize;
        let (buffer, past) = buffer.split_at_mut(there);
        past.fill(0);
        match &self.preserved {
            None => self.base().read_at(buffer, offset),
            Some(preserved) => preserved.read(self.base(), buffer, offset),
        }
    }
}

impl Preserved {
    fn open(len: u64, cluster: u32, table: OwnedFd, store: OwnedFd) -> Result<Self, OpenError> {
        if u64::from(cluster) != CLUSTER {
            return Err(OpenError::Cluster(cluster));
        }
        Ok(Self { table: TableView::open(table, len)?, store: store.into() })
    }

    fn read(&self, base: &dyn Bytes, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let result = self.read_unchecked(base, buffer, offset);
        // Last: what was read before this was seen may have been replaced.
        match self.table.lost() {
            Some(why) => Err(io::Error::other(why)),
            None => result,
        }
    }

    fn read_unchecked(&self, base: &dyn Bytes, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + buffer.len() as u64;
        let mut at = offset;
        while at < end {
            let first = at / CLUSTER;
            let part = |to: u64| (at - offset) as usize..(to.min(end) - offset) as usize;
            if let Some(kept) = self.table.kept(first) {
                let to = (first + 1) * CLUSTER;
                self.fetch(kept, &mut buffer[part(to)], at % CLUSTER)?;
                at = to;
                continue;
            }
            // As much as the disk itself still has, at once.
            let more = (first + 1..clusters(end)).take_while(|cluster| self.table.kept(*cluster).is_none());
            let to = (first + 1 + more.count() as u64) * CLUSTER;
            base.read_at(&mut buffer[part(to)], at)?;
            for cluster in first..to / CLUSTER {
                if let Some(kept) = self.table.kept_meanwhile(cluster) {
                    let from = at.max(cluster * CLUSTER);
                    let stale = (from - offset) as usize..(((cluster + 1) * CLUSTER).min(end) - offset) as usize;
                    self.fetch(kept, &mut buffer[stale], from % CLUSTER)?;
                }
            }
            at = to;
        }
        Ok(())
    }

    /// Fills `part`, which lies within a cluster from `within` on.
    fn fetch(&self, kept: Kept, part: &mut [u8], within: u64) -> io::Result<()> {
        match kept {
            Kept::Zeroes => part.fill(0),
            Kept::Stored(slot) => self.store.read_exact_at(part, Slot::offset(slot) + within)?,
        }
        Ok(())
    }
}
