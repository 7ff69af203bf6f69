//! The DSDT's contents: what a guest finds under `\_SB` and how it sleeps.
//!
//! ```text
//! \_S5            soft off, as power.rs knows it
//! \_SB.PCI0       the PCI host bridge: bus 0 and its windows, no native hotplug
//! \_SB.PCI0.S01…  a slot whose devices come and go: hotplug.rs    \_GPE._E01  says which did
//! \_SB.MBRD       motherboard resources: ECAM and the ACPI ports
//! \_SB.COM1       the serial port
//! \_SB.VGEN       the generation id          \_GPE._E02  says that it changed
//! \_SB.VCLK       the clock page             \_GPE._E03
//! \_SB.C000…      a processor device each
//! ```
//!
//! ACPI 6.5 §5–7 and §19; PCI Firmware 3.3 §4.5 (`_OSC`); for VGEN and VCLK see generation.rs and clock.rs.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method,
    MethodCall, Name, NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Or, Package, Path, ResourceTemplate, Return,
    Scope, ShiftLeft, Store, Uuid, ZERO,
};

use super::hotplug::{DEVICE_CHECK, EJECT_REQUEST};
use super::power::{PORT, PORTS, SLP_TYP_S5, gpe};
use super::tables::AcpiConfig;
use super::{clock, hotplug};

/// Host bridges and their `_OSC` (PCI Firmware 3.3 §4.5.1).
const PCI_OSC_UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// What a guest may take over: PME, AER and the PCI Express capability. Not native PCIe hotplug nor SHPC (bits 0 and 1):
/// slots are ACPI's, or the guest would look for hotplug in ports that do not exist.
const PCI_OSC_GRANTED: u32 = 1 << 2 | 1 << 3 | 1 << 4;
/// `_OSC` status: unknown UUID, unknown revision, a control bit masked (ACPI 6.5 §6.2.12).
const OSC_UNKNOWN_UUID: u8 = 1 << 2;
const OSC_UNKNOWN_REVISION: u8 = 1 << 3;
const OSC_MASKED: u8 = 1 << 4;

/// The first code that means what the device says it means (ACPI 6.5 §5.6.6).
const NOTIFY_CHANGED: u8 = 0x80;

/// The DSDT's terms, without a table header.
pub(crate) fn dsdt(config: &AcpiConfig) -> Vec<u8> {
    let mut aml = Vec::new();
    soft_off(&mut aml);
    host_bridge(config, &mut aml);
    slots(config, &mut aml);
    motherboard(config, &mut aml);
    serial(config, &mut aml);
    generation_id(config, &mut aml);
    clock_page(config, &mut aml);
    processors(config, &mut aml);
    aml
}

fn soft_off(aml: &mut Vec<u8>) {
    Name::new("_S5_".into(), &Package::new(vec![&SLP_TYP_S5, &SLP_TYP_S5, &ZERO, &ZERO])).to_aml_bytes(aml);
}

fn host_bridge(config: &AcpiConfig, aml: &mut Vec<u8>) {
    let last = |range: &Range<u64>| range.end - 1;
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    let ports = (config.pci_config_port, config.pci_config_ports);
    let config_ports = IO::new(ports.0, ports.0, 1, ports.1);
    let low_ports = AddressSpace::new_io(0u16, ports.0 - 1, None);
    let high_ports = AddressSpace::new_io(ports.0 + u16::from(ports.1), 0xffff, None);
    let mmio32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        config.mmio32.start as u32,
        last(&config.mmio32) as u32,
        None,
    );
    let mmio64 = config.mmio64.as_ref().map(|window| {
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, window.start, last(window), None)
    });
    let mut windows: Vec<&dyn Aml> = vec![&bus, &config_ports, &low_ports, &high_ports, &mmio32];
    if let Some(window) = &mmio64 {
        windows.push(window);
    }

    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "PCI0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_SEG".into(), &ZERO),
                &Name::new("_BBN".into(), &ZERO),
                &Name::new("_CRS".into(), &ResourceTemplate::new(windows)),
                &osc(),
            ],
        )],
    )
    .to_aml_bytes(aml);
}

/// `_OSC(UUID, revision, count, capabilities)`: grants [`PCI_OSC_GRANTED`] of what is asked for, and says so.
fn osc() -> Bytes {
    let uuid = Uuid::new(PCI_OSC_UUID);
    let status: Path = "CDW1".into();
    let control: Path = "CDW3".into();
    let capabilities = Arg(3);
    let granted = Local(0);
    let mut bytes = Vec::new();
    Method::new(
        "_OSC".into(),
        4,
        false,
        vec![
            &CreateDWordField::new(&status, &capabilities, &0u8),
            &If::new(
                &Equal::new(&Arg(0), &uuid),
                vec![
                    &CreateDWordField::new(&control, &capabilities, &8u8),
                    &And::new(&granted, &control, &PCI_OSC_GRANTED),
                    &If::new(&NotEqual::new(&Arg(1), &ONE), vec![&Or::new(&status, &status, &OSC_UNKNOWN_REVISION)]),
                    &If::new(&NotEqual::new(&control, &granted), vec![&Or::new(&status, &status, &OSC_MASKED)]),
                    &Store::new(&control, &granted),
                ],
            ),
            &Else::new(vec![&Or::new(&status, &status, &OSC_UNKNOWN_UUID)]),
            &Return::new(&capabilities),
        ],
    )
    .to_aml_bytes(&mut bytes);
    Bytes(bytes)
}

/// The slots whose devices come and go. None has a `_STA`: whether there is a device shows in its configuration space.
fn slots(config: &AcpiConfig, aml: &mut Vec<u8>) {
    if config.hotplug_slots == 0 {
        return;
    }
    let mut terms = Vec::new();
    let (first, len) = (hotplug::PORT, hotplug::PORTS);
    OpRegion::new("HPRG".into(), OpRegionSpace::SystemIO, &first, &len).to_aml_bytes(&mut terms);
    let word = |name: &[u8; 4]| FieldEntry::Named(*name, 32);
    Field::new(
        "HPRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![word(b"HINS"), word(b"HEJR"), word(b"HEJ0"), word(b"HOST")],
    )
    .to_aml_bytes(&mut terms);
    let there = (1..32u8).filter(|slot| config.hotplug_slots >> slot & 1 == 1);
    let (mut devices, mut notifications) = (Vec::new(), Vec::new());
    for slot in there {
        let name = format!("S{slot:02X}_");
        slot_device(slot, &name).to_aml_bytes(&mut devices);
        let device: Path = name.as_str().into();
        let (arg, mask) = (Arg(0), 1u32 << slot);
        If::new(&And::new(&ZERO, &arg, &mask), vec![&Notify::new(&device, &Arg(1))]).to_aml_bytes(&mut notifications);
    }
    terms.extend(devices);
    let notifications = Bytes(notifications);
    Method::new("HNTF".into(), 2, false, vec![&notifications]).to_aml_bytes(&mut terms);
    // What comes between a read and the write behind it is not cleared, and has raised the event anew.
    let (inserted, wanted): (Path, Path) = ("HINS".into(), "HEJR".into());
    let tell = |slots: &Local, what: u8| {
        let mut bytes = Vec::new();
        If::new(slots, vec![&MethodCall::new("HNTF".into(), vec![slots, &what])]).to_aml_bytes(&mut bytes);
        Bytes(bytes)
    };
    let (ins, out) = (Local(0), Local(1));
    let (tell_inserted, tell_wanted) = (tell(&ins, DEVICE_CHECK), tell(&out, EJECT_REQUEST));
    let steps = [
        Store::new(&ins, &inserted),
        Store::new(&inserted, &ins),
        Store::new(&out, &wanted),
        Store::new(&wanted, &out),
    ];
    let steps = steps.iter().map(|step| step as &dyn Aml).chain([&tell_inserted as &dyn Aml, &tell_wanted]);
    Method::new("HPEV".into(), 0, true, steps.collect()).to_aml_bytes(&mut terms);
    aml.extend(Scope::raw("\\_SB_.PCI0".into(), terms));
    let event = MethodCall::new("\\_SB_.PCI0.HPEV".into(), Vec::new());
    handler(gpe::HOTPLUG, &event, aml);
}

fn slot_device(slot: u8, name: &str) -> Bytes {
    let (eject, answer): (Path, Path) = ("HEJ0".into(), "HOST".into());
    let (event, status) = (Local(0), Local(1));
    let mut bytes = Vec::new();
    Device::new(
        name.into(),
        vec![
            &Name::new("_ADR".into(), &(u32::from(slot) << 16)),
            &Name::new("_SUN".into(), &slot),
            &Method::new("_EJ0".into(), 1, false, vec![&Store::new(&eject, &(1u32 << slot))]),
            &Method::new(
                "_OST".into(),
                3,
                false,
                vec![
                    &And::new(&event, &Arg(0), &0xffu8),
                    &ShiftLeft::new(&event, &event, &8u8),
                    &And::new(&status, &Arg(1), &0xffu8),
                    &Or::new(&event, &event, &status),
                    &Or::new(&event, &event, &(u32::from(slot) << 24)),
                    &Store::new(&answer, &event),
                ],
            ),
        ],
    )
    .to_aml_bytes(&mut bytes);
    Bytes(bytes)
}

/// Reserves what no device claims: ECAM (PCI Firmware 3.3 §4.1.2 wants it here) and the ports of power.rs and hotplug.rs.
fn motherboard(config: &AcpiConfig, aml: &mut Vec<u8>) {
    let ecam = Memory32Fixed::new(true, config.ecam.start as u32, (config.ecam.end - config.ecam.start) as u32);
    let ports = IO::new(PORT, PORT, 1, PORTS as u8);
    let slots = IO::new(hotplug::PORT, hotplug::PORT, 1, hotplug::PORTS as u8);
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "MBRD".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam, &ports, &slots])),
            ],
        )],
    )
    .to_aml_bytes(aml);
}

fn serial(config: &AcpiConfig, aml: &mut Vec<u8>) {
    let Some((port, irq)) = config.com1 else {
        return;
    };
    let ports = IO::new(port, port, 1, 8);
    let interrupt = Interrupt::new(true, true, false, false, irq);
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_DDN".into(), &"COM1"),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
            ],
        )],
    )
    .to_aml_bytes(aml);
}

/// A guest's driver knows the device by its `_CID` and asks `ADDR` for the address, low half first. The `_HID` is ours to choose.
fn generation_id(config: &AcpiConfig, aml: &mut Vec<u8>) {
    let Some(address) = config.generation_id else {
        return;
    };
    let (low, high) = (address as u32, (address >> 32) as u32);
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "VGEN".into(),
            vec![
                &Name::new("_HID".into(), &"CIVC0001"),
                &Name::new("_CID".into(), &"VM_Gen_Counter"),
                &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
            ],
        )],
    )
    .to_aml_bytes(aml);
    notification(gpe::GENERATION_ID, "\\_SB_.VGEN", aml);
}

fn clock_page(config: &AcpiConfig, aml: &mut Vec<u8>) {
    let Some(address) = config.clock else {
        return;
    };
    let page = Memory32Fixed::new(false, address as u32, clock::LEN);
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "VCLK".into(),
            vec![
                &Name::new("_HID".into(), &"AMZNC10C"),
                &Name::new("_CID".into(), &"VMCLOCK"),
                &Name::new("_DDN".into(), &"VMCLOCK"),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&page])),
            ],
        )],
    )
    .to_aml_bytes(aml);
    notification(gpe::CLOCK, "\\_SB_.VCLK", aml);
}

/// The handler of general-purpose event `event`: tells `device` that its state changed.
fn notification(event: u32, device: &str, aml: &mut Vec<u8>) {
    let device: Path = device.into();
    handler(event, &Notify::new(&device, &NOTIFY_CHANGED), aml);
}

fn handler(event: u32, what: &dyn Aml, aml: &mut Vec<u8>) {
    let name = format!("_E{event:02X}");
    Scope::new("_GPE".into(), vec![&Method::new(name.as_str().into(), 0, false, vec![what])]).to_aml_bytes(aml);
}

fn processors(config: &AcpiConfig, aml: &mut Vec<u8>) {
    let mut devices = Vec::new();
    for cpu in 0..config.cpus {
        Device::new(
            format!("C{cpu:03X}").as_str().into(),
            vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &cpu)],
        )
        .to_aml_bytes(&mut devices);
    }
    aml.extend(Scope::raw("_SB_".into(), devices));
}

/// Terms already encoded.
struct Bytes(Vec<u8>);

impl Aml for Bytes {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}
