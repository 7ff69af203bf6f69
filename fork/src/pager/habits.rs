//! What earlier children of a source did with its memory: what the next ones are given before they ask for it.
//!
//! Two things are known: which pages a child was given until it ended, and which it had written when its first program began to run. The
//! former are mapped for the next child beforehand; that costs no memory. The latter are for a child that will run programs too: it copies
//! them before its guest does so page by page, one fault each. A page counts only if the last two children that told have written it, since a
//! guest that is at work takes other pages every time.

use serde::{Deserialize, Serialize};

use super::generation::Pages;

/// Pages that are remembered as given at most. A stock kernel that has had devices plugged in and started a program has touched 5,300, of which
/// it waited for 480 where this was 4,096 (`cargo xtask bench inject`).
pub const WARM: u32 = 8192;
/// Pages that are remembered as written at most: what a child has copied beforehand, and may then not need. A stock kernel writes 1,300 until a
/// program has been started and has ended.
pub const WRITTEN: u32 = 2048;

/// Runs of pages: the first, and how many.
pub type Runs = Vec<(u32, u32)>;

/// What is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Habits {
    /// What the last child was given.
    pub given: Runs,
    /// What the last two had written that told of it, the later one first.
    pub written: [Runs; 2],
}

impl Habits {
    /// Without what is not in a memory of so many pages.
    pub fn within(mut self, pages: u32) -> Self {
        for runs in [&mut self.given].into_iter().chain(&mut self.written) {
            runs.retain(|(first, len)| first.checked_add(*len).is_some_and(|end| end <= pages));
        }
        self
    }

    /// A child of a memory of so many pages has ended that was given these pages, in runs of at most `longest`. First come those that it was
    /// not given beforehand: it has waited for them. Whether it touched the others is not known.
    pub fn add_given(&mut self, given: Pages, pages: usize, longest: u32) {
        let mut waited = given;
        let beforehand: Vec<_> = each(&self.given).filter(|page| waited.take(*page)).collect();
        let mut kept = Pages::new(pages);
        waited.iter().chain(beforehand).take(WARM as usize).for_each(|page| kept.add(page));
        self.given = kept.runs(longest);
    }

    /// A child, which may lie, says that it has written these: the first [`WRITTEN`] of them count that are in a memory of so many pages.
    pub fn add_written(&mut self, runs: &[(u32, u32)], pages: usize) {
        let mut written = Pages::new(pages);
        let there = |page: &u32| (*page as usize) < pages;
        let saturating = runs.iter().flat_map(|&(first, len)| first..first.saturating_add(len.min(WRITTEN)));
        saturating.take(WRITTEN as usize).filter(there).for_each(|page| written.add(page));
        self.written.swap(0, 1);
        self.written[0] = written.runs(u32::MAX);
    }

    /// What a child that will run programs is going to write, as far as is known, in a memory of so many pages.
    pub fn to_write(&self, pages: usize) -> Runs {
        let [last, before] = &self.written;
        let mut known = Pages::new(pages);
        each(before).for_each(|page| known.add(page));
        let mut both = Pages::new(pages);
        each(last).filter(|page| known.has(*page)).for_each(|page| both.add(page));
        both.runs(u32::MAX)
    }
}

fn each(runs: &[(u32, u32)]) -> impl Iterator<Item = u32> {
    runs.iter().flat_map(|&(first, len)| first..first + len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mappings::{Hva, Mapping, Mappings};
    use crate::pager::protocol::Request;
    use crate::ram::PAGE;

    const PAGES: usize = 3 * WARM as usize;

    fn given(habits: &mut Habits, pages: impl Iterator<Item = u32>) -> Vec<u32> {
        let mut given = Pages::new(PAGES);
        pages.for_each(|page| given.add(page));
        habits.add_given(given, PAGES, 16);
        assert!(habits.given.iter().all(|(_, len)| *len <= 16));
        each(&habits.given).collect()
    }

    #[test]
    fn what_was_waited_for_is_remembered_before_what_was_not() {
        let mut habits = Habits::default();
        // As if children had been given these: all that may be kept, some of it again with something else, and nothing new.
        assert!(given(&mut habits, 0..PAGES as u32).into_iter().eq(0..WARM));
        let more = 2 * WARM..2 * WARM + 100;
        assert!(given(&mut habits, (0..WARM).chain(more.clone())).into_iter().eq((0..WARM - 100).chain(more)));
        assert!(given(&mut habits, 50..WARM).into_iter().eq(50..WARM));
    }

    #[test]
    fn only_what_two_have_written_is_expected_of_a_third() {
        let mut habits = Habits::default();
        assert_eq!(habits.to_write(PAGES), []);
        habits.add_written(&[(3, 4), (100, 1)], PAGES);
        assert_eq!(habits.to_write(PAGES), []);
        habits.add_written(&[(5, 4), (100, 1)], PAGES);
        assert_eq!(habits.to_write(PAGES), [(5, 2), (100, 1)]);
        habits.add_written(&[(8, 1)], PAGES);
        assert_eq!(habits.to_write(PAGES), [(8, 1)]);
    }

    #[test]
    fn lies_are_bounded() {
        let mut habits = Habits::default();
        let lies: Runs = vec![(u32::MAX, u32::MAX), (PAGES as u32 - 1, 7), (0, u32::MAX), (0, u32::MAX)];
        (0..2).for_each(|_| habits.add_written(&lies, PAGES));
        assert!(each(&habits.to_write(PAGES)).count() <= WRITTEN as usize);
        let within = Habits { given: lies.clone(), written: [lies, vec![(1, 1)]] }.within(PAGES as u32);
        assert_eq!(within, Habits { given: vec![], written: [vec![], vec![(1, 1)]] });
    }

    /// Whatever children did, the next page server can be told of it.
    #[test]
    fn the_most_that_can_be_known_fits_into_a_message() {
        let far = (64_u64 << 30) / PAGE as u64;
        let alone = |count: u32| (0..count).map(|n| (far as u32 - 2 * n - 1, 1)).collect::<Runs>();
        let habits = Habits { given: alone(WARM), written: [alone(WRITTEN), alone(WRITTEN)] };
        let piece = |offset| Mapping { start: Hva(1 << 46), len: 32 << 30, offset };
        let mappings = Mappings::new(vec![piece(0), piece(32 << 30)]).unwrap();
        let (here, there) = crate::wire::Wire::pair().unwrap();
        here.send(&Request::Begin { mappings, limit: u32::MAX, habits: habits.clone() }, &[]).unwrap();
        let (heard, _) = there.receive::<Request>(std::time::Duration::from_secs(10)).unwrap();
        assert!(matches!(heard, Request::Begin { habits: h, .. } if h == habits));
    }
}
