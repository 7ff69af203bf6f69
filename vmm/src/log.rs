//! The monitor's log: to stderr, and no faster than a disk can bear.
//!
//! A guest can cause log lines as fast as it can reset itself or break a queue. Devices say each thing once; what is left passes a
//! token bucket, so that a hostile guest's log grows by at most [`REFILL`] bytes a second after a first [`BURST`] bytes. A line that
//! does not fit is dropped, and the next that fits says how many were. Warnings and errors have a bucket of their own, as large: what
//! explains a failure is not lost because much was said before it.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// Bytes that may come at once.
pub const BURST: u64 = 256 << 10;
/// Bytes a second after that: 5.5 MB a day.
pub const REFILL: u64 = 64;

/// Sends this process's log to stderr; `CIVIC_LOG` chooses what is logged (tracing's filter syntax), by default `info`.
pub fn start() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("CIVIC_LOG").unwrap_or_else(|_| "info".into());
    let writer = Writers { told: Limited::new(io::stderr()), warned: Limited::new(io::stderr()) };
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(false).init();
}

struct Bucket<W> {
    out: W,
    tokens: u64,
    filled: Instant,
    dropped: u64,
}

impl<W: Write> Bucket<W> {
    fn line(&mut self, line: &[u8], now: Instant) -> io::Result<()> {
        let whole = now.saturating_duration_since(self.filled).as_secs();
        if whole > 0 {
            self.tokens = self.tokens.saturating_add(whole.saturating_mul(REFILL)).min(BURST);
            self.filled = now;
        }
        let Some(left) = self.tokens.checked_sub(line.len() as u64) else {
            self.dropped += 1;
            return Ok(());
        };
        self.tokens = left;
        if self.dropped > 0 {
            let dropped = std::mem::take(&mut self.dropped);
            writeln!(self.out, "({dropped} lines were dropped here: too many too fast)")?;
        }
        self.out.write_all(line)
    }
}

/// A writer with a token bucket, shared by all threads. Each write is one line, as the formatter makes them.
struct Limited<W>(Arc<Mutex<Bucket<W>>>);

impl<W> Limited<W> {
    fn new(out: W) -> Self {
        Self(Arc::new(Mutex::new(Bucket { out, tokens: BURST, filled: Instant::now(), dropped: 0 })))
    }
}

impl<W: Write> Write for Limited<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut bucket = self.0.lock().unwrap_or_else(|e| e.into_inner());
        bucket.line(line, Instant::now())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).out.flush()
    }
}

/// Where lines go by how grave they are.
struct Writers<W> {
    told: Limited<W>,
    warned: Limited<W>,
}

impl<W: Write + Send + 'static> MakeWriter<'_> for Writers<W> {
    type Writer = Limited<W>;

    fn make_writer(&self) -> Limited<W> {
        Limited(Arc::clone(&self.told.0))
    }

    fn make_writer_for(&self, about: &Metadata<'_>) -> Limited<W> {
        Limited(Arc::clone(if *about.level() <= Level::WARN { &self.warned.0 } else { &self.told.0 }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_flood_is_cut_and_said_to_have_been() {
        let start = Instant::now();
        let mut bucket = Bucket { out: Vec::new(), tokens: BURST, filled: start, dropped: 0 };
        let line = [b"x".repeat(99), b"\n".to_vec()].concat();
        for _ in 0..10_000 {
            bucket.line(&line, start).unwrap();
        }
        let fit = BURST / 100;
        assert_eq!(std::mem::take(&mut bucket.out).len() as u64, fit * 100);
        bucket.line(&line, start + Duration::from_secs(2)).unwrap();
        let text = String::from_utf8(std::mem::take(&mut bucket.out)).unwrap();
        assert!(text.starts_with(&format!("({} lines were dropped here", 10_000 - fit)), "{text}");
        bucket.line(&line, start + Duration::from_secs(3)).unwrap();
        assert_eq!(bucket.out.len(), 100);
        // A clock that stands still or goes back fills nothing.
        bucket.line(&line, start).unwrap();
        assert_eq!((bucket.out.len(), bucket.dropped), (100, 1));
    }

    #[test]
    fn a_flood_of_information_leaves_room_for_a_warning() {
        #[derive(Clone, Default)]
        struct Shared(Arc<Mutex<Vec<u8>>>);
        impl Write for Shared {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().write(bytes)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (told, warned) = (Shared::default(), Shared::default());
        let writers = Writers { told: Limited::new(told.clone()), warned: Limited::new(warned.clone()) };
        let subscriber = tracing_subscriber::fmt().with_writer(writers).with_ansi(false).finish();
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..BURST / 50 {
                tracing::info!("a line of information that is at least fifty bytes long");
            }
            tracing::warn!("a warning");
        });
        assert!(told.0.lock().unwrap().len() as u64 > BURST - 1000);
        let warned = String::from_utf8(warned.0.lock().unwrap().clone()).unwrap();
        assert!(warned.contains("a warning") && warned.lines().count() == 1, "{warned}");
    }
}
