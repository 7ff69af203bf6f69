//! What a card is after it was saved and restored, and after a reset.

use super::*;
use crate::virtio::state::DeviceState;

fn saved(setup: &Setup) -> NetStateV1 {
    let DeviceState::Net(state) = setup.net.save() else { panic!("a network card") };
    state
}

/// A card with three pairs in use, whose second holds a frame.
fn busy() -> Setup {
    let mut setup = Setup::full(3);
    assert_eq!(setup.command([4, 0], &[3, 0]), 0);
    assert_eq!(setup.command([5, 0], &[2, 0, 0, 0, 0, 0, 0, 0]), 0);
    setup.driver.queues[2].offer(&[Part::Room(600)]);
    setup.driver.queues[2].kick();
    let frame = [&[0; NET_HEADER][..], &body(1000)].concat();
    assert_eq!(write(&setup.far[1], &frame), Ok(1012));
    // Once the socket is empty the frame is with the card.
    until("frame taken", || {
        let mut fds = [nix::poll::PollFd::new(setup.links[1].fd(), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, nix::poll::PollTimeout::ZERO) == Ok(0)
    });
    setup.net.pause();
    setup
}

#[test]
fn a_restored_card_goes_on_where_the_saved_one_stood() {
    let mut setup = busy();
    let state = saved(&setup);
    assert_eq!((state.pairs, state.offloads, state.link_up), (3, Some(2), true));
    assert_eq!(state.held.iter().map(|held| (held.pair, held.bytes.len())).collect::<Vec<_>>(), [(1, 1012)]);
    let (rx, _) = (setup.net.positions()[2], ());
    assert_eq!((rx.index, rx.next_avail), (2, 0), "the buffer that did not suffice is back in the ring");
    setup.net = made("eth0", &setup.links, options());
    setup.net.restore(DeviceState::Net(state.clone())).unwrap();
    let features = setup.net.features();
    setup.net.activate(Activation { paused: true, ..setup.driver.activation(features) }).unwrap();
    assert_eq!(saved(&setup), state);
    let only = Offloads { checksum: true, ..Offloads::default() };
    assert_eq!(*setup.links[2].offloads.lock().unwrap(), Some(only));
    assert_eq!(*setup.links[2].attached.lock().unwrap(), Some(true));
    setup.net.resume();
    let queue = &mut setup.driver.queues[2];
    let offered = queue.offer(&[Part::Room(2000)]);
    queue.kick();
    assert_eq!(queue.await_used(), (offered.head, 1012));
    assert_eq!(queue.bytes(offered.parts[0])[NET_HEADER..1012], body(1000));
}

#[test]
fn an_inactive_card_is_saved_too() {
    let mut setup = Setup::with(2, options(), false);
    let state = saved(&setup);
    setup.net = made("eth0", &setup.links, options());
    setup.net.restore(DeviceState::Net(state.clone())).unwrap();
    assert_eq!(saved(&setup), state);
}

#[test]
fn a_frame_held_at_a_reset_or_by_a_pair_given_up_is_a_drop() {
    let mut setup = busy();
    setup.net.reset();
    assert_eq!((setup.count("rx_drops"), setup.count("rx_frames")), (1, 0));
    setup.net.reset();
    assert_eq!(setup.count("rx_drops"), 1);
    let mut setup = busy();
    setup.net.resume();
    assert_eq!(setup.command([4, 0], &[1, 0]), 0);
    assert_eq!(setup.count("rx_drops"), 1);
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let setup = busy();
    let good = saved(&setup);
    let refuse = |what: &str, change: &dyn Fn(&mut NetStateV1)| {
        let mut state = good.clone();
        change(&mut state);
        let mut net = made("eth0", &setup.links, options());
        let before = net.save();
        assert!(net.restore(DeviceState::Net(state)).is_err(), "{what}");
        assert_eq!(net.save(), before, "{what} leaves nothing behind");
    };
    refuse("another address", &|state| state.mac[3] ^= 1);
    refuse("packets longer than the wire's", &|state| state.mtu = 1401);
    refuse("an MTU of none", &|state| state.mtu = 67);
    refuse("too many pairs", &|state| state.pairs = 4);
    refuse("offloads that are none", &|state| state.offloads = Some(1 << VIRTIO_NET_F_MAC));
    refuse("a frame of a pair that is not in use", &|state| state.pairs = 1);
    refuse("a frame that is only a header", &|state| state.held[0].bytes.truncate(NET_HEADER));
    refuse("a frame that is too long", &|state| state.held[0].bytes.resize(MAX_FRAME + 1, 0));
    refuse("two frames of one pair", &|state| state.held.push(state.held[0].clone()));
    let mut net = made("eth0", &setup.links, options());
    assert_eq!(net.restore(DeviceState::Rng), Err(StateError::WrongDevice("network card")));
}

#[test]
fn the_guest_keeps_the_mtu_that_it_was_told() {
    let mtu_of = |net: &Net| {
        let mut mtu = [0; 2];
        net.read_config(10, &mut mtu);
        u16::from_le_bytes(mtu)
    };
    let mut setup = Setup::with(1, NetOptions { mtu: Some(576), ..options() }, false);
    assert_eq!(mtu_of(&setup.net), 576);
    let state = setup.net.save();
    setup.net = made("eth0", &setup.links, options());
    assert_eq!(mtu_of(&setup.net), 1400, "the link's");
    setup.net.restore(state).unwrap();
    assert_eq!(mtu_of(&setup.net), 576);
}

#[test]
fn options_that_make_no_card_are_refused() {
    let make = |links: usize, options| {
        let links = (0..links).map(|_| plug(false).0 as _).collect();
        Net::new("eth0", links, options).err()
    };
    let zero = RateLimit { bytes_per_second: Some(0), operations_per_second: None };
    assert!(matches!(make(0, options()), Some(NetError::Pairs(0))));
    assert!(matches!(make(MAX_PAIRS + 1, options()), Some(NetError::Pairs(_))));
    assert!(matches!(make(1, NetOptions { mtu: Some(67), ..options() }), Some(NetError::Mtu(67))));
    assert!(matches!(make(1, NetOptions { rx_rate: Some(zero), ..options() }), Some(NetError::Rate(_))));
    assert!(matches!(make(1, NetOptions { tx_rate: Some(zero), ..options() }), Some(NetError::Rate(_))));
    assert!(make(MAX_PAIRS, NetOptions { mtu: Some(u16::MAX), ..options() }).is_none());
}
