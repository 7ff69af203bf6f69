//! A saved VM on disk: a directory of three files.
//!
//! ```text
//! memory, memory.index   what was in RAM: see civic_fork::image
//! state                  everything else: see crate::state; written last, so a directory without it is not a saved VM
//! ```
//!
//! The state names the memory index by its checksum, so files of two saves cannot be mixed up. It also remembers the disks as they
//! were: a machine whose disk has moved on under it would destroy the file system on it.
//!
//! Invariant: an unfinished save leaves nothing that opens, and removes what it made.

#[cfg(test)]
mod tests;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use civic_api::{ErrorBody, ErrorCode, VmConfig};
use civic_fork::image::{self, INDEX, Image, ImageError, LoadError, OnProgress};
use civic_fork::lazy::{FEATURES, LazyMemory, StartError};
use civic_fork::uffd::Userfault;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::memory::Memory;
use crate::state::{MAX_BYTES, Section, Sections, StateError};

/// The file with everything but memory.
pub const STATE: &str = "state";
const PARTIAL: &str = "state.partial";
const VM: &str = "vm";
const CHECKSUM: crc::Crc<u64, crc::Table<16>> = crc::Crc::<u64, crc::Table<16>>::new(&crc::CRC_64_XZ);
/// A table of 12 bytes for each 64 KiB of the most RAM that a VM may have, and its header, with room to spare.
const MAX_INDEX: u64 = 64 << 20;

/// What the machine does not know of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStateV1 {
    /// The configuration, as JSON, with every default that depended on the VM's name filled in.
    pub config: String,
    /// How often the guest has started, counting resets.
    pub boots: u64,
    /// How long the VM has run, without pauses.
    pub run: Duration,
    /// The memory index's CRC-64/XZ.
    pub index_checksum: u64,
    /// The writable disks, by position in the configuration.
    pub disks: Vec<Option<DiskStamp>>,
}

impl Section for VmStateV1 {
    const VERSION: u16 = 1;
}

/// A writable image file as it was when the VM was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStamp {
    /// Length in bytes.
    pub bytes: u64,
    /// Time of the last change: seconds since the epoch, and nanoseconds.
    pub modified: (i64, i64),
}

impl DiskStamp {
    /// Of the file at `path`; none for a block device, which keeps no such time.
    pub fn of(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
        Some(Self { bytes: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) })
    }
}

/// Why a VM cannot be saved to a directory, or taken from one.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// It would overwrite something.
    #[error("{} is not empty", .0.display())]
    NotEmpty(PathBuf),
    /// A file or directory cannot be made, written or read.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// There is no state.
    #[error("{} is not a saved VM, or saving it did not end", .0.display())]
    NotAVm(PathBuf),
    /// The state is none.
    #[error("cannot use {}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: StateError,
    },
    /// The configuration in the state is none.
    #[error("the saved VM's configuration cannot be read")]
    Config(#[source] serde_json::Error),
    /// State and memory are of two saves.
    #[error("the memory in {} is not that of the state beside it", .0.display())]
    Mixed(PathBuf),
    /// The memory cannot be saved.
    #[error(transparent)]
    Save(#[from] image::SaveError),
    /// The memory cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The memory cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// It cannot be loaded while the VM runs, nor at once.
    #[error(transparent)]
    Lazy(#[from] StartError),
    /// A disk was written to since.
    #[error("disk '{id}' ({}) has been written to since the VM was saved", path.display())]
    DiskChanged {
        /// The disk.
        id: String,
        /// Its image.
        path: PathBuf,
    },
}

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> SavedError + 'a {
    move |source| SavedError::Io { what, path: path.to_owned(), source }
}

/// A directory that is becoming a saved VM. Dropped before its time, it goes away with what is in it.
pub struct Draft {
    dir: PathBuf,
    made: bool,
    finished: bool,
}

impl Draft {
    /// Makes the directory, or takes an empty one.
    ///
    /// # Errors
    /// When it cannot be made or holds something.
    pub fn new(dir: &Path) -> Result<Self, SavedError> {
        let made = match DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => true,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(io_error("make", dir)(e)),
        };
        let mut entries = fs::read_dir(dir).map_err(io_error("read", dir))?;
        if entries.next().is_some() {
            return Err(SavedError::NotEmpty(dir.to_owned()));
        }
        Ok(Self { dir: dir.to_owned(), made, finished: false })
    }

    /// Writes the memory, then the state; returns the bytes of both. `vm`'s checksum is filled in here.
    ///
    /// # Errors
    /// When something cannot be written, or `progress` says to stop.
    pub fn write(
        mut self,
        memfd: &File,
        mut sections: Sections,
        vm: VmStateV1,
        progress: OnProgress<'_>,
    ) -> Result<(u64, u64), SavedError> {
        let saved = image::save(memfd, &self.dir, progress)?;
        sections.put(VM, &VmStateV1 { index_checksum: index_checksum(&self.dir)?, ..vm });
        let bytes = sections.encode();
        let (partial, state) = (self.dir.join(PARTIAL), self.dir.join(STATE));
        let mut file = OpenOptions::new();
        let file = file.write(true).create_new(true).mode(0o600).open(&partial);
        let written = file.and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()));
        written.map_err(io_error("write", &partial))?;
        let synced = fs::rename(&partial, &state).and_then(|()| File::open(&self.dir)?.sync_all());
        synced.map_err(io_error("write", &state))?;
        self.finished = true;
        Ok((saved.bytes, bytes.len() as u64))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // The memory's files are gone already where saving them failed.
        for name in [image::MEMORY, INDEX, PARTIAL, STATE] {
            let _ = fs::remove_file(self.dir.join(name));
        }
        if self.made
            && let Err(e) = fs::remove_dir(&self.dir)
        {
            warn!("cannot remove {}: {e}", self.dir.display());
        }
    }
}

/// A saved VM that was opened and checked, but for its memory's contents.
pub struct SavedVm {
    /// As it was saved.
    pub config: VmConfig,
    /// What the machine does not know of itself.
    pub vm: VmStateV1,
    /// The machine.
    pub sections: Sections,
    image: Image,
}

impl SavedVm {
    /// Opens the saved VM in `dir`.
    ///
    /// # Errors
    /// When there is none, or it was cut short, altered, mixed up or made by another version.
    pub fn open(dir: &Path) -> Result<Self, SavedError> {
        let path = dir.join(STATE);
        let bytes = read_bounded(&path, MAX_BYTES as u64).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => SavedError::NotAVm(dir.to_owned()),
            _ => io_error("read", &path)(e),
        })?;
        let wrong = |source| SavedError::State { path: path.clone(), source };
        let mut sections = Sections::decode(&bytes).map_err(wrong)?;
        let vm: VmStateV1 = sections.take(VM).map_err(wrong)?;
        let config: VmConfig = serde_json::from_str(&vm.config).map_err(SavedError::Config)?;
        let image = Image::open(dir, config.memory_bytes)?;
        if index_checksum(dir)? != vm.index_checksum {
            return Err(SavedError::Mixed(dir.to_owned()));
        }
        Ok(Self { config, vm, sections, image })
    }

    /// Refuses disks that are not as they were; `config` is the one that the VM is to have, disks in the saved order.
    ///
    /// # Errors
    /// For the first disk that changed.
    pub fn check_disks(&self, config: &VmConfig) -> Result<(), SavedError> {
        for (disk, saved) in config.disks.iter().zip(&self.vm.disks) {
            if let Some(saved) = saved
                && DiskStamp::of(&disk.path).is_some_and(|now| now != *saved)
            {
                return Err(SavedError::DiskChanged { id: disk.id.clone(), path: disk.path.clone() });
            }
        }
        Ok(())
    }

    /// Parts the memory from the rest.
    pub fn into_parts(self) -> (Sections, SavedMemory) {
        (self.sections, SavedMemory(self.image))
    }
}

/// A saved VM's memory.
pub struct SavedMemory(Image);

impl SavedMemory {
    /// Has the memory appear in `memory`: while the VM runs where the kernel lets us watch it, else at once. `failed` as in
    /// [`LazyMemory::start`].
    ///
    /// # Errors
    /// When it can be had in neither way.
    pub fn fill(
        self,
        memory: &Memory,
        failed: impl FnOnce(Arc<LoadError>) + Send + 'static,
    ) -> Result<Option<LazyMemory>, SavedError> {
        let Self(image) = self;
        match Userfault::open(FEATURES) {
            Ok(userfault) => {
                let lazy = LazyMemory::start(userfault, Arc::clone(&memory.ram), image, failed)?;
                memory.set_loading(lazy.progress());
                Ok(Some(lazy))
            }
            Err(e) => {
                let bytes = image.data();
                info!(
                    "loading {bytes} bytes of memory before the VM starts: {}",
                    ErrorBody::from_error(ErrorCode::Internal, &e).message
                );
                image.load_all(&memory.memfd, &mut |_| std::ops::ControlFlow::Continue(()))?;
                Ok(None)
            }
        }
    }
}

fn index_checksum(dir: &Path) -> Result<u64, SavedError> {
    let path = dir.join(INDEX);
    let bytes = read_bounded(&path, MAX_INDEX).map_err(io_error("read", &path))?;
    Ok(CHECKSUM.checksum(&bytes))
}

/// All of a regular file, if it is not longer than `most`.
fn read_bounded(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    // One more than allowed: the decoder then says what is wrong.
    file.take(most + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}
