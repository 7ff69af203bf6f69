//! MSI-X: the vector table, pending bits and their delivery (PCI 3.0 §6.8.2).
//!
//! A vector's message reaches the hypervisor when it becomes deliverable (enabled, unmasked, changed); a vector that
//! fires while masked is remembered in the pending bits and fires on unmasking.
//!
//! Lock order: the state's mutex is a leaf; `fire` is called from device threads.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::irq::{MsiAllocator, MsiMessage, MsiSource};

/// Capability id.
pub const CAPABILITY_ID: u8 = 0x11;
/// Offset of message control in the capability.
pub const CONTROL: usize = 2;
/// The value that stands for "no vector".
pub const NO_VECTOR: u16 = 0xffff;
const ENTRY: u64 = 16;
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;

/// Saved vectors; what they hold is untrusted when it comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixStateV1 {
    /// The enable and function-mask bits of message control.
    pub control: u16,
    /// The table and the pending bits.
    pub vectors: Vec<VectorStateV1>,
}

/// A saved vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorStateV1 {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Whether it is masked.
    pub masked: bool,
    /// Whether it fired while it could not be delivered.
    pub pending: bool,
}

struct Vector {
    message: MsiMessage,
    masked: bool,
    pending: bool,
    /// What the source was last routed to.
    routed: Option<MsiMessage>,
    source: Arc<dyn MsiSource>,
}

struct State {
    vectors: Vec<Vector>,
    control: u16,
}

/// A function's MSI-X vectors.
pub struct Msix {
    state: Mutex<State>,
}

impl Msix {
    /// `count` masked vectors (1 to 2048).
    ///
    /// # Errors
    /// When the hypervisor has no more message sources.
    pub fn new(count: u16, allocator: &dyn MsiAllocator) -> io::Result<Self> {
        let vectors = (0..count)
            .map(|_| {
                let source = allocator.allocate()?;
                Ok(Vector { message: MsiMessage::default(), masked: true, pending: false, routed: None, source })
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { state: Mutex::new(State { vectors, control: 0 }) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The capability's body for a table and pending bits in `bar` at these offsets, and its write mask.
    pub fn capability(&self, bar: u8, table: u32, pending: u32) -> ([u8; 10], [u8; 2]) {
        let last = self.count() - 1;
        let mut body = [0; 10];
        body[0..2].copy_from_slice(&last.to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..10].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        (body, (ENABLE | FUNCTION_MASK).to_le_bytes())
    }

    /// The number of vectors.
    pub fn count(&self) -> u16 {
        self.state().vectors.len() as u16
    }

    /// The message control word was written.
    pub fn set_control(&self, control: u16) {
        let mut state = self.state();
        state.control = control & (ENABLE | FUNCTION_MASK);
        for index in 0..state.vectors.len() {
            state.settle(index);
        }
    }

    /// The vectors as they stand.
    pub fn save(&self) -> MsixStateV1 {
        let state = self.state();
        let save = |vector: &Vector| VectorStateV1 {
            address: vector.message.address,
            data: vector.message.data,
            masked: vector.masked,
            pending: vector.pending,
        };
        MsixStateV1 { control: state.control, vectors: state.vectors.iter().map(save).collect() }
    }

    /// Takes over saved vectors and routes those that may be delivered; false, with nothing changed, when their number is another.
    #[must_use]
    pub fn restore(&self, saved: &MsixStateV1) -> bool {
        let mut state = self.state();
        if saved.vectors.len() != state.vectors.len() {
            return false;
        }
        for (vector, saved) in state.vectors.iter_mut().zip(&saved.vectors) {
            vector.message = MsiMessage { address: saved.address, data: saved.data };
            (vector.masked, vector.pending) = (saved.masked, saved.pending);
        }
        state.control = saved.control & (ENABLE | FUNCTION_MASK);
        for index in 0..state.vectors.len() {
            state.settle(index);
        }
        true
    }

    /// Fires a vector; one that does not exist, or [`NO_VECTOR`], fires nothing.
    pub fn fire(&self, vector: u16) {
        let mut state = self.state();
        let index = usize::from(vector);
        if state.control & ENABLE == 0 || index >= state.vectors.len() {
            return;
        }
        if state.deliverable(index) {
            state.vectors[index].source.fire();
        } else {
            state.vectors[index].pending = true;
        }
    }

    /// Reads the vector table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset + i as u64;
            let entry = state.vectors.get((at / ENTRY) as usize);
            *byte = entry.map_or(0, |v| v.bytes()[(at % ENTRY) as usize]);
        }
    }

    /// Writes the vector table: aligned 4- or 8-byte accesses, as §6.8.2 demands; others are dropped.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let mut state = self.state();
        let index = (offset / ENTRY) as usize;
        let Some(vector) = state.vectors.get_mut(index) else { return };
        let mut bytes = vector.bytes();
        let at = (offset % ENTRY) as usize;
        bytes[at..at + data.len()].copy_from_slice(data);
        vector.set_bytes(&bytes);
        state.settle(index);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        for (i, byte) in data.iter_mut().enumerate() {
            let first = (offset as usize).saturating_add(i).saturating_mul(8);
            let bit = |n: usize| u8::from(state.vectors.get(first.saturating_add(n)).is_some_and(|v| v.pending)) << n;
            *byte = (0..8).map(bit).sum();
        }
    }
}

impl State {
    fn deliverable(&self, index: usize) -> bool {
        let vector = &self.vectors[index];
        self.control & (ENABLE | FUNCTION_MASK) == ENABLE && !vector.masked && vector.routed.is_some()
    }

    /// Routes a vector that has become deliverable or has changed, and fires what was pending on it.
    fn settle(&mut self, index: usize) {
        let open = self.control & (ENABLE | FUNCTION_MASK) == ENABLE;
        let vector = &mut self.vectors[index];
        if !open || vector.masked {
            return;
        }
        if vector.routed != Some(vector.message) {
            match vector.source.route(vector.message) {
                Ok(()) => vector.routed = Some(vector.message),
                Err(e) => {
                    warn!(vector = index, "the hypervisor refuses the guest's MSI message: {e}");
                    vector.routed = None;
                    return;
                }
            }
        }
        if std::mem::take(&mut vector.pending) {
            vector.source.fire();
        }
    }
}

impl Vector {
    fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&self.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.message.data.to_le_bytes());
        bytes[12] = u8::from(self.masked);
        bytes
    }

    fn set_bytes(&mut self, bytes: &[u8; 16]) {
        let (address, rest) = bytes.split_at(8);
        self.message.address = u64::from_le_bytes(address.try_into().unwrap_or_default());
        self.message.data = u32::from_le_bytes(rest[..4].try_into().unwrap_or_default());
        self.masked = rest[4] & 1 != 0;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Records what is routed and fired.
    #[derive(Default)]
    pub(crate) struct Recorder(Arc<Mutex<Vec<String>>>);

    impl Recorder {
        pub(crate) fn take(&self) -> Vec<String> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    struct Source(usize, Arc<Mutex<Vec<String>>>);
    impl MsiSource for Source {
        fn route(&self, message: MsiMessage) -> io::Result<()> {
            self.1.lock().unwrap().push(format!("route {} {:x}/{:x}", self.0, message.address, message.data));
            Ok(())
        }
        fn fire(&self) {
            self.1.lock().unwrap().push(format!("fire {}", self.0));
        }
    }

    impl MsiAllocator for Recorder {
        fn allocate(&self) -> io::Result<Arc<dyn MsiSource>> {
            let next = Arc::strong_count(&self.0) - 1;
            Ok(Arc::new(Source(next, self.0.clone())))
        }
    }

    #[test]
    fn a_masked_vector_fires_on_unmasking() {
        let recorder = Recorder::default();
        let msix = Msix::new(2, &recorder).unwrap();
        msix.fire(1);
        msix.set_control(ENABLE);
        msix.write_table(16, &0xfee0_1000u64.to_le_bytes());
        msix.write_table(24, &0x41u32.to_le_bytes());
        msix.fire(1);
        msix.fire(7);
        msix.fire(NO_VECTOR);
        assert!(recorder.take().is_empty());
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 2);
        msix.write_table(28, &[0; 4]);
        assert_eq!(recorder.take(), ["route 1 fee01000/41", "fire 1"]);
        msix.fire(1);
        msix.set_control(ENABLE | FUNCTION_MASK);
        msix.fire(1);
        assert_eq!(recorder.take(), ["fire 1"]);
        msix.set_control(ENABLE);
        assert_eq!(recorder.take(), ["fire 1"]);
        let mut entry = [0; 16];
        msix.read_table(16, &mut entry);
        assert_eq!(entry[..13], [0, 0x10, 0xe0, 0xfe, 0, 0, 0, 0, 0x41, 0, 0, 0, 0]);
    }

    #[test]
    fn odd_accesses_change_nothing() {
        let recorder = Recorder::default();
        let msix = Msix::new(1, &recorder).unwrap();
        msix.set_control(ENABLE);
        for (offset, data) in
            [(1, &[0u8; 4][..]), (12, &[0; 1]), (12, &[0; 8]), (u64::MAX - 3, &[0; 4]), (4096, &[0; 4])]
        {
            msix.write_table(offset, data);
        }
        assert!(recorder.take().is_empty());
    }
}
