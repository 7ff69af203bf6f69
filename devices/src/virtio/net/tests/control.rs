//! Pairs of queues, offloads, announcements, the cable.

use std::sync::atomic::Ordering;

use super::*;
use crate::virtio::state::DeviceState;

const OK: u8 = 0;
const ERR: u8 = 1;

impl Setup {
    /// Sends a command on `queue`; returns the answer.
    pub(super) fn command_on(&mut self, queue: usize, command: [u8; 2], data: &[u8]) -> u8 {
        let queue = &mut self.driver.queues[queue];
        let offered = queue.offer(&[Part::Say(&command), Part::Say(data), Part::Room(1)]);
        queue.kick();
        assert_eq!(queue.await_used(), (offered.head, 1));
        queue.bytes(offered.parts[2])[0]
    }

    pub(super) fn command(&mut self, command: [u8; 2], data: &[u8]) -> u8 {
        self.command_on(self.driver.queues.len() - 1, command, data)
    }

    fn set_pairs(&mut self, pairs: u16) -> u8 {
        self.command([4, 0], &pairs.to_le_bytes())
    }

    fn attached(&self) -> Vec<bool> {
        self.links.iter().map(|link| link.attached.lock().unwrap().unwrap()).collect()
    }

    pub(super) fn arrive_at(&self, pair: usize, body: &[u8]) {
        let frame = [&[0; NET_HEADER][..], body].concat();
        assert_eq!(write(&self.far[pair], &frame), Ok(frame.len()));
    }

    fn config_interrupts(&self) -> u64 {
        self.driver.interrupt.config.load(Ordering::SeqCst)
    }

    fn status(&self) -> u8 {
        let mut status = [0; 2];
        self.net.read_config(6, &mut status);
        status[0]
    }
}

#[test]
fn the_driver_chooses_the_pairs() {
    let mut setup = Setup::full(3);
    assert_eq!(setup.attached(), [true, false, false]);
    for pair in 0..3 {
        setup.driver.queues[2 * pair].offer(&[Part::Room(1600)]);
        setup.driver.queues[2 * pair].offer(&[Part::Room(1600)]);
        setup.driver.queues[2 * pair].kick();
    }
    // What comes by a way that is not in use stays there.
    setup.arrive_at(2, &body(100));
    setup.arrive_at(0, &body(200));
    assert_eq!(setup.driver.queues[0].await_used().1, 212);
    assert_eq!(setup.set_pairs(3), OK);
    assert_eq!(setup.attached(), [true; 3]);
    assert_eq!(setup.driver.queues[4].await_used().1, 112);
    for (pairs, answer) in [(0, ERR), (4, ERR), (u16::MAX, ERR), (2, OK)] {
        assert_eq!(setup.set_pairs(pairs), answer, "{pairs}");
    }
    assert_eq!(setup.attached(), [true, true, false]);
    // From the answer on the queue is the driver's alone.
    setup.arrive_at(2, &body(100));
    setup.arrive_at(1, &body(300));
    assert_eq!(setup.driver.queues[2].await_used().1, 312);
    setup.net.pause();
    assert_eq!(setup.driver.queues[4].take_used(), None);
    let DeviceState::Net(state) = setup.net.save() else { panic!("a network card") };
    assert_eq!(state.pairs, 2);
    // The next driver begins with one.
    setup.net.reset();
    let features = setup.net.features();
    setup.net.activate(setup.driver.activation(features)).unwrap();
    assert_eq!(setup.attached(), [true, false, false]);
}

#[test]
fn every_pair_sends() {
    let mut setup = Setup::full(2);
    for pair in [1, 0] {
        let frame = [&[0; NET_HEADER][..], &[pair as u8; 80]].concat();
        setup.driver.queues[2 * pair + 1].offer(&[Part::Say(&frame)]);
        setup.driver.queues[2 * pair + 1].kick();
        setup.driver.queues[2 * pair + 1].await_used();
        let mut got = vec![0; 200];
        assert_eq!(read(&setup.far[pair], &mut got), Ok(92));
        assert_eq!(got[..92], frame);
    }
}

#[test]
fn a_pair_whose_queues_are_not_both_enabled_is_none() {
    let mut setup = Setup::with(3, options(), false);
    let mut activation = setup.driver.activation(setup.net.features());
    activation.queues.retain(|queue| queue.index != 3);
    setup.net.activate(activation).unwrap();
    assert_eq!((setup.set_pairs(2), setup.set_pairs(3), setup.set_pairs(1)), (ERR, ERR, OK));
    let mut setup = Setup::with(1, options(), false);
    for missing in 0..3 {
        let mut activation = setup.driver.activation(setup.net.features());
        activation.queues.retain(|queue| queue.index != missing);
        assert!(matches!(setup.net.activate(activation), Err(ActivateError::MissingQueue(index)) if index == missing));
    }
}

#[test]
fn without_multiqueue_the_control_queue_is_the_third() {
    let mut setup = Setup::with(3, options(), false);
    let features = setup.net.features() & !(1 << VIRTIO_NET_F_MQ);
    setup.net.activate(setup.driver.activation(features)).unwrap();
    assert_eq!(setup.attached(), [true, false, false]);
    assert_eq!(setup.command_on(2, [4, 0], &[1, 0]), ERR, "MQ was not negotiated");
    assert_eq!(setup.command_on(2, [5, 0], &[0; 8]), OK);
}

#[test]
fn offloads_are_switched_while_it_runs() {
    let mut setup = Setup::full(1);
    let offloads = |setup: &Setup| setup.links[0].offloads.lock().unwrap().unwrap();
    let bits = |features: &[u32]| features.iter().fold(0_u64, |all, bit| all | 1 << bit).to_le_bytes();
    assert_eq!(setup.command([5, 0], &bits(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO6])), OK);
    assert_eq!(offloads(&setup), Offloads { checksum: true, tso6: true, ..Offloads::default() });
    // Segmentation rests on checksums.
    assert_eq!(setup.command([5, 0], &bits(&[VIRTIO_NET_F_GUEST_TSO4])), OK);
    assert_eq!(offloads(&setup), Offloads::default());
    assert_eq!(setup.command([5, 0], &bits(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MAC])), ERR);
    assert_eq!(offloads(&setup), Offloads::default());
    let mut setup = Setup::with(1, options(), false);
    let features = setup.net.features() & !(1 << VIRTIO_NET_F_GUEST_USO6);
    setup.net.activate(setup.driver.activation(features)).unwrap();
    assert_eq!(setup.command([5, 0], &bits(&[VIRTIO_NET_F_GUEST_USO6])), ERR, "it was not negotiated");
}

#[test]
fn nonsense_on_the_control_queue_is_answered_so() {
    let mut setup = Setup::full(2);
    for (command, data) in [
        ([4, 0], &[1][..]),
        ([4, 0], &[1, 0, 0]),
        ([4, 1], &[1, 0]),
        ([5, 0], &[0; 7]),
        ([5, 0], &[0; 9]),
        ([3, 0], &[0]),
        ([1, 0], &[0; 4]),
        ([255, 255], &[0xff; 5000]),
    ] {
        assert_eq!(setup.command(command, data), ERR, "{command:?} with {} bytes", data.len());
    }
    let queue = &mut setup.driver.queues[4];
    let offered = queue.offer(&[Part::Say(&[4]), Part::Room(100)]);
    queue.kick();
    queue.await_used();
    assert_eq!(queue.bytes(offered.parts[1])[0], ERR);
    queue.offer(&[Part::Say(&[4, 0, 1, 0])]);
    queue.kick();
    setup.driver.await_fault();
}

#[test]
fn after_a_restore_the_guest_is_asked_to_announce_itself() {
    let mut setup = Setup::full(1);
    assert_eq!((setup.status(), setup.config_interrupts()), (1, 0));
    setup.net.pause();
    let state = setup.net.save();
    setup.net = made("eth0", &setup.links, options());
    setup.net.restore(state.clone()).unwrap();
    let features = setup.net.features();
    let paused = |setup: &mut Setup, features| Activation { paused: true, ..setup.driver.activation(features) };
    let activation = paused(&mut setup, features);
    setup.net.activate(activation).unwrap();
    assert_eq!((setup.status(), setup.config_interrupts()), (3, 0));
    setup.net.resume();
    until("a configuration interrupt", || setup.config_interrupts() == 1);
    assert_eq!(setup.command([3, 0], &[]), OK);
    assert_eq!(setup.status(), 1);
    // Not one that would not understand it.
    setup.net.reset();
    setup.net.restore(state).unwrap();
    let activation = paused(&mut setup, features & !(1 << VIRTIO_NET_F_GUEST_ANNOUNCE));
    setup.net.activate(activation).unwrap();
    setup.net.resume();
    assert_eq!(setup.status(), 1);
    assert_eq!(setup.command([3, 0], &[]), ERR);
    assert_eq!(setup.config_interrupts(), 1);
}

#[test]
fn a_pulled_cable_loses_frames_of_both_directions() {
    let mut setup = Setup::full(1);
    let switch = setup.net.switch();
    switch.set_up(false);
    switch.set_up(false);
    until("a configuration interrupt", || setup.config_interrupts() == 1);
    assert_eq!((setup.status(), switch.is_up()), (0, false));
    let frame = [&[0; NET_HEADER][..], &body(100)].concat();
    for queue in [0, 1] {
        let part = if queue == 0 { Part::Room(1600) } else { Part::Say(&frame) };
        setup.driver.queues[queue].offer(&[part]);
        setup.driver.queues[queue].kick();
    }
    setup.driver.queues[1].await_used();
    setup.arrive(&body(100));
    until("lost frames", || (setup.count("rx_drops"), setup.count("tx_drops")) == (1, 1));
    switch.set_up(true);
    until("a configuration interrupt", || setup.config_interrupts() == 2);
    assert_eq!(setup.status(), 1);
    setup.arrive(&body(200));
    assert_eq!(setup.driver.queues[0].await_used().1, 212);
    assert_eq!(read(&setup.far[0], &mut [0; 200]), Err(Errno::EAGAIN));
}
