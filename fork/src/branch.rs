//! A child's side of the page server that serves it, when it is forked itself.
//!
//! ```text
//!   arm:     its own pages, all ──▶ protect, copy;  those written meanwhile, again, while there are fewer each time
//!   freeze:  (paused) the last of them ──▶ copy, seal ──▶ FreezeChild [memfd] ──▶ page server
//! ```
//!
//! A child's own pages are those that it has written, or that were copied for it; its children share all others with the source. Its own ones
//! are copied by itself, so that what it does to them harms nobody else, and its host's accounts name the right one. What was written since
//! it was copied the kernel knows (see [`PageMap`]): no write of its ever waits for a fork of its own.
//!
//! Every answer comes by the lifeline, on whose thread [`Branch::hear`] runs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::huge::advise;
use crate::mappings::Mappings;
use crate::pagemap::PageMap;
use crate::pager::generation::Pages;
use crate::pager::habits::WRITTEN;
use crate::pager::protocol::{Request, Response};
use crate::pager::snapshot::SEALS;
use crate::pager::{Armed, ChildId, GenerationId, Notice, Report};
use crate::ram::PAGE;
use crate::source::{PageService, Process, SourceError, refusal};
use crate::uffd::Userfault;
use crate::wire::{Wire, WireError};

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(10);
/// A round of copying that leaves this few pages for the pause is the last.
const FEW: u32 = 256;
/// Rounds at most.
const ROUNDS: u32 = 5;
/// Pages copied at a time.
const AT_ONCE: u32 = 64;

/// The page server, as a child talks with it.
pub struct Branch {
    wire: Wire,
    /// One request at a time.
    turn: Mutex<()>,
    inner: Mutex<Inner>,
    own: Mutex<Own>,
}

#[derive(Default)]
struct Inner {
    /// Who waits for the answer to the last request.
    waiting: Option<Sender<Response>>,
    /// Its last word.
    ended: Option<String>,
}

/// Its own pages.
struct Own {
    memory: Arc<GuestMemoryMmap>,
    mappings: Mappings,
    /// Opened beforehand: later it may not be able to.
    map: PageMap,
    /// Those known.
    pages: Pages,
    draft: Option<Draft>,
}

/// Its own pages, copied for a fork to come.
struct Draft {
    memfd: File,
    /// Where in it each is.
    places: BTreeMap<u32, u32>,
}

impl Branch {
    /// Of a child with this memory, which is mapped privately, at the other end of whose lifeline the page server is.
    ///
    /// # Errors
    /// When the memory is not so, or there is no /proc.
    pub fn new(lifeline: Wire, memory: Arc<GuestMemoryMmap>) -> Result<Self, SourceError> {
        let mappings = Mappings::of_private(&memory).map_err(io::Error::other)?;
        let pages = Pages::new((mappings.bytes() / PAGE as u64) as usize);
        let own = Mutex::new(Own { memory, mappings, map: PageMap::open()?, pages, draft: None });
        Ok(Self { wire: lifeline, turn: Mutex::default(), inner: Mutex::default(), own })
    }

    /// Hears the page server, and tells `event` what it says of this child's own children, until its last word: then this child must end.
    pub fn hear(&self, mut event: impl FnMut(Notice)) -> String {
        let why = loop {
            match self.wire.receive::<Response>(Duration::MAX) {
                Ok((Response::Failed(why), _)) => break why,
                Ok((Response::Notice(notice), _)) => event(notice),
                Ok((response, _)) => {
                    if let Some(waiting) = self.inner().waiting.take() {
                        let _ = waiting.send(response);
                    }
                }
                Err(WireError::Closed) => break "its page server has died".into(),
                Err(e) => break format!("its page server: {e}"),
            }
        };
        let mut inner = self.inner();
        inner.ended = Some(why.clone());
        inner.waiting = None;
        why
    }

    /// The memory is about to be unmapped, and this VM goes on with other memory. Its disks remain those of its fork point.
    pub fn independent(&self) {
        let _ = self.ask(&Request::Independent, &[]);
    }

    /// Brings what a child that runs programs is going to need, as far as earlier ones' needs tell: what they were given is given to it, and
    /// what they have written becomes its own. Returns the pages that are there then, as runs. It takes as long as the page server needs for it.
    ///
    /// # Errors
    /// When the page server is gone, or the kernel has no such calls (Linux 6.7): the child finds out by itself then, page by page.
    pub fn prepare(&self) -> Result<Vec<(u32, u32)>, SourceError> {
        let expected = match self.ask(&Request::Expect, &[])? {
            Response::Expected(runs) => runs,
            other => return Err(refusal(other)),
        };
        let own = self.own();
        for (first, len) in expected {
            let (offset, bytes) = (u64::from(first) * PAGE as u64, u64::from(len) * PAGE as u64);
            for (start, len) in own.mappings.spans(offset, bytes) {
                advise(start, len, libc::MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE").map_err(io::Error::other)?;
            }
        }
        Ok(own.map.present(&own.mappings)?)
    }

    /// Tells the page server what this child has written until now, for those to come.
    ///
    /// # Errors
    /// When the page server is gone, or the kernel has no such call (Linux 6.7).
    pub fn tell_written(&self) -> Result<(), SourceError> {
        let mut runs = {
            let own = self.own();
            own.map.own(&own.mappings)?
        };
        // More do not count, and would not fit into a message.
        runs.truncate(WRITTEN as usize);
        match self.ask(&Request::Wrote { runs }, &[])? {
            Response::Done => Ok(()),
            other => Err(refusal(other)),
        }
    }

    /// Ends [`Branch::hear`].
    pub fn close(&self) {
        self.wire.shut_down();
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, request: &Request, fds: &[std::os::fd::BorrowedFd<'_>]) -> Result<Response, SourceError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let (tell, answer) = channel();
        {
            let mut inner = self.inner();
            if let Some(why) = &inner.ended {
                return Err(SourceError::Ended(why.clone()));
            }
            inner.waiting = Some(tell);
        }
        if let Err(e) = self.wire.send(request, fds) {
            self.inner().waiting = None;
            return Err(e.into());
        }
        match answer.recv_timeout(ANSWER) {
            Ok(response) => Ok(response),
            Err(RecvTimeoutError::Disconnected) => {
                Err(SourceError::Ended(self.inner().ended.clone().unwrap_or_default()))
            }
            Err(RecvTimeoutError::Timeout) => {
                // Its answer would be taken for another's. Without its page server this child ends.
                self.close();
                Err(SourceError::Silent)
            }
        }
    }
}

impl Own {
    /// Copies what was written since the last time, or all that is its own if there is no draft yet. Returns how many pages.
    fn copy(&mut self) -> io::Result<u32> {
        let Self { memory, mappings, map, pages, draft } = self;
        let whole = draft.is_none();
        let draft = match draft {
            Some(draft) => draft,
            None => draft.insert(Draft::new()?),
        };
        let written = map.written(mappings).map_err(|e| {
            io::Error::new(e.kind(), format!("what a fork has written cannot be told apart (Linux 6.7 can): {e}"))
        })?;
        written.iter().flat_map(|(first, len)| *first..first + len).for_each(|page| pages.add(page));
        let runs = if whole { pages.runs(u32::MAX) } else { written };
        for (first, len) in &runs {
            draft.copy(memory, *first, *len)?;
        }
        Ok(runs.iter().map(|(_, len)| len).sum())
    }
}

impl Draft {
    fn new() -> io::Result<Self> {
        let memfd = memfd_create(c"civic-own", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        Ok(Self { memfd: memfd.into(), places: BTreeMap::new() })
    }

    fn copy(&mut self, memory: &GuestMemoryMmap, first: u32, len: u32) -> io::Result<()> {
        let mut buffer = vec![0; AT_ONCE.min(len) as usize * PAGE];
        let (mut page, end) = (first, first + len);
        while page < end {
            // As many as lie next to each other there, too.
            let place = self.place(page);
            let mut count = 1;
            while count < AT_ONCE && page + count < end && self.place(page + count) == place + count {
                count += 1;
            }
            let bytes = &mut buffer[..count as usize * PAGE];
            read(memory, u64::from(page) * PAGE as u64, bytes)?;
            self.memfd.write_all_at(bytes, u64::from(place) * PAGE as u64)?;
            page += count;
        }
        Ok(())
    }

    fn place(&mut self, page: u32) -> u32 {
        let next = self.places.len() as u32;
        *self.places.entry(page).or_insert(next)
    }

    /// Nothing changes any more. Returns how many pages there are.
    fn seal(&self) -> io::Result<u32> {
        let mut numbers = vec![0; self.places.len() * 4];
        for (page, place) in &self.places {
            numbers[*place as usize * 4..][..4].copy_from_slice(&page.to_le_bytes());
        }
        self.memfd.write_all_at(&numbers, (self.places.len() * PAGE) as u64)?;
        fcntl(&self.memfd, FcntlArg::F_ADD_SEALS(SEALS))?;
        Ok(self.places.len() as u32)
    }
}

/// Reads guest memory by its offset in the memfd.
fn read(memory: &GuestMemoryMmap, mut offset: u64, mut bytes: &mut [u8]) -> io::Result<()> {
    for region in memory.iter() {
        let start = region.file_offset().map_or(0, |file| file.start());
        let Some(within) = offset.checked_sub(start).filter(|within| *within < region.len()) else { continue };
        let (here, rest) = bytes.split_at_mut((region.len() - within).min(bytes.len() as u64) as usize);
        let address = GuestAddress(region.start_addr().0 + within);
        memory.read_slice(here, address).map_err(io::Error::other)?;
        offset += here.len() as u64;
        bytes = rest;
    }
    if bytes.is_empty() { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

impl PageService for Branch {
    fn adopt(
        &self,
        child: ChildId,
        process: &Arc<Process>,
        uffd: &Userfault,
        mappings: Mappings,
        lifeline: &Wire,
    ) -> Result<(), SourceError> {
        let fds: Vec<_> = [uffd.as_fd(), lifeline.as_fd()].into_iter().chain(process.fds()).collect();
        match self.ask(&Request::Adopt { child, mappings }, &fds)? {
            Response::Done => Ok(()),
            other => Err(refusal(other)),
        }
    }

    fn arm_ahead(&self) -> Result<(), SourceError> {
        Ok(())
    }

    fn arm(&self) -> Result<Armed, SourceError> {
        let mut own = self.own();
        own.draft = None;
        let mut left = own.copy()?;
        let mut rounds = 0;
        while left > FEW && rounds < ROUNDS {
            left = own.copy()?;
            rounds += 1;
        }
        Ok(Armed { rounds, left: left as usize })
    }

    fn freeze(&self, children: Vec<ChildId>) -> Result<GenerationId, SourceError> {
        let (memfd, pages) = {
            let mut own = self.own();
            own.copy()?;
            let draft = own.draft.take().ok_or_else(|| SourceError::Refused("it is not armed".into()))?;
            let pages = draft.seal()?;
            (draft.memfd, pages)
        };
        match self.ask(&Request::FreezeChild { children, pages }, &[memfd.as_fd()])? {
            Response::Frozen(generation) => Ok(generation),
            other => Err(refusal(other)),
        }
    }

    fn abandon(&self) -> Result<(), SourceError> {
        self.own().draft = None;
        Ok(())
    }

    fn forget(&self, child: ChildId) -> Result<(), SourceError> {
        self.ask(&Request::Forget { child }, &[]).map(drop)
    }

    fn lose(&self, generation: GenerationId, why: String) -> Result<(), SourceError> {
        self.ask(&Request::Lose { generation, why }, &[]).map(drop)
    }

    fn leave(&self) {
        self.independent();
    }

    fn report(&self) -> Result<Report, SourceError> {
        match self.ask(&Request::Report, &[])? {
            Response::Report(report) => Ok(*report),
            other => Err(refusal(other)),
        }
    }

    fn lives(&self) -> bool {
        self.inner().ended.is_none()
    }
}

#[cfg(test)]
mod tests {
    use nix::fcntl::{SpliceFFlags, splice};

    use super::*;
    use crate::testing;

    #[test]
    fn a_page_that_somebody_holds_does_not_keep_a_draft_from_being_sealed() {
        let memfd = testing::memfd(8 * PAGE as u64);
        testing::fill(&memfd, 0..8);
        let memory = testing::private(&memfd, &[8 * PAGE as u64]);
        let mut draft = Draft::new().unwrap();
        draft.copy(&memory, 2, 3).unwrap();
        // A pipe holds the page itself, no copy.
        let (_held, pipe) = nix::unistd::pipe().unwrap();
        let spliced = splice(&draft.memfd, Some(&mut 0), &pipe, None, PAGE, SpliceFFlags::empty()).unwrap();
        assert_eq!(spliced, PAGE);
        assert_eq!(draft.seal().unwrap(), 3);
        assert!(draft.memfd.write_all_at(&[1], 0).is_err());
        assert!(draft.memfd.set_len(0).is_err());
    }
}
