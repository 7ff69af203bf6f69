//! Forking: what a source and its children say to each other, and what either does.
//!
//! ```text
//!  child's monitor                         source's monitor                     page server
//!    │ connect fork.sock, Hello                  │                                   │
//!    │──────────────────────────────────────────▶│ ◀──── connect fork.sock, Hello ───│
//!    │◀──────── Welcome {config} [RAM, kernel…]  │                                   │
//!    │ maps it privately, watches it, builds     │                                   │
//!    │ Ready [userfaultfd, lifeline] ───────────▶│                                   │
//!    │◀───────────────────────────── Registered  │                                   │
//!    │ (waits)                                   │  POST /v1/fork                    │
//!    │                                           │── Adopt, Arm ────────────────────▶│
//!    │                                           │  pause, state, disks              │
//!    │                                           │── Freeze ────────────────────────▶│
//!    │                                           │  run                              │
//!    │◀── Go {state}, Disk… ─────────────────────│                                   │
//!    │ runs; Started ───────────────────────────▶│                                   │
//!    │◀════════════ lifeline, page faults ═══════════════════════════════════════════▶│
//! ```
//!
//! Neither the source nor the child opens or starts anything from `Go` on: everything that either needs is there beforehand or comes as
//! a descriptor.

pub mod birth;
pub mod disks;
pub mod family;
pub mod point;

use std::fs::File;
use std::time::Duration;

use civic_fork::mappings::Mappings;
use civic_fork::pager::GenerationId;
use civic_inject::plan::Plan;
use serde::{Deserialize, Serialize};

use self::disks::DiskStateV1;

/// How long either waits for the other's next word, where nothing has to happen first.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// From the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToChild {
    /// To `Hello`: with the source's RAM, its kernel and its initial RAM disk if it has one, all to be read. A child opens no file of its
    /// source's by name: it may be another user's, and what a source says that is called so.
    Welcome {
        /// The source's configuration, as JSON, with every default filled in that depends on its name.
        config: String,
    },
    /// It is known that it waits.
    Registered,
    /// The fork: with the state, in a memfd.
    Go(Go),
    /// A disk, after [`ToChild::Go`], in the configuration's order: with the descriptors of its parts.
    Disk(DiskStateV1),
    /// Nothing comes of it.
    Refused {
        /// Why.
        why: String,
    },
}

/// What a child needs to know at its birth, beside state and disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Go {
    /// Of which fork it is.
    pub generation: GenerationId,
    /// The source's configuration, as [`ToChild::Welcome`] has it: devices may have come and gone since.
    pub config: String,
    /// Whether it stays paused.
    pub paused: bool,
    /// How often the guest has started.
    pub boots: u64,
    /// How long it has run.
    pub run: Duration,
    /// What its source knows of the guest's kernel, to start programs there.
    pub plan: Option<Box<Plan>>,
}

/// What a guest's next start reads.
#[derive(Debug)]
pub struct BootFiles {
    /// The kernel.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
}

/// From the child.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSource {
    /// It waits: with its userfaultfd, the page server's end of its lifeline, and the far ends of its network cards that are to be fed.
    Ready {
        /// Where it has its RAM.
        mappings: Mappings,
        /// For each card its id, and how many of the descriptors are its.
        mirrors: Vec<(String, u8)>,
    },
    /// It runs, or could.
    Started {
        /// Since when: `CLOCK_MONOTONIC`, in nanoseconds.
        at: u64,
    },
    /// It cannot.
    Failed {
        /// Why.
        why: String,
    },
}
