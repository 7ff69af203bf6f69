//! A wire that leads nowhere: what a network card sends is dropped, and nothing ever comes. For the cloned card of a forked VM, which has
//! its source's address and must not be heard beside it.
//!
//! The kernel drops: the far end of a socket pair has a filter that takes nothing, so no queue fills and no thread is needed.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::virtio::net::{FrameLink, Offloads};

/// See the module's documentation.
#[derive(Debug)]
pub struct IsolatedLink {
    here: OwnedFd,
    carrier: bool,
    /// Keeps the pair a pair.
    _there: OwnedFd,
}

impl IsolatedLink {
    /// A new one.
    ///
    /// # Errors
    /// When no more descriptors are to be had.
    pub fn new() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (here, there) = socketpair(AddressFamily::Unix, SockType::Datagram, None, flags)?;
        take_nothing(there.as_fd())?;
        Ok(Self { here, carrier: true, _there: there })
    }

    /// One whose cable is out.
    ///
    /// # Errors
    /// As [`IsolatedLink::new`].
    pub fn down() -> io::Result<Self> {
        Ok(Self { carrier: false, ..Self::new()? })
    }
}

/// Has the kernel drop whatever is sent to `socket`. Who sends is told that it went.
///
/// # Errors
/// What the system says.
pub(crate) fn take_nothing(socket: BorrowedFd<'_>) -> io::Result<()> {
    // BPF_RET | BPF_K 0: of each packet, nothing (socket(7), SO_ATTACH_FILTER).
    let mut nothing = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut nothing };
    let size = size_of::<libc::sock_fprog>() as libc::socklen_t;
    // SAFETY: `program` is a live sock_fprog of this size whose filter has one instruction; the kernel copies both.
    let attached = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size,
        )
    };
    Errno::result(attached)?;
    Ok(())
}

impl FrameLink for IsolatedLink {
    fn fd(&self) -> BorrowedFd<'_> {
        self.here.as_fd()
    }

    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn carrier(&self) -> bool {
        self.carrier
    }

    fn segments_udp(&self) -> bool {
        // Whatever the source's can do, dropping can.
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::unistd::{read, write};

    #[test]
    fn takes_everything_and_gives_nothing() {
        let link = IsolatedLink::new().unwrap();
        let frame = vec![7; 65_000];
        for _ in 0..10_000 {
            assert_eq!(write(link.fd(), &frame).unwrap(), frame.len());
        }
        assert_eq!(read(link.fd(), &mut [0; 10]), Err(Errno::EAGAIN));
        let mut wait = [PollFd::new(link.fd(), PollFlags::POLLIN | PollFlags::POLLOUT)];
        poll(&mut wait, PollTimeout::ZERO).unwrap();
        assert_eq!(wait[0].revents().unwrap(), PollFlags::POLLOUT);
    }
}
