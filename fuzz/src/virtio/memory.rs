//! Guest RAM for one run, small enough to be copied and compared after each step.

use std::sync::Arc;

use civic_devices::virtio::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Two regions with a hole between them and nothing behind: start and length.
pub const REGIONS: [(u64, u64); 2] = [(0, 0x2_8000), (0x4_0000, 0x1_0000)];
/// The first address behind RAM.
pub const END: u64 = 0x5_0000;

thread_local! {
    // Mapped once: mapping and faulting it in for every run would be most of a run.
    static RAM: GuestRam = Arc::new(GuestMemoryMmap::from_ranges(
        &REGIONS.map(|(start, len)| (GuestAddress(start), len as usize))
    ).expect("guest RAM can be mapped"));
}

/// RAM that reads as zeroes. One thread has one at a time.
pub fn zeroed() -> GuestRam {
    let ram = RAM.with(Arc::clone);
    for (start, len) in REGIONS {
        ram.write_slice(&vec![0; len as usize], GuestAddress(start)).expect("it lies in RAM");
    }
    ram
}

/// Whether all of a range is RAM.
pub fn is_ram(at: u64, len: u64) -> bool {
    let fits = |&(start, size): &(u64, u64)| at >= start && at.checked_add(len).is_some_and(|end| end <= start + size);
    REGIONS.iter().any(fits)
}

/// RAM as it was at a moment: the regions, one behind the other.
pub struct Snapshot(Vec<u8>);

impl Snapshot {
    /// Of this moment.
    pub fn take(ram: &GuestMemoryMmap) -> Self {
        let mut bytes = vec![0; REGIONS.iter().map(|(_, len)| *len as usize).sum()];
        let mut rest = &mut bytes[..];
        for (start, len) in REGIONS {
            let part = rest.split_off_mut(..len as usize).expect("there is room for all regions");
            ram.read_slice(part, GuestAddress(start)).expect("it lies in RAM");
        }
        Self(bytes)
    }

    /// The bytes of a range, if all of it is RAM.
    pub fn bytes(&self, at: u64, len: u64) -> Option<&[u8]> {
        let start = place(at)?;
        is_ram(at, len).then(|| &self.0[start..start + len as usize])
    }

    /// A 16-bit word.
    pub fn word(&self, at: u64) -> Option<u16> {
        self.bytes(at, 2)?.try_into().ok().map(u16::from_le_bytes)
    }

    /// A 32-bit word.
    pub fn dword(&self, at: u64) -> Option<u32> {
        self.bytes(at, 4)?.try_into().ok().map(u32::from_le_bytes)
    }

    /// A 64-bit word.
    pub fn qword(&self, at: u64) -> Option<u64> {
        self.bytes(at, 8)?.try_into().ok().map(u64::from_le_bytes)
    }

    /// Makes a range of RAM the same as in `other`.
    pub fn overlook(&mut self, at: u64, len: u64, other: &Self) {
        if let (Some(start), Some(bytes)) = (place(at), other.bytes(at, len)) {
            self.0[start..start + bytes.len()].copy_from_slice(bytes);
        }
    }

    /// The first address at which two differ.
    pub fn difference(&self, other: &Self) -> Option<u64> {
        if self.0 == other.0 {
            return None;
        }
        let at = self.0.iter().zip(&other.0).position(|(a, b)| a != b)? as u64;
        let [(_, low), (high, _)] = REGIONS;
        Some(if at < low { at } else { high + at - low })
    }
}

/// Where an address of RAM is in a snapshot.
fn place(at: u64) -> Option<usize> {
    let [(_, low), (high, len)] = REGIONS;
    match at {
        _ if at < low => Some(at as usize),
        _ if at >= high && at < high + len => Some((at - high + low) as usize),
        _ => None,
    }
}
