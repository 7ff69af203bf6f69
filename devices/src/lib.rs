//! The devices of a machine: buses, the PCI root and its functions, virtio, the serial port and the ACPI hardware.
//!
//! Invariants:
//! * nothing here knows KVM or fork: the hypervisor is reached through [`irq`] and [`pci::Doorbells`];
//! * nothing a guest writes can panic, block for long, or make a device grow without bound.

pub mod acpi;
pub mod bus;
pub mod console_hub;
pub mod counters;
mod entropy;
pub mod irq;
pub mod isolated;
pub mod mirror;
pub mod pci;
pub mod serial;
pub mod tap;
pub mod virtio;
