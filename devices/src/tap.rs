//! A host tap interface, as the network device's wire.
//!
//! Frames come and go with a virtio-net header before them (IFF_VNET_HDR, 12 bytes), so checksums and segmentation can be
//! left to the other side: see `Documentation/networking/tuntap.rst` and `drivers/net/tun.c`.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_ulong};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::net::if_::if_nametoindex;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use crate::virtio::net::{FrameLink, NET_HEADER, Offloads};

/// Why an interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No interface has that name. None is made: its owner sets it up, and a typing error must not.
    #[error("network interface {0} does not exist")]
    Absent(String),
    /// Someone else has it open.
    #[error("tap interface {0} is in use")]
    Busy(String),
    /// The name is of another sort of interface: a real card, a tun, or a tap with several queues.
    #[error("network interface {0} is not a tap with a single queue")]
    NotATap(String),
    /// Neither owned by this user nor by its group, or /dev/net/tun may not be opened.
    #[error("no permission to use tap interface {0}")]
    Permission(String),
    /// Anything else that the system said.
    #[error("cannot open tap interface {name}")]
    Io {
        /// The interface's name.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

/// An open tap. The interface has no other user as long as it lives.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Opens the tap interface called `name`.
    ///
    /// # Errors
    /// Each way in which it is unfit has its own variant.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let named = || name.to_owned();
        let because = |source: io::Error| match source.raw_os_error() {
            Some(libc::EBUSY) => TapError::Busy(named()),
            Some(libc::EINVAL) => TapError::NotATap(named()),
            Some(libc::EPERM | libc::EACCES) => TapError::Permission(named()),
            _ => TapError::Io { name: named(), source },
        };
        let mut request = request(name).ok_or_else(|| TapError::Absent(named()))?;
        // TUNSETIFF makes an interface where there is none: look before, and after in case it vanished in between.
        let index = if_nametoindex(name).map_err(|_| TapError::Absent(named()))?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        let file = options.open("/dev/net/tun").map_err(because)?;
        // SAFETY: TUNSETIFF reads and writes an ifreq, which `request` is.
        let attached = unsafe { ioctl_with_mut_ref(&file, libc::TUNSETIFF, &mut request) };
        check(attached).map_err(because)?;
        if if_nametoindex(name) != Ok(index) {
            // Closing the file takes away what was just made.
            return Err(TapError::Absent(named()));
        }
        let header = NET_HEADER as c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        let sized = unsafe { ioctl_with_ref(&file, libc::TUNSETVNETHDRSZ, &header) };
        check(sized).map_err(because)?;
        Ok(Self { file })
    }
}

impl FrameLink for Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let mut flags = 0;
        for (on, flag) in [
            (offloads.checksum, libc::TUN_F_CSUM),
            (offloads.tso4, libc::TUN_F_TSO4),
            (offloads.tso6, libc::TUN_F_TSO6),
        ] {
            flags |= if on { c_ulong::from(flag) } else { 0 };
        }
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        check(unsafe { ioctl_with_val(&self.file, libc::TUNSETOFFLOAD, flags) })
    }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The request for a tap called `name`; none when no interface can be called so.
fn request(name: &str) -> Option<libc::ifreq> {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let fits = !name.is_empty() && name.len() < libc::IFNAMSIZ && !name.contains('\0');
    fits.then(|| {
        let mut ifr_name = [0; libc::IFNAMSIZ];
        for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags as libc::c_short } }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_does_not_exist_is_not_made() {
        for name in ["civic-no-such", "", "a-name-longer-than-the-kernel-takes", "%d"] {
            assert!(matches!(Tap::open(name), Err(TapError::Absent(_))), "{name}");
        }
        assert!(if_nametoindex("civic-no-such").is_err());
    }

    #[test]
    fn the_loopback_interface_is_no_tap() {
        let refused = Tap::open("lo");
        assert!(matches!(refused, Err(TapError::NotATap(_) | TapError::Permission(_) | TapError::Io { .. })));
    }
}
