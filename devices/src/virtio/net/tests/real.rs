//! Through real taps, in network namespaces of the tests' own.

use super::*;
use crate::tap::Tap;
use crate::tap::namespace::{await_open, in_fresh_namespace, ip, make_tap, packet_socket};

fn through_tap(name: &str, queues: usize) -> (Attached<Net>, Driver) {
    let links = Tap::open(name, queues).unwrap().into_iter().map(|tap| Arc::new(tap) as _).collect();
    let mut net = Attached::new(Net::new("eth0", links, options()).unwrap());
    let mut driver = Driver::new(net.queue_max_sizes());
    let features = net.features();
    net.activate(driver.activation(features)).unwrap();
    await_open(name);
    (net, driver)
}

/// The lengths of frames that come, `total` bytes of payload in all, into buffers of 64 KiB.
fn frames(queue: &mut DriverQueue, total: usize) -> Vec<usize> {
    let (mut lens, mut got) = (Vec::new(), 0);
    while got < total {
        let len = queue.await_used().1 as usize - NET_HEADER;
        got += len - 54;
        lens.push(len);
    }
    lens
}

#[test]
fn segments_come_whole_until_the_guest_switches_that_off() {
    in_fresh_namespace(|| {
        make_tap("one0", false);
        let host = packet_socket("one0");
        let (net, driver) = through_tap("one0", 1);
        let mut setup = Setup { net, links: Vec::new(), far: vec![host], driver };
        let (header, frame) = bench::tcp_frame(30_000);
        for _ in 0..60 {
            setup.driver.queues[0].offer(&[Part::Room(66_000)]);
        }
        setup.driver.queues[0].kick();
        let sent = [&header[..], &frame].concat();
        assert_eq!(write(&setup.far[0], &sent), Ok(sent.len()));
        assert_eq!(frames(&mut setup.driver.queues[0], 30_000), [30_054]);
        assert_eq!(setup.command([5, 0], &[0; 8]), 0);
        assert_eq!(write(&setup.far[0], &sent), Ok(sent.len()));
        let lens = frames(&mut setup.driver.queues[0], 30_000);
        assert!(lens.len() == 30_000_usize.div_ceil(1448) && lens.iter().all(|&len| len <= 1502), "{lens:?}");
    });
}

#[test]
fn a_tap_deleted_under_load_costs_frames_and_nothing_else() {
    in_fresh_namespace(|| {
        make_tap("many0", true);
        let host = packet_socket("many0");
        let (net, driver) = through_tap("many0", 2);
        let mut setup = Setup { net, links: Vec::new(), far: vec![host], driver };
        assert_eq!(setup.command([4, 0], &[2, 0]), 0);
        let (header, frame) = bench::tcp_frame(1000);
        let mut sent = 0;
        let mut exchange = |setup: &mut Setup| {
            let _ = write(&setup.far[0], &[&header[..], &frame].concat());
            for queue in [1, 3] {
                let whole = [&[0; NET_HEADER][..], &frame].concat();
                setup.driver.queues[queue].offer(&[Part::Say(&whole)]);
                setup.driver.queues[queue].kick();
                setup.driver.queues[queue].await_used();
                sent += 1;
            }
            sent
        };
        for _ in 0..50 {
            exchange(&mut setup);
        }
        assert_eq!(setup.count("tx_frames"), 100);
        ip("link del many0");
        for _ in 0..50 {
            exchange(&mut setup);
        }
        assert_eq!((setup.count("tx_frames"), setup.count("tx_drops")), (100, 100));
        // Whatever the driver then does is answered.
        setup.command([4, 0], &[1, 0]);
        setup.command([5, 0], &[0; 8]);
        setup.net.reset();
        let features = setup.net.features();
        setup.net.activate(setup.driver.activation(features)).unwrap();
        assert_eq!(exchange(&mut setup), 202);
        assert_eq!(setup.driver.interrupt.needs_reset.load(std::sync::atomic::Ordering::SeqCst), 0);
    });
}
