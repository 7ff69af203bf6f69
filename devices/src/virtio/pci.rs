//! The modern virtio PCI transport (virtio 1.2 §4.1): capabilities, common configuration, notifications, MSI-X.
//!
//! One 64-bit BAR holds everything, a page or more per structure:
//!
//! ```text
//! 0x0000 common configuration   0x1000 ISR   0x2000 device configuration
//! 0x3000 notifications, 4 bytes a queue      0x4000 MSI-X table   0x5000 MSI-X pending bits
//! ```
//!
//! No legacy interface and no INTx: a driver without MSI-X gets no interrupts. Kicks reach the device's thread through an
//! eventfd that the hypervisor signals by itself ([`Doorbells`]); a vCPU comes here only for configuration.
//!
//! Lock order: `config`, then `state`, then [`Msix`]'s. A device's thread takes only the last (through [`PciInterrupt`]), so
//! `reset` may wait for it with `state` held.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tracing::{debug, warn};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::state::{QueueStateV1, StateError, VirtioPciStateV1};
use super::worker::Workers;
use super::{Activation, ActiveQueue, DeviceType, GuestRam, Interrupt, VirtioDevice};
use crate::counters::Counters;
use crate::irq::MsiAllocator;
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::msix::{self, Msix, NO_VECTOR};
use crate::pci::{BarWindow, Doorbells, Function};

#[cfg(test)]
mod tests;

/// Length of the BAR.
pub const BAR_LEN: u64 = 0x8000;
const BAR: u8 = 0;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const NOTIFY_MULTIPLIER: u32 = 4;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const PAGE: u64 = 0x1000;

const VENDOR: u16 = 0x1af4;
const VENDOR_CAPABILITY: u8 = 0x09;
/// Capability types (§4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Device status bits (§2.1).
pub mod status {
    /// The guest has found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on.
    pub const NEEDS_RESET: u8 = 64;
}

const VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// A device's way to its driver: MSI-X vectors and the flags behind them.
struct PciInterrupt {
    msix: Arc<Msix>,
    queue_vectors: Vec<AtomicU16>,
    config_vector: AtomicU16,
    isr: AtomicU8,
    needs_reset: AtomicBool,
    generation: AtomicU8,
}

impl PciInterrupt {
    fn clear(&self) {
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        self.isr.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }

    /// The vector that the driver asked for, or [`NO_VECTOR`] when there is none such (§4.1.5.1.2.1).
    fn checked(&self, vector: u16) -> u16 {
        if vector < self.msix.count() { vector } else { NO_VECTOR }
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, queue: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        if let Some(vector) = self.queue_vectors.get(usize::from(queue)) {
            self.msix.fire(vector.load(Ordering::Acquire));
        }
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.msix.fire(self.config_vector.load(Ordering::Acquire));
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.config();
    }
}

/// What the driver has set up for one queue.
#[derive(Clone, Copy)]
struct QueueSetup {
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

struct State {
    device: Box<dyn VirtioDevice>,
    /// The device's threads while it is active. They end before it is reset.
    workers: Workers,
    status: u8,
    offered_select: u32,
    accepted_select: u32,
    accepted: u64,
    queue_select: u16,
    queues: Vec<QueueSetup>,
    bound_at: Option<u64>,
    /// It was shut down: whoever still comes, came too late.
    gone: bool,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    id: String,
    kind: DeviceType,
    config: Mutex<ConfigSpace>,
    pci_cfg: usize,
    msix_cap: usize,
    state: Mutex<State>,
    interrupt: Arc<PciInterrupt>,
    msix: Arc<Msix>,
    kicks: Vec<EventFd>,
    max_sizes: Vec<u16>,
    ram: GuestRam,
    doorbells: Arc<dyn Doorbells>,
    counters: Arc<dyn Counters>,
    driven: Arc<AtomicBool>,
}

impl VirtioPci {
    /// Puts `device` behind a function whose BAR starts out at `base` (aligned to [`BAR_LEN`]); `id` names it in logs.
    ///
    /// # Errors
    /// When the hypervisor has no more interrupt sources, or the process no more descriptors.
    pub fn new(
        id: &str,
        device: Box<dyn VirtioDevice>,
        base: u64,
        ram: GuestRam,
        interrupts: &dyn MsiAllocator,
        doorbells: Arc<dyn Doorbells>,
    ) -> io::Result<Self> {
        let max_sizes = device.queue_max_sizes().to_vec();
        let msix = Arc::new(Msix::new(device.vectors(), interrupts)?);
        let kind = device.device_type();
        let (config, msix_cap, pci_cfg) = config_space(kind, base, &msix);
        let kicks = max_sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect::<io::Result<_>>()?;
        let interrupt = Arc::new(PciInterrupt {
            msix: Arc::clone(&msix),
            queue_vectors: max_sizes.iter().map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config_vector: AtomicU16::new(NO_VECTOR),
            isr: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            generation: AtomicU8::new(0),
        });
        let counters = device.counters();
        let state = State {
            queues: fresh_queues(&max_sizes),
            device,
            workers: Workers::default(),
            status: 0,
            offered_select: 0,
            accepted_select: 0,
            accepted: 0,
            queue_select: 0,
            bound_at: None,
            gone: false,
        };
        Ok(Self {
            id: id.to_owned(),
            kind,
            config: Mutex::new(config),
            pci_cfg,
            msix_cap,
            state: Mutex::new(state),
            interrupt,
            msix,
            kicks,
            max_sizes,
            ram,
            doorbells,
            counters,
            driven: Arc::default(),
        })
    }

    /// Tells whether the guest has a driver that uses the device. Outlives it.
    pub fn driven(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.driven)
    }

    /// The name given at construction.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The device's virtio type.
    pub fn kind(&self) -> DeviceType {
        self.kind
    }

    /// The device's counters.
    pub fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.counters)
    }

    /// Stops the device's thread from touching guest memory; returns when what was in flight is complete.
    pub fn pause(&self) {
        self.state().workers.pause();
    }

    /// Undoes [`VirtioPci::pause`].
    pub fn resume(&self) {
        self.state().workers.resume();
    }

    /// Everything the guest could see of the function or has set in it. To be called while it is paused.
    pub fn save(&self) -> VirtioPciStateV1 {
        let config = self.config_space().save();
        let state = self.state();
        let positions = state.workers.positions();
        let vector = |v: &AtomicU16| v.load(Ordering::Acquire);
        let queue = |(index, setup): (usize, &QueueSetup)| {
            let position = positions.iter().find(|position| usize::from(position.index) == index);
            QueueStateV1 {
                size: setup.size,
                enabled: setup.enabled,
                descriptors: setup.descriptors,
                driver: setup.driver,
                device: setup.device,
                vector: vector(&self.interrupt.queue_vectors[index]),
                next_avail: position.map_or(0, |position| position.next_avail),
                next_used: position.map_or(0, |position| position.next_used),
            }
        };
        VirtioPciStateV1 {
            config,
            msix: self.msix.save(),
            status: state.status,
            needs_reset: self.interrupt.needs_reset.load(Ordering::Acquire),
            offered_select: state.offered_select,
            accepted_select: state.accepted_select,
            accepted: state.accepted,
            queue_select: state.queue_select,
            isr: self.interrupt.isr.load(Ordering::Acquire),
            generation: self.interrupt.generation.load(Ordering::Acquire),
            config_vector: vector(&self.interrupt.config_vector),
            queues: state.queues.iter().enumerate().map(queue).collect(),
            device: state.device.save(),
        }
    }

    /// Takes over what [`VirtioPci::save`] gave, on a new function that is not plugged yet. An active device comes back paused.
    ///
    /// # Errors
    /// When the state is of another device, or none that this one can be in; the function is then to be thrown away.
    pub fn restore(&self, saved: VirtioPciStateV1) -> Result<(), StateError> {
        let mut state = self.state();
        if saved.queues.len() != state.queues.len() {
            let (saved, now) = (saved.queues.len().to_string(), state.queues.len().to_string());
            return Err(StateError::Differs { what: "the number of queues", saved, now });
        }
        let offered = self.offered(&state);
        if saved.status & status::FEATURES_OK != 0 && saved.accepted & !offered != 0 {
            let (saved, now) = (format!("{:#x}", saved.accepted), format!("{offered:#x}"));
            return Err(StateError::Differs { what: "the set of features", saved, now });
        }
        let sized = |(queue, &max): (&QueueStateV1, &u16)| queue.size.is_power_of_two() && queue.size <= max;
        if !saved.queues.iter().zip(&self.max_sizes).all(sized) {
            return Err(StateError::Impossible("a queue is larger than the device's"));
        }
        if !self.config_space().restore(&saved.config) {
            return Err(StateError::Impossible("the configuration space is of another function"));
        }
        if !self.msix.restore(&saved.msix) {
            return Err(StateError::Impossible("the number of interrupt vectors is another"));
        }
        state.device.restore(saved.device)?;
        let interrupt = &self.interrupt;
        interrupt.isr.store(saved.isr, Ordering::Release);
        interrupt.generation.store(saved.generation, Ordering::Release);
        interrupt.needs_reset.store(saved.needs_reset, Ordering::Release);
        interrupt.config_vector.store(interrupt.checked(saved.config_vector), Ordering::Release);
        for (vector, queue) in interrupt.queue_vectors.iter().zip(&saved.queues) {
            vector.store(interrupt.checked(queue.vector), Ordering::Release);
        }
        state.status = saved.status & !status::NEEDS_RESET;
        state.offered_select = saved.offered_select;
        state.accepted_select = saved.accepted_select;
        state.accepted = saved.accepted;
        state.queue_select = saved.queue_select;
        for (setup, queue) in state.queues.iter_mut().zip(&saved.queues) {
            *setup = QueueSetup {
                size: queue.size,
                enabled: queue.enabled,
                descriptors: queue.descriptors,
                driver: queue.driver,
                device: queue.device,
            };
        }
        // A device that waits for its reset has no threads that serve.
        if state.status & status::DRIVER_OK != 0 && !saved.needs_reset {
            let positions: Vec<_> = saved.queues.iter().map(|queue| (queue.next_avail, queue.next_used)).collect();
            self.activate(&mut state, Some(&positions)).map_err(StateError::Activate)?;
        }
        Ok(())
    }

    /// Interrupts the driver for every queue. After a restore: an interrupt that was on its way is not part of any state, and
    /// drivers look before they believe.
    pub fn nudge(&self) {
        let enabled: Vec<_> = self.state().queues.iter().map(|queue| queue.enabled).collect();
        for (index, _) in enabled.iter().enumerate().filter(|(_, enabled)| **enabled) {
            self.interrupt.queue(index as u16);
        }
    }

    /// Stops the device for good, with what was in flight complete or dropped: it was unplugged, or the machine is being taken down.
    pub fn shut_down(&self) {
        let mut state = self.state();
        state.gone = true;
        state.workers = Workers::default();
        self.driven.store(false, Ordering::Release);
        state.device.reset();
        self.unbind(&mut state);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn config_space(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn offered(&self, state: &State) -> u64 {
        state.device.features() | VERSION_1
    }

    fn status(&self, state: &State) -> u8 {
        let broken = self.interrupt.needs_reset.load(Ordering::Acquire);
        state.status | if broken { status::NEEDS_RESET } else { 0 }
    }

    /// Reads the common configuration (§4.1.4.3): fields are read whole, or a 64-bit one by halves.
    fn common_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        let index = usize::from(state.queue_select);
        let queue = state.queues.get(index);
        let vector = |v: &AtomicU16| u64::from(v.load(Ordering::Acquire));
        let half = |value: u64, select: u32| match select {
            0 => value & 0xffff_ffff,
            1 => value >> 32,
            _ => 0,
        };
        let value = match offset {
            0x00 => u64::from(state.offered_select),
            0x04 => half(self.offered(&state), state.offered_select),
            0x08 => u64::from(state.accepted_select),
            0x0c => half(state.accepted, state.accepted_select),
            0x10 => vector(&self.interrupt.config_vector),
            0x12 => state.queues.len() as u64,
            0x14 => u64::from(self.status(&state)),
            0x15 => u64::from(self.interrupt.generation.load(Ordering::Acquire)),
            0x16 => u64::from(state.queue_select),
            0x18 => queue.map_or(0, |q| u64::from(q.size)),
            0x1a => self.interrupt.queue_vectors.get(index).map_or(u64::from(NO_VECTOR), vector),
            0x1c => queue.map_or(0, |q| u64::from(q.enabled)),
            0x1e => u64::from(state.queue_select),
            0x20 => queue.map_or(0, |q| q.descriptors),
            0x24 => queue.map_or(0, |q| q.descriptors >> 32),
            0x28 => queue.map_or(0, |q| q.driver),
            0x2c => queue.map_or(0, |q| q.driver >> 32),
            0x30 => queue.map_or(0, |q| q.device),
            0x34 => queue.map_or(0, |q| q.device >> 32),
            _ => 0,
        };
        for (byte, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = from;
        }
    }

    fn common_write(&self, offset: u64, data: &[u8]) {
        let mut raw = [0; 8];
        let Some(place) = raw.get_mut(..data.len()) else { return };
        place.copy_from_slice(data);
        let value = u64::from_le_bytes(raw);
        let mut state = self.state();
        let index = usize::from(state.queue_select);
        match offset {
            0x00 => state.offered_select = value as u32,
            0x04 | 0x12 | 0x15 | 0x1e => {}
            0x08 => state.accepted_select = value as u32,
            0x0c => {
                if state.status & status::FEATURES_OK == 0 && state.accepted_select < 2 {
                    let shift = 32 * state.accepted_select;
                    state.accepted &= !(0xffff_ffff << shift);
                    state.accepted |= (value & 0xffff_ffff) << shift;
                }
            }
            0x10 => {
                self.interrupt.config_vector.store(self.interrupt.checked(value as u16), Ordering::Release);
            }
            0x14 => self.set_status(&mut state, value as u8),
            0x16 => state.queue_select = value as u16,
            0x1a => {
                if let Some(vector) = self.interrupt.queue_vectors.get(index) {
                    vector.store(self.interrupt.checked(value as u16), Ordering::Release);
                }
            }
            _ => self.queue_write(&mut state, index, offset, data.len(), value),
        }
    }

    fn queue_write(&self, state: &mut State, index: usize, offset: u64, len: usize, value: u64) {
        // After the driver said that it is ready, its rings stay where they are.
        if state.status & status::DRIVER_OK != 0 {
            return;
        }
        let Some(queue) = state.queues.get_mut(index) else { return };
        let merge = |old: u64, high: bool| match (len, high) {
            (8, false) => value,
            (_, false) => old & !0xffff_ffff | value & 0xffff_ffff,
            (_, true) => old & 0xffff_ffff | value << 32,
        };
        match offset {
            0x18 if (value as u16).is_power_of_two() && value as u16 <= self.max_sizes[index] => {
                queue.size = value as u16
            }
            0x1c => queue.enabled |= value == 1,
            0x20 => queue.descriptors = merge(queue.descriptors, false),
            0x24 => queue.descriptors = merge(queue.descriptors, true),
            0x28 => queue.driver = merge(queue.driver, false),
            0x2c => queue.driver = merge(queue.driver, true),
            0x30 => queue.device = merge(queue.device, false),
            0x34 => queue.device = merge(queue.device, true),
            _ => {}
        }
    }

    fn set_status(&self, state: &mut State, new: u8) {
        if new == 0 {
            return self.reset(state);
        }
        // A driver may only add bits (§3.1.1); it cannot undo steps but by a reset, nor set what is the device's.
        let old = state.status;
        let mut next = old | (new & !status::NEEDS_RESET);
        if next & !old & status::FEATURES_OK != 0 {
            let unknown = state.accepted & !self.offered(state);
            if unknown != 0 || state.accepted & VERSION_1 == 0 {
                debug!(device = %self.id, "features {:#x} refused", state.accepted);
                next &= !status::FEATURES_OK;
            }
        }
        if next & !old & status::DRIVER_OK != 0 {
            if next & status::FEATURES_OK == 0 {
                next &= !status::DRIVER_OK;
            } else if let Err(e) = self.activate(state, None) {
                warn!(device = %self.id, "{e}: the driver must reset the device");
                state.status = next;
                return self.interrupt.needs_reset();
            }
        }
        state.status = next;
    }

    /// Starts the device, at the saved positions of all queues and paused where there are such.
    fn activate(&self, state: &mut State, positions: Option<&[(u16, u16)]>) -> Result<(), String> {
        if state.gone {
            return Err("it is gone".into());
        }
        let mut queues = Vec::new();
        for (index, setup) in state.queues.iter().enumerate().filter(|(_, q)| q.enabled) {
            let queue = self.queue(setup, self.max_sizes[index], state.accepted);
            let mut queue = queue.ok_or_else(|| format!("queue {index} does not lie in guest memory"))?;
            if let Some(&(next_avail, next_used)) = positions.and_then(|positions| positions.get(index)) {
                queue.set_next_avail(next_avail);
                queue.set_next_used(next_used);
            }
            let kick = self.kicks[index].try_clone().map_err(|e| e.to_string())?;
            queues.push(ActiveQueue { index: index as u16, queue, kick });
        }
        let activation = Activation {
            ram: Arc::clone(&self.ram),
            features: state.accepted,
            queues,
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
            paused: positions.is_some(),
        };
        state.workers = state.device.activate(activation).map_err(|e| e.to_string())?;
        self.driven.store(true, Ordering::Release);
        Ok(())
    }

    fn queue(&self, setup: &QueueSetup, max: u16, features: u64) -> Option<Queue> {
        let mut queue = Queue::new(max).ok()?;
        queue.set_size(setup.size);
        queue.try_set_desc_table_address(GuestAddress(setup.descriptors)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(setup.driver)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(setup.device)).ok()?;
        queue.set_event_idx(features & 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX != 0);
        queue.set_ready(true);
        queue.is_valid(&*self.ram).then_some(queue)
    }

    fn reset(&self, state: &mut State) {
        state.workers = Workers::default();
        self.driven.store(false, Ordering::Release);
        state.device.reset();
        self.interrupt.clear();
        state.status = 0;
        state.offered_select = 0;
        state.accepted_select = 0;
        state.accepted = 0;
        state.queue_select = 0;
        state.queues = fresh_queues(&self.max_sizes);
        for kick in &self.kicks {
            let _ = kick.read();
        }
    }

    fn unbind(&self, state: &mut State) {
        if let Some(base) = state.bound_at.take() {
            for (i, kick) in self.kicks.iter().enumerate() {
                if let Err(e) = self.doorbells.unbind(notify_address(base, i), kick) {
                    warn!(device = %self.id, queue = i, "cannot unbind a doorbell: {e}");
                }
            }
        }
    }

    /// The window through which configuration space reaches the BAR (§4.1.4.9): offset and length, when sound.
    fn window(config: &ConfigSpace, cap: usize) -> Option<(u64, usize)> {
        let offset = u64::from(config.dword(cap + 8));
        let len = config.dword(cap + 12);
        let sound = config.byte(cap + 4) == BAR
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(u64::from(len))
            && offset + u64::from(len) <= BAR_LEN;
        sound.then_some((offset, len as usize))
    }
}

fn fresh_queues(max_sizes: &[u16]) -> Vec<QueueSetup> {
    let fresh = |&size: &u16| QueueSetup { size, enabled: false, descriptors: 0, driver: 0, device: 0 };
    max_sizes.iter().map(fresh).collect()
}

fn notify_address(base: u64, queue: usize) -> u64 {
    base + NOTIFY + u64::from(NOTIFY_MULTIPLIER) * queue as u64
}

/// Configuration space, and where its MSI-X and PCI-configuration-access capabilities are.
fn config_space(kind: DeviceType, base: u64, msix: &Msix) -> (ConfigSpace, usize, usize) {
    let class = match kind {
        DeviceType::Net => [0x02, 0x00, 0x00],
        DeviceType::Block => [0x01, 0x00, 0x00],
        DeviceType::Console | DeviceType::Vsock => [0x07, 0x80, 0x00],
        DeviceType::Rng => [0x10, 0x00, 0x00],
        // Of no defined class (PCI Code and ID 1.11 §1.1).
        DeviceType::Balloon => [0xff, 0x00, 0x00],
    };
    let mut config = ConfigSpace::new(&Identity {
        vendor: VENDOR,
        device: 0x1040 + kind as u16,
        revision: 1,
        class,
        subsystem_vendor: VENDOR,
        subsystem: 0x1040 + kind as u16,
    });
    config.add_bar(BAR, base, BAR_LEN);
    let (body, writable) = msix.capability(BAR, MSIX_TABLE as u32, MSIX_PENDING as u32);
    let msix_cap = config.add_capability(msix::CAPABILITY_ID, &body, &writable);
    let mut vendor = |kind: u8, offset: u64, len: u64, extra: &[u8], writable: &[u8]| {
        let total = (16 + extra.len()) as u8;
        let mut body = vec![total, kind, BAR, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((len as u32).to_le_bytes());
        body.extend(extra);
        config.add_capability(VENDOR_CAPABILITY, &body, writable)
    };
    vendor(CFG_COMMON, COMMON, 0x38, &[], &[]);
    vendor(CFG_ISR, ISR, 1, &[], &[]);
    vendor(CFG_DEVICE, DEVICE, PAGE, &[], &[]);
    vendor(CFG_NOTIFY, NOTIFY, PAGE, &NOTIFY_MULTIPLIER.to_le_bytes(), &[]);
    // The access window's bar, offset and length are the driver's to write; its data bytes are caught on access.
    let writable = [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    let pci_cfg = vendor(CFG_PCI, 0, 0, &[0; 4], &writable);
    (config, msix_cap, pci_cfg)
}

impl Function for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let offset = usize::from(offset);
        let config = self.config_space();
        let window = Self::window(&config, self.pci_cfg);
        config.read(offset, data);
        drop(config);
        if let Some((at, len)) = window
            && offset == self.pci_cfg + 16
            && data.len() >= len
        {
            self.bar_read(BAR, at, &mut data[..len]);
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let offset = usize::from(offset);
        let mut config = self.config_space();
        config.write(offset, data);
        let control_at = self.msix_cap + msix::CONTROL;
        if offset < control_at + 2 && offset + data.len() > control_at {
            let control = u16::from_le_bytes([config.byte(control_at), config.byte(control_at + 1)]);
            self.msix.set_control(control);
        }
        let window = Self::window(&config, self.pci_cfg);
        drop(config);
        if let Some((at, len)) = window
            && offset == self.pci_cfg + 16
            && data.len() >= len
        {
            self.bar_write(BAR, at, &data[..len]);
        }
    }

    fn decoded(&self) -> Vec<BarWindow> {
        self.config_space().decoded()
    }

    fn moved(&self, _bar: u8, base: Option<u64>) {
        let mut state = self.state();
        self.unbind(&mut state);
        let Some(base) = base.filter(|_| !state.gone) else { return };
        for (i, kick) in self.kicks.iter().enumerate() {
            // Without a doorbell a kick still arrives, by way of the vCPU.
            if let Err(e) = self.doorbells.bind(notify_address(base, i), kick) {
                warn!(device = %self.id, queue = i, "cannot bind a doorbell: {e}");
                for (j, kick) in self.kicks[..i].iter().enumerate() {
                    let _ = self.doorbells.unbind(notify_address(base, j), kick);
                }
                return;
            }
        }
        state.bound_at = Some(base);
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset & !(PAGE - 1) {
            COMMON => self.common_read(offset - COMMON, data),
            ISR if offset == ISR => data[0] = self.interrupt.isr.swap(0, Ordering::AcqRel),
            DEVICE => self.state().device.read_config(offset - DEVICE, data),
            MSIX_TABLE => self.msix.read_table(offset - MSIX_TABLE, data),
            MSIX_PENDING => self.msix.read_pending(offset - MSIX_PENDING, data),
            _ => {}
        }
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        match offset & !(PAGE - 1) {
            COMMON => self.common_write(offset - COMMON, data),
            DEVICE => self.state().device.write_config(offset - DEVICE, data),
            NOTIFY => {
                let queue = (offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER);
                if let Some(kick) = self.kicks.get(queue as usize) {
                    let _ = kick.write(1);
                }
            }
            MSIX_TABLE => self.msix.write_table(offset - MSIX_TABLE, data),
            _ => {}
        }
    }
}
