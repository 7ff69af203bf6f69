//! What a program needs to drive a virtio device of the first slot with one queue, without interrupts.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::program::{Asm, ECAM, TABLES};

/// The configuration space of the first slot behind the host bridge: that of the first disk, where there is one.
pub const FIRST_FUNCTION: u32 = ECAM + (1 << 15);
/// Its BAR at the start: the second of its size in the window for BARs.
pub const FIRST_BAR: u32 = 0xc000_8000;
/// Of the BAR: notifications.
pub const NOTIFY: u32 = 0x3000;
/// Queue 0.
pub const DESCRIPTORS: u32 = TABLES;
/// Its available ring.
pub const AVAILABLE: u32 = TABLES + 0x1000;
/// Its used ring.
pub const USED: u32 = TABLES + 0x2000;

/// A disk's request: its header, 16 bytes, and the status behind it.
const HEADER: u32 = TABLES + 0x3000;
const STATUS: u32 = HEADER + 16;
/// Descriptor flags (virtio 1.2 §2.7.5).
const NEXT: u32 = 1;
const WRITE: u32 = 2;

/// A field of the common configuration, by its width in bytes.
pub fn common(asm: &mut Asm, base: u32, field: u32, width: u32, value: u32) -> Result<(), IcedError> {
    asm.mov(edx, base + field)?;
    asm.mov(eax, value)?;
    match width {
        1 => asm.mov(byte_ptr(edx), al),
        2 => asm.mov(word_ptr(edx), ax),
        _ => asm.mov(dword_ptr(edx), eax),
    }
}

/// Says where queue 0 is, of `size` entries.
pub fn place_queue(asm: &mut Asm, base: u32, size: u32) -> Result<(), IcedError> {
    common(asm, base, 0x16, 2, 0)?;
    common(asm, base, 0x18, 2, size)?;
    for (field, ring) in [(0x20, DESCRIPTORS), (0x28, AVAILABLE), (0x30, USED)] {
        common(asm, base, field, 4, ring)?;
        common(asm, base, field + 4, 4, 0)?;
    }
    Ok(())
}

/// 32-bit code: switches the first slot's disk on.
pub fn start_disk(asm: &mut Asm) -> Result<(), IcedError> {
    let base = FIRST_BAR;
    asm.poke(FIRST_FUNCTION + 4, 6)?;
    for status in [0, 1, 3] {
        common(asm, base, 0x14, 1, status)?;
    }
    // VERSION_1, and nothing else.
    common(asm, base, 0x08, 4, 1)?;
    common(asm, base, 0x0c, 4, 1)?;
    common(asm, base, 0x14, 1, 11)?;
    place_queue(asm, base, 4)?;
    common(asm, base, 0x1c, 2, 1)?;
    common(asm, base, 0x14, 1, 15)
}

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// 32-bit code: asks the disk for `len` bytes at `buffer`, from the sector in EAX on. One request at a time: see [`await_disk`].
pub fn ask_disk(asm: &mut Asm, direction: Direction, buffer: u32, len: u32) -> Result<(), IcedError> {
    let (kind, device_writes) = match direction {
        Direction::Read => (0, WRITE),
        Direction::Write => (1, 0),
    };
    asm.mov(edx, HEADER + 8)?;
    asm.mov(dword_ptr(edx), eax)?;
    asm.poke(HEADER, kind)?;
    asm.poke(STATUS, 0xff)?;
    let chain = [(HEADER, 16, NEXT), (buffer, len, NEXT | device_writes), (STATUS, 1, WRITE)];
    for (n, (at, len, flags)) in (0..).zip(chain) {
        asm.poke(DESCRIPTORS + 16 * n, at)?;
        asm.poke(DESCRIPTORS + 16 * n + 8, len)?;
        asm.poke(DESCRIPTORS + 16 * n + 12, flags | (n + 1) << 16)?;
    }
    // Descriptor 0 stands in every ring entry.
    asm.mov(edx, AVAILABLE + 2)?;
    asm.inc(word_ptr(edx))?;
    asm.mov(edx, FIRST_BAR + NOTIFY)?;
    asm.xor(eax, eax)?;
    asm.mov(word_ptr(edx), ax)
}

/// 32-bit code: waits until nothing is asked of the disk; AL is then the last request's status.
pub fn await_disk(asm: &mut Asm) -> Result<(), IcedError> {
    let (mut poll, mut done) = (asm.create_label(), asm.create_label());
    asm.set_label(&mut poll)?;
    asm.mov(edx, AVAILABLE + 2)?;
    asm.mov(ax, word_ptr(edx))?;
    asm.mov(edx, USED + 2)?;
    asm.cmp(ax, word_ptr(edx))?;
    asm.je(done)?;
    asm.pause()?;
    asm.jmp(poll)?;
    asm.set_label(&mut done)?;
    asm.mov(edx, STATUS)?;
    asm.mov(al, byte_ptr(edx))
}
