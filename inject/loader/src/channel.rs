//! How bytes come from the monitor and go to it: what the loader's argument says.
//!
//! * `port:HEX:TOKEN`: hypercalls through an I/O port, both numbers hexadecimal, or at a breakpoint of the monitor's where the guest's kernel
//!   allows no port. Nothing of the guest's is in between, and there is nothing to wait at;
//! * `fd:N`: a stream socket or character device that is open as N;
//! * `path:NAME`: a character device, such as a port of the virtio console.
#![allow(unsafe_code)]

use core::str;

use civic_loader::{OP_RECV, OP_SEND, UNMAPPED};
use rustix::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, ioctl_fionbio, read, write};

use crate::sys;
use crate::time::{Deadline, sleep_ms};

/// Ports from the named one on that an access of four bytes touches.
const PORTS: usize = 4;
/// How often to bring pages back for one hypercall: other processes may take them away just as fast, but not so often in a row.
const TRIES: usize = 100;

/// How long the monitor may take to find that it needs a breakpoint, and how often to see, in milliseconds.
const BREAKPOINT_MS: u64 = 30_000;
const LOOK_MS: u64 = 3;

/// There is no host any more, or it has never been there.
pub struct Lost;

/// Two streams of bytes. Nothing waits.
pub trait Channel {
    /// Gives the host the beginning of `bytes`, and says how much of it.
    fn send(&mut self, bytes: &[u8]) -> Result<usize, Lost>;

    /// Fills the beginning of `into` with what the host has, and says how much. 0 if there is nothing now.
    fn recv(&mut self, into: &mut [u8]) -> Result<usize, Lost>;

    /// What becomes ready when there is more to do, if there is such a thing.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
}

/// A channel of any kind.
pub enum AnyChannel {
    /// Hypercalls.
    Port(Port),
    /// A descriptor.
    Stream(Stream),
}

impl AnyChannel {
    /// What the argument names.
    pub fn open(argument: &[u8]) -> Result<Self, Lost> {
        let argument = str::from_utf8(argument).map_err(|_| Lost)?;
        let (kind, name) = argument.split_once(':').ok_or(Lost)?;
        match kind {
            "port" => Port::open(name).map(Self::Port),
            "fd" => {
                let fd = name.parse().ok().filter(|fd| *fd >= 0).ok_or(Lost)?;
                // SAFETY: whoever started us opened it for us, and nobody else in this process knows of it.
                Stream::new(unsafe { OwnedFd::from_raw_fd(fd) }).map(Self::Stream)
            }
            "path" => {
                let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
                open(name, flags, Mode::empty()).map_err(|_| Lost).and_then(Stream::new).map(Self::Stream)
            }
            _ => Err(Lost),
        }
    }

    /// As what all kinds are.
    pub fn get(&mut self) -> &mut dyn Channel {
        match self {
            Self::Port(port) => port,
            Self::Stream(stream) => stream,
        }
    }
}

/// Hypercalls: see `civic_loader::OP_SEND`.
pub struct Port {
    /// None where ports are forbidden.
    port: Option<u16>,
    token: u64,
    /// Somebody has answered.
    answered: bool,
}

impl Port {
    fn open(name: &str) -> Result<Self, Lost> {
        let (port, token) = name.split_once(':').ok_or(Lost)?;
        let port = u16::from_str_radix(port, 16).map_err(|_| Lost)?;
        let token = u64::from_str_radix(token, 16).map_err(|_| Lost)?;
        let port = sys::ioperm(port, PORTS, true).is_ok().then_some(port);
        Ok(Self { port, token, answered: false })
    }

    /// One hypercall; the answer to one that nobody hears is no count.
    fn call(&mut self, op: u32, buffer: *mut u8, len: usize) -> i64 {
        if let Some(port) = self.port {
            // SAFETY: `open` was allowed to use the port, which the monitor named because it listens there. The callers' buffers are valid
            // for what the operation does.
            return unsafe { sys::hypercall(port, op, self.token, buffer, len) };
        }
        let deadline = Deadline::after_ms(BREAKPOINT_MS);
        loop {
            // SAFETY: the callers' buffers are valid for what the operation does.
            let answer = unsafe { sys::knock(op, self.token, buffer, len) };
            let heard = answer != i64::from(op);
            if heard || self.answered || deadline.passed() {
                self.answered |= heard;
                return answer;
            }
            sleep_ms(LOOK_MS);
        }
    }

    /// What the answer to a hypercall for `len` bytes means; `None`: to be tried again, with the pages there.
    fn count(answer: i64, len: usize) -> Option<Result<usize, Lost>> {
        (answer != UNMAPPED).then(|| usize::try_from(answer).ok().filter(|count| *count <= len).ok_or(Lost))
    }
}

impl Channel for Port {
    fn send(&mut self, bytes: &[u8]) -> Result<usize, Lost> {
        let attempt = || {
            sys::map_for_reading(bytes);
            // The monitor only reads it.
            Self::count(self.call(OP_SEND, bytes.as_ptr().cast_mut(), bytes.len()), bytes.len())
        };
        core::iter::repeat_with(attempt).take(TRIES).flatten().next().unwrap_or(Ok(0))
    }

    fn recv(&mut self, into: &mut [u8]) -> Result<usize, Lost> {
        let attempt = || {
            sys::map_for_writing(into);
            Self::count(self.call(OP_RECV, into.as_mut_ptr(), into.len()), into.len())
        };
        core::iter::repeat_with(attempt).take(TRIES).flatten().next().unwrap_or(Ok(0))
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A descriptor that does not block.
pub struct Stream(OwnedFd);

impl Stream {
    fn new(fd: OwnedFd) -> Result<Self, Lost> {
        ioctl_fionbio(&fd, true).map_err(|_| Lost)?;
        Ok(Self(fd))
    }
}

impl Channel for Stream {
    fn send(&mut self, bytes: &[u8]) -> Result<usize, Lost> {
        match write(&self.0, bytes) {
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            result => result.map_err(|_| Lost),
        }
    }

    fn recv(&mut self, into: &mut [u8]) -> Result<usize, Lost> {
        match read(&self.0, into) {
            // Nobody is at the other end.
            Ok(0) => Err(Lost),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            result => result.map_err(|_| Lost),
        }
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}
