//! What is looked at and changed in a guest's kernel from outside, while its vCPUs stand still.
//!
//! ```text
//! place:   annex filled ─▶ page directory entry ─▶ trap at schedule()        remove: trap ─▶ entry ─▶ annex, each as it was
//! ```
//!
//! The annex is memory that the guest is told nothing of: shown to it with the first use, and full of zeros when it is not used.
//!
//! Changing is for forks alone: [`Child`] is the only way to it, and there is none of a machine that runs on memory of its own, unless its
//! owner has given [`Consent`] when it was started.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use civic_api::VmConfig;
use civic_devices::virtio::GuestRam;
use civic_guest::memory::{Absent, Gpa, Gva, PhysicalMemory};
use civic_guest::registers::Registers;
use civic_inject::code::{Code, CodeError, Mailbox, OUT, PORT};
use civic_inject::hook::{Hook, Progress, Turn};
use civic_inject::plan::{CROSSROADS, Plan};
use civic_inject::site::{NoSite, Site};
use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug, kvm_regs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::Machine;
use crate::cpu::guest::{address_space, registers};
use crate::kvm::KvmError;
use crate::kvm::slots::Annex;
use crate::traps::Trap;

/// Present, writable, accessed, dirty, 2 MiB: executable and the kernel's own (Intel SDM 3A §4.5).
const ENTRY_FLAGS: u64 = 0xe3;
/// What the processor changes in an entry by itself.
const ENTRY_TRACES: u64 = 0x60;

const WRITE_ANNEX: &str = "fill what the guest is shown";

/// DR7: a breakpoint in all tasks, when the instruction at DR0 is about to run (Intel SDM 3B §18.2.4).
const EXECUTION_AT_DR0: u64 = 0x402;

/// RAM, as what reads guest kernels wants it.
pub struct Seen<'a>(pub &'a GuestRam);

impl PhysicalMemory for Seen<'_> {
    fn read(&self, at: Gpa, buffer: &mut [u8]) -> Result<(), Absent> {
        let len = buffer.len();
        self.0.read_slice(buffer, GuestAddress(at.0)).map_err(|_| Absent { at, len })
    }
}

/// Why nothing can be placed in a guest's kernel, or it cannot be removed.
#[derive(Debug, thiserror::Error)]
pub enum SurgeryError {
    /// Its scheduler has no place for a trap.
    #[error("the guest's kernel has no place for a trap at the entry of {CROSSROADS}()")]
    NoPlace(#[from] NoSite),
    /// No room within reach of its code.
    #[error("the page table of the guest's kernel has no free entry")]
    NoRoom,
    /// Its memory is not where its page tables say.
    #[error(transparent)]
    Memory(#[from] Absent),
    /// Something is not as it was left.
    #[error("the guest's kernel has changed {what} meanwhile: it is left as it is")]
    Changed {
        /// What it is.
        what: &'static str,
    },
    /// A task would go on in memory that is taken away.
    #[error("vCPU {vcpu} is still in what was placed in the guest's kernel")]
    Occupied {
        /// Which.
        vcpu: usize,
    },
    /// A task of the guest has been sent there, and has not come back.
    #[error("a task of the guest is still on its way to start the loader")]
    Awaited,
    /// The code does not fit.
    #[error(transparent)]
    Code(#[from] CodeError),
    /// There is no machine any more that it could be done with.
    #[error("{why}")]
    Gone {
        /// What became of it.
        why: String,
    },
    /// KVM refuses something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// That the owner of a VM which is no fork lets programs be started in it.
#[derive(Clone, Copy, Debug)]
pub struct Consent(());

impl Consent {
    /// As the VM was configured.
    pub fn of(config: &VmConfig) -> Option<Self> {
        config.allow_programs.then_some(Self(()))
    }
}

/// A machine that is a fork, so that what happens to it happens to nobody else; or its owner knows. Its vCPUs stand still.
pub struct Child<'a>(&'a Machine);

impl Machine {
    /// The registers of its vCPUs, which must stand still; none of one that has ended.
    ///
    /// # Errors
    /// What KVM says.
    pub fn registers(&self) -> Result<Vec<Registers>, KvmError> {
        let read = self.vcpus.each(registers);
        read.into_iter().flatten().map(|read| read.map_err(KvmError::refused("tell a vCPU's registers"))).collect()
    }

    /// Puts somebody at a port, in place of whoever was there.
    pub fn serve(&self, port: u16, trap: Arc<dyn Trap>) {
        self.traps.insert(port, trap);
    }

    /// The machine as one that may be changed from outside: a fork, or one whose owner consents. Its vCPUs must stand still as long as that
    /// is used.
    pub fn child(&self, consent: Option<Consent>) -> Option<Child<'_>> {
        (self.is_forked() || consent.is_some()).then_some(Child(self))
    }
}

/// Something placed in a guest's kernel, until it is removed.
pub struct Placed {
    injection: Arc<Injection>,
    trapped: bool,
    site: Site,
    trap: Gpa,
    before: [u8; OUT.len()],
    directory: Gpa,
    mapping: u64,
    annex: Arc<Annex>,
}

impl Child<'_> {
    /// As [`Machine::registers`].
    ///
    /// # Errors
    /// As there.
    pub fn registers(&self) -> Result<Vec<Registers>, KvmError> {
        self.0.registers()
    }

    /// Stops every vCPU that comes to `at`, of whatever process, for somebody, from now on. The guest's own hardware breakpoints are
    /// without effect then.
    ///
    /// # Errors
    /// What KVM says.
    pub fn serve_at(&self, at: Gva, trap: Arc<dyn Trap>) -> Result<(), KvmError> {
        self.0.traps.insert_breakpoint(trap);
        let mut debug = kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, ..Default::default() };
        debug.arch.debugreg[0] = at.0;
        debug.arch.debugreg[7] = EXECUTION_AT_DR0;
        let set = self.0.vcpus.each(move |fd| fd.set_guest_debug(&debug));
        set.into_iter().flatten().try_for_each(|set| set.map_err(KvmError::refused("set a breakpoint")))
    }

    /// Has the first task that comes by start the loader.
    ///
    /// # Errors
    /// When the kernel is not one where that can be: then nothing has changed.
    pub fn place(&self, plan: &Plan, loader: &[u8], arguments: &[&str]) -> Result<Box<Placed>, SurgeryError> {
        let memory = &self.0.memory.ram;
        let image = &plan.image;
        let site = Site::of(image, &Seen(memory), plan.crossroads)?;
        let trap = image.to_physical(site.at).ok_or(SurgeryError::NoRoom)?;
        let mut before = [0; OUT.len()];
        Seen(memory).read(trap, &mut before)?;
        let free = image.free_slots(&Seen(memory))?.first().copied().ok_or(SurgeryError::NoRoom)?;
        let code = Code::new(&plan.targets, free.at, loader, arguments)?;
        let annex = self.annex()?;
        annex.write(code.bytes()).map_err(|e| KvmError::Refused { what: WRITE_ANNEX, source: io::Error::other(e) })?;
        let mapping = self.0.sockets.layout.annex().start.0 | ENTRY_FLAGS;
        let injection = Injection::new(Hook::new(site, code), memory);
        self.0.traps.insert(PORT.into(), Arc::clone(&injection) as _);
        self.write(free.entry, &mapping.to_le_bytes())?;
        self.write(trap, &OUT)?;
        let directory = free.entry;
        Ok(Box::new(Placed { injection, trapped: true, site, trap, before, directory, mapping, annex }))
    }

    fn annex(&self) -> Result<Arc<Annex>, KvmError> {
        if let Some(annex) = self.0.annex.get() {
            return Ok(Arc::clone(annex));
        }
        let window = self.0.sockets.layout.annex();
        let annex = Annex::show(&self.0.vm, &self.0.memory.ram, window.start.into(), window.len)?;
        Ok(Arc::clone(self.0.annex.get_or_init(|| Arc::new(annex))))
    }

    /// Takes it away again: the kernel's text and page tables are then as before.
    ///
    /// # Errors
    /// When somebody is still in there or may yet come, or somebody else has changed what is to be restored: then it stays, but for the
    /// trap.
    pub fn remove(&self, mut placed: Box<Placed>) -> Result<Mailbox, (SurgeryError, Box<Placed>)> {
        match self.untrap(&mut placed).and_then(|()| self.try_remove(&placed)) {
            Ok(mailbox) => Ok(mailbox),
            Err(e) => Err((e, placed)),
        }
    }

    /// Takes the trap away: from now on nobody else is diverted, and who waits there goes on. May be done before the rest.
    ///
    /// # Errors
    /// When something else stands there.
    pub fn untrap(&self, placed: &mut Placed) -> Result<(), SurgeryError> {
        let mut trap = [0; OUT.len()];
        Seen(&self.0.memory.ram).read(placed.trap, &mut trap)?;
        if placed.trapped && trap != OUT {
            return Err(SurgeryError::Changed { what: "the text at the trap" });
        }
        if std::mem::take(&mut placed.trapped) {
            self.write(placed.trap, &placed.before)?;
        }
        Ok(())
    }

    fn try_remove(&self, placed: &Placed) -> Result<Mailbox, SurgeryError> {
        if placed.is_awaited() {
            return Err(SurgeryError::Awaited);
        }
        let memory = Seen(&self.0.memory.ram);
        let inside =
            |at: Gva| placed.injection.hook().code().contains(at) || at == placed.site.at.plus(OUT.len() as u64);
        if let Some(vcpu) = self.0.registers()?.iter().position(|registers| inside(registers.rip)) {
            return Err(SurgeryError::Occupied { vcpu });
        }
        let mut entry = [0; 8];
        memory.read(placed.directory, &mut entry)?;
        if u64::from_le_bytes(entry) & !ENTRY_TRACES != placed.mapping & !ENTRY_TRACES {
            return Err(SurgeryError::Changed { what: "its page table" });
        }
        self.write(placed.directory, &[0; 8])?;
        self.0.traps.remove(PORT.into());
        let mailbox = placed.mailbox();
        if let Err(e) = placed.annex.clear() {
            tracing::warn!(
                "what was placed in the guest's kernel stays in memory until something else is, out of its reach: {e}"
            );
        }
        Ok(mailbox)
    }

    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), Absent> {
        let written = self.0.memory.ram.write_slice(bytes, GuestAddress(at.0));
        written.map_err(|_| Absent { at, len: bytes.len() })
    }
}

impl Placed {
    /// Whether tasks wait at the trap until it is taken away.
    pub fn holds_up(&self) -> bool {
        self.trapped && self.site.waits()
    }

    /// What the vCPUs have come to.
    pub fn injection(&self) -> &Arc<Injection> {
        &self.injection
    }

    /// Whether the kernel has refused the helper, so that nobody will be called.
    pub fn is_refused(&self) -> bool {
        self.injection.hook().progress() == Progress::Queued && self.mailbox().queued != Some(0)
    }

    /// Whether some task of the guest is on its way there.
    fn is_awaited(&self) -> bool {
        !matches!(self.injection.hook().progress(), Progress::Armed | Progress::Done) && !self.is_refused()
    }

    /// What the guest has left there.
    pub fn mailbox(&self) -> Mailbox {
        let mut bytes = [0; Mailbox::LEN];
        // It lies within the annex.
        let _ = self.annex.read(&mut bytes, Mailbox::AT);
        Mailbox::read(&bytes)
    }
}

/// What vCPUs meet at the trap and the rings.
pub struct Injection {
    hook: Mutex<Hook<kvm_regs>>,
    changed: Condvar,
    memory: GuestRam,
}

impl Injection {
    fn new(hook: Hook<kvm_regs>, memory: &GuestRam) -> Arc<Self> {
        Arc::new(Self { hook: Mutex::new(hook), changed: Condvar::new(), memory: Arc::clone(memory) })
    }

    fn hook(&self) -> MutexGuard<'_, Hook<kvm_regs>> {
        self.hook.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it has come further than `so_far`, or until `deadline`; says how far it is.
    pub fn wait(&self, so_far: Progress, deadline: Instant) -> Progress {
        let mut hook = self.hook();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if hook.progress() != so_far || left.is_zero() {
                return hook.progress();
            }
            hook = self.changed.wait_timeout(hook, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The vCPU as after a `ret`; none where its stack cannot be read.
    fn returned(&self, fd: &VcpuFd, regs: kvm_regs) -> Result<Option<kvm_regs>, kvm_ioctls::Error> {
        let memory: &dyn PhysicalMemory = &Seen(&self.memory);
        let stack = address_space(fd)?.and_then(|space| space.walk(memory, Gva(regs.rsp)).ok());
        let target = stack.and_then(|found| memory.u64(found.at).ok());
        Ok(target.map(|rip| kvm_regs { rip, rsp: regs.rsp.wrapping_add(8), ..regs }))
    }
}

impl Trap for Injection {
    fn meet(&self, fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        let regs = fd.get_regs()?;
        let mut hook = self.hook();
        let next = match hook.meet(Gva(regs.rip), |at| kvm_regs { rip: at.0, ..regs }) {
            Turn::Foreign => None,
            Turn::GoTo(at) => Some(kvm_regs { rip: at.0, ..regs }),
            Turn::Restore(regs) => Some(regs),
            // Else it does so itself, and may be found there.
            Turn::Return => self.returned(fd, regs)?,
        };
        if let Some(next) = next {
            fd.set_regs(&next)?;
        }
        drop(hook);
        self.changed.notify_all();
        Ok(())
    }
}
