//! The source's side of its page server, and what saves the source from it.
//!
//! ```text
//!  supervisor, fork thread ── request ──▶ wire ──▶ civic-pager
//!                          ◀─ answer ── watchdog thread ◀── wire
//!                                          │ again and again, while there are children: Ping; has the pulse moved?
//!                                          └─ no, or the process is gone:
//!        kill it ─▶ end the children ─▶ put the page in flight back ─▶ lift every protection ─▶ tell the owner
//! ```
//!
//! The page server is killed before anything is undone, so that one that was only stopped cannot go on behind our back; the children,
//! but for those that only wait, are given a moment to say why they end and are killed then, so that none sees what the source writes afterwards. Only then the
//! source's memory is let go. It keeps a descriptor of its userfaultfd, of the store and of the journal for that. Left to itself the
//! kernel would let whoever waits go on, and a page that had just been punched out would be lost.
//!
//! What the source waits for at most, if its page server stops: [`PULSE`] twice, [`PATIENCE`], [`LAST_WORDS`], and the deaths: less than a
//! second. Time in which the watchdog itself did not get to run does not count ([`standstill`]). A host that is so slow that a page server
//! which is well still does not show that in time needs more patience.

mod standstill;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::MsgFlags;

use crate::mappings::Mappings;
use crate::pager::habits::Habits;
use crate::pager::journal::Journal;
use crate::pager::protocol::{Request, Response};
use crate::pager::{Armed, ChildId, FEATURES, GenerationId, Notice, Report};
use crate::ram::{PAGE, Ram};
use crate::uffd::{UffdError, Userfault};
use crate::wire::{Wire, WireError};

use self::standstill::Standstill;

/// How often the watchdog looks.
const PULSE: Duration = Duration::from_millis(100);
/// How long the page server may take to show that it is well, where nobody says otherwise.
pub const PATIENCE: Duration = Duration::from_millis(500);
/// How long children may take to end by themselves when the page server is gone.
const LAST_WORDS: Duration = Duration::from_millis(250);
/// How long a process may take to end once it is killed. What lasts longer hangs in the kernel.
const DEATH: Duration = Duration::from_secs(5);
/// How long an answer may take that needs no waiting for the guest.
const ANSWER: Duration = Duration::from_secs(2);
/// How long the source stays paused for an answer.
const PAUSED: Duration = Duration::from_millis(500);

/// Why the page server does not do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It is not there any more. The source goes on without.
    #[error("the page server has ended: {0}")]
    Ended(String),
    /// It does not want to.
    #[error("the page server refuses: {0}")]
    Refused(String),
    /// It takes too long.
    #[error("the page server does not answer")]
    Silent,
    /// It cannot be talked with.
    #[error("cannot talk with the page server")]
    Wire(#[from] WireError),
    /// Guest memory cannot be watched.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// The system refuses.
    #[error("cannot set up the page server")]
    System(#[from] io::Error),
}

/// What the owner hears, on the watchdog's thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// From the page server.
    Notice(Notice),
    /// It has ended, for this reason; its children with it. The source is as it was before.
    Ended(String),
}

/// What a VM that is forked asks of its page server: its own, or the one that serves it as a child.
pub trait PageService: Send + Sync {
    /// Makes a process that waits one of its children. `lifeline` is the page server's end of a pair of which the child has the other.
    fn adopt(
        &self,
        child: ChildId,
        process: &Arc<Process>,
        uffd: &Userfault,
        mappings: Mappings,
        lifeline: &Wire,
    ) -> Result<(), SourceError>;

    /// Does what can be done beforehand while the machine runs, as long as there are children that wait. Does not wait for it.
    fn arm_ahead(&self) -> Result<(), SourceError>;

    /// Does the rest of what can be done while the machine runs. Returns when it may be paused.
    fn arm(&self) -> Result<Armed, SourceError>;

    /// The fork point: the machine is paused.
    fn freeze(&self, children: Vec<ChildId>) -> Result<GenerationId, SourceError>;

    /// There will be no fork after all.
    fn abandon(&self) -> Result<(), SourceError>;

    /// A child is not wanted any more.
    fn forget(&self, child: ChildId) -> Result<(), SourceError>;

    /// What was frozen of the disks is lost: whoever began there must end.
    fn lose(&self, generation: GenerationId, why: String) -> Result<(), SourceError>;

    /// The memory is about to be unmapped. The children keep it as it is, and from now on nothing here touches it.
    fn leave(&self);

    /// What it has done.
    fn report(&self) -> Result<Report, SourceError>;

    /// Whether it still serves.
    fn lives(&self) -> bool;
}

/// A process that is watched by its pidfd.
#[derive(Debug)]
pub struct Process {
    /// As whoever told of it counts; 0 if nobody did.
    id: u32,
    pidfd: OwnedFd,
    /// By which its jailer is told to end it, where it is another user's, in a namespace of its own.
    leash: Option<OwnedFd>,
    /// It is only said, by somebody who may be hostile, that it is who it is.
    hearsay: bool,
}

impl Process {
    /// The one at the other end of `wire`.
    ///
    /// # Errors
    /// When it has ended, or is in a jail and was not introduced.
    pub fn of(wire: &Wire) -> io::Result<Self> {
        let pid = wire.peer()?;
        if pid == 0 {
            let message = "it is in another namespace of processes: have the jailer start it, by 'civic fork'";
            return Err(io::Error::other(message));
        }
        let process = Self::open(pid)?;
        // Its number could have been another's in the meantime only if it had ended; then the connection is closed.
        if wire.hung_up() { Err(io::ErrorKind::NotConnected.into()) } else { Ok(process) }
    }

    #[allow(unsafe_code)]
    fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: the call takes its arguments by value and touches no memory of ours.
        let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
        // SAFETY: the kernel has just made this descriptor for us; it is nobody else's, and fits an i32.
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Ok(Self { id: pid.unsigned_abs(), pidfd, leash: None, hearsay: false })
    }

    /// One that its jailer has introduced.
    pub(crate) fn jailed(id: u32, pidfd: OwnedFd, leash: OwnedFd) -> Self {
        Self { id, pidfd, leash: Some(leash), hearsay: false }
    }

    /// Its number, for people.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What somebody else needs to watch it and to end it.
    pub(crate) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        [self.pidfd.as_fd()].into_iter().chain(self.leash.iter().map(AsFd::as_fd)).collect()
    }

    #[allow(unsafe_code)]
    fn kill(&self) {
        if let Some(leash) = &self.leash {
            // Its jailer has ended if nobody reads, and it with that. It may be no socket, or full, if somebody lies: nobody waits for it.
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let _ = nix::sys::socket::send(leash.as_raw_fd(), b"x", flags);
            return;
        }
        let fd = self.pidfd.as_raw_fd();
        // SAFETY: the call takes its arguments by value, but for the null pointer that stands for "as kill(2) does". One that has
        // ended needs no killing.
        let _ = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, std::ptr::null::<u8>(), 0) };
    }

    /// One of which another process says that it is a child, by its pidfd and its leash if it has one. Without a leash that is believed only
    /// of a process of the same user as one of `children`, which whoever says it could have ended by itself. Who has one is never signalled
    /// from here: all that a lie brings about is a byte to whoever is at the other end of what the liar had.
    fn of_another(fds: Vec<OwnedFd>, children: &BTreeMap<ChildId, Arc<Self>>) -> Option<Self> {
        let mut fds = fds.into_iter();
        let process = Self { id: 0, pidfd: fds.next()?, leash: fds.next(), hearsay: true };
        if process.leash.is_some() {
            // A descriptor of another kind would be waited for in vain.
            return process.is_pidfd().then_some(process);
        }
        let user = process.user()?;
        children.values().any(|child| child.user() == Some(user)).then_some(process)
    }

    fn info(&self) -> Option<String> {
        std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.pidfd.as_raw_fd())).ok()
    }

    fn is_pidfd(&self) -> bool {
        self.info().is_some_and(|info| info.lines().any(|line| line.starts_with("Pid:")))
    }

    /// Its number, if it is to be seen from here.
    fn pid(&self) -> Option<u32> {
        let pid = self.info()?.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok();
        pid.filter(|pid| *pid > 0)
    }

    /// What its threads are doing, as proc(5) has it: state, and where in the kernel they wait.
    fn doing(&self) -> String {
        let Some(tasks) = self.pid().and_then(|pid| std::fs::read_dir(format!("/proc/{pid}/task")).ok()) else {
            return if self.leash.is_some() { "are in a jail".into() } else { "have ended".into() };
        };
        let task = |task: std::path::PathBuf| {
            let stat = std::fs::read_to_string(task.join("stat")).ok()?;
            let state = stat.rsplit(')').next()?.split_whitespace().next()?.to_owned();
            let place = std::fs::read_to_string(task.join("wchan")).unwrap_or_default();
            Some(if matches!(place.as_str(), "" | "0") { state } else { format!("{state} in {place}") })
        };
        let tasks = tasks.filter_map(|entry| task(entry.ok()?.path()));
        tasks.collect::<Vec<_>>().join(", ")
    }

    /// Whose it is; none if it has ended.
    fn user(&self) -> Option<u32> {
        let pid = self.pid()?;
        let user = std::fs::metadata(format!("/proc/{pid}")).ok()?.uid();
        // Only now its number was not another's.
        (!self.ends_by(Instant::now())).then_some(user)
    }

    /// Whether it has ended by `deadline`.
    fn ends_by(&self, deadline: Instant) -> bool {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            match poll(&mut [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(Errno::EINTR) => (),
                Err(_) => return false,
            }
        }
    }
}

/// What requests and the watchdog share. Lock order: `inner` is a leaf, not held while waiting.
struct Shared {
    wire: Wire,
    process: Process,
    inner: Mutex<Inner>,
}

struct Inner {
    /// Who waits for the answer to the last request.
    waiting: Option<Sender<Response>>,
    /// Those that wait.
    adopted: BTreeMap<ChildId, Arc<Process>>,
    /// Those that share memory.
    children: BTreeMap<ChildId, Arc<Process>>,
    /// Why there is no page server any more.
    ended: Option<String>,
    /// The memory is not the source's any more.
    left: bool,
    /// Whether the watchdog is to end.
    closing: bool,
}

impl Inner {
    /// From now on these have pages of the source.
    fn bear(&mut self, children: &[ChildId]) {
        for child in children {
            self.children.extend(self.adopted.remove_entry(child));
        }
    }

    fn remove(&mut self, child: ChildId) {
        self.adopted.remove(&child);
        self.children.remove(&child);
    }

    /// Whether the source may be waiting for the page server.
    fn is_watched(&self) -> bool {
        !self.adopted.is_empty() || !self.children.is_empty()
    }
}

impl Shared {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A page server, seen from its source. Dropped, it is told to go; children that it still has keep it alive for themselves.
pub struct PageServer {
    shared: Arc<Shared>,
    /// One request at a time.
    turn: Mutex<()>,
    watchdog: Option<JoinHandle<()>>,
}

impl PageServer {
    /// Has `process`, at the other end of `wire`, serve `ram`, with a store of at most `limit` pages. `habits` are what the last
    /// [`Notice::Idle`] said; `patience` how long it may stand still: [`PATIENCE`], mostly. `event` is called by the watchdog's thread and must not wait for a request to this.
    ///
    /// # Errors
    /// When the kernel has no userfaultfd for us, or the other end is no page server.
    pub fn begin(
        wire: Wire,
        process: Process,
        ram: Arc<Ram>,
        limit: u32,
        habits: Habits,
        patience: Duration,
        event: impl FnMut(Event) + Send + 'static,
    ) -> Result<Self, SourceError> {
        let uffd = Userfault::open(FEATURES)?;
        let memfd = |name| memfd_create(name, MFdFlags::MFD_CLOEXEC).map(File::from).map_err(io::Error::from);
        let (store, log) = (memfd(c"civic-store")?, memfd(c"civic-journal")?);
        let journal = Journal::new(&log)?;
        let begin = Request::Begin { mappings: ram.mappings().clone(), limit, habits };
        wire.send(&begin, &[uffd.as_fd(), ram.memfd().as_fd(), store.as_fd(), log.as_fd()])?;
        match wire.receive(ANSWER)?.0 {
            Response::Done => (),
            other => return Err(SourceError::Refused(format!("{other:?}"))),
        }
        let (adopted, children) = (BTreeMap::new(), BTreeMap::new());
        let inner = Inner { waiting: None, adopted, children, ended: None, left: false, closing: false };
        let shared = Arc::new(Shared { wire, process, inner: Mutex::new(inner) });
        let saved = Saved { uffd, ram, store, journal };
        let watched = Arc::clone(&shared);
        let watchdog = std::thread::Builder::new().name("pager-watchdog".into());
        let watchdog = watchdog.spawn(move || Watchdog { shared: watched, saved, patience, event }.run())?;
        Ok(Self { shared, turn: Mutex::new(()), watchdog: Some(watchdog) })
    }

    fn ask(
        &self,
        request: &Request,
        fds: &[std::os::fd::BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Response, SourceError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = self.listen()?;
        if let Err(e) = self.shared.wire.send(request, fds) {
            self.shared.inner().waiting = None;
            return Err(e.into());
        }
        match answer.recv_timeout(limit) {
            Ok(response) => Ok(response),
            Err(RecvTimeoutError::Disconnected) => Err(self.ended()),
            Err(RecvTimeoutError::Timeout) => {
                // Its answer would be taken for another's: it has had its chance.
                self.shared.process.kill();
                Err(SourceError::Silent)
            }
        }
    }

    fn listen(&self) -> Result<Receiver<Response>, SourceError> {
        let (tell, answer) = channel();
        let mut inner = self.shared.inner();
        match &inner.ended {
            Some(why) => Err(SourceError::Ended(why.clone())),
            None => {
                inner.waiting = Some(tell);
                Ok(answer)
            }
        }
    }

    fn ended(&self) -> SourceError {
        SourceError::Ended(self.shared.inner().ended.clone().unwrap_or_else(|| "it is being closed".into()))
    }
}

impl PageService for PageServer {
    fn adopt(
        &self,
        child: ChildId,
        process: &Arc<Process>,
        uffd: &Userfault,
        mappings: Mappings,
        lifeline: &Wire,
    ) -> Result<(), SourceError> {
        let adopt = Request::Adopt { child, mappings };
        let done = match self.ask(&adopt, &[uffd.as_fd(), lifeline.as_fd()], ANSWER)? {
            Response::Done => Ok(()),
            other => Err(refusal(other)),
        };
        if done.is_ok() {
            self.shared.inner().adopted.insert(child, Arc::clone(process));
        }
        done
    }

    fn arm_ahead(&self) -> Result<(), SourceError> {
        match self.ask(&Request::ArmAhead, &[], ANSWER)? {
            Response::Done => Ok(()),
            other => Err(refusal(other)),
        }
    }

    fn arm(&self) -> Result<Armed, SourceError> {
        // As long as memory is large; the watchdog sees to it that it does not stop.
        match self.ask(&Request::Arm, &[], Duration::from_secs(60))? {
            Response::Armed(armed) => Ok(armed),
            other => Err(refusal(other)),
        }
    }

    fn freeze(&self, children: Vec<ChildId>) -> Result<GenerationId, SourceError> {
        self.shared.inner().bear(&children);
        match self.ask(&Request::Freeze { children }, &[], PAUSED)? {
            Response::Frozen(generation) => Ok(generation),
            other => Err(refusal(other)),
        }
    }

    fn abandon(&self) -> Result<(), SourceError> {
        self.ask(&Request::Abandon, &[], ANSWER).map(drop)
    }

    fn forget(&self, child: ChildId) -> Result<(), SourceError> {
        self.shared.inner().remove(child);
        self.ask(&Request::Forget { child }, &[], ANSWER).map(drop)
    }

    fn lose(&self, generation: GenerationId, why: String) -> Result<(), SourceError> {
        self.ask(&Request::Lose { generation, why }, &[], ANSWER).map(drop)
    }

    fn leave(&self) {
        self.shared.inner().left = true;
        // One that does not hear it any more has no children.
        let _ = self.ask(&Request::Leave, &[], ANSWER);
    }

    fn report(&self) -> Result<Report, SourceError> {
        match self.ask(&Request::Report, &[], ANSWER)? {
            Response::Report(report) => Ok(*report),
            other => Err(refusal(other)),
        }
    }

    fn lives(&self) -> bool {
        self.shared.inner().ended.is_none()
    }
}

pub(crate) fn refusal(response: Response) -> SourceError {
    match response {
        Response::Refused(why) | Response::Failed(why) => SourceError::Refused(why),
        other => SourceError::Refused(format!("it answers {other:?}")),
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        self.shared.inner().closing = true;
        // Ends the watchdog's wait, and tells the page server that the source is gone.
        self.shared.wire.shut_down();
        if let Some(watchdog) = self.watchdog.take() {
            let _ = watchdog.join();
        }
    }
}

/// What the source needs to do without its page server.
struct Saved {
    uffd: Userfault,
    ram: Arc<Ram>,
    store: File,
    journal: Journal,
}

impl Saved {
    /// Puts back the page in flight, and lets everybody write. The page server is dead.
    fn take_over(&self) -> Result<(), SourceError> {
        let mappings = self.ram.mappings();
        if let Some(in_flight) = self.journal.in_flight() {
            let mut page = vec![0; PAGE];
            self.store.read_exact_at(&mut page, in_flight.slot.offset())?;
            self.uffd.copy(mappings, u64::from(in_flight.page) * PAGE as u64, &page)?;
        }
        // Takes the protection off and wakes who waits, for a write or for a hole. What is not watched any more is passed over.
        Ok(self.uffd.unregister(mappings)?)
    }
}

struct Watchdog<F> {
    shared: Arc<Shared>,
    saved: Saved,
    patience: Duration,
    event: F,
}

impl<F: FnMut(Event)> Watchdog<F> {
    fn run(mut self) {
        let why = self.watch();
        if self.shared.inner().closing {
            return;
        }
        self.shared.process.kill();
        if !self.shared.process.ends_by(Instant::now() + DEATH) {
            // It hangs in the kernel. It does nothing any more, so it is as good as dead.
            tracing::error!("the page server does not end although it was killed");
        }
        self.end_children();
        if !self.shared.inner().left
            && let Err(e) = self.saved.take_over()
        {
            tracing::error!("guest memory cannot be let go: {e}");
        }
        let mut inner = self.shared.inner();
        inner.ended = Some(why.clone());
        inner.waiting = None;
        drop(inner);
        (self.event)(Event::Ended(why));
    }

    /// Passes on what the page server says, until it is not well. Returns why.
    fn watch(&mut self) -> String {
        let mut standstill = Standstill::new(Instant::now());
        let mut pulse = self.saved.journal.pulse();
        let mut asked = false;
        loop {
            match self.shared.wire.receive::<Response>(PULSE) {
                Ok((Response::Notice(Notice::Descendant(child)), fds)) => {
                    let mut inner = self.shared.inner();
                    match Process::of_another(fds, &inner.children) {
                        // As one that has pages: whether it still waits is its parent's to know, which would end with it.
                        Some(process) => drop(inner.children.insert(child, Arc::new(process))),
                        None => tracing::warn!("a fork says that a process is its child that cannot be"),
                    }
                }
                Ok((Response::Notice(notice), _)) => {
                    if let Notice::Gone(child) = &notice {
                        self.shared.inner().remove(*child);
                    }
                    (self.event)(Event::Notice(notice));
                }
                Ok((Response::Failed(why), _)) => return why,
                Ok((response, _)) => {
                    if let Some(waiting) = self.shared.inner().waiting.take() {
                        let _ = waiting.send(response);
                    }
                }
                Err(WireError::Timeout(_)) => (),
                Err(WireError::Closed) => return "its process has ended".into(),
                Err(e) => return e.to_string(),
            }
            let now = Instant::now();
            if standstill.since(now) < PULSE {
                continue;
            }
            let last = std::mem::replace(&mut pulse, self.saved.journal.pulse());
            if asked && pulse == last {
                let known = standstill.still(now);
                if known > self.patience {
                    return format!("it has done nothing for {known:?} (its threads: {})", self.shared.process.doing());
                }
                continue;
            }
            standstill = Standstill::new(now);
            asked = self.shared.inner().is_watched();
            if asked && self.shared.wire.send(&Request::Ping, &[]).is_err() {
                return "its process has ended".into();
            }
        }
    }

    /// Waits for the children to end, and has them end.
    fn end_children(&self) {
        let children = std::mem::take(&mut self.shared.inner().children);
        let deadline = Instant::now() + LAST_WORDS;
        let (_, stay): (Vec<_>, Vec<_>) = children.into_values().partition(|child| child.ends_by(deadline));
        for child in &stay {
            child.kill();
        }
        let killed = Instant::now();
        for child in &stay {
            // Who is a child by hearsay may be anything, and live for ever.
            child.ends_by(killed + if child.hearsay && child.leash.is_some() { LAST_WORDS } else { DEATH });
        }
    }
}
