//! Many frames: whole, in order, at their rate, and through resets.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::*;
use crate::virtio::testing::Offered;

/// Takes the buffers of one frame out of the used ring, which has all of them or none; returns the frame.
pub(super) fn take_frame(queue: &mut DriverQueue, offered: &mut VecDeque<Offered>) -> Option<Vec<u8>> {
    let mut take = |queue: &mut DriverQueue| {
        let (head, len) = queue.take_used()?;
        let chain = offered.pop_front().unwrap();
        assert_eq!(head, chain.head);
        let bytes: Vec<u8> = chain.parts.iter().flat_map(|&part| queue.bytes(part)).collect();
        Some(bytes[..len as usize].to_vec())
    };
    let mut frame = take(queue)?;
    let buffers = u16::from_le_bytes(frame[NUM_BUFFERS..NET_HEADER].try_into().unwrap());
    for i in 1..buffers {
        let more = take(queue).unwrap_or_else(|| panic!("{i} of {buffers} buffers can be seen"));
        frame.extend(more);
    }
    Some(frame)
}

#[test]
fn a_polling_driver_sees_all_buffers_of_a_frame_at_once() {
    let mut setup = Setup::new(MERGEABLE);
    let mut offered = VecDeque::new();
    for sent in 0..1500_usize {
        let queue = &mut setup.driver.queues[0];
        while offered.len() < 120 {
            offered.push_back(queue.offer(&[Part::Room(100)]));
        }
        queue.kick();
        setup.arrive(&body(2000 + sent));
        let mut frame = None;
        until("a frame", || {
            // Not through `until`, which sleeps: a driver that polls looks all the time.
            let looked = (0..10_000).find_map(|_| take_frame(&mut setup.driver.queues[0], &mut offered));
            frame = looked;
            frame.is_some()
        });
        assert_eq!(frame.unwrap()[NET_HEADER..], body(2000 + sent));
    }
}

#[test]
fn frames_survive_a_driver_that_resets_in_their_midst() {
    let mut setup = Setup::full(2);
    let features = setup.net.features();
    let frame = [&[0; NET_HEADER][..], &body(1400)].concat();
    for round in 0..30 {
        for pair in 0..2 {
            while write(&setup.far[pair], &frame).is_ok() {}
            let queue = &mut setup.driver.queues[2 * pair];
            (0..100).for_each(|_| drop(queue.offer(&[Part::Room(1000)])));
            queue.kick();
            let queue = &mut setup.driver.queues[2 * pair + 1];
            (0..100).for_each(|_| drop(queue.offer(&[Part::Say(&frame)])));
            queue.kick();
        }
        if round % 2 == 0 {
            setup.command([4, 0], &[2, 0]);
        }
        setup.net.reset();
        setup.net.activate(setup.driver.activation(features)).unwrap();
    }
    // And then it still works.
    setup.net.pause();
    let mut rest = vec![0; MAX_FRAME];
    for (near, far) in setup.links.iter().zip(&setup.far) {
        while read(near.fd(), &mut rest).is_ok() {}
        while read(far, &mut rest).is_ok() {}
    }
    setup.net.reset();
    setup.net.activate(setup.driver.activation(features)).unwrap();
    setup.arrive(&body(333));
    setup.driver.queues[0].offer(&[Part::Room(1526)]);
    setup.driver.queues[0].kick();
    assert_eq!(setup.driver.queues[0].await_used().1 as usize, NET_HEADER + 333);
}

/// A card whose `rx` or `tx` passes 300 frames a second, 30 at once.
fn limited(rx: bool) -> Setup {
    let limit = Some(RateLimit { bytes_per_second: None, operations_per_second: Some(300) });
    let rates =
        if rx { NetOptions { rx_rate: limit, ..options() } } else { NetOptions { tx_rate: limit, ..options() } };
    let mut setup = Setup::with(1, rates, false);
    let features = setup.net.features();
    setup.net.activate(setup.driver.activation(features)).unwrap();
    setup
}

/// 120 frames at that rate take three tenths of a second.
#[track_caller]
fn assert_slowed(took: Duration) {
    assert!((Duration::from_millis(280)..Duration::from_secs(3)).contains(&took), "{took:?}");
}

#[test]
fn a_rate_delays_what_is_sent_and_drops_none() {
    let mut setup = limited(false);
    let start = Instant::now();
    for i in 0..120_u8 {
        setup.driver.queues[1].offer(&[Part::Say(&[&[0; NET_HEADER][..], &[i; 100]].concat())]);
    }
    setup.driver.queues[1].kick();
    for i in 0..120_u8 {
        assert_eq!(setup.leave()[NET_HEADER..], [i; 100]);
    }
    assert_slowed(start.elapsed());
    assert_eq!((setup.count("tx_frames"), setup.count("tx_drops")), (120, 0));
    assert!(setup.count("tx_delays") > 0);
    // The other direction is free.
    setup.driver.queues[0].offer(&[Part::Room(1600)]);
    setup.driver.queues[0].kick();
    setup.arrive(&body(50));
    setup.driver.queues[0].await_used();
    assert_eq!(setup.count("rx_delays"), 0);
}

#[test]
fn a_rate_delays_what_is_received_and_drops_none() {
    let mut setup = limited(true);
    for _ in 0..120 {
        setup.driver.queues[0].offer(&[Part::Room(1600)]);
    }
    setup.driver.queues[0].kick();
    let start = Instant::now();
    let send = |from: u8, to: u8| (from..to).for_each(|i| setup.arrive(&[i; 100]));
    // A pause in between changes nothing.
    send(0, 60);
    setup.net.pause();
    setup.net.resume();
    let send = |from: u8, to: u8| (from..to).for_each(|i| setup.arrive(&[i; 100]));
    send(60, 120);
    for _ in 0..120 {
        setup.driver.queues[0].await_used();
    }
    assert_slowed(start.elapsed());
    assert_eq!((setup.count("rx_frames"), setup.count("rx_drops")), (120, 0));
    assert!(setup.count("rx_delays") > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn frames_arrive_whole_whatever_the_buffers(
        frames in prop::collection::vec(prop_oneof![1_usize..200, 1000_usize..3000, 30_000_usize..65_000], 1..25),
        buffers in prop::collection::vec(prop::collection::vec(1_usize..50, 0..4), 1..8),
        last in prop_oneof![1500_usize..2000, Just(65_600_usize)],
        mergeable: bool,
    ) {
        let mut setup = Setup::new(if mergeable { MERGEABLE } else { RING_FEATURES });
        // Without merging only a buffer for the longest frame will do.
        let last = if mergeable { last } else { 65_600 };
        let mut offers = buffers.iter().cycle();
        let (mut offered, mut descriptors) = (VecDeque::<Offered>::new(), 0);
        for len in frames {
            setup.arrive(&body(len));
            let mut frame = None;
            until("a frame", || {
                let queue = &mut setup.driver.queues[0];
                if let Some(sizes) = (descriptors + 5 < usize::from(QUEUE_SIZE)).then(|| offers.next().unwrap()) {
                    let mut parts = vec![Part::Room(NET_HEADER)];
                    parts.extend(sizes.iter().map(|&size| Part::Room(size)));
                    parts.push(Part::Room(last));
                    offered.push_back(queue.offer(&parts));
                    descriptors += parts.len();
                    queue.kick_if_wanted(1);
                }
                frame = take_frame(queue, &mut offered);
                descriptors = offered.iter().map(|chain| chain.parts.len()).sum();
                frame.is_some()
            });
            let expected = body(len);
            prop_assert_eq!(&frame.unwrap()[NET_HEADER..], &expected[..]);
        }
        prop_assert_eq!((setup.count("errors"), setup.count("rx_drops")), (0, 0));
    }
}
