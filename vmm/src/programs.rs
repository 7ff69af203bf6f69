//! Programs in the guest, as their loaders and clients talk about them: bytes of [`wire`] frames, both ways.
//!
//! ```text
//!  loader ── out, registers ──▶ vCPU thread: Programs ─▶ its Session ◀─ API thread: relay ◀─▶ client
//! ```
//!
//! The loader's hypercalls name a buffer in its memory, which is read and written by its vCPU's own page tables. It asks, it is never
//! waited for: what it has to say is taken as long as there is room, what it is told is there until it asks.
//!
//! What comes from the guest is untrusted: a session whose frames make no sense is over. Lock order: `sessions`, then one session's.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use civic_api::ProgramInfo;
use civic_devices::virtio::GuestRam;
use civic_guest::memory::{Gva, PhysicalMemory};
use civic_guest::paging::AddressSpace;
use civic_inject::wire::{
    FromGuest, HEADER, MAX_PAYLOAD, Malformed, OP_RECV, OP_SEND, Stage, ToGuest, UNMAPPED, split,
};
use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuFd;
use tokio::sync::Notify;
use vm_memory::{Bytes, GuestAddress};

use crate::cpu::guest::address_space;
use crate::machine::surgery::Seen;
use crate::traps::Trap;

/// Where loaders knock.
pub const PORT: u16 = 0x6c0;

/// Bytes that are kept of what a program has said, at most.
pub const ROOM: usize = 16 * (HEADER + MAX_PAYLOAD);
/// And of what it is told, before no more is taken: more than a loader ever gives credit for, in frames of some bytes too.
const TOLD: usize = 4 << 20;
/// What is less is put together for the client.
const PIECE: usize = HEADER + MAX_PAYLOAD;
/// Programs at a time.
pub const MOST: usize = 64;

/// RFLAGS.RF: no breakpoint stops the next instruction (Intel SDM 3B §18.3.1.1).
const RESUME: u64 = 1 << 16;
/// Bytes of the instruction at which loaders are stopped.
const KNOCK_LEN: u64 = 1;

const PAGE: u64 = 4096;
const EINVAL: i64 = -22;
const EPIPE: i64 = -32;

/// All sessions of a VM.
#[derive(Default)]
pub struct Programs {
    sessions: Mutex<BTreeMap<u64, Arc<Session>>>,
    last: AtomicU64,
}

/// One program.
pub struct Session {
    id: u64,
    /// The program and its arguments, for people.
    argv: Vec<String>,
    begun: Instant,
    /// What the loader says to be believed.
    token: u64,
    state: Mutex<Talk>,
    /// For threads that wait for the guest.
    heard: Condvar,
    /// For the task that serves the client.
    changed: Notify,
}

#[derive(Default)]
struct Talk {
    /// Frames for the loader.
    to_guest: VecDeque<u8>,
    /// What the loader has said and is no whole frame yet.
    partial: Vec<u8>,
    /// Whole frames for the client, which make sense.
    from_guest: Pieces,
    /// The loader has said its first word.
    greeted: bool,
    /// It has become the program.
    runs: bool,
    /// There will be no more frames from the guest.
    over: bool,
    /// Why that is, if it was not the loader's will.
    broken: Option<String>,
    /// Somebody listens, or has.
    attended: bool,
    /// Nobody listens any more.
    deaf: bool,
}

/// Whole frames, in pieces that are as large as they came: nothing is copied that is large.
#[derive(Default)]
struct Pieces {
    pieces: VecDeque<Vec<u8>>,
    len: usize,
}

impl Pieces {
    fn push(&mut self, frames: Vec<u8>) {
        self.len += frames.len();
        match self.pieces.back_mut() {
            Some(last) if last.len() + frames.len() <= PIECE => last.extend(frames),
            _ => self.pieces.push_back(frames),
        }
    }

    fn pop(&mut self) -> Option<Vec<u8>> {
        let piece = self.pieces.pop_front()?;
        self.len -= piece.len();
        Some(piece)
    }
}

impl Programs {
    /// A session for a program that is to be launched so.
    ///
    /// # Errors
    /// When there are [`MOST`], or the system gives no random numbers.
    pub fn begin(&self, argv: &[String], launch: Vec<u8>) -> Result<Arc<Session>, String> {
        let mut token = [0; 8];
        getrandom::fill(&mut token).map_err(|e| format!("no random numbers: {e}"))?;
        let mut sessions = self.sessions();
        sessions.retain(|_, session| !session.is_done());
        if sessions.len() >= MOST {
            return Err(format!("{MOST} programs run in this VM, more than that at a time are not possible"));
        }
        let session = Arc::new(Session {
            id: self.last.fetch_add(1, Ordering::Relaxed) + 1,
            argv: argv.to_vec(),
            begun: Instant::now(),
            token: u64::from_le_bytes(token),
            state: Mutex::new(Talk { to_guest: launch.into(), ..Talk::default() }),
            heard: Condvar::new(),
            changed: Notify::new(),
        });
        sessions.insert(session.id, Arc::clone(&session));
        Ok(session)
    }

    /// The session of this number, unless all of it is over.
    pub fn session(&self, id: u64) -> Option<Arc<Session>> {
        self.sessions().get(&id).cloned()
    }

    /// Those that are not over.
    pub fn running(&self) -> Vec<ProgramInfo> {
        self.sessions().values().filter_map(|session| session.info()).collect()
    }

    /// Forgets a session.
    pub fn end(&self, id: u64) {
        self.sessions().remove(&id);
    }

    /// The guest is another one now.
    pub fn reset(&self) {
        for session in std::mem::take(&mut *self.sessions()).into_values() {
            session.fail("the guest has reset");
        }
    }

    fn sessions(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Session>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn by_token(&self, token: u64) -> Option<Arc<Session>> {
        self.sessions().values().find(|session| session.token == token).cloned()
    }
}

impl Session {
    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The loader's argument: where to knock, and as whom.
    pub fn argument(&self) -> String {
        format!("port:{PORT:x}:{:x}", self.token)
    }

    /// Waits for the loader's first word; false if it is not heard by `deadline`.
    pub fn greeted(&self, deadline: Instant) -> bool {
        self.wait(deadline, |talk| talk.greeted)
    }

    /// Waits until the program itself runs; false if it does not by `deadline`, or will not.
    pub fn runs(&self, deadline: Instant) -> bool {
        self.wait(deadline, |talk| talk.runs)
    }

    fn wait(&self, deadline: Instant, what: impl Fn(&Talk) -> bool) -> bool {
        let mut talk = self.talk();
        while !what(&talk) && !talk.over {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            talk = self.heard.wait_timeout(talk, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        what(&talk)
    }

    /// Whether the caller is the first who wants to listen, and so the one.
    pub fn attend(&self) -> bool {
        !std::mem::replace(&mut self.talk().attended, true)
    }

    /// Frames from the guest: waits for some. `None` when there are no more, and why if it was not the loader's will.
    pub async fn next(&self) -> Result<Vec<u8>, Option<String>> {
        loop {
            let changed = self.changed.notified();
            {
                let mut talk = self.talk();
                if let Some(frames) = talk.from_guest.pop() {
                    return Ok(frames);
                }
                if talk.over {
                    return Err(talk.broken.clone());
                }
            }
            changed.await;
        }
    }

    /// A frame for the loader, if there is room.
    pub fn tell(&self, frame: &ToGuest<'_>) -> bool {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes).is_ok() && self.pass_on(&bytes)
    }

    /// The same, of one that was encoded elsewhere and looked into.
    pub fn pass_on(&self, frame: &[u8]) -> bool {
        let mut talk = self.talk();
        let room = talk.to_guest.len() < TOLD;
        if room {
            talk.to_guest.extend(frame);
        }
        room
    }

    /// Nobody wants to hear of it any more: what it says is dropped.
    pub fn abandon(&self) {
        let mut talk = self.talk();
        talk.deaf = true;
        talk.from_guest = Pieces::default();
    }

    /// Ends it, whatever the loader does.
    pub fn fail(&self, why: &str) {
        let mut talk = self.talk();
        if !talk.over {
            talk.over = true;
            talk.broken = Some(why.to_owned());
        }
        drop(talk);
        self.tell_all();
    }

    fn info(&self) -> Option<ProgramInfo> {
        let talk = self.talk();
        let age_ms = self.begun.elapsed().as_millis() as u64;
        (!talk.over).then(|| ProgramInfo { id: self.id, argv: self.argv.clone(), age_ms, started: talk.greeted })
    }

    fn is_done(&self) -> bool {
        let talk = self.talk();
        talk.over && (talk.deaf || talk.from_guest.len == 0)
    }

    fn talk(&self) -> MutexGuard<'_, Talk> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_all(&self) {
        self.heard.notify_all();
        self.changed.notify_one();
    }

    /// What the loader says: takes as much of it as there is room for, which `bytes` is told. As the answer to its hypercall.
    pub fn hear(&self, bytes: impl FnOnce(usize) -> Option<Vec<u8>>) -> i64 {
        let mut talk = self.talk();
        if talk.over {
            return EPIPE;
        }
        let room = ROOM.saturating_sub(talk.from_guest.len + talk.partial.len());
        let Some(bytes) = bytes(room) else { return UNMAPPED };
        let heard = bytes.len() as i64;
        if talk.partial.is_empty() {
            talk.partial = bytes;
        } else {
            talk.partial.extend(bytes);
        }
        if let Err(e) = talk.sort() {
            (talk.over, talk.broken) = (true, Some(format!("the loader makes no sense: {e}")));
        }
        drop(talk);
        self.tell_all();
        heard
    }
}

impl Talk {
    /// Moves whole frames to where the client finds them, up to one that makes no sense.
    fn sort(&mut self) -> Result<(), Malformed> {
        let mut done = 0;
        let sorted = loop {
            let (frame, len) = match split(&self.partial[done..]) {
                Ok(Some(found)) => found,
                Ok(None) => break Ok(()),
                Err(e) => break Err(e),
            };
            match FromGuest::decode(frame) {
                Ok(FromGuest::Hello { .. }) => self.greeted = true,
                Ok(FromGuest::Stage { stage: Stage::Execed, .. }) => self.runs = true,
                Ok(FromGuest::Exited(_) | FromGuest::Failed { .. }) => self.over = true,
                Ok(_) => {}
                Err(e) => break Err(e),
            }
            done += len;
        };
        let rest = self.partial.split_off(done);
        let frames = std::mem::replace(&mut self.partial, rest);
        if !self.deaf && !frames.is_empty() {
            self.from_guest.push(frames);
        }
        sorted
    }
}

/// The sessions, where the guest's loaders reach them.
pub struct Knocking {
    /// Them.
    pub programs: Arc<Programs>,
    /// Where their buffers are.
    pub ram: GuestRam,
    /// Where they are stopped that may use no port.
    pub breakpoint: Option<Gva>,
}

impl Trap for Knocking {
    fn meet(&self, fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        let regs = fd.get_regs()?;
        let stopped = self.breakpoint == Some(Gva(regs.rip));
        let session = self.programs.by_token(regs.r8);
        let Some(session) = session else {
            // Another program that has an instruction there: past the breakpoint.
            return fd.set_regs(&kvm_regs { rflags: regs.rflags | if stopped { RESUME } else { 0 }, ..regs });
        };
        let answer = match (address_space(fd)?, regs.rax as u32) {
            (Some(space), OP_SEND) => session.hear(|room| self.fetch(&space, regs.rdi, regs.rsi.min(room as u64))),
            (Some(space), OP_RECV) => self.give(&session, &space, regs.rdi, regs.rsi),
            _ => EINVAL,
        };
        let rip = if stopped { regs.rip.wrapping_add(KNOCK_LEN) } else { regs.rip };
        fd.set_regs(&kvm_regs { rax: answer as u64, rip, ..regs })
    }
}

impl Knocking {
    fn fetch(&self, space: &AddressSpace, at: u64, len: u64) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        self.pages(space, at, len, false, |physical, from, to| {
            let part = &mut bytes[from as usize..to as usize];
            self.ram.read_slice(part, GuestAddress(physical)).is_ok()
        })?;
        Some(bytes)
    }

    fn give(&self, session: &Session, space: &AddressSpace, at: u64, len: u64) -> i64 {
        let mut talk = session.talk();
        if talk.to_guest.is_empty() && talk.over {
            return EPIPE;
        }
        let len = len.min(talk.to_guest.len() as u64);
        let bytes = &talk.to_guest.make_contiguous()[..len as usize];
        let written = self.pages(space, at, len, true, |physical, from, to| {
            self.ram.write_slice(&bytes[from as usize..to as usize], GuestAddress(physical)).is_ok()
        });
        if written.is_none() {
            return UNMAPPED;
        }
        talk.to_guest.drain(..len as usize);
        len as i64
    }

    /// Calls `each` with each page's part of a buffer: its physical address, and where it begins and ends in the buffer.
    fn pages(
        &self,
        space: &AddressSpace,
        at: u64,
        len: u64,
        writes: bool,
        mut each: impl FnMut(u64, u64, u64) -> bool,
    ) -> Option<()> {
        let memory: &dyn PhysicalMemory = &Seen(&self.ram);
        let mut done = 0;
        while done < len {
            let here = at.checked_add(done)?;
            let part = (PAGE - here % PAGE).min(len - done);
            let found = space.walk(memory, Gva(here)).ok()?;
            // As the loader itself could: a page that it may only read may be others' too.
            if !found.user || (writes && !found.writable) || !each(found.at.0, done, done + part) {
                return None;
            }
            done += part;
        }
        Some(())
    }
}

/// How long a loader has to say its first word once it was executed.
pub const FIRST_WORD: Duration = Duration::from_secs(10);
