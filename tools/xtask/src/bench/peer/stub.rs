//! A client of QEMU's GDB stub, by GDB's remote serial protocol ("Remote Protocol" in GDB's manual): only what it takes to change a
//! guest that stands still.
//!
//! ```text
//!  here ─▶ $DATA#SUM        SUM: of DATA's bytes modulo 256, in two hexadecimal digits
//!  stub ─▶ + $ANSWER#SUM    the + only until both have agreed on none
//! ```
//!
//! Addresses are physical ones (QEMU's `Qqemu.PhyMemMode`): the guest may stand in a program whose page tables lack its kernel. The stub
//! has a guest stand still when somebody connects, and lets it go on when he detaches.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// What [`Stub::stop`] sends, outside of packets.
const INTERRUPT: u8 = 3;
const NO_ACKS: &str = "QStartNoAckMode";
/// Bytes of memory in a packet: twice as many digits, and QEMU's packets are of 4 KiB.
const PIECE: usize = 1024;

/// A connection to one QEMU.
pub struct Stub {
    stream: UnixStream,
    /// What was read and is no whole packet yet.
    bytes: Vec<u8>,
    acks: bool,
    limit: Duration,
}

impl Stub {
    /// Connects; from then on each answer may take as long as `limit`.
    pub fn connect(socket: &Path, limit: Duration) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("no stub at {}", socket.display()))?;
        let mut this = Self { stream, bytes: Vec::new(), acks: true, limit };
        let features = this.ask("qSupported")?;
        if features.split(';').any(|feature| feature.strip_suffix('+') == Some(NO_ACKS)) {
            this.done(NO_ACKS)?;
            this.acks = false;
        }
        this.done("Qqemu.PhyMemMode:1")?;
        Ok(this)
    }

    /// Reads guest memory.
    pub fn read(&mut self, at: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let (from, piece) = (at + bytes.len() as u64, (len - bytes.len()).min(PIECE));
            let said = self.ask(&format!("m{from:x},{piece:x}"))?;
            let read = from_hex(&said).filter(|read| read.len() == piece);
            bytes.extend(read.with_context(|| format!("the stub reads {piece} bytes at {from:#x}: {said}"))?);
        }
        Ok(bytes)
    }

    /// Writes guest memory.
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut to = at;
        for piece in bytes.chunks(PIECE) {
            self.done(&format!("M{to:x},{:x}:{}", piece.len(), hex(piece)))?;
            to += piece.len() as u64;
        }
        Ok(())
    }

    /// Lets the guest go on.
    pub fn go(&mut self) -> Result<()> {
        self.send("c")
    }

    /// Has a guest that goes on stand still.
    pub fn stop(&mut self) -> Result<()> {
        self.stream.write_all(&[INTERRUPT])?;
        let said = self.answer("an interrupt")?;
        ensure!(said.starts_with(['T', 'S']), "the stub answers an interrupt with {said}");
        Ok(())
    }

    /// Lets the guest go on and leaves it.
    pub fn detach(mut self) -> Result<()> {
        self.done("D")
    }

    fn done(&mut self, packet: &str) -> Result<()> {
        let said = self.ask(packet)?;
        ensure!(said == "OK", "the stub answers {} with {said:?}", brief(packet));
        Ok(())
    }

    fn ask(&mut self, packet: &str) -> Result<String> {
        self.send(packet)?;
        self.answer(packet)
    }

    fn send(&mut self, packet: &str) -> Result<()> {
        self.stream
            .write_all(format!("${packet}#{:02x}", sum(packet.as_bytes())).as_bytes())
            .context("the stub is gone")
    }

    /// The next packet.
    fn answer(&mut self, to: &str) -> Result<String> {
        let deadline = Instant::now() + self.limit;
        loop {
            if let Some(packet) = take(&mut self.bytes)? {
                if self.acks {
                    self.stream.write_all(b"+")?;
                }
                return Ok(packet);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let mut buffer = [0; 4096];
            let read = self.stream.read(&mut buffer);
            let n = read.with_context(|| format!("the stub does not answer {} in time", brief(to)))?;
            ensure!(n > 0, "the stub has ended at {}", brief(to));
            self.bytes.extend_from_slice(&buffer[..n]);
        }
    }
}

/// Takes the first packet, with what stands before it, if it is whole.
fn take(bytes: &mut Vec<u8>) -> Result<Option<String>> {
    let find = |byte, from: usize| bytes[from..].iter().position(|b| *b == byte).map(|at| from + at);
    let Some(start) = find(b'$', 0) else { return Ok(None) };
    let Some(end) = find(b'#', start) else { return Ok(None) };
    let Some(digits) = bytes.get(end + 1..end + 3) else { return Ok(None) };
    if bytes[..start].contains(&b'-') {
        bail!("the stub takes a packet for damaged");
    }
    let packet = String::from_utf8(bytes[start + 1..end].to_vec()).context("the stub's answer is no text")?;
    ensure!(digits == format!("{:02x}", sum(packet.as_bytes())).as_bytes(), "the stub's answer is damaged: {packet}");
    bytes.drain(..end + 3);
    Ok(Some(packet))
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    text.len().is_multiple_of(2).then(|| text.as_bytes().chunks(2).map(digits).collect())?
}

/// The beginning of a packet, for messages.
fn brief(packet: &str) -> &str {
    packet.get(..24).unwrap_or(packet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    /// A stub that says these things, each after it was sent something; what it was sent.
    fn stub(name: &str, answers: &'static [&'static str]) -> (Result<Stub>, JoinHandle<Vec<String>>) {
        let path = std::env::temp_dir().join(format!("xtask-stub-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let heard = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut heard = Vec::new();
            for answer in answers {
                let mut text = Vec::new();
                while !text.ends_with(&[INTERRUPT]) && text.iter().rev().nth(2) != Some(&b'#') {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    text.extend(byte);
                }
                heard.push(String::from_utf8(text).unwrap());
                stream.write_all(answer.as_bytes()).unwrap();
            }
            heard
        });
        let connected = Stub::connect(&path, Duration::from_secs(5));
        std::fs::remove_file(&path).unwrap();
        (connected, heard)
    }

    #[test]
    fn memory_is_read_and_written() {
        let (connected, heard) = stub(
            "memory",
            &[
                "+$QStartNoAckMode+;PacketSize=1000#07",
                "+$OK#9a",
                "$OK#9a",
                "$00ff10#8d",
                "$OK#9a",
                "$T02thread:01;#04",
            ],
        );
        let mut stub = connected.unwrap();
        assert_eq!(stub.read(0x100_0000, 3).unwrap(), [0, 0xff, 0x10]);
        stub.write(0x20, &[0xe9, 1]).unwrap();
        stub.stop().unwrap();
        drop(stub);
        let heard = heard.join().unwrap();
        assert_eq!(heard[0], "$qSupported#37");
        assert_eq!(heard[1..3], ["+$QStartNoAckMode#b0", "+$Qqemu.PhyMemMode:1#77"]);
        assert_eq!(heard[3..], ["$m1000000,3#1d", "$M20,2:e901#46", "\u{3}"]);
    }

    #[test]
    fn packets_are_whole_and_sound() {
        let check = |bytes: &[u8]| take(&mut bytes.to_vec()).map_err(drop);
        assert_eq!(check(b"+$OK#9a"), Ok(Some("OK".to_owned())));
        for part in ["", "+", "+$", "$OK", "$OK#9"] {
            assert_eq!(check(part.as_bytes()), Ok(None), "{part}");
        }
        assert!(check(b"$OK#9b").is_err() && check(b"-$OK#9a").is_err());
        let mut two = b"$a#61$b#62".to_vec();
        assert_eq!([take(&mut two).unwrap(), take(&mut two).unwrap()], [Some("a".to_owned()), Some("b".to_owned())]);
        assert_eq!((from_hex("0aff"), from_hex("0af"), from_hex("zz")), (Some(vec![10, 255]), None, None));
    }
}
