//! Disks of a fork: what a VM's disks held at its fork points, on their way to its children, and how those open them.
//!
//! ```text
//!   source    file ◀─ Freezer ─────────── files ───────────────┐
//!   child     Overlay ◀─ Freezer over it ── layer ───────────┐ │ FrozenFile, image format
//!   its child Overlay over ───────────────────────────────▶ FrozenFile over OverlayView
//! ```
//!
//! A child keeps what it was given of its disks, for its own children: they read what it reads, below what it has written.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use civic_api::{DiskConfig, ErrorBody, ErrorCode, ForksConfig};
use civic_devices::virtio::block::{BeforeWrite, Disk, DiskFormat, ReadDisk, WriteDisk, open_frozen};
use civic_fork::disk::{
    Bytes, Freezer, FreezerOptions, FrozenFile, FrozenParts, FrozenStateV1, Generation as DiskGeneration, Overlay,
    OverlayParts, OverlayStateV1, OverlayView, reopen_read_only,
};
use civic_fork::wire::MAX_FDS;
use serde::{Deserialize, Serialize};

use super::ToChild;
use super::family::Family;

/// Descriptors that a fork's disk has more than its source's.
const LAYER: usize = 4;

/// A disk that children are to have as it is at a fork point.
pub struct Freezable {
    id: String,
    disk: Arc<Disk>,
    /// Its image, frozen anew each time; none for one that nobody writes.
    freezer: Option<Arc<Freezer>>,
    base: Base,
}

/// What a disk builds upon.
enum Base {
    /// Files that nobody writes. The image too, if it is read-only.
    Files(Vec<File>),
    /// A fork's disk, or one over an image: what is frozen under its overlay.
    Fork(Arc<LayeredDisk>),
}

/// Tells a freezer what a disk is about to overwrite.
struct Watcher(Arc<Freezer>);

impl BeforeWrite for Watcher {
    fn before_write(&self, range: Range<u64>) {
        self.0.before_write(range);
    }

    fn needs(&self, range: Range<u64>) -> bool {
        self.0.needs(range)
    }
}

impl Freezable {
    /// Prepares a disk for fork points; `forked` is what it consists of if it has layers.
    ///
    /// # Errors
    /// When it is of a kind that cannot be forked, or there is no place for what must be kept of it.
    pub fn new(
        config: &DiskConfig,
        disk: &Arc<Disk>,
        forked: Option<&Arc<LayeredDisk>>,
        forks: &ForksConfig,
        family: &Arc<Family>,
    ) -> Result<Self, ErrorBody> {
        let told =
            |e: io::Error| ErrorBody::new(ErrorCode::ForkFailed, format!("disk '{}' cannot be forked: {e}", config.id));
        let options = FreezerOptions {
            store: forks.effective_dir().to_owned(),
            limit: forks.effective_disk_bytes(),
            reflink: None,
        };
        let (family, id) = (Arc::downgrade(family), config.id.clone());
        let lost = move |_, why| {
            if let Some(family) = family.upgrade() {
                family.disks_lost(format!("what disk '{id}' held at the fork is lost: {why}"));
            }
        };
        let (freezer, base) = match forked {
            Some(forked) if forked.parts.descriptors() + LAYER > MAX_FDS => {
                return Err(told(io::Error::other("too many forks are above it")));
            }
            Some(forked) if disk.read_only() => (None, Base::Fork(Arc::clone(forked))),
            Some(forked) => {
                let overlay = Arc::clone(&forked.overlay) as Arc<dyn Bytes>;
                let freezer = Freezer::over(overlay, options, Box::new(lost)).map_err(told)?;
                (Some(freezer), Base::Fork(Arc::clone(forked)))
            }
            None => {
                let mut files = disk.files().map_err(told)?.into_iter();
                let image = files.next().ok_or_else(|| told(io::Error::other("it is in no file")))?;
                let mut still = Vec::new();
                let freezer = if disk.read_only() {
                    still.push(image);
                    None
                } else {
                    let reader = reopen_read_only(&image).map_err(told)?;
                    Some(Freezer::over_file(reader, options, Box::new(lost)).map_err(told)?)
                };
                still.extend(files);
                (freezer, Base::Files(still))
            }
        };
        Ok(Self { id: config.id.clone(), disk: Arc::clone(disk), freezer, base })
    }

    /// Whether it is this one.
    pub fn is_of(&self, disk: &Arc<Disk>) -> bool {
        Arc::ptr_eq(&self.disk, disk)
    }

    /// The fork point. Nothing is in flight.
    ///
    /// # Errors
    /// When its image's metadata cannot be written, or there is no memory.
    pub fn freeze(&self) -> Result<Option<DiskGeneration>, ErrorBody> {
        let told =
            |e: io::Error| ErrorBody::new(ErrorCode::ForkFailed, format!("disk '{}' cannot be frozen: {e}", self.id));
        let Some(freezer) = &self.freezer else { return Ok(None) };
        self.disk.write_back().map_err(told)?;
        let generation = freezer.freeze().map_err(told)?;
        self.disk.watch(Some(Arc::new(Watcher(Arc::clone(freezer)))));
        Ok(Some(generation))
    }

    /// Nothing of it is frozen: its writes are nobody's business.
    pub fn thaw(&self) {
        self.disk.watch(None);
    }

    /// What a child needs to read it.
    ///
    /// # Errors
    /// When no more descriptors are to be had.
    pub fn parts(&self, generation: Option<&DiskGeneration>) -> io::Result<DiskParts> {
        let frozen = generation.map(DiskGeneration::parts).transpose()?;
        match &self.base {
            Base::Files(still) => {
                let still = still.iter().map(FrozenParts::of_read_only);
                let files = frozen.map(Ok).into_iter().chain(still).collect::<io::Result<_>>()?;
                Ok(DiskParts { files, layers: Vec::new() })
            }
            Base::Fork(forked) => {
                let mut parts = forked.parts.try_clone()?;
                if let Some(frozen) = frozen {
                    parts.layers.push((forked.overlay.parts()?, frozen));
                }
                Ok(parts)
            }
        }
    }
}

/// Of a [`DiskParts`], what does not go as a descriptor: for each of its parts how many of those it has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStateV1 {
    /// The image first, then what it builds upon.
    files: Vec<(FrozenStateV1, u8)>,
    /// Overlays of forks above it, the oldest first, each with what was frozen of it.
    layers: Vec<(OverlayStateV1, u8, FrozenStateV1, u8)>,
}

/// What a child needs to read a disk.
pub struct DiskParts {
    files: Vec<FrozenParts>,
    layers: Vec<(OverlayParts, FrozenParts)>,
}

impl DiskParts {
    /// As it goes to the child.
    pub fn message(&self) -> (ToChild, Vec<BorrowedFd<'_>>) {
        let Self { files, layers } = self;
        let state = DiskStateV1 {
            files: files.iter().map(|part| (part.state, part.fds.len() as u8)).collect(),
            layers: layers
                .iter()
                .map(|(overlay, part)| (overlay.state, overlay.fds.len() as u8, part.state, part.fds.len() as u8))
                .collect(),
        };
        let layers = layers.iter().flat_map(|(overlay, part)| overlay.fds.iter().chain(&part.fds));
        let fds = files.iter().flat_map(|part| &part.fds).chain(layers);
        (ToChild::Disk(state), fds.map(AsFd::as_fd).collect())
    }

    /// As it comes; none if that is something else.
    pub fn of(message: ToChild, fds: Vec<OwnedFd>) -> Option<Self> {
        let ToChild::Disk(DiskStateV1 { files, layers }) = message else { return None };
        let mut rest = fds.into_iter();
        let mut take = |count: u8| rest.by_ref().take(count.into()).collect();
        let files = files.into_iter().map(|(state, count)| FrozenParts { state, fds: take(count) }).collect();
        let layer = |(overlay, its, state, count)| {
            (OverlayParts { state: overlay, fds: take(its) }, FrozenParts { state, fds: take(count) })
        };
        let layers = layers.into_iter().map(layer).collect();
        rest.next().is_none().then_some(Self { files, layers })
    }

    fn descriptors(&self) -> usize {
        self.message().1.len()
    }

    fn try_clone(&self) -> io::Result<Self> {
        let files = self.files.iter().map(FrozenParts::try_clone).collect::<io::Result<_>>()?;
        let layer = |(overlay, part): &(OverlayParts, FrozenParts)| Ok((overlay.try_clone()?, part.try_clone()?));
        let layers = self.layers.iter().map(layer).collect::<io::Result<_>>()?;
        Ok(Self { files, layers })
    }

    /// A disk that has an image that nobody writes under what this VM writes, which is kept in the folder `overlays`.
    ///
    /// # Errors
    /// As [`DiskParts::open`].
    pub fn open_over(
        image: &Arc<Disk>,
        config: &DiskConfig,
        overlays: &Path,
    ) -> Result<(Disk, Arc<LayeredDisk>), ErrorBody> {
        let files = image.files().and_then(|files| files.iter().map(FrozenParts::of_read_only).collect());
        let files = files.map_err(|e| {
            ErrorBody::new(ErrorCode::ImageUnusable, format!("disk '{}' cannot have an overlay: {e}", config.id))
        })?;
        let (disk, layers) = Self { files, layers: Vec::new() }.open(config, overlays)?;
        let LayeredDisk { parts, overlay, .. } =
            Arc::into_inner(layers).ok_or_else(|| ErrorBody::internal("a new disk is shared"))?;
        Ok((disk, Arc::new(LayeredDisk { parts, overlay, _image: Some(Arc::clone(image)) })))
    }

    /// The disk: what it held at the fork, under what this VM writes, which is kept in the folder `overlays`.
    ///
    /// # Errors
    /// When the parts do not fit, or there is no place for the overlay.
    pub fn open(self, config: &DiskConfig, overlays: &Path) -> Result<(Disk, Arc<LayeredDisk>), ErrorBody> {
        let told = |e: io::Error| {
            ErrorBody::new(ErrorCode::ForkFailed, format!("disk '{}' cannot be put together: {e}", config.id))
        };
        let kept = self.try_clone().map_err(told)?;
        let mut files: Vec<Arc<dyn ReadDisk>> = Vec::new();
        for parts in self.files {
            let file = FrozenFile::open(parts).map_err(|e| told(io::Error::other(e)))?;
            files.push(Arc::new(Frozen(Arc::new(file))));
        }
        let format = image_format(config);
        let mut below: Arc<dyn Bytes> = Arc::new(Image(open_frozen(files, format).map_err(told)?));
        for (overlay, parts) in self.layers {
            let view = OverlayView::open(overlay, below).map_err(|e| told(io::Error::other(e)))?;
            let frozen = FrozenFile::open_layer(parts, Arc::new(view)).map_err(|e| told(io::Error::other(e)))?;
            below = Arc::new(frozen);
        }
        let overlay = Overlay::new(below, overlays).map_err(|e| {
            let hint = format!(
                "'civic fork --overlay-dir', 'civic run --forks dir=DIR' say where its writes go; now {}",
                overlays.display()
            );
            told(e).with_hint(hint)
        })?;
        let overlay = Arc::new(overlay);
        let disk = Disk::plugged(Arc::new(Layers(Arc::clone(&overlay))), config.read_only).map_err(told)?;
        Ok((disk, Arc::new(LayeredDisk { parts: kept, overlay, _image: None })))
    }
}

/// What is in a disk's image, in the device's own words.
pub fn image_format(config: &DiskConfig) -> DiskFormat {
    match config.format {
        civic_api::DiskFormat::Raw => DiskFormat::Raw,
        civic_api::DiskFormat::Qcow2 => DiskFormat::Qcow2,
    }
}

/// What a disk consists of that is more than an image.
pub struct LayeredDisk {
    parts: DiskParts,
    overlay: Arc<Overlay>,
    /// Keeps others from writing it.
    _image: Option<Arc<Disk>>,
}

/// A frozen file, as the image formats' reader wants it.
struct Frozen(Arc<FrozenFile>);

impl ReadDisk for Frozen {
    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset)
    }
}

/// A frozen disk, as an overlay wants it.
struct Image(Arc<dyn ReadDisk>);

impl Bytes for Image {
    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset)
    }
}

/// An overlay, as the block device wants it.
struct Layers(Arc<Overlay>);

impl ReadDisk for Layers {
    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset)
    }
}

impl WriteDisk for Layers {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.zero(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)
    }
}
