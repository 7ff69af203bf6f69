//! The serial port: a 16550A behind eight I/O ports, its line side on a [`ConsoleHub`].
//!
//! The registers are vm-superio's, but for IIR: that one forgets a pending interrupt once IIR was read, so a driver that
//! leaves its handler with bytes in the FIFO would never be told of them, and it reports two pending interrupts as a
//! third one. Here IIR says "received data" as long as there is any (TL16C550C data sheet, table 5).
//!
//! Input is taken as the FIFO has room and never dropped; the hub is told when the FIFO is empty.
//!
//! Lock order: `uart`, then whatever the interrupt line takes; the hub's side is safe to call with `uart` held.

#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tracing::warn;
use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents, SerialState};

use crate::bus::BusDevice;
use crate::console_hub::{ConsoleHub, ConsoleInput};
use crate::counters::{Counter, Counters};
use crate::irq::IrqLine;

/// How many ports it decodes.
pub const SERIAL_PORTS: u64 = 8;

const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
const INTERRUPT_ID: u8 = 2;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;

const ENABLE_RECEIVED: u8 = 1 << 0;
const ENABLE_SENT: u8 = 1 << 1;
const DIVISOR_LATCH: u8 = 1 << 7;
const LOOPBACK: u8 = 1 << 4;
const DATA_READY: u8 = 1 << 0;

const ID_FIFOS: u8 = 0xc0;
const ID_NONE: u8 = 1;
const ID_SENT: u8 = 2;
const ID_RECEIVED: u8 = 4;

/// Saved registers of a port; what they hold is untrusted when it comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialStateV1 {
    /// Divisor latch, low and high byte.
    pub divisor: [u8; 2],
    /// IER, IIR, LCR, LSR, MCR, MSR and SCR.
    pub registers: [u8; 7],
    /// Received bytes that the guest has not read.
    pub received: Vec<u8>,
    /// Whether "transmitter empty" is due behind "received data".
    pub sent_waits: bool,
}

/// The state holds more received bytes than the FIFO has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the serial port's FIFO does not hold {0} bytes")]
pub struct FifoTooLong(pub usize);

/// A 16550A serial port.
pub struct SerialPort {
    uart: Mutex<Uart>,
    hub: Arc<ConsoleHub>,
    counters: Arc<SerialCounters>,
}

struct Uart {
    registers: Serial<Pulse, Drained, Line>,
    /// "Transmitter empty" was due when IIR had "received data" to report, which goes first.
    sent_waits: bool,
}

impl SerialPort {
    /// A port whose output goes to `hub` and which pulses `irq`. For input, connect it to the hub as its sink.
    pub fn new(hub: Arc<ConsoleHub>, irq: Arc<dyn IrqLine>) -> Self {
        let counters = Arc::new(SerialCounters::default());
        let line = Line { hub: Arc::clone(&hub), counters: Arc::clone(&counters) };
        let registers = Serial::with_events(Pulse(irq), Drained(Arc::clone(&hub)), line);
        Self { uart: Mutex::new(Uart { registers, sent_waits: false }), hub, counters }
    }

    /// Takes over what [`SerialPort::save`] gave and raises what is due. Call it once the interrupt controllers have their state.
    ///
    /// # Errors
    /// When the FIFO cannot hold what it is said to; the port is then as it was.
    pub fn restore(&self, saved: &SerialStateV1, irq: Arc<dyn IrqLine>) -> Result<(), FifoTooLong> {
        let [ier, iir, lcr, lsr, mcr, msr, scratch] = saved.registers;
        let state = SerialState {
            baud_divisor_low: saved.divisor[0],
            baud_divisor_high: saved.divisor[1],
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch,
            in_buffer: saved.received.clone(),
        };
        let line = Line { hub: Arc::clone(&self.hub), counters: Arc::clone(&self.counters) };
        let registers = Serial::from_state(&state, Pulse(irq), Drained(Arc::clone(&self.hub)), line)
            .map_err(|_| FifoTooLong(saved.received.len()))?;
        *self.uart() = Uart { registers, sent_waits: saved.sent_waits };
        self.hub.input_ready();
        Ok(())
    }

    /// The registers as they stand.
    pub fn save(&self) -> SerialStateV1 {
        let uart = self.uart();
        let state = uart.registers.state();
        SerialStateV1 {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            registers: [
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
            received: state.in_buffer,
            sent_waits: uart.sent_waits,
        }
    }

    /// The port's counters.
    pub fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.counters) as _
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Uart {
    fn read(&mut self, register: u8) -> u8 {
        if register == INTERRUPT_ID { self.interrupt_id() } else { self.registers.read(register) }
    }

    fn write(&mut self, register: u8, value: u8) {
        let latch = self.registers.read(LINE_CONTROL) & DIVISOR_LATCH != 0;
        match register {
            DATA if !latch => self.sent_waits = false,
            INTERRUPT_ENABLE if !latch && value & ENABLE_SENT == 0 => self.sent_waits = false,
            _ => {}
        }
        // Neither the line nor the trigger can fail.
        if let Err(e) = self.registers.write(register, value) {
            warn!("the serial port failed: {e}");
        }
    }

    fn interrupt_id(&mut self) -> u8 {
        let raised = self.registers.read(INTERRUPT_ID);
        let sent = raised & ID_SENT != 0 || self.sent_waits;
        let received =
            self.interrupts_enabled() & ENABLE_RECEIVED != 0 && self.registers.read(LINE_STATUS) & DATA_READY != 0;
        self.sent_waits = received && sent;
        match (received, sent) {
            (true, _) => ID_FIFOS | ID_RECEIVED,
            (false, true) => ID_FIFOS | ID_SENT,
            (false, false) => ID_FIFOS | ID_NONE,
        }
    }

    /// IER, which the divisor latch hides.
    fn interrupts_enabled(&self) -> u8 {
        self.registers.state().interrupt_enable
    }

    fn loopback(&mut self) -> bool {
        self.registers.read(MODEM_CONTROL) & LOOPBACK != 0
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = self.uart();
        for (i, byte) in data.iter_mut().enumerate() {
            let register = offset.saturating_add(i as u64);
            *byte = if register < SERIAL_PORTS { uart.read(register as u8) } else { 0xff };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut uart = self.uart();
        let looped = uart.loopback();
        for (register, &byte) in (offset..SERIAL_PORTS).zip(data) {
            uart.write(register as u8, byte);
        }
        if looped && !uart.loopback() {
            // Input was refused meanwhile.
            self.hub.input_ready();
        }
    }
}

impl ConsoleInput for SerialPort {
    fn offer(&self, bytes: &[u8]) -> usize {
        let mut uart = self.uart();
        // An error says that the FIFO is full.
        let taken = uart.registers.enqueue_raw_bytes(bytes).unwrap_or(0);
        // With the lock still held: whoever has read the bytes finds them counted.
        self.counters.received.add(taken as u64);
        taken
    }
}

#[derive(Default)]
struct SerialCounters {
    sent: Counter,
    received: Counter,
}

impl Counters for SerialCounters {
    fn read(&self) -> Vec<(&'static str, u64)> {
        vec![("output_bytes", self.sent.get()), ("input_bytes", self.received.get())]
    }
}

/// An edge on the interrupt line.
struct Pulse(Arc<dyn IrqLine>);

impl Trigger for Pulse {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set(true);
        self.0.set(false);
        Ok(())
    }
}

/// Asks the hub for more input when the FIFO is empty.
struct Drained(Arc<ConsoleHub>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.input_ready();
    }
}

/// The transmitting wire.
struct Line {
    hub: Arc<ConsoleHub>,
    counters: Arc<SerialCounters>,
}

impl io::Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // In this order: whoever has read the bytes finds them counted.
        self.counters.sent.add(bytes.len() as u64);
        self.hub.guest_output(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
