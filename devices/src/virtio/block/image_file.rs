//! A file as `imago` sees it: for an image's metadata, and what it copies within the image.
//!
//! imago has storage of its own for files, but that lets a sync keep all others waiting, and it opens without locks.
//!
//! Invariant: what makes the file an image stays. Where an image does not count its own header as taken, imago would put there
//! what it needs next. Were that reference counts, imago would forget them at once, since offset zero means that there are none,
//! and look for them until its stack is used up.
#![allow(unsafe_code)]

use std::fmt;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::watch::HostFile;

/// How a qcow2 image begins.
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// What lies before this is of the image's first cluster, however short its clusters are: the header's, never data.
pub const HEADER: u64 = 512;

/// Zeroes to write.
static ZEROES: [u8; 65536] = [0; 65536];

/// An open, locked file of an image.
#[derive(Debug)]
pub struct ImageFile {
    file: Arc<HostFile>,
    path: PathBuf,
    /// Bytes that it had when it was opened, and keeps unless we shorten it.
    len: AtomicU64,
    helper: CommonStorageHelper,
}

impl ImageFile {
    /// `file`, which is at `path`.
    ///
    /// # Errors
    /// When it does not tell its size.
    pub fn new(file: Arc<HostFile>, path: &Path) -> io::Result<Self> {
        // Also of block devices. Nothing else uses the file's position.
        let len = (&**file).seek(SeekFrom::End(0))?;
        Ok(Self { file, path: path.to_owned(), len: AtomicU64::new(len), helper: CommonStorageHelper::default() })
    }

    /// Its size in bytes when it was opened: what ends before was cut by somebody else.
    pub fn original_len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    /// The file, for those who know where in it they may write.
    pub fn share(&self) -> Arc<HostFile> {
        Arc::clone(&self.file)
    }

    /// Refuses to have `len` bytes at `offset` overwritten with `bytes`, or with nothing that is known, where the image begins.
    fn spares_header(&self, offset: u64, len: u64, bytes: &[u8]) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap_or(usize::MAX).min(MAGIC.len());
        let there = &MAGIC[at..];
        if len == 0 || there.is_empty() || bytes.len() >= there.len() && bytes.starts_with(there) {
            return Ok(());
        }
        let why = format!("{} counts its own header as free (qemu-img check -r all may help)", self.path.display());
        Err(io::Error::new(io::ErrorKind::InvalidData, why))
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.spares_header(offset, len, &[])?;
        self.file.watch.before_write(offset, len);
        let place = |n: u64| libc::off_t::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
        match fallocate(&*self.file, FallocateFlags::FALLOC_FL_ZERO_RANGE, place(offset)?, place(len)?) {
            Err(Errno::EOPNOTSUPP) => {}
            result => return Ok(result?),
        }
        let mut done = 0;
        while done < len {
            let count = (len - done).min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..count as usize], offset + done)?;
            done += count;
        }
        Ok(())
    }
}

impl fmt::Display for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

/// The methods that are `unsafe` to call ask of their caller to keep to alignments and not to write one range twice at a time;
/// for memory's sake nothing depends on that here.
impl Storage for ImageFile {
    fn size(&self) -> io::Result<u64> {
        // Also of block devices. Nothing else uses the file's position.
        (&**self.file).seek(SeekFrom::End(0))
    }

    fn get_filename(&self) -> Option<PathBuf> {
        Some(self.path.clone())
    }

    unsafe fn pure_readv(&self, areas: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        for mut area in areas.into_inner() {
            let mut rest = &mut area[..];
            while !rest.is_empty() {
                match self.file.read_at(rest, offset) {
                    Ok(0) if offset < self.original_len() => return Err(io::ErrorKind::UnexpectedEof.into()),
                    // An image may be shorter than its last cluster.
                    Ok(0) => {
                        rest.fill(0);
                        break;
                    }
                    Ok(count) => {
                        rest = &mut rest[count..];
                        offset += count as u64;
                    }
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
            }
            offset += rest.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, areas: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        for area in areas.into_inner() {
            self.spares_header(offset, area.len() as u64, &area)?;
            self.file.watch.before_write(offset, area.len() as u64);
            self.file.write_all_at(&area, offset)?;
            offset += area.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len)
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len)
    }

    unsafe fn pure_discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.spares_header(offset, len, &[])?;
        if self.file.watch.needs(offset, len) {
            // The space stays taken.
            return Ok(());
        }
        let place = |n: u64| libc::off_t::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&*self.file, mode, place(offset)?, place(len)?) {
            // The space stays taken.
            Err(Errno::EOPNOTSUPP) => Ok(()),
            result => Ok(result?),
        }
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, size: u64, mode: PreallocateMode) -> io::Result<()> {
        match mode {
            PreallocateMode::None | PreallocateMode::Zero => {
                self.file.watch.before_write(size, u64::MAX);
                self.len.fetch_min(size, Ordering::Relaxed);
                self.file.set_len(size)
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
