//! Time, and waiting for a while.

use rustix::event::{Timespec, poll};

use crate::sys;

/// A moment in the future.
#[derive(Clone, Copy)]
pub struct Deadline(u64);

impl Deadline {
    /// So many milliseconds from now.
    pub fn after_ms(ms: u64) -> Self {
        Self(sys::now_ms().saturating_add(ms))
    }

    /// Whether it is not in the future any more.
    pub fn passed(self) -> bool {
        self.left_ms().is_none()
    }

    /// How long it is until then; none if it is not in the future any more.
    pub fn left_ms(self) -> Option<u64> {
        self.0.checked_sub(sys::now_ms()).filter(|left| *left > 0)
    }
}

/// So many milliseconds, for [`poll`].
pub fn timespec(ms: u64) -> Timespec {
    Timespec { tv_sec: (ms / 1000).cast_signed(), tv_nsec: (ms % 1000 * 1_000_000).cast_signed() }
}

/// Sleeps so many milliseconds. Who does so looks again afterwards, however long it was.
pub fn sleep_ms(ms: u64) {
    let _ = poll(&mut [], Some(&timespec(ms)));
}
