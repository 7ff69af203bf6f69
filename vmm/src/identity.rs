//! What tells a guest that it is not the machine it was: its generation id and its clock page.
//!
//! Both lie in guest RAM, so that a restored machine and a child of a fork find their source's; before such a machine first runs,
//! [`Identity::mark_disruption`] makes them its own.

use std::io;
use std::sync::Arc;

use civic_devices::acpi::clock::VmClock;
use civic_devices::acpi::generation::GenerationId;
use civic_devices::acpi::power::PowerManagement;
use civic_devices::virtio::GuestRam;

use crate::layout::{CLOCK_PAGE, GENERATION_PAGE};

/// A machine's identity in its RAM.
pub struct Identity {
    ram: GuestRam,
    power: Arc<PowerManagement>,
    generation: GenerationId,
    clock: VmClock,
}

impl Identity {
    /// The identity that `ram` holds, of a machine that continues another's life.
    pub fn inherited(ram: &GuestRam, power: &Arc<PowerManagement>) -> Self {
        Self {
            ram: Arc::clone(ram),
            power: Arc::clone(power),
            generation: GenerationId::new(GENERATION_PAGE.0),
            clock: VmClock::new(CLOCK_PAGE.0),
        }
    }

    /// Puts a fresh identity into the RAM of a machine that boots.
    ///
    /// # Errors
    /// When the host gives no entropy.
    pub fn fresh(ram: &GuestRam, power: &Arc<PowerManagement>) -> io::Result<Self> {
        let identity = Self::inherited(ram, power);
        identity.generation.install(ram)?;
        identity.clock.install(ram)?;
        Ok(identity)
    }

    /// Makes the machine another one than that whose RAM it continues, and has the guest told when it runs. To be called while
    /// no vCPU runs, after the power management's registers were restored.
    ///
    /// # Errors
    /// When the host gives no entropy; such a machine must not run.
    pub fn mark_disruption(&self) -> io::Result<()> {
        // The clock first: who reseeds on the generation's event may look at the time.
        self.clock.disrupt(&self.ram, &self.power)?;
        self.generation.regenerate(&self.ram, &self.power)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Gpa, Layout, MIN_MEMORY, PAGE_SIZE};
    use crate::memory::Memory;
    use civic_devices::acpi::power::{PowerEvents, gpe};
    use civic_devices::irq::IrqLine;
    use vm_memory::Bytes;

    struct Nobody;

    impl IrqLine for Nobody {
        fn set(&self, _: bool) {}
    }

    impl PowerEvents for Nobody {
        fn power_off(&self) {}
    }

    #[test]
    fn one_ram_begets_different_machines() {
        let memory = Memory::allocate(&Layout::new(MIN_MEMORY).unwrap()).unwrap();
        let page = |at: Gpa| {
            let mut page = vec![0; PAGE_SIZE as usize];
            memory.ram.read_slice(&mut page, at.into()).unwrap();
            page
        };
        let power = || Arc::new(PowerManagement::new(Arc::new(Nobody), Arc::new(Nobody)));
        let source = power();
        Identity::fresh(&memory.ram, &source).unwrap();
        assert_eq!(source.save().gpe_status, 0);
        let mut generations = vec![page(GENERATION_PAGE)];
        let mut clocks = vec![page(CLOCK_PAGE)];
        for _ in 0..2 {
            let restored = power();
            Identity::inherited(&memory.ram, &restored).mark_disruption().unwrap();
            assert_eq!(restored.save().gpe_status, 1 << gpe::GENERATION_ID | 1 << gpe::CLOCK);
            generations.push(page(GENERATION_PAGE));
            clocks.push(page(CLOCK_PAGE));
        }
        for pages in [generations, clocks] {
            assert!(pages[0] != pages[1] && pages[1] != pages[2] && pages[0] != pages[2]);
        }
    }
}
