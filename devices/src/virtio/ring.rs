//! A device's side of one virtqueue: takes chains, gives them back used, interrupts when the driver wants it.
//!
//! Virtio 1.2 §2.7. What a correct driver cannot have done (a chain without an end, a buffer outside RAM, readable parts
//! after writable ones, an index out of range) is a [`Fault`]: with a request half understood there is no honest answer
//! but DEVICE_NEEDS_RESET.
//!
//! Invariants:
//! * one call serves a bounded number of chains, however fast the driver adds more: the rest waits for a kick that the
//!   ring gives itself, so that commands to the worker come through;
//! * a chain that was taken is given back by [`Ring::used`] or put back by [`Ring::put_back`].

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::areas::Areas;
use super::worker::Fault;
use super::{ActivateError, Activation, ActiveQueue, GuestRam, Interrupt, QueuePosition};

/// The ring features that every device offers.
pub const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// More descriptors than this in one chain is a fault. Drivers stay below the queue's size, which is smaller (§2.7.5.2).
const MAX_DESCRIPTORS: usize = 1024;

/// One descriptor chain.
pub struct Chain<'a> {
    /// Its name towards the driver.
    pub head: u16,
    /// What the driver says.
    pub readable: Areas<'a>,
    /// Where the device answers.
    pub writable: Areas<'a>,
}

/// Whose turn a part of a chain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The driver says something.
    Readable,
    /// The device answers.
    Writable,
}

/// What a device did with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It is done; so many bytes of its writable part were written, from the start.
    Used(u32),
    /// It could not be begun and comes again at the next call.
    NotNow,
}

/// Where the rings' fields are (§2.7.6, §2.7.8): flags, index, entries.
const INDEX: u64 = 2;
const ENTRIES: u64 = 4;
const AVAIL_ENTRY: u64 = 2;
const USED_ENTRY: u64 = 8;
/// A descriptor's size (§2.7.5).
const DESCRIPTOR: u64 = 16;

/// A virtqueue that is being served.
pub struct Ring {
    index: u16,
    queue: Queue,
    /// The used ring's index when the driver was last told of it, or when it did not want to be.
    told: u16,
    /// The available ring's index when it was last read: what is before it needs no look.
    available: u16,
    kick: EventFd,
    ram: GuestRam,
    interrupt: Arc<dyn Interrupt>,
}

impl Ring {
    /// Takes queue `index` out of an activation, with the eventfd that its worker is to wait for.
    ///
    /// # Errors
    /// `MissingQueue` when the driver did not enable it.
    pub fn take(activation: &mut Activation, index: u16) -> Result<(Self, EventFd), ActivateError> {
        let position = activation.queues.iter().position(|queue| queue.index == index);
        let position = position.ok_or(ActivateError::MissingQueue(index))?;
        let ActiveQueue { mut queue, kick, .. } = activation.queues.remove(position);
        queue.set_event_idx(activation.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        let for_worker = kick.try_clone().map_err(ActivateError::Worker)?;
        let ram = Arc::clone(&activation.ram);
        let interrupt = Arc::clone(&activation.interrupt);
        let (told, available) = (queue.next_used(), queue.next_avail());
        Ok((Self { index, queue, told, available, kick, ram, interrupt }, for_worker))
    }

    /// How many chains it holds at most.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Where it stands: chains taken and given back so far, modulo 2^16.
    pub fn position(&self) -> QueuePosition {
        let (next_avail, next_used) = (self.queue.next_avail(), self.queue.next_used());
        QueuePosition { index: self.index, next_avail, next_used }
    }

    /// Guest RAM, for [`Ring::next`].
    pub fn ram(&self) -> GuestRam {
        Arc::clone(&self.ram)
    }

    /// Serves waiting chains with `serve`, in order, until none waits, it says `NotNow`, or enough were served for now.
    ///
    /// # Errors
    /// A broken ring or chain, or the fault that `serve` found.
    pub fn serve(&mut self, mut serve: impl FnMut(Chain<'_>) -> Result<Served, Fault>) -> Result<(), Fault> {
        let ram = self.ram();
        let mut budget = 2 * u32::from(self.queue.size());
        self.ignore_kicks()?;
        loop {
            while let Some(chain) = self.next(&ram)? {
                let head = chain.head;
                match serve(chain)? {
                    Served::Used(len) => self.used(head, len)?,
                    Served::NotNow => {
                        self.put_back(1);
                        return self.notify();
                    }
                }
                // At once, not at the end: the driver can go on while the next request waits for its disk.
                self.notify()?;
                budget -= 1;
                if budget == 0 {
                    return self.kick_self();
                }
            }
            if !self.await_kick()? {
                return Ok(());
            }
        }
    }

    /// The next waiting chain.
    ///
    /// # Errors
    /// A broken ring or chain.
    pub fn next<'a>(&mut self, ram: &'a GuestMemoryMmap) -> Result<Option<Chain<'a>>, Fault> {
        let (mut readable, mut writable) = (Areas::default(), Areas::default());
        let head = self.walk(ram, |side, part| match side {
            Side::Readable => readable.push(part),
            Side::Writable => writable.push(part),
        })?;
        Ok(head.map(|head| Chain { head, readable, writable }))
    }

    /// Takes the next waiting chain, gives its parts to `part` in order, and returns its head. As [`Ring::next`], for a device
    /// that keeps parts in its own way.
    ///
    /// # Errors
    /// A broken ring or chain. Some parts may have been given.
    pub fn walk<'a>(
        &mut self,
        ram: &'a GuestMemoryMmap,
        mut part: impl FnMut(Side, VolatileSlice<'a>),
    ) -> Result<Option<u16>, Fault> {
        let (size, next) = (self.queue.size(), self.queue.next_avail());
        if next == self.available {
            self.available = self.read_available()?;
        }
        let waiting = self.available.wrapping_sub(next);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > size {
            return Err(Fault(format!("{waiting} chains wait in a ring of {size}")));
        }
        let head = read_word(ram, self.queue.avail_ring() + ENTRIES + AVAIL_ENTRY * u64::from(next % size))?;
        self.queue.set_next_avail(next.wrapping_add(1));
        let fault = |what: &str| Fault(format!("descriptor chain {head} {what}"));
        let mut table = Table { base: self.queue.desc_table(), entries: size.into(), indirect: false };
        let (mut index, mut count, mut bytes, mut side) = (head, 0, 0_u32, Side::Readable);
        let mut left = table.entries;
        loop {
            let descriptor = table.entry(ram, index).ok_or_else(|| fault("leaves its table"))?;
            if descriptor.refers_to_indirect_table() {
                table = table.enter(&descriptor).ok_or_else(|| fault("has a bad indirect table"))?;
                (index, left) = (0, table.entries);
                continue;
            }
            (count, left) = (count + 1, left - 1);
            if count > MAX_DESCRIPTORS {
                return Err(fault("is too long"));
            }
            match descriptor.is_write_only() {
                true => side = Side::Writable,
                false if side == Side::Readable => {}
                false => return Err(fault("has readable parts after writable ones")),
            }
            let len = descriptor.len();
            bytes = bytes.checked_add(len).ok_or_else(|| fault("is longer than 4 GiB"))?;
            // All in one region, as it nearly always is, costs a third to find.
            match ram.get_slice(descriptor.addr(), len as usize) {
                Ok(slice) if len > 0 => part(side, slice),
                _ => {
                    for slice in ram.get_slices(descriptor.addr(), len as usize) {
                        part(side, slice.map_err(|_| fault("reaches outside RAM"))?);
                    }
                }
            }
            if !descriptor.has_next() {
                return Ok(Some(head));
            }
            if left == 0 {
                return Err(fault("has no end"));
            }
            index = descriptor.next();
        }
    }

    /// Puts the last `count` chains taken back, to be taken again.
    pub fn put_back(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Gives a chain back to the driver with `len` bytes of its writable part written.
    ///
    /// # Errors
    /// `head` was never a valid index.
    pub fn used(&mut self, head: u16, len: u32) -> Result<(), Fault> {
        self.used_together([(head, len)])
    }

    /// Gives several chains back in one step: a driver sees all of them or none. So it must be for a frame that took several
    /// buffers (§5.1.6.3.2).
    ///
    /// # Errors
    /// A head was never a valid index.
    pub fn used_together(&mut self, chains: impl IntoIterator<Item = (u16, u32)>) -> Result<(), Fault> {
        let (base, size) = (self.queue.used_ring(), u64::from(self.queue.size()));
        let mut next = self.queue.next_used();
        for (head, len) in chains {
            if u64::from(head) >= size {
                return Err(Fault(format!("descriptor chain {head} is not of this queue")));
            }
            // The ring was within RAM when the queue was made: no sum below overflows.
            let at = base + ENTRIES + USED_ENTRY * (u64::from(next) % size);
            let entry = u64::from(head) | u64::from(len) << 32;
            slice(&self.ram, at, size_of_val(&entry))?.get_ref::<u64>(0).map_err(broken)?.store(entry.to_le());
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        write_word(&self.ram, base + INDEX, next, Ordering::Release)
    }

    /// Interrupts the driver if it wants to hear of the chains given back since the last time.
    ///
    /// # Errors
    /// A broken ring.
    pub fn notify(&mut self) -> Result<(), Fault> {
        let (told, used) = (std::mem::replace(&mut self.told, self.queue.next_used()), self.queue.next_used());
        if told == used {
            return Ok(());
        }
        // What the driver wants is read after it can see what was given back (§2.7.7.2): it writes and looks in the other order.
        fence(Ordering::SeqCst);
        let ring = self.queue.avail_ring();
        let wanted = if self.queue.event_idx_enabled() {
            let event = read_word(&self.ram, ring + ENTRIES + AVAIL_ENTRY * u64::from(self.queue.size()))?;
            used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(told)
        } else {
            u32::from(read_word(&self.ram, ring)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }

    /// Tells the driver that kicks are not needed for now.
    ///
    /// # Errors
    /// A broken ring.
    pub fn ignore_kicks(&mut self) -> Result<(), Fault> {
        // With EVENT_IDX the place at which a kick was last wanted lies behind by now.
        if self.queue.event_idx_enabled() {
            return Ok(());
        }
        write_word(&self.ram, self.queue.used_ring(), VRING_USED_F_NO_NOTIFY as u16, Ordering::Relaxed)
    }

    /// Asks the driver for a kick with the next chain; true when chains came meanwhile and nobody will kick for them.
    ///
    /// # Errors
    /// A broken ring.
    pub fn await_kick(&mut self) -> Result<bool, Fault> {
        let (ring, next) = (self.queue.used_ring(), self.queue.next_avail());
        let event = ring + ENTRIES + USED_ENTRY * u64::from(self.queue.size());
        let (at, value) = if self.queue.event_idx_enabled() { (event, next) } else { (ring, 0) };
        write_word(&self.ram, at, value, Ordering::Relaxed)?;
        // What is available is read after the driver can see that (§2.7.10.1): it adds and looks in the other order.
        fence(Ordering::SeqCst);
        self.available = self.read_available()?;
        Ok(self.available != next)
    }

    fn read_available(&self) -> Result<u16, Fault> {
        let at = self.queue.avail_ring() + INDEX;
        slice(&self.ram, at, 2)?.load(0, Ordering::Acquire).map(u16::from_le).map_err(broken)
    }

    /// Has the worker come back to this queue after it looked at its commands and other descriptors.
    ///
    /// # Errors
    /// The eventfd refused, which it has no reason to.
    pub fn kick_self(&mut self) -> Result<(), Fault> {
        self.kick.write(1).or_else(|e| match e.kind() {
            io::ErrorKind::WouldBlock => Ok(()),
            _ => Err(Fault(format!("cannot kick queue {}: {e}", self.index))),
        })
    }
}

/// A table of descriptors: the queue's, or one that a descriptor of that leads to (§2.7.5.3).
struct Table {
    base: u64,
    entries: u32,
    indirect: bool,
}

impl Table {
    /// A descriptor as it is now: read once, for the driver may change it.
    fn entry(&self, ram: &GuestMemoryMmap, index: u16) -> Option<Descriptor> {
        let at = self.base.checked_add(DESCRIPTOR * u64::from(index)).filter(|_| u32::from(index) < self.entries)?;
        let place = ram.get_slice(GuestAddress(at), DESCRIPTOR as usize).ok()?;
        Some(place.get_ref::<Descriptor>(0).ok()?.load())
    }

    /// The table that `descriptor` refers to; none if it is no table, or a table within one.
    fn enter(&self, descriptor: &Descriptor) -> Option<Self> {
        let entries = descriptor.len() / DESCRIPTOR as u32;
        let whole = descriptor.len().is_multiple_of(DESCRIPTOR as u32) && entries <= u16::MAX.into();
        (whole && !self.indirect).then_some(Self { base: descriptor.addr().0, entries, indirect: true })
    }
}

/// Guest memory that lies in one region, as rings do: found with a quarter of the instructions that `Bytes` takes on guest memory,
/// which can put accesses together from several. Measured with callgrind on `vsock::tests::bench`: a chain taken and given
/// back cost 2400 instructions, of 4400 for a packet in all.
fn slice(ram: &GuestMemoryMmap, at: u64, len: usize) -> Result<VolatileSlice<'_>, Fault> {
    ram.get_slice(GuestAddress(at), len).map_err(broken)
}

fn read_word(ram: &GuestMemoryMmap, at: u64) -> Result<u16, Fault> {
    slice(ram, at, 2)?.load(0, Ordering::Relaxed).map(u16::from_le).map_err(broken)
}

fn write_word(ram: &GuestMemoryMmap, at: u64, word: u16, order: Ordering) -> Result<(), Fault> {
    slice(ram, at, 2)?.store(word.to_le(), 0, order).map_err(broken)
}

fn broken(error: impl std::fmt::Display) -> Fault {
    Fault(format!("broken virtqueue: {error}"))
}
