//! What the machine is made of: a QEMU that can do it, a kernel, and an initramfs with the agent in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt::{Apt, RELEASE};
use crate::cache::{self, make_once, progress};
use crate::cpio::Archive;
use crate::kernel::{HOST_FLAVOUR, Kernel};

/// System packages without which no testbed can be set up.
pub const PACKAGES: [&str; 7] =
    ["qemu-system-x86", "busybox-static", "kmod", "xz-utils", "zstd", "lz4", "debian-archive-keyring"];

/// Modules that L1 loads, in this order after what they depend on.
const MODULES: [&str; 26] = [
    "irqbypass",
    "kvm",
    "kvm-amd",
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "virtio-rng",
    "9p",
    "9pnet_virtio",
    "crc32c_generic?",
    "overlay",
    "tun",
    "tap",
    "vhost_net",
    "vhost_vsock",
    "veth",
    "bridge",
    "loop",
    "ext4",
    "squashfs?",
    "erofs?",
    "fuse",
    "dm-mod",
    "dm-snapshot",
    "acpiphp?",
];

/// L1's first program. It stays as process 1: a shell that waits reaps whatever is orphaned.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin; export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for m in $(cat /mod/order); do insmod /mod/$m || echo "testbed: insmod $m failed"; done
ln -s /proc/self/fd /dev/fd; ln -s fd/0 /dev/stdin; ln -s fd/1 /dev/stdout; ln -s fd/2 /dev/stderr
mkdir -p /dev/pts /dev/shm /run
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
ip link set lo up
hostname testbed
echo 1 > /proc/sys/kernel/sysrq
# Huge pages for guests' RAM: a nested page fault is what QEMU is slow at, and what it now and then gets wrong.
echo always > /sys/kernel/mm/transparent_hugepage/shmem_enabled
/agent agent
echo "testbed: the agent ended with $?"
poweroff -f
"#;

/// Everything needed to start the machine.
pub struct Parts {
    /// `qemu-system-x86_64`, with its `-L` folders.
    pub qemu: Qemu,
    /// L1's bzImage.
    pub vmlinuz: PathBuf,
    /// L1's initramfs, without the agent.
    pub initrd: PathBuf,
}

/// A QEMU.
pub struct Qemu {
    /// The program.
    pub program: PathBuf,
    /// Where its firmware lies.
    pub data: Vec<PathBuf>,
}

/// Gets all parts, fetching and building what is missing.
pub fn parts() -> Result<Parts> {
    let dir = cache::dir()?.join("testbed");
    fs::create_dir_all(&dir)?;
    let qemu = qemu()?;
    let kernel = Kernel::get(HOST_FLAVOUR)?;
    let initrd = dir.join("l1.cpio");
    let recipe = format!("1 {} {} {INIT}", kernel.version, MODULES.join(" "));
    make_once(&initrd, &recipe, |new| {
        progress("building the testbed's initramfs");
        let mut a = Archive::new();
        for name in ["proc", "sys", "dev", "run", "tmp"] {
            a.dir(name);
        }
        a.file("init", 0o755, INIT.as_bytes());
        a.copy(Path::new("/bin/busybox"), "bin/busybox").context("busybox-static is missing: run cargo xtask setup")?;
        kernel.modules()?.pack(&MODULES, &mut a)?;
        Ok(fs::write(new, a.finish())?)
    })?;
    Ok(Parts { qemu, vmlinuz: kernel.vmlinuz(), initrd })
}

/// The agent as an archive that follows L1's initramfs: this very program, and the libraries it needs.
pub fn agent_archive() -> Result<Vec<u8>> {
    let mut a = Archive::new();
    a.program(&std::env::current_exe()?, "agent").context("cannot read this program")?;
    Ok(a.finish())
}

fn major(program: &Path) -> Option<u32> {
    let out = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.split_once("version ")?.1.split('.').next()?.parse().ok()
}

/// Before QEMU 10 hardware breakpoints do not work in a nested guest, and the machine is about a third slower. Debian 12
/// has 10 in its backports: it is unpacked in the cache and installed nowhere.
fn qemu() -> Result<Qemu> {
    let data = |first: Option<PathBuf>| {
        first.into_iter().chain(["/usr/share/seabios", "/usr/share/qemu"].map(PathBuf::from)).collect::<Vec<_>>()
    };
    let system = PathBuf::from("qemu-system-x86_64");
    let Some(have) = major(&system) else { bail!("qemu-system-x86_64 is missing: run cargo xtask setup") };
    if have >= 10 {
        return Ok(Qemu { program: system, data: data(None) });
    }
    let cache = cache::dir()?;
    let root = cache.join("qemu");
    let made = make_once(&root, "1", |new| {
        progress("fetching QEMU 10 from backports");
        let suite = format!("{RELEASE}-backports");
        Apt::open(&cache)?.unpack(&["qemu-system-x86", "qemu-system-data"], Some(&suite), new)
    });
    let program = root.join("usr/bin/qemu-system-x86_64");
    if made.is_ok() && major(&program).is_some_and(|m| m >= 10) {
        return Ok(Qemu { program, data: data(Some(root.join("usr/share/qemu"))) });
    }
    if let Err(e) = made {
        eprintln!("testbed: {e:#}");
    }
    eprintln!("testbed: no QEMU 10 from backports; using {have}: slower, and no hardware breakpoints in guests");
    Ok(Qemu { program: system, data: data(None) })
}
