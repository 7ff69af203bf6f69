//! Devices that come and go while the VM is there.
//!
//! ```text
//! Plug:    thread: open ──▶ Opened ──▶ plug into the machine, configuration and resources grow
//! Unplug:  ask the guest ──▶ GaveUp ──▶ ┐
//!          (by force) pull ────────────▶ ┴ detach: they shrink ──▶ thread: shut down, write back, close ──▶ Closed: answered
//! ```
//!
//! Configuration, resources and machine have the same devices at all times, but for those that the guest has given up and nobody has
//! noticed. While a fork is being made or a save written, what was taken for it must stay: devices then come and go afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use civic_api::{ErrorBody, ErrorCode, NewDevice, RESERVED_IDS, VmConfig, VmState};
use civic_devices::console_hub::ConsoleHub;
use civic_devices::virtio::pci::VirtioPci;
use tracing::{info, warn};

use super::{LAST_WORDS, Message, Supervisor};
use crate::control::{Answer, Reply};
use crate::machine::Machine;
use crate::resources::{Opened, Resources};

/// What a thread has done.
pub enum PlugMessage {
    /// What a device needs was opened, or cannot be.
    Opened { device: NewDevice, opened: Result<Opened, ErrorBody>, reply: Reply },
    /// A device that is gone is closed.
    Closed { id: String, outcome: Result<(), ErrorBody> },
    /// A request for later.
    Unplug { id: String, force: bool, reply: Reply },
}

/// Devices on their way.
#[derive(Default)]
pub struct Plugging {
    opening: BTreeSet<String>,
    /// Devices that are to go, and who waits for that.
    removing: BTreeMap<String, Vec<Reply>>,
    /// Devices that are gone and not closed yet.
    closing: BTreeSet<String>,
    /// For when no fork is being made and nothing is being saved.
    later: Vec<Message>,
}

impl Supervisor {
    /// Starts to plug in a device; the reply comes when it is plugged in, or cannot be.
    pub(super) fn begin_plug(&mut self, device: NewDevice, reply: Reply) {
        if let Err(e) = self.check_plug(&device) {
            let _ = reply.send(Err(e));
            return;
        }
        let id = device.id().to_owned();
        self.plugging.opening.insert(id.clone());
        let (sender, places) = (self.sender.clone(), self.resources.places.clone());
        let open = move || {
            let opened = Opened::new(&device, &places).map_err(ErrorBody::from);
            let _ = sender.send(Message::Plug(PlugMessage::Opened { device, opened, reply }));
        };
        // The reply is lost with the thread; dropping it is answered.
        if let Err(e) = std::thread::Builder::new().name("plug".into()).spawn(open) {
            warn!("cannot start a thread for a device: {e}");
            self.plugging.opening.remove(&id);
        }
    }

    fn check_plug(&self, device: &NewDevice) -> Result<(), ErrorBody> {
        let id = device.id();
        self.check_state("plug a device into")?;
        if self.plugging.opening.contains(id) {
            return Err(ErrorBody::new(ErrorCode::Busy, format!("a device '{id}' is just being plugged in")));
        }
        if self.plugging.closing.contains(id) {
            let error = ErrorBody::new(ErrorCode::Busy, format!("the last device '{id}' is still being closed"));
            return Err(error.with_hint("try again in a moment"));
        }
        self.shared.config().with(device.clone())?;
        self.check_listens("try again when it is up; docs/support.md says what its kernel must have")
    }

    fn check_state(&self, what: &str) -> Result<(), ErrorBody> {
        let state = self.shared.status().state;
        if self.saving.is_some() {
            let error = ErrorBody::new(ErrorCode::WrongState, format!("cannot {what} a VM that is being saved"));
            return Err(error.with_hint("wait until it is saved ('civic info' shows how far it is)"));
        }
        match state {
            VmState::Created | VmState::Running | VmState::Stopping | VmState::Paused => Ok(()),
            VmState::Waiting | VmState::Stopped => {
                Err(ErrorBody::new(ErrorCode::WrongState, format!("cannot {what} a VM that is {state}")))
            }
        }
    }

    /// Refuses if nobody in the guest would ever look.
    fn check_listens(&self, hint: &str) -> Result<(), ErrorBody> {
        let started = self.shared.status().state != VmState::Created;
        if !started || self.machine.as_ref().is_none_or(Machine::hears_hotplug) {
            return Ok(());
        }
        let message =
            "the guest does not listen to devices that come and go: it is still booting, or its kernel has no ACPI";
        Err(ErrorBody::new(ErrorCode::WrongState, message).with_hint(hint))
    }

    pub(super) fn plug_message(&mut self, message: PlugMessage) {
        match message {
            PlugMessage::Closed { id, outcome } => {
                self.plugging.closing.remove(&id);
                for reply in self.plugging.removing.remove(&id).unwrap_or_default() {
                    let _ = reply.send(outcome.clone().map(|()| Answer::Done));
                }
            }
            message if self.must_stay() => self.plugging.later.push(Message::Plug(message)),
            PlugMessage::Opened { device, opened, reply } => {
                self.plugging.opening.remove(device.id());
                let outcome = opened.and_then(|opened| self.plug(&device, opened));
                let _ = reply.send(outcome.map(|()| Answer::Done));
            }
            PlugMessage::Unplug { id, force, reply } => self.begin_unplug(id, force, reply),
        }
    }

    /// Whether devices must stay as they are, because something that was begun counts on them.
    pub(super) fn must_stay(&self) -> bool {
        self.forking || self.injecting || self.saving.is_some()
    }

    /// Comes again when that is over.
    pub(super) fn later(&mut self, message: Message) {
        self.plugging.later.push(message);
    }

    /// It may be over.
    pub(super) fn may_go(&mut self) {
        if !self.must_stay() {
            for message in std::mem::take(&mut self.plugging.later) {
                let _ = self.sender.send(message);
            }
        }
    }

    fn plug(&mut self, device: &NewDevice, opened: Opened) -> Result<(), ErrorBody> {
        let config = self.shared.config().with(device.clone())?;
        let started = self.shared.status().state != VmState::Created;
        let machine = self.machine.as_mut().ok_or_else(|| ErrorBody::internal("there is no machine"))?;
        machine.plug(&config, device, &opened, started)?;
        self.resources.add(opened);
        self.shared.set_config(config);
        self.devices_changed();
        info!(id = device.id(), "plugged in");
        Ok(())
    }

    /// Has a device go; the reply comes when it is closed, or cannot go.
    pub(super) fn begin_unplug(&mut self, id: String, force: bool, reply: Reply) {
        if self.must_stay() && self.saving.is_none() {
            self.plugging.later.push(Message::Plug(PlugMessage::Unplug { id, force, reply }));
            return;
        }
        match self.unplug(&id, force) {
            Ok(gone) => {
                self.plugging.removing.entry(id).or_default().push(reply);
                gone.into_iter().for_each(|function| self.detach(function));
            }
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    /// The device, if it is off the bus already.
    fn unplug(&mut self, id: &str, force: bool) -> Result<Option<Arc<VirtioPci>>, ErrorBody> {
        self.check_state("remove a device from")?;
        if self.shared.config().device(id).is_none() {
            if self.plugging.closing.contains(id) {
                return Ok(None);
            }
            if RESERVED_IDS.contains(&id) {
                let message = format!("'{id}' stays as long as the VM");
                return Err(ErrorBody::new(ErrorCode::InvalidRequest, message)
                    .with_hint("disks, network cards and consoles can be removed"));
            }
            let message = format!("the VM has no device '{id}'");
            return Err(ErrorBody::new(ErrorCode::NotFound, message).with_hint("'civic info' lists them"));
        }
        let started = self.shared.status().state != VmState::Created;
        if started && !force {
            self.check_listens("--force takes the device away all the same: the guest is not asked")?;
        }
        let machine = self.machine.as_mut().ok_or_else(|| ErrorBody::internal("there is no machine"))?;
        if started && !force {
            machine.request(id);
            Ok(None)
        } else {
            Ok(machine.pull(id, started))
        }
    }

    /// What the guest has given up is closed.
    pub(super) fn collect_given_up(&mut self) {
        let gone = self.machine.as_mut().map(Machine::given_up).unwrap_or_default();
        gone.into_iter().for_each(|function| self.detach(function));
    }

    /// Those that were to go need not be asked for any more: the guest is about to reset.
    pub(super) fn pull_leaving(&mut self) {
        let ids: Vec<_> = self.plugging.removing.keys().cloned().collect();
        for id in ids {
            if let Some(function) = self.machine.as_mut().and_then(|machine| machine.pull(&id, false)) {
                self.detach(function);
            }
        }
    }

    /// Closes what was taken off the bus, in a thread: it may have requests in flight, and much to write back.
    fn detach(&mut self, function: Arc<VirtioPci>) {
        let id = function.id().to_owned();
        let config = self.shared.config();
        let opened = self.resources.remove(&config, &id);
        if let (Some(Opened::Disk(disk)), Some(freezable)) = (&opened, &mut self.freezable) {
            let kept = freezable.iter().filter(|freezable| !freezable.is_of(&disk.disk)).cloned().collect();
            *freezable = Arc::new(kept);
        }
        self.shared.set_config(config.without(&id));
        self.plugging.closing.insert(id.clone());
        self.devices_changed();
        info!(id, "removed");
        let (sender, gone) = (self.sender.clone(), id.clone());
        let close = move || {
            function.shut_down();
            drop(function);
            let outcome = close(&id, opened);
            let _ = sender.send(Message::Plug(PlugMessage::Closed { id, outcome }));
        };
        // With the thread goes what it was to close, written back or not; who waits for it hears that something is wrong.
        if let Err(e) = std::thread::Builder::new().name("unplug".into()).spawn(close) {
            warn!(id = gone, "cannot start a thread to close a device: {e}");
            self.plugging.closing.remove(&gone);
            self.plugging.removing.remove(&gone);
        }
    }

    /// What others know of the devices.
    fn devices_changed(&mut self) {
        let Some(machine) = &self.machine else { return };
        let mut status = self.shared.status();
        status.meters = machine.meters().after(&status.meters);
        status.consoles = ports(&self.shared.config(), &self.resources);
        drop(status);
        match serde_json::to_string(&self.inherited()) {
            Ok(config) => self.shared.family.set_config(config),
            Err(e) => warn!("forks do not hear of the devices that changed: {e}"),
        }
    }
}

/// Consoles' ports by name.
pub(super) fn ports(config: &VmConfig, resources: &Resources) -> BTreeMap<String, Arc<ConsoleHub>> {
    let ids = config.consoles.iter().map(|console| console.id.clone());
    ids.zip(resources.consoles.iter().cloned()).collect()
}

fn close(id: &str, opened: Option<Opened>) -> Result<(), ErrorBody> {
    match opened {
        Some(Opened::Disk(disk)) => disk.disk.sync().map_err(|e| {
            warn!(id, "cannot write back what the guest wrote: {e}");
            let message = format!("disk '{id}' is removed, but what the guest wrote last may be lost: {e}");
            ErrorBody::new(ErrorCode::ImageUnusable, message)
        }),
        Some(Opened::Console(hub)) => {
            hub.finish(LAST_WORDS);
            Ok(())
        }
        Some(Opened::Net(_)) | None => Ok(()),
    }
}
