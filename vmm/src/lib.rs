//! The monitor: one process per VM, made of the modules that `civic-vmm` (main.rs) puts together.
//!
//! ```text
//! main ─▶ directory, preflight, resources ─▶ supervisor ─▶ machine ─▶ kvm, vcpu, boot, cpu, memory, layout
//!   └───▶ server, audit ── control ──────────────────▲
//! ```
//!
//! Invariants: only [`supervisor`] changes a machine's state; the API never runs on a vCPU's or a device's thread; nothing
//! here parses the guest kernel's structures.

pub mod audit;
pub mod boot;
pub mod clock;
pub mod control;
pub mod cpu;
pub mod directory;
pub mod doctor;
pub mod failure;
pub mod fork;
pub mod identity;
pub mod kvm;
pub mod layout;
pub mod log;
pub mod machine;
pub mod memory;
pub mod preflight;
pub mod process;
pub mod programs;
pub mod resources;
pub mod saved;
pub mod server;
pub mod state;
pub mod supervisor;
pub mod traps;
pub mod vcpu;
