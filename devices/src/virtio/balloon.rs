//! The memory balloon (virtio 1.2 §5.5): pages that the guest gives back, because it was asked to or because they are free.
//!
//! ```text
//!  BalloonControl ── target ──▶ configuration change ──▶ driver
//!  driver ── inflateq: page numbers ──────┐
//!         ── reporting_vq: free memory ───┴─▶ runs of whole pages in RAM ──▶ PageRelease
//!         ── deflateq ── nothing to be done: a page is there again when it is touched
//!         ── statsq: one buffer that waits here and goes back when numbers are wanted
//! ```
//!
//! What happens to a page is not the balloon's to decide: [`PageRelease`] is the monitor's.
//!
//! MUST_TELL_HOST is not offered, so that a guest that runs out of memory takes its pages back without waiting for us. Free page
//! hinting is not offered either: it is for a migration.
//!
//! Where is the reporting queue? At index 4, says the specification; but Linux (until 6.10 at least) counts only the queues that it
//! uses, and finds it at 3, or at 2 if it wants no statistics. Queues 3 and 4 exist, and whichever the driver enables is taken for
//! it: nothing else could be meant, for queue 3 belongs to hinting.
//!
//! Page poison (§5.5.6.6): a guest that fills its free pages with a value expects to find it in pages that it reported. A released
//! page reads as zero, so reports count only if that value is zero, or there is none.
//!
//! Invariants:
//! * only whole pages that the guest named and that lie in RAM are released, and before their buffer is given back;
//! * a turn releases a bounded number of pages, then looks at its commands;
//! * no buffer is ever kept: the one with statistics stays in the ring until it is to go back.

mod pages;
mod statistics;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use pages::PAGE;
pub use statistics::Statistics;

use super::areas::Areas;
use super::ring::{RING_FEATURES, Ring, Served};
use super::state::{BalloonStateV1, DeviceState, StateError};
use super::worker::{Fault, Handler, Worker, Workers};
use super::{
    ActivateError, Activation, DeviceType, GuestRam, Interrupt, OncePerReset, VirtioDevice, read_config_bytes,
};
use crate::counters::{Counter, Counters};

/// Linux reports 32 areas at once and wants a descriptor for each.
const QUEUE_SIZE: u16 = 64;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;
/// Where drivers look for the reporting queue, the place that the specification gives it first.
const REPORTING_AT: [u16; 3] = [4, 3, STATISTICS];
const QUEUES: usize = 5;

const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_POISON: u64 = 1 << 4;
const F_PAGE_REPORTING: u64 = 1 << 5;

/// Where fields of the configuration lie (§5.5.4).
const CONFIG_LEN: usize = 16;
const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const POISON_VAL: usize = 12;

/// Page numbers taken from one buffer; what comes after them stays with the guest. Linux sends 256.
const MAX_LISTED: usize = 1 << 16;
/// Pages after which a turn ends.
const TURN_PAGES: u64 = 1 << 16;

/// Takes pages that the guest has no use for.
pub trait PageRelease: Send + Sync {
    /// Gives up the contents of `len` bytes at the guest-physical address `gpa`: whole pages of one region of RAM. Whoever
    /// reads them afterwards finds zeroes, or what was there; never anything older. False where they are to stay, which is no
    /// error.
    ///
    /// # Errors
    /// When nothing could be given up. The pages are then the guest's as before.
    fn release(&self, gpa: u64, len: u64) -> io::Result<bool>;
}

/// A virtio memory balloon.
pub struct Balloon {
    shared: Arc<Shared>,
    release: Arc<dyn PageRelease>,
}

impl Balloon {
    /// A balloon that wants `target` pages of the guest and hands what it gets to `release`.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn new(release: Arc<dyn PageRelease>, target: u32) -> io::Result<Self> {
        let shared = Shared {
            target: AtomicU32::new(target),
            actual: AtomicU32::new(0),
            poison: AtomicU32::new(0),
            retargeted: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            heard: Mutex::default(),
            counters: Arc::default(),
        };
        Ok(Self { shared: Arc::new(shared), release })
    }

    /// The balloon's handle for its owner.
    pub fn control(&self) -> BalloonControl {
        BalloonControl(Arc::clone(&self.shared))
    }

    /// What serves the queues of `activation` that have a meaning, and their kicks.
    fn handler(&self, activation: &mut Activation) -> Result<(BalloonHandler, Vec<EventFd>), ActivateError> {
        let has = |feature: u64| activation.features & feature != 0;
        let enabled = |index: &u16| activation.queues.iter().any(|queue| queue.index == *index);
        let statistics = Some(STATISTICS).filter(|index| has(F_STATS_VQ) && enabled(index));
        let reporting = REPORTING_AT.into_iter().find(|index| enabled(index) && statistics != Some(*index));
        let reporting = reporting.filter(|_| has(F_PAGE_REPORTING));
        let desk = Desk {
            shared: Arc::clone(&self.shared),
            release: Arc::clone(&self.release),
            ram: Arc::clone(&activation.ram),
            poisoned: has(F_PAGE_POISON),
            listened: false,
            complained: OncePerReset::default(),
        };
        let roles = [
            (Role::Inflate, Some(INFLATE)),
            (Role::Deflate, Some(DEFLATE)),
            (Role::Statistics, statistics),
            (Role::Reporting, reporting),
        ];
        let (mut queues, mut kicks) = (Vec::new(), Vec::new());
        for (role, index) in roles {
            let Some(index) = index else { continue };
            let (ring, kick) = Ring::take(activation, index)?;
            queues.push((role, ring));
            kicks.push(kick);
        }
        let interrupt = Arc::clone(&activation.interrupt);
        Ok((BalloonHandler { queues, desk, interrupt }, kicks))
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let fields =
            [(NUM_PAGES, &self.shared.target), (ACTUAL, &self.shared.actual), (POISON_VAL, &self.shared.poison)];
        for (at, field) in fields {
            config[at..at + 4].copy_from_slice(&field.load(Ordering::Acquire).to_le_bytes());
        }
        config
    }

    /// Takes over the fields that are the driver's to write.
    fn set_config(&self, config: &[u8; CONFIG_LEN]) {
        for (at, field) in [(ACTUAL, &self.shared.actual), (POISON_VAL, &self.shared.poison)] {
            let bytes = config[at..at + 4].try_into().unwrap_or_default();
            field.store(u32::from_le_bytes(bytes), Ordering::Release);
        }
    }
}

/// What the balloon is asked for and what it knows. Callable from any thread, whatever the device does; never waits for it.
#[derive(Clone)]
pub struct BalloonControl(Arc<Shared>);

impl BalloonControl {
    /// Asks the guest to have `pages` pages of [`PAGE`] bytes in the balloon. It does as it can and as it likes, in its own time.
    pub fn set_target(&self, pages: u32) {
        self.0.target.store(pages, Ordering::Release);
        self.0.retargeted.store(true, Ordering::Release);
        self.0.wake();
    }

    /// How many pages the balloon is to hold.
    pub fn target(&self) -> u32 {
        self.0.target.load(Ordering::Acquire)
    }

    /// How many it holds, as the guest says.
    pub fn actual(&self) -> u32 {
        self.0.actual.load(Ordering::Acquire)
    }

    /// Asks the guest for new statistics, which [`BalloonControl::statistics`] gives once they are there.
    pub fn request_statistics(&self) {
        self.0.asked.store(true, Ordering::Release);
        self.0.wake();
    }

    /// What the guest last said of its memory, and how many times it has said something since the device was made.
    pub fn statistics(&self) -> (Statistics, u64) {
        *self.0.heard()
    }
}

struct Shared {
    target: AtomicU32,
    actual: AtomicU32,
    poison: AtomicU32,
    /// The driver is to look at the target.
    retargeted: AtomicBool,
    /// Statistics are wanted.
    asked: AtomicBool,
    /// Written after either was set.
    wake: EventFd,
    /// The last statistics, and their number.
    heard: Mutex<(Statistics, u64)>,
    counters: Arc<BalloonCounters>,
}

impl Shared {
    fn wake(&self) {
        // Fails only when the counter is full, which is a wake-up too.
        let _ = self.wake.write(1);
    }

    fn heard(&self) -> MutexGuard<'_, (Statistics, u64)> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        RING_FEATURES | F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_POISON | F_PAGE_REPORTING
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut config = self.config();
        let Some(places) = usize::try_from(offset).ok().and_then(|offset| config.get_mut(offset..)) else {
            return;
        };
        for (place, byte) in places.iter_mut().zip(data) {
            *place = *byte;
        }
        self.set_config(&config);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Workers, ActivateError> {
        let (handler, kicks) = self.handler(&mut activation)?;
        let worker = Worker::spawn("balloon", kicks, handler, &activation);
        Ok(worker.map_err(ActivateError::Worker)?.into())
    }

    fn reset(&mut self) {
        // The target is its owner's; the rest was the driver's.
        self.set_config(&[0; CONFIG_LEN]);
    }

    fn save(&self) -> DeviceState {
        let read = |field: &AtomicU32| field.load(Ordering::Acquire);
        let Shared { target, actual, poison, .. } = &*self.shared;
        DeviceState::Balloon(BalloonStateV1 { target: read(target), actual: read(actual), poison: read(poison) })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Balloon(BalloonStateV1 { target, actual, poison }) = state else {
            return Err(StateError::WrongDevice("memory balloon"));
        };
        self.shared.actual.store(actual, Ordering::Release);
        self.shared.poison.store(poison, Ordering::Release);
        // The driver may not have heard of it: a change of the target that was on its way is in no state.
        self.control().set_target(target);
        Ok(())
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.shared.counters) as _
    }
}

#[derive(Default)]
struct BalloonCounters {
    inflated: Counter,
    deflated: Counter,
    reported: Counter,
    released: Counter,
    ignored: Counter,
    errors: Counter,
}

impl Counters for BalloonCounters {
    fn read(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("inflated_pages", self.inflated.get()),
            ("deflated_pages", self.deflated.get()),
            ("reported_pages", self.reported.get()),
            ("released_pages", self.released.get()),
            ("ignored_pages", self.ignored.get()),
            ("errors", self.errors.get()),
        ]
    }
}

#[derive(Clone, Copy)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

struct BalloonHandler {
    /// In the order of their kicks.
    queues: Vec<(Role, Ring)>,
    desk: Desk,
    interrupt: Arc<dyn Interrupt>,
}

impl Handler for BalloonHandler {
    fn sources(&self) -> Vec<(RawFd, u16)> {
        vec![(self.desk.shared.wake.as_raw_fd(), 0)]
    }

    fn kicked(&mut self, position: usize) -> Result<(), Fault> {
        let Self { queues, desk, .. } = self;
        let Some((role, ring)) = queues.get_mut(position) else { return Ok(()) };
        let mut left = TURN_PAGES;
        match role {
            Role::Inflate => ring.serve(|chain| desk.within(&mut left, |desk| desk.inflate(chain.readable)))?,
            Role::Reporting => ring.serve(|chain| desk.within(&mut left, |desk| desk.report(&chain.writable)))?,
            Role::Deflate => ring.serve(|chain| {
                desk.shared.counters.deflated.add((chain.readable.len() / pages::NUMBER) as u64);
                Ok(Served::Used(0))
            })?,
            Role::Statistics => ring.serve(|chain| Ok(desk.listen(chain.readable)))?,
        }
        if left == 0 { ring.kick_self() } else { Ok(()) }
    }

    fn ready(&mut self, _token: u16) -> Result<(), Fault> {
        let _ = self.desk.shared.wake.read();
        if self.desk.shared.retargeted.swap(false, Ordering::AcqRel) {
            self.interrupt.config();
        }
        match self.queues.iter().position(|(role, _)| matches!(role, Role::Statistics)) {
            Some(position) => self.kicked(position),
            None => Ok(()),
        }
    }

    fn rings(&self) -> Vec<&Ring> {
        self.queues.iter().map(|(_, ring)| ring).collect()
    }
}

/// Answers buffers; knows nothing of rings.
struct Desk {
    shared: Arc<Shared>,
    release: Arc<dyn PageRelease>,
    ram: GuestRam,
    /// The driver said what it fills free pages with.
    poisoned: bool,
    /// The statistics that wait in the ring were read.
    listened: bool,
    complained: OncePerReset,
}

impl Desk {
    /// Does `work` if the turn is not over, and takes the pages that it was about from what is `left` of it.
    fn within(&self, left: &mut u64, work: impl FnOnce(&Self) -> u64) -> Result<Served, Fault> {
        if *left == 0 {
            return Ok(Served::NotNow);
        }
        *left = left.saturating_sub(work(self));
        Ok(Served::Used(0))
    }

    /// Releases the listed pages; returns how many are listed.
    fn inflate(&self, list: Areas<'_>) -> u64 {
        let listed = (list.len() / pages::NUMBER) as u64;
        let named = pages::listed(list, MAX_LISTED);
        let counters = &self.shared.counters;
        counters.inflated.add(listed);
        counters.ignored.add(listed.saturating_sub(MAX_LISTED as u64));
        self.give(named);
        listed.min(MAX_LISTED as u64)
    }

    /// Releases free memory, if the guest does not mind finding it zeroed; returns how many pages.
    fn report(&self, free: &Areas<'_>) -> u64 {
        let counters = &self.shared.counters;
        counters.reported.add(free.len() as u64 / PAGE);
        if self.poisoned && self.shared.poison.load(Ordering::Acquire) != 0 {
            counters.ignored.add(free.len() as u64 / PAGE);
            return 0;
        }
        self.give(free.ranges(&self.ram).collect())
    }

    /// Releases the whole pages of `named` that are RAM; returns how many.
    fn give(&self, named: Vec<Range<u64>>) -> u64 {
        let counters = &self.shared.counters;
        let mut pages = 0;
        for run in pages::runs(named) {
            let mut outside = (run.end - run.start) / PAGE;
            for part in pages::in_ram(&self.ram, &run) {
                let count = (part.end - part.start) / PAGE;
                outside -= count;
                pages += count;
                match self.release.release(part.start, part.end - part.start) {
                    Ok(true) => counters.released.add(count),
                    Ok(false) => counters.ignored.add(count),
                    Err(error) => {
                        counters.errors.add(1);
                        if self.complained.first() {
                            warn!(device = "balloon", "{error}: pages that the guest gave back stay allocated");
                        }
                    }
                }
            }
            counters.ignored.add(outside);
        }
        pages
    }

    /// Reads the statistics that wait, and gives the buffer back for new ones if they are wanted.
    fn listen(&mut self, buffer: Areas<'_>) -> Served {
        if !self.listened {
            let mut heard = self.shared.heard();
            *heard = (Statistics::read(buffer), heard.1 + 1);
            self.listened = true;
        }
        if self.shared.asked.swap(false, Ordering::AcqRel) {
            self.listened = false;
            return Served::Used(0);
        }
        Served::NotNow
    }
}
