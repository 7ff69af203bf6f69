//! A disk's way through a fork, `devices` and `fork` together, without a machine: an image is frozen, its file becomes another's byte
//! by byte, and a child, and a child of that child, still have the disk of before.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use civic_devices::virtio::block::{BeforeWrite, Disk, DiskFormat, DiskOptions, ReadDisk, WriteDisk, open_frozen};
use civic_fork::disk::{
    Bytes, Freezer, FreezerOptions, FrozenFile, FrozenParts, Generation, Overlay, OverlayView, reopen_read_only,
};

/// What of `fork` can be read, for `devices`.
struct Out<T>(T);

impl<T: Bytes> ReadDisk for Out<T> {
    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset)
    }
}

impl WriteDisk for Out<Overlay> {
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

/// What `devices` made readable, for `fork`.
struct In<T: ?Sized>(Arc<T>);

impl<T: ReadDisk + ?Sized> Bytes for In<T> {
    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset)
    }
}

struct Hook(Arc<Freezer>);

impl BeforeWrite for Hook {
    fn before_write(&self, range: Range<u64>) {
        self.0.before_write(range);
    }

    fn needs(&self, range: Range<u64>) -> bool {
        self.0.needs(range)
    }
}

fn options() -> FreezerOptions {
    FreezerOptions { store: std::env::temp_dir(), limit: 1 << 30, reflink: None }
}

fn all(disk: &dyn ReadDisk) -> Vec<u8> {
    let mut bytes = vec![1; disk.size().unwrap() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn qemu_img(dir: &Path, args: &[&str]) {
    let out = Command::new("qemu-img").current_dir(dir).args(args).output();
    let out = out.expect("this test needs qemu-img: `cargo xtask setup` installs it");
    assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// The disk that a child reads: the frozen image, and what that builds upon.
fn child_of(disk: &Disk, generation: &Generation, format: DiskFormat) -> Arc<dyn ReadDisk> {
    let mut parts = vec![generation.parts().unwrap()];
    parts.extend(disk.files().unwrap()[1..].iter().map(|file| FrozenParts::of_read_only(file).unwrap()));
    let files = parts.into_iter().map(|parts| Arc::new(Out(FrozenFile::open(parts).unwrap())) as Arc<dyn ReadDisk>);
    open_frozen(files.collect(), format).unwrap()
}

fn numbered(bytes: usize, salt: usize) -> Vec<u8> {
    (0..bytes / 512).flat_map(|sector| [((sector * 7 + salt) % 255) as u8 + 1; 512]).collect()
}

/// Freezes `dir/disk`, gives its file the bytes of `dir/other`, and looks what children have.
fn a_fork_keeps(dir: &Path, format: DiskFormat, contents: &[u8]) {
    let path = dir.join("disk");
    let disk = Disk::open(&path, DiskOptions { format, backing: true, read_only: false }).unwrap();
    let file = disk.files().unwrap().swap_remove(0);
    let never = |_, _| unreachable!("nothing is given up");
    let freezer = Freezer::over_file(reopen_read_only(&file).unwrap(), options(), Box::new(never)).unwrap();
    let hook: Arc<dyn BeforeWrite> = Arc::new(Hook(Arc::clone(&freezer)));
    disk.watch(Some(Arc::clone(&hook)));
    disk.write_back().unwrap();
    let generation = freezer.freeze().unwrap();
    let early = child_of(&disk, &generation, format);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let other = fs::read(dir.join("other")).unwrap();
            for (n, bytes) in other.chunks(5000).enumerate() {
                let at = n as u64 * 5000;
                hook.before_write(at..at + bytes.len() as u64);
                file.write_all_at(bytes, at).unwrap();
            }
            let end = file.metadata().unwrap().len();
            hook.before_write(other.len() as u64..end);
            file.set_len(other.len() as u64).unwrap();
            over.store(true, Ordering::Release);
        });
        while !over.load(Ordering::Acquire) {
            assert!(all(&*early) == contents);
        }
    });
    assert!(all(&*early) == contents && fs::read(&path).unwrap() == fs::read(dir.join("other")).unwrap());
    // As the child's block device has it.
    let child = Arc::new(Out(Overlay::new(Arc::new(In(child_of(&disk, &generation, format))), dir).unwrap()));
    let child_disk = Disk::plugged(Arc::clone(&child) as _, false).unwrap();
    assert_eq!(child_disk.len(), contents.len() as u64);
    child.write_at(&[9; 700], 100).unwrap();
    let mut changed = contents.to_vec();
    changed[100..800].fill(9);
    assert!(all(&*child) == changed);

    let layer = Freezer::over(Arc::new(In(Arc::clone(&child))), options(), Box::new(never)).unwrap();
    let second = layer.freeze().unwrap();
    let view = OverlayView::open(child.0.parts().unwrap(), Arc::new(In(child_of(&disk, &generation, format)))).unwrap();
    let grandchild = FrozenFile::open_layer(second.parts().unwrap(), Arc::new(view)).unwrap();
    let grandchild = Out(Overlay::new(Arc::new(grandchild), dir).unwrap());
    layer.before_write(0..300);
    child.write_at(&[8; 300], 0).unwrap();
    assert!(all(&grandchild) == changed && all(&*child) != changed);
}

#[test]
fn a_raw_disk() {
    let dir = tempfile::tempdir().unwrap();
    let contents = numbered(3 << 20, 0);
    fs::write(dir.path().join("disk"), &contents).unwrap();
    fs::write(dir.path().join("other"), numbered(3 << 20, 1)).unwrap();
    a_fork_keeps(dir.path(), DiskFormat::Raw, &contents);
}

#[test]
fn a_qcow2_image_and_what_it_builds_upon() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut contents = numbered(3 << 20, 0);
    fs::write(dir.join("base"), &contents).unwrap();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base", "disk"]);
    let script = ["-c", "write -q -P 7 70k 600k", "-c", "write -q -z 1M 64k", "disk"];
    let out = Command::new("qemu-io").current_dir(dir).args(script).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    contents[70 << 10..670 << 10].fill(7);
    contents[1 << 20..(1 << 20) + (64 << 10)].fill(0);
    // Shorter, with other clusters, and other things in the same place.
    File::create(dir.join("more")).unwrap().write_all_at(&numbered(1 << 19, 3), 0).unwrap();
    qemu_img(dir, &["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", "more", "other"]);
    a_fork_keeps(dir, DiskFormat::Qcow2, &contents);
}
