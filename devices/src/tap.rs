//! A host tap interface, as the network device's wire.
//!
//! Frames come and go with a virtio-net header before them (IFF_VNET_HDR, 12 bytes), so checksums and segmentation can be
//! left to the other side: see `Documentation/networking/tuntap.rst` and `drivers/net/tun.c`.
//!
//! An interface made with `multi_queue` is opened once for each queue. A queue that its user does not serve is detached, or the
//! kernel would steer flows to it.
#![allow(unsafe_code)]

#[cfg(test)]
pub(crate) mod namespace;
#[cfg(test)]
mod tests;

use std::ffi::{c_int, c_ulong};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, PoisonError};

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
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
    /// The name is of another sort of interface: a real card, or a tun.
    #[error("network interface {0} is not a tap")]
    NotATap(String),
    /// Several queues were asked for, and it was made with one.
    #[error("tap interface {0} was made with a single queue")]
    SingleQueue(String),
    /// One queue was asked for, and it was made for several. The kernel would let a second user in unasked.
    #[error("tap interface {0} was made for several queues")]
    MultiQueue(String),
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

/// One queue of an open tap. The interface has no other user as long as it lives.
#[derive(Debug)]
pub struct Tap {
    file: File,
    mtu: Option<u16>,
    segments_udp: bool,
    /// Whether frames come here; none when it cannot be changed, for a tap with a single queue.
    attached: Option<Mutex<bool>>,
}

impl Tap {
    /// Opens `queues` queues of the tap interface called `name`. It must have been made with `multi_queue` if they are more than
    /// one, and without if not.
    ///
    /// # Errors
    /// Each way in which it is unfit has its own variant.
    pub fn open(name: &str, queues: usize) -> Result<Vec<Self>, TapError> {
        let io = |source: io::Error| TapError::Io { name: name.to_owned(), source };
        let interface = Interface::find(name)?;
        let several = queues > 1;
        // A tap has a carrier only while someone has it open. With a single queue the kernel says by itself that it is in use.
        let busy = several && interface.has_carrier().map_err(io)?;
        let mtu = interface.mtu().map_err(io)?;
        let mut taps = Vec::new();
        for _ in 0..queues {
            let file = interface.attach(several)?;
            if busy {
                return Err(TapError::Busy(name.to_owned()));
            }
            taps.push(Self { file, mtu, segments_udp: false, attached: several.then(|| Mutex::new(true)) });
        }
        let Some(first) = taps.first() else { return Err(io(io::ErrorKind::InvalidInput.into())) };
        let header = NET_HEADER as c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int. It is the interface's, for all queues, as are the offloads.
        let sized = unsafe { ioctl_with_ref(&first.file, libc::TUNSETVNETHDRSZ, &header) };
        check(sized).map_err(io)?;
        // From Linux 6.2 on (399e0827642f). Asked for and taken back: what the last user left is gone with it.
        let udp = Offloads { checksum: true, uso4: true, uso6: true, ..Offloads::default() };
        let segments_udp = first.set_offloads(udp).is_ok();
        first.set_offloads(Offloads::default()).map_err(io)?;
        taps.iter_mut().for_each(|tap| tap.segments_udp = segments_udp);
        Ok(taps)
    }
}

impl FrameLink for Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let Offloads { checksum, tso4, tso6, ecn, uso4, uso6 } = offloads;
        // The kernel has either none of the last two or both, and takes a flag only with those on which it rests.
        let uso = uso4 && uso6;
        let mut flags = 0;
        for (on, flag) in [
            (checksum, libc::TUN_F_CSUM),
            (tso4, libc::TUN_F_TSO4),
            (tso6, libc::TUN_F_TSO6),
            (ecn, libc::TUN_F_TSO_ECN),
            (uso, libc::TUN_F_USO4),
            (uso, libc::TUN_F_USO6),
        ] {
            flags |= if on { c_ulong::from(flag) } else { 0 };
        }
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        check(unsafe { ioctl_with_val(&self.file, libc::TUNSETOFFLOAD, flags) })
    }

    fn segments_udp(&self) -> bool {
        self.segments_udp
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        let Some(now) = &self.attached else { return Ok(()) };
        let mut now = now.lock().unwrap_or_else(PoisonError::into_inner);
        if *now == attached {
            return Ok(());
        }
        let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let request = request([0; libc::IFNAMSIZ], flags);
        // SAFETY: TUNSETQUEUE reads an ifreq, which `request` is.
        check(unsafe { ioctl_with_ref(&self.file, libc::TUNSETQUEUE, &request) })?;
        *now = attached;
        Ok(())
    }
}

/// A network interface by its name.
struct Interface<'a> {
    name: &'a str,
    raw_name: [libc::c_char; libc::IFNAMSIZ],
    index: u32,
}

impl<'a> Interface<'a> {
    fn find(name: &'a str) -> Result<Self, TapError> {
        let absent = || TapError::Absent(name.to_owned());
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains('\0') {
            return Err(absent());
        }
        let mut raw_name = [0; libc::IFNAMSIZ];
        for (to, from) in raw_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        let index = if_nametoindex(name).map_err(|_| absent())?;
        Ok(Self { name, raw_name, index })
    }

    /// Opens a queue of it.
    fn attach(&self, several: bool) -> Result<File, TapError> {
        let named = || self.name.to_owned();
        let because = |source: io::Error| match source.raw_os_error() {
            Some(libc::EBUSY) => TapError::Busy(named()),
            Some(libc::EPERM | libc::EACCES) => TapError::Permission(named()),
            _ => TapError::Io { name: named(), source },
        };
        let file = match self.try_attach(several) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                // Either no tap at all, or of the other sort: then any answer but this one comes.
                let other = self.try_attach(!several);
                return Err(match other {
                    Err(e) if e.raw_os_error() == Some(libc::EINVAL) => TapError::NotATap(named()),
                    _ if several => TapError::SingleQueue(named()),
                    _ => TapError::MultiQueue(named()),
                });
            }
            other => other.map_err(because)?,
        };
        // TUNSETIFF makes an interface where there is none: it may have vanished since it was found.
        if if_nametoindex(self.name) != Ok(self.index) {
            // Closing the file takes away what was just made.
            return Err(TapError::Absent(named()));
        }
        Ok(file)
    }

    fn try_attach(&self, several: bool) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        let file = options.open("/dev/net/tun")?;
        let several = if several { libc::IFF_MULTI_QUEUE } else { 0 };
        let mut request = request(self.raw_name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several);
        // SAFETY: TUNSETIFF reads and writes an ifreq, which `request` is.
        check(unsafe { ioctl_with_mut_ref(&file, libc::TUNSETIFF, &mut request) })?;
        Ok(file)
    }

    /// The longest packet that it carries; none when that is longer than Ethernet can say.
    fn mtu(&self) -> io::Result<Option<u16>> {
        let mut request = request(self.raw_name, 0);
        // SAFETY: SIOCGIFMTU reads the name of an ifreq and writes its MTU.
        check(unsafe { ioctl_with_mut_ref(&any_socket()?, libc::SIOCGIFMTU, &mut request) })?;
        // SAFETY: the call has just written this member.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        Ok(u16::try_from(mtu).ok())
    }

    /// Whether something is at its other end. One that is down does not tell, and counts as free.
    fn has_carrier(&self) -> io::Result<bool> {
        let mut value = EthtoolValue { command: ETHTOOL_GLINK, data: 0 };
        let mut request = request(self.raw_name, 0);
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        // SAFETY: ETHTOOL_GLINK reads an ifreq and reads and writes the `ethtool_value` behind its pointer, which is exclusive to
        // this call.
        let asked = unsafe { ioctl_with_mut_ref(&any_socket()?, libc::SIOCETHTOOL, &mut request) };
        match check(asked) {
            // Another sort of interface may not know, and is refused for what it is.
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
            Err(e) => Err(e),
            Ok(()) => Ok(value.data != 0),
        }
    }
}

/// `struct ethtool_value` (linux/ethtool.h).
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

const ETHTOOL_GLINK: u32 = 0xa;

/// A socket that interfaces can be asked about.
fn any_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?)
}

fn request(ifr_name: [libc::c_char; libc::IFNAMSIZ], flags: c_int) -> libc::ifreq {
    libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags as libc::c_short } }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
