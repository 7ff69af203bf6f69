//! Makes a fresh machine ready: packages, kernels, images, the testbed.

use anyhow::Result;
use civic_testbed::{apt, setup};

use crate::place::Place;
use crate::{assets, debian, store};

/// What the project needs of the system, besides Rust.
const PACKAGES: [&str; 18] = [
    "mmdebstrap",
    "fakeroot",
    "cpio",
    "e2fsprogs",
    "iproute2",
    "iputils-ping",
    "curl",
    "iperf3",
    "qemu-utils",
    "btrfs-progs",
    "pkg-config",
    "libclang-dev",
    "g++",
    "bzip2",
    "util-linux",
    "ca-certificates",
    "libc-bin",
    "busybox-static",
];

/// Installs packages, where missing.
pub fn packages() -> Result<()> {
    let all: Vec<_> = PACKAGES.iter().chain(&setup::PACKAGES).copied().collect();
    apt::install(&all)
}

/// Everything. Fast when nothing is to do.
pub fn all() -> Result<()> {
    packages()?;
    let kernels = assets::kernels()?;
    debian::build(&kernels)?;
    store::build()?;
    if Place::for_guests().0 == Place::Testbed {
        setup::parts()?;
    }
    Ok(())
}
