//! The wire from a network card to a card of a fork of its VM, which is fed what the first receives and must not be
//! heard.
//!
//! ```text
//!  source: Mirror ── MirrorSink ── pair of datagram sockets ──▶ MirrorLink ── card of the fork
//!                      filter ◀── dropped by the kernel ◀──────────┘
//! ```
//!
//! A datagram is a frame with its header. It looks as the source's driver wants it, and the fork's driver begins as a
//! copy of that one, with the same features: a frame that the one can take, the other can. What the fork's driver asks
//! for later is not passed on.
//!
//! The ends trust each other with nothing: a source sends without waiting and takes nothing, a fork reads what may as
//! well come from the network. Of datagram sockets, an end that goes away is no end of input: the fork's card is then on
//! a wire where nothing comes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrLike, SockaddrStorage, getpeername, getsockopt, send,
    setsockopt, socketpair, sockopt,
};

use crate::isolated::take_nothing;
use crate::virtio::net::{FrameLink, MAX_FRAME, MAX_PAIRS, Offloads};

/// What is asked for as a socket's send buffer, of which the kernel makes twice as much with its own overhead: some
/// sixty of the longest frames. The host gives no more than net.core.wmem_max: with the kernel's 208 KiB there are six.
const SEND_BUFFER: usize = 2 << 20;
/// Of a send buffer, what a datagram cannot have (unix_dgram_sendmsg).
const SEND_OVERHEAD: usize = 32;

/// Why a mirror cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// It needs a socket, and has one for each pair of queues at most.
    #[error("a mirror has between 1 and {MAX_PAIRS} sockets, not {0}")]
    Sockets(usize),
    /// A descriptor of another kind.
    #[error("a mirror's sockets are connected unix datagram sockets, and this is none")]
    Kind,
    /// The longest frame would never pass.
    #[error("a mirror's socket would send {0} bytes at once, too few for a frame: raise net.core.wmem_max")]
    SendBuffer(usize),
    /// The system refuses.
    #[error("cannot prepare a mirror's socket")]
    Socket(#[source] io::Error),
    /// So many are fed already.
    #[error("a network card has {0} mirrors at most")]
    TooMany(usize),
    /// The process has no room for a thread.
    #[error("cannot start a mirror's thread")]
    Thread(#[source] io::Error),
    /// The card was taken out.
    #[error("the network card is gone")]
    Gone,
}

/// A source's ends of the wires to one card.
#[derive(Debug)]
pub struct MirrorSink(Vec<OwnedFd>);

impl MirrorSink {
    /// Takes `sockets`, one for each pair of queues. Frames of a pair that has none go to the first. Nobody need be
    /// trusted with the descriptors' other copies: who has one can divert frames or lose them, and nothing else.
    ///
    /// # Errors
    /// When one is no such socket, or cannot be made ready.
    pub fn new(sockets: Vec<OwnedFd>) -> Result<Self, MirrorError> {
        if !(1..=MAX_PAIRS).contains(&sockets.len()) {
            return Err(MirrorError::Sockets(sockets.len()));
        }
        for socket in &sockets {
            prepare(socket)?;
        }
        Ok(Self(sockets))
    }

    /// Sends a frame of the pair number `pair`, without waiting.
    ///
    /// # Errors
    /// What send(2) says.
    pub(crate) fn send(&self, pair: usize, frame: &[u8]) -> Result<(), Errno> {
        let socket = self.0.get(pair).unwrap_or(&self.0[0]);
        // Others may have taken O_NONBLOCK away: it belongs to all copies of the descriptor.
        send(socket.as_raw_fd(), frame, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL).map(drop)
    }
}

fn prepare(socket: &OwnedFd) -> Result<(), MirrorError> {
    let connected = getpeername::<SockaddrStorage>(socket.as_raw_fd()).ok().and_then(|address| address.family());
    if connected != Some(AddressFamily::Unix) || getsockopt(socket, sockopt::SockType) != Ok(SockType::Datagram) {
        return Err(MirrorError::Kind);
    }
    let refused = |error: Errno| MirrorError::Socket(error.into());
    take_nothing(socket.as_fd()).map_err(MirrorError::Socket)?;
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL).map_err(refused)?);
    fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map_err(refused)?;
    setsockopt(socket, sockopt::SndBuf, &SEND_BUFFER).map_err(refused)?;
    let room = getsockopt(socket, sockopt::SndBuf).map_err(refused)?.saturating_sub(SEND_OVERHEAD);
    if room < MAX_FRAME { Err(MirrorError::SendBuffer(room)) } else { Ok(()) }
}

/// A fork's end of a wire: gives what the source's card receives, drops what the fork's card sends.
#[derive(Debug)]
pub struct MirrorLink {
    here: OwnedFd,
    /// Keeps the pair a pair when the source closes its copy: what is sent goes nowhere as before.
    _there: OwnedFd,
}

impl MirrorLink {
    /// A new wire: the fork's end, and what the source is to make a [`MirrorSink`] of. Until it does, and when it has
    /// closed that, nothing comes.
    ///
    /// # Errors
    /// When no more descriptors are to be had.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (here, there) = socketpair(AddressFamily::Unix, SockType::Datagram, None, flags)?;
        take_nothing(there.as_fd())?;
        Ok((Self { here, _there: there.try_clone()? }, there))
    }
}

impl FrameLink for MirrorLink {
    fn fd(&self) -> BorrowedFd<'_> {
        self.here.as_fd()
    }

    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        // The source's driver has said what comes.
        Ok(())
    }

    fn segments_udp(&self) -> bool {
        // Whatever the source's can do: what comes its driver can take, and dropping can all.
        true
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::unix::net::UnixDatagram;

    use nix::unistd::{pipe, read, write};

    use super::*;
    use crate::virtio::testing::until;

    fn sink_of(socket: impl Into<OwnedFd>) -> Result<MirrorSink, MirrorError> {
        MirrorSink::new(vec![socket.into()])
    }

    #[test]
    fn the_longest_frame_passes() {
        let (link, there) = MirrorLink::pair().unwrap();
        let sink = sink_of(there).unwrap();
        let frame: Vec<u8> = (0..MAX_FRAME).map(|i| (i % 251) as u8).collect();
        assert_eq!(sink.send(0, &frame), Ok(()));
        assert_eq!(sink.send(1, b"after it"), Ok(()), "by the only socket");
        let mut got = vec![0; MAX_FRAME + 1];
        assert_eq!(read(link.fd(), &mut got), Ok(MAX_FRAME));
        assert_eq!(got[..MAX_FRAME], frame);
        assert_eq!(read(link.fd(), &mut got), Ok(8));
        assert_eq!(read(link.fd(), &mut got), Err(Errno::EAGAIN));
    }

    #[test]
    fn what_a_fork_sends_goes_nowhere_and_fills_nothing() {
        let frame = vec![7; 65_000];
        let send_much = |from: BorrowedFd<'_>| (0..5000).for_each(|_| assert_eq!(write(from, &frame), Ok(frame.len())));
        // A fork that has attached no filter.
        let (here, there) = UnixDatagram::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        let sink = sink_of(there.try_clone().unwrap()).unwrap();
        send_much(here.as_fd());
        assert_eq!(there.recv(&mut [0; 10]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(sink);
        // And one that has: before, while and after its source has its end.
        let (link, there) = MirrorLink::pair().unwrap();
        send_much(link.fd());
        let copy = there.try_clone().unwrap();
        let sink = sink_of(there).unwrap();
        send_much(link.fd());
        assert_eq!(read(&copy, &mut [0; 10]), Err(Errno::EAGAIN));
        drop((copy, sink));
        send_much(link.fd());
        assert_eq!(read(link.fd(), &mut [0; 10]), Err(Errno::EAGAIN), "no end of input either");
    }

    #[test]
    fn a_fork_that_does_not_read_makes_nobody_wait() {
        let (link, there) = MirrorLink::pair().unwrap();
        let copy = there.try_clone().unwrap();
        let sink = sink_of(there).unwrap();
        // Who has a copy may have it wait.
        fcntl(&copy, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        let frame = [7; MAX_FRAME];
        let sent = (0..10_000).find(|_| sink.send(0, &frame).is_err()).unwrap();
        assert!((3..2 * SEND_BUFFER / MAX_FRAME + 2).contains(&sent), "{sent}");
        assert_eq!(sink.send(0, &frame), Err(Errno::EAGAIN));
        read(link.fd(), &mut [0; MAX_FRAME]).unwrap();
        assert_eq!(sink.send(0, &frame), Ok(()));
        drop(link);
        // A program that another test starts may have the end for a moment.
        until("refusal", || sink.send(0, &frame) == Err(Errno::ECONNREFUSED));
    }

    #[test]
    fn descriptors_that_are_no_such_sockets_are_refused() {
        let connected = UdpSocket::bind("127.0.0.1:0").unwrap();
        connected.connect(connected.local_addr().unwrap()).unwrap();
        let pair = |kind| socketpair(AddressFamily::Unix, kind, None, SockFlag::empty()).unwrap().0;
        let bad: [OwnedFd; 6] = [
            std::fs::File::open("/dev/null").unwrap().into(),
            pipe().unwrap().1,
            connected.into(),
            UnixDatagram::unbound().unwrap().into(),
            pair(SockType::Stream),
            pair(SockType::SeqPacket),
        ];
        for (i, bad) in bad.into_iter().enumerate() {
            let (_link, good) = MirrorLink::pair().unwrap();
            assert!(matches!(MirrorSink::new(vec![good, bad]), Err(MirrorError::Kind)), "{i}");
        }
        assert!(matches!(MirrorSink::new(Vec::new()), Err(MirrorError::Sockets(0))));
        let (_links, many): (Vec<_>, Vec<_>) = (0..=MAX_PAIRS).map(|_| MirrorLink::pair().unwrap()).unzip();
        assert!(matches!(MirrorSink::new(many), Err(MirrorError::Sockets(n)) if n == MAX_PAIRS + 1));
    }
}
