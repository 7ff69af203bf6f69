//! Where a VM's RAM is mapped in its process, by offset in the memfd: that is how a page is named everywhere.
//!
//! Addresses here may be those of another process: they are only handed to its userfaultfd, never followed.

use serde::{Deserialize, Serialize};

use crate::ram::PAGE;

/// An address in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Hva(pub u64);

/// A piece of the memfd, mapped in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// Where.
    pub start: Hva,
    /// Bytes.
    pub len: u64,
    /// In the memfd.
    pub offset: u64,
}

/// The mappings leave out or repeat what begins here, begin or end within a page, or wrap around.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the mappings do not cover guest memory page by page without gaps (at offset {offset:#x})")]
pub struct MappingsError {
    /// In the memfd.
    pub offset: u64,
}

/// All of a VM's RAM: pieces that cover the memfd from 0 on without gaps. Deserialized ones are checked by [`Mappings::new`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Mapping>", into = "Vec<Mapping>")]
pub struct Mappings(Vec<Mapping>);

impl TryFrom<Vec<Mapping>> for Mappings {
    type Error = MappingsError;

    fn try_from(pieces: Vec<Mapping>) -> Result<Self, MappingsError> {
        Self::new(pieces)
    }
}

impl From<Mappings> for Vec<Mapping> {
    fn from(mappings: Mappings) -> Self {
        mappings.0
    }
}

impl Mappings {
    /// Takes `pieces`, in any order, if they are all of a memfd.
    pub fn new(mut pieces: Vec<Mapping>) -> Result<Self, MappingsError> {
        pieces.sort_by_key(|piece| piece.offset);
        let mut end = 0u64;
        for &Mapping { start, len, offset } in &pieces {
            let wrong = Err(MappingsError { offset: end.min(offset) });
            if offset != end || len == 0 || [start.0, len].iter().any(|n| n % PAGE as u64 != 0) {
                return wrong;
            }
            match end.checked_add(len) {
                Some(next) if start.0.checked_add(len).is_some() => end = next,
                _ => return wrong,
            }
        }
        Ok(Self(pieces))
    }

    /// Size of the whole.
    pub fn bytes(&self) -> u64 {
        self.0.last().map_or(0, |last| last.offset + last.len)
    }

    /// By offset.
    pub fn iter(&self) -> impl Iterator<Item = &Mapping> {
        self.0.iter()
    }

    /// The offset in the memfd of what is mapped at `address`, if it is RAM.
    pub fn offset_of(&self, address: Hva) -> Option<u64> {
        let within = |piece: &Mapping| address.0.checked_sub(piece.start.0).filter(|distance| *distance < piece.len);
        self.0.iter().find_map(|piece| Some(piece.offset + within(piece)?))
    }

    /// Where `len` bytes from `offset` on are mapped: as many spans as there are pieces under them. What lies beyond the end of RAM
    /// is left out.
    pub fn spans(&self, offset: u64, len: u64) -> impl Iterator<Item = (Hva, u64)> {
        let end = offset.saturating_add(len);
        self.0.iter().filter_map(move |piece| {
            let from = offset.max(piece.offset);
            let to = end.min(piece.offset + piece.len);
            (from < to).then(|| (Hva(piece.start.0 + (from - piece.offset)), to - from))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: u64 = PAGE as u64;

    fn piece(start: u64, len: u64, offset: u64) -> Mapping {
        Mapping { start: Hva(start), len, offset }
    }

    #[test]
    fn offsets_and_addresses_belong_together() {
        let mappings = Mappings::new(vec![piece(0x9_0000, 2 * P, 3 * P), piece(0x5_0000, 3 * P, 0)]).unwrap();
        assert_eq!(mappings.bytes(), 5 * P);
        // A range over the seam of two pieces is two spans.
        let spans: Vec<_> = mappings.spans(2 * P, 2 * P).collect();
        assert_eq!(spans, [(Hva(0x5_0000 + 2 * P), P), (Hva(0x9_0000), P)]);
        assert_eq!(mappings.offset_of(Hva(0x9_0005)), Some(3 * P + 5));
        assert_eq!(mappings.spans(4 * P, u64::MAX).collect::<Vec<_>>(), [(Hva(0x9_0000 + P), P)]);
        assert_eq!(mappings.spans(5 * P, P).count(), 0);
        assert_eq!(mappings.offset_of(Hva(0)), None);
    }

    #[test]
    fn what_does_not_cover_a_memfd_is_refused() {
        for pieces in [
            vec![piece(P, P, P)],
            vec![piece(P, P, 0), piece(4 * P, P, 2 * P)],
            vec![piece(P, 2 * P, 0), piece(8 * P, P, P)],
            vec![piece(P + 1, P, 0)],
            vec![piece(P, P - 1, 0)],
            vec![piece(P, 0, 0)],
            vec![piece(u64::MAX - P + 1, P, 0)],
            vec![piece(P, u64::MAX - P + 1, 0), piece(P, P, u64::MAX - P + 1)],
        ] {
            assert!(Mappings::new(pieces.clone()).is_err(), "{pieces:x?}");
            let bytes = postcard::to_stdvec(&pieces).unwrap();
            assert!(postcard::from_bytes::<Mappings>(&bytes).is_err());
        }
    }
}
