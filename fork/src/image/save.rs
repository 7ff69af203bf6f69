//! Writing a memory image.
//!
//! The order makes it an image only when it is whole: memory, sync, index, sync, directory. Whatever ends a save before that
//! leaves no index; an error also removes what was written.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::index::Index;
use super::{CHUNK, INDEX, MEMORY, OnProgress, Progress, data_runs};
use crate::ram::PAGE;

/// Why memory could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// A file of the image is there already.
    #[error("{} exists already: save to another directory, or remove it", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The file system is full, or a quota is used up.
    #[error(
        "no space left for {} after {written} bytes: make room for up to {total} bytes, or save elsewhere", path.display()
    )]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// Bytes written to it.
        written: u64,
        /// Bytes of RAM to save; pages that are zero, which take no space, among them.
        total: u64,
    },
    /// A file cannot be made or written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Guest memory cannot be read.
    #[error("cannot read guest memory at {offset:#x}")]
    Memfd {
        /// Where in it.
        offset: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No RAM of ours has such a size.
    #[error("{bytes} bytes of guest memory cannot be saved: not a number of pages, or too many")]
    Size {
        /// The memfd's length.
        bytes: u64,
    },
    /// Whoever is told of progress said so.
    #[error("saving the memory was stopped")]
    Stopped,
}

/// What was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Bytes written to `memory`, zero pages not counted.
    pub bytes: u64,
    /// Chunks that have data.
    pub chunks: u64,
    /// Chunks that are zero.
    pub holes: u64,
}

/// Saves all of `memfd` to `dir`, which exists and holds no image. Nobody may write to the memory meanwhile.
///
/// Reading a memfd does not raise page faults in a userfaultfd: memory that is still being loaded from an image must be
/// loaded to its end first (`LazyMemory::finish`), or its missing pages are saved as zero.
pub fn save(memfd: &File, dir: &Path, progress: OnProgress) -> Result<Saved, SaveError> {
    let ram = memfd.metadata().map_err(|source| SaveError::Memfd { offset: 0, source })?.len();
    let index = Index::new(ram).filter(|_| ram > 0 && ram % PAGE as u64 == 0);
    let mut index = index.ok_or(SaveError::Size { bytes: ram })?;
    let index_path = dir.join(INDEX);
    if fs::exists(&index_path).unwrap_or(false) {
        return Err(SaveError::Exists { path: index_path });
    }
    let memory = NewFile::create(dir.join(MEMORY))?;
    memory.file.set_len(ram).map_err(|source| write_error(&memory.path, 0, 0, source))?;
    let saved = write_memory(memfd, &mut index, &memory.file, &memory.path, progress)?;
    memory.file.sync_all().map_err(|source| write_error(&memory.path, saved.bytes, saved.bytes, source))?;
    let mut index_file = NewFile::create(index_path)?;
    let bytes = index.encode();
    let written = index_file.file.write_all(&bytes).and_then(|()| index_file.file.sync_all());
    written.map_err(|source| write_error(&index_file.path, 0, bytes.len() as u64, source))?;
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|source| SaveError::Write { path: dir.to_owned(), source })?;
    memory.keep();
    index_file.keep();
    Ok(saved)
}

/// A file that is removed again unless it is kept.
struct NewFile {
    file: File,
    path: PathBuf,
    keep: bool,
}

impl NewFile {
    /// Readable by nobody else: guest memory has the guest's secrets in it.
    fn create(path: PathBuf) -> Result<Self, SaveError> {
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => Ok(Self { file, path, keep: false }),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(SaveError::Exists { path }),
            Err(source) => Err(SaveError::Write { path, source }),
        }
    }

    fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.keep {
            // What fails here is left behind as a memory without an index: no image.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn write_error(path: &Path, written: u64, total: u64, source: io::Error) -> SaveError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => SaveError::NoSpace { path, written, total },
        _ => SaveError::Write { path, source },
    }
}

/// Copies what is not zero from `memfd` to the same place in `out`, and enters it in `index`.
pub(super) fn write_memory(
    memfd: &File,
    index: &mut Index,
    out: &File,
    path: &Path,
    progress: OnProgress,
) -> Result<Saved, SaveError> {
    let ram = index.ram();
    let mut saved = Saved { bytes: 0, chunks: 0, holes: ram.div_ceil(CHUNK) };
    let populated = populated(memfd, ram)?;
    let mut so_far = Progress { done: 0, total: populated.iter().map(|range| range.end - range.start).sum() };
    let mut buffer = vec![0; CHUNK as usize];
    for range in populated {
        for start in range.clone().step_by(CHUNK as usize) {
            let chunk = &mut buffer[..CHUNK.min(range.end - start) as usize];
            let read = memfd.read_exact_at(chunk, start);
            read.map_err(|source| SaveError::Memfd { offset: start, source })?;
            let before = saved.bytes;
            for run in data_runs(chunk) {
                let written = out.write_all_at(&chunk[run.clone()], start + run.start as u64);
                written.map_err(|source| write_error(path, saved.bytes, so_far.total, source))?;
                saved.bytes += run.len() as u64;
            }
            if saved.bytes > before {
                index.push(start, chunk);
                saved.chunks += 1;
                saved.holes -= 1;
            }
            so_far.done += chunk.len() as u64;
            if progress(so_far).is_break() {
                return Err(SaveError::Stopped);
            }
        }
    }
    Ok(saved)
}

/// The parts of `memfd` that have pages, widened to whole chunks.
fn populated(memfd: &File, ram: u64) -> Result<Vec<Range<u64>>, SaveError> {
    let seek = |offset: u64, whence| match lseek(memfd, offset as libc::off_t, whence) {
        Ok(found) => Ok(Some(found as u64)),
        Err(Errno::ENXIO) => Ok(None),
        Err(e) => Err(SaveError::Memfd { offset, source: e.into() }),
    };
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while let Some(data) = seek(at, Whence::SeekData)?.filter(|data| *data < ram) {
        let hole = seek(data, Whence::SeekHole)?.unwrap_or(ram);
        let (start, end) = (data - data % CHUNK, hole.next_multiple_of(CHUNK).min(ram));
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
        at = end;
    }
    Ok(ranges)
}
