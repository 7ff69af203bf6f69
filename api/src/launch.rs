//! How `civic run` and `civic-vmm` meet.
//!
//! ```text
//!  civic run                                     civic-vmm --config - --dir RUN_DIR/NAME
//!     │  LaunchRequest as JSON on stdin ─────────►│  takes DIR/lock, binds DIR/api.sock, builds the VM
//!     │◄──────────── one line of JSON on stdout ───│  Launch::Ready or Launch::Failed; then closes stdout
//!     │  POST /v1/start over DIR/api.sock ────────►│
//! ```
//!
//! Files of a VM's directory. All but the log go when the VM ends; the log stays when it ended badly.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{ErrorBody, NewDevice, VmConfig};

/// Held with `flock` as long as the monitor lives. A directory whose lock is free is nobody's.
pub const LOCK_FILE: &str = "lock";
/// The API's socket.
pub const SOCKET_FILE: &str = "api.sock";
/// The monitor's stderr.
pub const LOG_FILE: &str = "vmm.log";

/// What a monitor is started with: a VM to boot, one to restore, or one to be forked from another. Told apart by the fields `restore` and
/// `fork_of`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LaunchRequest {
    /// A VM to boot.
    Boot(VmConfig),
    /// A saved VM.
    Restore(RestoreConfig),
    /// A VM that waits to be forked from another.
    Fork(ForkConfig),
}

impl LaunchRequest {
    /// The VM's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Boot(config) => &config.name,
            Self::Restore(config) => &config.name,
            Self::Fork(config) => &config.name,
        }
    }

    /// Reads the JSON of either.
    ///
    /// # Errors
    /// What serde says of the one that it is.
    pub fn from_json(text: &str) -> serde_json::Result<Self> {
        let value: serde_json::Value = serde_json::from_str(text)?;
        if value.get("restore").is_some() {
            serde_json::from_str(text).map(Self::Restore)
        } else if value.get("fork_of").is_some() {
            serde_json::from_str(text).map(Self::Fork)
        } else {
            serde_json::from_str(text).map(Self::Boot)
        }
    }

    /// The JSON of either.
    ///
    /// # Errors
    /// For a path that is not UTF-8.
    pub fn to_json(&self) -> serde_json::Result<Vec<u8>> {
        match self {
            Self::Boot(config) => serde_json::to_vec(config),
            Self::Restore(config) => serde_json::to_vec(config),
            Self::Fork(config) => serde_json::to_vec(config),
        }
    }
}

/// A saved VM to restore. Everything that is not given here is as it was saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// The VM's name from now on.
    pub name: String,
    /// The directory that it was saved to.
    #[schema(value_type = String)]
    pub restore: PathBuf,
    /// Where disks' images are now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<MovedDisk>,
    /// The taps that network cards are on now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<MovedNet>,
    /// The vsock's socket, for one that had any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub vsock: Option<PathBuf>,
    /// Where the kernel is now: the guest's next reset boots it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub kernel: Option<PathBuf>,
    /// Where the initial RAM disk is now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// Restore although a writable disk has been written to since: its file system will be damaged unless it was copied at the moment of
    /// saving.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_changed_disks: bool,
    /// As in [`VmConfig`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub overcommit: bool,
    /// As in [`VmConfig`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub any_kvm: bool,
    /// Its audit log from now on: that of the VM that was saved is not written to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub audit: Option<PathBuf>,
}

/// A VM that waits to be forked from another: it is what that one is, under another name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkConfig {
    /// The VM's name.
    pub name: String,
    /// The directory of the VM that it is to be forked from.
    #[schema(value_type = String)]
    pub fork_of: PathBuf,
    /// A folder on the file system that takes what it writes to its disks: without a name, and gone with it. If not given, `/var/tmp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub overlay_dir: Option<PathBuf>,
    /// What its source's network cards are connected to in it.
    #[serde(default, skip_serializing_if = "SourceNet::is_isolated")]
    pub source_net: SourceNet,
    /// What it has besides what its source has: plugged in before its guest runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<NewDevice>,
    /// Programs will be started in it: it is not born before it has the memory that earlier such forks have needed, as far as is known.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub for_programs: bool,
    /// Its audit log: it does not write to its source's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub audit: Option<PathBuf>,
}

/// What the network cards that a fork has of its source are connected to. They have the source's addresses: nothing that they send is
/// ever heard by anybody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SourceNet {
    /// To wires that lead nowhere: nothing comes.
    #[default]
    Isolated,
    /// To nothing: the guest sees that the cable is out.
    Down,
    /// To wires on which comes a copy of what the source receives. What the fork does not take in time is lost to it.
    Mirror,
}

impl SourceNet {
    fn is_isolated(&self) -> bool {
        *self == Self::Isolated
    }
}

/// A disk whose image is elsewhere now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MovedDisk {
    /// Which.
    pub id: String,
    /// Where.
    #[schema(value_type = String)]
    pub path: PathBuf,
}

/// A network card that is on another tap now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MovedNet {
    /// Which.
    pub id: String,
    /// On which.
    pub tap: String,
}

/// The one line a monitor writes to stdout: `{"ready":true,"pid":42}` or `{"error":{…}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Launch {
    /// The VM is built and the API answers.
    Ready {
        /// Always true.
        ready: bool,
        /// The monitor's process id.
        pid: u32,
    },
    /// There will be no VM.
    Failed {
        /// Why.
        error: ErrorBody,
    },
}

impl Launch {
    /// The VM is built, by process `pid`.
    pub fn ready(pid: u32) -> Self {
        Self::Ready { ready: true, pid }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorCode;

    #[test]
    fn lines_are_as_documented() {
        let check = |launch: Launch, line: &str| {
            assert_eq!(serde_json::to_string(&launch).unwrap(), line);
            assert_eq!(serde_json::from_str::<Launch>(line).unwrap(), launch);
        };
        check(Launch::ready(42), r#"{"ready":true,"pid":42}"#);
        let error = ErrorBody::new(ErrorCode::NameInUse, "taken");
        check(Launch::Failed { error }, r#"{"error":{"code":"name_in_use","message":"taken"}}"#);
    }
}
