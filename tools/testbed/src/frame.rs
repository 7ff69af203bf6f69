//! What client, daemon and agent say to each other.
//!
//! A frame is `length: u32 LE | run: u32 LE | kind: u8 | body`, `length` counting the body. Frames of several runs share the
//! one channel into L1, so output and input are sent on credit: a sender may have [`WINDOW`] bytes of a stream under way
//! that the other end has not yet acknowledged by [`Kind::Credit`]. So a reader that stalls holds up its own run only.
//!
//! ```text
//!  client            daemon                       agent
//!    │ Request(Run)    │ boots L1, plugs disks       │
//!    ├────────────────►│ Start{…}                    │
//!    │                 ├────────────────────────────►│ starts the job
//!    │ Stdin, Signal   │                             │
//!    ├────────────────►├────────────────────────────►│
//!    │     Stdout, Stderr, Credit                    │
//!    │◄────────────────┤◄────────────────────────────┤
//!    │                 │                        Exit │ everything the job left is dead
//!    │            Exit │◄────────────────────────────┤
//!    │◄────────────────┤ unplugs disks first         │
//! ```

use std::io::{Read, Write};
use std::sync::{Condvar, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// Raised when what is said changes; a daemon of another version has to be restarted.
pub const VERSION: u32 = 1;
/// Bytes of one stream that may be under way unacknowledged.
pub const WINDOW: usize = 256 << 10;
/// The longest piece of a stream in one frame.
pub const CHUNK: usize = 32 << 10;
const LONGEST: usize = 4 << 20;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Agent to daemon, once: it is up.
    Hello = 1,
    /// Daemon to agent: are you alive?
    Ping,
    /// The answer.
    Pong,
    /// Client to daemon: a JSON [`Request`].
    Request,
    /// Daemon to client: the answer to what is not a run, as text.
    Reply,
    /// Daemon to agent: a JSON [`Start`].
    Start,
    /// Input; an empty body is its end.
    Stdin,
    /// Output.
    Stdout,
    /// Errors.
    Stderr,
    /// `stream kind: u8 | bytes: u32 LE` were consumed.
    Credit,
    /// A signal number (u8) for the job's process group.
    Signal,
    /// Kill all of the run.
    Kill,
    /// The exit status (i32 LE). The last frame of a run.
    Exit,
    /// Daemon to client: text to show.
    Notice,
    /// The run failed for a reason of the testbed's own (text). The last frame of a run.
    Failed,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::*;
        let all = [
            Hello, Ping, Pong, Request, Reply, Start, Stdin, Stdout, Stderr, Credit, Signal, Kill, Exit, Notice, Failed,
        ];
        all.into_iter().find(|k| *k as u8 == byte)
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Which run; 0 where there is none.
    pub run: u32,
    /// What for.
    pub kind: Kind,
    /// Its contents.
    pub body: Vec<u8>,
}

impl Frame {
    /// A frame.
    pub fn new(run: u32, kind: Kind, body: impl Into<Vec<u8>>) -> Self {
        Self { run, kind, body: body.into() }
    }

    /// An acknowledgement of `bytes` of a stream.
    pub fn credit(run: u32, stream: Kind, bytes: usize) -> Self {
        let mut body = vec![stream as u8];
        body.extend_from_slice(&(bytes as u32).to_le_bytes());
        Self::new(run, Kind::Credit, body)
    }

    /// Reads what [`Frame::credit`] wrote.
    pub fn as_credit(&self) -> Option<(Kind, usize)> {
        let [stream, bytes @ ..] = self.body.as_slice() else { return None };
        Some((Kind::from_byte(*stream)?, u32::from_le_bytes(bytes.try_into().ok()?) as usize))
    }

    /// The exit status in an [`Kind::Exit`] frame.
    pub fn as_exit(&self) -> Option<i32> {
        Some(i32::from_le_bytes(self.body.as_slice().try_into().ok()?))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Writes the frame in one piece.
    pub fn write(&self, to: &mut impl Write) -> std::io::Result<()> {
        let mut bytes = Vec::with_capacity(9 + self.body.len());
        bytes.extend_from_slice(&(self.body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&self.run.to_le_bytes());
        bytes.push(self.kind as u8);
        bytes.extend_from_slice(&self.body);
        to.write_all(&bytes)?;
        to.flush()
    }

    /// Reads the next frame. An error is the end of the connection, in order or not.
    pub fn read(from: &mut impl Read) -> Result<Self> {
        let mut head = [0; 9];
        from.read_exact(&mut head)?;
        let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let run = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        let kind = Kind::from_byte(head[8]).with_context(|| format!("unknown frame kind {}", head[8]))?;
        ensure!(length <= LONGEST, "a frame of {length} bytes");
        let mut body = vec![0; length];
        from.read_exact(&mut body)?;
        Ok(Self { run, kind, body })
    }
}

/// What a client asks of the daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// What to do.
    pub what: What,
}

/// The requests.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum What {
    /// Run a command.
    Run(Run),
    /// Say how things are, as JSON.
    Status,
    /// End the machine and the daemon.
    Stop,
}

/// A command to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Where.
    pub cwd: String,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Disks to plug in for the command.
    pub disks: Vec<Disk>,
    /// MiB the machine shall have, if it matters.
    pub memory: Option<u32>,
    /// CPUs the machine shall have, if it matters.
    pub cpus: Option<u32>,
}

/// A disk image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// A raw image (or block device) of this machine.
    pub file: String,
    /// Read-only.
    pub ro: bool,
    /// Writes are discarded.
    pub snapshot: bool,
}

/// What the agent is told of a command.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Start {
    /// The command. Its `disks` are for the daemon.
    pub run: Run,
    /// Serial numbers of the disks, by which they are found.
    pub serials: Vec<String>,
    /// The workspace, mounted read-write.
    pub workspace: String,
    /// The mount tag of the root share to use.
    pub root_tag: String,
    /// Time of day: L1's clock stands while it is stopped.
    pub time_ns: u64,
}

/// How many bytes more may be sent of a stream.
pub struct Window {
    left: Mutex<Option<usize>>,
    more: Condvar,
}

impl Default for Window {
    fn default() -> Self {
        Self { left: Mutex::new(Some(WINDOW)), more: Condvar::new() }
    }
}

impl Window {
    /// Waits until `bytes` may be sent. False if the stream was closed.
    pub fn take(&self, bytes: usize) -> bool {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &mut *left {
                None => return false,
                Some(n) if *n >= bytes => {
                    *n -= bytes;
                    return true;
                }
                Some(_) => left = self.more.wait(left).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// The other end consumed `bytes`.
    pub fn give(&self, bytes: usize) {
        if let Some(n) = &mut *self.left.lock().unwrap_or_else(PoisonError::into_inner) {
            *n = n.saturating_add(bytes).min(WINDOW);
        }
        self.more.notify_all();
    }

    /// Nothing more is wanted.
    pub fn close(&self) {
        *self.left.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.more.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back() {
        let frames =
            [Frame::new(7, Kind::Stdout, *b"abc"), Frame::new(0, Kind::Ping, []), Frame::credit(7, Kind::Stdin, 300)];
        let mut bytes = Vec::new();
        for f in &frames {
            f.write(&mut bytes).unwrap();
        }
        let mut from = bytes.as_slice();
        for f in &frames {
            assert_eq!(&Frame::read(&mut from).unwrap(), f);
        }
        assert!(Frame::read(&mut from).is_err());
        assert_eq!(frames[2].as_credit(), Some((Kind::Stdin, 300)));
        assert_eq!(frames[0].as_credit(), None);
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Frame::read(&mut [0u8, 0, 0, 0, 0, 0, 0, 0, 99].as_slice()).is_err());
        assert!(Frame::read(&mut [255u8, 255, 255, 255, 0, 0, 0, 0, 1].as_slice()).is_err());
        assert!(Frame::read(&mut [4u8, 0, 0, 0, 0, 0, 0, 0, 1, 1].as_slice()).is_err());
    }

    #[test]
    fn window_holds_back() {
        let w = std::sync::Arc::new(Window::default());
        assert!(w.take(WINDOW));
        let other = w.clone();
        let waiting = std::thread::spawn(move || (other.take(10), other.take(WINDOW)));
        w.give(10);
        std::thread::sleep(std::time::Duration::from_millis(20));
        w.close();
        assert_eq!(waiting.join().unwrap(), (true, false));
    }
}
