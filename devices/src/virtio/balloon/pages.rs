//! Which pages the guest named: lists of page numbers or areas of memory, in any order, overlapping, inside RAM or not.

use std::ops::Range;

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::virtio::areas::Areas;

/// Bytes of a page, whatever the guest's own are (virtio 1.2 §5.5.6).
pub const PAGE: u64 = 4096;
/// Bytes of a page number.
pub const NUMBER: usize = 4;

/// Numbers read at once.
const CHUNK: usize = 256;

/// The pages that `list` numbers, at most `max` of them.
pub fn listed(mut list: Areas<'_>, max: usize) -> Vec<Range<u64>> {
    let mut pages = Vec::new();
    let mut numbers = list.take(max * NUMBER);
    while !numbers.is_empty() {
        let mut chunk = [0; CHUNK * NUMBER];
        let len = numbers.take(chunk.len()).copy_to(&mut chunk);
        let (numbers, _torn) = chunk[..len].as_chunks::<NUMBER>();
        for number in numbers {
            let start = u64::from(u32::from_le_bytes(*number)) * PAGE;
            pages.push(start..start + PAGE);
        }
    }
    pages
}

/// The whole pages in `ranges`, each once, as runs that do not touch each other, ascending.
pub fn runs(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut runs: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match runs.last_mut() {
            Some(run) if range.start <= run.end => run.end = run.end.max(range.end),
            _ => runs.push(range),
        }
    }
    // Not before: two areas may share a page without a gap between them.
    let whole = |run: Range<u64>| run.start.next_multiple_of(PAGE)..run.end / PAGE * PAGE;
    runs.into_iter().map(whole).filter(|run| run.start < run.end).collect()
}

/// The parts of `run` that lie in `ram`, none across the end of a region.
pub fn in_ram(ram: &GuestMemoryMmap, run: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let part = |region: &<GuestMemoryMmap as GuestMemoryBackend>::R| {
        let start = region.start_addr().0;
        run.start.max(start)..run.end.min(start + region.len())
    };
    ram.iter().map(part).filter(|part| part.start < part.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use vm_memory::{Bytes, GuestAddress};

    fn ram() -> GuestMemoryMmap {
        let regions = [(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x2000), (GuestAddress(0x8000), 0x1000)];
        GuestMemoryMmap::from_ranges(&regions).unwrap()
    }

    #[test]
    fn numbers_are_read_across_areas_and_up_to_a_bound() {
        let ram = ram();
        let numbers: Vec<u8> = (0..600_u32).flat_map(|n| (n * 3 + 1).to_le_bytes()).collect();
        ram.write_slice(&numbers, GuestAddress(0x10)).unwrap();
        let list = |torn: usize| {
            let mut areas = Areas::default();
            for (at, len) in [(0, 6), (6, 2000), (2006, 394 - torn)] {
                areas.push(ram.get_slice(GuestAddress(0x10 + at), len).unwrap());
            }
            areas
        };
        let page = |n: u64| (n * 3 + 1) * PAGE..(n * 3 + 2) * PAGE;
        assert_eq!(listed(list(0), 1000), (0..600).map(page).collect::<Vec<_>>());
        assert_eq!(listed(list(0), 300), (0..300).map(page).collect::<Vec<_>>());
        assert_eq!(listed(list(3), 1000).len(), 599, "a torn number is none");
        ram.write_slice(&[0xff; 4], GuestAddress(0x10)).unwrap();
        assert_eq!(listed(list(0), 1).first(), Some(&(0xffff_ffff * PAGE..0x1_0000_0000 * PAGE)));
    }

    #[test]
    fn neighbours_become_runs_and_pieces_of_pages_none() {
        let check = |named: Vec<Range<u64>>, expected: &[(u64, u64)]| {
            let found: Vec<_> = runs(named).iter().map(|run| (run.start, run.end)).collect();
            assert_eq!(found, expected);
        };
        let pages = |list: &[u64]| list.iter().map(|n| n * PAGE..(n + 1) * PAGE).collect::<Vec<_>>();
        check(pages(&[7, 3, 5, 4, 3, 6]), &[(3 * PAGE, 8 * PAGE)]);
        check(pages(&[1, 3]), &[(PAGE, 2 * PAGE), (3 * PAGE, 4 * PAGE)]);
        check(vec![1..PAGE, PAGE + 1..2 * PAGE], &[]);
        check(vec![PAGE + 100..2 * PAGE, 1..PAGE + 100], &[(PAGE, 2 * PAGE)]);
        check(vec![], &[]);
    }

    #[test]
    fn what_is_no_ram_is_left_out_and_regions_stay_apart() {
        let parts = |run: Range<u64>| in_ram(&ram(), &run).collect::<Vec<_>>();
        assert_eq!(parts(0..0x10000), [0..0x4000, 0x4000..0x6000, 0x8000..0x9000]);
        assert_eq!(parts(0x3000..0x5000), [0x3000..0x4000, 0x4000..0x5000]);
        assert_eq!(parts(0x6000..0x8000), []);
        assert_eq!(parts(0x9000..1 << 44), []);
    }

    proptest! {
        #[test]
        fn runs_hold_the_pages_that_were_named_whole_and_no_other(
            ranges in prop::collection::vec((0..0x8000_u64, 0..0x3000_u64), 0..12)
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(start, len)| start..start + len).collect();
            let bytes: BTreeSet<u64> = ranges.iter().cloned().flatten().collect();
            let whole = |page: &u64| (page * PAGE..(page + 1) * PAGE).all(|byte| bytes.contains(&byte));
            let expected: Vec<u64> = (0..12).filter(whole).collect();
            let runs = runs(ranges);
            let found: Vec<u64> = runs.iter().flat_map(|run| run.start / PAGE..run.end / PAGE).collect();
            prop_assert_eq!(found, expected);
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
