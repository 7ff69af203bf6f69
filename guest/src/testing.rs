//! Guests made by code: memory, page tables, and a kernel's image with all that is looked for in it.
//!
//! For tests and for seeds of fuzz targets. It says what is right without asking the readers: each encoder is written from the format.

mod guest;
mod image;
mod kallsyms;
mod tables;
mod types;

pub use guest::{Guest, GuestShape};
pub use image::{exports, put};
pub use kallsyms::{STYLES, Style, kallsyms};
pub use tables::{ENTRY_FLAGS, PageTables, SparseMemory};
pub use types::Types;
