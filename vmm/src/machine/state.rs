//! A machine's state: taken from one that is paused, given to a board in place of a kernel.
//!
//! ```text
//! save:     pause ─▶ vCPUs (each on its thread) ─▶ interrupt controllers, clock ─▶ board devices ─▶ PCI functions
//! restore:  board ─▶ memory ─▶ functions ─▶ vCPUs ─▶ interrupt controllers, clock ─▶ board devices ─▶ nudge ─▶ parked machine
//! ```
//!
//! Nothing is in flight in a paused machine, so memory and state together are all of it. Interrupts that a device had raised are in the
//! local APICs, which are therefore saved after the devices were drained and restored after the functions' vectors were routed; one that
//! KVM had not delivered yet is made up for by the nudge.

use std::sync::Arc;

use civic_api::VmConfig;
use civic_devices::acpi::hotplug::HotplugStateV1;
use civic_devices::acpi::power::PowerStateV1;
use civic_devices::pci::Slot;
use civic_devices::pci::root::PciRootStateV1;
use civic_devices::serial::{FifoTooLong, SerialStateV1};
use civic_devices::virtio::state::{StateError as DeviceStateError, VirtioPciStateV1};
use civic_fork::lazy::LazyMemory;
use serde::{Deserialize, Serialize};
use tracing::info;

use super::{Board, BuildError, GuestEvent, Machine, Made, Plugged, io_error};
use crate::cpu::cpuid::{CpuidStateV1, CpuidTemplate};
use crate::cpu::state::{ClockLeader, VcpuShape, VcpuStateError, VcpuStateV1};
use crate::identity::Identity;
use crate::kvm::KvmError;
use crate::kvm::state::KvmStateV1;
use crate::layout::{self, Layout};
use crate::memory::Memory;
use crate::resources::Resources;
use crate::state::{Section, Sections, StateError};
use crate::vcpu::Vcpus;

const CPUID: &str = "cpuid";
const KVM: &str = "kvm";
const POWER: &str = "power";
const SERIAL: &str = "serial";
const PCI: &str = "pci";
const HOTPLUG: &str = "hotplug";

fn vcpu(index: usize) -> String {
    format!("vcpu{index}")
}

fn device(id: &str) -> String {
    format!("device/{id}")
}

/// A PCI function in its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionStateV2 {
    /// Device number on bus 0.
    pub slot: u8,
    /// Whether it is still on the bus, or was just given up.
    pub plugged: bool,
    /// The function.
    pub function: VirtioPciStateV1,
}

impl Section for FunctionStateV2 {
    const VERSION: u16 = 2;
}

impl Section for HotplugStateV1 {
    const VERSION: u16 = 1;
}

impl Section for PowerStateV1 {
    const VERSION: u16 = 1;
}

impl Section for SerialStateV1 {
    const VERSION: u16 = 1;
}

impl Section for PciRootStateV1 {
    const VERSION: u16 = 1;
}

/// Why a machine's state cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// A vCPU's.
    #[error("cannot read the state of vCPU {index}")]
    Vcpu {
        /// Which.
        index: usize,
        /// Why.
        #[source]
        source: VcpuStateError,
    },
    /// A vCPU whose thread has ended.
    #[error("vCPU {0} has failed: it has no state")]
    Ended(usize),
    /// The VM's.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// Why a machine cannot be made from a state.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The sources say it.
pub enum RestoreError {
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("cannot restore vCPU {index}")]
    Vcpu {
        index: usize,
        #[source]
        source: VcpuStateError,
    },
    #[error("vCPU {0} has failed")]
    Ended(usize),
    #[error("cannot restore device '{id}'")]
    Device {
        id: String,
        #[source]
        source: DeviceStateError,
    },
    #[error(transparent)]
    Serial(#[from] FifoTooLong),
    #[error("the PCI host bridge's state is of another one")]
    Bridge,
}

impl From<KvmError> for RestoreError {
    fn from(error: KvmError) -> Self {
        Self::Build(error.into())
    }
}

/// A machine to come: all that takes time to make is there, and nothing of it has a state yet.
pub struct Blank {
    board: Board,
    vcpus: Vcpus,
}

impl Blank {
    fn new(
        board: Board,
        config: &VmConfig,
        report: impl Fn(GuestEvent) + Clone + Send + 'static,
    ) -> Result<Self, BuildError> {
        let mut fds = Vec::new();
        for index in 0..config.cpus {
            let fd = board.vm.create_vcpu(u64::from(index)).map_err(KvmError::refused("create a vCPU"))?;
            board.cpuid.apply(index, &fd)?;
            fds.push(fd);
        }
        let vcpus = board.spawn(fds, report)?;
        Ok(Self { board, vcpus })
    }
}

/// Gives each vCPU its state, the first one before the others, whose clocks follow it; and another identification, if it has to be.
fn restore_vcpus(
    vcpus: &Vcpus,
    shape: &VcpuShape,
    cpuid: Option<&CpuidTemplate>,
    mut states: Vec<VcpuStateV1>,
) -> Result<(), RestoreError> {
    let others = states.split_off(1.min(states.len()));
    let mut clock = ClockLeader::default();
    for (first, states) in [(0, states), (1, others)] {
        let (shape, cpuid, leader) = (shape.clone(), cpuid.cloned(), clock.clone());
        let restored = vcpus.hand(first, states, move |fd, index, state| {
            let mut clock = leader.clone();
            if let Some(cpuid) = &cpuid {
                cpuid.apply(index as u8, fd).map_err(BuildError::from)?;
            }
            let failed = |source| RestoreError::Vcpu { index, source };
            shape.restore(fd, &state, &mut clock).map_err(failed)?;
            // So that the guest's watchdogs know why so much time has passed. A guest without kvmclock has no way to be told.
            let _ = fd.kvmclock_ctrl();
            Ok::<_, RestoreError>(clock)
        });
        for (index, restored) in (first..).zip(restored) {
            clock = restored.ok_or(RestoreError::Ended(index))??;
        }
    }
    Ok(())
}

impl Machine {
    /// The state of everything but memory. The machine must be paused.
    ///
    /// # Errors
    /// When KVM refuses to tell.
    pub fn save(&self) -> Result<Sections, SaveError> {
        let mut sections = Sections::default();
        let shape = self.shape.clone();
        for (index, state) in self.vcpus.each(move |fd| shape.save(fd)).into_iter().enumerate() {
            let state = state.ok_or(SaveError::Ended(index))?;
            sections.put(vcpu(index), &state.map_err(|source| SaveError::Vcpu { index, source })?);
        }
        sections.put(KVM, &KvmStateV1::save(&self.vm)?);
        sections.put(CPUID, &self.cpuid.save());
        sections.put(POWER, &self.power.save());
        sections.put(SERIAL, &self.serial.save());
        sections.put(PCI, &self.root.save());
        sections.put(HOTPLUG, &self.hotplug.save());
        for Plugged { slot, function, .. } in &self.plugged {
            let state = FunctionStateV2 { slot: slot.0, plugged: self.root.holds(*slot), function: function.save() };
            sections.put(device(function.id()), &state);
        }
        Ok(sections)
    }

    /// Builds the machine that `sections` are of, paused. `fill` has its memory appear, at once or while it runs.
    ///
    /// # Errors
    /// When the state is not of a machine of this configuration, or this host cannot carry it.
    pub fn restore<E: From<RestoreError>>(
        config: &VmConfig,
        resources: &mut Resources,
        sections: &mut Sections,
        fill: impl FnOnce(&Memory) -> Result<Option<LazyMemory>, E>,
        report: impl Fn(GuestEvent) + Clone + Send + Sync + 'static,
    ) -> Result<Self, E> {
        let board = Board::new(config, resources, report.clone()).map_err(RestoreError::from)?;
        let lazy = fill(&board.memory)?;
        let blank = Blank::new(board, config, report).map_err(RestoreError::from)?;
        Ok(Self::revive(blank, config, resources, sections, lazy)?)
    }

    /// What becomes a child's machine, before it is known what that is: everything that takes time. `memory` is nobody's yet and is not
    /// touched.
    ///
    /// # Errors
    /// When this host cannot carry such a machine.
    pub fn unborn(
        config: &VmConfig,
        resources: &Resources,
        layout: Layout,
        memory: Memory,
        report: impl Fn(GuestEvent) + Clone + Send + Sync + 'static,
    ) -> Result<Blank, BuildError> {
        let board = Board::around(config, resources, layout, memory, report.clone())?;
        Blank::new(board, config, report)
    }

    /// The child's machine, parked: `sections` are its source's at the fork point, and its memory answers.
    ///
    /// # Errors
    /// As [`Machine::restore`].
    pub fn born(
        blank: Blank,
        config: &VmConfig,
        resources: &Resources,
        sections: &mut Sections,
    ) -> Result<Self, RestoreError> {
        let mut machine = Self::revive(blank, config, resources, sections, None)?;
        machine.forked = true;
        Ok(machine)
    }

    /// Whether its memory is another's, and only what it has written is its own.
    pub fn is_forked(&self) -> bool {
        self.forked
    }

    fn revive(
        blank: Blank,
        config: &VmConfig,
        resources: &Resources,
        sections: &mut Sections,
        lazy: Option<LazyMemory>,
    ) -> Result<Self, RestoreError> {
        let Blank { mut board, vcpus } = blank;
        let cpuid: CpuidStateV1 = sections.take(CPUID)?;
        // Mostly what they have already: of a VM that was made on a host like this one.
        let renamed = board.cpuid.save() != cpuid;
        board.cpuid = board.cpuid.restore(cpuid).map_err(BuildError::from)?;
        if !board.root.restore(&sections.take(PCI)?) {
            return Err(RestoreError::Bridge);
        }
        let mut plugged = Vec::new();
        let (devices, balloon) = board.devices(config, resources)?;
        let sockets = board.sockets();
        for Made { id, device: virtio, mirror } in devices {
            let saved: FunctionStateV2 = sections.take(&device(&id))?;
            let slot = Slot(saved.slot);
            let function = sockets.function(&id, virtio, slot)?;
            function.restore(saved.function).map_err(|source| RestoreError::Device { id, source })?;
            if saved.plugged {
                board.root.plug(slot, Arc::clone(&function) as _).map_err(BuildError::from)?;
                board.root.settle(slot);
            }
            plugged.push(Plugged { slot, function, mirror });
        }
        let states = (0..config.cpus).map(|index| sections.take(&vcpu(index.into()))).collect::<Result<_, _>>()?;
        restore_vcpus(&vcpus, &board.shape()?, renamed.then_some(&board.cpuid), states)?;
        sections.take::<KvmStateV1>(KVM)?.restore(&board.vm)?;
        board.serial.restore(&sections.take(SERIAL)?, board.interrupts.line(layout::COM1_IRQ))?;
        board.hotplug.restore(&sections.take(HOTPLUG)?);
        board.power.restore(&sections.take(POWER)?);
        let identity = Identity::inherited(&board.memory.ram, &board.power);
        let machine = board.finish(vcpus, plugged, balloon, identity, lazy)?;
        machine.mark_disruption().map_err(io_error("the machine's identity"))?;
        for plugged in &machine.plugged {
            plugged.function.nudge();
        }
        info!(cpus = config.cpus, memory = config.memory_bytes, "machine restored");
        Ok(machine)
    }

    /// The RAM. Until [`Machine::loading`] is none, only what goes through its mappings sees all of it.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What still loads the memory of a machine that was restored; none when it is all there.
    pub fn loading(&self) -> Option<Arc<LazyMemory>> {
        self.lazy.clone().filter(|lazy| lazy.counters().bytes_left > 0)
    }
}
