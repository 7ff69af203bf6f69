mod bench;
mod control;
mod flow;
mod mirror;
mod real;
mod saved;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use nix::unistd::{read, write};
use proptest::prelude::*;

use super::*;
use crate::virtio::testing::{Attached, Driver, DriverQueue, NEXT, Part, WRITE, count, until};

/// One end of a socket pair that keeps message boundaries, as a tap keeps frames.
struct Socket {
    fd: OwnedFd,
    offloads: Mutex<Option<Offloads>>,
    attached: Mutex<Option<bool>>,
    gone: bool,
}

impl FrameLink for Socket {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        *self.offloads.lock().unwrap() = Some(offloads);
        if self.gone { Err(Errno::EBADFD.into()) } else { Ok(()) }
    }
    fn segments_udp(&self) -> bool {
        true
    }
    fn mtu(&self) -> Option<u16> {
        Some(1400)
    }
    fn set_attached(&self, attached: bool) -> io::Result<()> {
        *self.attached.lock().unwrap() = Some(attached);
        Ok(())
    }
}

/// A card whose links are sockets, and their far ends.
struct Setup {
    net: Attached<Net>,
    links: Vec<Arc<Socket>>,
    far: Vec<OwnedFd>,
    driver: Driver,
}

const MERGEABLE: u64 = RING_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF;

fn options() -> NetOptions {
    NetOptions::new(Mac::derived("vm eth0"))
}

fn plug(gone: bool) -> (Arc<Socket>, OwnedFd) {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (near, far) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    for end in [&near, &far] {
        setsockopt(end, sockopt::SndBuf, &(200 << 10)).unwrap();
    }
    (Arc::new(Socket { fd: near, offloads: Mutex::default(), attached: Mutex::default(), gone }), far)
}

fn made(id: &str, links: &[Arc<Socket>], options: NetOptions) -> Attached<Net> {
    let links = links.iter().map(|link| Arc::clone(link) as _).collect();
    Attached::new(Net::new(id, links, options).unwrap())
}

impl Setup {
    fn inactive(gone: bool) -> Self {
        Self::with(1, options(), gone)
    }

    fn with(pairs: usize, options: NetOptions, gone: bool) -> Self {
        let (links, far): (Vec<_>, _) = (0..pairs).map(|_| plug(gone)).unzip();
        let net = made("eth0", &links, options);
        let driver = Driver::new(net.queue_max_sizes());
        Self { net, links, far, driver }
    }

    fn new(features: u64) -> Self {
        let mut setup = Self::inactive(false);
        setup.net.activate(setup.driver.activation(features)).unwrap();
        setup
    }

    /// All features, on so many pairs.
    fn full(pairs: usize) -> Self {
        let mut setup = Self::with(pairs, options(), false);
        let features = setup.net.features();
        setup.net.activate(setup.driver.activation(features)).unwrap();
        setup
    }

    /// A frame arrives from the host: a zeroed header and `body`.
    fn arrive(&self, body: &[u8]) {
        let frame = [&[0; NET_HEADER][..], body].concat();
        assert_eq!(write(&self.far[0], &frame), Ok(frame.len()));
    }

    /// The next frame that the host gets.
    fn leave(&self) -> Vec<u8> {
        let mut frame = vec![0; MAX_FRAME];
        let mut got = Err(Errno::EAGAIN);
        until("frame", || {
            got = read(&self.far[0], &mut frame);
            got != Err(Errno::EAGAIN)
        });
        frame.truncate(got.unwrap());
        frame
    }

    fn count(&self, name: &str) -> u64 {
        count(&*self.net.counters(), name)
    }
}

fn body(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

#[test]
fn sends_gathered_frames() {
    let mut setup = Setup::new(RING_FEATURES);
    let frame = [&[1; NET_HEADER][..], &body(1500)].concat();
    let queue = &mut setup.driver.queues[1];
    queue.offer(&[Part::Say(&frame[..5]), Part::Say(&frame[5..100]), Part::Say(&frame[100..])]);
    queue.offer_indirect(&[Part::Say(&frame[..12]), Part::Say(&frame[12..60])]);
    queue.kick();
    assert_eq!(setup.leave(), frame);
    assert_eq!(setup.leave(), frame[..60]);
    for _ in 0..2 {
        assert_eq!(setup.driver.queues[1].await_used().1, 0);
    }
    assert_eq!((setup.count("tx_frames"), setup.count("tx_bytes")), (2, 1548));
}

#[test]
fn drops_frames_that_are_none_or_too_long() {
    let mut setup = Setup::new(RING_FEATURES);
    let queue = &mut setup.driver.queues[1];
    let long = vec![0; MAX_FRAME + 1];
    for parts in [&[Part::Say(&[0; NET_HEADER])][..], &[Part::Room(100)], &[Part::Say(&long)]] {
        queue.offer(parts);
        queue.kick();
        assert_eq!(queue.await_used().1, 0);
    }
    queue.offer(&[Part::Say(&long[..MAX_FRAME])]);
    queue.kick();
    queue.await_used();
    assert_eq!(setup.leave().len(), MAX_FRAME);
    assert_eq!((setup.count("tx_drops"), setup.count("tx_frames")), (3, 1));
}

#[test]
fn a_link_that_is_full_delays_frames_and_loses_none() {
    let mut setup = Setup::new(RING_FEATURES);
    let queue = &mut setup.driver.queues[1];
    for i in 0..200_u8 {
        queue.offer(&[Part::Say(&[&[0; NET_HEADER][..], &[i; 8000]].concat())]);
    }
    queue.kick();
    for i in 0..200_u8 {
        assert_eq!(setup.leave()[NET_HEADER..], [i; 8000]);
    }
    for _ in 0..200 {
        setup.driver.queues[1].await_used();
    }
    assert_eq!((setup.count("tx_frames"), setup.count("tx_drops")), (200, 0));
}

#[test]
fn spreads_frames_over_mergeable_buffers() {
    let mut setup = Setup::new(MERGEABLE);
    let queue = &mut setup.driver.queues[0];
    let offered: Vec<_> = (0..4).map(|_| queue.offer(&[Part::Room(500), Part::Room(500)])).collect();
    setup.arrive(&body(2400));
    setup.arrive(&body(60));
    let queue = &mut setup.driver.queues[0];
    let mut got = Vec::new();
    for (expected, chain) in [1000, 1000, 412, 72].into_iter().zip(&offered) {
        assert_eq!(queue.await_used(), (chain.head, expected));
        let bytes = [queue.bytes(chain.parts[0]), queue.bytes(chain.parts[1])].concat();
        got.push(bytes[..expected as usize].to_vec());
    }
    let first = got[..3].concat();
    assert_eq!(first[NUM_BUFFERS..NET_HEADER], 3_u16.to_le_bytes());
    assert_eq!(first[NET_HEADER..], body(2400));
    assert_eq!(got[3][NUM_BUFFERS..NET_HEADER], 1_u16.to_le_bytes());
    assert_eq!((setup.count("rx_frames"), setup.count("rx_bytes")), (2, 2460));
}

#[test]
fn frames_wait_for_buffers_without_a_busy_loop_or_a_lost_kick() {
    for features in [MERGEABLE, 1 << VIRTIO_NET_F_MRG_RXBUF] {
        let mut setup = Setup::new(features);
        let add = |queue: &mut DriverQueue| {
            queue.offer(&[Part::Room(600)]);
            if features & RING_FEATURES == 0 {
                queue.kick();
            } else {
                queue.kick_if_wanted(1);
            }
        };
        for i in 0..20 {
            setup.arrive(&body(1000 + i));
        }
        // One buffer too few for the first frame: the kick must come with the second.
        let queue = &mut setup.driver.queues[0];
        queue.offer(&[Part::Room(600)]);
        queue.kick();
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(queue.take_used(), None);
        for i in 0..20 {
            let queue = &mut setup.driver.queues[0];
            if i > 0 {
                add(queue);
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            add(queue);
            assert_eq!(queue.await_used().1, 600);
            assert_eq!(queue.await_used().1 as usize, NET_HEADER + 1000 + i - 600);
        }
        assert_eq!((setup.count("rx_frames"), setup.count("rx_drops")), (20, 0));
    }
}

#[test]
fn an_idle_device_with_frames_waiting_sleeps() {
    let mut setup = Setup::inactive(false);
    setup.net = made("idle", &setup.links, options());
    setup.net.activate(setup.driver.activation(MERGEABLE)).unwrap();
    setup.arrive(&body(100));
    std::thread::sleep(std::time::Duration::from_millis(300));
    let of_device = |task: std::io::Result<std::fs::DirEntry>| {
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
        // proc(5): utime and stime are fields 14 and 15; ")" ends the second.
        let fields: Vec<u64> =
            stat.split_once("(net:idle) ")?.1.split(' ').skip(11).take(2).flat_map(str::parse).collect();
        Some(fields.iter().sum())
    };
    let ticks: Vec<u64> = std::fs::read_dir("/proc/self/task").unwrap().filter_map(of_device).collect();
    assert!(matches!(ticks[..], [0..5]), "{ticks:?} of 1/100 s in 300 ms");
}

#[test]
fn a_frame_that_no_buffer_can_hold_is_dropped() {
    let mut setup = Setup::new(RING_FEATURES);
    setup.driver.queues[0].offer(&[Part::Room(1526)]);
    setup.arrive(&body(1515));
    setup.arrive(&body(1514));
    assert_eq!(setup.driver.queues[0].await_used().1, 1526);
    assert_eq!((setup.count("rx_frames"), setup.count("rx_drops")), (1, 1));
    // A whole ring of mergeable buffers that is too small.
    let mut setup = Setup::new(MERGEABLE);
    let offered: Vec<_> = (0..QUEUE_SIZE).map(|_| setup.driver.queues[0].offer(&[Part::Room(20)])).collect();
    setup.arrive(&body(6000));
    setup.arrive(&body(5));
    assert_eq!(setup.driver.queues[0].await_used(), (offered[0].head, 17));
    assert_eq!((setup.count("rx_frames"), setup.count("rx_drops")), (1, 1));
}

#[test]
fn a_deleted_interface_swallows_frames() {
    let mut setup = Setup::inactive(true);
    setup.net.activate(setup.driver.activation(RING_FEATURES)).unwrap();
    setup.arrive(&body(100));
    let queue = &mut setup.driver.queues[1];
    for _ in 0..3 {
        queue.offer(&[Part::Say(&body(100))]);
        queue.kick();
        queue.await_used();
    }
    assert_eq!((setup.count("tx_drops"), setup.count("errors"), setup.count("rx_frames")), (3, 1, 0));
}

#[test]
fn a_closed_far_end_is_no_loop() {
    let mut setup = Setup::new(MERGEABLE);
    setup.driver.queues[0].offer(&[Part::Room(2000)]);
    drop(std::mem::take(&mut setup.far));
    std::thread::sleep(std::time::Duration::from_millis(50));
    setup.net.pause();
    assert!(setup.count("errors") < 10);
}

#[test]
fn negotiates_offloads_and_survives_a_reset() {
    let mut setup = Setup::new(MERGEABLE);
    assert_eq!(*setup.links[0].offloads.lock().unwrap(), Some(Offloads::default()));
    setup.net.reset();
    setup.net.reset();
    setup.arrive(&body(300));
    let features = setup.net.features();
    setup.net.activate(setup.driver.activation(features)).unwrap();
    let all = Offloads { checksum: true, tso4: true, tso6: true, ecn: true, uso4: true, uso6: true };
    assert_eq!(*setup.links[0].offloads.lock().unwrap(), Some(all));
    let queue = &mut setup.driver.queues[0];
    queue.offer(&[Part::Room(1526)]);
    queue.kick();
    assert_eq!(queue.await_used().1 as usize, NET_HEADER + 300);
    setup.net.pause();
    setup.arrive(&body(300));
    setup.driver.queues[0].offer(&[Part::Room(1526)]);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(setup.driver.queues[0].take_used(), None);
    setup.net.resume();
    setup.driver.queues[0].await_used();
}

#[test]
fn addresses_are_stable_and_local() {
    let mac = Mac::derived("vm eth0");
    assert_eq!(mac, Mac::derived("vm eth0"));
    assert_ne!(mac, Mac::derived("vm eth1"));
    assert_eq!(mac.0[0] & 3, 2);
    let setup = Setup::inactive(false);
    let mut config = [0; 14];
    setup.net.read_config(0, &mut config);
    assert_eq!(config[..6], mac.0);
    assert_eq!(config[6..], [1, 0, 1, 0, 0x78, 5, 0, 0]);
}

proptest! {
    #[test]
    fn no_table_panics_or_hangs_it(
        table in prop::collection::vec(
            (0_u64..0x90_0000, prop_oneof![0_u32..3000, any::<u32>()], 0_u16..8, 0_u16..20), 16),
        heads in prop::collection::vec(0_u16..17, 1..16),
        mergeable: bool,
    ) {
        let mut setup = Setup::inactive(false);
        setup.arrive(&body(3000));
        setup.arrive(&body(30));
        let activation = setup.driver.activation(if mergeable { MERGEABLE } else { RING_FEATURES });
        for queue in &mut setup.driver.queues {
            for (i, descriptor) in table.iter().enumerate() {
                queue.set_descriptor(i as u16, *descriptor);
            }
            queue.set_descriptor(16, (0x20_0000, 1600, WRITE | NEXT, 17));
            queue.set_descriptor(17, (0x30_0000, 1600, WRITE, 0));
            for &head in &heads {
                queue.publish(head);
            }
        }
        setup.net.activate(activation).unwrap();
        setup.net.pause();
        setup.net.reset();
    }
}

/// What was sent before a broken chain is done, and the driver hears of it.
#[test]
fn frames_before_a_broken_chain_are_told() {
    let mut setup = Setup::new(RING_FEATURES);
    setup.net.pause();
    let queue = &mut setup.driver.queues[1];
    queue.offer(&[Part::Say(&[&[0; NET_HEADER][..], b"sent"].concat())]);
    queue.publish(QUEUE_SIZE);
    queue.kick();
    setup.net.resume();
    setup.driver.await_fault();
    assert_eq!(setup.leave()[NET_HEADER..], *b"sent");
    assert!(setup.driver.queues[1].has_used());
    assert_eq!(setup.driver.interrupts(), 1);
}
