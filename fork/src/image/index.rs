//! The index of a memory image: which chunks of RAM have data, and what each one's checksum is.
//!
//! ```text
//!  0  8  magic "CivicMem"
//!  8  4  version of the format
//! 12  4  bytes in a chunk
//! 16  8  bytes of RAM
//! 24  8  number of entries
//! 32  8  entry: number of the chunk (4), CRC-32 of its bytes (4)      ascending, one for each chunk with data
//!        …
//!     4  CRC-32 of all before
//! ```
//!
//! Little-endian. CRC-32 is the one of ISO-HDLC (zlib): of those fast in software it is the one with a small, plain crate.
//! It finds every damage up to 32 bits long, and misses one in 2^32 of the larger ones.

use std::io::{self, Read};
use std::ops::Range;

use super::CHUNK;

/// The version of the format that is written, and the only one that is read.
pub const VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"CivicMem";
/// Length of an index without entries.
const EMPTY: u64 = 32 + 4;
/// Length of an entry.
const ENTRY: u64 = 8;

/// Why an index is refused.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// Something else.
    #[error("this is no index of a memory image")]
    NotAnIndex,
    /// Ours, in another format.
    #[error(
        "it was made by another version of Civic (format {version}; this one reads {VERSION}): restore it with that one"
    )]
    OtherVersion {
        /// The format's version.
        version: u32,
    },
    /// An image of another VM.
    #[error("the image is of {image} bytes of RAM, the VM has {ram}")]
    OtherSize {
        /// The image's RAM.
        image: u64,
        /// The RAM that it is for.
        ram: u64,
    },
    /// It ends early.
    #[error("it is damaged: {len} bytes long instead of {expected}")]
    Truncated {
        /// Its length.
        len: u64,
        /// What it says about its length.
        expected: u64,
    },
    /// Its contents are not what was written.
    #[error("it is damaged: {what}")]
    Damaged {
        /// In which way.
        what: &'static str,
    },
    /// It cannot be read.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
}

/// A chunk with data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its number: its offset divided by [`CHUNK`].
    pub chunk: u32,
    /// CRC-32 of all its bytes, zero pages among them included.
    pub sum: u32,
}

/// Invariant: the entries' chunks ascend, and all lie within the RAM.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Index {
    ram: u64,
    entries: Vec<Entry>,
}

impl Index {
    /// An index without entries; none if chunks of so much RAM cannot be numbered.
    pub fn new(ram: u64) -> Option<Self> {
        u32::try_from(chunks(ram)).ok()?;
        Some(Self { ram, entries: Vec::new() })
    }

    /// Adds the chunk at `offset`. Chunks come in ascending order.
    pub fn push(&mut self, offset: u64, bytes: &[u8]) {
        let entry = Entry { chunk: (offset / CHUNK) as u32, sum: crc32fast::hash(bytes) };
        assert!(offset < self.ram && self.entries.last().is_none_or(|last| last.chunk < entry.chunk));
        self.entries.push(entry);
    }

    pub fn ram(&self) -> u64 {
        self.ram
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The position of the entry of the chunk that `offset` lies in.
    pub fn find(&self, offset: u64) -> Option<usize> {
        self.entries.binary_search_by_key(&(offset / CHUNK), |entry| entry.chunk.into()).ok()
    }

    /// Where a chunk lies. The last one of RAM may be shorter than the others.
    pub fn range(&self, entry: Entry) -> Range<u64> {
        let start = u64::from(entry.chunk) * CHUNK;
        start..self.ram.min(start + CHUNK)
    }

    /// Bytes in all chunks that have entries.
    pub fn data(&self) -> u64 {
        self.entries.iter().map(|entry| self.range(*entry)).map(|range| range.end - range.start).sum()
    }

    /// As bytes of a file.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(EMPTY as usize + self.entries.len() * ENTRY as usize);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((CHUNK as u32).to_le_bytes());
        bytes.extend(self.ram.to_le_bytes());
        bytes.extend((self.entries.len() as u64).to_le_bytes());
        for entry in &self.entries {
            bytes.extend(entry.chunk.to_le_bytes());
            bytes.extend(entry.sum.to_le_bytes());
        }
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    /// Reads a file of `len` bytes that ought to be the index of an image of `ram` bytes of RAM. Whatever it says, no more is
    /// read and allocated than an index of so much RAM can need.
    pub fn read(file: impl Read, len: u64, ram: u64) -> Result<Self, IndexError> {
        let enough = |expected| if len < expected { Err(IndexError::Truncated { len, expected }) } else { Ok(()) };
        let mut file = Summed { file, sum: crc32fast::Hasher::new() };
        enough(EMPTY)?;
        if file.take()? != MAGIC {
            return Err(IndexError::NotAnIndex);
        }
        let version = u32::from_le_bytes(file.take()?);
        if version != VERSION {
            return Err(IndexError::OtherVersion { version });
        }
        let chunk = u32::from_le_bytes(file.take()?);
        let image = u64::from_le_bytes(file.take()?);
        let count = u64::from_le_bytes(file.take()?);
        if image != ram {
            return Err(IndexError::OtherSize { image, ram });
        }
        if u64::from(chunk) != CHUNK || count > chunks(ram) {
            return Err(IndexError::Damaged { what: "its header makes no sense" });
        }
        let expected = EMPTY + count * ENTRY;
        enough(expected)?;
        let mut body = vec![0; (count * ENTRY) as usize];
        file.fill(&mut body)?;
        let sum = file.sum.clone().finalize();
        if file.take()? != sum.to_le_bytes() {
            return Err(IndexError::Damaged { what: "its checksum does not fit" });
        }
        if len > expected {
            return Err(IndexError::Damaged { what: "it goes on after its end" });
        }
        let (body, _) = body.as_chunks::<{ ENTRY as usize }>();
        let entries = body.iter().map(|&[a, b, c, d, e, f, g, h]| Entry {
            chunk: u32::from_le_bytes([a, b, c, d]),
            sum: u32::from_le_bytes([e, f, g, h]),
        });
        let entries: Vec<_> = entries.collect();
        if !entries.is_sorted_by(|one, next| one.chunk < next.chunk) {
            return Err(IndexError::Damaged { what: "its entries are not in order" });
        }
        if entries.last().is_some_and(|last| u64::from(last.chunk) >= chunks(ram)) {
            return Err(IndexError::Damaged { what: "an entry lies beyond the end of RAM" });
        }
        Ok(Self { ram, entries })
    }
}

/// Chunks in so much RAM, the last of which may be a short one.
fn chunks(ram: u64) -> u64 {
    ram.div_ceil(CHUNK)
}

/// Sums up what is read.
struct Summed<R> {
    file: R,
    sum: crc32fast::Hasher,
}

impl<R: Read> Summed<R> {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), IndexError> {
        self.file.read_exact(bytes).map_err(IndexError::Read)?;
        self.sum.update(bytes);
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], IndexError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }
}
