//! What the source and the page server say to each other, and what a child hears.
//!
//! ```text
//!  source                          page server                       child
//!    │ Begin [uffd, ram, store, journal] │                              │
//!    │──────────────────────────────────▶│                              │
//!    │◀──────────────────────────── Done │                              │
//!    │ Adopt [uffd, lifeline] ──────────▶│◀═══════ lifeline ═══════════▶│
//!    │◀──────────────────────────── Done │                              │
//!    │ ArmAhead ────────────────────────▶│                              │
//!    │◀──────────────────────────── Done │                              │
//!    │ (a fork is wanted) Arm ──────────▶│                              │
//!    │◀─────────────────────────── Armed │                              │
//!    │ Freeze ──────────────────────────▶│                              │
//!    │◀────────────────────────── Frozen │                              │
//!    │   …            Notice, whenever ◀─│─▶ LastWord, then closed      │
//! ```
//!
//! A child asks by its lifeline, in the same words, for what its own children need: [`Request::Adopt`], [`Request::FreezeChild`] and so on.
//!
//! Every request but [`Request::Ping`] has one answer, in order; notices come between.

use serde::{Deserialize, Serialize};

use super::habits::{Habits, Runs};
use super::{Armed, ChildId, GenerationId, Notice, Report};
use crate::mappings::Mappings;

/// From the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The first: with the source's userfaultfd, the memfd of its RAM, and those of the store and the journal.
    Begin {
        /// Where the source has its RAM.
        mappings: Mappings,
        /// Most pages in the store.
        limit: u32,
        /// What is known of the source's earlier children.
        habits: Habits,
    },
    /// A child that waits: with its userfaultfd and its lifeline; of a child, also with its process's pidfd, and its leash if it is jailed.
    Adopt {
        /// Its number.
        child: ChildId,
        /// Where it has its RAM.
        mappings: Mappings,
    },
    /// Protect the source's memory while it runs, as long as there are children that wait.
    ArmAhead,
    /// The same for a fork that comes now: say when it is done.
    Arm,
    /// The fork point, of these children.
    Freeze {
        /// Their numbers.
        children: Vec<ChildId>,
    },
    /// A child's fork point, of these children.
    FreezeChild {
        /// Their numbers.
        children: Vec<ChildId>,
        /// How many pages the child has of its own, in the memfd that comes along; see [`Snapshot`](super::snapshot).
        pages: u32,
    },
    /// There will be no fork.
    Abandon,
    /// A child is not wanted any more.
    Forget {
        /// Its number.
        child: ChildId,
    },
    /// What was frozen of the disks at a fork point is lost: its children must end.
    Lose {
        /// Which one.
        generation: GenerationId,
        /// Why.
        why: String,
    },
    /// From a child: it has other memory now, and its disks are as they were.
    Independent,
    /// From a child that will run programs: say when it has been given all that earlier ones needed, and what it is going to write.
    Expect,
    /// From a child: it had written these pages when a program began to run in it.
    Wrote {
        /// They.
        runs: Runs,
    },
    /// The source has its memory no more. Its children keep it as it is.
    Leave,
    /// What has been done.
    Report,
    /// Show that you are well.
    Ping,
}

/// From the page server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// It is done.
    Done,
    /// To [`Request::Arm`].
    Armed(Armed),
    /// To [`Request::Freeze`].
    Frozen(GenerationId),
    /// To [`Request::Expect`].
    Expected(Runs),
    /// To [`Request::Report`].
    Report(Box<Report>),
    /// It cannot be done.
    Refused(String),
    /// Not an answer.
    Notice(Notice),
    /// Not an answer: it cannot go on, and ends. To a child: that must end. One that hears nothing before its lifeline is closed knows that
    /// the page server has died.
    Failed(String),
}
