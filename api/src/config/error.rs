//! What can be wrong with a configuration.

use std::path::PathBuf;

use super::{
    BALLOON_STEP_BYTES, MAX_CID, MAX_CMDLINE_BYTES, MAX_CPUS, MAX_DEVICES, MAX_ID_BYTES, MAX_MEMORY_BYTES,
    MAX_NAME_BYTES, MAX_VSOCK_PATH_BYTES, MEMORY_STEP_BYTES, MIN_CID, MIN_FORK_STORE_BYTES, MIN_MEMORY_BYTES, MIN_MTU,
};
use crate::{ByteSize, ErrorBody, ErrorCode, MacAddr};

/// Why a [`VmConfig`] is no VM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // The messages say it.
pub enum ConfigError {
    #[error(
        "'{name}' is no name for a VM: use a-z, 0-9, '.', '_' and '-', starting with a letter or digit, at most {MAX_NAME_BYTES} characters"
    )]
    Name { name: String },
    #[error("{cpus} vCPUs: must be 1 to {MAX_CPUS}")]
    Cpus { cpus: u8 },
    #[error("{} of memory ({bytes} bytes): must be {} to {}", ByteSize(*.bytes), ByteSize(MIN_MEMORY_BYTES), ByteSize(MAX_MEMORY_BYTES))]
    MemoryRange { bytes: u64 },
    #[error("{bytes} bytes of memory: must be a multiple of {}", ByteSize(MEMORY_STEP_BYTES))]
    MemoryStep { bytes: u64 },
    #[error("the kernel command line has {bytes} bytes: at most {MAX_CMDLINE_BYTES}")]
    CmdlineTooLong { bytes: usize },
    #[error("the kernel command line contains a NUL byte")]
    CmdlineNul,
    #[error("{field}: '{}' is no path", path.display())]
    Path { field: Field, path: PathBuf },
    #[error(
        "'{id}' is no id for a device: use a-z, 0-9, '.', '_' and '-', starting with a letter or digit, at most {MAX_ID_BYTES} characters"
    )]
    Id { field: Field, id: String },
    #[error("the id '{id}' is kept for a device of Civic's own")]
    ReservedId { field: Field, id: String },
    #[error("two devices have the id '{id}'")]
    DuplicateId { field: Field, id: String },
    #[error("{count} disks, network cards and consoles: the bus has room for {MAX_DEVICES}")]
    TooManyDevices { field: Field, count: usize },
    #[error("the image {} is given to two disks", path.display())]
    DuplicateImage { path: PathBuf },
    #[error("'{tap}' is no name of a network interface: 1 to 15 characters without '/', '%', ':' and spaces")]
    Tap { tap: String },
    #[error("the tap interface '{tap}' is given to two network cards")]
    DuplicateTap { tap: String },
    #[error("{mac} is no address for one station: the first byte must be even and not all may be zero")]
    MacNotUnicast { mac: MacAddr },
    #[error("two network cards have the address {mac}")]
    DuplicateMac { mac: MacAddr },
    #[error("'{id}' is a raw image, which has no backing file: only qcow2 has")]
    RawBacking { id: String },
    #[error("'{id}' cannot both refuse writes and take them in an overlay")]
    ReadOnlyOverlay { id: String },
    #[error("{queues} queues for '{id}': must be 1 to {most}")]
    Queues { field: Field, id: String, queues: u16, most: u16 },
    #[error("an MTU of {mtu} for '{id}': must be {MIN_MTU} to {}", u16::MAX)]
    Mtu { id: String, mtu: u16 },
    #[error("the rate limit of '{id}' limits nothing: give bytes or operations per second")]
    RateEmpty { field: Field, id: String },
    #[error("a rate limit of 0 would stop '{id}' for ever: give at least 1 per second, or no limit")]
    RateZero { field: Field, id: String },
    #[error("the path {} has {bytes} bytes: at most {MAX_VSOCK_PATH_BYTES}, to leave room for '_PORT' in a socket's address", path.display())]
    VsockPath { path: PathBuf, bytes: usize },
    #[error("{cid} is no context id for a guest: must be {MIN_CID} to {MAX_CID}")]
    Cid { cid: u32 },
    #[error("a balloon of {target} bytes: must be a multiple of {BALLOON_STEP_BYTES}")]
    BalloonStep { target: u64 },
    #[error("a balloon of {} ({target} bytes) in {} of memory: must leave the guest {}", ByteSize(*.target), ByteSize(*.memory), ByteSize(MIN_MEMORY_BYTES))]
    BalloonTooLarge { target: u64, memory: u64 },
    #[error("{bytes} bytes kept for forks are too few: at least {}", ByteSize(MIN_FORK_STORE_BYTES))]
    ForkStore { bytes: u64 },
}

/// The part of a [`VmConfig`] an error is about. `Display` gives the field's name in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Named as the fields are.
pub enum Field {
    Name,
    Kernel,
    Initrd,
    Cmdline,
    Memory,
    Cpus,
    Disk,
    Net,
    Console,
    Vsock,
    Balloon,
    Forks,
}

impl Field {
    /// The option of `civic run` that sets this field.
    pub fn flag(self) -> &'static str {
        match self {
            Self::Name => "--name",
            Self::Kernel => "--kernel",
            Self::Initrd => "--initrd",
            Self::Cmdline => "--cmdline",
            Self::Memory => "--memory",
            Self::Cpus => "--cpus",
            Self::Disk => "--disk",
            Self::Net => "--net",
            Self::Console => "--console",
            Self::Vsock => "--vsock",
            Self::Balloon => "--balloon",
            Self::Forks => "--forks",
        }
    }
}

impl std::fmt::Display for Field {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Name => "name",
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::Cmdline => "cmdline",
            Self::Memory => "memory_bytes",
            Self::Cpus => "cpus",
            Self::Disk => "disks",
            Self::Net => "nets",
            Self::Console => "consoles",
            Self::Vsock => "vsock",
            Self::Balloon => "balloon",
            Self::Forks => "forks",
        })
    }
}

impl ConfigError {
    /// The part of the configuration that is wrong.
    pub fn field(&self) -> Field {
        match self {
            Self::Name { .. } => Field::Name,
            Self::Cpus { .. } => Field::Cpus,
            Self::MemoryRange { .. } | Self::MemoryStep { .. } => Field::Memory,
            Self::CmdlineTooLong { .. } | Self::CmdlineNul => Field::Cmdline,
            Self::Path { field, .. }
            | Self::Id { field, .. }
            | Self::ReservedId { field, .. }
            | Self::DuplicateId { field, .. }
            | Self::TooManyDevices { field, .. }
            | Self::Queues { field, .. }
            | Self::RateEmpty { field, .. }
            | Self::RateZero { field, .. } => *field,
            Self::DuplicateImage { .. } | Self::RawBacking { .. } | Self::ReadOnlyOverlay { .. } => Field::Disk,
            Self::Tap { .. }
            | Self::DuplicateTap { .. }
            | Self::MacNotUnicast { .. }
            | Self::DuplicateMac { .. }
            | Self::Mtu { .. } => Field::Net,
            Self::VsockPath { .. } | Self::Cid { .. } => Field::Vsock,
            Self::BalloonStep { .. } | Self::BalloonTooLarge { .. } => Field::Balloon,
            Self::ForkStore { .. } => Field::Forks,
        }
    }
}

impl From<ConfigError> for ErrorBody {
    fn from(error: ConfigError) -> Self {
        ErrorBody::new(ErrorCode::InvalidConfig, format!("{}: {error}", error.field()))
    }
}
