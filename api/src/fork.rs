//! Forking a VM: what is asked, what came of it, who is whose child.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where a source listens for its page server and for children that wait, in its directory.
pub const FORK_SOCKET_FILE: &str = "fork.sock";
/// Most children of one fork.
pub const MAX_CHILDREN: usize = 64;

/// A request to fork a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// The children, by name: monitors that were started to be forked from this VM, and wait.
    pub children: Vec<String>,
    /// Whether the children stay paused, to be resumed one by one.
    #[serde(default)]
    pub paused: bool,
}

/// What came of a fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkReport {
    /// Fork points of a VM are counted.
    pub generation: u32,
    /// The children that live, in the order in which they were asked for.
    pub children: Vec<ForkedVm>,
    /// Those that could not be brought to life, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<FailedVm>,
    /// Where the time went.
    pub stages: ForkStages,
}

/// A child that lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkedVm {
    /// Its name.
    pub name: String,
    /// Process id of its monitor.
    pub pid: u32,
    /// From the request until its vCPUs were let run (or, if it stays paused, could have been), in microseconds.
    pub running_us: u64,
}

/// A child that does not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FailedVm {
    /// Its name.
    pub name: String,
    /// Why.
    pub message: String,
}

/// How long each stage of a fork took, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkStages {
    /// Before anything else: waiting for the page server, and having it adopt the children. The source runs.
    pub prepare_us: u64,
    /// Protecting the source's memory. It runs.
    pub arm_us: u64,
    /// The pause, as the source's guest sees it: from asking the vCPUs to stop until they were let run.
    pub pause_us: u64,
    /// Of the pause: stopping vCPUs and draining devices.
    pub drain_us: u64,
    /// Of the pause: reading the state of vCPUs and devices.
    pub state_us: u64,
    /// Of the pause: freezing the disks.
    pub disks_us: u64,
    /// Of the pause: protecting the last pages.
    pub freeze_us: u64,
    /// Of the pause: letting devices and vCPUs run.
    pub resume_us: u64,
    /// Handing the state to the children and waiting for all of them.
    pub birth_us: u64,
    /// From the request to the answer.
    pub total_us: u64,
}

/// A VM's family, as it knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Family {
    /// The VM that it was forked from, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
    /// Its children that live.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<ChildVm>,
    /// Monitors that wait to be forked from it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waiting: Vec<String>,
    /// Whether it has a page server: it needs one to be forked.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub page_server: bool,
}

impl Family {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Where a VM was forked from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Parent {
    /// The source's name at that time.
    pub name: String,
    /// Which of its forks; 0 as long as it waits for that.
    pub generation: u32,
}

/// A child of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ChildVm {
    /// Its name.
    pub name: String,
    /// Process id of its monitor.
    pub pid: u32,
    /// Of which fork.
    pub generation: u32,
}
