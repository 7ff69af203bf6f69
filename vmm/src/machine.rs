//! A machine: everything between a reset and the next.
//!
//! ```text
//! VmConfig ─▶ Layout ─▶ Resources ─▶ Machine (vCPUs parked) ─▶ run ⇄ pause ─▶ drop
//!            (pure)    (fds, locks)
//! ```
//!
//! A saved machine ([`state`]) takes the other road: the same board, with the state in place of a kernel.
//!
//! A reset drops the machine and builds the next from the same resources: the guest finds memory, vCPUs and devices as after
//! power-on, and no state can leak from one boot into the next.
//!
//! Invariants: the vCPUs end before anything that they use; [`Machine::pause`] returns only when no vCPU is in the guest and no
//! device touches its memory.

mod meters;
mod plugging;
pub mod state;
pub mod surgery;

use std::io;
use std::sync::{Arc, OnceLock};

use civic_api::{BALLOON_STEP_BYTES, DiskConfig, MacAddr, NetConfig, VmConfig};
use civic_devices::acpi::hotplug::{self, Hotplug};
use civic_devices::acpi::power::{self, I8042Reset, PowerEvents, PowerManagement, ResetEvents};
use civic_devices::acpi::tables::{self, AcpiConfig};
use civic_devices::bus::{Bus, BusDevice, BusError};
use civic_devices::console_hub::ConsoleHub;
use civic_devices::pci::Slot;
use civic_devices::pci::root::{ConfigPorts, ECAM_LEN, Ecam, PORTS, PORTS_LEN, PciRoot, SlotError};
use civic_devices::serial::{SERIAL_PORTS, SerialPort};
use civic_devices::virtio::balloon::{Balloon, BalloonControl};
use civic_devices::virtio::block::{Block, BlockOptions, Disk};
use civic_devices::virtio::console::Console;
use civic_devices::virtio::net::{FrameLink, Mac, Mirror, Net, NetError, NetOptions};
use civic_devices::virtio::pci::{BAR_LEN, VirtioPci};
use civic_devices::virtio::rate::RateLimit;
use civic_devices::virtio::rng::Rng;
use civic_devices::virtio::vsock::Vsock;
use civic_devices::virtio::{GuestRam, VirtioDevice};
use civic_fork::lazy::LazyMemory;
use civic_fork::ram::PAGE;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use tracing::info;
use vm_memory::Bytes;

use crate::boot::{BootError, BootParams};
use crate::cpu::cpuid::{CpuidError, CpuidTemplate};
use crate::cpu::msr::{self, MsrError};
use crate::cpu::registers::{self, BootRegisters, RegistersError};
use crate::cpu::state::{VcpuShape, VcpuStateError};
use crate::identity::Identity;
use crate::kvm::interrupts::{Interrupts, Messages};
use crate::kvm::slots::Annex;
use crate::kvm::{self, IoEvents, KvmError};
use crate::layout::{self, Gpa, Layout, LayoutError};
use crate::memory::{Memory, MemoryError};
use crate::resources::Resources;
use crate::traps::Traps;
use crate::vcpu::{Buses, Gate, VcpuEvent, Vcpus};

pub use self::meters::Meters;
pub use self::plugging::{Mirrored, Places, Presence};

/// The guest's vsock address where the user gives none: the lowest there is.
const DEFAULT_CID: u32 = 3;
/// Most queues of a disk where the user does not say how many.
const DEFAULT_DISK_QUEUES: u16 = 4;

/// What the guest did that ends this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// It switched itself off.
    PowerOff,
    /// It reset itself, or triple-faulted.
    Reset,
    /// It gave up a device: see [`Machine::given_up`].
    GaveUp,
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
    #[error("cannot use this host's KVM for a vCPU")]
    Vcpu(#[source] VcpuStateError),
    #[error("cannot place a device")]
    Bus(#[from] BusError),
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error("network card '{id}' cannot be as it is asked for")]
    Net {
        id: String,
        #[source]
        source: NetError,
    },
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
    /// A network card's.
    mirror: Option<Arc<Mirror>>,
}

/// A machine with its vCPUs parked or running.
pub struct Machine {
    // Dropped first: no vCPU may run while the rest goes.
    vcpus: Vcpus,
    /// Dropped while the vCPUs are gone and the devices shut down, as it demands.
    lazy: Option<Arc<LazyMemory>>,
    /// Whether its memory is another's, and only what it has written is its own.
    forked: bool,
    plugged: Vec<Plugged>,
    serial: Arc<SerialPort>,
    power: Arc<PowerManagement>,
    hotplug: Arc<Hotplug>,
    identity: Identity,
    balloon: Option<BalloonControl>,
    /// Kept here alone: the ways into it do not keep it.
    root: Arc<PciRoot>,
    sockets: Sockets,
    cpuid: CpuidTemplate,
    shape: VcpuShape,
    vm: Arc<VmFd>,
    memory: Memory,
    /// Once something was placed in the guest's kernel.
    annex: OnceLock<Arc<Annex>>,
    traps: Arc<Traps>,
}

/// What a PCI function is wired to.
#[derive(Clone)]
struct Sockets {
    layout: Layout,
    ram: GuestRam,
    vm: Arc<VmFd>,
    interrupts: Arc<Interrupts>,
}

impl Sockets {
    /// A function for a virtio device, to be plugged into `slot`.
    fn function(&self, id: &str, device: Box<dyn VirtioDevice>, slot: Slot) -> Result<Arc<VirtioPci>, BuildError> {
        let base = self.layout.mmio32().start.0 + BAR_LEN * u64::from(slot.0);
        let messages = Messages(Arc::clone(&self.interrupts));
        let doorbells = Arc::new(IoEvents(Arc::clone(&self.vm)));
        let function = VirtioPci::new(id, device, base, Arc::clone(&self.ram), &messages, doorbells);
        Ok(Arc::new(function.map_err(io_error("a PCI function"))?))
    }
}

/// What becomes a machine: all of it but the vCPUs, at power-on.
pub struct Board {
    layout: Layout,
    memory: Memory,
    kvm: Kvm,
    vm: Arc<VmFd>,
    interrupts: Arc<Interrupts>,
    cpuid: CpuidTemplate,
    gate: Arc<Gate>,
    buses: Buses,
    root: Arc<PciRoot>,
    power: Arc<PowerManagement>,
    hotplug: Arc<Hotplug>,
    serial: Arc<SerialPort>,
}

impl Board {
    /// Memory, interrupt controllers, buses and what every machine has on them.
    fn new(
        config: &VmConfig,
        resources: &Resources,
        report: impl Fn(GuestEvent) + Clone + Send + Sync + 'static,
    ) -> Result<Self, BuildError> {
        let layout = Layout::new(config.memory_bytes)?;
        let memory = Memory::allocate(&layout)?;
        Self::around(config, resources, layout, memory, report)
    }

    fn around(
        config: &VmConfig,
        resources: &Resources,
        layout: Layout,
        memory: Memory,
        report: impl Fn(GuestEvent) + Clone + Send + Sync + 'static,
    ) -> Result<Self, BuildError> {
        let kvm = kvm::open()?;
        let vm = kvm::create_vm(&kvm)?;
        kvm::slots::insert_ram(&vm, &memory.ram)?;
        let cpuid = cpuid(&kvm, config.cpus)?;
        layout.check_reach(cpuid.phys_bits())?;

        let interrupts = Interrupts::new(Arc::clone(&vm)).map_err(io_error("the interrupt routing"))?;
        let gate = Gate::new();
        let wires = Arc::new(Wires { gate: Arc::clone(&gate), report });

        let buses = Buses { pio: Arc::new(Bus::new()), mmio: Arc::new(Bus::new()), traps: Arc::default() };
        let root = PciRoot::new(Arc::clone(&buses.mmio));
        buses.mmio.insert(layout::ECAM.start.0, ECAM_LEN, Arc::new(Ecam::new(&root)))?;
        let reset = Arc::clone(&wires);
        let ports = ConfigPorts::new(&root, move || reset.reset());
        buses.pio.insert(u64::from(PORTS), PORTS_LEN, Arc::new(ports))?;
        let keyboard = Arc::new(I8042Reset::new(wires.clone()));
        buses.pio.insert(u64::from(power::I8042_PORT), u64::from(power::I8042_PORTS), keyboard)?;
        let power = Arc::new(PowerManagement::new(interrupts.line(power::SCI_GSI), Arc::clone(&wires) as _));
        buses.pio.insert(u64::from(power::PORT), u64::from(power::PORTS), Arc::clone(&power) as _)?;
        let slots = Arc::downgrade(&root);
        let hotplug = Arc::new(Hotplug::new(Arc::clone(&power), move |slot| {
            // What it was doing goes on until the supervisor stops it.
            if slots.upgrade().and_then(|slots| slots.unplug(slot)).is_some() {
                (wires.report)(GuestEvent::GaveUp);
            }
        }));
        buses.pio.insert(u64::from(hotplug::PORT), u64::from(hotplug::PORTS), Arc::clone(&hotplug) as _)?;
        let serial = Arc::new(SerialPort::new(Arc::clone(&resources.serial), interrupts.line(layout::COM1_IRQ)));
        resources.serial.connect_input(Arc::clone(&serial) as _);
        buses.pio.insert(u64::from(layout::COM1_PORT), SERIAL_PORTS, Arc::clone(&serial) as Arc<dyn BusDevice>)?;
        Ok(Self { layout, memory, kvm, vm, interrupts, cpuid, gate, buses, root, power, hotplug, serial })
    }

    /// The devices that are functions of the PCI bus, in slot order, and what sets the balloon's size.
    fn devices(
        &self,
        config: &VmConfig,
        resources: &Resources,
    ) -> Result<(Vec<Made>, Option<BalloonControl>), BuildError> {
        let balloon = balloon(config, &self.memory)?;
        let control = balloon.as_ref().map(Balloon::control);
        Ok((virtio_devices(config, resources, balloon)?, control))
    }

    fn sockets(&self) -> Sockets {
        Sockets {
            layout: self.layout,
            ram: Arc::clone(&self.memory.ram),
            vm: Arc::clone(&self.vm),
            interrupts: Arc::clone(&self.interrupts),
        }
    }

    fn shape(&self) -> Result<VcpuShape, BuildError> {
        let xsave2 = self.vm.check_extension_raw(VcpuShape::XSAVE2);
        VcpuShape::new(&self.kvm, xsave2).map_err(BuildError::Vcpu)
    }

    /// The vCPUs' threads, parked.
    fn spawn(
        &self,
        fds: Vec<VcpuFd>,
        report: impl Fn(GuestEvent) + Clone + Send + 'static,
    ) -> Result<Vcpus, BuildError> {
        let tell = move |event| match event {
            VcpuEvent::Reset => report(GuestEvent::Reset),
            VcpuEvent::Failed(why) => report(GuestEvent::Failed(why)),
        };
        Vcpus::spawn(fds, Arc::clone(&self.gate), &self.buses, tell).map_err(io_error("a vCPU thread"))
    }

    /// The machine, parked.
    fn finish(
        self,
        vcpus: Vcpus,
        plugged: Vec<Plugged>,
        balloon: Option<BalloonControl>,
        identity: Identity,
        lazy: Option<LazyMemory>,
    ) -> Result<Machine, BuildError> {
        let (shape, sockets) = (self.shape()?, self.sockets());
        let Self { memory, vm, cpuid, root, power, hotplug, serial, buses, .. } = self;
        Ok(Machine {
            vcpus,
            lazy: lazy.map(Arc::new),
            forked: false,
            plugged,
            serial,
            power,
            hotplug,
            identity,
            balloon,
            root,
            sockets,
            cpuid,
            shape,
            vm,
            memory,
            annex: OnceLock::new(),
            traps: buses.traps,
        })
    }
}

impl Machine {
    /// Builds a machine at its power-on state; `report` is called, from any thread, with what the guest does that its owner must know of.
    /// Devices in `places` are where they were before.
    pub fn build(
        config: &VmConfig,
        resources: &mut Resources,
        places: &Places,
        report: impl Fn(GuestEvent) + Clone + Send + Sync + 'static,
    ) -> Result<Self, BuildError> {
        let board = Board::new(config, resources, report.clone())?;
        let mut plugged = Vec::new();
        let (devices, balloon) = board.devices(config, resources)?;
        let sockets = board.sockets();
        for Made { id, device, mirror } in devices {
            let slot = match places.get(&id) {
                Some(slot) => *slot,
                None => board.root.free_slot(|slot| places.values().any(|taken| *taken == slot))?,
            };
            let function = sockets.function(&id, device, slot)?;
            board.root.plug(slot, Arc::clone(&function) as _)?;
            plugged.push(Plugged { slot, function, mirror });
        }
        board.hotplug.serve(plugging::slots(config, &plugged));
        let identity = Identity::fresh(&board.memory.ram, &board.power).map_err(io_error("the machine's identity"))?;
        let entry = load(config, resources, &board)?;
        let boot = BootRegisters::new(&entry);
        boot.write_tables(&board.memory.ram)?;
        let msrs = board.kvm.get_msr_index_list().map_err(KvmError::refused("list its MSRs"))?;
        let mut fds = Vec::new();
        for index in 0..config.cpus {
            let fd = board.vm.create_vcpu(u64::from(index)).map_err(KvmError::refused("create a vCPU"))?;
            prepare(&fd, index, &board.cpuid, msrs.as_slice(), &boot)?;
            fds.push(fd);
        }
        let vcpus = board.spawn(fds, report)?;
        let machine = board.finish(vcpus, plugged, balloon, identity, None)?;
        info!(cpus = config.cpus, memory = config.memory_bytes, "machine built");
        Ok(machine)
    }

    /// Lets devices and vCPUs run.
    pub fn run(&self) {
        for plugged in &self.plugged {
            plugged.function.resume();
        }
        self.vcpus.run();
    }

    /// Has KVM map pages that are there, so that the guest need not leave for each: runs of pages of the memory file. Returns how many pages
    /// were mapped: none where this host's KVM cannot (before Linux 6.11, or without two-dimensional paging). The vCPUs must be paused.
    pub fn map(&self, runs: &[(u32, u32)]) -> u64 {
        let regions = self.sockets.layout.ram_regions();
        let within = |&(first, pages): &(u32, u32)| {
            let (start, end) = (u64::from(first) * PAGE as u64, (u64::from(first) + u64::from(pages)) * PAGE as u64);
            regions.iter().filter_map(move |(gpa, len, offset)| {
                let (from, to) = (start.max(*offset), end.min(offset + len));
                (from < to).then(|| (gpa.0 + (from - offset), to - from))
            })
        };
        let ranges: Vec<_> = runs.iter().flat_map(within).collect();
        let map = |fd: &VcpuFd, _, ranges: Vec<(u64, u64)>| {
            ranges.into_iter().map_while(|(gpa, bytes)| kvm::slots::map(fd, gpa, bytes).ok()).sum::<u64>()
        };
        self.vcpus.hand(0, vec![ranges], map).into_iter().flatten().sum::<u64>() / PAGE as u64
    }

    /// The same after a time in which the guest's clock has gone on without it: its watchdogs are told why.
    pub fn run_again(&self) {
        self.vcpus.each(|fd| {
            // A guest without kvmclock has no way to be told.
            let _ = fd.kvmclock_ctrl();
        });
        self.run();
    }

    /// Takes all vCPUs out of the guest, then drains the devices.
    pub fn pause(&self) {
        self.vcpus.pause();
        for plugged in &self.plugged {
            plugged.function.pause();
        }
    }

    /// Takes all vCPUs out of the guest until what is returned is dropped, and lets devices run. They must be in it.
    pub fn hold_vcpus(&self) -> impl Drop {
        self.vcpus.pause();
        Held(&self.vcpus)
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

    /// When its first vCPU entered the guest, by [`crate::clock::monotonic`]; none if it may not.
    pub fn entered(&self) -> Option<u64> {
        self.vcpus.entered()
    }
}

struct Held<'a>(&'a Vcpus);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.run();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Device threads go while vCPUs are parked; the vCPU threads end when their field is dropped. A thread that waits for memory
        // that is still being loaded gets it.
        self.vcpus.pause();
        for plugged in &self.plugged {
            plugged.function.shut_down();
        }
    }
}

/// A device that is not plugged in yet.
struct Made {
    id: String,
    device: Box<dyn VirtioDevice>,
    /// A network card's.
    mirror: Option<Arc<Mirror>>,
}

impl Made {
    fn new(id: &str, device: impl VirtioDevice + 'static) -> Self {
        Self { id: id.to_owned(), device: Box::new(device), mirror: None }
    }
}

/// Disks, network cards, then what every machine has; in slot order.
fn virtio_devices(config: &VmConfig, resources: &Resources, balloon: Option<Balloon>) -> Result<Vec<Made>, BuildError> {
    let mut devices: Vec<Made> = Vec::new();
    for (disk, opened) in config.disks.iter().zip(&resources.disks) {
        devices.push(disk_device(config, disk, &opened.disk)?);
    }
    for (net, tap) in config.nets.iter().zip(&resources.taps) {
        devices.push(net_device(config, net, tap.clone())?);
    }
    devices.push(Made::new("rng", Rng::new()));
    devices.push(console_device("console", &resources.hvc)?);
    if let (Some(vsock), Some(listener)) = (&config.vsock, &resources.vsock) {
        let device = Vsock::new(u64::from(vsock.cid.unwrap_or(DEFAULT_CID)), Arc::clone(listener));
        devices.push(Made::new("vsock", device.map_err(io_error("the vsock"))?));
    }
    devices.extend(balloon.map(|balloon| Made::new("balloon", balloon)));
    for (console, hub) in config.consoles.iter().zip(&resources.consoles) {
        devices.push(console_device(&console.id, hub)?);
    }
    Ok(devices)
}

fn disk_device(config: &VmConfig, disk: &DiskConfig, opened: &Arc<Disk>) -> Result<Made, BuildError> {
    let options = block_options(config, disk);
    Ok(Made::new(&disk.id, Block::new(&disk.id, Arc::clone(opened), options).map_err(io_error("a disk"))?))
}

fn net_device(config: &VmConfig, net: &NetConfig, links: Vec<Arc<dyn FrameLink>>) -> Result<Made, BuildError> {
    let mac = Mac(effective_mac(config, net).0);
    let (rx_rate, tx_rate) = (net.rx_rate.as_ref().map(rate), net.tx_rate.as_ref().map(rate));
    let card = Net::new(&net.id, links, NetOptions { mac, mtu: net.mtu, rx_rate, tx_rate });
    let card = card.map_err(|source| BuildError::Net { id: net.id.clone(), source })?;
    let mirror = Some(card.mirror());
    Ok(Made { mirror, ..Made::new(&net.id, card) })
}

fn console_device(id: &str, hub: &Arc<ConsoleHub>) -> Result<Made, BuildError> {
    let console = Console::new(Arc::clone(hub)).map_err(io_error("the console"))?;
    hub.connect_input(console.input());
    Ok(Made::new(id, console))
}

/// A queue for each vCPU, where the user does not say otherwise, but not so many that most would be idle.
fn block_options(config: &VmConfig, disk: &DiskConfig) -> BlockOptions {
    let queues = disk.queues.unwrap_or(u16::from(config.cpus).min(DEFAULT_DISK_QUEUES));
    BlockOptions { queues, rate: disk.rate.as_ref().map(rate) }
}

fn rate(limit: &civic_api::RateLimit) -> RateLimit {
    RateLimit { bytes_per_second: limit.bytes_per_second, operations_per_second: limit.operations_per_second }
}

fn balloon(config: &VmConfig, memory: &Memory) -> Result<Option<Balloon>, BuildError> {
    let Some(wanted) = &config.balloon else { return Ok(None) };
    // What validation lets through is less than MAX_MEMORY, so its pages can be counted.
    let pages = (wanted.target_bytes / BALLOON_STEP_BYTES) as u32;
    Balloon::new(memory.page_release(), pages).map(Some).map_err(io_error("the balloon"))
}

/// The address that a network card has: the configured one, or one made from the VM's name and the card's id.
pub fn effective_mac(config: &VmConfig, net: &NetConfig) -> MacAddr {
    net.mac.unwrap_or_else(|| MacAddr(Mac::derived(&format!("{}/{}", config.name, net.id)).0))
}

/// Puts the guest's kernel, initial RAM disk, command line and ACPI tables into memory.
fn load(
    config: &VmConfig,
    resources: &mut Resources,
    Board { layout, memory, cpuid, hotplug, .. }: &Board,
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
        hotplug_slots: hotplug.save().slots,
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
