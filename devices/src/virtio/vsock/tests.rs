mod bench;
mod guest;
mod model;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::connection::BUF_ALLOC;
use super::packet::{HEADER, Header, NO_MORE, NO_RECEIVE, NO_SEND, Op, Ports};
use super::*;
use crate::virtio::testing::{Part, until};
use guest::{CID, Guest, ROOM, header, line, text};

fn guest() -> Guest {
    let mut guest = Guest::new(|_| ());
    guest.give(32);
    guest
}

/// What a stream has until its end.
fn rest(mut stream: &UnixStream) -> Vec<u8> {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Whether a stream was closed without a byte, whatever of ours was not read.
fn turned_away(mut stream: &UnixStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    match stream.read(&mut [0]) {
        Ok(len) => len == 0,
        Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
    }
}

fn exactly(mut stream: &UnixStream, len: usize) -> Vec<u8> {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_program_gets_to_a_port_of_the_guest() {
    let mut guest = guest();
    let (ports, mut program) = guest.be_connected(1024);
    assert_eq!(ports.host, FIRST_PORT);
    program.write_all(&text(0, 10_000)).unwrap();
    assert_eq!(guest.expect_data(ports, 10_000), text(0, 10_000));
    guest.send(Op::Data, ports, b"answer");
    assert_eq!(exactly(&program, 6), b"answer");
    let (other, _program) = guest.be_connected(1024);
    assert_eq!(other, Ports { host: FIRST_PORT + 1, ..ports });
    until("both to be counted", || guest.count("connections") == 2);
    assert_eq!((guest.count("rx_bytes"), guest.count("tx_bytes")), (10_000, 6));
}

#[test]
fn bytes_that_come_with_the_request_are_the_guests() {
    let mut guest = guest();
    let mut program = UnixStream::connect(guest.path()).unwrap();
    program.write_all(b"CONNECT 7\nhello").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    let ports = guest.asked(7);
    guest.nothing_arrives();
    guest.send(Op::Response, ports, &[]);
    assert_eq!(line(&program), format!("OK {}\n", ports.host));
    assert_eq!(guest.expect(Op::Data, ports).1, b"hello");
    assert_eq!(guest.expect(Op::Shutdown, ports).0.flags, NO_SEND);
    guest.send(Op::Data, ports, b"bye");
    guest.shut_down(ports, NO_MORE);
    guest.expect(Op::Reset, ports);
    assert_eq!(rest(&program), b"bye");
}

#[test]
fn programs_that_the_guest_or_nobody_understands_are_turned_away() {
    let mut guest = guest();
    let refused = guest.ask(9);
    let ports = guest.asked(9);
    guest.send(Op::Reset, ports, &[]);
    assert_eq!(rest(&refused), b"");
    for wrong in ["\n", "CONNECT x\n", "HELO there, this line never seems to end"] {
        let mut program = UnixStream::connect(guest.path()).unwrap();
        program.write_all(wrong.as_bytes()).unwrap();
        assert!(turned_away(&program), "{wrong}");
    }
    let mut hasty = UnixStream::connect(guest.path()).unwrap();
    hasty.write_all(b"CONNECT 1").unwrap();
    hasty.shutdown(Shutdown::Write).unwrap();
    assert!(turned_away(&hasty));
    // One that does not wait for the answer.
    let impatient = guest.ask(5);
    let ports = guest.asked(5);
    drop(impatient);
    guest.expect(Op::Reset, ports);
    assert_eq!((guest.count("refused"), guest.count("connections")), (6, 0));
}

#[test]
fn handshakes_end_in_time_and_are_few() {
    let mut guest = Guest::new(|device| {
        device.limits.patience = Duration::from_millis(50);
        device.limits.handshakes = 2;
    });
    guest.give(8);
    let silent: Vec<_> = (0..5).map(|_| UnixStream::connect(guest.path()).unwrap()).collect();
    for program in &silent {
        assert_eq!(rest(program), b"");
    }
    // One that the guest never answers, too; its late answer is none.
    let unanswered = guest.ask(4);
    let ports = guest.asked(4);
    assert_eq!(rest(&unanswered), b"");
    guest.expect(Op::Reset, ports);
    guest.send(Op::Response, ports, &[]);
    guest.expect(Op::Reset, ports);
    assert_eq!(guest.count("refused"), 6);
}

#[test]
fn the_guest_gets_to_programs_of_the_host() {
    let mut guest = guest();
    let nobody = Ports { guest: 5000, host: 52 };
    guest.send(Op::Request, nobody, &[]);
    guest.expect(Op::Reset, nobody);
    let server = guest.serve(52);
    let (ports, mut program) = guest.connect(5000, 52, &server);
    guest.send(Op::Data, ports, &text(0, 70_000));
    assert_eq!(exactly(&program, 70_000), text(0, 70_000));
    program.write_all(&text(1, 50_000)).unwrap();
    assert_eq!(guest.expect_data(ports, 50_000), text(1, 50_000));
    assert_eq!((guest.count("connections"), guest.count("refused")), (1, 1));
    // The guest asks for the same once more: it knows nothing of the first.
    guest.send(Op::Request, ports, &[]);
    guest.expect(Op::Reset, ports);
    assert_eq!(rest(&program), b"");
}

#[test]
fn each_direction_ends_by_itself() {
    let mut guest = guest();
    let server = guest.serve(1);
    let (ports, mut program) = guest.connect(10, 1, &server);
    program.write_all(b"last words").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(Op::Data, ports).1, b"last words");
    assert_eq!(guest.expect(Op::Shutdown, ports).0.flags, NO_SEND);
    guest.send(Op::Data, ports, b"still here");
    assert_eq!(exactly(&program, 10), b"still here");
    guest.shut_down(ports, NO_SEND);
    assert_eq!(rest(&program), b"");
    // Both have ended: nothing more is to be expected.
    assert_eq!(guest.expect(Op::Shutdown, ports).0.flags, NO_MORE);
    guest.send(Op::Reset, ports, &[]);

    let (ports, mut program) = guest.connect(11, 1, &server);
    guest.shut_down(ports, NO_RECEIVE);
    guest.send(Op::Data, ports, b"only this way");
    assert_eq!(exactly(&program, 13), b"only this way");
    assert_eq!(program.write(b"no").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    drop(program);
    assert_eq!(guest.expect(Op::Shutdown, ports).0.flags & NO_RECEIVE, NO_RECEIVE);
    guest.shut_down(ports, NO_MORE);
    guest.expect(Op::Reset, ports);
    assert_eq!(guest.count("resets"), 0);
}

#[test]
fn a_program_that_closes_is_read_to_its_end() {
    let mut guest = guest();
    let server = guest.serve(1);
    let (ports, mut program) = guest.connect(10, 1, &server);
    guest.send(Op::Data, ports, b"not read");
    guest.settle();
    program.write_all(&text(0, 60_000)).unwrap();
    drop(program);
    let mut got = 0;
    let mut flags = 0;
    while flags != NO_MORE {
        let (header, data) = guest.receive();
        assert_eq!(data, text(got, data.len()));
        got += data.len();
        flags |= header.flags;
    }
    assert_eq!(got, 60_000);
    // What the guest sent before it knew is swallowed.
    guest.send(Op::Data, ports, b"into the void");
    guest.send(Op::Reset, ports, &[]);
    guest.settle();
    guest.send(Op::Data, ports, b"more");
    guest.expect(Op::Reset, ports);
}

#[test]
fn a_guest_that_does_not_confirm_the_end_is_reset() {
    let mut guest = Guest::new(|device| device.limits.patience = Duration::from_millis(30));
    guest.give(8);
    let server = guest.serve(1);
    let (ports, program) = guest.connect(10, 1, &server);
    drop(program);
    while guest.receive().0.flags != NO_MORE {}
    guest.expect(Op::Reset, ports);
    assert_eq!(guest.count("resets"), 1);
    // Before that, its port may be used anew.
    let (ports, program) = guest.connect(10, 1, &server);
    drop(program);
    while guest.receive().0.flags != NO_MORE {}
    let (_, mut program) = guest.connect(10, 1, &server);
    program.write_all(b"new").unwrap();
    assert_eq!(guest.expect(Op::Data, ports).1, b"new");
}

#[test]
fn what_a_guest_sent_before_it_closed_reaches_a_slow_program() {
    let mut guest = guest();
    let server = guest.serve(1);
    let (ports, program) = guest.connect(10, 1, &server);
    let len = BUF_ALLOC as usize;
    for start in (0..len).step_by(32 << 10) {
        guest.send(Op::Data, ports, &text(start, 32 << 10));
    }
    guest.shut_down(ports, NO_MORE);
    guest.expect(Op::Reset, ports);
    // The same ports, while the rest of before is not yet read.
    let (_, other) = guest.connect(10, 1, &server);
    guest.send(Op::Data, ports, b"other");
    guest.shut_down(ports, NO_MORE);
    guest.expect(Op::Reset, ports);
    assert_eq!(rest(&program), text(0, len));
    assert_eq!(rest(&other), b"other");
}

#[test]
fn a_reset_is_abrupt() {
    let mut guest = guest();
    let server = guest.serve(1);
    let (ports, program) = guest.connect(10, 1, &server);
    guest.send(Op::Reset, ports, &[]);
    assert_eq!(rest(&program), b"");
    guest.send(Op::CreditRequest, ports, &[]);
    guest.expect(Op::Reset, ports);
    assert_eq!(guest.count("resets"), 1);
}

#[test]
fn the_guest_is_told_of_room_when_it_asks_or_must_know() {
    let mut guest = guest();
    let server = guest.serve(1);
    let (ports, program) = guest.connect(10, 1, &server);
    guest.send(Op::Data, ports, &text(0, 1000));
    exactly(&program, 1000);
    guest.nothing_arrives();
    guest.send(Op::CreditRequest, ports, &[]);
    let (header, _) = guest.expect(Op::CreditUpdate, ports);
    assert_eq!((header.buf_alloc, header.fwd_cnt), (BUF_ALLOC, 1000));
    for _ in 0..3 {
        guest.nothing_arrives();
        guest.send(Op::Data, ports, &text(0, 64 << 10));
        exactly(&program, 64 << 10);
    }
    assert_eq!(guest.expect(Op::CreditUpdate, ports).0.fwd_cnt, 1000 + (192 << 10));
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut guest = guest();
    let server = guest.serve(1);
    let (ports, mut program) = guest.connect(10, 1, &server);
    let room = ROOM as usize;
    program.write_all(&text(0, room + 9000)).unwrap();
    assert_eq!(guest.expect_data(ports, room), text(0, room));
    guest.expect(Op::CreditRequest, ports);
    guest.nothing_arrives();
    let update = |fwd_cnt| Header { fwd_cnt, ..header(Op::CreditUpdate, ports) };
    guest.send_packet(&update(5), &[]);
    assert_eq!(guest.expect_data(ports, 5), text(room, 5));
    guest.expect(Op::CreditRequest, ports);
    // A count that cannot be is no room.
    guest.send_packet(&update(ROOM + 6), &[]);
    guest.nothing_arrives();
    guest.send_packet(&update(ROOM), &[]);
    assert_eq!(guest.expect_data(ports, 8995), text(room + 5, 8995));
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_is_reset() {
    let mut guest = guest();
    let server = guest.serve(1);
    let (ports, program) = guest.connect(10, 1, &server);
    let (other, bystander) = guest.connect(11, 1, &server);
    // The program reads nothing. Its socket's buffer is finite.
    let mut sent = 0;
    while guest.count("resets") == 0 {
        guest.send(Op::Data, ports, &text(sent, 50_000));
        guest.settle();
        sent += 50_000;
        assert!(sent < 4 << 20);
    }
    guest.expect(Op::Reset, ports);
    let got = rest(&program);
    assert_eq!(got, text(0, got.len()));
    guest.send(Op::Data, other, b"unharmed");
    assert_eq!(exactly(&bystander, 8), b"unharmed");
}

/// On an interrupt for what it gets, a driver with one vector for all queues sees that its own packet is done as well.
#[test]
fn an_answer_is_told_before_what_it_answers() {
    let mut guest = guest();
    assert_eq!(guest.device.vectors(), 2);
    let ports = Ports { guest: 10, host: 1 };
    guest.send(Op::Request, ports, &[]);
    guest.expect(Op::Reset, ports);
    until("both interrupts", || guest.driver.interrupts() == 2);
    assert_eq!(guest.driver.interrupt.first.get(), Some(&0));
}

#[test]
fn nonsense_is_answered_or_ignored() {
    let mut guest = guest();
    let server = guest.serve(1);
    let ports = Ports { guest: 10, host: 1 };
    type Change = fn(&mut Header);
    let wrong: [Change; 6] = [
        |header| header.op = 0,
        |header| header.op = 8,
        |header| header.len = 100,
        |header| header.op = Op::Response as u16,
        |header| header.len = u32::MAX,
        |header| header.op = Op::Request as u16,
    ];
    for (i, change) in wrong.into_iter().enumerate() {
        let (ports, program) = guest.connect(10, 1, &server);
        let mut packet = Header { len: 3, ..header(Op::Data, ports) };
        change(&mut packet);
        guest.send_packet(&packet, b"abc");
        guest.expect(Op::Reset, ports);
        assert_eq!(rest(&program), b"", "{i}");
    }
    // What is to another address, or of another sort, is refused and ends nothing.
    let (_, program) = guest.connect(10, 1, &server);
    let elsewhere = Header { dst_cid: 7, ..header(Op::Request, ports) };
    guest.send_packet(&elsewhere, &[]);
    let (refusal, _) = guest.receive();
    assert_eq!((refusal.op, refusal.src_cid, refusal.dst_port), (Op::Reset as u16, 7, 10));
    // From another address, without a whole header, RSTs for nothing, no data: no answer.
    guest.send_packet(&Header { src_cid: 4, ..header(Op::Reset, ports) }, &[]);
    guest.send_raw(&[&[1; 43]]);
    guest.send(Op::Reset, Ports { guest: 11, host: 1 }, &[]);
    guest.send(Op::Data, ports, &[]);
    guest.nothing_arrives();
    guest.send(Op::Data, ports, b"alive");
    assert_eq!(exactly(&program, 5), b"alive");
    let seqpacket = Header { kind: 2, ..header(Op::Request, Ports { guest: 12, host: 1 }) };
    guest.send_raw(&[&seqpacket.bytes()]);
    let (refusal, _) = guest.receive();
    assert_eq!((refusal.op, refusal.kind), (Op::Reset as u16, 2));
}

#[test]
fn connections_are_bounded() {
    let mut guest = Guest::new(|device| device.limits.connections = 3);
    guest.give(32);
    let server = guest.serve(1);
    let mut made: Vec<_> = (0..3).map(|i| guest.connect(10 + i, 1, &server)).collect();
    let refused = Ports { guest: 20, host: 1 };
    guest.send(Op::Request, refused, &[]);
    guest.expect(Op::Reset, refused);
    assert_eq!(rest(&guest.ask(5)), b"");
    // One that only the host still has makes room.
    let (ports, _program) = &made[0];
    for start in (0..BUF_ALLOC as usize).step_by(64 << 10) {
        guest.send(Op::Data, *ports, &text(start, 64 << 10));
    }
    guest.shut_down(*ports, NO_MORE);
    guest.expect(Op::Reset, *ports);
    made.push(guest.connect(20, 1, &server));
    guest.send(Op::Request, Ports { guest: 21, host: 1 }, &[]);
    guest.expect(Op::Reset, Ports { guest: 21, host: 1 });
    assert!(rest(&made[0].1).len() < BUF_ALLOC as usize);
    assert_eq!(guest.count("refused"), 3);
}

#[test]
fn a_guest_without_receive_buffers_is_not_listened_to_for_ever() {
    let mut guest = Guest::new(|_| ());
    let mut driver_side = 0;
    for guest_port in 0..250 {
        guest.driver.queues[1].offer(&[Part::Say(&header(Op::Data, Ports { guest: guest_port, host: 9 }).bytes())]);
        driver_side += 1;
    }
    guest.driver.queues[1].kick();
    let mut taken = 0;
    let mut take = |guest: &mut Guest, want: usize| {
        until("packets taken", || {
            taken += std::iter::from_fn(|| guest.driver.queues[1].take_used()).count();
            taken == want
        });
    };
    take(&mut guest, 250);
    for guest_port in 250..350 {
        guest.driver.queues[1].offer(&[Part::Say(&header(Op::Data, Ports { guest: guest_port, host: 9 }).bytes())]);
        driver_side += 1;
    }
    guest.driver.queues[1].kick();
    take(&mut guest, 256);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.driver.queues[1].take_used(), None);
    guest.give(4);
    for guest_port in 0..driver_side {
        guest.expect(Op::Reset, Ports { guest: guest_port, host: 9 });
    }
    take(&mut guest, 350);
}

#[test]
fn a_slow_connection_does_not_hold_others_up() {
    let mut guest = guest();
    let server = guest.serve(1);
    let (slow, mut from_slow) = guest.connect(10, 1, &server);
    let (fast, mut from_fast) = guest.connect(11, 1, &server);
    // One has no more credit, and its program reads nothing.
    from_slow.write_all(&text(0, ROOM as usize + 1000)).unwrap();
    guest.expect_data(slow, ROOM as usize);
    guest.expect(Op::CreditRequest, slow);
    for start in (0..BUF_ALLOC as usize).step_by(32 << 10) {
        guest.send(Op::Data, slow, &text(start, 32 << 10));
    }
    for i in 0..50 {
        from_fast.write_all(&text(i, 700)).unwrap();
        assert_eq!(guest.expect_data(fast, 700), text(i, 700));
        guest.send(Op::Data, fast, &text(i, 900));
        assert_eq!(exactly(&from_fast, 900), text(i, 900));
    }
}

#[test]
fn an_idle_device_with_bytes_waiting_sleeps() {
    let mut guest = Guest::new(|device| device.name = "vsock:idle");
    guest.give(3);
    let server = guest.serve(1);
    let poor = Ports { guest: 10, host: 1 };
    guest.send_packet(&Header { buf_alloc: 0, ..header(Op::Request, poor) }, &[]);
    guest.expect(Op::Response, poor);
    let mut without_credit = server.accept().unwrap().0;
    without_credit.write_all(b"x").unwrap();
    guest.expect(Op::CreditRequest, poor);
    let (_, mut without_buffers) = guest.connect(11, 1, &server);
    let (_, closed) = guest.connect(12, 1, &server);
    while guest.buffers() > 0 {
        without_buffers.write_all(&[0; 5000]).unwrap();
        until("a packet", || guest.try_receive().is_some());
    }
    without_buffers.write_all(&[0; 5000]).unwrap();
    drop(closed);
    let _silent = UnixStream::connect(guest.path()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let of_device = |task: io::Result<std::fs::DirEntry>| {
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
        // proc(5): utime and stime are fields 14 and 15; ")" ends the second.
        let fields: Vec<u64> =
            stat.split_once("(vsock:idle) ")?.1.split(' ').skip(11).take(2).flat_map(str::parse).collect();
        Some(fields.iter().sum())
    };
    let ticks: Vec<u64> = std::fs::read_dir("/proc/self/task").unwrap().filter_map(of_device).collect();
    assert!(matches!(ticks[..], [0..5]), "{ticks:?} of 1/100 s in 300 ms");
}

#[test]
fn a_paused_device_is_still_and_forgets_nothing() {
    let mut guest = guest();
    let server = guest.serve(1);
    let (ports, mut program) = guest.connect(10, 1, &server);
    guest.device.pause();
    program.write_all(&text(0, 5000)).unwrap();
    guest.send(Op::Data, ports, b"waits");
    let asking = guest.ask(7);
    guest.nothing_arrives();
    assert_eq!((guest.count("rx_bytes"), guest.count("tx_bytes")), (0, 0));
    guest.device.resume();
    assert_eq!(exactly(&program, 5), b"waits");
    let mut got = Vec::new();
    let mut asked = None;
    while got.len() < 5000 || asked.is_none() {
        match guest.receive() {
            (Header { op: 1, src_port, .. }, _) => asked = Some(Ports { guest: 7, host: src_port }),
            (_, data) => got.extend(data),
        }
    }
    assert_eq!(got, text(0, 5000));
    guest.send(Op::Response, asked.unwrap(), &[]);
    assert!(line(&asking).starts_with("OK "));
}

#[test]
fn a_drivers_reset_ends_all_and_the_next_driver_begins_anew() {
    let mut guest = guest();
    let server = guest.serve(1);
    let (_, program) = guest.connect(10, 1, &server);
    let (before, asked) = guest.be_connected(7);
    guest.device.reset();
    guest.device.reset();
    assert_eq!((rest(&program), rest(&asked)), (Vec::new(), Vec::new()));
    // A program that comes in between waits.
    let waiting = guest.ask(7);
    guest.activate();
    guest.give(4);
    let ports = guest.asked(7);
    assert_eq!(ports.host, before.host + 1);
    guest.send(Op::Response, ports, &[]);
    assert!(line(&waiting).starts_with("OK "));
    assert_eq!(guest.driver.interrupt.needs_reset.load(Ordering::SeqCst), 0);
}

#[test]
fn a_restored_device_has_its_driver_reset_the_connections_and_the_source_keeps_them() {
    let mut source = guest();
    let server = source.serve(1);
    let (ports, program) = source.connect(10, 1, &server);
    let (inward, _asked) = source.be_connected(7);
    source.device.pause();
    let state = source.device.save();

    let mut child = Guest::inactive(|_| ());
    let _server = child.serve(1);
    child.device.restore(state).unwrap();
    child.activate_as(true);
    child.give(8);
    child.send(Op::Data, ports, b"stale");
    let event = child.give_event_buffer();
    child.nothing_arrives();
    child.device.resume();
    child.expect(Op::Reset, ports);
    assert_eq!(child.driver.queues[2].await_used(), (event.head, 4));
    assert_eq!(child.driver.queues[2].bytes(event.parts[0]), [0; 4]);
    // Ports of before are not used again, and the event comes once.
    let _asking = child.ask(7);
    assert_eq!(child.asked(7), Ports { host: inward.host + 1, ..inward });
    child.give_event_buffer();
    child.nothing_arrives();
    assert_eq!(child.driver.queues[2].take_used(), None);

    source.device.resume();
    source.send(Op::Data, ports, b"unharmed");
    assert_eq!(exactly(&program, 8), b"unharmed");
    source.give_event_buffer();
    source.nothing_arrives();
    assert_eq!(source.driver.queues[2].take_used(), None);
}

#[test]
fn the_reset_event_waits_for_a_buffer_and_for_no_new_driver() {
    let mut child = Guest::inactive(|_| ());
    let state = child.device.save();
    child.device.restore(state).unwrap();
    child.activate_as(true);
    child.device.resume();
    child.give(2);
    child.send(Op::Data, Ports { guest: 1, host: 1 }, b"stale");
    child.expect(Op::Reset, Ports { guest: 1, host: 1 });
    child.give_event_buffer();
    assert_eq!(child.driver.queues[2].await_used().1, 4);
    child.device.reset();
    child.activate();
    child.give_event_buffer();
    child.nothing_arrives();
    assert_eq!(child.driver.queues[2].take_used(), None);
}

#[test]
fn states_that_are_not_its_own_are_refused() {
    let mut device = Guest::inactive(|_| ()).device;
    let state = |cid, next_port| DeviceState::Vsock(VsockStateV1 { cid, next_port });
    assert_eq!(device.save(), state(CID, FIRST_PORT));
    assert!(matches!(device.restore(DeviceState::Rng), Err(StateError::WrongDevice(_))));
    assert!(matches!(device.restore(state(4, FIRST_PORT)), Err(StateError::Differs { .. })));
    assert!(matches!(device.restore(state(CID, 5)), Err(StateError::Impossible(_))));
    device.restore(state(CID, u32::MAX)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let listener = Arc::new(VsockListener::bind(&dir.path().join("v")).unwrap());
    for cid in [0, 2, CID_END, u64::MAX] {
        assert_eq!(Vsock::new(cid, Arc::clone(&listener)).err().unwrap().kind(), io::ErrorKind::InvalidInput);
    }
    let mut config = [9; 10];
    Vsock::new(0x1234, listener).unwrap().read_config(0, &mut config);
    assert_eq!(config, [0x34, 0x12, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn host_ports_wrap_and_skip_those_in_use() {
    let mut guest = Guest::new(|device| device.next_port.store(u32::MAX - 1, Ordering::Relaxed));
    guest.give(8);
    let server = guest.serve(FIRST_PORT);
    let _used = guest.connect(7, FIRST_PORT, &server);
    let ports: Vec<_> = (0..2).map(|_| guest.be_connected(7)).collect();
    assert_eq!(ports.iter().map(|(ports, _)| ports.host).collect::<Vec<_>>(), [u32::MAX - 1, FIRST_PORT + 1]);
}

#[test]
fn a_driver_must_enable_all_queues_and_give_sound_buffers() {
    let mut guest = Guest::inactive(|_| ());
    let mut activation = guest.driver.activation(RING_FEATURES);
    activation.queues.pop();
    assert!(matches!(guest.device.activate(activation), Err(ActivateError::MissingQueue(2))));
    for (queue, room) in [(0, HEADER), (2, 3)] {
        let mut guest = Guest::inactive(|_| ());
        let state = guest.device.save();
        guest.device.restore(state).unwrap();
        guest.activate();
        guest.driver.queues[queue].offer(&[Part::Room(room)]);
        guest.driver.queues[queue].kick();
        guest.send(Op::Data, Ports { guest: 1, host: 1 }, b"refuse me");
        guest.driver.await_fault();
    }
}

/// What was done before something broken was met is done, and the driver hears of it. Found by fuzzing.
#[test]
fn what_is_done_before_a_broken_chain_is_told() {
    // Packets sent at a time, and whether a good buffer lies before the broken one; then interrupts.
    for (packets, good, told) in [(1, false, 1), (2, true, 2)] {
        let mut guest = Guest::new(|_| ());
        guest.device.pause();
        let receive = &mut guest.driver.queues[0];
        if good {
            receive.offer(&[Part::Room(HEADER + 100)]);
        }
        receive.offer(&[Part::Room(HEADER)]);
        // Each is refused.
        (0..packets).for_each(|port| guest.send(Op::Request, Ports { guest: 10 + port, host: 1 }, &[]));
        guest.device.resume();
        guest.driver.await_fault();
        assert_eq!((guest.driver.interrupts(), guest.driver.queues[0].has_used()), (told, good));
        guest.settle();
    }
    // As one of the driver's own.
    let mut guest = guest();
    guest.device.pause();
    guest.send(Op::Reset, Ports { guest: 10, host: 1 }, &[]);
    guest.driver.queues[1].publish(QUEUE_SIZE);
    guest.device.resume();
    guest.driver.await_fault();
    assert_eq!(guest.driver.interrupts(), 1);
    guest.settle();
}
