//! VMClock: a page in which the guest, down to its programs, sees that its clock was disrupted.
//!
//! Linux' include/uapi/linux/vmclock-abi.h, version 1, all little-endian:
//!
//! ```text
//!  0 magic "VCLK"    4 bytes of the region    8 version   10 counter   11 time type
//! 12 sequence: odd while the rest is written
//! 16 disruption marker    24 flags    34 clock status    104 VM generation counter
//! ```
//!
//! We say when the relation of the processor's counter to real time broke (the marker changes) and when the machine came out
//! of a saved state (the generation counter changes too). We do not say what that relation is: the counter is "invalid", the
//! clock's status "unknown" and the fields from 40 to 103 are zero. So a Linux guest gets `/dev/vmclock0`, and no PTP clock that
//! it might believe.
//!
//! What stands in the page is the guest's to read and, the page being RAM, to spoil; it is never relied on.

use std::io;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::power::{PowerManagement, gpe};

/// Bytes of the region: a page, so that the guest can map it into its programs.
pub const LEN: u32 = 4096;

const MAGIC: [u8; 4] = *b"VCLK";
const VERSION: u16 = 1;
const COUNTER_INVALID: u8 = 0xff;
const STATUS_UNKNOWN: u8 = 0;
/// There is no value for "none"; without a counter it says nothing.
const TIME_UTC: u8 = 0;
const FLAG_GENERATION_COUNTER: u64 = 1 << 8;
/// The guest is notified of every change.
const FLAG_NOTIFICATION: u64 = 1 << 9;

const SEQUENCE: u64 = 12;
const DISRUPTION: u64 = 16;
const FLAGS: usize = 24;
const STATUS: usize = 34;
const GENERATION: u64 = 104;

/// Where a machine's clock page lies.
#[derive(Clone, Copy, Debug)]
pub struct VmClock {
    address: u64,
}

impl VmClock {
    /// The page at the guest-physical `address`, a multiple of [`LEN`] in RAM that the guest has no other use for.
    pub fn new(address: u64) -> Self {
        Self { address }
    }

    /// Writes the page of a machine that begins its life.
    ///
    /// # Errors
    /// When the page is not in RAM.
    pub fn install(&self, ram: &GuestMemoryMmap) -> io::Result<()> {
        let mut page = [0; LEN as usize];
        page[..4].copy_from_slice(&MAGIC);
        page[4..8].copy_from_slice(&LEN.to_le_bytes());
        page[8..10].copy_from_slice(&VERSION.to_le_bytes());
        page[10..12].copy_from_slice(&[COUNTER_INVALID, TIME_UTC]);
        page[FLAGS..FLAGS + 8].copy_from_slice(&(FLAG_GENERATION_COUNTER | FLAG_NOTIFICATION).to_le_bytes());
        page[STATUS] = STATUS_UNKNOWN;
        ram.write_slice(&page, GuestAddress(self.address)).map_err(io::Error::other)
    }

    /// The machine came out of a saved state: changes both markers and tells the guest.
    ///
    /// # Errors
    /// When the page is not in RAM.
    pub fn disrupt(&self, ram: &GuestMemoryMmap, power: &PowerManagement) -> io::Result<()> {
        let at = |offset| GuestAddress(self.address + offset);
        let next = |offset| -> vm_memory::GuestMemoryResult<()> {
            let value: u64 = ram.load(at(offset), Ordering::Relaxed)?;
            ram.store(value.wrapping_add(1), at(offset), Ordering::Relaxed)
        };
        let update = || {
            let sequence: u32 = ram.load(at(SEQUENCE), Ordering::Relaxed)?;
            let odd = sequence | 1;
            ram.store(odd, at(SEQUENCE), Ordering::Relaxed)?;
            fence(Ordering::Release);
            next(DISRUPTION)?;
            next(GENERATION)?;
            ram.store(odd.wrapping_add(1), at(SEQUENCE), Ordering::Release)
        };
        update().map_err(io::Error::other)?;
        power.raise_gpe(gpe::CLOCK);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
