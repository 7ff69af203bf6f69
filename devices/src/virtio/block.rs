//! The block device (virtio 1.2 §5.2): a raw image file, a qcow2 image or a host block device as a disk of 512-byte sectors.
//!
//! Each queue has a worker of its own ([`queue`]) with an io_uring: many requests in flight, straight on guest memory, answered
//! in the order in which they are done. What the host's storage says (EIO, ENOSPC, an image that was cut short) becomes
//! VIRTIO_BLK_S_IOERR; the machine lives on.
//!
//! Durability (§5.2.6.2): a driver that negotiated FLUSH decides when data must be on the disk, unless it switched the cache to
//! write-through; for one that did not, every write is on the disk before it is answered. A flush covers what was answered
//! before it was asked for.
//!
//! For a fork someone can be told before a disk's bytes change ([`Disk::watch`]), read an image's disk out of files that stand still
//! ([`open_frozen`]), and provide a disk's bytes ([`Disk::plugged`]).

mod counters;
mod disk;
mod engine;
mod flight;
mod frozen;
mod helpers;
mod image;
mod image_file;
mod job;
mod plugged;
mod queue;
mod request;
#[cfg(test)]
mod tests;
mod uring;
mod watch;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};

pub use disk::{Disk, DiskError, DiskFormat, DiskOptions, SECTOR};
pub use frozen::open_frozen;
pub use plugged::{ReadDisk, WriteDisk};
pub use watch::BeforeWrite;

use self::counters::BlockCounters;
use self::engine::Engine;
use self::queue::{BlockQueue, Shared};
use self::request::{MAX_SEGMENT_SECTORS, MAX_SEGMENTS};
use self::uring::Uring;
use super::rate::{RateLimit, SharedRate};
use super::ring::{RING_FEATURES, Ring};
use super::state::{BlockStateV1, DeviceState, StateError};
use super::worker::{Worker, Workers};
use super::{ActivateError, Activation, DeviceType, OncePerReset, VirtioDevice, read_config_bytes};
use crate::counters::Counters;

/// The most queues that a device may have.
pub const MAX_QUEUES: u16 = 64;

const QUEUE_SIZE: u16 = 256;
/// A request is a header, data and a status: two descriptors are not data.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
const ID_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Page-cache pages behind 512-byte sectors: 2^3 logical blocks in a physical one.
const PHYSICAL_BLOCK_EXP: u8 = 3;
/// Where the configuration space says, and is told, whether writes may stay in the host's cache.
const WRITEBACK: usize = 32;

/// What a device is like beside its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockOptions {
    /// Queues, each with a thread of its own: from 1 to [`MAX_QUEUES`]. More than the guest has vCPUs are of no use.
    pub queues: u16,
    /// How fast all of them together may be; a flush, a discard or zeroes count as an operation without bytes.
    pub rate: Option<RateLimit>,
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self { queues: 1, rate: None }
    }
}

/// Tries whether this host keeps many requests of a disk in flight (io_uring). Disks work without.
///
/// # Errors
/// What the kernel says; `Unsupported` where it has none or one that is too old.
pub fn io_uring() -> io::Result<()> {
    Uring::new(1).map(drop)
}

/// A virtio block device.
pub struct Block {
    name: String,
    disk: Arc<Disk>,
    id: [u8; ID_LEN],
    queue_sizes: Vec<u16>,
    /// The configuration field of that name.
    writeback: Arc<AtomicBool>,
    rate: Option<SharedRate>,
    counters: Arc<BlockCounters>,
    engine: fn(u16) -> Engine,
}

impl Block {
    /// A device called `id` over `disk`. The guest reads `id` as the disk's serial number, cut to 20 bytes.
    ///
    /// # Errors
    /// `InvalidInput` for a rate of zero.
    pub fn new(id: &str, disk: Arc<Disk>, options: BlockOptions) -> io::Result<Self> {
        let mut serial = [0; ID_LEN];
        let len = id.len().min(ID_LEN);
        serial[..len].copy_from_slice(&id.as_bytes()[..len]);
        Ok(Self {
            name: format!("blk:{id}"),
            disk,
            id: serial,
            queue_sizes: vec![QUEUE_SIZE; options.queues.clamp(1, MAX_QUEUES).into()],
            writeback: Arc::new(AtomicBool::new(true)),
            rate: options.rate.map(SharedRate::new).transpose()?,
            counters: Arc::default(),
            engine: Engine::new,
        })
    }

    fn shared(&self, features: u64) -> Shared {
        let has = |feature: u32| features & 1 << feature != 0;
        let write_back = match (has(VIRTIO_BLK_F_FLUSH), has(VIRTIO_BLK_F_CONFIG_WCE)) {
            (true, true) => Arc::clone(&self.writeback),
            (flush, _) => Arc::new(AtomicBool::new(flush)),
        };
        Shared {
            name: self.name.clone(),
            disk: Arc::clone(&self.disk),
            id: self.id,
            features,
            write_back,
            counters: Arc::clone(&self.counters),
            complained: OncePerReset::default(),
        }
    }

    /// §5.2.4, up to and with the fields of WRITE_ZEROES.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.disk.len() / SECTOR).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(24, &[PHYSICAL_BLOCK_EXP]);
        put(26, &(1u16 << PHYSICAL_BLOCK_EXP).to_le_bytes());
        put(WRITEBACK, &[self.writeback.load(Ordering::Relaxed).into()]);
        put(34, &(self.queue_sizes.len() as u16).to_le_bytes());
        if !self.disk.read_only() {
            put(36, &MAX_SEGMENT_SECTORS.to_le_bytes());
            put(40, &MAX_SEGMENTS.to_le_bytes());
            put(44, &(1u32 << PHYSICAL_BLOCK_EXP).to_le_bytes());
            put(48, &MAX_SEGMENT_SECTORS.to_le_bytes());
            put(52, &MAX_SEGMENTS.to_le_bytes());
            put(56, &[1]);
        }
        config
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let kind = match self.disk.read_only() {
            true => 1 << VIRTIO_BLK_F_RO,
            false => 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
        };
        let queues = if self.queue_sizes.len() > 1 { 1 << VIRTIO_BLK_F_MQ } else { 0 };
        RING_FEATURES
            | kind
            | queues
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_CONFIG_WCE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // The one field that is the driver's. It holds for requests that are taken from now on.
        if let (WRITEBACK, &[value]) = (offset as usize, data) {
            self.writeback.store(value != 0, Ordering::Relaxed);
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Workers, ActivateError> {
        let shared = Arc::new(self.shared(activation.features));
        if !activation.paused && !shared.write_back.load(Ordering::Relaxed) {
            // §5.2.5.1: so it must read when CONFIG_WCE was negotiated without FLUSH.
            self.writeback.store(false, Ordering::Relaxed);
        }
        let indices: Vec<u16> = activation.queues.iter().map(|queue| queue.index).collect();
        if indices.is_empty() {
            return Err(ActivateError::MissingQueue(0));
        }
        let mut workers = Vec::new();
        for index in indices {
            let (ring, kick) = Ring::take(&mut activation, index)?;
            let name = if index == 0 { self.name.clone() } else { format!("{}.{index}", self.name) };
            let mut engine = (self.engine)(QUEUE_SIZE);
            if self.disk.needs_helpers() {
                engine.help(&name).map_err(ActivateError::Worker)?;
            }
            let limiter = self.rate.as_ref().map(SharedRate::limiter).transpose().map_err(ActivateError::Worker)?;
            let handler = BlockQueue::new(ring, Arc::clone(&shared), engine, limiter);
            let worker = Worker::spawn(&name, vec![kick], handler, &activation);
            workers.push(worker.map_err(ActivateError::Worker)?);
        }
        Ok(Workers::new(workers))
    }

    fn reset(&mut self) {
        self.writeback.store(true, Ordering::Relaxed);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(BlockStateV1 {
            bytes: self.disk.len(),
            serial: self.id,
            queues: self.queue_sizes.len() as u16,
            writeback: self.writeback.load(Ordering::Relaxed),
        })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Block(BlockStateV1 { bytes, serial, queues, writeback }) = state else {
            return Err(StateError::WrongDevice("block device"));
        };
        let name = |serial: [u8; ID_LEN]| String::from_utf8_lossy(&serial).trim_end_matches('\0').to_owned();
        let differs = |what, saved, now| Err(StateError::Differs { what, saved, now });
        if serial != self.id {
            return differs("the disk's serial number", name(serial), name(self.id));
        }
        if bytes != self.disk.len() {
            return differs("the disk's size", format!("{bytes} bytes"), format!("{} bytes", self.disk.len()));
        }
        let now = self.queue_sizes.len();
        if usize::from(queues) != now {
            return differs("the disk's number of queues", queues.to_string(), now.to_string());
        }
        self.writeback.store(writeback, Ordering::Relaxed);
        Ok(())
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.counters) as _
    }
}
