//! What the monitor tells about a running VM.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{BalloonInfo, Family, GuestAnswer, ProgramInfo, SaveProgress};

/// Where a VM is in its life.
///
/// ```text
///            start            pause
///  Created ────────► Running ◄──────► Paused
///     │                 │    resume     │
///     │ kill            │ stop          │ kill
///     │                 ▼               │
///     │              Stopping           │     Stopping: the power button is pressed, the guest still runs
///     ▼                 ▼               ▼
///  Stopped ◄────────────┴───────────────┘
/// ```
///
/// A VM that is to be forked begins as `Waiting`, and goes on as its source is, running or paused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Waits to be forked from another VM: there is no guest yet.
    Waiting,
    /// Built; no guest instruction has run.
    #[default]
    Created,
    /// vCPUs run.
    Running,
    /// vCPUs hold still; devices and clocks of the guest stand.
    Paused,
    /// The guest was asked to power off.
    Stopping,
    /// The guest is gone; the process is about to end.
    Stopped,
}

impl VmState {
    /// As in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        }
    }
}

impl std::fmt::Display for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EndReason {
    /// The guest switched itself off.
    PoweredOff,
    /// Somebody asked for `kill`.
    Killed,
    /// It was saved, and goes on where it is restored.
    Saved {
        /// Where to.
        #[schema(value_type = String)]
        directory: PathBuf,
    },
    /// The monitor or KVM could not go on.
    Failed {
        /// What happened.
        message: String,
    },
}

/// A VM as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmInfo {
    /// Its name.
    pub name: String,
    /// Where it is in its life.
    pub state: VmState,
    /// Process id of its monitor.
    pub pid: u32,
    /// Version of its monitor.
    pub version: String,
    /// vCPUs.
    pub cpus: u8,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Kernel image it was started with.
    #[schema(value_type = String)]
    pub kernel: PathBuf,
    /// Its audit log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub audit: Option<PathBuf>,
    /// How often the guest has started: 1 after `start`, one more for each reset.
    pub boots: u64,
    /// When the guest first started, in milliseconds since 1970 (UTC). Absent before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at_ms: Option<u64>,
    /// How long its vCPUs have been let run, in milliseconds: stands still while paused.
    pub run_ms: u64,
    /// Its devices in bus order.
    pub devices: Vec<DeviceInfo>,
    /// Its vCPUs by index.
    pub vcpus: Vec<VcpuInfo>,
    /// Names of its console ports.
    pub consoles: Vec<String>,
    /// Programs in it that were started from outside, by number.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub programs: Vec<ProgramInfo>,
    /// Its balloon, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonInfo>,
    /// Whom it was forked from, and who from it.
    #[serde(default, skip_serializing_if = "Family::is_empty")]
    pub family: Family,
    /// How far it is saved, while it is being saved; it stands still meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saving: Option<SaveProgress>,
    /// Why it ended, once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<EndReason>,
}

/// A device of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeviceInfo {
    /// Its id in the configuration, or one of [`crate::RESERVED_IDS`].
    pub id: String,
    /// `blk`, `net`, `rng`, `console`, `vsock`, `balloon` or `serial`.
    #[schema(example = "blk")]
    pub kind: String,
    /// PCI address, `0000:00:03.0`; absent for a device that is not on the bus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "0000:00:03.0")]
    pub address: Option<String>,
    /// What it was configured with, by the names in the configuration's JSON; a rate's are `bytes_per_second` and
    /// `operations_per_second`, a network card's with `rx_` or `tx_` before. What is not there was left to the monitor, but for a
    /// network card's address: `mac` is the one it has.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub settings: BTreeMap<String, String>,
    /// Counters since the monitor started; names end in their unit (`read_bytes`, `kicks`). They never go back.
    pub counters: BTreeMap<String, u64>,
    /// Whether the guest has a driver for it, which uses it. Absent for a device that is not on the bus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<bool>,
    /// What the guest made of the device's coming, or is to do about its going.
    #[serde(default, skip_serializing_if = "GuestAnswer::is_unasked")]
    pub guest: GuestAnswer,
    /// The guest is to give it up.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
}

/// A vCPU of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VcpuInfo {
    /// 0 is the boot CPU.
    pub index: u32,
    /// KVM exits to the monitor since it started, by reason (`io_out`, `mmio_read`, `hlt`, `interrupted`).
    pub exits: BTreeMap<String, u64>,
}
