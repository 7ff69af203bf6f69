//! Saved states: of a whole VM, as the file that `civic restore` opens, and of one device, which then goes on with its work.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use civic_devices::acpi::hotplug::HotplugStateV1;
use civic_devices::acpi::power::PowerStateV1;
use civic_devices::bus::Bus;
use civic_devices::pci::root::{PciRoot, PciRootStateV1};
use civic_devices::serial::{SerialPort, SerialStateV1};
use civic_vmm::cpu::cpuid::{CpuidStateV1, CpuidTemplate};
use civic_vmm::cpu::state::VcpuStateV1;
use civic_vmm::kvm::state::KvmStateV1;
use civic_vmm::machine::state::FunctionStateV2;
use civic_vmm::saved::{DiskStamp, STATE, SavedVm, VmStateV1};
use civic_vmm::state::{Section, Sections};
use kvm_bindings::kvm_cpuid_entry2;

use crate::host::{Wire, hub, scratch};
use crate::ports::hotplug;
use crate::virtio;

/// What stands before the sections: magic, format, reserved, their length and checksum.
const HEADER: usize = 32;

/// One input: its first byte says of what it is the state.
pub fn run(bytes: &[u8]) {
    match bytes.split_first() {
        Some((0..0x40, rest)) => machine(rest),
        // The header as it must be, so that what is behind it is read.
        Some((0x40..0x80, rest)) => machine(&headed(rest)),
        Some((_, rest)) => virtio::run_restored(rest),
        None => {}
    }
}

fn headed(body: &[u8]) -> Vec<u8> {
    let mut bytes = Sections::default().encode()[..HEADER].to_vec();
    let sum = crc::Crc::<u64, crc::Table<16>>::new(&crc::CRC_64_XZ).checksum(body);
    bytes[16..24].copy_from_slice(&(body.len() as u64).to_le_bytes());
    bytes[24..32].copy_from_slice(&sum.to_le_bytes());
    bytes.extend(body);
    bytes
}

/// A folder for a saved VM, which has no memory.
fn dir() -> &'static PathBuf {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = scratch("state");
        fs::create_dir(&dir).expect("a new folder can be made");
        dir
    })
}

fn machine(bytes: &[u8]) {
    fs::write(dir().join(STATE), bytes).expect("the host has room");
    if let Err(error) = SavedVm::open(dir()) {
        drop(error.to_string());
    }
    let mut sections = match Sections::decode(bytes) {
        Ok(sections) => sections,
        Err(error) => return drop(error.to_string()),
    };
    assert_eq!(Sections::decode(&sections.encode()).expect("what was encoded"), sections);
    if let Some(saved) = take::<CpuidStateV1>(&mut sections, "cpuid") {
        let here = CpuidTemplate::new(&processor(), 2, true).expect("it has all that is needed");
        if let Ok(template) = here.restore(saved) {
            drop((template.vcpu(1), template.phys_bits()));
        }
    }
    if let Some(saved) = take::<SerialStateV1>(&mut sections, "serial") {
        let port = SerialPort::new(hub(), Arc::new(Wire::default()));
        let _ = port.restore(&saved, Arc::new(Wire::default()));
    }
    if let Some(saved) = take::<PciRootStateV1>(&mut sections, "pci") {
        let _ = PciRoot::new(Arc::new(Bus::new())).restore(&saved);
    }
    // Of these all values are good, or KVM's to refuse.
    take::<PowerStateV1>(&mut sections, "power");
    if let Some(saved) = take::<HotplugStateV1>(&mut sections, "hotplug") {
        let hotplug = hotplug(|_| ());
        hotplug.restore(&saved);
        assert_eq!(hotplug.save().slots & 1, 0, "the host bridge stays");
    }
    take::<KvmStateV1>(&mut sections, "kvm");
    take::<VcpuStateV1>(&mut sections, "vcpu0");
    take::<FunctionStateV2>(&mut sections, "device/rng");
    take::<VmStateV1>(&mut sections, "vm");
    let _ = sections.finish().map_err(|error| error.to_string());
}

fn take<T: Section>(sections: &mut Sections, name: &str) -> Option<T> {
    match sections.take(name) {
        Ok(state) => Some(state),
        Err(error) => {
            drop(error.to_string());
            None
        }
    }
}

/// As much of a processor as a machine needs.
fn processor() -> Vec<kvm_cpuid_entry2> {
    let leaf = |function, ecx| kvm_cpuid_entry2 { function, ecx, eax: 0x302e, ..Default::default() };
    vec![leaf(0, 0x6c65_746e), leaf(1, u32::MAX), leaf(7, u32::MAX), leaf(0xd, 0), leaf(0x8000_0008, 0)]
}

/// A state with all sections that can be had without a machine, with its own header and without one; and devices' states.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut sections = Sections::default();
    let here = CpuidTemplate::new(&processor(), 2, true).expect("it has all that is needed");
    sections.put("cpuid", &here.save());
    let port = SerialPort::new(hub(), Arc::new(Wire::default()));
    sections.put("serial", &SerialStateV1 { received: vec![1, 2, 3], ..port.save() });
    sections.put("pci", &PciRoot::new(Arc::new(Bus::new())).save());
    let registers = hotplug(|_| ());
    registers.serve(!1);
    registers.request(civic_devices::pci::Slot(5));
    sections.put("hotplug", &registers.save());
    let vm = VmStateV1 {
        config: r#"{"name":"a","kernel":"/k","memory_bytes":16777216,"cpus":1}"#.into(),
        boots: 1,
        run: Duration::from_secs(1),
        index_checksum: 0,
        disks: vec![None, Some(DiskStamp { bytes: 512, modified: (1, 1) })],
    };
    sections.put("vm", &vm);
    let bytes = sections.encode();
    let mut seeds = vec![[&[0][..], &bytes].concat(), [&[0x40][..], &bytes[HEADER..]].concat(), vec![0x40, 0]];
    seeds.extend(virtio::seeds_restored().into_iter().map(|seed| [&[0x80][..], &seed].concat()));
    seeds
}
