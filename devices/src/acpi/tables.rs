//! The ACPI tables, laid out in one piece of guest memory.
//!
//! ```text
//! base: RSDP ─► XSDT ─► FADT ─► FACS, DSDT
//!                    ├► MADT
//!                    └► MCFG
//! ```
//!
//! ACPI 6.5 §5.2. The interrupt wiring that the MADT promises, and the hypervisor's routes must keep: GSI 0 (the PIT)
//! arrives at IOAPIC pin **2** (and PIC pin 0), every other GSI below 24 at the pin of its number, and GSI 2 is nobody's.

use std::ops::Range;

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, facs::FACS};

use super::aml;
use super::power::{GPE0, PM_TIMER, PM1_CONTROL, PM1_EVENT, SCI_GSI};

const OEM: [u8; 6] = *b"CIVIC ";
const OEM_TABLE: [u8; 8] = *b"CIVICVMM";
const OEM_REVISION: u32 = 1;

/// ACPI 6.x revisions of the tables that acpi_tables leaves to us.
const MADT_REVISION: u8 = 5;
const DSDT_REVISION: u8 = 2;

/// The reset register and the value that resets (the PC's 0xcf9: full, hard reset).
pub const RESET_PORT: u16 = 0xcf9;
/// See [`RESET_PORT`].
pub const RESET_VALUE: u8 = 6;

/// IA-PC boot architecture (ACPI 6.5 table 5.10). Bit 1 stays clear: an i8042 that only resets is none to probe.
const BOOT_ARCH_LEGACY_DEVICES: u16 = 1 << 0;
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_ASPM: u16 = 1 << 4;
const BOOT_ARCH_NO_CMOS_RTC: u16 = 1 << 5;

/// MADT: a PC/AT-compatible 8259 pair exists too.
const MADT_PCAT_COMPAT: u32 = 1;
const INTERRUPT_SOURCE_OVERRIDE: u8 = 2;
const LOCAL_APIC_NMI: u8 = 4;
/// MPS INTI flags: as the bus has it (edge, high for ISA); active high and level-triggered.
const INTI_CONFORMS: u16 = 0;
const INTI_HIGH_LEVEL: u16 = 0b1101;
/// Where the PIT's interrupt arrives.
const PIT_GSI: u32 = 2;

/// What the tables describe. Address ranges are not empty.
#[derive(Clone, Debug)]
pub struct AcpiConfig {
    /// vCPUs, with APIC ids from 0. At most 254.
    pub cpus: u8,
    /// The local APICs' registers.
    pub lapic: u32,
    /// The IOAPIC's registers.
    pub ioapic: u32,
    /// The IOAPIC's id: what its registers say (0 for KVM's).
    pub ioapic_id: u8,
    /// Configuration space of PCI bus 0, below 4 GiB.
    pub ecam: Range<u64>,
    /// The window for 32-bit BARs, below 4 GiB.
    pub mmio32: Range<u64>,
    /// The window for 64-bit BARs, where the guest can reach one.
    pub mmio64: Option<Range<u64>>,
    /// First PCI configuration port.
    pub pci_config_port: u16,
    /// PCI configuration ports.
    pub pci_config_ports: u8,
    /// The serial port's first I/O port and interrupt, where there is one.
    pub com1: Option<(u16, u32)>,
    /// Where the generation id lies, if the machine has one.
    pub generation_id: Option<u64>,
    /// Where the clock page lies, below 4 GiB, if the machine has one.
    pub clock: Option<u64>,
    /// The slots of bus 0 whose devices come and go while the guest runs, a bit each. Not the host bridge's, which is 0.
    pub hotplug_slots: u32,
}

impl Default for AcpiConfig {
    /// One vCPU and the usual places of a PC.
    fn default() -> Self {
        Self {
            cpus: 1,
            lapic: 0xfee0_0000,
            ioapic: 0xfec0_0000,
            ioapic_id: 0,
            ecam: 0xe000_0000..0xe010_0000,
            mmio32: 0xc000_0000..0xe000_0000,
            mmio64: None,
            pci_config_port: 0xcf8,
            pci_config_ports: 8,
            com1: Some((0x3f8, 4)),
            generation_id: None,
            clock: None,
            hotplug_slots: 0,
        }
    }
}

/// Tables to write into guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiBlob {
    /// The guest-physical address of the RSDP: where the boot protocol points.
    pub rsdp: u64,
    /// What to write at the base.
    pub bytes: Vec<u8>,
}

/// Builds the tables for `base`, a multiple of 64 below 4 GiB.
pub fn build(config: &AcpiConfig, base: u64) -> AcpiBlob {
    let mut blob = Blob {
        base,
        // The RSDP comes first and is written last.
        bytes: vec![0; Rsdp::len()],
    };
    let mut facs = FACS::new();
    facs.version = 2;
    let facs = blob.append(&facs);
    let dsdt = blob.append(&dsdt(config));
    let fadt = blob.append(&fadt(facs, dsdt));
    let madt = blob.append(&madt(config));
    let mcfg = blob.append(&mcfg(config));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = blob.append(&xsdt);

    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    blob.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    AcpiBlob { rsdp: base, bytes: blob.bytes }
}

struct Blob {
    base: u64,
    bytes: Vec<u8>,
}

impl Blob {
    /// Appends a table and returns its address. The FACS must lie on 64 bytes; the others do no harm there.
    fn append(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        let address = self.base + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

fn dsdt(config: &AcpiConfig) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&aml::dsdt(config));
    dsdt
}

fn fadt(facs: u64, dsdt: u64) -> impl Aml {
    let io = |(port, len): (u16, u8), access| GAS::new(AddressSpace::SystemIo, len * 8, 0, access, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .gpe_info(GPE0.0.into(), 0, GPE0.1, 0, 0);
    // Absent: SMI command (the guest is in ACPI mode already), C2 and C3 (latencies above what is allowed for them),
    // a sleep button and a wake-up clock (their flags say "not here"); the power button is fixed hardware (flag clear).
    for flag in [Flags::Wbinvd, Flags::ProcC1, Flags::SlpButton, Flags::FixRtc, Flags::TmrValExt, Flags::ResetRegSup] {
        fadt = fadt.flag(flag);
    }
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = (SCI_GSI as u16).into();
    fadt.pm1a_evt_blk = u32::from(PM1_EVENT.0).into();
    fadt.pm1_evt_len = PM1_EVENT.1;
    // Two registers of 16 bits, so the access size is theirs.
    fadt.x_pm1a_evt_blk = io(PM1_EVENT, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL.0).into();
    fadt.pm1_cnt_len = PM1_CONTROL.1;
    fadt.x_pm1a_cnt_blk = io(PM1_CONTROL, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(PM_TIMER.0).into();
    fadt.pm_tmr_len = PM_TIMER.1;
    fadt.x_pm_tmr_blk = io(PM_TIMER, AccessSize::DwordAccess);
    fadt.x_gpe0_blk = io(GPE0, AccessSize::ByteAccess);
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.iapc_boot_arch =
        (BOOT_ARCH_LEGACY_DEVICES | BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_ASPM | BOOT_ARCH_NO_CMOS_RTC).into();
    fadt.reset_reg = io((RESET_PORT, 1), AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    fadt.finalize()
}

/// Not acpi_tables' `MADT`: that one knows neither flags nor interrupt source overrides.
fn madt(config: &AcpiConfig) -> Sdt {
    let mut structures = Vec::new();
    structures.extend(config.lapic.to_le_bytes());
    structures.extend(MADT_PCAT_COMPAT.to_le_bytes());
    for cpu in 0..config.cpus {
        ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled).to_aml_bytes(&mut structures);
    }
    IoApic::new(config.ioapic_id, config.ioapic, 0).to_aml_bytes(&mut structures);
    structures.extend(source_override(0, PIT_GSI, INTI_CONFORMS));
    structures.extend(source_override(SCI_GSI as u8, SCI_GSI, INTI_HIGH_LEVEL));
    // Every processor's LINT1 is NMI.
    structures.extend([LOCAL_APIC_NMI, 6, 0xff, 0, 0, 1]);

    let mut madt = Sdt::new(*b"APIC", 36, MADT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    madt.append_slice(&structures);
    madt
}

/// ACPI 6.5 §5.2.12.5: ISA interrupt `irq` is `gsi`.
fn source_override(irq: u8, gsi: u32, flags: u16) -> Vec<u8> {
    let mut bytes = vec![INTERRUPT_SOURCE_OVERRIDE, 10, 0, irq];
    bytes.extend(gsi.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

fn mcfg(config: &AcpiConfig) -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(config.ecam.start, 0, 0, 0);
    mcfg
}

#[cfg(test)]
mod tests;
