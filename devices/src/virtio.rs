//! Virtio 1.2 devices over PCI.
//!
//! [`VirtioDevice`] is a device's face to its transport ([`pci`]): what it offers, its configuration space, and a life
//! cycle. The transport owns queues' addresses, status and MSI-X; it hands the negotiated queues over on `activate` and
//! takes the device back to its initial state with `reset`.
//!
//! ```text
//!             activate                pause
//!   Inactive ───────────▶ Running ─────────────▶ Paused (no guest memory is touched,
//!    │ ▲                    │   ◀─────────────     ▲      no interrupt raised) ── save
//!    │ └──── reset ─────────┴──────── resume       │
//!    └── restore, activate with `paused` ──────────┘
//! ```
//!
//! An active device is its [`worker`] threads, which the transport owns: it pauses, resumes and ends them. Requests never run
//! on a vCPU.

mod areas;
pub mod balloon;
pub mod block;
pub mod console;
mod courtesy;
mod held;
pub mod net;
pub mod pci;
pub mod rate;
mod ring;
pub mod rng;
pub mod state;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
pub mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use self::state::{DeviceState, StateError};
use self::worker::Workers;
use crate::counters::Counters;

/// Guest RAM as devices see it. Shared: all accesses are volatile, through vm-memory.
pub type GuestRam = Arc<GuestMemoryMmap>;

/// Virtio device type numbers (virtio 1.2 §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceType {
    /// Network card (§5.1).
    Net = 1,
    /// Block device (§5.2).
    Block = 2,
    /// Console (§5.3).
    Console = 3,
    /// Entropy (§5.4).
    Rng = 4,
    /// Memory balloon (§5.5).
    Balloon = 5,
    /// Sockets between guest and host (§5.10).
    Vsock = 19,
}

/// How a device tells its driver that something happened.
pub trait Interrupt: Send + Sync {
    /// Used buffers wait in queue `queue`.
    fn queue(&self, queue: u16);
    /// The configuration space changed.
    fn config(&self);
    /// The driver broke the protocol: sets DEVICE_NEEDS_RESET and tells the driver (§2.1.2). The device must then touch
    /// nothing more until it is reset.
    fn needs_reset(&self);
}

/// One negotiated virtqueue, given to a device on activation.
pub struct ActiveQueue {
    /// The queue's index in the device.
    pub index: u16,
    /// Ring addresses and positions; valid when handed over, contents untrusted.
    pub queue: Queue,
    /// Written when the driver kicks the queue.
    pub kick: EventFd,
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Guest RAM.
    pub ram: GuestRam,
    /// Negotiated feature bits.
    pub features: u64,
    /// The queues that the driver enabled, by index, ascending. May lack queues that the device offers.
    pub queues: Vec<ActiveQueue>,
    /// The way back to the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// Whether the device is to touch nothing until it is resumed: it comes out of a saved state.
    pub paused: bool,
}

/// How far a device has come in a queue: what is in between is not in flight once the device is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePosition {
    /// The queue's index in the device.
    pub index: u16,
    /// The place in the available ring from which the next chain is taken.
    pub next_avail: u16,
    /// The place in the used ring at which the next chain is given back.
    pub next_used: u16,
}

/// Why a device could not be activated. The driver sees DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// A queue without which the device cannot work was left disabled.
    #[error("queue {0} is not enabled")]
    MissingQueue(u16),
    /// The worker thread or one of its descriptors could not be made.
    #[error("cannot start the device's worker")]
    Worker(#[source] std::io::Error),
}

/// A virtio device behind a transport. Methods are called by one thread at a time.
pub trait VirtioDevice: Send {
    /// The device's type number.
    fn device_type(&self) -> DeviceType;
    /// Feature bits offered, without the transport's (VERSION_1 is added by the transport).
    fn features(&self) -> u64;
    /// The largest size of each queue; its length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];
    /// How many interrupt vectors it offers: the drivers' custom is one for each queue and one for the configuration, or with
    /// fewer one for all queues.
    fn vectors(&self) -> u16 {
        self.queue_max_sizes().len() as u16 + 1
    }
    /// Reads the device-specific configuration; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the device-specific configuration; most devices have nothing writable.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Starts serving the queues; the device is active as long as the threads live.
    ///
    /// # Errors
    /// When a queue that it needs is missing, or a thread cannot be had.
    fn activate(&mut self, activation: Activation) -> Result<Workers, ActivateError>;
    /// Forgets what the driver set up. The threads have ended, with what was in flight completed or dropped. Idempotent.
    fn reset(&mut self) {}
    /// What the device itself holds beyond its queues. Called while it is paused or inactive.
    fn save(&self) -> DeviceState;
    /// Takes over what [`VirtioDevice::save`] gave, on a new device that is then activated, or not.
    ///
    /// # Errors
    /// When the state is of another sort of device, or of one that this one cannot stand in for.
    fn restore(&mut self, state: DeviceState) -> Result<(), StateError>;
    /// The device's counters.
    fn counters(&self) -> Arc<dyn Counters>;
}

/// Copies the part of `config` that an access covers; bytes past its end read as zero.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    for (i, byte) in data.iter_mut().enumerate() {
        let at = offset.saturating_add(i as u64);
        *byte = usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0);
    }
}

/// A flag that lets one message through until it is cleared: a guest can repeat a mistake faster than a log can hold it.
#[derive(Debug, Default)]
pub struct OncePerReset(AtomicBool);

impl OncePerReset {
    /// True the first time after a reset.
    pub fn first(&self) -> bool {
        !self.0.swap(true, Ordering::Relaxed)
    }

    /// Lets the next one through.
    pub fn clear(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}
