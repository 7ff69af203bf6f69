//! What a guest says of its memory (virtio 1.2 §5.5.6.3 and §5.5.6.4; tags from 10 on are Linux'): entries of a 16-bit tag and
//! a 64-bit value, in any order and any selection.

use crate::virtio::areas::Areas;

/// By tag.
const NAMES: [&str; 16] = [
    "swapped_in_bytes",
    "swapped_out_bytes",
    "major_faults",
    "minor_faults",
    "free_bytes",
    "total_bytes",
    "available_bytes",
    "cache_bytes",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kills",
    "allocation_stalls",
    "async_scans",
    "direct_scans",
    "async_reclaims",
    "direct_reclaims",
];

const ENTRY: usize = 10;
/// A buffer's entries beyond this are not looked at.
const MAX_ENTRIES: usize = 64;

/// A guest's own view of its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics([Option<u64>; NAMES.len()]);

impl Statistics {
    /// Reads a driver's buffer; of entries with the same tag the last counts.
    pub(super) fn read(mut buffer: Areas<'_>) -> Self {
        let mut statistics = Self::default();
        let mut bytes = [0; ENTRY * MAX_ENTRIES];
        let len = buffer.take(bytes.len()).copy_to(&mut bytes);
        for entry in bytes[..len].as_chunks::<ENTRY>().0 {
            let &[tag_low, tag_high, ref value @ ..] = entry;
            let tag = u16::from_le_bytes([tag_low, tag_high]);
            if let Some(place) = statistics.0.get_mut(usize::from(tag)) {
                *place = Some(u64::from_le_bytes(*value));
            }
        }
        statistics
    }

    /// What the guest chose to tell, by name: lower-case with underscores and the unit, where it is bytes.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        NAMES.into_iter().zip(self.0).filter_map(|(name, value)| Some((name, value?)))
    }

    /// The one called `name`, if the guest told it.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.named().find(|(known, _)| *known == name).map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    fn read(bytes: &[u8]) -> Statistics {
        let ram: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        ram.write_slice(bytes, GuestAddress(0)).unwrap();
        let mut areas = Areas::default();
        areas.push(ram.get_slice(GuestAddress(0), bytes.len()).unwrap());
        Statistics::read(areas)
    }

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }

    #[test]
    fn entries_come_in_any_order_and_unknown_ones_are_passed_over() {
        let told = [entry(5, 1 << 40), entry(16, 1), entry(0xffff, 2), entry(0, 3), entry(4, 4), entry(0, 5)].concat();
        let statistics = read(&told);
        let named: Vec<_> = statistics.named().collect();
        assert_eq!(named, [("swapped_in_bytes", 5), ("free_bytes", 4), ("total_bytes", 1 << 40)]);
        assert_eq!((statistics.get("free_bytes"), statistics.get("oom_kills")), (Some(4), None));
        // Cut short in the last entry.
        assert_eq!(read(&told[..59]).get("swapped_in_bytes"), Some(3));
        assert_eq!(read(&told[..9]), Statistics::default());
    }

    #[test]
    fn more_entries_than_there_are_tags_are_not_read_for_ever() {
        let many = [entry(1, 7).repeat(MAX_ENTRIES), entry(1, 8)].concat();
        assert_eq!(read(&many).get("swapped_out_bytes"), Some(7));
    }
}
