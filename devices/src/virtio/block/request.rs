//! What a driver may ask of a disk (virtio 1.2 §5.2.6), read and checked. Pure: nothing is done here.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::disk::SECTOR;
use crate::virtio::areas::Areas;

/// Type, reserved and sector.
const HEADER: usize = 16;
/// Sector, count of sectors and flags.
const SEGMENT: usize = 16;
/// Segments of one discard or write-zeroes request.
pub const MAX_SEGMENTS: u32 = 16;
/// Sectors of one segment: 64 MiB, so that a file system that can neither deallocate nor zero is not busy for long with one.
pub const MAX_SEGMENT_SECTORS: u32 = 1 << 17;

/// A range of the disk in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
    /// Whether its place on the disk may be given back.
    pub unmap: bool,
}

/// A request that the disk can be asked to carry out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill the answer from this offset.
    Read(u64),
    /// Write the rest of the readable part at this offset.
    Write(u64),
    /// Bring what was written to the disk.
    Flush,
    /// These ranges are not needed any more.
    Discard(Vec<Extent>),
    /// These ranges are to read as zeroes.
    WriteZeroes(Vec<Extent>),
    /// Tell the serial number.
    Identify,
}

/// Why there will be no such thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The driver asked for what the device did not offer.
    Unsupported,
    /// The driver asked for what it must not: outside the disk, a write to a read-only one, a torn sector.
    Invalid,
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// The disk's size.
    pub bytes: u64,
    /// Whether it may only be read.
    pub read_only: bool,
    /// Negotiated.
    pub features: u64,
}

impl Terms {
    /// Reads a request's header, and for some its segments, off `readable`; `room` bytes are there for its answer.
    pub fn read(&self, readable: &mut Areas<'_>, room: usize) -> Result<Request, Refusal> {
        let mut header = [0; HEADER];
        if readable.take(HEADER).copy_to(&mut header) < HEADER {
            return Err(Refusal::Invalid);
        }
        let (kind, sector) = (le32(&header, 0), le64(&header, 8));
        match kind {
            VIRTIO_BLK_T_IN => Ok(Request::Read(self.position(sector, room as u64)?)),
            VIRTIO_BLK_T_OUT => {
                let offset = self.position(sector, readable.len() as u64)?;
                if self.read_only { Err(Refusal::Invalid) } else { Ok(Request::Write(offset)) }
            }
            VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
            VIRTIO_BLK_T_DISCARD => {
                let segments = self.segments(readable, VIRTIO_BLK_F_DISCARD)?;
                // Here the flag has no meaning, and §5.2.6.2 wants it refused.
                let plain = segments.iter().all(|segment| !segment.unmap);
                if plain { Ok(Request::Discard(segments)) } else { Err(Refusal::Unsupported) }
            }
            VIRTIO_BLK_T_WRITE_ZEROES => Ok(Request::WriteZeroes(self.segments(readable, VIRTIO_BLK_F_WRITE_ZEROES)?)),
            VIRTIO_BLK_T_GET_ID => Ok(Request::Identify),
            _ => Err(Refusal::Unsupported),
        }
    }

    /// The byte offset of `sector` if `len` bytes from there are whole sectors of the disk.
    fn position(&self, sector: u64, len: u64) -> Result<u64, Refusal> {
        let offset = sector.checked_mul(SECTOR).ok_or(Refusal::Invalid)?;
        let end = offset.checked_add(len).ok_or(Refusal::Invalid)?;
        if len.is_multiple_of(SECTOR) && end <= self.bytes { Ok(offset) } else { Err(Refusal::Invalid) }
    }

    fn segments(&self, readable: &Areas<'_>, feature: u32) -> Result<Vec<Extent>, Refusal> {
        if self.features & 1 << feature == 0 {
            return Err(Refusal::Unsupported);
        }
        let len = readable.len();
        if len == 0 || !len.is_multiple_of(SEGMENT) || len > MAX_SEGMENTS as usize * SEGMENT || self.read_only {
            return Err(Refusal::Invalid);
        }
        let mut bytes = vec![0; len];
        readable.copy_to(&mut bytes);
        let all: Result<Vec<_>, _> = bytes.chunks_exact(SEGMENT).map(|segment| self.segment(segment)).collect();
        Ok(all?.into_iter().filter(|segment| segment.len > 0).collect())
    }

    fn segment(&self, segment: &[u8]) -> Result<Extent, Refusal> {
        let (sector, sectors, flags) = (le64(segment, 0), le32(segment, 8), le32(segment, 12));
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
            return Err(Refusal::Unsupported);
        }
        let len = u64::from(sectors) * SECTOR;
        let offset = self.position(sector, len)?;
        if sectors > MAX_SEGMENT_SECTORS {
            return Err(Refusal::Invalid);
        }
        Ok(Extent { offset, len, unmap: flags != 0 })
    }
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().copied().map_or(0, u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().copied().map_or(0, u64::from_le_bytes)
}
