use std::io::{Read, Write};
use std::thread::{sleep, spawn};
use std::time::Duration;

use super::*;
use crate::virtio::testing::{Attached, Driver, Part, count};

fn setup() -> (Arc<ConsoleHub>, Attached<Console>, Driver) {
    let hub = ConsoleHub::new("hvc0", 4 << 20, None).unwrap();
    let console = Attached::new(Console::new(Arc::clone(&hub)).unwrap());
    hub.connect_input(console.input());
    (hub, console, Driver::new(&[QUEUE_SIZE; 2]))
}

fn text(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 253) as u8).collect()
}

#[test]
fn prints() {
    let (hub, mut console, mut driver) = setup();
    console.activate(driver.activation(RING_FEATURES)).unwrap();
    let mut client = hub.attach().unwrap();
    let text = text(300_000);
    let queue = &mut driver.queues[1];
    for piece in text.chunks(10_000) {
        queue.offer(&[Part::Say(&piece[..piece.len() / 3]), Part::Say(&piece[piece.len() / 3..])]);
        queue.kick_if_wanted(1);
        assert_eq!(queue.await_used().1, 0);
    }
    let mut got = vec![0; text.len()];
    client.read_exact(&mut got).unwrap();
    assert_eq!(got, text);
    assert_eq!(count(&*console.counters(), "output_bytes"), 300_000);
}

#[test]
fn input_waits_for_the_driver_and_for_its_buffers_and_none_is_lost() {
    let (hub, mut console, mut driver) = setup();
    let mut client = hub.attach().unwrap();
    let sent = text(1 << 20);
    let typed = sent.clone();
    let typist = spawn(move || client.write_all(&typed).map(|()| client));
    sleep(Duration::from_millis(20));
    assert_eq!(count(&*console.counters(), "input_bytes"), 0);
    console.activate(driver.activation(RING_FEATURES)).unwrap();

    let mut got: Vec<u8> = Vec::new();
    let mut turn = 0;
    while got.len() < sent.len() {
        turn += 1;
        if turn == 20 {
            // The guest reboots; what its driver did not get goes to the next.
            console.pause();
            console.reset();
            assert_eq!(driver.queues[0].take_used(), None);
            console.activate(driver.activation(RING_FEATURES)).unwrap();
        }
        let queue = &mut driver.queues[0];
        let offered: Vec<_> = (1..=4).map(|i| queue.offer(&[Part::Room(500 * i), Part::Room(700)])).collect();
        queue.kick_if_wanted(4);
        for chain in offered {
            if got.len() == sent.len() {
                break;
            }
            let (head, len) = queue.await_used();
            assert_eq!(head, chain.head);
            let bytes: Vec<u8> = chain.parts.iter().flat_map(|part| queue.bytes(*part)).collect();
            got.extend(&bytes[..len as usize]);
        }
        if got.len() < sent.len() {
            assert_eq!(got, sent[..got.len()]);
        }
    }
    assert!(got == sent);
    typist.join().unwrap().unwrap();
    assert_eq!(count(&*console.counters(), "input_bytes"), 1 << 20);
}

#[test]
fn the_buffer_is_bounded() {
    let (_hub, mut console, mut driver) = setup();
    let input = console.input();
    assert_eq!(input.offer(&text(10)), 0);
    console.activate(driver.activation(0)).unwrap();
    assert_eq!(input.offer(&text(INPUT_BYTES - 1)), INPUT_BYTES - 1);
    assert_eq!(input.offer(&text(10)), 1);
    assert_eq!(input.offer(&text(10)), 0);
    console.reset();
    assert_eq!(input.offer(&text(10)), 0);
}

#[test]
fn nonsense_is_survived() {
    let (hub, mut console, mut driver) = setup();
    console.activate(driver.activation(0)).unwrap();
    // A receive buffer that is none, and output that is.
    driver.queues[0].offer(&[Part::Say(b"hello")]);
    driver.queues[0].offer(&[Part::Room(5)]);
    driver.queues[0].kick();
    driver.queues[1].offer(&[Part::Room(100)]);
    driver.queues[1].kick();
    assert_eq!(driver.queues[1].await_used().1, 0);
    hub.attach().unwrap().write_all(b"x").unwrap();
    assert_eq!(driver.queues[0].await_used().1, 0);
    assert_eq!(driver.queues[0].await_used().1, 1);
    driver.queues[1].set_available(1000);
    driver.queues[1].kick();
    driver.await_fault();
    console.pause();
}
