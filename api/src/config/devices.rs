//! A VM's devices.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ConfigError, Field, is_false, validate_path};
use crate::MacAddr;

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Unique among the VM's disks and NICs; the disk's serial number in the guest: `[a-z0-9][a-z0-9._-]{0,19}`.
    #[schema(pattern = "^[a-z0-9][a-z0-9._-]{0,19}$")]
    pub id: String,
    /// Image file or block device.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Refuse the guest's writes.
    #[serde(default, skip_serializing_if = "is_false")]
    pub read_only: bool,
}

/// A network card of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Unique among the VM's disks and NICs: `[a-z0-9][a-z0-9._-]{0,19}`.
    #[schema(pattern = "^[a-z0-9][a-z0-9._-]{0,19}$")]
    pub id: String,
    /// Name of the host's tap interface.
    #[schema(min_length = 1, max_length = 15)]
    pub tap: String,
    /// Absent means one made from the VM's name and this id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
}

impl DiskConfig {
    /// Checks what concerns this disk alone.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        validate_path(Field::Disk, &self.path)
    }
}

impl NetConfig {
    /// Checks what concerns this card alone.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let tap = &self.tap;
        if tap.is_empty()
            || tap.len() > 15
            || tap == "."
            || tap == ".."
            || tap.bytes().any(|b| b <= b' ' || b == 0x7f || matches!(b, b'/' | b'%' | b':'))
        {
            return Err(ConfigError::Tap { tap: tap.clone() });
        }
        match self.mac {
            Some(mac) if !mac.is_unicast() => Err(ConfigError::MacNotUnicast { mac }),
            _ => Ok(()),
        }
    }
}
