//! Save and restore: a guest goes on in another process, and what is not whole is refused.

use std::fs;
use std::os::unix::fs::FileExt;

use civic_api::{AfterSave, ErrorCode, SaveRequest, VmState};
use civic_tests::bare::program::{DATA, pvh};
use civic_tests::bare::vm::{Setup, Vm};
use iced_x86::code_asm::*;

use crate::interrupts::echo;
use crate::pausing::{LINE_LEN, hammer};

/// All that is still to come from a monitor that ends by itself.
fn ended_well(vm: &mut Vm) {
    assert!(vm.ended().success());
    assert!(!vm.dir().exists(), "the VM's directory is left behind");
}

#[test]
fn a_saved_guest_goes_on_with_the_very_next_value() {
    let mut vm = Setup::new(&hammer()).cpus(4).boot();
    let mut text = Vec::new();
    for round in 0..5 {
        let name = format!("saved{round}");
        vm.until("output", |vm| vm.printed() > 20 * LINE_LEN);
        vm.pause();
        let (printed, run) = (vm.counter("serial", "output_bytes") as usize, vm.info().run_ms);
        let report = vm.save(&name, AfterSave::Stop);
        assert!(report.memory_bytes_written > 0 && report.state_bytes > 4096, "{report:?}");
        vm.until("the last output", |vm| vm.printed() == printed);
        ended_well(&mut vm);
        text.extend(vm.take(printed));
        vm = vm.restored(&name);
        let info = vm.info();
        assert_eq!((info.state, info.boots, info.run_ms), (VmState::Created, 1, run));
        vm.start();
        // The counters are this process's own.
        let all_run = |vm: &Vm| vm.info().vcpus.iter().all(|vcpu| vcpu.exits.values().sum::<u64>() > 20);
        vm.until("progress of every CPU", all_run);
    }
    text.extend(vm.take(20 * LINE_LEN));
    for (number, line) in text.chunks_exact(LINE_LEN).enumerate() {
        assert_eq!(line.escape_ascii().to_string(), format!("{number:08x}\\n"));
    }
    vm.kill();
    ended_well(&mut vm);
}

const LAST: u32 = DATA + 0x300;
const TURN: u32 = DATA + 0x340;

/// Two CPUs read the time stamp counter in turns: each value must not be below the one that the other read before. 'T' every 512
/// turns, '!' when time went back.
fn clockwork() -> Vec<u8> {
    pvh(|asm| {
        let (mut other, mut both, mut wait, mut back, mut quiet) =
            (asm.create_label(), asm.create_label(), asm.create_label(), asm.create_label(), asm.create_label());
        asm.start_others(other)?;
        asm.xor(ebx, ebx)?;
        asm.jmp(both)?;
        asm.set_label(&mut other)?;
        asm.mov(ebx, 1)?;
        asm.set_label(&mut both)?;
        asm.xor(ebp, ebp)?;
        asm.set_label(&mut wait)?;
        asm.pause()?;
        asm.mov(ecx, TURN)?;
        asm.mov(eax, dword_ptr(ecx))?;
        asm.and(eax, 1)?;
        asm.cmp(eax, ebx)?;
        asm.jne(wait)?;
        asm.mfence()?;
        asm.rdtsc()?;
        asm.mov(ecx, LAST)?;
        asm.mov(esi, eax)?;
        asm.mov(edi, edx)?;
        asm.sub(esi, dword_ptr(ecx))?;
        asm.sbb(edi, dword_ptr(ecx + 4))?;
        asm.js(back)?;
        asm.mov(dword_ptr(ecx), eax)?;
        asm.mov(dword_ptr(ecx + 4), edx)?;
        asm.mov(ecx, TURN)?;
        asm.lock().inc(dword_ptr(ecx))?;
        asm.inc(ebp)?;
        asm.test(ebp, 0x1ff)?;
        asm.jne(wait)?;
        asm.test(ebx, ebx)?;
        asm.jne(wait)?;
        asm.mov(eax, u32::from(b'T'))?;
        asm.print_al()?;
        asm.jmp(wait)?;
        asm.set_label(&mut back)?;
        asm.mov(eax, u32::from(b'!'))?;
        asm.print_al()?;
        asm.set_label(&mut quiet)?;
        asm.hlt()?;
        asm.jmp(quiet)
    })
}

#[test]
fn time_does_not_go_back_on_any_cpu() {
    let mut vm = Setup::new(&clockwork()).cpus(2).boot();
    for round in 0..4 {
        let name = format!("saved{round}");
        let printed = vm.printed();
        vm.until("turns", |vm| vm.printed() >= printed + 3);
        vm.save(&name, AfterSave::Stop);
        ended_well(&mut vm);
        let all = vm.printed();
        assert!(vm.take(all).iter().all(|&b| b == b'T'), "time went back before round {round}");
        vm = vm.restored(&name);
        vm.start();
    }
    vm.until("turns", |vm| vm.printed() >= 5);
    let all = vm.printed();
    assert!(vm.take(all).iter().all(|&b| b == b'T'), "time went back");
    vm.kill();
    ended_well(&mut vm);
}

#[test]
fn what_is_typed_before_and_after_arrives() {
    for interrupts in [false, true] {
        let mut vm = Setup::new(&echo(interrupts)).boot();
        vm.expect("ready\n");
        for (round, key) in b"civic".iter().enumerate() {
            let name = format!("saved{round}");
            vm.pause();
            let before = vm.counter("serial", "input_bytes");
            vm.send(&[*key]);
            vm.until("the key to reach the port", |vm| vm.counter("serial", "input_bytes") == before + 1);
            // It lies in the FIFO, its interrupt raised and not taken.
            vm.save(&name, AfterSave::Stop);
            ended_well(&mut vm);
            vm = vm.restored(&name);
            vm.start();
            assert_eq!(vm.take(1), [*key]);
            vm.send(b"+");
            assert_eq!(vm.take(1), *b"+");
        }
        vm.kill();
        ended_well(&mut vm);
    }
}

#[test]
fn a_vm_that_was_saved_can_go_on_or_stay() {
    let mut vm = Setup::new(&echo(false)).boot();
    vm.expect("ready\n");
    vm.save("first", AfterSave::Resume);
    assert_eq!(vm.state(), VmState::Running);
    vm.send(b"a");
    assert_eq!(vm.take(1), *b"a");
    vm.save("second", AfterSave::Pause);
    assert_eq!(vm.state(), VmState::Paused);
    vm.resume();
    vm.send(b"b");
    assert_eq!(vm.take(1), *b"b");
    // Both may still be restored, each as often as one likes.
    vm.kill();
    ended_well(&mut vm);
    for name in ["first", "second", "first"] {
        let mut again = vm.restored(name);
        again.start();
        again.send(b"c");
        assert_eq!(again.take(1), *b"c");
        again.kill();
        ended_well(&mut again);
    }
}

#[test]
fn a_restored_guest_reboots() {
    let kernel = pvh(|asm| {
        asm.print("boot\n")?;
        asm.read_key()?;
        asm.out8(0xcf9, 6)?;
        asm.spin()
    });
    let mut vm = Setup::new(&kernel).boot();
    vm.expect("boot\n");
    vm.save("saved", AfterSave::Stop);
    ended_well(&mut vm);
    let mut vm = vm.restored("saved");
    vm.start();
    assert_eq!(vm.info().boots, 1);
    vm.send(b"x");
    vm.expect("boot\n");
    assert_eq!(vm.info().boots, 2);
    vm.kill();
    ended_well(&mut vm);
}

#[test]
fn a_save_that_cannot_be_leaves_the_vm_as_it_was() {
    let mut vm = Setup::new(&echo(false)).launch();
    let refused = |vm: &Vm, name: &str| {
        let error = vm.try_save(name, AfterSave::Stop).unwrap_err();
        error.refusal().unwrap_or_else(|| vm.fail(&format!("{error}"))).clone()
    };
    assert_eq!(refused(&vm, "new").code, ErrorCode::WrongState);
    vm.start();
    vm.expect("ready\n");
    let taken = vm.setup().root().join("taken");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("mine"), "hands off").unwrap();
    for (name, code) in [
        ("taken", ErrorCode::SaveFailed),
        ("taken/mine", ErrorCode::SaveFailed),
        ("no/such/place", ErrorCode::SaveFailed),
    ] {
        let error = refused(&vm, name);
        assert_eq!(error.code, code, "{error:?}");
        assert_eq!(vm.state(), VmState::Running);
    }
    assert_eq!(fs::read_to_string(taken.join("mine")).unwrap(), "hands off");
    assert!(!vm.setup().root().join("new").exists());
    vm.send(b"a");
    assert_eq!(vm.take(1), *b"a");
    vm.kill();
    ended_well(&mut vm);
}

#[test]
fn a_saved_vm_that_is_not_whole_is_refused() {
    let mut vm = Setup::new(&echo(false)).disk("root", 1 << 20).boot();
    vm.expect("ready\n");
    vm.save("saved", AfterSave::Stop);
    ended_well(&mut vm);
    let setup = vm.setup();
    let (dir, text) = (setup.root().join("saved"), setup.restoring("saved"));
    let refused = |what: &str| {
        let error = setup.refused_with(&text);
        assert_eq!(error.code, ErrorCode::StateInvalid, "{what}: {error:?}");
        error.message
    };
    for name in ["state", "memory.index", "memory"] {
        let path = dir.join(name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        refused(&format!("{name} cut short"));
        fs::remove_file(&path).unwrap();
        refused(&format!("{name} missing"));
        fs::write(&path, &whole).unwrap();
    }
    for (name, at) in [("state", 8), ("state", 100), ("memory.index", 40)] {
        let file = fs::File::options().read(true).write(true).open(dir.join(name)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        let message = refused(&format!("{name} altered at {at}"));
        assert!((name, at) != ("state", 8) || message.contains("format"), "{message}");
        file.write_all_at(&byte, at).unwrap();
    }
    let unknown = text.replace('}', r#","disks":[{"id":"other","path":"/x"}]}"#);
    assert_eq!(setup.refused_with(&unknown).code, ErrorCode::InvalidConfig);
    // The disk went on without the guest.
    let disk = &setup.config.disks[0].path;
    let before = fs::read(disk).unwrap();
    fs::write(disk, &before).unwrap();
    let message = refused("a disk that was written to");
    assert!(message.contains("root"), "{message}");
    fs::write(disk, &before[..512]).unwrap();
    let message = setup.refused_with(&text.replace('}', r#","allow_changed_disks":true}"#)).message;
    assert!(message.contains("size"), "{message}");
}

/// Memory that was altered is noticed when it is loaded, and ends the VM before anything can come of it.
#[test]
fn altered_memory_ends_the_vm_with_a_reason() {
    let mut vm = Setup::new(&echo(false)).boot();
    vm.expect("ready\n");
    vm.save("saved", AfterSave::Stop);
    ended_well(&mut vm);
    let memory = vm.setup().root().join("saved/memory");
    let file = fs::File::options().write(true).open(&memory).unwrap();
    // Where there is something: a hole has no checksum, and is read as zero whatever was put there.
    let at = fs::read(&memory).unwrap().iter().rposition(|&byte| byte != 0).unwrap() as u64;
    file.write_all_at(&[0], at).unwrap();
    // Found even before the guest would have run.
    let (status, log) = vm.setup().dies(&vm.setup().restoring("saved"));
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("memory is damaged"), "{log}");
}

#[test]
fn a_vm_killed_while_it_is_saved_is_gone_and_so_is_the_save() {
    // Memory that takes a while to write.
    let kernel = pvh(|asm| {
        let mut page = asm.create_label();
        asm.mov(eax, 0x100_0000)?;
        asm.set_label(&mut page)?;
        asm.mov(dword_ptr(eax), eax)?;
        asm.add(eax, 0x1000)?;
        asm.cmp(eax, 0x3000_0000)?;
        asm.jne(page)?;
        asm.print("ready\n")?;
        asm.spin()
    });
    let mut vm = Setup::new(&kernel).memory(1 << 30).boot();
    vm.expect("ready\n");
    let directory = vm.setup().root().join("saved");
    let request = SaveRequest { directory: directory.clone(), then: AfterSave::Resume };
    let (saved, refused, killed) = vm.api(|client| race::save_and_kill(client, request));
    assert!(saved.is_err(), "{saved:?}");
    assert!(refused.is_err() && killed.is_ok(), "{refused:?}, {killed:?}");
    ended_well(&mut vm);
    assert!(!directory.exists());
}

mod race {
    use civic_api::client::{Client, ClientError};
    use civic_api::{SaveReport, SaveRequest};

    type Outcome = (Result<SaveReport, ClientError>, Result<(), ClientError>, Result<(), ClientError>);

    /// Saves, and once that is under way tries to resume the VM, then kills it.
    pub async fn save_and_kill(client: Client, request: SaveRequest) -> Outcome {
        let kill = async {
            while client.info().await.is_ok_and(|info| info.saving.is_none()) {
                tokio::task::yield_now().await;
            }
            (client.resume().await, client.kill().await)
        };
        let (saved, (refused, killed)) = tokio::join!(client.save(&request), kill);
        (saved, refused, killed)
    }
}
