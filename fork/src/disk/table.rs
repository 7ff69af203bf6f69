//! A generation's table: for each cluster of the disk, where its content at the fork point is. Shared with the children.
//!
//! ```text
//! word 0           0 while the generation lives, else why it was lost (Lost)
//! word 1024 + n    cluster n: 0 in the disk itself, u32::MAX zeroes, else 1 + its place in the store, in clusters
//! ```

use std::io;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::sync::atomic::{Ordering, fence};

use super::CLUSTER;
use super::words::{Words, WordsView};

/// Words before the first cluster's: a page, so that the first is not shared with it.
const HEAD: usize = 1024;
const ZEROES: u32 = u32::MAX;

/// Why a generation's disk cannot be read any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// The store was as large as it may be.
    #[error("the frozen disk was given up: the store of what its source overwrites reached its limit")]
    Limit,
    /// The store's file system is full.
    #[error("the frozen disk was given up: no space is left for what its source overwrites")]
    NoSpace,
    /// The store could not be written for another reason.
    #[error("the frozen disk was given up: the store of what its source overwrites failed")]
    Store,
    /// What the source was about to overwrite could not be read.
    #[error("the frozen disk was given up: what its source overwrites could not be read before")]
    Unreadable,
    /// The source gave the generation back, or says what this does not know.
    #[error("the frozen disk was given back by its source")]
    Ended,
}

impl Lost {
    fn word(self) -> u32 {
        match self {
            Self::Limit => 1,
            Self::NoSpace => 2,
            Self::Store => 3,
            Self::Unreadable => 4,
            Self::Ended => 5,
        }
    }

    fn from_word(word: u32) -> Option<Self> {
        match word {
            0 => None,
            1 => Some(Self::Limit),
            2 => Some(Self::NoSpace),
            3 => Some(Self::Store),
            4 => Some(Self::Unreadable),
            _ => Some(Self::Ended),
        }
    }
}

/// A cluster's place in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(NonZeroU32);

impl Slot {
    /// The most slots that a table can name.
    pub const MOST: u32 = ZEROES - 1;

    /// By its place, counted from 0.
    pub fn at(place: u32) -> Option<Self> {
        let word = place.checked_add(1).filter(|word| *word != ZEROES)?;
        NonZeroU32::new(word).map(Self)
    }

    /// Its place, counted from 0.
    pub fn place(self) -> u32 {
        self.0.get() - 1
    }

    /// Where it begins in the store, in bytes.
    pub fn offset(self) -> u64 {
        u64::from(self.place()) * CLUSTER
    }
}

/// Where a cluster's content at the fork point is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Nowhere: it was all zeroes.
    Zeroes,
    /// In the store.
    Stored(Slot),
}

impl Kept {
    fn word(self) -> u32 {
        match self {
            Self::Zeroes => ZEROES,
            Self::Stored(slot) => slot.0.get(),
        }
    }

    fn from_word(word: u32) -> Option<Self> {
        match word {
            ZEROES => Some(Self::Zeroes),
            word => NonZeroU32::new(word).map(|word| Self::Stored(Slot(word))),
        }
    }
}

/// Clusters that `bytes` take.
pub fn clusters(bytes: u64) -> u64 {
    bytes.div_ceil(CLUSTER)
}

fn words(bytes: u64) -> io::Result<usize> {
    let words = usize::try_from(clusters(bytes)).ok().and_then(|clusters| clusters.checked_add(HEAD));
    words.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn index(cluster: u64) -> usize {
    usize::try_from(cluster).map_or(usize::MAX, |cluster| cluster.saturating_add(HEAD))
}

/// The source's side. What it reads here is its own: nobody else can write it.
#[derive(Debug)]
pub struct Table {
    words: Words,
    clusters: u64,
}

impl Table {
    /// For a disk of so many bytes.
    pub fn new(bytes: u64) -> io::Result<Self> {
        Ok(Self { words: Words::new(c"civic-disk-table", words(bytes)?)?, clusters: clusters(bytes) })
    }

    /// How many clusters it is about.
    pub fn clusters(&self) -> u64 {
        self.clusters
    }

    /// Whether the disk itself is still the only one to have this cluster as it was.
    pub fn lacks(&self, cluster: u64) -> bool {
        cluster < self.clusters && self.words.get(index(cluster)) == Some(0)
    }

    /// Says where the cluster is. What is stored must be so by now, and what is in the disk not yet overwritten.
    pub fn set(&self, cluster: u64, kept: Kept) {
        if cluster < self.clusters {
            self.words.set(index(cluster), kept.word());
        }
    }

    /// Tells readers to trust nothing any more, of what they read from now on or just did.
    pub fn give_up(&self, why: Lost) {
        self.words.set(0, why.word());
        // Before whatever is overwritten next: see `TableView::lost`.
        fence(Ordering::SeqCst);
    }

    /// Whether it was given up.
    pub fn lost(&self) -> Option<Lost> {
        Lost::from_word(self.words.get(0)?)
    }

    /// A descriptor for children.
    pub fn share(&self) -> io::Result<OwnedFd> {
        self.words.share()
    }
}

/// A child's side.
#[derive(Debug)]
pub struct TableView(WordsView);

impl TableView {
    /// Opens the table of a disk of so many bytes.
    pub fn open(fd: OwnedFd, bytes: u64) -> io::Result<Self> {
        WordsView::open(fd, words(bytes)?).map(Self)
    }

    /// Where the cluster is, if not in the disk itself.
    pub fn kept(&self, cluster: u64) -> Option<Kept> {
        Kept::from_word(self.0.get(index(cluster))?)
    }

    /// As [`TableView::kept`], for one who has just read the disk: if that had been overwritten, this says so.
    ///
    /// The fence keeps the loads of the reading, also those that the kernel did for this thread, before the table's.
    pub fn kept_meanwhile(&self, cluster: u64) -> Option<Kept> {
        fence(Ordering::Acquire);
        self.kept(cluster)
    }

    /// Whether what was read until now may be wrong.
    pub fn lost(&self) -> Option<Lost> {
        fence(Ordering::Acquire);
        Lost::from_word(self.0.get(0).unwrap_or(Lost::Ended.word()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_sees_what_is_set() {
        let bytes = 2 * CLUSTER + 1;
        let table = Table::new(bytes).unwrap();
        let view = TableView::open(table.share().unwrap(), bytes).unwrap();
        assert!(TableView::open(table.share().unwrap(), bytes + CLUSTER).is_err());
        assert_eq!((table.clusters(), view.kept(0), view.kept(u64::MAX)), (3, None, None));
        assert_eq!([0, 2, 3, u64::MAX].map(|n| table.lacks(n)), [true, true, false, false]);
        let slot = Slot::at(5).unwrap();
        table.set(2, Kept::Stored(slot));
        table.set(1, Kept::Zeroes);
        table.set(3, Kept::Zeroes);
        assert_eq!((view.kept(1), view.kept_meanwhile(2)), (Some(Kept::Zeroes), Some(Kept::Stored(slot))));
        assert_eq!(slot.offset(), 5 * CLUSTER);
        assert!(!table.lacks(1) && !table.lacks(2));
        assert_eq!((Slot::at(Slot::MOST), Slot::at(u32::MAX)), (None, None));
        assert!(Slot::at(Slot::MOST - 1).is_some());

        for why in [Lost::Limit, Lost::NoSpace, Lost::Store, Lost::Unreadable, Lost::Ended] {
            assert_eq!(Lost::from_word(why.word()), Some(why));
        }
        assert_eq!((table.lost(), view.lost(), Lost::from_word(77)), (None, None, Some(Lost::Ended)));
        table.give_up(Lost::Limit);
        assert_eq!((table.lost(), view.lost()), (Some(Lost::Limit), Some(Lost::Limit)));
        assert!(Table::new(u64::MAX).is_err());
    }
}
