//! A machine's state as bytes: named, versioned sections behind a checksummed header. What `civic save` writes beside the memory
//! image, and what a fork hands to the child.
//!
//! ```text
//! 0   "CIVICVM\0"                  8 bytes
//! 8   format of this container     u32, little-endian like all numbers
//! 12  reserved, zero               u32
//! 16  length of the sections       u64
//! 24  CRC-64/XZ of the sections    u64
//! 32  sections: postcard, a list of (name, version, bytes)
//! ```
//!
//! A section belongs to one component, which alone knows its type: `vcpu3` version 1 is a `VcpuStateV1`. The header and the list can be
//! read whatever the versions of the sections are, so a state of another version is named as such.
//!
//! Invariants: bytes are untrusted: they are refused, never believed. A section that nobody takes is an error, so nothing is forgotten
//! on restore, as is one that is missing.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::Serialize;
use serde::de::DeserializeOwned;

const MAGIC: [u8; 8] = *b"CIVICVM\0";
const FORMAT: u32 = 1;
const HEADER: usize = 32;
/// More than any machine's state has: 16 vCPUs of some 20 KiB and 32 devices of at most a few hundred KiB.
pub const MAX_BYTES: usize = 64 << 20;
const CHECKSUM: crc::Crc<u64, crc::Table<16>> = crc::Crc::<u64, crc::Table<16>>::new(&crc::CRC_64_XZ);

/// Why bytes are no state of a machine, or none that this monitor can take over.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// They begin otherwise.
    #[error("this is not the state of a VM")]
    NotAState,
    /// The container is of another version.
    #[error("the state has format {found}: this monitor reads format {FORMAT}")]
    Format {
        /// Which.
        found: u32,
    },
    /// Bytes are missing.
    #[error("the state is cut short: {found} bytes of {expected}")]
    Truncated {
        /// How many there are.
        found: usize,
        /// How many there should be.
        expected: usize,
    },
    /// There are more bytes than the header says, or than a state can have.
    #[error("the state is {0} bytes long, more than it says or than any is")]
    TooLong(usize),
    /// The checksum is wrong.
    #[error("the state was altered: its checksum is {found:016x}, not {expected:016x}")]
    Checksum {
        /// Of the bytes.
        found: u64,
        /// In the header.
        expected: u64,
    },
    /// The checksum is right and the contents are not.
    #[error("the state's section '{section}' cannot be read")]
    Malformed {
        /// Which section; "sections" for the list of them.
        section: String,
        /// What is wrong.
        #[source]
        source: Option<postcard::Error>,
    },
    /// A component's state is of a version that this monitor does not know.
    #[error("the state's section '{section}' has version {found}: this monitor reads version {known}")]
    Version {
        /// Which section.
        section: String,
        /// Its version.
        found: u16,
        /// The one that is known.
        known: u16,
    },
    /// A component has no state.
    #[error("the state has no section '{0}'")]
    Missing(String),
    /// Nobody wants it.
    #[error("the state has sections that this monitor does not know: {}", .0.join(", "))]
    Unknown(Vec<String>),
}

/// A plain type that is one component's whole state.
pub trait Section: Serialize + DeserializeOwned {
    /// Changes whenever the type's encoding does.
    const VERSION: u16;
}

/// The sections of a state, by name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Sections(BTreeMap<String, (u16, Vec<u8>)>);

impl Sections {
    /// Adds a component's state, in place of an earlier one of that name.
    pub fn put<T: Section>(&mut self, name: impl Into<String>, state: &T) {
        // Into memory, of types without maps of unknown length: this cannot fail.
        let bytes = postcard::to_stdvec(state).unwrap_or_default();
        self.0.insert(name.into(), (T::VERSION, bytes));
    }

    /// Takes a component's state out.
    ///
    /// # Errors
    /// When it is missing, of another version, or malformed.
    pub fn take<T: Section>(&mut self, name: &str) -> Result<T, StateError> {
        let (version, bytes) = self.0.remove(name).ok_or_else(|| StateError::Missing(name.into()))?;
        if version != T::VERSION {
            return Err(StateError::Version { section: name.into(), found: version, known: T::VERSION });
        }
        decode(name, &bytes)
    }

    /// Says that all who had something to take have taken it.
    ///
    /// # Errors
    /// When something is left.
    pub fn finish(self) -> Result<(), StateError> {
        let left: Vec<_> = self.0.into_keys().collect();
        if left.is_empty() { Ok(()) } else { Err(StateError::Unknown(left)) }
    }

    /// The state as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let list: Vec<_> = self.0.iter().map(|(name, (version, bytes))| (name, version, bytes)).collect();
        // As in `put`.
        let sections = postcard::to_stdvec(&list).unwrap_or_default();
        let mut bytes = Vec::with_capacity(HEADER + sections.len());
        bytes.extend(MAGIC);
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend((sections.len() as u64).to_le_bytes());
        bytes.extend(CHECKSUM.checksum(&sections).to_le_bytes());
        bytes.extend(sections);
        bytes
    }

    /// Reads bytes that [`Sections::encode`] may have made.
    ///
    /// # Errors
    /// Each way in which they are not has its own variant.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let start = bytes.get(..8).ok_or(StateError::NotAState)?;
        if start != MAGIC {
            return Err(StateError::NotAState);
        }
        let word = |at: usize| {
            let word: Option<[u8; 8]> = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
            word.map(u64::from_le_bytes).ok_or(StateError::Truncated { found: bytes.len(), expected: HEADER })
        };
        let format = word(8)?;
        // The reserved half as well: what it would mean is not known.
        if format != u64::from(FORMAT) {
            return Err(StateError::Format { found: format as u32 });
        }
        let (len, expected) = (word(16)?, word(24)?);
        let sections = &bytes[HEADER..];
        if bytes.len() > MAX_BYTES || sections.len() as u64 > len {
            return Err(StateError::TooLong(bytes.len()));
        }
        if (sections.len() as u64) < len {
            let expected = usize::try_from(len).unwrap_or(usize::MAX).saturating_add(HEADER);
            return Err(StateError::Truncated { found: bytes.len(), expected });
        }
        let found = CHECKSUM.checksum(sections);
        if found != expected {
            return Err(StateError::Checksum { found, expected });
        }
        let list: Vec<(String, u16, Vec<u8>)> = decode("sections", sections)?;
        let count = list.len();
        let sections: BTreeMap<_, _> =
            list.into_iter().map(|(name, version, bytes)| (name, (version, bytes))).collect();
        if sections.len() < count {
            return Err(StateError::Malformed { section: "sections".into(), source: None });
        }
        Ok(Self(sections))
    }
}

/// Decodes all of `bytes`.
fn decode<T: DeserializeOwned>(section: &str, bytes: &[u8]) -> Result<T, StateError> {
    let malformed = |source| StateError::Malformed { section: section.into(), source };
    match postcard::take_from_bytes(bytes) {
        Ok((state, [])) => Ok(state),
        Ok(_) => Err(malformed(None)),
        Err(e) => Err(malformed(Some(e))),
    }
}
