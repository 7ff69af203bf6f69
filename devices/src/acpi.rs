//! The machine's ACPI side: the tables that describe it and the fixed hardware behind them.
//!
//! ACPI 6.5, not hardware-reduced: the guest starts in ACPI mode (there is no SMI command), with the in-kernel PIC, PIT,
//! IOAPIC and local APICs of the hypervisor.

pub mod aml;
pub mod clock;
pub mod generation;
pub mod hotplug;
pub mod power;
pub mod tables;
