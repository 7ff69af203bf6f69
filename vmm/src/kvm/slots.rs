//! Memory slots: where guest RAM appears, and what is shown to the guest beside it.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::sync::Arc;

use civic_devices::virtio::GuestRam;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{VcpuFd, VmFd};
use nix::errno::Errno;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress, MmapRegion,
    VolatileMemory, VolatileMemoryError,
};

use super::KvmError;

/// Lets the guest see every region of `ram`, slot by slot from 0.
///
/// `ram` must be kept until the VM is gone: the vCPU threads and `ram` both live in [`crate::machine::Machine`], which drops the
/// vCPUs first.
pub fn insert_ram(vm: &VmFd, ram: &GuestRam) -> Result<(), KvmError> {
    for (slot, region) in ram.iter().enumerate() {
        let host = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|e| KvmError::Refused { what: "map guest memory", source: std::io::Error::other(e) })?;
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the range is a live mapping of ours of exactly this length (vm-memory made it), and it outlives the VM's
        // vCPUs as the function's contract says.
        unsafe { vm.set_user_memory_region(region) }.map_err(KvmError::refused("map guest memory"))?;
    }
    Ok(())
}

mod ioctl {
    #![allow(missing_docs, clippy::undocumented_unsafe_blocks)] // nix's macro writes the function.

    nix::ioctl_readwrite!(pre_fault_memory, kvm_bindings::KVMIO, 0xd5, kvm_bindings::kvm_pre_fault_memory);
}

/// Maps guest memory before the guest touches it (`KVM_PRE_FAULT_MEMORY`, Linux 6.11; api.rst §4.143): `bytes` from `gpa` on, in whole
/// pages. What is not there is waited for. Returns how many bytes there are to map, all of which were mapped.
///
/// # Errors
/// When the host's KVM cannot.
pub fn map(vcpu: &VcpuFd, gpa: u64, bytes: u64) -> Result<u64, Errno> {
    let mut range = kvm_bindings::kvm_pre_fault_memory { gpa, size: bytes, ..Default::default() };
    while range.size > 0 {
        // SAFETY: the descriptor is a vCPU's, and `range` a live structure of the call's type, which it writes what is left to.
        unsafe { ioctl::pre_fault_memory(vcpu.as_raw_fd(), &raw mut range) }?;
    }
    Ok(bytes)
}

/// Memory beside RAM that the guest sees as long as this lives.
///
/// KVM forgets where all of a guest's memory is when a slot goes (`kvm_mmu_zap_all_fast`), so that thousands of pages fault again: it is kept
/// from one use to the next, and emptied between them.
pub struct Annex {
    vm: Arc<VmFd>,
    slot: u32,
    at: GuestAddress,
    memory: MmapRegion,
}

impl Annex {
    /// Shows `len` zeros at `at`, in the first slot behind those of `ram`.
    ///
    /// # Errors
    /// When there is no memory, or KVM refuses.
    pub fn show(vm: &Arc<VmFd>, ram: &GuestRam, at: GuestAddress, len: u64) -> Result<Self, KvmError> {
        const WHAT: &str = "show the guest more memory";
        let memory = MmapRegion::new(len as usize)
            .map_err(|e| KvmError::Refused { what: WHAT, source: std::io::Error::other(e) })?;
        let this = Self { vm: Arc::clone(vm), slot: ram.num_regions() as u32, at, memory };
        this.set(len).map_err(KvmError::refused(WHAT))?;
        Ok(this)
    }

    /// Writes from its beginning on.
    ///
    /// # Errors
    /// Beyond its end.
    pub fn write(&self, bytes: &[u8]) -> Result<(), VolatileMemoryError> {
        self.memory.as_volatile_slice().write_slice(bytes, 0)
    }

    /// Reads what the guest has made of it.
    ///
    /// # Errors
    /// Beyond its end.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), VolatileMemoryError> {
        self.memory.as_volatile_slice().read_slice(buffer, offset as usize)
    }

    /// Makes it zeros again, that take no memory.
    ///
    /// # Errors
    /// What the system says.
    pub fn clear(&self) -> std::io::Result<()> {
        let (start, len) = (self.memory.as_ptr(), self.memory.size());
        // SAFETY: the range is a live private mapping of ours, accessed by volatile operations only, to which zeros are as good as
        // anything.
        let done = unsafe { libc::madvise(start.cast(), len, libc::MADV_DONTNEED) };
        Ok(Errno::result(done).map(drop)?)
    }

    fn set(&self, len: u64) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot: self.slot,
            flags: 0,
            guest_phys_addr: self.at.raw_value(),
            memory_size: len,
            userspace_addr: self.memory.as_ptr() as u64,
        };
        // SAFETY: the range is a live mapping of ours of this length or none, and dropping takes the slot away before the mapping.
        unsafe { self.vm.set_user_memory_region(region) }
    }
}

impl Drop for Annex {
    fn drop(&mut self) {
        if let Err(e) = self.set(0) {
            // The mapping goes now, and a guest that looks there stops its vCPU: only of a VM that KVM has given up.
            tracing::error!("KVM keeps a memory slot: {e}");
        }
    }
}
