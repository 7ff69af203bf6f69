//! A fork under way: a thread makes it, the supervisor only makes the pause, which is where the machine is.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use civic_api::{ErrorBody, ErrorCode, ForkRequest, ForkStages, MAX_CHILDREN, VmState, validate_name};
use civic_fork::ram::Ram;

use super::{Message, Supervisor, way_out};
use crate::clock::monotonic;
use crate::control::{Answer, Command, Reply};
use crate::fork::BootFiles;
use crate::fork::disks::Freezable;
use crate::fork::family::Origin;
use crate::fork::point::{Fork, Pause, Paused};
use crate::machine::{Machine, effective_mac};

/// A pause that a fork's thread asks for, and where what comes of it goes.
pub struct PauseRequest {
    pause: Pause,
    told: Sender<Result<Paused, ErrorBody>>,
}

/// Who wants the vCPUs to stand still: told when they do, and gone when they need not any more.
pub struct StillRequest {
    stand: Sender<()>,
    done: Receiver<()>,
}

impl Supervisor {
    /// Starts a fork; the reply comes when it is made, or cannot be.
    pub(super) fn begin_fork(&mut self, request: ForkRequest, reply: Reply) {
        let begun = monotonic();
        if let Err((error, reply)) = self.try_fork(request, begun, reply) {
            let _ = reply.send(Err(error));
        }
    }

    fn try_fork(&mut self, request: ForkRequest, begun: u64, reply: Reply) -> Result<(), (ErrorBody, Reply)> {
        let ready = self.check_fork(&request);
        let disks = match ready.and_then(|()| self.freezable()) {
            Ok(disks) => disks,
            Err(e) => return Err((e, reply)),
        };
        let loading = self.machine.as_ref().and_then(Machine::loading);
        let fork = Fork { request, begun, family: Arc::clone(&self.shared.family), disks };
        let sender = self.sender.clone();
        let make = move || {
            if let Some(lazy) = loading {
                // What it was restored from must be there before it can be shared. A failure is told through another message.
                let _ = lazy.finish();
            }
            let asked = sender.clone();
            let outcome = fork.make(|pause| {
                let (told, answer) = channel();
                let _ = asked.send(Message::ForkPoint(Box::new(PauseRequest { pause, told })));
                answer
            });
            let _ = sender.send(Message::Forked);
            let _ = reply.send(outcome.map(Answer::Forked));
        };
        self.forking = true;
        // The reply is lost with the thread; dropping it is answered.
        if let Err(e) = std::thread::Builder::new().name("fork".into()).spawn(make) {
            self.forking = false;
            tracing::warn!("cannot start a thread for a fork: {e}");
        }
        Ok(())
    }

    fn check_fork(&self, request: &ForkRequest) -> Result<(), ErrorBody> {
        let invalid = |message: String| Err(ErrorBody::new(ErrorCode::InvalidRequest, message));
        if request.children.is_empty() || request.children.len() > MAX_CHILDREN {
            return invalid(format!("a fork has 1 to {MAX_CHILDREN} children, not {}", request.children.len()));
        }
        for (n, name) in request.children.iter().enumerate() {
            if let Err(e) = validate_name(name) {
                return invalid(e.to_string());
            }
            if request.children[..n].contains(name) {
                return invalid(format!("'{name}' is asked for twice"));
            }
        }
        let state = self.shared.status().state;
        if self.forking {
            let error = ErrorBody::new(ErrorCode::Busy, "the VM is being forked");
            return Err(error.with_hint("try again when that is done"));
        }
        if self.injecting {
            let error = ErrorBody::new(ErrorCode::Busy, "a program is just being started in the VM");
            return Err(error.with_hint("try again when it is"));
        }
        if self.saving.is_some() {
            let error = ErrorBody::new(ErrorCode::WrongState, "cannot fork a VM that is being saved");
            return Err(error.with_hint("wait until it is saved"));
        }
        if !matches!(state, VmState::Running | VmState::Stopping | VmState::Paused) {
            let error = ErrorBody::new(ErrorCode::WrongState, format!("cannot fork a VM that is {state}"));
            return Err(error.with_hint(way_out(&Command::Fork(request.clone()), state)));
        }
        Ok(())
    }

    /// The disks, each prepared for fork points when the first is wanted.
    fn freezable(&mut self) -> Result<Arc<Vec<Arc<Freezable>>>, ErrorBody> {
        let (resources, family, config) = (&self.resources, &self.shared.family, self.shared.config());
        let known = self.freezable.clone().unwrap_or_default();
        let disks = config.disks.iter().zip(&resources.disks);
        let disks: Result<Vec<_>, _> = disks
            .map(|(disk, opened)| match known.iter().find(|known| known.is_of(&opened.disk)) {
                Some(known) => Ok(Arc::clone(known)),
                None => Freezable::new(disk, &opened.disk, opened.layers.as_ref(), &config.forks, family).map(Arc::new),
            })
            .collect();
        let disks = Arc::new(disks?);
        self.freezable = Some(Arc::clone(&disks));
        Ok(disks)
    }

    /// The pause: as short as can be.
    pub(super) fn fork_point(&mut self, request: PauseRequest) {
        let PauseRequest { pause, told } = request;
        let _ = told.send(self.paused_for(pause));
    }

    fn paused_for(&self, pause: Pause) -> Result<Paused, ErrorBody> {
        let gone = || ErrorBody::new(ErrorCode::ForkFailed, "the VM has ended or reset");
        let config = serde_json::to_string(&self.inherited())
            .map_err(|e| ErrorBody::internal(format!("the configuration cannot be written: {e}")))?;
        let machine = self.machine.as_ref().ok_or_else(gone)?;
        // A page server of a machine that has reset meanwhile watches nothing any more.
        if !self.shared.family.serves(&pause.serving) {
            return Err(gone());
        }
        let running = self.shared.status().state != VmState::Paused;
        let mut stages = ForkStages::default();
        let micros = |since: Instant| since.elapsed().as_micros() as u64;
        let start = Instant::now();
        if running {
            machine.pause();
        }
        stages.drain_us = micros(start);
        self.shared.family.pin(&pause.disks);
        let frozen = (|| -> Result<_, ErrorBody> {
            let from = Instant::now();
            let sections = machine.save().map_err(|e| ErrorBody::from_error(ErrorCode::Internal, &e))?;
            stages.state_us = micros(from);
            let from = Instant::now();
            let disks: Result<Vec<_>, _> = pause.disks.iter().map(|disk| disk.freeze()).collect();
            let disks = disks?;
            stages.disks_us = micros(from);
            let from = Instant::now();
            let generation = pause.serving.server.freeze(pause.children.clone());
            let generation = generation.map_err(|e| ErrorBody::from_error(ErrorCode::ForkFailed, &e))?;
            stages.freeze_us = micros(from);
            // What comes from now on is for the children too.
            let feed = |(child, id, sink): (_, String, _)| machine.mirror(&id, sink).map(|mirrored| (child, mirrored));
            let mirrors: Vec<_> = pause.mirrors.into_iter().filter_map(feed).collect();
            Ok((sections, disks, generation, mirrors))
        })();
        let from = Instant::now();
        if running {
            machine.run();
        }
        stages.resume_us = micros(from);
        stages.pause_us = micros(start);
        let (sections, disks, generation, mirrors) = frozen.inspect_err(|_| self.shared.family.unpin())?;
        let status = self.shared.status();
        let run = status.run + status.running_since.map_or_else(Default::default, |since| since.elapsed());
        Ok(Paused { sections, config, generation, mirrors, disks, stages, boots: status.boots, run, plan: self.plan })
    }

    /// Has the vCPUs stand still for a moment, devices going on.
    pub(super) fn stand_still(&self, StillRequest { stand, done }: StillRequest) {
        let running = self.machine.as_ref().filter(|_| self.shared.status().state != VmState::Paused);
        let go_on = running.map(Machine::hold_vcpus);
        let _ = stand.send(());
        // It ends in this process, whatever happens.
        let _ = done.recv();
        drop(go_on);
    }

    fn still(&self) -> impl Fn(&mut dyn FnMut()) + Send + Sync + 'static {
        let sender = self.sender.clone();
        move |work| {
            let ((stand, stood), (_doing, done)) = (channel(), channel());
            let _ = sender.send(Message::Still(StillRequest { stand, done }));
            // A supervisor that has ended has no vCPUs any more.
            let _ = stood.recv();
            work();
        }
    }

    /// From now on the present machine is what children are forked from.
    pub(super) fn offer(&self) {
        let Some(machine) = &self.machine else { return };
        let memory = machine.memory();
        let origin = (|| {
            // A fork's children read what it reads; what they need of its own is copied for them.
            let (ram, read_only) = if machine.is_forked() {
                (None, memory.memfd.try_clone().map_err(|e| e.to_string())?)
            } else {
                let ram = Ram::new(Arc::clone(&memory.ram)).map_err(|e| e.to_string())?;
                (Some(Arc::new(ram)), memory.read_only().map_err(|e| e.to_string())?)
            };
            let store_bytes = self.shared.config().forks.memory_bytes;
            let still = Box::new(self.still());
            let sender = self.sender.clone();
            let expected = Box::new(move || {
                let _ = sender.send(Message::Operate(Box::new(Supervisor::learn)));
            });
            let kernel = self.resources.kernel.file().try_clone().map_err(|e| e.to_string())?;
            let initrd = self.resources.initrd.as_ref().map(|initrd| initrd.try_clone()).transpose();
            let boot = BootFiles { kernel, initrd: initrd.map_err(|e| e.to_string())? };
            Ok(Origin { ram, read_only, boot, keeper: memory.keeper(), store_bytes, still, expected })
        })();
        match (origin, serde_json::to_string(&self.inherited())) {
            (Ok(origin), Ok(config)) => self.shared.family.set_origin(origin, config),
            (Err::<_, String>(why), _) => tracing::warn!("this VM cannot be forked: {why}"),
            (_, Err(e)) => tracing::warn!("this VM cannot be forked: {e}"),
        }
    }

    /// What a child is configured as: with everything filled in that is this VM's own.
    pub(super) fn inherited(&self) -> civic_api::VmConfig {
        let mut config = civic_api::VmConfig::clone(&self.shared.config());
        let macs: Vec<_> = config.nets.iter().map(|net| effective_mac(&config, net)).collect();
        for (net, mac) in config.nets.iter_mut().zip(macs) {
            net.mac = Some(mac);
        }
        for (disk, opened) in config.disks.iter_mut().zip(&self.resources.disks) {
            disk.read_only = opened.disk.read_only();
        }
        config
    }
}
