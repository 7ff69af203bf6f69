//! What a guest does to I/O ports: the serial port, against a model of its FIFO and of a driver that is due its interrupts; and the
//! ACPI fixed hardware, whose interrupt line must follow its registers; and the registers of hotplug, by which a guest must be able to give
//! up what it was offered and nothing else.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arbitrary::{Arbitrary, Result, Unstructured};
use civic_devices::acpi::hotplug::{Hotplug, HotplugStateV1};
use civic_devices::acpi::power::{PORTS, PowerEvents, PowerManagement, PowerStateV1};
use civic_devices::bus::BusDevice;
use civic_devices::console_hub::ConsoleInput;
use civic_devices::pci::Slot;
use civic_devices::serial::{SerialPort, SerialStateV1};

use crate::host::{Wire, hub};

const FIFO: usize = 64;
const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const INTERRUPT_ID: u64 = 2;
const LINE_CONTROL: u64 = 3;
const MODEM_CONTROL: u64 = 4;
const LINE_STATUS: u64 = 5;
const LOOPBACK: u8 = 1 << 4;
const LATCH: u8 = 1 << 7;
const RECEIVED: u8 = 1;
const SENT: u8 = 2;

/// Runs one program: a byte for the device, then operations of a byte each with their operands.
pub fn run(program: &[u8]) {
    let mut input = Unstructured::new(program);
    let _ = match program.first() {
        Some(0..0x80) => serial(&mut input),
        Some(0x80..0xc0) => plugging(&mut input),
        _ => power(&mut input),
    };
}

/// The serial port, and what must be so.
struct Model {
    port: SerialPort,
    wire: Arc<Wire>,
    fifo: VecDeque<u8>,
    enabled: u8,
    control: u8,
    modem: u8,
    /// The driver read "no interrupt" last: it comes back only for an edge.
    idle: Option<u64>,
}

fn serial(input: &mut Unstructured<'_>) -> Result<()> {
    input.arbitrary::<u8>()?;
    let wire = Arc::new(Wire::default());
    let port = SerialPort::new(hub(), Arc::clone(&wire) as _);
    let mut model = Model { port, wire, fifo: VecDeque::new(), enabled: 0, control: 0, modem: 8, idle: None };
    model.control = model.read(LINE_CONTROL);
    model.modem = model.read(MODEM_CONTROL);
    while !input.is_empty() {
        match input.arbitrary::<u8>()? % 8 {
            0..=2 => model.write(u64::from(input.arbitrary::<u8>()? % 8), input.arbitrary()?),
            3 | 4 => drop(model.read(u64::from(input.arbitrary::<u8>()? % 8))),
            5 => {
                let len = usize::from(input.arbitrary::<u8>()? % 80);
                model.offer(input.bytes(len.min(input.len()))?);
            }
            6 => model.come_back(),
            _ if input.arbitrary()? => {
                // Whatever state this is, and whatever else is done then: only to be survived.
                let (port, wire) = (model.port, model.wire);
                return wild(input, &port, wire);
            }
            _ => {
                let (offset, mut data) = (input.arbitrary::<u64>()?, input.arbitrary::<u64>()?.to_le_bytes());
                // Where the model is not concerned: from the scratch register on.
                model.port.read(7 + u64::from(u8::arbitrary(input)?), &mut data);
                model.port.write(offset | 8, &data);
            }
        }
        model.check();
    }
    Ok(())
}

fn wild(input: &mut Unstructured<'_>, port: &SerialPort, wire: Arc<Wire>) -> Result<()> {
    let received = usize::from(input.arbitrary::<u8>()? % 80);
    let saved = SerialStateV1 {
        divisor: input.arbitrary()?,
        registers: input.arbitrary()?,
        sent_waits: input.arbitrary()?,
        received: input.bytes(received.min(input.len()))?.to_vec(),
    };
    let taken = port.restore(&saved, wire);
    assert_eq!(taken.is_ok(), saved.received.len() <= FIFO);
    if taken.is_ok() {
        assert_eq!(port.save(), saved);
    }
    while !input.is_empty() {
        let (how, offset) = (input.arbitrary::<u8>()?, u64::from(input.arbitrary::<u8>()? % 9));
        let mut data = [input.arbitrary()?, 0];
        let data = &mut data[..1 + usize::from(how >> 7)];
        match how % 3 {
            0 => port.read(offset, data),
            1 => port.write(offset, data),
            _ => drop(port.offer(data)),
        }
    }
    Ok(())
}

impl Model {
    fn latched(&self) -> bool {
        self.control & LATCH != 0
    }

    fn looped(&self) -> bool {
        self.modem & LOOPBACK != 0
    }

    fn read(&mut self, register: u64) -> u8 {
        let mut byte = [0];
        self.port.read(register, &mut byte);
        let [byte] = byte;
        match register {
            DATA if !self.latched() => {
                let expected = self.fifo.pop_front();
                assert!(expected.is_none_or(|expected| expected == byte), "read {byte:#x}, not {expected:?}");
            }
            INTERRUPT_ENABLE if !self.latched() => assert_eq!(byte, self.enabled),
            INTERRUPT_ID => {
                let due = self.enabled & RECEIVED != 0 && !self.fifo.is_empty();
                assert_eq!(byte & 0xf == 4, due, "the interrupt is {byte:#x}");
                self.idle = (byte & 1 != 0).then(|| self.wire.rises());
            }
            LINE_STATUS => {
                assert_eq!(byte & 1 != 0, !self.fifo.is_empty(), "the line status is {byte:#x}");
                assert_eq!(byte & 0x60, 0x60, "the transmitter is always empty");
            }
            _ => {}
        }
        byte
    }

    fn write(&mut self, register: u64, value: u8) {
        self.port.write(register, &[value]);
        match register {
            DATA | INTERRUPT_ENABLE if self.latched() => {}
            DATA if self.looped() && self.fifo.len() == FIFO => {}
            DATA if self.looped() => {
                self.fifo.push_back(value);
                self.due(RECEIVED);
            }
            DATA => self.due(SENT),
            INTERRUPT_ENABLE => {
                self.enabled = value & 0xf;
                self.due(SENT);
                if !self.fifo.is_empty() {
                    self.due(RECEIVED);
                }
            }
            LINE_CONTROL => self.control = value,
            MODEM_CONTROL => self.modem = value,
            _ => {}
        }
    }

    fn offer(&mut self, bytes: &[u8]) {
        let taken = self.port.offer(bytes);
        let room = if self.looped() { 0 } else { FIFO - self.fifo.len() };
        assert_eq!(taken, room.min(bytes.len()), "with {} bytes in the FIFO", self.fifo.len());
        self.fifo.extend(&bytes[..taken]);
        if taken > 0 {
            self.due(RECEIVED);
        }
    }

    /// Something happened that the driver wants an interrupt for, if these are enabled.
    fn due(&mut self, interrupts: u8) {
        if let Some(rises) = self.idle
            && self.enabled & interrupts != 0
        {
            assert!(self.wire.rises() > rises, "the driver is not told");
            self.idle = None;
        }
    }

    /// The port is saved, and another made from that.
    fn come_back(&mut self) {
        let saved = self.port.save();
        assert_eq!(saved.received, Vec::from(self.fifo.clone()));
        let wire = Arc::new(Wire::default());
        let port = SerialPort::new(hub(), Arc::clone(&wire) as _);
        port.restore(&saved, Arc::clone(&wire) as _).expect("a state that was saved");
        assert_eq!(port.save(), saved);
        self.idle = self.idle.map(|_| 0);
        (self.port, self.wire) = (port, wire);
    }

    fn check(&self) {
        assert!(!self.wire.high(), "the interrupt is an edge");
        assert!(self.fifo.len() <= FIFO);
    }
}

#[derive(Default)]
struct PowerOffs(AtomicU64);

impl PowerEvents for PowerOffs {
    fn power_off(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn power(input: &mut Unstructured<'_>) -> Result<()> {
    input.arbitrary::<u8>()?;
    let (mut wire, offs) = (Arc::new(Wire::default()), Arc::new(PowerOffs::default()));
    let make = |wire: &Arc<Wire>| PowerManagement::new(Arc::clone(wire) as _, Arc::clone(&offs) as _);
    let mut power = make(&wire);
    while !input.is_empty() {
        let offset = u64::from(input.arbitrary::<u8>()?) % u64::from(PORTS + 2);
        match input.arbitrary::<u8>()? % 8 {
            0..=2 => {
                let len = 1 + usize::from(input.arbitrary::<u8>()? % 8);
                let data = &input.arbitrary::<u64>()?.to_le_bytes()[..len];
                let before = offs.0.load(Ordering::Relaxed);
                power.write(offset, data);
                // SLP_EN and SLP_TYP are in the control register's upper byte.
                let upper = 5_u64.checked_sub(offset).and_then(|at| data.get(at as usize));
                let asked = upper.is_some_and(|byte| byte & 0x3c == 0x34);
                assert_eq!(offs.0.load(Ordering::Relaxed) - before, u64::from(asked));
            }
            3 => {
                let mut data = [0; 4];
                power.read(offset, &mut data);
            }
            4 => power.press_power_button(),
            5 => power.raise_gpe(input.arbitrary::<u8>()?.into()),
            6 => {
                let state = power.save();
                wire = Arc::new(Wire::default());
                power = make(&wire);
                power.restore(&state);
                assert_eq!(registers(&power.save()), registers(&state));
            }
            _ => {
                let state = PowerStateV1 {
                    pm1_status: input.arbitrary()?,
                    pm1_enable: input.arbitrary()?,
                    pm1_control: input.arbitrary()?,
                    gpe_status: input.arbitrary()?,
                    gpe_enable: input.arbitrary()?,
                    timer_ticks: input.arbitrary()?,
                };
                wire = Arc::new(Wire::default());
                power = make(&wire);
                power.restore(&state);
            }
        }
        let state = power.save();
        let wants = state.pm1_status & state.pm1_enable != 0 || state.gpe_status & state.gpe_enable != 0;
        assert_eq!(wire.high(), wants, "the line does not follow {state:?}");
        let mut data = [0; 4];
        power.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), u32::from(state.pm1_status) | u32::from(state.pm1_enable) << 16);
    }
    Ok(())
}

/// Hotplug's registers; `given_up` is called for what the guest gives up.
pub fn hotplug(given_up: impl Fn(Slot) + Send + Sync + 'static) -> Hotplug {
    let power = PowerManagement::new(Arc::new(Wire::default()), Arc::new(PowerOffs::default()));
    Hotplug::new(Arc::new(power), given_up)
}

fn plugging(input: &mut Unstructured<'_>) -> Result<()> {
    input.arbitrary::<u8>()?;
    let slots = input.arbitrary::<u32>()?;
    let given_up = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&given_up);
    let hotplug = hotplug(move |slot| {
        seen.fetch_or(1 << slot.0, Ordering::Relaxed);
    });
    hotplug.serve(slots);
    while !input.is_empty() {
        let slot = Slot(input.arbitrary()?);
        match input.arbitrary::<u8>()? % 5 {
            0 => hotplug.inserted(slot),
            1 => hotplug.request(slot),
            2 => {
                let len = usize::from(input.arbitrary::<u8>()? % 9);
                hotplug.write(slot.0.into(), &input.arbitrary::<u64>()?.to_le_bytes()[..len]);
            }
            3 => {
                let mut data = [0; 8];
                let len = usize::from(input.arbitrary::<u8>()? % 9);
                hotplug.read(slot.0.into(), &mut data[..len]);
            }
            _ => {
                let state = HotplugStateV1 {
                    slots,
                    inserted: input.arbitrary()?,
                    wanted: input.arbitrary()?,
                    leaving: input.arbitrary()?,
                    heard: input.arbitrary()?,
                };
                hotplug.restore(&state);
            }
        }
        let state = hotplug.save();
        assert_eq!(state.slots, slots & !1);
        assert_eq!((state.inserted | state.wanted | state.leaving) & !state.slots, 0, "{state:?}");
        assert_eq!(given_up.load(Ordering::Relaxed) & !u64::from(state.slots), 0, "what stays was given up");
        assert_eq!(hotplug.is_leaving(slot), slot.0 < 32 && state.leaving >> slot.0 & 1 == 1);
        let _ = (hotplug.answer(slot), hotplug.has(slot));
    }
    Ok(())
}

/// Without the timer, which goes on.
fn registers(state: &PowerStateV1) -> PowerStateV1 {
    PowerStateV1 { timer_ticks: 0, ..state.clone() }
}

/// A driver of each that does as it should.
pub fn seeds() -> Vec<Vec<u8>> {
    let set = |register: u64, value: u8| [0, register as u8, value];
    let get = |register: u64| [3, register as u8];
    let receive =
        [&[5, 3, 1, 2, 3][..], &get(INTERRUPT_ID), &get(LINE_STATUS), &get(DATA), &get(DATA), &get(INTERRUPT_ID)];
    let rest = [&get(DATA)[..], &get(INTERRUPT_ID)].concat();
    let begin = [&[0][..], &set(INTERRUPT_ENABLE, 3), &get(INTERRUPT_ID), &get(INTERRUPT_ID)].concat();
    let print = [&set(DATA, 65)[..], &get(INTERRUPT_ID), &get(INTERRUPT_ID)].concat();
    let loops = [&set(MODEM_CONTROL, LOOPBACK)[..], &set(DATA, 7), &get(DATA), &set(MODEM_CONTROL, 8)].concat();
    let serial = [&begin[..], &print, &receive.concat(), &rest, &loops, &receive.concat(), &[6], &rest].concat();
    let wild = [&begin[..], &[7, 1, 4, 12, 0, 1, 4, 3, 0x61, 8, 0, 0, 0], &[1, 2, 3, 4], &[0, 0, 0, 1, 1, 3]].concat();
    let enable = [2, 0, 3, 0x21, 1, 0, 0, 0, 0, 0, 0];
    let events = [0, 4, 0, 5, 3, 0, 0, 3, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 6];
    let off = [4, 0, 1, 0, 0x34, 0, 0, 0, 0, 0, 0];
    let give =
        [&[0x80, 0xfe, 0xff, 0xff, 0xff, 5, 0, 5, 1][..], &[0, 2, 4, 0x20, 0, 0, 0, 0, 0, 0, 0], &[8, 2, 4, 0x20]]
            .concat();
    vec![serial, wild, give, [&[0xc0][..], &enable, &[0x24, 0, 3, 8, 0, 0, 0, 0, 0, 0, 0], &events, &off].concat()]
}
