//! Points in time that connections wait for at most, and one timer for the first of them.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

/// A deadline per id.
pub struct Deadlines {
    timer: TimerFd,
    /// When the timer goes off. It may be too early: taking a deadline away does not set it.
    armed: Option<Instant>,
    in_order: BTreeSet<(Instant, u64)>,
    of: HashMap<u64, Instant>,
}

impl Deadlines {
    /// None yet.
    ///
    /// # Errors
    /// When the host has no timer to give.
    pub fn new() -> io::Result<Self> {
        Ok(Self { timer: TimerFd::new()?, armed: None, in_order: BTreeSet::new(), of: HashMap::new() })
    }

    /// Gives `id` a deadline, or none, in place of the one that it had.
    pub fn set(&mut self, id: u64, deadline: Option<Instant>) {
        if let Some(before) = self.of.remove(&id) {
            self.in_order.remove(&(before, id));
        }
        if let Some(deadline) = deadline {
            self.of.insert(id, deadline);
            self.in_order.insert((deadline, id));
        }
    }

    /// The timer went off: what it was set for is over.
    pub fn went_off(&mut self) {
        self.armed = None;
    }

    /// Takes out an id whose deadline is not after `now`.
    pub fn take_passed(&mut self, now: Instant) -> Option<u64> {
        let &(deadline, id) = self.in_order.first()?;
        (deadline <= now).then(|| {
            self.set(id, None);
            id
        })
    }

    /// Sets the timer for the first deadline, unless it goes off before.
    ///
    /// # Errors
    /// When the host refuses, for which it has no reason.
    pub fn arm(&mut self) -> io::Result<()> {
        if let Some(&(first, _)) = self.in_order.first()
            && self.armed.is_none_or(|armed| armed > first)
        {
            // Zero would disarm it.
            let wait = first.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
            self.timer.reset(wait, None)?;
            self.armed = Some(first);
        }
        Ok(())
    }
}

impl AsRawFd for Deadlines {
    /// The timer: readable when it went off. It need not be read where edges are waited for.
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::until;
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    #[test]
    fn goes_off_for_the_first_and_again_for_the_next() {
        let mut deadlines = Deadlines::new().unwrap();
        let epoll = Epoll::new().unwrap();
        let watched = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        epoll.ctl(ControlOperation::Add, deadlines.as_raw_fd(), watched).unwrap();
        let start = Instant::now();
        let after = |ms| Some(start + Duration::from_millis(ms));
        deadlines.set(1, after(3_600_000));
        deadlines.set(2, after(30));
        deadlines.arm().unwrap();
        deadlines.set(3, after(10));
        deadlines.set(4, after(1));
        deadlines.set(4, None);
        deadlines.arm().unwrap();
        let mut passed = Vec::new();
        until("deadlines", || {
            if epoll.wait(0, &mut [EpollEvent::default()]).unwrap() > 0 {
                deadlines.went_off();
                passed.extend(std::iter::from_fn(|| deadlines.take_passed(Instant::now())));
                deadlines.arm().unwrap();
            }
            passed.len() == 2
        });
        assert_eq!(passed, [3, 2]);
        assert!(start.elapsed() >= Duration::from_millis(30));
    }
}
