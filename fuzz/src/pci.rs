//! A guest that moves BARs about: through ECAM and the configuration ports, over each other and over what else is on the bus.
//!
//! After each access the MMIO bus must be as the functions were told: a BAR that was put somewhere is reached there from its first to
//! its last byte, one that was not is reached nowhere, and one may be refused its place only for what is there already.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arbitrary::{Result, Unstructured};
use civic_devices::bus::{Bus, BusDevice};
use civic_devices::pci::config::{ConfigSpace, Identity};
use civic_devices::pci::root::{ConfigPorts, ECAM_LEN, Ecam, PciRoot};
use civic_devices::pci::{BarWindow, Function, Slot};
use civic_devices::virtio::pci::{BAR_LEN, VirtioPci};
use civic_devices::virtio::rng::Rng;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::host::{Bells, Messages};

const ECAM: u64 = 0xe000_0000;
const FIRST: u64 = 0xc000_0000;
/// Lengths of a card's BARs.
const LENGTHS: [u64; 3] = [16, 0x1000, 0x10_0000];
const CARDS: usize = 3;
const VIRTIO_SLOT: u8 = CARDS as u8 + 1;
const MOST: usize = 200;

/// A function with three BARs that remembers where it was put and what was last read of it.
struct Card {
    config: Mutex<ConfigSpace>,
    places: Mutex<[Option<u64>; 3]>,
    read: Mutex<Option<(u8, u64)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Card {
    fn new(number: u64) -> Self {
        let identity =
            Identity { vendor: 1, device: 2, revision: 0, class: [2, 0, 0], subsystem_vendor: 0, subsystem: 0 };
        let mut config = ConfigSpace::new(&identity);
        for (bar, len) in LENGTHS.into_iter().enumerate() {
            config.add_bar(2 * bar as u8, FIRST + (4 * number + bar as u64) * 0x10_0000, len);
        }
        Self { config: Mutex::new(config), places: Mutex::default(), read: Mutex::default() }
    }
}

impl Function for Card {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        lock(&self.config).read(offset.into(), data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        lock(&self.config).write(offset.into(), data);
    }
    fn decoded(&self) -> Vec<BarWindow> {
        lock(&self.config).decoded()
    }
    fn moved(&self, bar: u8, base: Option<u64>) {
        let place = &mut lock(&self.places)[usize::from(bar / 2)];
        assert!(base.is_none() || place.is_none(), "BAR {bar} is at {place:x?} and put at {base:x?} as well");
        *place = base;
    }
    fn bar_read(&self, bar: u8, offset: u64, _: &mut [u8]) {
        assert!(offset < LENGTHS[usize::from(bar / 2)]);
        *lock(&self.read) = Some((bar, offset));
    }
    fn bar_write(&self, _: u8, _: u64, _: &[u8]) {}
}

struct Machine {
    mmio: Arc<Bus>,
    ports: ConfigPorts,
    cards: Vec<Arc<Card>>,
    virtio: Arc<VirtioPci>,
    bells: Arc<Bells>,
    root: Arc<PciRoot>,
}

impl Machine {
    fn new() -> Self {
        let mmio = Arc::new(Bus::new());
        let root = PciRoot::new(Arc::clone(&mmio));
        mmio.insert(ECAM, ECAM_LEN, Arc::new(Ecam::new(&root))).expect("the bus is empty");
        let cards: Vec<_> = (0..CARDS).map(|number| Arc::new(Card::new(number as u64))).collect();
        for (card, slot) in cards.iter().zip(1..) {
            root.plug(Slot(slot), Arc::clone(card) as _).expect("the slot is free");
        }
        let ram = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("memory can be mapped"));
        let bells = Arc::new(Bells::default());
        let virtio =
            VirtioPci::new("fuzz", Box::new(Rng::new()), FIRST + 0x200_0000, ram, &Messages, Arc::clone(&bells) as _);
        let virtio = Arc::new(virtio.expect("the host has descriptors"));
        root.plug(Slot(VIRTIO_SLOT), Arc::clone(&virtio) as _).expect("the slot is free");
        Self { mmio, ports: ConfigPorts::new(&root, || ()), cards, virtio, bells, root }
    }

    /// What lies where.
    fn occupied(&self) -> Vec<(u64, u64)> {
        let mut all = vec![(ECAM, ECAM_LEN)];
        for card in &self.cards {
            all.extend(lock(&card.places).iter().zip(LENGTHS).filter_map(|(place, len)| place.map(|at| (at, len))));
        }
        all.extend(self.virtio_place().map(|at| (at, BAR_LEN)));
        all
    }

    /// Where the virtio function's BAR is: its doorbell tells.
    fn virtio_place(&self) -> Option<u64> {
        self.bells.addresses().first().map(|bell| bell - 0x3000)
    }

    fn check(&self, written: Option<u8>) {
        let occupied = self.occupied();
        for (n, a) in occupied.iter().enumerate() {
            let meets = |b: &&(u64, u64)| a.0 < b.0 + b.1 && b.0 < a.0 + a.1;
            assert!(!occupied[..n].iter().any(|b| meets(&b)), "two things at {a:x?}");
        }
        for (card, slot) in self.cards.iter().zip(1..) {
            let decoded = card.decoded();
            for (index, (place, len)) in lock(&card.places).into_iter().zip(LENGTHS).enumerate() {
                let bar = 2 * index as u8;
                let window = decoded.iter().find(|window| window.bar == bar);
                match place {
                    Some(at) => {
                        assert_eq!(
                            window,
                            Some(&BarWindow { bar, base: at, len }),
                            "BAR {bar} of slot {slot} was left behind"
                        );
                        for offset in [0, len - 1] {
                            assert_eq!(self.reach(card, at + offset), Some((bar, offset)));
                        }
                    }
                    None => {
                        for offset in [0, len - 1] {
                            let reached = window.and_then(|window| self.reach(card, window.base + offset));
                            assert!(
                                reached.is_none_or(|(reached, _)| reached != bar),
                                "BAR {bar} is where it was not put"
                            );
                        }
                        // Only a write to its own registers makes it try again.
                        if let Some(window) = window.filter(|_| written == Some(slot)) {
                            let taken = occupied
                                .iter()
                                .any(|&(at, len)| at < window.base + window.len && window.base < at + len);
                            assert!(taken, "BAR {bar} of slot {slot} was refused {:#x}, which is free", window.base);
                        }
                    }
                }
            }
        }
        if let Some(at) = self.virtio_place() {
            assert_eq!(self.virtio.decoded(), [BarWindow { bar: 0, base: at, len: BAR_LEN }]);
        }
    }

    /// Which BAR of the card an address leads to, and where in it.
    fn reach(&self, card: &Card, address: u64) -> Option<(u8, u64)> {
        lock(&card.read).take();
        self.mmio.read(address, &mut [0]);
        lock(&card.read).take()
    }
}

/// Runs one program: operations of a byte each with their operands.
pub fn run(program: &[u8]) {
    let _ = play(&mut Unstructured::new(program));
}

fn play(input: &mut Unstructured<'_>) -> Result<()> {
    let machine = Machine::new();
    for _ in 0..MOST {
        if input.is_empty() {
            break;
        }
        let slot = input.arbitrary::<u8>()? % (VIRTIO_SLOT + 2);
        let at = ECAM | u64::from(slot) << 15;
        let mut written = Some(slot);
        match input.arbitrary::<u8>()? % 8 {
            // Decoding on or off.
            0 => drop(machine.mmio.write(at | 4, &[input.arbitrary::<u8>()?, 0])),
            // A BAR put somewhere, both halves as a driver writes them.
            1 | 2 => {
                let register = at | 0x10 | u64::from(input.arbitrary::<u8>()? % 3) << 3;
                let base = place(input, &machine)?;
                machine.mmio.write(register, &(base as u32).to_le_bytes());
                machine.check(written);
                machine.mmio.write(register + 4, &((base >> 32) as u32).to_le_bytes());
            }
            3 => {
                let (offset, len) = (u64::from(input.arbitrary::<u16>()? % 0x1008), 1 + input.arbitrary::<u8>()? % 8);
                machine.mmio.write(at | offset, &input.arbitrary::<u64>()?.to_le_bytes()[..usize::from(len)]);
                // What is not all of one function's is nobody's.
                written = written.filter(|_| offset + u64::from(len) <= 0x1000);
            }
            4 => {
                let address = 1 << 31 | u32::from(slot) << 11 | u32::from(input.arbitrary::<u8>()? & 0xfc);
                machine.ports.write(0, &address.to_le_bytes());
                let (port, len) = (4 + u64::from(input.arbitrary::<u8>()? % 4), 1 + input.arbitrary::<u8>()? % 4);
                machine.ports.write(port, &input.arbitrary::<u32>()?.to_le_bytes()[..usize::from(len)]);
                machine.ports.read(port, &mut [0; 4][..usize::from(len)]);
                written = written.filter(|_| port % 4 + u64::from(len) <= 4);
            }
            5 => {
                let (port, len) = (u64::from(input.arbitrary::<u8>()? % 8), 1 + input.arbitrary::<u8>()? % 4);
                machine.ports.write(port, &input.arbitrary::<u32>()?.to_le_bytes()[..usize::from(len)]);
                machine.ports.read(port, &mut [0; 4][..usize::from(len)]);
                written = None;
            }
            6 => {
                let (address, len) = (place(input, &machine)?, 1 + input.arbitrary::<u8>()? % 8);
                let mut data = input.arbitrary::<u64>()?.to_le_bytes();
                machine.mmio.write(address, &data[..usize::from(len)]);
                machine.mmio.read(address, &mut data[..usize::from(len)]);
                written = None;
            }
            _ => {
                let saved = machine.root.save();
                assert!(machine.root.restore(&saved));
                assert_eq!(machine.root.save(), saved);
                written = None;
            }
        }
        machine.check(written);
    }
    machine.virtio.shut_down();
    Ok(())
}

/// An address: near one that something has, or any.
fn place(input: &mut Unstructured<'_>, machine: &Machine) -> Result<u64> {
    let occupied = machine.occupied();
    Ok(match input.arbitrary::<u8>()? {
        near @ 0..=0x9f => {
            let (at, len) = occupied[usize::from(near) % occupied.len()];
            let by = i64::from(input.arbitrary::<i8>()?) * [1, 16, 0x1000, 0x8000][usize::from(near >> 5) % 4];
            if near & 1 == 0 { at } else { at + len }.wrapping_add_signed(by)
        }
        0xa0..=0xdf => FIRST + u64::from(input.arbitrary::<u16>()?) * 0x1000,
        0xe0..=0xf7 => u64::MAX - u64::from(input.arbitrary::<u32>()?),
        _ => input.arbitrary()?,
    })
}

/// Functions switched on, moved over each other, and off.
pub fn seeds() -> Vec<Vec<u8>> {
    let on: Vec<u8> = (1..=VIRTIO_SLOT).flat_map(|slot| [slot, 0, 2]).collect();
    let over: Vec<u8> = (1..=VIRTIO_SLOT).flat_map(|slot| [slot, 1, 1, 2 * slot, 0]).collect();
    let far: Vec<u8> = (1..=VIRTIO_SLOT).flat_map(|slot| [slot, 1, 0, 0xff, 0, 0, slot, 0, 1, 0, 0, 0]).collect();
    let off: Vec<u8> = (1..=VIRTIO_SLOT).flat_map(|slot| [slot, 0, 0]).collect();
    vec![[&on[..], &over, &off, &on].concat(), [&on[..], &far, &over, &off].concat(), [over, on, far].concat()]
}
