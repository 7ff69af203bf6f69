//! What a VM may keep for its forks.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::{ConfigError, Field};
use super::{MIN_FORK_STORE_BYTES, validate_path};

/// What is kept of a VM's memory and disks for its forks before it overwrites them. At a limit the oldest fork is given up; the VM itself
/// never waits for room, nor fails for want of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForksConfig {
    /// Most bytes kept of memory, for all forks together. Absent means as much as the VM has memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1048576)]
    pub memory_bytes: Option<u64>,
    /// Most bytes kept of each disk. Absent means 64 GiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1048576)]
    pub disk_bytes: Option<u64>,
    /// The folder on whose file system what is kept of disks is, in files without a name. Absent means `/var/tmp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub dir: Option<PathBuf>,
}

impl ForksConfig {
    /// Most bytes kept of each disk.
    pub fn effective_disk_bytes(&self) -> u64 {
        self.disk_bytes.unwrap_or(64 << 30)
    }

    /// Where what is kept of disks is.
    pub fn effective_dir(&self) -> &Path {
        self.dir.as_deref().unwrap_or(Path::new("/var/tmp"))
    }

    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        for bytes in [self.memory_bytes, self.disk_bytes].into_iter().flatten() {
            if bytes < MIN_FORK_STORE_BYTES {
                return Err(ConfigError::ForkStore { bytes });
            }
        }
        self.dir.as_deref().map_or(Ok(()), |dir| validate_path(Field::Forks, dir))
    }
}
