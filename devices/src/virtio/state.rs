//! What virtio devices and their transport hold, as plain data. It comes back from outside, so nothing in it is trusted: a queue's
//! addresses and positions mean no more than what a driver may write, and all else is checked where it is taken over.

use serde::{Deserialize, Serialize};

use crate::pci::msix::MsixStateV1;

/// Why a saved state cannot be taken over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// It is of another sort of device.
    #[error("the state is not that of a {0}")]
    WrongDevice(&'static str),
    /// It is of a device that offered more, or other, than this one.
    #[error("{what} was {saved} when the state was saved and is {now} now")]
    Differs {
        /// What differs.
        what: &'static str,
        /// What it was.
        saved: String,
        /// What it is.
        now: String,
    },
    /// No device can have been in such a state.
    #[error("the state cannot be: {0}")]
    Impossible(&'static str),
    /// The device could not be started again.
    #[error("cannot activate the device again: {0}")]
    Activate(String),
}

/// A function behind the transport: configuration space, MSI-X, negotiation, queues and the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciStateV1 {
    /// All 256 bytes of configuration space.
    pub config: Vec<u8>,
    /// The vectors.
    pub msix: MsixStateV1,
    /// Device status without DEVICE_NEEDS_RESET.
    pub status: u8,
    /// Whether DEVICE_NEEDS_RESET is set.
    pub needs_reset: bool,
    /// Which half of the offered features shows.
    pub offered_select: u32,
    /// Which half of the accepted features is written.
    pub accepted_select: u32,
    /// The accepted features.
    pub accepted: u64,
    /// The queue whose registers show.
    pub queue_select: u16,
    /// ISR status.
    pub isr: u8,
    /// Configuration generation.
    pub generation: u8,
    /// The vector of configuration changes.
    pub config_vector: u16,
    /// By index.
    pub queues: Vec<QueueStateV1>,
    /// The device's own.
    pub device: DeviceState,
}

/// One queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStateV1 {
    /// Entries.
    pub size: u16,
    /// Whether the driver enabled it.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Of the available ring.
    pub driver: u64,
    /// Of the used ring.
    pub device: u64,
    /// Its MSI-X vector.
    pub vector: u16,
    /// Where the next chain is taken from the available ring.
    pub next_avail: u16,
    /// Where the next chain is given back in the used ring.
    pub next_used: u16,
}

/// What a device holds beyond its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// A block device.
    Block(BlockStateV1),
    /// A network card.
    Net(NetStateV1),
    /// A console.
    Console(ConsoleStateV1),
    /// An entropy source: nothing.
    Rng,
    /// A memory balloon.
    Balloon(BalloonStateV1),
    /// A socket device.
    Vsock(VsockStateV1),
}

/// A block device: what the guest believes of its disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStateV1 {
    /// Size in bytes.
    pub bytes: u64,
    /// Serial number.
    pub serial: [u8; 20],
    /// How many queues it offers.
    pub queues: u16,
    /// Whether the driver left the cache in write-back mode.
    pub writeback: bool,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStateV1 {
    /// Hardware address.
    pub mac: [u8; 6],
    /// The longest packet, as the guest was told.
    pub mtu: u16,
    /// Pairs of queues that the driver uses.
    pub pairs: u16,
    /// The feature bits of the guest's offloads, where the driver changed them after negotiation.
    pub offloads: Option<u64>,
    /// Whether the cable is in.
    pub link_up: bool,
    /// Frames that came from the link and wait for receive buffers: at most one per pair.
    pub held: Vec<HeldFrameV1>,
}

/// A frame that waits for receive buffers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldFrameV1 {
    /// The pair of queues through which it goes.
    pub pair: u16,
    /// The frame with its header.
    pub bytes: Vec<u8>,
}

/// A console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleStateV1 {
    /// Input that waits for receive buffers.
    pub input: Vec<u8>,
}

/// A socket device. Its connections are not state: they end on the host, and a restored device has the guest reset them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockStateV1 {
    /// The guest's address.
    pub cid: u64,
    /// The port from which the next connection into the guest is made. Going on from here, none is taken for one of before.
    pub next_port: u32,
}

/// A memory balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStateV1 {
    /// Pages that it is to hold.
    pub target: u32,
    /// Pages that it holds, as the driver says.
    pub actual: u32,
    /// What the driver fills free pages with.
    pub poison: u32,
}
