//! How long answers took, as a histogram.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Buckets: up to 1 µs, 2 µs, 4 µs and so on, and one for all that is longer.
pub const BUCKETS: usize = 18;

/// Times, counted by powers of two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    counts: [u64; BUCKETS],
    nanos: u64,
}

impl Times {
    /// Counts one.
    pub fn add(&mut self, time: Duration) {
        let nanos = time.as_nanos() as u64;
        let micros = nanos.div_ceil(1000);
        let bucket = micros.next_power_of_two().trailing_zeros() as usize;
        self.counts[bucket.min(BUCKETS - 1)] += 1;
        self.nanos += nanos;
    }

    /// Each bucket's upper limit, none for the last, and how many are in it.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<Duration>, u64)> {
        let limit = |n| (n + 1 < BUCKETS).then(|| Duration::from_micros(1_u64 << n));
        self.counts.iter().enumerate().map(move |(n, count)| (limit(n), *count))
    }

    /// How long all of them took.
    pub fn sum(&self) -> Duration {
        Duration::from_nanos(self.nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_in_the_first_bucket_that_has_room_for_it() {
        let mut times = Times::default();
        for micros in [0, 1, 2, 3, 4, 5, 65_536, 65_537, 10_000_000] {
            times.add(Duration::from_micros(micros));
        }
        times.add(Duration::from_nanos(1001));
        let filled: Vec<_> = times.buckets().filter(|(_, count)| *count > 0).collect();
        let us = |micros| Some(Duration::from_micros(micros));
        assert_eq!(filled, [(us(1), 2), (us(2), 2), (us(4), 2), (us(8), 1), (us(65_536), 1), (None, 2)]);
        assert_eq!(times.sum(), Duration::from_nanos(10_131_088_000 + 1001));
    }
}
