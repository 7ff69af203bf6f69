//! The hypervisor: a KVM VM with its in-kernel interrupt controllers, memory slots, doorbells and interrupt sources.
//!
//! Invariant: this and [`crate::vcpu`] are the only modules that speak to KVM while a guest runs.
//!
//! Linux `Documentation/virt/kvm/api.rst`.

pub mod interrupts;
pub mod slots;
pub mod state;

use std::io;
use std::path::Path;
use std::sync::Arc;

use civic_devices::pci::Doorbells;
use kvm_bindings::{KVM_API_VERSION, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::layout;

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` does not open.
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// It speaks another version of the API than every kernel since 2.6.22.
    #[error("/dev/kvm has API version {0}, not {KVM_API_VERSION}")]
    Version(i32),
    /// It lacks what we cannot do without.
    #[error("this host's KVM lacks {0:?}")]
    Lacks(Cap),
    /// It lacks `KVM_CAP_IOEVENTFD_ANY_LENGTH` (Linux 4.4).
    #[error("this host's KVM lacks doorbells of any length")]
    NoAnyLength,
    /// A call that sets the VM up failed.
    #[error("KVM refuses to {what}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

impl KvmError {
    /// For `map_err`: names what KVM refused.
    pub fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |e| Self::Refused { what, source: e.into() }
    }
}

/// Not among [`Cap`]'s.
const IOEVENTFD_ANY_LENGTH: u64 = kvm_bindings::KVM_CAP_IOEVENTFD_ANY_LENGTH as u64;

const NEEDED: [Cap; 7] =
    [Cap::Irqchip, Cap::UserMemory, Cap::Irqfd, Cap::Ioeventfd, Cap::Pit2, Cap::ImmediateExit, Cap::ExtCpuid];

/// Opens KVM and checks that it can carry a machine.
pub fn open() -> Result<Kvm, KvmError> {
    if let Err(e) = std::fs::OpenOptions::new().read(true).write(true).open(Path::new("/dev/kvm")) {
        return Err(KvmError::Open(e));
    }
    let kvm = Kvm::new().map_err(|e| KvmError::Open(e.into()))?;
    match kvm.get_api_version() {
        version if version == KVM_API_VERSION as i32 => {}
        version => return Err(KvmError::Version(version)),
    }
    match NEEDED.into_iter().find(|cap| !kvm.check_extension(*cap)) {
        Some(cap) => Err(KvmError::Lacks(cap)),
        None if kvm.check_extension_raw(IOEVENTFD_ANY_LENGTH) == 0 => Err(KvmError::NoAnyLength),
        None => Ok(kvm),
    }
}

/// A VM with PIC, IOAPIC and PIT in the kernel, no memory and no vCPU yet.
pub fn create_vm(kvm: &Kvm) -> Result<Arc<VmFd>, KvmError> {
    let vm = kvm.create_vm().map_err(KvmError::refused("create a VM"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP.0).map_err(KvmError::refused("place the identity map"))?;
    vm.set_tss_address(layout::KVM_TSS.0 as usize).map_err(KvmError::refused("place the TSS"))?;
    vm.create_irq_chip().map_err(KvmError::refused("create the interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(KvmError::refused("create the timer"))?;
    Ok(Arc::new(vm))
}

/// Doorbells by ioeventfd: a write of any size to the address signals, with no exit to this process.
pub struct IoEvents(pub Arc<VmFd>);

impl Doorbells for IoEvents {
    fn bind(&self, address: u64, kick: &EventFd) -> io::Result<()> {
        Ok(self.0.register_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }

    fn unbind(&self, address: u64, kick: &EventFd) -> io::Result<()> {
        Ok(self.0.unregister_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }
}
