//! A disk whose changes someone wants to know of, and disks whose bytes are elsewhere.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES};

use super::images::{Folder, QCOW2};
use super::load::{SLOT, Slots, exercise, many_queues};
use super::trim::ask;
use super::*;
use crate::virtio::block::job::Target;

const QUEUES: usize = 3;
const CLUSTER: u64 = 4096;

/// Keeps what a file held when this was made: a small model of what a fork does.
struct Keeper {
    file: File,
    len: u64,
    kept: Mutex<HashMap<u64, Vec<u8>>>,
}

impl Keeper {
    fn new(disk: &Disk) -> Arc<Self> {
        let file = disk.files().unwrap().swap_remove(0);
        let len = file.metadata().unwrap().len();
        Arc::new(Self { file, len, kept: Mutex::default() })
    }

    fn clusters(&self, range: &Range<u64>) -> Range<u64> {
        range.start / CLUSTER..range.end.min(self.len).div_ceil(CLUSTER)
    }

    fn now(&self, cluster: u64) -> Vec<u8> {
        let mut bytes = vec![0; CLUSTER as usize];
        let mut done = 0;
        while let Ok(count @ 1..) = self.file.read_at(&mut bytes[done..], cluster * CLUSTER + done as u64) {
            done += count;
        }
        bytes
    }
}

impl BeforeWrite for Keeper {
    fn before_write(&self, range: Range<u64>) {
        for cluster in self.clusters(&range) {
            self.kept.lock().unwrap().entry(cluster).or_insert_with(|| self.now(cluster));
        }
    }

    fn needs(&self, range: Range<u64>) -> bool {
        let kept = self.kept.lock().unwrap();
        self.clusters(&range).any(|cluster| !kept.contains_key(&cluster))
    }
}

impl ReadDisk for Keeper {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + buffer.len() as u64;
        for cluster in offset / CLUSTER..end.div_ceil(CLUSTER) {
            let kept = self.kept.lock().unwrap();
            let mut bytes = kept.get(&cluster).cloned().unwrap_or_else(|| self.now(cluster));
            let start = cluster * CLUSTER;
            bytes[self.len.saturating_sub(start).min(CLUSTER) as usize..].fill(0);
            let (from, to) = (start.max(offset), (start + CLUSTER).min(end));
            let target = &mut buffer[(from - offset) as usize..(to - offset) as usize];
            target.copy_from_slice(&bytes[(from - start) as usize..(to - start) as usize]);
        }
        Ok(())
    }
}

fn all(disk: &dyn ReadDisk) -> Vec<u8> {
    let mut bytes = vec![1; disk.size().unwrap() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn slots() -> Vec<Slots> {
    (0..QUEUES).map(|i| Slots::new(64, i as u64)).collect()
}

/// Discards and zeroes here and there, writes what is stable, and more that is long.
fn trim(setup: &mut Setup) {
    for n in 0..10_u64 {
        let at = n * 277 % 2000;
        assert_eq!(ask(setup, VIRTIO_BLK_T_DISCARD, &[(at, 100, 0), (at + 200, 16, 0)]), OK);
        assert_eq!(ask(setup, VIRTIO_BLK_T_WRITE_ZEROES, &[(at + 50, 70, 1), (at + 300, 33, 0)]), OK);
        let write = header(VIRTIO_BLK_T_OUT, at + 400);
        assert_eq!(setup.status(&[Part::Say(&write), Part::Say(&vec![n as u8; 300 << 10]), Part::Room(1)]), OK);
        assert_eq!(setup.status(&[Part::Say(&header(VIRTIO_BLK_T_FLUSH, 0)), Part::Room(1)]), OK);
    }
}

/// Loads a disk, freezes it, loads it further, and checks that nothing changed untold.
fn whoever_watches_knows(path: &Path, options: DiskOptions, engine: fn(u16) -> Engine) {
    let mut slots = slots();
    let setup = many_queues(Disk::open(path, options).unwrap(), QUEUES as u16, engine);
    let mut setup = exercise(setup, &mut slots, 300);
    setup.block.pause();
    setup.block.disk.write_back().unwrap();
    let before = std::fs::read(path).unwrap();
    let keeper = Keeper::new(&setup.block.disk);
    setup.block.disk.watch(Some(Arc::clone(&keeper) as _));
    let read = || {
        let mut files: Vec<Arc<dyn ReadDisk>> = vec![Arc::clone(&keeper) as _];
        files.extend(setup.block.disk.files().unwrap().into_iter().skip(1).map(|file| {
            let len = file.metadata().unwrap().len();
            Arc::new(Keeper { file, len, kept: Mutex::default() }) as _
        }));
        open_frozen(files, options.format).unwrap()
    };
    let early = read();
    let contents = all(&*early);
    for (held, bytes) in slots.iter().flat_map(|slots| &slots.holds).zip(contents.chunks(SLOT)) {
        assert!(bytes.iter().all(|byte| byte == held));
    }
    setup.block.resume();
    let mut setup = exercise(setup, &mut slots, 900);
    assert!(all(&*early) == contents);
    trim(&mut setup);
    setup.block.writeback.store(false, Ordering::Relaxed);
    trim(&mut setup);
    setup.block.pause();
    assert!(all(&*keeper) == before);
    assert!(all(&*early) == contents);
    let files = vec![Arc::clone(&keeper) as Arc<dyn ReadDisk>];
    if setup.block.disk.files().unwrap().len() == 1 {
        assert!(all(&*open_frozen(files, options.format).unwrap()) == contents);
    } else {
        assert!(open_frozen(files, options.format).is_err());
    }
    assert!(std::fs::read(path).unwrap() != before);
    // Nobody is told any more.
    setup.block.disk.watch(None);
    let told = keeper.kept.lock().unwrap().len();
    setup.block.resume();
    trim(&mut setup);
    assert_eq!(keeper.kept.lock().unwrap().len(), told);
}

fn raw() -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> =
        (0..QUEUES * 64 * SLOT * 2).map(|n| if n < QUEUES * 64 * SLOT { 0 } else { (n / 512) as u8 }).collect();
    image.as_file().write_all_at(&bytes, 0).unwrap();
    image
}

#[test]
fn no_change_of_a_raw_disk_goes_untold() {
    whoever_watches_knows(raw().path(), DiskOptions::default(), Engine::new);
    whoever_watches_knows(raw().path(), DiskOptions::default(), |_| Engine::direct());
}

#[test]
fn no_change_of_an_image_goes_untold() {
    for (args, engine) in [
        (&[][..], Engine::new as fn(u16) -> Engine),
        (&["-o", "cluster_size=512"], Engine::new),
        (&["-o", "compat=0.10,cluster_size=4096"], Engine::new),
        (&["-o", "lazy_refcounts=on"], |_| Engine::direct()),
    ] {
        let folder = Folder::new();
        let path = folder.create("disk", args, QUEUES * 64 * SLOT * 2);
        whoever_watches_knows(&path, QCOW2, engine);
    }
}

#[test]
fn nor_of_one_that_builds_upon_others() {
    let folder = Folder::new();
    let size = QUEUES * 64 * SLOT * 2;
    // The middle one has the first slots' sectors as zeroes, the others as they are below.
    std::fs::copy(raw().path(), folder.path("base")).unwrap();
    folder.create("middle", &["-F", "raw", "-b", "base"], size);
    let path = folder.create("disk", &["-F", "qcow2", "-b", "middle"], size);
    let options = DiskOptions { backing: true, ..QCOW2 };
    assert_eq!(Disk::open(&path, options).unwrap().files().unwrap().len(), 3);
    whoever_watches_knows(&path, options, Engine::new);
}

#[test]
fn what_is_still_needed_is_not_discarded() {
    let image = raw();
    let features = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD;
    let mut setup = Setup::new(open(image.path(), false).unwrap(), features);
    let start = (QUEUES * 64 * SLOT / 512) as u64;
    let keeper = Keeper::new(&setup.block.disk);
    setup.block.disk.watch(Some(Arc::clone(&keeper) as _));
    let before = std::fs::read(image.path()).unwrap();
    assert_eq!(ask(&mut setup, VIRTIO_BLK_T_DISCARD, &[(start, 64, 0)]), OK);
    assert!(std::fs::read(image.path()).unwrap() == before && keeper.kept.lock().unwrap().is_empty());
    keeper.before_write(start * 512..start * 512 + (64 << 9));
    assert_eq!(ask(&mut setup, VIRTIO_BLK_T_DISCARD, &[(start, 64, 0)]), OK);
    assert!(std::fs::read(image.path()).unwrap() != before && all(&*keeper) == before);
}

/// What imago does to a file only now and then.
#[test]
#[allow(unsafe_code)]
fn nor_does_what_imago_seldom_does() {
    use imago::Storage;
    use imago::storage::PreallocateMode;

    let image = raw();
    let before = std::fs::read(image.path()).unwrap();
    let disk = open(image.path(), false).unwrap();
    let keeper = Keeper::new(&disk);
    disk.watch(Some(Arc::clone(&keeper) as _));
    let Target::File(host) = disk.target() else { unreachable!() };
    let file = image_file::ImageFile::new(host, image.path()).unwrap();
    let len = before.len() as u64;
    let told = || keeper.kept.lock().unwrap().len();
    // SAFETY: nobody else uses the file.
    unsafe { file.pure_discard(len / 2, len / 4) }.unwrap();
    assert!(told() == 0 && std::fs::read(image.path()).unwrap() == before);
    // SAFETY: as above.
    unsafe { file.pure_write_zeroes(len / 2 + 5000, 5000) }.unwrap();
    // SAFETY: as above.
    unsafe { file.pure_write_allocated_zeroes(len / 2 + 50_000, 5000) }.unwrap();
    // SAFETY: as above. These are no longer needed.
    unsafe { file.pure_discard(len / 2 + 8192, 512) }.unwrap();
    assert!((4..8).contains(&told()));
    file.resize(len + 100_000, PreallocateMode::None).unwrap();
    assert!((4..8).contains(&told()));
    file.resize(len - 10_000, PreallocateMode::None).unwrap();
    assert!((7..11).contains(&told()));
    assert!(std::fs::read(image.path()).unwrap()[..] != before[..] && all(&*keeper) == before);
}

#[test]
fn what_is_no_frozen_image_is_refused() {
    let file = |bytes: &[u8]| {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        Arc::new(Keeper { file, len: bytes.len() as u64, kept: Mutex::default() }) as Arc<dyn ReadDisk>
    };
    assert!(open_frozen(Vec::new(), DiskFormat::Raw).is_err() && open_frozen(Vec::new(), DiskFormat::Qcow2).is_err());
    assert!(open_frozen(vec![file(&[1; 512]); 2], DiskFormat::Raw).is_err());
    assert!(open_frozen(vec![file(&[1; 512])], DiskFormat::Qcow2).is_err());
    assert_eq!(all(&*open_frozen(vec![file(&[1; 512])], DiskFormat::Raw).unwrap()), [1; 512]);
    let folder = Folder::new();
    let image = std::fs::read(folder.create("disk", &[], 1 << 20)).unwrap();
    open_frozen(vec![file(&image)], DiskFormat::Qcow2).unwrap();
    assert!(open_frozen(vec![file(&image), file(&[1; 512])], DiskFormat::Qcow2).is_err());
}

/// A disk in this process's memory, whose last sector cannot be used.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn at(&self, offset: u64, len: u64, act: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let mut bytes = self.0.lock().unwrap();
        let end = (offset + len) as usize;
        if end > bytes.len() - 512 {
            return Err(io::ErrorKind::Other.into());
        }
        act(&mut bytes[offset as usize..end]);
        Ok(())
    }
}

impl ReadDisk for Memory {
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.at(offset, buffer.len() as u64, |bytes| buffer.copy_from_slice(bytes))
    }
}

impl WriteDisk for Memory {
    fn write_at(&self, buffer: &[u8], offset: u64) -> io::Result<()> {
        self.at(offset, buffer.len() as u64, |bytes| bytes.copy_from_slice(buffer))
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.at(offset, len, |bytes| bytes.fill(0))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len)
    }
}

#[test]
fn a_disk_can_be_elsewhere() {
    for engine in [Engine::new as fn(u16) -> Engine, |_| Engine::direct()] {
        let memory = Arc::new(Memory(Mutex::new(vec![0; QUEUES * 64 * SLOT * 2])));
        let disk = Disk::plugged(Arc::clone(&memory) as _, false).unwrap();
        assert!(disk.files().unwrap().is_empty());
        let mut slots = slots();
        let mut setup = exercise(many_queues(disk, QUEUES as u16, engine), &mut slots, 1000);
        let bytes = memory.0.lock().unwrap().clone();
        for (held, bytes) in slots.iter().flat_map(|slots| &slots.holds).zip(bytes.chunks(SLOT)) {
            assert!(bytes.iter().all(|byte| byte == held));
        }
        // Its changes are told of like a file's.
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().write_all_at(&bytes, 0).unwrap();
        let keeper = Keeper::new(&open(image.path(), false).unwrap());
        setup.block.disk.watch(Some(Arc::clone(&keeper) as _));
        trim(&mut setup);
        let after = memory.0.lock().unwrap().clone();
        assert!(after != bytes && keeper.kept.lock().unwrap().len() > 100);
        let kept = keeper.kept.lock().unwrap().clone();
        for (cluster, (was, is)) in bytes.chunks(4096).zip(after.chunks(4096)).enumerate() {
            assert!(was == is || kept.contains_key(&(cluster as u64)), "{cluster}");
        }
        let last = (after.len() / 512) as u64 - 1;
        let status =
            |setup: &mut Setup, kind, part| setup.status(&[Part::Say(&header(kind, last)), part, Part::Room(1)]);
        assert_eq!(status(&mut setup, VIRTIO_BLK_T_IN, Part::Room(512)), IOERR);
        assert_eq!(status(&mut setup, VIRTIO_BLK_T_OUT, Part::Say(&[1; 512])), IOERR);
    }
    let empty = |len| Disk::plugged(Arc::new(Memory(Mutex::new(vec![0; len]))), true);
    assert!(empty(0).is_err() && empty(513).is_err() && empty(512).unwrap().read_only());
}
