//! Devices that come and go while the machine is there.
//!
//! ```text
//! plug:     function ─▶ root ─▶ hotplug registers ─▶ (guest looks, and finds it)
//! request:  hotplug registers ─▶ (guest lets go, writes) ─▶ off the bus ─▶ GaveUp ─▶ given_up ─▶ shut_down
//! pull:     off the bus ─▶ hotplug registers ─▶ (guest finds it gone)
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use civic_api::{GuestAnswer, NewDevice, VmConfig};
use civic_devices::acpi::hotplug::{Answer, Hotplug};
use civic_devices::mirror::MirrorSink;
use civic_devices::pci::Slot;
use civic_devices::virtio::net::{Mirror, MirrorId};
use civic_devices::virtio::pci::VirtioPci;
use tracing::warn;

use super::{BuildError, Machine, Made, Plugged, console_device, disk_device, net_device};
use crate::resources::Opened;

/// Where devices are, by id.
pub type Places = BTreeMap<String, Slot>;

/// The slots whose devices come and go: all but those of what every machine has.
pub(super) fn slots(config: &VmConfig, plugged: &[Plugged]) -> u32 {
    let stays = |plugged: &&Plugged| config.device(plugged.function.id()).is_none();
    plugged.iter().filter(stays).fold(!1, |slots, stays| slots & !(1 << stays.slot.0))
}

/// What the guest makes of a device. Outlives it.
pub struct Presence {
    slot: Slot,
    hotplug: Arc<Hotplug>,
    driven: Arc<AtomicBool>,
}

impl Presence {
    pub(super) fn new(plugged: &Plugged, hotplug: &Arc<Hotplug>) -> Self {
        Self { slot: plugged.slot, hotplug: Arc::clone(hotplug), driven: plugged.function.driven() }
    }

    /// Whether it has a driver that uses the device.
    pub fn driver(&self) -> bool {
        self.driven.load(Ordering::Acquire)
    }

    /// What it said when it was last asked about the slot.
    pub fn guest(&self) -> GuestAnswer {
        match self.hotplug.answer(self.slot) {
            Answer::Unasked => GuestAnswer::Unasked,
            Answer::Silent => GuestAnswer::Silent,
            Answer::Heard => GuestAnswer::Heard,
            Answer::Done(0) => GuestAnswer::Done,
            Answer::Done(_) => GuestAnswer::Refused,
        }
    }

    /// Whether it is to give the device up.
    pub fn leaving(&self) -> bool {
        self.hotplug.is_leaving(self.slot)
    }
}

/// A fork's network card that is fed by one of a machine's, as long as this lives.
pub struct Mirrored {
    mirror: Arc<Mirror>,
    number: MirrorId,
}

impl Drop for Mirrored {
    fn drop(&mut self) {
        self.mirror.remove(self.number);
    }
}

impl Machine {
    /// Whether the guest listens to what is plugged in.
    pub fn hears_hotplug(&self) -> bool {
        self.hotplug.is_heard()
    }

    /// Plugs in a device that `config` has already. The guest is told if it is to be.
    ///
    /// # Errors
    /// When no slot is free, or the device cannot be made.
    pub fn plug(
        &mut self,
        config: &VmConfig,
        device: &NewDevice,
        opened: &Opened,
        tell: bool,
    ) -> Result<(), BuildError> {
        let Made { id, device, mirror } = match (device, opened) {
            (NewDevice::Disk(disk), Opened::Disk(opened)) => disk_device(config, disk, &opened.disk)?,
            (NewDevice::Net(net), Opened::Net(links)) => net_device(config, net, links.clone())?,
            (NewDevice::Console(console), Opened::Console(hub)) => console_device(&console.id, hub)?,
            _ => return Err(BuildError::Place("device that was opened")),
        };
        let unfit = |slot: Slot| !self.hotplug.has(slot) || self.hotplug.is_leaving(slot);
        let slot = self.root.free_slot(unfit)?;
        let function = self.sockets.function(&id, device, slot)?;
        self.root.plug(slot, Arc::clone(&function) as _)?;
        self.plugged.push(Plugged { slot, function, mirror });
        if tell {
            self.hotplug.inserted(slot);
        }
        Ok(())
    }

    /// Asks the guest to give up a device; false if there is none of that id.
    pub fn request(&self, id: &str) -> bool {
        let found = self.find(id);
        if let Some(plugged) = found {
            self.hotplug.request(plugged.slot);
        }
        found.is_some()
    }

    /// Takes a device off the bus, whether the guest still uses it or not.
    pub fn pull(&mut self, id: &str, tell: bool) -> Option<Arc<VirtioPci>> {
        let place = self.plugged.iter().position(|plugged| plugged.function.id() == id)?;
        let Plugged { slot, function, .. } = self.plugged.remove(place);
        self.root.unplug(slot);
        if tell {
            self.hotplug.request(slot);
        }
        Some(function)
    }

    /// What the guest has given up since this was last asked: off the bus, and to be shut down.
    pub fn given_up(&mut self) -> Vec<Arc<VirtioPci>> {
        let root = &self.root;
        let gone = self.plugged.extract_if(.., |plugged| !root.holds(plugged.slot));
        gone.map(|plugged| plugged.function).collect()
    }

    /// Feeds what the network card `id` receives to a fork's, as long as what is returned is held. None, and it is said in the log, if that
    /// cannot be.
    pub fn mirror(&self, id: &str, sink: MirrorSink) -> Option<Mirrored> {
        let mirror = self.find(id)?.mirror.clone()?;
        match mirror.add(sink) {
            Ok(number) => Some(Mirrored { mirror, number }),
            Err(e) => {
                warn!(id, "a fork's network card is not fed: {e}");
                None
            }
        }
    }

    /// Where its devices are.
    pub fn places(&self) -> Places {
        self.plugged.iter().map(|plugged| (plugged.function.id().to_owned(), plugged.slot)).collect()
    }

    fn find(&self, id: &str) -> Option<&Plugged> {
        self.plugged.iter().find(|plugged| plugged.function.id() == id)
    }
}
