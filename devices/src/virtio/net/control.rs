//! The control queue (virtio 1.2 §5.1.6.5): the driver says how many pairs of queues it uses, what it can cope with, and that it
//! has announced itself.
//!
//! A command is a class, a number and data, and is answered by one byte. What a command asks is in force when it is answered:
//! no frame goes into a receive queue that the driver has just given up.

use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};
use vmm_sys_util::eventfd::EventFd;

use super::super::ring::{Chain, Ring, Served};
use super::super::worker::{Fault, Handler};
use super::Card;

/// Class and number.
const HEADER: usize = 2;
/// The data of the longest command that is known.
const MAX_DATA: usize = 8;

/// Serves the control queue, on a thread of its own: its commands wait for the host's network, and drivers spin until they are
/// answered.
pub struct ControlHandler {
    pub ring: Ring,
    pub card: Arc<Card>,
    /// Negotiated.
    pub features: u64,
    /// The receive queues' eventfds of the pairs that the driver enabled: a pair that comes into use has to look at its link.
    pub kicks: Vec<EventFd>,
}

impl Handler for ControlHandler {
    fn kicked(&mut self, _position: usize) -> Result<(), Fault> {
        let Self { ring, card, features, kicks } = self;
        ring.serve(|chain| answer(card, *features, kicks, chain).map(Served::Used))
    }

    fn rings(&self) -> Vec<&Ring> {
        vec![&self.ring]
    }
}

fn answer(card: &Card, features: u64, kicks: &[EventFd], mut chain: Chain<'_>) -> Result<u32, Fault> {
    if chain.writable.is_empty() {
        return Err(Fault(format!("network control command {} has no room for its answer", chain.head)));
    }
    let mut command = [0; HEADER + MAX_DATA + 1];
    let len = chain.readable.take(command.len()).copy_to(&mut command);
    let done = match command[..len].split_at_checked(HEADER) {
        Some((&[class, number], data)) => obey(card, features, kicks, (class.into(), number.into()), data),
        _ => None,
    };
    let answer = if done.is_some() { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
    chain.writable.copy_from(&[answer as u8]);
    Ok(1)
}

/// Does what a command says; none when it cannot be done, or is no command for what was negotiated.
fn obey(card: &Card, features: u64, kicks: &[EventFd], command: (u32, u32), data: &[u8]) -> Option<()> {
    let has = |feature: u32| features & 1 << feature != 0;
    match command {
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) if has(VIRTIO_NET_F_MQ) => {
            let pairs = u16::from_le_bytes(data.try_into().ok()?);
            let enabled = (1..=kicks.len()).contains(&usize::from(pairs));
            if !enabled {
                return None;
            }
            card.use_pairs(pairs).ok()?;
            for kick in &kicks[..usize::from(pairs)] {
                // Fails only when the counter is full, which is a wake-up too.
                let _ = kick.write(1);
            }
            Some(())
        }
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET)
            if has(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) =>
        {
            let offloads = u64::from_le_bytes(data.try_into().ok()?);
            // No others than those negotiated (§5.1.6.5.6.2).
            let known = offloads & !(features & super::link::GUEST_OFFLOADS) == 0;
            known.then(|| card.set_offloads(offloads, true))
        }
        (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) if has(VIRTIO_NET_F_GUEST_ANNOUNCE) => {
            data.is_empty().then(|| card.switch.announced())
        }
        _ => None,
    }
}
