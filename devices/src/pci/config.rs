//! The configuration space of one conventional function: header type 0, memory BARs, capabilities.
//!
//! Every byte has a mask of the bits that the guest may write; all else is read-only, as the specification asks of
//! reserved and hard-wired fields (PCI 3.0 §6.1).

use super::BarWindow;

const SIZE: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const COMMAND_MEMORY: u8 = 1 << 1;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const BAR_64_BIT: u8 = 0x4;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// Registers of a function, with the bits that the guest may change.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Length of the 64-bit memory BAR at index 0, 2 or 4.
    bars: [u64; 3],
    next_capability: usize,
    last_link: usize,
}

impl ConfigSpace {
    /// A function without BARs or capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut bytes = [0; SIZE];
        bytes[0x00..0x02].copy_from_slice(&identity.vendor.to_le_bytes());
        bytes[0x02..0x04].copy_from_slice(&identity.device.to_le_bytes());
        bytes[0x08] = identity.revision;
        bytes[0x09] = identity.class[2];
        bytes[0x0a] = identity.class[1];
        bytes[0x0b] = identity.class[0];
        bytes[0x2c..0x2e].copy_from_slice(&identity.subsystem_vendor.to_le_bytes());
        bytes[0x2e..0x30].copy_from_slice(&identity.subsystem.to_le_bytes());
        let mut writable = [0; SIZE];
        // I/O, memory, bus master; parity and SERR responses; INTx disable.
        writable[COMMAND] = 0x47;
        writable[COMMAND + 1] = 0x05;
        writable[0x0c] = 0xff;
        writable[INTERRUPT_LINE] = 0xff;
        Self { bytes, writable, bars: [0; 3], next_capability: 0x40, last_link: CAPABILITIES }
    }

    /// Adds a 64-bit, non-prefetchable memory BAR at index `bar` (0, 2 or 4) of `len` bytes, placed at `base`.
    ///
    /// # Panics
    /// When `len` is no power of two of at least 16, or `base` is not aligned to it: both come from our own code.
    pub fn add_bar(&mut self, bar: u8, base: u64, len: u64) {
        assert!(bar.is_multiple_of(2) && bar < 6 && len.is_power_of_two() && len >= 16 && base.is_multiple_of(len));
        let at = BAR0 + 4 * usize::from(bar);
        self.bytes[at..at + 8].copy_from_slice(&base.to_le_bytes());
        self.bytes[at] |= BAR_64_BIT;
        self.writable[at..at + 8].copy_from_slice(&(!(len - 1)).to_le_bytes());
        self.bars[usize::from(bar / 2)] = len;
    }

    /// Adds a capability: `body` follows the two bytes of id and link, `writable` is its mask (missing bytes are
    /// read-only). Returns its offset.
    ///
    /// # Panics
    /// When the 256 bytes are full: capabilities come from our own code.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next_capability;
        let end = at + 2 + body.len();
        assert!(end <= SIZE);
        self.bytes[self.last_link] = at as u8;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.bytes[at] = id;
        self.bytes[at + 2..end].copy_from_slice(body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.last_link = at + 1;
        self.next_capability = end.next_multiple_of(4);
        at
    }

    /// Reads; what lies past the 256 bytes of a conventional function reads as ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset + i).copied().unwrap_or(0xff);
        }
    }

    /// Writes the bits that are writable.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (i, &byte) in data.iter().enumerate() {
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(offset + i), self.writable.get(offset + i)) {
                *old = (*old & !mask) | (byte & mask);
            }
        }
    }

    /// All 256 bytes, for [`ConfigSpace::restore`].
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes over saved bytes; false, with nothing changed, when they differ in what the guest could not have written.
    #[must_use]
    pub fn restore(&mut self, saved: &[u8]) -> bool {
        let Ok(saved) = <&[u8; SIZE]>::try_from(saved) else { return false };
        let fixed = |bytes: &[u8; SIZE]| -> Vec<u8> { bytes.iter().zip(&self.writable).map(|(b, w)| b & !w).collect() };
        let same = fixed(saved) == fixed(&self.bytes);
        if same {
            self.bytes = *saved;
        }
        same
    }

    /// The byte at `offset`.
    pub fn byte(&self, offset: usize) -> u8 {
        self.bytes[offset]
    }

    /// The little-endian 32-bit word at `offset`.
    pub fn dword(&self, offset: usize) -> u32 {
        let mut word = [0; 4];
        self.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    /// The BARs that are decoded now: memory space enabled. A BAR that wraps around the address space is not.
    pub fn decoded(&self) -> Vec<BarWindow> {
        if self.bytes[COMMAND] & COMMAND_MEMORY == 0 {
            return Vec::new();
        }
        let mut windows = Vec::new();
        for (i, &len) in self.bars.iter().enumerate() {
            let at = BAR0 + 8 * i;
            let raw = u64::from(self.dword(at)) | u64::from(self.dword(at + 4)) << 32;
            let base = raw & !0xf;
            if len > 0 && base.checked_add(len).is_some() {
                windows.push(BarWindow { bar: 2 * i as u8, base, len });
            }
        }
        windows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [1, 0, 0],
            subsystem_vendor: 0x1af4,
            subsystem: 2,
        };
        let mut space = ConfigSpace::new(&identity);
        space.add_bar(0, 0xc000_0000, 0x8000);
        space.add_capability(0x11, &[3, 0, 1, 2], &[0, 0xc0]);
        space.add_capability(0x09, &[5; 14], &[]);
        space
    }

    #[test]
    fn sizing_a_bar_tells_its_length_and_moving_it_moves_the_window() {
        let mut space = space();
        assert_eq!(space.decoded(), []);
        space.write(COMMAND, &[2, 0]);
        assert_eq!(space.decoded(), [BarWindow { bar: 0, base: 0xc000_0000, len: 0x8000 }]);
        space.write(BAR0, &[0xff; 8]);
        assert_eq!(space.dword(BAR0), 0xffff_8004);
        assert_eq!(space.dword(BAR0 + 4), 0xffff_ffff);
        // At the very top the end of the window does not fit into 64 bits.
        assert_eq!(space.decoded(), []);
        space.write(BAR0, &0x40_0001_2345u64.to_le_bytes());
        assert_eq!(space.decoded(), [BarWindow { bar: 0, base: 0x40_0001_0000, len: 0x8000 }]);
    }

    #[test]
    fn capabilities_are_linked() {
        let space = space();
        assert_eq!(space.byte(STATUS) & STATUS_CAPABILITIES, STATUS_CAPABILITIES);
        let first = usize::from(space.byte(CAPABILITIES));
        assert_eq!(space.byte(first), 0x11);
        let second = usize::from(space.byte(first + 1));
        assert_eq!((space.byte(second), space.byte(second + 1)), (0x09, 0));
    }

    proptest! {
        #[test]
        fn whatever_is_written_read_only_bits_stay(writes in prop::collection::vec((0usize..300, prop::collection::vec(any::<u8>(), 1..5)), 0..64)) {
            let mut space = space();
            let fresh = space.bytes;
            for (offset, data) in &writes {
                space.write(*offset, data);
                for window in space.decoded() {
                    prop_assert!(window.base % window.len == 0);
                }
            }
            for ((now, before), writable) in space.bytes.iter().zip(&fresh).zip(&space.writable) {
                prop_assert_eq!(now & !writable, before & !writable);
            }
        }
    }
}
