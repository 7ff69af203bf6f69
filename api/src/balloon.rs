//! What a VM's balloon tells.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A VM's balloon as it is now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BalloonInfo {
    /// How much memory it is to take from the guest, in bytes.
    pub target_bytes: u64,
    /// How much it has taken, as the guest says. It gives when it can, so this follows the target in its own time.
    pub actual_bytes: u64,
    /// How often the guest has told its statistics since it was last reset.
    pub reports: u64,
    /// What it told last, by its own account: names end in their unit (`free_bytes`, `major_faults`). It may leave anything
    /// out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub statistics: BTreeMap<String, u64>,
}
