//! A VM's devices.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    BALLOON_STEP_BYTES, ConfigError, Field, MAX_CID, MAX_DISK_QUEUES, MAX_NET_QUEUES, MAX_VSOCK_PATH_BYTES, MIN_CID,
    MIN_MEMORY_BYTES, MIN_MTU, is_false, validate_path,
};
use crate::MacAddr;

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Unique among the VM's disks, NICs and consoles; the disk's serial number in the guest: `[a-z0-9][a-z0-9._-]{0,19}`.
    #[schema(pattern = "^[a-z0-9][a-z0-9._-]{0,19}$")]
    pub id: String,
    /// Image file or block device.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Refuse the guest's writes.
    #[serde(default, skip_serializing_if = "is_false")]
    pub read_only: bool,
    /// What the image's bytes mean. Never guessed: a guest can write any header into a raw image.
    #[serde(default, skip_serializing_if = "DiskFormat::is_raw")]
    pub format: DiskFormat,
    /// Let a qcow2 image name files to read its missing clusters from. Off, an image that names one is refused: whoever made
    /// it would choose which of the host's files the guest sees.
    #[serde(default, skip_serializing_if = "is_false")]
    pub backing: bool,
    /// Leave the image as it is: what the guest writes goes to a file without a name, and with the VM. Others may have the image so too, or
    /// read-only, at the same time.
    #[serde(default, skip_serializing_if = "is_false")]
    pub overlay: bool,
    /// Request queues. Absent lets the monitor choose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 16)]
    pub queues: Option<u16>,
    /// Limit of reads and writes together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<RateLimit>,
}

/// What is in a disk's image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// The disk's bytes as they are.
    #[default]
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

/// How much a device may do; absent parts are unlimited, and one must be there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes a second, on average.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub bytes_per_second: Option<u64>,
    /// A disk's requests or a network card's packets a second, on average.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub operations_per_second: Option<u64>,
}

/// A network card of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Unique among the VM's disks, NICs and consoles: `[a-z0-9][a-z0-9._-]{0,19}`.
    #[schema(pattern = "^[a-z0-9][a-z0-9._-]{0,19}$")]
    pub id: String,
    /// Name of the host's tap interface.
    #[schema(min_length = 1, max_length = 15)]
    pub tap: String,
    /// Absent means one made from the VM's name and this id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// Pairs of a receiving and a sending queue. Absent means 1; more need a tap made with `multi_queue`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 8)]
    pub queues: Option<u16>,
    /// Largest packet the guest is told to use, in bytes without the Ethernet header. Absent means what the tap has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 68)]
    pub mtu: Option<u16>,
    /// Limit of what the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate: Option<RateLimit>,
    /// Limit of what the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate: Option<RateLimit>,
}

/// A console port of a VM: a virtio console of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Unique among the VM's disks, NICs and consoles, and the port's name: `[a-z0-9][a-z0-9._-]{0,19}`.
    #[schema(pattern = "^[a-z0-9][a-z0-9._-]{0,19}$")]
    pub id: String,
}

/// The VM's vsock device: stream sockets between the guest and unix sockets of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Unix socket the monitor listens on for the host's connections to the guest. A connection of the guest's to port N of
    /// the host goes to the socket of this path with `_N` behind it. A lock with `.lock` behind the path is there as long as the
    /// socket; a socket that nobody listens on any more is replaced.
    #[schema(value_type = String, max_length = 96)]
    pub uds: PathBuf,
    /// The guest's address (context id). Absent means 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 3, maximum = 4294967294_i64)]
    pub cid: Option<u32>,
}

/// The VM's memory balloon. With one, the guest gives back the pages it has no use for (free page reporting).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// How much memory to take from the guest, in bytes: a multiple of 4096 that leaves it 16 MiB.
    #[serde(default)]
    #[schema(multiple_of = 4096)]
    pub target_bytes: u64,
}

impl DiskConfig {
    /// Whether the image itself may be written.
    pub fn writes_image(&self) -> bool {
        !self.read_only && !self.overlay
    }

    /// A raw, writable disk with the monitor's defaults.
    pub fn new(id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            id: id.into(),
            path: path.into(),
            read_only: false,
            format: DiskFormat::Raw,
            backing: false,
            overlay: false,
            queues: None,
            rate: None,
        }
    }

    /// Checks what concerns this disk alone.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        validate_path(Field::Disk, &self.path)?;
        if self.backing && self.format != DiskFormat::Qcow2 {
            return Err(ConfigError::RawBacking { id: self.id.clone() });
        }
        if self.overlay && self.read_only {
            return Err(ConfigError::ReadOnlyOverlay { id: self.id.clone() });
        }
        check_queues(Field::Disk, &self.id, self.queues, MAX_DISK_QUEUES)?;
        check_rate(Field::Disk, &self.id, self.rate)
    }
}

impl DiskFormat {
    /// As in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    fn is_raw(&self) -> bool {
        *self == Self::Raw
    }
}

impl NetConfig {
    /// A card with the monitor's defaults.
    pub fn new(id: impl Into<String>, tap: impl Into<String>) -> Self {
        Self { id: id.into(), tap: tap.into(), mac: None, queues: None, mtu: None, rx_rate: None, tx_rate: None }
    }

    /// Checks what concerns this card alone.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        validate_tap(&self.tap)?;
        if let Some(mac) = self.mac
            && !mac.is_unicast()
        {
            return Err(ConfigError::MacNotUnicast { mac });
        }
        check_queues(Field::Net, &self.id, self.queues, MAX_NET_QUEUES)?;
        if let Some(mtu) = self.mtu
            && mtu < MIN_MTU
        {
            return Err(ConfigError::Mtu { id: self.id.clone(), mtu });
        }
        check_rate(Field::Net, &self.id, self.rx_rate)?;
        check_rate(Field::Net, &self.id, self.tx_rate)
    }
}

impl VsockConfig {
    /// The guest's context id.
    pub fn effective_cid(&self) -> u32 {
        self.cid.unwrap_or(MIN_CID)
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        validate_path(Field::Vsock, &self.uds)?;
        let bytes = self.uds.as_os_str().len();
        if bytes > MAX_VSOCK_PATH_BYTES {
            return Err(ConfigError::VsockPath { path: self.uds.clone(), bytes });
        }
        match self.effective_cid() {
            MIN_CID..=MAX_CID => Ok(()),
            cid => Err(ConfigError::Cid { cid }),
        }
    }
}

impl BalloonConfig {
    /// Checks that a VM of `memory_bytes` can have such a balloon.
    pub fn check(&self, memory_bytes: u64) -> Result<(), ConfigError> {
        let target = self.target_bytes;
        if !target.is_multiple_of(BALLOON_STEP_BYTES) {
            return Err(ConfigError::BalloonStep { target });
        }
        if target > memory_bytes.saturating_sub(MIN_MEMORY_BYTES) {
            return Err(ConfigError::BalloonTooLarge { target, memory: memory_bytes });
        }
        Ok(())
    }
}

pub(super) fn validate_tap(tap: &str) -> Result<(), ConfigError> {
    if tap.is_empty()
        || tap.len() > 15
        || tap == "."
        || tap == ".."
        || tap.bytes().any(|b| b <= b' ' || b == 0x7f || matches!(b, b'/' | b'%' | b':'))
    {
        return Err(ConfigError::Tap { tap: tap.to_owned() });
    }
    Ok(())
}

fn check_queues(field: Field, id: &str, queues: Option<u16>, most: u16) -> Result<(), ConfigError> {
    match queues {
        Some(queues) if !(1..=most).contains(&queues) => {
            Err(ConfigError::Queues { field, id: id.to_owned(), queues, most })
        }
        _ => Ok(()),
    }
}

fn check_rate(field: Field, id: &str, rate: Option<RateLimit>) -> Result<(), ConfigError> {
    let id = || id.to_owned();
    match rate {
        Some(RateLimit { bytes_per_second: None, operations_per_second: None }) => {
            Err(ConfigError::RateEmpty { field, id: id() })
        }
        Some(RateLimit { bytes_per_second: Some(0), .. } | RateLimit { operations_per_second: Some(0), .. }) => {
            Err(ConfigError::RateZero { field, id: id() })
        }
        _ => Ok(()),
    }
}
