//! Per-device counters, read by the API while the device runs.

use std::sync::atomic::{AtomicU64, Ordering};

/// Something that counts. Names are lower-case with underscores, as Prometheus wants them.
pub trait Counters: Send + Sync {
    /// The counters' names and values at this moment.
    fn read(&self) -> Vec<(&'static str, u64)>;
}

/// A counter that many threads may add to.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The value at this moment.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
