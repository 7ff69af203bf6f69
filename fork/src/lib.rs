//! Forking a running VM: its memory, shared page by page, and its disks, frozen; saving memory and loading it while the VM runs.
//!
//! Nothing here knows devices or what a guest kernel looks like.

pub mod branch;
pub mod disk;
pub mod hello;
pub mod huge;
pub mod image;
pub mod lazy;
pub mod mappings;
mod pagemap;
pub mod pager;
pub mod ram;
mod slice;
pub mod source;
pub mod support;
#[cfg(test)]
mod testing;
pub mod uffd;
pub mod wire;
