use std::io::Write;

use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use proptest::prelude::*;
use vm_memory::ByteValued;

use super::*;
use crate::layout::{EBDA, HIMEM, PVH_START_INFO, ZERO_PAGE};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 48 * MIB;
const RSDP: Gpa = Gpa(0xe_0000);
const CODE_LEN: usize = 0x2000;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn setup() -> setup_header {
    setup_header {
        setup_sects: 1,
        syssize: (CODE_LEN / 16) as u32,
        boot_flag: 0xaa55,
        jump: 0x6aeb,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        loadflags: 1,
        code32_start: MIB as u32,
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 2 << 20,
        relocatable_kernel: 1,
        xloadflags: 0x3f,
        cmdline_size: 2047,
        payload_offset: 0x300,
        payload_length: 0x100,
        pref_address: 16 * MIB,
        init_size: 4 * MIB as u32,
        ..Default::default()
    }
}

/// A bzImage with this header, recognisable code, and something behind it.
fn bzimage(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let mut header = setup();
    change(&mut header);
    let mut bytes = vec![0u8; 1024 + CODE_LEN];
    bytes[0x1f1..][..size_of::<setup_header>()].copy_from_slice(header.as_slice());
    for (at, byte) in bytes[1024..].iter_mut().enumerate() {
        *byte = at as u8 | 1;
    }
    bytes.extend(b"signature");
    bytes
}

struct Elf {
    class: u8,
    machine: u16,
    note_owner: &'static [u8; 4],
    note_align: usize,
    entry: u32,
    start: u64,
    file_len: u64,
    len: u64,
}

impl Default for Elf {
    fn default() -> Self {
        Self {
            class: 2,
            machine: 62,
            note_owner: b"Xen\0",
            note_align: 4,
            entry: 0x100_0010,
            start: 0x100_0000,
            file_len: 0x800,
            len: 0x3000,
        }
    }
}

impl Elf {
    /// A segment at 0x1000, notes at 0x200.
    fn bytes(&self) -> Vec<u8> {
        let mut notes = Vec::new();
        for (kind, owner, descriptor) in
            [(6u32, &b"Linux\0"[..], &[1, 2, 3][..]), (18, &self.note_owner[..], &self.entry.to_le_bytes())]
        {
            notes.extend((owner.len() as u32).to_le_bytes());
            notes.extend((descriptor.len() as u32).to_le_bytes());
            notes.extend(kind.to_le_bytes());
            for part in [owner, descriptor] {
                notes.extend(part);
                notes.resize(notes.len().next_multiple_of(self.note_align), 0);
            }
        }
        let mut bytes = vec![0u8; 0x1800];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, b"\x7fELF");
        put(4, &[self.class, 1]);
        put(18, &self.machine.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(54, &56u16.to_le_bytes());
        put(56, &2u16.to_le_bytes());
        for (index, kind, offset, start, file_len, len) in
            [(0, 4u32, 0x200u64, 0, notes.len() as u64, 0), (1, 1, 0x1000, self.start, self.file_len, self.len)]
        {
            let at = 64 + index * 56;
            put(at, &kind.to_le_bytes());
            put(at + 8, &offset.to_le_bytes());
            put(at + 24, &start.to_le_bytes());
            put(at + 32, &file_len.to_le_bytes());
            put(at + 40, &len.to_le_bytes());
        }
        put(0x200, &notes);
        put(0x1000, b"kernel");
        bytes
    }
}

fn memory(layout: &Layout) -> GuestMemoryMmap {
    let ranges: Vec<_> = layout.ram_regions().iter().map(|&(start, len, _)| (start.into(), len as usize)).collect();
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

fn boot_with(bytes: &[u8], cmdline: &str, initrd: Option<&[u8]>) -> Result<(GuestMemoryMmap, Entry), BootError> {
    let layout = Layout::new(MEMORY).unwrap();
    let memory = memory(&layout);
    let mut initrd = initrd.map(file);
    let params = BootParams { cmdline, initrd: initrd.as_mut(), rsdp: RSDP };
    let entry = Kernel::open(file(bytes))?.load(&memory, &layout, params)?;
    Ok((memory, entry))
}

fn boot(bytes: &[u8]) -> Result<(GuestMemoryMmap, Entry), BootError> {
    boot_with(bytes, "console=ttyS0", Some(b"initrd"))
}

/// What refusing `bytes` says.
fn refusal(bytes: &[u8]) -> String {
    boot(bytes).unwrap_err().to_string()
}

fn text(memory: &GuestMemoryMmap, at: u64, len: usize) -> String {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, Gpa(at).into()).unwrap();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn bzimage_boots_by_its_64_bit_entry() {
    let (memory, entry) = boot(&bzimage(|_| ())).unwrap();
    assert_eq!(entry, Entry { protocol: Protocol::Linux64, rip: Gpa(16 * MIB + 0x200), boot_info: ZERO_PAGE });
    assert_eq!(memory.read_obj::<u8>(entry.rip.into()).unwrap(), 1);
    assert_eq!(memory.read_obj::<u8>(Gpa(entry.rip.0 + 2).into()).unwrap(), 3);
    let behind: u64 = memory.read_obj(Gpa(16 * MIB + CODE_LEN as u64).into()).unwrap();
    assert_eq!(behind, 0, "the signature stays out");

    let zero_page: boot_params = memory.read_obj(ZERO_PAGE.into()).unwrap();
    let header = zero_page.hdr;
    assert_eq!((header.type_of_loader, header.version), (0xff, 0x20f));
    assert_eq!({ zero_page.acpi_rsdp_addr }, RSDP.0);
    assert_eq!(text(&memory, header.cmd_line_ptr.into(), 14), "console=ttyS0\0");
    assert_eq!((header.ramdisk_image, header.ramdisk_size), ((MEMORY - PAGE_SIZE) as u32, 6));
    assert_eq!(text(&memory, header.ramdisk_image.into(), 6), "initrd");
    assert_eq!(usize::from(zero_page.e820_entries), Layout::new(MEMORY).unwrap().e820().len());
    let table = zero_page.e820_table;
    let first = table[0];
    assert_eq!(({ first.addr }, { first.size }, { first.r#type }), (0, EBDA.0, 1));
}

#[test]
fn elf_boots_by_its_pvh_note() {
    for note_align in [4, 8] {
        let (memory, entry) = boot(&Elf { note_align, ..Default::default() }.bytes()).unwrap();
        assert_eq!(entry, Entry { protocol: Protocol::Pvh, rip: Gpa(0x100_0010), boot_info: PVH_START_INFO });
        assert_eq!(text(&memory, 0x100_0000, 6), "kernel");
        let info: hvm_start_info = memory.read_obj(entry.boot_info.into()).unwrap();
        assert_eq!((info.magic, info.version, info.rsdp_paddr), (0x336e_c578, 1, RSDP.0));
        assert_eq!(text(&memory, info.cmdline_paddr, 14), "console=ttyS0\0");
        let module: hvm_modlist_entry = memory.read_obj(Gpa(info.modlist_paddr).into()).unwrap();
        assert_eq!((info.nr_modules, module.paddr, module.size), (1, MEMORY - PAGE_SIZE, 6));
        let e820 = Layout::new(MEMORY).unwrap().e820();
        assert_eq!(info.memmap_entries as usize, e820.len());
        for (index, expected) in e820.iter().enumerate() {
            let at = Gpa(info.memmap_paddr + 24 * index as u64);
            let found: hvm_memmap_table_entry = memory.read_obj(at.into()).unwrap();
            assert_eq!((found.addr, found.size, found.type_), (expected.start.0, expected.len, expected.kind.code()));
        }
    }
}

#[test]
fn no_initrd_is_no_module() {
    let (memory, _) = boot_with(&bzimage(|_| ()), "", None).unwrap();
    let zero_page: boot_params = memory.read_obj(ZERO_PAGE.into()).unwrap();
    assert_eq!({ zero_page.hdr.ramdisk_size }, 0);
    let (memory, entry) = boot_with(&Elf::default().bytes(), "", None).unwrap();
    let info: hvm_start_info = memory.read_obj(entry.boot_info.into()).unwrap();
    assert_eq!((info.nr_modules, info.modlist_paddr), (0, 0));
}

#[test]
fn says_what_is_wrong_with_a_kernel() {
    for (bytes, expected) in [
        (vec![], "empty"),
        (b"PK".to_vec(), "neither a bzImage nor an ELF kernel: it begins with [50, 4b]"),
        (vec![0; 4096], "neither"),
        (b"\x7fELF".to_vec(), "its ELF header needs 64 bytes, the file has 4"),
        (bzimage(|_| ())[..2048].to_vec(), "protected-mode code needs 9216 bytes, the file has 2048"),
        (bzimage(|_| ())[..0x240].to_vec(), "setup header needs"),
        (bzimage(|h| h.boot_flag = 0), "boot_flag"),
        (bzimage(|h| h.version = 0x20b), "speaks boot protocol 2.11"),
        (bzimage(|h| h.xloadflags = 0), "not for x86-64"),
        (bzimage(|h| h.loadflags = 0), "loadflags"),
        (bzimage(|h| h.setup_sects = 0xff), "cut short"),
        (bzimage(|h| h.syssize = 0), "syssize"),
        (bzimage(|h| h.kernel_alignment = 3), "kernel_alignment"),
        (bzimage(|h| h.payload_length = u32::MAX), "payload_length"),
        (bzimage(|h| h.init_size = 1), "init_size"),
        (bzimage(|h| h.pref_address = 0), "pref_address"),
        (bzimage(|h| h.init_size = 32 * MIB as u32 + 1), "needs memory up to 0x3000001, low memory ends at 0x3000000"),
        (bzimage(|h| h.pref_address = !0 << 21), "needs memory up to"),
        (Elf { class: 1, ..Default::default() }.bytes(), "32-bit"),
        (Elf { machine: 183, ..Default::default() }.bytes(), "machine 183"),
        (Elf { note_owner: b"Zen\0", ..Default::default() }.bytes(), "no PVH entry"),
        (Elf { entry: 0x100_0800, ..Default::default() }.bytes(), "PVH entry is 0x1000800"),
        (Elf { start: 0x1000, ..Default::default() }.bytes(), "p_paddr is 0x1000"),
        (Elf { file_len: 0x4000, ..Default::default() }.bytes(), "p_filesz"),
        (Elf { len: u64::MAX, ..Default::default() }.bytes(), "p_memsz"),
        (Elf { len: MEMORY, ..Default::default() }.bytes(), "needs memory up to 0x4000000"),
        (Elf::default().bytes()[..0x1700].to_vec(), "its segment needs"),
        (Elf::default().bytes()[..0x80].to_vec(), "its program headers needs"),
    ] {
        let said = refusal(&bytes);
        assert!(said.contains(expected), "{said:?} for {expected:?}");
    }
    let folder = File::open(std::env::temp_dir()).unwrap();
    assert!(matches!(Kernel::open(folder), Err(BootError::KernelNotAFile)));
}

#[test]
fn says_what_does_not_fit_beside_a_kernel() {
    // Kernel and initrd share 48 MiB: 20 are the kernel's (16 below it), and 28 are left.
    let kernel = bzimage(|_| ());
    let boot = |len: u64| {
        let layout = Layout::new(MEMORY).unwrap();
        let mut initrd = tempfile::tempfile().unwrap();
        initrd.set_len(len).unwrap();
        let params = BootParams { cmdline: "", initrd: Some(&mut initrd), rsdp: RSDP };
        Kernel::open(file(&kernel))?.load(&memory(&layout), &layout, params)
    };
    assert!(boot(28 * MIB).is_ok());
    let error = boot(28 * MIB + 1).unwrap_err();
    assert!(matches!(error, BootError::InitrdTooLarge { size, room } if size == room + 1 && room == 28 * MIB));
    assert!(matches!(boot(0), Err(BootError::InitrdEmpty)));

    let below = bzimage(|h| h.initrd_addr_max = 40 * MIB as u32 + 5);
    let (memory, _) = boot_with(&below, "", Some(b"x")).unwrap();
    let zero_page: boot_params = memory.read_obj(ZERO_PAGE.into()).unwrap();
    assert_eq!({ zero_page.hdr.ramdisk_image }, (40 * MIB - PAGE_SIZE) as u32);

    for kernel in [kernel, Elf::default().bytes()] {
        assert!(boot_with(&kernel, &"x".repeat(2047), None).is_ok());
        let error = boot_with(&kernel, &"x".repeat(2048), None).unwrap_err();
        assert!(matches!(error, BootError::CmdlineTooLong { len: 2048, max: 2047 }));
        assert!(matches!(boot_with(&kernel, "a\0b", None), Err(BootError::CmdlineNul)));
    }
}

/// Boots a damaged kernel: whatever comes of it, no panic, and nothing of it below the first megabyte but what we wrote.
fn survives(bytes: &[u8]) {
    if let Ok((memory, entry)) = boot(bytes) {
        assert!(entry.rip >= HIMEM && entry.rip.0 < MEMORY);
        let mut tables = vec![0; (HIMEM.0 - EBDA.0) as usize];
        memory.read_slice(&mut tables, EBDA.into()).unwrap();
        assert!(tables.iter().all(|byte| *byte == 0));
    }
}

fn damaged(kernel: &[u8], len: usize, changes: &[(usize, u8)]) -> Vec<u8> {
    let mut bytes = kernel[..len.min(kernel.len())].to_vec();
    let end = bytes.len();
    for &(at, value) in changes.iter().filter(|_| end > 0) {
        bytes[at % end] = value;
    }
    bytes
}

/// Changes near `base`, where the headers are; extreme values more often than chance would have them.
fn changes(base: usize, range: usize) -> impl Strategy<Value = Vec<(usize, u8)>> {
    let value = prop_oneof![Just(0u8), Just(0xff), Just(0x7f), Just(0x80), any::<u8>()];
    prop::collection::vec((base..base + range, value), 0..12)
}

proptest! {
    #[test]
    fn no_damage_to_a_bzimage_panics(len in prop_oneof![Just(usize::MAX), 0..0x2500usize], changes in changes(0x1f1, 0x90)) {
        survives(&damaged(&bzimage(|_| ()), len, &changes));
    }

    #[test]
    fn no_damage_to_an_elf_panics(len in prop_oneof![Just(usize::MAX), 0..0x1900usize], changes in changes(4, 0x230)) {
        survives(&damaged(&Elf::default().bytes(), len, &changes));
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..700), elf in any::<bool>()) {
        let mut bytes = bytes;
        if elf && bytes.len() >= 4 {
            bytes[..4].copy_from_slice(b"\x7fELF");
        }
        survives(&bytes);
    }
}
