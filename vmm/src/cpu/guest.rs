//! What is read of a vCPU to find the guest's kernel.

use civic_guest::memory::Gva;
use civic_guest::paging::AddressSpace;
use civic_guest::registers::Registers;
use kvm_ioctls::{Error, VcpuFd};

use super::msr::{self, KERNEL_GS_BASE, LSTAR};

/// The registers of a vCPU that stands still, on its own thread.
///
/// # Errors
/// What KVM says.
pub fn registers(fd: &VcpuFd) -> Result<Registers, Error> {
    let (regs, sregs) = (fd.get_regs()?, fd.get_sregs()?);
    let msrs = msr::read(fd, &[LSTAR, KERNEL_GS_BASE])?;
    let msr = |index| msrs.iter().find(|msr| msr.index == index).map_or(0, |msr| msr.data);
    Ok(Registers {
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        efer: sregs.efer,
        idt_base: Gva(sregs.idt.base),
        idt_limit: sregs.idt.limit,
        gs_base: sregs.gs.base,
        kernel_gs_base: msr(KERNEL_GS_BASE),
        lstar: Gva(msr(LSTAR)),
        rip: Gva(regs.rip),
        rsp: Gva(regs.rsp),
        cpl: sregs.ss.dpl,
    })
}

/// The address space in which a vCPU runs that stands still, on its own thread; none where it has no 64-bit mode on.
///
/// # Errors
/// What KVM says.
pub fn address_space(fd: &VcpuFd) -> Result<Option<AddressSpace>, Error> {
    let sregs = fd.get_sregs()?;
    let paging = Registers { cr3: sregs.cr3, cr4: sregs.cr4, efer: sregs.efer, ..Registers::default() };
    Ok(AddressSpace::of(&paging))
}
