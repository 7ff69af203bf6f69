//! Bare-metal guests: tiny programs assembled at run time, and the monitor they run under.
//!
//! ```text
//! program::Asm ─► image::{pvh, bzimage} ─► vm::Setup ─► civic-vmm process ─► vm::Vm (API socket, serial console)
//! ```
//!
//! They need `/dev/kvm`, but not one that can run Linux: no instruction here is beyond KVM's own emulator, which is what
//! executes such guests on a host without `vmx` or `svm` (about 1 µs an instruction). That emulator has no IRET for 32-bit
//! protected mode, so programs that take interrupts are 64-bit ones.
//!
//! What a guest observed it tells over the serial port; the test asserts on that.

pub mod image;
pub mod program;
pub mod syscalls;
pub mod virtio;
pub mod vm;
