//! Everything tests boot, in one directory of the cache:
//!
//! ```text
//!  assets/FLAVOUR/vmlinuz        the stock kernel's bzImage
//!  assets/FLAVOUR/vmlinux        the ELF file inside it
//!  assets/FLAVOUR/version        uname -r
//!  assets/FLAVOUR/tiny.initrd    the tiny guest's initramfs; the last to be made
//!  assets/FLAVOUR/initrd.img     Debian's own initrd, for debian.img
//!  assets/debian.img             a Debian root file system (raw ext4)
//!  assets/tools.img              a store of tools, for `civic inspect`
//!  assets/agents.img             the store of docs/examples/agents
//!  assets/services.img           services and tools of the other examples
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use civic_testbed::cache;
use civic_testbed::kernel::{FLAVOURS, Kernel, available};

use crate::{minimal, tiny};

/// The directory, whether or not it is complete.
pub fn dir() -> Result<PathBuf> {
    let dir = cache::dir()?.join("assets");
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// Kernels and their tiny guests.
pub fn kernels() -> Result<Vec<Kernel>> {
    FLAVOURS.into_iter().map(kernel).collect()
}

/// A kernel and its tiny guest.
pub fn kernel(flavour: &str) -> Result<Kernel> {
    let kernel = if flavour == minimal::FLAVOUR { minimal::kernel()? } else { Kernel::get(flavour)? };
    let to = dir()?.join(flavour);
    fs::create_dir_all(&to)?;
    for name in ["vmlinuz", "vmlinux", "version"] {
        link(&kernel.dir.join(name), &to.join(name))?;
    }
    tiny::build(&kernel, &to.join("tiny.initrd"))?;
    Ok(kernel)
}

/// Every kernel that Debian has and one of our own, and their tiny guests: for tests that take long.
pub fn every_kernel() -> Result<()> {
    available()?.iter().try_for_each(|flavour| kernel(flavour).map(drop))?;
    kernel(minimal::FLAVOUR).map(drop)
}

/// The flavours that are there, of those that are always and others.
pub fn flavours() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir()?)? {
        let entry = entry?;
        if entry.path().join("tiny.initrd").exists() {
            found.extend(entry.file_name().into_string());
        }
    }
    found.sort();
    Ok(found)
}

/// Makes `to` the same file as `from`, unless it is.
fn link(from: &Path, to: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let inode = |p: &Path| fs::metadata(p).map(|m| m.ino()).ok();
    if inode(from) != inode(to) {
        cache::remove(to)?;
        fs::hard_link(from, to)?;
    }
    Ok(())
}
