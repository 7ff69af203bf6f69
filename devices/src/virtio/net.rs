//! The network device (virtio 1.2 §5.1): pairs of receive and transmit queues, frames to and from a host tap.
//!
//! ```text
//!  guest ── transmitq ──▶ writev from guest memory ──▶ ┐
//!                                                      ├─ tap, one file per pair
//!  guest ◀── receiveq ◀── readv into guest memory ◀─── ┘
//!
//!  guest ── controlq ──▶ pairs in use, offloads, "announced"
//! ```
//!
//! Each pair has a thread ([`pair`]) and the control queue one ([`control`]); what they share is the [`card`]. The host steers a
//! flow to the queue from which the guest sends it, among the pairs in use.
//!
//! What a card receives can be copied to cards of its VM's forks ([`mirror`]).
//!
//! Nothing filters by address: the guest may change its own without telling (CTRL_MAC_ADDR and CTRL_RX are not offered, so the
//! card is promiscuous, §5.1.6.5.1). UFO is not offered: Linux has none any more.

mod card;
mod control;
mod frame;
mod link;
mod mirror;
mod pair;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

pub use link::{FrameLink, LinkSwitch, Offloads};
pub use mirror::{Mirror, MirrorId};

use self::card::Card;
use self::control::ControlHandler;
use self::pair::{Pace, PairHandler};
use super::rate::{RateLimit, SharedRate};
use super::ring::{RING_FEATURES, Ring};
use super::state::{DeviceState, HeldFrameV1, NetStateV1, StateError};
use super::worker::{Worker, Workers};
use super::{ActivateError, Activation, DeviceType, VirtioDevice, read_config_bytes};
use crate::counters::Counters;

/// Bytes of the header before a frame, `struct virtio_net_hdr_v1`.
pub const NET_HEADER: usize = 12;
/// Where that header says how many receive buffers a frame took.
const NUM_BUFFERS: usize = 10;
/// The largest frame with its header: a segmentation-offloaded packet of 64 KiB, its Ethernet header and a VLAN tag.
pub(crate) const MAX_FRAME: usize = NET_HEADER + 18 + 65535;
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// The most pairs of queues of one card.
pub const MAX_PAIRS: usize = 32;
/// The shortest packet that everything can carry (RFC 791), which §5.1.4.1 wants of a device.
const MIN_MTU: u16 = 68;
/// What a card says whose link does not know.
const ETHERNET_MTU: u16 = 1500;

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

/// How a card is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetOptions {
    /// Its address.
    pub mac: Mac,
    /// The longest packet that the guest is to send, in bytes after the Ethernet header; what the link says when it is not given.
    pub mtu: Option<u16>,
    /// How fast the guest receives. Frames wait in the link meanwhile.
    pub rx_rate: Option<RateLimit>,
    /// How fast it sends. Frames wait in the guest meanwhile.
    pub tx_rate: Option<RateLimit>,
}

impl NetOptions {
    /// A card with the address `mac`, and nothing limited.
    pub fn new(mac: Mac) -> Self {
        Self { mac, mtu: None, rx_rate: None, tx_rate: None }
    }
}

/// Why a card cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// It needs one link for each of its pairs of queues.
    #[error("a network card has between 1 and {MAX_PAIRS} pairs of queues, not {0}")]
    Pairs(usize),
    /// No network carries so short packets.
    #[error("an MTU of {0} is too small: {MIN_MTU} is the least")]
    Mtu(u16),
    /// A limit of zero.
    #[error("a network card cannot be limited to nothing")]
    Rate(#[source] io::Error),
    /// The process has no more descriptors.
    #[error("cannot make a network card")]
    Io(#[source] io::Error),
}

/// A virtio network device.
pub struct Net {
    card: Arc<Card>,
    mac: Mac,
    mtu: u16,
    rx_rate: Option<SharedRate>,
    tx_rate: Option<SharedRate>,
    queue_sizes: Vec<u16>,
}

impl Net {
    /// A device called `id` with as many pairs of queues as there are `links`.
    ///
    /// # Errors
    /// What is wrong with the links or options.
    pub fn new(id: &str, links: Vec<Arc<dyn FrameLink>>, options: NetOptions) -> Result<Self, NetError> {
        let pairs = links.len();
        if !(1..=MAX_PAIRS).contains(&pairs) {
            return Err(NetError::Pairs(pairs));
        }
        if let Some(mtu) = options.mtu.filter(|mtu| *mtu < MIN_MTU) {
            return Err(NetError::Mtu(mtu));
        }
        let mtu = options.mtu.or(links[0].mtu()).unwrap_or(ETHERNET_MTU).max(MIN_MTU);
        let rate = |limit: Option<RateLimit>| limit.map(SharedRate::new).transpose().map_err(NetError::Rate);
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let carrier = links[0].carrier();
        let this = Self {
            card: Arc::new(Card::new(id, links).map_err(NetError::Io)?),
            mac: options.mac,
            mtu,
            rx_rate: rate(options.rx_rate)?,
            tx_rate: rate(options.tx_rate)?,
            queue_sizes,
        };
        this.card.switch.set_up(carrier);
        Ok(this)
    }

    /// The card's cable.
    pub fn switch(&self) -> Arc<LinkSwitch> {
        Arc::clone(&self.card.switch)
    }

    /// Who else gets what the card receives.
    pub fn mirror(&self) -> Arc<Mirror> {
        Arc::clone(&self.card.mirror)
    }

    /// The pairs of queues that it has at most.
    fn max_pairs(&self) -> usize {
        self.card.links.len()
    }

    /// The handlers of the pairs that the driver enabled: one, without MQ.
    fn pair_handlers(&self, activation: &mut Activation) -> Result<Vec<(PairHandler, Kicks)>, ActivateError> {
        let has = |features: u64, feature: u32| features & 1 << feature != 0;
        let most = if has(activation.features, VIRTIO_NET_F_MQ) { self.max_pairs() } else { 1 };
        let mut handlers = Vec::new();
        for pair in 0..most {
            let enabled = |index: usize| activation.queues.iter().any(|queue| usize::from(queue.index) == index);
            if pair > 0 && !(enabled(2 * pair) && enabled(2 * pair + 1)) {
                break;
            }
            let (receive, receive_kick) = Ring::take(activation, 2 * pair as u16)?;
            let (transmit, transmit_kick) = Ring::take(activation, 2 * pair as u16 + 1)?;
            let pace = |rate: &Option<SharedRate>| {
                let limiter = rate.as_ref().map(SharedRate::limiter).transpose().map_err(ActivateError::Worker)?;
                Ok(limiter.map(Pace::new))
            };
            let mut handler = PairHandler::new(pair, (receive, transmit), &self.card, &activation.interrupt);
            handler.mergeable = has(activation.features, VIRTIO_NET_F_MRG_RXBUF);
            handler.rx_rate = pace(&self.rx_rate)?;
            handler.tx_rate = pace(&self.tx_rate)?;
            handlers.push((handler, vec![receive_kick, transmit_kick]));
        }
        Ok(handlers)
    }

    /// The control queue's handler, if the driver has one. The queue is the one after the last pair that it knows of (§5.1.2).
    fn control_handler(&self, activation: &mut Activation, receive_kicks: Kicks) -> Result<Control, ActivateError> {
        let features = activation.features;
        if features & 1 << VIRTIO_NET_F_CTRL_VQ == 0 {
            return Ok(None);
        }
        let index = if features & 1 << VIRTIO_NET_F_MQ == 0 { 2 } else { 2 * self.max_pairs() as u16 };
        let (ring, kick) = Ring::take(activation, index)?;
        let handler = ControlHandler { ring, card: Arc::clone(&self.card), features, kicks: receive_kicks };
        Ok(Some((handler, vec![kick])))
    }
}

type Kicks = Vec<vmm_sys_util::eventfd::EventFd>;
type Control = Option<(ControlHandler, Kicks)>;

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        let optional = [
            (self.max_pairs() > 1, 1 << VIRTIO_NET_F_MQ),
            (
                self.card.links[0].segments_udp(),
                1 << VIRTIO_NET_F_HOST_USO | 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6,
            ),
        ];
        let optional = optional.into_iter().filter(|(offered, _)| *offered).fold(0, |all, (_, bits)| all | bits);
        RING_FEATURES
            | optional
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_MTU
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_HOST_ECN
            | 1 << VIRTIO_NET_F_GUEST_CSUM
            | 1 << VIRTIO_NET_F_GUEST_TSO4
            | 1 << VIRTIO_NET_F_GUEST_TSO6
            | 1 << VIRTIO_NET_F_GUEST_ECN
            | 1 << VIRTIO_NET_F_CTRL_VQ
            | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
            | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // §5.1.4: nothing after the MTU is offered.
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac.0);
        config[6..8].copy_from_slice(&self.card.switch.status().to_le_bytes());
        config[8..10].copy_from_slice(&(self.max_pairs() as u16).to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Workers, ActivateError> {
        let features = activation.features;
        let handlers = self.pair_handlers(&mut activation)?;
        let receive_kicks: io::Result<_> = handlers.iter().map(|(_, kicks)| kicks[0].try_clone()).collect();
        let control = self.control_handler(&mut activation, receive_kicks.map_err(ActivateError::Worker)?)?;
        let card = &self.card;
        // None is in use but after a restore, and then as many as were: the driver starts with one (§5.1.6.5.5).
        let pairs = card.pairs().clamp(1, handlers.len() as u16);
        if card.use_pairs(pairs).is_err() {
            // The driver takes frames from any pair.
            let _ = card.use_pairs(1);
        }
        let asked = card.offloads();
        card.set_offloads(features & asked.unwrap_or(u64::MAX), asked.is_some());
        let announces = features & 1 << VIRTIO_NET_F_GUEST_ANNOUNCE != 0;
        card.switch.set_announces(announces);
        if activation.paused {
            // Out of a saved state: the card may be somewhere else now.
            card.switch.announce();
        }
        let mut workers = Vec::new();
        for (handler, kicks) in handlers {
            let name = match handler.pair {
                0 => card.name.clone(),
                pair => format!("{}.{pair}", card.name),
            };
            workers.push(Worker::spawn(&name, kicks, handler, &activation).map_err(ActivateError::Worker)?);
        }
        if let Some((handler, kicks)) = control {
            let name = format!("{}.c", card.name);
            workers.push(Worker::spawn(&name, kicks, handler, &activation).map_err(ActivateError::Worker)?);
        }
        Ok(Workers::new(workers))
    }

    fn reset(&mut self) {
        self.card.reset();
    }

    fn save(&self) -> DeviceState {
        let held = |pair: usize| {
            let bytes = self.card.way(pair).held.clone();
            (!bytes.is_empty()).then_some(HeldFrameV1 { pair: pair as u16, bytes })
        };
        DeviceState::Net(NetStateV1 {
            mac: self.mac.0,
            mtu: self.mtu,
            pairs: self.card.pairs(),
            offloads: self.card.offloads(),
            link_up: self.card.switch.is_up(),
            held: (0..self.max_pairs()).filter_map(held).collect(),
        })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Net(state) = state else {
            return Err(StateError::WrongDevice("network card"));
        };
        self.check(&state)?;
        self.mtu = state.mtu;
        for pair in 0..self.max_pairs() {
            let mut way = self.card.way(pair);
            way.in_use = pair < usize::from(state.pairs);
            way.held.clear();
        }
        for frame in state.held {
            self.card.way(usize::from(frame.pair)).held = frame.bytes;
        }
        self.card.restore_offloads(state.offloads);
        self.card.switch.set_up(state.link_up && self.card.links[0].carrier());
        Ok(())
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.card) as _
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        // Others may hold on to it.
        self.card.mirror.close();
    }
}

impl Net {
    /// Whether this card can go on from `state`.
    fn check(&self, state: &NetStateV1) -> Result<(), StateError> {
        let differs = |what, saved, now| Err(StateError::Differs { what, saved, now });
        let NetStateV1 { mac, mtu, pairs, offloads, link_up: _, held } = state;
        if *mac != self.mac.0 {
            let hex = |mac: [u8; 6]| format!("{mac:02x?}");
            return differs("the network card's address", hex(*mac), hex(self.mac.0));
        }
        if *mtu < MIN_MTU {
            return Err(StateError::Impossible("a network card has an MTU that no network has"));
        }
        // A wire that carries longer packets than the guest sends will do, one that does not tell too.
        if let Some(now) = self.card.links[0].mtu().filter(|now| *now < *mtu) {
            return differs("the network card's MTU", mtu.to_string(), now.to_string());
        }
        if usize::from(*pairs) > self.max_pairs() {
            return differs(
                "the network card's number of queues in use",
                pairs.to_string(),
                self.max_pairs().to_string(),
            );
        }
        if offloads.is_some_and(|offloads| offloads & !(link::GUEST_OFFLOADS & self.features()) != 0) {
            return Err(StateError::Impossible("a network card has offloads that are none"));
        }
        // In order, so that none comes twice.
        let ordered = held.windows(2).all(|two| two[0].pair < two[1].pair);
        let sound =
            |frame: &HeldFrameV1| frame.pair < *pairs && (NET_HEADER + 1..=MAX_FRAME).contains(&frame.bytes.len());
        if !ordered || !held.iter().all(sound) {
            return Err(StateError::Impossible("a network card holds what is no frame"));
        }
        Ok(())
    }
}
