//! What a device needs to interrupt the guest, whoever delivers it.

use std::io;
use std::sync::Arc;

/// A level- or edge-triggered interrupt line of the IOAPIC/PIC pair, by its global system interrupt number.
pub trait IrqLine: Send + Sync {
    /// Raises (true) or lowers (false) the line. Level-triggered users keep it high while an event is pending;
    /// edge-triggered ones pulse it.
    fn set(&self, high: bool);
}

/// The address and data that a message-signalled interrupt writes (PCI 3.0 §6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// Message address (0xfee…, in a PC).
    pub address: u64,
    /// Message data: vector, delivery and trigger mode.
    pub data: u32,
}

/// One message-signalled interrupt source of the hypervisor (with KVM: an irqfd and its GSI route).
pub trait MsiSource: Send + Sync {
    /// Routes the source to `message`, replacing the route before.
    fn route(&self, message: MsiMessage) -> io::Result<()>;
    /// Fires the message. Callable from any thread; never blocks.
    fn fire(&self);
}

/// Gives out message-signalled interrupt sources.
pub trait MsiAllocator: Send + Sync {
    /// A fresh source, not yet routed. An error when the hypervisor has no more.
    fn allocate(&self) -> io::Result<Arc<dyn MsiSource>>;
}
