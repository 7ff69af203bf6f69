//! A source's fork: everything before and after the pause in a thread of its own, the pause itself by the supervisor.
//!
//! ```text
//!  when somebody waits: page server, Adopt, ArmAhead
//!  thread "fork":  Arm, of what is left ──▶ supervisor: pause, state, disks, Freeze, run ──▶ thread: Go, Disk…, Started
//! ```
//!
//! Whatever fails before `Freeze` leaves the source as it was; from then on it runs whatever becomes of the children.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use civic_api::{ErrorBody, ErrorCode, FailedVm, ForkReport, ForkRequest, ForkStages, ForkedVm};
use civic_devices::mirror::MirrorSink;
use civic_fork::disk::Generation as DiskGeneration;
use civic_fork::pager::{ChildId, GenerationId};
use civic_fork::source::PageService;
use civic_inject::plan::Plan;
use nix::sys::memfd::{MFdFlags, memfd_create};
use tracing::info;

use super::disks::Freezable;
use super::family::{Family, Serving};
use super::{Go, ToChild, ToSource};
use crate::clock::monotonic;
use crate::machine::Mirrored;
use crate::state::Sections;

/// How long a child may take to live, once it has everything.
const BIRTH: Duration = Duration::from_secs(30);

/// What the supervisor is asked for: the pause.
pub struct Pause {
    /// The page server, armed.
    pub serving: Serving,
    /// The children to come.
    pub children: Vec<ChildId>,
    /// The disks.
    pub disks: Arc<Vec<Arc<Freezable>>>,
    /// The children's network cards that are to be fed from that moment on, by child and id.
    pub mirrors: Vec<(ChildId, String, MirrorSink)>,
}

/// What it gives back.
pub struct Paused {
    /// The state of everything but memory and disks.
    pub sections: Sections,
    /// The configuration at that moment, as in [`ToChild::Go`].
    pub config: String,
    /// As the page server counts.
    pub generation: GenerationId,
    /// The network cards that are fed.
    pub mirrors: Vec<(ChildId, Mirrored)>,
    /// Of each disk; none for one that nobody writes.
    pub disks: Vec<Option<DiskGeneration>>,
    /// How long each part took.
    pub stages: ForkStages,
    /// How often the guest has started.
    pub boots: u64,
    /// How long it has run.
    pub run: Duration,
    /// As in [`Go`].
    pub plan: Option<Plan>,
}

/// A fork to be made.
pub struct Fork {
    /// What was asked.
    pub request: ForkRequest,
    /// When, by [`monotonic`].
    pub begun: u64,
    /// Whose.
    pub family: Arc<Family>,
    /// Its disks.
    pub disks: Arc<Vec<Arc<Freezable>>>,
}

fn micros(since: Instant) -> u64 {
    since.elapsed().as_micros() as u64
}

impl Fork {
    /// Makes it. `pause` asks the supervisor for the pause.
    ///
    /// # Errors
    /// When nothing came of it; the source is as it was.
    pub fn make(
        self,
        pause: impl FnOnce(Pause) -> Receiver<Result<Paused, ErrorBody>>,
    ) -> Result<ForkReport, ErrorBody> {
        let Self { request, begun, family, disks } = self;
        let started = Instant::now();
        let _making = family.making();
        let waiting = family.take_waiting(&request.children)?;
        let serving = family.server()?;
        let Serving { server, origin, .. } = &serving;
        let failed = |e: &(dyn std::error::Error + 'static)| ErrorBody::from_error(ErrorCode::ForkFailed, e);
        let (mut children, mut mirrors) = (Vec::new(), Vec::new());
        let ids: Vec<_> = waiting.iter().map(|waiting| waiting.id).collect();
        let give_up = |e: ErrorBody| {
            let _ = server.abandon();
            ids.iter().for_each(|id| drop(server.forget(*id)));
            e
        };
        for (name, waiting) in request.children.iter().zip(waiting) {
            // Mostly it is already.
            let adopted =
                waiting.adopted_by(&serving).map_err(|e| failed(&e).with_hint(format!("it was about '{name}'")));
            let link = waiting.link.try_clone().map_err(|e| failed(&e));
            mirrors.extend(waiting.mirrors().into_iter().map(|(net, sink)| (waiting.id, net, sink)));
            children.push((waiting.id, name.clone(), waiting.process.id(), adopted.and(link).map_err(give_up)?));
        }
        let prepare_us = micros(started);
        let arming = Instant::now();
        // From now on pages stay that the guest gives back: children will want them.
        origin.keeper.keep(true);
        let armed = server.arm().map_err(|e| give_up(failed(&e)))?;
        family.armed();
        let arm_us = micros(arming);
        let (children_asked, frozen_disks) = (ids.clone(), Arc::clone(&disks));
        let asked = Pause { serving: serving.clone(), children: children_asked, disks: frozen_disks, mirrors };
        let gone = || ErrorBody::new(ErrorCode::ForkFailed, "the VM has ended");
        let paused = pause(asked).recv().unwrap_or_else(|_| Err(gone())).map_err(give_up)?;
        let born = Instant::now();
        let Paused { sections, config, generation, mut mirrors, disks: frozen, mut stages, boots, run, plan } = paused;
        let numbered = family.next_number();
        let plan = plan.map(Box::new);
        let go = Go { generation: numbered, config, paused: request.paused, boots, run, plan };
        let frozen: Arc<[_]> = frozen.into();
        family.freeze(&serving, (numbered, generation), ids, Arc::clone(&frozen));
        let sent = hand_over(&children, &sections, &go, &disks, &frozen);
        // They go with whoever needs them.
        drop(frozen);
        if let Err(e) = sent {
            children.iter().for_each(|(id, ..)| lose(&family, &**server, *id));
            return Err(ErrorBody::new(ErrorCode::ForkFailed, format!("the state cannot be handed over: {e}")));
        }
        let (mut lives, mut dead) = (Vec::new(), Vec::new());
        for (id, name, pid, link) in children {
            match link.receive::<ToSource>(BIRTH) {
                Ok((ToSource::Started { at }, _)) => {
                    let fed = mirrors.extract_if(.., |(child, _)| *child == id).map(|(_, mirrored)| mirrored);
                    family.add(id, name.clone(), pid, numbered, fed.collect());
                    lives.push(ForkedVm { name, pid, running_us: at.saturating_sub(begun) / 1000 });
                }
                other => {
                    let message = match other {
                        Ok((ToSource::Failed { why }, _)) => why,
                        Ok(_) => "it says something else than that it lives".into(),
                        Err(e) => e.to_string(),
                    };
                    lose(&family, &**server, id);
                    dead.push(FailedVm { name, message });
                }
            }
        }
        (stages.prepare_us, stages.arm_us, stages.birth_us) = (prepare_us, arm_us, micros(born));
        stages.total_us = monotonic().saturating_sub(begun) / 1000;
        info!(
            generation = numbered,
            children = lives.len(),
            ?stages,
            rounds = armed.rounds,
            left = armed.left,
            "forked"
        );
        match (lives.is_empty(), dead.first()) {
            (true, Some(FailedVm { name, message })) => {
                let message = format!("'{name}' could not be brought to life: {message}");
                Err(ErrorBody::new(ErrorCode::ForkFailed, message).with_hint("see vmm.log in its directory"))
            }
            _ => Ok(ForkReport { generation: numbered, children: lives, failed: dead, stages }),
        }
    }
}

fn lose(family: &Family, server: &dyn PageService, child: ChildId) {
    let _ = server.forget(child);
    family.remove(child);
}

/// Gives every child its state and its disks. One that is gone by now is noticed later.
fn hand_over(
    children: &[(ChildId, String, u32, civic_fork::wire::Wire)],
    sections: &Sections,
    go: &Go,
    disks: &[Arc<Freezable>],
    frozen: &[Option<DiskGeneration>],
) -> io::Result<()> {
    let state = sections.encode();
    for (.., link) in children {
        // One each: they read from where it stands.
        let mut memfd = File::from(memfd_create(c"civic-state", MFdFlags::MFD_CLOEXEC)?);
        memfd.write_all(&state)?;
        let mut sent = link.send(&ToChild::Go(go.clone()), &[memfd.as_fd()]);
        for (disk, generation) in disks.iter().zip(frozen) {
            let parts = disk.parts(generation.as_ref())?;
            let (message, fds) = parts.message();
            // One that does not read is not waited for again.
            sent = sent.and_then(|()| link.send(&message, &fds));
        }
        if let Err(e) = sent {
            // Whoever waits for its first word waits no longer than it must.
            tracing::warn!("a child does not take what it is to be: {e}");
            link.shut_down();
        }
    }
    Ok(())
}
