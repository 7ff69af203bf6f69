//! Bus 0 and the two ways into its configuration space.

use std::sync::{Arc, Mutex, MutexGuard, Weak};

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::config::{ConfigSpace, Identity};
use super::{BarWindow, Function, Slot};
use crate::bus::{Bus, BusDevice};

/// Devices on the bus.
pub const SLOTS: usize = 32;
/// Bytes of ECAM for one bus: 32 devices, 8 functions, 4 KiB each.
pub const ECAM_LEN: u64 = 1 << 20;
/// First of the eight configuration ports.
pub const PORTS: u16 = 0xcf8;
/// How many ports there are.
pub const PORTS_LEN: u64 = 8;
const RESET_CONTROL: u64 = 1;
/// "Reset CPU" of the reset control register (also named in the FADT).
const RESET_CPU: u8 = 1 << 2;

struct Occupant {
    function: Arc<dyn Function>,
    mapped: Vec<BarWindow>,
}

/// Why a function cannot be plugged.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SlotError {
    /// The slot holds a function already, or does not exist.
    #[error("slot {0} is taken")]
    Taken(Slot),
    /// None is free for it.
    #[error("the PCI bus has no free slot of its {SLOTS}")]
    Full,
}

/// The PCI root complex. Whoever makes it keeps it: neither of the two ways in does, since a mapped BAR on the bus keeps its function,
/// and the root keeps the bus.
pub struct PciRoot {
    /// Lock order: a slot's lock before the MMIO bus's table and before the function's own locks.
    slots: [Mutex<Option<Occupant>>; SLOTS],
    bridge: Arc<HostBridge>,
    /// The address register of the configuration ports.
    address: Mutex<u32>,
    mmio: Arc<Bus>,
}

/// The root's own saved registers; functions save theirs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciRootStateV1 {
    /// The host bridge's 256 bytes of configuration space.
    pub bridge: Vec<u8>,
    /// The address last written to port 0xcf8.
    pub config_address: u32,
}

/// The host bridge itself, in slot 0.
struct HostBridge(Mutex<ConfigSpace>);

impl Function for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).read(usize::from(offset), data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).write(usize::from(offset), data);
    }
    fn decoded(&self) -> Vec<BarWindow> {
        Vec::new()
    }
    fn moved(&self, _: u8, _: Option<u64>) {}
    fn bar_read(&self, _: u8, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&self, _: u8, _: u64, _: &[u8]) {}
}

impl PciRoot {
    /// A root with its host bridge in slot 0, whose functions' BARs appear on `mmio`.
    pub fn new(mmio: Arc<Bus>) -> Arc<Self> {
        // Red Hat's generic PCIe host bridge: known to guests, no quirks attached.
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: [0x06, 0, 0],
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        let bridge = Arc::new(HostBridge(Mutex::new(ConfigSpace::new(&identity))));
        let slots = std::array::from_fn(|_| Mutex::new(None));
        let root = Arc::new(Self { slots, bridge: Arc::clone(&bridge), address: Mutex::new(0), mmio });
        *root.slot(0) = Some(Occupant { function: bridge, mapped: Vec::new() });
        root
    }

    fn slot(&self, index: usize) -> MutexGuard<'_, Option<Occupant>> {
        self.slots[index].lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The lowest free slot that is not `unfit`.
    ///
    /// # Errors
    /// When there is none.
    pub fn free_slot(&self, unfit: impl Fn(Slot) -> bool) -> Result<Slot, SlotError> {
        let free = |slot: &Slot| self.slot(slot.0.into()).is_none() && !unfit(*slot);
        (0..SLOTS as u8).map(Slot).find(free).ok_or(SlotError::Full)
    }

    /// Plugs `function` into `slot`.
    pub fn plug(&self, slot: Slot, function: Arc<dyn Function>) -> Result<(), SlotError> {
        if usize::from(slot.0) >= SLOTS {
            return Err(SlotError::Taken(slot));
        }
        let mut place = self.slot(usize::from(slot.0));
        if place.is_some() {
            return Err(SlotError::Taken(slot));
        }
        *place = Some(Occupant { function, mapped: Vec::new() });
        Ok(())
    }

    /// Takes what is in `slot` off the bus: from now on the guest finds nothing there. What it was doing goes on.
    pub fn unplug(&self, slot: Slot) -> Option<Arc<dyn Function>> {
        if usize::from(slot.0) >= SLOTS {
            return None;
        }
        let mut place = self.slot(slot.0.into());
        let mut occupant = place.take()?;
        self.remap(slot, &mut occupant, Vec::new());
        Some(occupant.function)
    }

    /// Whether there is something in `slot`.
    pub fn holds(&self, slot: Slot) -> bool {
        usize::from(slot.0) < SLOTS && self.slot(slot.0.into()).is_some()
    }

    /// The bridge's registers and the configuration address.
    pub fn save(&self) -> PciRootStateV1 {
        let bridge = self.bridge.0.lock().unwrap_or_else(|e| e.into_inner()).save();
        PciRootStateV1 { bridge, config_address: *self.address() }
    }

    /// Takes over what [`PciRoot::save`] gave; false, with nothing changed, when it is of another bridge.
    #[must_use]
    pub fn restore(&self, saved: &PciRootStateV1) -> bool {
        let same = self.bridge.0.lock().unwrap_or_else(|e| e.into_inner()).restore(&saved.bridge);
        if same {
            *self.address() = saved.config_address;
        }
        same
    }

    fn address(&self) -> MutexGuard<'_, u32> {
        self.address.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Puts the BARs of a function on the bus that decodes them from the start: its configuration space was restored.
    pub fn settle(&self, slot: Slot) {
        if let Some(occupant) = self.slots.get(usize::from(slot.0)).and(self.slot(slot.0.into()).as_mut()) {
            let wanted = occupant.function.decoded();
            self.remap(slot, occupant, wanted);
        }
    }

    fn config_read(&self, slot: usize, offset: u16, data: &mut [u8]) {
        match &*self.slot(slot) {
            Some(occupant) => occupant.function.config_read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn config_write(&self, slot: usize, offset: u16, data: &[u8]) {
        let mut place = self.slot(slot);
        let Some(occupant) = place.as_mut() else { return };
        occupant.function.config_write(offset, data);
        let wanted = occupant.function.decoded();
        if wanted != occupant.mapped {
            self.remap(Slot(slot as u8), occupant, wanted);
        }
    }

    fn remap(&self, slot: Slot, occupant: &mut Occupant, wanted: Vec<BarWindow>) {
        for old in occupant.mapped.iter().filter(|w| !wanted.contains(w)) {
            occupant.function.moved(old.bar, None);
            self.mmio.remove(old.base);
        }
        occupant.mapped.retain(|w| wanted.contains(w));
        for new in wanted {
            if occupant.mapped.contains(&new) {
                continue;
            }
            let region = Arc::new(BarRegion { function: Arc::clone(&occupant.function), bar: new.bar });
            match self.mmio.insert(new.base, new.len, region) {
                Ok(()) => {
                    occupant.function.moved(new.bar, Some(new.base));
                    occupant.mapped.push(new);
                }
                // On hardware two devices would answer at once. Here the first keeps the place.
                Err(e) => warn!(%slot, bar = new.bar, "the guest put a BAR where it cannot be: {e}"),
            }
        }
    }
}

struct BarRegion {
    function: Arc<dyn Function>,
    bar: u8,
}

impl BusDevice for BarRegion {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.bar_read(self.bar, offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(self.bar, offset, data);
    }
}

/// Memory-mapped configuration of bus 0. Like [`ConfigPorts`] it does not keep the root, which keeps the bus that it is on.
pub struct Ecam(Weak<PciRoot>);

impl Ecam {
    /// A window into `root`.
    pub fn new(root: &Arc<PciRoot>) -> Self {
        Self(Arc::downgrade(root))
    }

    /// Slot and register, or none for functions 1 to 7 and for accesses that cross a function's 4 KiB.
    fn decode(offset: u64, len: usize) -> Option<(usize, u16)> {
        let slot = (offset >> 15) as usize;
        let function = offset >> 12 & 7;
        let register = offset as usize & 0xfff;
        (slot < SLOTS && function == 0 && register + len <= 4096).then_some((slot, register as u16))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (Self::decode(offset, data.len()), self.0.upgrade()) {
            (Some((slot, register)), Some(root)) => root.config_read(slot, register, data),
            _ => data.fill(0xff),
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        if let (Some((slot, register)), Some(root)) = (Self::decode(offset, data.len()), self.0.upgrade()) {
            root.config_write(slot, register, data);
        }
    }
}

/// Ports 0xcf8–0xcff: configuration mechanism 1, with the reset control register in its midst at 0xcf9.
pub struct ConfigPorts {
    root: Weak<PciRoot>,
    reset: Box<dyn Fn() + Send + Sync>,
}

impl ConfigPorts {
    /// Ports into `root`; `reset` is called when the guest writes "reset CPU".
    pub fn new(root: &Arc<PciRoot>, reset: impl Fn() + Send + Sync + 'static) -> Self {
        Self { root: Arc::downgrade(root), reset: Box::new(reset) }
    }

    fn target(root: &PciRoot, offset: u64, len: usize) -> Option<(usize, u16)> {
        let address = *root.address();
        let (bus, function) = (address >> 16 & 0xff, address >> 8 & 7);
        let register = (address & 0xfc) as u16 + (offset as u16 & 3);
        let enabled = address >> 31 == 1;
        let fits = usize::from(register & 3) + len <= 4;
        (enabled && bus == 0 && function == 0 && fits).then_some(((address >> 11 & 0x1f) as usize, register))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some(root) = self.root.upgrade() else { return };
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&root.address().to_le_bytes()),
            (RESET_CONTROL, 1) => data[0] = 0,
            (4..8, _) => {
                if let Some((slot, register)) = Self::target(&root, offset, data.len()) {
                    root.config_read(slot, register, data);
                }
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(root) = self.root.upgrade() else { return };
        match (offset, data) {
            (0, &[a, b, c, d]) => *root.address() = u32::from_le_bytes([a, b, c, d]),
            (RESET_CONTROL, &[value]) if value & RESET_CPU != 0 => (self.reset)(),
            (4..8, _) => {
                if let Some((slot, register)) = Self::target(&root, offset, data.len()) {
                    root.config_write(slot, register, data);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Card {
        config: Mutex<ConfigSpace>,
        moves: Mutex<Vec<Option<u64>>>,
    }
    impl Card {
        fn new(base: u64) -> Arc<Self> {
            let identity =
                Identity { vendor: 1, device: 2, revision: 0, class: [2, 0, 0], subsystem_vendor: 0, subsystem: 0 };
            let mut config = ConfigSpace::new(&identity);
            config.add_bar(0, base, 0x1000);
            Arc::new(Self { config: Mutex::new(config), moves: Mutex::default() })
        }
    }
    impl Function for Card {
        fn config_read(&self, offset: u16, data: &mut [u8]) {
            self.config.lock().unwrap().read(usize::from(offset), data);
        }
        fn config_write(&self, offset: u16, data: &[u8]) {
            self.config.lock().unwrap().write(usize::from(offset), data);
        }
        fn decoded(&self) -> Vec<BarWindow> {
            self.config.lock().unwrap().decoded()
        }
        fn moved(&self, _: u8, base: Option<u64>) {
            self.moves.lock().unwrap().push(base);
        }
        fn bar_read(&self, _: u8, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8 + 1);
        }
        fn bar_write(&self, _: u8, _: u64, _: &[u8]) {}
    }

    #[test]
    fn the_guest_moves_a_bar_through_ports_and_ecam() {
        let mmio = Arc::new(Bus::new());
        let root = PciRoot::new(mmio.clone());
        assert_eq!(root.free_slot(|_| false), Ok(Slot(1)));
        assert_eq!(root.free_slot(|slot| slot.0 < 4), Ok(Slot(4)));
        assert_eq!(root.free_slot(|_| true), Err(SlotError::Full));
        let card = Card::new(0xc000_0000);
        root.plug(Slot(3), card.clone()).unwrap();
        assert_eq!(root.plug(Slot(3), card.clone()), Err(SlotError::Taken(Slot(3))));
        let ports = ConfigPorts::new(&root, || ());
        let ecam = Ecam::new(&root);

        let mut id = [0; 4];
        ports.write(0, &0x8000_1800u32.to_le_bytes());
        ports.read(4, &mut id);
        assert_eq!(id, [1, 0, 2, 0]);
        ecam.read(3 << 15, &mut id);
        assert_eq!(id, [1, 0, 2, 0]);
        ecam.read(4 << 15, &mut id);
        assert_eq!(id, [0xff; 4]);

        let mut byte = [0];
        assert!(!mmio.read(0xc000_0005, &mut byte));
        ecam.write(3 << 15 | 4, &[2, 0]);
        assert!(mmio.read(0xc000_0005, &mut byte));
        assert_eq!(byte, [6]);
        ecam.write(3 << 15 | 0x10, &0xd000_0000u32.to_le_bytes());
        assert!(!mmio.read(0xc000_0005, &mut byte));
        assert!(mmio.read(0xd000_0005, &mut byte));
        assert_eq!(*card.moves.lock().unwrap(), [Some(0xc000_0000), None, Some(0xd000_0000)]);
    }

    #[test]
    fn two_bars_at_one_place_leave_the_first() {
        let mmio = Arc::new(Bus::new());
        let root = PciRoot::new(mmio.clone());
        let (first, second) = (Card::new(0xc000_0000), Card::new(0xc000_0000));
        root.plug(Slot(1), first.clone()).unwrap();
        root.plug(Slot(2), second.clone()).unwrap();
        let ecam = Ecam::new(&root);
        ecam.write(1 << 15 | 4, &[2, 0]);
        ecam.write(2 << 15 | 4, &[2, 0]);
        assert!(second.moves.lock().unwrap().is_empty());
        // The second gets its place once the first has left.
        ecam.write(1 << 15 | 4, &[0, 0]);
        ecam.write(2 << 15 | 4, &[2, 0]);
        assert_eq!(*second.moves.lock().unwrap(), [Some(0xc000_0000)]);
    }

    #[test]
    fn what_is_unplugged_leaves_nothing_behind() {
        let mmio = Arc::new(Bus::new());
        let root = PciRoot::new(mmio.clone());
        let card = Card::new(0xc000_0000);
        root.plug(Slot(4), card.clone()).unwrap();
        let ecam = Ecam::new(&root);
        ecam.write(4 << 15 | 4, &[2, 0]);
        assert!(root.unplug(Slot(4)).is_some() && root.unplug(Slot(4)).is_none() && root.unplug(Slot(40)).is_none());
        assert!(!root.holds(Slot(4)) && root.holds(Slot(0)) && !root.holds(Slot(40)));
        let mut id = [0; 4];
        ecam.read(4 << 15, &mut id);
        assert_eq!(id, [0xff; 4]);
        assert!(!mmio.read(0xc000_0005, &mut [0]));
        assert_eq!(*card.moves.lock().unwrap(), [Some(0xc000_0000), None]);
        drop(ecam);
        drop(root);
        assert_eq!(Arc::strong_count(&card), 1);
        let next = Card::new(0xc000_0000);
        let root = PciRoot::new(mmio);
        root.plug(Slot(4), next).unwrap();
        Ecam::new(&root).write(4 << 15 | 4, &[2, 0]);
    }

    #[test]
    fn only_the_reset_bit_resets() {
        let hits = Arc::new(Mutex::new(0));
        let root = PciRoot::new(Arc::new(Bus::new()));
        let count = hits.clone();
        let ports = ConfigPorts::new(&root, move || *count.lock().unwrap() += 1);
        ports.write(1, &[2]);
        ports.write(1, &[6]);
        ports.write(0, &6u32.to_le_bytes());
        assert_eq!(*hits.lock().unwrap(), 1);
    }
}
