//! vCPU threads and the gate that starts, parks and ends them together.
//!
//! ```text
//!              open                 shut
//!   Parked ───────────▶ Running ───────────▶ Parked (out of KVM_RUN, pending I/O completed)
//!      └────────── end ────┴── end ──▶ Ended
//! ```
//!
//! Whoever wants a vCPU out of the guest changes the gate's mode and kicks its thread with a signal, whose handler sets
//! `immediate_exit`: the kick works whether it comes before, in or after `KVM_RUN`.
//!
//! Invariants: nothing in the exit path waits for the API, a disk or another vCPU (a device's reset may wait for that device's
//! own requests); a parked vCPU has completed the I/O instruction it left on, so its registers may be read and written.
//!
//! A parked thread can be given work on its vCPU ([`Vcpus::each`]): a vCPU's ioctls belong on its own thread, and all work at once.
//!
//! Lock order: the gate's mutex is a leaf.

mod kick;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use civic_confine::Kind;
use civic_devices::bus::Bus;
use civic_devices::counters::{Counter, Counters};
use kvm_ioctls::{VcpuExit, VcpuFd};
use tracing::{debug, error, warn};

use self::kick::RunPage;
use crate::clock::monotonic;
use crate::traps::{Trap, Traps};

/// What a vCPU has to say that only the supervisor can act on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuEvent {
    /// Triple fault, or the guest asked KVM for a reset.
    Reset,
    /// KVM cannot go on; the text says why.
    Failed(String),
}

/// Why vCPUs leave the guest, counted.
#[derive(Debug, Default)]
pub struct Exits {
    io: Counter,
    mmio: Counter,
    unclaimed: Counter,
    kicks: Counter,
    other: Counter,
}

impl Counters for Exits {
    fn read(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("io", self.io.get()),
            ("mmio", self.mmio.get()),
            ("unclaimed", self.unclaimed.get()),
            ("kick", self.kicks.get()),
            ("other", self.other.get()),
        ]
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Park,
    /// For good: the guest has ended, or is to be reset.
    Shut,
    Run,
    End,
}

/// Work on a parked vCPU.
type Job = Box<dyn FnOnce(&VcpuFd) + Send>;

struct GateState {
    mode: Mode,
    parked: usize,
    ended: BTreeSet<usize>,
    /// By vCPU.
    jobs: BTreeMap<usize, Job>,
    /// When the first vCPU entered the guest.
    entered: Option<u64>,
}

/// Says whether vCPUs may run. Shared by a machine's vCPUs, and by devices that end the machine.
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
    /// Mirrors `mode == Run`, so that the exit path takes no lock.
    open: AtomicBool,
}

impl Gate {
    /// A gate that is shut.
    pub fn new() -> Arc<Self> {
        let state =
            GateState { mode: Mode::Park, parked: 0, ended: BTreeSet::new(), jobs: BTreeMap::new(), entered: None };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new(), open: AtomicBool::new(false) })
    }

    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn set(&self, mode: Mode) {
        let mut state = self.state();
        if state.mode != Mode::End && (state.mode != Mode::Shut || mode == Mode::End) {
            state.mode = mode;
            self.open.store(mode == Mode::Run, Ordering::SeqCst);
            self.changed.notify_all();
        }
    }

    /// Lets no vCPU back into the guest after its current exit, ever. Unlike [`Vcpus::pause`] it does not wait, so a device may call
    /// it from a vCPU's own exit.
    pub fn shut(&self) {
        self.set(Mode::Shut);
    }

    fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    /// Parks vCPU `index` until the gate opens, doing the jobs that come; false when the machine ends.
    fn park(&self, index: usize, fd: &VcpuFd) -> bool {
        let mut state = self.state();
        state.parked += 1;
        self.changed.notify_all();
        while matches!(state.mode, Mode::Park | Mode::Shut) {
            if let Some(job) = state.jobs.remove(&index) {
                drop(state);
                job(fd);
                state = self.state();
            } else {
                state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
            }
        }
        state.parked -= 1;
        state.mode == Mode::Run
    }
}

/// Counts a thread as ended, however it ends.
struct Leave(Arc<Gate>, usize);

impl Drop for Leave {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.ended.insert(self.1);
        state.jobs.remove(&self.1);
        self.0.changed.notify_all();
    }
}

/// The buses that exits reach.
#[derive(Clone)]
pub struct Buses {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Ports that are on no bus.
    pub traps: Arc<Traps>,
}

/// All vCPUs of a machine, each on its thread, parked at first. Dropping ends them.
pub struct Vcpus {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
    exits: Vec<Arc<Exits>>,
}

impl Vcpus {
    /// Starts a thread for each of `fds`; `report` tells what only the supervisor can act on.
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub fn spawn(
        fds: Vec<VcpuFd>,
        gate: Arc<Gate>,
        buses: &Buses,
        report: impl Fn(VcpuEvent) + Clone + Send + 'static,
    ) -> io::Result<Self> {
        kick::install_handler()?;
        let mut vcpus = Self { gate, threads: Vec::new(), exits: Vec::new() };
        for (index, fd) in fds.into_iter().enumerate() {
            let exits = Arc::new(Exits::default());
            vcpus.exits.push(Arc::clone(&exits));
            let gate = Arc::clone(&vcpus.gate);
            let vcpu = Vcpu { index, fd, gate, buses: buses.clone(), exits, report: report.clone() };
            vcpus.threads.push(std::thread::Builder::new().name(format!("vcpu{index}")).spawn(|| {
                civic_confine::thread(Kind::Vcpu);
                vcpu.run()
            })?);
        }
        vcpus.wait_parked();
        Ok(vcpus)
    }

    /// Exit counters, by vCPU.
    pub fn exits(&self) -> &[Arc<Exits>] {
        &self.exits
    }

    /// Lets the vCPUs into the guest.
    pub fn run(&self) {
        self.gate.set(Mode::Run);
    }

    /// Takes the vCPUs out of the guest; returns when all are parked.
    pub fn pause(&self) {
        self.gate.set(Mode::Park);
        self.kick();
        self.wait_parked();
    }

    /// Does `work` on every vCPU, each on its own thread, at the same time; by vCPU, none for one whose thread has ended. The vCPUs must
    /// be paused.
    pub fn each<T: Send + 'static>(&self, work: impl Fn(&VcpuFd) -> T + Send + Sync + 'static) -> Vec<Option<T>> {
        self.hand(0, vec![(); self.threads.len()], move |fd, _, ()| work(fd))
    }

    /// Does `work` on vCPU `first` and those after it, each on its own thread with its index and its part of `parts`, at the same time;
    /// none for one whose thread has ended. The vCPUs must be paused.
    pub fn hand<P: Send + 'static, T: Send + 'static>(
        &self,
        first: usize,
        parts: Vec<P>,
        work: impl Fn(&VcpuFd, usize, P) -> T + Send + Sync + 'static,
    ) -> Vec<Option<T>> {
        let work = Arc::new(work);
        let give = |(index, part)| {
            let (done, wait) = sync_channel(1);
            let work = Arc::clone(&work);
            let job = Box::new(move |fd: &VcpuFd| drop(done.send(work(fd, index, part))));
            let mut state = self.gate.state();
            if !state.ended.contains(&index) {
                state.jobs.insert(index, job);
            }
            wait
        };
        let waits: Vec<_> = (first..self.threads.len()).zip(parts).map(give).collect();
        self.gate.changed.notify_all();
        waits.into_iter().map(|wait| wait.recv().ok()).collect()
    }

    /// When the first of them entered the guest, by [`monotonic`]: waits for that, if they may. None if they may not, or all have ended.
    pub fn entered(&self) -> Option<u64> {
        let mut state = self.gate.state();
        while state.entered.is_none() && state.mode == Mode::Run && state.ended.len() < self.threads.len() {
            state = self.gate.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        state.entered
    }

    fn wait_parked(&self) {
        let all = self.threads.len();
        let mut state = self.gate.state();
        while state.parked + state.ended.len() < all {
            state = self.gate.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }

    fn kick(&self) {
        for thread in &self.threads {
            kick::kick(thread);
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.gate.set(Mode::End);
        self.kick();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                error!("a vCPU thread panicked");
            }
        }
    }
}

/// How a vCPU came out of the guest.
enum Left {
    /// By an exit, which has been served.
    Served,
    /// By a kick.
    Kicked,
    /// By writing to a port where somebody wants the vCPU, or by coming to a breakpoint.
    Trapped(Arc<dyn Trap>),
}

struct Vcpu<R> {
    index: usize,
    fd: VcpuFd,
    gate: Arc<Gate>,
    buses: Buses,
    exits: Arc<Exits>,
    report: R,
}

impl<R: Fn(VcpuEvent)> Vcpu<R> {
    fn run(mut self) {
        let _leave = Leave(Arc::clone(&self.gate), self.index);
        let page = RunPage::enter(&mut self.fd);
        let mut entered = false;
        loop {
            // A kick between here and KVM_RUN sets the flag again, and one before here has changed the gate.
            self.fd.set_kvm_immediate_exit(0);
            let result = if self.gate.is_open() {
                if !std::mem::replace(&mut entered, true) {
                    self.gate.state().entered.get_or_insert_with(monotonic);
                    self.gate.changed.notify_all();
                }
                match self.enter(&page) {
                    Ok(Left::Trapped(trap)) => self.meet(&*trap, &page),
                    result => result.map(|_| ()),
                }
            } else {
                let completed = self.complete_io(&page);
                if tracing::enabled!(tracing::Level::DEBUG) {
                    debug!("parks {}", self.place());
                }
                if !self.gate.park(self.index, &self.fd) {
                    return;
                }
                completed
            };
            if let Err(event) = result {
                // Whatever happens next is the supervisor's to decide: no vCPU goes on.
                warn!("ends {}: {event:?}", self.place());
                self.gate.shut();
                (self.report)(event);
            }
        }
    }

    /// Where the vCPU is, for the log.
    fn place(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                "vcpu={} rip={:#x} rsp={:#x} rflags={:#x} cr0={:#x} cr3={:#x}",
                self.index, regs.rip, regs.rsp, regs.rflags, sregs.cr0, sregs.cr3
            ),
            (Err(e), _) | (_, Err(e)) => format!("vcpu={}, its registers cannot be read: {e}", self.index),
        }
    }

    /// Finishes the instruction that the last exit left half done, so that the registers are the guest's own. One of several
    /// accesses (a string or a page-crossing one) leaves once for each.
    fn complete_io(&mut self, page: &RunPage) -> Result<(), VcpuEvent> {
        loop {
            self.fd.set_kvm_immediate_exit(1);
            if matches!(self.enter(page)?, Left::Kicked) {
                return Ok(());
            }
        }
    }

    fn meet(&mut self, trap: &dyn Trap, page: &RunPage) -> Result<(), VcpuEvent> {
        self.complete_io(page)?;
        let refused = |e| VcpuEvent::Failed(format!("KVM refuses the registers of vCPU {}: {e}", self.index));
        trap.meet(&self.fd).map_err(refused)
    }

    fn enter(&mut self, page: &RunPage) -> Result<Left, VcpuEvent> {
        let exits = &self.exits;
        let claimed = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                exits.io.add(1);
                if let Some(trap) = self.buses.traps.at(port) {
                    return Ok(Left::Trapped(trap));
                }
                let size = page.io_size().clamp(1, data.len().max(1));
                data.chunks(size).all(|item| self.buses.pio.write(u64::from(port), item))
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                exits.io.add(1);
                let size = page.io_size().clamp(1, data.len().max(1));
                data.chunks_mut(size).all(|item| self.buses.pio.read(u64::from(port), item))
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                exits.mmio.add(1);
                self.buses.mmio.read(address, data)
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                exits.mmio.add(1);
                self.buses.mmio.write(address, data)
            }
            Ok(VcpuExit::Intr) => {
                exits.kicks.add(1);
                return Ok(Left::Kicked);
            }
            Ok(VcpuExit::Shutdown) => return Err(VcpuEvent::Reset),
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                warn!(vcpu = self.index, kind, "system event");
                return Err(VcpuEvent::Reset);
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Err(VcpuEvent::Failed(format!("vCPU {} cannot enter the guest: {reason:#x}", self.index)));
            }
            Ok(VcpuExit::InternalError) => {
                let what = page.internal_error();
                return Err(VcpuEvent::Failed(format!("KVM cannot emulate vCPU {}: {what}", self.index)));
            }
            Ok(VcpuExit::Debug(_)) => {
                exits.other.add(1);
                match self.buses.traps.at_breakpoint() {
                    Some(trap) => return Ok(Left::Trapped(trap)),
                    None => true,
                }
            }
            Ok(VcpuExit::IrqWindowOpen | VcpuExit::SetTpr | VcpuExit::IoapicEoi(_) | VcpuExit::Hlt) => {
                exits.other.add(1);
                true
            }
            Ok(other) => {
                let what = format!("vCPU {}: exit {other:?} is not ours to handle", self.index);
                return Err(VcpuEvent::Failed(what));
            }
            Err(e) => match e.errno() {
                // EAGAIN: a vCPU that waits for its start-up interrupt comes back like this when signalled.
                nix::libc::EINTR | nix::libc::EAGAIN => {
                    exits.kicks.add(1);
                    return Ok(Left::Kicked);
                }
                _ => return Err(VcpuEvent::Failed(format!("KVM_RUN of vCPU {} failed: {e}", self.index))),
            },
        };
        if !claimed {
            exits.unclaimed.add(1);
        }
        Ok(Left::Served)
    }
}
