//! How fast a device may work: bytes and operations per second, for one thread or shared by several.
//!
//! Each limit is a bucket that holds a tenth of a second's worth and fills steadily. A request passes while the bucket holds
//! anything, and takes its whole cost, if need be into debt: a request larger than the bucket is neither stuck for ever nor
//! cheaper than it should be.
//!
//! ```text
//!   take ──▶ anything in it? ── yes ──▶ go ahead, cost deducted
//!                  │ no
//!                  ▼
//!            cost deducted: a claim on a moment in the future ── timer ──▶ the next take goes ahead
//! ```
//!
//! A refused request pays at once and so holds its place: whoever asks later, on whichever thread, gets a later moment. No
//! thread can starve another, and none waits for another to do anything. A claim that is given up is paid back.
//!
//! Lock order: a rate's buckets are a leaf.

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Picoseconds since a rate was made. Nanoseconds would make a small frame on a fast link cheaper by a tenth.
type Picos = u128;

const SECOND: Picos = 1_000_000_000_000;
/// What an idle bucket saves up.
const BURST: Picos = SECOND / 10;
/// A thread that has to wait sleeps no shorter, and so finds work for several requests when it wakes.
const SHORTEST_WAIT: Picos = SECOND / 1000;
/// A timer is set no further ahead, and set again when it expires too early.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// How fast a device may work. What is not given is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes per second.
    pub bytes_per_second: Option<u64>,
    /// Operations (requests, frames) per second.
    pub operations_per_second: Option<u64>,
}

/// A rate that several threads keep together, each with a [`RateLimiter`] of its own. Clones are the same rate.
#[derive(Clone, Debug)]
pub struct SharedRate {
    buckets: Arc<Mutex<Buckets>>,
    start: Instant,
}

impl SharedRate {
    /// A rate whose buckets are full.
    ///
    /// # Errors
    /// `InvalidInput` for a limit of zero: nothing would ever pass.
    pub fn new(limit: RateLimit) -> io::Result<Self> {
        let buckets = Buckets::new(limit).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { buckets: Arc::new(Mutex::new(buckets)), start: Instant::now() })
    }

    /// One thread's access to the rate.
    ///
    /// # Errors
    /// When no timer can be had.
    pub fn limiter(&self) -> io::Result<RateLimiter> {
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        Ok(RateLimiter { rate: self.clone(), timer, turn: Turn::default() })
    }

    fn buckets(&self) -> MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Picos {
        self.start.elapsed().as_nanos() * 1000
    }
}

/// A thread's access to a rate: asks, and is woken through a timer's descriptor when it was refused.
#[derive(Debug)]
pub struct RateLimiter {
    rate: SharedRate,
    timer: TimerFd,
    turn: Turn,
}

impl RateLimiter {
    /// A limiter with a rate of its own.
    ///
    /// # Errors
    /// `InvalidInput` for a limit of zero; what timerfd_create(2) says.
    pub fn new(limit: RateLimit) -> io::Result<Self> {
        SharedRate::new(limit)?.limiter()
    }

    /// Asks for one operation of `bytes`. True: go ahead. False: not now; its place is kept, and the timer expires when
    /// the next call will say true.
    pub fn take(&mut self, bytes: u64) -> bool {
        let now = self.rate.now();
        let Some(wait) = self.turn.take(&mut self.rate.buckets(), now, bytes) else { return true };
        let wait = Duration::from_nanos(u64::try_from(wait.div_ceil(1000)).unwrap_or(u64::MAX)).min(LONGEST_WAIT);
        // A wait that nothing ends would be worse than a request too early.
        self.timer.set(Expiration::OneShot(wait.into()), TimerSetTimeFlags::empty()).is_err()
    }

    /// Corrects the cost of an operation that went ahead: `taken` bytes were asked for when its length was not known, and
    /// there were `bytes`.
    pub fn settle(&mut self, taken: u64, bytes: u64) {
        let now = self.rate.now();
        self.rate.buckets().settle(now, taken, bytes);
    }

    /// To be called when the descriptor is readable, before the next [`RateLimiter::take`].
    pub fn expired(&mut self) {
        // It would block if the timer was set anew meanwhile: then it expires again.
        let _ = self.timer.wait();
    }
}

impl AsFd for RateLimiter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

impl AsRawFd for RateLimiter {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Drop for RateLimiter {
    fn drop(&mut self) {
        self.turn.give_up(&mut self.rate.buckets());
    }
}

/// One limit's bucket, as the moment at which all that was taken so far will have flowed in again. Its level is that
/// moment's distance from [`BURST`] ahead of now.
#[derive(Debug)]
struct Bucket {
    per_second: u64,
    repaid: Picos,
}

impl Bucket {
    fn cost(&self, units: u64) -> Picos {
        Picos::from(units) * SECOND / Picos::from(self.per_second)
    }

    /// The moment from which on it holds anything.
    fn opens(&self) -> Picos {
        self.repaid.saturating_sub(BURST)
    }

    fn deduct(&mut self, now: Picos, units: u64) {
        self.repaid = self.repaid.max(now).saturating_add(self.cost(units));
    }

    fn pay_back(&mut self, units: u64) {
        self.repaid = self.repaid.saturating_sub(self.cost(units));
    }
}

#[derive(Debug)]
struct Buckets {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Buckets {
    /// None when a limit is zero.
    fn new(limit: RateLimit) -> Option<Self> {
        let RateLimit { bytes_per_second, operations_per_second } = limit;
        let bucket = |limit: Option<u64>| limit.map(|per_second| Bucket { per_second, repaid: 0 });
        let possible = bytes_per_second != Some(0) && operations_per_second != Some(0);
        possible.then(|| Self { bytes: bucket(bytes_per_second), operations: bucket(operations_per_second) })
    }

    /// The moment from which on all of them hold anything.
    fn open(&self) -> Picos {
        self.bytes.iter().chain(&self.operations).map(Bucket::opens).max().unwrap_or(0)
    }

    fn deduct(&mut self, now: Picos, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.deduct(now, bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.deduct(now, 1);
        }
    }

    fn settle(&mut self, now: Picos, taken: u64, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            match bytes.checked_sub(taken) {
                Some(more) => bucket.deduct(now, more),
                None => bucket.pay_back(taken - bytes),
            }
        }
    }

    fn pay_back(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.pay_back(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.pay_back(1);
        }
    }
}

/// A request that was refused, has paid, and may go ahead at `at`.
#[derive(Clone, Copy, Debug)]
struct Claim {
    at: Picos,
    bytes: u64,
}

/// One thread's standing: at most one claim.
#[derive(Debug, Default)]
struct Turn(Option<Claim>);

impl Turn {
    /// How long one operation of `bytes` has to wait; `None` to go ahead.
    fn take(&mut self, buckets: &mut Buckets, now: Picos, bytes: u64) -> Option<Picos> {
        match self.0 {
            Some(claim) if claim.at > now => Some(claim.at - now),
            Some(claim) => {
                // The request that comes may be another than the one that was refused.
                self.0 = None;
                buckets.settle(now, claim.bytes, bytes);
                None
            }
            None => {
                let open = buckets.open();
                buckets.deduct(now, bytes);
                (open > now).then(|| {
                    let at = open.max(now + SHORTEST_WAIT);
                    self.0 = Some(Claim { at, bytes });
                    at - now
                })
            }
        }
    }

    fn give_up(&mut self, buckets: &mut Buckets) {
        if let Some(claim) = self.0.take() {
            buckets.pay_back(claim.bytes);
        }
    }
}
