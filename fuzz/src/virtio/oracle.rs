//! What must hold after a device has run, whatever its driver did: judged from the function's state and RAM before and after.
//!
//! * Bytes changed only where an available chain lets the device write, and in used rings.
//! * Chains come back at most once, only if they were made available, and never with a longer answer than they have room for.
//! * No more than the available chains was taken; in a paused device none is in flight.
//! * What the driver could not have meant (a chain without an end, a buffer outside RAM) is not answered.
//! * A driver that wants an interrupt for a used chain gets one.
//!
//! A driver that lets a device write into a ring or a descriptor table cannot hold it to anything: then there is no verdict.

use civic_devices::virtio::pci::status;
use civic_devices::virtio::state::{QueueStateV1, VirtioPciStateV1};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::chains::{Shape, resolve};
use super::memory::Snapshot;

type Range = (u64, u64);

/// A moment between steps: nothing runs.
pub struct Moment {
    /// The function, paused.
    pub state: VirtioPciStateV1,
    /// RAM.
    pub ram: Snapshot,
}

impl Moment {
    fn serving(&self) -> bool {
        self.state.status & status::DRIVER_OK != 0 && !self.state.needs_reset
    }
}

/// What a queue's device did between two moments.
struct Work {
    queue: QueueStateV1,
    /// The available ring's flags and, behind its entries, the index from which on the driver wants an interrupt.
    asked: (u16, u16),
    /// Heads of the chains taken, in order.
    taken: Vec<u16>,
    /// The chains that were available and not taken: the device's as well, for now.
    left: Vec<Shape>,
    /// Heads and lengths given back, in order.
    used: Vec<(u32, u32)>,
    /// Of `taken`.
    shapes: Vec<Shape>,
}

/// Judges the step from `before` to `after`. False when there is nothing to hold the device to.
pub fn judge(before: Moment, after: &Moment) -> bool {
    let ran = after.state.status & status::DRIVER_OK != 0
        && (before.serving() || before.state.status & status::DRIVER_OK == 0);
    let works: Vec<_> = if ran { work(&before, after) } else { Vec::new() };
    if works.iter().any(|work| overlaps(&works, work)) {
        return false;
    }
    let mut ram = before.ram;
    for work in &works {
        for &(at, len) in work.shapes.iter().chain(&work.left).flat_map(|shape| &shape.writable) {
            ram.overlook(at, len, &after.ram);
        }
        let (at, len) = used_ring(&work.queue);
        ram.overlook(at, len, &after.ram);
        fair(work, after);
        interrupted(work, after);
    }
    if let Some(at) = ram.difference(&after.ram) {
        panic!("the device wrote to {at:#x}, where no chain let it (ran: {ran})");
    }
    true
}

fn work(before: &Moment, after: &Moment) -> Vec<Work> {
    let queues = before.state.queues.iter().zip(&after.state.queues);
    let ran = |(before_queue, queue): (&QueueStateV1, &QueueStateV1)| {
        let count = queue.next_avail.wrapping_sub(before_queue.next_avail);
        let slot = |nth: u16| before_queue.next_avail.wrapping_add(nth) % queue.size;
        let offered = |nth| before.ram.word(queue.driver.wrapping_add(4 + 2 * u64::from(slot(nth))));
        let head = |nth| offered(nth).expect("available rings lie in RAM");
        let taken: Vec<_> = (0..count).map(head).collect();
        let shapes = taken.iter().map(|&head| resolve(&before.ram, queue, head)).collect();
        let given = queue.next_used.wrapping_sub(before_queue.next_used);
        let used = |nth: u16| {
            let slot = before_queue.next_used.wrapping_add(nth) % queue.size;
            let at = queue.device + 4 + 8 * u64::from(slot);
            after.ram.dword(at).zip(after.ram.dword(at + 4)).expect("used rings lie in RAM")
        };
        // A device that could not be activated has taken nothing out of rings that may lie anywhere.
        let word =
            |at| before.ram.word(at).unwrap_or_else(|| if count == 0 { 0 } else { panic!("no ring lies at {at:#x}") });
        let available = before.ram.word(queue.driver.wrapping_add(2)).unwrap_or(queue.next_avail);
        let waiting = available.wrapping_sub(queue.next_avail).min(queue.size);
        let left = (count..count.saturating_add(waiting)).filter_map(offered);
        let left = left.map(|head| resolve(&before.ram, queue, head)).collect();
        let asked = (word(queue.driver), word(queue.driver.wrapping_add(4 + 2 * u64::from(queue.size))));
        Work { queue: *queue, asked, taken, left, used: (0..given).map(used).collect(), shapes }
    };
    queues.filter(|(_, queue)| queue.enabled).map(ran).collect()
}

/// Whether the device was told to write into what its work is made of.
fn overlaps(works: &[Work], work: &Work) -> bool {
    let meets = |a: Range, b: Range| a.0 < b.0.saturating_add(b.1) && b.0 < a.0.saturating_add(a.1) && a.1 > 0;
    let read = || {
        let size = u64::from(work.queue.size);
        let rings = [(work.queue.descriptors, 16 * size), (work.queue.driver, 6 + 2 * size)];
        rings
            .into_iter()
            .chain(work.shapes.iter().chain(&work.left).flat_map(|shape| shape.descriptors.iter().copied()))
    };
    let own = std::ptr::from_ref(work);
    works.iter().any(|other| {
        let written: Vec<_> =
            other.shapes.iter().chain(&other.left).flat_map(|shape| shape.writable.iter().copied()).collect();
        let ring = used_ring(&other.queue);
        read().any(|range| meets(ring, range) || written.iter().any(|&w| meets(w, range)))
            || written.iter().any(|&w| meets(w, used_ring(&work.queue)))
            || !std::ptr::eq(own, other) && meets(ring, used_ring(&work.queue))
    })
}

fn used_ring(queue: &QueueStateV1) -> Range {
    (queue.device, 6 + 8 * u64::from(queue.size))
}

/// What was taken and given back is as the driver may expect.
fn fair(work: &Work, after: &Moment) {
    let Work { queue, taken, used, shapes, .. } = work;
    assert!(taken.len() <= usize::from(queue.size), "more chains were taken than the ring holds");
    assert!(used.len() <= taken.len(), "{} chains were given back, {} taken", used.len(), taken.len());
    if !after.state.needs_reset {
        assert_eq!(used.len(), taken.len(), "a paused device has a chain in flight");
    }
    let mut open: Vec<_> = taken.iter().zip(shapes).collect();
    for &(head, len) in used {
        let found = open.iter().position(|(taken, _)| u32::from(**taken) == head);
        let (_, shape) = open.remove(found.unwrap_or_else(|| panic!("chain {head} came back without being taken")));
        assert!(shape.sound, "the malformed chain {head} was answered");
        assert!(u64::from(len) <= shape.room(), "chain {head} has room for {} bytes, got {len}", shape.room());
    }
    if !used.is_empty() {
        let index = after.ram.word(queue.device + 2);
        assert_eq!(index, Some(queue.next_used), "the used ring's index is not where the device stands");
    }
}

/// The driver was told of used chains if it wants to be (§2.7.7, §2.7.10).
fn interrupted(work: &Work, after: &Moment) {
    let given = work.used.len() as u16;
    let (flags, event) = work.asked;
    let wanted = if after.state.accepted & 1 << VIRTIO_RING_F_EVENT_IDX != 0 {
        work.queue.next_used.wrapping_sub(event).wrapping_sub(1) < given
    } else {
        given > 0 && flags & 1 == 0
    };
    assert!(!wanted || after.state.isr & 1 != 0, "no interrupt for {given} used chains");
}
