//! ELF kernels (`vmlinux`), by the PVH entry that a note of theirs names.
//!
//! Every segment is loaded at its physical address; the kernel clears what its file does not hold.
//!
//! Xen's docs/misc/pvh.pandoc and xen/include/public/arch-x86/hvm/start_info.h.

use std::fs::File;

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::{BootError, BootParams, Entry, Protocol, Source, corrupt, load_initrd, load_range, write_cmdline};
use crate::layout::{CMDLINE, Gpa, HIMEM, Layout, PVH_START_INFO, ZERO_PAGE};

pub(super) const MAGIC: &[u8] = b"\x7fELF";

const HEADER_LEN: u64 = 64;
const PROGRAM_HEADER_LEN: u16 = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
/// Kernels have about five program headers, and some hundred bytes of notes.
const MAX_PROGRAM_HEADERS: u16 = 64;
const MAX_NOTES_LEN: u64 = 64 << 10;

const NOTE_OWNER: &[u8] = b"Xen\0";
/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const NOTE_ENTRY: usize = 18;

/// `COMMAND_LINE_SIZE` of Linux on x86, less the terminating zero.
const MAX_CMDLINE: u64 = 2047;

/// `hvm_start_info` has a memory map since version 1.
const START_INFO_VERSION: u32 = 1;
const MODULES: Gpa = Gpa(PVH_START_INFO.0 + 0x80);
const MEMORY_MAP: Gpa = Gpa(PVH_START_INFO.0 + 0x100);
const MAX_MEMORY_MAP: usize = (ZERO_PAGE.0 - MEMORY_MAP.0) as usize / size_of::<hvm_memmap_table_entry>();
const _: () = assert!(MAX_MEMORY_MAP >= 16);

#[derive(Clone, Copy, Debug)]
struct Segment {
    offset: u64,
    file_len: u64,
    start: u64,
    end: u64,
}

/// A checked kernel: what to load where, and its entry.
#[derive(Debug)]
pub(super) struct Image {
    segments: Vec<Segment>,
    entry: Gpa,
    end: Gpa,
}

impl Image {
    /// Reads and checks the headers and notes.
    pub(super) fn parse(source: &Source<'_>) -> Result<Self, BootError> {
        let header = source.read(0, HEADER_LEN, "ELF header")?;
        let not_ours = |what: String| Err(BootError::NotX86_64 { what });
        if header[4] != CLASS_64 {
            return not_ours("a 32-bit ELF file".into());
        }
        if header[5] != LITTLE_ENDIAN {
            return not_ours("a big-endian ELF file".into());
        }
        let machine = int(&header, 18, 2) as u16;
        if machine != MACHINE_X86_64 {
            return not_ours(format!("an ELF file for machine {machine}"));
        }
        let (table, entry_len, count) = (int(&header, 32, 8), int(&header, 54, 2) as u16, int(&header, 56, 2) as u16);
        if entry_len != PROGRAM_HEADER_LEN {
            return Err(corrupt("e_phentsize", entry_len));
        }
        if count == 0 || count > MAX_PROGRAM_HEADERS {
            return Err(corrupt("e_phnum", count));
        }
        let table = source.read(table, u64::from(count) * u64::from(entry_len), "program headers")?;

        let mut segments = Vec::new();
        let mut entry = None;
        for program_header in table.chunks_exact(entry_len.into()) {
            match int(program_header, 0, 4) as u32 {
                SEGMENT_LOAD => segments.extend(segment(source, program_header)?),
                SEGMENT_NOTE if entry.is_none() => entry = pvh_entry(source, program_header)?,
                _ => {}
            }
        }
        let entry = entry.ok_or(BootError::NoPvhNote)?;
        let inside = |s: &Segment| (s.start..s.start + s.file_len).contains(&entry.0);
        if !segments.iter().any(inside) {
            return Err(corrupt("PVH entry", entry.0));
        }
        // Segments that overlap in the file would let a small file make much work.
        let total = segments.iter().fold(0u64, |sum, s| sum.saturating_add(s.file_len));
        if total > source.len {
            return Err(corrupt("sum of p_filesz", total));
        }
        let end = Gpa(segments.iter().map(|s| s.end).max().unwrap_or(0));
        Ok(Self { segments, entry, end })
    }

    pub(super) fn load(
        &self,
        file: &mut File,
        memory: &GuestMemoryMmap,
        layout: &Layout,
        params: BootParams<'_>,
    ) -> Result<Entry, BootError> {
        let available = layout.low_ram_end();
        if self.end > available {
            return Err(BootError::KernelTooLarge { needed: self.end, available });
        }
        for segment in &self.segments {
            load_range(file, segment.offset, memory, Gpa(segment.start), segment.file_len)
                .map_err(|e| e.or(BootError::Read))?;
        }
        write_cmdline(memory, params.cmdline, MAX_CMDLINE)?;

        let mut start_info = hvm_start_info {
            magic: XEN_HVM_START_MAGIC_VALUE,
            version: START_INFO_VERSION,
            cmdline_paddr: CMDLINE.0,
            rsdp_paddr: params.rsdp.0,
            memmap_paddr: MEMORY_MAP.0,
            ..Default::default()
        };
        if let Some(file) = params.initrd {
            let initrd = load_initrd(file, memory, self.end, available)?;
            let module = hvm_modlist_entry { paddr: initrd.start.0, size: initrd.len, ..Default::default() };
            memory.write_obj(module, MODULES.into())?;
            start_info.nr_modules = 1;
            start_info.modlist_paddr = MODULES.0;
        }
        let mut at = MEMORY_MAP;
        for entry in layout.e820().iter().take(MAX_MEMORY_MAP) {
            let entry =
                hvm_memmap_table_entry { addr: entry.start.0, size: entry.len, type_: entry.kind.code(), reserved: 0 };
            memory.write_obj(entry, at.into())?;
            at.0 += size_of::<hvm_memmap_table_entry>() as u64;
            start_info.memmap_entries += 1;
        }
        memory.write_obj(start_info, PVH_START_INFO.into())?;
        Ok(Entry { protocol: Protocol::Pvh, rip: self.entry, boot_info: PVH_START_INFO })
    }
}

/// A little-endian integer of `len` bytes; the callers' buffers are long enough.
fn int(bytes: &[u8], at: usize, len: usize) -> u64 {
    let mut word = [0; 8];
    word[..len].copy_from_slice(&bytes[at..at + len]);
    u64::from_le_bytes(word)
}

/// A segment to load; `None` where it takes no memory.
fn segment(source: &Source<'_>, program_header: &[u8]) -> Result<Option<Segment>, BootError> {
    let field = |at| int(program_header, at, 8);
    let (offset, start, file_len, len) = (field(8), field(24), field(32), field(40));
    if len == 0 && file_len == 0 {
        return Ok(None);
    }
    if file_len > len {
        return Err(corrupt("p_filesz", file_len));
    }
    if start < HIMEM.0 {
        return Err(corrupt("p_paddr", start));
    }
    let end = start.checked_add(len).ok_or_else(|| corrupt("p_memsz", len))?;
    source.require(offset, file_len, "segment")?;
    Ok(Some(Segment { offset, file_len, start, end }))
}

/// The entry that the notes of a segment name, if they do.
fn pvh_entry(source: &Source<'_>, program_header: &[u8]) -> Result<Option<Gpa>, BootError> {
    let (offset, len) = (int(program_header, 8, 8), int(program_header, 32, 8));
    if len > MAX_NOTES_LEN {
        return Err(corrupt("p_filesz", len));
    }
    let notes = source.read(offset, len, "notes")?;
    // 4 by the ELF specification and in Linux; some linkers align to 8.
    Ok(find_entry(&notes, 4).or_else(|| find_entry(&notes, 8)))
}

/// Walks notes of `name length, descriptor length, type, name, descriptor`, the last one and the next note aligned.
fn find_entry(mut notes: &[u8], align: usize) -> Option<Gpa> {
    const NOTE_HEADER_LEN: usize = 12;
    loop {
        let header = notes.get(..NOTE_HEADER_LEN)?;
        let word = |at| int(header, at, 4) as usize;
        let name_end = NOTE_HEADER_LEN + word(0);
        let start = name_end.next_multiple_of(align);
        let end = start + word(4);
        let (name, descriptor) = (notes.get(NOTE_HEADER_LEN..name_end)?, notes.get(start..end)?);
        if word(8) == NOTE_ENTRY && name == NOTE_OWNER && descriptor.len() >= 4 {
            return Some(Gpa(int(descriptor, 0, 4)));
        }
        notes = notes.get(end.next_multiple_of(align)..)?;
    }
}
