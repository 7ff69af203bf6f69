mod failing;
mod forked;
mod images;
mod load;
mod trim;

use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};

use super::*;
use crate::virtio::QueuePosition;
use crate::virtio::rate::RateLimit;
use crate::virtio::testing::{
    Attached, Driver, DriverQueue, INDIRECT, NEXT, Offered, Part, WRITE, count, numbered_image, until,
};
use crate::virtio::worker::Handler;

/// Written while a process is started, read by tests that open a disk again as soon as they have closed it.
static FORKS: std::sync::RwLock<()> = std::sync::RwLock::new(());

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

fn open(path: &Path, read_only: bool) -> Result<Disk, DiskError> {
    Disk::open(path, DiskOptions { read_only, ..DiskOptions::default() })
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

struct Setup {
    block: Attached<Block>,
    driver: Driver,
}

impl Setup {
    fn new(disk: Disk, features: u64) -> Self {
        let mut block = Attached::new(Block::new("root", Arc::new(disk), BlockOptions::default()).unwrap());
        let mut driver = Driver::new(&[QUEUE_SIZE]);
        block.activate(driver.activation(features)).unwrap();
        Self { block, driver }
    }

    fn on(image: &tempfile::NamedTempFile) -> Self {
        Self::new(open(image.path(), false).unwrap(), 1 << VIRTIO_BLK_F_FLUSH)
    }

    /// Sends one request; returns its status, used length and parts.
    fn request(&mut self, parts: &[Part<'_>]) -> (u8, u32, Offered) {
        let queue = &mut self.driver.queues[0];
        let offered = queue.offer(parts);
        queue.kick();
        let (head, len) = queue.await_used();
        assert_eq!(head, offered.head);
        let &(at, room) = offered.parts.last().unwrap();
        let status = queue.bytes((at + room as u64 - 1, 1))[0];
        (status, len, offered)
    }

    fn status(&mut self, parts: &[Part<'_>]) -> u8 {
        self.request(parts).0
    }

    fn count(&self, name: &str) -> u64 {
        count(&*self.block.counters(), name)
    }
}

#[test]
fn reads_writes_and_flushes() {
    let image = numbered_image(64);
    let mut setup = Setup::on(&image);
    let read = header(VIRTIO_BLK_T_IN, 3);
    let (status, len, offered) = setup.request(&[Part::Say(&read), Part::Room(700), Part::Room(324), Part::Room(1)]);
    assert_eq!((status, len), (OK, 1025));
    let queue = &setup.driver.queues[0];
    let bytes = [queue.bytes(offered.parts[1]), queue.bytes(offered.parts[2])].concat();
    assert_eq!(bytes, [[3; 512], [4; 512]].concat());

    let write = header(VIRTIO_BLK_T_OUT, 62);
    let data = [0xaa; 1024];
    let (status, len, _) =
        setup.request(&[Part::Say(&write), Part::Say(&data[..100]), Part::Say(&data[100..]), Part::Room(1)]);
    assert_eq!((status, len), (OK, 1));
    assert_eq!(setup.status(&[Part::Say(&header(VIRTIO_BLK_T_FLUSH, 0)), Part::Room(1)]), OK);
    let mut end = [0; 1024];
    image.as_file().read_exact_at(&mut end, 62 * 512).unwrap();
    assert_eq!(end, data);

    assert_eq!((setup.count("reads"), setup.count("read_bytes")), (1, 1024));
    assert_eq!((setup.count("writes"), setup.count("written_bytes")), (1, 1024));
    assert_eq!((setup.count("flushes"), setup.count("errors")), (1, 0));
}

#[test]
fn any_descriptor_layout_will_do() {
    let image = numbered_image(8);
    let mut setup = Setup::on(&image);
    let read = header(VIRTIO_BLK_T_IN, 5);
    // The header in three pieces, the status byte in the data's descriptor.
    let (status, len, offered) =
        setup.request(&[Part::Say(&read[..1]), Part::Say(&read[1..9]), Part::Say(&read[9..]), Part::Room(513)]);
    assert_eq!((status, len), (OK, 513));
    assert_eq!(setup.driver.queues[0].bytes(offered.parts[3])[..512], [5; 512]);
    // The header in the data's descriptor.
    let write = [&header(VIRTIO_BLK_T_OUT, 0)[..], &[9; 512]].concat();
    assert_eq!(setup.status(&[Part::Say(&write), Part::Room(1)]), OK);
    // Empty parts.
    assert_eq!(setup.status(&[Part::Say(&[]), Part::Say(&read), Part::Room(0), Part::Room(513)]), OK);
    let queue = &mut setup.driver.queues[0];
    let offered = queue.offer_indirect(&[Part::Say(&header(VIRTIO_BLK_T_IN, 0)), Part::Room(512), Part::Room(1)]);
    queue.kick();
    assert_eq!(queue.await_used(), (offered.head, 513));
    assert_eq!(queue.bytes(offered.parts[1]), [9; 512]);
}

#[test]
fn tells_its_serial_number() {
    let image = numbered_image(1);
    let mut setup = Setup::on(&image);
    let id = header(VIRTIO_BLK_T_GET_ID, 0);
    let (status, len, offered) = setup.request(&[Part::Say(&id), Part::Room(20), Part::Room(1)]);
    assert_eq!((status, len), (OK, 21));
    assert_eq!(setup.driver.queues[0].bytes(offered.parts[1]), *b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(setup.request(&[Part::Say(&id), Part::Room(30), Part::Room(1)]).1, 20);
    assert_eq!(
        Block::new("a-name-longer-than-twenty-bytes", Arc::clone(&setup.block.disk), BlockOptions::default())
            .unwrap()
            .id,
        *b"a-name-longer-than-t"
    );
}

#[test]
fn refuses_what_is_outside_or_torn_or_unknown() {
    let image = numbered_image(8);
    let mut setup = Setup::on(&image);
    let refused: [(u32, u64, usize, u8); 7] = [
        (VIRTIO_BLK_T_IN, 8, 512, IOERR),
        (VIRTIO_BLK_T_IN, 7, 1024, IOERR),
        (VIRTIO_BLK_T_IN, u64::MAX, 512, IOERR),
        (VIRTIO_BLK_T_IN, u64::MAX / 512, 512, IOERR),
        (VIRTIO_BLK_T_IN, 0, 511, IOERR),
        (0x1234, 0, 512, UNSUPP),
        (11, 0, 512, UNSUPP),
    ];
    for (kind, sector, room, expected) in refused {
        let got = setup.request(&[Part::Say(&header(kind, sector)), Part::Room(room), Part::Room(1)]);
        assert_eq!((got.0, got.1), (expected, 0), "{kind} at {sector}");
    }
    for (sector, len) in [(8, 512), (7, 1024), (0, 100)] {
        let write = header(VIRTIO_BLK_T_OUT, sector);
        assert_eq!(setup.status(&[Part::Say(&write), Part::Say(&vec![1; len]), Part::Room(1)]), IOERR);
    }
    let short = setup.request(&[Part::Say(&[0; 15]), Part::Room(1)]);
    assert_eq!((short.0, short.1), (IOERR, 1));
    assert_eq!(setup.count("errors"), 11);
    // It goes on.
    assert_eq!(setup.status(&[Part::Say(&header(VIRTIO_BLK_T_IN, 0)), Part::Room(512), Part::Room(1)]), OK);
}

#[test]
fn a_read_only_disk_says_so_and_is_not_written() {
    let image = numbered_image(8);
    let disk = open(image.path(), true).unwrap();
    let mut setup = Setup::new(disk, 1 << VIRTIO_BLK_F_FLUSH);
    assert_ne!(setup.block.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(setup.status(&[Part::Say(&header(VIRTIO_BLK_T_OUT, 0)), Part::Say(&[7; 512]), Part::Room(1)]), IOERR);
    assert_eq!(setup.status(&[Part::Say(&header(VIRTIO_BLK_T_FLUSH, 0)), Part::Room(1)]), OK);
    let mut first = [1; 512];
    image.as_file().read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [0; 512]);
}

#[test]
fn what_the_host_cannot_do_is_an_io_error() {
    // ENOSPC on every write; endless zeroes to read.
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let mut setup = Setup::new(Disk::claiming(full, 1 << 20), 1 << VIRTIO_BLK_F_FLUSH);
    assert_eq!(setup.status(&[Part::Say(&header(VIRTIO_BLK_T_OUT, 0)), Part::Say(&[7; 512]), Part::Room(1)]), IOERR);
    // An image that was cut short.
    let image = numbered_image(8);
    let mut setup = Setup::on(&image);
    image.as_file().set_len(1024 + 100).unwrap();
    assert_eq!(setup.status(&[Part::Say(&header(VIRTIO_BLK_T_IN, 1)), Part::Room(512), Part::Room(1)]), OK);
    assert_eq!(setup.status(&[Part::Say(&header(VIRTIO_BLK_T_IN, 2)), Part::Room(512), Part::Room(1)]), IOERR);
    assert_eq!((setup.count("errors"), setup.count("reads")), (1, 1));
}

#[test]
fn event_indices_save_interrupts_and_kicks() {
    let image = numbered_image(8);
    let mut setup = Setup::new(open(image.path(), false).unwrap(), RING_FEATURES | 1 << VIRTIO_BLK_F_FLUSH);
    let flush = header(VIRTIO_BLK_T_FLUSH, 0);
    let queue = &mut setup.driver.queues[0];
    queue.interrupt_after(7);
    for sent in 0..20 {
        queue.offer(&[Part::Say(&flush), Part::Room(1)]);
        // The device asks for the next kick before it sleeps, so this stops being false at some point.
        let _ = queue.kick_if_wanted(1);
        queue.await_used();
        until("a quiet device", || setup.block.counters.flushes.get() == sent + 1);
    }
    // Wait until the device has nothing left to do.
    setup.block.pause();
    assert_eq!(setup.driver.interrupts(), 1);
    setup.block.resume();

    // Without them every completion interrupts.
    setup.block.reset();
    setup.block.activate(setup.driver.activation(1 << VIRTIO_BLK_F_FLUSH)).unwrap();
    for _ in 0..5 {
        setup.request(&[Part::Say(&flush), Part::Room(1)]);
    }
    setup.block.pause();
    assert_eq!(setup.driver.interrupts(), 6);
}

#[test]
fn more_requests_than_a_turn_are_all_served() {
    let image = numbered_image(8);
    let mut setup = Setup::new(open(image.path(), true).unwrap(), RING_FEATURES);
    let flush = header(VIRTIO_BLK_T_FLUSH, 0);
    let queue = &mut setup.driver.queues[0];
    let (mut sent, mut done) = (0, 0);
    while done < 20_000 {
        if sent < 20_000 && sent - done < 100 {
            queue.offer(&[Part::Say(&flush), Part::Room(1)]);
            queue.kick_if_wanted(1);
            sent += 1;
        } else {
            queue.await_used();
            done += 1;
        }
    }
    assert_eq!(setup.count("flushes"), 20_000);
}

#[test]
fn a_pause_holds_requests_and_a_reset_forgets_them() {
    let image = numbered_image(8);
    let mut setup = Setup::on(&image);
    setup.block.pause();
    setup.block.pause();
    let positions = setup.block.positions();
    assert_eq!(positions, [QueuePosition { index: 0, next_avail: 0, next_used: 0 }]);
    let queue = &mut setup.driver.queues[0];
    queue.offer(&[Part::Say(&header(VIRTIO_BLK_T_FLUSH, 0)), Part::Room(1)]);
    queue.kick();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(queue.take_used(), None);
    setup.block.resume();
    setup.block.resume();
    queue.await_used();
    setup.block.pause();
    assert_eq!(setup.block.positions(), [QueuePosition { index: 0, next_avail: 1, next_used: 1 }]);
    setup.block.reset();
    setup.block.reset();
    setup.block.pause();
    setup.block.resume();
    setup.block.activate(setup.driver.activation(0)).unwrap();
    assert_eq!(setup.status(&[Part::Say(&header(VIRTIO_BLK_T_FLUSH, 0)), Part::Room(1)]), OK);
    let mut none = setup.driver.activation(0);
    none.queues.clear();
    setup.block.reset();
    assert!(matches!(setup.block.activate(none), Err(ActivateError::MissingQueue(0))));
}

#[test]
fn broken_chains_need_a_reset_and_get_over_it() {
    let say = |len, flags| (0x10_0000, len, flags, 1);
    let broken: [&[(u64, u32, u16, u16)]; 9] = [
        &[say(16, 0)],                                          // no status byte
        &[say(16, NEXT), (0x20_0000, 0, WRITE, 0)],             // nor here
        &[say(16, NEXT), (0x20_0000, 513, NEXT | WRITE, 0)],    // a loop
        &[say(16, NEXT), (0x20_0000, 513, NEXT | WRITE, 1)],    // a shorter one
        &[say(16, NEXT), (0x20_0000, 513, NEXT | WRITE, 9999)], // next is no index
        &[say(16, NEXT), (u64::MAX - 5, 513, WRITE, 0)],        // wraps around
        &[say(16, NEXT), (0x3f_ff00, 0xffff_ffff, WRITE, 0)],   // reaches outside RAM
        &[say(1, WRITE | NEXT), (0x20_0000, 16, 0, 0)],         // the wrong way round
        &[(0x10_0000, 24, INDIRECT, 0)],                        // a torn indirect table
    ];
    let _no_forks = FORKS.read().unwrap();
    let image = numbered_image(8);
    for chain in broken {
        let mut setup = Setup::on(&image);
        let queue = &mut setup.driver.queues[0];
        for (i, descriptor) in chain.iter().enumerate() {
            queue.set_descriptor(i as u16, *descriptor);
        }
        queue.publish(0);
        queue.kick();
        setup.driver.await_fault();
        assert_eq!(setup.driver.queues[0].take_used(), None, "{chain:?}");
        setup.block.reset();
        setup.block.activate(setup.driver.activation(0)).unwrap();
        assert_eq!(setup.status(&[Part::Say(&header(VIRTIO_BLK_T_FLUSH, 0)), Part::Room(1)]), OK);
    }
    let indices: [fn(&mut DriverQueue); 2] = [|queue| queue.publish(QUEUE_SIZE), |queue| queue.set_available(257)];
    for wrong in indices {
        let mut setup = Setup::on(&image);
        wrong(&mut setup.driver.queues[0]);
        setup.driver.queues[0].kick();
        setup.driver.await_fault();
        setup.driver.queues[0].kick();
        setup.block.pause();
        assert_eq!(setup.driver.interrupt.needs_reset.load(Ordering::SeqCst), 1);
    }
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![0x10_0000_u64..0x10_4000, 0_u64..0x50_0000, Just(0), any::<u64>()];
    let len = prop_oneof![Just(1_u32), Just(16), Just(512), Just(513), 0_u32..5000, any::<u32>()];
    let flags = prop_oneof![8 => 0_u16..4, 1 => 0_u16..8, 1 => any::<u16>()];
    (address, len, flags, prop_oneof![8 => 0_u16..16, 1 => any::<u16>()])
}

proptest! {
    #[test]
    fn no_table_panics_or_hangs_it(
        table in prop::collection::vec(descriptor(), 16),
        // Also where indirect tables point to.
        inner in prop::collection::vec(descriptor(), 64),
        kinds in prop::collection::vec(0_u32..16, 64),
        heads in prop::collection::vec(0_u16..17, 1..16),
        index in prop_oneof![8 => Just(None), 1 => any::<u16>().prop_map(Some)],
    ) {
        let file = numbered_image(64);
        let mut driver = Driver::new(&[16]);
        let mut activation = driver.activation(RING_FEATURES);
        let mut block = Block::new("fuzz", Arc::new(open(file.path(), false).unwrap()), BlockOptions::default()).unwrap();
        let (ring, _) = Ring::take(&mut activation, 0).unwrap();
        let shared = Arc::new(block.shared(RING_FEATURES));
        let mut handler = BlockQueue::new(ring, shared, Engine::new(QUEUE_SIZE), None);
        let queue = &mut driver.queues[0];
        for (i, kind) in kinds.iter().enumerate() {
            let at = vm_memory::GuestAddress(0x10_0000 + 512 * i as u64);
            vm_memory::Bytes::write_slice(&*driver.ram, &header(*kind, i as u64), at).unwrap();
        }
        // Descriptors past the queue's own are an indirect table at an even address.
        for (i, descriptor) in table.iter().chain(&inner).enumerate() {
            queue.set_descriptor(i as u16, *descriptor);
        }
        for head in heads {
            queue.publish(head);
        }
        if let Some(index) = index {
            queue.set_available(index);
        }
        for _ in 0..4 {
            if handler.kicked(0).is_err() {
                break;
            }
        }
        block.reset();
    }
}

#[test]
fn unfit_paths_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    assert!(matches!(open(&path, false), Err(DiskError::Missing(_))));
    assert!(matches!(open(dir.path(), false), Err(DiskError::Directory(_))));
    assert!(matches!(open(dir.path(), true), Err(DiskError::Directory(_))));
    assert!(matches!(open("/dev/null".as_ref(), false), Err(DiskError::NotADisk(_))));
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(open(&path, true), Err(DiskError::NotADisk(_))));
    std::fs::remove_file(&path).unwrap();
    for size in [0, 511, 513] {
        File::create(&path).unwrap().set_len(size).unwrap();
        let refused = open(&path, false).unwrap_err();
        assert!(matches!(refused, DiskError::Size { size: s, .. } if s == size), "{refused}");
        assert!(refused.to_string().contains(&format!("is {size} bytes long")));
    }
    File::create(&path).unwrap().set_len(512).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
    assert_eq!(open(&path, true).unwrap().len(), 512);
    if !nix::unistd::geteuid().is_root() {
        assert!(matches!(open(&path, false), Err(DiskError::Permission { read_only: false, .. })));
    }
}

#[test]
fn a_writable_disk_has_one_user() {
    let _no_forks = FORKS.read().unwrap();
    let image = numbered_image(1);
    let open = |read_only| open(image.path(), read_only);
    let writer = open(false).unwrap();
    assert!(matches!(open(false), Err(DiskError::Locked { .. })));
    assert!(matches!(open(true), Err(DiskError::Locked { .. })));
    drop(writer);
    let readers = (open(true).unwrap(), open(true).unwrap());
    assert!(matches!(open(false), Err(DiskError::Locked { .. })));
    drop(readers);
    open(false).unwrap();
}

#[test]
fn describes_itself() {
    let image = numbered_image(20);
    let block = Block::new("root", Arc::new(open(image.path(), false).unwrap()), BlockOptions::default()).unwrap();
    let mut config = [0xff; 64];
    block.read_config(0, &mut config);
    assert_eq!(config[..8], 20_u64.to_le_bytes());
    assert_eq!(config[12..16], 254_u32.to_le_bytes());
    assert_eq!(config[20..24], 512_u32.to_le_bytes());
    assert_eq!(config[24..28], [3, 0, 8, 0]);
    // Write-back, one queue; 64 MiB in 16 segments to discard or zero, 4 KiB at a time, which may unmap.
    assert_eq!(config[28..36], [0, 0, 0, 0, 1, 0, 1, 0]);
    assert_eq!(config[36..48], [0, 0, 2, 0, 16, 0, 0, 0, 8, 0, 0, 0]);
    assert_eq!(config[48..], [0, 0, 2, 0, 16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(block.features() & 1 << VIRTIO_BLK_F_RO, 0);
}
