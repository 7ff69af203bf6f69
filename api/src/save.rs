//! Saving a VM: what is asked, how far it is, what came of it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What becomes of a VM that was saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AfterSave {
    /// It ends: its disks stay as they were saved.
    #[default]
    Stop,
    /// It runs on. Its disks change, so what was saved fits only copies of them made at that moment.
    Resume,
    /// It stays paused.
    Pause,
}

/// A request to save a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SaveRequest {
    /// Where to: an absolute path to a directory that is empty or does not exist yet.
    #[schema(value_type = String)]
    pub directory: PathBuf,
    /// What becomes of the VM.
    #[serde(default)]
    pub then: AfterSave,
}

/// How far saving a VM's memory is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SaveProgress {
    /// Bytes dealt with.
    pub bytes_done: u64,
    /// Of these.
    pub bytes_total: u64,
}

/// What was saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SaveReport {
    /// Where to.
    #[schema(value_type = String)]
    pub directory: PathBuf,
    /// Bytes of memory that are in the image: what the guest never touched is not.
    pub memory_bytes_written: u64,
    /// Bytes of all other state.
    pub state_bytes: u64,
    /// How long the guest stood still, in milliseconds.
    pub pause_ms: u64,
    /// How long it took in all, in milliseconds.
    pub total_ms: u64,
}
