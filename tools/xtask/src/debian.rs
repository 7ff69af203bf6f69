//! The Debian guest: a raw ext4 image of Debian 12 with systemd, nginx and the three stock kernels, whose initrds are those
//! that initramfs-tools makes in it, unmodified.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use civic_testbed::apt::{RELEASE, mirror_lines};
use civic_testbed::cache::{self, make_once, progress};
use civic_testbed::kernel::{FLAVOURS, Kernel};

use crate::assets;

const CUSTOMIZE: &str = include_str!("../../../resources/debian/customize");
const PACKAGES: [&str; 17] = [
    "systemd-sysv",
    "udev",
    "dbus",
    "libpam-systemd",
    "nginx-light",
    "iperf3",
    "curl",
    "iproute2",
    "iputils-ping",
    "ethtool",
    "fio",
    "procps",
    "kmod",
    "e2fsprogs",
    "initramfs-tools",
    "busybox",
    "zstd",
];
const SIZE: &str = "2G";

/// Builds `debian.img` and takes the initrds out of it.
pub fn build(kernels: &[Kernel]) -> Result<()> {
    let image = assets::dir()?.join("debian.img");
    let packages: Vec<_> =
        PACKAGES.iter().map(|p| (*p).to_owned()).chain(kernels.iter().map(Kernel::package)).collect();
    let recipe = format!("1 {RELEASE} {SIZE} {} {CUSTOMIZE}", packages.join(" "));
    make_once(&image, &recipe, |new| {
        progress("building the Debian image: two to four minutes");
        let work = new.with_extension("work");
        // Made under fakeroot, the tree has owners only fakeroot knows, but its modes are ours to remove.
        cache::remove(&work)?;
        fs::create_dir_all(&work)?;
        bootstrap(&work, &packages)?;
        unpack(&work, new)?;
        for (flavour, kernel) in FLAVOURS.iter().zip(kernels) {
            let initrd = format!("tree/boot/initrd.img-{}", kernel.version);
            let to = assets::dir()?.join(flavour).join("initrd.img");
            cache::remove(&to)?;
            fs::copy(work.join(initrd), to).context("the image has no initrd for a kernel")?;
        }
        cache::remove(&work)
    })
    .map(drop)
}

fn bootstrap(work: &Path, packages: &[String]) -> Result<()> {
    let hook = work.join("customize");
    fs::write(&hook, CUSTOMIZE)?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
    let out = Command::new("mmdebstrap")
        .args(["--variant=minbase", "--mode=auto", "--format=tar"])
        .arg(format!("--include={}", packages.join(",")))
        .arg(format!("--customize-hook={} \"$1\"", hook.display()))
        .arg(RELEASE)
        .arg(work.join("root.tar"))
        .args(mirror_lines()?)
        .stdin(Stdio::null())
        .output()
        .context("cannot run mmdebstrap")?;
    ensure!(out.status.success(), "mmdebstrap failed:\n{}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

/// Makes the file system from the tar archive without mounting anything, as root or as fakeroot.
fn unpack(work: &Path, image: &Path) -> Result<()> {
    let script = "set -e; mkdir tree; tar -C tree -xf root.tar --numeric-owner; rm root.tar; truncate -s \"$1\" \"$0\"
        mke2fs -q -F -t ext4 -L root -E root_owner=0:0 -d tree \"$0\"";
    let root = fs::metadata("/proc/self")?;
    let shell: &[&str] = if std::os::unix::fs::MetadataExt::uid(&root) == 0 { &["sh"] } else { &["fakeroot", "sh"] };
    let out = Command::new(shell[0])
        .args(&shell[1..])
        .args(["-c", script])
        .arg(image)
        .arg(SIZE)
        .current_dir(work)
        .output()
        .with_context(|| format!("cannot run {}", shell[0]))?;
    ensure!(out.status.success(), "cannot make the image:\n{}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}
