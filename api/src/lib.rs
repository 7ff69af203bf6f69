//! The words Civic's processes say to each other: a VM's configuration, what the monitor tells about it, its errors,
//! and (feature `client`) the HTTP client.
//!
//! Plain data only. Nothing here opens a device or knows KVM; whoever depends on this crate gets no runtime unless it
//! asks for `client`.
//!
//! Invariants:
//! * [`VmConfig`] refuses fields it does not know: a misspelt option is an error, never a silent default.
//! * Whatever else is *read* here accepts unknown fields, so that an older command can talk to a newer monitor.
//! * An error on the wire is always an [`ErrorBody`].

mod balloon;
#[cfg(feature = "client")]
pub mod client;
mod config;
mod device;
pub mod doctor;
mod error;
mod fork;
mod guest;
mod info;
pub mod launch;
mod mac;
mod program;
pub mod routes;
mod save;
mod size;

pub use balloon::BalloonInfo;
pub use config::{
    BALLOON_ID, BALLOON_STEP_BYTES, BalloonConfig, CONSOLE_PORT_HVC, CONSOLE_PORT_SERIAL, ConfigError, ConsoleConfig,
    DiskConfig, DiskFormat, Field, ForksConfig, MAX_CID, MAX_CMDLINE_BYTES, MAX_CPUS, MAX_DEVICES, MAX_DISK_QUEUES,
    MAX_ID_BYTES, MAX_MEMORY_BYTES, MAX_NAME_BYTES, MAX_NET_QUEUES, MAX_VSOCK_PATH_BYTES, MEMORY_STEP_BYTES, MIN_CID,
    MIN_MEMORY_BYTES, MIN_MTU, NetConfig, RESERVED_IDS, RateLimit, VSOCK_ID, VmConfig, VsockConfig, validate_name,
};
pub use device::{DEVICE_WAIT_MS, GuestAnswer, MAX_DEVICE_WAIT_MS, NewDevice, PluggedDevice, STORE_ID};
pub use error::{ErrorBody, ErrorCode};
pub use fork::{
    ChildVm, FORK_SOCKET_FILE, FailedVm, Family, ForkReport, ForkRequest, ForkStages, ForkedVm, MAX_CHILDREN, Parent,
};
pub use guest::{
    Finding, GuestChecksums, GuestFile, GuestFiles, GuestImage, GuestKernel, GuestSymbols, GuestTypes, PerCpuSymbols,
    SymbolAddresses,
};
pub use info::{DeviceInfo, EndReason, VcpuInfo, VmInfo, VmState};
pub use mac::{MacAddr, MacAddrError};
pub use program::{
    CopyDirection, CopyRequest, Freeze, InjectStages, MAX_PROGRAM_WAIT_MS, PROGRAM_WAIT_MS, ProgramInfo,
    ProgramNetwork, ProgramRequest, ProgramRoot, StartedProgram, TerminalSize,
};
pub use save::{AfterSave, SaveProgress, SaveReport, SaveRequest};
pub use size::{ByteSize, ByteSizeError};
