//! What `civic doctor` finds out about a host.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// As it should be.
    Ok,
    /// VMs run, with less than all features.
    Warn,
    /// VMs cannot run.
    Fail,
}

impl Status {
    /// As in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// Short stable name, `kvm`, `userfaultfd`.
    pub name: String,
    /// How it went.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What Civic needs it for.
    pub why: String,
    /// How to mend it; present unless the status is `ok`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// The whole report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Report {
    /// Version of the monitor that looked.
    pub version: String,
    /// Whether VMs with stock kernels can run here: no check failed.
    pub can_run: bool,
    /// In the order a reader would mend them.
    pub checks: Vec<Check>,
}

impl Report {
    /// A report of `checks`.
    pub fn new(version: impl Into<String>, checks: Vec<Check>) -> Self {
        let can_run = checks.iter().all(|check| check.status != Status::Fail);
        Self { version: version.into(), can_run, checks }
    }
}
