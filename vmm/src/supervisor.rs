//! The supervisor: owns the machine and changes its state, one thing at a time.
//!
//! ```text
//!  Waiting (to be forked; see Embryo)
//!
//!            Start            Pause
//!  Created ────────▶ Running ◀──────▶ Paused        guest reset: the next machine, Running again
//!                       │     Resume                guest power-off, failure, Kill: Stopped, the process ends
//!                  Stop │ (power button)
//!                       ▼
//!                    Stopping ── Stop presses again
//! ```
//!
//! A save ([`saving`]) pauses the machine and writes in a thread; until that is done nothing but Kill is obeyed.
//!
//! Commands come from the API, events from the guest; both arrive on one channel, so no two can race. What the API may read
//! without asking stands in [`Shared`].

mod balloon;
mod examining;
mod forking;
mod injecting;
mod launching;
mod plugging;
mod saving;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use civic_api::{
    AfterSave, CONSOLE_PORT_HVC, CONSOLE_PORT_SERIAL, EndReason, ErrorBody, ErrorCode, SaveRequest, VmConfig, VmInfo,
    VmState,
};
use civic_devices::console_hub::ConsoleHub;
use civic_devices::virtio::balloon::BalloonControl;
use civic_inject::plan::Plan;
use tracing::{error, info, warn};

use self::forking::{PauseRequest, StillRequest};
use self::injecting::Operation;
use self::plugging::{PlugMessage, Plugging};
use self::saving::{Begin, Meter, Outcome, Saving};
use crate::control::{Answer, Command, Control, Reply, Request, View, no_balloon};
use crate::fork::birth::{Born, LAST_RESORT, Lifeline, Link};
use crate::fork::disks::Freezable;
use crate::fork::family::{Family, Sharing};
use crate::machine::surgery::Placed;
use crate::machine::{BuildError, GuestEvent, Machine, Meters, Places, effective_mac};
use crate::programs::{Programs, Session};
use crate::resources::Resources;
use crate::saved::{DiskStamp, Draft, SavedVm, VmStateV1};

/// How long console clients may take to read the last of the guest's output.
const LAST_WORDS: Duration = Duration::from_secs(1);

enum Message {
    Api(Request),
    /// From the machine of this boot; one that is gone may still be heard.
    Guest(u64, GuestEvent),
    /// From the thread that writes a save.
    Saved(Outcome),
    /// From the thread that makes a fork: pause the machine for it.
    ForkPoint(Box<PauseRequest>),
    /// From the same: it is over.
    Forked,
    /// From whoever prepares one: the vCPUs are in the way.
    Still(StillRequest),
    /// From the thread that starts a program: something to be done with the machine, at once.
    Operate(Operation),
    /// From the same: it is over.
    Injected,
    /// From threads that open and close devices.
    Plug(PlugMessage),
    /// Part of the memory cannot be had: from the thread that loads a saved VM's, or the one that listens to a child's page server.
    MemoryLost(String),
    /// A child was to end before it was born.
    Unwanted,
}

/// What is read without asking the supervisor.
#[derive(Default)]
struct Status {
    state: VmState,
    boots: u64,
    started: Option<SystemTime>,
    /// Time run up to the last pause, and since when it runs.
    run: Duration,
    running_since: Option<Instant>,
    meters: Meters,
    balloon: Option<BalloonControl>,
    saving: Option<Arc<Meter>>,
    /// Those that come and go, by their ports' names.
    consoles: BTreeMap<String, Arc<ConsoleHub>>,
    ended: Option<EndReason>,
}

/// The API's view. Lock order: `status` is a leaf, held for reading counters only; so is `config`, held to copy a pointer.
struct Shared {
    /// As it is now: devices come and go.
    config: RwLock<Arc<VmConfig>>,
    status: Mutex<Status>,
    family: Arc<Family>,
    programs: Arc<Programs>,
    serial: Arc<ConsoleHub>,
    hvc: Arc<ConsoleHub>,
}

impl Shared {
    fn new(config: VmConfig, status: Status, family: Arc<Family>, resources: &Resources) -> Arc<Self> {
        let (serial, hvc) = (Arc::clone(&resources.serial), Arc::clone(&resources.hvc));
        let status = Mutex::new(Status { consoles: plugging::ports(&config, resources), ..status });
        Arc::new(Self { config: RwLock::new(Arc::new(config)), status, family, programs: Arc::default(), serial, hvc })
    }

    fn config(&self) -> Arc<VmConfig> {
        Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn set_config(&self, config: VmConfig) {
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl View for Shared {
    fn info(&self) -> VmInfo {
        let config = self.config();
        let status = self.status();
        let running = status.running_since.map_or(Duration::ZERO, |since| since.elapsed());
        let since_epoch = |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        VmInfo {
            name: config.name.clone(),
            state: status.state,
            pid: crate::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            cpus: config.cpus,
            memory_bytes: config.memory_bytes,
            kernel: config.kernel.clone(),
            audit: config.audit.clone(),
            boots: status.boots,
            started_at_ms: status.started.map(since_epoch),
            run_ms: (status.run + running).as_millis() as u64,
            devices: status.meters.devices(&config),
            vcpus: status.meters.vcpus(),
            consoles: [CONSOLE_PORT_SERIAL, CONSOLE_PORT_HVC]
                .into_iter()
                .chain(config.consoles.iter().map(|console| console.id.as_str()))
                .map(str::to_owned)
                .collect(),
            programs: self.programs.running(),
            balloon: status.balloon.as_ref().map(balloon::info),
            family: self.family.info(),
            saving: status.saving.as_ref().map(|meter| meter.read()),
            ended: status.ended.clone(),
        }
    }

    fn sharing(&self) -> Option<Sharing> {
        self.family.sharing()
    }

    fn ask_balloon(&self) {
        if let Some(balloon) = &self.status().balloon {
            balloon.request_statistics();
        }
    }

    fn program(&self, id: u64) -> Option<Arc<Session>> {
        self.programs.session(id)
    }

    fn console(&self, port: &str) -> Option<Arc<ConsoleHub>> {
        match port {
            CONSOLE_PORT_SERIAL => Some(Arc::clone(&self.serial)),
            CONSOLE_PORT_HVC => Some(Arc::clone(&self.hvc)),
            _ => self.status().consoles.get(port).cloned(),
        }
    }
}

/// A supervisor to come: its API answers already, its machine is still to be born.
pub struct Embryo {
    shared: Arc<Shared>,
    sender: Sender<Message>,
    inbox: Receiver<Message>,
    /// It is to end.
    quit: Arc<AtomicBool>,
}

impl Embryo {
    /// Of a VM that waits to be forked from `source`.
    pub fn new(config: &VmConfig, resources: &Resources, source: &str) -> Self {
        let (sender, inbox) = channel();
        let family = Family::new(Some(source.to_owned()));
        let status = Status { state: VmState::Waiting, ..Status::default() };
        let shared = Shared::new(config.clone(), status, family, resources);
        Self { shared, sender, inbox, quit: Arc::default() }
    }

    /// What its machine reports to.
    pub fn report(&self) -> impl Fn(GuestEvent) + Clone + Send + Sync + 'static {
        let sender = self.sender.clone();
        move |event| drop(sender.send(Message::Guest(1, event)))
    }

    /// The API's handle, for now and later. `quit` ends the wait.
    pub fn control(&self, quit: impl Fn() + Send + Sync + 'static) -> Control {
        let (shared, sender, wanted) = (Arc::clone(&self.shared), self.sender.clone(), Arc::clone(&self.quit));
        let send = move |request: Request| {
            let state = shared.status().state;
            let answer = match request.command {
                _ if state != VmState::Waiting => return drop(sender.send(Message::Api(request))),
                Command::Stop | Command::Kill => {
                    wanted.store(true, Ordering::Relaxed);
                    quit();
                    Ok(Answer::Done)
                }
                command => Err(wrong_state(&command, state)),
            };
            let _ = request.reply.send(answer);
        };
        Control::new(send, Arc::clone(&self.shared) as _)
    }

    /// As [`Supervisor::listen`].
    ///
    /// # Errors
    /// As there.
    pub fn listen(&self, dir: &std::path::Path) -> std::io::Result<()> {
        self.shared.family.listen(dir)
    }
}

/// Owns the machine.
pub struct Supervisor {
    shared: Arc<Shared>,
    resources: Resources,
    /// None only while the next one is built, or after that failed.
    machine: Option<Machine>,
    /// Counts machines; tells events of the present one from those of its predecessors.
    boot: u64,
    /// Its first start goes on with what was saved: no boot.
    restored: bool,
    saving: Option<Saving>,
    /// A fork is being made.
    forking: bool,
    /// A loader is being started.
    injecting: bool,
    /// What a start of a loader had to leave in the guest's kernel.
    left_placed: Option<Box<Placed>>,
    /// What is needed to start programs in the guest, once that is known.
    plan: Option<Plan>,
    /// Somebody is at it.
    learning: bool,
    /// How often that was looked for since the guest started, for its forks.
    looked: u8,
    /// Devices on their way.
    plugging: Plugging,
    /// The disks, once the first fork was wanted.
    freezable: Option<Arc<Vec<Arc<Freezable>>>>,
    /// What keeps a forked machine's memory, and the disks of what it becomes after a reset.
    lifeline: Option<Lifeline>,
    sender: Sender<Message>,
    inbox: Receiver<Message>,
}

impl Supervisor {
    /// Builds the first machine; it waits for [`Command::Start`].
    pub fn new(config: VmConfig, mut resources: Resources) -> Result<Self, BuildError> {
        let (sender, inbox) = channel();
        let machine = build(&config, &mut resources, &Places::new(), &sender, 1)?;
        let shared = Shared::new(config, Status::default(), Family::new(None), &resources);
        Ok(Self::around(machine, shared, resources, (sender, inbox), None))
    }

    /// Builds the machine that was saved; it waits for [`Command::Start`]. `config` is the saved one, with what has moved since.
    ///
    /// # Errors
    /// When the state does not fit the configuration, the disks or this host.
    pub fn restore(config: VmConfig, mut resources: Resources, saved: SavedVm) -> Result<Self, ErrorBody> {
        let (sender, inbox) = channel();
        let (boots, run) = (saved.vm.boots, saved.vm.run);
        let (mut sections, memory) = saved.into_parts();
        let (lost, report) = (sender.clone(), sender.clone());
        let fill = |ram: &crate::memory::Memory| {
            let lazy = memory.fill(ram, move |why| {
                let why = ErrorBody::from_error(ErrorCode::StateInvalid, &*why).message;
                let _ = lost.send(Message::MemoryLost(why));
                std::thread::park_timeout(LAST_RESORT);
                std::process::exit(1);
            });
            lazy.map_err(ErrorBody::from)
        };
        let report = move |event| drop(report.send(Message::Guest(1, event)));
        let machine = Machine::restore(&config, &mut resources, &mut sections, fill, report)?;
        sections.finish().map_err(|e| ErrorBody::from_error(ErrorCode::StateInvalid, &e))?;
        let shared = Shared::new(config, Status::default(), Family::new(None), &resources);
        Ok(Self::around(machine, shared, resources, (sender, inbox), Some((boots, run))))
    }

    /// Takes over a machine that was just forked. It waits for [`Command::Start`], unless it is to stay paused, or runs already.
    pub fn adopt(embryo: Embryo, born: Born) -> (Self, Link) {
        let Born { machine, config, resources, go, lifeline, link } = born;
        let Embryo { shared, sender, inbox, quit } = embryo;
        shared.status().consoles = plugging::ports(&config, &resources);
        shared.set_config(config);
        let (lost, family) = (sender.clone(), Arc::clone(&shared.family));
        shared.family.born_of(go.generation);
        let mut this = Self::around(machine, shared, resources, (sender, inbox), Some((go.boots, go.run)));
        this.plan = go.plan.map(|plan| *plan);
        if go.paused {
            let mut status = this.shared.status();
            status.state = VmState::Paused;
            status.started.get_or_insert_with(SystemTime::now);
        } else {
            this.start();
        }
        this.offer();
        this.shared.family.served_by(Arc::clone(&lifeline.branch));
        lifeline.attend(move |notice| family.heed_branch(notice), move |why| drop(lost.send(Message::MemoryLost(why))));
        this.lifeline = Some(lifeline);
        // Its source's guest may have given something up in its last moment.
        this.collect_given_up();
        if quit.load(Ordering::Relaxed) {
            // Who wanted it to end was told that it will, when it was about to be born.
            let _ = this.sender.send(Message::Unwanted);
        }
        (this, link)
    }

    /// Lets other monitors be forked from this VM, through a socket in its directory.
    ///
    /// # Errors
    /// When the system refuses the socket or a thread.
    pub fn listen(&self, dir: &std::path::Path) -> std::io::Result<()> {
        self.offer();
        self.shared.family.listen(dir)
    }

    fn around(
        machine: Machine,
        shared: Arc<Shared>,
        resources: Resources,
        (sender, inbox): (Sender<Message>, Receiver<Message>),
        life: Option<(u64, Duration)>,
    ) -> Self {
        let mut status = shared.status();
        (status.boots, status.run) = life.unwrap_or_default();
        (status.meters, status.balloon) = (machine.meters(), machine.balloon().cloned());
        status.state = VmState::Created;
        drop(status);
        let (restored, saving) = (life.is_some(), None);
        Self {
            shared,
            resources,
            machine: Some(machine),
            boot: 1,
            restored,
            saving,
            forking: false,
            injecting: false,
            left_placed: None,
            plan: None,
            learning: false,
            looked: 0,
            plugging: Plugging::default(),
            freezable: None,
            lifeline: None,
            sender,
            inbox,
        }
    }

    /// As [`Machine::entered`].
    pub fn entered(&self) -> Option<u64> {
        self.machine.as_ref()?.entered()
    }

    /// The API's handle.
    pub fn control(&self) -> Control {
        let sender = self.sender.clone();
        let view: Arc<dyn View> = Arc::clone(&self.shared) as _;
        Control::new(move |request| drop(sender.send(Message::Api(request))), view)
    }

    /// Serves commands and events until the VM has stopped; says why it did.
    pub fn run(mut self) -> EndReason {
        let reason = loop {
            let end = match self.inbox.recv() {
                Ok(Message::Api(Request { command: Command::Save(request), reply })) => {
                    self.begin_save(request, reply);
                    None
                }
                Ok(Message::Api(Request { command: Command::Fork(request), reply })) => {
                    self.begin_fork(request, reply);
                    None
                }
                Ok(Message::Api(Request { command: Command::Examine(files), reply })) => {
                    self.begin_examination(files, reply);
                    None
                }
                Ok(Message::Api(Request { command: Command::StartProgram(request), reply })) => {
                    self.begin_program(request, reply);
                    None
                }
                Ok(Message::Operate(operation)) => {
                    operation(&mut self);
                    None
                }
                Ok(Message::Injected) => {
                    self.injecting = false;
                    self.may_go();
                    None
                }
                Ok(Message::ForkPoint(request)) => {
                    self.fork_point(*request);
                    None
                }
                Ok(Message::Api(Request { command: Command::Plug(device), reply })) => {
                    self.begin_plug(device, reply);
                    None
                }
                Ok(Message::Api(Request { command: Command::Unplug { id, force }, reply })) => {
                    self.begin_unplug(id, force, reply);
                    None
                }
                Ok(Message::Plug(message)) => {
                    self.plug_message(message);
                    None
                }
                Ok(Message::Still(request)) => {
                    self.stand_still(request);
                    None
                }
                Ok(Message::Forked) => {
                    self.forking = false;
                    self.learn();
                    self.may_go();
                    None
                }
                Ok(Message::Api(request)) => {
                    let (answer, end) = self.obey(request.command);
                    let _ = request.reply.send(answer.map(|()| Answer::Done));
                    end
                }
                Ok(Message::Guest(boot, event)) if boot == self.boot => self.observe(event),
                Ok(Message::Guest(..)) => None,
                Ok(Message::Saved(outcome)) => {
                    let end = self.end_save(outcome);
                    self.may_go();
                    end
                }
                Ok(Message::MemoryLost(why)) => {
                    // Its threads may be waiting for memory that never comes: they end with the process.
                    std::mem::forget(self.machine.take());
                    let message = match &self.lifeline {
                        Some(_) => format!("what the fork shared is lost: {why}"),
                        None => format!("the saved VM's memory is damaged: {why}"),
                    };
                    error!("{message}");
                    Some(EndReason::Failed { message })
                }
                Ok(Message::Unwanted) => Some(EndReason::Killed),
                // Unreachable while `self.sender` lives; ending is right all the same.
                Err(_) => Some(EndReason::Killed),
            };
            if let Some(end) = end {
                break end;
            }
        };
        if let Some(saving) = &self.saving {
            saving.give_up();
            // It clears up after itself before anybody hears that the VM has ended.
            while let Ok(message) = self.inbox.recv() {
                if matches!(message, Message::Saved(_)) {
                    break;
                }
            }
        }
        self.leave_family();
        self.machine = None;
        for hub in [&self.shared.serial, &self.shared.hvc] {
            hub.finish(LAST_WORDS);
        }
        let mut status = self.shared.status();
        status.stop_clock();
        status.state = VmState::Stopped;
        status.ended = Some(reason.clone());
        drop(status);
        info!(?reason, "stopped");
        reason
    }

    fn obey(&mut self, command: Command) -> (Result<(), ErrorBody>, Option<EndReason>) {
        let state = self.shared.status().state;
        if self.saving.is_some() && command != Command::Kill {
            let message = format!("cannot {} a VM that is being saved", command_name(&command));
            let hint = "wait until it is saved ('civic info' shows how far it is), or kill it";
            return (Err(ErrorBody::new(ErrorCode::WrongState, message).with_hint(hint)), None);
        }
        let Some(machine) = &self.machine else {
            return (Err(ErrorBody::internal("there is no machine")), None);
        };
        let answer = match (&command, state) {
            (Command::Start, VmState::Created) => {
                self.start();
                Ok(())
            }
            (Command::Pause, VmState::Running | VmState::Stopping) => {
                machine.pause();
                let mut status = self.shared.status();
                status.stop_clock();
                status.state = VmState::Paused;
                Ok(())
            }
            (Command::Resume, VmState::Paused) => {
                self.shared.status().start_clock();
                machine.run_again();
                Ok(())
            }
            (Command::Stop, VmState::Running | VmState::Stopping) => {
                machine.press_power_button();
                self.shared.status().state = VmState::Stopping;
                Ok(())
            }
            (Command::SetBalloon(bytes), _) => match machine.balloon() {
                Some(balloon) => {
                    balloon::set_target(balloon, *bytes);
                    Ok(())
                }
                None => Err(no_balloon()),
            },
            (Command::Kill, _) => return (Ok(()), Some(EndReason::Killed)),
            _ => Err(wrong_state(&command, state)),
        };
        (answer, None)
    }

    /// Pauses the machine and starts to write it; the reply comes when that is done.
    fn begin_save(&mut self, request: SaveRequest, reply: Reply) {
        if let Err((error, reply)) = self.try_save(request, reply) {
            let _ = reply.send(Err(error));
        }
    }

    fn try_save(&mut self, request: SaveRequest, reply: Reply) -> Result<(), (ErrorBody, Reply)> {
        let begun = Instant::now();
        let before = self.shared.status().state;
        let wrong = |message: String, hint: &str| ErrorBody::new(ErrorCode::WrongState, message).with_hint(hint);
        if self.saving.is_some() {
            return Err((wrong("the VM is being saved already".into(), "wait for that, or kill the VM"), reply));
        }
        if !matches!(before, VmState::Running | VmState::Stopping | VmState::Paused) {
            let hint = way_out(&Command::Save(request), before);
            return Err((wrong(format!("cannot save a VM that is {before}"), hint), reply));
        }
        let Some(machine) = &self.machine else { return Err((ErrorBody::internal("there is no machine"), reply)) };
        if self.forking {
            return Err((wrong("the VM is being forked".into(), "try again when that is done"), reply));
        }
        if machine.is_forked() {
            let hint = "save the VM that it was forked from";
            return Err((wrong("a fork cannot be saved: its memory is its source's".into(), hint), reply));
        }
        if let Some(disk) = self.shared.config().disks.iter().find(|disk| disk.overlay) {
            let message = format!("a VM cannot be saved whose disk '{}' keeps what is written in an overlay", disk.id);
            return Err((wrong(message, "remove the disk first"), reply));
        }
        if let Some(lazy) = machine.loading() {
            // What it was restored from is still needed: wait for that while it runs, then come back.
            let sender = self.sender.clone();
            let again = move || {
                // A failure is told through another message.
                let _ = lazy.finish();
                let _ = sender.send(Message::Api(Request { command: Command::Save(request), reply }));
            };
            std::thread::spawn(again);
            return Ok(());
        }
        if !request.directory.is_absolute() {
            let message = format!("{} is not an absolute path", request.directory.display());
            return Err((ErrorBody::new(ErrorCode::InvalidRequest, message), reply));
        }
        let draft = match Draft::new(&request.directory) {
            Ok(draft) => draft,
            Err(e) => return Err((e.into(), reply)),
        };
        machine.pause();
        let paused = Instant::now();
        {
            let mut status = self.shared.status();
            status.stop_clock();
            status.state = VmState::Paused;
        }
        let sections = match machine.save() {
            Ok(sections) => sections,
            Err(e) => {
                self.go_back(before);
                return Err((ErrorBody::from_error(ErrorCode::Internal, &e), reply));
            }
        };
        let vm = match self.vm_state() {
            Ok(vm) => vm,
            Err(e) => {
                self.go_back(before);
                return Err((ErrorBody::from_error(ErrorCode::Internal, &e), reply));
            }
        };
        let begin = Begin { request, reply, before, begun, paused, memory: machine.memory(), sections, vm };
        let sender = self.sender.clone();
        match Saving::begin(begin, draft, move |outcome| drop(sender.send(Message::Saved(outcome)))) {
            Ok(saving) => {
                self.shared.status().saving = Some(saving.meter());
                self.saving = Some(saving);
                Ok(())
            }
            Err((e, reply)) => {
                self.go_back(before);
                Err((ErrorBody::internal(format!("cannot start a thread: {e}")), reply))
            }
        }
    }

    /// What the machine does not know of itself, with every default filled in that depended on its name.
    fn vm_state(&self) -> Result<VmStateV1, serde_json::Error> {
        let mut config = VmConfig::clone(&self.shared.config());
        let macs: Vec<_> = config.nets.iter().map(|net| effective_mac(&config, net)).collect();
        for (net, mac) in config.nets.iter_mut().zip(macs) {
            net.mac = Some(mac);
        }
        let target = self.machine.as_ref().and_then(Machine::balloon).map(BalloonControl::target);
        if let (Some(balloon), Some(pages)) = (&mut config.balloon, target) {
            balloon.target_bytes = balloon::bytes(pages);
        }
        let stamp = |disk: &civic_api::DiskConfig| (!disk.read_only).then(|| DiskStamp::of(&disk.path)).flatten();
        let status = self.shared.status();
        Ok(VmStateV1 {
            config: serde_json::to_string(&config)?,
            boots: status.boots,
            run: status.run,
            index_checksum: 0,
            disks: config.disks.iter().map(stamp).collect(),
        })
    }

    fn end_save(&mut self, outcome: Outcome) -> Option<EndReason> {
        let saving = self.saving.take()?;
        self.shared.status().saving = None;
        match outcome {
            Ok((memory, state)) => {
                let (then, before) = (saving.then(), saving.before());
                let (report, reply) = saving.report(memory, state);
                info!(directory = %report.directory.display(), memory, state, "saved");
                let directory = report.directory.clone();
                match then {
                    AfterSave::Resume => {
                        self.go_back(if before == VmState::Paused { VmState::Running } else { before })
                    }
                    AfterSave::Stop | AfterSave::Pause => {}
                }
                let _ = reply.send(Ok(Answer::Saved(report)));
                (then == AfterSave::Stop).then_some(EndReason::Saved { directory })
            }
            Err(e) => {
                self.go_back(saving.before());
                warn!("not saved: {e}");
                let _ = saving.into_reply().send(Err(e.into()));
                None
            }
        }
    }

    /// Lets a machine that was paused for a save be what it was before.
    fn go_back(&self, before: VmState) {
        if before == VmState::Paused {
            return;
        }
        if let Some(machine) = &self.machine {
            let mut status = self.shared.status();
            status.start_clock();
            status.state = before;
            drop(status);
            machine.run_again();
        }
    }

    fn start(&mut self) {
        // Before the guest runs, so that whoever hears of it finds it counted.
        let mut status = self.shared.status();
        status.boots += u64::from(!std::mem::take(&mut self.restored));
        status.started.get_or_insert_with(SystemTime::now);
        status.start_clock();
        drop(status);
        if let Some(machine) = &self.machine {
            machine.run();
        }
    }

    fn observe(&mut self, event: GuestEvent) -> Option<EndReason> {
        match event {
            GuestEvent::PowerOff => Some(EndReason::PoweredOff),
            GuestEvent::GaveUp if self.must_stay() => {
                self.later(Message::Guest(self.boot, GuestEvent::GaveUp));
                None
            }
            GuestEvent::GaveUp => {
                self.collect_given_up();
                None
            }
            GuestEvent::Reset => {
                info!("the guest resets");
                self.reboot().err().map(|e| {
                    error!("cannot build the machine again: {}", e.message);
                    EndReason::Failed {
                        message: format!("the guest reset and could not be started again: {}", e.message),
                    }
                })
            }
            GuestEvent::Failed(message) => {
                error!("{message}");
                Some(EndReason::Failed { message })
            }
        }
    }

    /// Has nobody share this machine's memory with it any more, which is about to go. While it stands still: who waited for the page
    /// server then would wait for ever.
    fn leave_family(&self) {
        if let Some(machine) = &self.machine {
            machine.pause();
        }
        self.shared.family.leave_origin();
    }

    /// Drops the machine and starts the next one in its place. A VM that was paused meanwhile stays paused.
    fn reboot(&mut self) -> Result<(), ErrorBody> {
        self.boot += 1;
        (self.plan, self.looked, self.left_placed) = (None, 0, None);
        self.shared.programs.reset();
        // The target may have been changed since the VM was configured.
        let target = self.machine.as_ref().and_then(Machine::balloon).map(BalloonControl::target);
        // First give the memory back: two machines may not fit.
        self.leave_family();
        self.collect_given_up();
        self.pull_leaving();
        let places = self.machine.as_ref().map(Machine::places).unwrap_or_default();
        self.machine = None;
        let next = build(&self.shared.config(), &mut self.resources, &places, &self.sender, self.boot)
            .map_err(|e| ErrorBody::from_error(ErrorCode::Internal, &e))?;
        let mut status = self.shared.status();
        status.meters = next.meters().after(&status.meters);
        status.balloon = next.balloon().cloned();
        if let (Some(pages), Some(balloon)) = (target, &status.balloon) {
            balloon.set_target(pages);
        }
        self.machine = Some(next);
        drop(status);
        self.offer();
        let mut status = self.shared.status();
        if status.state == VmState::Paused {
            warn!("the guest reset while it was being paused: it starts on resume");
            status.boots += 1;
            return Ok(());
        }
        status.stop_clock();
        drop(status);
        self.start();
        Ok(())
    }
}

impl Status {
    fn start_clock(&mut self) {
        self.state = VmState::Running;
        self.running_since = Some(Instant::now());
    }

    fn stop_clock(&mut self) {
        if let Some(since) = self.running_since.take() {
            self.run += since.elapsed();
        }
    }
}

fn build(
    config: &VmConfig,
    resources: &mut Resources,
    places: &Places,
    sender: &Sender<Message>,
    boot: u64,
) -> Result<Machine, BuildError> {
    // `Sender` is Sync, so devices on any thread may report.
    let sender = sender.clone();
    Machine::build(config, resources, places, move |event| drop(sender.send(Message::Guest(boot, event))))
}

fn command_name(command: &Command) -> &'static str {
    match command {
        Command::Start => "start",
        Command::Pause => "pause",
        Command::Resume => "resume",
        Command::Stop => "stop",
        Command::Kill => "kill",
        Command::SetBalloon(_) => "set the balloon of",
        Command::Save(_) => "save",
        Command::Fork(_) => "fork",
        Command::Examine(_) => "examine the guest of",
        Command::StartProgram(_) => "start a program in",
        Command::Plug(_) => "plug a device into",
        Command::Unplug { .. } => "remove a device from",
    }
}

fn wrong_state(command: &Command, state: VmState) -> ErrorBody {
    let message = format!("cannot {} a VM that is {state}", command_name(command));
    ErrorBody::new(ErrorCode::WrongState, message).with_hint(way_out(command, state))
}

fn way_out(command: &Command, state: VmState) -> &'static str {
    match (command, state) {
        (Command::Stop, VmState::Paused) => "resume it first, so that the guest can see the power button; or kill it",
        (Command::Stop, VmState::Created) => "start it first, or kill it",
        (_, VmState::Created) => "start it first",
        (_, VmState::Waiting) => "it is none yet: its source is still to be forked; 'kill' ends the wait",
        (_, VmState::Stopped) => "run it again",
        _ => "ask for its state with 'civic info'",
    }
}
