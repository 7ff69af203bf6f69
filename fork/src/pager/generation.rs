//! A fork point: what guest memory held then, as far as it has changed since.

use super::store::Slot;

/// What a generation knows of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Nothing: it is still what it was.
    Live,
    /// It was a hole: zeros.
    Zero,
    /// It was copied before it changed.
    In(Slot),
}

const ZERO: u32 = 1;
const FIRST_SLOT: u32 = 2;

/// A fork point.
#[derive(Debug)]
pub struct Generation {
    /// By page: 0, [`ZERO`], or [`FIRST_SLOT`] + the slot. Comes from the kernel zeroed, so what is not touched takes no memory.
    kept: Vec<u32>,
    /// Pages that are kept in slots.
    slots: u32,
}

impl Generation {
    /// Of a memory of so many pages.
    pub fn new(pages: usize) -> Self {
        Self { kept: vec![0; pages], slots: 0 }
    }

    /// What is known of a page.
    pub fn get(&self, page: u32) -> Kept {
        match self.kept[page as usize] {
            0 => Kept::Live,
            ZERO => Kept::Zero,
            slot => Kept::In(Slot(slot - FIRST_SLOT)),
        }
    }

    /// Whether a page is still what it was.
    pub fn is_live(&self, page: u32) -> bool {
        self.kept[page as usize] == 0
    }

    /// Keeps a page that was a hole.
    pub fn keep_zero(&mut self, page: u32) {
        self.kept[page as usize] = ZERO;
    }

    /// Keeps a page that is in `slot` now.
    pub fn keep(&mut self, page: u32, slot: Slot) {
        self.kept[page as usize] = slot.0 + FIRST_SLOT;
        self.slots += 1;
    }

    /// Pages kept in slots.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// The slots it keeps, at its end.
    pub fn into_slots(self) -> impl Iterator<Item = Slot> {
        self.kept.into_iter().filter(|kept| *kept >= FIRST_SLOT).map(|kept| Slot(kept - FIRST_SLOT))
    }
}

/// A set of pages.
#[derive(Clone, Debug)]
pub struct Pages {
    words: Vec<u64>,
    count: u32,
}

impl Pages {
    /// Empty, of a memory of so many pages.
    pub fn new(pages: usize) -> Self {
        Self { words: vec![0; pages.div_ceil(64)], count: 0 }
    }

    /// Whether it has this one.
    pub fn has(&self, page: u32) -> bool {
        self.words[page as usize / 64] >> (page % 64) & 1 != 0
    }

    /// Adds one.
    pub fn add(&mut self, page: u32) {
        let word = &mut self.words[page as usize / 64];
        self.count += u32::from(*word >> (page % 64) & 1 == 0);
        *word |= 1 << (page % 64);
    }

    /// Takes one out; whether it was there.
    pub fn take(&mut self, page: u32) -> bool {
        let had = self.has(page);
        self.words[page as usize / 64] &= !(1 << (page % 64));
        self.count -= u32::from(had);
        had
    }

    /// How many.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        if self.count > 0 {
            self.words.fill(0);
            self.count = 0;
        }
    }

    /// Those in it, in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        let words = self.words.iter().enumerate().filter(|(_, word)| **word != 0);
        words
            .flat_map(|(at, word)| (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| at as u32 * 64 + bit))
    }

    /// Those in it, as runs, each of at most `longest` pages.
    pub fn runs(&self, longest: u32) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for page in self.iter() {
            match runs.last_mut() {
                Some((first, len)) if *first + *len == page && *len < longest => *len += 1,
                _ => runs.push((page, 1)),
            }
        }
        runs
    }

    /// Spans that have all of those in it, and others where fewer than `gap` lie between two.
    pub fn spans(&self, gap: u32) -> impl Iterator<Item = (u32, u32)> {
        let mut pages = self.iter().peekable();
        std::iter::from_fn(move || {
            let first = pages.next()?;
            let mut last = first;
            while let Some(page) = pages.next_if(|page| *page - last <= gap) {
                last = page;
            }
            Some((first, last - first + 1))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_live_zero_or_kept() {
        let mut generation = Generation::new(8);
        generation.keep_zero(1);
        generation.keep(2, Slot(0));
        generation.keep(7, Slot(5));
        let known: Vec<_> = (0..8).map(|page| generation.get(page)).collect();
        use Kept::{In, Live, Zero};
        assert_eq!(known, [Live, Zero, In(Slot(0)), Live, Live, Live, Live, In(Slot(5))]);
        assert_eq!(generation.slots(), 2);
        assert_eq!(generation.into_slots().collect::<Vec<_>>(), [Slot(0), Slot(5)]);
    }

    #[test]
    fn a_set_of_pages_has_runs() {
        let mut pages = Pages::new(200);
        for page in [0, 1, 2, 63, 64, 65, 199] {
            pages.add(page);
        }
        assert_eq!(pages.runs(100), [(0, 3), (63, 3), (199, 1)]);
        assert_eq!(pages.runs(2), [(0, 2), (2, 1), (63, 2), (65, 1), (199, 1)]);
        assert_eq!(pages.spans(1).collect::<Vec<_>>(), [(0, 3), (63, 3), (199, 1)]);
        assert_eq!(pages.spans(61).collect::<Vec<_>>(), [(0, 66), (199, 1)]);
        assert!(pages.take(64) && !pages.take(64) && !pages.has(64) && pages.has(65));
        pages.add(65);
        assert_eq!(pages.count(), 6);
        pages.clear();
        assert_eq!((pages.count(), pages.iter().next()), (0, None));
    }
}
