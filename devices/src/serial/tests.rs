use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use super::*;

/// An edge-triggered line: an edge while one is pending is the same one.
struct Edge(SyncSender<()>);

impl IrqLine for Edge {
    fn set(&self, high: bool) {
        if high {
            let _ = self.0.try_send(());
        }
    }
}

struct Setup {
    port: Arc<SerialPort>,
    client: UnixStream,
    interrupts: Receiver<()>,
}

fn setup() -> Setup {
    let hub = ConsoleHub::new("ttyS0", 1 << 20, None).unwrap();
    let (edge, interrupts) = sync_channel(1);
    let port = Arc::new(SerialPort::new(Arc::clone(&hub), Arc::new(Edge(edge))));
    hub.connect_input(Arc::clone(&port) as _);
    let client = hub.attach().unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    Setup { port, client, interrupts }
}

impl Setup {
    fn get(&self, register: u8) -> u8 {
        let mut byte = [0];
        self.port.read(u64::from(register), &mut byte);
        byte[0]
    }

    fn set(&self, register: u8, value: u8) {
        self.port.write(u64::from(register), &[value]);
    }

    /// Waits for an interrupt.
    fn interrupt(&self) -> bool {
        self.interrupts.recv_timeout(Duration::from_secs(10)).is_ok()
    }

    fn counter(&self, name: &str) -> u64 {
        self.port.counters().read().into_iter().find(|(known, _)| *known == name).unwrap().1
    }
}

#[test]
fn prints() {
    let mut setup = setup();
    for byte in b"hello" {
        assert_ne!(setup.get(LINE_STATUS) & 0x20, 0);
        setup.set(DATA, *byte);
    }
    let mut got = [0; 5];
    setup.client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
    assert_eq!(setup.counter("output_bytes"), 5);
}

/// A driver's interrupt handler, reading at most `most` bytes each time.
fn receive(setup: &Setup, most: usize, got: &mut Vec<u8>, end: usize) {
    setup.set(INTERRUPT_ENABLE, ENABLE_RECEIVED | ENABLE_SENT);
    while got.len() < end {
        assert!(setup.interrupt(), "no interrupt after {} bytes", got.len());
        loop {
            let id = setup.get(INTERRUPT_ID) & 0xf;
            match id {
                ID_NONE => break,
                ID_SENT => {}
                ID_RECEIVED => {
                    for _ in 0..most {
                        if setup.get(LINE_STATUS) & DATA_READY == 0 {
                            break;
                        }
                        got.push(setup.get(DATA));
                    }
                }
                other => panic!("interrupt {other:#x}"),
            }
        }
    }
}

#[test]
fn a_mebibyte_of_input_arrives_whole_however_it_is_read() {
    for most in [1, 7, 256] {
        let setup = setup();
        let sent: Vec<u8> = (0..1 << 20).map(|i| (i % 251) as u8).collect();
        let mut client = setup.client.try_clone().unwrap();
        let typed = sent.clone();
        let typist = std::thread::spawn(move || client.write_all(&typed));
        let mut got = Vec::new();
        receive(&setup, most, &mut got, sent.len());
        assert!(got == sent);
        typist.join().unwrap().unwrap();
        assert_eq!(setup.counter("input_bytes"), 1 << 20);
    }
}

#[test]
fn a_driver_that_polls_gets_everything_too() {
    let setup = setup();
    let sent: Vec<u8> = (0..100_000).map(|i| (i % 241) as u8).collect();
    let mut client = setup.client.try_clone().unwrap();
    let typed = sent.clone();
    let typist = std::thread::spawn(move || client.write_all(&typed));
    let mut got = Vec::new();
    while got.len() < sent.len() {
        if setup.get(LINE_STATUS) & DATA_READY != 0 {
            got.push(setup.get(DATA));
        }
    }
    assert!(got == sent);
    typist.join().unwrap().unwrap();
}

#[test]
fn input_waits_while_the_guest_tests_its_loopback() {
    let mut setup = setup();
    setup.set(MODEM_CONTROL, LOOPBACK);
    setup.client.write_all(b"typed").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(setup.get(LINE_STATUS) & DATA_READY, 0);
    setup.set(DATA, b'L');
    assert_ne!(setup.get(LINE_STATUS) & DATA_READY, 0);
    assert_eq!(setup.get(DATA), b'L');
    setup.set(MODEM_CONTROL, 0x08);
    let mut got = Vec::new();
    receive(&setup, 16, &mut got, 5);
    assert_eq!(got, b"typed");
}

#[test]
fn received_data_goes_first_and_nothing_pending_is_forgotten() {
    let setup = setup();
    setup.set(INTERRUPT_ENABLE, ENABLE_RECEIVED | ENABLE_SENT);
    assert_eq!(setup.port.offer(b"ab"), 2);
    assert_eq!(setup.get(INTERRUPT_ID), ID_FIFOS | ID_RECEIVED);
    assert_eq!(setup.get(INTERRUPT_ID), ID_FIFOS | ID_RECEIVED);
    assert_eq!((setup.get(DATA), setup.get(DATA)), (b'a', b'b'));
    assert_eq!(setup.get(INTERRUPT_ID), ID_FIFOS | ID_SENT);
    assert_eq!(setup.get(INTERRUPT_ID), ID_FIFOS | ID_NONE);
    // The divisor latch hides the registers, not the state.
    assert_eq!(setup.port.offer(b"c"), 1);
    setup.set(LINE_CONTROL, DIVISOR_LATCH | 3);
    assert_eq!(setup.get(DATA), 12);
    assert_eq!(setup.get(INTERRUPT_ID), ID_FIFOS | ID_RECEIVED);
    setup.set(LINE_CONTROL, 3);
    assert_eq!(setup.get(DATA), b'c');
}

#[test]
fn the_fifo_takes_what_fits() {
    let setup = setup();
    assert_eq!(setup.port.offer(&[1; 100]), 64);
    assert_eq!(setup.port.offer(&[1; 100]), 0);
    assert_eq!(setup.port.offer(&[]), 0);
    setup.get(DATA);
    assert_eq!(setup.port.offer(&[1; 100]), 1);
}

#[test]
fn wide_accesses_stay_inside() {
    let setup = setup();
    let mut wide = [0; 8];
    setup.port.read(4, &mut wide);
    assert_eq!(wide[4..], [0xff; 4]);
    setup.port.write(7, &[0x5a; 8]);
    assert_eq!(setup.get(7), 0x5a);
    setup.port.read(u64::MAX, &mut wide);
    setup.port.write(u64::MAX, &wide);
}

#[test]
fn a_port_comes_back_with_its_bytes_and_its_interrupt() {
    let before = setup();
    before.set(INTERRUPT_ENABLE, ENABLE_RECEIVED);
    before.set(7, 0x5a);
    assert_eq!(before.port.offer(b"typed"), 5);
    assert!(before.interrupt());
    let saved = before.port.save();
    let after = setup();
    let (edge, interrupts) = sync_channel(1);
    after.port.restore(&saved, Arc::new(Edge(edge))).unwrap();
    assert_eq!(after.port.save(), saved);
    interrupts.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(after.get(INTERRUPT_ID) & 0xf, ID_RECEIVED);
    let read: Vec<u8> = (0..5).map(|_| after.get(DATA)).collect();
    assert_eq!((&read[..], after.get(7)), (&b"typed"[..], 0x5a));
    let long = SerialStateV1 { received: vec![0; 65], ..saved };
    let (edge, _interrupts) = sync_channel(1);
    assert_eq!(after.port.restore(&long, Arc::new(Edge(edge))), Err(FifoTooLong(65)));
    assert_eq!(after.get(7), 0x5a);
}
