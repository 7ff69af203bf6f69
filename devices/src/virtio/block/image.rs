//! A disk inside a qcow2 image, by means of `imago`.
//!
//! imago knows where things are; what the guest reads and writes goes between its memory and the file without it wherever a
//! range has its place already ([`Image::locate`]): the same jobs on the same ring as for a raw disk. The rest (allocating,
//! decompressing, zeroing, flushing) is done by [`Image::run`], on threads that may wait.
//!
//! ```text
//!  locate ─▶ here, in this file ─────▶ ring      (holds a Lease)
//!         ├▶ nowhere: zeroes ────────▶ at once
//!         └▶ not without the image ──▶ run       (holds a Lease, or the whole image)
//! ```
//!
//! Invariants:
//! * a place that was told stays where it is as long as its [`Lease`] lives: discarding and zeroing wait until there is none,
//!   and meanwhile no new one is given. Nobody waits for anything with a lease in hand, but for the host's storage;
//! * an image's bytes are the user's, but untrusted: whatever they make imago do, a panic too, is an I/O error;
//! * no Rust reference to guest memory goes to imago.
//!
//! Only what the user named is opened: an external data file never, backing files only if he said so, and then by the format
//! that the image names. Probing would let a guest choose: it can write a qcow2 header with any host file's path into a raw disk.
//!
//! Lock order: the gate's lock is a leaf.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, Mapping};

use super::disk::{self, DiskError, Place};
use super::image_file::{HEADER, ImageFile};
use super::job::{Action, Target};
use super::watch::HostFile;
use crate::virtio::held::HeldAreas;

/// The longest chain of backing files.
const MAX_DEPTH: usize = 32;
/// What is decompressed at a time.
const PIECE: usize = 1 << 20;

/// An open qcow2 image.
pub struct Image {
    access: FormatAccess<ImageFile>,
    gate: Gate,
    /// imago panicked: what it holds in memory is not to be trusted, so nothing is done any more.
    broken: AtomicBool,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Image").field(&self.access).finish()
    }
}

impl Image {
    /// Opens the image in `file`, which is at `path`; with its backing files if `backing`.
    pub fn open(file: Arc<HostFile>, path: &Path, read_only: bool, backing: bool) -> Result<Self, DiskError> {
        let unfit = |source| DiskError::Image { path: path.to_owned(), source };
        if !read_only {
            counts_itself(&file).map_err(unfit)?;
        }
        let file = ImageFile::new(file, path).map_err(unfit)?;
        let open = || open_chain(file, path, !read_only, backing, 0);
        let qcow2 = catch_unwind(AssertUnwindSafe(open)).map_err(|_| unfit(panicked()))??;
        Ok(Self { access: FormatAccess::new(qcow2), gate: Gate::default(), broken: AtomicBool::new(false) })
    }

    /// The disk's size in bytes.
    pub fn len(&self) -> u64 {
        self.access.size()
    }

    /// Its own file.
    pub fn file(&self) -> Arc<HostFile> {
        self.files().swap_remove(0)
    }

    /// Its own file and those it builds upon, in this order.
    pub fn files(&self) -> Vec<Arc<HostFile>> {
        let deepest_first = self.access.inner().collect_storage_dependencies();
        deepest_first.into_iter().rev().map(ImageFile::share).collect()
    }

    /// Where `len` bytes at `offset` are read from, or written to.
    pub fn locate(self: &Arc<Self>, offset: u64, len: u64, write: bool) -> io::Result<Place> {
        let by_itself =
            || Place::There { target: Target::Image(Arc::clone(self)), offset, len, padded: false, lease: None };
        let Some(lease) = Lease::try_new(self) else { return Ok(by_itself()) };
        let (mapping, length) = self.guarded(|| self.access.get_mapping(offset, len))?;
        Ok(match mapping {
            Mapping::Raw { storage, offset, writable, .. }
                if length > 0 && (!write || writable && offset >= HEADER) =>
            {
                // A write that only in part has its place is better allocated as a whole.
                if write && length < len {
                    return Ok(by_itself());
                }
                // Where the file ended once it may end, but not before.
                let sure = storage.original_len().saturating_sub(offset);
                let (length, padded) = if write || sure == 0 { (length, true) } else { (length.min(sure), false) };
                let target = Target::File(storage.share());
                Place::There { target, offset, len: length, padded, lease: Some(lease) }
            }
            Mapping::Zero { .. } if !write && length > 0 => Place::Zeroes(length),
            _ => by_itself(),
        })
    }

    /// Does a job, which may take as long as the host's storage takes. What is done of `areas` is then no longer left.
    pub fn run(self: &Arc<Self>, action: Action, offset: u64, areas: &mut HeldAreas) -> io::Result<()> {
        match action {
            Action::Read { .. } => {
                let _lease = Lease::new(self);
                self.guarded(|| self.read(offset, areas))
            }
            Action::Write { stable } => {
                let lease = Lease::new(self);
                self.guarded(|| self.write(offset, areas))?;
                drop(lease);
                if stable { self.flush() } else { Ok(()) }
            }
            Action::Sync => self.flush(),
            Action::Discard { len } => {
                let _all = self.gate.close();
                // SAFETY: the gate is closed: nobody holds a place in the image, nor is in a call that does.
                or_hint(self.guarded(|| unsafe { self.access.discard_to_any_unsafe(offset, len) }))
            }
            Action::Punch { len } => {
                let _all = self.gate.close();
                // SAFETY: as above.
                or_not_supported(self.guarded(|| unsafe { self.access.discard_to_zero_unsafe(offset, len) }))
            }
            Action::ZeroRange { len } => {
                let _all = self.gate.close();
                or_not_supported(self.guarded(|| self.access.write_zeroes(offset, len)))
            }
        }
    }

    /// Brings everything written, and where it is, to the disk.
    pub fn flush(&self) -> io::Result<()> {
        self.write_back()?;
        self.guarded(|| self.access.sync())
    }

    /// Has the file say where everything written is, for whoever else reads it.
    pub fn write_back(&self) -> io::Result<()> {
        self.guarded(|| self.access.flush())
    }

    fn read(&self, mut offset: u64, areas: &mut HeldAreas) -> io::Result<()> {
        let mut piece = vec![0; PIECE.min(areas.len())];
        while !areas.is_empty() {
            let count = piece.len().min(areas.len());
            self.access.read(&mut piece[..count], offset)?;
            areas.copy_from(&piece[..count]);
            areas.advance(count);
            offset += count as u64;
        }
        Ok(())
    }

    fn write(&self, mut offset: u64, areas: &mut HeldAreas) -> io::Result<()> {
        while !areas.is_empty() {
            let mapping = self.access.prepare_data_mapping(offset, areas.len() as u64, true)?;
            let len = mapping.length();
            if mapping.offset() < HEADER {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the image has data in its own header"));
            }
            let mut part = areas.take(usize::try_from(len).unwrap_or(usize::MAX));
            let file = mapping.storage().share();
            file.watch.before_write(mapping.offset(), part.len() as u64);
            part.write_at(file.as_fd(), mapping.offset(), false)?;
            self.access.commit_data_mapping(mapping)?;
            offset += len;
        }
        Ok(())
    }

    fn guarded<T>(&self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.broken.load(Ordering::Acquire) {
            return Err(panicked());
        }
        catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
            self.broken.store(true, Ordering::Release);
            Err(panicked())
        })
    }
}

fn panicked() -> io::Error {
    io::Error::other("the image is damaged in a way that nothing can be made of")
}

/// A discard is a hint: where the image cannot follow it, nothing is wrong.
fn or_hint(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
        result => result,
    }
}

/// What fallocate(2) says of a file that cannot do it.
fn or_not_supported(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::Unsupported => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        result => result,
    }
}

/// Refuses a qcow2 image that does not say that its own first cluster is taken. imago would use that one for what it needs
/// next, which [`ImageFile`] does not allow: nothing could be written that has no place yet.
fn counts_itself(file: &File) -> io::Result<()> {
    let word = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).map(|()| u64::from_be_bytes(bytes))
    };
    // The header's version, refcount_table_offset, refcount_table_clusters and refcount_order, which version 2 does not have.
    let (version, table, clusters) = (word(0)? as u32, word(48)?, word(56)? >> 32);
    let order = if version > 2 { word(96)? >> 32 } else { 4 };
    // The table's first entry without its reserved bits. Of counts shorter than a byte the first is in a byte's lowest bits.
    let counts = if table != 0 && clusters != 0 { word(table)? & !0x1ff } else { 0 };
    let first = if counts == 0 { 0 } else { word(counts)? };
    let count = match order {
        0..3 => first >> 56 & ((1 << (1 << order)) - 1),
        3..6 => first >> (64 - (1 << order)),
        _ => first,
    };
    if count == 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "its reference counts are missing, or say that its header is free (qemu-img check -r all may help)",
        ));
    }
    Ok(())
}

fn open_chain(
    file: ImageFile,
    path: &Path,
    writable: bool,
    backing: bool,
    depth: usize,
) -> Result<Qcow2<ImageFile>, DiskError> {
    let unfit = |source| DiskError::Image { path: path.to_owned(), source };
    let refused = |why: &str| unfit(io::Error::new(io::ErrorKind::InvalidInput, why.to_owned()));
    let mut image = Qcow2::<ImageFile>::open_image(file, writable).map_err(unfit)?;
    if image.requires_external_data_file() {
        return Err(refused("its data are in another file, which is not supported"));
    }
    image.set_data_file(None);
    let Some(name) = image.implicit_backing_file().cloned() else {
        image.set_backing(None);
        return Ok(image);
    };
    if !backing {
        return Err(DiskError::Backing { path: path.to_owned(), backing: name.into() });
    }
    if depth == MAX_DEPTH {
        return Err(refused("it has too many backing files, or is its own"));
    }
    let base = path.parent().unwrap_or(Path::new("")).join(&name);
    let format = image.implicit_backing_format().cloned();
    let lower = ImageFile::new(disk::open_file(&base, true)?, &base).map_err(unfit)?;
    let lower = match format.as_deref() {
        Some("qcow2") => FormatAccess::new(open_chain(lower, &base, false, true, depth + 1)?),
        Some("raw" | "file") => FormatAccess::new(Raw::open_image(lower, false).map_err(unfit)?),
        Some(_) => return Err(refused("its backing file is neither raw nor qcow2")),
        None => {
            return Err(refused("it does not say of which format its backing file is (qemu-img rebase -u -F does)"));
        }
    };
    image.set_backing(Some(lower));
    Ok(image)
}

/// Many may hold places in an image, or one may move them.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    leases: usize,
    /// Closed, or about to be.
    closing: usize,
    closed: bool,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) -> Closed<'_> {
        let mut state = self.state();
        state.closing += 1;
        let busy = |state: &mut GateState| state.leases > 0 || state.closed;
        state = self.changed.wait_while(state, busy).unwrap_or_else(PoisonError::into_inner);
        state.closed = true;
        Closed(self)
    }
}

struct Closed<'a>(&'a Gate);

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.closing -= 1;
        state.closed = false;
        self.0.changed.notify_all();
    }
}

/// Keeps the places in an image where they are.
pub struct Lease(Arc<Image>);

impl Lease {
    fn new(image: &Arc<Image>) -> Self {
        let closing = |state: &mut GateState| state.closing > 0;
        let gate = &image.gate;
        gate.changed.wait_while(gate.state(), closing).unwrap_or_else(PoisonError::into_inner).leases += 1;
        Self(Arc::clone(image))
    }

    fn try_new(image: &Arc<Image>) -> Option<Self> {
        let mut state = image.gate.state();
        (state.closing == 0).then(|| {
            state.leases += 1;
            Self(Arc::clone(image))
        })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.0.gate.state();
        state.leases -= 1;
        if state.leases == 0 {
            self.0.gate.changed.notify_all();
        }
    }
}
