//! The page server as a process: waits for everybody at once, and answers the source first.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::journal::Journal;
use super::protocol::{Request, Response};
use super::store::Store;
use super::{CHILDREN, ChildId, Lost, Notice, Pager, PagerError};
use crate::slice;
use crate::uffd::{UffdError, Userfault};
use crate::wire::{Wire, WireError};

/// How long the source may take to say what it wants: it splits huge pages first.
const PATIENCE: Duration = Duration::from_secs(60);
/// Events taken at a time.
const EVENTS: usize = 64;

/// Why a page server ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The source says nothing sensible.
    #[error("the source cannot be understood")]
    Wire(#[from] WireError),
    /// The source began with something else.
    #[error("the source did not begin as it should: {0}")]
    Beginning(&'static str),
    /// Memory cannot be served.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// What the source handed over cannot be used.
    #[error("the source's memory cannot be watched")]
    Uffd(#[from] UffdError),
    /// The system refuses.
    #[error("cannot wait for page faults")]
    System(#[source] std::io::Error),
}

impl From<Errno> for ServeError {
    fn from(e: Errno) -> Self {
        Self::System(e.into())
    }
}

/// Serves the source at the other end of `wire` until it and every child has gone.
///
/// # Errors
/// When it cannot go on. The source has been told, if it could be; its watchdog does what is left.
pub fn serve(wire: Wire) -> Result<(), ServeError> {
    // Without, it is only slower.
    if let Err(e) = slice::shorten() {
        tracing::debug!("cannot choose how to be scheduled: {e}");
    }
    let mut server = Server::begin(wire)?;
    let ended = server.run();
    if let Err(e) = &ended {
        let why = with_causes(e);
        let _ = server.wire.send(&Response::Failed(why.clone()), &[]);
        for lifeline in server.lifelines.values() {
            let _ = lifeline.post(&Response::Failed(why.clone()));
        }
    }
    ended
}

fn with_causes(e: &(dyn std::error::Error + 'static)) -> String {
    let chain = std::iter::successors(Some(e), |e| e.source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Whose descriptor has something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Wire,
    Source,
    Memory(ChildId),
    Lifeline(ChildId),
}

/// Of a token, above the child's number.
const KIND: u32 = CHILDREN.trailing_zeros();

impl Token {
    fn event(self, flags: EpollFlags) -> EpollEvent {
        let data = match self {
            Self::Wire => 0,
            Self::Source => 1,
            Self::Memory(child) => 2 << KIND | child,
            Self::Lifeline(child) => 3 << KIND | child,
        };
        EpollEvent::new(flags, data)
    }

    fn of(event: &EpollEvent) -> Self {
        let child = event.data() % CHILDREN;
        match (event.data() >> KIND, child) {
            (2, child) => Self::Memory(child),
            (3, child) => Self::Lifeline(child),
            (_, 1) => Self::Source,
            _ => Self::Wire,
        }
    }
}

struct Server {
    wire: Wire,
    pager: Pager,
    journal: Journal,
    epoll: Epoll,
    lifelines: BTreeMap<ChildId, Wire>,
    /// The source waits to hear that it may be paused.
    arming: bool,
    /// Children that wait to hear that they have been given what they will need.
    expecting: Vec<ChildId>,
}

impl Server {
    fn begin(wire: Wire) -> Result<Self, ServeError> {
        let (request, fds) = wire.receive(PATIENCE)?;
        let Request::Begin { mappings, limit, habits } = request else {
            return Err(ServeError::Beginning("another request"));
        };
        let [uffd, ram, store, journal]: [OwnedFd; 4] =
            fds.try_into().map_err(|_| ServeError::Beginning("descriptors are missing"))?;
        let uffd = Userfault::of_another(uffd)?;
        let store = Store::new(File::from(store), limit).map_err(PagerError::from)?;
        let journal = File::from(journal);
        let map = |file| Journal::new(file).map_err(ServeError::System);
        let mut pager = Pager::new(File::from(ram), uffd, mappings, store, map(&journal)?)?;
        pager.set_habits(habits);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&wire, Token::Wire.event(EpollFlags::EPOLLIN))?;
        if let Some(source) = pager.source() {
            epoll.add(source, Token::Source.event(EpollFlags::EPOLLIN))?;
        }
        wire.send(&Response::Done, &[])?;
        Ok(Self {
            wire,
            pager,
            journal: map(&journal)?,
            epoll,
            lifelines: BTreeMap::new(),
            arming: false,
            expecting: Vec::new(),
        })
    }

    fn run(&mut self) -> Result<(), ServeError> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let mut source_lives = true;
        while source_lives || !self.lifelines.is_empty() {
            let timeout = if self.pager.busy() { EpollTimeout::ZERO } else { EpollTimeout::NONE };
            let ready = match self.epoll.wait(&mut events, timeout) {
                Err(Errno::EINTR) => 0,
                ready => ready?,
            };
            self.journal.beat();
            self.pager.step()?;
            for event in &events[..ready] {
                match Token::of(event) {
                    // Answered by every step.
                    Token::Source => (),
                    Token::Wire => source_lives = self.hear_source()?,
                    // Of a userfaultfd this says that it cannot be waited for: its owner has taken O_NONBLOCK away.
                    Token::Memory(child) if event.events().contains(EpollFlags::EPOLLERR) => {
                        let why = "its userfaultfd has whoever reads it wait".into();
                        self.pager.lose(child, Lost::Unserved { why });
                    }
                    Token::Memory(child) => drop(self.pager.serve_child(child)?),
                    Token::Lifeline(child) => self.hear_child(child, event.events()),
                }
            }
            if self.arming
                && let Some(armed) = self.pager.armed()
            {
                self.arming = false;
                self.answer(&Response::Armed(armed));
            }
            for child in std::mem::take(&mut self.expecting) {
                self.answer_expecting(child);
            }
            self.tell();
        }
        Ok(())
    }

    /// Tells a child what it is going to write, once it has been given what it will need.
    fn answer_expecting(&mut self, child: ChildId) {
        match self.pager.to_write(child) {
            Some(runs) => self.tell_child(child, &Response::Expected(runs)),
            None if self.lifelines.contains_key(&child) => self.expecting.push(child),
            None => (),
        }
    }

    /// Obeys what the source says. False if it is gone.
    fn hear_source(&mut self) -> Result<bool, ServeError> {
        loop {
            match self.wire.try_receive::<Request>() {
                Ok(Some((request, fds))) => self.obey(request, fds),
                Ok(None) => return Ok(true),
                Err(WireError::Closed) => {
                    // Its children have all of its memory; nobody writes to it any more.
                    let _ = self.epoll.delete(&self.wire);
                    self.leave_source();
                    return Ok(false);
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn leave_source(&mut self) {
        if let Some(source) = self.pager.source() {
            let _ = self.epoll.delete(source);
        }
        self.pager.leave_source();
    }

    /// Obeys one thing that a child says, if that is for it to say; anything else is its end.
    fn hear_child(&mut self, child: ChildId, flags: EpollFlags) {
        let Some(lifeline) = self.lifelines.get(&child) else { return };
        match lifeline.try_receive::<Request>() {
            Ok(None) if flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) => self.end(child),
            Ok(None) => (),
            // Its next request comes after the answer: one that does not wait for it is told twice at most.
            Ok(Some((Request::Expect, _))) if !self.expecting.contains(&child) => self.answer_expecting(child),
            Ok(Some((request, fds))) => {
                let response = self.obey_child(child, request, fds);
                self.tell_child(child, &response);
            }
            Err(_) => self.end(child),
        }
    }

    fn obey_child(&mut self, owner: ChildId, request: Request, fds: Vec<OwnedFd>) -> Response {
        let refused = |e: &dyn std::fmt::Display| Response::Refused(e.to_string());
        let is_its = |pager: &Pager, child| pager.parent(child) == Some(owner);
        match request {
            Request::Adopt { child, mappings } => {
                self.adopt(child, Some(owner), mappings, fds).map_or_else(Response::Refused, |()| Response::Done)
            }
            Request::FreezeChild { children, pages } => {
                let Some(memfd) = fds.into_iter().next().map(File::from) else {
                    return refused(&"the pages are missing");
                };
                let frozen = self.pager.freeze_child(owner, &memfd, pages, &children);
                frozen.map_or_else(|e| refused(&with_causes(&e)), Response::Frozen)
            }
            Request::Forget { child } if is_its(&self.pager, child) => {
                self.forget(child);
                // It holds descriptors of it, too.
                self.answer(&Response::Notice(Notice::Gone(child)));
                Response::Done
            }
            // It may have gone meanwhile.
            Request::Forget { .. } => Response::Done,
            Request::Lose { generation, why } => {
                self.pager.lose_disks(Some(owner), generation, &why);
                Response::Done
            }
            Request::Independent => {
                if let Some(uffd) = self.pager.child(owner) {
                    let _ = self.epoll.delete(uffd);
                }
                self.pager.set_independent(owner);
                Response::Done
            }
            Request::Wrote { runs } => {
                self.pager.add_written(&runs);
                Response::Done
            }
            Request::Report => Response::Report(Box::new(self.pager.report(Some(owner)))),
            _ => Response::Refused("this is not a child's to ask for".into()),
        }
    }

    fn obey(&mut self, request: Request, fds: Vec<OwnedFd>) {
        let refused = |e: &dyn std::fmt::Display| Response::Refused(e.to_string());
        let response = match request {
            Request::Begin { .. } => Response::Refused("it has begun already".into()),
            Request::Adopt { child, mappings } => {
                self.adopt(child, None, mappings, fds).map_or_else(Response::Refused, |()| Response::Done)
            }
            Request::ArmAhead => self.pager.arm_ahead().map_or_else(|e| refused(&e), |()| Response::Done),
            Request::Arm => match self.pager.arm() {
                Ok(()) => {
                    self.arming = true;
                    return;
                }
                Err(e) => refused(&e),
            },
            Request::Freeze { children } => self.pager.freeze(&children).map_or_else(|e| refused(&e), Response::Frozen),
            Request::Abandon => {
                self.arming = false;
                self.pager.abandon();
                Response::Done
            }
            Request::Forget { child } => {
                self.forget(child);
                Response::Done
            }
            Request::Lose { generation, why } => {
                self.pager.lose_disks(None, generation, &why);
                Response::Done
            }
            Request::Leave => {
                self.leave_source();
                Response::Done
            }
            Request::Report => Response::Report(Box::new(self.pager.report(None))),
            Request::FreezeChild { .. } | Request::Independent | Request::Expect | Request::Wrote { .. } => {
                Response::Refused("it is no child".into())
            }
            // The pulse has been given.
            Request::Ping => return,
        };
        self.answer(&response);
    }

    fn adopt(
        &mut self,
        child: ChildId,
        parent: Option<ChildId>,
        mappings: crate::mappings::Mappings,
        fds: Vec<OwnedFd>,
    ) -> Result<(), String> {
        let mut fds = fds.into_iter();
        let (Some(uffd), Some(lifeline)) = (fds.next(), fds.next()) else {
            return Err("descriptors are missing".into());
        };
        // Its pidfd, and its leash if it has one.
        let process: Vec<_> = fds.take(2).collect();
        let uffd = Userfault::of_another(uffd).map_err(|e| e.to_string())?;
        self.pager.adopt(child, parent, uffd, mappings).map_err(|e| e.to_string())?;
        if parent.is_some() {
            // The source hears of it before its parent does: it may have to end it.
            if process.is_empty() {
                self.pager.forget(child);
                return Err("its process is missing".into());
            }
            let process: Vec<_> = process.iter().map(AsFd::as_fd).collect();
            let _ = self.wire.send(&Response::Notice(Notice::Descendant(child)), &process);
        }
        let lifeline = Wire::from(lifeline);
        let memory =
            self.pager.child(child).map(|uffd| self.epoll.add(uffd, Token::Memory(child).event(EpollFlags::EPOLLIN)));
        let life = self.epoll.add(&lifeline, Token::Lifeline(child).event(EpollFlags::EPOLLIN));
        self.lifelines.insert(child, lifeline);
        if let Err(e) = memory.unwrap_or(Ok(())).and(life) {
            self.forget(child);
            if parent.is_some() {
                self.answer(&Response::Notice(Notice::Gone(child)));
            }
            return Err(e.to_string());
        }
        Ok(())
    }

    /// A child has ended.
    fn end(&mut self, child: ChildId) {
        let parent = self.pager.parent(child);
        self.forget(child);
        self.pass_on(parent, Notice::Gone(child));
    }

    fn forget(&mut self, child: ChildId) {
        // Closing a descriptor takes it out only if it is the last one, and the child has another.
        if let Some(uffd) = self.pager.child(child) {
            let _ = self.epoll.delete(uffd);
        }
        self.pager.forget(child);
        if let Some(lifeline) = self.lifelines.remove(&child) {
            let _ = self.epoll.delete(lifeline.as_fd());
        }
    }

    /// Passes on what has happened.
    fn tell(&mut self) {
        loop {
            let notices: Vec<_> = self.pager.notices().collect();
            if notices.is_empty() {
                return;
            }
            for (owner, notice) in notices {
                match &notice {
                    Notice::Lost(child, lost) => {
                        // It waits in vain from now on; that it has ended is noticed by its lifeline.
                        if let Some(uffd) = self.pager.child(*child) {
                            let _ = self.epoll.delete(uffd);
                        }
                        self.tell_child(*child, &Response::Failed(lost.to_string()));
                    }
                    Notice::Gone(child) => self.forget(*child),
                    _ => (),
                }
                self.pass_on(owner, notice);
            }
        }
    }

    /// Tells a child, or the source, of something; the source hears of every end.
    fn pass_on(&mut self, owner: Option<ChildId>, notice: Notice) {
        let Some(child) = owner else { return self.answer(&Response::Notice(notice)) };
        if matches!(notice, Notice::Gone(_)) {
            self.answer(&Response::Notice(notice.clone()));
        }
        self.tell_child(child, &Response::Notice(notice));
    }

    /// Tells a child something. One that has not read what it was told for long is given up.
    fn tell_child(&mut self, child: ChildId, response: &Response) {
        let Some(lifeline) = self.lifelines.get(&child) else { return };
        match lifeline.post(response) {
            // Its end is still to be heard.
            Ok(()) | Err(WireError::Closed) => (),
            Err(_) => lifeline.shut_down(),
        }
    }

    /// Sends what the source may be too dead to hear.
    fn answer(&self, response: &Response) {
        let _ = self.wire.send(response, &[]);
    }
}
