//! The PCI root: one bus of conventional functions, reached through ECAM and through ports 0xcf8–0xcff.
//!
//! ```text
//!  vCPU ─▶ ECAM / config ports ─▶ root ─▶ Function::config_write
//!                                   │          │ (BAR or command register changed)
//!                                   ◀──────────┘
//!                                   └─▶ Bus::remove / insert, Function::moved
//! ```
//!
//! Invariants: a BAR is on the MMIO bus exactly while memory decoding is enabled and its place is free; device code runs
//! without the root's lock, except for configuration accesses of the same slot.
//!
//! PCI Local Bus 3.0 chapter 6, PCI Express 5.0 §7.2.2 (ECAM).

pub mod config;
pub mod msix;
pub mod root;

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// A memory BAR that is decoded at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarWindow {
    /// BAR number, 0 to 5.
    pub bar: u8,
    /// Guest-physical base address.
    pub base: u64,
    /// Length in bytes, a power of two.
    pub len: u64,
}

/// A single-function PCI device.
pub trait Function: Send + Sync {
    /// Reads configuration space; `offset + data.len() <= 4096`, at most 4 bytes.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space; as [`Function::config_read`].
    fn config_write(&self, offset: u16, data: &[u8]);
    /// The BARs decoded now, as the configuration space says.
    fn decoded(&self) -> Vec<BarWindow>;
    /// A BAR has been put at `base`, or taken off the bus.
    fn moved(&self, bar: u8, base: Option<u64>);
    /// Reads from a BAR.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);
    /// Writes to a BAR.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);
}

/// Lets the hypervisor turn a guest's write to an address into an eventfd signal (with KVM: ioeventfd).
pub trait Doorbells: Send + Sync {
    /// Any write to `address` signals `kick` without reaching the device.
    fn bind(&self, address: u64, kick: &EventFd) -> io::Result<()>;
    /// Undoes `bind`.
    fn unbind(&self, address: u64, kick: &EventFd) -> io::Result<()>;
}

/// A function's place on bus 0: device number, function 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u8);

impl std::fmt::Display for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "0000:00:{:02x}.0", self.0)
    }
}
