//! The bytes of the kernel's image, read once and then searched.
//!
//! Read by physical address: with page table isolation some of it is not mapped any more. Where init sections were there may be
//! anything by now, and what is not RAM reads as zeros. Whoever searches it must stand both.

use crate::memory::{Gpa, Gva, PhysicalMemory};
use crate::paging::{KernelImage, LARGE};

/// An image's bytes, of which there are at most [`crate::paging::MOST_IMAGE`].
#[derive(Debug)]
pub struct Image {
    base: Gva,
    bytes: Vec<u8>,
    absent: u64,
}

impl Image {
    /// Reads all of it.
    pub fn read(memory: &dyn PhysicalMemory, place: &KernelImage) -> Self {
        let mut bytes = vec![0; place.bytes() as usize];
        let mut absent = 0;
        for (chunk, at) in bytes.chunks_mut(LARGE as usize).zip((place.physical.0..).step_by(LARGE as usize)) {
            if memory.read(Gpa(at), chunk).is_err() {
                chunk.fill(0);
                absent += chunk.len() as u64;
            }
        }
        Self { base: place.base, bytes, absent }
    }

    /// An image of these bytes.
    #[cfg(any(test, feature = "testing"))]
    pub fn of(base: Gva, bytes: Vec<u8>) -> Self {
        Self { base, bytes, absent: 0 }
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How much of it is not RAM, in bytes.
    pub fn absent(&self) -> u64 {
        self.absent
    }

    /// The address of its byte number `offset`.
    pub fn address(&self, offset: usize) -> Gva {
        self.base.plus(offset as u64)
    }

    /// Which of its bytes this address is.
    pub fn offset(&self, at: Gva) -> Option<usize> {
        let offset = usize::try_from(at.0.checked_sub(self.base.0)?).ok()?;
        (offset < self.bytes.len()).then_some(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::SparseMemory;

    #[test]
    fn what_is_not_ram_reads_as_zeros() {
        let place = KernelImage {
            base: Gva(0xffff_ffff_8100_0000),
            end: Gva(0xffff_ffff_8160_0000),
            physical: Gpa(0x20_0000),
            pmd_table: Gpa(0),
            root: Gpa(0),
            levels: 4,
            isolated: false,
        };
        let mut memory = SparseMemory::new();
        memory.add(Gpa(0), 0x40_0000);
        memory.add(Gpa(0x60_0000), 0x20_0000);
        memory.write(Gpa(0x3f_ffff), &[1]);
        memory.write(Gpa(0x60_0000), &[2]);
        let image = Image::read(&memory, &place);
        assert_eq!((image.bytes().len(), image.absent()), (0x60_0000, 0x20_0000));
        assert_eq!([0x1f_ffff, 0x20_0000, 0x40_0000].map(|at: usize| image.bytes()[at]), [1, 0, 2]);
        assert_eq!(image.offset(image.address(0x40_0000)), Some(0x40_0000));
        assert_eq!((image.offset(Gva(0)), image.offset(place.end)), (None, None));
    }
}
