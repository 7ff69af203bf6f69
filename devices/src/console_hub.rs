//! One guest console port, shared by any number of clients.
//!
//! ```text
//!  vCPU / device thread                       hub thread (poll)                      clients
//!  guest_output ─► ring of the last bytes ─► a cursor per client ─► socketpair ─────► attach()
//!                                         └► a cursor for the log file
//!  ConsoleInput::offer ◄─────────────────── the client's unsent bytes ◄─ socketpair ◄─ writes
//!  input_ready ──────► eventfd ───────────►
//! ```
//!
//! Output has one ring; a client is a cursor into it. One that falls behind by more than the ring loses the oldest bytes
//! and is told how many. Input is read from a client only after the guest's side took all that was read before, so a
//! client that writes faster than the guest reads is held back by its own socket, and nothing is dropped.
//!
//! Invariants:
//! * [`ConsoleHub::guest_output`] and [`ConsoleHub::input_ready`] make no system call but an eventfd write, and wait for
//!   nothing but the ring's lock, under which only memory is copied (at most [`CHUNK_BYTES`] at a time by the hub);
//! * memory is bounded: the ring, and [`CHUNK_BYTES`] per client;
//! * locks: `ring` and `sink` are leaves; the hub thread calls [`ConsoleInput::offer`] with neither held, so a device may
//!   call the hub with its own lock held and take that lock in `offer`.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use civic_confine::Kind;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::counters::{Counter, Counters};

/// Most clients of one port.
pub const MAX_CLIENTS: usize = 32;
/// Most bytes read, written or copied at once.
const CHUNK_BYTES: usize = 4096;
/// Least size of the ring: a client with less would lose output to an ordinary scheduling delay.
const MIN_RING_BYTES: usize = 64 << 10;
/// The log starts over when it has grown to this: a guest must not fill the host's disk.
const MAX_LOG_BYTES: u64 = 16 << 20;
/// Chunks moved for one client before the next has its turn.
const TURN_CHUNKS: usize = 16;

/// The guest's side of a console's input.
pub trait ConsoleInput: Send + Sync {
    /// Takes as many of `bytes` as fit, from the front, and returns how many. A device that took less than all must call
    /// [`ConsoleHub::input_ready`] once there is room again. Must not block; called on the hub's thread.
    fn offer(&self, bytes: &[u8]) -> usize;
}

/// A guest console port. See the module's documentation.
pub struct ConsoleHub {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    name: String,
    history_bytes: usize,
    /// Leaf lock.
    ring: Mutex<Ring>,
    /// Leaf lock.
    sink: Mutex<Option<Arc<dyn ConsoleInput>>>,
    wake: EventFd,
    /// The eventfd is written and not yet read: saves the system call per byte of a serial port.
    woken: AtomicBool,
    clients: AtomicUsize,
    output_bytes: Counter,
    input_bytes: Counter,
    lost_bytes: Counter,
}

/// The last bytes of output. Positions count from the port's first byte and never wrap in practice (u64).
struct Ring {
    bytes: VecDeque<u8>,
    capacity: usize,
    end: u64,
    newcomers: Vec<Client>,
    /// Set by [`ConsoleHub::finish`]: no more output is taken, and when to give up delivering.
    deadline: Option<Instant>,
}

impl Ring {
    fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    fn push(&mut self, output: &[u8]) {
        let kept = &output[output.len().saturating_sub(self.capacity)..];
        let excess = (self.bytes.len() + kept.len()).saturating_sub(self.capacity);
        self.bytes.drain(..excess);
        self.bytes.extend(kept);
        self.end += output.len() as u64;
    }

    /// Copies what follows `cursor` into `chunk`; returns how much, and how many bytes before it are gone.
    fn copy(&self, cursor: &mut u64, chunk: &mut [u8; CHUNK_BYTES]) -> (usize, u64) {
        let lost = self.start().saturating_sub(*cursor);
        *cursor += lost;
        let skip = (*cursor - self.start()) as usize;
        let mut len = 0;
        let (front, back) = self.bytes.as_slices();
        for part in [front.get(skip..).unwrap_or(&[]), back.get(skip.saturating_sub(front.len())..).unwrap_or(&[])] {
            let n = part.len().min(CHUNK_BYTES - len);
            chunk[len..len + n].copy_from_slice(&part[..n]);
            len += n;
        }
        (len, lost)
    }
}

/// The hub's end of a client. Owned by the hub thread once it has been taken from `newcomers`.
struct Client {
    stream: UnixStream,
    /// Next byte of output to send.
    cursor: u64,
    /// A notice of lost output, to be sent before anything else.
    notice: Vec<u8>,
    /// Read from the client, not yet taken by the guest.
    input: Vec<u8>,
    /// The client will write no more: it shut down its writing half, or closed.
    input_ended: bool,
    /// The client reads no more: it closed.
    output_ended: bool,
}

impl ConsoleHub {
    /// A port called `name` whose clients first see its last `history_bytes` of output. `log`, if given, gets all output
    /// and starts over at 16 MiB. Fails when the host refuses an eventfd or a thread.
    pub fn new(name: impl Into<String>, history_bytes: usize, log: Option<File>) -> io::Result<Arc<Self>> {
        let name = name.into();
        let shared = Arc::new(Shared {
            history_bytes,
            ring: Mutex::new(Ring {
                bytes: VecDeque::new(),
                capacity: history_bytes.max(MIN_RING_BYTES),
                end: 0,
                newcomers: Vec::new(),
                deadline: None,
            }),
            sink: Mutex::new(None),
            wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            woken: AtomicBool::new(false),
            clients: AtomicUsize::new(0),
            output_bytes: Counter::default(),
            input_bytes: Counter::default(),
            lost_bytes: Counter::default(),
            name,
        });
        let hub = HubThread { shared: shared.clone(), clients: Vec::new(), log: log.map(Log::new) };
        let thread = std::thread::Builder::new().name(format!("con-{}", shared.name)).spawn(move || {
            civic_confine::thread(Kind::Device);
            hub.run()
        })?;
        Ok(Arc::new(Self { shared, thread: Mutex::new(Some(thread)) }))
    }

    /// The port's name, as clients ask for it.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Takes what the guest printed. Never waits for a client or a file; called from vCPU and device threads.
    pub fn guest_output(&self, bytes: &[u8]) {
        let mut ring = self.shared.ring();
        if ring.deadline.is_some() {
            return;
        }
        ring.push(bytes);
        drop(ring);
        self.shared.output_bytes.add(bytes.len() as u64);
        self.shared.wake();
    }

    /// A new client: the stream first yields the history, then live output; what is written to it is guest input. Close
    /// it to detach. A client that only shuts down its writing half goes on receiving.
    ///
    /// Fails with [`io::ErrorKind::ResourceBusy`] at [`MAX_CLIENTS`] and [`io::ErrorKind::NotConnected`] after `finish`.
    pub fn attach(&self) -> io::Result<UnixStream> {
        let (theirs, ours) = UnixStream::pair()?;
        self.adopt(ours, Vec::new())?;
        Ok(theirs)
    }

    /// As [`Self::attach`] for a client that has a stream already, `stream` being our end of it. `input` is what the
    /// client sent before now.
    pub fn adopt(&self, stream: UnixStream, input: Vec<u8>) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let mut ring = self.shared.ring();
        self.check_room(&ring)?;
        // Counted up only here, under the ring's lock, so the limit holds.
        self.shared.clients.fetch_add(1, Ordering::Relaxed);
        let cursor = ring.start().max(ring.end.saturating_sub(self.shared.history_bytes as u64));
        let notice = Vec::new();
        ring.newcomers.push(Client { stream, cursor, notice, input, input_ended: false, output_ended: false });
        drop(ring);
        self.shared.wake();
        Ok(())
    }

    /// Whether a client could attach now; the error is the one it would get.
    pub fn has_room(&self) -> io::Result<()> {
        self.check_room(&self.shared.ring())
    }

    fn check_room(&self, ring: &Ring) -> io::Result<()> {
        if ring.deadline.is_some() {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "the console has ended"));
        }
        if self.shared.clients.load(Ordering::Relaxed) >= MAX_CLIENTS {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, format!("the console has {MAX_CLIENTS} clients")));
        }
        Ok(())
    }

    /// Sends input to `sink` from now on, in place of the one before. Until the first, clients' input waits.
    pub fn connect_input(&self, sink: Arc<dyn ConsoleInput>) {
        let before = self.shared.sink().replace(sink);
        drop(before); // Outside the lock: it may own the device.
        self.shared.wake();
    }

    /// There is room again in the sink. Cheap: callable at every read of a device register.
    pub fn input_ready(&self) {
        self.shared.wake();
    }

    /// Takes no more output, delivers what is buffered for at most `patience`, closes every client and forgets the sink.
    /// For the machine's end; a second call does nothing.
    pub fn finish(&self, patience: Duration) {
        self.shared.ring().deadline.get_or_insert_with(|| Instant::now() + patience);
        self.shared.wake();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join(); // A panic in it has been reported by the panic hook.
        }
    }
}

impl Drop for ConsoleHub {
    fn drop(&mut self) {
        // No join: the last reference may be the sink's, dropped by the hub thread itself.
        self.shared.ring().deadline.get_or_insert_with(Instant::now);
        self.shared.wake();
    }
}

impl Counters for ConsoleHub {
    fn read(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("output_bytes", self.shared.output_bytes.get()),
            ("input_bytes", self.shared.input_bytes.get()),
            ("lost_bytes", self.shared.lost_bytes.get()),
            ("clients", self.shared.clients.load(Ordering::Relaxed) as u64),
        ]
    }
}

impl Shared {
    // A poisoned lock still guards consistent data: no code under either lock can panic half-way through a change.
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sink(&self) -> MutexGuard<'_, Option<Arc<dyn ConsoleInput>>> {
        self.sink.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            // Fails only when the counter is full, which is a wake-up too.
            let _ = self.wake.write(1);
        }
    }
}

struct HubThread {
    shared: Arc<Shared>,
    clients: Vec<Client>,
    log: Option<Log>,
}

impl HubThread {
    fn run(mut self) {
        let mut busy = false;
        loop {
            if let Err(error) = self.wait(busy) {
                tracing::error!(port = self.shared.name, %error, "console: cannot wait for clients");
                std::thread::sleep(Duration::from_millis(100));
            }
            let deadline = {
                let mut ring = self.shared.ring();
                self.clients.append(&mut ring.newcomers);
                ring.deadline
            };
            busy = self.serve();
            if let Some(deadline) = deadline
                && (self.delivered() || Instant::now() >= deadline)
            {
                break;
            }
        }
        self.shared.clients.store(0, Ordering::Relaxed);
        let sink = self.shared.sink().take();
        drop(sink);
    }

    /// Sleeps until the guest, a client or the deadline needs the thread; `busy` only looks.
    fn wait(&mut self, busy: bool) -> io::Result<()> {
        let (end, deadline) = {
            let ring = self.shared.ring();
            (ring.end, ring.deadline)
        };
        let mut fds = vec![PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN)];
        let mut polled = Vec::new();
        for (index, client) in self.clients.iter().enumerate() {
            let mut events = PollFlags::empty();
            if !client.input_ended && client.input.is_empty() {
                events |= PollFlags::POLLIN;
            }
            if !client.output_ended && client.has_output(end) {
                events |= PollFlags::POLLOUT;
            }
            // A closed peer is reported even when not asked for: leave it out once known, or poll would return for ever
            // while its last input waits for the guest.
            if !events.is_empty() || !client.output_ended {
                fds.push(PollFd::new(client.stream.as_fd(), events));
                polled.push(index);
            }
        }
        let timeout = match deadline {
            _ if busy => PollTimeout::ZERO,
            None => PollTimeout::NONE,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now()).as_millis().saturating_add(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let closed = |fd: &PollFd<'_>| {
            fd.revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
        };
        let closed: Vec<bool> = fds[1..].iter().map(closed).collect();
        for (index, closed) in polled.into_iter().zip(closed) {
            self.clients[index].output_ended |= closed;
        }
        // Forget the wake-up before looking at what it was for, or one in between would be lost.
        let _ = self.shared.wake.read();
        self.shared.woken.swap(false, Ordering::AcqRel); // A swap: it must see what a waker that found `true` did before.
        Ok(())
    }

    /// Gives every client and the log a turn. Returns whether some of it could go on at once.
    fn serve(&mut self) -> bool {
        let mut busy = false;
        if let Some(log) = &mut self.log {
            match log.take_turn(&self.shared) {
                Ok(more) => busy |= more,
                Err(error) => {
                    tracing::warn!(port = self.shared.name, %error, "console: the log ends here");
                    self.log = None;
                }
            }
        }
        // One sink for the whole turn; a new one wakes us again.
        let sink = self.shared.sink().clone();
        for client in &mut self.clients {
            busy |= client.send(&self.shared);
            busy |= client.receive(&self.shared, sink.as_deref());
        }
        let before = self.clients.len();
        self.clients.retain(|client| !client.is_gone());
        self.shared.clients.fetch_sub(before - self.clients.len(), Ordering::Relaxed);
        // Who was first should not always be first at a sink with little room.
        if self.clients.len() > 1 {
            self.clients.rotate_left(1);
        }
        busy
    }

    fn delivered(&self) -> bool {
        let ring = self.shared.ring();
        ring.newcomers.is_empty()
            && self.clients.iter().all(|client| client.output_ended || !client.has_output(ring.end))
            && self.log.as_ref().is_none_or(|log| log.cursor == ring.end)
    }
}

impl Client {
    fn has_output(&self, end: u64) -> bool {
        !self.notice.is_empty() || self.cursor < end
    }

    fn is_gone(&self) -> bool {
        self.output_ended && self.input_ended && self.input.is_empty()
    }

    /// Writes output until the socket is full, there is none, or the turn is over (true).
    fn send(&mut self, shared: &Shared) -> bool {
        let mut chunk = [0; CHUNK_BYTES];
        for _ in 0..TURN_CHUNKS {
            if self.output_ended {
                return false;
            }
            if !self.notice.is_empty() {
                match self.stream.write(&self.notice) {
                    Ok(n) => drop(self.notice.drain(..n)),
                    Err(error) => return self.send_failed(error),
                }
                continue;
            }
            let (len, lost) = shared.ring().copy(&mut self.cursor, &mut chunk);
            if lost > 0 {
                shared.lost_bytes.add(lost);
                self.notice = notice(lost);
                continue;
            }
            if len == 0 {
                return false;
            }
            match self.stream.write(&chunk[..len]) {
                Ok(n) => self.cursor += n as u64,
                Err(error) => return self.send_failed(error),
            }
        }
        true
    }

    /// False, or true to try again at once.
    fn send_failed(&mut self, error: io::Error) -> bool {
        match error.kind() {
            io::ErrorKind::WouldBlock => false,
            io::ErrorKind::Interrupted => true,
            _ => {
                self.output_ended = true;
                false
            }
        }
    }

    /// Reads input and offers it until the sink is full, there is none, or the turn is over (true).
    fn receive(&mut self, shared: &Shared, sink: Option<&dyn ConsoleInput>) -> bool {
        for _ in 0..TURN_CHUNKS {
            if !self.input.is_empty() {
                let taken = sink.map_or(0, |sink| sink.offer(&self.input)).min(self.input.len());
                shared.input_bytes.add(taken as u64);
                self.input.drain(..taken);
                if !self.input.is_empty() {
                    return false;
                }
            }
            if self.input_ended {
                return false;
            }
            self.input.resize(CHUNK_BYTES, 0);
            let read = self.stream.read(&mut self.input);
            self.input.truncate(*read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => self.input_ended = true,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.input_ended = true,
            }
        }
        true
    }
}

/// What a reader sees where output is missing.
fn notice(lost: u64) -> Vec<u8> {
    format!("\r\n[civic: {lost} bytes of output lost here]\r\n").into_bytes()
}

struct Log {
    file: File,
    cursor: u64,
    written: u64,
}

impl Log {
    fn new(file: File) -> Self {
        Self { file, cursor: 0, written: 0 }
    }

    /// Writes output until there is none or the turn is over (true).
    fn take_turn(&mut self, shared: &Shared) -> io::Result<bool> {
        let mut chunk = [0; CHUNK_BYTES];
        for _ in 0..TURN_CHUNKS {
            let (len, lost) = shared.ring().copy(&mut self.cursor, &mut chunk);
            if lost > 0 {
                shared.lost_bytes.add(lost);
                self.file.write_all(&notice(lost))?;
            }
            if len == 0 {
                return Ok(false);
            }
            if self.written + len as u64 > MAX_LOG_BYTES {
                self.file.set_len(0)?;
                self.file.seek(SeekFrom::Start(0))?;
                self.written = 0;
            }
            self.file.write_all(&chunk[..len])?;
            self.cursor += len as u64;
            self.written += len as u64;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
