//! What a block device counts.

use crate::counters::{Counter, Counters};

/// A block device's counters. Requests count when they succeeded, bytes with them.
#[derive(Default)]
pub struct BlockCounters {
    pub reads: Counter,
    pub writes: Counter,
    pub flushes: Counter,
    pub discards: Counter,
    pub write_zeroes: Counter,
    pub read_bytes: Counter,
    pub written_bytes: Counter,
    /// Requests that failed or were refused.
    pub errors: Counter,
    /// Requests that had to wait for the rate.
    pub throttled: Counter,
}

impl Counters for BlockCounters {
    fn read(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("reads", self.reads.get()),
            ("writes", self.writes.get()),
            ("flushes", self.flushes.get()),
            ("discards", self.discards.get()),
            ("write_zeroes", self.write_zeroes.get()),
            ("read_bytes", self.read_bytes.get()),
            ("written_bytes", self.written_bytes.get()),
            ("errors", self.errors.get()),
            ("throttled", self.throttled.get()),
        ]
    }
}
