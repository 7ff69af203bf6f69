//! bzImage, by Linux' 64-bit entry.
//!
//! ```text
//! file:  boot sector and setup code ((setup_sects + 1) × 512) │ protected-mode code ─► load address, entry at + 0x200
//! ```
//!
//! The kernel decompresses itself to its preferred address, or above it to one that it picks at random out of the memory
//! map; either way it needs `init_size` bytes from there, and picks what neither it nor the initrd occupies.
//!
//! Documentation/arch/x86/boot.rst.

use std::fs::File;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestMemoryMmap};

use super::{BootError, BootParams, Entry, Protocol, Source, corrupt, load_initrd, load_range, write_cmdline};
use crate::layout::{CMDLINE, Gpa, HIMEM, Layout, ZERO_PAGE};

/// Where the header lies in the file, and in `boot_params`.
const HEADER_OFFSET: u64 = 0x1f1;
/// The header ends this far behind the distance that the byte at 0x201 gives.
const HEADER_END_BASE: u64 = 0x202;
const HEADER_LENGTH_OFFSET: usize = 0x201 - HEADER_OFFSET as usize;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const BOOT_FLAG: u16 = 0xaa55;

const SECTOR: u64 = 512;
const MIN_PROTOCOL: u16 = 0x20c;
const LOADED_HIGH: u8 = 1 << 0;
const KERNEL_64: u16 = 1 << 0;
/// An undefined boot loader.
const LOADER_UNDEFINED: u8 = 0xff;
const ENTRY_64: u64 = 0x200;
/// What is behind a 64-bit entry at the least.
const MIN_CODE: u64 = ENTRY_64 + 1;

/// A checked header, as the kernel gave it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    setup: setup_header,
}

impl Header {
    /// Reads and checks the header; `None` where the file is no bzImage.
    pub(super) fn parse(source: &Source<'_>) -> Result<Option<Self>, BootError> {
        let wanted = size_of::<setup_header>() as u64;
        if source.len < HEADER_END_BASE + 4 {
            // Too short to tell: a bzImage has a boot sector's signature even if nothing else is left of it.
            return Ok(None);
        }
        let available = wanted.min(source.len - HEADER_OFFSET);
        let mut bytes = source.read(HEADER_OFFSET, available, "setup header")?;
        bytes.resize(wanted as usize, 0);
        let mut setup = setup_header::default();
        setup.as_mut_slice().copy_from_slice(&bytes);
        if setup.header != MAGIC {
            return Ok(None);
        }

        if setup.boot_flag != BOOT_FLAG {
            return Err(corrupt("boot_flag", setup.boot_flag));
        }
        if setup.version < MIN_PROTOCOL {
            return Err(BootError::OldProtocol { version: setup.version });
        }
        // What lies behind the header's own end is code, not fields.
        let end = HEADER_END_BASE + u64::from(bytes[HEADER_LENGTH_OFFSET]);
        let len = (end - HEADER_OFFSET).min(wanted) as usize;
        source.require(HEADER_OFFSET, len as u64, "setup header")?;
        setup.as_mut_slice()[len..].fill(0);
        let header = Self { setup };
        header.check(source)?;
        Ok(Some(header))
    }

    fn check(&self, source: &Source<'_>) -> Result<(), BootError> {
        let setup = &self.setup;
        if setup.loadflags & LOADED_HIGH == 0 {
            return Err(corrupt("loadflags", setup.loadflags));
        }
        if setup.xloadflags & KERNEL_64 == 0 {
            return Err(BootError::NotX86_64 { what: "a bzImage without a 64-bit entry".into() });
        }
        if !setup.kernel_alignment.is_power_of_two() {
            return Err(corrupt("kernel_alignment", setup.kernel_alignment));
        }
        let code_len = self.code_len();
        if code_len < MIN_CODE {
            return Err(corrupt("syssize", setup.syssize));
        }
        let payload = u64::from(setup.payload_offset) + u64::from(setup.payload_length);
        if payload > code_len {
            return Err(corrupt("payload_length", setup.payload_length));
        }
        if u64::from(setup.init_size) < code_len {
            return Err(corrupt("init_size", setup.init_size));
        }
        if setup.pref_address < HIMEM.0 || !setup.pref_address.is_multiple_of(2 << 20) {
            return Err(corrupt("pref_address", setup.pref_address));
        }
        source.require(self.code_offset(), code_len, "protected-mode code")
    }

    /// Where the protected-mode code begins in the file.
    fn code_offset(&self) -> u64 {
        let sectors = match self.setup.setup_sects {
            0 => 4,
            sectors => u64::from(sectors),
        };
        (sectors + 1) * SECTOR
    }

    fn code_len(&self) -> u64 {
        u64::from(self.setup.syssize) * 16
    }

    pub(super) fn load(
        &self,
        file: &mut File,
        memory: &GuestMemoryMmap,
        layout: &Layout,
        params: BootParams<'_>,
    ) -> Result<Entry, BootError> {
        let setup = &self.setup;
        let available = layout.low_ram_end();
        // Loaded where it wants to run. Behind that code, a file may hold more, such as a signature.
        let load = Gpa(setup.pref_address);
        let needed = Gpa(load.0.saturating_add(setup.init_size.into()));
        if needed > available {
            return Err(BootError::KernelTooLarge { needed, available });
        }
        load_range(file, self.code_offset(), memory, load, self.code_len()).map_err(|e| e.or(BootError::Read))?;

        let mut zero_page = boot_params { hdr: *setup, acpi_rsdp_addr: params.rsdp.0, ..Default::default() };
        write_cmdline(memory, params.cmdline, setup.cmdline_size.into())?;
        zero_page.hdr.type_of_loader = LOADER_UNDEFINED;
        zero_page.hdr.cmd_line_ptr = CMDLINE.0 as u32;
        zero_page.hdr.code32_start = load.0 as u32;

        if let Some(file) = params.initrd {
            let ceiling = available.min(Gpa(u64::from(setup.initrd_addr_max) + 1));
            let initrd = load_initrd(file, memory, needed, ceiling)?;
            let (start, len) = (initrd.start.0, initrd.len);
            zero_page.hdr.ramdisk_image = start as u32;
            zero_page.hdr.ramdisk_size = len as u32;
            zero_page.ext_ramdisk_image = (start >> 32) as u32;
            zero_page.ext_ramdisk_size = (len >> 32) as u32;
        }

        let e820 = layout.e820();
        let table: Vec<_> = e820
            .iter()
            .map(|entry| boot_e820_entry { addr: entry.start.0, size: entry.len, r#type: entry.kind.code() })
            .collect();
        zero_page.e820_table[..table.len()].copy_from_slice(&table);
        zero_page.e820_entries = table.len() as u8;
        memory.write_obj(zero_page, ZERO_PAGE.into())?;
        Ok(Entry { protocol: Protocol::Linux64, rip: Gpa(load.0 + ENTRY_64), boot_info: ZERO_PAGE })
    }
}
