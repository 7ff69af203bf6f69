//! A function's first instructions: where compilers leave five bytes for tracers (`-mfentry`), which probes use too.
//!
//! ```text
//!  (endbr64, or what it was sealed with: 4 bytes)   nop, or call to ftrace: 5 bytes   function …
//! ```

use crate::memory::{Absent, Gva, PhysicalMemory};
use crate::paging::KernelImage;

/// Bytes of a slot.
pub const SLOT: usize = 5;
/// Bytes from a function's first on in which its slot is.
pub const ENTRY: usize = LANDING + SLOT;

/// Bytes of `endbr64`.
const LANDING: usize = 4;
/// `endbr64`, and what the kernel puts in its place where nobody may jump to (`gen_endbr_poison`): before 6.15, and since.
const LANDINGS: [[u8; LANDING]; 3] = [[0xf3, 0x0f, 0x1e, 0xfa], [0x66, 0x0f, 0x1f, 0x00], [0x0f, 0x1f, 0x40, 0xd6]];
/// The no-operations of five bytes; the second is of some processors before 5.13.
const NOPS: [[u8; SLOT]; 2] = [[0x0f, 0x1f, 0x44, 0x00, 0x00], [0x66, 0x66, 0x66, 0x66, 0x90]];
const CALL: u8 = 0xe8;

/// Why a function's first instructions cannot be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// They are not all in the image.
    #[error("{at} is not in the kernel's image")]
    Outside {
        /// The function.
        at: Gva,
    },
    /// They are not in RAM.
    #[error(transparent)]
    Absent(#[from] Absent),
}

/// Five bytes at a function's entry that do nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntrySlot {
    /// They are here, and unused.
    Free {
        /// Their first.
        at: Gva,
    },
    /// The kernel traces this function: they are a call.
    Traced {
        /// Their first.
        at: Gva,
    },
    /// The function has none.
    None,
}

impl EntrySlot {
    /// The slot of a function in a kernel's image, as it is now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn at(image: &KernelImage, memory: &dyn PhysicalMemory, function: Gva) -> Result<Self, SlotError> {
        Ok(Self::of(function, &code(image, memory, function)?))
    }

    /// The slot of the function at `at`, which begins with `code`.
    pub fn of(at: Gva, code: &[u8; ENTRY]) -> Self {
        let landing = LANDINGS.iter().any(|landing| code.starts_with(landing));
        let skip = if landing { LANDING } else { 0 };
        let (at, slot) = (at.plus(skip as u64), &code[skip..skip + SLOT]);
        match slot {
            _ if NOPS.iter().any(|nop| slot == nop) => Self::Free { at },
            [CALL, ..] => Self::Traced { at },
            _ => Self::None,
        }
    }
}

/// The first bytes of a function in a kernel's image, as they are now.
///
/// # Errors
/// When they cannot be read.
pub fn code<const N: usize>(
    image: &KernelImage,
    memory: &dyn PhysicalMemory,
    function: Gva,
) -> Result<[u8; N], SlotError> {
    let last = image.to_physical(function.plus(N as u64 - 1));
    let first = image.to_physical(function).filter(|_| last.is_some());
    let first = first.ok_or(SlotError::Outside { at: function })?;
    Ok(memory.bytes(first)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_told_by_their_bytes() {
        let at = Gva(0x1000);
        let slot = |code: &[u8]| {
            let mut entry = [0xcc; ENTRY];
            entry[..code.len()].copy_from_slice(code);
            EntrySlot::of(at, &entry)
        };
        for nop in NOPS {
            assert_eq!(slot(&nop), EntrySlot::Free { at });
            for landing in LANDINGS {
                assert_eq!(slot(&[&landing[..], &nop].concat()), EntrySlot::Free { at: Gva(0x1004) });
            }
        }
        assert_eq!(slot(&[CALL, 1, 2, 3, 4]), EntrySlot::Traced { at });
        assert_eq!(slot(&[0xf3, 0x0f, 0x1e, 0xfa, CALL, 1, 2, 3, 4]), EntrySlot::Traced { at: Gva(0x1004) });
        assert_eq!(slot(&[0x55, 0x48, 0x89, 0xe5]), EntrySlot::None);
    }
}
