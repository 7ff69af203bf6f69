//! Descriptor chains as the specification has them (virtio 1.2 §2.7), found in a snapshot of RAM without the device's code.

use civic_devices::virtio::state::QueueStateV1;

use super::memory::{Snapshot, is_ram};

/// Descriptor flags.
pub const NEXT: u16 = 1;
/// The device may write.
pub const WRITE: u16 = 2;
/// The descriptor is a table of others.
pub const INDIRECT: u16 = 4;

/// What a chain is made of. Ranges are addresses and lengths.
#[derive(Debug, Default)]
pub struct Shape {
    /// Where the device may write.
    pub writable: Vec<(u64, u64)>,
    /// Where its descriptors lie.
    pub descriptors: Vec<(u64, u64)>,
    /// It is one that a correct driver can have made, up to its meaning for the device.
    pub sound: bool,
}

impl Shape {
    /// Bytes that the device may write.
    pub fn room(&self) -> u64 {
        self.writable.iter().map(|(_, len)| len).sum()
    }
}

/// The chain that starts at descriptor `head`, as far as it goes.
pub fn resolve(ram: &Snapshot, queue: &QueueStateV1, head: u16) -> Shape {
    let mut shape = Shape::default();
    shape.sound = follow(ram, queue, head, &mut shape).is_some();
    shape
}

/// Collects into `shape`; nothing when the chain breaks off.
fn follow(ram: &Snapshot, queue: &QueueStateV1, head: u16, shape: &mut Shape) -> Option<()> {
    let (mut table, mut size, mut indirect) = (queue.descriptors, u32::from(queue.size), false);
    let (mut index, mut left, mut total) = (u32::from(head), size, 0_u32);
    loop {
        if left == 0 || index >= size {
            return None;
        }
        let at = table.checked_add(16 * u64::from(index))?;
        let (address, len) = (ram.qword(at)?, ram.dword(at.checked_add(8)?)?);
        let (flags, next) = (ram.word(at.checked_add(12)?)?, ram.word(at.checked_add(14)?)?);
        shape.descriptors.push((at, 16));
        if flags & INDIRECT != 0 {
            if indirect || len % 16 != 0 || len / 16 > u16::MAX.into() {
                return None;
            }
            (table, size, indirect) = (address, len / 16, true);
            (index, left) = (0, size);
            continue;
        }
        total = total.checked_add(len)?;
        if flags & WRITE != 0 {
            shape.writable.push((address, len.into()));
        } else if shape.room() > 0 {
            return None;
        }
        if len > 0 && !is_ram(address, len.into()) {
            return None;
        }
        if flags & NEXT == 0 {
            return Some(());
        }
        (index, left) = (next.into(), left - 1);
    }
}
