//! The console device (virtio 1.2 §5.3) with its one port, Linux's hvc0, on a [`ConsoleHub`].
//!
//! Input waits in a bounded buffer until the driver gives receive buffers. What the buffer cannot take stays with the
//! hub, which is told when the buffer is empty: nothing is lost, whether or not the guest has opened the port. Before
//! activation nothing is taken; what was taken before a reset goes to the next driver.
//!
//! Lock order: [`Port::input`] is a leaf; the hub is called without it.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ring::{RING_FEATURES, Ring, Served};
use super::state::{ConsoleStateV1, DeviceState, StateError};
use super::worker::{Fault, Handler, Worker, Workers};
use super::{ActivateError, Activation, DeviceType, VirtioDevice};
use crate::console_hub::{ConsoleHub, ConsoleInput};
use crate::counters::{Counter, Counters};

const QUEUE_SIZE: u16 = 64;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Input that waits for the driver.
const INPUT_BYTES: usize = 64 << 10;
/// Output handed to the hub at once.
const CHUNK: usize = 4096;
/// Most output taken from one chain. Drivers send a page at most; a chain may name the same page many times over.
const MAX_OUTPUT: usize = 1 << 20;

/// A virtio console.
pub struct Console {
    port: Arc<Port>,
}

impl Console {
    /// A console whose output goes to `hub`. For input, connect [`Console::input`] to the hub as its sink.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn new(hub: Arc<ConsoleHub>) -> io::Result<Self> {
        let arrived = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let port = Port { hub, input: Mutex::default(), arrived, counters: Arc::default() };
        Ok(Self { port: Arc::new(port) })
    }

    /// The port's input side.
    pub fn input(&self) -> Arc<dyn ConsoleInput> {
        Arc::clone(&self.port) as _
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        // Neither SIZE, MULTIPORT nor EMERG_WRITE is offered, so no field means anything.
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Workers, ActivateError> {
        let (receive, receive_kick) = Ring::take(&mut activation, RECEIVE)?;
        let (transmit, transmit_kick) = Ring::take(&mut activation, TRANSMIT)?;
        let handler = ConsoleHandler { receive, transmit, port: Arc::clone(&self.port) };
        let worker = Worker::spawn("console", vec![receive_kick, transmit_kick], handler, &activation);
        let worker = worker.map_err(ActivateError::Worker)?;
        self.port.input().open = true;
        self.port.hub.input_ready();
        Ok(worker.into())
    }

    fn reset(&mut self) {
        self.port.input().open = false;
    }

    fn save(&self) -> DeviceState {
        DeviceState::Console(ConsoleStateV1 { input: self.port.input().bytes.iter().copied().collect() })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Console(ConsoleStateV1 { input }) = state else {
            return Err(StateError::WrongDevice("console"));
        };
        if input.len() > INPUT_BYTES {
            return Err(StateError::Impossible("the console's input is longer than its buffer"));
        }
        self.port.input().bytes = input.into();
        Ok(())
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.port.counters) as _
    }
}

#[derive(Default)]
struct ConsoleCounters {
    sent: Counter,
    received: Counter,
}

impl Counters for ConsoleCounters {
    fn read(&self) -> Vec<(&'static str, u64)> {
        vec![("output_bytes", self.sent.get()), ("input_bytes", self.received.get())]
    }
}

/// What outlives a reset.
struct Port {
    hub: Arc<ConsoleHub>,
    input: Mutex<Input>,
    /// Written when input arrived in an empty buffer.
    arrived: EventFd,
    counters: Arc<ConsoleCounters>,
}

#[derive(Default)]
struct Input {
    bytes: VecDeque<u8>,
    open: bool,
}

impl Port {
    fn input(&self) -> MutexGuard<'_, Input> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConsoleInput for Port {
    fn offer(&self, bytes: &[u8]) -> usize {
        let mut input = self.input();
        let room = if input.open { INPUT_BYTES - input.bytes.len() } else { 0 };
        let taken = room.min(bytes.len());
        input.bytes.extend(&bytes[..taken]);
        drop(input);
        if taken > 0 {
            // Fails only when the counter is full, which is a wake-up too.
            let _ = self.arrived.write(1);
        }
        taken
    }
}

struct ConsoleHandler {
    receive: Ring,
    transmit: Ring,
    port: Arc<Port>,
}

impl Handler for ConsoleHandler {
    fn sources(&self) -> Vec<(RawFd, u16)> {
        vec![(self.port.arrived.as_raw_fd(), 0)]
    }

    fn kicked(&mut self, position: usize) -> Result<(), Fault> {
        if position == usize::from(RECEIVE) { self.fill_buffers() } else { self.print() }
    }

    fn ready(&mut self, _token: u16) -> Result<(), Fault> {
        let _ = self.port.arrived.read();
        self.fill_buffers()
    }

    fn rings(&self) -> Vec<&Ring> {
        vec![&self.receive, &self.transmit]
    }
}

impl ConsoleHandler {
    /// Gives waiting input to the driver.
    fn fill_buffers(&mut self) -> Result<(), Fault> {
        let Self { receive, port, .. } = self;
        let mut drained = false;
        receive.serve(|chain| {
            let mut input = port.input();
            if input.bytes.is_empty() {
                return Ok(Served::NotNow);
            }
            let (front, back) = input.bytes.as_slices();
            let mut room = chain.writable;
            let mut filled = room.take(front.len()).copy_from(front);
            filled += room.copy_from(back);
            input.bytes.drain(..filled);
            drained |= input.bytes.is_empty();
            port.counters.received.add(filled as u64);
            Ok(Served::Used(filled as u32))
        })?;
        if drained {
            port.hub.input_ready();
        }
        Ok(())
    }

    /// Prints what the driver sends.
    fn print(&mut self) -> Result<(), Fault> {
        let Self { transmit, port, .. } = self;
        transmit.serve(|mut chain| {
            let mut text = chain.readable.take(MAX_OUTPUT);
            let mut chunk = [0; CHUNK];
            while !text.is_empty() {
                let part = text.take(CHUNK).copy_to(&mut chunk);
                port.hub.guest_output(&chunk[..part]);
                port.counters.sent.add(part as u64);
            }
            Ok(Served::Used(0))
        })
    }
}
