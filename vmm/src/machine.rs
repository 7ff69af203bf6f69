//! A machine: everything between a reset and the next.
//!
//! ```text
//! VmConfig ─▶ Layout ─▶ Resources ─▶ Machine (vCPUs parked) ─▶ run ⇄ pause ─▶ drop
//!            (pure)    (fds, locks)
//! ```
//!
//! A reset drops the machine and builds the next from the same resources: the guest finds memory, vCPUs and devices as after
//! power-on, and no state can leak from one boot into the next.
//!
//! Invariants: the vCPUs end before anything that they use; [`Machine::pause`] returns only when no vCPU is in the guest and no
//! device touches its memory.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use civic_api::{BALLOON_STEP_BYTES, DeviceInfo, VcpuInfo, VmConfig};
use civic_devices::acpi::power::{self, I8042Reset, PowerEvents, PowerManagement, ResetEvents};
use civic_devices::acpi::tables::{self, AcpiConfig};
use civic_devices::bus::{Bus, BusDevice, BusError};
use civic_devices::counters::Counters;
use civic_devices::pci::Slot;
use civic_devices::pci::root::{ConfigPorts, ECAM_LEN, Ecam, PORTS, PORTS_LEN, PciRoot, SlotError};
use civic_devices::serial::{SERIAL_PORTS, SerialPort};
use civic_devices::virtio::balloon::{Balloon, BalloonControl};
use civic_devices::virtio::block::{Block, BlockOptions};
use civic_devices::virtio::console::Console;
use civic_devices::virtio::net::{Mac, Net};
use civic_devices::virtio::pci::{BAR_LEN, VirtioPci};
use civic_devices::virtio::rng::Rng;
use civic_devices::virtio::{DeviceType, VirtioDevice};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use tracing::info;
use vm_memory::Bytes;

use crate::boot::{BootError, BootParams};
use crate::cpu::cpuid::{CpuidError, CpuidTemplate};
use crate::cpu::msr::{self, MsrError};
use crate::cpu::registers::{self, BootRegisters, RegistersError};
use crate::identity::Identity;
use crate::kvm::interrupts::{Interrupts, Messages};
use crate::kvm::{self, IoEvents, KvmError};
use crate::layout::{self, Gpa, Layout, LayoutError};
use crate::memory::{Memory, MemoryError};
use crate::resources::Resources;
use crate::vcpu::{Buses, Gate, VcpuEvent, Vcpus};

/// What the guest did that ends this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// It switched itself off.
    PowerOff,
    /// It reset itself, or triple-faulted.
    Reset,
    /// A vCPU cannot go on.
    Failed(String),
}

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The sources say it.
pub enum BuildError {
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("cannot load the guest")]
    Boot(#[from] BootError),
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    #[error(transparent)]
    Msr(#[from] MsrError),
    #[error(transparent)]
    Registers(#[from] RegistersError),
    #[error("cannot place a device")]
    Bus(#[from] BusError),
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error("cannot make {what}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("guest memory does not hold the {0}")]
    Place(&'static str),
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> BuildError {
    move |source| BuildError::Io { what, source }
}

/// The wires by which the guest's own hardware ends the machine: no vCPU goes on after its present exit.
struct Wires<R> {
    gate: Arc<Gate>,
    report: R,
}

impl<R: Fn(GuestEvent) + Send + Sync> PowerEvents for Wires<R> {
    fn power_off(&self) {
        self.gate.shut();
        (self.report)(GuestEvent::PowerOff);
    }
}

impl<R: Fn(GuestEvent) + Send + Sync> ResetEvents for Wires<R> {
    fn reset(&self) {
        self.gate.shut();
        (self.report)(GuestEvent::Reset);
    }
}

/// A PCI function of the machine, for the API.
struct Plugged {
    slot: Slot,
    function: Arc<VirtioPci>,
}

/// A machine with its vCPUs parked or running.
pub struct Machine {
    // Dropped first: no vCPU may run while the rest goes.
    vcpus: Vcpus,
    plugged: Vec<Plugged>,
    serial: Arc<SerialPort>,
    power: Arc<PowerManagement>,
    identity: Identity,
    balloon: Option<BalloonControl>,
    /// Kept here alone: the ways into it do not keep it.
    _root: Arc<PciRoot>,
    _vm: Arc<VmFd>,
    _memory: Memory,
}

impl Machine {
    /// Builds a machine at its power-on state; `report` is called, from any thread, with what the guest does that ends it.
    pub fn build(
        config: &VmConfig,
        resources: &mut Resources,
        report: impl Fn(GuestEvent) + Clone + Send + Sync + 'static,
    ) -> Result<Self, BuildError> {
        let layout = Layout::new(config.memory_bytes)?;
        let memory = Memory::allocate(&layout)?;
        let kvm = kvm::open()?;
        let vm = kvm::create_vm(&kvm)?;
        kvm::slots::insert_ram(&vm, &memory.ram)?;
        let cpuid = cpuid(&kvm, config.cpus)?;
        layout.check_reach(cpuid.phys_bits())?;

        let interrupts = Interrupts::new(Arc::clone(&vm)).map_err(io_error("the interrupt routing"))?;
        let gate = Gate::new();
        let wires = Arc::new(Wires { gate: Arc::clone(&gate), report: report.clone() });

        let buses = Buses { pio: Arc::new(Bus::new()), mmio: Arc::new(Bus::new()) };
        let root = PciRoot::new(Arc::clone(&buses.mmio));
        buses.mmio.insert(layout::ECAM.start.0, ECAM_LEN, Arc::new(Ecam::new(&root)))?;
        let reset = Arc::clone(&wires);
        let ports = ConfigPorts::new(&root, move || reset.reset());
        buses.pio.insert(u64::from(PORTS), PORTS_LEN, Arc::new(ports))?;
        let keyboard = Arc::new(I8042Reset::new(wires.clone()));
        buses.pio.insert(u64::from(power::I8042_PORT), u64::from(power::I8042_PORTS), keyboard)?;
        let power = Arc::new(PowerManagement::new(interrupts.line(power::SCI_GSI), wires));
        buses.pio.insert(u64::from(power::PORT), u64::from(power::PORTS), Arc::clone(&power) as _)?;
        let serial = Arc::new(SerialPort::new(Arc::clone(&resources.serial), interrupts.line(layout::COM1_IRQ)));
        resources.serial.connect_input(Arc::clone(&serial) as _);
        buses.pio.insert(u64::from(layout::COM1_PORT), SERIAL_PORTS, Arc::clone(&serial) as Arc<dyn BusDevice>)?;

        let mut plugged = Vec::new();
        let doorbells = Arc::new(IoEvents(Arc::clone(&vm)));
        let balloon = balloon(config, &memory)?;
        let balloon_control = balloon.as_ref().map(Balloon::control);
        for (id, device) in virtio_devices(config, resources, balloon)? {
            let slot = root.free_slot()?;
            let base = layout.mmio32().start.0 + BAR_LEN * u64::from(slot.0);
            let messages = Messages(Arc::clone(&interrupts));
            let ram = Arc::clone(&memory.ram);
            let function = VirtioPci::new(&id, device, base, ram, &messages, doorbells.clone())
                .map_err(io_error("a PCI function"))?;
            let function = Arc::new(function);
            root.plug(slot, Arc::clone(&function) as _)?;
            plugged.push(Plugged { slot, function });
        }

        let identity = Identity::fresh(&memory.ram, &power).map_err(io_error("the machine's identity"))?;
        let entry = load(config, resources, &layout, &memory, &cpuid)?;
        let boot = BootRegisters::new(&entry);
        boot.write_tables(&memory.ram)?;
        let msrs = kvm.get_msr_index_list().map_err(KvmError::refused("list its MSRs"))?;
        let mut fds = Vec::new();
        for index in 0..config.cpus {
            let fd = vm.create_vcpu(u64::from(index)).map_err(KvmError::refused("create a vCPU"))?;
            prepare(&fd, index, &cpuid, msrs.as_slice(), &boot)?;
            fds.push(fd);
        }
        let tell = move |event| match event {
            VcpuEvent::Reset => report(GuestEvent::Reset),
            VcpuEvent::Failed(why) => report(GuestEvent::Failed(why)),
        };
        let vcpus = Vcpus::spawn(fds, gate, &buses, tell).map_err(io_error("a vCPU thread"))?;
        info!(cpus = config.cpus, memory = config.memory_bytes, "machine built");
        Ok(Self {
            vcpus,
            plugged,
            serial,
            power,
            identity,
            balloon: balloon_control,
            _root: root,
            _vm: vm,
            _memory: memory,
        })
    }

    /// Lets devices and vCPUs run.
    pub fn run(&self) {
        for plugged in &self.plugged {
            plugged.function.resume();
        }
        self.vcpus.run();
    }

    /// Takes all vCPUs out of the guest, then drains the devices.
    pub fn pause(&self) {
        self.vcpus.pause();
        for plugged in &self.plugged {
            plugged.function.pause();
        }
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.power.press_power_button();
    }

    /// Makes it another machine than the one whose saved state it continues; see [`Identity::mark_disruption`].
    ///
    /// # Errors
    /// When the host gives no entropy: then it must not run.
    pub fn mark_disruption(&self) -> io::Result<()> {
        self.identity.mark_disruption()
    }

    /// The balloon, if it has one.
    pub fn balloon(&self) -> Option<&BalloonControl> {
        self.balloon.as_ref()
    }

    /// The counters of devices and vCPUs, which outlive the machine.
    pub fn meters(&self) -> Meters {
        let tally = |counters| Tally { counters, carried: BTreeMap::new() };
        let serial = tally(self.serial.counters());
        let mut devices = vec![Meter { id: "serial".into(), kind: "serial", address: None, tally: serial }];
        for Plugged { slot, function } in &self.plugged {
            let kind = match function.kind() {
                DeviceType::Net => "net",
                DeviceType::Block => "blk",
                DeviceType::Console => "console",
                DeviceType::Rng => "rng",
                DeviceType::Balloon => "balloon",
                DeviceType::Vsock => "vsock",
            };
            let (id, address) = (function.id().to_owned(), Some(slot.to_string()));
            devices.push(Meter { id, kind, address, tally: tally(function.counters()) });
        }
        let vcpus = self.vcpus.exits().iter().map(|exits| tally(Arc::clone(exits) as Arc<dyn Counters>)).collect();
        Meters { devices, vcpus }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Device threads go while vCPUs are parked; the vCPU threads end when their field is dropped.
        self.vcpus.pause();
        for plugged in &self.plugged {
            plugged.function.shut_down();
        }
    }
}

/// Counters of one machine, and what its predecessors' had come to.
struct Tally {
    counters: Arc<dyn Counters>,
    carried: BTreeMap<String, u64>,
}

impl Tally {
    fn read(&self) -> BTreeMap<String, u64> {
        let mut sums = self.carried.clone();
        for (name, value) in self.counters.read() {
            *sums.entry(name.into()).or_default() += value;
        }
        sums
    }
}

struct Meter {
    id: String,
    kind: &'static str,
    address: Option<String>,
    tally: Tally,
}

/// Reads the counters of a machine and of those before it: a reset does not set them back.
#[derive(Default)]
pub struct Meters {
    devices: Vec<Meter>,
    vcpus: Vec<Tally>,
}

impl Meters {
    /// Counts on from what `before`, of the machine that this one replaces, had come to.
    #[must_use]
    pub fn after(mut self, before: &Self) -> Self {
        // The same configuration makes the same devices in the same order.
        for (meter, before) in self.devices.iter_mut().zip(&before.devices) {
            meter.tally.carried = before.tally.read();
        }
        for (tally, before) in self.vcpus.iter_mut().zip(&before.vcpus) {
            tally.carried = before.read();
        }
        self
    }

    /// The devices as the API shows them.
    pub fn devices(&self) -> Vec<DeviceInfo> {
        let info = |meter: &Meter| DeviceInfo {
            id: meter.id.clone(),
            kind: meter.kind.into(),
            address: meter.address.clone(),
            counters: meter.tally.read(),
        };
        self.devices.iter().map(info).collect()
    }

    /// The vCPUs as the API shows them.
    pub fn vcpus(&self) -> Vec<VcpuInfo> {
        let info = |(index, tally): (usize, &Tally)| VcpuInfo { index: index as u32, exits: tally.read() };
        self.vcpus.iter().enumerate().map(info).collect()
    }
}

/// A device and its id.
type Named = (String, Box<dyn VirtioDevice>);

/// Disks, network cards, then what every machine has; in slot order.
fn virtio_devices(
    config: &VmConfig,
    resources: &Resources,
    balloon: Option<Balloon>,
) -> Result<Vec<Named>, BuildError> {
    let mut devices: Vec<Named> = Vec::new();
    for (disk, opened) in config.disks.iter().zip(&resources.disks) {
        devices.push((disk.id.clone(), Box::new(Block::new(&disk.id, Arc::clone(opened), BlockOptions::default()))));
    }
    for (net, tap) in config.nets.iter().zip(&resources.taps) {
        let derived = || Mac::derived(&format!("{}/{}", config.name, net.id));
        let mac = net.mac.map_or_else(derived, |mac| Mac(mac.0));
        devices.push((net.id.clone(), Box::new(Net::new(&net.id, Arc::clone(tap) as _, mac))));
    }
    let console = Console::new(Arc::clone(&resources.hvc)).map_err(io_error("the console"))?;
    resources.hvc.connect_input(console.input());
    devices.push(("rng".into(), Box::new(Rng::new())));
    devices.push(("console".into(), Box::new(console)));
    devices.extend(balloon.map(|balloon| ("balloon".into(), Box::new(balloon) as Box<dyn VirtioDevice>)));
    Ok(devices)
}

fn balloon(config: &VmConfig, memory: &Memory) -> Result<Option<Balloon>, BuildError> {
    let Some(wanted) = &config.balloon else { return Ok(None) };
    // What validation lets through is less than MAX_MEMORY, so its pages can be counted.
    let pages = (wanted.target_bytes / BALLOON_STEP_BYTES) as u32;
    Balloon::new(memory.page_release(), pages).map(Some).map_err(io_error("the balloon"))
}

/// Puts the guest's kernel, initial RAM disk, command line and ACPI tables into memory.
fn load(
    config: &VmConfig,
    resources: &mut Resources,
    layout: &Layout,
    memory: &Memory,
    cpuid: &CpuidTemplate,
) -> Result<crate::boot::Entry, BuildError> {
    let range = |window: layout::Window| window.start.0..window.end().0;
    let acpi = AcpiConfig {
        cpus: config.cpus,
        lapic: layout::LAPIC.0 as u32,
        ioapic: layout::IOAPIC.0 as u32,
        ecam: range(layout.ecam()),
        mmio32: range(layout.mmio32()),
        mmio64: layout.mmio64(cpuid.phys_bits()).map(range),
        pci_config_port: layout::PCI_CONFIG_PORT,
        com1: Some((layout::COM1_PORT, layout::COM1_IRQ)),
        generation_id: Some(layout::GENERATION_PAGE.0),
        clock: Some(layout::CLOCK_PAGE.0),
        ..Default::default()
    };
    let base = layout::ACPI_TABLES;
    let blob = tables::build(&acpi, base.0);
    memory.ram.write_slice(&blob.bytes, base.into()).map_err(|_| BuildError::Place("ACPI tables"))?;
    let cmdline = config.effective_cmdline();
    let params = BootParams { cmdline: &cmdline, initrd: resources.initrd.as_mut(), rsdp: Gpa(blob.rsdp) };
    Ok(resources.kernel.load(&memory.ram, layout, params)?)
}

/// The guest's CPUID table, from what KVM supports.
fn cpuid(kvm: &Kvm, cpus: u8) -> Result<CpuidTemplate, BuildError> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(KvmError::refused("tell its CPUID"))?;
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    Ok(CpuidTemplate::new(supported.as_slice(), cpus, tsc_deadline)?)
}

/// Brings a vCPU to where the boot protocol wants it; all but the first wait for their start-up interrupt.
fn prepare(
    fd: &VcpuFd,
    index: u8,
    cpuid: &CpuidTemplate,
    msrs: &[u32],
    boot: &BootRegisters,
) -> Result<(), BuildError> {
    cpuid.apply(index, fd)?;
    msr::apply(fd, &msr::boot_msrs(msrs))?;
    registers::apply_common(fd)?;
    if index == 0 {
        boot.apply(fd)?;
    }
    Ok(())
}
