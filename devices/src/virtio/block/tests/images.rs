//! qcow2 images, checked by QEMU's own tool: `qemu-img` (Debian's qemu-utils, which `cargo xtask setup` installs).

use std::path::PathBuf;
use std::process::{Command, Stdio};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES};

use super::load::{SLOT, Slots, exercise, many_queues};
use super::trim::ask;
use super::*;

pub const QCOW2: DiskOptions = DiskOptions { read_only: false, format: DiskFormat::Qcow2, backing: false };

#[test]
fn qemu_keeps_off_a_disk_in_use() {
    let folder = Folder::new();
    let path = folder.create("disk", &[], 1 << 20);
    let check = || std::panic::catch_unwind(|| qemu_img(&["check", "-f", "qcow2", &folder.text("disk")]));
    let disk = Disk::open(&path, QCOW2).unwrap();
    let refused = check().unwrap_err();
    assert!(refused.downcast_ref::<String>().unwrap().contains("lock"));
    let _no_forks = FORKS.read().unwrap();
    drop(disk);
    Disk::open(&path, QCOW2).unwrap();
}

#[track_caller]
pub fn qemu_img(args: &[&str]) -> String {
    let mut command = Command::new("qemu-img");
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Between its fork and its exec the child has the locks of this process's other tests.
    let child = {
        let _alone = FORKS.write();
        command.spawn()
    };
    let child = child.expect("these tests need qemu-img: `cargo xtask setup` installs it, or the package qemu-utils");
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub fn create(&self, name: &str, args: &[&str], size: usize) -> PathBuf {
        let (file, size) = (self.text(name), size.to_string());
        qemu_img(&[&["create", "-q", "-f", "qcow2"], args, &[&file, &size]].concat());
        self.path(name)
    }

    /// What QEMU reads from the image; it must find it in order.
    fn contents(&self, name: &str) -> Vec<u8> {
        // Of a copy, because the disk may be in use.
        std::fs::copy(self.path(name), self.path("copy")).unwrap();
        qemu_img(&["check", "-q", "-f", "qcow2", &self.text("copy")]);
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &self.text("copy"), &self.text("contents")]);
        std::fs::read(self.path("contents")).unwrap()
    }
}

fn holds(slots: &[Slots], bytes: &[u8]) {
    for (held, bytes) in slots.iter().flat_map(|slots| &slots.holds).zip(bytes.chunks(SLOT)) {
        assert!(bytes.iter().all(|byte| byte == held));
    }
}

fn load_image(args: &[&str], engine: fn(u16) -> Engine) {
    let folder = Folder::new();
    let path = folder.create("disk", args, 2 * 64 * SLOT);
    let setup = many_queues(Disk::open(&path, QCOW2).unwrap(), 2, engine);
    let mut slots: Vec<_> = (0..2).map(|i| Slots::new(64, i)).collect();
    let mut setup = exercise(setup, &mut slots, 1000);
    // While it is paused the image is whole, for whoever copies it then.
    setup.block.pause();
    holds(&slots, &folder.contents("disk"));
    drop(setup);
    holds(&slots, &folder.contents("disk"));
}

#[test]
fn an_image_holds_what_was_written_under_load() {
    load_image(&[], Engine::new);
    load_image(&["-o", "cluster_size=4096"], Engine::new);
    load_image(&["-o", "compat=0.10,cluster_size=512"], Engine::new);
}

#[test]
fn and_without_an_io_uring() {
    load_image(&[], |_| Engine::direct());
}

#[test]
fn a_driver_that_cannot_flush_has_the_image_on_the_disk() {
    let folder = Folder::new();
    let path = folder.create("disk", &[], 1 << 20);
    let mut setup = Setup::new(Disk::open(&path, QCOW2).unwrap(), 0);
    assert_eq!(setup.status(&[Part::Say(&header(VIRTIO_BLK_T_OUT, 5)), Part::Say(&[7; 512]), Part::Room(1)]), OK);
    // Not paused: the answer alone says that it is there.
    let bytes = folder.contents("disk");
    assert_eq!((&bytes[5 * 512..6 * 512], bytes[6 * 512]), (&[7; 512][..], 0));
}

#[test]
fn ranges_are_zeroed_and_discarded_while_others_are_written() {
    for args in [&[][..], &["-o", "compat=0.10"]] {
        let folder = Folder::new();
        let path = folder.create("disk", args, 64 << 20);
        let mut setup = many_queues(Disk::open(&path, QCOW2).unwrap(), 2, Engine::new);
        let whole = vec![3; 128 << 10];
        for round in 0..40_u64 {
            // In the upper half on one queue, in the lower on the other.
            let write = header(VIRTIO_BLK_T_OUT, 65_536 + 256 * (round % 8));
            setup.driver.queues[1].offer(&[Part::Say(&write), Part::Say(&whole), Part::Room(1)]);
            setup.driver.queues[1].kick();
            let at = 256 * (round % 8);
            assert_eq!(setup.status(&[Part::Say(&header(VIRTIO_BLK_T_OUT, at)), Part::Say(&whole), Part::Room(1)]), OK);
            assert_eq!(ask(&mut setup, VIRTIO_BLK_T_DISCARD, &[(at, 256, 0), (at + 3, 200, 0)]), OK);
            assert_eq!(ask(&mut setup, VIRTIO_BLK_T_WRITE_ZEROES, &[(at + 3, 130, 1), (at + 150, 50, 0)]), OK);
            setup.driver.queues[1].await_used();
            let read = setup.request(&[Part::Say(&header(VIRTIO_BLK_T_IN, at)), Part::Room(128 << 10), Part::Room(1)]);
            let bytes = setup.driver.queues[0].bytes(read.2.parts[1]);
            let zero =
                |range: std::ops::Range<usize>| bytes[range.start * 512..range.end * 512].iter().all(|b| *b == 0);
            assert!(zero(3..133) && zero(150..200), "round {round}");
        }
        assert_eq!(setup.count("errors"), 0);
        drop(setup);
        let bytes = folder.contents("disk");
        assert!(bytes[32 << 20..33 << 20].iter().all(|byte| *byte == 3));
        assert!(bytes[33 << 20..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn compressed_clusters_are_read_and_overwritten() {
    let folder = Folder::new();
    let bytes: Vec<u8> = (0..1 << 20).map(|i: u32| (i / 512) as u8).collect();
    std::fs::write(folder.path("raw"), &bytes).unwrap();
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", &folder.text("raw"), &folder.text("disk")]);
    let mut setup = Setup::new(Disk::open(&folder.path("disk"), QCOW2).unwrap(), 1 << VIRTIO_BLK_F_FLUSH);
    let read = setup.request(&[Part::Say(&header(VIRTIO_BLK_T_IN, 100)), Part::Room(400 << 10), Part::Room(1)]);
    assert_eq!(setup.driver.queues[0].bytes(read.2.parts[1]), bytes[51_200..51_200 + (400 << 10)]);
    assert_eq!(setup.status(&[Part::Say(&header(VIRTIO_BLK_T_OUT, 7)), Part::Say(&[9; 1024]), Part::Room(1)]), OK);
    drop(setup);
    let now = folder.contents("disk");
    assert_eq!((&now[..7 * 512], &now[9 * 512..]), (&bytes[..7 * 512], &bytes[9 * 512..]));
    assert_eq!(now[7 * 512..9 * 512], [9; 1024]);
}

#[test]
fn backing_files_are_used_only_if_the_user_says_so() {
    let folder = Folder::new();
    std::fs::write(folder.path("base"), vec![5; 1 << 20]).unwrap();
    let middle = ["-b", "base", "-F", "raw"];
    folder.create("middle", &middle, 1 << 20);
    let path = folder.create("disk", &["-b", "middle", "-F", "qcow2"], 2 << 20);
    assert!(
        matches!(Disk::open(&path, QCOW2), Err(DiskError::Backing { backing, .. }) if backing == Path::new("middle"))
    );
    let allowed = DiskOptions { backing: true, ..QCOW2 };
    let mut setup = Setup::new(Disk::open(&path, allowed).unwrap(), 1 << VIRTIO_BLK_F_FLUSH);
    // They are held against writers, and never written.
    assert!(matches!(open(&folder.path("base"), false), Err(DiskError::Locked { .. })));
    assert!(matches!(Disk::open(&folder.path("middle"), allowed), Err(DiskError::Locked { .. })));
    assert_eq!(setup.status(&[Part::Say(&header(VIRTIO_BLK_T_OUT, 1)), Part::Say(&[6; 512]), Part::Room(1)]), OK);
    let read = setup.request(&[Part::Say(&header(VIRTIO_BLK_T_IN, 0)), Part::Room(2 << 20), Part::Room(1)]);
    let bytes = setup.driver.queues[0].bytes(read.2.parts[1]);
    let expected = [vec![5; 512], vec![6; 512], vec![5; (1 << 20) - 1024], vec![0; 1 << 20]].concat();
    assert!(read.0 == OK && bytes == expected);
    drop(setup);
    assert!(folder.contents("disk") == expected);
    assert!(std::fs::read(folder.path("base")).unwrap().iter().all(|byte| *byte == 5));
}

#[test]
fn images_that_lead_astray_are_refused() {
    let folder = Folder::new();
    let allowed = DiskOptions { backing: true, ..QCOW2 };
    let refused = |path: &Path, options| match Disk::open(path, options) {
        Err(DiskError::Image { source, .. }) => source.to_string(),
        other => panic!("{other:?}"),
    };
    // Its own backing file, read only so that its lock is not in the way.
    folder.create("base", &[], 1 << 20);
    let path = folder.create("loop", &["-b", "base", "-F", "qcow2"], 1 << 20);
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", "loop", "-F", "qcow2", &folder.text("loop")]);
    assert!(refused(&path, DiskOptions { read_only: true, ..allowed }).contains("is its own"));
    // A format that would have to be guessed: the header's name for it taken out.
    let path = folder.create("guess", &["-b", "base", "-F", "qcow2"], 1 << 20);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(4).position(|window| window == 0xe279_2aca_u32.to_be_bytes()).unwrap();
    bytes[at..at + 4].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    assert!(refused(&path, allowed).contains("of which format"));
    let path =
        folder.create("data", &["-o", &format!("data_file={},data_file_raw=on", folder.text("secret"))], 1 << 20);
    assert!(refused(&path, allowed).contains("in another file"));
    std::fs::write(folder.path("raw"), [0; 1024]).unwrap();
    refused(&folder.path("raw"), QCOW2);
    assert!(matches!(Disk::open(&folder.create("odd", &[], 700), QCOW2), Ok(disk) if disk.len() == 1024));
    // As raw it is what it is, whatever it looks like.
    assert!(matches!(open(&folder.path("base"), false), Err(DiskError::Size { .. })));
}

#[test]
fn what_somebody_cuts_off_an_image_or_its_base_is_an_error() {
    const LOST: u64 = 1 << 10;
    let folder = Folder::new();
    let open = || Disk::open(&folder.path("disk"), DiskOptions { backing: true, ..QCOW2 }).unwrap();
    let ask = |setup: &mut Setup, kind, sector, part: Part<'_>| {
        let (status, _, offered) = setup.request(&[Part::Say(&header(kind, sector)), part, Part::Room(1)]);
        (status, setup.driver.queues[0].bytes(offered.parts[1]))
    };
    let cut = |name: &str| {
        let file = File::options().write(true).open(folder.path(name)).unwrap();
        file.set_len(file.metadata().unwrap().len() / 4).unwrap();
    };
    std::fs::write(folder.path("base"), vec![5; 1 << 20]).unwrap();
    folder.create("disk", &["-b", "base", "-F", "raw"], 1 << 20);

    let mut setup = Setup::new(open(), 0);
    assert_eq!(ask(&mut setup, VIRTIO_BLK_T_IN, LOST, Part::Room(512)), (OK, vec![5; 512]));
    cut("base");
    assert_eq!(ask(&mut setup, VIRTIO_BLK_T_IN, LOST, Part::Room(512)).0, IOERR);
    assert_eq!(ask(&mut setup, VIRTIO_BLK_T_OUT, LOST, Part::Say(&[7; 512])).0, IOERR, "not all of a cluster");
    assert_eq!(ask(&mut setup, VIRTIO_BLK_T_IN, 0, Part::Room(512)), (OK, vec![5; 512]));
    assert_eq!(ask(&mut setup, VIRTIO_BLK_T_OUT, LOST, Part::Say(&vec![7; 1 << 16])).0, OK);
    assert_eq!(ask(&mut setup, VIRTIO_BLK_T_IN, LOST, Part::Room(512)), (OK, vec![7; 512]));
    drop(setup);

    let mut setup = Setup::new(open(), 0);
    cut("disk");
    assert_eq!(ask(&mut setup, VIRTIO_BLK_T_IN, LOST, Part::Room(512)).0, IOERR);
}

/// The big-endian number at `at`.
fn number(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

#[test]
fn an_image_that_counts_its_header_as_free_is_refused() {
    let folder = Folder::new();
    for (version, bits) in [("0.10", 16), ("1.1", 1), ("1.1", 8), ("1.1", 16), ("1.1", 64)] {
        let options = format!("compat={version},refcount_bits={bits}");
        let path = folder.create("disk", &["-o", &options], 1 << 20);
        drop(Disk::open(&path, QCOW2).unwrap());
        let whole = std::fs::read(&path).unwrap();
        let counts = number(&whole, number(&whole, 48)) as usize;
        for (at, without) in [(48, &[0; 8][..]), (56, &[0; 4]), (counts, &vec![0; 8_usize.min(bits)])] {
            let mut bytes = whole.clone();
            // Of the bits in the first byte the lowest is the header's.
            let kept = if bits == 1 && at == counts { bytes[at] & !1 } else { 0 };
            bytes[at..at + without.len()].copy_from_slice(without);
            bytes[at] = kept;
            std::fs::write(&path, &bytes).unwrap();
            let refused = Disk::open(&path, QCOW2);
            let said = |error: &DiskError| match error {
                DiskError::Image { source, .. } => source.to_string().contains("reference counts"),
                _ => false,
            };
            assert!(refused.as_ref().is_err_and(said), "{options}, {at}: {refused:?}");
            // Nobody allocates anything there.
            Disk::open(&path, DiskOptions { read_only: true, ..QCOW2 }).unwrap();
        }
    }
}

#[test]
fn an_image_that_comes_to_count_its_header_as_free_keeps_it() {
    let folder = Folder::new();
    let raw = File::create(folder.path("raw")).unwrap();
    raw.write_all_at(&[5; 1 << 16], 0).unwrap();
    raw.set_len(4 << 20).unwrap();
    let (raw, disk) = (folder.text("raw"), folder.text("disk"));
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", &raw, &disk]);
    let mut bytes = std::fs::read(folder.path("disk")).unwrap();
    let clusters = (number(&bytes, number(&bytes, 40)) & ((1 << 56) - 512)) as usize;
    // The first cluster is compressed in the image's header, where it is freed once it is overwritten; the second is nowhere.
    let entries = [(1_u64 << 62).to_be_bytes(), [0; 8]].concat();
    bytes[clusters..clusters + entries.len()].copy_from_slice(&entries);
    // For one, data are wanted in its place; for the other first a table.
    for sector in [8, 4096] {
        // Each its own: another test that is just starting a program holds this process's locks for a moment.
        let path = folder.path(&format!("disk{sector}"));
        std::fs::write(&path, &bytes).unwrap();
        let mut setup = Setup::new(Disk::open(&path, QCOW2).unwrap(), 1 << VIRTIO_BLK_F_FLUSH);
        let mut write = |sector| {
            setup.status(&[Part::Say(&header(VIRTIO_BLK_T_OUT, sector)), Part::Say(&[7; 4096]), Part::Room(1)])
        };
        assert_eq!((write(0), write(sector)), (OK, IOERR));
        assert_eq!(write(16), OK, "what has its place can be written");
        drop(setup);
        assert_eq!(std::fs::read(&path).unwrap()[..512], bytes[..512]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_image_panics_or_hangs_it(
        holes in prop::collection::vec((0_usize..1 << 19, prop::collection::vec(any::<u8>(), 1..9)), 0..12),
        early in prop::collection::vec((0_usize..112, any::<u8>()), 0..3),
        cut in prop_oneof![Just(usize::MAX), 0_usize..1 << 19],
    ) {
        static WHOLE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let whole = WHOLE.get_or_init(|| {
            let folder = Folder::new();
            std::fs::write(folder.path("raw"), vec![5; 1 << 18]).unwrap();
            let (raw, disk) = (folder.text("raw"), folder.text("disk"));
            qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", &raw, &disk]);
            std::fs::read(disk).unwrap()
        });
        let mut bytes = whole.clone();
        for (at, hole) in holes {
            // The tables are in the first clusters.
            let at = at % (bytes.len() - 8).min(if at % 2 == 0 { 0x6000 } else { usize::MAX });
            bytes[at..at + hole.len()].copy_from_slice(&hole);
        }
        early.into_iter().for_each(|(at, byte)| bytes[at] = byte);
        bytes.truncate(cut);
        let image = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(image.path(), &bytes).unwrap();
        if let Ok(disk) = Disk::open(image.path(), QCOW2) {
            let mut setup = Setup::new(disk, 1 << VIRTIO_BLK_F_FLUSH);
            for round in 0..8 {
                let read = header(VIRTIO_BLK_T_IN, 64 * round);
                setup.status(&[Part::Say(&read), Part::Room(32 << 10), Part::Room(1)]);
                let write = header(VIRTIO_BLK_T_OUT, 64 * round + 3);
                setup.status(&[Part::Say(&write), Part::Say(&[1; 4096]), Part::Room(1)]);
            }
            setup.status(&[Part::Say(&header(VIRTIO_BLK_T_FLUSH, 0)), Part::Room(1)]);
        }
    }
}
