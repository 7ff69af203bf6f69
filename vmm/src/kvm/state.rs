//! What the VM itself holds: the in-kernel interrupt controllers, the timer and the guest's clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::KvmError;
use crate::state::Section;

/// A VM's interrupt controllers, timer and clock.
#[derive(Clone, Serialize, Deserialize)]
pub struct KvmStateV1 {
    /// The 8259 pair and the IOAPIC.
    pub chips: [kvm_irqchip; 3],
    /// The 8254.
    pub pit: kvm_pit_state2,
    /// kvmclock in nanoseconds: it goes on from here, so that monotonic time in the guest knows nothing of the time between.
    pub clock_ns: u64,
}

impl Section for KvmStateV1 {
    const VERSION: u16 = 1;
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl KvmStateV1 {
    /// The state of a VM whose vCPUs are parked.
    ///
    /// # Errors
    /// When KVM refuses to tell.
    pub fn save(vm: &VmFd) -> Result<Self, KvmError> {
        let mut chips = CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        for chip in &mut chips {
            vm.get_irqchip(chip).map_err(KvmError::refused("tell its interrupt controllers' state"))?;
        }
        let pit = vm.get_pit2().map_err(KvmError::refused("tell the timer's state"))?;
        let clock = vm.get_clock().map_err(KvmError::refused("tell the guest's clock"))?;
        Ok(Self { chips, pit, clock_ns: clock.clock })
    }

    /// Gives the state to a new VM, whose vCPUs have theirs.
    ///
    /// # Errors
    /// When KVM refuses it.
    pub fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        for (chip, chip_id) in self.chips.iter().zip(CHIPS) {
            let chip = kvm_irqchip { chip_id, ..*chip };
            vm.set_irqchip(&chip).map_err(KvmError::refused("take over the interrupt controllers' state"))?;
        }
        vm.set_pit2(&self.pit).map_err(KvmError::refused("take over the timer's state"))?;
        let clock = kvm_clock_data { clock: self.clock_ns, ..Default::default() };
        vm.set_clock(&clock).map_err(KvmError::refused("take over the guest's clock"))
    }
}
