//! The disk in an image whose files are given as they were at some time, which need not be how they are now: a forked VM's.
//!
//! As in [`image`](super::image) the bytes are the user's but untrusted. Nothing is opened here, and nothing is written.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{FormatAccess, Storage};

use super::disk::DiskFormat;
use super::plugged::ReadDisk;

/// Opens the disk in `files`: the image of the given format, then those it builds upon, as [`Disk::files`](super::Disk::files) lists
/// them.
///
/// # Errors
/// When they are no such image, or not all of its files, or more.
pub fn open_frozen(files: Vec<Arc<dyn ReadDisk>>, format: DiskFormat) -> io::Result<Arc<dyn ReadDisk>> {
    let mut files = files.into_iter();
    let disk = match format {
        DiskFormat::Raw => files.next().ok_or_else(|| unfit("a file is missing"))?,
        DiskFormat::Qcow2 => {
            let open = || open_chain(&mut files);
            let access = catch_unwind(AssertUnwindSafe(open)).map_err(|_| damaged())??;
            Arc::new(FrozenImage { access: FormatAccess::new(access), broken: AtomicBool::new(false) })
        }
    };
    if files.next().is_some() { Err(unfit("there are more files than it builds upon")) } else { Ok(disk) }
}

fn unfit(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the frozen image cannot be used: {why}"))
}

fn damaged() -> io::Error {
    io::Error::other("the frozen image is damaged in a way that nothing can be made of")
}

fn open_chain(files: &mut dyn Iterator<Item = Arc<dyn ReadDisk>>) -> io::Result<Qcow2<FrozenFile>> {
    // Its source has seen to it that the chain is no longer than it may be.
    let mut next = || files.next().map(FrozenFile::new).ok_or_else(|| unfit("a file that it builds upon is missing"));
    let mut image = Qcow2::<FrozenFile>::open_image(next()?, false)?;
    if image.requires_external_data_file() {
        return Err(unfit("its data are in another file"));
    }
    image.set_data_file(None);
    let backing = match (image.implicit_backing_file(), image.implicit_backing_format().map(String::as_str)) {
        (None, _) => None,
        (_, Some("qcow2")) => Some(FormatAccess::new(open_chain(files)?)),
        (_, Some("raw" | "file")) => Some(FormatAccess::new(Raw::open_image(next()?, false)?)),
        _ => return Err(unfit("it does not say of which format its backing file is")),
    };
    image.set_backing(backing);
    Ok(image)
}

struct FrozenImage {
    access: FormatAccess<FrozenFile>,
    /// imago panicked.
    broken: AtomicBool,
}

impl ReadDisk for FrozenImage {
    fn size(&self) -> io::Result<u64> {
        Ok(self.access.size())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if self.broken.load(Ordering::Acquire) {
            return Err(damaged());
        }
        let there = self.access.size().saturating_sub(offset).min(buffer.len() as u64) as usize;
        let (buffer, past) = buffer.split_at_mut(there);
        past.fill(0);
        catch_unwind(AssertUnwindSafe(|| self.access.read(buffer, offset))).unwrap_or_else(|_| {
            self.broken.store(true, Ordering::Release);
            Err(damaged())
        })
    }
}

/// A file as imago sees it.
struct FrozenFile {
    bytes: Arc<dyn ReadDisk>,
    helper: CommonStorageHelper,
}

impl FrozenFile {
    fn new(bytes: Arc<dyn ReadDisk>) -> Self {
        Self { bytes, helper: CommonStorageHelper::default() }
    }
}

impl fmt::Debug for FrozenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FrozenFile")
    }
}

impl fmt::Display for FrozenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a frozen file")
    }
}

/// The methods that are `unsafe` to call ask of their caller to keep to alignments and to look after concurrent writes; for memory's
/// sake nothing depends on that here.
impl Storage for FrozenFile {
    fn size(&self) -> io::Result<u64> {
        self.bytes.size()
    }

    unsafe fn pure_readv(&self, areas: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        for mut area in areas.into_inner() {
            self.bytes.read_at(&mut area, offset)?;
            offset += area.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, _areas: IoVector<'_>, _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, _size: u64, _mode: PreallocateMode) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}
