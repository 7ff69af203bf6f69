//! The generation of a machine: 16 random bytes that are others once the machine lives a second time, be it from a saved
//! state or as a child of another. A guest that sees them change gives up what must not exist twice: the state of its random
//! number generator above all.
//!
//! Microsoft, "Virtual Machine Generation ID" (2012). The bytes lie in a page that the memory map reserves; an ACPI device
//! names their address, and [`gpe::GENERATION_ID`] says that they changed.
//!
//! They are secret, for they seed that generator: nothing else lies in their page, which a guest could let its programs map.

use std::io;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::power::{PowerManagement, gpe};
use crate::entropy;

/// Bytes of a generation id.
pub const LEN: usize = 16;

/// Where a machine's generation id lies.
#[derive(Clone, Copy, Debug)]
pub struct GenerationId {
    address: u64,
}

impl GenerationId {
    /// The id at the guest-physical `address`, a multiple of 8 in RAM that the guest has no other use for.
    pub fn new(address: u64) -> Self {
        Self { address }
    }

    /// Draws the id of a machine that begins its life.
    ///
    /// # Errors
    /// When the host gives no entropy, or the address is not in RAM.
    pub fn install(&self, ram: &GuestMemoryMmap) -> io::Result<()> {
        let mut id = [0; LEN];
        entropy::random(&mut id)?;
        ram.write_slice(&id, GuestAddress(self.address)).map_err(io::Error::other)
    }

    /// Draws another id and tells the guest. No vCPU may run, or it could read half of the old and half of the new.
    ///
    /// # Errors
    /// As [`GenerationId::install`]; the guest is then told nothing.
    pub fn regenerate(&self, ram: &GuestMemoryMmap, power: &PowerManagement) -> io::Result<()> {
        self.install(ram)?;
        power.raise_gpe(gpe::GENERATION_ID);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::power::tests::machine;

    #[test]
    fn every_generation_has_another_id_and_the_guest_is_told() {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let id = || {
            let mut bytes = [0; 3 * LEN];
            ram.read_slice(&mut bytes, GuestAddress(0x20)).unwrap();
            bytes
        };
        let (_, power) = machine();
        let generation = GenerationId::new(0x30);
        generation.install(&ram).unwrap();
        let first = id();
        assert_ne!(first, [0; 3 * LEN]);
        assert!(first[..LEN].iter().chain(&first[2 * LEN..]).all(|byte| *byte == 0), "something beside it was written");
        assert_eq!(power.save().gpe_status, 0, "a boot is no event");

        generation.regenerate(&ram, &power).unwrap();
        assert_ne!(id(), first);
        assert_eq!(power.save().gpe_status, 1 << gpe::GENERATION_ID);
    }

    #[test]
    fn an_address_outside_ram_is_refused() {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let (_, power) = machine();
        assert!(GenerationId::new(0x1000 - 8).regenerate(&ram, &power).is_err());
        assert_eq!(power.save().gpe_status, 0);
    }
}
