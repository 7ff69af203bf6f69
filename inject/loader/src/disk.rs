//! Finding the store's disk and mounting what is on it.

use core::ffi::CStr;

use civic_loader::{Disk, Step, Store};
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, open, statat};
use rustix::io::Errno;
use rustix::process::fchdir;

use crate::failure::Failure;
use crate::files::{detached, find_folder, read_into};
use crate::news::News;
use crate::time::{Deadline, sleep_ms};

/// How often to try to open a disk that was plugged in just now, in milliseconds.
const LOOK_MS: u64 = 3;

/// The file systems that a store may have, and whether they can only be read.
const FILE_SYSTEMS: [(&CStr, bool); 4] = [(c"ext4", false), (c"squashfs", true), (c"btrfs", false), (c"xfs", false)];

/// A block device's name in the folder of devices.
struct DeviceName {
    bytes: [u8; 64],
    len: usize,
}

impl DeviceName {
    fn new(name: &[u8]) -> Option<Self> {
        let mut bytes = [0; 64];
        bytes.get_mut(..name.len())?.copy_from_slice(name);
        Some(Self { bytes, len: name.len() })
    }

    fn name(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The file system of the store, mounted nowhere. The working directory is the devices' afterwards.
pub fn mount<'a>(store: &Store<'a>, deadline: Deadline) -> Result<OwnedFd, Failure<'a>> {
    let failure = |errno, text| Failure::new(Step::Store, errno, text);
    let (none, name) = match store.disk {
        Disk::Serial(serial) => ("the guest's kernel has found no disk with the serial number ", serial),
        Disk::Name(name) => ("the guest's kernel has found no disk with the name ", name),
    };
    let devices = devices().map_err(|e| failure(e, "the guest's kernel shows no devices"))?;
    let disks = detached(c"sysfs", &[]).map_err(|e| failure(e, "the guest's kernel shows no disks"))?;
    let news = News::new();
    let device = loop {
        match find(&store.disk, &disks, &devices) {
            Ok(Some(device)) => break device,
            Ok(None) if deadline.passed() => return Err(failure(Errno::NODEV, none).about(name.as_bytes(), "")),
            Ok(None) => news.wait(b"SUBSYSTEM=block"),
            Err(e) => return Err(failure(e, "the guest's kernel shows no disks")),
        }
    };
    // A source is looked up from the working directory.
    fchdir(&devices).map_err(|e| failure(e, "the folder of devices cannot be entered"))?;
    loop {
        match mount_device(device.name(), store.read_only) {
            // Its driver shows a disk, with serial number and device file, before it can be opened.
            Err(Errno::NXIO) if !deadline.passed() => sleep_ms(LOOK_MS),
            Err(Errno::NXIO) => {
                return Err(
                    failure(Errno::NXIO, "the guest's kernel does not open the disk ").about(name.as_bytes(), "")
                );
            }
            mounted => {
                return mounted.map_err(|e| {
                    failure(e, "the guest's kernel mounts no ext4, squashfs, btrfs or xfs from the disk ")
                        .about(name.as_bytes(), "")
                });
            }
        }
    }
}

/// The kernel's own folder of devices, or the guest's.
fn devices() -> rustix::io::Result<OwnedFd> {
    detached(c"devtmpfs", &[])
        .or_else(|_| open(c"/dev", OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()))
}

/// The disk, if it and its device file are there yet.
fn find(disk: &Disk<'_>, disks: &OwnedFd, devices: &OwnedFd) -> rustix::io::Result<Option<DeviceName>> {
    let device = match disk {
        Disk::Name(name) => DeviceName::new(name.as_bytes()),
        Disk::Serial(serial) => find_folder(disks, c"block", |name, disk| {
            let mut buffer = [0; 64];
            let found = read_into(disk, c"serial", &mut buffer).ok()?;
            (found.trim_ascii_end() == serial.as_bytes()).then(|| DeviceName::new(name.to_bytes()))?
        })?,
    };
    Ok(device.filter(|device| {
        statat(devices, device.name(), AtFlags::empty())
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice)
    }))
}

/// The file system of a device in the working directory. The error is that of the file system that knew its own, or else the last.
fn mount_device(device: &[u8], read_only: bool) -> rustix::io::Result<OwnedFd> {
    let mut result = Err(Errno::NODEV);
    for (fs, only_read) in FILE_SYSTEMS {
        let source = (c"source", Some(device));
        let both = [source, (c"ro", None)];
        result = detached(fs, if read_only || only_read { &both } else { &both[..1] });
        // The kernel does not have it, or it is not what is there.
        if !matches!(result, Err(Errno::NODEV | Errno::INVAL)) {
            break;
        }
    }
    result
}
