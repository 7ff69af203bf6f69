//! Kernel files, bzImage and ELF: one that is taken lies where it may, with all that it was given beside it.

use std::fs::File;
use std::io::Write;

use civic_vmm::boot::{BootParams, Kernel, Protocol};
use civic_vmm::layout::{ACPI_TABLES, ACPI_TABLES_CAPACITY, CMDLINE, Gpa, HIMEM, Layout};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MEMORY: u64 = 48 << 20;
const TEXT: &str = "console=ttyS0";
const INITRD: &[u8] = b"initial file system";
/// What ACPI tables are until a kernel spoils them.
static TABLES: [u8; ACPI_TABLES_CAPACITY as usize] = [0xa5; ACPI_TABLES_CAPACITY as usize];

fn file(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create(c"file", MFdFlags::MFD_CLOEXEC).expect("the host has memory"));
    file.write_all(bytes).expect("the host has memory");
    file
}

/// Opens and loads one kernel file.
pub fn run(bytes: &[u8]) {
    let mut kernel = match Kernel::open(file(bytes)) {
        Ok(kernel) => kernel,
        Err(error) => return drop(error.to_string()),
    };
    let layout = Layout::new(MEMORY).expect("a machine may have so much");
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).expect("memory can be mapped");
    memory.write_slice(&TABLES, ACPI_TABLES.into()).expect("they lie in RAM");
    let mut initrd = file(INITRD);
    let params = BootParams { cmdline: TEXT, initrd: Some(&mut initrd), rsdp: ACPI_TABLES };
    let entry = match kernel.load(&memory, &layout, params) {
        Ok(entry) => entry,
        Err(error) => return drop(error.to_string()),
    };
    assert!((HIMEM..layout.low_ram_end()).contains(&entry.rip), "entered at {}", entry.rip);
    let mut tables = vec![0; TABLES.len()];
    memory.read_slice(&mut tables, ACPI_TABLES.into()).expect("they lie in RAM");
    assert!(tables == TABLES, "the ACPI tables were written over");
    let mut text = [0; TEXT.len() + 1];
    memory.read_slice(&mut text, CMDLINE.into()).expect("it lies in RAM");
    assert_eq!(text, *[TEXT.as_bytes(), &[0]].concat(), "the command line");
    let mut found = [0; INITRD.len()];
    let start = initrd_of(&memory, entry.protocol, entry.boot_info);
    memory.read_slice(&mut found, start).expect("the initrd lies in RAM");
    assert_eq!(found, *INITRD, "the initrd at {start:?} was written over");
}

/// Where the boot structures say that the initrd lies: `boot_params`' header, or the first module of `hvm_start_info`.
fn initrd_of(memory: &GuestMemoryMmap, protocol: Protocol, info: Gpa) -> GuestAddress {
    let dword = |at: u64| -> u32 { memory.read_obj(GuestAddress(at)).expect("boot structures lie in RAM") };
    let qword = |at: u64| -> u64 { memory.read_obj(GuestAddress(at)).expect("boot structures lie in RAM") };
    GuestAddress(match protocol {
        Protocol::Linux64 => u64::from(dword(info.0 + 0x218)) | u64::from(dword(info.0 + 0xc0)) << 32,
        Protocol::Pvh => qword(qword(info.0 + 0x10)),
    })
}

/// The smallest kernels that load.
pub fn seeds() -> Vec<Vec<u8>> {
    vec![bzimage(), elf(), b"\x7fELF".to_vec(), vec![0; 600]]
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// Documentation/arch/x86/boot.rst: two sectors of set-up code, 1 KiB behind them.
fn bzimage() -> Vec<u8> {
    const CODE: usize = 0x400;
    let mut bytes = vec![0; 1024 + CODE];
    for (at, field) in [
        (0x1f1, &[1][..]),
        (0x1f4, &(CODE as u32 / 16).to_le_bytes()),
        (0x1fe, &0xaa55_u16.to_le_bytes()),
        (0x200, &0x6aeb_u16.to_le_bytes()),
        (0x202, b"HdrS"),
        (0x206, &0x20f_u16.to_le_bytes()),
        (0x211, &[1]),
        (0x22c, &0x7fff_ffff_u32.to_le_bytes()),
        (0x230, &0x20_0000_u32.to_le_bytes()),
        (0x234, &[1, 21, 0x3f, 0]),
        (0x238, &2047_u32.to_le_bytes()),
        (0x258, &0x100_0000_u64.to_le_bytes()),
        (0x260, &0x40_0000_u32.to_le_bytes()),
    ] {
        put(&mut bytes, at, field);
    }
    bytes
}

/// One segment, and the note that names its entry.
fn elf() -> Vec<u8> {
    let mut bytes = vec![0; 0x180];
    put(&mut bytes, 0, b"\x7fELF\x02\x01\x01");
    put(&mut bytes, 16, &[2, 0, 62, 0, 1]);
    put(&mut bytes, 32, &64_u64.to_le_bytes());
    put(&mut bytes, 52, &[64, 0, 56, 0, 2, 0]);
    let note = [&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0][..], b"Xen\0", &0x100_0010_u32.to_le_bytes()].concat();
    for (at, kind, offset, address, len) in
        [(64, 4_u32, 0x100_u64, 0_u64, note.len() as u64), (120, 1, 0x140, 0x100_0000, 0x40)]
    {
        put(&mut bytes, at, &kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, address), (32, len), (40, len)] {
            put(&mut bytes, at + field, &value.to_le_bytes());
        }
    }
    put(&mut bytes, 0x100, &note);
    bytes
}
