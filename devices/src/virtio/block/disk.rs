//! The host's side of a disk: an opened and locked image file or block device, or bytes that are elsewhere.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use tracing::warn;

use super::image::{Image, Lease};
use super::job::Target;
use super::plugged::{Plugged, WriteDisk};
use super::watch::{BeforeWrite, HostFile};

/// A sector in bytes: the unit of a disk's size and of requests.
pub const SECTOR: u64 = 512;
/// How a qcow2 image begins.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

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
    /// Not an image of the format that was asked for, or one that cannot be used.
    #[error("disk image {} is not usable", path.display())]
    Image {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        source: io::Error,
    },
    /// It builds upon another file, which the user did not allow.
    #[error("disk image {} has the backing file {}, which was not allowed", path.display(), backing.display())]
    Backing {
        /// The path.
        path: PathBuf,
        /// As the image names it.
        backing: PathBuf,
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

/// How a disk's bytes are laid out in its file.
///
/// Never found out by looking: a guest can write what looks like another format's header, naming any file of the host, into
/// a raw disk of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskFormat {
    /// One after the other. Also block devices.
    #[default]
    Raw,
    /// QEMU's format, version 2 or 3.
    Qcow2,
}

/// How to open a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// Only to be read.
    pub read_only: bool,
    /// The layout.
    pub format: DiskFormat,
    /// Whether an image may build upon other files, which are then only read. It names them itself: any that this process may
    /// open. So not for images from someone who is not trusted with those.
    pub backing: bool,
}

/// An open disk. If in a file, locked as long as it lives: writable ones exclusively, read-only ones against writers. So are the files that
/// it builds upon, against writers.
///
/// The lock is an open-file-description lock on the whole file (fcntl(2)): it follows the descriptor to whoever gets it
/// and also conflicts with those of QEMU.
#[derive(Debug)]
pub struct Disk {
    backend: Backend,
    len: u64,
    read_only: bool,
}

#[derive(Debug)]
enum Backend {
    Raw(Arc<HostFile>),
    Image(Arc<Image>),
    Plugged(Arc<Plugged>),
}

/// Where a range of a disk is.
pub(super) enum Place {
    /// Its first `len` bytes: at `offset` of the target, as long as the lease lives.
    There {
        /// Who has it.
        target: Target,
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u64,
        /// What lies past the target's end is zeroes.
        padded: bool,
        /// What keeps it there.
        lease: Option<Lease>,
    },
    /// Its first so many bytes are nowhere, and read as zeroes.
    Zeroes(u64),
}

impl Disk {
    /// Opens and locks the image or block device at `path`.
    ///
    /// # Errors
    /// Each way in which `path` is unfit has its own variant.
    pub fn open(path: &Path, options: DiskOptions) -> Result<Self, DiskError> {
        let DiskOptions { read_only, format, backing } = options;
        let file = open_file(path, read_only)?;
        // The end is the size of block devices too, whose metadata says zero. Nothing else uses the file's position.
        let end = (&**file).seek(SeekFrom::End(0)).map_err(|source| DiskError::Io { path: path.to_owned(), source })?;
        let (backend, len) = match format {
            DiskFormat::Raw => {
                let mut start = [0; 4];
                if file.read_exact_at(&mut start, 0).is_ok() && start == QCOW2_MAGIC {
                    warn!("disk image {} looks like qcow2 and is used as raw, as it was asked for", path.display());
                }
                (Backend::Raw(file), end)
            }
            DiskFormat::Qcow2 => {
                let image = Image::open(file, path, read_only, backing)?;
                let len = image.len();
                (Backend::Image(Arc::new(image)), len)
            }
        };
        if len == 0 || len % SECTOR != 0 {
            return Err(DiskError::Size { path: path.to_owned(), size: len });
        }
        Ok(Self { backend, len, read_only })
    }

    /// A disk whose bytes are elsewhere. Whoever keeps them has to see to it that it has one user.
    ///
    /// # Errors
    /// What `bytes` says; `InvalidInput` when that is not a whole number of sectors, or none.
    pub fn plugged(bytes: Arc<dyn WriteDisk>, read_only: bool) -> io::Result<Self> {
        let len = bytes.size()?;
        if len == 0 || len % SECTOR != 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self { backend: Backend::Plugged(Arc::new(Plugged::new(bytes))), len, read_only })
    }

    /// From now on `watcher`, if any, is told before this changes. While nothing is in flight: jobs that have begun are not told of.
    pub fn watch(&self, watcher: Option<Arc<dyn BeforeWrite>>) {
        match &self.backend {
            Backend::Raw(file) => file.watch.set(watcher),
            Backend::Image(image) => image.file().watch.set(watcher),
            Backend::Plugged(plugged) => plugged.watch.set(watcher),
        }
    }

    /// The files that it is in: the image first, whose changes a watcher is told of, then those it builds upon, in this order. None
    /// if its bytes are elsewhere.
    ///
    /// # Errors
    /// When no more descriptors are to be had.
    pub fn files(&self) -> io::Result<Vec<File>> {
        match &self.backend {
            Backend::Raw(file) => Ok(vec![file.try_clone()?]),
            Backend::Image(image) => image.files().iter().map(|file| file.try_clone()).collect(),
            Backend::Plugged(_) => Ok(Vec::new()),
        }
    }

    /// Has the files say all that there is to say, for whoever else reads them. Pausing the device does it too, but only logs a failure.
    ///
    /// # Errors
    /// What the host says.
    pub fn write_back(&self) -> io::Result<()> {
        match &self.backend {
            Backend::Image(image) if !self.read_only => image.write_back(),
            _ => Ok(()),
        }
    }

    /// Has everything that was written be on the host's storage.
    ///
    /// # Errors
    /// What the host says.
    pub fn sync(&self) -> io::Result<()> {
        match &self.backend {
            _ if self.read_only => Ok(()),
            Backend::Raw(file) => file.sync_data(),
            Backend::Image(image) => image.flush(),
            // It goes with its VM.
            Backend::Plugged(_) => Ok(()),
        }
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

    /// Who has the disk as a whole.
    pub(super) fn target(&self) -> Target {
        match &self.backend {
            Backend::Raw(file) => Target::File(Arc::clone(file)),
            Backend::Image(image) => Target::Image(Arc::clone(image)),
            Backend::Plugged(plugged) => Target::Plugged(Arc::clone(plugged)),
        }
    }

    /// Whether some of its jobs are none for a ring.
    pub(super) fn needs_helpers(&self) -> bool {
        !matches!(self.backend, Backend::Raw(_))
    }

    /// Where `len` bytes at `offset` are read from or written to; if `stable`, what says where they are is to be on the disk
    /// with them.
    pub(super) fn locate(&self, offset: u64, len: u64, write: bool, stable: bool) -> io::Result<Place> {
        match &self.backend {
            Backend::Image(image) if !(write && stable) => image.locate(offset, len, write),
            _ => Ok(Place::There { target: self.target(), offset, len, padded: false, lease: None }),
        }
    }

    /// A disk that claims to be `len` bytes long, for tests of storage that fails.
    #[cfg(test)]
    pub(super) fn claiming(file: File, len: u64) -> Self {
        Self { backend: Backend::Raw(Arc::new(HostFile::new(file))), len, read_only: false }
    }
}

/// Opens and locks a file or block device.
pub(super) fn open_file(path: &Path, read_only: bool) -> Result<Arc<HostFile>, DiskError> {
    let name = || path.to_owned();
    let io = |source| DiskError::Io { path: name(), source };
    let mut how = OpenOptions::new();
    // O_NONBLOCK: a pipe would otherwise wait for its other end.
    how.read(true).write(!read_only).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    let file = how.open(path).map_err(|source| match source.kind() {
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
    Ok(Arc::new(HostFile::new(file)))
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
