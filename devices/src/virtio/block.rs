//! The block device (virtio 1.2 §5.2): a raw image file or a host block device as a disk of 512-byte sectors.
//!
//! Requests are served in order on the worker, by positional system calls straight on guest memory. What the host's
//! storage says (EIO, ENOSPC, an image that was cut short) becomes VIRTIO_BLK_S_IOERR; the machine lives on.
//!
//! Durability: a driver that negotiated FLUSH decides when data must be on the disk; for one that did not, every write
//! is on the disk before it is answered (§5.2.5.2).

mod disk;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use tracing::warn;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

pub use disk::{Disk, DiskError, SECTOR};

use super::areas::Areas;
use super::ring::{Chain, RING_FEATURES, Ring, Served};
use super::state::{BlockStateV1, DeviceState, StateError};
use super::worker::{Fault, Handler, Worker, Workers};
use super::{ActivateError, Activation, DeviceType, OncePerReset, VirtioDevice, read_config_bytes};
use crate::counters::{Counter, Counters};

const QUEUE_SIZE: u16 = 256;
/// A request is a header, data and a status: two descriptors are not data.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Type, reserved and sector.
const HEADER: usize = 16;
const ID_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Page-cache pages behind 512-byte sectors: 2^3 logical blocks in a physical one.
const PHYSICAL_BLOCK_EXP: u8 = 3;

/// A virtio block device.
pub struct Block {
    name: String,
    disk: Arc<Disk>,
    id: [u8; ID_LEN],
    counters: Arc<BlockCounters>,
}

impl Block {
    /// A device called `id` over `disk`. The guest reads `id` as the disk's serial number, cut to 20 bytes.
    pub fn new(id: &str, disk: Arc<Disk>) -> Self {
        let mut serial = [0; ID_LEN];
        let len = id.len().min(ID_LEN);
        serial[..len].copy_from_slice(&id.as_bytes()[..len]);
        Self { name: format!("blk:{id}"), disk, id: serial, counters: Arc::default() }
    }

    fn handler(&self, ring: Ring, features: u64) -> BlockHandler {
        let server = Server {
            name: self.name.clone(),
            disk: Arc::clone(&self.disk),
            id: self.id,
            write_through: features & 1 << VIRTIO_BLK_F_FLUSH == 0,
            counters: Arc::clone(&self.counters),
            complained: OncePerReset::default(),
        };
        BlockHandler { ring, server }
    }

    /// §5.2.4, up to and with the topology.
    fn config(&self) -> [u8; 32] {
        let mut config = [0; 32];
        config[0..8].copy_from_slice(&(self.disk.len() / SECTOR).to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        config[24] = PHYSICAL_BLOCK_EXP;
        config[26..28].copy_from_slice(&(1u16 << PHYSICAL_BLOCK_EXP).to_le_bytes());
        config
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let read_only = if self.disk.read_only() { 1 << VIRTIO_BLK_F_RO } else { 0 };
        RING_FEATURES
            | read_only
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Workers, ActivateError> {
        let (ring, kick) = Ring::take(&mut activation, 0)?;
        let handler = self.handler(ring, activation.features);
        let worker = Worker::spawn(&self.name, vec![kick], handler, &activation);
        Ok(worker.map_err(ActivateError::Worker)?.into())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(BlockStateV1 { bytes: self.disk.len(), serial: self.id })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Block(BlockStateV1 { bytes, serial }) = state else {
            return Err(StateError::WrongDevice("block device"));
        };
        let name = |serial: [u8; ID_LEN]| String::from_utf8_lossy(&serial).trim_end_matches('\0').to_owned();
        if serial != self.id {
            return Err(StateError::Differs {
                what: "the disk's serial number",
                saved: name(serial),
                now: name(self.id),
            });
        }
        if bytes != self.disk.len() {
            let (saved, now) = (format!("{bytes} bytes"), format!("{} bytes", self.disk.len()));
            return Err(StateError::Differs { what: "the disk's size", saved, now });
        }
        Ok(())
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.counters) as _
    }
}

#[derive(Default)]
struct BlockCounters {
    reads: Counter,
    writes: Counter,
    flushes: Counter,
    read_bytes: Counter,
    written_bytes: Counter,
    errors: Counter,
}

impl Counters for BlockCounters {
    fn read(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("reads", self.reads.get()),
            ("writes", self.writes.get()),
            ("flushes", self.flushes.get()),
            ("read_bytes", self.read_bytes.get()),
            ("written_bytes", self.written_bytes.get()),
            ("errors", self.errors.get()),
        ]
    }
}

struct BlockHandler {
    ring: Ring,
    server: Server,
}

impl Handler for BlockHandler {
    fn kicked(&mut self, _position: usize) -> Result<(), Fault> {
        let Self { ring, server } = self;
        ring.serve(|chain| server.serve(chain).map(Served::Used))
    }

    fn rings(&self) -> Vec<&Ring> {
        vec![&self.ring]
    }
}

/// Why a request failed.
enum Failure {
    /// The driver asked for what the device did not offer.
    Unsupported,
    /// The driver asked for what it must not: outside the disk, a write to a read-only one, a torn sector.
    Refused,
    /// The host's storage failed.
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Answers requests; knows nothing of rings.
struct Server {
    name: String,
    disk: Arc<Disk>,
    id: [u8; ID_LEN],
    write_through: bool,
    counters: Arc<BlockCounters>,
    complained: OncePerReset,
}

impl Server {
    /// Answers one request; returns how many bytes were written from the writable part's start.
    fn serve(&mut self, mut chain: Chain<'_>) -> Result<u32, Fault> {
        let room = chain.writable.len();
        let Some(data_room) = room.checked_sub(1) else {
            return Err(Fault(format!("block request {} has no status byte", chain.head)));
        };
        let answer = chain.writable.take(data_room);
        let (status, filled) = match self.execute(chain.readable, answer) {
            Ok(filled) => (VIRTIO_BLK_S_OK, filled),
            Err(failure) => (self.blame(failure), 0),
        };
        chain.writable.copy_from(&[status as u8]);
        // §2.7.8.2: `len` bytes from the start were written. The status counts when no gap lies before it.
        Ok(if filled == data_room { room } else { filled } as u32)
    }

    /// The status for a failure, after counting it and, the first time since the reset, logging the host's ones.
    fn blame(&self, failure: Failure) -> u32 {
        self.counters.errors.add(1);
        match failure {
            Failure::Unsupported => VIRTIO_BLK_S_UNSUPP,
            Failure::Refused => VIRTIO_BLK_S_IOERR,
            Failure::Io(error) => {
                if self.complained.first() {
                    warn!(device = %self.name, "{error}: the guest gets an I/O error");
                }
                VIRTIO_BLK_S_IOERR
            }
        }
    }

    /// Does what `request` says; returns how much of `answer` was filled.
    fn execute(&self, mut request: Areas<'_>, answer: Areas<'_>) -> Result<usize, Failure> {
        let mut header = [0; HEADER];
        if request.take(HEADER).copy_to(&mut header) < HEADER {
            return Err(Failure::Refused);
        }
        let kind = u32::from_le_bytes(header[0..4].try_into().unwrap_or_default());
        let sector = u64::from_le_bytes(header[8..16].try_into().unwrap_or_default());
        let counters = &self.counters;
        match kind {
            VIRTIO_BLK_T_IN => {
                let len = answer.len();
                let offset = self.position(sector, len)?;
                self.disk.read_at(answer, offset)?;
                counters.reads.add(1);
                counters.read_bytes.add(len as u64);
                Ok(len)
            }
            VIRTIO_BLK_T_OUT => {
                let len = request.len();
                let offset = self.position(sector, len)?;
                if self.disk.read_only() {
                    return Err(Failure::Refused);
                }
                self.disk.write_at(request, offset)?;
                if self.write_through {
                    self.disk.flush()?;
                }
                counters.writes.add(1);
                counters.written_bytes.add(len as u64);
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                self.disk.flush()?;
                counters.flushes.add(1);
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => Ok(answer.copy_from(&self.id)),
            _ => Err(Failure::Unsupported),
        }
    }

    /// The byte offset of `sector` if `len` bytes from there are whole sectors of the disk.
    fn position(&self, sector: u64, len: usize) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR).ok_or(Failure::Refused)?;
        let end = offset.checked_add(len as u64).ok_or(Failure::Refused)?;
        let whole = (len as u64).is_multiple_of(SECTOR);
        if whole && end <= self.disk.len() { Ok(offset) } else { Err(Failure::Refused) }
    }
}
