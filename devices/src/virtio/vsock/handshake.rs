//! What a program of the host's says first: `CONNECT <port>\n`, in decimal, and to that port of the guest it is connected.
//!
//! Only that line is read: what follows it is the guest's, and may have come with it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use vmm_sys_util::epoll::EventSet;

/// The longest line, with its end: ten digits, and room for no nonsense.
const MAX_LINE: usize = 32;
/// VMADDR_PORT_ANY names no port.
const ANY_PORT: u32 = u32::MAX;

/// Where a handshake stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// The line is not complete.
    NotYet,
    /// This port of the guest.
    Port(u32),
    /// Nothing that can be understood, and nothing ever will.
    Nonsense,
}

/// A program that connected and has not yet said where to.
#[derive(Debug)]
pub struct Handshake {
    /// The connection to it.
    pub stream: UnixStream,
    /// All that epoll said of it.
    pub events: EventSet,
}

impl Handshake {
    /// With the program behind `stream`.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, events: EventSet::empty() }
    }

    /// Looks whether the line has come, and takes it off the stream.
    pub fn look(&self) -> Asked {
        let mut line = [0; MAX_LINE];
        let len = match self.receive(&mut line, MsgFlags::MSG_PEEK) {
            Err(Errno::EAGAIN) => return Asked::NotYet,
            Ok(0) | Err(_) => return Asked::Nonsense,
            Ok(len) => len,
        };
        let Some(end) = line[..len].iter().position(|byte| *byte == b'\n') else {
            return if len == MAX_LINE { Asked::Nonsense } else { Asked::NotYet };
        };
        match (port(&line[..end]), self.receive(&mut line[..=end], MsgFlags::empty())) {
            (Some(port), Ok(taken)) if taken == end + 1 => Asked::Port(port),
            _ => Asked::Nonsense,
        }
    }

    fn receive(&self, bytes: &mut [u8], flags: MsgFlags) -> Result<usize, Errno> {
        loop {
            match recv(self.stream.as_raw_fd(), bytes, flags | MsgFlags::MSG_DONTWAIT) {
                Err(Errno::EINTR) => {}
                result => return result,
            }
        }
    }
}

impl AsFd for Handshake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn port(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    let decimal = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    let port = std::str::from_utf8(digits).ok().filter(|_| decimal)?.parse().ok()?;
    (port != ANY_PORT).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn said(text: &[u8]) -> Asked {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(text).unwrap();
        Handshake::new(near).look()
    }

    #[test]
    fn understands_the_line_and_nothing_else() {
        assert_eq!(said(b"CONNECT 52\n"), Asked::Port(52));
        assert_eq!(said(b"CONNECT 4294967294\nbytes"), Asked::Port(u32::MAX - 1));
        for partial in [&b""[..], b"C", b"CONNECT ", b"CONNECT 00000000000000000000005"] {
            assert_eq!(said(partial), Asked::NotYet, "{partial:?}");
        }
        let wrong: [&[u8]; 9] = [
            b"\n",
            b"CONNECT \n",
            b"CONNECT +5\n",
            b"CONNECT 4294967295\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 5 \n",
            b"connect\xff\n",
            b"GET / HTTP/1.1\n",
            b"CONNECT 000000000000000000000005\n",
        ];
        for line in wrong {
            assert_eq!(said(line), Asked::Nonsense, "{line:?}");
        }
    }

    #[test]
    fn leaves_what_follows() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut handshake = Handshake::new(near);
        for part in [&b"CONN"[..], b"ECT 1", b"2"] {
            far.write_all(part).unwrap();
            assert_eq!(handshake.look(), Asked::NotYet);
        }
        far.write_all(b"\nrest").unwrap();
        assert_eq!(handshake.look(), Asked::Port(12));
        let mut rest = [0; 9];
        assert_eq!(handshake.stream.read(&mut rest).unwrap(), 4);
        drop(far);
        assert_eq!(handshake.look(), Asked::Nonsense);
    }
}
