//! What the kernel tells of devices that come: who waits for one need not look for it all the time, while the kernel has it to bring.
//!
//! Kernel uevents, as the kernel itself sends them; netlink(7), `lib/kobject_uevent.c`.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use rustix::io::{Errno, Result};
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use crate::time::{Deadline, sleep_ms, timespec};

/// The kernel's own, not udev's.
const KERNELS: u32 = 1;
/// After how long somebody looks in any case, in milliseconds, and where nothing is told.
const LOOK_MS: u64 = 50;
const ALONE_MS: u64 = 3;

/// Where it is heard, if the kernel allows.
pub struct News(Option<OwnedFd>);

impl News {
    /// From now on.
    pub fn new() -> Self {
        Self(listen().ok())
    }

    /// Waits until something of a subsystem has come, changed or gone: `SUBSYSTEM=` and its name. A short time at most.
    pub fn wait(&self, subsystem: &[u8]) {
        let Some(socket) = &self.0 else { return sleep_ms(ALONE_MS) };
        let deadline = Deadline::after_ms(LOOK_MS);
        let mut message = [0; 2048];
        while let Some(left) = deadline.left_ms() {
            let mut watched = [PollFd::new(socket, PollFlags::IN)];
            let _ = poll(&mut watched, Some(&timespec(left)));
            let mut heard = false;
            loop {
                match recv(socket, &mut message, RecvFlags::DONTWAIT) {
                    Ok((bytes, _)) => heard |= message[..bytes].split(|byte| *byte == 0).any(|word| word == subsystem),
                    // Some were lost, or none is left.
                    Err(Errno::NOBUFS) => heard = true,
                    Err(_) => break,
                }
            }
            if heard {
                return;
            }
        }
    }
}

fn listen() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(KOBJECT_UEVENT))?;
    bind(&socket, &SocketAddrNetlink::new(0, KERNELS))?;
    Ok(socket)
}
