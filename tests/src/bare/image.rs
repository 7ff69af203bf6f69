//! Kernels made of a few instructions: an ELF file with a PVH note, and a bzImage.

/// Where programs are loaded, whichever the image.
pub const LOAD: u32 = 0x10_0000;
/// Where a bzImage's protected-mode code is loaded: what it prefers must be aligned to 2 MiB.
pub const LOAD_BZ: u32 = 0x20_0000;
/// The 64-bit entry, relative to [`LOAD_BZ`].
pub const ENTRY_64: u32 = 0x200;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const NOTE: usize = 20;
const CODE: usize = 0x1000;

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// An ELF kernel without the note that names its PVH entry.
pub fn elf_without_note(code: &[u8]) -> Vec<u8> {
    let mut image = pvh(code);
    // The note's program header becomes one of no type.
    put(&mut image, HEADER + PROGRAM_HEADER, &[0; 4]);
    image
}

/// An ELF kernel that is entered at the first byte of `code` in 32-bit protected mode, loaded at [`LOAD`].
pub fn pvh(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; CODE];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &2u16.to_le_bytes()); // ET_EXEC
    put(&mut image, 18, &62u16.to_le_bytes()); // EM_X86_64
    put(&mut image, 20, &1u32.to_le_bytes());
    put(&mut image, 24, &u64::from(LOAD).to_le_bytes());
    put(&mut image, 32, &(HEADER as u64).to_le_bytes());
    put(&mut image, 52, &(HEADER as u16).to_le_bytes());
    put(&mut image, 54, &(PROGRAM_HEADER as u16).to_le_bytes());
    put(&mut image, 56, &2u16.to_le_bytes());
    let mut program_header = |index: usize, kind: u32, offset: usize, address: u32, len: usize| {
        let at = HEADER + index * PROGRAM_HEADER;
        put(&mut image, at, &kind.to_le_bytes());
        put(&mut image, at + 4, &7u32.to_le_bytes());
        for (field, value) in [(8, offset as u64), (16, address.into()), (24, address.into())] {
            put(&mut image, at + field, &value.to_le_bytes());
        }
        put(&mut image, at + 32, &(len as u64).to_le_bytes());
        put(&mut image, at + 40, &(len as u64).to_le_bytes());
    };
    let note = HEADER + 2 * PROGRAM_HEADER;
    program_header(0, 1, CODE, LOAD, code.len());
    program_header(1, 4, note, 0, NOTE);
    for (at, word) in [(0, 4u32), (4, 4), (8, 18), (16, LOAD)] {
        put(&mut image, note + at, &word.to_le_bytes());
    }
    put(&mut image, note + 12, b"Xen\0");
    image.extend(code);
    image
}

/// A bzImage that is entered at the first byte of `code` in long mode, loaded at [`LOAD_BZ`] + [`ENTRY_64`].
pub fn bzimage(code: &[u8]) -> Vec<u8> {
    const SETUP: usize = 2 * 512;
    let len = (ENTRY_64 as usize + code.len()).next_multiple_of(16);
    let mut image = vec![0; SETUP + len];
    put(&mut image, 0x1f1, &[1]); // setup_sects
    put(&mut image, 0x1f4, &((len / 16) as u32).to_le_bytes());
    put(&mut image, 0x1fe, &0xaa55u16.to_le_bytes());
    put(&mut image, 0x200, &[0xeb, 0x66]); // the header ends at 0x268
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x20fu16.to_le_bytes());
    put(&mut image, 0x211, &[1]); // LOADED_HIGH
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut image, 0x236, &1u16.to_le_bytes()); // a 64-bit entry
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x258, &u64::from(LOAD_BZ).to_le_bytes());
    put(&mut image, 0x260, &(len as u32).to_le_bytes());
    put(&mut image, SETUP + ENTRY_64 as usize, code);
    image
}
