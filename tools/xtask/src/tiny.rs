//! The tiny guest: a stock kernel with a busybox initramfs, for tests that need Linux but no distribution.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use civic_testbed::cache::{make_once, progress};
use civic_testbed::cpio::Archive;
use civic_testbed::kernel::Kernel;

const INIT: &str = include_str!("../../../resources/tiny/init");
const POWER_BUTTON: &str = include_str!("../../../resources/tiny/power-button");

/// Loaded in this order after what they depend on; `?` where a kernel may lack one. The last ones are for the power button.
const MODULES: [&str; 14] = [
    "virtio_pci",
    "virtio_console",
    "virtio-rng?",
    "virtio_blk",
    "virtio_net",
    "crc32c_generic?",
    "ext4",
    "vmw_vsock_virtio_transport?",
    "virtio_balloon?",
    "virtio_mem?",
    "evdev?",
    "button?",
    "msr?",
    "acpiphp?",
];

/// Builds the initramfs for `kernel` as `path`, uncompressed: unpacking is slow where guests are emulated.
pub fn build(kernel: &Kernel, path: &Path) -> Result<()> {
    let recipe = format!("1 {} {MODULES:?} {INIT} {POWER_BUTTON}", kernel.version);
    make_once(path, &recipe, |new| {
        progress(&format!("building the tiny guest for {}", kernel.version));
        let mut a = Archive::new();
        for dir in ["proc", "sys", "dev", "tmp", "run", "mnt", "root"] {
            a.dir(dir);
        }
        a.file("init", 0o755, INIT.as_bytes());
        a.file("etc/acpi/PWRF/00000080", 0o755, POWER_BUTTON.as_bytes());
        a.file("etc/passwd", 0o644, b"root::0:0:root:/:/bin/sh\n");
        a.file("etc/profile", 0o644, b"export PS1='tiny# '\n");
        a.copy(Path::new("/bin/busybox"), "bin/busybox").context("busybox-static is missing")?;
        a.program(Path::new("/usr/bin/iperf3"), "bin/iperf3").context("iperf3 is missing")?;
        kernel.modules()?.pack(&MODULES, &mut a)?;
        Ok(fs::write(new, a.finish())?)
    })
    .map(drop)
}
