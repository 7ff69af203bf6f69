//! What a virtual processor starts with: identification, model-specific registers and boot registers.

pub mod cpuid;
pub mod msr;
pub mod registers;
