//! A memory image: the RAM of a paused VM as two files in a directory.
//!
//! ```text
//! memory         as long as the RAM, every byte at its offset in the memfd; pages that are all zero are holes
//! memory.index   which chunks have data, and the checksum of each       (format: `image/index.rs`)
//! ```
//!
//! RAM is dealt with in chunks of [`CHUNK`] bytes, counted from the memfd's start. A chunk that is zero has no entry in the index,
//! and its place in `memory` is never read. The index is written last, once the memory is on the disk: files that a save left
//! half done have none, and are no image.
//!
//! Invariants:
//! * All bytes read here are untrusted. What is read of a chunk is used only if its checksum fits; nothing in the files makes
//!   us allocate more than the RAM size that the caller names accounts for (8 bytes a chunk), wait, or panic.
//! * `memory` keeps its place while somebody loads from it, or is unlinked: it is never written again.

mod index;
mod save;

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub use index::{IndexError, VERSION};
pub use save::{SaveError, Saved, save};

use index::Index;

use crate::ram::PAGE;

/// How much of RAM is read, checked and filled at a time. Also what the answer to one page fault brings along.
///
/// Larger ones load faster and answer slower. `cargo run --release -p civic-fork --example memory_image` measures both.
pub const CHUNK: u64 = 64 << 10;

/// Name of the file with the RAM's contents.
pub const MEMORY: &str = "memory";
/// Name of the file that says what is in it.
pub const INDEX: &str = "memory.index";

/// How far a save or a load is, in bytes. Zero pages inside of what holds data count as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Dealt with.
    pub done: u64,
    /// Of these.
    pub total: u64,
}

/// Is told of progress after each chunk, in the thread that works, and can end that.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is no index.
    #[error("{} is not a saved VM's memory, or saving it did not end", dir.display())]
    NoImage {
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// A file cannot be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The index is not one, or not one of this RAM.
    #[error("cannot use {}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: IndexError,
    },
    /// The memory's length is not the RAM's.
    #[error("{} is damaged: {len} bytes long instead of {ram}", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// The RAM's size.
        ram: u64,
    },
    /// A chunk is not what was saved.
    #[error("{} is damaged: the {len} bytes at {offset:#x} are not what was saved", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where in it, and in RAM.
        offset: u64,
        /// How many bytes the checksum is of.
        len: usize,
    },
    /// A chunk cannot be read.
    #[error("cannot read {} at {offset:#x}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Why memory could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The image is at fault.
    #[error("cannot load the saved memory")]
    Image(#[from] ImageError),
    /// This host is.
    #[error("cannot fill guest memory at {offset:#x} from its image")]
    Fill {
        /// Where in RAM.
        offset: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The kernel does not let us answer page faults any more.
    #[error("cannot fill guest memory from its image")]
    Userfault(#[from] crate::uffd::UffdError),
    /// The RAM has another size than the image.
    #[error("the memory image is of {image} bytes of RAM, the VM has {ram}")]
    Size {
        /// Of the image.
        image: u64,
        /// Of the VM.
        ram: u64,
    },
    /// Whoever is told of progress said so.
    #[error("loading the memory was stopped")]
    Stopped,
    /// A fault of ours.
    #[error("the thread that loads the memory panicked")]
    Panicked,
}

/// An image that is open to be loaded.
#[derive(Debug)]
pub struct Image {
    memory: File,
    path: PathBuf,
    index: Index,
}

impl Image {
    /// Opens the image in `dir`, which must be one of `ram` bytes of RAM. Checks all but the chunks' contents.
    pub fn open(dir: &Path, ram: u64) -> Result<Self, ImageError> {
        let path = dir.join(INDEX);
        let (file, len) = match open(&path) {
            Err(ImageError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::NoImage { dir: dir.to_owned() });
            }
            other => other?,
        };
        let index = Index::read(file, len, ram).map_err(|source| ImageError::Index { path, source })?;
        let path = dir.join(MEMORY);
        let (memory, len) = open(&path)?;
        if len != ram {
            return Err(ImageError::Length { path, len, ram });
        }
        Ok(Self { memory, path, index })
    }

    /// Size of the RAM that was saved.
    pub fn ram(&self) -> u64 {
        self.index.ram()
    }

    /// Bytes in chunks that have data: what there is to load.
    pub fn data(&self) -> u64 {
        self.index.data()
    }

    /// Number of chunks that have data. They are named by their position among these.
    pub(crate) fn chunks(&self) -> usize {
        self.index.entries().len()
    }

    /// The chunk that `offset` lies in, if it has data.
    pub(crate) fn find(&self, offset: u64) -> Option<usize> {
        self.index.find(offset)
    }

    /// Reads a chunk that has data into `buffer` and checks it. Returns its offset.
    pub(crate) fn read(&self, position: usize, buffer: &mut Vec<u8>) -> Result<u64, ImageError> {
        let entry = self.index.entries()[position];
        let Range { start, end } = self.index.range(entry);
        buffer.resize((end - start) as usize, 0);
        let read = self.memory.read_exact_at(buffer, start);
        read.map_err(|source| ImageError::Read { path: self.path.clone(), offset: start, source })?;
        if crc32fast::hash(buffer) != entry.sum {
            return Err(ImageError::Damaged { path: self.path.clone(), offset: start, len: buffer.len() });
        }
        Ok(start)
    }

    /// Loads all of it into `memfd`, which must be as long as the RAM and empty, before anybody uses that: the way for hosts
    /// that offer no userfaultfd. Pages that are zero stay holes.
    pub fn load_all(&self, memfd: &File, progress: OnProgress) -> Result<(), LoadError> {
        let len = memfd.metadata().map_err(|source| LoadError::Fill { offset: 0, source })?.len();
        if len != self.ram() {
            return Err(LoadError::Size { image: self.ram(), ram: len });
        }
        let mut so_far = Progress { done: 0, total: self.data() };
        let mut buffer = Vec::new();
        for position in 0..self.chunks() {
            let start = self.read(position, &mut buffer)?;
            for run in data_runs(&buffer) {
                let offset = start + run.start as u64;
                let filled = memfd.write_all_at(&buffer[run], offset);
                filled.map_err(|source| LoadError::Fill { offset, source })?;
            }
            so_far.done += buffer.len() as u64;
            if progress(so_far).is_break() {
                return Err(LoadError::Stopped);
            }
        }
        Ok(())
    }
}

/// Opens a regular file, and says how long it is. Does not wait for the other end of a pipe that somebody put there.
fn open(path: &Path) -> Result<(File, u64), ImageError> {
    let failed = |source| ImageError::Open { path: path.to_owned(), source };
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let status = file.metadata().map_err(failed)?;
    if !status.is_file() {
        return Err(failed(io::Error::other("not a regular file")));
    }
    Ok((file, status.len()))
}

/// The pages of `bytes` that are not all zero, in runs as long as they get.
pub(crate) fn data_runs(bytes: &[u8]) -> impl Iterator<Item = Range<usize>> {
    static ZERO: [u8; PAGE] = [0; PAGE];
    let is_zero = |page: &[u8]| page == &ZERO[..page.len()];
    let mut pages = bytes.chunks(PAGE).enumerate().peekable();
    std::iter::from_fn(move || {
        let (first, page) = pages.find(|(_, page)| !is_zero(page))?;
        let start = first * PAGE;
        let mut end = start + page.len();
        while let Some((_, page)) = pages.next_if(|(_, page)| !is_zero(page)) {
            end += page.len();
        }
        Some(start..end)
    })
}

#[cfg(test)]
mod tests;
