//! The entropy device (virtio 1.2 §5.4): what getrandom(2) gives, at most 64 KiB a request.

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use super::areas::Areas;
use super::ring::{RING_FEATURES, Ring, Served};
use super::state::{DeviceState, StateError};
use super::worker::{Fault, Handler, Worker, Workers};
use super::{ActivateError, Activation, DeviceType, VirtioDevice};
use crate::counters::{Counter, Counters};
use crate::entropy;

const QUEUE_SIZE: u16 = 64;
/// Drivers take what they get and ask again.
const MAX_REQUEST: usize = 64 << 10;
const CHUNK: usize = entropy::MAX;

/// A virtio entropy device.
#[derive(Default)]
pub struct Rng {
    counters: Arc<RngCounters>,
}

impl Rng {
    /// A device that draws from the host kernel.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Workers, ActivateError> {
        let (ring, kick) = Ring::take(&mut activation, 0)?;
        let handler = RngHandler { ring, counters: Arc::clone(&self.counters) };
        let worker = Worker::spawn("rng", vec![kick], handler, &activation);
        Ok(worker.map_err(ActivateError::Worker)?.into())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        if state == DeviceState::Rng { Ok(()) } else { Err(StateError::WrongDevice("entropy source")) }
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.counters) as _
    }
}

#[derive(Default)]
struct RngCounters {
    requests: Counter,
    bytes: Counter,
}

impl Counters for RngCounters {
    fn read(&self) -> Vec<(&'static str, u64)> {
        vec![("requests", self.requests.get()), ("bytes", self.bytes.get())]
    }
}

struct RngHandler {
    ring: Ring,
    counters: Arc<RngCounters>,
}

impl Handler for RngHandler {
    fn kicked(&mut self, _position: usize) -> Result<(), Fault> {
        let Self { ring, counters } = self;
        ring.serve(|mut chain| {
            let filled = fill(chain.writable.take(MAX_REQUEST));
            let filled = filled.map_err(|e| Fault(format!("the host gives no entropy: {e}")))?;
            counters.requests.add(1);
            counters.bytes.add(filled as u64);
            Ok(Served::Used(filled as u32))
        })
    }

    fn rings(&self) -> Vec<&Ring> {
        vec![&self.ring]
    }
}

fn fill(mut areas: Areas<'_>) -> io::Result<usize> {
    let len = areas.len();
    let mut chunk = [0; CHUNK];
    while !areas.is_empty() {
        let part = areas.take(CHUNK);
        let bytes = &mut chunk[..part.len()];
        entropy::random(bytes)?;
        part.copy_from(bytes);
    }
    Ok(len)
}
