//! Everything that is known about guest kernels: what a paused x86-64 Linux VM's kernel is, found in its registers and physical memory.
//!
//! ```text
//!  Registers ─ Anchors ─▶ KernelImage ─▶ Image ─┬▶ Kallsyms ─┐
//!               (text)     (page tables) (bytes) ├▶ Exports ──┼▶ Kernel: functions, members, entry slots, per-CPU variables
//!                                                ├▶ Btf ──────┤
//!                                                └▶ banner    └◀ Hints (System.map, vmlinux)
//! ```
//!
//! Invariants: no KVM, no I/O, no `unsafe`. What is read is a guest's, and may be made to mislead: nothing panics, loops or allocates
//! beyond fixed bounds, whatever it is. What a kernel can do is told by its symbols, types and members, never by its version.

pub mod anchors;
pub mod btf;
mod bytes;
pub mod current;
pub mod entry;
pub mod exports;
pub mod hints;
pub mod image;
pub mod kallsyms;
pub mod kernel;
pub mod memory;
pub mod paging;
pub mod registers;
pub mod symbols;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
