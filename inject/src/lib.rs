//! Starting a program in a guest from outside: what is placed in its kernel, what vCPUs do that meet it, and what is started. Pure: whoever
//! has the VM places it, and moves the vCPUs.
//!
//! [`targets`] says what is needed of the kernel, [`code`] makes the code for it, [`hook`] draws how it goes. The loader then speaks [`wire`].

pub mod code;
pub mod hook;
pub mod targets;

pub use civic_loader as wire;

/// The program that is brought into the guest, as an ELF file: `civic-loader`, built by this crate's `build.rs`.
pub static LOADER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/loader"));
