//! What a network card's threads share.
//!
//! Lock order: `offloads`, then nothing; a pair's [`Way`] is a leaf but for its link. A pair's thread holds its way for one turn
//! of receiving, so that whoever takes the pair out of use waits no longer than that, and afterwards no frame comes.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;

use super::super::OncePerReset;
use super::link::{FrameLink, LinkSwitch, Offloads};
use super::mirror::Mirror;
use crate::counters::{Counter, Counters};

/// The receiving side of one pair of queues.
#[derive(Debug, Default)]
pub struct Way {
    /// Whether frames go this way.
    pub in_use: bool,
    /// The frame with its header that came from the link and waits for receive buffers; empty when none does.
    pub held: Vec<u8>,
}

/// A network card without its queues.
pub struct Card {
    /// In logs.
    pub name: String,
    /// One for each pair of queues.
    pub links: Vec<Arc<dyn FrameLink>>,
    ways: Vec<Mutex<Way>>,
    /// The cable.
    pub switch: Arc<LinkSwitch>,
    /// Outlives the driver's resets.
    pub mirror: Arc<Mirror>,
    /// The feature bits of the guest's offloads that the driver asked for after negotiation.
    offloads: Mutex<Option<u64>>,
    pub counters: NetCounters,
    gone: AtomicBool,
    complained: OncePerReset,
}

impl Card {
    pub fn new(id: &str, links: Vec<Arc<dyn FrameLink>>) -> io::Result<Self> {
        Ok(Self {
            name: format!("net:{id}"),
            mirror: Arc::new(Mirror::new(id, links.len())),
            ways: links.iter().map(|_| Mutex::default()).collect(),
            links,
            switch: Arc::new(LinkSwitch::new()?),
            offloads: Mutex::default(),
            counters: NetCounters::default(),
            gone: AtomicBool::new(false),
            complained: OncePerReset::default(),
        })
    }

    pub fn way(&self, pair: usize) -> MutexGuard<'_, Way> {
        self.ways[pair].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many pairs frames go through.
    pub fn pairs(&self) -> u16 {
        (0..self.ways.len()).filter(|&pair| self.way(pair).in_use).count() as u16
    }

    /// Has frames go through the first `pairs` pairs and no others.
    ///
    /// # Errors
    /// When an entrance could not be opened; it is as before then. One that cannot be closed is no error: its frames are lost, as
    /// they would be when it closes.
    pub fn use_pairs(&self, pairs: u16) -> io::Result<()> {
        let pairs = usize::from(pairs);
        for (pair, link) in self.links.iter().enumerate().take(pairs) {
            if let Err(error) = link.set_attached(true) {
                self.failed("cannot open another queue of its tap", &error);
                for (pair, link) in self.links.iter().enumerate().take(pair) {
                    if !self.way(pair).in_use {
                        let _ = link.set_attached(false);
                    }
                }
                return Err(error);
            }
        }
        for (pair, link) in self.links.iter().enumerate() {
            let mut way = self.way(pair);
            way.in_use = pair < pairs;
            if !way.in_use {
                self.counters.rx_drops.add(u64::from(!way.held.is_empty()));
                way.held.clear();
                drop(way);
                if let Err(error) = link.set_attached(false) {
                    self.failed("cannot close a queue of its tap", &error);
                }
            }
        }
        Ok(())
    }

    /// Tells the link what the guest can cope with, as feature bits; `asked` when the driver said so after negotiation.
    pub fn set_offloads(&self, features: u64, asked: bool) {
        let mut own = self.offloads.lock().unwrap_or_else(PoisonError::into_inner);
        if asked {
            *own = Some(features);
        }
        let offloads = Offloads::of_guest(features);
        for link in &self.links {
            if let Err(error) = link.set_offloads(offloads) {
                self.failed("cannot tell its tap what the guest offloads", &error);
            }
        }
    }

    /// What the driver asked for with [`Card::set_offloads`].
    pub fn offloads(&self) -> Option<u64> {
        *self.offloads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As out of a saved state.
    pub fn restore_offloads(&self, offloads: Option<u64>) {
        *self.offloads.lock().unwrap_or_else(PoisonError::into_inner) = offloads;
    }

    /// Forgets the driver. The threads have ended.
    pub fn reset(&self) {
        for way in &self.ways {
            let mut way = way.lock().unwrap_or_else(PoisonError::into_inner);
            self.counters.rx_drops.add(u64::from(!way.held.is_empty()));
            *way = Way::default();
        }
        self.restore_offloads(None);
        self.switch.set_announces(false);
        self.complained.clear();
    }

    /// Counts what the host's network refused, and says so the first time since the reset.
    pub fn failed(&self, what: &str, error: &io::Error) {
        self.counters.errors.add(1);
        let deleted = error.raw_os_error() == Some(libc::EBADFD);
        if deleted && !self.gone.swap(true, Ordering::Relaxed) {
            warn!(device = %self.name, "its tap interface is gone: the guest's frames go nowhere");
        } else if self.complained.first() {
            warn!(device = %self.name, "{what}: {error}");
        }
    }

    /// True once the interface was deleted: nothing is read any more, what is sent is dropped.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
}

/// Counts frames.
#[derive(Default)]
pub struct NetCounters {
    pub rx_frames: Counter,
    pub rx_bytes: Counter,
    pub rx_drops: Counter,
    pub rx_delays: Counter,
    pub tx_frames: Counter,
    pub tx_bytes: Counter,
    pub tx_drops: Counter,
    pub tx_delays: Counter,
    pub errors: Counter,
}

impl Counters for Card {
    fn read(&self) -> Vec<(&'static str, u64)> {
        let of = &self.counters;
        vec![
            ("rx_frames", of.rx_frames.get()),
            ("rx_bytes", of.rx_bytes.get()),
            ("rx_drops", of.rx_drops.get()),
            ("rx_delays", of.rx_delays.get()),
            ("tx_frames", of.tx_frames.get()),
            ("tx_bytes", of.tx_bytes.get()),
            ("tx_drops", of.tx_drops.get()),
            ("tx_delays", of.tx_delays.get()),
            ("errors", of.errors.get()),
            ("mirror_frames", self.mirror.frames()),
            ("mirror_drops", self.mirror.drops()),
        ]
    }
}
