//! A driver: knows where it put its rings, and can be told to do right or wrong.

use std::sync::Arc;

use civic_devices::virtio::GuestRam;
use civic_devices::virtio::pci::status;
use civic_devices::virtio::state::{QueueStateV1, VirtioPciStateV1};
use vm_memory::{Bytes, GuestAddress};

use super::chains::{INDIRECT, NEXT, WRITE};
use super::devices::{Known, Part};
use super::memory::{END, REGIONS, is_ram};
use super::rig::Rig;

/// A queue's rings and indirect tables lie in so much RAM.
const SPAN: u64 = 0x4000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const TABLES: u64 = 0x3000;
/// Tables of 16 descriptors each.
const TABLE: u64 = 0x100;
/// Where buffers lie, in turn: from and to.
const BUFFERS: [(u64, u64); 2] = [(5 * SPAN, REGIONS[0].1), (REGIONS[1].0, END)];
const VERSION_1: u64 = 1 << 32;

/// A descriptor: address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

/// One end of a virtqueue.
#[derive(Clone, Copy, Default)]
struct DriverQueue {
    size: u16,
    base: u64,
    next_descriptor: u16,
    next_table: u16,
    available: u16,
}

/// The driver.
pub struct Driver {
    ram: GuestRam,
    queues: Vec<DriverQueue>,
    next_buffer: u64,
}

/// How a device is brought up.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Which of the offered features are accepted; others are asked for too.
    pub features: u64,
    /// Queues have at most 2 to the power of this many entries.
    pub order: u32,
    /// Queues that stay disabled, by bit.
    pub without: u8,
    /// How far the rings are from where they should be.
    pub shift: u64,
}

impl Plan {
    /// What a correct driver does.
    pub const GOOD: Self = Self { features: u64::MAX, order: 15, without: 0, shift: 0 };
}

impl Driver {
    /// A driver for the device of `rig`, which has its queues where this one would have put them, or nowhere.
    pub fn new(rig: &Rig) -> Self {
        let queue = |(index, state): (usize, &QueueStateV1)| DriverQueue {
            size: state.size,
            base: SPAN * index as u64,
            next_descriptor: 0,
            next_table: 0,
            available: state.next_avail,
        };
        assert!(rig.state().queues.len() as u64 <= BUFFERS[0].0 / SPAN, "there is no room for so many queues");
        let queues = rig.state().queues.iter().enumerate().map(queue).collect();
        Self { ram: Arc::clone(&rig.ram), queues, next_buffer: BUFFERS[0].0 }
    }

    /// Resets the device and brings it up (virtio 1.2 §3.1.1).
    pub fn bring_up(&mut self, rig: &mut Rig, plan: Plan) {
        let set_status = |rig: &mut Rig, bits: u8| rig.write(0x14, &[bits]);
        set_status(rig, 0);
        set_status(rig, status::ACKNOWLEDGE | status::DRIVER);
        for half in 0..2_u32 {
            let mut offered = [0; 4];
            rig.write(0x00, &half.to_le_bytes());
            rig.read(0x04, &mut offered);
            let wanted = (plan.features | VERSION_1) >> (32 * half);
            rig.write(0x08, &half.to_le_bytes());
            rig.write(0x0c, &(u32::from_le_bytes(offered) & wanted as u32).to_le_bytes());
        }
        set_status(rig, status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        for index in 0..self.queues.len() {
            self.enable(rig, index as u16, plan);
        }
        set_status(rig, status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK);
    }

    fn enable(&mut self, rig: &mut Rig, index: u16, plan: Plan) {
        let mut max = [0; 2];
        rig.write(0x16, &index.to_le_bytes());
        rig.read(0x18, &mut max);
        let size = 1 << plan.order.min(u16::from_le_bytes(max).ilog2());
        let base = SPAN * u64::from(index);
        self.queues[usize::from(index)] = DriverQueue { size, base, ..Default::default() };
        self.poke(base + AVAIL, &[0; 4]);
        self.poke(base + USED, &[0; 4]);
        rig.write(0x18, &size.to_le_bytes());
        for (register, at) in [(0x20, base), (0x28, base + AVAIL), (0x30, base + USED)] {
            rig.write(register, &at.wrapping_add(plan.shift).to_le_bytes());
        }
        rig.write(0x1a, &index.to_le_bytes());
        if plan.without >> index.min(7) & 1 == 0 {
            rig.write(0x1c, &[1, 0]);
        }
    }

    /// Writes to RAM; what does not fit is left out.
    pub fn poke(&self, at: u64, bytes: &[u8]) {
        let _ = self.ram.write(bytes, GuestAddress(at));
    }

    /// Reads a byte of RAM.
    pub fn peek(&self, at: u64) -> u8 {
        self.ram.read_obj(GuestAddress(at)).expect("it lies in RAM")
    }

    fn queue(&mut self, index: u16) -> &mut DriverQueue {
        let count = self.queues.len();
        &mut self.queues[usize::from(index) % count]
    }

    /// Where a queue's descriptor table, its available and its used ring and its indirect tables are.
    pub fn landmarks(&mut self, index: u16) -> [u64; 4] {
        let base = self.queue(index).base;
        [base, base + AVAIL, base + USED, base + TABLES]
    }

    /// A place for a buffer: RAM, if there is so much anywhere.
    pub fn buffer(&mut self, len: u32) -> u64 {
        let len = u64::from(len);
        let here = usize::from(self.next_buffer >= BUFFERS[1].0);
        let (start, end) = BUFFERS[here];
        // What is left here, then the other place, then this one from its start.
        let fits = |&(at, end): &(u64, u64)| len <= end - at;
        let places = [(self.next_buffer, end), BUFFERS[1 - here], (start, end)];
        let (at, end) = places.into_iter().find(fits).unwrap_or(BUFFERS[1 - here]);
        self.next_buffer = (at + len).min(end);
        at
    }

    /// Writes one descriptor of a queue's table.
    pub fn descriptor(&mut self, queue: u16, index: u16, descriptor: Descriptor) {
        let at = self.queue(queue).base + 16 * u64::from(index);
        self.poke(at, &encode(descriptor));
    }

    /// Puts parts (address, length, writable) into the next descriptors, or into an indirect table, and makes the chain available.
    pub fn offer(&mut self, index: u16, parts: &[(u64, u32, bool)], indirect: bool) {
        let queue = *self.queue(index);
        let mask = queue.size - 1;
        let head = queue.next_descriptor & mask;
        let chain = |nth: usize, next: u16| {
            let (at, len, writable) = parts[nth];
            let more = if nth + 1 < parts.len() { NEXT } else { 0 };
            (at, len, more | if writable { WRITE } else { 0 }, next)
        };
        if indirect {
            let table = queue.base + TABLES + TABLE * u64::from(queue.next_table % 16);
            for nth in 0..parts.len() {
                self.poke(table + 16 * nth as u64, &encode(chain(nth, nth as u16 + 1)));
            }
            self.descriptor(index, head, (table, 16 * parts.len() as u32, INDIRECT, 0));
            self.queue(index).next_table = queue.next_table.wrapping_add(1);
            self.queue(index).next_descriptor = queue.next_descriptor.wrapping_add(1);
        } else {
            for nth in 0..parts.len() {
                let at = queue.next_descriptor.wrapping_add(nth as u16);
                self.descriptor(index, at & mask, chain(nth, at.wrapping_add(1) & mask));
            }
            self.queue(index).next_descriptor = queue.next_descriptor.wrapping_add(parts.len() as u16);
        }
        self.publish(index, head);
    }

    /// Makes the chain at `head` available.
    pub fn publish(&mut self, index: u16, head: u16) {
        let queue = self.queue(index);
        let (ring, slot) = (queue.base + AVAIL, u64::from(queue.available & (queue.size - 1)));
        queue.available = queue.available.wrapping_add(1);
        let available = queue.available;
        self.poke(ring + 4 + 2 * slot, &head.to_le_bytes());
        self.poke(ring + 2, &available.to_le_bytes());
    }

    /// Says something else of how much is available.
    pub fn set_available(&mut self, index: u16, by: i8) {
        let queue = self.queue(index);
        queue.available = queue.available.wrapping_add_signed(by.into());
        let (at, available) = (queue.base + AVAIL + 2, queue.available);
        self.poke(at, &available.to_le_bytes());
    }

    /// Asks for interrupts from used index `from` on, or with these flags, whichever was negotiated.
    pub fn set_interrupts(&mut self, index: u16, flags: u16, from: u16) {
        let queue = *self.queue(index);
        self.poke(queue.base + AVAIL, &flags.to_le_bytes());
        self.poke(queue.base + AVAIL + 4 + 2 * u64::from(queue.size), &from.to_le_bytes());
    }

    /// Makes a request, and finds it answered as it must be.
    pub fn ask(&mut self, rig: &mut Rig, known: &Known) {
        if !known.feed.is_empty() {
            rig.feed(0, known.feed);
        }
        let mut parts = Vec::new();
        for part in &known.parts {
            parts.push(match part {
                Part::Say(bytes) => {
                    let at = self.buffer(bytes.len() as u32);
                    self.poke(at, bytes);
                    (at, bytes.len() as u32, false)
                }
                Part::Room(len) => (self.buffer(*len), *len, true),
            });
        }
        let sound = parts.iter().all(|&(at, len, _)| is_ram(at, len.into()));
        assert!(sound, "there is no room for a good request: {parts:x?}");
        let ring = |rig: &Rig| place(&rig.state(), known.queue);
        let (_, before) = ring(rig);
        self.offer(known.queue, &parts, false);
        rig.kick(known.queue);
        let (used, index) = ring(rig);
        assert_eq!(index, before.wrapping_add(1), "a good request was not answered");
        let slot = u64::from(before & (self.queue(known.queue).size - 1));
        let len: u32 = self.ram.read_obj(GuestAddress(used + 8 + 8 * slot)).expect("the used ring lies in RAM");
        let (least, most) = known.answer;
        assert!((least..=most).contains(&len), "a good request got {len} bytes");
    }
}

/// A queue's used ring, and where the device stands in it.
fn place(state: &VirtioPciStateV1, queue: u16) -> (u64, u16) {
    assert!(!state.needs_reset, "a device that was reset and asked nothing wrong needs another reset");
    let queue = state.queues[usize::from(queue)];
    (queue.device, queue.next_used)
}

fn encode((at, len, flags, next): Descriptor) -> [u8; 16] {
    let word = u128::from(at) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
    word.to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_ram_if_there_is_so_much() {
        let mut driver = Driver::new(&Rig::new(3, false));
        // Some fit only in the lower place, some only in what is left of none.
        for len in [1, 66_000, 66_000, 60_000, 60_000, 66_000, 512, 81_920, 65_536, 65_536] {
            let at = driver.buffer(len);
            assert!(is_ram(at, len.into()), "{at:#x}+{len:#x}");
        }
        driver.buffer(u32::MAX);
        assert!(is_ram(driver.buffer(512), 512));
    }
}
