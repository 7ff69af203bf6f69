//! Memory slots: where guest RAM appears.
#![allow(unsafe_code)]

use civic_devices::virtio::GuestRam;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

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
