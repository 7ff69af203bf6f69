//! Address-decoded buses: port I/O and memory-mapped I/O.
//!
//! A bus maps disjoint ranges to devices. vCPU threads look a device up and call it without holding the bus lock, so
//! a device may remap itself (a PCI BAR that the guest moves) from inside its own handler.
//!
//! Lock order: the range table is a leaf lock; no device code runs under it.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

/// A device that decodes a range of a bus. Offsets are relative to the range's start.
///
/// Called from vCPU threads, possibly several at a time. `data` is 1 to 8 bytes long and the access may reach past
/// the device's registers: reads beyond leave zeroes or ones as hardware would, writes beyond are dropped.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range cannot be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Another device decodes part of the range.
    #[error("range {start:#x}+{len:#x} overlaps another device")]
    Overlap {
        /// First address of the refused range.
        start: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The range is empty or wraps around.
    #[error("range {start:#x}+{len:#x} is empty or wraps around")]
    Invalid {
        /// First address of the refused range.
        start: u64,
        /// Its length in bytes.
        len: u64,
    },
}

struct Range {
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// A port or MMIO address space.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, Range>>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` decode `len` addresses from `start`.
    pub fn insert(&self, start: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let end = start.checked_add(len).filter(|_| len > 0).ok_or(BusError::Invalid { start, len })?;
        let mut ranges = self.ranges.write().unwrap_or_else(|e| e.into_inner());
        if let Some((&below, range)) = ranges.range(..end).next_back()
            && below + range.len > start
        {
            return Err(BusError::Overlap { start, len });
        }
        ranges.insert(start, Range { len, device });
        Ok(())
    }

    /// Removes the range that starts at `start`; says whether there was one.
    pub fn remove(&self, start: u64) -> bool {
        let mut ranges = self.ranges.write().unwrap_or_else(|e| e.into_inner());
        ranges.remove(&start).is_some()
    }

    fn find(&self, address: u64) -> Option<(u64, Arc<dyn BusDevice>)> {
        let ranges = self.ranges.read().unwrap_or_else(|e| e.into_inner());
        let (&start, range) = ranges.range(..=address).next_back()?;
        (address - start < range.len).then(|| (address - start, Arc::clone(&range.device)))
    }

    /// Reads from whatever decodes `address`; false, with `data` all ones, where nothing does.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes to whatever decodes `address`; false where nothing does.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);
    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn decodes_by_range_and_floats_high_elsewhere() {
        let bus = Bus::new();
        let echo = Arc::new(Echo::default());
        bus.insert(0x100, 0x10, echo.clone()).unwrap();
        let mut byte = [0u8];
        assert!(bus.read(0x10f, &mut byte));
        assert_eq!(byte, [0x0f]);
        assert!(!bus.read(0x110, &mut byte));
        assert_eq!(byte, [0xff]);
        assert!(!bus.write(0xff, &[1]));
        assert!(bus.write(0x104, &[1, 2]));
        assert_eq!(*echo.0.lock().unwrap(), [(4, vec![1, 2])]);
    }

    #[test]
    fn refuses_overlap_and_wrap() {
        let bus = Bus::new();
        let echo: Arc<dyn BusDevice> = Arc::new(Echo::default());
        bus.insert(0x100, 0x10, echo.clone()).unwrap();
        for (start, len) in [(0x100, 1), (0xf8, 9), (0x10f, 4), (0xf0, 0x40)] {
            assert_eq!(bus.insert(start, len, echo.clone()), Err(BusError::Overlap { start, len }));
        }
        assert!(bus.insert(u64::MAX, 2, echo.clone()).is_err());
        assert!(bus.insert(0, 0, echo.clone()).is_err());
        bus.insert(0x110, 4, echo.clone()).unwrap();
        assert!(bus.remove(0x100));
        bus.insert(0xf8, 9, echo).unwrap();
    }
}
