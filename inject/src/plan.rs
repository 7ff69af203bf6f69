//! All that is needed of a kernel to start programs in it, small enough to be handed on: a fork's kernel is its source's, so whoever is
//! forked need not read tens of megabytes of its memory to find the same again.

use civic_guest::entry::{SlotError, code};
use civic_guest::kernel::Kernel;
use civic_guest::memory::{Gva, PhysicalMemory};
use civic_guest::paging::KernelImage;
use serde::{Deserialize, Serialize};

use crate::targets::{Targets, Unfit};

/// The function whose entry gets the trap: every task comes by that is not running for ever.
pub const CROSSROADS: &str = "schedule";

/// Bytes of a function by which it is recognized. No tracer writes them: they are behind its place, and that of the landing pad.
const TELLING: usize = 16;
const BEHIND: u64 = 9;

/// Why a kernel cannot be planned with.
#[derive(Debug, thiserror::Error)]
pub enum NoPlan {
    /// It lacks something.
    #[error(transparent)]
    Unfit(#[from] Unfit),
    /// Its functions cannot be read.
    #[error(transparent)]
    Slot(#[from] SlotError),
}

/// Where in a kernel what is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Where its image is.
    pub image: KernelImage,
    /// What is called and read.
    pub targets: Targets,
    /// Where tasks come by.
    pub crossroads: Gva,
    /// What is there, and at the first function that is called.
    signs: [[u8; TELLING]; 2],
}

impl Plan {
    /// Of a kernel in memory.
    ///
    /// # Errors
    /// What it lacks.
    pub fn of(kernel: &Kernel, memory: &dyn PhysicalMemory) -> Result<Self, NoPlan> {
        let (targets, image) = (Targets::of(kernel)?, *kernel.image());
        let missing = |source| Unfit::Function { name: CROSSROADS, source };
        let crossroads = kernel.function(CROSSROADS).map_err(missing)?;
        let signs = signs(&image, memory, &targets, crossroads)?;
        Ok(Self { image, targets, crossroads, signs })
    }

    /// Whether the kernel in memory is still the one that this is of: a guest may have put another in its place (kexec).
    pub fn fits(&self, memory: &dyn PhysicalMemory) -> bool {
        signs(&self.image, memory, &self.targets, self.crossroads).is_ok_and(|signs| signs == self.signs)
    }
}

fn signs(
    image: &KernelImage,
    memory: &dyn PhysicalMemory,
    targets: &Targets,
    crossroads: Gva,
) -> Result<[[u8; TELLING]; 2], SlotError> {
    let sign = |function: Gva| code(image, memory, function.plus(BEHIND));
    Ok([sign(crossroads)?, sign(targets.call_usermodehelper_setup)?])
}
