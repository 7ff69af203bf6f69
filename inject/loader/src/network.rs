//! Setting up the program's network card, and taking the cards down that came with the fork.
//!
//! By the ioctls of netdevice(7), which every kernel with IPv4 has.
#![allow(unsafe_code)]

use core::ffi::CStr;
use core::net::Ipv4Addr;

use civic_loader::{FromGuest, Launch, Mac, Network, Step};
use rustix::fd::OwnedFd;
use rustix::io::{Errno, Result};
use rustix::ioctl::{Opcode, Updater, ioctl};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::failure::{Ending, Failure};
use crate::files::{detached, find_folder};
use crate::link::Link;
use crate::news::News;
use crate::time::Deadline;

const SIOCADDRT: Opcode = 0x890b;
const SIOCGIFFLAGS: Opcode = 0x8913;
const SIOCSIFFLAGS: Opcode = 0x8914;
const SIOCSIFADDR: Opcode = 0x8916;
const SIOCSIFNETMASK: Opcode = 0x891c;
const SIOCSIFMTU: Opcode = 0x8922;
const SIOCGIFHWADDR: Opcode = 0x8927;

const IFF_UP: u16 = 1;
const RTF_UP: u16 = 1;
const RTF_GATEWAY: u16 = 2;

/// The kernel's `struct ifreq`: a name, and what is asked or told.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Request {
    name: [u8; 16],
    value: [u8; 24],
}

/// The kernel's `struct rtentry`.
#[repr(C)]
struct Route {
    _hash: usize,
    destination: [u8; 16],
    gateway: [u8; 16],
    mask: [u8; 16],
    flags: u16,
    _unused: [u16; 3],
    _more: [usize; 2],
    _metric: u16,
    device: *const u8,
    _mtu: usize,
    _window: usize,
    _round_trip: u16,
}

const _: () = assert!(size_of::<Request>() == 40);
const _: () = assert!(size_of::<Route>() == 120);

/// Does what the launch says of cards.
pub fn set_up<'a>(link: &mut Link<'_>, launch: &Launch<'a>) -> core::result::Result<(), Ending<'a>> {
    if launch.network.is_none() && launch.down.is_empty() {
        return Ok(());
    }
    let failure = |errno, text| Failure::new(Step::Network, errno, text);
    let cards = Cards::new().map_err(|e| failure(e, "the guest's kernel has no network that could be set up"))?;
    for mac in launch.down {
        // One that is not there need not be taken down.
        if let Ok(Some(card)) = cards.find(mac) {
            cards.set_up(card, false).map_err(|e| failure(e, "a card of the fork's cannot be taken down"))?;
        }
    }
    let Some(network) = &launch.network else {
        return Ok(());
    };
    let deadline = Deadline::after_ms(launch.timeout_ms.into());
    let news = News::new();
    let card = loop {
        match cards.find(&network.mac) {
            Ok(Some(card)) => break card,
            Ok(None) if deadline.passed() => {
                return Err(failure(Errno::NODEV, "the guest's kernel has not found the new network card").into());
            }
            Ok(None) => news.wait(b"SUBSYSTEM=net"),
            Err(e) => return Err(failure(e, "the guest's kernel does not list its network cards").into()),
        }
    };
    cards.configure(card, network)?;
    match network.gateway.map(|gateway| cards.route(card, gateway)) {
        None | Some(Ok(())) => Ok(()),
        Some(Err(Errno::EXIST)) => {
            Ok(link.tell(FromGuest::Warning("the guest has a default route of its own, which stays"))?)
        }
        Some(Err(e)) => Err(failure(e, "the gateway cannot be used as such").into()),
    }
}

/// A card's name, with zeroes after it.
type Name = [u8; 16];

/// All cards of the guest.
struct Cards {
    socket: OwnedFd,
    sysfs: OwnedFd,
}

impl Cards {
    fn new() -> Result<Self> {
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        Ok(Self { socket, sysfs: detached(c"sysfs", &[])? })
    }

    fn find(&self, mac: &Mac) -> Result<Option<Name>> {
        find_folder(&self.sysfs, c"class/net", |name, _: &OwnedFd| {
            let name = name_of(name)?;
            // `struct sockaddr`: a family, then the address.
            let [_, _, address @ ..] = self.ask::<SIOCGIFHWADDR>(name, [0; 24]).ok()?;
            (address[..6] == *mac).then_some(name)
        })
    }

    fn configure(&self, card: Name, network: &Network) -> core::result::Result<(), Failure<'static>> {
        let failure = |errno, text| Failure::new(Step::Network, errno, text);
        if let Some(mtu) = network.mtu {
            let mut value = [0; 24];
            value[..4].copy_from_slice(&i32::from(mtu).to_ne_bytes());
            self.ask::<SIOCSIFMTU>(card, value).map_err(|e| failure(e, "the network card does not take the MTU"))?;
        }
        self.ask::<SIOCSIFADDR>(card, padded(network.address))
            .map_err(|e| failure(e, "the network card does not take the address"))?;
        let mask = u32::MAX.checked_shl(32 - u32::from(network.prefix)).unwrap_or(0);
        self.ask::<SIOCSIFNETMASK>(card, padded(mask.into()))
            .map_err(|e| failure(e, "the network card does not take the prefix"))?;
        self.set_up(card, true).map_err(|e| failure(e, "the network card cannot be set up"))
    }

    fn set_up(&self, card: Name, up: bool) -> Result<()> {
        let mut value = self.ask::<SIOCGIFFLAGS>(card, [0; 24])?;
        let flags = u16::from_ne_bytes([value[0], value[1]]);
        let flags = if up { flags | IFF_UP } else { flags & !IFF_UP };
        value[..2].copy_from_slice(&flags.to_ne_bytes());
        self.ask::<SIOCSIFFLAGS>(card, value).map(drop)
    }

    /// Sends what is for no known network to `gateway`.
    fn route(&self, card: Name, gateway: Ipv4Addr) -> Result<()> {
        let mut route = Route {
            _hash: 0,
            destination: address(Ipv4Addr::UNSPECIFIED),
            gateway: address(gateway),
            mask: address(Ipv4Addr::UNSPECIFIED),
            flags: RTF_UP | RTF_GATEWAY,
            _unused: [0; 3],
            _more: [0; 2],
            _metric: 0,
            device: card.as_ptr(),
            _mtu: 0,
            _window: 0,
            _round_trip: 0,
        };
        // SAFETY: SIOCADDRT reads a `struct rtentry`, which this is.
        let request = unsafe { Updater::<SIOCADDRT, Route>::new(&mut route) };
        // SAFETY: as above; the device's name, which it points to, is a string of ours.
        unsafe { ioctl(&self.socket, request) }
    }

    /// One of the `SIOC…IF…`; gives the answer's value.
    fn ask<const OPCODE: Opcode>(&self, name: Name, value: [u8; 24]) -> Result<[u8; 24]> {
        let mut request = Request { name, value };
        // SAFETY: all of these read and write a `struct ifreq`, which this is.
        let updater = unsafe { Updater::<OPCODE, Request>::new(&mut request) };
        // SAFETY: as above.
        unsafe { ioctl(&self.socket, updater) }?;
        Ok(request.value)
    }
}

/// A name that the kernel gave us; it has none that is longer.
fn name_of(name: &CStr) -> Option<Name> {
    let mut padded = [0; 16];
    padded.get_mut(..name.to_bytes_with_nul().len())?.copy_from_slice(name.to_bytes_with_nul());
    Some(padded)
}

/// `struct sockaddr_in`.
fn address(address: Ipv4Addr) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&AddressFamily::INET.as_raw().to_ne_bytes());
    bytes[4..8].copy_from_slice(&address.octets());
    bytes
}

/// The same as an `ifreq`'s value.
fn padded(host: Ipv4Addr) -> [u8; 24] {
    let mut value = [0; 24];
    value[..16].copy_from_slice(&address(host));
    value
}
