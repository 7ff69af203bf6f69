//! Saving a VM's memory and loading it back while the VM runs; later: forking a running VM's memory and disks.
//!
//! Nothing here knows devices or what a guest kernel looks like.

pub mod image;
pub mod lazy;
pub mod ram;
pub mod support;
#[cfg(test)]
mod testing;
pub mod uffd;
