//! A child's side: a monitor that waits to be forked from a VM, and what becomes of it.
//!
//! Everything that takes time or opens anything is done before it says that it is ready. Then it waits, for as long as it must, and is
//! gone when its source is.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use civic_api::launch::{ForkConfig, SourceNet};
use civic_api::{ErrorBody, ErrorCode, NewDevice, VmConfig};
use civic_fork::branch::Branch;
use civic_fork::hello::{Hello, Role, VERSION};
use civic_fork::mappings::Mappings;
use civic_fork::pager::{Notice, open_child, watch_child};
use civic_fork::wire::{Wire, WireError};
use tracing::debug;

use super::disks::DiskParts;
use super::{BootFiles, Go, PATIENCE, ToChild, ToSource};
use crate::clock::monotonic;
use crate::layout::Layout;
use crate::machine::state::Blank;
use crate::machine::{GuestEvent, Machine};
use crate::memory::Memory;
use crate::resources::{MirrorEnds, OpenDisk, OpenIn, Opened, Resources};
use crate::state::{MAX_BYTES, Sections};

/// Where overlays are, if nothing else is said: on a disk, mostly.
const OVERLAYS: &str = "/var/tmp";

/// How long what must end may take to do so orderly.
pub const LAST_RESORT: Duration = Duration::from_secs(10);

fn failed(message: impl Into<String>) -> ErrorBody {
    ErrorBody::new(ErrorCode::ForkFailed, message)
}

fn io_failed(what: &'static str) -> impl Fn(io::Error) -> ErrorBody {
    move |e| failed(format!("{what}: {e}"))
}

/// A monitor that has heard what it is to be.
pub struct Conceived {
    link: Wire,
    ram: File,
    overlays: PathBuf,
    /// For its guest's resets; until it has resources.
    boot: Option<BootFiles>,
    own: Vec<(NewDevice, Opened)>,
    for_programs: bool,
    /// What it is to be.
    pub config: VmConfig,
    /// Of whom.
    pub source: String,
}

impl Conceived {
    /// Connects to the source, unless its jailer has, and hears.
    ///
    /// # Errors
    /// When nobody is there, or does not want to be forked.
    pub fn new(request: &ForkConfig, dir: &Path, introduced: bool) -> Result<Self, ErrorBody> {
        let socket = civic_fork::hello::socket(&request.fork_of);
        let nobody = |e: io::Error| {
            let message = format!("nobody can be forked at {}: {e}", socket.display());
            ErrorBody::new(ErrorCode::NotFound, message).with_hint("see 'civic list'")
        };
        let link = if introduced { Wire::inherited() } else { Wire::connect(&socket) }.map_err(nobody)?;
        let hello = Hello { version: VERSION, role: Role::Child(request.name.clone()) };
        link.send(&hello, &[]).map_err(|e| broken(&e))?;
        let (welcome, fds) = link.receive::<ToChild>(PATIENCE).map_err(|e| broken(&e))?;
        let mut files = fds.into_iter().map(File::from);
        let (config, ram, kernel) = match (welcome, files.next(), files.next()) {
            (ToChild::Welcome { config }, Some(ram), Some(kernel)) => (config, ram, kernel),
            (ToChild::Refused { why }, ..) => return Err(failed(why)),
            _ => return Err(failed("the source says something else than what it should")),
        };
        let boot = Some(BootFiles { kernel, initrd: files.next() });
        let (config, source) = as_child(&config, &request.name, &dir.join("vsock.sock"))?;
        let overlays = request.overlay_dir.clone().unwrap_or_else(|| OVERLAYS.into());
        // What would be refused at birth is better refused now.
        request.devices.iter().try_fold(config.clone(), |config, device| config.with(device.clone()))?;
        let places = OpenIn { logs: dir.to_owned(), overlays: overlays.clone() };
        let open = |device: &NewDevice| Ok((device.clone(), Opened::new(device, &places)?));
        let own = request.devices.iter().map(open).collect::<Result<_, ErrorBody>>()?;
        Ok(Self { link, ram, overlays, boot, own, for_programs: request.for_programs, config, source })
    }

    /// What it is to have besides memory and disks; see [`Resources::of_fork`].
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn resources(&mut self, dir: &Path, source_net: SourceNet) -> Result<(Resources, Vec<MirrorEnds>), ErrorBody> {
        let boot = self.boot.take().ok_or_else(|| failed("it has its resources already"))?;
        Ok(Resources::of_fork(&self.config, dir, source_net, boot)?)
    }

    /// Builds what can be built, says so and waits for the source to know it.
    ///
    /// # Errors
    /// When this host cannot carry such a machine, or the source does not want it.
    pub fn wait(
        self,
        mut resources: Resources,
        mirrors: Vec<MirrorEnds>,
        report: impl Fn(GuestEvent) + Clone + Send + Sync + 'static,
    ) -> Result<Unborn, ErrorBody> {
        let Self { link, ram, overlays, own, for_programs, config, .. } = self;
        resources.places.overlays.clone_from(&overlays);
        let layout = Layout::new(config.memory_bytes).map_err(|e| ErrorBody::from_error(ErrorCode::Internal, &e))?;
        let memory =
            Memory::of_parent(&layout, Arc::new(ram)).map_err(|e| ErrorBody::from_error(ErrorCode::OutOfMemory, &e))?;
        let fork_failed = |e: &(dyn std::error::Error + 'static)| {
            ErrorBody::from_error(ErrorCode::ForkFailed, e).with_hint("'civic doctor' says what this host lacks")
        };
        let mappings = Mappings::of_private(&memory.ram).map_err(|e| fork_failed(&e))?;
        let uffd = open_child().map_err(|e| fork_failed(&e))?;
        watch_child(&uffd, &mappings).map_err(|e| fork_failed(&e))?;
        let (here, there) = Wire::pair().map_err(io_failed("cannot make a lifeline"))?;
        let branch = Branch::new(here, Arc::clone(&memory.ram)).map_err(|e| fork_failed(&e))?;
        let watched = uffd.try_clone().map_err(io_failed("cannot keep a userfaultfd"))?;
        let told = link.try_clone().map_err(io_failed("cannot keep the source's link"))?;
        let lifeline = Lifeline::new(branch, watched, told).map_err(io_failed("cannot listen to the page server"))?;
        let blank = Machine::unborn(&config, &resources, layout, memory, report)?;
        let handed = uffd.try_clone().map_err(io_failed("cannot hand over a userfaultfd"))?;
        let counts = mirrors.iter().map(|ends| (ends.id.clone(), ends.sockets.len() as u8)).collect();
        let ready = ToSource::Ready { mappings, mirrors: counts };
        let fds = [handed.as_fd(), there.as_fd()].into_iter();
        let fds: Vec<_> = fds.chain(mirrors.iter().flat_map(|ends| &ends.sockets).map(AsFd::as_fd)).collect();
        link.send(&ready, &fds).map_err(|e| broken(&e))?;
        // Only the source has them now: where it closes them, nothing comes any more.
        drop(mirrors);
        match link.receive::<ToChild>(PATIENCE).map_err(|e| broken(&e))?.0 {
            ToChild::Registered => Ok(Unborn { link, lifeline, blank, overlays, own, for_programs, config, resources }),
            ToChild::Refused { why } => Err(failed(why)),
            _ => Err(failed("the source says something else than what it should")),
        }
    }
}

/// What a source's configuration is as its child's, and the source's name.
fn as_child(config: &str, name: &str, vsock: &Path) -> Result<(VmConfig, String), ErrorBody> {
    let source: VmConfig =
        serde_json::from_str(config).map_err(|e| failed(format!("the source's configuration cannot be read: {e}")))?;
    let parent = source.name.clone();
    let mut config = VmConfig { name: name.to_owned(), ..source };
    if let Some(device) = &mut config.vsock {
        device.uds = vsock.to_owned();
    }
    Ok((config, parent))
}

fn broken(e: &WireError) -> ErrorBody {
    failed(format!("the VM to be forked: {e}"))
}

/// A monitor that waits.
pub struct Unborn {
    link: Wire,
    lifeline: Lifeline,
    blank: Blank,
    overlays: PathBuf,
    /// What it has besides what its source has.
    own: Vec<(NewDevice, Opened)>,
    for_programs: bool,
    config: VmConfig,
    resources: Resources,
}

/// A child's machine, and what else is its.
pub struct Born {
    /// Parked.
    pub machine: Machine,
    /// What it is.
    pub config: VmConfig,
    /// Opened.
    pub resources: Resources,
    /// What the source said.
    pub go: Go,
    /// The page server's other end, and what keeps the memory watched.
    pub lifeline: Lifeline,
    /// Where the source waits to hear.
    pub link: Link,
}

impl Unborn {
    /// Ends the wait: [`Unborn::birth`] fails.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn quitter(&self) -> Result<impl Fn() + Send + Sync + 'static, ErrorBody> {
        let link = self.link.try_clone().map_err(io_failed("cannot watch over the wait"))?;
        Ok(move || link.shut_down())
    }

    /// Waits for the fork, and makes the machine.
    ///
    /// # Errors
    /// When the source is gone, or its state cannot be this machine's. The source has been told.
    pub fn birth(self) -> Result<Born, ErrorBody> {
        let Self { link, lifeline, blank, overlays, own, for_programs, config: before, mut resources } = self;
        let link = Link(link);
        let (go, fds) = match link.0.receive::<ToChild>(Duration::MAX) {
            Ok((ToChild::Go(go), fds)) => (go, fds),
            Ok((ToChild::Refused { why }, _)) => return Err(failed(why)),
            Ok(_) => return Err(failed("the source says something else than what it should")),
            Err(WireError::Closed) => return Err(failed("the VM to be forked has ended, or does not want it")),
            Err(e) => return Err(broken(&e)),
        };
        let made = (|| {
            let mut sections = sections(fds)?;
            let vsock = before.vsock.as_ref().map(|vsock| vsock.uds.clone()).unwrap_or_default();
            let (mut config, _) = as_child(&go.config, &before.name, &vsock)?;
            resources.follow(&before, &config)?;
            for disk in &config.disks {
                let (message, fds) = link.0.receive::<ToChild>(PATIENCE).map_err(|e| broken(&e))?;
                let parts = DiskParts::of(message, fds)
                    .ok_or_else(|| failed("the source does not tell of a disk as it should"))?;
                let (disk, layers) = parts.open(disk, &overlays)?;
                resources.disks.push(OpenDisk { disk: Arc::new(disk), layers: Some(layers) });
            }
            let mut machine = Machine::born(blank, &config, &resources, &mut sections)?;
            sections.finish().map_err(|e| ErrorBody::from_error(ErrorCode::StateInvalid, &e))?;
            if !own.is_empty() && !machine.hears_hotplug() {
                let message = "its guest does not listen to devices that come and go: they cannot be plugged in";
                return Err(failed(message).with_hint("docs/support.md says what a guest's kernel must have"));
            }
            for (device, opened) in own {
                config = config.with(device.clone())?;
                machine.plug(&config, &device, &opened, true)?;
                resources.add(opened);
            }
            if for_programs {
                prepare(&machine, &lifeline.branch);
            }
            Ok((machine, config))
        })();
        let (machine, config) = match made {
            Ok(made) => made,
            Err(e) => {
                let e: ErrorBody = e;
                let _ = link.0.send(&ToSource::Failed { why: e.message.clone() }, &[]);
                return Err(e);
            }
        };
        Ok(Born { machine, config, resources, go, lifeline, link })
    }
}

/// Brings the memory that earlier forks have needed whose guests had programs started. Without, it comes when it is touched.
fn prepare(machine: &Machine, server: &Branch) {
    let begun = Instant::now();
    match server.prepare() {
        Ok(runs) => {
            let there: u64 = runs.iter().map(|(_, len)| u64::from(*len)).sum();
            let mapped = machine.map(&runs);
            let us = begun.elapsed().as_micros() as u64;
            debug!(there, mapped, us, "pages that earlier forks have needed are there");
        }
        // Whatever it is, it shows again where it matters.
        Err(e) => debug!("nothing is there beforehand: {e}"),
    }
}

/// Where the source waits to hear that its child runs.
pub struct Link(Wire);

impl Link {
    /// Says since when it does; now, if it is to stay paused.
    pub fn started(self, at: Option<u64>) {
        // A source that is gone needs not know.
        let _ = self.0.send(&ToSource::Started { at: at.unwrap_or_else(monotonic) }, &[]);
    }
}

/// As long as this is held, a child's memory is watched and the page server knows that it lives. A thread hears that all the time: a child
/// may be lost before it lives, with whoever makes its machine waiting for memory that does not come any more.
pub struct Lifeline {
    /// The page server, to be asked.
    pub branch: Arc<Branch>,
    attending: Arc<Mutex<Attending>>,
    /// If it were closed everywhere, who waits for a page would see whatever is there.
    _uffd: OwnedFd,
}

/// Who is to be told.
enum Attending {
    /// The source, of a child that will not be.
    Source(Wire),
    /// The child: of its own children, and of its end.
    Child { notice: Box<dyn FnMut(Notice) + Send>, lost: Box<dyn FnOnce(String) + Send> },
    /// Nobody any more: that was its last word.
    Nobody(String),
}

impl Lifeline {
    fn new(branch: Branch, uffd: OwnedFd, source: Wire) -> io::Result<Self> {
        let branch = Arc::new(branch);
        let attending = Arc::new(Mutex::new(Attending::Source(source)));
        let (heard, told) = (Arc::clone(&branch), Arc::clone(&attending));
        let hear = move || {
            let locked = || told.lock().unwrap_or_else(PoisonError::into_inner);
            let why = heard.hear(|event| {
                if let Attending::Child { notice, .. } = &mut *locked() {
                    notice(event);
                }
            });
            let attended = std::mem::replace(&mut *locked(), Attending::Nobody(why.clone()));
            match attended {
                Attending::Source(link) => {
                    tracing::error!("the fork is lost before it lives: {why}");
                    let _ = link.send(&ToSource::Failed { why }, &[]);
                    // Who waits for the fork waits in vain.
                    link.shut_down();
                }
                Attending::Child { lost, .. } => lost(why),
                Attending::Nobody(_) => (),
            }
            // Whatever hangs because it has no memory any more goes with the process.
            std::thread::sleep(LAST_RESORT);
            std::process::exit(1);
        };
        std::thread::Builder::new().name("lifeline".into()).spawn(hear)?;
        Ok(Self { branch, attending, _uffd: uffd })
    }

    /// From now on `notice` hears of this child's children, and `lost` why it must end; at once, if that was said before.
    pub fn attend(&self, notice: impl FnMut(Notice) + Send + 'static, lost: impl FnOnce(String) + Send + 'static) {
        let mut attending = self.attending.lock().unwrap_or_else(PoisonError::into_inner);
        match &*attending {
            Attending::Nobody(why) => lost(why.clone()),
            _ => *attending = Attending::Child { notice: Box::new(notice), lost: Box::new(lost) },
        }
    }
}

fn sections(fds: Vec<OwnedFd>) -> Result<Sections, ErrorBody> {
    let memfd = fds.into_iter().next().ok_or_else(|| failed("the state is missing"))?;
    let mut bytes = Vec::new();
    let mut file = File::from(memfd);
    file.rewind()
        .and_then(|()| file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes))
        .map_err(io_failed("cannot read the state"))?;
    Sections::decode(&bytes).map_err(|e| ErrorBody::from_error(ErrorCode::StateInvalid, &e))
}
