//! The host's side of a disk: an opened and locked image file or block device.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// A sector in bytes: the unit of a disk's size and of requests.
pub const SECTOR: u64 = 512;

/// Why a path cannot serve as a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Nothing is there.
    #[error("disk image {} does not exist", .0.display())]
    Missing(PathBuf),
    /// This process may not open it as asked.
    #[error("no permission to {} disk image {}", if *read_only { "read" } else { "write" }, path.display())]
    Permission {
        /// The path.
        path: PathBuf,
        /// Whether it was to be opened for reading only.
        read_only: bool,
    },
    /// A directory.
    #[error("disk image {} is a directory", .0.display())]
    Directory(PathBuf),
    /// A pipe, a socket or a character device.
    #[error("disk image {} is neither a file nor a block device", .0.display())]
    NotADisk(PathBuf),
    /// Not a whole number of sectors, or none at all.
    #[error("disk image {} is {size} bytes long, not a multiple of {SECTOR} bytes above zero", path.display())]
    Size {
        /// The path.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Another process, or another disk of this one, holds it: a writable disk has one user.
    #[error("disk image {} is in use{}", path.display(), if *read_only { " by a writer" } else { "" })]
    Locked {
        /// The path.
        path: PathBuf,
        /// Whether it was to be opened for reading only, so that other readers would not have mattered.
        read_only: bool,
    },
    /// Anything else that the system said.
    #[error("cannot open disk image {}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// How to open a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// Only to be read.
    pub read_only: bool,
}

/// An open disk. Locked as long as it lives: writable ones exclusively, read-only ones against writers.
///
/// The lock is an open-file-description lock on the whole file (fcntl(2)): it follows the descriptor to whoever gets it
/// and also conflicts with those of QEMU.
#[derive(Debug)]
pub struct Disk {
    file: Arc<File>,
    len: u64,
    read_only: bool,
}

impl Disk {
    /// Opens and locks the raw image or block device at `path`.
    ///
    /// # Errors
    /// Each way in which `path` is unfit has its own variant.
    pub fn open(path: &Path, options: DiskOptions) -> Result<Self, DiskError> {
        let DiskOptions { read_only } = options;
        let name = || path.to_owned();
        let io = |source| DiskError::Io { path: name(), source };
        let mut how = OpenOptions::new();
        // O_NONBLOCK: a pipe would otherwise wait for its other end.
        how.read(true).write(!read_only).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        let mut file = how.open(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => DiskError::Missing(name()),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                DiskError::Permission { path: name(), read_only }
            }
            io::ErrorKind::IsADirectory => DiskError::Directory(name()),
            _ if source.raw_os_error() == Some(libc::ENXIO) => DiskError::NotADisk(name()),
            _ => io(source),
        })?;
        let kind = file.metadata().map_err(io)?.file_type();
        if kind.is_dir() {
            return Err(DiskError::Directory(name()));
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotADisk(name()));
        }
        lock(&file, read_only).map_err(|errno| match errno {
            Errno::EAGAIN | Errno::EACCES => DiskError::Locked { path: name(), read_only },
            errno => io(errno.into()),
        })?;
        // The end is the size of block devices too, whose metadata says zero. Nothing else uses the file's position.
        let len = file.seek(SeekFrom::End(0)).map_err(io)?;
        if len == 0 || len % SECTOR != 0 {
            return Err(DiskError::Size { path: name(), size: len });
        }
        Ok(Self { file: Arc::new(file), len, read_only })
    }

    /// Its size in bytes: a multiple of [`SECTOR`].
    #[expect(clippy::len_without_is_empty, reason = "no disk is empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it was opened for reading only.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The file or block device that holds its bytes.
    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// A disk that claims to be `len` bytes long, for tests of storage that fails.
    #[cfg(test)]
    pub(super) fn claiming(file: File, len: u64) -> Self {
        Self { file: Arc::new(file), len, read_only: false }
    }
}

fn lock(file: &File, read_only: bool) -> nix::Result<()> {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    let whole = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole)).map(drop)
}
