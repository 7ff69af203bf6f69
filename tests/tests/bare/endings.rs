//! How a guest starts over, and how it ends: every road to a reset, S5, kill, signals, failure.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;

use civic_api::launch::LOG_FILE;
use civic_api::{ErrorCode, VmState, VsockConfig};
use civic_tests::bare::program::{COM1, DATA, ECAM, IOAPIC, LAPIC, linux64, pvh};
use civic_tests::bare::vm::{Setup, Vm};
use iced_x86::code_asm::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::interrupts::listener;

/// The first slot's function.
const FUNCTION: u32 = ECAM + (1 << 15);
const BASE: u32 = 0xc000_8000;
/// What a machine looks like after power-on, in the order it is told.
const STATE: [&str; 12] =
    ["memory", "high", "scratch", "ier", "pm1", "command", "bar", "msix", "virtio", "ioapic", "svr", "address"];

/// Tells the state of the machine, spoils it, and resets on the road that a key names.
pub fn resetting() -> Vec<u8> {
    linux64(|asm| {
        asm.peek(DATA)?;
        asm.print_value("memory")?;
        asm.peek((32 << 20) - 4)?;
        asm.print_value("high")?;
        asm.in8(COM1 + 7)?;
        asm.print_value("scratch")?;
        asm.in8(COM1 + 1)?;
        asm.print_value("ier")?;
        asm.mov(edx, 0x602)?;
        asm.xor(eax, eax)?;
        asm.in_(ax, dx)?;
        asm.print_value("pm1")?;
        asm.peek(FUNCTION + 4)?;
        asm.print_value("command")?;
        asm.peek(FUNCTION + 0x10)?;
        asm.print_value("bar")?;
        asm.peek(FUNCTION + 0x40)?;
        asm.print_value("msix")?;
        asm.poke(FUNCTION + 4, 2)?;
        asm.peek(BASE + 0x14)?;
        asm.print_value("virtio")?;
        asm.read_ioapic(0x10 + 2 * 5)?;
        asm.print_value("ioapic")?;
        asm.peek(LAPIC + 0xf0)?;
        asm.print_value("svr")?;
        asm.mov(edx, 0xcf8)?;
        asm.in_(eax, dx)?;
        asm.print_value("address")?;

        for address in [DATA, (32 << 20) - 4] {
            asm.poke(address, 0xdead_beef)?;
        }
        asm.out8(COM1 + 7, 0x77)?;
        asm.out8(COM1 + 1, 1)?;
        asm.mov(edx, 0x602)?;
        asm.mov(eax, 1 << 8)?;
        asm.out(dx, ax)?;
        asm.mov(edx, BASE + 0x14)?;
        asm.mov(byte_ptr(edx), 3)?;
        asm.poke(FUNCTION + 0x40, 0x8000_0000)?;
        asm.poke(FUNCTION + 0x10, 0xd000_0000)?;
        asm.poke(FUNCTION + 4, 6)?;
        asm.enable_lapic()?;
        asm.route_pin(5, 0x45, true)?;
        asm.mov(edx, 0xcf8)?;
        asm.mov(eax, 0x8000_1234u32)?;
        asm.out(dx, eax)?;
        asm.poke(IOAPIC, 0)?;
        asm.print("spoilt\n")?;

        let (mut port, mut keyboard, mut fault) = (asm.create_label(), asm.create_label(), asm.create_label());
        asm.read_key()?;
        for (key, road) in [(b'p', port), (b'k', keyboard), (b'f', fault)] {
            asm.cmp(al, i32::from(key))?;
            asm.je(road)?;
        }
        asm.power_off()?;
        asm.set_label(&mut port)?;
        // Asking for a full reset only arms it; the second write resets.
        asm.out8(0xcf9, 2)?;
        asm.print("armed\n")?;
        asm.out8(0xcf9, 6)?;
        asm.spin()?;
        asm.set_label(&mut keyboard)?;
        asm.out8(0x64, 0xfe)?;
        asm.spin()?;
        asm.set_label(&mut fault)?;
        // No interrupt table: the exception's exception has a third.
        asm.mov(word_ptr(u64::from(DATA)), 0)?;
        asm.lidt(qword_ptr(u64::from(DATA)))?;
        asm.ud2()?;
        asm.spin()
    })
}

#[test]
fn every_reset_starts_over_from_power_on() {
    let state = |vm: &mut Vm| -> Vec<u32> { STATE.iter().map(|name| vm.value(name)).collect() };
    let mut vm = Setup::new(&resetting()).boot();
    let first = state(&mut vm);
    vm.expect("spoilt\n");
    assert_eq!(first[..2], [0, 0], "memory is not zero at first");
    assert_eq!((first[5] & 7, first[6], first[8] & 0xff), (0, BASE | 4, 0));
    let mut before = vm.info();
    for (boot, key) in (2..).zip([b'p', b'k', b'f', b'p', b'f']) {
        vm.send(&[key]);
        if key == b'p' {
            vm.expect("armed\n");
        }
        assert_eq!(state(&mut vm), first, "after '{}', by {STATE:?}", char::from(key));
        vm.expect("spoilt\n");
        let now = vm.info();
        assert_eq!((now.boots, now.state), (boot, VmState::Running));
        // Counters are the VM's, not the machine's.
        assert!(now.vcpus[0].exits["io"] > before.vcpus[0].exits["io"], "{now:?} after {before:?}");
        assert_eq!(now.devices[0].counters["output_bytes"], vm.printed() as u64);
        assert_eq!(now.devices[0].counters["input_bytes"], boot - 1);
        before = now;
    }
    vm.send(b"o");
    assert_eq!(vm.ended().code(), Some(0));
}

/// Descriptors and memfd mappings of the monitor: what a machine that was not taken down whole would keep.
fn held(vm: &Vm) -> (usize, usize) {
    let proc = format!("/proc/{}", vm.pid());
    let open = std::fs::read_dir(format!("{proc}/fd")).expect("the monitor has descriptors").count();
    let maps = std::fs::read_to_string(format!("{proc}/maps")).expect("the monitor has mappings");
    (open, maps.matches("memfd:civic-ram").count())
}

#[test]
fn a_reset_keeps_nothing_of_the_machine_before() {
    let mut vm = Setup::new(&resetting()).boot();
    vm.expect("spoilt\n");
    let first = held(&vm);
    for _ in 0..10 {
        vm.send(b"k");
        vm.expect("spoilt\n");
    }
    assert_eq!(held(&vm), first);
    vm.kill();
    assert!(vm.ended().success());
}

#[test]
fn any_cpu_may_reset_the_machine_while_others_work() {
    let kernel = pvh(|asm| {
        let mut others = asm.create_label();
        asm.start_others(others)?;
        asm.print("boot\n")?;
        // CPU 0 keeps the bus busy; CPU 3 resets, the rest spin.
        let mut busy = asm.create_label();
        asm.set_label(&mut busy)?;
        asm.in8(COM1 + 7)?;
        asm.jmp(busy)?;
        asm.set_label(&mut others)?;
        let mut rest = asm.create_label();
        asm.cmp(ebx, 3)?;
        asm.jne(rest)?;
        asm.read_key()?;
        asm.out8(0xcf9, 6)?;
        asm.set_label(&mut rest)?;
        asm.pause()?;
        asm.jmp(rest)
    });
    let mut vm = Setup::new(&kernel).cpus(4).boot();
    for boot in 1..6 {
        vm.expect("boot\n");
        assert_eq!(vm.info().boots, boot);
        vm.send(b"x");
    }
    vm.kill();
    assert!(vm.ended().success());
}

fn signal(vm: &Vm, signal: Signal) {
    kill(Pid::from_raw(vm.pid() as i32), signal).expect("the monitor can be signalled");
}

#[test]
fn a_termination_signal_presses_the_button() {
    let mut vm = Setup::new(&listener()).boot();
    vm.expect("listening\n");
    // A terminal that hangs up is no reason to end.
    signal(&vm, Signal::SIGHUP);
    signal(&vm, Signal::SIGTERM);
    assert_eq!(vm.value("status"), 1 << 8);
    vm.expect("interrupts");
    assert_eq!(vm.state(), VmState::Stopping);
    vm.send(b"x");
    assert_eq!(vm.ended().code(), Some(0));
}

#[test]
fn a_second_signal_ends_a_guest_that_does_not_listen() {
    let kernel = pvh(|asm| asm.spin());
    let mut vm = Setup::new(&kernel).boot();
    signal(&vm, Signal::SIGTERM);
    vm.until("the button to be pressed", |vm| vm.state() == VmState::Stopping);
    signal(&vm, Signal::SIGINT);
    assert_eq!(vm.ended().code(), Some(0));
    // One that has not been started knows no button.
    let mut vm = Setup::new(&kernel).launch();
    signal(&vm, Signal::SIGTERM);
    assert_eq!(vm.ended().code(), Some(0));
}

#[test]
fn a_guest_that_cannot_go_on_ends_badly_and_leaves_its_logs() {
    // Code cannot be fetched where no memory is: KVM gives up.
    let kernel = pvh(|asm| {
        asm.print("jumping\n")?;
        asm.mov(eax, 0xd000_0000u32)?;
        asm.jmp(eax)
    });
    let mut vm = Setup::new(&kernel).boot();
    vm.expect("jumping\n");
    let (status, left) = vm.ended_badly();
    assert_eq!(status.code(), Some(1));
    assert!(left.iter().all(|name| name.ends_with(".log") || name == LOG_FILE), "{left:?}");
    let serial = fs::read_to_string(vm.dir().join("serial.log")).expect("the console's log stays");
    assert_eq!(serial, "jumping\n");
    // The name is free again.
    let mut next = vm.again();
    next.expect("jumping\n");
    next.ended_badly();
}

#[test]
fn two_monitors_share_a_run_directory() {
    let kernel = pvh(|asm| {
        asm.print("up\n")?;
        asm.spin()
    });
    let mut first = Setup::new(&kernel).boot();
    let run_dir = first.dir().parent().expect("a VM's directory has a parent").to_owned();
    let mut second = Setup::new(&kernel).run_dir(run_dir).name("other").boot();
    first.expect("up\n");
    second.expect("up\n");
    first.kill();
    assert!(first.ended().success());
    assert_eq!(second.state(), VmState::Running);
    second.kill();
    assert!(second.ended().success());
}

#[test]
fn what_a_killed_monitor_leaves_of_its_vsock_is_replaced_and_what_a_live_one_has_is_not() {
    let kernel = pvh(|asm| {
        asm.print("up\n")?;
        asm.spin()
    });
    let place = tempfile::tempdir().expect("a directory");
    let uds = place.path().join("vsock");
    let with_vsock = |name: &str| {
        let mut setup = Setup::new(&kernel).name(name).beside(place.path());
        setup.config.vsock = Some(VsockConfig { uds: uds.clone(), cid: None });
        setup
    };
    let mut vm = with_vsock("first").boot();
    vm.expect("up\n");
    let refused = with_vsock("second").refused();
    assert_eq!(refused.code, ErrorCode::SocketUnavailable, "{refused:?}");
    assert!(refused.message.contains(&format!("{} is in use", uds.display())), "{refused:?}");
    signal(&vm, Signal::SIGKILL);
    assert!(!vm.ended_badly().0.success());
    assert!(UnixStream::connect(&uds).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused));

    let mut vm = vm.again();
    vm.expect("up\n");
    UnixStream::connect(&uds).expect("its socket is a new one");
    vm.kill();
    assert!(vm.ended().success());
    assert_eq!(fs::read_dir(place.path()).expect("the directory").count(), 0);
}
