//! A network of their own for tests that need real interfaces.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::thread;

use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};

use crate::virtio::testing::until;

/// Runs `test` on a thread in a network namespace that goes away with it.
pub fn in_fresh_namespace(test: impl FnOnce() + Send) {
    let inside = || {
        unshare(CloneFlags::CLONE_NEWNET).expect("this test makes a network namespace: run it as root");
        ip("link set lo up");
        test();
    };
    thread::scope(|scope| {
        if let Err(panic) = scope.spawn(inside).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Runs `ip` with `arguments` in this thread's namespace.
#[track_caller]
pub fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).output().expect("iproute2 is installed");
    assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Makes the tap `name`, with several queues or one, and sets it up. IPv6 is off: it would speak unasked.
pub fn make_tap(name: &str, multi_queue: bool) {
    ip(&format!("tuntap add dev {name} mode tap{}", if multi_queue { " multi_queue" } else { "" }));
    // Where IPv6 is not there at all, so is not the file.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    ip(&format!("link set {name} up"));
}

/// Waits until the kernel lets frames out through the tap `name`, a moment after it was opened: before, it drops them.
pub fn await_open(name: &str) {
    until("queueing discipline", || {
        let shown = Command::new("ip").args(["link", "show", "dev", name]).output().expect("iproute2 is installed");
        let shown = String::from_utf8_lossy(&shown.stdout);
        shown.contains("LOWER_UP") && !shown.contains("qdisc noop ")
    });
}

/// A socket that sends and receives whole frames on the host's side of interface `name`, each with a virtio-net header of ten
/// bytes before it.
pub fn packet_socket(name: &str) -> OwnedFd {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: socket(2) takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(protocol)) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor was just made and is nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let on: libc::c_int = 1;
    // SAFETY: the option's value is an int of that length.
    let set =
        unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_VNET_HDR, (&raw const on).cast(), 4) };
    assert_eq!(set, 0, "{}", io::Error::last_os_error());
    // SAFETY: zero is a value for each of its integers.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = if_nametoindex(name).unwrap() as i32;
    // SAFETY: the address is one of that length.
    let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32) };
    assert_eq!(bound, 0, "{}", io::Error::last_os_error());
    fd
}
