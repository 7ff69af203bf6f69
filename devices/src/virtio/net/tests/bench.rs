//! What a frame costs the device's thread, through a real tap. Not a test of time: it prints, and asserts what arrived.
//!
//! `cargo test --release -p civic-devices -- --ignored --nocapture net::tests::bench`

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, spawn};

use nix::poll::{PollFd, PollFlags, poll};

use super::*;
use crate::mirror::MirrorLink;
use crate::tap::Tap;
use crate::tap::namespace::{await_open, in_fresh_namespace, make_tap, packet_socket};
use crate::virtio::testing::ran;

/// An Ethernet frame of TCP over IPv4 with `payload` bytes, and the header that says so (for GSO where it needs it).
pub fn tcp_frame(payload: usize) -> (Vec<u8>, Vec<u8>) {
    let mut frame = vec![0x02; 12];
    frame.extend([8, 0]);
    let mut ip = vec![0x45, 0];
    ip.extend(((40 + payload) as u16).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(ip);
    frame.extend([0x30, 0x39, 0x30, 0x39, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame.extend(vec![0xab; payload]);
    let mut header = vec![0; 10];
    if payload > 1460 {
        header[0] = 1;
        header[1] = 1;
        header[2..4].copy_from_slice(&54_u16.to_le_bytes());
        header[4..6].copy_from_slice(&1448_u16.to_le_bytes());
        header[6..8].copy_from_slice(&34_u16.to_le_bytes());
        header[8..10].copy_from_slice(&16_u16.to_le_bytes());
    }
    (header, frame)
}

fn device() -> (Attached<Net>, Driver, OwnedFd) {
    make_tap("bench0", false);
    let host = packet_socket("bench0");
    let tap = Tap::open("bench0", 1).unwrap().remove(0);
    let net = Net::new("bench", vec![Arc::new(tap)], NetOptions::new(Mac::derived("bench"))).unwrap();
    let mut net = Attached::new(net);
    let mut driver = Driver::new(net.queue_max_sizes());
    let features = net.features();
    net.activate(driver.activation(features)).unwrap();
    await_open("bench0");
    (net, driver, host)
}

fn report(what: &str, frames: u64, bytes: usize, nanos: u64) {
    let each = nanos / frames;
    eprintln!("{what} {bytes:>6} bytes: {each:>6} ns a frame, {:.2} GB/s of its thread", bytes as f64 / each as f64);
}

#[test]
#[ignore = "prints times"]
fn receive() {
    for (payload, rounds) in [(6, 1000), (1460, 1000), (64_000, 1000)] {
        receive_all("receive ", payload, rounds, |_| ());
    }
}

/// What mirrors cost the pair's thread. No sink, one that is read from, one that is not.
#[test]
#[ignore = "prints times"]
fn receive_mirrored() {
    for payload in [6, 1446, 64_946] {
        receive_all("no sink ", payload, 1000, |_| ());
        receive_all("read    ", payload, 1000, |net| {
            let (links, sink) = mirror::sink(1);
            net.mirror().add(sink).unwrap();
            Reader::of(links)
        });
        receive_all("not read", payload, 1000, |net| {
            let (links, sink) = mirror::sink(1);
            net.mirror().add(sink).unwrap();
            links
        });
    }
}

/// A thread that reads what comes by a link, until it is dropped.
struct Reader {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    fn of(links: Vec<MirrorLink>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = spawn(move || {
            let mut frame = vec![0; MAX_FRAME];
            while !stopped.load(Ordering::Relaxed) {
                poll(&mut [PollFd::new(links[0].fd(), PollFlags::POLLIN)], 10_u8).unwrap();
                while read(links[0].fd(), &mut frame).is_ok() {}
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Receives `rounds` rings full of frames; `with` may connect more to the card.
fn receive_all<T>(what: &str, payload: usize, rounds: usize, with: impl Fn(&Net) -> T + Send + Sync) {
    in_fresh_namespace(|| {
        let (mut net, mut driver, host) = device();
        let _with = with(&net);
        let (header, frame) = tcp_frame(payload);
        let sent = [&header[..], &frame].concat();
        // As many as the ring can take, all waiting when the thread begins: what a busy link is like.
        let each = (NET_HEADER + frame.len()).div_ceil(1536);
        let at_once = 250 / each;
        let (mut used, mut nanos) = (0_u16, 0);
        for _ in 0..rounds {
            net.pause();
            let before = ran("net:bench");
            let queue = &mut driver.queues[0];
            for _ in 0..at_once * each {
                queue.offer(&[Part::Room(1536)]);
            }
            queue.interrupt_after(used);
            for _ in 0..at_once {
                assert_eq!(write(&host, &sent), Ok(sent.len()));
            }
            queue.kick();
            net.resume();
            for _ in 0..at_once * each {
                queue.await_used();
                used = used.wrapping_add(1);
            }
            net.pause();
            nanos += ran("net:bench") - before;
            net.resume();
        }
        let frames = (rounds * at_once) as u64;
        report(what, frames, frame.len(), nanos);
        let interrupts = driver.interrupts();
        assert_eq!((count(&*net.counters(), "rx_frames"), count(&*net.counters(), "rx_drops")), (frames, 0));
        eprintln!("         {:.3} interrupts a frame", interrupts as f64 / frames as f64);
        let [copies, lost] = ["mirror_frames", "mirror_drops"].map(|name| count(&*net.counters(), name));
        if copies + lost > 0 {
            eprintln!("         mirrored: {copies} sent, {lost} lost");
        }
    });
}

#[test]
#[ignore = "prints times"]
fn transmit() {
    for (payload, frames) in [(6, 200_000_u64), (1460, 200_000), (64_000, 20_000)] {
        in_fresh_namespace(|| {
            let (net, mut driver, _) = device();
            let (header, frame) = tcp_frame(payload);
            let header = [&header[..], &[0, 0]].concat();
            let queue = &mut driver.queues[1];
            let (mut out, mut back, start) = (0, 0, ran("net:bench"));
            while back < frames {
                let mut added = 0;
                while out < frames && out < back + 80 {
                    let (one, two) = frame.split_at(frame.len() / 2);
                    queue.offer(&[Part::Say(&header), Part::Say(one), Part::Say(two)]);
                    out += 1;
                    added += 1;
                }
                if added > 0 {
                    queue.kick_if_wanted(added);
                }
                while queue.take_used().is_some() {
                    back += 1;
                }
                queue.interrupt_after(back as u16);
            }
            let nanos = ran("net:bench") - start;
            report("transmit", frames, frame.len(), nanos);
            let interrupts = driver.interrupts();
            assert_eq!(count(&*net.counters(), "tx_frames") + count(&*net.counters(), "tx_drops"), frames);
            eprintln!("         {:.3} interrupts a frame", interrupts as f64 / frames as f64);
        });
    }
}
