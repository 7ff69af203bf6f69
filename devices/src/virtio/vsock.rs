//! The socket device (virtio 1.2 §5.10): stream connections between the guest and programs of the host, which see unix sockets.
//!
//! ```text
//!  guest: connect(2, P)  ──▶ host: PATH_P, where a program listens
//!  guest: listen(P)      ◀── host: connect to PATH, write "CONNECT P\n", read "OK <port>\n"
//! ```
//!
//! Nothing of the host's kernel is involved but unix sockets, and no privilege is needed. A connection that nobody takes is
//! refused with an RST, or by closing the program's socket.
//!
//! Data moves between guest memory and sockets in one copy, the kernel's, up to 256 KiB a system call: to the guest over as many of
//! its receive buffers as that takes, which it gets back together.
//!
//! Connections do not go with a saved state: they end on the host. A restored device has its driver reset them by a
//! transport reset event (§5.10.6.7), and what the guest still sends in them is answered with RSTs.
//!
//! Nothing of the host's is read while the driver gives no receive buffers or a connection's receiver no credit: the socket fills, and
//! its program waits.

mod buffers;
mod claim;
mod connection;
mod deadlines;
mod handshake;
mod listener;
mod packet;
mod switchboard;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use vm_memory::GuestMemoryMmap;

use self::buffers::Buffers;
pub use self::listener::{VsockError, VsockListener};
use self::switchboard::{FIRST_PORT, Outgoing, Switchboard};
use super::ring::{RING_FEATURES, Ring, Side};
use super::state::{DeviceState, StateError, VsockStateV1};
use super::worker::{Fault, Handler, Worker, Workers};
use super::{ActivateError, Activation, DeviceType, VirtioDevice, read_config_bytes};
use crate::counters::{Counter, Counters};

const QUEUE_SIZE: u16 = 256;
const EVENT_QUEUE_SIZE: u16 = 16;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;
/// VIRTIO_VSOCK_F_STREAM (§5.10.3).
const F_STREAM: u64 = 1;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, as it lies in an event's buffer.
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();
/// Packets moved before the worker looks at its commands again.
const TURN: usize = 256;
/// Addresses from here on are not a guest's: VMADDR_CID_ANY.
const CID_END: u64 = 0xffff_ffff;

/// How much a device holds at most, and how long it waits.
#[derive(Clone, Copy, Debug)]
struct Limits {
    connections: usize,
    /// Programs that have not yet said where to.
    handshakes: usize,
    /// For that, for the guest's answer, and for its RST when all was said.
    patience: Duration,
}

const LIMITS: Limits = Limits { connections: 1024, handshakes: 64, patience: Duration::from_secs(10) };

/// A virtio socket device.
pub struct Vsock {
    name: &'static str,
    cid: u64,
    listener: Arc<VsockListener>,
    limits: Limits,
    counters: Arc<VsockCounters>,
    /// Outlives connections and resets, so that nothing late is taken for a part of something new.
    next_port: Arc<AtomicU32>,
    /// It was restored: the driver does not know yet that its connections are gone.
    stale: bool,
}

impl Vsock {
    /// A device in whose guest, with the address `cid`, programs get to by `listener`. The listener outlives the machine's
    /// reboots.
    ///
    /// # Errors
    /// `InvalidInput` for an address that no guest may have.
    pub fn new(cid: u64, listener: Arc<VsockListener>) -> io::Result<Self> {
        if cid <= packet::HOST_CID || cid >= CID_END {
            let text = format!("{cid} is no address for a guest: they go from 3 to 4294967294");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let next_port = Arc::new(AtomicU32::new(FIRST_PORT));
        Ok(Self { name: "vsock", cid, listener, limits: LIMITS, counters: Arc::default(), next_port, stale: false })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn features(&self) -> u64 {
        RING_FEATURES | F_STREAM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE]
    }

    /// One for all queues: a program in the guest that reads has it send word of room, and that packet comes back at the time when
    /// the next data come. Linux looks at every queue of an interrupt, so one does for both.
    fn vectors(&self) -> u16 {
        2
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Workers, ActivateError> {
        let (receive, receive_kick) = Ring::take(&mut activation, RECEIVE)?;
        let (transmit, transmit_kick) = Ring::take(&mut activation, TRANSMIT)?;
        let (events, event_kick) = Ring::take(&mut activation, EVENT)?;
        let (listener, counters) = (Arc::clone(&self.listener), Arc::clone(&self.counters));
        let board = Switchboard::new(self.cid, listener, self.limits, counters, Arc::clone(&self.next_port));
        let handler = VsockHandler {
            receive,
            transmit,
            events,
            board: board.map_err(ActivateError::Worker)?,
            stale: self.stale,
            transmit_blocked: false,
            more_events: false,
        };
        let worker = Worker::spawn(self.name, vec![receive_kick, transmit_kick, event_kick], handler, &activation);
        Ok(worker.map_err(ActivateError::Worker)?.into())
    }

    fn reset(&mut self) {
        self.stale = false;
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockStateV1 { cid: self.cid, next_port: self.next_port.load(Ordering::Relaxed) })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Vsock(VsockStateV1 { cid, next_port }) = state else {
            return Err(StateError::WrongDevice("socket device"));
        };
        if cid != self.cid {
            let (saved, now) = (cid.to_string(), self.cid.to_string());
            return Err(StateError::Differs { what: "the guest's vsock address", saved, now });
        }
        if next_port < FIRST_PORT {
            return Err(StateError::Impossible("a socket device's port is none of its own"));
        }
        self.next_port.store(next_port, Ordering::Relaxed);
        self.stale = true;
        Ok(())
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.counters) as _
    }
}

#[derive(Default)]
struct VsockCounters {
    /// Made, by either side.
    connections: Counter,
    /// Asked for and not made, by either side.
    refused: Counter,
    /// Broken off, by either side.
    resets: Counter,
    rx_packets: Counter,
    rx_bytes: Counter,
    tx_packets: Counter,
    tx_bytes: Counter,
}

impl Counters for VsockCounters {
    fn read(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("connections", self.connections.get()),
            ("refused", self.refused.get()),
            ("resets", self.resets.get()),
            ("rx_packets", self.rx_packets.get()),
            ("rx_bytes", self.rx_bytes.get()),
            ("tx_packets", self.tx_packets.get()),
            ("tx_bytes", self.tx_bytes.get()),
        ]
    }
}

/// Moves packets between the rings and the switchboard.
struct VsockHandler {
    receive: Ring,
    transmit: Ring,
    events: Ring,
    board: Switchboard,
    /// The driver is to be told that its connections are gone.
    stale: bool,
    /// The switchboard takes no packet until the guest took some.
    transmit_blocked: bool,
    /// The switchboard has not seen all events of its sockets.
    more_events: bool,
}

impl Handler for VsockHandler {
    fn sources(&self) -> Vec<(RawFd, u16)> {
        vec![(self.board.as_raw_fd(), 0)]
    }

    fn kicked(&mut self, position: usize) -> Result<(), Fault> {
        let served = self.serve(position);
        // After what its packets brought the guest: the interrupt for that finds these done as well, and then nobody waits for
        // another. Also where something was broken: what was done before is done.
        let told = self.transmit.notify();
        served.and(told)
    }

    fn ready(&mut self, _token: u16) -> Result<(), Fault> {
        self.look()
    }

    fn rings(&self) -> Vec<&Ring> {
        vec![&self.receive, &self.transmit, &self.events]
    }
}

impl VsockHandler {
    /// Does what a kick may be for. The driver is not told yet of the packets that were taken from it.
    fn serve(&mut self, position: usize) -> Result<(), Fault> {
        self.tell_reset()?;
        if position == usize::from(TRANSMIT) {
            self.take_packets()?;
        }
        if self.more_events { self.look() } else { self.deliver() }
    }

    /// Tells the driver of a restored device that its connections are gone.
    fn tell_reset(&mut self) -> Result<(), Fault> {
        let ram = self.events.ram();
        while self.stale {
            let Some(chain) = self.events.next(&ram)? else {
                if self.events.await_kick()? {
                    continue;
                }
                return Ok(());
            };
            if chain.writable.copy_from(&TRANSPORT_RESET) < TRANSPORT_RESET.len() {
                return Err(Fault(format!("event buffer {} has no room for an event", chain.head)));
            }
            self.events.used(chain.head, TRANSPORT_RESET.len() as u32)?;
            self.events.notify()?;
            self.stale = false;
        }
        Ok(())
    }

    /// Takes packets from the driver until none waits, the switchboard wants no more, or it was enough for one turn. The driver is
    /// not told yet.
    fn take_packets(&mut self) -> Result<(), Fault> {
        let Self { transmit, board, .. } = self;
        let ram = transmit.ram();
        transmit.ignore_kicks()?;
        for _ in 0..TURN {
            if !board.takes_packets() {
                self.transmit_blocked = true;
                return Ok(());
            }
            match transmit.next(&ram)? {
                Some(chain) => {
                    board.packet(chain.readable);
                    transmit.used(chain.head, 0)?;
                }
                None if transmit.await_kick()? => {}
                None => return Ok(()),
            }
        }
        transmit.kick_self()
    }

    /// Takes in what happened to sockets, and delivers what came of it.
    fn look(&mut self) -> Result<(), Fault> {
        self.more_events = self.board.look().map_err(host_failed)?;
        if self.more_events {
            self.receive.kick_self()?;
        }
        self.deliver()
    }

    /// Gives packets to the driver until none is due, there are no buffers, or it was enough for one turn.
    fn deliver(&mut self) -> Result<(), Fault> {
        let ram = self.receive.ram();
        let mut buffers = Buffers::default();
        self.receive.ignore_kicks()?;
        let turn = self.deliver_turn(&ram, &mut buffers);
        // With any kick that a shortage needs already asked for: it has to come with the next buffer, not with one that is there.
        self.receive.put_back(buffers.len() as u16);
        // Also when the next buffer is broken.
        let told = self.receive.notify();
        turn.and(told)?;
        self.board.arm().map_err(host_failed)?;
        if self.transmit_blocked && self.board.takes_packets() {
            self.transmit_blocked = false;
            self.transmit.kick_self()?;
        }
        Ok(())
    }

    fn deliver_turn<'a>(&mut self, ram: &'a GuestMemoryMmap, buffers: &mut Buffers<'a>) -> Result<(), Fault> {
        let mut left = TURN;
        while self.board.has_outgoing() {
            if left == 0 {
                return self.receive.kick_self();
            }
            if buffers.len() == 0 && !self.take_buffer(ram, buffers)? {
                if self.receive.await_kick()? {
                    continue;
                }
                return Ok(());
            }
            let packets = match self.board.next() {
                None => 0,
                Some(Outgoing::Packet(header)) => {
                    self.receive.used_together(buffers.fill_one(&header))?;
                    1
                }
                Some(Outgoing::Data { id, max }) => {
                    // As many as are there and likely to be needed.
                    while buffers.room() < max && self.take_buffer(ram, buffers)? {}
                    let before = buffers.len();
                    let (header, len) = self.board.read(id, buffers.data(), max);
                    self.receive.used_together(buffers.fill(header, len))?;
                    before - buffers.len()
                }
            };
            self.board.delivered(packets);
            left = left.saturating_sub(packets.max(1));
        }
        Ok(())
    }

    /// Takes a receive buffer from the ring; false when there is none.
    fn take_buffer<'a>(&mut self, ram: &'a GuestMemoryMmap, buffers: &mut Buffers<'a>) -> Result<bool, Fault> {
        let taken = self.receive.walk(ram, |side, part| {
            if side == Side::Writable {
                buffers.push_part(part);
            }
        })?;
        match taken {
            Some(head) if !buffers.push_buffer(head) => {
                Err(Fault(format!("receive buffer {head} has no room for a packet")))
            }
            taken => Ok(taken.is_some()),
        }
    }
}

fn host_failed(error: io::Error) -> Fault {
    Fault(format!("the host's epoll or timer fails: {error}"))
}
