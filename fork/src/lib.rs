//! Saving a VM's memory and loading it back while the VM runs; freezing its disks for its children; later: forking its memory.
//!
//! Nothing here knows devices or what a guest kernel looks like.

pub mod disk;
pub mod image;
pub mod lazy;
pub mod mappings;
pub mod pager;
pub mod ram;
pub mod support;
#[cfg(test)]
mod testing;
pub mod uffd;
