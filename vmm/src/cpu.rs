//! What a virtual processor starts with (identification, model-specific registers, boot registers), and what it has come to.

pub mod cpuid;
pub mod guest;
pub mod msr;
pub mod registers;
pub mod state;
