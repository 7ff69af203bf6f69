//! Devices that come and go: a guest that does by hand what an operating system does by its ACPI tables.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use civic_api::client::ClientError;
use civic_api::{
    AfterSave, ConsoleConfig, DeviceInfo, DiskConfig, ErrorBody, ErrorCode, GuestAnswer, MAX_DEVICES, NewDevice,
    PluggedDevice, STORE_ID,
};
use civic_tests::bare::program::{Asm, COM1, DATA, ECAM, pvh};
use civic_tests::bare::vm::{Setup, Vm};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const GPE_ENABLE: u16 = 0x624;
const INSERTED: u32 = 0x640;
const WANTED: u32 = 0x644;
const EJECT: u32 = 0x648;
const ANSWER: u32 = 0x64c;

/// A guest that does not answer is waited for as long as this, where it is to be seen that it does not.
const SOON: Duration = Duration::from_millis(300);
/// Nobody has a driver: it is not waited for.
const NOW: Duration = Duration::ZERO;
const LONG: Duration = Duration::from_secs(30);

/// Tells what is in the slots, then what comes and goes. Keys: `r` resets, `k` has it keep what it is to give up, `s` has it be silent, `e`
/// gives up what is in slot 1 unasked. A deaf one does not know that it could hear.
fn operating(deaf: bool) -> Vec<u8> {
    pvh(|asm| {
        if !deaf {
            asm.out8(GPE_ENABLE, 2)?;
            // As while it handles one.
            asm.out8(GPE_ENABLE, 0)?;
        }
        scan(asm)?;
        asm.print("ready\n")?;
        let (mut turn, mut wanted, mut keys) = (asm.create_label(), asm.create_label(), asm.create_label());
        asm.set_label(&mut turn)?;
        asm.peek(DATA + 4)?;
        asm.test(eax, eax)?;
        asm.jne(keys)?;
        each(asm, INSERTED, wanted, |asm| {
            asm.mov(eax, ebx)?;
            asm.print_value("in")?;
            read_id(asm)?;
            asm.print_value("id")?;
            answer(asm, 1 << 8)
        })?;
        asm.set_label(&mut wanted)?;
        each(asm, WANTED, keys, |asm| {
            let (mut kept, mut done) = (asm.create_label(), asm.create_label());
            asm.peek(DATA)?;
            asm.test(eax, eax)?;
            asm.jne(kept)?;
            eject(asm)?;
            asm.mov(eax, ebx)?;
            asm.print_value("out")?;
            read_id(asm)?;
            asm.print_value("left")?;
            answer(asm, 3 << 8)?;
            asm.jmp(done)?;
            asm.set_label(&mut kept)?;
            asm.mov(eax, ebx)?;
            asm.print_value("kept")?;
            answer(asm, 3 << 8 | 1)?;
            asm.set_label(&mut done)?;
            asm.nop()
        })?;
        asm.set_label(&mut keys)?;
        asm.in8(COM1 + 5)?;
        asm.test(al, 1)?;
        asm.je(turn)?;
        asm.in8(COM1)?;
        asm.mov(ebp, eax)?;
        for (key, what) in [(b'r', 0), (b'k', 1), (b's', 2), (b'e', 3)] {
            let mut next = asm.create_label();
            asm.cmp(ebp, i32::from(key))?;
            asm.jne(next)?;
            match what {
                0 => asm.out8(0xcf9, 6)?,
                1 => asm.poke(DATA, 1)?,
                2 => asm.poke(DATA + 4, 1)?,
                _ => {
                    asm.mov(ebx, 1)?;
                    eject(asm)?;
                }
            }
            asm.print("done\n")?;
            asm.set_label(&mut next)?;
        }
        asm.jmp(turn)
    })
}

/// Prints which slots have something in them.
fn scan(asm: &mut Asm) -> Result<(), IcedError> {
    let (mut slot, mut empty) = (asm.create_label(), asm.create_label());
    asm.mov(ebx, 1)?;
    asm.set_label(&mut slot)?;
    read_id(asm)?;
    asm.cmp(eax, -1)?;
    asm.je(empty)?;
    asm.mov(eax, ebx)?;
    asm.print_value("at")?;
    asm.set_label(&mut empty)?;
    asm.inc(ebx)?;
    asm.cmp(ebx, 32)?;
    asm.jne(slot)
}

/// For each bit of the register, cleared first, with its number in EBX; goes to `none` afterwards.
fn each(
    asm: &mut Asm,
    register: u32,
    none: CodeLabel,
    work: impl FnOnce(&mut Asm) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut next = asm.create_label();
    asm.mov(edx, register)?;
    asm.in_(eax, dx)?;
    asm.out(dx, eax)?;
    asm.mov(ebp, eax)?;
    asm.set_label(&mut next)?;
    asm.bsf(ebx, ebp)?;
    asm.je(none)?;
    asm.btr(ebp, ebx)?;
    work(asm)?;
    asm.jmp(next)
}

/// EAX := vendor and device of what is in slot EBX.
fn read_id(asm: &mut Asm) -> Result<(), IcedError> {
    asm.mov(edx, ebx)?;
    asm.shl(edx, 15)?;
    asm.mov(eax, dword_ptr(edx + ECAM))
}

fn eject(asm: &mut Asm) -> Result<(), IcedError> {
    asm.mov(eax, 1)?;
    asm.mov(ecx, ebx)?;
    asm.shl(eax, cl)?;
    asm.mov(edx, EJECT)?;
    asm.out(dx, eax)
}

fn answer(asm: &mut Asm, what: u32) -> Result<(), IcedError> {
    asm.mov(eax, ebx)?;
    asm.shl(eax, 24)?;
    asm.or(eax, what as i32)?;
    asm.mov(edx, ANSWER)?;
    asm.out(dx, eax)
}

fn image(vm: &Vm, name: &str) -> PathBuf {
    let path = vm.setup().root().join(name);
    File::create(&path).and_then(|file| file.set_len(1 << 20)).expect("an image can be made");
    path
}

fn disk(vm: &Vm, id: &str) -> NewDevice {
    NewDevice::Disk(DiskConfig::new(id, image(vm, &format!("{id}.img"))))
}

fn plug(vm: &Vm, device: &NewDevice, wait: Duration) -> Result<PluggedDevice, ErrorBody> {
    told(vm, vm.api(|client| async move { client.plug(device, wait).await }))
}

fn unplug(vm: &Vm, id: &str, wait: Duration, force: bool) -> Result<(), ErrorBody> {
    told(vm, vm.api(|client| async move { client.unplug(id, wait, force).await }))
}

fn told<T>(vm: &Vm, result: Result<T, ClientError>) -> Result<T, ErrorBody> {
    result.map_err(|error| error.refusal().cloned().unwrap_or_else(|| vm.fail(&error.to_string())))
}

fn device(vm: &Vm, id: &str) -> Option<DeviceInfo> {
    vm.info().devices.into_iter().find(|device| device.id == id)
}

/// The slots that the guest has found something in, when it started.
fn found(vm: &mut Vm) -> Vec<u32> {
    let text = vm.expect("ready\n");
    let slots = text.lines().filter_map(|line| line.strip_prefix("at="));
    slots.map(|slot| u32::from_str_radix(slot, 16).expect("a number")).collect()
}

fn ready() -> Vm {
    let mut vm = Setup::new(&operating(false)).disk("root", 1 << 20).boot();
    // The disk, the entropy source and the console.
    assert_eq!(found(&mut vm), [1, 2, 3]);
    vm
}

fn descriptors(vm: &Vm) -> usize {
    fs::read_dir(format!("/proc/{}/fd", vm.pid())).expect("the monitor has descriptors").count()
}

fn threads(vm: &Vm) -> usize {
    fs::read_dir(format!("/proc/{}/task", vm.pid())).expect("the monitor has threads").count()
}

#[test]
fn each_kind_comes_and_goes_and_leaves_nothing() {
    let mut vm = ready();
    let mut open = None;
    for round in 0..20 {
        let console = NewDevice::Console(ConsoleConfig { id: "tools".into() });
        for (new, identity) in [(disk(&vm, "data"), 0x1042_1af4), (console, 0x1043_1af4)] {
            let plugged = plug(&vm, &new, NOW).unwrap();
            assert_eq!((plugged.address.as_str(), plugged.driver), ("0000:00:04.0", false));
            assert_eq!((vm.value("in"), vm.value("id")), (4, identity));
            vm.until("its answer", |vm| device(vm, new.id()).unwrap().guest == GuestAnswer::Done);
            assert_eq!(vm.info().consoles.contains(&"tools".to_owned()), new.id() == "tools");
            unplug(&vm, new.id(), LONG, false).unwrap();
            assert_eq!((vm.value("out"), vm.value("left")), (4, !0));
            assert_eq!(device(&vm, new.id()), None);
            assert!(vm.info().consoles.iter().all(|port| port != "tools"));
        }
        let now = (descriptors(&vm), threads(&vm));
        // The first rounds start what then stays, as the API's own threads.
        if round == 4 {
            open = Some(now);
        }
        if let Some(open) = open {
            vm.until("nothing to be left", |vm| (descriptors(vm), threads(vm)) <= open);
        }
    }
    // Its image is free again.
    let path = vm.setup().root().join("data.img");
    plug(&vm, &NewDevice::Disk(DiskConfig::new("other", &path)), NOW).unwrap();
    let e = plug(&vm, &NewDevice::Disk(DiskConfig::new("another", vm.setup().root().join("none"))), NOW).unwrap_err();
    assert_eq!(e.code, ErrorCode::ImageUnusable, "{e:?}");
}

#[test]
fn as_many_as_there_are_slots() {
    let mut vm = ready();
    let count = MAX_DEVICES - 1;
    for n in 0..count {
        plug(&vm, &disk(&vm, &format!("d{n}")), NOW).unwrap();
    }
    let mut slots: Vec<_> = (0..count).map(|_| vm.value("in")).collect();
    slots.sort_unstable();
    // Two more have no device that comes and goes: a vsock's and a balloon's, if there are any.
    assert_eq!(slots, (4..4 + count as u32).collect::<Vec<_>>());
    let e = plug(&vm, &disk(&vm, "more"), NOW).unwrap_err();
    assert_eq!(e.code, ErrorCode::InvalidConfig, "{e:?}");
    unplug(&vm, "d7", LONG, false).unwrap();
    assert_eq!(vm.value("out"), 11);
    assert_eq!(plug(&vm, &disk(&vm, "more"), NOW).unwrap().address, "0000:00:0b.0");
}

#[test]
fn they_stay_where_they_are_over_resets_saves_and_forks() {
    let mut vm = ready();
    for (id, slot) in [("a", 4), ("b", 5), ("c", 6)] {
        plug(&vm, &disk(&vm, id), NOW).unwrap();
        assert_eq!(vm.value("in"), slot);
    }
    unplug(&vm, "a", LONG, false).unwrap();
    assert_eq!(vm.value("out"), 4);
    vm.send(b"r");
    assert_eq!(found(&mut vm), [1, 2, 3, 5, 6]);
    assert_eq!(plug(&vm, &disk(&vm, "d"), NOW).unwrap().address, "0000:00:04.0");
    assert_eq!(vm.value("in"), 4);

    // One that waits since before the last device came.
    let waiting = vm.waiting("child");
    plug(&vm, &disk(&vm, "e"), NOW).unwrap();
    assert_eq!(vm.value("in"), 7);
    unplug(&vm, "c", LONG, false).unwrap();
    assert_eq!(vm.value("out"), 6);
    let (_, mut children) = vm.fork(vec![waiting], false);
    let child = &mut children[0];
    let places = |vm: &Vm| -> Vec<_> {
        let mut places: Vec<_> = vm.info().devices.into_iter().map(|device| (device.id, device.address)).collect();
        places.sort();
        places
    };
    assert_eq!(places(child), places(&vm));
    // In the child they come and go too, and the source has nothing of it.
    unplug(child, "e", LONG, false).unwrap();
    assert_eq!(child.value("out"), 7);
    assert!(device(&vm, "e").is_some());
    child.send(b"r");
    assert_eq!(found(child), [1, 2, 3, 4, 5]);
    child.kill();
    child.ended();

    let before = places(&vm);
    vm.save("saved", AfterSave::Stop);
    vm.ended();
    let mut vm = vm.restored("saved");
    vm.start();
    assert_eq!(places(&vm), before);
    unplug(&vm, "b", LONG, false).unwrap();
    assert_eq!(vm.value("out"), 5);
    vm.send(b"r");
    assert_eq!(found(&mut vm), [1, 2, 3, 4, 7]);
}

#[test]
fn a_child_has_devices_of_its_own_before_it_runs() {
    let mut vm = ready();
    let own = [disk(&vm, "store"), NewDevice::Console(ConsoleConfig { id: "tools".into() })];
    let waiting = vm.waiting_with("child", &own);
    let (_, mut children) = vm.fork(vec![waiting], false);
    let child = &mut children[0];
    assert_eq!((child.value("in"), child.value("id")), (4, 0x1042_1af4));
    assert_eq!((child.value("in"), child.value("id")), (5, 0x1043_1af4));
    assert!(device(&vm, "store").is_none() && vm.info().consoles.len() == 2);
    // Its image is the child's until that gives it up, or ends.
    let e = plug(&vm, &own[0], NOW).unwrap_err();
    assert_eq!(e.code, ErrorCode::ImageLocked, "{e:?}");
    child.kill();
    child.ended();
    plug(&vm, &own[0], NOW).unwrap();
    assert_eq!(vm.value("in"), 4);
    // A child's child has it as the child has it.
    let e = vm.refused_child("second", &[NewDevice::Disk(DiskConfig::new("root", "/x"))]);
    assert_eq!(e.code, ErrorCode::InvalidConfig, "{e:?}");
    let e = vm.refused_child("third", &own[..1]);
    assert!(matches!(e.code, ErrorCode::InvalidConfig | ErrorCode::ImageLocked), "{e:?}");
}

#[test]
fn a_store_is_one_childs_at_a_time_or_each_ones_with_an_overlay() {
    let mut vm = ready();
    let path = image(&vm, "store.img");
    let store = |overlay| [NewDevice::Disk(DiskConfig { overlay, ..DiskConfig::new(STORE_ID, &path) })];
    let waiting = vec![vm.waiting_with("first", &store(true)), vm.waiting_with("second", &store(true))];
    let e = vm.refused_child("third", &store(false));
    assert_eq!(e.code, ErrorCode::ImageLocked, "{e:?}");
    let (_, mut children) = vm.fork(waiting, false);
    for child in &mut children {
        assert_eq!((child.value("in"), child.value("id")), (4, 0x1042_1af4));
    }
    // A fork of one has what that has written, and an overlay over it.
    let (_, mut below) = children[0].fork(vec![children[0].waiting("below")], false);
    below[0].send(b"r");
    assert_eq!(found(&mut below[0]), [1, 2, 3, 4]);
    for mut child in below.into_iter().chain(children) {
        child.kill();
        child.ended();
    }
    let (_, mut children) = vm.fork(vec![vm.waiting_with("fourth", &store(false))], false);
    assert_eq!(children[0].value("in"), 4);
    let e = vm.refused_child("fifth", &store(true));
    assert_eq!(e.code, ErrorCode::ImageLocked, "{e:?}");
    children[0].kill();
    children[0].ended();
    // What would be lost is not saved.
    plug(&vm, &store(true)[0], NOW).unwrap();
    assert_eq!(vm.value("in"), 4);
    let e = told(&vm, vm.try_save("saved", AfterSave::Stop)).unwrap_err();
    assert!(e.code == ErrorCode::WrongState && e.message.contains("overlay"), "{e:?}");
    let e = plug(&vm, &NewDevice::Disk(DiskConfig::new("other", &path)), NOW).unwrap_err();
    assert_eq!(e.code, ErrorCode::InvalidConfig, "{e:?}");
    let again = DiskConfig { overlay: true, ..DiskConfig::new("other", &path) };
    plug(&vm, &NewDevice::Disk(again), NOW).unwrap();
}

#[test]
fn a_guest_that_does_not_do_as_it_is_asked_is_told_of() {
    let mut vm = ready();
    vm.send(b"k");
    vm.expect("done\n");
    // It keeps what it has, and says so.
    let e = unplug(&vm, "root", LONG, false).unwrap_err();
    assert_eq!((e.code, vm.value("kept")), (ErrorCode::WrongState, 1), "{e:?}");
    assert!(e.hint.unwrap().contains("--force") && device(&vm, "root").is_some());
    vm.send(b"s");
    vm.expect("done\n");
    let plugged = plug(&vm, &disk(&vm, "data"), SOON).unwrap();
    assert_eq!((plugged.guest, plugged.driver), (GuestAnswer::Silent, false));
    assert!(plugged.waited_us >= 300_000);
    let e = unplug(&vm, "data", SOON, false).unwrap_err();
    assert_eq!(e.code, ErrorCode::Timeout, "{e:?}");
    // By force it goes; its slot is free when the guest has noticed, or reset. What was asked to go is gone then.
    unplug(&vm, "root", NOW, true).unwrap();
    assert!(device(&vm, "root").is_none());
    vm.send(b"r");
    assert_eq!(found(&mut vm), [2, 3]);
    assert!(device(&vm, "data").is_none());
    assert_eq!(plug(&vm, &disk(&vm, "new"), NOW).unwrap().address, "0000:00:01.0");
}

#[test]
fn a_guest_that_cannot_listen_is_not_asked() {
    let mut vm = Setup::new(&operating(true)).disk("root", 1 << 20).boot();
    assert_eq!(found(&mut vm), [1, 2, 3]);
    for e in [
        plug(&vm, &disk(&vm, "more"), LONG).unwrap_err(),
        unplug(&vm, "root", LONG, false).unwrap_err(),
        vm.refused_child("child", &[disk(&vm, "own")]),
    ] {
        assert!(matches!(e.code, ErrorCode::WrongState | ErrorCode::ForkFailed), "{e:?}");
        assert!(e.message.contains("does not listen"), "{e:?}");
    }
    unplug(&vm, "root", NOW, true).unwrap();
    assert!(device(&vm, "root").is_none());
    vm.send(b"r");
    assert_eq!(found(&mut vm), [2, 3]);
}

#[test]
fn what_is_forced_away_is_noticed_and_its_slot_used_again() {
    let mut vm = ready();
    unplug(&vm, "root", NOW, true).unwrap();
    assert_eq!((vm.value("out"), vm.value("left")), (1, !0));
    assert_eq!(plug(&vm, &disk(&vm, "next"), NOW).unwrap().address, "0000:00:01.0");
    assert_eq!(vm.value("in"), 1);
    // Unasked.
    vm.send(b"e");
    vm.expect("done\n");
    vm.until("it to be gone", |vm| device(vm, "next").is_none());
    assert!(vm.log().contains("removed"));
    plug(&vm, &disk(&vm, "last"), NOW).unwrap();
    assert_eq!(vm.value("in"), 1);
}

#[test]
fn bad_requests_change_nothing() {
    let mut vm = ready();
    let root = vm.setup().root().join("root.img");
    let before = vm.info().devices;
    let new = |id: &str, path: &str| NewDevice::Disk(DiskConfig::new(id, path));
    for (device, code) in [
        (new("data", "/nonexistent"), ErrorCode::ImageUnusable),
        (new("root", "/x"), ErrorCode::InvalidConfig),
        (new("rng", "/x"), ErrorCode::InvalidConfig),
        (new("hvc0", "/x"), ErrorCode::InvalidConfig),
        (new("data", root.to_str().unwrap()), ErrorCode::InvalidConfig),
        (NewDevice::Console(ConsoleConfig { id: "ROOT".into() }), ErrorCode::InvalidConfig),
    ] {
        let e = plug(&vm, &device, NOW).unwrap_err();
        assert_eq!(e.code, code, "{device:?}: {e:?}");
    }
    for (id, code) in [("nobody", ErrorCode::NotFound), ("rng", ErrorCode::InvalidRequest)] {
        let e = unplug(&vm, id, NOW, false).unwrap_err();
        assert_eq!(e.code, code, "{id}: {e:?}");
    }
    let ids = |devices: &[DeviceInfo]| devices.iter().map(|device| device.id.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&vm.info().devices), ids(&before));
    // And all is well.
    plug(&vm, &disk(&vm, "data"), NOW).unwrap();
    assert_eq!(vm.value("in"), 4);
}

#[test]
fn before_the_start_and_while_it_is_paused() {
    let mut vm = Setup::new(&operating(false)).disk("root", 1 << 20).launch();
    plug(&vm, &disk(&vm, "cold"), LONG).unwrap();
    plug(&vm, &disk(&vm, "gone"), LONG).unwrap();
    unplug(&vm, "gone", LONG, false).unwrap();
    vm.start();
    assert_eq!(found(&mut vm), [1, 2, 3, 4]);
    vm.pause();
    let plugged = plug(&vm, &disk(&vm, "data"), LONG).unwrap();
    assert_eq!(plugged.guest, GuestAnswer::Silent);
    let e = unplug(&vm, "cold", SOON, false).unwrap_err();
    assert!(e.code == ErrorCode::Timeout && e.message.contains("paused"), "{e:?}");
    vm.resume();
    // It was paused anywhere: either may come first.
    vm.expect("in=00000005");
    vm.until("it to be gone", |vm| device(vm, "cold").is_none());
}

#[test]
fn devices_and_forks_do_not_lose_each_other() {
    let mut vm = ready();
    for round in 0..10 {
        let waiting = vm.waiting(&format!("child{round}"));
        let data = disk(&vm, "data");
        // Both at once, in either order.
        let socket = vm.socket();
        let other = std::thread::spawn(move || {
            let client = civic_api::client::Client::new(socket);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async { client.plug(&data, NOW).await }).expect("it can be plugged in");
        });
        let (_, mut children) = vm.fork(vec![waiting], false);
        other.join().expect("no panic");
        assert_eq!((vm.value("in"), vm.value("id")), (4, 0x1042_1af4));
        let child = &mut children[0];
        if device(child, "data").is_some() {
            unplug(child, "data", LONG, false).unwrap();
            child.expect("out=");
        }
        unplug(&vm, "data", LONG, false).unwrap();
        assert_eq!(vm.value("out"), 4);
        child.kill();
        child.ended();
    }
}
