//! One queue of a block device: takes requests from the ring in batches, has them carried out in any order, gives them back.
//!
//! ```text
//!  ring ── begin ──▶ Flight, in a slot ── jobs ──▶ Engine
//!   ▲                                                │
//!   └──────────── land: status, used ◀───────────────┘
//! ```
//!
//! A batch costs one system call, and one interrupt if the driver wants any. No more requests are in flight than the ring has
//! entries: what comes beyond that stays in the ring until one lands.
//!
//! After `drain` every request that was taken has been given back.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::warn;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

use super::counters::BlockCounters;
use super::disk::Disk;
use super::engine::Engine;
use super::flight::{Flight, Work};
use super::job::Job;
use super::request::{Refusal, Request, Terms};
use super::{ID_LEN, QUEUE_SIZE};
use crate::virtio::areas::Areas;
use crate::virtio::held::HeldAreas;
use crate::virtio::rate::RateLimiter;
use crate::virtio::ring::{Chain, Ring};
use crate::virtio::worker::{Fault, Handler};
use crate::virtio::{GuestRam, OncePerReset};

/// Tokens among [`Handler::sources`]: the engine, and the rate's timer.
const DONE: u16 = 0;
const PACE: u16 = 1;

/// What the queues of a device share while it is active.
pub struct Shared {
    pub name: String,
    pub disk: Arc<Disk>,
    pub id: [u8; ID_LEN],
    pub features: u64,
    /// Writes need not be on the disk when they are answered: the driver flushes.
    pub write_back: Arc<AtomicBool>,
    pub counters: Arc<BlockCounters>,
    pub complained: OncePerReset,
}

/// What a request counts as once it succeeded.
#[derive(Clone, Copy)]
enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

/// A request that was taken from the ring.
struct Taken {
    head: u16,
    kind: Kind,
    bytes: u64,
    flight: Flight,
    status: HeldAreas,
    /// The used lengths of a request that succeeded, and of one that failed.
    used: (u32, u32),
}

/// The worker's side of a queue.
pub struct BlockQueue {
    ring: Ring,
    shared: Arc<Shared>,
    engine: Engine,
    taken: Vec<Option<Taken>>,
    free: Vec<u32>,
    /// Something was given back of which the driver was not told.
    untold: bool,
    limiter: Option<RateLimiter>,
    /// The ring's next request has to wait for the rate.
    throttled: bool,
}

impl BlockQueue {
    /// Serves `ring` by means of `engine`, as fast as `limiter` allows.
    pub fn new(ring: Ring, shared: Arc<Shared>, engine: Engine, limiter: Option<RateLimiter>) -> Self {
        let slots = u32::from(QUEUE_SIZE);
        let taken = (0..slots).map(|_| None).collect();
        Self { ring, shared, engine, taken, free: (0..slots).rev().collect(), untold: false, limiter, throttled: false }
    }

    fn in_flight(&self) -> usize {
        self.taken.len() - self.free.len()
    }

    /// Moves on everything that can be moved on; bounded, whatever the driver does meanwhile.
    fn serve(&mut self) -> Result<(), Fault> {
        let ram = self.ring.ram();
        let mut budget = 2 * u32::from(self.ring.size());
        self.ring.ignore_kicks()?;
        loop {
            self.land_done()?;
            let mut waiting = true;
            while waiting && budget > 0 && !self.free.is_empty() {
                match self.ring.next(&ram)? {
                    Some(chain) => {
                        if !self.begin(chain, &ram)? {
                            self.ring.put_back(1);
                            break;
                        }
                        if self.engine.is_direct() {
                            // At once: the driver can go on while the next request waits for its disk.
                            self.land_done()?;
                            self.tell()?;
                        }
                    }
                    None => waiting = false,
                }
                budget -= 1;
            }
            self.engine.submit().map_err(broken)?;
            // What the page cache had is done by now.
            let landed = self.land_done()?;
            self.tell()?;
            if budget == 0 {
                return self.ring.kick_self();
            }
            if waiting && !landed {
                // Full, or too fast: what lands next, or the timer, comes back here.
                return Ok(());
            }
            if !waiting && !landed && !self.ring.await_kick()? {
                return Ok(());
            }
        }
    }

    /// Waits for everything in flight and gives it back, as far as the ring lets it.
    fn settle(&mut self) {
        while self.in_flight() > 0 {
            if let Err(e) = self.engine.wait() {
                warn!(device = %self.shared.name, "cannot wait for requests: {e}");
                break;
            }
            // A broken ring is no reason to stop: memory must not be touched later.
            let _ = self.land_done();
        }
        let _ = self.tell();
    }

    /// Takes on a request; false when it has to wait for the rate.
    fn begin(&mut self, mut chain: Chain<'_>, ram: &GuestRam) -> Result<bool, Fault> {
        let room = chain.writable.len();
        let Some(data_room) = room.checked_sub(1) else {
            return Err(Fault(format!("block request {} has no status byte", chain.head)));
        };
        let answer = chain.writable.take(data_room);
        let hold = |areas: &Areas<'_>| {
            HeldAreas::new(areas, ram).ok_or_else(|| Fault("a buffer does not lie in guest memory".into()))
        };
        let status = hold(&chain.writable)?;
        // §2.7.8.2: `len` bytes from the start were written. The status counts when no gap lies before it.
        let used = |filled: usize| if filled == data_room { room } else { filled } as u32;
        let shared = Arc::clone(&self.shared);
        let terms = Terms { bytes: shared.disk.len(), read_only: shared.disk.read_only(), features: shared.features };
        let stable = !shared.write_back.load(Ordering::Relaxed);
        let request = terms.read(&mut chain.readable, data_room);
        let bytes = match request {
            Ok(Request::Read(_)) => data_room,
            Ok(Request::Write(_)) => chain.readable.len(),
            _ => 0,
        } as u64;
        if !self.may(bytes) {
            return Ok(false);
        }
        let (kind, filled, work) = match request {
            Ok(Request::Read(offset)) => {
                let work = Work::Transfer { write: false, offset, areas: hold(&answer)? };
                (Kind::Read, data_room, work)
            }
            Ok(Request::Write(offset)) => {
                let work = Work::Transfer { write: true, offset, areas: hold(&chain.readable)? };
                (Kind::Write, 0, work)
            }
            Ok(Request::Flush) => (Kind::Flush, 0, Work::Sync),
            Ok(Request::Discard(extents)) => (Kind::Discard, 0, Work::Discard(extents.into())),
            Ok(Request::WriteZeroes(extents)) => (Kind::WriteZeroes, 0, Work::WriteZeroes(extents.into())),
            Ok(Request::Identify) => {
                let filled = answer.copy_from(&shared.id);
                self.give_back(chain.head, &status, VIRTIO_BLK_S_OK, used(filled))?;
                return Ok(true);
            }
            Err(refusal) => {
                shared.counters.errors.add(1);
                let code = match refusal {
                    Refusal::Unsupported => VIRTIO_BLK_S_UNSUPP,
                    Refusal::Invalid => VIRTIO_BLK_S_IOERR,
                };
                self.give_back(chain.head, &status, code, used(0))?;
                return Ok(true);
            }
        };
        let flight = Flight::new(work, stable);
        let taken = Taken { head: chain.head, kind, bytes, flight, status, used: (used(filled), used(0)) };
        let Some(slot) = self.free.pop() else { return Err(Fault("more requests than the queue has entries".into())) };
        let next = self.taken[slot as usize].insert(taken).flight.next(&shared.disk);
        self.go_on(slot, next)?;
        Ok(true)
    }

    /// Whether the rate lets a request of `bytes` through now. If not, the timer says when.
    fn may(&mut self, bytes: u64) -> bool {
        let may = self.limiter.as_mut().is_none_or(|limiter| limiter.take(bytes));
        if !may && !self.throttled {
            self.shared.counters.throttled.add(1);
        }
        self.throttled = !may;
        may
    }

    /// Takes in what is done; true if anything was.
    fn land_done(&mut self) -> Result<bool, Fault> {
        let mut any = false;
        while let Some((slot, result)) = self.engine.next_done() {
            any = true;
            let Some(Some(taken)) = self.taken.get_mut(slot as usize) else { continue };
            let next = match result {
                Ok(()) => taken.flight.next(&self.shared.disk),
                Err(error) => taken.flight.recover(&self.shared.disk, error),
            };
            self.go_on(slot, next)?;
        }
        Ok(any)
    }

    /// Begins the request's next job, or lands it.
    fn go_on(&mut self, slot: u32, next: io::Result<Option<Job>>) -> Result<(), Fault> {
        let code = match next {
            Ok(Some(job)) => {
                self.engine.begin(slot, job);
                return Ok(());
            }
            Ok(None) => VIRTIO_BLK_S_OK,
            Err(error) => {
                self.shared.counters.errors.add(1);
                if self.shared.complained.first() {
                    warn!(device = %self.shared.name, "{error}: the guest gets an I/O error");
                }
                VIRTIO_BLK_S_IOERR
            }
        };
        let Some(taken) = self.taken[slot as usize].take() else { return Ok(()) };
        self.free.push(slot);
        if code == VIRTIO_BLK_S_OK {
            self.count(&taken);
        }
        let used = if code == VIRTIO_BLK_S_OK { taken.used.0 } else { taken.used.1 };
        self.give_back(taken.head, &taken.status, code, used)
    }

    fn count(&self, taken: &Taken) {
        let counters = &self.shared.counters;
        match taken.kind {
            Kind::Read => {
                counters.reads.add(1);
                counters.read_bytes.add(taken.bytes);
            }
            Kind::Write => {
                counters.writes.add(1);
                counters.written_bytes.add(taken.bytes);
            }
            Kind::Flush => counters.flushes.add(1),
            Kind::Discard => counters.discards.add(1),
            Kind::WriteZeroes => counters.write_zeroes.add(1),
        }
    }

    fn give_back(&mut self, head: u16, status: &HeldAreas, code: u32, used: u32) -> Result<(), Fault> {
        status.copy_from(&[code as u8]);
        self.untold = true;
        self.ring.used(head, used)
    }

    /// Interrupts the driver if it wants to hear of what was given back.
    fn tell(&mut self) -> Result<(), Fault> {
        if std::mem::take(&mut self.untold) { self.ring.notify() } else { Ok(()) }
    }
}

impl Handler for BlockQueue {
    fn sources(&self) -> Vec<(RawFd, u16)> {
        let engine = self.engine.sources().into_iter().map(|fd| (fd, DONE));
        engine.chain(self.limiter.iter().map(|limiter| (limiter.as_raw_fd(), PACE))).collect()
    }

    fn kicked(&mut self, _position: usize) -> Result<(), Fault> {
        // What was in flight before the fault may still write memory: that ends before the driver is told.
        self.serve().inspect_err(|_| self.settle())
    }

    fn ready(&mut self, token: u16) -> Result<(), Fault> {
        if let (PACE, Some(limiter)) = (token, &mut self.limiter) {
            limiter.expired();
        }
        self.kicked(0)
    }

    fn drain(&mut self) {
        self.settle();
        // Whoever saves or copies the disk now looks at the file.
        if let Err(e) = self.shared.disk.write_back() {
            warn!(device = %self.shared.name, "cannot bring the disk image up to date: {e}");
        }
    }

    fn rings(&self) -> Vec<&Ring> {
        vec![&self.ring]
    }
}

fn broken(error: io::Error) -> Fault {
    Fault(format!("the io_uring failed: {error}"))
}
