//! The guest's kernel, found from outside: the supervisor takes the vCPUs' registers, a thread reads the memory while the guest runs on.

use std::io::{self, Read};
use std::path::PathBuf;
use std::time::Instant;

use civic_api::{
    ErrorBody, ErrorCode, Finding, GuestChecksums, GuestFile, GuestFiles, GuestImage, GuestKernel, GuestSymbols,
    GuestTypes, PerCpuSymbols, SymbolAddresses, VmState,
};
use civic_guest::current::PerCpu;
use civic_guest::hints::Hints;
use civic_guest::kallsyms::Addresses;
use civic_guest::kernel::{Checksums, Kernel, Report};
use civic_guest::registers::Registers;
use civic_inject::plan::Plan;
use tracing::{info, warn};

use super::injecting::Operation;
use super::{Message, Supervisor, wrong_state};
use crate::control::{Answer, Command, Reply};
use crate::machine::Machine;
use crate::machine::surgery::Seen;
use crate::resources::open_regular;

/// How often a VM that is forked looks at its guest for the forks' sake: what is no Linux will not become one.
const MOST_LOOKS: u8 = 3;
/// As much of a file as is read: kernels with all their debugging information are smaller.
const LARGEST_FILE: u64 = 2 << 30;

impl Supervisor {
    /// Starts to look for the guest's kernel; the reply comes when it is found, or is not.
    pub(super) fn begin_examination(&self, files: GuestFiles, reply: Reply) {
        let begun = Instant::now();
        let registers = match self.registers() {
            Ok(registers) => registers,
            Err(e) => return drop(reply.send(Err(e))),
        };
        let stopped = begun.elapsed();
        let Some(memory) = self.machine.as_ref().map(|machine| machine.memory().ram.clone()) else { return };
        let (sender, boot, hinted) = (self.sender.clone(), self.boot, !files.is_empty());
        let look = move || {
            let memory = Seen(&memory);
            let contents = match Contents::read(&files) {
                Ok(contents) => contents,
                Err(e) => return drop(reply.send(Err(e))),
            };
            let found = Kernel::find_with(&memory, &registers, &contents.hints());
            let took = begun.elapsed();
            info!(?stopped, ?took, found = found.is_ok(), "looked for the guest's kernel");
            let answer = found.map(|kernel| {
                // Its forks need not look again. What was found by somebody's files is not what it says itself.
                let plan = (!hinted).then(|| Plan::of(&kernel, &memory).ok()).flatten();
                let _ = sender.send(Message::Operate(learnt(boot, plan)));
                let (stopped_us, took_us) = (stopped.as_micros() as u64, took.as_micros() as u64);
                // What cannot be read was not there for the rest either.
                let checksums = kernel.checksums(&memory).ok().flatten();
                Answer::Examined(Box::new(told(kernel.report(), checksums, stopped_us, took_us)))
            });
            let _ = reply.send(answer.map_err(|e| ErrorBody::from_error(ErrorCode::GuestUnusable, &e)));
        };
        // The reply is lost with the thread; dropping it is answered.
        if let Err(e) = std::thread::Builder::new().name("examiner".into()).spawn(look) {
            warn!("cannot start a thread to look at the guest: {e}");
        }
    }

    /// Has what is needed to start programs in the guest be found beside, when somebody waits to be forked from it, so that its forks know it
    /// from the start. Nobody waits for it, and where it is not found, as in a guest that still boots, the forks look for themselves.
    pub(super) fn learn(&mut self) {
        if self.plan.is_some() || self.learning || self.looked >= MOST_LOOKS {
            return;
        }
        self.looked += 1;
        let (Ok(registers), Some(machine)) = (self.registers(), &self.machine) else { return };
        let (memory, sender, boot) = (machine.memory().ram.clone(), self.sender.clone(), self.boot);
        let look = move || {
            let memory = Seen(&memory);
            let found = Kernel::find(&memory, &registers).ok();
            let plan = found.and_then(|kernel| Plan::of(&kernel, &memory).ok());
            let tell: Operation = Box::new(move |supervisor| {
                supervisor.learning = false;
                learnt(boot, plan)(supervisor);
            });
            let _ = sender.send(Message::Operate(tell));
        };
        match std::thread::Builder::new().name("examiner".into()).spawn(look) {
            Ok(_) => self.learning = true,
            Err(e) => warn!("cannot start a thread to look at the guest: {e}"),
        }
    }

    fn registers(&self) -> Result<Vec<Registers>, ErrorBody> {
        let state = self.shared.status().state;
        let runs = matches!(state, VmState::Running | VmState::Stopping);
        if self.saving.is_some() {
            let error = ErrorBody::new(ErrorCode::WrongState, "cannot examine the guest of a VM that is being saved");
            return Err(error.with_hint("wait until it is saved ('civic info' shows how far it is)"));
        }
        if !runs && state != VmState::Paused {
            return Err(wrong_state(&Command::Examine(GuestFiles::default()), state));
        }
        let machine = self.machine.as_ref().ok_or_else(|| ErrorBody::internal("there is no machine"))?;
        let _held = runs.then(|| Machine::hold_vcpus(machine));
        machine.registers().map_err(|e| ErrorBody::from_error(ErrorCode::Internal, &e))
    }
}

/// Has what was found of the guest of this boot be known, if anything was.
fn learnt(boot: u64, plan: Option<Plan>) -> Operation {
    Box::new(move |supervisor| {
        if supervisor.boot == boot {
            supervisor.plan = plan.or(supervisor.plan);
        }
    })
}

/// What is in files that belong to a guest's kernel.
#[derive(Default)]
pub(super) struct Contents {
    system_map: Option<Vec<u8>>,
    vmlinux: Option<Vec<u8>>,
}

impl Contents {
    /// Reads them.
    pub(super) fn read(files: &GuestFiles) -> Result<Self, ErrorBody> {
        let read = |path: &PathBuf| {
            let failed = |e: io::Error| {
                ErrorBody::new(ErrorCode::InvalidRequest, format!("cannot read {}: {e}", path.display()))
            };
            let mut bytes = Vec::new();
            let file = open_regular(path).map_err(failed)?;
            file.take(LARGEST_FILE).read_to_end(&mut bytes).map_err(failed)?;
            Ok::<_, ErrorBody>(bytes)
        };
        Ok(Self {
            system_map: files.system_map.as_ref().map(read).transpose()?,
            vmlinux: files.vmlinux.as_ref().map(read).transpose()?,
        })
    }

    pub(super) fn hints(&self) -> Hints<'_> {
        Hints { system_map: self.system_map.as_deref(), vmlinux: self.vmlinux.as_deref() }
    }
}

fn told(report: Report, checksums: Option<Checksums>, stopped_us: u64, took_us: u64) -> GuestKernel {
    let image = report.image;
    GuestKernel {
        release: report.release,
        version: report.version,
        banner: report.banner,
        image: GuestImage {
            base: image.base.to_string(),
            physical: image.physical.to_string(),
            bytes: image.bytes(),
            slide: report.virtual_slide,
            physical_slide: report.physical_slide,
        },
        paging_levels: image.levels,
        isolated: image.isolated,
        page_table: image.root.to_string(),
        direct_map: report.direct_map.map(|at| at.to_string()),
        per_cpu: report.current.map(|current| match current.per_cpu {
            PerCpu::Offsets => PerCpuSymbols::Offsets,
            PerCpu::Addresses => PerCpuSymbols::Addresses,
        }),
        symbols: finding(report.kallsyms, |found| GuestSymbols {
            count: found.count as u64,
            addresses: match found.layout.addresses {
                Addresses::AbsolutePerCpu => SymbolAddresses::AbsolutePerCpu,
                Addresses::FromBase => SymbolAddresses::FromBase,
                Addresses::FromThemselves => SymbolAddresses::FromThemselves,
            },
            confirmed: found.confirmed,
            names_data: found.names_data,
        }),
        files: report
            .hints
            .iter()
            .map(|hint| GuestFile { file: hint.file.to_string(), count: hint.count as u64 })
            .collect(),
        exports: report.exports.map(|count| count as u64),
        types: finding(report.btf, |found| GuestTypes {
            count: found.count as u64,
            bytes: found.bytes as u64,
            complete: found.unknown.is_none(),
        }),
        checksums: checksums.map(|sums| GuestChecksums { text: sums.text, mapping: sums.mapping }),
        stopped_us,
        took_us,
    }
}

fn finding<T, U, E: std::fmt::Display>(found: Result<T, E>, tell: impl FnOnce(T) -> U) -> Finding<U> {
    match found {
        Ok(found) => Finding::Found(tell(found)),
        Err(why) => Finding::Missing(why.to_string()),
    }
}
