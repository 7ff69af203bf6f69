use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::unistd::{read, write};

use super::namespace::{await_open, in_fresh_namespace, ip, make_tap, packet_socket};
use super::*;

#[test]
fn an_interface_that_does_not_exist_is_not_made() {
    for name in ["civic-no-such", "", "a-name-longer-than-the-kernel-takes", "%d"] {
        for queues in [1, 2] {
            assert!(matches!(Tap::open(name, queues), Err(TapError::Absent(_))), "{name}");
        }
    }
    assert!(if_nametoindex("civic-no-such").is_err());
}

#[test]
fn the_loopback_interface_is_no_tap() {
    for queues in [1, 2] {
        let refused = Tap::open("lo", queues);
        assert!(matches!(refused, Err(TapError::NotATap(_) | TapError::Permission(_))), "{refused:?}");
    }
}

#[test]
fn queues_must_be_as_the_interface_was_made() {
    in_fresh_namespace(|| {
        make_tap("one0", false);
        make_tap("many0", true);
        assert!(matches!(Tap::open("one0", 2), Err(TapError::SingleQueue(_))));
        assert!(matches!(Tap::open("many0", 1), Err(TapError::MultiQueue(_))));
        assert!(matches!(Tap::open("one0", 0), Err(TapError::Io { .. })));
        ip("tuntap add dev tun0 mode tun");
        assert!(matches!(Tap::open("tun0", 1), Err(TapError::NotATap(_))));
        for (name, queues) in [("one0", 1), ("many0", 3)] {
            let taps = Tap::open(name, queues).unwrap();
            assert_eq!(taps.len(), queues);
            assert!(matches!(Tap::open(name, queues), Err(TapError::Busy(_))), "{name}");
            drop(taps);
            Tap::open(name, queues).unwrap();
        }
        // A user of one that is in use does not get in by the other way either.
        let _one = Tap::open("one0", 1).unwrap();
        assert!(matches!(Tap::open("one0", 2), Err(TapError::SingleQueue(_))));
    });
}

#[test]
fn tells_its_mtu_and_what_its_kernel_segments() {
    in_fresh_namespace(|| {
        make_tap("one0", false);
        ip("link set one0 mtu 9000");
        let tap = &Tap::open("one0", 1).unwrap()[0];
        assert_eq!(tap.mtu(), Some(9000));
        let tcp = Offloads { checksum: true, tso4: true, tso6: true, ecn: true, ..Offloads::default() };
        let udp = Offloads { uso4: true, uso6: true, ..tcp };
        tap.set_offloads(tcp).unwrap();
        assert_eq!(tap.set_offloads(udp).is_ok(), tap.segments_udp());
        // What the kernel cannot tell apart is left out.
        tap.set_offloads(Offloads { uso4: true, ..tcp }).unwrap();
    });
}

/// An Ethernet frame of UDP over IPv4 from `port`, with no offload to be done.
fn flow(port: u16) -> Vec<u8> {
    let mut frame = vec![0; 10];
    frame.extend([[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]].concat());
    frame.extend([8, 0, 0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    frame.extend([port.to_be_bytes(), [0, 9]].concat());
    frame.extend([0, 12, 0, 0, 1, 2, 3, 4]);
    frame
}

/// Frames that wait in each of `taps`.
fn waiting(taps: &[Tap]) -> Vec<usize> {
    let mut frame = [0; 200];
    let count = |tap: &Tap| (0..).take_while(|_| read(tap.fd(), &mut frame).is_ok()).count();
    taps.iter().map(count).collect()
}

fn send_flows(host: &OwnedFd) {
    for port in 1000..1064 {
        assert!(write(host, &flow(port)).is_ok());
    }
}

#[test]
fn detached_queues_get_no_frames_and_attached_ones_do() {
    in_fresh_namespace(|| {
        make_tap("many0", true);
        let host = packet_socket("many0");
        let taps = Tap::open("many0", 4).unwrap();
        await_open("many0");
        taps[1..].iter().for_each(|tap| tap.set_attached(false).unwrap());
        taps[1].set_attached(false).unwrap();
        send_flows(&host);
        assert_eq!(waiting(&taps), [64, 0, 0, 0]);
        for tap in [&taps[1], &taps[2], &taps[2]] {
            tap.set_attached(true).unwrap();
        }
        send_flows(&host);
        let got = waiting(&taps);
        assert!(got.iter().sum::<usize>() == 64 && got[3] == 0, "{got:?}");
        assert!(got[..3].iter().filter(|&&frames| frames > 0).count() > 1, "all flows on one queue: {got:?}");
    });
}

#[test]
fn a_deleted_interface_says_so() {
    in_fresh_namespace(|| {
        make_tap("one0", false);
        let tap = &Tap::open("one0", 1).unwrap()[0];
        ip("link del one0");
        let mut frame = [0; 200];
        assert_eq!(read(tap.fd(), &mut frame), Err(Errno::EBADFD));
        assert_eq!(write(tap.fd(), &[&[0, 0][..], &flow(1)].concat()), Err(Errno::EBADFD));
        assert_eq!(tap.set_offloads(Offloads::default()).unwrap_err().raw_os_error(), Some(libc::EBADFD));
    });
}
