//! For how long a process has done nothing, as far as one knows who was not always there to see it.

use std::time::{Duration, Instant};

/// Between two looks this much at most counts: who looks too late has itself been kept from running, by a busy host or by one that
/// stood still as a whole, and so may be whom it looks at.
const MOST: Duration = Duration::from_millis(200);

/// Looks again and again whether something moves.
#[derive(Debug)]
pub struct Standstill {
    looked: Instant,
    known: Duration,
}

impl Standstill {
    /// It has just moved.
    pub fn new(now: Instant) -> Self {
        Self { looked: now, known: Duration::ZERO }
    }

    /// How long ago the last look was.
    pub fn since(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.looked)
    }

    /// It has not moved since the last look: says for how long it is known to stand still.
    pub fn still(&mut self, now: Instant) -> Duration {
        self.known += self.since(now).min(MOST);
        self.looked = now;
        self.known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_time_counts_in_which_one_looked() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut standstill = Standstill::new(at(0));
        let known: Vec<_> = [100, 200, 350, 9000, 9100].map(|ms| standstill.still(at(ms)).as_millis()).into();
        assert_eq!(known, [100, 200, 350, 550, 650]);
        assert_eq!(standstill.since(at(9300)), Duration::from_millis(200));
        assert_eq!(Standstill::new(at(9300)).still(at(9400)), Duration::from_millis(100));
    }
}
