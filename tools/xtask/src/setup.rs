//! Makes a fresh machine ready: packages, kernels, images, the testbed.

use anyhow::{Result, ensure};
use civic_testbed::{apt, client, setup};
use nix::sys::statvfs::statvfs;

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

/// GiB that all builds and tests take on a disk: in a workspace where nothing is built yet, and over again.
const ROOM_GIB: [u64; 2] = [12, 4];

/// That there is room for what is built. A linker that finds none says nothing but "Bus error".
pub fn room() -> Result<()> {
    let workspace = client::workspace()?;
    let built = workspace.join("target/release").exists();
    let (needed, found) = (ROOM_GIB[usize::from(built)], statvfs(&workspace)?);
    let free = (found.blocks_available() * found.fragment_size()) >> 30;
    let at = workspace.display();
    ensure!(free >= needed, "{needed} GiB are needed beside {at}, and {free} GiB are free: make room, and do it again");
    Ok(())
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
