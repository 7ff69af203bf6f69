//! What has to be known of one vCPU (Intel SDM volume 3: "Control Registers", "Interrupt Descriptor Table", "SYSCALL and SYSRET").

use crate::memory::Gva;

const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

/// Registers of one vCPU, as KVM gives them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// Page table root, with its flags or PCID.
    pub cr3: u64,
    /// Paging mode.
    pub cr4: u64,
    /// `MSR_EFER`.
    pub efer: u64,
    /// Where the interrupt descriptor table is.
    pub idt_base: Gva,
    /// Its length in bytes, less one.
    pub idt_limit: u16,
    /// The active GS base.
    pub gs_base: u64,
    /// `MSR_KERNEL_GS_BASE`: the one that SWAPGS would make active.
    pub kernel_gs_base: u64,
    /// `MSR_LSTAR`: where SYSCALL enters the kernel.
    pub lstar: Gva,
    /// The next instruction.
    pub rip: Gva,
    /// The stack.
    pub rsp: Gva,
    /// Privilege level: 0 in the kernel, 3 in programs.
    pub cpl: u8,
}

impl Registers {
    /// Levels of page tables, if the vCPU runs in 64-bit mode.
    pub fn levels(&self) -> Option<u8> {
        let long = self.efer & EFER_LMA != 0 && self.cr4 & CR4_PAE != 0;
        long.then_some(if self.cr4 & CR4_LA57 != 0 { 5 } else { 4 })
    }

    /// The kernel's GS base, on which its per-CPU variables are.
    ///
    /// Programs may set theirs to anything (`WRGSBASE`), so for a vCPU in a program the other one counts, whatever this one looks
    /// like. In the kernel it is the active one, but in the few instructions before `SWAPGS`, when that is still the program's.
    pub fn kernel_gs(&self) -> u64 {
        let kernel_half = |base: u64| base >> 63 == 1;
        if self.cpl == 0 && kernel_half(self.gs_base) { self.gs_base } else { self.kernel_gs_base }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_need_long_mode() {
        let registers = |cr4, efer| Registers { cr4, efer, ..Default::default() };
        assert_eq!(registers(CR4_PAE, EFER_LMA).levels(), Some(4));
        assert_eq!(registers(CR4_PAE | CR4_LA57, EFER_LMA).levels(), Some(5));
        assert_eq!(registers(CR4_PAE, 0).levels(), None);
        assert_eq!(registers(0, EFER_LMA).levels(), None);
    }

    #[test]
    fn a_programs_gs_is_not_the_kernels() {
        let kernel = 0xffff_8880_3ec0_0000;
        let registers = |cpl, gs_base, kernel_gs_base| Registers { cpl, gs_base, kernel_gs_base, ..Default::default() };
        assert_eq!(registers(0, kernel, 0x7000).kernel_gs(), kernel);
        assert_eq!(registers(0, 0x7000, kernel).kernel_gs(), kernel);
        assert_eq!(registers(3, 0xffff_8880_0000_0000, kernel).kernel_gs(), kernel);
    }
}
