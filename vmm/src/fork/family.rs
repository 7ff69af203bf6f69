//! A source's family: who waits to be forked from it, who was, and the page server that they all need.
//!
//! One thread accepts connections, one per connection hears who it is. What they learn stands in [`Family`], where the thread that makes a
//! fork waits for it. As soon as there are a page server and somebody who waits, the one adopts the other and protects the memory: a fork
//! then finds most of its work done. Nothing here touches the machine.
//!
//! Locks: [`Waiting`]'s is held while its page server adopts it, and comes first; `inner` is a leaf, never held while talking with
//! another process. Page servers' events come on their watchdogs' threads.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use civic_api::{ChildVm, ErrorBody, ErrorCode, Family as FamilyInfo, Parent};
use civic_devices::mirror::MirrorSink;
use civic_fork::branch::Branch;
use civic_fork::disk::Generation as DiskGeneration;
use civic_fork::hello::{Role, VERSION, Visitor};
use civic_fork::huge;
use civic_fork::mappings::Mappings;
use civic_fork::pager::habits::Habits;
use civic_fork::pager::times::Times;
use civic_fork::pager::{CHILDREN, ChildId, ChildReport, Counters, GenerationId, Notice};
use civic_fork::ram::{PAGE, Ram};
use civic_fork::source::{Event, PageServer, PageService, Process, SourceError};
use civic_fork::uffd::Userfault;
use civic_fork::wire::{Listener, Wire};
use tracing::{info, warn};

use super::disks::Freezable;
use super::{BootFiles, PATIENCE, ToChild, ToSource};
use crate::machine::Mirrored;
use crate::memory::Keeper;

/// How long a fork waits for a page server that is just being started.
const PAGE_SERVER: Duration = Duration::from_secs(5);
/// How long a huge page of guest memory may stay one, because somebody uses it all the time.
const IN_USE: Duration = Duration::from_secs(5);
/// Most monitors that wait at a time.
const MAX_WAITING: usize = 256;
/// Most that have connected and not said yet who they are.
const MAX_UNHEARD: usize = 256;
/// How long a message may take to go to a monitor that does not read.
const UNREAD: Duration = Duration::from_secs(1);

/// The machine of this boot, as far as a fork needs it.
pub struct Origin {
    /// Its RAM; none if that is a fork's.
    pub ram: Option<Arc<Ram>>,
    /// The same, for children to read.
    pub read_only: File,
    /// For their guests' resets.
    pub boot: BootFiles,
    /// Has pages stay that the guest gives back.
    pub keeper: Keeper,
    /// Most bytes kept of it for children; as many as it has, if nothing is said.
    pub store_bytes: Option<u64>,
    /// Has its vCPUs stand still while the given work is done, if there are any.
    pub still: Box<huge::Still>,
    /// To be told when somebody waits to be forked from it.
    pub expected: Box<dyn Fn() + Send + Sync>,
}

impl Origin {
    /// Has the memory be in small pages, as long as somebody is forked from it.
    fn split(&self) -> Result<(), ErrorBody> {
        let Some(ram) = &self.ram else { return Ok(()) };
        let start = Instant::now();
        let count = huge::split(ram, IN_USE, &self.still).map_err(|e| {
            ErrorBody::from_error(ErrorCode::ForkFailed, &e).with_hint("try again: a disk's requests end some time")
        })?;
        if count > 0 {
            info!(count, took = ?start.elapsed(), "huge pages of guest memory are split");
        }
        Ok(())
    }

    /// Nobody is.
    fn allow_huge(&self) {
        if let Some(Err(e)) = self.ram.as_ref().map(|ram| huge::allow(ram)) {
            warn!("guest memory stays in small pages: {e}");
        }
    }
}

/// A monitor that waits to be forked.
pub struct Waiting {
    /// Its number.
    pub id: ChildId,
    /// Its process.
    pub process: Arc<Process>,
    /// To it.
    pub link: Wire,
    /// Where its RAM is watched.
    uffd: Userfault,
    /// Where it has its RAM.
    mappings: Mappings,
    /// The page server's end.
    lifeline: Wire,
    /// The number of the page server that has it.
    adopted_by: Mutex<Option<u32>>,
    /// Its network cards that are to be fed, until they are.
    mirrors: Mutex<Vec<(String, MirrorSink)>>,
}

impl Waiting {
    /// Its network cards that this VM's are to feed, by id. They are given away once.
    pub fn mirrors(&self) -> Vec<(String, MirrorSink)> {
        std::mem::take(&mut self.mirrors.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Has this page server know it.
    ///
    /// # Errors
    /// When that does not want it, or is gone.
    pub fn adopted_by(&self, serving: &Serving) -> Result<(), SourceError> {
        let mut adopted_by = self.adopted_by.lock().unwrap_or_else(PoisonError::into_inner);
        if *adopted_by != Some(serving.number) {
            serving.server.adopt(self.id, &self.process, &self.uffd, self.mappings.clone(), &self.lifeline)?;
            *adopted_by = Some(serving.number);
        }
        Ok(())
    }
}

/// A child that lives.
struct Alive {
    name: String,
    pid: u32,
    generation: GenerationId,
    /// Its network cards are fed as long as these are held.
    _mirrors: Vec<Mirrored>,
}

/// What a page server tells, in this VM's own names.
pub struct Sharing {
    /// What it has done, for all that it serves.
    pub counters: Counters,
    /// Writes of the source that waited.
    pub stalls: Times,
    /// This VM's forks, with the pages that are kept for each.
    pub generations: Vec<(GenerationId, u32)>,
    /// This VM's children.
    pub children: Vec<(String, ChildReport)>,
}

/// A page server and what it serves.
#[derive(Clone)]
pub struct Serving {
    /// Tells it from its predecessors.
    number: u32,
    /// The handle.
    pub server: Arc<dyn PageService>,
    /// The machine.
    pub origin: Arc<Origin>,
}

/// What is frozen for a generation, besides memory.
struct Frozen {
    /// The page server's number, and what that calls it.
    server: u32,
    point: GenerationId,
    children: Vec<ChildId>,
    disks: Arc<[Option<DiskGeneration>]>,
}

#[derive(Default)]
struct Inner {
    /// None while there is no machine, or one that cannot be forked.
    origin: Option<Arc<Origin>>,
    config: String,
    /// A page server that has connected and not begun.
    page_server: Option<(Wire, Process)>,
    server: Option<Serving>,
    /// Those of machines that are no more, whose children live on.
    former: Vec<Serving>,
    /// How many there have been.
    servers: u32,
    /// Forks that are being made.
    making: u32,
    /// A page server is about to serve.
    beginning: bool,
    /// The page server has told that nothing is shared any more, and was not asked for a fork since.
    unshared: bool,
    /// The same, and that nobody waits.
    idle: bool,
    waiting: BTreeMap<String, Arc<Waiting>>,
    children: BTreeMap<ChildId, Alive>,
    frozen: BTreeMap<GenerationId, Frozen>,
    /// Released before it was known here what was frozen, by page server and what that calls it.
    released: BTreeSet<(u32, GenerationId)>,
    /// How many forks there have been.
    forks: GenerationId,
    /// Disks that are watched, while something of any is frozen or is being frozen: so many times. Those too that the VM has no more: their
    /// images stay locked as long as a child reads them.
    disks: Vec<Arc<Freezable>>,
    pins: u32,
    /// Of which fork of its parent it is; 0 until there is one.
    born_of: GenerationId,
    /// What is known of its children's memory.
    habits: Habits,
}

/// See the module's documentation.
pub struct Family {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// By name.
    parent: Option<String>,
    /// How many are being heard.
    unheard: AtomicUsize,
}

impl Family {
    /// Of a VM that is forked from `parent`, or of none.
    pub fn new(parent: Option<String>) -> Arc<Self> {
        Arc::new(Self { inner: Mutex::default(), changed: Condvar::new(), parent, unheard: AtomicUsize::new(0) })
    }

    /// It was forked, and this is which fork of its parent it is of.
    pub fn born_of(&self, generation: GenerationId) {
        self.inner().born_of = generation;
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens in the VM's directory.
    ///
    /// # Errors
    /// When the system refuses the socket or a thread.
    pub fn listen(self: &Arc<Self>, dir: &Path) -> io::Result<()> {
        let listener = Listener::bind(&civic_fork::hello::socket(dir))?;
        let family = Arc::downgrade(self);
        let accept = move || {
            loop {
                match (listener.accept(), family.upgrade()) {
                    (_, None) => return,
                    (Ok(_), Some(family)) if family.unheard.load(Ordering::Relaxed) >= MAX_UNHEARD => {
                        warn!("{MAX_UNHEARD} have connected to fork.sock and say nothing: another one is turned away");
                    }
                    (Ok(wire), Some(family)) => {
                        let unheard = Unheard::new(&family);
                        let hear = move || {
                            family.hear(wire);
                            drop(unheard);
                        };
                        if let Err(e) = std::thread::Builder::new().name("fork-hello".into()).spawn(hear) {
                            warn!("cannot hear who connects to fork.sock: {e}");
                        }
                    }
                    (Err(e), Some(_)) => {
                        warn!("cannot accept a connection on fork.sock: {e}");
                        // Out of descriptors, mostly: those of ended connections come back.
                        std::thread::sleep(Duration::from_millis(100));
                    }
                }
            }
        };
        std::thread::Builder::new().name("fork-gate".into()).spawn(accept).map(drop)
    }

    /// Hears who connects, and answers.
    fn hear(self: &Arc<Self>, wire: Wire) {
        if let Err(e) = wire.set_patience(UNREAD) {
            return warn!("somebody connected to fork.sock: {e}");
        }
        let Visitor { hello, process } = match Visitor::hear(&wire, PATIENCE) {
            Ok(visitor) => visitor,
            Err(e) => return warn!("somebody connected to fork.sock: {e}"),
        };
        if hello.version != VERSION {
            let why =
                format!("it speaks version {} of the fork's protocol, this VM's monitor {VERSION}", hello.version);
            let _ = wire.send(&ToChild::Refused { why }, &[]);
            return;
        }
        match hello.role {
            Role::PageServer => {
                let mut inner = self.inner();
                if inner.page_server.as_ref().is_none_or(|(wire, _)| wire.hung_up())
                    && !inner.serves()
                    && !inner.beginning
                {
                    inner.page_server = Some((wire, process));
                    self.changed.notify_all();
                    let waiting = inner.waiting.values().cloned().collect();
                    drop(inner);
                    self.arm_ahead(waiting);
                }
            }
            Role::Child(name) => match self.welcome(name, &wire, process) {
                Ok(()) => {
                    let waiting = self.inner().waiting.values().cloned().collect();
                    self.arm_ahead(waiting);
                }
                Err(why) => {
                    info!("a monitor cannot be forked from this VM: {why}");
                    let _ = wire.send(&ToChild::Refused { why }, &[]);
                }
            },
        }
    }

    fn welcome(&self, name: String, link: &Wire, process: Process) -> Result<(), String> {
        let (origin, config) = {
            let inner = self.inner();
            if inner.waiting.len() >= MAX_WAITING {
                return Err(format!("{MAX_WAITING} monitors wait already"));
            }
            (inner.origin.clone(), inner.config.clone())
        };
        let origin = origin.ok_or_else(|| self.why_not())?;
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let files = [&origin.read_only, &origin.boot.kernel].into_iter().chain(&origin.boot.initrd);
        let files: Vec<_> = files.map(AsFd::as_fd).collect();
        link.send(&ToChild::Welcome { config }, &files).map_err(|e| text(&e))?;
        let (ready, fds) = link.receive::<ToSource>(PATIENCE).map_err(|e| text(&e))?;
        let ToSource::Ready { mappings, mirrors } = ready else { return Err("it is not ready".into()) };
        let mut fds = fds.into_iter();
        let (Some(uffd), Some(lifeline)) = (fds.next(), fds.next()) else {
            return Err("descriptors are missing".into());
        };
        let mut sinks = Vec::new();
        for (id, count) in mirrors {
            let sink = MirrorSink::new(fds.by_ref().take(count.into()).collect()).map_err(|e| text(&e))?;
            sinks.push((id, sink));
        }
        let uffd = Userfault::of_another(uffd).map_err(|e| text(&e))?;
        let link = link.try_clone().map_err(|e| text(&e))?;
        let told = link.try_clone().map_err(|e| text(&e))?;
        let id = child_id().map_err(|e| text(&e))?;
        let mut inner = self.inner();
        inner.waiting.retain(|_, waiting| !waiting.link.hung_up());
        let taken = inner.waiting.contains_key(&name) || inner.children.values().any(|child| child.name == name);
        if taken {
            return Err(format!("a child '{name}' is there already"));
        }
        let (lifeline, adopted_by, mirrors) = (Wire::from(lifeline), Mutex::default(), Mutex::new(sinks));
        inner.waiting.insert(
            name,
            Arc::new(Waiting { id, process: Arc::new(process), link, uffd, mappings, lifeline, adopted_by, mirrors }),
        );
        drop(inner);
        told.send(&ToChild::Registered, &[]).map_err(|e| text(&e))
    }

    /// Has the page server, if there is one, do what it can before those who wait are forked. Whatever is wrong is told by the fork.
    fn arm_ahead(self: &Arc<Self>, waiting: Vec<Arc<Waiting>>) {
        {
            let inner = self.inner();
            let served = inner.page_server.is_some() || inner.serves() || inner.beginning;
            if waiting.is_empty() || !served {
                return;
            }
        }
        let cannot = |why: &dyn std::fmt::Display| info!("cannot prepare a fork: {why}");
        // Held to the end: if all have gone meanwhile, so does the page server then.
        let _making = self.making();
        let serving = match self.server() {
            Ok(serving) => serving,
            Err(e) => return cannot(&e.message),
        };
        let adopted = |waiting: &&Arc<Waiting>| waiting.adopted_by(&serving).inspect_err(|e| cannot(e)).is_ok();
        if waiting.iter().filter(adopted).count() > 0 {
            // Before it is asked: that nobody waits any more may be told as soon as it has answered.
            self.inner().idle = false;
            (serving.origin.expected)();
            if let Err(e) = serving.server.arm_ahead() {
                cannot(&e);
            }
        }
    }

    fn why_not(&self) -> String {
        "there is no machine that could be forked".into()
    }

    /// What the API tells.
    pub fn info(&self) -> FamilyInfo {
        let mut inner = self.inner();
        inner.waiting.retain(|_, waiting| !waiting.link.hung_up());
        inner.page_server.take_if(|(wire, _)| wire.hung_up());
        let lives = inner.serves();
        FamilyInfo {
            parent: self.parent.clone().map(|name| Parent { name, generation: inner.born_of }),
            children: inner
                .children
                .values()
                .map(|Alive { name, pid, generation, .. }| ChildVm {
                    name: name.clone(),
                    pid: *pid,
                    generation: *generation,
                })
                .collect(),
            waiting: inner.waiting.keys().cloned().collect(),
            page_server: lives || inner.page_server.is_some(),
        }
    }

    /// What the page server tells, if there is one. Waits for it.
    pub fn sharing(&self) -> Option<Sharing> {
        let serving = self.inner().server.clone()?;
        let report = serving.server.report().ok()?;
        let inner = self.inner();
        let of_it = inner.frozen.iter().filter(|(_, frozen)| frozen.server == serving.number);
        let numbers: BTreeMap<_, _> = of_it.map(|(number, frozen)| (frozen.point, *number)).collect();
        let name = |child: &ChildReport| Some((inner.children.get(&child.id)?.name.clone(), *child));
        Some(Sharing {
            counters: report.counters,
            stalls: report.stalls,
            generations: report.generations.iter().filter_map(|g| Some((*numbers.get(&g.id)?, g.kept))).collect(),
            children: report.children.iter().filter_map(name).collect(),
        })
    }

    /// From now on this machine is forked; `config` is what its children are to be.
    pub fn set_origin(&self, origin: Origin, config: String) {
        let mut inner = self.inner();
        inner.origin = Some(Arc::new(origin));
        inner.config = config;
    }

    /// From now on children are to be this.
    pub fn set_config(&self, config: String) {
        self.inner().config = config;
    }

    /// The machine is about to go. Who waits for it waits in vain; its children keep its memory.
    pub fn leave_origin(&self) {
        let (server, _waiting, _origin) = {
            let mut inner = self.inner();
            (inner.server.take(), std::mem::take(&mut inner.waiting), inner.origin.take())
        };
        if let Some(serving) = server.filter(|serving| serving.server.lives()) {
            // Listed first: it may have nobody left, and then tells so at once.
            self.inner().former.push(serving.clone());
            serving.server.leave();
        }
    }

    /// Takes those of these names who wait.
    pub fn take_waiting(&self, names: &[String]) -> Result<Vec<Arc<Waiting>>, ErrorBody> {
        let mut inner = self.inner();
        inner.waiting.retain(|_, waiting| !waiting.link.hung_up());
        if let Some(missing) = names.iter().find(|name| !inner.waiting.contains_key(*name)) {
            let message = format!("no monitor waits to be forked from this VM as '{missing}'");
            return Err(ErrorBody::new(ErrorCode::NotFound, message).with_hint("'civic fork' starts one"));
        }
        Ok(names.iter().filter_map(|name| inner.waiting.remove(name)).collect())
    }

    /// A fork is being made as long as this is held: its page server stays, and so does what the guest gives back.
    pub fn making(self: &Arc<Self>) -> Making {
        self.inner().making += 1;
        Making(Arc::clone(self))
    }

    /// The page server, which serves this origin from now on if it did not before.
    pub fn server(self: &Arc<Self>) -> Result<Serving, ErrorBody> {
        let deadline = Instant::now() + PAGE_SERVER;
        let mut inner = self.inner();
        loop {
            let Some(origin) = inner.origin.clone() else {
                return Err(ErrorBody::new(ErrorCode::ForkFailed, self.why_not()));
            };
            if let Some(serving) = inner.server.clone().filter(|serving| serving.server.lives()) {
                return Ok(serving);
            }
            // One at a time: two could not watch the same memory.
            let idle = !inner.beginning;
            let connected = inner.page_server.take_if(|_| idle).filter(|(wire, _)| !wire.hung_up());
            if let Some(connected) = connected {
                inner.servers += 1;
                inner.beginning = true;
                let (number, habits) = (inner.servers, std::mem::take(&mut inner.habits));
                drop(inner);
                let server = origin.split().and_then(|()| {
                    self.begin(connected, &origin, number, habits).map_err(|e| {
                        ErrorBody::from_error(ErrorCode::ForkFailed, &e)
                            .with_hint("'civic doctor' says what this host lacks")
                    })
                });
                let mut inner = self.inner();
                inner.beginning = false;
                self.changed.notify_all();
                let server = server.inspect_err(|_| origin.allow_huge())?;
                let serving = Serving { number, server, origin };
                inner.server = Some(serving.clone());
                // It has nobody yet, and does not say so.
                inner.idle = true;
                return Ok(serving);
            }
            // One that is about to serve waits for nobody without bound.
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() && !inner.beginning {
                let error = ErrorBody::new(ErrorCode::ForkFailed, "the VM has no page server");
                return Err(error.with_hint("'civic fork' starts one; by hand: 'civic-pager DIRECTORY'"));
            }
            let left = left.max(Duration::from_millis(100));
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn begin(
        self: &Arc<Self>,
        (wire, process): (Wire, Process),
        origin: &Arc<Origin>,
        number: u32,
        habits: Habits,
    ) -> Result<Arc<PageServer>, SourceError> {
        let no_ram = || SourceError::Refused("the memory is another VM's".into());
        let ram = origin.ram.as_ref().ok_or_else(no_ram)?;
        let bytes = origin.store_bytes.unwrap_or_else(|| ram.bytes());
        let limit = u32::try_from(bytes / PAGE as u64).unwrap_or(u32::MAX);
        let (family, keeper) = (Arc::downgrade(self), origin.keeper.clone());
        let event = move |event| {
            if let Some(family) = family.upgrade() {
                family.heed(number, &keeper, event);
            }
        };
        PageServer::begin(wire, process, Arc::clone(ram), limit, habits, patience(), event).map(Arc::new)
    }

    /// The page server has done all that it was asked before: what it tells from now on is of now.
    pub fn armed(&self) {
        let mut inner = self.inner();
        (inner.idle, inner.unshared) = (false, false);
    }

    /// This machine is a fork: its children are its parent's page server's too. There is an origin.
    pub fn served_by(&self, branch: Arc<Branch>) {
        let mut inner = self.inner();
        inner.servers += 1;
        let number = inner.servers;
        inner.server = inner.origin.clone().map(|origin| Serving { number, server: branch, origin });
    }

    /// Takes note of what that page server says.
    pub fn heed_branch(self: &Arc<Self>, notice: Notice) {
        let serving = {
            let inner = self.inner();
            inner.server.iter().chain(&inner.former).find(|serving| serving.origin.ram.is_none()).cloned()
        };
        if let Some(serving) = serving {
            self.heed(serving.number, &serving.origin.keeper, Event::Notice(notice));
        }
    }

    /// Whether this is the page server of the present machine.
    pub fn serves(&self, serving: &Serving) -> bool {
        self.inner().server.as_ref().is_some_and(|present| present.number == serving.number)
    }

    /// A number for a fork.
    pub fn next_number(&self) -> GenerationId {
        let mut inner = self.inner();
        inner.forks += 1;
        inner.forks
    }

    /// These disks are about to be frozen: from now on they are watched.
    pub fn pin(&self, disks: &[Arc<Freezable>]) {
        let mut inner = self.inner();
        inner.pins += 1;
        for disk in disks {
            if !inner.disks.iter().any(|known| Arc::ptr_eq(known, disk)) {
                inner.disks.push(Arc::clone(disk));
            }
        }
    }

    /// They were not.
    pub fn unpin(&self) {
        let mut inner = self.inner();
        inner.pins -= 1;
        thaw_unused(&mut inner);
    }

    /// A fork point, by its number and what `serving` calls it, which keeps it: `disks` stay frozen until that says that nobody needs them.
    /// To be told of before its children live: that one has ended is heard on another thread, perhaps at once.
    pub fn freeze(
        &self,
        serving: &Serving,
        (generation, point): (GenerationId, GenerationId),
        children: Vec<ChildId>,
        disks: Arc<[Option<DiskGeneration>]>,
    ) {
        let frozen = Frozen { server: serving.number, point, children, disks };
        let unneeded = {
            let mut inner = self.inner();
            inner.pins -= 1;
            // One that has ended meanwhile tells nothing any more.
            let ended = !inner.server.iter().chain(&inner.former).any(|known| known.number == serving.number);
            if inner.released.remove(&(serving.number, point)) || ended {
                thaw_unused(&mut inner);
                Some(frozen)
            } else {
                inner.frozen.insert(generation, frozen);
                None
            }
        };
        // Dropped without the lock: it gives back space.
        drop(unneeded);
    }

    /// Nobody needs a fork point any more.
    fn release(&self, server: u32, point: GenerationId) {
        if self.thaw(server, |frozen| frozen.point == point).is_empty() {
            // It is being frozen right now.
            self.inner().released.insert((server, point));
        }
    }

    /// Takes what is frozen by this page server and as `which` says. Dropped, it gives back space: not under the lock.
    fn thaw(&self, server: u32, which: impl Fn(&Frozen) -> bool) -> Vec<Frozen> {
        let mut inner = self.inner();
        let thawed = inner.frozen.extract_if(.., |_, frozen| frozen.server == server && which(frozen));
        let thawed = thawed.map(|(_, frozen)| frozen).collect();
        thaw_unused(&mut inner);
        thawed
    }

    /// A child has begun to live.
    pub fn add(&self, child: ChildId, name: String, pid: u32, generation: GenerationId, mirrors: Vec<Mirrored>) {
        let mut inner = self.inner();
        // It may have ended already.
        if inner.frozen.get(&generation).is_some_and(|frozen| frozen.children.contains(&child)) {
            inner.children.insert(child, Alive { name, pid, generation, _mirrors: mirrors });
        }
    }

    /// A child is no more, or never was. Returns its name, if it lived.
    pub fn remove(&self, child: ChildId) -> Option<String> {
        let mut inner = self.inner();
        // Dropped without the lock: a thread may have to end.
        let alive = inner.children.remove(&child);
        inner.waiting.retain(|_, waiting| waiting.id != child);
        for frozen in inner.frozen.values_mut() {
            frozen.children.retain(|other| *other != child);
        }
        drop(inner);
        alive.map(|alive| alive.name)
    }

    /// The disks of a fork point are lost: whoever needs them must end. Called by a disk's thread, so another does it.
    pub fn disks_lost(self: &Arc<Self>, why: String) {
        let family = Arc::clone(self);
        let lose = move || {
            let lost: Vec<_> = {
                let inner = family.inner();
                let servers: BTreeMap<_, _> = inner.server.iter().chain(&inner.former).map(|s| (s.number, s)).collect();
                let lost = inner
                    .frozen
                    .values()
                    .filter(|frozen| frozen.disks.iter().flatten().any(|disk| disk.lost().is_some()));
                let server = |frozen: &Frozen| Some((Arc::clone(&servers.get(&frozen.server)?.server), frozen.point));
                lost.filter_map(server).collect()
            };
            for (server, point) in lost {
                let _ = server.lose(point, why.clone());
            }
        };
        if let Err(e) = std::thread::Builder::new().name("fork-lost".into()).spawn(lose) {
            warn!("cannot tell children that their disks are lost: {e}");
        }
    }
}

/// Somebody who is being heard.
struct Unheard(Arc<Family>);

impl Unheard {
    fn new(family: &Arc<Family>) -> Self {
        family.unheard.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(family))
    }
}

impl Drop for Unheard {
    fn drop(&mut self) {
        self.0.unheard.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A number for a child, which must be nobody else's at a page server that serves children's children too: so many bits at random are.
fn child_id() -> io::Result<ChildId> {
    Ok(getrandom::u64()? % CHILDREN)
}

/// How long a page server may stand still: `CIVIC_PAGER_PATIENCE_MS`, for hosts that are so slow that one which is well may.
fn patience() -> Duration {
    let said = std::env::var("CIVIC_PAGER_PATIENCE_MS").ok().and_then(|text| text.parse().ok());
    said.map_or(civic_fork::source::PATIENCE, Duration::from_millis)
}

/// Has nobody watch the disks any more, once nothing of them is frozen.
fn thaw_unused(inner: &mut Inner) {
    if inner.frozen.is_empty() && inner.pins == 0 {
        inner.disks.drain(..).for_each(|disk| disk.thaw());
    }
}

impl Inner {
    /// Whether there is a page server that lives.
    fn serves(&self) -> bool {
        self.server.as_ref().is_some_and(|serving| serving.server.lives())
    }
}

/// See [`Family::making`].
pub struct Making(Arc<Family>);

impl Drop for Making {
    fn drop(&mut self) {
        self.0.inner().making -= 1;
        self.0.settle();
    }
}

impl Family {
    /// Takes note of what the page server of this number says. `keeper` is its machine's.
    fn heed(self: &Arc<Self>, number: u32, keeper: &Keeper, event: Event) {
        match event {
            Event::Notice(Notice::Gone(child)) => {
                if let Some(name) = self.remove(child) {
                    info!(name, "a child has ended");
                }
            }
            Event::Notice(Notice::Lost(child, why)) => info!(child, "a child is lost: {why}"),
            Event::Notice(Notice::Released(point)) => {
                self.release(number, point);
                self.settle();
            }
            Event::Notice(Notice::SourceGone | Notice::Descendant(_)) => {}
            Event::Notice(Notice::Unshared) => {
                let mut inner = self.inner();
                if inner.former.iter().all(|serving| serving.number != number) {
                    inner.unshared = true;
                }
                drop(inner);
                self.settle();
            }
            Event::Notice(Notice::Idle { habits }) => {
                let mut inner = self.inner();
                if inner.former.iter().all(|serving| serving.number != number) {
                    (inner.habits, inner.idle) = (habits, true);
                }
                drop(inner);
                self.settle();
            }
            Event::Ended(why) => {
                warn!("the page server has ended: {why}; all children with it, this VM goes on");
                keeper.keep(false);
                let ended: Vec<_> = {
                    let mut inner = self.inner();
                    inner.released.retain(|(server, _)| *server != number);
                    let present = inner.server.take_if(|serving| serving.number == number);
                    present.iter().for_each(|serving| serving.origin.allow_huge());
                    let former = inner.former.extract_if(.., |serving| serving.number == number);
                    former.chain(present).collect()
                };
                dismiss(ended);
                for Frozen { children, .. } in self.thaw(number, |_| true) {
                    children.into_iter().for_each(|child| drop(self.remove(child)));
                }
            }
        }
    }

    /// Once nothing is shared and nobody is making a fork, what the guest gives back is given back, and the page server goes, unless
    /// somebody waits to be forked.
    fn settle(&self) {
        let retired: Vec<_> = {
            let mut inner = self.inner();
            if inner.making > 0 {
                return;
            }
            let Inner { frozen, former, .. } = &mut *inner;
            let needed = |serving: &Serving| frozen.values().any(|frozen| frozen.server == serving.number);
            let mut retired: Vec<_> = former.extract_if(.., |serving| !needed(serving)).collect();
            if let Some(serving) = inner.server.as_ref().filter(|_| inner.unshared || inner.idle) {
                serving.origin.keeper.keep(false);
            }
            inner.waiting.retain(|_, waiting| !waiting.link.hung_up());
            // A child that has reset shares no memory, but needs its disks.
            if inner.idle && inner.waiting.is_empty() && inner.frozen.is_empty() {
                let server = inner.server.take();
                server.iter().for_each(|serving| serving.origin.allow_huge());
                retired.extend(server);
            }
            retired
        };
        dismiss(retired);
    }
}

/// Lets page servers go: in a thread of its own, since dropping one waits for the thread that tells of it.
fn dismiss(servers: impl IntoIterator<Item = Serving>) {
    let servers: Vec<_> = servers.into_iter().collect();
    if !servers.is_empty() {
        // Refused, the closure and with it the servers would be dropped here: that waits for this thread itself.
        let kept = std::mem::ManuallyDrop::new(servers);
        let go = move || drop(std::mem::ManuallyDrop::into_inner(kept));
        if let Err(e) = std::thread::Builder::new().name("fork-retire".into()).spawn(go) {
            warn!("a page server that is not needed any more stays: {e}");
        }
    }
}
