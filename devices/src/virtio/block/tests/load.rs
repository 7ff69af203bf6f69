//! Many requests in flight: none is lost, doubled or mixed up, whatever happens meanwhile. And how fast it goes.

use std::time::{Duration, Instant};

use super::*;

/// Offers requests of `len` bytes at random places until `time` is over, `depth` at a time; returns how many.
fn hammer(setup: &mut Setup, kind: u32, (len, depth): (usize, usize), sectors: u64, time: Duration) -> u64 {
    let (mut done, mut flying) = (0, 0);
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let data = vec![0x5a; len];
    let start = Instant::now();
    let queue = &mut setup.driver.queues[0];
    queue.interrupt_after(0);
    while start.elapsed() < time || flying > 0 {
        let mut added = 0;
        while flying < depth && start.elapsed() < time {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let header = header(kind, seed % (sectors - len as u64 / 512) / 8 * 8);
            match kind {
                VIRTIO_BLK_T_IN => queue.offer(&[Part::Say(&header), Part::Room(len), Part::Room(1)]),
                _ => queue.offer(&[Part::Say(&header), Part::Say(&data), Part::Room(1)]),
            };
            flying += 1;
            added += 1;
        }
        if added > 0 {
            queue.kick_if_wanted(added);
        }
        while queue.take_used().is_some() {
            flying -= 1;
            done += 1;
        }
        std::thread::yield_now();
    }
    done
}

/// Processor time of this process without this thread: the workers', those of the kernel among them.
fn others_time() -> Duration {
    use nix::sys::resource::{UsageWho, getrusage};
    let spent = |who| {
        let usage = getrusage(who).unwrap();
        let (user, system) = (usage.user_time(), usage.system_time());
        Duration::from_micros(
            (1_000_000 * (user.tv_sec() + system.tv_sec()) + user.tv_usec() + system.tv_usec()) as u64,
        )
    };
    spent(UsageWho::RUSAGE_SELF).saturating_sub(spent(UsageWho::RUSAGE_THREAD))
}

/// Run by hand: `cargo test --release -p civic-devices -- --ignored --nocapture how_fast`. Its images are in TMPDIR.
///
/// `qemu-img bench -f qcow2 -d 32 -s 4096 -c 100000 [-w] IMAGE` is what QEMU does on one thread, without a guest's rings.
#[test]
#[ignore = "measures; run it by hand"]
fn how_fast_the_engines_are() {
    let bytes: u64 = 256 << 20;
    let image = tempfile::NamedTempFile::new().unwrap();
    let chunk = vec![7; 1 << 20];
    (0..bytes >> 20).for_each(|i| image.as_file().write_all_at(&chunk, i << 20).unwrap());
    let folder = images::Folder::new();
    let (raw, qcow2) = (image.path().to_str().unwrap(), folder.path("disk"));
    images::qemu_img(&["convert", "-f", "raw", "-O", "qcow2", raw, qcow2.to_str().unwrap()]);
    let measure = |disk: Disk, engine, kind, (len, depth)| {
        let mut setup = many_queues(disk, 1, engine);
        let (before, time) = (others_time(), Duration::from_millis(1500));
        let count = hammer(&mut setup, kind, (len, depth), bytes / 512, time);
        let spent = (others_time() - before).as_secs_f64() * 1e6 / count as f64;
        format!("{:.0}/s, {spent:.1} us each", count as f64 / time.as_secs_f64())
    };
    for (name, kind) in [("read", VIRTIO_BLK_T_IN), ("write", VIRTIO_BLK_T_OUT)] {
        for shape in [(4096, 1), (4096, 32), (131_072, 1), (131_072, 8)] {
            println!("{name} {} bytes, {} at a time:", shape.0, shape.1);
            println!("  direct   {}", measure(open(image.path(), false).unwrap(), |_| Engine::direct(), kind, shape));
            println!("  io_uring {}", measure(open(image.path(), false).unwrap(), Engine::new, kind, shape));
            println!("  qcow2    {}", measure(Disk::open(&qcow2, images::QCOW2).unwrap(), Engine::new, kind, shape));
        }
    }
}

/// Reads and writes of a region of its own for each of many slots, verified against what the slot must hold.
pub struct Slots {
    /// What each slot holds, once its write has landed.
    pub holds: Vec<u8>,
    /// By head: the slot, and what is being written or where it is read to.
    flying: std::collections::HashMap<u16, (usize, Offered, Option<u8>)>,
    seed: u64,
    pub landed: usize,
}

pub const SLOT: usize = 8192;

impl Slots {
    pub fn new(count: usize, seed: u64) -> Self {
        Self { holds: vec![0; count], flying: std::collections::HashMap::new(), seed, landed: 0 }
    }

    fn random(&mut self) -> usize {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33) as usize
    }

    /// Offers a request on a slot that nothing is in flight for. `base` is the first slot's place on the disk.
    fn offer(&mut self, queue: &mut DriverQueue, base: usize) {
        let slot = self.random() % self.holds.len();
        if self.flying.values().any(|(busy, ..)| *busy == slot) {
            return;
        }
        let sector = ((base + slot) * SLOT / 512) as u64;
        let cut = 1 + self.random() % (SLOT - 1);
        let (offered, value) = if self.random().is_multiple_of(2) {
            let value = self.random() as u8;
            let bytes = vec![value; SLOT];
            let header = header(VIRTIO_BLK_T_OUT, sector);
            let parts = [Part::Say(&header), Part::Say(&bytes[..cut]), Part::Say(&bytes[cut..]), Part::Room(1)];
            (queue.offer_indirect(&parts), Some(value))
        } else {
            let header = header(VIRTIO_BLK_T_IN, sector);
            let parts = [Part::Say(&header), Part::Room(cut), Part::Room(SLOT - cut), Part::Room(1)];
            (queue.offer_indirect(&parts), None)
        };
        let known = self.flying.insert(offered.head, (slot, offered, value));
        assert!(known.is_none(), "a head that is in flight");
    }

    /// Takes what was used, in whatever order, and checks it.
    fn land(&mut self, queue: &mut DriverQueue) {
        while let Some((head, _)) = queue.take_used() {
            let (slot, offered, value) = self.flying.remove(&head).expect("an answer to what was asked, once");
            assert_eq!(queue.bytes(offered.parts[3]), [OK]);
            match value {
                Some(value) => self.holds[slot] = value,
                None => {
                    let bytes = [queue.bytes(offered.parts[1]), queue.bytes(offered.parts[2])].concat();
                    assert!(bytes.iter().all(|byte| *byte == self.holds[slot]), "slot {slot}: {:?}", &bytes[..8]);
                }
            }
            self.landed += 1;
        }
    }
}

fn blank(bytes: usize) -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(bytes as u64).unwrap();
    image
}

/// A device with so many queues, all of them active.
pub fn many_queues(disk: Disk, queues: u16, engine: fn(u16) -> Engine) -> Setup {
    let mut block = Block::new("root", Arc::new(disk), BlockOptions { queues, rate: None }).unwrap();
    block.engine = engine;
    let mut block = Attached::new(block);
    let mut driver = Driver::new(&vec![QUEUE_SIZE; queues.into()]);
    let features = block.features();
    block.activate(driver.activation(features)).unwrap();
    Setup { block, driver }
}

/// Loads all queues until each has had `count` answers, with a pause now and then.
pub fn exercise(mut setup: Setup, slots: &mut [Slots], count: usize) -> Setup {
    let per_queue = slots[0].holds.len();
    let mut rounds = 0_u32;
    until("enough answers", || {
        for (index, slots) in slots.iter_mut().enumerate() {
            let queue = &mut setup.driver.queues[index];
            let before = slots.flying.len();
            while slots.flying.len() < 24 && slots.random() % 8 != 0 {
                slots.offer(queue, index * per_queue);
            }
            queue.kick_if_wanted((slots.flying.len() - before) as u16);
            slots.land(queue);
        }
        rounds += 1;
        if rounds.is_multiple_of(50) {
            setup.block.pause();
            for (position, (slots, queue)) in
                setup.block.positions().iter().zip(slots.iter_mut().zip(&mut setup.driver.queues))
            {
                // Nothing is in flight: what was taken was given back.
                assert_eq!(position.next_avail, position.next_used);
                slots.land(queue);
                assert_eq!(slots.landed as u16, position.next_used);
            }
            setup.block.resume();
        }
        slots.iter().all(|slots| slots.landed >= count)
    });
    until("the last answers", || {
        for (slots, queue) in slots.iter_mut().zip(&mut setup.driver.queues) {
            slots.land(queue);
        }
        slots.iter().all(|slots| slots.flying.is_empty())
    });
    setup
}

fn load_engine(engine: fn(u16) -> Engine) {
    const QUEUES: usize = 3;
    let image = blank(QUEUES * 64 * SLOT);
    let setup = many_queues(open(image.path(), false).unwrap(), QUEUES as u16, engine);
    let mut slots: Vec<_> = (0..QUEUES).map(|i| Slots::new(64, i as u64)).collect();
    let setup = exercise(setup, &mut slots, 2000);
    let total: usize = slots.iter().map(|slots| slots.landed).sum();
    assert_eq!(setup.count("reads") + setup.count("writes"), total as u64);
    drop(setup);
    let mut bytes = vec![1; QUEUES * 64 * SLOT];
    image.as_file().read_exact_at(&mut bytes, 0).unwrap();
    for (held, bytes) in slots.iter().flat_map(|slots| &slots.holds).zip(bytes.chunks(SLOT)) {
        assert!(bytes.iter().all(|byte| byte == held));
    }
}

#[test]
fn under_load_nothing_is_lost_doubled_or_mixed_up() {
    load_engine(Engine::new);
}

#[test]
fn nor_without_an_io_uring() {
    load_engine(|_| Engine::direct());
}

#[test]
fn a_reset_under_load_leaves_nothing_behind() {
    let image = blank(64 * SLOT);
    let mut setup = many_queues(open(image.path(), false).unwrap(), 2, Engine::new);
    for round in 0..50 {
        let mut slots = Slots::new(64, round);
        for _ in 0..40 {
            slots.offer(&mut setup.driver.queues[round as usize % 2], 0);
        }
        setup.driver.queues[round as usize % 2].kick();
        setup.block.reset();
        // What comes now is not answered, and the rings are where a driver that starts anew puts them.
        let features = setup.block.features();
        setup.block.activate(setup.driver.activation(features)).unwrap();
        assert_eq!(setup.status(&[Part::Say(&header(VIRTIO_BLK_T_FLUSH, 0)), Part::Room(1)]), OK);
        assert_eq!(setup.driver.queues[0].take_used(), None);
    }
}

#[test]
fn requests_overtake_each_other_and_a_full_queue_goes_on() {
    // A pipe that is read never ends: the read of it stays in flight while others come and go.
    let image = blank(64 * SLOT);
    let mut ring = uring::Uring::new(4).unwrap();
    let (quiet, mut wake) = std::io::pipe().unwrap();
    let ram: crate::virtio::GuestRam =
        Arc::new(vm_memory::GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 0x10000)]).unwrap());
    let memory = || {
        let mut areas = crate::virtio::areas::Areas::default();
        areas.push(vm_memory::GuestMemoryBackend::get_slice(&*ram, vm_memory::GuestAddress(0), 512).unwrap());
        crate::virtio::held::HeldAreas::new(&areas, &ram).unwrap()
    };
    let hosts = |file| Arc::new(watch::HostFile::new(file));
    let pipe = hosts(File::from(std::os::fd::OwnedFd::from(quiet)));
    let file = hosts(image.reopen().unwrap());
    let read = |file: &Arc<watch::HostFile>| {
        let target = job::Target::File(Arc::clone(file));
        job::Job { areas: memory(), ..job::Job::bare(target, job::Action::Read { padded: false }, 0) }
    };
    ring.begin(7, read(&pipe));
    for round in 0..20 {
        (0..3).for_each(|i| ring.begin(10 + i, read(&file)));
        assert_eq!(ring.in_flight(), 4);
        // One more than it has room for is done on the spot.
        ring.begin(20, read(&file));
        let mut done = Vec::new();
        while done.len() < 4 {
            ring.wait().unwrap();
            while let Some((tag, result)) = ring.next_done() {
                result.unwrap();
                done.push(tag);
            }
        }
        done.sort_unstable();
        assert_eq!(done, [10, 11, 12, 20], "round {round}");
    }
    // Half of what was asked for, and then the rest.
    std::io::Write::write_all(&mut wake, &[1; 200]).unwrap();
    ring.submit().unwrap();
    assert!(ring.next_done().is_none());
    std::io::Write::write_all(&mut wake, &[1; 312]).unwrap();
    ring.wait().unwrap();
    assert!(matches!(ring.next_done(), Some((7, Ok(())))));
    ring.begin(8, read(&pipe));
    drop(wake);
    ring.wait().unwrap();
    let (8, Err(error)) = ring.next_done().unwrap() else { panic!() };
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
}

#[test]
fn a_disk_can_be_opened_again_as_soon_as_it_is_closed() {
    let _no_forks = FORKS.read().unwrap();
    let image = blank(64 * SLOT);
    for _ in 0..300 {
        let mut setup = Setup::on(&image);
        let queue = &mut setup.driver.queues[0];
        // Not alone, so that the kernel's own threads do it.
        for _ in 0..3 {
            queue.offer(&[Part::Say(&header(VIRTIO_BLK_T_OUT, 0)), Part::Say(&[7; 512]), Part::Room(1)]);
            queue.offer(&[Part::Say(&header(VIRTIO_BLK_T_FLUSH, 0)), Part::Room(1)]);
        }
        queue.kick();
        (0..6).for_each(|_| assert_eq!(queue.await_used().1, 1));
    }
}

#[test]
fn queues_share_a_rate_and_a_large_request_passes_in_the_end() {
    let image = blank(4 << 20);
    let rate = Some(RateLimit { bytes_per_second: Some(4 << 20), operations_per_second: Some(400) });
    let disk = Arc::new(open(image.path(), false).unwrap());
    let mut block = Attached::new(Block::new("slow", Arc::clone(&disk), BlockOptions { queues: 2, rate }).unwrap());
    let mut driver = Driver::new(&[QUEUE_SIZE; 2]);
    block.activate(driver.activation(RING_FEATURES | 1 << VIRTIO_BLK_F_FLUSH)).unwrap();
    let start = Instant::now();
    for queue in &mut driver.queues {
        for _ in 0..80 {
            queue.offer(&[Part::Say(&header(VIRTIO_BLK_T_FLUSH, 0)), Part::Room(1)]);
        }
        queue.kick();
    }
    // A pause does not let anything through, nor does it lose what waits.
    block.pause();
    block.resume();
    for queue in &mut driver.queues {
        (0..80).for_each(|_| assert_eq!(queue.await_used().1, 1));
    }
    // A tenth of a second is saved up, and a request passes when nothing is left but no debt either.
    assert!(start.elapsed() >= Duration::from_millis((160 - 42) * 1000 / 400), "{:?}", start.elapsed());
    let start = Instant::now();
    let queue = &mut driver.queues[0];
    for _ in 0..2 {
        let head = queue.offer(&[Part::Say(&header(VIRTIO_BLK_T_IN, 0)), Part::Room(2 << 20), Part::Room(1)]).head;
        queue.kick();
        assert_eq!(queue.await_used(), (head, (2 << 20) + 1));
    }
    // The second waited until the first was paid for.
    assert!(start.elapsed() >= Duration::from_millis(380), "{:?}", start.elapsed());
    let throttled = count(&*block.counters(), "throttled");
    assert!((3..=162).contains(&throttled), "{throttled}");
    let zero = Some(RateLimit { bytes_per_second: Some(0), operations_per_second: None });
    assert!(Block::new("stopped", disk, BlockOptions { queues: 1, rate: zero }).is_err());
}
