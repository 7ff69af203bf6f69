//! Storage that fails: what the host says becomes an I/O error of the request that it is about, and of no other.

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicI32;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::load::many_queues;
use super::trim::ask;
use super::*;

const ENGINES: [fn(u16) -> Engine; 2] = [Engine::new, |_| Engine::direct()];

fn read(setup: &mut Setup, sector: u64, len: usize) -> Result<Vec<u8>, u8> {
    let (status, used, offered) =
        setup.request(&[Part::Say(&header(VIRTIO_BLK_T_IN, sector)), Part::Room(len), Part::Room(1)]);
    if status != OK {
        // Nothing is promised of the data, so nothing is said to have been written.
        assert_eq!(used, 0);
        return Err(status);
    }
    Ok(setup.driver.queues[0].bytes(offered.parts[1]))
}

fn write(setup: &mut Setup, sector: u64, bytes: &[u8]) -> u8 {
    setup.status(&[Part::Say(&header(VIRTIO_BLK_T_OUT, sector)), Part::Say(bytes), Part::Room(1)])
}

fn flush(setup: &mut Setup) -> u8 {
    setup.status(&[Part::Say(&header(VIRTIO_BLK_T_FLUSH, 0)), Part::Room(1)])
}

/// A disk that is this process's memory (`/proc/self/mem`): it gives EIO where nothing is mapped, as below the first page that may
/// be. The sectors from the returned one on are good, as long as the memory lives.
fn half_dead() -> (GuestMemoryMmap, Disk, u64) {
    let good = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let sector = good.get_host_address(GuestAddress(0)).unwrap() as u64 / SECTOR;
    let memory = File::options().read(true).write(true).open("/proc/self/mem").unwrap();
    (good, Disk::claiming(memory, 1 << 47), sector)
}

const DEAD: u64 = 8;

#[test]
fn eio_fails_its_request_and_the_queue_lives_on() {
    for engine in ENGINES {
        let (memory, disk, good) = half_dead();
        let mut setup = many_queues(disk, 1, engine);
        for (round, len) in [512, 4096, 256 << 10].into_iter().enumerate() {
            assert_eq!(read(&mut setup, DEAD, len), Err(IOERR));
            assert_eq!(write(&mut setup, DEAD, &vec![1; len]), IOERR);
            // It can do neither what makes zeroes cheaply nor what that comes to.
            assert_eq!(ask(&mut setup, VIRTIO_BLK_T_WRITE_ZEROES, &[(DEAD, len as u32 / 512, 0)]), IOERR);
            // Nor can it be synced.
            assert_eq!(flush(&mut setup), IOERR);
            let held = vec![round as u8 + 7; len];
            assert_eq!(write(&mut setup, good, &held), OK);
            assert_eq!(read(&mut setup, good, len), Ok(held));
        }
        assert_eq!((setup.count("errors"), setup.count("reads"), setup.count("writes")), (12, 3, 3));
        assert_eq!(setup.driver.interrupt.needs_reset.load(Ordering::SeqCst), 0);
        drop((setup, memory));
    }
}

#[test]
fn requests_that_fail_do_no_harm_to_those_beside_them() {
    const REQUESTS: u64 = 96;
    for engine in ENGINES {
        let (memory, disk, good) = half_dead();
        let mut setup = many_queues(disk, 1, engine);
        for round in 0..20_u64 {
            let slot = |n: u64| n * 4096;
            let mut offered = std::collections::HashMap::new();
            for n in 0..REQUESTS {
                memory.write_slice(&[(round + n) as u8; 4096], GuestAddress(slot(n))).unwrap();
                // Every third is for what is dead.
                let sector = if n % 3 == round % 3 { DEAD } else { good + slot(n) / 512 };
                let header = header(VIRTIO_BLK_T_IN, sector);
                let parts = [Part::Say(&header), Part::Room(4096), Part::Room(1)];
                let chain = setup.driver.queues[0].offer_indirect(&parts);
                offered.insert(chain.head, (n, chain));
            }
            setup.driver.queues[0].kick();
            for _ in 0..REQUESTS {
                let queue = &mut setup.driver.queues[0];
                let (head, len) = queue.await_used();
                let (n, chain) = offered.remove(&head).expect("each is answered once");
                if n % 3 == round % 3 {
                    assert_eq!((queue.bytes(chain.parts[2]), len), (vec![IOERR], 0));
                } else {
                    assert_eq!((queue.bytes(chain.parts[2]), len), (vec![OK], 4097));
                    assert_eq!(queue.bytes(chain.parts[1]), [(round + n) as u8; 4096]);
                }
            }
            setup.block.pause();
            assert_eq!(setup.driver.queues[0].take_used(), None);
            setup.block.resume();
        }
        assert_eq!((setup.count("errors"), setup.count("reads")), (20 * 32, 20 * 64));
    }
}

#[test]
fn enospc_fails_writes_only() {
    for engine in ENGINES {
        // Also what is too long to be written on the spot.
        for len in [512, 512 << 10] {
            let full = File::options().read(true).write(true).open("/dev/full").unwrap();
            let mut setup = many_queues(Disk::claiming(full, 1 << 20), 1, engine);
            assert_eq!(write(&mut setup, 0, &vec![7; len]), IOERR);
            assert_eq!(ask(&mut setup, VIRTIO_BLK_T_WRITE_ZEROES, &[(0, len as u32 / 512, 0)]), IOERR);
            assert_eq!(read(&mut setup, 0, len), Ok(vec![0; len]));
            assert_eq!(setup.count("errors"), 2);
        }
    }
}

#[test]
fn an_image_that_vanishes_fails_reads_and_comes_back() {
    for engine in ENGINES {
        let image = numbered_image(1024);
        let mut setup = many_queues(open(image.path(), false).unwrap(), 1, engine);
        // By name alone: it is there as long as it is open.
        let file = image.reopen().unwrap();
        image.close().unwrap();
        assert_eq!(read(&mut setup, 3, 512), Ok(vec![3; 512]));
        file.set_len(0).unwrap();
        for len in [512, 4096, 256 << 10] {
            assert_eq!(read(&mut setup, 8, len), Err(IOERR));
        }
        assert_eq!(flush(&mut setup), OK);
        file.set_len(1024 * 512).unwrap();
        assert_eq!(read(&mut setup, 8, 4096), Ok(vec![0; 4096]));
        assert_eq!(write(&mut setup, 8, &[9; 512]), OK);
        assert_eq!(read(&mut setup, 8, 512), Ok(vec![9; 512]));
    }
}

/// Bytes elsewhere that fail with a number for as long as that is not zero.
struct Moody(AtomicI32);

impl Moody {
    fn mood(&self) -> io::Result<()> {
        match self.0.load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl ReadDisk for Moody {
    fn size(&self) -> io::Result<u64> {
        Ok(1 << 20)
    }

    fn read_at(&self, buffer: &mut [u8], _: u64) -> io::Result<()> {
        buffer.fill(5);
        self.mood()
    }
}

impl WriteDisk for Moody {
    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        self.mood()
    }

    fn zero(&self, _: u64, _: u64) -> io::Result<()> {
        self.mood()
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        self.mood()
    }
}

#[test]
fn a_disk_elsewhere_may_fail_for_any_reason_and_recover() {
    for engine in ENGINES {
        let moody = Arc::new(Moody(AtomicI32::new(0)));
        let mut setup = many_queues(Disk::plugged(Arc::clone(&moody) as _, false).unwrap(), 1, engine);
        for errno in [libc::EIO, libc::ENOSPC, libc::ENXIO, libc::ENODEV, libc::EINTR, libc::EAGAIN, libc::ETIMEDOUT] {
            for (errno, read_as, status) in [(errno, Err(IOERR), IOERR), (0, Ok(vec![5; 4096]), OK)] {
                moody.0.store(errno, Ordering::SeqCst);
                assert_eq!(read(&mut setup, 0, 4096), read_as, "{errno}");
                assert_eq!(write(&mut setup, 0, &[1; 4096]), status);
                assert_eq!(ask(&mut setup, VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), status);
                assert_eq!(ask(&mut setup, VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 0)]), status);
            }
        }
    }
}

/// ENOSPC needs a full file system, and that root. A file that may not grow is as good: the image finds no place for a new cluster.
#[test]
fn an_image_that_cannot_grow_fails_what_needs_room_and_nothing_else() {
    const CLUSTER: usize = 64 << 10;
    let folder = images::Folder::new();
    let blank = std::fs::read(folder.create("disk", &[], 1 << 20)).unwrap();
    for engine in ENGINES {
        let memory = File::from(memfd_create(c"image", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        memory.write_all_at(&blank, 0).unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", memory.as_raw_fd()));
        let mut setup = many_queues(Disk::open(&path, images::QCOW2).unwrap(), 1, engine);
        assert_eq!(write(&mut setup, 0, &[1; CLUSTER]), OK);
        assert_eq!(flush(&mut setup), OK);
        fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
        let sectors = (CLUSTER / 512) as u64;
        for sector in [4 * sectors, 5 * sectors + 3] {
            assert_eq!(write(&mut setup, sector, &[2; 4096]), IOERR);
            assert_eq!(read(&mut setup, sector, 4096), Ok(vec![0; 4096]));
        }
        assert_eq!(write(&mut setup, 1, &[3; 4096]), OK);
        assert_eq!(flush(&mut setup), OK);
        assert_eq!(read(&mut setup, 0, 512), Ok(vec![1; 512]));
        assert_eq!(read(&mut setup, 1, 4096), Ok(vec![3; 4096]));
        assert!(setup.count("errors") == 2 && setup.driver.interrupt.needs_reset.load(Ordering::SeqCst) == 0);
        // The image is sound: what it holds is where it says, and nothing more is missing than room that was set aside.
        setup.block.pause();
        drop(setup);
        let mut bytes = vec![0; memory.metadata().unwrap().len() as usize];
        memory.read_exact_at(&mut bytes, 0).unwrap();
        std::fs::write(folder.path("after"), bytes).unwrap();
        let checked = folder.path("after");
        let report = images::qemu_img(&["check", "-r", "leaks", "-f", "qcow2", checked.to_str().unwrap()]);
        assert!(report.contains("No errors were found"), "{report}");
    }
}
