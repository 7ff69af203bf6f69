//! A guest's driver for the device under test, and programs of the host's.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;

use super::super::packet::{HEADER, HOST_CID, Header, NO_RECEIVE, NO_SEND, Op, Ports, STREAM};
use super::super::{EVENT_QUEUE_SIZE, QUEUE_SIZE, Vsock, VsockListener};
use crate::virtio::VirtioDevice;
use crate::virtio::ring::RING_FEATURES;
use crate::virtio::testing::{Attached, Driver, Offered, Part, count, until};
use std::sync::Arc;

pub const CID: u64 = 3;
/// What the guest says that it can receive in each connection.
pub const ROOM: u32 = 64 << 10;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENTS: usize = 2;

/// A packet with its data.
pub type Packet = (Header, Vec<u8>);

pub struct Guest {
    pub device: Attached<Vsock>,
    pub driver: Driver,
    pub dir: TempDir,
    /// Receive buffers that the device has.
    offered: VecDeque<Offered>,
    /// Size of the next ones' data.
    pub buffer_size: usize,
    /// Transmitted packets that were not given back.
    in_flight: usize,
}

impl Guest {
    /// A device that `change` made ready, with a driver that has given no receive buffers.
    pub fn new(change: impl FnOnce(&mut Vsock)) -> Self {
        let mut guest = Self::inactive(change);
        guest.activate();
        guest
    }

    pub fn inactive(change: impl FnOnce(&mut Vsock)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = VsockListener::bind(&dir.path().join("v")).unwrap();
        let mut device = Vsock::new(CID, Arc::new(listener)).unwrap();
        change(&mut device);
        let driver = Driver::new(&[QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE]);
        Self { device: Attached::new(device), driver, dir, offered: VecDeque::new(), buffer_size: 4096, in_flight: 0 }
    }

    pub fn activate(&mut self) {
        self.activate_as(false);
    }

    pub fn activate_as(&mut self, paused: bool) {
        self.offered.clear();
        self.in_flight = 0;
        let mut activation = self.driver.activation(RING_FEATURES);
        activation.paused = paused;
        self.device.activate(activation).unwrap();
    }

    pub fn count(&self, name: &str) -> u64 {
        count(&*self.device.counters(), name)
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    /// A program that serves `port` of the host.
    pub fn serve(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap()
    }

    /// Gives `count` receive buffers.
    pub fn give(&mut self, count: usize) {
        let queue = &mut self.driver.queues[RECEIVE];
        for i in 0..count {
            // As older and as newer drivers do it.
            let offered = match i % 2 {
                0 => queue.offer_indirect(&[Part::Room(HEADER), Part::Room(self.buffer_size)]),
                _ => queue.offer(&[Part::Room(HEADER + self.buffer_size)]),
            };
            self.offered.push_back(offered);
        }
        queue.kick_if_wanted(count as u16);
    }

    pub fn give_event_buffer(&mut self) -> Offered {
        let queue = &mut self.driver.queues[EVENTS];
        let offered = queue.offer(&[Part::Room(4)]);
        queue.kick_if_wanted(1);
        offered
    }

    /// Receive buffers that the device still has.
    pub fn buffers(&self) -> usize {
        self.offered.len()
    }

    /// Takes a packet that has arrived.
    pub fn try_receive(&mut self) -> Option<Packet> {
        let queue = &mut self.driver.queues[RECEIVE];
        let (head, len) = queue.take_used()?;
        let buffer = self.offered.pop_front().unwrap();
        assert_eq!(head, buffer.head);
        let bytes: Vec<u8> = buffer.parts.iter().flat_map(|part| queue.bytes(*part)).collect();
        let header = Header::parse(bytes[..HEADER].try_into().unwrap());
        assert_eq!(len as usize, HEADER + header.len as usize);
        assert_eq!(header.dst_cid, CID);
        Some((header, bytes[HEADER..len as usize].to_vec()))
    }

    /// The next packet, for which there is a buffer; the buffer is replaced.
    #[track_caller]
    pub fn receive(&mut self) -> Packet {
        assert!(!self.offered.is_empty());
        let mut packet = None;
        until("a packet for the guest", || {
            packet = self.try_receive();
            packet.is_some()
        });
        self.give(1);
        packet.unwrap()
    }

    /// The next packet, which must be `op` in the connection called `ports`; updates of credit may come before it.
    #[track_caller]
    pub fn expect(&mut self, op: Op, ports: Ports) -> Packet {
        let mut packet = self.receive();
        while op != Op::CreditUpdate && packet.0.op == Op::CreditUpdate as u16 {
            packet = self.receive();
        }
        let Header { src_cid, src_port, dst_port, kind, .. } = packet.0;
        assert_eq!((Op::from_number(packet.0.op), src_cid, kind), (Some(op), HOST_CID, STREAM), "{:?}", packet.0);
        assert_eq!(Ports { guest: dst_port, host: src_port }, ports);
        packet
    }

    /// Data of the connection called `ports` until there are `len` bytes. The guest's credit must suffice.
    #[track_caller]
    pub fn expect_data(&mut self, ports: Ports, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            bytes.extend(self.expect(Op::Data, ports).1);
        }
        bytes
    }

    pub fn nothing_arrives(&mut self) {
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(self.try_receive(), None);
    }

    /// Puts a packet into the ring as it is.
    pub fn send_raw(&mut self, parts: &[&[u8]]) {
        let queue = &mut self.driver.queues[TRANSMIT];
        // The buffers of so many packets lie beside each other.
        while self.in_flight >= 16 || self.in_flight > 0 && queue.has_used() {
            queue.await_used();
            self.in_flight -= 1;
        }
        let parts: Vec<_> = parts.iter().map(|bytes| Part::Say(bytes)).collect();
        queue.offer(&parts);
        queue.kick_if_wanted(1);
        self.in_flight += 1;
    }

    pub fn send_packet(&mut self, header: &Header, data: &[u8]) {
        if data.is_empty() {
            self.send_raw(&[&header.bytes()]);
        } else {
            self.send_raw(&[&header.bytes(), data]);
        }
    }

    pub fn send(&mut self, op: Op, ports: Ports, data: &[u8]) {
        self.send_packet(&Header { len: data.len() as u32, ..header(op, ports) }, data);
    }

    pub fn shut_down(&mut self, ports: Ports, flags: u32) {
        assert_eq!(flags & !(NO_SEND | NO_RECEIVE), 0);
        self.send_packet(&Header { flags, ..header(Op::Shutdown, ports) }, &[]);
    }

    /// Waits until the device has seen all packets.
    pub fn settle(&mut self) {
        for _ in 0..std::mem::take(&mut self.in_flight) {
            self.driver.queues[TRANSMIT].await_used();
        }
    }

    /// A connection made by the guest to a program on `host`; returns the program's end.
    pub fn connect(&mut self, guest: u32, host: u32, server: &UnixListener) -> (Ports, UnixStream) {
        let ports = Ports { guest, host };
        self.send(Op::Request, ports, &[]);
        self.expect(Op::Response, ports);
        (ports, server.accept().unwrap().0)
    }

    /// A program's connection that asks for `port` of the guest.
    pub fn ask(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    /// The request that a program's asking leads to.
    #[track_caller]
    pub fn asked(&mut self, port: u32) -> Ports {
        let (header, _) = self.receive();
        assert_eq!((header.op, header.dst_port), (Op::Request as u16, port));
        Ports { guest: port, host: header.src_port }
    }

    /// A connection made by a program to `port` of the guest; returns the program's end.
    pub fn be_connected(&mut self, port: u32) -> (Ports, UnixStream) {
        let stream = self.ask(port);
        let ports = self.asked(port);
        self.send(Op::Response, ports, &[]);
        assert_eq!(line(&stream), format!("OK {}\n", ports.host));
        (ports, stream)
    }
}

/// The guest's header of a packet saying `op`.
pub fn header(op: Op, ports: Ports) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: ports.guest,
        dst_port: ports.host,
        kind: STREAM,
        op: op as u16,
        buf_alloc: ROOM,
        ..Header::default()
    }
}

/// The line that a stream has, read byte by byte so that nothing after it is lost. Empty at the stream's end.
pub fn line(stream: &UnixStream) -> String {
    let mut line = String::new();
    BufReader::with_capacity(1, stream).read_line(&mut line).unwrap();
    line
}

/// `len` bytes that are not those from anywhere near, from `start` on.
pub fn text(start: usize, len: usize) -> Vec<u8> {
    (start..start + len).map(|i| (i ^ i >> 8 ^ i >> 16) as u8).collect()
}
