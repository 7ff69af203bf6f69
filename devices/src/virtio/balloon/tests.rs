use super::*;
use crate::virtio::testing::{Attached, Driver, DriverQueue, NEXT, Part, WRITE, count, until};
use vm_memory::{Bytes, GuestAddress};

const ALL: u64 = RING_FEATURES | F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_POISON | F_PAGE_REPORTING;
const UNPOISONED: u64 = ALL & !F_PAGE_POISON;

/// Notes what was released.
#[derive(Default)]
struct Released {
    runs: Mutex<Vec<(u64, u64)>>,
    refuse: AtomicBool,
    keep: AtomicBool,
}

impl Released {
    fn take(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.runs.lock().unwrap())
    }
}

impl PageRelease for Released {
    fn release(&self, gpa: u64, len: u64) -> io::Result<bool> {
        if self.keep.load(Ordering::SeqCst) {
            return Ok(false);
        }
        if self.refuse.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.runs.lock().unwrap().push((gpa / PAGE, len / PAGE));
        assert_eq!((gpa % PAGE, len % PAGE), (0, 0));
        Ok(true)
    }
}

struct Bench {
    balloon: Attached<Balloon>,
    control: BalloonControl,
    driver: Driver,
    released: Arc<Released>,
}

impl Bench {
    /// A balloon that is not active.
    fn new(target: u32) -> Self {
        let released = Arc::new(Released::default());
        let balloon = Balloon::new(Arc::clone(&released) as _, target).unwrap();
        let control = balloon.control();
        Self { balloon: Attached::new(balloon), control, driver: Driver::new(&[QUEUE_SIZE; QUEUES]), released }
    }

    /// Activates it with `features` and the queues of these indices.
    fn activate(&mut self, features: u64, queues: &[u16]) {
        let mut activation = self.driver.activation(features);
        activation.queues.retain(|queue| queues.contains(&queue.index));
        self.balloon.activate(activation).unwrap();
    }

    /// One that a driver uses as the specification says.
    fn active(features: u64) -> Self {
        let mut bench = Self::new(0);
        bench.activate(features, &[0, 1, 2, 4]);
        bench
    }

    fn count(&self, name: &str) -> u64 {
        count(&*self.balloon.counters(), name)
    }

    /// Sends the numbers of pages and waits until they come back.
    fn list(&mut self, queue: u16, pages: &[u32]) {
        let list: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        let queue = &mut self.driver.queues[usize::from(queue)];
        let offered = queue.offer_indirect(&[Part::Say(&list)]);
        queue.kick();
        assert_eq!(queue.await_used(), (offered.head, 0));
    }

    /// Reports areas of memory, in one chain of the queue, and waits until it comes back.
    fn report(&mut self, queue: u16, areas: &[(u64, u32)]) {
        let queue = &mut self.driver.queues[usize::from(queue)];
        for (i, &(at, len)) in areas.iter().enumerate() {
            let more = if i + 1 < areas.len() { NEXT } else { 0 };
            queue.set_descriptor(i as u16, (at, len, WRITE | more, i as u16 + 1));
        }
        queue.publish(0);
        queue.kick();
        assert_eq!(queue.await_used(), (0, 0));
    }

    fn config(&self) -> [u32; 5] {
        let mut bytes = [0x55; 20];
        self.balloon.read_config(0, &mut bytes);
        let mut words = [0; 5];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        words
    }

    fn config_changes(&self) -> u64 {
        self.driver.interrupt.config.load(Ordering::SeqCst)
    }
}

fn entry(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

/// Makes a buffer of statistics available, as a driver does when it got the last one back.
fn tell(queue: &mut DriverQueue, free: u64) -> u16 {
    let offered = queue.offer(&[Part::Say(&[entry(4, free), entry(5, 1 << 30)].concat())]);
    queue.kick();
    offered.head
}

#[test]
fn listed_pages_are_released_in_runs_before_the_list_comes_back() {
    let mut bench = Bench::active(ALL);
    bench.list(INFLATE, &[9, 7, 8, 100, 7]);
    assert_eq!(bench.released.take(), [(7, 3), (100, 1)]);
    assert_eq!((bench.count("inflated_pages"), bench.count("released_pages")), (5, 4));
    bench.list(DEFLATE, &[7, 8]);
    assert_eq!((bench.released.take(), bench.count("deflated_pages")), (vec![], 2));
    // A poison matters to reports alone: the driver fills what it takes back.
    bench.balloon.write_config(12, &[0xaa; 4]);
    bench.list(INFLATE, &[1]);
    assert_eq!(bench.released.take(), [(1, 1)]);
}

#[test]
fn pages_that_are_none_are_passed_over() {
    let mut bench = Bench::active(ALL);
    // The driver's memory is five times 1024 pages.
    bench.list(INFLATE, &[5119, 5120, u32::MAX, 0x10_0000, 3]);
    assert_eq!(bench.released.take(), [(3, 1), (5119, 1)]);
    assert_eq!((bench.count("ignored_pages"), bench.count("released_pages")), (3, 2));
    bench.list(INFLATE, &[]);
    let queue = &mut bench.driver.queues[0];
    // Half a number, and an answer that nobody reads.
    queue.offer(&[Part::Say(&[1, 0, 0]), Part::Room(64)]);
    queue.kick();
    assert_eq!(queue.await_used().1, 0);
    assert_eq!(bench.released.take(), []);
    assert_eq!(bench.driver.interrupt.needs_reset.load(Ordering::SeqCst), 0);
}

#[test]
fn lists_without_end_take_bounded_turns() {
    let Bench { balloon, mut driver, released, .. } = Bench::new(0);
    // Each list names more pages than are looked at.
    let numbers: Vec<u8> = (0..1u32 << 18).flat_map(|n| (n % 5120).to_le_bytes()).collect();
    let at = driver.queues[0].buffer(numbers.len());
    let (mut handler, kicks) = balloon.handler(&mut driver.activation(ALL)).unwrap();
    driver.ram.write_slice(&numbers, GuestAddress(at)).unwrap();
    let queue = &mut driver.queues[0];
    for head in 0..QUEUE_SIZE {
        queue.set_descriptor(head, (at, numbers.len() as u32, 0, 0));
        queue.publish(head);
    }
    for head in 0..QUEUE_SIZE {
        handler.kicked(0).unwrap();
        assert_eq!((queue.take_used(), queue.take_used()), (Some((head, 0)), None), "one list a turn");
        kicks[0].read().expect("it comes back by itself");
    }
    let counters = balloon.counters();
    let lists = u64::from(QUEUE_SIZE);
    assert_eq!(count(&*counters, "inflated_pages"), lists << 18);
    assert_eq!(count(&*counters, "ignored_pages"), lists * ((1 << 18) - MAX_LISTED as u64));
    assert_eq!(released.take(), vec![(0, 5120); lists as usize]);
    handler.kicked(0).unwrap();
    assert!(kicks[0].read().is_err(), "it waits once nothing is left");
}

#[test]
fn reported_areas_are_released_as_far_as_they_are_whole_pages() {
    for (queues, reporting, features) in [
        (&[0, 1, 2, 4][..], 4, UNPOISONED),
        (&[0, 1, 2, 3], 3, UNPOISONED),
        (&[0, 1, 2], 2, UNPOISONED & !F_STATS_VQ),
        (&[0, 1, 4], 4, UNPOISONED),
        (&[0, 1, 2, 3, 4], 4, ALL),
    ] {
        let mut bench = Bench::new(0);
        bench.activate(features, queues);
        bench.report(reporting, &[(0x40_0000, 0x20_0000), (0x20_0000, 0x20_0000), (0x3000, 0x800), (0x3800, 0x1000)]);
        assert_eq!(bench.released.take(), [(3, 1), (0x200, 0x400)], "queues {queues:?}");
        bench.report(reporting, &[(0x1001, 0x1ffe), (0x5000, 0x1000), (0x5000, 0x1000)]);
        assert_eq!(bench.released.take(), [(5, 1)]);
    }
}

#[test]
fn a_poison_that_we_cannot_restore_keeps_reported_pages() {
    let mut bench = Bench::new(0);
    bench.balloon.write_config(12, &[0xaa; 4]);
    bench.activate(ALL, &[0, 1, 2, 4]);
    bench.report(4, &[(0x1000, 0x1000)]);
    assert_eq!((bench.released.take(), bench.count("ignored_pages")), (vec![], 1));
    // Initialised on free: zero it is.
    bench.balloon.reset();
    bench.balloon.write_config(12, &[0; 4]);
    bench.activate(ALL, &[0, 1, 2, 4]);
    bench.report(4, &[(0x1000, 0x1000)]);
    assert_eq!(bench.released.take(), [(1, 1)]);
    // A value without the feature means nothing.
    bench.balloon.reset();
    bench.balloon.write_config(12, &[0xaa; 4]);
    bench.activate(UNPOISONED, &[0, 1, 2, 4]);
    bench.report(4, &[(0x1000, 0x1000)]);
    assert_eq!(bench.released.take(), [(1, 1)]);
}

#[test]
fn an_area_outside_ram_is_a_fault() {
    let mut bench = Bench::active(ALL);
    let queue = &mut bench.driver.queues[4];
    queue.set_descriptor(0, (5 * (4 << 20) - 0x1000, 0x2000, WRITE, 0));
    queue.publish(0);
    queue.kick();
    bench.driver.await_fault();
    assert_eq!(bench.released.take(), []);
}

#[test]
fn a_host_that_cannot_release_is_no_reason_to_stop() {
    let mut bench = Bench::active(ALL);
    bench.released.refuse.store(true, Ordering::SeqCst);
    bench.list(INFLATE, &[1, 3]);
    assert_eq!((bench.count("errors"), bench.count("released_pages")), (2, 0));
    bench.released.refuse.store(false, Ordering::SeqCst);
    bench.list(INFLATE, &[1, 3]);
    assert_eq!(bench.count("released_pages"), 2);
    // One that does not want to just now.
    bench.released.keep.store(true, Ordering::SeqCst);
    bench.list(INFLATE, &[5, 6]);
    assert_eq!((bench.count("errors"), bench.count("released_pages"), bench.count("ignored_pages")), (2, 2, 2));
}

#[test]
fn the_driver_writes_its_own_fields_only() {
    let mut bench = Bench::new(77);
    assert_eq!(bench.config(), [77, 0, 0, 0, 0]);
    bench.balloon.write_config(4, &0x1122_3344_u32.to_le_bytes());
    assert_eq!((bench.config(), bench.control.actual()), ([77, 0x1122_3344, 0, 0, 0], 0x1122_3344));
    bench.balloon.write_config(5, &[0x99]);
    bench.balloon.write_config(0, &[0xff; 4]);
    bench.balloon.write_config(8, &[0xff; 4]);
    bench.balloon.write_config(13, &[1, 2, 3, 4, 5]);
    for offset in [16, 17, 0x1000, u64::MAX] {
        bench.balloon.write_config(offset, &[0xff; 8]);
    }
    assert_eq!(bench.config(), [77, 0x1122_9944, 0, 0x0302_0100, 0]);
    bench.balloon.reset();
    assert_eq!(bench.config(), [77, 0, 0, 0, 0], "the target is not the driver's to forget");
}

#[test]
fn a_new_target_interrupts_but_not_while_paused() {
    let mut bench = Bench::active(ALL);
    bench.control.set_target(1000);
    until("a configuration change", || bench.config_changes() == 1);
    assert_eq!((bench.config()[0], bench.control.target()), (1000, 1000));
    bench.balloon.pause();
    bench.control.set_target(2000);
    assert_eq!(bench.config()[0], 2000);
    bench.balloon.pause();
    assert_eq!(bench.config_changes(), 1);
    bench.balloon.resume();
    until("a configuration change", || bench.config_changes() == 2);
    // Without a driver: the next one reads it, and is told once more than it needs.
    bench.balloon.reset();
    bench.control.set_target(3000);
    bench.activate(ALL, &[0, 1, 2, 4]);
    until("a configuration change", || bench.config_changes() == 3);
}

#[test]
fn statistics_wait_in_the_ring_until_new_ones_are_wanted() {
    let mut bench = Bench::active(ALL);
    let control = bench.control.clone();
    let free = || control.statistics().0.get("free_bytes");
    assert_eq!((free(), control.statistics().1), (None, 0));
    let head = tell(&mut bench.driver.queues[2], 1);
    until("statistics", || free() == Some(1));
    assert_eq!(control.statistics().0.get("total_bytes"), Some(1 << 30));
    // A needless kick neither gives it back nor counts it twice.
    bench.driver.queues[2].kick();
    bench.balloon.pause();
    let position = bench.balloon.positions().into_iter().find(|position| position.index == STATISTICS).unwrap();
    assert_eq!((position.next_avail, position.next_used), (0, 0), "nothing of it is in flight");
    bench.balloon.resume();
    assert_eq!(control.statistics().1, 1);

    for (told, said) in [(2, 2), (3, 3)] {
        let waiting = if told == 2 { head } else { told as u16 - 2 };
        control.request_statistics();
        assert_eq!(bench.driver.queues[2].await_used(), (waiting, 0));
        assert_eq!(free(), Some(told - 1));
        tell(&mut bench.driver.queues[2], told);
        until("statistics", || control.statistics().1 == said);
        assert_eq!(free(), Some(told));
    }
}

#[test]
fn a_wish_for_statistics_outlives_the_wait_for_a_driver() {
    let mut bench = Bench::new(0);
    bench.control.request_statistics();
    bench.activate(ALL, &[0, 1, 2, 4]);
    // What the driver brings along may be old: it is asked for new ones at once.
    let head = tell(&mut bench.driver.queues[2], 1);
    assert_eq!(bench.driver.queues[2].await_used(), (head, 0));
    tell(&mut bench.driver.queues[2], 2);
    until("statistics", || bench.control.statistics().1 == 2);
    assert_eq!(bench.driver.queues[2].take_used(), None);
    // A driver without statistics is not held up by it.
    let mut bench = Bench::new(0);
    bench.activate(ALL & !F_STATS_VQ, &[0, 1, 4]);
    bench.control.request_statistics();
    bench.list(INFLATE, &[1]);
    assert_eq!(bench.released.take(), [(1, 1)]);
}

#[test]
fn continues_from_a_saved_state() {
    let mut bench = Bench::new(500);
    bench.balloon.write_config(12, &[0xaa; 4]);
    bench.activate(ALL, &[0, 1, 2, 4]);
    bench.list(INFLATE, &[1, 2]);
    bench.balloon.write_config(4, &2_u32.to_le_bytes());
    tell(&mut bench.driver.queues[2], 9);
    until("statistics", || bench.control.statistics().1 == 1);
    bench.balloon.pause();
    bench.control.set_target(600);
    let state = bench.balloon.save();
    let expected = BalloonStateV1 { target: 600, actual: 2, poison: 0xaaaa_aaaa };
    assert_eq!(state, DeviceState::Balloon(expected));

    let mut other = Bench::new(0);
    assert_eq!(other.balloon.restore(DeviceState::Rng), Err(StateError::WrongDevice("memory balloon")));
    other.balloon.restore(state).unwrap();
    assert_eq!(other.config(), [600, 2, 0, 0xaaaa_aaaa, 0]);
    other.activate(ALL, &[0, 1, 2, 4]);
    until("a configuration change", || other.config_changes() == 1);
    other.report(4, &[(0x1000, 0x1000)]);
    assert_eq!(other.released.take(), [], "the poison came along");
}

#[test]
fn it_needs_its_two_queues() {
    let mut bench = Bench::new(0);
    for queues in [&[0][..], &[1, 2, 4]] {
        let mut activation = bench.driver.activation(ALL);
        activation.queues.retain(|queue| queues.contains(&queue.index));
        assert!(matches!(bench.balloon.activate(activation), Err(ActivateError::MissingQueue(_))));
    }
    bench.activate(ALL, &[0, 1]);
    bench.list(INFLATE, &[4]);
    assert_eq!(bench.released.take(), [(4, 1)]);
}
