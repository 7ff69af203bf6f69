//! The supervisor: owns the machine and changes its state, one thing at a time.
//!
//! ```text
//!            Start            Pause
//!  Created ────────▶ Running ◀──────▶ Paused        guest reset: the next machine, Running again
//!                       │     Resume                guest power-off, failure, Kill: Stopped, the process ends
//!                  Stop │ (power button)
//!                       ▼
//!                    Stopping ── Stop presses again
//! ```
//!
//! Commands come from the API, events from the guest; both arrive on one channel, so no two can race. What the API may read
//! without asking stands in [`Shared`].

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use civic_api::{CONSOLE_PORT_SERIAL, EndReason, ErrorBody, ErrorCode, VmConfig, VmInfo, VmState};
use civic_devices::console_hub::ConsoleHub;
use tracing::{error, info, warn};

use crate::control::{Command, Control, Request, View};
use crate::machine::{BuildError, GuestEvent, Machine, Meters};
use crate::resources::{CONSOLE_PORT_HVC, Resources};

/// How long console clients may take to read the last of the guest's output.
const LAST_WORDS: Duration = Duration::from_secs(1);

enum Message {
    Api(Request),
    /// From the machine of this boot; one that is gone may still be heard.
    Guest(u64, GuestEvent),
}

/// What is read without asking the supervisor.
struct Status {
    state: VmState,
    boots: u64,
    started: Option<SystemTime>,
    /// Time run up to the last pause, and since when it runs.
    run: Duration,
    running_since: Option<Instant>,
    meters: Meters,
    ended: Option<EndReason>,
}

/// The API's view. Lock order: `status` is a leaf, held for reading counters only.
struct Shared {
    config: VmConfig,
    status: Mutex<Status>,
    serial: Arc<ConsoleHub>,
    hvc: Arc<ConsoleHub>,
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl View for Shared {
    fn info(&self) -> VmInfo {
        let status = self.status();
        let running = status.running_since.map_or(Duration::ZERO, |since| since.elapsed());
        let since_epoch = |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        VmInfo {
            name: self.config.name.clone(),
            state: status.state,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            cpus: self.config.cpus,
            memory_bytes: self.config.memory_bytes,
            kernel: self.config.kernel.clone(),
            boots: status.boots,
            started_at_ms: status.started.map(since_epoch),
            run_ms: (status.run + running).as_millis() as u64,
            devices: status.meters.devices(),
            vcpus: status.meters.vcpus(),
            consoles: vec![CONSOLE_PORT_SERIAL.into(), CONSOLE_PORT_HVC.into()],
            ended: status.ended.clone(),
        }
    }

    fn console(&self, port: &str) -> Option<Arc<ConsoleHub>> {
        match port {
            CONSOLE_PORT_SERIAL => Some(Arc::clone(&self.serial)),
            CONSOLE_PORT_HVC => Some(Arc::clone(&self.hvc)),
            _ => None,
        }
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
    sender: Sender<Message>,
    inbox: Receiver<Message>,
}

impl Supervisor {
    /// Builds the first machine; it waits for [`Command::Start`].
    pub fn new(config: VmConfig, mut resources: Resources) -> Result<Self, BuildError> {
        let (sender, inbox) = channel();
        let machine = build(&config, &mut resources, &sender, 1)?;
        let status = Status {
            state: VmState::Created,
            boots: 0,
            started: None,
            run: Duration::ZERO,
            running_since: None,
            meters: machine.meters(),
            ended: None,
        };
        let (serial, hvc) = (Arc::clone(&resources.serial), Arc::clone(&resources.hvc));
        let shared = Arc::new(Shared { config, status: Mutex::new(status), serial, hvc });
        Ok(Self { shared, resources, machine: Some(machine), boot: 1, sender, inbox })
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
                Ok(Message::Api(request)) => {
                    let (answer, end) = self.obey(request.command);
                    let _ = request.reply.send(answer);
                    end
                }
                Ok(Message::Guest(boot, event)) if boot == self.boot => self.observe(event),
                Ok(Message::Guest(..)) => None,
                // Unreachable while `self.sender` lives; ending is right all the same.
                Err(_) => Some(EndReason::Killed),
            };
            if let Some(end) = end {
                break end;
            }
        };
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
        let wrong = || {
            let message = format!("cannot {} a VM that is {state}", command_name(command));
            Err(ErrorBody::new(ErrorCode::WrongState, message).with_hint(way_out(command, state)))
        };
        let Some(machine) = &self.machine else {
            return (Err(ErrorBody::internal("there is no machine")), None);
        };
        let answer = match (command, state) {
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
                machine.run();
                Ok(())
            }
            (Command::Stop, VmState::Running | VmState::Stopping) => {
                machine.press_power_button();
                self.shared.status().state = VmState::Stopping;
                Ok(())
            }
            (Command::Kill, _) => return (Ok(()), Some(EndReason::Killed)),
            _ => wrong(),
        };
        (answer, None)
    }

    fn start(&mut self) {
        // Before the guest runs, so that whoever hears of it finds it counted.
        let mut status = self.shared.status();
        status.boots += 1;
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

    /// Drops the machine and starts the next one in its place. A VM that was paused meanwhile stays paused.
    fn reboot(&mut self) -> Result<(), ErrorBody> {
        self.boot += 1;
        // First give the memory back: two machines may not fit.
        self.machine = None;
        let next = build(&self.shared.config, &mut self.resources, &self.sender, self.boot)
            .map_err(|e| ErrorBody::from_error(ErrorCode::Internal, &e))?;
        let mut status = self.shared.status();
        status.meters = next.meters().after(&status.meters);
        self.machine = Some(next);
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
    sender: &Sender<Message>,
    boot: u64,
) -> Result<Machine, BuildError> {
    // `Sender` is Sync, so devices on any thread may report.
    let sender = sender.clone();
    Machine::build(config, resources, move |event| drop(sender.send(Message::Guest(boot, event))))
}

fn command_name(command: Command) -> &'static str {
    match command {
        Command::Start => "start",
        Command::Pause => "pause",
        Command::Resume => "resume",
        Command::Stop => "stop",
        Command::Kill => "kill",
    }
}

fn way_out(command: Command, state: VmState) -> &'static str {
    match (command, state) {
        (Command::Stop, VmState::Paused) => "resume it first, so that the guest can see the power button; or kill it",
        (Command::Stop, VmState::Created) => "start it first, or kill it",
        (_, VmState::Created) => "start it first",
        (_, VmState::Stopped) => "run it again",
        _ => "ask for its state with 'civic info'",
    }
}
