//! The driver's side of a device, for tests: queues in guest memory, and an interrupt that counts.

use std::ops::{Deref, DerefMut};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::sleep;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::worker::Workers;
use super::{ActivateError, Activation, ActiveQueue, GuestRam, Interrupt, QueuePosition, VirtioDevice};
use crate::counters::Counters;

/// Descriptor flags.
pub const NEXT: u16 = 1;
/// The device may write.
pub const WRITE: u16 = 2;
/// The descriptor is a table of others.
pub const INDIRECT: u16 = 4;

/// Each queue has so much guest memory for its rings and buffers.
const SPAN: u64 = 4 << 20;
const AVAIL: u64 = 0x1_0000;
const USED: u64 = 0x2_0000;
const TABLES: u64 = 0x4_0000;
const BUFFERS: u64 = 0x10_0000;

/// A part of a chain.
pub enum Part<'a> {
    /// Bytes for the device.
    Say(&'a [u8]),
    /// Room for its answer.
    Room(usize),
}

/// A device with its threads, as the transport keeps them.
pub struct Attached<D> {
    workers: Workers,
    device: D,
}

impl<D: VirtioDevice> Attached<D> {
    pub fn new(device: D) -> Self {
        Self { workers: Workers::default(), device }
    }

    pub fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.workers = self.device.activate(activation)?;
        Ok(())
    }

    pub fn pause(&mut self) {
        self.workers.pause();
    }

    pub fn resume(&mut self) {
        self.workers.resume();
    }

    pub fn reset(&mut self) {
        self.workers = Workers::default();
        self.device.reset();
    }

    /// Where its queues stand while it is paused.
    pub fn positions(&self) -> Vec<QueuePosition> {
        self.workers.positions()
    }
}

impl<D> Deref for Attached<D> {
    type Target = D;

    fn deref(&self) -> &D {
        &self.device
    }
}

impl<D> DerefMut for Attached<D> {
    fn deref_mut(&mut self) -> &mut D {
        &mut self.device
    }
}

/// Counts what a device tells its driver.
#[derive(Default)]
pub struct Spy {
    pub queue: AtomicU64,
    /// The first queue of which it told.
    pub first: OnceLock<u16>,
    pub config: AtomicU64,
    pub needs_reset: AtomicU64,
}

impl Interrupt for Spy {
    fn queue(&self, queue: u16) {
        let _ = self.first.set(queue);
        self.queue.fetch_add(1, Ordering::SeqCst);
    }
    fn config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
    fn needs_reset(&self) {
        self.needs_reset.fetch_add(1, Ordering::SeqCst);
    }
}

/// A driver with its queues.
pub struct Driver {
    pub ram: GuestRam,
    pub interrupt: Arc<Spy>,
    pub queues: Vec<DriverQueue>,
}

impl Driver {
    pub fn new(sizes: &[u16]) -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), sizes.len() * SPAN as usize)]).unwrap();
        let ram = Arc::new(ram);
        let queue = |(i, &size): (usize, &u16)| DriverQueue::new(Arc::clone(&ram), i as u64 * SPAN, size);
        let queues = sizes.iter().enumerate().map(queue).collect();
        Self { ram, interrupt: Arc::default(), queues }
    }

    /// Negotiates `features` and hands over the queues as they stand after a reset.
    pub fn activation(&mut self, features: u64) -> Activation {
        let hand_over = |(index, queue): (usize, &mut DriverQueue)| ActiveQueue {
            index: index as u16,
            queue: queue.device_side(),
            kick: queue.kick.try_clone().unwrap(),
        };
        Activation {
            ram: Arc::clone(&self.ram),
            features,
            queues: self.queues.iter_mut().enumerate().map(hand_over).collect(),
            interrupt: Arc::clone(&self.interrupt) as _,
            paused: false,
        }
    }

    pub fn interrupts(&self) -> u64 {
        self.interrupt.queue.load(Ordering::SeqCst)
    }

    /// Waits for DEVICE_NEEDS_RESET.
    pub fn await_fault(&self) {
        until("a fault", || self.interrupt.needs_reset.load(Ordering::SeqCst) > 0);
    }
}

/// One virtqueue, from the driver's side.
pub struct DriverQueue {
    ram: GuestRam,
    base: u64,
    size: u16,
    kick: EventFd,
    next_descriptor: u16,
    next_buffer: u64,
    avail: u16,
    seen: u16,
}

/// A chain that was offered: its head, and its parts' addresses and lengths.
#[derive(Clone, Debug)]
pub struct Offered {
    pub head: u16,
    pub parts: Vec<(u64, usize)>,
}

impl DriverQueue {
    fn new(ram: GuestRam, base: u64, size: u16) -> Self {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        Self { ram, base, size, kick, next_descriptor: 0, next_buffer: 0, avail: 0, seen: 0 }
    }

    fn device_side(&mut self) -> Queue {
        self.ram.write_slice(&vec![0; BUFFERS as usize], GuestAddress(self.base)).unwrap();
        (self.next_descriptor, self.next_buffer, self.avail, self.seen) = (0, 0, 0, 0);
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.base + AVAIL)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.base + USED)).unwrap();
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.ram));
        queue
    }

    fn word(&self, at: u64) -> u16 {
        self.ram.load(GuestAddress(self.base + at), Ordering::SeqCst).unwrap()
    }

    fn set_word(&self, at: u64, value: u16) {
        self.ram.store(value, GuestAddress(self.base + at), Ordering::SeqCst).unwrap();
    }

    /// Writes one descriptor of the queue's table.
    pub fn set_descriptor(&self, index: u16, (addr, len, flags, next): (u64, u32, u16, u16)) {
        self.write_descriptor(self.base + 16 * u64::from(index), (addr, len, flags, next));
    }

    fn write_descriptor(&self, at: u64, (addr, len, flags, next): (u64, u32, u16, u16)) {
        self.ram.write_obj(addr, GuestAddress(at)).unwrap();
        self.ram.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.ram.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes the chain at `head` available without a kick.
    pub fn publish(&mut self, head: u16) {
        self.set_word(AVAIL + 4 + 2 * u64::from(self.avail % self.size), head);
        self.set_available(self.avail.wrapping_add(1));
    }

    /// Writes the available ring's index.
    pub fn set_available(&mut self, index: u16) {
        self.avail = index;
        self.set_word(AVAIL + 2, index);
    }

    /// An address in this queue's buffer memory.
    pub fn buffer(&mut self, len: usize) -> u64 {
        if self.next_buffer + len as u64 > SPAN - BUFFERS {
            self.next_buffer = 0;
        }
        let at = self.base + BUFFERS + self.next_buffer;
        self.next_buffer += len as u64;
        at
    }

    fn place(&mut self, parts: &[Part<'_>]) -> Vec<(u64, usize, u16)> {
        let mut placed = Vec::new();
        for part in parts {
            let (len, flags) = match part {
                Part::Say(bytes) => (bytes.len(), 0),
                Part::Room(len) => (*len, WRITE),
            };
            let at = self.buffer(len);
            if let Part::Say(bytes) = part {
                self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
            }
            placed.push((at, len, flags));
        }
        placed
    }

    /// Makes a chain available. The caller keeps fewer descriptors in flight than the queue has.
    pub fn offer(&mut self, parts: &[Part<'_>]) -> Offered {
        let placed = self.place(parts);
        let head = self.next_descriptor;
        for (i, &(at, len, flags)) in placed.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let more = if i + 1 < placed.len() { NEXT } else { 0 };
            self.set_descriptor(index, (at, len as u32, flags | more, self.next_descriptor));
        }
        self.publish(head);
        Offered { head, parts: placed.iter().map(|&(at, len, _)| (at, len)).collect() }
    }

    /// As [`DriverQueue::offer`], through an indirect table.
    pub fn offer_indirect(&mut self, parts: &[Part<'_>]) -> Offered {
        let placed = self.place(parts);
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % self.size;
        let table = self.base + TABLES + 0x400 * u64::from(head);
        for (i, &(at, len, flags)) in placed.iter().enumerate() {
            let more = if i + 1 < placed.len() { NEXT } else { 0 };
            self.write_descriptor(table + 16 * i as u64, (at, len as u32, flags | more, i as u16 + 1));
        }
        self.set_descriptor(head, (table, 16 * placed.len() as u32, INDIRECT, 0));
        self.publish(head);
        Offered { head, parts: placed.iter().map(|&(at, len, _)| (at, len)).collect() }
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Kicks if the device asked for it, as a driver with EVENT_IDX does after adding `added` chains.
    pub fn kick_if_wanted(&self, added: u16) -> bool {
        let event = self.word(USED + 4 + 8 * u64::from(self.size));
        let wanted = self.avail.wrapping_sub(event).wrapping_sub(1) < added;
        if wanted {
            self.kick();
        }
        wanted
    }

    /// With EVENT_IDX: interrupt once the used index passes `index`.
    pub fn interrupt_after(&self, index: u16) {
        self.set_word(AVAIL + 4 + 2 * u64::from(self.size), index);
    }

    /// Whether there is a used chain to take.
    pub fn has_used(&self) -> bool {
        self.word(USED + 2) != self.seen
    }

    /// Takes a used chain, if there is one: its head and length.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        let at = self.base + USED + 4 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        let head: u32 = self.ram.read_obj(GuestAddress(at)).unwrap();
        Some((head as u16, self.ram.read_obj(GuestAddress(at + 4)).unwrap()))
    }

    /// Waits for a used chain.
    pub fn await_used(&mut self) -> (u16, u32) {
        let mut used = None;
        until("a used chain", || {
            used = self.take_used();
            used.is_some()
        });
        used.unwrap()
    }

    /// What a part holds.
    pub fn bytes(&self, (at, len): (u64, usize)) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

/// Waits until `done`, at most ten seconds.
#[track_caller]
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(10), "no {what}");
        sleep(Duration::from_micros(100));
    }
}

/// Nanoseconds that the thread called `name` has run.
pub fn ran(name: &str) -> u64 {
    let of = |file: std::path::PathBuf| std::fs::read_to_string(file).unwrap_or_default();
    let mut found = None;
    until("thread of that name", || {
        let mut tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
        found = tasks.find(|task| of(task.join("comm")).trim() == name);
        found.is_some()
    });
    of(found.unwrap().join("schedstat")).split(' ').next().unwrap().parse().unwrap()
}

/// The counter called `name`.
#[track_caller]
pub fn count(counters: &dyn Counters, name: &str) -> u64 {
    counters.read().into_iter().find(|(known, _)| *known == name).expect("the counter exists").1
}

/// A file of `sectors` sectors, each filled with the low byte of its number.
pub fn numbered_image(sectors: usize) -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..sectors * 512).map(|i| (i / 512) as u8).collect();
    image.as_file().write_all_at(&bytes, 0).unwrap();
    image
}
