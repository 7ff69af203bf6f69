//! The guest-physical address space, as a pure function of the memory size.
//!
//! ```text
//! 0x0000_0000  low RAM: boot structures, kernel, initrd       (at most 3 GiB)
//! 0xc000_0000  32-bit window for PCI BARs                     (512 MiB)
//! 0xe000_0000  ECAM: configuration space of PCI bus 0         (1 MiB)
//! 0xfec0_0000  IOAPIC        0xfee0_0000  local APIC
//! 0xfffb_c000  KVM's identity map page, then its TSS (3 pages)
//! 0x1_0000_0000  the rest of RAM, and behind it the annex    (2 MiB, seldom there)
//! 0x40_0000_0000  64-bit window for PCI BARs                  (128 GiB)
//! ```
//!
//! Invariants:
//! * RAM is one file, mapped without gaps in the file: low RAM first, the rest of it after;
//! * nothing here overlaps RAM, and no boot structure lies outside the first megabyte;
//! * the same memory size always gives the same layout: a child of a fork relies on it.

use std::fmt;

/// A guest-physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl From<Gpa> for vm_memory::GuestAddress {
    fn from(gpa: Gpa) -> Self {
        vm_memory::GuestAddress(gpa.0)
    }
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// RAM is mapped in units of this many bytes.
pub const PAGE_SIZE: u64 = 4096;
/// The least memory a machine may have.
pub const MIN_MEMORY: u64 = 16 * MIB;
/// The most memory a machine may have.
pub const MAX_MEMORY: u64 = 64 * GIB;

/// Low RAM never reaches beyond this.
const LOW_RAM_END: Gpa = Gpa(0xc000_0000);
const HIGH_RAM_START: Gpa = Gpa(4 * GIB);

/// The global descriptor table that the first vCPU starts with.
pub const GDT: Gpa = Gpa(0x500);
/// PVH's `hvm_start_info`, and behind it its memory map and module list.
pub const PVH_START_INFO: Gpa = Gpa(0x6000);
/// Linux' `boot_params`.
pub const ZERO_PAGE: Gpa = Gpa(0x7000);
/// The first stack, which grows down; nothing lies between it and the zero page.
pub const BOOT_STACK_TOP: Gpa = Gpa(0x8ff0);
/// Boot page tables: PML4, PDPT and four page directories, a page each.
pub const PAGE_TABLES: Gpa = Gpa(0x9000);
/// The kernel command line.
pub const CMDLINE: Gpa = Gpa(0x2_0000);
/// Room for the command line and its terminating zero byte.
pub const CMDLINE_CAPACITY: u64 = 0x1_0000;
/// Where the BIOS's data would begin: from here to [`HIMEM`] the guest finds no usable RAM.
pub const EBDA: Gpa = Gpa(0x9_fc00);
/// The ACPI tables; the RSDP comes first.
pub const ACPI_TABLES: Gpa = Gpa(0xe_0000);
/// Room for the ACPI tables.
pub const ACPI_TABLES_CAPACITY: u64 = GENERATION_PAGE.0 - ACPI_TABLES.0;
/// A page for the generation id. Behind 0xf0000, where no guest looks for the ROMs of cards.
pub const GENERATION_PAGE: Gpa = Gpa(0xf_e000);
/// A page for the clock's disruptions, which a guest maps into its programs.
pub const CLOCK_PAGE: Gpa = Gpa(0xf_f000);
/// Where memory beyond the first megabyte begins.
pub const HIMEM: Gpa = Gpa(MIB);

/// The IOAPIC's registers (KVM's default).
pub const IOAPIC: Gpa = Gpa(0xfec0_0000);
/// The local APICs' registers (KVM's default).
pub const LAPIC: Gpa = Gpa(0xfee0_0000);
/// A page for KVM_SET_IDENTITY_MAP_ADDR.
pub const KVM_IDENTITY_MAP: Gpa = Gpa(0xfffb_c000);
/// Three pages for KVM_SET_TSS_ADDR.
pub const KVM_TSS: Gpa = Gpa(0xfffb_d000);

/// The 64-bit window is out of reach of a guest with fewer physical address bits.
const MMIO64_PHYS_BITS: u8 = 39;

/// The first serial port: I/O ports and interrupt.
pub const COM1_PORT: u16 = 0x3f8;
/// Ports of [`COM1_PORT`].
pub const COM1_PORTS: u16 = 8;
/// The first serial port's interrupt.
pub const COM1_IRQ: u32 = 4;
/// PCI configuration ports, the reset register at 0xcf9 among them.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Ports of [`PCI_CONFIG_PORT`].
pub const PCI_CONFIG_PORTS: u16 = 8;

/// Bytes of the annex, which begins at a multiple of them.
pub const ANNEX_BYTES: u64 = 2 * MIB;

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First address.
    pub start: Gpa,
    /// Length in bytes.
    pub len: u64,
}

impl Window {
    /// The first address behind the window.
    pub fn end(&self) -> Gpa {
        Gpa(self.start.0 + self.len)
    }
}

/// The 32-bit window for PCI BARs.
pub const MMIO32: Window = Window { start: LOW_RAM_END, len: 512 * MIB };
/// Configuration space of PCI bus 0 (PCI Firmware 3.3 §4.1.2).
pub const ECAM: Window = Window { start: Gpa(0xe000_0000), len: MIB };
/// The 64-bit window for PCI BARs; see [`Layout::mmio64`].
const MMIO64: Window = Window { start: Gpa(256 * GIB), len: 128 * GIB };

const _: () = {
    assert!(MMIO32.start.0 + MMIO32.len == ECAM.start.0);
    assert!(ECAM.start.0 + ECAM.len <= IOAPIC.0);
    assert!(KVM_IDENTITY_MAP.0 + PAGE_SIZE == KVM_TSS.0);
    assert!(KVM_TSS.0 + 3 * PAGE_SIZE <= HIGH_RAM_START.0);
    assert!(PAGE_TABLES.0 + 6 * PAGE_SIZE <= CMDLINE.0);
    assert!(CMDLINE.0 + CMDLINE_CAPACITY <= EBDA.0);
    assert!(ACPI_TABLES.0 < GENERATION_PAGE.0 && GENERATION_PAGE.0 + PAGE_SIZE <= CLOCK_PAGE.0);
    assert!(CLOCK_PAGE.0 + PAGE_SIZE <= HIMEM.0);
    assert!(HIGH_RAM_START.0 + MAX_MEMORY + 2 * ANNEX_BYTES <= MMIO64.start.0);
    assert!(MMIO64.start.0 + MMIO64.len <= 1 << MMIO64_PHYS_BITS);
};

/// What the guest is told a range is (ACPI 6.5 §15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum E820Kind {
    /// Usable memory.
    Ram,
    /// Not to be touched without knowing what it is.
    Reserved,
}

impl E820Kind {
    /// The number in an e820 entry and in PVH's memory map.
    pub fn code(self) -> u32 {
        match self {
            E820Kind::Ram => 1,
            E820Kind::Reserved => 2,
        }
    }
}

/// An entry of the memory map that the guest is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Entry {
    /// First address.
    pub start: Gpa,
    /// Length in bytes.
    pub len: u64,
    /// What it is.
    pub kind: E820Kind,
}

/// Why a machine cannot have so much memory.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// Too little or too much.
    #[error(
        "{bytes} bytes of memory: a machine has {} MiB to {} GiB",
        MIN_MEMORY / MIB,
        MAX_MEMORY / GIB
    )]
    Size {
        /// The memory asked for.
        bytes: u64,
    },
    /// Not whole pages.
    #[error("{bytes} bytes of memory is not a multiple of {PAGE_SIZE}")]
    Unaligned {
        /// The memory asked for.
        bytes: u64,
    },
    /// The processor cannot address the end of it.
    #[error("memory ends at {end}, beyond the {phys_bits} physical address bits of this processor")]
    OutOfReach {
        /// The first address behind RAM.
        end: Gpa,
        /// The guest's physical address width.
        phys_bits: u8,
    },
}

/// Where the memory of a machine lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    memory: u64,
}

impl Layout {
    /// Lays out `memory_bytes` of RAM.
    pub fn new(memory_bytes: u64) -> Result<Self, LayoutError> {
        let bytes = memory_bytes;
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) {
            return Err(LayoutError::Size { bytes });
        }
        if !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(LayoutError::Unaligned { bytes });
        }
        Ok(Self { memory: bytes })
    }

    /// RAM in bytes.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// The first address behind low RAM.
    pub fn low_ram_end(&self) -> Gpa {
        Gpa(self.memory.min(LOW_RAM_END.0))
    }

    /// The first address behind all RAM.
    pub fn ram_end(&self) -> Gpa {
        match self.high_ram() {
            Some(window) => window.end(),
            None => self.low_ram_end(),
        }
    }

    fn high_ram(&self) -> Option<Window> {
        let len = self.memory - self.low_ram_end().0;
        (len > 0).then_some(Window { start: HIGH_RAM_START, len })
    }

    /// RAM as `(start, length in bytes, offset in the memory file)`, ascending in both addresses and offsets.
    pub fn ram_regions(&self) -> Vec<(Gpa, u64, u64)> {
        let low = self.low_ram_end().0;
        let mut regions = vec![(Gpa(0), low, 0)];
        regions.extend(self.high_ram().map(|window| (window.start, window.len, low)));
        regions
    }

    /// A stretch that the guest is told nothing of: for what a monitor wants its kernel to see for a moment.
    pub fn annex(&self) -> Window {
        let start = self.ram_end().max(HIGH_RAM_START).0.next_multiple_of(ANNEX_BYTES);
        Window { start: Gpa(start), len: ANNEX_BYTES }
    }

    /// The memory map for the guest, ascending.
    pub fn e820(&self) -> Vec<E820Entry> {
        let entry = |start: Gpa, end: Gpa, kind| E820Entry { start, len: end.0 - start.0, kind };
        let mut entries = vec![
            entry(Gpa(0), EBDA, E820Kind::Ram),
            entry(EBDA, HIMEM, E820Kind::Reserved),
            entry(HIMEM, self.low_ram_end(), E820Kind::Ram),
            // As firmware does it, beside the motherboard device in the DSDT.
            entry(ECAM.start, ECAM.end(), E820Kind::Reserved),
            entry(KVM_IDENTITY_MAP, Gpa(KVM_TSS.0 + 3 * PAGE_SIZE), E820Kind::Reserved),
        ];
        entries.extend(self.high_ram().map(|window| entry(window.start, window.end(), E820Kind::Ram)));
        entries
    }

    /// The 32-bit window for PCI BARs.
    pub fn mmio32(&self) -> Window {
        MMIO32
    }

    /// The 64-bit window for PCI BARs, where a guest with `phys_bits` physical address bits reaches it.
    pub fn mmio64(&self, phys_bits: u8) -> Option<Window> {
        (phys_bits >= MMIO64_PHYS_BITS).then_some(MMIO64)
    }

    /// Configuration space of PCI bus 0.
    pub fn ecam(&self) -> Window {
        ECAM
    }

    /// Refuses memory that a guest with `phys_bits` physical address bits cannot reach.
    pub fn check_reach(&self, phys_bits: u8) -> Result<(), LayoutError> {
        let end = self.ram_end();
        if phys_bits < 64 && end.0 > 1 << phys_bits {
            return Err(LayoutError::OutOfReach { end, phys_bits });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
