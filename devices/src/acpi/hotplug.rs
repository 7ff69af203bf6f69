//! PCI hotplug by ACPI: how the guest hears that a slot has got a device or is to give one up, and how it gives it up.
//!
//! ```text
//! port    register                                              bytes
//! 0x640   inserted: bit n, look at slot n (write 1 to clear)    4
//! 0x644   wanted back: bit n, eject slot n (write 1 to clear)   4
//! 0x648   eject (write): bit n, slot n is given up              4
//! 0x64c   answer (write): slot << 24 | event << 8 | status      4
//! ```
//!
//! The guest's handler of [`gpe::HOTPLUG`] (in aml.rs) reads the first two, clears what it read, and notifies the slots' devices: Device
//! Check, Eject Request. The device's `_EJ0` writes the third, its `_OST` the last.
//!
//! Invariant: a device is off the bus before the write returns that gives it up. A slot is free for another one only when the guest has
//! been through with ejecting the last: it would eject the next.
//!
//! Lock order: the registers' lock is a leaf but for the power hardware's. `given_up` is called with no lock held.
//!
//! ACPI 6.5 §5.6.6 (notifications), §6.3.3 (`_EJx`), §6.3.5 (`_OST`).

use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::power::{PowerManagement, gpe};
use crate::bus::BusDevice;
use crate::pci::Slot;
use crate::pci::root::SLOTS;

/// First port of the block that [`Hotplug`] decodes.
pub const PORT: u16 = 0x640;
/// How many ports it decodes.
pub const PORTS: u16 = 0x10;

/// Offsets of the registers.
const INSERTED: u64 = 0;
const WANTED: u64 = 4;
const EJECT: u64 = 8;
const ANSWER: u64 = 12;

/// Notifications, and what an answer is to (ACPI 6.5 table 5.166).
pub(crate) const DEVICE_CHECK: u8 = 1;
/// See [`DEVICE_CHECK`].
pub(crate) const EJECT_REQUEST: u8 = 3;

/// What the guest has said of a slot since it was last asked anything about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Answer {
    /// Nothing: it has not been asked.
    #[default]
    Unasked,
    /// Nothing yet.
    Silent,
    /// It has read which slots changed.
    Heard,
    /// It has done what it was asked, or tried to: the status code of its `_OST`, 0 for success.
    Done(u8),
}

/// Saved [`Hotplug`]; what it holds is untrusted when it comes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HotplugStateV1 {
    /// The slots whose devices come and go.
    pub slots: u32,
    /// The first register.
    pub inserted: u32,
    /// The second.
    pub wanted: u32,
    /// Slots that were to be ejected and are not yet.
    pub leaving: u32,
    /// Whether the guest listens.
    pub heard: bool,
}

#[derive(Default)]
struct Registers {
    /// Slots whose devices come and go.
    slots: u32,
    inserted: u32,
    wanted: u32,
    /// The guest was asked to eject these, and has not done it.
    leaving: u32,
    /// It listened before this hardware was restored.
    heard: bool,
    answers: [Answer; SLOTS],
}

/// The registers, a device for [`PORT`] and [`PORTS`].
pub struct Hotplug {
    registers: Mutex<Registers>,
    power: Arc<PowerManagement>,
    given_up: Box<dyn Fn(Slot) + Send + Sync>,
}

fn bit(slot: Slot) -> u32 {
    1u32.checked_shl(slot.0.into()).unwrap_or(0)
}

impl Hotplug {
    /// Registers after power-on, for no slot yet. `given_up` takes a device off the bus, if there is one: it is called from a vCPU's
    /// thread.
    pub fn new(power: Arc<PowerManagement>, given_up: impl Fn(Slot) + Send + Sync + 'static) -> Self {
        Self { registers: Mutex::default(), power, given_up: Box::new(given_up) }
    }

    /// From now on devices come and go in the slots whose bits are set, but for the host bridge's.
    pub fn serve(&self, slots: u32) {
        self.lock().slots = slots & !1;
    }

    /// Whether a slot's devices may come and go.
    pub fn has(&self, slot: Slot) -> bool {
        self.lock().slots & bit(slot) != 0
    }

    /// Whether the guest would eject what is plugged there next.
    pub fn is_leaving(&self, slot: Slot) -> bool {
        self.lock().leaving & bit(slot) != 0
    }

    /// Whether the guest listens: it has found the handler, and enabled its event.
    pub fn is_heard(&self) -> bool {
        self.lock().heard || self.power.is_known(gpe::HOTPLUG)
    }

    /// A device was plugged into `slot`.
    pub fn inserted(&self, slot: Slot) {
        self.ask(slot, |registers, bit| registers.inserted |= bit);
    }

    /// The guest is to give up what is in `slot`, or was: it is gone already.
    pub fn request(&self, slot: Slot) {
        self.ask(slot, |registers, bit| {
            registers.inserted &= !bit;
            registers.wanted |= bit;
            registers.leaving |= bit;
        });
    }

    fn ask(&self, slot: Slot, what: impl FnOnce(&mut Registers, u32)) {
        if !self.has(slot) {
            return;
        }
        let mut registers = self.lock();
        what(&mut registers, bit(slot));
        registers.answers[usize::from(slot.0)] = Answer::Silent;
        drop(registers);
        self.power.raise_gpe(gpe::HOTPLUG);
    }

    /// What the guest has said of it.
    pub fn answer(&self, slot: Slot) -> Answer {
        self.lock().answers.get(usize::from(slot.0)).copied().unwrap_or_default()
    }

    /// The registers at this moment; vCPUs must be paused for it to mean anything.
    pub fn save(&self) -> HotplugStateV1 {
        let registers = self.lock();
        let Registers { slots, inserted, wanted, leaving, .. } = *registers;
        drop(registers);
        HotplugStateV1 { slots, inserted, wanted, leaving, heard: self.is_heard() }
    }

    /// Continues from `state`. Its event comes with the power hardware's own state.
    pub fn restore(&self, state: &HotplugStateV1) {
        let mut registers = self.lock();
        let slots = state.slots & !1;
        registers.slots = slots;
        (registers.inserted, registers.wanted) = (state.inserted & slots, state.wanted & slots);
        registers.leaving = state.leaving & slots;
        registers.heard = state.heard;
        let asked = registers.inserted | registers.leaving;
        for (slot, answer) in registers.answers.iter_mut().enumerate() {
            *answer = if asked >> slot & 1 == 1 { Answer::Silent } else { Answer::Unasked };
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Registers {
    /// The guest has read these.
    fn heard(&mut self, slots: u32) {
        for (slot, answer) in self.answers.iter_mut().enumerate() {
            if slots >> slot & 1 == 1 && *answer == Answer::Silent {
                *answer = Answer::Heard;
            }
        }
    }
}

impl BusDevice for Hotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.lock();
        let value = match offset {
            INSERTED => registers.inserted,
            WANTED => registers.wanted,
            _ => 0,
        };
        for (byte, from) in data.iter_mut().zip(value.to_le_bytes().into_iter().chain(std::iter::repeat(0))) {
            *byte = from;
        }
    }

    /// Whole registers only: nothing of ours writes them otherwise.
    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        let mut registers = self.lock();
        match offset {
            INSERTED => {
                let cleared = registers.inserted & value;
                registers.heard(cleared);
                registers.inserted &= !value;
            }
            WANTED => {
                let cleared = registers.wanted & value;
                registers.heard(cleared);
                registers.wanted &= !value;
            }
            EJECT => {
                let slots = value & registers.slots;
                drop(registers);
                // Off the bus before anybody can hear that it is.
                (0..SLOTS as u8).map(Slot).filter(|slot| bit(*slot) & slots != 0).for_each(&self.given_up);
                let mut registers = self.lock();
                registers.wanted &= !slots;
                registers.leaving &= !slots;
            }
            ANSWER => {
                let [status, event, _, slot] = value.to_le_bytes();
                if let Some(answer) = registers.answers.get_mut(usize::from(slot))
                    && matches!(event, DEVICE_CHECK | EJECT_REQUEST)
                {
                    *answer = Answer::Done(status);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::power::tests::machine;

    struct Guest {
        hotplug: Hotplug,
        power: Arc<PowerManagement>,
        given_up: Arc<Mutex<Vec<Slot>>>,
    }

    fn guest(slots: u32) -> Guest {
        let (_, power) = machine();
        let power = Arc::new(power);
        let given_up = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&given_up);
        let hotplug = Hotplug::new(Arc::clone(&power), move |slot| seen.lock().unwrap().push(slot));
        hotplug.serve(slots);
        Guest { hotplug, power, given_up }
    }

    impl Guest {
        fn read(&self, at: u64) -> u32 {
            let mut bytes = [0; 4];
            self.hotplug.read(at, &mut bytes);
            u32::from_le_bytes(bytes)
        }

        fn write(&self, at: u64, value: u32) {
            self.hotplug.write(at, &value.to_le_bytes());
        }

        fn asked(&self) -> bool {
            self.power.save().gpe_status == 1 << gpe::HOTPLUG
        }
    }

    #[test]
    fn a_guest_hears_of_a_device_and_answers() {
        let guest = guest(!1);
        assert_eq!(guest.hotplug.answer(Slot(5)), Answer::Unasked);
        guest.hotplug.inserted(Slot(5));
        assert!(guest.asked());
        assert_eq!((guest.read(INSERTED), guest.read(WANTED)), (1 << 5, 0));
        assert_eq!(guest.hotplug.answer(Slot(5)), Answer::Silent);
        // Another comes between its read and its write: it stays.
        guest.hotplug.inserted(Slot(31));
        guest.write(INSERTED, 1 << 5);
        assert_eq!(guest.read(INSERTED), 1 << 31);
        assert_eq!((guest.hotplug.answer(Slot(5)), guest.hotplug.answer(Slot(31))), (Answer::Heard, Answer::Silent));
        guest.write(ANSWER, 5 << 24 | 1 << 8);
        assert_eq!(guest.hotplug.answer(Slot(5)), Answer::Done(0));
    }

    #[test]
    fn a_device_is_given_up_and_its_slot_free_afterwards() {
        let guest = guest(!1);
        guest.hotplug.request(Slot(3));
        assert!(guest.asked() && guest.hotplug.is_leaving(Slot(3)));
        guest.write(WANTED, 1 << 3);
        assert!(guest.hotplug.is_leaving(Slot(3)));
        guest.write(EJECT, 1 << 3);
        assert_eq!(*guest.given_up.lock().unwrap(), [Slot(3)]);
        assert!(!guest.hotplug.is_leaving(Slot(3)));
        guest.write(ANSWER, 3 << 24 | 3 << 8 | 1);
        assert_eq!(guest.hotplug.answer(Slot(3)), Answer::Done(1));
        // Unasked too: somebody in the guest switches the slot off.
        guest.write(EJECT, 1 << 4);
        assert_eq!(*guest.given_up.lock().unwrap(), [Slot(3), Slot(4)]);
    }

    #[test]
    fn what_is_no_slot_of_its_own_stays() {
        let guest = guest(1 << 7);
        guest.hotplug.inserted(Slot(6));
        guest.hotplug.request(Slot(200));
        assert!(!guest.asked());
        guest.write(EJECT, !0);
        assert_eq!(*guest.given_up.lock().unwrap(), [Slot(7)]);
        guest.write(ANSWER, !0);
        guest.hotplug.write(EJECT, &[0xff]);
        guest.hotplug.write(EJECT + 1, &[0xff; 4]);
        assert_eq!(guest.given_up.lock().unwrap().len(), 1);
        let mut long = [7; 8];
        guest.hotplug.read(0x20, &mut long);
        assert_eq!(long, [0; 8]);
    }

    #[test]
    fn a_guest_that_handles_an_event_still_listens() {
        let first = guest(!1);
        assert!(!first.hotplug.is_heard());
        first.power.write(0x24, &[1 << gpe::HOTPLUG]);
        first.power.write(0x24, &[0]);
        assert!(first.hotplug.is_heard());
        let second = guest(!1);
        second.hotplug.restore(&first.hotplug.save());
        assert!(second.hotplug.is_heard());
    }

    #[test]
    fn a_saved_one_goes_on() {
        let first = guest(!1);
        first.hotplug.inserted(Slot(2));
        first.hotplug.request(Slot(9));
        let state = first.hotplug.save();
        let second = guest(0);
        second.hotplug.restore(&state);
        assert_eq!(second.hotplug.save(), state);
        second.hotplug.restore(&HotplugStateV1 { slots: !(1 << 9), ..state });
        let expected = HotplugStateV1 { slots: !(1 | 1 << 9), inserted: 1 << 2, wanted: 0, leaving: 0, ..state };
        assert_eq!(second.hotplug.save(), expected);
        assert_eq!(second.hotplug.answer(Slot(2)), Answer::Silent);
        assert!(!second.asked(), "the event is the power hardware's");
    }
}
