//! Forking a running VM's memory and disks. So far: finding out whether this host's kernel can do it.
//!
//! Nothing here knows devices or what a guest kernel looks like.

pub mod support;
