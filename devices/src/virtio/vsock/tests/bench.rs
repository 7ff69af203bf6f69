//! What data cost the device's thread. Not a test of time: it prints, and asserts what arrived.
//!
//! `cargo test --release -p civic-devices -- --ignored --nocapture vsock::tests::bench`

use std::io::{Read, Write};

use super::guest::{Guest, header};
use super::*;
use crate::virtio::testing::{Part, ran};

const MIB: usize = 1 << 20;
const TOTAL: usize = 256 * MIB;
/// A receive buffer of Linux's (VIRTIO_VSOCK_DEFAULT_RX_BUF_SIZE), and the packets that it sends.
const BUFFER: usize = 3776;
const PACKET: usize = 64 << 10;

fn report(what: &str, guest: &Guest, packets: usize, start: u64) {
    let nanos = (ran("vsock") - start) as usize;
    let interrupts = guest.driver.interrupts() as usize;
    let (mibs, each) = (TOTAL / MIB, nanos / packets);
    eprintln!(
        "{what}: {:>4} us a MiB, {each} ns a packet; {:.2} interrupts a MiB",
        nanos / mibs / 1000,
        interrupts as f64 / mibs as f64
    );
}

#[test]
#[ignore = "prints times"]
fn to_guest() {
    let mut guest = Guest::new(|_| {});
    guest.give(16);
    let (ports, mut stream) = guest.be_connected(5000);
    guest.send_packet(&Header { buf_alloc: 1 << 31, ..header(Op::CreditUpdate, ports) }, &[]);
    guest.settle();
    let spare = guest.buffers();
    let start = ran("vsock");
    let writer = std::thread::spawn(move || {
        let block = vec![7; 4 * PACKET];
        (0..TOTAL / block.len()).for_each(|_| stream.write_all(&block).unwrap());
        stream
    });
    let queue = &mut guest.driver.queues[0];
    let (mut bytes, mut packets, mut due) = (0, 0, 240 - spare);
    while bytes < TOTAL {
        // As Linux does it: when half of them are gone.
        if due >= 128 {
            (0..due).for_each(|_| drop(queue.offer(&[Part::Room(BUFFER)])));
            queue.kick_if_wanted(due as u16);
            due = 0;
        }
        queue.interrupt_after(packets as u16);
        let (_, len) = queue.await_used();
        bytes += len as usize - HEADER;
        packets += 1;
        due += 1;
    }
    assert_eq!(bytes, TOTAL);
    report("to the guest", &guest, packets, start);
    drop(writer.join().unwrap());
}

#[test]
#[ignore = "prints times"]
fn from_guest() {
    let mut guest = Guest::new(|_| {});
    guest.give(64);
    let (ports, mut stream) = guest.be_connected(5000);
    let start = ran("vsock");
    let reader = std::thread::spawn(move || {
        let mut block = vec![0; 4 * PACKET];
        let mut left = TOTAL;
        while left > 0 {
            left -= stream.read(&mut block).unwrap();
        }
    });
    let data = vec![7; PACKET];
    let (mut sent, mut room, mut packets) = (0_usize, 256 << 10, 0);
    while sent < TOTAL {
        while room - sent < PACKET {
            let (header, _) = guest.receive();
            room = (sent & !0xffff_ffff) + header.fwd_cnt as usize + header.buf_alloc as usize;
        }
        guest.send(Op::Data, ports, &data);
        sent += PACKET;
        packets += 1;
    }
    reader.join().unwrap();
    report("from the guest", &guest, packets, start);
}
