//! What a card's mirrors get, and that the card has no disadvantage by them.

use std::collections::VecDeque;

use super::flow::take_frame;
use super::*;
use crate::mirror::{MirrorError, MirrorLink, MirrorSink};

/// A new sink with so many sockets, and the far ends.
pub(super) fn sink(sockets: usize) -> (Vec<MirrorLink>, MirrorSink) {
    let (links, sockets) = (0..sockets).map(|_| MirrorLink::pair().unwrap()).unzip();
    (links, MirrorSink::new(sockets).unwrap())
}

/// An active card called `id`, and its mirror. The id is a test's own: threads are called by it.
fn card(id: &str, pairs: usize) -> (Setup, Arc<Mirror>) {
    let mut setup = Setup::with(pairs, options(), false);
    setup.net = made(id, &setup.links, options());
    let features = setup.net.features();
    setup.net.activate(setup.driver.activation(features)).unwrap();
    let mirror = setup.net.mirror();
    (setup, mirror)
}

impl Setup {
    /// A frame arrives and the guest gets it.
    fn deliver(&mut self, body: &[u8]) {
        self.driver.queues[0].offer(&[Part::Room(66_000)]);
        self.driver.queues[0].kick();
        self.arrive(body);
        assert_eq!(self.driver.queues[0].await_used().1 as usize, NET_HEADER + body.len());
    }
}

fn try_read(link: &MirrorLink) -> Option<Vec<u8>> {
    let mut frame = vec![0; MAX_FRAME + 1];
    let len = read(link.fd(), &mut frame).ok()?;
    frame.truncate(len);
    Some(frame)
}

/// The next frame.
#[track_caller]
fn get_whole(link: &MirrorLink) -> Vec<u8> {
    let mut frame = None;
    until("a mirrored frame", || {
        frame = try_read(link);
        frame.is_some()
    });
    frame.unwrap()
}

/// The next frame's body.
#[track_caller]
fn get(link: &MirrorLink) -> Vec<u8> {
    get_whole(link).split_off(NET_HEADER)
}

/// How many threads mirror the card `id`.
fn threads(id: &str) -> usize {
    let name = format!("mirror:{id}");
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let comms = tasks.flat_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")));
    comms.filter(|comm| comm.trim() == name).count()
}

#[test]
fn every_frame_reaches_two_sinks_whole_and_in_order() {
    let (mut setup, mirror) = card("two", 1);
    let (one, sink_one) = sink(1);
    let (two, sink_two) = sink(1);
    mirror.add(sink_one).unwrap();
    mirror.add(sink_two).unwrap();
    until("one thread", || threads("two") == 1);
    let mut offered = VecDeque::new();
    let lens = [1, 60, 1500, 30_000, 65_000, 60, MAX_FRAME - NET_HEADER, 4096, 9000, 9000];
    for (i, len) in lens.into_iter().cycle().take(100).enumerate() {
        let header = [i as u8 | 1; NUM_BUFFERS];
        let frame = [&header[..], &[0, 0], &body(len + i)[i..]].concat();
        assert_eq!(write(&setup.far[0], &frame), Ok(frame.len()));
        // Sometimes before there is any room.
        let queue = &mut setup.driver.queues[0];
        while offered.len() < 50 {
            offered.push_back(queue.offer(&[Part::Room(NET_HEADER), Part::Room(1500)]));
        }
        queue.kick();
        let mut got = None;
        until("the guest's frame", || {
            got = take_frame(&mut setup.driver.queues[0], &mut offered);
            got.is_some()
        });
        for mut got in [got.unwrap(), get_whole(&one[0]), get_whole(&two[0])] {
            got[NUM_BUFFERS..NET_HEADER].fill(0);
            assert!(got == frame, "{i}: {} bytes, not {}", got.len(), frame.len());
        }
    }
    // Many at once.
    for _ in 0..60 {
        setup.driver.queues[0].offer(&[Part::Room(200)]);
    }
    setup.driver.queues[0].kick();
    for i in 0..60_u8 {
        setup.arrive(&[i; 100]);
    }
    for i in 0..60_u8 {
        assert_eq!((get(&one[0]), get(&two[0])), (vec![i; 100], vec![i; 100]));
    }
    assert_eq!((setup.count("mirror_frames"), setup.count("mirror_drops")), (320, 0));
    assert_eq!((setup.count("rx_drops"), setup.count("errors")), (0, 0));
}

#[test]
fn a_sink_that_never_reads_loses_frames_and_nobody_else_does() {
    let (mut setup, mirror) = card("never", 1);
    let (reads, sink_of_reader) = sink(1);
    let (never, sink_of_other) = sink(1);
    mirror.add(sink_of_reader).unwrap();
    mirror.add(sink_of_other).unwrap();
    for i in 0..200_u8 {
        setup.deliver(&[i; 65_000]);
        assert_eq!(get(&reads[0]), [i; 65_000]);
    }
    until("all counted", || setup.count("mirror_frames") + setup.count("mirror_drops") == 400);
    assert_eq!((setup.count("rx_frames"), setup.count("rx_drops")), (200, 0));
    let kept = std::iter::from_fn(|| try_read(&never[0])).count() as u64;
    assert!(kept > 2 && setup.count("mirror_drops") == 200 - kept, "{kept}");
    // And gets frames again now that there is room.
    setup.deliver(b"again");
    assert_eq!(get(&never[0]), b"again");
}

#[test]
fn a_sink_whose_far_end_is_closed_goes_by_itself() {
    let (mut setup, mirror) = card("closed", 1);
    let (one, sink_one) = sink(1);
    let (two, sink_two) = sink(1);
    let first = mirror.add(sink_one).unwrap();
    mirror.add(sink_two).unwrap();
    // More than one frame: a program that another test starts may have an end for a moment.
    drop(one);
    until("one sink", || {
        setup.deliver(b"to one left");
        assert_eq!(get(&two[0]), b"to one left");
        mirror.sinks() == 1
    });
    assert!(!mirror.remove(first));
    drop(two);
    until("no sink", || {
        setup.deliver(b"to nobody");
        mirror.sinks() == 0
    });
    until("no thread", || threads("closed") == 0);
    assert!(mirror.is_empty());
    assert_eq!(setup.count("mirror_drops"), 0);
    // The next one begins anew.
    let (three, sink_three) = sink(1);
    let third = mirror.add(sink_three).unwrap();
    assert_ne!(third, first);
    setup.deliver(b"to another");
    assert_eq!(get(&three[0]), b"to another");
    assert!(mirror.remove(third) && !mirror.remove(third));
    until("no thread", || threads("closed") == 0);
}

#[test]
fn each_pair_has_its_socket_or_the_first() {
    let (mut setup, mirror) = card("pairs", 3);
    assert_eq!(setup.command([4, 0], &[3, 0]), 0);
    let (all, sink_all) = sink(3);
    let (some, sink_some) = sink(2);
    let (one, sink_one) = sink(1);
    for sink in [sink_all, sink_some, sink_one] {
        mirror.add(sink).unwrap();
    }
    for round in 0..20_u8 {
        for pair in [2, 0, 1] {
            let queue = &mut setup.driver.queues[2 * pair];
            queue.offer(&[Part::Room(2000)]);
            queue.kick();
            let body = [round, pair as u8];
            setup.arrive_at(pair, &body);
            setup.driver.queues[2 * pair].await_used();
            assert_eq!(get(&all[pair]), body);
            assert_eq!(get(some.get(pair).unwrap_or(&some[0])), body);
            assert_eq!(get(&one[0]), body);
        }
    }
    assert_eq!((setup.count("mirror_frames"), setup.count("mirror_drops")), (180, 0));
}

#[test]
fn without_sinks_there_is_no_thread_and_no_copy() {
    let (mut setup, mirror) = card("none", 1);
    setup.deliver(b"before");
    assert!(mirror.is_empty() && threads("none") == 0);
    let (links, only) = sink(1);
    let id = mirror.add(only).unwrap();
    assert!(!mirror.is_empty());
    setup.deliver(b"while");
    assert_eq!(get(&links[0]), b"while");
    assert!(mirror.remove(id));
    setup.deliver(b"after");
    assert!(mirror.is_empty());
    until("no thread", || threads("none") == 0);
    assert_eq!(try_read(&links[0]), None);
    assert_eq!((setup.count("mirror_frames"), setup.count("rx_frames")), (1, 3));
}

#[test]
fn what_the_guest_has_no_room_for_is_mirrored_and_what_came_without_a_cable_is_not() {
    let mut setup = Setup::new(RING_FEATURES);
    let (links, only) = sink(1);
    setup.net.mirror().add(only).unwrap();
    setup.driver.queues[0].offer(&[Part::Room(500)]);
    setup.driver.queues[0].kick();
    setup.arrive(&body(600));
    assert_eq!(get(&links[0]), body(600));
    until("a drop", || setup.count("rx_drops") == 1);
    setup.net.switch().set_up(false);
    setup.arrive(&body(100));
    until("another", || setup.count("rx_drops") == 2);
    setup.net.switch().set_up(true);
    setup.arrive(&body(200));
    assert_eq!(get(&links[0]), body(200));
    assert_eq!(setup.count("mirror_frames"), 2);
}

#[test]
fn a_held_frame_is_mirrored_once() {
    let (mut setup, mirror) = card("held", 1);
    let (links, only) = sink(1);
    mirror.add(only).unwrap();
    setup.driver.queues[0].offer(&[Part::Room(600)]);
    setup.driver.queues[0].kick();
    setup.arrive(&body(1000));
    assert_eq!(get(&links[0]), body(1000));
    setup.driver.queues[0].offer(&[Part::Room(600)]);
    setup.driver.queues[0].kick();
    setup.driver.queues[0].await_used();
    setup.driver.queues[0].await_used();
    setup.deliver(b"next");
    assert_eq!(get(&links[0]), b"next");
    assert_eq!((setup.count("rx_frames"), setup.count("mirror_frames")), (2, 2));
}

#[test]
fn a_reset_keeps_the_sinks_and_the_cards_end_takes_them() {
    let (mut setup, mirror) = card("ends", 1);
    let (links, only) = sink(1);
    mirror.add(only).unwrap();
    setup.deliver(b"before");
    setup.net.reset();
    let features = setup.net.features();
    setup.net.activate(setup.driver.activation(features)).unwrap();
    setup.deliver(b"after");
    assert_eq!((get(&links[0]), get(&links[0])), (b"before".to_vec(), b"after".to_vec()));
    drop(setup);
    assert!(mirror.sinks() == 0 && mirror.is_empty());
    until("no thread", || threads("ends") == 0);
    assert!(matches!(mirror.add(sink(1).1), Err(MirrorError::Gone)));
}

#[test]
fn a_forks_card_receives_as_its_sources_does_and_is_not_heard() {
    let (mut source, mirror) = card("source", 1);
    let (mut links, sockets): (Vec<_>, _) = (0..1).map(|_| MirrorLink::pair().unwrap()).unzip();
    let mut fork = Attached::new(Net::new("fork", vec![Arc::new(links.remove(0))], options()).unwrap());
    let mut driver = Driver::new(fork.queue_max_sizes());
    assert_eq!(fork.features(), source.net.features());
    fork.activate(driver.activation(source.net.features())).unwrap();
    let id = mirror.add(MirrorSink::new(sockets).unwrap()).unwrap();
    for len in [60, 1500, 65_000, 60] {
        let offered = driver.queues[0].offer(&[Part::Room(66_000)]);
        driver.queues[0].kick();
        source.deliver(&body(len));
        assert_eq!(driver.queues[0].await_used(), (offered.head, (NET_HEADER + len) as u32));
        let got = driver.queues[0].bytes(offered.parts[0]);
        assert_eq!(got[NUM_BUFFERS..NET_HEADER], 1_u16.to_le_bytes());
        assert_eq!(got[NET_HEADER..][..len], body(len));
    }
    let frame = [&[0; NET_HEADER][..], &body(30_000)].concat();
    let mut send = || {
        for _ in 0..100 {
            driver.queues[1].offer(&[Part::Say(&frame)]);
            driver.queues[1].kick();
            driver.queues[1].await_used();
        }
    };
    send();
    // Also when it is fed no longer.
    assert!(mirror.remove(id));
    send();
    let count = |name| count(&*fork.counters(), name);
    assert_eq!((count("tx_frames"), count("tx_drops"), count("errors"), count("rx_frames")), (200, 0, 0, 4));
    assert_eq!((source.count("rx_frames"), source.count("tx_frames"), source.count("errors")), (4, 0, 0));
    assert_eq!(read(&source.far[0], &mut [0; 10]), Err(Errno::EAGAIN), "nothing left the source");
}
