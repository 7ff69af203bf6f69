//! Model-specific registers: at boot, and those that make up a vCPU's state.

use std::collections::BTreeSet;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_PAT: u32 = 0x277;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const STAR: u32 = 0xc000_0081;
pub(super) const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SYSCALL_MASK: u32 = 0xc000_0084;
pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Variable and fixed memory-type ranges, which KVM has and older kernels do not list.
const MTRRS: [std::ops::RangeInclusive<u32>; 4] = [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f];
/// Control, status, address and miscellany of up to 32 machine-check banks, likewise.
const MACHINE_CHECK_BANKS: std::ops::RangeInclusive<u32> = 0x400..=0x47f;
/// The time stamp counter is saved beside these, as all vCPUs' together.
const IA32_TSC: u32 = 0x10;
/// The kernel's limit is 256 (`MAX_IO_MSRS`).
const BATCH: usize = 64;

const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs on, fixed ranges off, write-back where none says otherwise: Linux turns PAT off while MTRRs are off.
const MTRR_WRITE_BACK: u64 = 0x806;
/// The value after power-on (Intel SDM 3A §12.12.4).
const PAT_DEFAULT: u64 = 0x0007_0406_0007_0406;

/// Why the registers cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum MsrError {
    /// The ioctl failed.
    #[error("KVM_SET_MSRS failed")]
    Kvm(#[source] kvm_ioctls::Error),
    /// KVM refused a register that it lists.
    #[error("KVM refuses MSR {index:#x}")]
    Refused {
        /// Which register.
        index: u32,
    },
}

/// What a vCPU starts with, as far as KVM lists the registers (`KVM_GET_MSR_INDEX_LIST`), and the default memory type. The time stamp counter is not
/// among them: KVM starts those of all vCPUs together, and a write would part them.
pub fn boot_msrs(listed: &[u32]) -> Vec<kvm_msr_entry> {
    let listed: BTreeSet<u32> = listed.iter().copied().collect();
    [
        (IA32_SYSENTER_CS, 0),
        (IA32_SYSENTER_ESP, 0),
        (IA32_SYSENTER_EIP, 0),
        (STAR, 0),
        (LSTAR, 0),
        (CSTAR, 0),
        (SYSCALL_MASK, 0),
        (KERNEL_GS_BASE, 0),
        (IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (IA32_PAT, PAT_DEFAULT),
        (IA32_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ]
    .into_iter()
    // Older kernels have the MTRRs but list none of them; without this one Linux would run without PAT.
    .filter(|(index, _)| listed.contains(index) || *index == IA32_MTRR_DEF_TYPE)
    .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() })
    .collect()
}

/// Sets `entries`, all or an error.
pub fn apply(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), MsrError> {
    // A list this short always fits KVM's limit (256).
    for batch in entries.chunks(64) {
        let Ok(msrs) = Msrs::from_entries(batch) else {
            continue;
        };
        let done = vcpu.set_msrs(&msrs).map_err(MsrError::Kvm)?;
        if let Some(refused) = batch.get(done) {
            return Err(MsrError::Refused { index: refused.index });
        }
    }
    Ok(())
}

/// The registers that a vCPU's state has: all that KVM lists (`KVM_GET_MSR_INDEX_LIST`, its own paravirtual ones among them) and
/// those it is known to have without listing them, without the time stamp counter.
pub fn saved_msrs(listed: &[u32]) -> Vec<u32> {
    let unlisted = MTRRS.into_iter().flatten().chain(MACHINE_CHECK_BANKS).chain([IA32_MTRR_DEF_TYPE, IA32_PAT]);
    let all: BTreeSet<u32> = listed.iter().copied().chain(unlisted).filter(|index| *index != IA32_TSC).collect();
    all.into_iter().collect()
}

/// The values of `indices`; a register that KVM does not give is left out.
///
/// # Errors
/// When the call itself fails.
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, kvm_ioctls::Error> {
    let mut values = Vec::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let entries: Vec<_> = batch.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let Ok(mut msrs) = Msrs::from_entries(&entries) else { break };
        let done = vcpu.get_msrs(&mut msrs)?;
        values.extend(&msrs.as_slice()[..done]);
        // KVM stops at the first one that it does not have.
        rest = &rest[if done < batch.len() { done + 1 } else { done }..];
    }
    Ok(values)
}

/// Sets `entries`; returns the first that KVM refuses although it has another value now. One that it refuses to set to the value it
/// has is read-only, and right.
///
/// # Errors
/// When the call itself fails.
pub fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<Option<kvm_msr_entry>, kvm_ioctls::Error> {
    let mut rest = entries;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let Ok(msrs) = Msrs::from_entries(batch) else { break };
        let done = vcpu.set_msrs(&msrs)?;
        if let Some(refused) = batch.get(done) {
            let now = read(vcpu, &[refused.index])?;
            if now.first().is_none_or(|now| now.data != refused.data) {
                return Ok(Some(*refused));
            }
        }
        rest = &rest[if done < batch.len() { done + 1 } else { done }..];
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_only_what_kvm_lists() {
        let indices = |listed: &[u32]| -> Vec<u32> { boot_msrs(listed).iter().map(|e| e.index).collect() };
        assert_eq!(indices(&[]), [IA32_MTRR_DEF_TYPE]);
        assert_eq!(indices(&[IA32_PAT, 0x10, LSTAR]), [LSTAR, IA32_PAT, IA32_MTRR_DEF_TYPE]);
        let pat = boot_msrs(&[IA32_PAT])[0];
        assert_eq!(pat.data, PAT_DEFAULT);
    }
}
