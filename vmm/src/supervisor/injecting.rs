//! A program that is started in the guest: a thread sees to it, the supervisor only does what needs the machine.
//!
//! ```text
//! thread:      find the kernel ─▶ │       │ ─▶ a task comes by, queues the helper, gets back ─▶ the helper execs ─▶ │        │ ─▶ Hello
//! supervisor:                     │ place │                                                                       │ remove │
//! ```
//!
//! One at a time; a fork waits meanwhile, so no other VM gets what was placed.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use civic_api::{
    ErrorBody, ErrorCode, GuestFiles, InjectStages, MAX_PROGRAM_WAIT_MS, ProgramRequest, StartedProgram, VmState,
};
use civic_devices::virtio::GuestRam;
use civic_guest::kernel::Kernel;
use civic_guest::registers::Registers;
use civic_inject::LOADER;
use civic_inject::code::Mailbox;
use civic_inject::hook::Progress;
use civic_inject::plan::Plan;
use nix::errno::Errno;
use tracing::{debug, info, warn};

use super::examining::Contents;
use super::launching::launch;
use super::{Message, Supervisor, wrong_state};
use crate::control::{Answer, Command, Reply};
use crate::machine::surgery::{Child, Consent, Placed, Seen, SurgeryError};
use crate::programs::{FIRST_WORD, Knocking, PORT, Programs, Session};

/// Something to be done with the machine.
pub type Operation = Box<dyn FnOnce(&mut Supervisor) + Send>;

/// How much longer a task that is on its way may take than is allowed in all: it cannot be called back.
const GRACE: Duration = Duration::from_secs(5);
/// How long a loader takes that may use its port, as a rule.
const SOON: Duration = Duration::from_millis(500);
/// How long a loader may take until the program runs for what was written until then to mean anything.
const LONG: Duration = Duration::from_secs(60);
/// Between two tries to take away what somebody is still in.
const AGAIN: Duration = Duration::from_millis(2);

impl Supervisor {
    /// Starts to start a program; the reply comes when its loader runs, or cannot.
    pub(super) fn begin_program(&mut self, request: ProgramRequest, reply: Reply) {
        if self.injecting || self.forking {
            return self
                .later(Message::Api(crate::control::Request { command: Command::StartProgram(request), reply }));
        }
        let begun = self.check_program(&request).and_then(|()| self.order(&request));
        let order = match begun {
            Ok(order) => order,
            Err(e) => return drop(reply.send(Err(e))),
        };
        let sender = self.sender.clone();
        // The first of a fork's programs shows what the kernel does for it; the others find that done.
        let server = self.lifeline.as_ref().map(|lifeline| Arc::clone(&lifeline.branch));
        let server = server.filter(|_| order.session.id() == 1);
        let start = move || {
            let session = Arc::clone(&order.session);
            let started = order.start();
            let runs = started.is_ok();
            if let Err(e) = &started {
                warn!(program = session.id(), "not started: {}", e.message);
                session.fail(&e.message);
                session.abandon();
            }
            let _ = sender.send(Message::Injected);
            let _ = reply.send(started.map(Answer::Started));
            if let Some(server) = server.filter(|_| runs && session.runs(Instant::now() + LONG))
                && let Err(e) = server.tell_written()
            {
                debug!("later forks will not know what this one has written: {e}");
            }
        };
        self.injecting = true;
        // The reply is lost with the thread; dropping it is answered.
        if let Err(e) = std::thread::Builder::new().name("inject".into()).spawn(start) {
            self.injecting = false;
            warn!("cannot start a thread for a program: {e}");
        }
    }

    fn check_program(&self, request: &ProgramRequest) -> Result<(), ErrorBody> {
        let state = self.shared.status().state;
        if !matches!(state, VmState::Running | VmState::Stopping) {
            return Err(wrong_state(&Command::StartProgram(request.clone()), state));
        }
        let consent = Consent::of(&self.shared.config());
        if self.machine.as_ref().is_none_or(|machine| machine.child(consent).is_none()) {
            let error =
                ErrorBody::new(ErrorCode::WrongState, "programs are started in forks only, and this VM is none");
            let hint = "fork it, and start the program in the fork; an owner's VM is started with --allow-programs";
            return Err(error.with_hint(hint));
        }
        if request.wait_ms > MAX_PROGRAM_WAIT_MS {
            let message = format!("{} ms are too long to wait: at most {MAX_PROGRAM_WAIT_MS}", request.wait_ms);
            return Err(ErrorBody::new(ErrorCode::InvalidRequest, message));
        }
        Ok(())
    }

    fn order(&self, request: &ProgramRequest) -> Result<Order, ErrorBody> {
        let machine = self.machine.as_ref().ok_or_else(|| ErrorBody::internal("there is no machine"))?;
        let launch = launch(request, &self.shared.config())?;
        let busy = |why| ErrorBody::new(ErrorCode::Busy, why);
        let session = self.shared.programs.begin(&request.argv, launch).map_err(busy)?;
        let ram = machine.memory().ram.clone();
        let knocking = Knocking { programs: Arc::clone(&self.shared.programs), ram: ram.clone(), breakpoint: None };
        machine.serve(PORT, Arc::new(knocking));
        Ok(Order {
            session,
            programs: Arc::clone(&self.shared.programs),
            // What is known was found without these files.
            plan: self.plan.filter(|_| request.files.is_empty()),
            files: request.files.clone(),
            ram,
            sender: self.sender.clone(),
            boot: self.boot,
            deadline: Instant::now() + Duration::from_millis(request.wait_ms),
        })
    }
}

/// A program to be started.
struct Order {
    session: Arc<Session>,
    programs: Arc<Programs>,
    plan: Option<Plan>,
    files: GuestFiles,
    ram: GuestRam,
    sender: Sender<Message>,
    boot: u64,
    deadline: Instant,
}

impl Order {
    fn start(mut self) -> Result<StartedProgram, ErrorBody> {
        let begun = Instant::now();
        let mut stages = InjectStages::default();
        let mut last = begun;
        let mut lap = || {
            let now = Instant::now();
            now.duration_since(std::mem::replace(&mut last, now)).as_micros() as u64
        };
        self.clear_up()?;
        let plan = match self.plan.take().filter(|plan| plan.fits(&Seen(&self.ram))) {
            Some(plan) => plan,
            None => self.find()?,
        };
        stages.find_us = lap();
        let argument = self.session.argument();
        let placed = self.child(move |child| child.place(&plan, LOADER, &[&argument]))?;
        let placed = placed.map_err(|e| unusable(&e))?;
        stages.place_us = lap();
        let (placed, outcome) = self.guest_starts(placed, &mut |progress| match progress {
            Progress::Armed => {}
            Progress::Diverted => stages.hook_us = lap(),
            Progress::Queued => stages.queue_us = lap(),
            Progress::Done => stages.exec_us = lap(),
        })?;
        let removed = self.remove(placed);
        stages.remove_us = lap();
        let mailbox = match (outcome, removed) {
            (Ok(()), Ok(mailbox)) => mailbox,
            (Ok(()), Err(e)) => return Err(unusable(&e)),
            (Err(progress), removed) => return Err(self.diagnosis(progress, removed)),
        };
        started(&mailbox)?;
        if !self.hears() {
            let error = ErrorBody::new(ErrorCode::Timeout, "the loader was started in the guest, and says nothing");
            return Err(error.with_hint("the guest may give it no time: 'civic exec --wait' waits longer"));
        }
        stages.hello_us = lap();
        stages.total_us = begun.elapsed().as_micros() as u64;
        info!(program = self.session.id(), ?stages, "a loader runs");
        Ok(StartedProgram { id: self.session.id(), stages })
    }

    /// Waits for the loader's first word. Where it does not come soon, the guest's kernel may forbid programs to use ports (lockdown, or no
    /// CONFIG_X86_IOPL_IOPERM): then it is stopped where it says it.
    fn hears(&self) -> bool {
        let deadline = self.deadline.max(Instant::now() + FIRST_WORD);
        if self.session.greeted(deadline.min(Instant::now() + SOON)) {
            return true;
        }
        let at = civic_inject::knock();
        let knocking = Knocking { programs: Arc::clone(&self.programs), ram: self.ram.clone(), breakpoint: Some(at) };
        match self.child(move |child| child.serve_at(at, Arc::new(knocking))) {
            Ok(Ok(())) => info!(program = self.session.id(), "a breakpoint is where its loader speaks"),
            Ok(Err(e)) => warn!("no breakpoint for a loader: {e}"),
            Err(gone) => warn!("no breakpoint for a loader: {}", gone.message),
        }
        self.session.greeted(deadline)
    }

    /// Removes what an earlier start had to leave.
    fn clear_up(&self) -> Result<(), ErrorBody> {
        if let Some(left) = self.operate(|supervisor| supervisor.left_placed.take())? {
            self.remove(left).map_err(|e| unusable(&e))?;
        }
        Ok(())
    }

    /// Finds what is needed of the guest's kernel, and has it remembered, even if there is no time left then to use it.
    fn find(&self) -> Result<Plan, ErrorBody> {
        let plan = Plan::of(&self.kernel()?, &Seen(&self.ram)).map_err(|e| unusable(&e))?;
        self.operate(move |supervisor| supervisor.plan = Some(plan))?;
        if Instant::now() >= self.deadline {
            let message = "finding the guest's kernel took all the time that there was";
            let hint = "try again, for it is known now; 'civic exec --wait' waits longer";
            return Err(ErrorBody::new(ErrorCode::Timeout, message).with_hint(hint));
        }
        Ok(plan)
    }

    fn kernel(&self) -> Result<Kernel, ErrorBody> {
        let registers = self.registers()?;
        let contents = Contents::read(&self.files)?;
        Kernel::find_with(&Seen(&self.ram), &registers, &contents.hints()).map_err(|e| unusable(&e))
    }

    fn registers(&self) -> Result<Vec<Registers>, ErrorBody> {
        let read = self.child(|child| child.registers())?;
        read.map_err(|e| ErrorBody::from_error(ErrorCode::Internal, &e))
    }

    /// Waits until nothing is needed any more that was placed, telling of each step; if that takes too long, says how far it got.
    fn guest_starts(
        &self,
        mut placed: Box<Placed>,
        told: &mut dyn FnMut(Progress),
    ) -> Result<(Box<Placed>, Result<(), Progress>), ErrorBody> {
        let mut progress = Progress::Armed;
        loop {
            let deadline = if progress == Progress::Armed { self.deadline } else { self.deadline + GRACE };
            let next = placed.injection().wait(progress, deadline);
            if next == progress {
                return Ok((placed, Err(progress)));
            }
            progress = next;
            told(progress);
            if placed.holds_up() {
                placed = self.child(move |child| {
                    // Removing the rest says it again.
                    let _ = child.untrap(&mut placed);
                    placed
                })?;
            }
            if progress == Progress::Done || placed.is_refused() {
                return Ok((placed, Ok(())));
            }
        }
    }

    fn remove(&self, mut placed: Box<Placed>) -> Result<Mailbox, SurgeryError> {
        loop {
            let removed = self.child(move |child| child.remove(placed));
            match removed {
                Ok(Ok(mailbox)) => return Ok(mailbox),
                Ok(Err((SurgeryError::Occupied { .. } | SurgeryError::Awaited, left)))
                    if Instant::now() < self.deadline + GRACE =>
                {
                    placed = left;
                }
                Ok(Err((e, left))) => {
                    warn!("what was placed in the guest's kernel stays there: {e}");
                    let boot = self.boot;
                    let _ = self.operate(move |supervisor| {
                        supervisor.left_placed = Some(left).filter(|_| supervisor.boot == boot);
                    });
                    return Err(e);
                }
                Err(gone) => return Err(SurgeryError::Gone { why: gone.message }),
            }
            // Somebody is on the way there, or out.
            std::thread::sleep(AGAIN);
        }
    }

    /// What kept the guest from starting it.
    fn diagnosis(&self, progress: Progress, removed: Result<Mailbox, SurgeryError>) -> ErrorBody {
        let what = match progress {
            Progress::Armed => "no task of the guest came by its scheduler",
            Progress::Diverted => "a task of the guest was stopped on its way to start the loader",
            Progress::Queued => "the guest's kernel was asked to start the loader, and has not",
            Progress::Done => "the loader was started",
        };
        let kernel = self.kernel().ok();
        let nearest = |at| kernel.as_ref().and_then(|kernel| kernel.nearest(at));
        let places = match self.registers() {
            Ok(registers) => {
                let place = |(n, registers): (usize, &Registers)| match nearest(registers.rip) {
                    _ if registers.cpl != 0 => format!("vCPU {n} is in a program"),
                    Some((found, offset)) => format!("vCPU {n} is at {}+{offset:#x}", found.symbol.name),
                    None => format!("vCPU {n} is at {}", registers.rip),
                };
                registers.iter().enumerate().map(place).collect::<Vec<_>>().join(", ")
            }
            Err(e) => e.message,
        };
        let left = match removed {
            Ok(_) => String::new(),
            Err(e) => format!("; {e}"),
        };
        let error = ErrorBody::new(ErrorCode::Timeout, format!("{what} in time: {places}{left}"));
        error.with_hint("a guest that hangs starts nothing; 'civic info --guest' still looks at it from outside")
    }

    /// Does something with the machine as one that may be changed from outside, its vCPUs standing still.
    fn child<T: Send + 'static>(&self, work: impl FnOnce(&Child<'_>) -> T + Send + 'static) -> Result<T, ErrorBody> {
        let boot = self.boot;
        self.operate(move |supervisor| {
            let gone = || ErrorBody::new(ErrorCode::WrongState, "the guest has reset");
            let machine = supervisor.machine.as_ref().filter(|_| supervisor.boot == boot).ok_or_else(gone)?;
            let running = supervisor.shared.status().state != VmState::Paused;
            let _held = running.then(|| machine.hold_vcpus());
            let child = machine.child(Consent::of(&supervisor.shared.config())).ok_or_else(gone)?;
            Ok(work(&child))
        })?
    }

    fn operate<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Supervisor) -> T + Send + 'static,
    ) -> Result<T, ErrorBody> {
        let (done, wait) = channel();
        let operation: Operation = Box::new(move |supervisor| drop(done.send(work(supervisor))));
        let _ = self.sender.send(Message::Operate(operation));
        wait.recv().map_err(|_| ErrorBody::new(ErrorCode::WrongState, "the VM has ended"))
    }
}

fn unusable(error: &(dyn std::error::Error + 'static)) -> ErrorBody {
    ErrorBody::from_error(ErrorCode::GuestUnusable, error)
}

/// Whether the guest's kernel has executed the loader, or why not.
fn started(mailbox: &Mailbox) -> Result<(), ErrorBody> {
    let refused = |what: &str, errno: i32, hint: &str| {
        let message = format!("{what}: {}", Errno::from_raw(-errno).desc());
        let error = ErrorBody::new(ErrorCode::GuestUnusable, message);
        Err(error.with_hint(format!("{hint} ({:?}, {:#x})", mailbox.stage, mailbox.last)))
    };
    match (mailbox.queued, mailbox.finished) {
        (Some(0), Some(0)) => Ok(()),
        (Some(0), Some(errno)) => refused(
            "the guest's kernel could not execute the loader",
            errno,
            "it may have no memory or no process left, or a security module that forbids it",
        ),
        (Some(errno), _) => refused(
            "the guest's kernel does not start helpers",
            errno,
            "it does not while it boots, sleeps or goes down, and may have no memory left",
        ),
        (None, _) => refused("the guest's kernel did not say what came of it", 0, "what it left says more"),
    }
}
