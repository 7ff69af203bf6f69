//! Random interleavings against a model of both ends, and packets that no driver sends.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::super::connection::BUF_ALLOC;
use super::super::packet::{HOST_CID, Header, NO_MORE, NO_RECEIVE, NO_SEND, Op, Ports, STREAM};
use super::guest::{CID, Guest, header};
use crate::virtio::VirtioDevice;
use crate::virtio::ring::RING_FEATURES;
use crate::virtio::testing::{NEXT, WRITE, until};

const SERVER: u32 = 1;

/// Byte `at` of what goes one way in a connection.
fn byte(connection: usize, inward: bool, at: usize) -> u8 {
    (at ^ at >> 8 ^ at >> 16).wrapping_mul(7).wrapping_add(connection * 50 + usize::from(inward) * 101) as u8
}

/// One direction of a connection, from writer to reader.
struct Way {
    connection: usize,
    inward: bool,
    written: usize,
    read: usize,
    /// The writer has ended; the reader has seen it.
    ended: bool,
    end_seen: bool,
}

impl Way {
    fn new(connection: usize, inward: bool) -> Self {
        Self { connection, inward, written: 0, read: 0, ended: false, end_seen: false }
    }

    fn next(&self, len: usize) -> Vec<u8> {
        (self.written..self.written + len).map(|at| byte(self.connection, self.inward, at)).collect()
    }

    fn arrived(&mut self, bytes: &[u8]) {
        assert!(!self.end_seen, "bytes after the end");
        for (i, got) in bytes.iter().enumerate() {
            assert_eq!(*got, byte(self.connection, self.inward, self.read + i), "byte {}", self.read + i);
        }
        self.read += bytes.len();
        assert!(self.read <= self.written, "bytes that nobody wrote");
    }

    fn end_arrived(&mut self) {
        assert!(self.ended && self.read == self.written, "{} of {} bytes before the end", self.read, self.written);
        self.end_seen = true;
    }
}

/// Both ends of a connection.
struct Ends {
    ports: Ports,
    program: UnixStream,
    to_guest: Way,
    to_host: Way,
    /// The guest's receive buffer: its size, and how many of the bytes that came were taken from it.
    room: u32,
    taken: usize,
    /// What the guest knows of the device's.
    device_room: u32,
    device_took: u32,
}

impl Ends {
    fn header(&self, op: Op) -> Header {
        Header { buf_alloc: self.room, fwd_cnt: self.taken as u32, ..header(op, self.ports) }
    }

    fn credit(&self) -> usize {
        (self.device_room - (self.to_host.written as u32).wrapping_sub(self.device_took)) as usize
    }

    /// The guest gets a packet.
    fn packet(&mut self, header: &Header, data: &[u8]) {
        (self.device_room, self.device_took) = (header.buf_alloc, header.fwd_cnt);
        assert_eq!(self.device_room, BUF_ALLOC);
        assert!(self.device_took as usize <= self.to_host.written);
        match Op::from_number(header.op).unwrap() {
            Op::Data => {
                assert!(!data.is_empty());
                self.to_guest.arrived(data);
                assert!(self.to_guest.read - self.taken <= self.room as usize, "more than there is room for");
            }
            Op::Shutdown if header.flags & NO_SEND != 0 => self.to_guest.end_arrived(),
            // The program takes no more once the guest has ended and it has, too.
            Op::Shutdown => assert!(self.to_host.ended && self.to_guest.ended),
            Op::CreditUpdate | Op::CreditRequest => {}
            other => panic!("{other:?} in the middle of things: {header:?}"),
        }
    }

    fn program_reads(&mut self, most: usize) {
        let mut bytes = vec![0; most];
        match self.program.read(&mut bytes) {
            Ok(0) => self.to_host.end_arrived(),
            Ok(len) => self.to_host.arrived(&bytes[..len]),
            Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    GuestWrites(usize),
    GuestTakes(usize),
    GuestEnds,
    ProgramWrites(usize),
    ProgramReads(usize),
    ProgramEnds,
    Buffers(usize),
    Packets,
    PauseAndResume,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (1..70_000_usize).prop_map(Step::GuestWrites),
        8 => (1..70_000_usize).prop_map(Step::GuestTakes),
        1 => Just(Step::GuestEnds),
        8 => (1..200_000_usize).prop_map(Step::ProgramWrites),
        8 => (1..200_000_usize).prop_map(Step::ProgramReads),
        1 => Just(Step::ProgramEnds),
        8 => (1..20_usize).prop_map(Step::Buffers),
        8 => Just(Step::Packets),
        1 => Just(Step::PauseAndResume),
    ]
}

struct World {
    guest: Guest,
    ends: Vec<Ends>,
    _server: UnixListener,
}

impl World {
    fn new(rooms: &[u32], buffer_size: usize) -> Self {
        let mut guest = Guest::new(|_| ());
        guest.buffer_size = buffer_size;
        let server = guest.serve(SERVER);
        guest.give(4);
        let mut ends = Vec::new();
        for (i, &room) in rooms.iter().enumerate() {
            // By turns from either side.
            let (ports, program) = match i % 2 {
                0 => guest.connect(100 + i as u32, SERVER, &server),
                _ => guest.be_connected(100 + i as u32),
            };
            program.set_nonblocking(true).unwrap();
            let (to_guest, to_host) = (Way::new(i, true), Way::new(i, false));
            let ends_of =
                Ends { ports, program, to_guest, to_host, room, taken: 0, device_room: BUF_ALLOC, device_took: 0 };
            guest.send_packet(&ends_of.header(Op::CreditUpdate), &[]);
            ends.push(ends_of);
        }
        guest.settle();
        Self { guest, ends, _server: server }
    }

    fn packets(&mut self) {
        while let Some((header, data)) = self.guest.try_receive() {
            assert_eq!(header.src_cid, HOST_CID);
            let ports = Ports { guest: header.dst_port, host: header.src_port };
            let ends = self.ends.iter_mut().find(|ends| ends.ports == ports);
            ends.expect("a connection that the guest knows").packet(&header, &data);
        }
    }

    fn buffers(&mut self, most: usize) {
        let count = most.min(100 - self.guest.buffers());
        if count > 0 {
            self.guest.give(count);
        }
    }

    fn guest_takes(&mut self, i: usize, most: usize) {
        let ends = &mut self.ends[i];
        let len = most.min(ends.to_guest.read - ends.taken);
        if len > 0 {
            ends.taken += len;
            self.guest.send_packet(&ends.header(Op::CreditUpdate), &[]);
        }
    }

    fn guest_ends(&mut self, i: usize, flags: u32) {
        let ends = &mut self.ends[i];
        ends.to_host.ended = true;
        self.guest.send_packet(&Header { flags, ..ends.header(Op::Shutdown) }, &[]);
    }

    fn step(&mut self, i: usize, step: &Step) {
        let ends = &mut self.ends[i];
        match *step {
            Step::GuestWrites(most) if !ends.to_host.ended => {
                let len = most.min(ends.credit());
                if len > 0 {
                    let bytes = ends.to_host.next(len);
                    ends.to_host.written += len;
                    self.guest.send_packet(&Header { len: len as u32, ..ends.header(Op::Data) }, &bytes);
                }
            }
            Step::GuestTakes(most) => self.guest_takes(i, most),
            Step::GuestEnds if !ends.to_host.ended => self.guest_ends(i, NO_SEND),
            Step::ProgramWrites(most) if !ends.to_guest.ended => {
                let bytes = ends.to_guest.next(most);
                if let Ok(len) = ends.program.write(&bytes) {
                    ends.to_guest.written += len;
                }
            }
            Step::ProgramReads(most) => ends.program_reads(most),
            Step::ProgramEnds if !ends.to_guest.ended => {
                ends.program.shutdown(Shutdown::Write).unwrap();
                ends.to_guest.ended = true;
            }
            Step::Buffers(count) => self.buffers(count),
            Step::Packets => self.packets(),
            Step::PauseAndResume => {
                self.guest.device.pause();
                self.guest.device.resume();
            }
            _ => {}
        }
    }

    /// Both ends of all connections end, and all that was written arrives.
    fn finish(&mut self) {
        for i in 0..self.ends.len() {
            self.step(i, &Step::ProgramEnds);
            self.step(i, &Step::GuestEnds);
        }
        until("all to arrive", || {
            self.buffers(20);
            self.packets();
            for i in 0..self.ends.len() {
                self.ends[i].program_reads(1 << 20);
                self.guest_takes(i, usize::MAX);
            }
            self.ends.iter().all(|ends| ends.to_guest.end_seen && ends.to_host.end_seen)
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn each_byte_arrives_once_and_in_order(
        rooms in prop::collection::vec(prop_oneof![Just(1_u32), 100..10_000_u32, Just(256_u32 << 10)], 1..5),
        buffer_size in prop_oneof![Just(10_usize), 1000..6000_usize],
        steps in prop::collection::vec((0..4_usize, step()), 1..150),
    ) {
        // A byte a packet takes its time.
        let tiny = buffer_size == 10 || rooms.contains(&1);
        let mut world = World::new(&rooms, buffer_size);
        for (i, step) in &steps {
            let step = match step {
                Step::ProgramWrites(most) if tiny => Step::ProgramWrites(most % 500),
                step => step.clone(),
            };
            world.step(i % rooms.len(), &step);
        }
        world.finish();
        prop_assert_eq!(world.guest.count("resets"), 0);
    }

    #[test]
    fn no_packets_panic_or_stop_it(
        packets in prop::collection::vec(packet(), 1..200),
        buffers in 0..60_usize,
        hosts in 0..4_usize,
    ) {
        let mut guest = Guest::new(|device| device.limits.connections = 4);
        let server = guest.serve(SERVER);
        server.set_nonblocking(true).unwrap();
        guest.give(buffers);
        let mut programs: Vec<_> = (0..hosts).map(|port| guest.ask(port as u32)).collect();
        for (i, (header, data)) in packets.iter().enumerate() {
            guest.send_raw(&[&header.bytes(), data]);
            if i % 20 == 0 {
                programs.extend(server.accept().ok().map(|(stream, _)| stream));
                if let Some(program) = programs.last_mut() {
                    program.set_nonblocking(true).unwrap();
                    let _ = program.write(&[0; 5000]);
                }
            }
            if i % 50 == 49 {
                programs.clear();
            }
        }
        // With buffers for its answers, it has taken all of it, and serves what comes then.
        while guest.try_receive().is_some() {}
        guest.give(100);
        guest.settle();
        let ports = Ports { guest: 77_777, host: SERVER };
        guest.send(Op::Request, ports, &[]);
        until("an answer", || {
            let packet = guest.try_receive();
            if packet.is_some() {
                guest.give(1);
            }
            packet.is_some_and(|(header, _)| header.dst_port == ports.guest)
        });
        prop_assert_eq!(guest.driver.interrupt.needs_reset.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn no_table_panics_or_hangs_it(
        table in prop::collection::vec(
            (0_u64..0xd0_0000, prop_oneof![0_u32..3000, any::<u32>()], 0_u16..8, 0_u16..20), 16),
        heads in prop::collection::vec(0_u16..17, 1..16),
    ) {
        let mut guest = Guest::inactive(|_| ());
        let state = guest.device.save();
        guest.device.restore(state).unwrap();
        let _program = guest.ask(5);
        let activation = guest.driver.activation(RING_FEATURES);
        for queue in &mut guest.driver.queues {
            for (i, descriptor) in table.iter().enumerate() {
                queue.set_descriptor(i as u16 % 16, *descriptor);
            }
            queue.set_descriptor(14, (0x20_0000, 1600, WRITE | NEXT, 15));
            queue.set_descriptor(15, (0x30_0000, 1600, WRITE, 0));
            for &head in &heads {
                queue.publish(head);
            }
        }
        guest.device.activate(activation).unwrap();
        guest.device.pause();
        guest.device.reset();
    }
}

/// A header, mostly one that could be, and data.
fn packet() -> impl Strategy<Value = (Header, Vec<u8>)> {
    let cid = prop_oneof![9 => Just(CID), 1 => any::<u64>()];
    let host = prop_oneof![9 => Just(HOST_CID), 1 => any::<u64>()];
    let port = prop_oneof![4 => Just(SERVER), 1 => 0xc000_0000..0xc000_0004_u32, 1 => any::<u32>()];
    let kind = prop_oneof![9 => Just(STREAM), 1 => any::<u16>()];
    let op = prop_oneof![4 => Just(1_u16), 8 => 2..8_u16, 4 => Just(5_u16), 1 => any::<u16>()];
    let data = prop_oneof![4 => prop::collection::vec(any::<u8>(), 0..300), 1 => Just(vec![5; 70_000])];
    let room = prop_oneof![Just(0_u32), Just(5), Just(1 << 18), any::<u32>()];
    let flags = prop_oneof![Just(NO_SEND), Just(NO_RECEIVE), Just(NO_MORE), any::<u32>()];
    let lie = prop_oneof![9 => Just(None), 1 => any::<u32>().prop_map(Some)];
    (cid, host, 0..4_u32, port, kind, op, flags, (room, prop_oneof![Just(0_u32), any::<u32>()]), data, lie).prop_map(
        |(src_cid, dst_cid, src_port, dst_port, kind, op, flags, (buf_alloc, fwd_cnt), data, lie)| {
            let len = lie.unwrap_or(data.len() as u32);
            let header = Header { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt };
            (header, data)
        },
    )
}
