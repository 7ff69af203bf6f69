//! The state a vCPU starts in, and the tables in guest memory that it points at.
//!
//! The first vCPU starts at the kernel's entry, as the Linux 64-bit boot protocol (Documentation/arch/x86/boot.rst,
//! "64-bit Boot Protocol") or PVH (Xen's docs/misc/pvh.pandoc) wants it. The others keep KVM's reset state and wait for
//! the guest's INIT and SIPI.
//!
//! ```text
//! selector  descriptor        used by
//! 0x10      code (__BOOT_CS)  linux64: 64-bit; pvh: 32-bit
//! 0x18      data (__BOOT_DS)  both
//! 0x20      TSS               both, never switched to
//! ```

use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestMemoryError, GuestMemoryMmap};

use crate::boot::{Entry, Protocol};
use crate::layout::{BOOT_STACK_TOP, GDT, Gpa, PAGE_SIZE, PAGE_TABLES};

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS always reads one.
const RFLAGS_FIXED: u64 = 1 << 1;

const FPU_CONTROL: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const LVT_DELIVERY_NMI: u32 = 0b100;
const LVT_DELIVERY_EXTINT: u32 = 0b111;

/// Why a vCPU cannot be given its first state.
#[derive(Debug, thiserror::Error)]
pub enum RegistersError {
    /// The boot tables do not fit into guest memory.
    #[error("cannot write the boot tables")]
    Memory(#[from] GuestMemoryError),
    /// An ioctl failed.
    #[error("{ioctl} failed")]
    Kvm {
        /// Which.
        ioctl: &'static str,
        /// With what.
        source: kvm_ioctls::Error,
    },
}

/// The registers of the first vCPU at a kernel's entry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BootRegisters {
    /// General registers.
    pub regs: kvm_regs,
    code: kvm_segment,
    data: kvm_segment,
    tss: kvm_segment,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
}

impl BootRegisters {
    /// The registers that `entry` asks for.
    pub fn new(entry: &Entry) -> Self {
        match entry.protocol {
            Protocol::Linux64 => linux64(entry),
            Protocol::Pvh => pvh(entry),
        }
    }

    /// Changes KVM's reset state to ours; what is not named here keeps its value.
    pub fn patch(&self, sregs: &mut kvm_sregs) {
        sregs.cs = self.code;
        for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
            *segment = self.data;
        }
        sregs.tr = self.tss;
        sregs.gdt = kvm_dtable { base: GDT.0, limit: (gdt(self).len() * 8 - 1) as u16, ..Default::default() };
        sregs.idt = kvm_dtable::default();
        sregs.cr0 = self.cr0;
        sregs.cr3 = self.cr3;
        sregs.cr4 = self.cr4;
        sregs.efer = self.efer;
    }

    /// Writes the descriptor table and, where paging is on, the page tables that the registers point at.
    pub fn write_tables(&self, memory: &GuestMemoryMmap) -> Result<(), RegistersError> {
        let bytes: Vec<u8> = gdt(self).iter().flat_map(|d| d.to_le_bytes()).collect();
        memory.write_slice(&bytes, GDT.into())?;
        if self.cr0 & CR0_PG != 0 {
            memory.write_slice(&identity_map(PAGE_TABLES), PAGE_TABLES.into())?;
        }
        Ok(())
    }

    /// Gives the registers to the first vCPU.
    pub fn apply(&self, vcpu: &VcpuFd) -> Result<(), RegistersError> {
        let mut sregs = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
        self.patch(&mut sregs);
        vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
        vcpu.set_regs(&self.regs).map_err(kvm("KVM_SET_REGS"))
    }
}

/// The 64-bit entry: long mode, the first 4 GiB mapped one to one, RSI at `boot_params`.
pub fn linux64(entry: &Entry) -> BootRegisters {
    BootRegisters {
        regs: kvm_regs {
            rip: entry.rip.0,
            rsi: entry.boot_info.0,
            rsp: BOOT_STACK_TOP.0,
            rbp: BOOT_STACK_TOP.0,
            rflags: RFLAGS_FIXED,
            ..Default::default()
        },
        code: kvm_segment { l: 1, db: 0, ..flat(CODE_SELECTOR, 0xb) },
        data: flat(DATA_SELECTOR, 0x3),
        tss: tss(),
        cr0: CR0_PE | CR0_ET | CR0_PG,
        cr3: PAGE_TABLES.0,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
    }
}

/// The PVH entry: 32-bit protected mode, paging off, EBX at `hvm_start_info`.
pub fn pvh(entry: &Entry) -> BootRegisters {
    BootRegisters {
        regs: kvm_regs { rip: entry.rip.0, rbx: entry.boot_info.0, rflags: RFLAGS_FIXED, ..Default::default() },
        code: flat(CODE_SELECTOR, 0xb),
        data: flat(DATA_SELECTOR, 0x3),
        tss: tss(),
        cr0: CR0_PE | CR0_ET,
        cr3: 0,
        cr4: 0,
        efer: 0,
    }
}

/// What every vCPU gets: the x87 and SSE control words that the ABI promises, and the local interrupts wired as in a
/// PC, LINT0 to the 8259 pair and LINT1 to NMI.
pub fn apply_common(vcpu: &VcpuFd) -> Result<(), RegistersError> {
    vcpu.set_fpu(&kvm_fpu { fcw: FPU_CONTROL, mxcsr: MXCSR, ..Default::default() }).map_err(kvm("KVM_SET_FPU"))?;
    let mut lapic = vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
    set_delivery_mode(&mut lapic, LAPIC_LVT_LINT0, LVT_DELIVERY_EXTINT);
    set_delivery_mode(&mut lapic, LAPIC_LVT_LINT1, LVT_DELIVERY_NMI);
    vcpu.set_lapic(&lapic).map_err(kvm("KVM_SET_LAPIC"))
}

fn kvm(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> RegistersError {
    move |source| RegistersError::Kvm { ioctl, source }
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let bytes = &mut lapic.regs[register..register + 4];
    let old = u32::from_le_bytes(std::array::from_fn(|i| bytes[i] as u8));
    let new = (old & !0x700) | (mode << 8);
    for (byte, value) in bytes.iter_mut().zip(new.to_le_bytes()) {
        *byte = value as _;
    }
}

/// A flat 4 GiB segment; `type_` as in a descriptor (Intel SDM 3A §3.4.5.1).
fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment { selector, limit: 0xffff_ffff, type_, present: 1, db: 1, s: 1, g: 1, ..Default::default() }
}

fn tss() -> kvm_segment {
    kvm_segment { selector: TSS_SELECTOR, limit: 0x67, type_: 0xb, present: 1, ..Default::default() }
}

/// The table, by selector: two nulls, code, data, and a TSS with the upper half that long mode wants.
fn gdt(registers: &BootRegisters) -> [u64; 6] {
    [0, 0, descriptor(&registers.code), descriptor(&registers.data), descriptor(&registers.tss), 0]
}

/// A segment as its descriptor (Intel SDM 3A §3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let (base, limit) = match segment.g {
        0 => (segment.base, u64::from(segment.limit)),
        _ => (segment.base, u64::from(segment.limit >> 12)),
    };
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags =
        u64::from(segment.avl) | u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

/// Page tables for `base` that map the first 4 GiB one to one in 2 MiB pages: PML4, PDPT, four page directories.
fn identity_map(base: Gpa) -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let table = |index: u64| base.0 + index * PAGE_SIZE;
    let mut entries = vec![0u64; 6 * 512];
    entries[0] = table(1) | PRESENT_WRITABLE;
    for directory in 0..4 {
        entries[512 + directory] = table(2 + directory as u64) | PRESENT_WRITABLE;
    }
    for (page, entry) in entries[2 * 512..].iter_mut().enumerate() {
        *entry = (page as u64) << 21 | LARGE | PRESENT_WRITABLE;
    }
    entries.iter().flat_map(|e| e.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(protocol: Protocol) -> Entry {
        Entry { protocol, rip: Gpa(0x100_0200), boot_info: Gpa(0x7000) }
    }

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(Gpa(0).into(), 1 << 20)]).unwrap()
    }

    fn word(memory: &GuestMemoryMmap, at: u64) -> u64 {
        memory.read_obj(Gpa(at).into()).unwrap()
    }

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(gdt(&linux64(&entry(Protocol::Linux64)))[2..4], [0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
        assert_eq!(
            gdt(&pvh(&entry(Protocol::Pvh)))[2..],
            [0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067, 0]
        );
    }

    #[test]
    fn walks_to_the_address_it_started_from() {
        let memory = memory();
        let registers = BootRegisters::new(&entry(Protocol::Linux64));
        registers.write_tables(&memory).unwrap();
        for address in [0u64, 0x7000, 0x20_0000, 0xbfff_ffff, 0xffff_ffff] {
            let next = |table: u64, shift: u32| {
                let entry = word(&memory, (table & !0xfff) + (address >> shift & 511) * 8);
                assert_eq!(entry & 3, 3);
                entry
            };
            let large = next(next(next(registers.cr3, 39), 30), 21);
            assert_ne!(large & 1 << 7, 0);
            assert_eq!((large & !0x1f_ffff) | (address & 0x1f_ffff), address);
        }
        assert_eq!(word(&memory, PAGE_TABLES.0 + 8), 0, "nothing beyond 512 GiB");
        assert_eq!(word(&memory, PAGE_TABLES.0 + PAGE_SIZE + 32), 0, "nothing beyond 4 GiB");
        assert_eq!(word(&memory, GDT.0 + u64::from(CODE_SELECTOR)), 0x00af_9b00_0000_ffff);
    }

    #[test]
    fn each_protocol_finds_its_information() {
        let linux = BootRegisters::new(&entry(Protocol::Linux64));
        assert_eq!((linux.regs.rip, linux.regs.rsi), (0x100_0200, 0x7000));
        let pvh = BootRegisters::new(&entry(Protocol::Pvh));
        assert_eq!((pvh.regs.rip, pvh.regs.rbx), (0x100_0200, 0x7000));
        let mut sregs = kvm_sregs::default();
        pvh.patch(&mut sregs);
        assert_eq!((sregs.cr0 & CR0_PG, sregs.cs.db, sregs.cs.l), (0, 1, 0));
        linux.patch(&mut sregs);
        assert_eq!((sregs.cs.db, sregs.cs.l, sregs.efer), (0, 1, 0x500));
    }

    #[test]
    fn local_interrupts_keep_their_other_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[LAPIC_LVT_LINT0 + 1] = 0x27;
        lapic.regs[LAPIC_LVT_LINT0 + 2] = 1;
        set_delivery_mode(&mut lapic, LAPIC_LVT_LINT0, LVT_DELIVERY_NMI);
        assert_eq!(lapic.regs[LAPIC_LVT_LINT0..][..4], [0, 0x24, 1, 0]);
    }
}
