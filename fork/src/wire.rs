//! Messages with descriptors between the processes of a fork: one datagram each, on a `SOCK_SEQPACKET` unix socket, so that an end that
//! goes away is noticed at once and no message comes in parts.
//!
//! The other end may be hostile: a message is of at most [`MAX_BYTES`] with at most [`MAX_FDS`] descriptors, is decoded by `postcard`,
//! and descriptors that no message asked for are closed.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{PeerCredentials, SendTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, setsockopt, shutdown, socket, socketpair,
};
use nix::sys::time::TimeVal;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest message.
pub const MAX_BYTES: usize = 64 << 10;
/// Most descriptors with a message.
pub const MAX_FDS: usize = 64;
/// The descriptor by which a process is connected that was started with a connection: the first behind its input and outputs.
pub const INHERITED: RawFd = 3;

/// Why a message did not come or go.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The other end is closed.
    #[error("the other process has closed the connection")]
    Closed,
    /// Nothing came in time.
    #[error("the other process does not answer (for {0:?})")]
    Timeout(Duration),
    /// It is not a message of this protocol, or of another version of it.
    #[error("the other process says something that is not understood: {0}")]
    Nonsense(String),
    /// It is too long to be sent.
    #[error("a message of {0} bytes is too long")]
    TooLong(usize),
    /// The system refuses.
    #[error("the connection to the other process fails")]
    System(#[source] io::Error),
}

impl From<Errno> for WireError {
    fn from(e: Errno) -> Self {
        match e {
            Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN => Self::Closed,
            e => Self::System(e.into()),
        }
    }
}

/// A message and its descriptors.
pub(crate) type Received = (Vec<u8>, Vec<OwnedFd>);

/// One end.
#[derive(Debug)]
pub struct Wire(OwnedFd);

impl From<OwnedFd> for Wire {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<Wire> for OwnedFd {
    fn from(wire: Wire) -> Self {
        wire.0
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Wire {
    /// Two ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(a), Self(b)))
    }

    /// Connects to a [`Listener`].
    pub fn connect(path: &Path) -> io::Result<Self> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self(fd))
    }

    /// The end that this process was started with, as [`INHERITED`]. To be called once.
    ///
    /// # Errors
    /// When that is no socket.
    pub fn inherited() -> io::Result<Self> {
        // SAFETY: whoever started this process left this descriptor for this alone; where it did not, none of ours has been opened in its
        // place that anybody relies on, or else the check below fails.
        let fd = unsafe { OwnedFd::from_raw_fd(INHERITED) };
        let wire = Self(fd);
        match getsockopt(&wire.0, nix::sys::socket::sockopt::SockType) {
            Ok(SockType::SeqPacket) => Ok(wire),
            other => {
                // Not ours to close.
                std::mem::forget(wire);
                Err(other.err().map_or_else(|| io::ErrorKind::InvalidInput.into(), io::Error::from))
            }
        }
    }

    /// Another descriptor of this end.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// The process at the other end, as it was when it connected.
    pub fn peer(&self) -> io::Result<i32> {
        Ok(getsockopt(&self.0, PeerCredentials)?.pid())
    }

    /// From now on what is sent here waits for somebody who does not read for so long at most, and then fails.
    pub fn set_patience(&self, limit: Duration) -> io::Result<()> {
        let limit = TimeVal::new(limit.as_secs() as i64, i64::from(limit.subsec_micros()));
        Ok(setsockopt(&self.0, SendTimeout, &limit)?)
    }

    /// Ends the connection, whoever waits at it: either end sees it closed.
    pub fn shut_down(&self) {
        // One that is not connected any more needs it not.
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }

    /// Whether the other end is closed.
    pub fn hung_up(&self) -> bool {
        let mut hung = [PollFd::new(self.0.as_fd(), PollFlags::empty())];
        let polled = poll(&mut hung, PollTimeout::ZERO);
        polled.is_ok() && hung[0].revents().is_some_and(|flags| flags.contains(PollFlags::POLLHUP))
    }

    /// Sends a message. Does not wait for the other end to read it, unless it is far behind.
    pub fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), WireError> {
        self.send_with(message, fds, MsgFlags::empty())
    }

    /// Sends a message to somebody who cannot be trusted to read: fails if it would have to wait.
    pub fn post(&self, message: &impl Serialize) -> Result<(), WireError> {
        self.send_with(message, &[], MsgFlags::MSG_DONTWAIT)
    }

    fn send_with(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>], flags: MsgFlags) -> Result<(), WireError> {
        let bytes = postcard::to_stdvec(message).map_err(|e| WireError::Nonsense(e.to_string()))?;
        self.send_bytes_with(&bytes, fds, flags)
    }

    /// Sends a message that is not one of these protocols' own.
    #[cfg(test)]
    pub(crate) fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), WireError> {
        self.send_bytes_with(bytes, fds, MsgFlags::empty())
    }

    fn send_bytes_with(&self, bytes: &[u8], fds: &[BorrowedFd<'_>], flags: MsgFlags) -> Result<(), WireError> {
        if bytes.is_empty() {
            // It could not be told from the end.
            return Err(WireError::Nonsense("an empty message".into()));
        }
        if bytes.len() > MAX_BYTES {
            return Err(WireError::TooLong(bytes.len()));
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights: &[_] = if raw.is_empty() { &[] } else { &rights };
        let sent = loop {
            match sendmsg::<()>(
                self.0.as_raw_fd(),
                &[IoSlice::new(bytes)],
                rights,
                MsgFlags::MSG_NOSIGNAL | flags,
                None,
            ) {
                Err(Errno::EINTR) => (),
                sent => break sent?,
            }
        };
        if sent == bytes.len() { Ok(()) } else { Err(WireError::Nonsense("a message was cut".into())) }
    }

    /// The next message and what came with it. Waits for it, for `limit` at most; [`Duration::MAX`] has no end.
    pub fn receive<T: DeserializeOwned>(&self, limit: Duration) -> Result<(T, Vec<OwnedFd>), WireError> {
        let (bytes, fds) = self.receive_bytes(limit)?;
        Ok((decode(&bytes)?, fds))
    }

    /// The same, of a message that may not be one of these protocols' own.
    pub(crate) fn receive_bytes(&self, limit: Duration) -> Result<Received, WireError> {
        let timeout = match i32::try_from(limit.as_millis()) {
            Ok(millis) => PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX),
            Err(_) if limit == Duration::MAX => PollTimeout::NONE,
            Err(_) => PollTimeout::MAX,
        };
        loop {
            match poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) => return Err(WireError::Timeout(limit)),
                Ok(_) => (),
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(e.into()),
            }
            if let Some(message) = self.try_receive_bytes()? {
                return Ok(message);
            }
        }
    }

    /// The next message, if one is there.
    pub fn try_receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, WireError> {
        let Some((bytes, fds)) = self.try_receive_bytes()? else { return Ok(None) };
        Ok(Some((decode(&bytes)?, fds)))
    }

    fn try_receive_bytes(&self) -> Result<Option<Received>, WireError> {
        let mut bytes = vec![0; MAX_BYTES];
        let mut rights = nix::cmsg_space!([RawFd; MAX_FDS]);
        let mut buffer = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let received = loop {
            match recvmsg::<()>(self.0.as_raw_fd(), &mut buffer, Some(&mut rights), flags) {
                Err(Errno::EINTR) => (),
                Err(Errno::EAGAIN) => return Ok(None),
                received => break received?,
            }
        };
        let mut fds = Vec::new();
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                // SAFETY: the kernel has just made these descriptors for us; they are nobody else's.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        if received.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
            return Err(WireError::Nonsense("a message that is too long".into()));
        }
        let len = received.bytes;
        if len == 0 && fds.is_empty() {
            return Err(WireError::Closed);
        }
        bytes.truncate(len);
        Ok(Some((bytes, fds)))
    }
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    postcard::from_bytes(bytes).map_err(|e| WireError::Nonsense(e.to_string()))
}

/// Where others connect.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Listener {
    /// At `path`, which must be free. Whoever may reach it may connect.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&fd, Backlog::new(64)?)?;
        Ok(Self(fd))
    }

    /// The next that connects. Waits for one.
    pub fn accept(&self) -> io::Result<Wire> {
        loop {
            match accept4(self.0.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                Err(Errno::EINTR | Errno::ECONNABORTED) => (),
                // SAFETY: the kernel has just made this descriptor for us; it is nobody else's.
                accepted => return Ok(Wire(unsafe { OwnedFd::from_raw_fd(accepted?) })),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn messages_come_whole_with_their_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&dir.path().join("s")).unwrap();
        let here = Wire::connect(&dir.path().join("s")).unwrap();
        let there = listener.accept().unwrap();
        assert_eq!(there.peer().unwrap(), std::process::id() as i32);
        let (read, write) = nix::unistd::pipe().unwrap();
        here.send(&("first", 1u32), &[write.as_fd()]).unwrap();
        here.send(&("second", 2u32), &[]).unwrap();
        let ((text, number), fds) = there.receive::<(String, u32)>(SOON).unwrap();
        assert_eq!((text.as_str(), number, fds.len()), ("first", 1, 1));
        drop(write);
        let mut passed = File::from(fds.into_iter().next().unwrap());
        passed.write_all(b"x").unwrap();
        drop(passed);
        let mut got = String::new();
        File::from(read).read_to_string(&mut got).unwrap();
        assert_eq!(got, "x");
        assert_eq!(there.receive::<(String, u32)>(SOON).unwrap().0.1, 2);
        assert!(there.try_receive::<u32>().unwrap().is_none());
        assert!(matches!(there.receive::<u32>(Duration::from_millis(1)), Err(WireError::Timeout(_))));
        drop(here);
        assert!(matches!(there.receive::<u32>(SOON), Err(WireError::Closed)));
        assert!(matches!(there.send(&1u32, &[]), Err(WireError::Closed)));
    }

    #[test]
    fn who_does_not_read_is_not_waited_for() {
        let (here, there) = Wire::pair().unwrap();
        let refused = (0..1_000_000u32).find_map(|n| here.post(&n).err()).unwrap();
        assert!(matches!(refused, WireError::System(_)), "{refused}");
        assert_eq!(there.receive::<u32>(SOON).unwrap().0, 0);
        here.post(&1u32).unwrap();
    }

    #[test]
    fn nonsense_is_an_error_and_leaks_nothing() {
        let (here, there) = Wire::pair().unwrap();
        let (read, write) = nix::unistd::pipe().unwrap();
        here.send(&[0xffu8; 12], &[write.as_fd()]).unwrap();
        drop(write);
        assert!(matches!(there.receive::<String>(SOON), Err(WireError::Nonsense(_))));
        // The descriptor that came along is closed: the pipe ends.
        assert_eq!(File::from(read).read(&mut [0]).unwrap(), 0);
        assert!(matches!(here.send(&(), &[]), Err(WireError::Nonsense(_))));
        assert!(matches!(here.send(&vec![0u8; MAX_BYTES + 1], &[]), Err(WireError::TooLong(_))));
        nix::unistd::write(&here, &vec![0; MAX_BYTES + 9]).unwrap();
        assert!(matches!(there.receive::<String>(SOON), Err(WireError::Nonsense(_))));
    }
}
