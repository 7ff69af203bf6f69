//! The network device (virtio 1.2 §5.1): one receive and one transmit queue, frames to and from a host tap.
//!
//! ```text
//!  guest ── transmitq ──▶ writev from guest memory ──▶ tap
//!  guest ◀── receiveq ◀── one frame held here ◀─────── tap
//! ```
//!
//! A frame is read only when the one before was delivered: while the receive ring is empty, frames wait (and in the end
//! are dropped) in the tap's queue, where the host counts them.
//!
//! Readiness is edge-triggered: `readable` remembers that the tap was not yet read dry.

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::unistd::read;
use tracing::warn;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};

use super::ring::{Chain, RING_FEATURES, Ring, Served};
use super::state::{DeviceState, NetStateV1, StateError};
use super::worker::{Fault, Handler, Worker, Workers};
use super::{ActivateError, Activation, DeviceType, VirtioDevice, read_config_bytes};
use crate::counters::{Counter, Counters};

/// Bytes of the header before a frame, `struct virtio_net_hdr_v1`.
pub const NET_HEADER: usize = 12;
/// Where that header says how many receive buffers a frame took.
const NUM_BUFFERS: usize = 10;
/// The largest frame with its header: a segmentation-offloaded packet of 64 KiB, its Ethernet header and a VLAN tag.
const MAX_FRAME: usize = NET_HEADER + 18 + 65535;
const QUEUE_SIZE: u16 = 256;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Frames received before the worker looks at its commands again.
const RECEIVE_TURN: usize = 64;

/// A hardware address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A locally administered unicast address that is always the same for `seed` (the machine's name and the device's id).
    pub fn derived(seed: &str) -> Self {
        // FNV-1a: stable over releases, which std's hasher does not promise. Folded, because its low bits are the best.
        let hash = seed
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        let [a, b, c, d, e, f, g, h] = hash.to_le_bytes();
        Self([(a ^ g) & 0xfc | 0x02, b ^ h, c, d, e, f])
    }
}

/// What the far side of a link may leave undone in the frames that it sends to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums.
    pub checksum: bool,
    /// Segmentation of TCP over IPv4.
    pub tso4: bool,
    /// Segmentation of TCP over IPv6.
    pub tso6: bool,
}

/// Something that carries frames, each with a header of [`NET_HEADER`] bytes before it, one per read or write.
pub trait FrameLink: Send + Sync {
    /// Its descriptor, non-blocking. EBADFD from it says that the interface is gone for good.
    fn fd(&self) -> BorrowedFd<'_>;
    /// Says what the guest can cope with.
    ///
    /// # Errors
    /// When the far side cannot be told.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;
}

/// A virtio network device.
pub struct Net {
    name: String,
    link: Arc<dyn FrameLink>,
    mac: Mac,
    counters: Arc<NetCounters>,
    /// Frames that wait for receive buffers: the worker's while it runs, here while it is parked.
    held: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Net {
    /// A device called `id` with the address `mac` on `link`.
    pub fn new(id: &str, link: Arc<dyn FrameLink>, mac: Mac) -> Self {
        Self { name: format!("net:{id}"), link, mac, counters: Arc::default(), held: Arc::default() }
    }

    fn held(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        RING_FEATURES
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_GUEST_CSUM
            | 1 << VIRTIO_NET_F_GUEST_TSO4
            | 1 << VIRTIO_NET_F_GUEST_TSO6
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // §5.1.4: the address and the status; nothing after them is offered.
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.mac.0);
        config[6..].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Workers, ActivateError> {
        let (receive, receive_kick) = Ring::take(&mut activation, RECEIVE)?;
        let (transmit, transmit_kick) = Ring::take(&mut activation, TRANSMIT)?;
        let has = |feature: u32| activation.features & 1 << feature != 0;
        let offloads = Offloads {
            checksum: has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: has(VIRTIO_NET_F_GUEST_CSUM) && has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: has(VIRTIO_NET_F_GUEST_CSUM) && has(VIRTIO_NET_F_GUEST_TSO6),
        };
        let mut wire = Wire {
            name: self.name.clone(),
            link: Arc::clone(&self.link),
            counters: Arc::clone(&self.counters),
            readable: true,
            gone: false,
        };
        if let Err(error) = self.link.set_offloads(offloads) {
            warn!(device = %self.name, "cannot tell the tap what the guest offloads: {error}");
            wire.failed(&error);
        }
        let mut frame = vec![0; MAX_FRAME].into_boxed_slice();
        let mut held = 0;
        if let Some(waiting) = self.held().pop() {
            held = waiting.len();
            frame[..held].copy_from_slice(&waiting);
        }
        let handler = NetHandler {
            receive,
            transmit,
            mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
            wire,
            frame,
            held,
            parked: Arc::clone(&self.held),
            transmit_blocked: false,
        };
        let kicks = vec![receive_kick, transmit_kick];
        let worker = Worker::spawn(&self.name, kicks, handler, &activation);
        Ok(worker.map_err(ActivateError::Worker)?.into())
    }

    fn reset(&mut self) {
        self.held().clear();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(NetStateV1 { mac: self.mac.0, held: self.held().clone() })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Net(NetStateV1 { mac, held }) = state else {
            return Err(StateError::WrongDevice("network card"));
        };
        if mac != self.mac.0 {
            let (saved, now) = (format!("{mac:02x?}"), format!("{:02x?}", self.mac.0));
            return Err(StateError::Differs { what: "the network card's address", saved, now });
        }
        if held.len() > 1 || held.iter().any(|frame| frame.len() <= NET_HEADER || frame.len() > MAX_FRAME) {
            return Err(StateError::Impossible("a network card holds what is no frame"));
        }
        *self.held() = held;
        Ok(())
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.counters) as _
    }
}

#[derive(Default)]
struct NetCounters {
    rx_frames: Counter,
    rx_bytes: Counter,
    rx_drops: Counter,
    tx_frames: Counter,
    tx_bytes: Counter,
    tx_drops: Counter,
    errors: Counter,
}

impl Counters for NetCounters {
    fn read(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("rx_frames", self.rx_frames.get()),
            ("rx_bytes", self.rx_bytes.get()),
            ("rx_drops", self.rx_drops.get()),
            ("tx_frames", self.tx_frames.get()),
            ("tx_bytes", self.tx_bytes.get()),
            ("tx_drops", self.tx_drops.get()),
            ("errors", self.errors.get()),
        ]
    }
}

/// The link and what is known of its state.
struct Wire {
    name: String,
    link: Arc<dyn FrameLink>,
    counters: Arc<NetCounters>,
    /// It was not yet read until it would block.
    readable: bool,
    /// The interface was deleted: nothing is read any more, what is sent is dropped.
    gone: bool,
}

impl Wire {
    fn failed(&mut self, error: &io::Error) {
        self.counters.errors.add(1);
        if error.raw_os_error() == Some(libc::EBADFD) && !self.gone {
            self.gone = true;
            self.readable = false;
            warn!(device = %self.name, "its tap interface is gone: the guest's frames go nowhere");
        }
    }

    /// Reads one frame with its header into `frame`; zero when none waits.
    fn read(&mut self, frame: &mut [u8]) -> usize {
        while self.readable && !self.gone {
            match read(self.link.fd(), frame) {
                Ok(len) if len > NET_HEADER => return len,
                // The far side was closed, or sends what is no frame.
                Ok(_) => {
                    self.counters.errors.add(1);
                    self.readable = false;
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.readable = false,
                Err(errno) => {
                    self.readable = false;
                    self.failed(&errno.into());
                }
            }
        }
        0
    }

    /// Sends one frame with its header.
    fn send(&mut self, chain: &Chain<'_>) -> Served {
        let frame = &chain.readable;
        let counters = Arc::clone(&self.counters);
        if self.gone || frame.len() <= NET_HEADER || frame.len() > MAX_FRAME {
            counters.tx_drops.add(1);
            return Served::Used(0);
        }
        match frame.send(self.link.fd()) {
            Ok(_) => {
                counters.tx_frames.add(1);
                counters.tx_bytes.add((frame.len() - NET_HEADER) as u64);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Served::NotNow,
            // The interface is down (EIO), or the frame is nonsense (EINVAL).
            Err(e) => {
                counters.tx_drops.add(1);
                self.failed(&e);
            }
        }
        Served::Used(0)
    }
}

struct NetHandler {
    receive: Ring,
    transmit: Ring,
    /// A frame may spread over several receive buffers.
    mergeable: bool,
    wire: Wire,
    /// Room for one frame with its header.
    frame: Box<[u8]>,
    /// Bytes of `frame` that wait for receive buffers.
    held: usize,
    /// Where they are left while the worker is parked.
    parked: Arc<Mutex<Vec<Vec<u8>>>>,
    /// The link would not take the next frame: it says when it does.
    transmit_blocked: bool,
}

impl Handler for NetHandler {
    fn sources(&self) -> Vec<(RawFd, u16)> {
        vec![(self.wire.link.fd().as_raw_fd(), 0)]
    }

    fn kicked(&mut self, position: usize) -> Result<(), Fault> {
        if position == usize::from(RECEIVE) { self.receive_frames() } else { self.send_frames() }
    }

    fn ready(&mut self, _token: u16) -> Result<(), Fault> {
        self.wire.readable = true;
        self.receive_frames()?;
        if self.transmit_blocked { self.send_frames() } else { Ok(()) }
    }

    fn drain(&mut self) {
        let held = &self.frame[..self.held];
        let waiting = if held.is_empty() { Vec::new() } else { vec![held.to_vec()] };
        *self.parked.lock().unwrap_or_else(PoisonError::into_inner) = waiting;
    }

    fn rings(&self) -> Vec<&Ring> {
        vec![&self.receive, &self.transmit]
    }
}

impl NetHandler {
    fn send_frames(&mut self) -> Result<(), Fault> {
        let Self { transmit, wire, transmit_blocked, .. } = self;
        *transmit_blocked = false;
        transmit.serve(|chain| {
            let served = wire.send(&chain);
            *transmit_blocked = served == Served::NotNow;
            Ok(served)
        })
    }

    /// Delivers frames until none waits, the guest has no buffers, or it was enough for one turn.
    fn receive_frames(&mut self) -> Result<(), Fault> {
        self.receive.ignore_kicks()?;
        for _ in 0..RECEIVE_TURN {
            if self.held == 0 {
                self.held = self.wire.read(&mut self.frame);
            }
            if self.held == 0 {
                return self.receive.notify();
            }
            if !self.deliver()? {
                return self.receive.notify();
            }
        }
        self.receive.notify()?;
        self.receive.kick_self()
    }

    /// Copies the held frame into receive buffers; false, with the buffers put back and a kick asked
    /// for, when there are not enough.
    fn deliver(&mut self) -> Result<bool, Fault> {
        let ram = self.receive.ram();
        let mut chains: Vec<Chain<'_>> = Vec::new();
        let mut room = 0;
        while room < self.held {
            if chains.len() == usize::from(self.receive.size()) {
                break;
            }
            let Some(chain) = self.receive.next(&ram)? else {
                // Before they are put back: the kick has to come with the next buffer, not with one that is there.
                if self.receive.await_kick()? {
                    continue;
                }
                self.receive.put_back(chains.len() as u16);
                return Ok(false);
            };
            if chain.writable.len() < NET_HEADER {
                return Err(Fault(format!("receive buffer {} has no room for a header", chain.head)));
            }
            room += chain.writable.len();
            chains.push(chain);
            if !self.mergeable {
                break;
            }
        }
        if room < self.held {
            // No buffer, nor a whole ring of them, will ever hold it.
            self.receive.put_back(chains.len() as u16);
            self.wire.counters.rx_drops.add(1);
            self.held = 0;
            return Ok(true);
        }
        let buffers = if self.mergeable { chains.len() as u16 } else { 1 };
        self.frame[NUM_BUFFERS..NET_HEADER].copy_from_slice(&buffers.to_le_bytes());
        self.wire.counters.rx_frames.add(1);
        self.wire.counters.rx_bytes.add((self.held - NET_HEADER) as u64);
        let mut rest = &self.frame[..self.held];
        for chain in chains {
            let len = chain.writable.copy_from(rest);
            rest = &rest[len..];
            self.receive.used(chain.head, len as u32)?;
        }
        self.held = 0;
        Ok(true)
    }
}
