//! Copies of what a card receives, for its *mirrors*: the cards of forks of its VM.
//!
//! ```text
//!  thread of pair 0 ── copy ──▶ batch ◀─ swap ─┐
//!                                              ├─ mirror thread, which has a batch too ── send ──▶ sinks
//!  thread of pair 1 ── copy ──▶ batch ◀─ swap ─┘
//! ```
//!
//! A frame is copied when it is read from the link with the cable in, whatever becomes of it then: also when no receive
//! buffer can hold it. A long one is copied out of receive buffers, so a guest that writes to them too early spoils the
//! copy.
//!
//! Invariants:
//! * while there is no sink there is neither thread nor batch, and a frame costs one relaxed load;
//! * a pair's thread waits for no sink: only for its batch's lock, under which the mirror thread swaps two pointers;
//! * memory is bounded, by [`MEMORY`] or what two frames for each pair take, and by the send buffers of the sinks'
//!   sockets. What does not fit is lost to the mirror, and counted;
//! * locks, in this order: `thread`, `state`, one of `queues`. The mirror thread does not take the first, and sends with
//!   none of them.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle, Thread, park};

use civic_confine::Kind;
use nix::errno::Errno;
use tracing::{debug, error, info};

use super::super::courtesy::wait_for_turns;
use super::MAX_FRAME;
use crate::counters::Counter;
use crate::mirror::{MirrorError, MirrorSink};

/// The most sinks of one card.
const MAX_SINKS: usize = 32;
/// Bytes of all batches together: some milliseconds of a fast link.
const MEMORY: usize = 4 << 20;
/// Frames of one batch.
const BATCH_FRAMES: usize = 4096;

/// A sink of a card's. No other ever has the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MirrorId(u64);

/// A card's mirrors. See the module's documentation.
pub struct Mirror {
    shared: Arc<Shared>,
    /// Of a thread that has ended by itself, until the next is started.
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    /// The card's.
    id: String,
    /// How many sinks there are.
    sinks: AtomicUsize,
    state: Mutex<State>,
    /// One for each pair; none while there is no thread.
    queues: Box<[Mutex<Option<Queue>>]>,
    frames: Counter,
    drops: Counter,
}

#[derive(Default)]
struct State {
    sinks: Vec<Arc<Sink>>,
    next: u64,
    /// There is a thread, and it will look at `sinks` again before it ends.
    running: bool,
    closed: bool,
}

struct Sink {
    id: MirrorId,
    sockets: MirrorSink,
    /// Gets no more.
    gone: AtomicBool,
}

struct Queue {
    batch: Batch,
    thread: Thread,
}

impl Mirror {
    pub(super) fn new(id: &str, pairs: usize) -> Self {
        let shared = Shared {
            id: id.to_owned(),
            sinks: AtomicUsize::new(0),
            state: Mutex::default(),
            queues: (0..pairs).map(|_| Mutex::default()).collect(),
            frames: Counter::default(),
            drops: Counter::default(),
        };
        Self { shared: Arc::new(shared), thread: Mutex::default() }
    }

    /// Feeds `sink` from now on, until it is removed or its far end is closed, which shows with the next frame. A reset of
    /// the guest's driver changes nothing.
    ///
    /// # Errors
    /// When there are too many, no thread is to be had, or the card is gone.
    pub fn add(&self, sink: MirrorSink) -> Result<MirrorId, MirrorError> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &self.shared;
        let mut state = shared.state();
        if state.closed {
            return Err(MirrorError::Gone);
        }
        if state.sinks.len() == MAX_SINKS {
            return Err(MirrorError::TooMany(MAX_SINKS));
        }
        if !state.running {
            // Since it said that it does not run, the last one takes no lock.
            finish(thread.take());
            let runner = Arc::clone(shared);
            let name = format!("mirror:{}", shared.id);
            let started = Builder::new()
                .name(name)
                .spawn(move || {
                    civic_confine::thread(Kind::Device);
                    runner.run()
                })
                .map_err(MirrorError::Thread)?;
            for pair in 0..shared.queues.len() {
                *shared.queue(pair) = Some(Queue { batch: shared.batch(), thread: started.thread().clone() });
            }
            *thread = Some(started);
            state.running = true;
        }
        let id = MirrorId(state.next);
        state.next += 1;
        state.sinks.push(Arc::new(Sink { id, sockets: sink, gone: AtomicBool::new(false) }));
        shared.sinks.store(state.sinks.len(), Ordering::Relaxed);
        Ok(id)
    }

    /// Feeds that sink no longer; false if it had gone already. One frame may be on its way to it still, unless it was the
    /// last.
    pub fn remove(&self, id: MirrorId) -> bool {
        self.remove_where(|sink| sink.id == id, false)
    }

    /// How many sinks there are.
    pub fn sinks(&self) -> usize {
        self.shared.sinks.load(Ordering::Relaxed)
    }

    /// Ends all of it, for good.
    pub(super) fn close(&self) {
        self.remove_where(|_| true, true);
    }

    fn remove_where(&self, goes: impl Fn(&Sink) -> bool, close: bool) -> bool {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.shared.state();
        state.closed |= close;
        let before = state.sinks.len();
        for sink in state.sinks.iter().filter(|sink| goes(sink)) {
            sink.gone.store(true, Ordering::Relaxed);
        }
        self.shared.forget_gone(&mut state);
        let (after, running) = (state.sinks.len(), state.running);
        drop(state);
        if after == 0 && (close || running) {
            finish(thread.take());
        }
        after < before
    }

    /// Whether frames are to be taken.
    pub(super) fn is_fed(&self) -> bool {
        self.shared.sinks.load(Ordering::Relaxed) != 0
    }

    /// Takes a frame of `len` bytes that came to `pair`: `copy` puts it down.
    pub(super) fn take(&self, pair: usize, len: usize, copy: impl FnOnce(&mut [u8])) {
        let shared = &self.shared;
        if let Some(queue) = &mut *shared.queue(pair) {
            match queue.batch.add(len) {
                Some(room) => copy(room),
                None => shared.drops.add(shared.sinks.load(Ordering::Relaxed) as u64),
            }
        }
    }

    /// Has what was taken from `pair` sent.
    pub(super) fn wake(&self, pair: usize) {
        if let Some(queue) = &*self.shared.queue(pair) {
            queue.thread.unpark();
        }
    }

    /// Frames sent, each to one sink.
    pub(super) fn frames(&self) -> u64 {
        self.shared.frames.get()
    }

    /// Frames lost, each to one sink.
    pub(super) fn drops(&self) -> u64 {
        self.shared.drops.get()
    }

    /// True when no memory is kept for frames.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        (0..self.shared.queues.len()).all(|pair| self.shared.queue(pair).is_none())
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.close();
    }
}

/// Waits for a thread that has nothing left to do.
fn finish(thread: Option<JoinHandle<()>>) {
    if let Some(thread) = thread {
        thread.thread().unpark();
        if thread.join().is_err() {
            error!("a mirror's thread panicked");
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(&self, pair: usize) -> MutexGuard<'_, Option<Queue>> {
        self.queues[pair].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that can be swapped with that of any pair.
    fn batch(&self) -> Batch {
        Batch::new((MEMORY / (self.queues.len() + 1)).max(2 * MAX_FRAME))
    }

    fn forget_gone(&self, state: &mut State) {
        state.sinks.retain(|sink| !sink.gone.load(Ordering::Relaxed));
        self.sinks.store(state.sinks.len(), Ordering::Relaxed);
    }

    /// The thread.
    fn run(&self) {
        if let Err(e) = wait_for_turns() {
            debug!(card = %self.id, "cannot choose how its mirror is scheduled: {e}");
        }
        let mut batch = self.batch();
        let mut sinks = Vec::new();
        loop {
            let mut idle = true;
            for pair in 0..self.queues.len() {
                if let Some(queue) = &mut *self.queue(pair) {
                    std::mem::swap(&mut queue.batch, &mut batch);
                }
                if !batch.ends.is_empty() {
                    idle = false;
                    self.send(pair, &batch, &mut sinks);
                    batch.ends.clear();
                }
            }
            if idle {
                if self.ends() {
                    return;
                }
                park();
            }
        }
    }

    /// Sends what came to `pair` to every sink. `sinks` is empty, before and after.
    fn send(&self, pair: usize, batch: &Batch, sinks: &mut Vec<Arc<Sink>>) {
        // Not before the batch was taken: whoever was added before the first frame of it gets it.
        sinks.extend(self.state().sinks.iter().cloned());
        let mut lost_one = false;
        for frame in batch.frames() {
            for sink in sinks.iter().filter(|sink| !sink.gone.load(Ordering::Relaxed)) {
                match sink.sockets.send(pair, frame) {
                    Ok(()) => self.frames.add(1),
                    // There was no room; there may be for the next.
                    Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM | Errno::EMSGSIZE | Errno::EINTR) => {
                        self.drops.add(1);
                    }
                    Err(e) => {
                        info!(card = %self.id, "a mirror has gone: {e}");
                        sink.gone.store(true, Ordering::Relaxed);
                        lost_one = true;
                    }
                }
            }
        }
        sinks.clear();
        if lost_one {
            self.forget_gone(&mut self.state());
        }
    }

    /// Whether the thread ends now: there is no sink.
    fn ends(&self) -> bool {
        let mut state = self.state();
        if !state.sinks.is_empty() {
            return false;
        }
        state.running = false;
        for pair in 0..self.queues.len() {
            *self.queue(pair) = None;
        }
        true
    }
}

/// Frames, one after another.
struct Batch {
    bytes: Box<[u8]>,
    /// Where each ends.
    ends: Vec<u32>,
}

impl Batch {
    fn new(bytes: usize) -> Self {
        Self { bytes: vec![0; bytes].into_boxed_slice(), ends: Vec::with_capacity(BATCH_FRAMES) }
    }

    /// Appends a frame of `len` bytes, and returns where it is to be put; none when there is no room.
    fn add(&mut self, len: usize) -> Option<&mut [u8]> {
        if self.ends.len() == BATCH_FRAMES {
            return None;
        }
        let start = self.ends.last().map_or(0, |&end| end as usize);
        let room = self.bytes.get_mut(start..start + len)?;
        self.ends.push((start + len) as u32);
        Some(room)
    }

    fn frames(&self) -> impl Iterator<Item = &[u8]> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let frame = &self.bytes[start..end as usize];
            start = end as usize;
            frame
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mirror::MirrorLink;
    use crate::virtio::net::FrameLink;
    use crate::virtio::testing::until;

    fn sink() -> (MirrorLink, MirrorSink) {
        let (link, there) = MirrorLink::pair().unwrap();
        (link, MirrorSink::new(vec![there]).unwrap())
    }

    #[test]
    fn a_batch_is_bounded_and_used_again() {
        let mut batch = Batch::new(1000);
        for _ in 0..2 {
            assert_eq!(batch.add(1001), None);
            batch.add(400).unwrap().fill(1);
            batch.add(600).unwrap().fill(2);
            assert_eq!(batch.add(1), None);
            assert_eq!(batch.frames().collect::<Vec<_>>(), [&[1; 400][..], &[2; 600]]);
            batch.ends.clear();
        }
        let mut batch = Batch::new(BATCH_FRAMES + 1);
        assert!((0..BATCH_FRAMES).all(|_| batch.add(1).is_some()));
        assert_eq!(batch.add(1), None);
    }

    #[test]
    fn the_longest_frame_has_room_with_any_number_of_pairs() {
        for pairs in [1, 2, super::super::MAX_PAIRS] {
            let bytes = Mirror::new("any", pairs).shared.batch().bytes.len();
            assert!(bytes >= 2 * MAX_FRAME && bytes * (pairs + 1) <= MEMORY.max(2 * MAX_FRAME * (pairs + 1)));
        }
    }

    /// Whatever keeps the thread, a pair's thread goes on, and each frame is sent or counted as lost, to each sink.
    #[test]
    fn a_full_queue_costs_frames_and_no_time() {
        let mirror = Mirror::new("full", 1);
        let (_links, sinks): (Vec<_>, Vec<_>) = (0..2).map(|_| sink()).unzip();
        for sink in sinks {
            mirror.add(sink).unwrap();
        }
        let keep = mirror.shared.state();
        for _ in 0..BATCH_FRAMES * 3 {
            mirror.take(0, 60, |bytes| bytes.fill(0));
            mirror.wake(0);
        }
        // One batch is with the thread, one is full.
        let lost = mirror.drops();
        assert!(lost >= 2 * BATCH_FRAMES as u64, "{lost}");
        assert_eq!(mirror.frames(), 0);
        drop(keep);
        until("frames", || mirror.frames() + mirror.drops() == 2 * 3 * BATCH_FRAMES as u64);
        assert!(mirror.frames() > 0);
    }

    #[test]
    fn sinks_come_and_go_while_frames_do() {
        let mirror = Mirror::new("busy", 2);
        let done = AtomicBool::new(false);
        /// Also when an assertion fails.
        struct Done<'a>(&'a AtomicBool);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        std::thread::scope(|scope| {
            for pair in 0..2 {
                let (mirror, done) = (&mirror, &done);
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        if mirror.is_fed() {
                            mirror.take(pair, 100, |bytes| bytes.fill(pair as u8));
                            mirror.wake(pair);
                        }
                        std::thread::yield_now();
                    }
                });
            }
            let _done = Done(&done);
            for round in 0..300 {
                let (link, there) = sink();
                let id = mirror.add(there).unwrap();
                if round % 3 == 0 {
                    let mut frame = [9; 200];
                    until("a frame", || nix::unistd::read(link.fd(), &mut frame) == Ok(100));
                    assert!(frame[0] < 2 && frame[..100].iter().all(|&byte| byte == frame[0]));
                }
                if round % 2 == 0 {
                    drop(link);
                    until("end of a sink whose far end is closed", || mirror.sinks() == 0);
                    assert!(!mirror.remove(id));
                } else {
                    assert!(mirror.remove(id));
                    assert!(mirror.is_empty(), "the thread has ended");
                }
            }
        });
    }

    #[test]
    fn sinks_are_bounded() {
        let mirror = Mirror::new("many", 1);
        let (_links, sinks): (Vec<_>, Vec<_>) = (0..=MAX_SINKS).map(|_| sink()).unzip();
        let added: Vec<_> = sinks.into_iter().map(|sink| mirror.add(sink)).collect();
        assert!(matches!(added[MAX_SINKS], Err(MirrorError::TooMany(MAX_SINKS))));
        assert_eq!(added.iter().flatten().collect::<std::collections::HashSet<_>>().len(), MAX_SINKS);
        assert_eq!(mirror.sinks(), MAX_SINKS);
    }
}
