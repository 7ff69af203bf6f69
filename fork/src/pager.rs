//! The page server: what the source overwrites is kept for its children first.
//!
//! ```text
//!            arm                  freeze: a generation             freeze: another
//!   idle ─────────▶ arming ───────────────────────▶ armed ─────────────────────────────▶ armed …
//!     ▲               │ ▲                             │ arm: what was written since
//!     │  all is let   │ └─────────────────────────────┘
//!     └── disarming ◀─┴──────────── the last child is gone, also of those that wait
//! ```
//!
//! All RAM is one memfd `R`. The source maps it shared and is watched for writes and for holes; a child maps it privately and is
//! watched for every first touch. Per page:
//!
//! | event | answer |
//! |---|---|
//! | the source writes a page that generations lack, no child has it mapped | copy it to the store; let the write through |
//! | the same, a child may have it mapped | copy; punch it out of `R` (that unmaps it everywhere at once; what a child wrote itself stays); put it back for the source |
//! | the source touches a hole | the generations keep "zero"; fill the hole |
//! | a child touches a page that its generation keeps | copy it from the store, or a zero page |
//! | a child touches a page that is still what it was | map `R`'s own page, read-only, and its neighbours; a hole: the zero page |
//!
//! Arming happens while the source runs: a write in that phase means that the page was written before the fork point: it is noted, not
//! kept. [`Pager::freeze`] protects what was noted again, with all vCPUs parked and devices drained, and that is the fork point. While
//! generations live, whatever is not protected is in `open`, so that the next arming has only that to protect. As soon as somebody waits to
//! be forked, [`Pager::arm_ahead`] does it beforehand: until the fork, the source's first write to a page costs it one answer.
//!
//! A child that is forked itself brings its own pages, sealed, as a [`Snapshot`]; whatever else its children touch is as it is for the child
//! (so, mostly, the source's own page):
//!
//! ```text
//!   grandchild ── touches ──▶ in the child's snapshot? copy : in the child's generation's store? copy : R's own page
//! ```
//!
//! Invariants:
//! * One thread does all of this, so no two answers about a page overlap: a child is never given `R`'s page while it is being kept.
//! * A page that a generation lacks is protected in the source, or a hole that faults.
//! * If a generation keeps a page, so does every older one that lives: they lack it together, and it is stored once.
//! * Faults that were read are all answered before anything else happens: none refers to a state that has passed.
//! * The source comes first: a child's fault never waits in front of the source's. What a child does can end children, not the source.
//! * A generation lives as long as a child needs it, or a snapshot that is above it; its disks are needed as long as a process lives that
//!   began at it, or at one of those: [`Notice::Released`].
//! * This process never touches guest memory through a mapping: it would wait for its own answer. It reads with `pread(2)`, which
//!   leaves holes holes.
//!
//! The protocol is measured and shown to hold in the tests; `userfaultfd(2)`, Linux 6.1 or later.

pub mod generation;
pub mod habits;
pub mod journal;
mod mapped;
pub mod protocol;
pub mod server;
pub mod snapshot;
pub mod store;
mod streams;
#[cfg(test)]
mod tests;
pub mod times;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use nix::fcntl::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};
use vm_memory::VolatileSlice;

use self::generation::{Generation, Kept, Pages};
use self::habits::{Habits, Runs};
use self::journal::{InFlight, Journal};
use self::snapshot::{Snapshot, SnapshotError};
use self::store::{Slot, Store, StoreError};
use self::streams::Streams;
use self::times::Times;
use crate::mappings::Mappings;
use crate::ram::PAGE;
use crate::uffd::{EventBuffer, Fault, FaultKind, FeatureFlags, IoctlFlags, RegisterMode, UffdError, Userfault};

/// What the source's userfaultfd must have been opened with.
pub const FEATURES: FeatureFlags = FeatureFlags::from_bits_retain(
    FeatureFlags::PAGEFAULT_FLAG_WP.bits()
        | FeatureFlags::MISSING_SHMEM.bits()
        | 1 << 10 // MINOR_SHMEM
        | 1 << 12 // WP_HUGETLBFS_SHMEM
        | 1 << 13, // WP_UNPOPULATED
);

/// What a child's should: protection that somebody else asks for is lifted at the first write, and nobody is told (Linux 6.7).
pub const CHILD_FEATURES: FeatureFlags = FeatureFlags::from_bits_retain(FEATURES.bits() | 1 << 15); // WP_ASYNC

/// Protected at a time: whoever writes there meanwhile waits that long. 8 MiB are 60 µs where the design's figures were measured.
const CHUNK: u64 = 8 << 20;
/// Pages around a child's fault that are mapped with it.
const NEIGHBOURS: u32 = 16;
/// Most that descend from one child of the source and live, as that may be hostile: each is two descriptors, here and in the source.
const MOST: usize = 512;
/// Most that descend from any.
const MOST_IN_ALL: usize = 2048;
/// Faults read at a time.
const EVENTS: usize = 64;
/// An arming round that leaves this few pages to protect in the pause is the last.
const FEW: usize = 256;
/// Rounds of arming at most: a guest that writes faster than it is protected gets a longer pause.
const ROUNDS: u32 = 5;
/// Pages between two that are to be protected which are protected with them, for one call instead of two.
const GAP: u32 = 8;

/// `UFFDIO_CONTINUE` among the calls that a range offers (`_UFFDIO_CONTINUE`), which the crate does not name.
const CONTINUE: IoctlFlags = IoctlFlags::from_bits_retain(1 << 7);

/// A fork point's number: they count up.
pub type GenerationId = u32;
/// A child's number: chosen by whoever has it adopted, and nobody else's. Below [`CHILDREN`].
pub type ChildId = u64;
/// The end of children's numbers.
pub const CHILDREN: ChildId = 1 << 62;

/// Why the page server cannot go on serving the source. Its children end.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// A call about the source's memory.
    #[error("the source's memory cannot be watched")]
    Source(#[source] UffdError),
    /// A page was punched out and cannot be put back, or not punched.
    #[error("guest memory at {offset:#x} cannot be exchanged")]
    Exchange {
        /// Where.
        offset: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Guest memory cannot be read, or the store not be mapped.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A child's own pages cannot be taken.
    #[error("the child's own pages cannot be taken")]
    Snapshot(#[from] SnapshotError),
    /// It cannot be done in this state.
    #[error("the page server is {is}: it cannot {to}")]
    Phase {
        /// What it is.
        is: &'static str,
        /// What was asked.
        to: &'static str,
    },
}

/// Why a child cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Lost {
    /// The store is full, and its generation was the oldest.
    #[error(
        "the source has overwritten more than the store of preserved pages holds ({limit} pages), and this was the oldest fork"
    )]
    StoreFull {
        /// The store's limit.
        limit: u32,
    },
    /// The host gives no memory to the store.
    #[error("the host has no memory for the store of preserved pages: {why}")]
    NoMemory {
        /// What it said.
        why: String,
    },
    /// It lacks something else.
    #[error("{why}")]
    Elsewhere {
        /// What.
        why: String,
    },
    /// Its memory cannot be served.
    #[error("its memory cannot be served: {why}")]
    Unserved {
        /// Why.
        why: String,
    },
}

/// What has happened and its owner should hear.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Notice {
    /// A child has lost its memory, and must end. Until [`Pager::forget`] nothing it still has mapped changes under it.
    Lost(ChildId, Lost),
    /// A child's process is gone.
    Gone(ChildId),
    /// The source's process is gone. The children have all of its memory.
    SourceGone,
    /// Nobody needs what was frozen at this fork point any more, be it memory or disks.
    Released(GenerationId),
    /// A child of a child was adopted: with its process.
    Descendant(ChildId),
    /// No generation is left: nobody needs what the source held.
    Unshared,
    /// Nobody waits any more either, and the source is as it was before.
    Idle {
        /// What is known of its children: for [`Pager::set_habits`] of the next page server.
        habits: Habits,
    },
}

/// What has been done, in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Counters {
    /// Pages of the source that a child had mapped at some time, now.
    pub shared: u64,
    /// Pages in the store now.
    pub stored: u64,
    /// Writes of the source that waited.
    pub write_faults: u64,
    /// Pages copied to the store.
    pub kept: u64,
    /// Of those, pages that were punched out and put back.
    pub punched: u64,
    /// Pages that the source was let through to before it wrote there, because it had written those before them.
    pub ahead: u64,
    /// Holes of the source that were filled.
    pub holes: u64,
    /// First touches of children that waited.
    pub child_faults: u64,
    /// Pages mapped into children: the source's own.
    pub mapped: u64,
    /// Pages copied to children.
    pub copied: u64,
    /// Zero pages given to children.
    pub zeroed: u64,
}

/// A fork point, and what is kept for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationReport {
    /// Its number.
    pub id: GenerationId,
    /// Pages that it keeps: of the source in the store, where generations share them; of a child those that were its own.
    pub kept: u32,
}

/// A child, and what it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildReport {
    /// Its number.
    pub id: ChildId,
    /// Pages that it has, but for those that nobody served.
    pub given: u32,
    /// Its first touches that waited, from when the page server read of them.
    pub service: Times,
}

/// What the page server tells of somebody's forks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Of the whole family.
    pub counters: Counters,
    /// Writes of the source that waited, from when the page server read of them.
    pub stalls: Times,
    /// Its fork points.
    pub generations: Vec<GenerationReport>,
    /// Its children that live, [`REPORTED`] at most.
    pub children: Vec<ChildReport>,
}

/// Most children in a [`Report`]: it has to fit in a message.
pub const REPORTED: usize = 256;

/// What arming did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Armed {
    /// Rounds over what was written meanwhile.
    pub rounds: u32,
    /// Pages that the last round left for the pause.
    pub left: usize,
}

#[derive(Debug)]
struct Source {
    uffd: Userfault,
    mappings: Mappings,
}

/// What a child's memory is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    /// Of a fork point to come.
    Waiting,
    /// Of this one.
    Generation(GenerationId),
    /// Of none any more: it has memory of its own now, and only its disks are as they were.
    Independent,
    /// Of one that was given up. What it touches is not answered, what it has mapped is taken away before it changes; its process is
    /// about to end.
    Lost,
}

#[derive(Debug)]
struct Child {
    uffd: Userfault,
    mappings: Mappings,
    of: Of,
    /// Of which child it is one; none of the source's own.
    parent: Option<ChildId>,
    /// From which child of the source's own it descends, be that alive or not.
    house: ChildId,
    /// Where it began, once it has.
    point: Option<GenerationId>,
    /// Pages that it was given, or that were there for it.
    given: Pages,
    service: Times,
}

impl Child {
    /// Copies to it what is in the store or a parent's own. `None` of what is neither.
    fn copy(&self, page: u32, content: &Content<'_>) -> Option<Result<(), UffdError>> {
        let copied = match content {
            Content::Kept(bytes) => self.uffd.copy(&self.mappings, offset_of(page), bytes),
            Content::Own(bytes) => self.uffd.copy_volatile(&self.mappings, offset_of(page), *bytes),
            Content::Zero | Content::Live => return None,
        };
        Some(copied.map(drop))
    }
}

/// A fork point, as long as somebody lives who began there or later.
#[derive(Clone, Copy, Debug)]
struct Point {
    /// Whose it is: a child's, or the source's.
    owner: Option<ChildId>,
    /// Where the owner began itself.
    above: Option<GenerationId>,
}

/// How a child's memory was when it began.
struct View<'a> {
    /// Its parents' own pages, its next parent's first.
    snapshots: Vec<&'a Snapshot>,
    generation: &'a Generation,
    store: &'a Store,
}

enum Content<'a> {
    /// In the store.
    Kept(&'a [u8]),
    /// In a parent's snapshot.
    Own(VolatileSlice<'a>),
    Zero,
    /// As it is in the source's memory now.
    Live,
}

impl<'a> View<'a> {
    fn of(
        snapshots: &'a BTreeMap<GenerationId, Snapshot>,
        generations: &'a BTreeMap<GenerationId, Generation>,
        store: &'a Store,
        mut point: GenerationId,
    ) -> Option<Self> {
        let mut own = Vec::new();
        while let Some(snapshot) = snapshots.get(&point) {
            own.push(snapshot);
            point = snapshot.above;
        }
        Some(Self { snapshots: own, generation: generations.get(&point)?, store })
    }

    fn page(&self, page: u32) -> Content<'a> {
        if let Some(bytes) = self.snapshots.iter().find_map(|snapshot| snapshot.page(page)) {
            return Content::Own(bytes);
        }
        match self.generation.get(page) {
            Kept::Live => Content::Live,
            Kept::Zero => Content::Zero,
            Kept::In(slot) => Content::Kept(self.store.page(slot)),
        }
    }

    fn is_live(&self, page: u32) -> bool {
        self.generation.is_live(page) && !self.snapshots.iter().any(|snapshot| snapshot.has(page))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    /// Protecting all from `next` on; then round by round what was written meanwhile.
    Arming {
        next: u64,
        rounds: u32,
    },
    Ready(Armed),
    Armed,
    /// Letting go of all from `next` on.
    Disarming {
        next: u64,
    },
}

/// The page server of one source.
pub struct Pager {
    ram: File,
    pages: usize,
    source: Option<Source>,
    store: Store,
    /// The host had no memory for more slots. Only when one is wanted is that a reason to give something up.
    starved: bool,
    journal: Journal,
    phase: Phase,
    generations: BTreeMap<GenerationId, Generation>,
    /// Fork points of children.
    snapshots: BTreeMap<GenerationId, Snapshot>,
    /// All fork points.
    points: BTreeMap<GenerationId, Point>,
    last: GenerationId,
    children: BTreeMap<ChildId, Child>,
    /// Pages of `ram` that a child may have mapped.
    shared: Pages,
    /// Pages of the source that are not protected, while others are.
    open: Pages,
    /// Where the source has been writing.
    streams: Streams,
    /// Runs that a new child is to be given beforehand.
    warming: VecDeque<(ChildId, u32, u32)>,
    habits: Habits,
    /// A fork is being made: what is armed stays armed.
    wanted: bool,
    /// There have been generations, and that there are none any more was not told yet.
    sharing: bool,
    events: EventBuffer,
    notices: VecDeque<(Option<ChildId>, Notice)>,
    counters: Counters,
    stalls: Times,
}

impl Pager {
    /// For a source whose RAM is `ram`, mapped at `mappings` of its address space and watched through `uffd`. `store` and `journal`
    /// are the source's too.
    ///
    /// # Errors
    /// When the store cannot be mapped.
    pub fn new(
        ram: File,
        uffd: Userfault,
        mappings: Mappings,
        store: Store,
        journal: Journal,
    ) -> Result<Self, PagerError> {
        let pages = (mappings.bytes() / PAGE as u64) as usize;
        Ok(Self {
            ram,
            pages,
            source: Some(Source { uffd, mappings }),
            store,
            starved: false,
            journal,
            phase: Phase::Idle,
            generations: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            points: BTreeMap::new(),
            last: 0,
            children: BTreeMap::new(),
            shared: Pages::new(pages),
            open: Pages::new(pages),
            streams: Streams::default(),
            warming: VecDeque::new(),
            habits: Habits::default(),
            wanted: false,
            sharing: false,
            events: EventBuffer::new(EVENTS),
            notices: VecDeque::new(),
            counters: Counters::default(),
            stalls: Times::default(),
        })
    }

    /// What is known of earlier children.
    pub fn set_habits(&mut self, habits: Habits) {
        self.habits = habits.within(self.pages as u32);
    }

    /// A child, which may lie, says what it had written when a program began to run in it.
    pub fn add_written(&mut self, runs: &[(u32, u32)]) {
        self.habits.add_written(runs, self.pages);
    }

    /// What a child that will run programs is going to write, as far as is known. None while it is still being given what it will need,
    /// or waits to be forked.
    pub fn to_write(&self, child: ChildId) -> Option<Runs> {
        let waits = self.children.get(&child).is_some_and(|child| child.of == Of::Waiting);
        let warming = self.warming.iter().any(|(warmed, ..)| *warmed == child);
        (!waits && !warming).then(|| self.habits.to_write(self.pages))
    }

    /// What has happened since this was asked, and which child is to hear of it; the source where it is none.
    pub fn notices(&mut self) -> impl Iterator<Item = (Option<ChildId>, Notice)> {
        std::mem::take(&mut self.notices).into_iter()
    }

    /// What has been done.
    pub fn counters(&self) -> Counters {
        Counters { shared: self.shared.count().into(), stored: self.store.used().into(), ..self.counters }
    }

    /// What there is to tell `owner`, a child or the source.
    pub fn report(&self, owner: Option<ChildId>) -> Report {
        let kept = |id: &GenerationId| {
            let of_source = self.generations.get(id).map(Generation::slots);
            of_source.or_else(|| self.snapshots.get(id).map(Snapshot::count)).unwrap_or_default()
        };
        let generations = self.points.iter().filter(|(_, point)| point.owner == owner);
        let children = self.children.iter().filter(|(_, child)| child.parent == owner && child.point.is_some());
        let child = |(id, child): (&ChildId, &Child)| ChildReport {
            id: *id,
            given: child.given.count(),
            service: child.service,
        };
        Report {
            counters: self.counters(),
            stalls: self.stalls,
            generations: generations.map(|(id, _)| GenerationReport { id: *id, kept: kept(id) }).collect(),
            children: children.map(child).take(REPORTED).collect(),
        }
    }

    /// The source's userfaultfd, to wait for.
    pub fn source(&self) -> Option<&Userfault> {
        self.source.as_ref().map(|source| &source.uffd)
    }

    /// A child's userfaultfd, to wait for.
    pub fn child(&self, id: ChildId) -> Option<&Userfault> {
        self.children.get(&id).map(|child| &child.uffd)
    }

    /// Whether [`Pager::step`] has something to do though nobody waits.
    pub fn busy(&self) -> bool {
        matches!(self.phase, Phase::Arming { .. } | Phase::Disarming { .. })
            || !self.warming.is_empty()
            || self.wants_slots()
            || self.has_spare()
    }

    /// Whether the store has memory to give back.
    fn has_spare(&self) -> bool {
        self.store.is_long(!self.generations.is_empty())
    }

    /// Whether slots should be made ready for what the source is about to overwrite.
    fn wants_slots(&self) -> bool {
        !self.starved && self.source.is_some() && !self.generations.is_empty() && self.store.is_short()
    }

    /// Starts protecting the source's memory, while it runs, for a fork that comes now. [`Pager::armed`] tells when that is done.
    ///
    /// # Errors
    /// When the kernel refuses, or there is no source.
    pub fn arm(&mut self) -> Result<(), PagerError> {
        match self.phase {
            Phase::Arming { .. } => (),
            // Only what is open needs protection.
            Phase::Armed | Phase::Ready(_) => self.phase = Phase::Arming { next: self.bytes(), rounds: 0 },
            Phase::Idle | Phase::Disarming { .. } => self.watch_source()?,
        }
        self.wanted = true;
        Ok(())
    }

    /// The same, for a fork that may come: it stays armed as long as somebody waits to be forked.
    ///
    /// # Errors
    /// As [`Pager::arm`].
    pub fn arm_ahead(&mut self) -> Result<(), PagerError> {
        match self.phase {
            Phase::Idle | Phase::Disarming { .. } if self.is_waited_for() => self.watch_source(),
            // Whoever waited has gone meanwhile.
            Phase::Idle => {
                self.tell_idle();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Whether somebody waits to be forked from the source itself.
    fn is_waited_for(&self) -> bool {
        self.children.values().any(|child| child.of == Of::Waiting && child.parent.is_none())
    }

    fn watch_source(&mut self) -> Result<(), PagerError> {
        let Some(source) = &self.source else { return Err(PagerError::Phase { is: "without a source", to: "arm" }) };
        let mode = RegisterMode::WRITE_PROTECT | RegisterMode::MISSING;
        let needs = IoctlFlags::COPY | IoctlFlags::ZEROPAGE | IoctlFlags::WAKE | IoctlFlags::WRITE_PROTECT;
        source.uffd.register(&source.mappings, mode, needs).map_err(PagerError::Source)?;
        self.open.clear();
        self.streams = Streams::default();
        self.phase = Phase::Arming { next: 0, rounds: 0 };
        Ok(())
    }

    fn bytes(&self) -> u64 {
        self.pages as u64 * PAGE as u64
    }

    /// What arming did, once the source may be paused.
    pub fn armed(&self) -> Option<Armed> {
        match self.phase {
            Phase::Ready(armed) => Some(armed),
            _ => None,
        }
    }

    /// The fork will not be: back to how it was.
    pub fn abandon(&mut self) {
        self.wanted = false;
        self.let_go_if_unused();
    }

    /// Adopts a process that waits to become a child, of another child or of the source. Its memory is `uffd`'s, at `mappings`: a private
    /// mapping of the memfd that nobody has touched.
    ///
    /// # Errors
    /// When its memory has another size, or its number is somebody's.
    pub fn adopt(
        &mut self,
        id: ChildId,
        parent: Option<ChildId>,
        uffd: Userfault,
        mappings: Mappings,
    ) -> Result<(), Lost> {
        if mappings.bytes() != self.bytes() {
            return Err(Lost::Unserved { why: format!("it has {} bytes of memory", mappings.bytes()) });
        }
        let house = parent.map(|parent| self.children.get(&parent).map_or(parent, |child| child.house));
        if let Some(house) = house {
            let descend = self.children.values().filter(|child| child.parent.is_some());
            let (of_it, all) =
                descend.fold((0, 0), |(of_it, all), child| (of_it + usize::from(child.house == house), all + 1));
            if of_it >= MOST || all >= MOST_IN_ALL {
                let why = format!("{MOST} forks of forks of one fork, or {MOST_IN_ALL} in all, are the most");
                return Err(Lost::Unserved { why });
            }
        }
        if id >= CHILDREN || self.children.contains_key(&id) {
            return Err(Lost::Unserved { why: format!("its number {id} is not its own") });
        }
        let given = Pages::new(self.pages);
        self.children.insert(
            id,
            Child {
                uffd,
                mappings,
                of: Of::Waiting,
                parent,
                house: house.unwrap_or(id),
                point: None,
                given,
                service: Times::default(),
            },
        );
        Ok(())
    }

    /// Of which child this is one.
    pub fn parent(&self, id: ChildId) -> Option<ChildId> {
        self.children.get(&id)?.parent
    }

    /// The fork point: every vCPU of the source is parked and every device drained. `children` are those that come of it.
    ///
    /// # Errors
    /// When it is not armed, or the kernel refuses: then there is no fork.
    pub fn freeze(&mut self, children: &[ChildId]) -> Result<GenerationId, PagerError> {
        if self.armed().is_none() {
            return Err(PagerError::Phase { is: "not armed", to: "freeze" });
        }
        self.serve_source()?;
        self.protect_open()?;
        // Devices that were waiting when they were drained are done, and parked vCPUs write nothing.
        self.last += 1;
        self.generations.insert(self.last, Generation::new(self.pages));
        (self.phase, self.wanted, self.sharing) = (Phase::Armed, false, true);
        self.begin(Point { owner: None, above: None }, children);
        Ok(self.last)
    }

    /// A fork point of a child, whose own pages then are the first `count` of `memfd`.
    ///
    /// # Errors
    /// When it has no fork point itself any more, or brings something else.
    pub fn freeze_child(
        &mut self,
        parent: ChildId,
        memfd: &File,
        count: u32,
        children: &[ChildId],
    ) -> Result<GenerationId, PagerError> {
        let Some(Of::Generation(above)) = self.children.get(&parent).map(|child| child.of) else {
            return Err(PagerError::Phase { is: "not serving it", to: "fork it" });
        };
        let snapshot = Snapshot::open(memfd, count, self.pages, above)?;
        self.last += 1;
        self.snapshots.insert(self.last, snapshot);
        self.begin(Point { owner: Some(parent), above: Some(above) }, children);
        Ok(self.last)
    }

    /// Those of these who wait for this begin at the last fork point.
    fn begin(&mut self, point: Point, children: &[ChildId]) {
        self.points.insert(self.last, point);
        for id in children {
            let child = self.children.get_mut(id);
            let Some(child) = child.filter(|child| child.of == Of::Waiting && child.parent == point.owner) else {
                continue;
            };
            (child.of, child.point) = (Of::Generation(self.last), Some(self.last));
            self.warming.extend(self.habits.given.iter().map(|&(first, len)| (*id, first, len)));
        }
        self.drop_unused();
    }

    /// A child has other memory now; its disks are still those of its fork point.
    pub fn set_independent(&mut self, id: ChildId) {
        let Some(child) = self.children.get_mut(&id).filter(|child| child.of != Of::Waiting) else { return };
        let before = std::mem::replace(&mut child.of, Of::Independent);
        // One that ends in order comes by here.
        if matches!(before, Of::Generation(_)) {
            let given = std::mem::replace(&mut child.given, Pages::new(0));
            self.habits.add_given(given, self.pages, NEIGHBOURS);
        }
        self.warming.retain(|(child, ..)| *child != id);
        self.drop_unused();
    }

    /// A child is gone, or is not wanted any more.
    pub fn forget(&mut self, id: ChildId) {
        let Some(child) = self.children.remove(&id) else { return };
        if matches!(child.of, Of::Generation(_)) {
            self.habits.add_given(child.given, self.pages, NEIGHBOURS);
        }
        self.warming.retain(|(child, ..)| *child != id);
        self.drop_unused();
    }

    /// The source's process is gone or being reset: nothing of it is watched any more. Its children keep the memory as it is.
    pub fn leave_source(&mut self) {
        if self.source.take().is_some() {
            self.phase = Phase::Armed;
            self.notices.push_back((None, Notice::SourceGone));
        }
    }

    /// Answers what the source waits for, then does a little of what is left to do.
    pub fn step(&mut self) -> Result<(), PagerError> {
        self.serve_source()?;
        match self.phase {
            Phase::Arming { next, rounds } => self.arm_on(next, rounds)?,
            // What the store gives back is given back before all is over.
            Phase::Disarming { next } if !self.has_spare() => self.disarm_on(next)?,
            _ => {
                if self.wants_slots() {
                    self.starved = !self.store.prepare();
                } else if let Some((id, first, len)) = self.warming.pop_front() {
                    self.warm(id, first, len);
                } else {
                    self.store.trim(!self.generations.is_empty());
                }
            }
        }
        Ok(())
    }

    fn arm_on(&mut self, next: u64, rounds: u32) -> Result<(), PagerError> {
        let Some(source) = &self.source else { return Ok(()) };
        if next < source.mappings.bytes() {
            let done = source.uffd.protect(&source.mappings, next, CHUNK);
            self.phase = Phase::Arming { next: next + CHUNK, rounds };
            return self.of_source(done);
        }
        let open = self.open.count() as usize;
        if open <= FEW || rounds == ROUNDS {
            self.phase = Phase::Ready(Armed { rounds, left: open });
            return Ok(());
        }
        self.phase = Phase::Arming { next, rounds: rounds + 1 };
        self.protect_open()
    }

    fn disarm_on(&mut self, next: u64) -> Result<(), PagerError> {
        let Some(source) = self.source.as_ref().filter(|source| next < source.mappings.bytes()) else {
            self.phase = Phase::Idle;
            self.open.clear();
            self.tell_idle();
            return Ok(());
        };
        let done = source.uffd.unregister_part(&source.mappings, next, CHUNK);
        self.phase = Phase::Disarming { next: next + CHUNK };
        self.of_source(done)
    }

    fn tell_idle(&mut self) {
        self.notices.push_back((None, Notice::Idle { habits: self.habits.clone() }));
    }

    /// Protects what is open. Writes that come meanwhile open it again.
    fn protect_open(&mut self) -> Result<(), PagerError> {
        let Some(source) = &self.source else { return Ok(()) };
        let mut done = Ok(());
        for (first, len) in self.open.spans(GAP) {
            let len = u64::from(len) * PAGE as u64;
            done = done.and_then(|()| source.uffd.protect(&source.mappings, offset_of(first), len));
        }
        self.open.clear();
        self.of_source(done)
    }

    /// Answers everything that the source waits for now.
    pub fn serve_source(&mut self) -> Result<(), PagerError> {
        loop {
            let Some(source) = &self.source else { return Ok(()) };
            let faults = match source.uffd.faults(&source.mappings, &mut self.events) {
                Ok(faults) => faults,
                Err(e) => return self.of_source(Err(e)),
            };
            if faults.is_empty() {
                return Ok(());
            }
            let read = Instant::now();
            for Fault { offset, kind } in faults {
                let page = (offset / PAGE as u64) as u32;
                match kind {
                    FaultKind::WriteProtected => self.source_writes(page)?,
                    FaultKind::Missing | FaultKind::Minor => self.source_lacks(page)?,
                }
                self.stalls.add(read.elapsed());
            }
        }
    }

    fn source_writes(&mut self, page: u32) -> Result<(), PagerError> {
        self.counters.write_faults += 1;
        let kept = self.keep(page)?;
        if self.shared.take(page) {
            let slot = match kept {
                Some(slot) => slot,
                // Whoever has it mapped is lost, but may not have ended yet.
                None => self.store.pass(&self.ram, offset_of(page))?,
            };
            self.open.add(page);
            return self.exchange(page, slot);
        }
        // One that goes from page to page is let through to where it will be next.
        let mut end = page + 1;
        let ahead = self.streams.written(page).min(self.pages as u32 - page);
        while end < page + ahead && !self.shared.has(end) && !self.open.has(end) {
            self.keep(end)?;
            end += 1;
        }
        self.streams.let_through(end);
        self.counters.ahead += u64::from(end - page - 1);
        let Some(source) = &self.source else { return Ok(()) };
        let done = source.uffd.unprotect(&source.mappings, offset_of(page), u64::from(end - page) * PAGE as u64);
        (page..end).for_each(|page| self.open.add(page));
        self.of_source(done)
    }

    fn source_lacks(&mut self, page: u32) -> Result<(), PagerError> {
        let Some(source) = &self.source else { return Ok(()) };
        self.counters.holes += 1;
        for generation in self.generations.values_mut().rev() {
            if !generation.is_live(page) {
                break;
            }
            generation.keep_zero(page);
        }
        let done = source.uffd.zero(&source.mappings, offset_of(page));
        self.open.add(page);
        self.of_source(done)
    }

    /// Keeps a page for the generations that lack it; none if none does.
    fn keep(&mut self, page: u32) -> Result<Option<Slot>, PagerError> {
        loop {
            let users = self.generations.values().rev().take_while(|generation| generation.is_live(page)).count();
            if users == 0 {
                return Ok(None);
            }
            let slot = match self.store.reserve() {
                Ok(slot) => slot,
                Err(e) => {
                    self.sacrifice_oldest(&e);
                    continue;
                }
            };
            self.store.fill(slot, &self.ram, offset_of(page), users as u32)?;
            for generation in self.generations.values_mut().rev().take(users) {
                generation.keep(page, slot);
            }
            self.counters.kept += 1;
            return Ok(Some(slot));
        }
    }

    /// Takes the page away from every child that shares it, and gives the source another with the same content.
    fn exchange(&mut self, page: u32, slot: Slot) -> Result<(), PagerError> {
        let Some(source) = &self.source else { return Ok(()) };
        self.counters.punched += 1;
        let offset = offset_of(page);
        self.journal.begin(InFlight { page, slot });
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let punched = fallocate(&self.ram, mode, offset as i64, PAGE as i64);
        // Even if it is still there: the source's next touch would ask for it.
        let back = source.uffd.copy(&source.mappings, offset, self.store.page(slot));
        match (punched, back) {
            (Ok(()), Ok(0)) => {
                self.journal.end();
                Ok(())
            }
            // Linux says that it has punched what it has only zeroed: a part of a huge page that it could not split just then
            // (truncate_inode_partial_folio). Guest memory is in small pages for that reason; nothing is safe where it is not.
            (Ok(()), Ok(_)) => {
                let put = self.ram.write_all_at(self.store.page(slot), offset);
                self.journal.end();
                let why = || io::Error::other("a page stayed that was taken out: is it part of a huge page?");
                Err(PagerError::Exchange { offset, source: put.err().unwrap_or_else(why) })
            }
            (Err(e), _) => Err(PagerError::Exchange { offset, source: e.into() }),
            (_, back) => {
                // A source that is gone needs it no more.
                let done = self.of_source(back.map(drop));
                if done.is_ok() {
                    self.journal.end();
                }
                done
            }
        }
    }

    /// Gives up the oldest generation, for the store's sake.
    fn sacrifice_oldest(&mut self, why: &StoreError) {
        let Some((&oldest, _)) = self.generations.first_key_value() else { return };
        let lost = match why {
            StoreError::NoMemory(e) => Lost::NoMemory { why: e.to_string() },
            _ => Lost::StoreFull { limit: self.store.limit() },
        };
        self.lose_point(oldest, &lost, |of| of != Of::Independent);
    }

    /// The disks of this fork point are lost: whoever began there, or at one of those who did, must end. `owner` is whose it is.
    pub fn lose_disks(&mut self, owner: Option<ChildId>, point: GenerationId, why: &str) {
        if self.points.get(&point).is_some_and(|point| point.owner == owner) {
            self.lose_point(point, &Lost::Elsewhere { why: why.into() }, |_| true);
        }
    }

    fn lose_point(&mut self, point: GenerationId, why: &Lost, whom: impl Fn(Of) -> bool) {
        let began = |at: Option<GenerationId>| self.above(at).any(|id| id == point);
        let lost = self.children.iter().filter(|(_, child)| began(child.point) && whom(child.of));
        let lost: Vec<_> = lost.map(|(id, _)| *id).collect();
        for id in lost {
            if let Some(child) = self.children.get_mut(&id).filter(|child| child.of != Of::Lost) {
                child.of = Of::Lost;
                self.notices.push_back((child.parent, Notice::Lost(id, why.clone())));
            }
        }
        self.warming.retain(|(id, ..)| self.children.get(id).is_some_and(|child| child.of != Of::Lost));
        self.drop_unused();
    }

    /// A fork point, and those above it.
    fn above(&self, mut point: Option<GenerationId>) -> impl Iterator<Item = GenerationId> {
        std::iter::from_fn(move || {
            let id = point?;
            point = self.points.get(&id)?.above;
            Some(id)
        })
    }

    /// Drops the generations that no child needs.
    fn drop_unused(&mut self) {
        let points = self.children.values().filter(|child| matches!(child.of, Of::Generation(_)));
        let needed: BTreeSet<_> = points.flat_map(|child| self.above(child.point)).collect();
        let unused: Vec<_> = self.generations.keys().copied().filter(|id| !needed.contains(id)).collect();
        self.snapshots.retain(|id, _| needed.contains(id));
        for id in unused {
            self.drop_generation(id);
        }
        let began: BTreeSet<_> = self.children.values().flat_map(|child| self.above(child.point)).collect();
        let notices = &mut self.notices;
        self.points.retain(|id, point| {
            let stays = began.contains(id);
            if !stays {
                notices.push_back((point.owner, Notice::Released(*id)));
            }
            stays
        });
        self.let_go_if_unused();
    }

    fn drop_generation(&mut self, id: GenerationId) {
        let Some(generation) = self.generations.remove(&id) else { return };
        for slot in generation.into_slots() {
            self.store.release(slot);
        }
        self.starved = false;
    }

    /// Once nobody has anything of the source's, nor waits for it, it is not watched any more, unless the next fork is being made.
    fn let_go_if_unused(&mut self) {
        let shares = |child: &Child| matches!(child.of, Of::Generation(_) | Of::Lost);
        if !self.generations.is_empty() || self.children.values().any(shares) {
            return;
        }
        if std::mem::take(&mut self.sharing) {
            self.shared.clear();
            self.notices.push_back((None, Notice::Unshared));
        }
        if self.wanted || self.is_waited_for() {
            return;
        }
        match self.phase {
            Phase::Arming { .. } | Phase::Ready(_) | Phase::Armed => self.phase = Phase::Disarming { next: 0 },
            Phase::Disarming { .. } => (),
            // Adopted and gone before anything was armed for it.
            Phase::Idle => self.tell_idle(),
        }
    }

    /// Answers some of what a child waits for. True if there may be more.
    pub fn serve_child(&mut self, id: ChildId) -> Result<bool, PagerError> {
        let Some(child) = self.children.get(&id) else { return Ok(false) };
        let faults = match child.uffd.faults(&child.mappings, &mut self.events) {
            Ok(faults) => faults,
            Err(e) => {
                self.of_child(id, Err(e));
                return Ok(false);
            }
        };
        let more = faults.len() == EVENTS;
        let read = Instant::now();
        for Fault { offset, kind } in faults {
            let page = (offset / PAGE as u64) as u32;
            self.counters.child_faults += 1;
            let done = self.child_touches(id, page, kind);
            if !self.of_child(id, done) {
                return Ok(false);
            }
            if let Some(child) = self.children.get_mut(&id) {
                child.service.add(read.elapsed());
            }
            self.serve_source()?;
        }
        Ok(more)
    }

    fn child_touches(&mut self, id: ChildId, page: u32, kind: FaultKind) -> Result<(), UffdError> {
        let Some(child) = self.children.get_mut(&id) else { return Ok(()) };
        let point = match child.of {
            Of::Waiting => return Err(UffdError::Unexpected { event: "a touch of memory before the fork".into() }),
            Of::Lost | Of::Independent => return Ok(()),
            Of::Generation(point) => point,
        };
        let Some(view) = View::of(&self.snapshots, &self.generations, &self.store, point) else { return Ok(()) };
        child.given.add(page);
        let content = view.page(page);
        if let Some(copied) = child.copy(page, &content) {
            self.counters.copied += 1;
            return copied;
        }
        match content {
            Content::Live if kind != FaultKind::Missing => {
                let (mut first, mut end) = (page, page + 1);
                let low = page - page % NEIGHBOURS;
                let high = (low + NEIGHBOURS).min(self.pages as u32);
                let wanted = |page: u32| view.is_live(page) && !child.given.has(page);
                while first > low && wanted(first - 1) {
                    first -= 1;
                }
                while end < high && wanted(end) {
                    end += 1;
                }
                for page in first..end {
                    self.shared.add(page);
                    child.given.add(page);
                }
                // Its own page first: it waits.
                self.counters.mapped += child.uffd.map_cached(&child.mappings, offset_of(page), PAGE as u64)?;
                for (from, to) in [(page + 1, end), (first, page)] {
                    let len = u64::from(to - from) * PAGE as u64;
                    self.counters.mapped += child.uffd.map_cached(&child.mappings, offset_of(from), len)?;
                }
                Ok(())
            }
            _ => {
                self.counters.zeroed += 1;
                child.uffd.zero(&child.mappings, offset_of(page))
            }
        }
    }

    /// Gives a child pages that the last one needed, and that have something in them.
    fn warm(&mut self, id: ChildId, first: u32, len: u32) {
        let Some(child) = self.children.get_mut(&id) else { return };
        let Of::Generation(point) = child.of else { return };
        let Some(view) = View::of(&self.snapshots, &self.generations, &self.store, point) else { return };
        let mut done = Ok(());
        let (mut page, end) = (first, first + len);
        while page < end && done.is_ok() {
            let wanted = |page: u32, child: &Child| page < end && view.is_live(page) && !child.given.has(page);
            let run = page;
            while wanted(page, child) {
                self.shared.add(page);
                child.given.add(page);
                page += 1;
            }
            let (at, bytes) = (offset_of(run), u64::from(page - run) * PAGE as u64);
            if page > run {
                done = child.uffd.map_cached(&child.mappings, at, bytes).map(|n| self.counters.mapped += n);
                continue;
            }
            if !child.given.has(page)
                && let Some(copied) = child.copy(page, &view.page(page))
            {
                child.given.add(page);
                self.counters.copied += 1;
                done = copied;
            }
            page += 1;
        }
        self.of_child(id, done);
    }

    /// Takes note of how a call about a child went. False if the child is no more.
    fn of_child(&mut self, id: ChildId, done: Result<(), UffdError>) -> bool {
        let Err(e) = done else { return true };
        if e.is_gone() {
            self.notices.push_back((self.parent(id), Notice::Gone(id)));
            self.forget(id);
        } else if e.is_unwatched() {
            // It is about to end and has unmapped its memory, which has woken who waited there.
            return true;
        } else {
            let chain = std::iter::successors(Some(&e as &dyn std::error::Error), |e| e.source());
            let why = chain.map(|e| e.to_string()).collect::<Vec<_>>().join(": ");
            self.lose(id, Lost::Unserved { why });
        }
        false
    }

    /// Gives up a child, which must end.
    pub fn lose(&mut self, id: ChildId, lost: Lost) {
        let Some(child) = self.children.get_mut(&id).filter(|child| child.of != Of::Lost) else { return };
        child.of = Of::Lost;
        self.notices.push_back((child.parent, Notice::Lost(id, lost)));
        self.drop_unused();
    }

    /// Takes note of how a call about the source went: one that is gone needs no more.
    fn of_source(&mut self, done: Result<(), UffdError>) -> Result<(), PagerError> {
        match done {
            Err(e) if e.is_gone() => {
                self.leave_source();
                Ok(())
            }
            // Whoever waited was let go with the memory around, but its fault was still there to be read.
            Err(e) if e.is_unwatched() && matches!(self.phase, Phase::Disarming { .. } | Phase::Idle) => Ok(()),
            done => done.map_err(PagerError::Source),
        }
    }
}

/// Has `uffd` watch a child's memory, which is mapped privately and nobody has touched; it is then to be given to the page server, and
/// kept open: the memory is watched as long as somebody has it, and a child whose page server is gone must wait, not go on.
///
/// # Errors
/// When the kernel cannot.
pub fn watch_child(uffd: &Userfault, mappings: &Mappings) -> Result<(), UffdError> {
    let needs = IoctlFlags::COPY | IoctlFlags::ZEROPAGE | IoctlFlags::WAKE | CONTINUE;
    uffd.register(mappings, RegisterMode::MISSING | RegisterMode::MINOR | RegisterMode::WRITE_PROTECT, needs)
}

/// Opens a child's userfaultfd. On a host before Linux 6.7 one by which the child can live, but not be forked itself.
///
/// # Errors
/// When the kernel cannot, or not for us.
pub fn open_child() -> Result<Userfault, UffdError> {
    match Userfault::open(CHILD_FEATURES) {
        Err(UffdError::Lacks { .. }) => Userfault::open(FEATURES),
        opened => opened,
    }
}

fn offset_of(page: u32) -> u64 {
    u64::from(page) * PAGE as u64
}
