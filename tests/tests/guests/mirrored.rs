//! What a fork's copy of its source's network card is connected to, on a bridge on which both the source and the fork's own card are.
//!
//! ```text
//!  host ── bridge ─┬─ tap ── eth0 of the source         capture: only the source's address ever comes from here
//!                  └─ tap ── the fork's own card        capture: only its own ever comes from here
//!                            eth0 of the fork           isolated, down, or a mirror of what the source receives
//! ```
//!
//! The host pings the source: an answer that came twice, or any frame of what the fork tries to send, would show.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use civic_tests::linux::{Spec, Tap, Vm, run};
use nix::errno::Errno;
use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

/// Pings of the source, for each fork.
const PINGS: u64 = 20;
/// The host that the fork looks for, and which is nobody.
const NOBODY: u8 = 99;
/// How many echo requests the guest's kernel has received.
const ECHOES: &str =
    "awk '/^Icmp:/ { if (h) print $h; else for (i = 1; i <= NF; i++) if ($i == \"InEchos\") h = i }' /proc/net/snmp";

type Mac = [u8; 6];

/// Who has sent something into an interface from its far side.
struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(BTreeSet<Mac>, bool)>>,
}

impl Capture {
    /// Looks at every frame on `interface` from now on.
    fn start(interface: &str) -> Result<Self> {
        let socket = packets(interface).with_context(|| format!("cannot look at {interface}"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let look = move || {
            let (mut senders, mut sought) = (BTreeSet::new(), false);
            let mut frame = [0; 2048];
            while !stopped.load(Ordering::Relaxed) {
                let Some(len) = receive(&socket, &mut frame)? else { continue };
                if let Some(sender) = frame[..len].get(6..12) {
                    senders.insert(sender.try_into()?);
                }
                // ARP for an address that ends so.
                sought |= frame[..len].get(12..14) == Some(&[8, 6]) && frame[..len].get(41) == Some(&NOBODY);
            }
            Ok((senders, sought))
        };
        Ok(Self { stop, thread: std::thread::spawn(look) })
    }

    /// The addresses that came from there, and whether anybody was looking for nobody.
    fn end(self) -> Result<(BTreeSet<Mac>, bool)> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the capture panicked"))?
    }
}

fn packets(interface: &str) -> Result<OwnedFd> {
    let all = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: makes a descriptor and touches no memory.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, all.into()) };
    Errno::result(fd)?;
    // SAFETY: it was just made, and is nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: all,
        sll_ifindex: if_nametoindex(interface)? as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is a live sockaddr_ll of this length.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    Errno::result(bound)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 100_000))?;
    Ok(socket)
}

/// The next frame that came from the far side, if there was one in time.
fn receive(socket: &OwnedFd, frame: &mut [u8]) -> Result<Option<usize>> {
    // SAFETY: all zeroes is one.
    let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&from) as libc::socklen_t;
    let (room, at) = (frame.len(), frame.as_mut_ptr());
    // SAFETY: both buffers are live and of these lengths.
    let got = unsafe { libc::recvfrom(socket.as_raw_fd(), at.cast(), room, 0, (&raw mut from).cast(), &raw mut len) };
    match Errno::result(got) {
        Ok(_) if from.sll_pkttype == libc::PACKET_OUTGOING => Ok(None),
        Ok(got) => Ok(Some(got as usize)),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
        Err(e) => Err(io::Error::from(e).into()),
    }
}

/// A bridge, gone when dropped.
struct Bridge(&'static str);

impl Bridge {
    fn new() -> Result<Self> {
        let name = "civicbr0";
        let _ = run("ip", &["link", "del", name]);
        run("ip", &["link", "add", name, "type", "bridge"])?;
        run("ip", &["link", "set", name, "up"])?;
        Ok(Self(name))
    }

    /// Takes over an interface, and an address of the host's.
    fn take(&self, tap: &Tap, address: bool) -> Result<()> {
        run("ip", &["addr", "flush", "dev", &tap.name])?;
        run("ip", &["link", "set", &tap.name, "master", self.0])?;
        if address {
            run("ip", &["addr", "add", &format!("{}/24", tap.host), "dev", self.0])?;
        }
        Ok(())
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = run("ip", &["link", "del", self.0]);
    }
}

fn mac(text: &str) -> Result<Mac> {
    let bytes: Result<Vec<_>, _> = text.trim().split(':').map(|byte| u8::from_str_radix(byte, 16)).collect();
    bytes?.try_into().map_err(|_| anyhow!("{text:?} is no address"))
}

/// Each kind of connection in turn.
pub fn tiny(spec: &Spec) -> Result<()> {
    let mut vm = Vm::start(spec)?;
    let bridge = Bridge::new()?;
    bridge.take(&vm.tap, true)?;
    let own = Tap::new()?;
    bridge.take(&own, false)?;
    let source_mac = mac(&vm.sh("cat /sys/class/net/eth0/address")?)?;
    for (source_net, last) in [("isolated", 3), ("down", 4), ("mirror", 5)] {
        one(&mut vm, &own, source_mac, (source_net, last)).with_context(|| source_net.to_owned())?;
    }
    vm.check_kernel_log()?;
    vm.stop()
}

/// The fork's own card gets an address that ends with `last`.
fn one(vm: &mut Vm, own: &Tap, source_mac: Mac, (source_net, last): (&str, u8)) -> Result<()> {
    let (from_source, from_own) = (Capture::start(&vm.tap.name)?, Capture::start(&own.name)?);
    let guest = vm.tap.guest;
    let [a, b, c, _] = guest.octets();
    let at = |last: u8| format!("{a}.{b}.{c}.{last}");
    let name = format!("child-{source_net}");
    let (mut child, _) =
        vm.fork_with(&name, &["--source-net", source_net, "--net", &format!("tap={},id=own", own.name)])?;
    if source_net == "down" {
        child.sh("until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done").context("the cable is in")?;
    }

    // Pings of the source are answered once each; the fork gets them or not.
    let before: u64 = child.sh(ECHOES)?.trim().parse()?;
    let told = run("ping", &["-c", &PINGS.to_string(), "-i", "0.2", "-W", "20", &guest.to_string()])?;
    ensure!(!told.contains("DUP!") && told.contains(" 0% packet loss"), "{told}");
    let wanted = if source_net == "mirror" { PINGS } else { 0 };
    // They come to the fork by another way, in their own time.
    let echoes = child.sh(&format!("n=0; while e=$({ECHOES}); [ $((e - {before})) -lt {wanted} ] && [ $n -lt 300 ]; do sleep 0.1; n=$((n + 1)); done; echo $e"))?;
    let echoes = echoes.trim().parse::<u64>()? - before;
    ensure!(echoes == wanted, "the fork got {echoes} of {PINGS} pings");
    let info = vm.info()?;
    let counters = &info.devices.iter().find(|device| device.kind == "net").context("no card")?.counters;
    ensure!((counters["mirror_frames"] > 0) == (source_net == "mirror"), "{counters:?}");
    ensure!(counters["mirror_drops"] == 0, "{counters:?}");

    let carrier = child.sh("cat /sys/class/net/eth0/carrier")?;
    ensure!((carrier == "0") == (source_net == "down"), "the carrier is {carrier}");

    // What it sends is heard by nobody.
    child.sh(&format!("ping -c 3 -w 3 {} > /dev/null; true", at(NOBODY)))?;

    // But for its own card.
    let own_mac = child.info()?.devices.into_iter().find(|device| device.id == "own");
    let own_mac = own_mac.and_then(|mut device| device.settings.remove("mac")).context("it has no address")?;
    child.sh(&format!(
        "until card=$(grep -lx {own_mac} /sys/class/net/*/address | cut -d/ -f5) && [ -n \"$card\" ]; do sleep 0.1; done; \
         ip link set eth0 down; ip addr flush dev eth0; ip addr add {}/24 dev $card; ip link set $card up",
        at(last)
    ))?;
    let told = run("ping", &["-c", "5", "-i", "0.2", "-W", "20", &at(last)])?;
    ensure!(!told.contains("DUP!") && told.contains(" 0% packet loss"), "{told}");
    child.check_kernel_log()?;
    child.kill()?;

    // With its fork the source's card has nobody to feed any more: its thread is gone.
    let pid = vm.info()?.pid;
    let fed = || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))?;
        let names = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        Ok::<_, anyhow::Error>(names.filter(|name| name.starts_with("mirror")).count())
    };
    let mut waited = 0;
    while fed()? > 0 {
        ensure!(waited < 300, "its card is still fed to somebody");
        std::thread::sleep(Duration::from_millis(100));
        waited += 1;
    }
    let ((source, sought), (own, sought_there)) = (from_source.end()?, from_own.end()?);
    ensure!(source == BTreeSet::from([source_mac]), "from the source's tap came frames of {source:02x?}");
    ensure!(own == BTreeSet::from([mac(&own_mac)?]), "from the fork's tap came frames of {own:02x?}");
    ensure!(!sought && !sought_there, "what the fork sent was heard");
    Ok(())
}
