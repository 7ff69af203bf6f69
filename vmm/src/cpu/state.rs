//! A vCPU's whole state, saved from a parked one and given to a new one.
//!
//! The order of restoring matters: identification first, since KVM checks later values against it; the special registers (APIC base,
//! x2APIC mode) before the local APIC; the local APIC before the model-specific registers, of which the deadline timer needs it in its mode
//! and the time stamp counter in place; pending events last. Linux `Documentation/virt/kvm/api.rst`.
//!
//! Time: the counters of all vCPUs stay as far apart as they were, and none goes back. Where KVM lets the offsets be set
//! (`KVM_VCPU_TSC_OFFSET`, Linux 5.16) this is exact; before, KVM itself aligns counters that are set within a second.

use kvm_bindings::{
    KVM_CAP_XSAVE2, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::msr;
use crate::state::Section;

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// The classical length of the XSAVE area that KVM takes and gives.
const XSAVE_BYTES: usize = 4096;
/// AMX is not offered; without it the area stays below three pages.
const MAX_XSAVE_BYTES: usize = 64 << 10;

/// Why a vCPU cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// An ioctl failed.
    #[error("{ioctl} failed")]
    Kvm {
        /// Which.
        ioctl: &'static str,
        /// With what.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM here does not take a register that was saved.
    #[error("this host's KVM refuses to set MSR {index:#x} to {value:#x}")]
    Msr {
        /// Which register.
        index: u32,
        /// Its saved value.
        value: u64,
    },
    /// The extended state has another length than this host's.
    #[error("the saved XSAVE area has {saved} bytes, this host's {here}: another kind of processor")]
    Xsave {
        /// In the state.
        saved: usize,
        /// Here.
        here: usize,
    },
    /// The counter ran at another frequency.
    #[error("the time stamp counter ran at {saved} kHz, here it runs at {here} kHz and cannot be scaled")]
    Frequency {
        /// In the state.
        saved: u32,
        /// Here.
        here: u32,
    },
}

fn failed(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Kvm { ioctl, source }
}

/// A vCPU, all of it but its identification, which the machine has once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuStateV1 {
    /// Running, halted, waiting for its start-up interrupt.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segment, control and APIC-base registers.
    pub sregs: kvm_sregs,
    /// FPU, SSE, AVX and further: the XSAVE area as KVM gives it.
    pub xsave: Vec<u8>,
    /// XCR0.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// The local APIC's register page.
    pub lapic: kvm_lapic_state,
    /// Pending exceptions, interrupts and NMIs.
    pub events: kvm_vcpu_events,
    /// Model-specific registers without the time stamp counter.
    pub msrs: Vec<kvm_msr_entry>,
    /// The time stamp counter.
    pub tsc: u64,
    /// Its frequency in kHz.
    pub tsc_khz: u32,
    /// What KVM added to the host's counter, where it says.
    pub tsc_offset: Option<u64>,
}

impl Section for VcpuStateV1 {
    const VERSION: u16 = 1;
}

/// CPUID leaf, and its bit in ECX that says that there is SVM (AMD APM 3, appendix E).
const EXTENDED_FEATURES: u32 = 0x8000_0001;
const SVM: u32 = 1 << 2;
/// Of a task state segment's type.
const BUSY: u8 = 2;

/// What is common to saving and restoring all vCPUs of a machine.
#[derive(Clone, Debug)]
pub struct VcpuShape {
    msrs: Vec<u32>,
    xsave_bytes: usize,
    /// The processor's virtualisation is AMD's.
    svm: bool,
}

impl VcpuShape {
    /// Asks KVM which model-specific registers there are and how long the XSAVE area is. `xsave2` is the VM's `KVM_CAP_XSAVE2`.
    ///
    /// # Errors
    /// When KVM does not list its registers.
    pub fn new(kvm: &Kvm, xsave2: i32) -> Result<Self, VcpuStateError> {
        let listed = kvm.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        let xsave_bytes = usize::try_from(xsave2).unwrap_or(0).clamp(XSAVE_BYTES, MAX_XSAVE_BYTES);
        let svm = std::arch::x86_64::__cpuid(EXTENDED_FEATURES).ecx & SVM != 0;
        Ok(Self { msrs: msr::saved_msrs(listed.as_slice()), xsave_bytes, svm })
    }

    /// The capability that [`VcpuShape::new`] wants to know the value of.
    pub const XSAVE2: u64 = KVM_CAP_XSAVE2 as u64;

    /// The state of a vCPU that is not in the guest and has completed its last exit.
    ///
    /// # Errors
    /// When KVM refuses to tell.
    pub fn save(&self, fd: &VcpuFd) -> Result<VcpuStateV1, VcpuStateError> {
        // First: it flushes what an INIT or SIPI that is pending would change.
        let mp_state = fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
        let mut msrs = msr::read(fd, &self.msrs).map_err(failed("KVM_GET_MSRS"))?;
        let tsc = msr::read(fd, &[IA32_TSC]).map_err(failed("KVM_GET_MSRS"))?.first().map_or(0, |entry| entry.data);
        for deadline in msrs.iter_mut().filter(|entry| entry.index == IA32_TSC_DEADLINE) {
            // KVM says zero for a deadline that has just passed: let it pass again rather than never.
            let lapic = fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
            if deadline.data == 0 && lapic_waits_for_deadline(&lapic) {
                deadline.data = tsc;
            }
        }
        Ok(VcpuStateV1 {
            mp_state,
            regs: fd.get_regs().map_err(failed("KVM_GET_REGS"))?,
            sregs: fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?,
            xsave: xsave::get(fd, self.xsave_bytes)?,
            xcrs: fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?,
            debug: fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            lapic: fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
            events: fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?,
            msrs,
            tsc,
            tsc_khz: fd.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?,
            tsc_offset: tsc_offset::get(fd),
        })
    }

    /// Gives `state` to a new vCPU that has its identification. `first` is the state of the machine's first vCPU and, once that is
    /// restored, the offset it got: the others follow it.
    ///
    /// # Errors
    /// When this host cannot carry it.
    pub fn restore(&self, fd: &VcpuFd, state: &VcpuStateV1, clock: &mut ClockLeader) -> Result<(), VcpuStateError> {
        let here = fd.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?;
        // KVM's own tolerance for "the same frequency" (tsc_tolerance_ppm): 250 parts in a million.
        if here.abs_diff(state.tsc_khz) > here / 4000 && fd.set_tsc_khz(state.tsc_khz).is_err() {
            return Err(VcpuStateError::Frequency { saved: state.tsc_khz, here });
        }
        fd.set_mp_state(state.mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
        fd.set_regs(&state.regs).map_err(failed("KVM_SET_REGS"))?;
        fd.set_sregs(&self.special(&state.sregs)).map_err(failed("KVM_SET_SREGS"))?;
        xsave::set(fd, &state.xsave, self.xsave_bytes)?;
        fd.set_xcrs(&state.xcrs).map_err(failed("KVM_SET_XCRS"))?;
        fd.set_debug_regs(&state.debug).map_err(failed("KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(&state.lapic).map_err(failed("KVM_SET_LAPIC"))?;
        clock.follow(fd, state)?;
        let (deadline, others): (Vec<_>, Vec<_>) =
            state.msrs.iter().copied().partition(|entry| entry.index == IA32_TSC_DEADLINE);
        for entries in [others, deadline] {
            if let Some(refused) = msr::write(fd, &entries).map_err(failed("KVM_SET_MSRS"))? {
                return Err(VcpuStateError::Msr { index: refused.index, value: refused.data });
            }
        }
        fd.set_vcpu_events(&state.events).map_err(failed("KVM_SET_VCPU_EVENTS"))
    }
}

impl VcpuShape {
    /// Special registers as this processor keeps them. Intel's wants the task state segment busy; AMD's does not mark it so, where KVM adds
    /// the mark when it is asked (`svm_get_segment`): given back to a processor that QEMU emulates, the guest's programs would have no
    /// I/O port whatever their permissions.
    fn special(&self, saved: &kvm_sregs) -> kvm_sregs {
        let mut sregs = *saved;
        if self.svm {
            sregs.tr.type_ &= !BUSY;
        }
        sregs
    }
}

/// Keeps the vCPUs' time stamp counters together.
#[derive(Clone, Debug, Default)]
pub struct ClockLeader {
    /// The first vCPU's offsets: saved, and here.
    offsets: Option<(u64, u64)>,
}

impl ClockLeader {
    fn follow(&mut self, fd: &VcpuFd, state: &VcpuStateV1) -> Result<(), VcpuStateError> {
        if let (Some((saved, here)), Some(own)) = (self.offsets, state.tsc_offset) {
            let offset = here.wrapping_add(own.wrapping_sub(saved));
            if tsc_offset::set(fd, offset) {
                return Ok(());
            }
        }
        let entry = kvm_msr_entry { index: IA32_TSC, data: state.tsc, ..Default::default() };
        if msr::write(fd, &[entry]).map_err(failed("KVM_SET_MSRS"))?.is_some() {
            return Err(VcpuStateError::Msr { index: IA32_TSC, value: state.tsc });
        }
        if self.offsets.is_none() {
            self.offsets = state.tsc_offset.zip(tsc_offset::get(fd));
        }
        Ok(())
    }
}

/// Whether the timer is unmasked and in TSC-deadline mode (Intel SDM 3A §11.5.4.1).
fn lapic_waits_for_deadline(lapic: &kvm_lapic_state) -> bool {
    const LVT_TIMER: usize = 0x320;
    let byte = |at: usize| lapic.regs[LVT_TIMER + at] as u8;
    byte(2) & 0b111 == 0b100
}

mod xsave {
    //! The XSAVE area, of a length that only the processor knows.
    #![allow(unsafe_code)]

    use kvm_bindings::kvm_xsave2;
    use vmm_sys_util::fam::FamStruct;

    use super::{VcpuFd, VcpuStateError, XSAVE_BYTES, Xsave, failed};

    fn words_beyond(bytes: usize) -> usize {
        bytes.saturating_sub(XSAVE_BYTES).div_ceil(size_of::<<kvm_xsave2 as FamStruct>::Entry>())
    }

    /// The area, `bytes` long: what `KVM_CAP_XSAVE2` said for this VM, at least a page.
    pub fn get(fd: &VcpuFd, bytes: usize) -> Result<Vec<u8>, VcpuStateError> {
        let too_long = |_| VcpuStateError::Xsave { saved: bytes, here: bytes };
        if bytes == XSAVE_BYTES {
            let area = fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?;
            return Ok(area.region.iter().flat_map(|word| word.to_le_bytes()).collect());
        }
        let mut area = Xsave::new(words_beyond(bytes)).map_err(too_long)?;
        // SAFETY: the area has the length that KVM says it needs, and no feature is enabled dynamically afterwards: none of
        // our code asks for permission to use AMX.
        unsafe { fd.get_xsave2(&mut area) }.map_err(failed("KVM_GET_XSAVE2"))?;
        let legacy = area.as_fam_struct_ref().xsave.region.iter();
        let mut all: Vec<u8> = legacy.flat_map(|word| word.to_le_bytes()).collect();
        all.extend(area.as_slice().iter().flat_map(|word| word.to_le_bytes()));
        all.truncate(bytes);
        Ok(all)
    }

    /// Sets the area; `bytes` as in [`get`].
    pub fn set(fd: &VcpuFd, saved: &[u8], bytes: usize) -> Result<(), VcpuStateError> {
        let wrong = || VcpuStateError::Xsave { saved: saved.len(), here: bytes };
        if saved.len() != bytes {
            return Err(wrong());
        }
        let mut area = Xsave::new(words_beyond(bytes)).map_err(|_| wrong())?;
        let word = |bytes: &[u8]| {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            u32::from_le_bytes(word)
        };
        let mut words = saved.chunks(4).map(word);
        for (to, from) in area.as_mut_slice().iter_mut().zip(saved[XSAVE_BYTES..].chunks(4).map(word)) {
            *to = from as _;
        }
        // SAFETY: the length of the flexible part is not changed.
        let header = unsafe { area.as_mut_fam_struct() };
        for to in &mut header.xsave.region {
            *to = words.next().unwrap_or(0);
        }
        // SAFETY: the area has the length that KVM says it reads.
        unsafe { fd.set_xsave2(&area) }.map_err(failed("KVM_SET_XSAVE"))
    }
}

mod tsc_offset {
    //! `KVM_VCPU_TSC_OFFSET`: the vCPU's device attribute, which kvm-ioctls has for other architectures only.
    #![allow(unsafe_code)]

    use std::os::fd::AsRawFd;

    use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
    use vmm_sys_util::ioctl::ioctl_with_ref;
    use vmm_sys_util::ioctl_iow_nr;

    use super::VcpuFd;

    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

    fn attribute(value: *mut u64) -> kvm_device_attr {
        kvm_device_attr { group: KVM_VCPU_TSC_CTRL, attr: u64::from(KVM_VCPU_TSC_OFFSET), addr: value as u64, flags: 0 }
    }

    /// The offset, where KVM has the attribute.
    pub fn get(fd: &VcpuFd) -> Option<u64> {
        let mut offset = 0;
        let attr = attribute(&raw mut offset);
        // SAFETY: the descriptor is a vCPU's; the attribute's address is that of a live u64, which the kernel writes.
        let got = unsafe { ioctl_with_ref(&fd.as_raw_fd(), KVM_GET_DEVICE_ATTR(), &attr) };
        (got == 0).then_some(offset)
    }

    /// Sets the offset; false where KVM has no such attribute.
    pub fn set(fd: &VcpuFd, mut offset: u64) -> bool {
        let attr = attribute(&raw mut offset);
        // SAFETY: as in `get`; the kernel reads.
        unsafe { ioctl_with_ref(&fd.as_raw_fd(), KVM_SET_DEVICE_ATTR(), &attr) == 0 }
    }
}
