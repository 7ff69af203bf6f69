//! The guest's physical memory, as a paused VM or a file of it shows it, and the addresses of this crate.
//!
//! Nothing here is trusted: whoever reads checks where, how much and what. Linux on x86-64 is little-endian.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A guest physical address.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gpa(pub u64);

/// A guest virtual address.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gva(pub u64);

impl Gpa {
    /// So many bytes further; at the end of the address space it begins again.
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

impl Gva {
    /// So many bytes further; at the end of the address space it begins again.
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpa({:#x})", self.0)
    }
}

impl fmt::Debug for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gva({:#x})", self.0)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// There is no RAM at some of the bytes that were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest has no RAM at physical address {at} ({len} bytes)")]
pub struct Absent {
    /// Where the reading began.
    pub at: Gpa,
    /// How many bytes were wanted.
    pub len: usize,
}

/// RAM of a guest that stands still.
pub trait PhysicalMemory {
    /// Fills all of `buffer` from `at`. After an error, what is in `buffer` means nothing.
    fn read(&self, at: Gpa, buffer: &mut [u8]) -> Result<(), Absent>;
}

impl dyn PhysicalMemory + '_ {
    /// So many bytes, as an array.
    pub fn bytes<const N: usize>(&self, at: Gpa) -> Result<[u8; N], Absent> {
        let mut bytes = [0; N];
        self.read(at, &mut bytes)?;
        Ok(bytes)
    }

    /// Two bytes.
    pub fn u16(&self, at: Gpa) -> Result<u16, Absent> {
        self.bytes(at).map(u16::from_le_bytes)
    }

    /// Four bytes.
    pub fn u32(&self, at: Gpa) -> Result<u32, Absent> {
        self.bytes(at).map(u32::from_le_bytes)
    }

    /// Eight bytes.
    pub fn u64(&self, at: Gpa) -> Result<u64, Absent> {
        self.bytes(at).map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::SparseMemory;

    #[test]
    fn reads_stay_inside_ram() {
        let mut memory = SparseMemory::new();
        memory.add(Gpa(0x1000), 0x2000);
        memory.write(Gpa(0x1ffc), &[1, 2, 3, 4, 5, 6, 7, 8]);
        let memory: &dyn PhysicalMemory = &memory;
        assert_eq!(memory.u64(Gpa(0x1ffc)), Ok(0x0807_0605_0403_0201));
        assert_eq!((memory.u32(Gpa(0x2000)), memory.u16(Gpa(0x2003))), (Ok(0x0807_0605), Ok(8)));
        assert_eq!(memory.u64(Gpa(0x2ff8)), Ok(0));
        for at in [0xfff, 0x2ff9, 0x3000, u64::MAX - 3, u64::MAX] {
            assert_eq!(memory.u64(Gpa(at)), Err(Absent { at: Gpa(at), len: 8 }));
        }
        assert_eq!(Gpa(u64::MAX).plus(2), Gpa(1));
        assert_eq!(format!("{} {:?} {} {:?}", Gpa(1), Gpa(2), Gva(3), Gva(4)), "0x1 Gpa(0x2) 0x3 Gva(0x4)");
    }
}
