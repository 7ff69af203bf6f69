//! Throughput of the channel between a program that was started from outside and its client, both ways: what `civic exec` and `civic cp` get.
//!
//! Beside it stands a program whose pipe somebody in the same guest relays by vsock: the loader uses no driver of the guest's, and this shows
//! what one would be worth.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use civic_loader::{Exit, FromGuest, MAX_PAYLOAD, ToGuest, split};
use serde_json::json;

use super::guest::Guest;
use super::net::Way;

/// How long the program may take to say anything.
const PATIENCE: Duration = Duration::from_secs(60);
const MIB: f64 = (1 << 20) as f64;

/// What the guest runs: it writes for ever, or reads to the end.
const fn script(way: Way) -> &'static str {
    match way {
        Way::Tx => "exec dd if=/dev/zero bs=64k 2> /dev/null",
        Way::Rx => "exec cat > /dev/null",
    }
}

/// MiB per second, over about so many seconds. What the program reads counts when it has read it all.
pub fn measure(guest: &Guest, way: Way, seconds: u32) -> Result<f64> {
    let started = guest.ask("POST", "/v1/programs", &json!({ "argv": ["/bin/sh", "-c", script(way)] }))?;
    let path = format!("/v1/programs/{}", started["id"]);
    let (stream, first) = guest.upgraded(&path, "civic-program", PATIENCE)?;
    let limit = Duration::from_secs(seconds.into());
    let mut talk = Talk { stream, waiting: first.into(), credit: 0 };
    match way {
        Way::Tx => talk.take(limit),
        Way::Rx => talk.give(limit),
    }
}

/// A client's end. When it is dropped the program is told to end.
struct Talk {
    stream: UnixStream,
    waiting: VecDeque<u8>,
    /// Bytes that may be sent.
    credit: usize,
}

impl Talk {
    /// Waits for a frame: how many bytes of output were in it, and how the program ended if it has.
    fn next(&mut self) -> Result<(usize, Option<Exit>)> {
        loop {
            if let Some((frame, len)) = split(self.waiting.make_contiguous()).ok().context("no frames")? {
                let told = match FromGuest::decode(frame).ok().context("the loader's frames make no sense")? {
                    FromGuest::Hello { credit, .. } | FromGuest::Credit(credit) => {
                        self.credit += credit as usize;
                        (0, None)
                    }
                    FromGuest::Stdout(bytes) => (bytes.len(), None),
                    FromGuest::Stderr(text) => bail!("the program complains: {}", String::from_utf8_lossy(text)),
                    FromGuest::Failed { text, errno, .. } => bail!("the loader failed: {text} ({errno})"),
                    FromGuest::Exited(how) => (0, Some(how)),
                    FromGuest::Stage { .. } | FromGuest::Warning(_) => (0, None),
                };
                self.waiting.drain(..len);
                return Ok(told);
            }
            let mut buffer = [0; MAX_PAYLOAD];
            let read = self.stream.read(&mut buffer).context("the program says nothing")?;
            ensure!(read > 0, "the monitor hung up");
            self.waiting.extend(&buffer[..read]);
        }
    }

    /// Output, from its first byte on.
    fn take(&mut self, limit: Duration) -> Result<f64> {
        while self.next()?.0 == 0 {}
        let (start, mut bytes) = (Instant::now(), 0);
        while start.elapsed() < limit {
            let (count, ended) = self.next()?;
            ensure!(ended.is_none(), "the program ended: {ended:?}");
            bytes += count;
        }
        Ok(bytes as f64 / MIB / start.elapsed().as_secs_f64())
    }

    /// Input, as fast as there is credit.
    fn give(&mut self, limit: Duration) -> Result<f64> {
        let block = vec![b'x'; MAX_PAYLOAD];
        let mut frame = Vec::new();
        let mut send = |stream: &mut UnixStream, what: &ToGuest<'_>| -> Result<()> {
            frame.clear();
            what.encode(&mut frame).ok().context("a frame that is too large")?;
            Ok(stream.write_all(&frame)?)
        };
        let (start, mut bytes) = (Instant::now(), 0);
        while start.elapsed() < limit {
            while self.credit == 0 {
                let (_, ended) = self.next()?;
                ensure!(ended.is_none(), "the program ended: {ended:?}");
            }
            let count = self.credit.min(block.len());
            send(&mut self.stream, &ToGuest::Stdin(&block[..count]))?;
            self.credit -= count;
            bytes += count;
        }
        send(&mut self.stream, &ToGuest::StdinEnd)?;
        let ended = loop {
            if let (_, Some(ended)) = self.next()? {
                break ended;
            }
        };
        ensure!(ended == Exit::Code(0), "the program ended with {ended:?}");
        Ok(bytes as f64 / MIB / start.elapsed().as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client's end, and a loader's that runs by itself.
    fn pair(loader: impl FnOnce(UnixStream) + Send + 'static) -> Talk {
        let (stream, other) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        std::thread::spawn(move || loader(other));
        Talk { stream, waiting: VecDeque::new(), credit: 0 }
    }

    fn say(stream: &mut UnixStream, frame: &FromGuest<'_>) -> bool {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes).unwrap();
        stream.write_all(&bytes).is_ok()
    }

    #[test]
    fn output_is_counted() {
        let limit = Duration::from_millis(50);
        let mut talk = pair(|mut stream| while say(&mut stream, &FromGuest::Stdout(&[0; 1000])) {});
        assert!(talk.take(limit).unwrap() > 0.0);
        let mut ended = pair(|mut stream| {
            say(&mut stream, &FromGuest::Stdout(b"x"));
            say(&mut stream, &FromGuest::Exited(Exit::Code(0)));
        });
        assert!(ended.take(limit).is_err());
    }

    /// Reads frames, gives back credit for each, and says how it ended at the input's end.
    fn reads(mut stream: UnixStream, exit: Exit) {
        say(&mut stream, &FromGuest::Hello { version: civic_loader::VERSION, credit: 5000 });
        let (mut waiting, mut buffer) = (Vec::new(), [0; 8192]);
        loop {
            while let Some((frame, len)) = split(&waiting).unwrap() {
                match ToGuest::decode(frame).unwrap() {
                    ToGuest::Stdin(bytes) => say(&mut stream, &FromGuest::Credit(bytes.len() as u32)),
                    _ => say(&mut stream, &FromGuest::Exited(exit)),
                };
                waiting.drain(..len);
            }
            match stream.read(&mut buffer) {
                Ok(read @ 1..) => waiting.extend(&buffer[..read]),
                _ => return,
            }
        }
    }

    #[test]
    fn input_goes_as_there_is_credit() {
        let limit = Duration::from_millis(50);
        assert!(pair(|stream| reads(stream, Exit::Code(0))).give(limit).unwrap() > 0.0);
        assert!(pair(|stream| reads(stream, Exit::Code(1))).give(limit).is_err());
    }
}
