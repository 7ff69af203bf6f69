//! What a user asks a VM to be. Checked by [`VmConfig::validate`] before anything is opened or allocated.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

mod devices;
mod error;
mod forks;
mod settings;

pub use devices::{BalloonConfig, ConsoleConfig, DiskConfig, DiskFormat, NetConfig, RateLimit, VsockConfig};
pub use error::{ConfigError, Field};
pub use forks::ForksConfig;
pub use settings::{BALLOON_ID, VSOCK_ID};

/// Longest name of a VM, in bytes: it is a directory name and, with the socket's name, part of a unix socket address.
pub const MAX_NAME_BYTES: usize = 63;
/// Longest id of a disk or NIC, in bytes: a disk's id is its serial number in the guest (virtio 1.2 §5.2.6: 20 bytes).
pub const MAX_ID_BYTES: usize = 20;
/// Most vCPUs.
pub const MAX_CPUS: u8 = 16;
/// Least guest RAM: below this no stock kernel unpacks itself.
pub const MIN_MEMORY_BYTES: u64 = 16 << 20;
/// Most guest RAM.
pub const MAX_MEMORY_BYTES: u64 = 64 << 30;
/// Guest RAM comes in whole huge pages.
pub const MEMORY_STEP_BYTES: u64 = 2 << 20;
/// Longest kernel command line, in bytes: what x86 Linux takes (`COMMAND_LINE_SIZE`) counts a final NUL.
pub const MAX_CMDLINE_BYTES: usize = 2047;
/// Most disks, NICs and consoles together, those that come while the VM runs included: the bus has 32 slots, of which the host bridge and
/// the devices of [`RESERVED_IDS`] that are on the bus take 5.
pub const MAX_DEVICES: usize = 27;
/// Ids of the devices whose id nobody chooses, as far as a VM has them.
pub const RESERVED_IDS: [&str; 6] = [BALLOON_ID, "console", CONSOLE_PORT_HVC, "rng", CONSOLE_PORT_SERIAL, VSOCK_ID];
/// Most request queues of a disk: no VM has more vCPUs to use them.
pub const MAX_DISK_QUEUES: u16 = MAX_CPUS as u16;
/// Most queue pairs of a network card.
pub const MAX_NET_QUEUES: u16 = 8;
/// Least MTU of a network card (virtio 1.2 §5.1.4.1): what every IPv4 host must take (RFC 791).
pub const MIN_MTU: u16 = 68;
/// Longest path of a vsock's unix socket, in bytes: `sun_path` holds 107 and a final NUL, and `_4294967295` must fit behind.
pub const MAX_VSOCK_PATH_BYTES: usize = 107 - "_4294967295".len();
/// Least context id of a guest, and the one it has unless another is given: 0 is the hypervisor, 1 the local machine, 2 the
/// host (virtio 1.2 §5.10.4).
pub const MIN_CID: u32 = 3;
/// Highest context id of a guest: the one above means any.
pub const MAX_CID: u32 = u32::MAX - 1;
/// A balloon takes pages of this size, whatever the guest's own is (virtio 1.2 §5.5.6).
pub const BALLOON_STEP_BYTES: u64 = 4096;
/// Least limit of what is kept for forks: less would end them at the VM's first writes.
pub const MIN_FORK_STORE_BYTES: u64 = 1 << 20;
/// The console port every VM has: the first UART, Linux's `ttyS0`.
pub const CONSOLE_PORT_SERIAL: &str = "serial";
/// The console port every VM has besides: the virtio console, Linux's `hvc0`.
pub const CONSOLE_PORT_HVC: &str = "hvc0";

/// A VM to be made. Paths are opened by the monitor: make them absolute unless it shares your working directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Unique on the host among VMs with the same run directory: `[a-z0-9][a-z0-9._-]{0,62}`.
    #[schema(pattern = "^[a-z0-9][a-z0-9._-]{0,62}$")]
    pub name: String,
    /// Kernel image: an x86 bzImage or an uncompressed ELF.
    #[schema(value_type = String)]
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line. Absent means [`VmConfig::effective_cmdline`]'s default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 2047)]
    pub cmdline: Option<String>,
    /// Guest RAM in bytes: 16 MiB to 64 GiB, a multiple of 2 MiB.
    #[schema(minimum = 16777216, maximum = 68719476736_i64, multiple_of = 2097152)]
    pub memory_bytes: u64,
    /// vCPUs.
    #[schema(minimum = 1, maximum = 16)]
    pub cpus: u8,
    /// Disks in PCI slot order: the first is the guest's `/dev/vda`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// Network cards, in PCI slot order after the disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetConfig>,
    /// Console ports besides `serial` and `hvc0`, in PCI slot order after all that every machine has: the guest's `/dev/hvc1` and so on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub consoles: Vec<ConsoleConfig>,
    /// Sockets between the guest and the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Memory the host takes back from the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// What may be kept for its forks.
    #[serde(default, skip_serializing_if = "ForksConfig::is_default")]
    pub forks: ForksConfig,
    /// Let guest RAM exceed the memory the host has available.
    #[serde(default, skip_serializing_if = "is_false")]
    pub overcommit: bool,
    /// Start even where KVM seems unable to run stock kernels (no `vmx` or `svm` on this host).
    #[serde(default, skip_serializing_if = "is_false")]
    pub any_kvm: bool,
    /// Let programs be started in this VM itself, and not only in its forks: for an owner who brings what was tried in a fork to where it
    /// came from.
    #[serde(default, skip_serializing_if = "is_false")]
    pub allow_programs: bool,
    /// Where each request that changes something, or shows something of the guest, is written down with who made it. If absent, nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub audit: Option<PathBuf>,
}

impl VmConfig {
    /// Checks everything that can be checked without opening anything. Reports the first thing wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        validate_name(&self.name)?;
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(ConfigError::Cpus { cpus: self.cpus });
        }
        let bytes = self.memory_bytes;
        if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&bytes) {
            return Err(ConfigError::MemoryRange { bytes });
        }
        if !bytes.is_multiple_of(MEMORY_STEP_BYTES) {
            return Err(ConfigError::MemoryStep { bytes });
        }
        if let Some(cmdline) = &self.cmdline {
            if cmdline.len() > MAX_CMDLINE_BYTES {
                return Err(ConfigError::CmdlineTooLong { bytes: cmdline.len() });
            }
            if cmdline.contains('\0') {
                return Err(ConfigError::CmdlineNul);
            }
        }
        validate_path(Field::Kernel, &self.kernel)?;
        if let Some(initrd) = &self.initrd {
            validate_path(Field::Initrd, initrd)?;
        }
        if let Some(vsock) = &self.vsock {
            vsock.check()?;
        }
        if let Some(balloon) = self.balloon {
            balloon.check(bytes)?;
        }
        self.forks.check()?;
        self.validate_devices()
    }

    fn validate_devices(&self) -> Result<(), ConfigError> {
        let counts = [self.disks.len(), self.nets.len(), self.consoles.len()];
        let count = counts.iter().sum();
        if count > MAX_DEVICES {
            let fields = [Field::Disk, Field::Net, Field::Console].into_iter().zip(counts);
            let field = fields.max_by_key(|(_, count)| *count).map_or(Field::Disk, |(field, _)| field);
            return Err(ConfigError::TooManyDevices { field, count });
        }
        let mut ids = HashSet::new();
        let mut check_id = |field, id: &str| {
            let id = id.to_owned();
            if !is_word(&id, MAX_ID_BYTES) {
                Err(ConfigError::Id { field, id })
            } else if RESERVED_IDS.contains(&id.as_str()) {
                Err(ConfigError::ReservedId { field, id })
            } else if !ids.insert(id.clone()) {
                Err(ConfigError::DuplicateId { field, id })
            } else {
                Ok(())
            }
        };
        // One image twice is harmless if nobody writes it.
        let mut images: Vec<&DiskConfig> = Vec::new();
        for disk in &self.disks {
            check_id(Field::Disk, &disk.id)?;
            disk.check()?;
            if images.iter().any(|other| other.path == disk.path && (other.writes_image() || disk.writes_image())) {
                return Err(ConfigError::DuplicateImage { path: disk.path.clone() });
            }
            images.push(disk);
        }
        let (mut taps, mut macs) = (HashSet::new(), HashSet::new());
        for net in &self.nets {
            check_id(Field::Net, &net.id)?;
            net.check()?;
            if !taps.insert(&net.tap) {
                return Err(ConfigError::DuplicateTap { tap: net.tap.clone() });
            }
            if let Some(mac) = net.mac
                && !macs.insert(mac)
            {
                return Err(ConfigError::DuplicateMac { mac });
            }
        }
        self.consoles.iter().try_for_each(|console| check_id(Field::Console, &console.id))
    }

    /// The command line the kernel gets: the configured one, else `console=ttyS0`, with ` root=/dev/vda rw` (`ro` for a
    /// read-only disk) where there is a disk and no initrd to find the root file system.
    pub fn effective_cmdline(&self) -> String {
        if let Some(cmdline) = &self.cmdline {
            return cmdline.clone();
        }
        match self.disks.first() {
            Some(disk) if self.initrd.is_none() => {
                format!("console=ttyS0 root=/dev/vda {}", if disk.read_only { "ro" } else { "rw" })
            }
            _ => "console=ttyS0".to_owned(),
        }
    }
}

/// Checks the name of a VM: `[a-z0-9][a-z0-9._-]{0,62}`.
pub fn validate_name(name: &str) -> Result<(), ConfigError> {
    if is_word(name, MAX_NAME_BYTES) { Ok(()) } else { Err(ConfigError::Name { name: name.to_owned() }) }
}

fn is_word(text: &str, max_bytes: usize) -> bool {
    let start = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    text.len() <= max_bytes
        && text.bytes().next().is_some_and(start)
        && text.bytes().all(|b| start(b) || matches!(b, b'.' | b'_' | b'-'))
}

fn validate_path(field: Field, path: &Path) -> Result<(), ConfigError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.contains(&0) {
        Err(ConfigError::Path { field, path: path.to_owned() })
    } else {
        Ok(())
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

#[cfg(test)]
mod tests;
