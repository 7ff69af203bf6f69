//! What the CPUID instruction tells the guest: KVM's supported table, made true for this machine.
//!
//! One socket, `cpus` cores, one thread each; a vCPU's APIC id is its index. No performance counters (their values would
//! not survive a fork) and no MONITOR. KVM's paravirtual leaves stay: guests keep time by `kvm-clock`. Of its features asynchronous page
//! faults are left out: what a vCPU waits for then is KVM's alone, no state has it, and a fork is where pages are waited for. With them
//! sources were corrupted or hung within some forks (Linux 6.12 on an emulated host). That may have been what huge pages did (`civic_fork::huge`),
//! which was found later: they have not been tried again since.
//!
//! Sources: Intel SDM 2A "CPUID", AMD APM 3 appendix E, Linux' Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::state::Section;

/// The most vCPUs a machine may have.
pub const MAX_CPUS: u8 = 16;

/// What a guest has for physical address bits where no leaf says (AMD APM 3 §E.4.7).
const DEFAULT_PHYS_BITS: u8 = 36;

const TYPE_SMT: u32 = 1;
const TYPE_CORE: u32 = 2;

/// Why there can be no CPUID table.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// None or too many.
    #[error("{cpus} vCPUs: a machine has 1 to {MAX_CPUS}")]
    Cpus {
        /// How many were asked for.
        cpus: u8,
    },
    /// The hypervisor's table lacks a leaf that every processor has.
    #[error("the hypervisor lists no CPUID leaf {leaf:#x}")]
    NoLeaf {
        /// Which.
        leaf: u32,
    },
    /// More entries than KVM takes.
    #[error("{entries} CPUID entries are more than KVM takes")]
    TooMany {
        /// How many.
        entries: usize,
    },
    /// A saved guest knows a processor of another maker.
    #[error("the VM was saved on a processor of another vendor")]
    OtherVendor,
    /// A saved guest knows features that this host has not.
    #[error("the VM was saved on a processor with features that this one lacks (CPUID leaf: bits of eax to edx): {}", .0.join("; "))]
    Lost(Vec<String>),
    /// KVM refused the table.
    #[error("KVM_SET_CPUID2 failed")]
    Kvm(#[source] kvm_ioctls::Error),
}

/// A saved table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpuidStateV1 {
    /// As KVM takes them, before they name a vCPU.
    pub entries: Vec<kvm_cpuid_entry2>,
}

impl Section for CpuidStateV1 {
    const VERSION: u16 = 1;
}

/// The table that all vCPUs of a machine share, up to what names one of them.
#[derive(Clone, Debug)]
pub struct CpuidTemplate {
    entries: Vec<kvm_cpuid_entry2>,
    cpus: u8,
}

impl CpuidTemplate {
    /// Makes the table for `cpus` vCPUs from `supported` (`KVM_GET_SUPPORTED_CPUID`). `tsc_deadline` says whether KVM
    /// has the APIC's deadline timer (`KVM_CAP_TSC_DEADLINE_TIMER`), which that table never says.
    pub fn new(supported: &[kvm_cpuid_entry2], cpus: u8, tsc_deadline: bool) -> Result<Self, CpuidError> {
        if !(1..=MAX_CPUS).contains(&cpus) {
            return Err(CpuidError::Cpus { cpus });
        }
        for leaf in [0, 1] {
            if !supported.iter().any(|e| e.function == leaf) {
                return Err(CpuidError::NoLeaf { leaf });
            }
        }
        let amd = is_amd(supported);
        // Topology leaves are written anew, one entry per level; 0x8000_0026 is AMD's newer form of 0xb, which guests
        // fall back to.
        let mut entries: Vec<_> =
            supported.iter().filter(|e| !matches!(e.function, 0xb | 0x1f | 0x8000_0026)).copied().collect();
        for entry in &mut entries {
            describe_machine(entry, cpus, tsc_deadline, amd);
        }
        for leaf in [0xb, 0x1f] {
            if supported.iter().any(|e| e.function == leaf) {
                entries.extend(levels(leaf, cpus));
            }
        }
        Ok(Self { entries, cpus })
    }

    /// The table as a state has it.
    pub fn save(&self) -> CpuidStateV1 {
        CpuidStateV1 { entries: self.entries.clone() }
    }

    /// The table of a machine that was saved, if this host, whose own is `self`, has every feature that the guest has been told of.
    ///
    /// # Errors
    /// When the processor is another one.
    pub fn restore(&self, saved: CpuidStateV1) -> Result<Self, CpuidError> {
        let mut lost = Vec::new();
        for entry in &saved.entries {
            let here = self.entries.iter().find(|e| (e.function, e.index) == (entry.function, entry.index));
            let here = here.copied().unwrap_or_default();
            let missing = match (entry.function, entry.index) {
                (0, _) if (entry.ebx, entry.ecx, entry.edx) != (here.ebx, here.ecx, here.edx) => {
                    return Err(CpuidError::OtherVendor);
                }
                (1 | 0x8000_0001, _) => [0, 0, entry.ecx & !here.ecx, entry.edx & !here.edx],
                (7, 0) => [0, entry.ebx & !here.ebx, entry.ecx & !here.ecx, entry.edx & !here.edx],
                (7, _) => [entry.eax & !here.eax, entry.ebx & !here.ebx, entry.ecx & !here.ecx, entry.edx & !here.edx],
                (0xd, 0) => [entry.eax & !here.eax, 0, 0, entry.edx & !here.edx],
                (0xd, 1) => [entry.eax & !here.eax, 0, entry.ecx & !here.ecx, entry.edx & !here.edx],
                (0x4000_0001, _) => [entry.eax & !here.eax, 0, 0, 0],
                (0x8000_0008, _) => [0, entry.ebx & !here.ebx, 0, 0],
                _ => [0; 4],
            };
            if missing != [0; 4] {
                lost.push(format!("{:#x}.{}: {missing:x?}", entry.function, entry.index));
            }
        }
        if lost.is_empty() { Ok(Self { entries: saved.entries, cpus: self.cpus }) } else { Err(CpuidError::Lost(lost)) }
    }

    /// The table of vCPU `index`.
    pub fn vcpu(&self, index: u8) -> Vec<kvm_cpuid_entry2> {
        debug_assert!(index < self.cpus);
        let mut entries = self.entries.clone();
        let apic_id = u32::from(index);
        for entry in &mut entries {
            match entry.function {
                1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | apic_id << 24,
                0xb | 0x1f => entry.edx = apic_id,
                0x8000_001e => {
                    entry.eax = apic_id;
                    // One thread per core (15:8 zero); node 0 of one.
                    entry.ebx = apic_id;
                    entry.ecx = 0;
                }
                _ => {}
            }
        }
        entries
    }

    /// The guest's physical address width.
    pub fn phys_bits(&self) -> u8 {
        let Some(leaf) = self.entries.iter().find(|e| e.function == 0x8000_0008) else {
            return DEFAULT_PHYS_BITS;
        };
        // Bits 23:16: what the hypervisor's page tables reach, where that is less.
        match (leaf.eax as u8, (leaf.eax >> 16) as u8) {
            (bits, 0) => bits,
            (bits, reach) => bits.min(reach),
        }
    }

    /// Gives vCPU `index` its table.
    pub fn apply(&self, index: u8, vcpu: &VcpuFd) -> Result<(), CpuidError> {
        let entries = self.vcpu(index);
        let table = CpuId::from_entries(&entries).map_err(|_| CpuidError::TooMany { entries: entries.len() })?;
        vcpu.set_cpuid2(&table).map_err(CpuidError::Kvm)
    }
}

/// Bits of an APIC id that number the cores of a socket.
fn core_bits(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two().trailing_zeros()
}

fn is_amd(supported: &[kvm_cpuid_entry2]) -> bool {
    supported.iter().any(|e| {
        let name = [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes).concat();
        e.function == 0 && matches!(&name[..], b"AuthenticAMD" | b"HygonGenuine")
    })
}

fn set(word: &mut u32, bit: u32, on: bool) {
    *word = (*word & !(1 << bit)) | u32::from(on) << bit;
}

/// Changes what is the same on every vCPU.
fn describe_machine(entry: &mut kvm_cpuid_entry2, cpus: u8, tsc_deadline: bool, amd: bool) {
    let cores = u32::from(cpus);
    let last_id = cores.next_power_of_two() - 1;
    match entry.function {
        1 => {
            // Cache lines of 8 × 8 bytes, and how many logical processors the socket holds.
            entry.ebx = cores << 16 | 8 << 8;
            set(&mut entry.ecx, 3, false); // MONITOR
            set(&mut entry.ecx, 5, false); // VMX: a guest's own guests are state that no fork could carry
            set(&mut entry.ecx, 15, false); // PDCM
            set(&mut entry.ecx, 21, true); // x2APIC
            set(&mut entry.ecx, 24, tsc_deadline);
            set(&mut entry.ecx, 31, true); // hypervisor
            set(&mut entry.edx, 28, cpus > 1); // HTT: more than one logical processor
        }
        // Cache parameters: level 3 is the socket's, the others are each core's own.
        4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { last_id } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14;
            if entry.function == 4 {
                entry.eax |= last_id << 26;
            }
        }
        // MONITOR parameters, performance counters of Intel and of AMD, SVM.
        5 | 0xa | 0x8000_000a | 0x8000_0022 => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        0x8000_0001 => {
            set(&mut entry.ecx, 2, false); // SVM, as VMX above
            for counters in [23, 24, 28] {
                set(&mut entry.ecx, counters, false);
            }
            if amd {
                // CmpLegacy: the HTT bit means cores, not threads.
                set(&mut entry.ecx, 1, cpus > 1);
            }
        }
        0x4000_0001 => {
            for async_pf in [4, 10, 14] {
                set(&mut entry.eax, async_pf, false);
            }
        }
        0x8000_0008 => entry.ecx = if amd { core_bits(cpus) << 12 | (cores - 1) } else { 0 },
        _ => {}
    }
}

/// The levels of an extended topology leaf: threads, cores, and the end of the list.
fn levels(leaf: u32, cpus: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |index, shift, processors, kind| kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: kind << 8 | index,
        ..Default::default()
    };
    [level(0, 0, 1, TYPE_SMT), level(1, core_bits(cpus), u32::from(cpus), TYPE_CORE), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests;
