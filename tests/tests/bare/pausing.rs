//! Pause and resume, at rest and under load; what is refused in which state.

use std::fs;
use std::time::Duration;

use civic_api::client::{Client, ClientError};
use civic_api::{ErrorCode, VmState};
use civic_tests::bare::program::{COM1, DATA, ECAM, pvh};
use civic_tests::bare::vm::{Setup, Vm};
use iced_x86::code_asm::*;

use crate::interrupts::echo;

const LINE: u32 = DATA + 0x100;
/// Characters of a printed number and its line feed.
pub const LINE_LEN: usize = 9;
const HOST_BRIDGE: i32 = 0x0008_1b36;

/// CPU 0 prints 00000000, 00000001, … in one string instruction each. The others hammer port I/O, MMIO and string input, each
/// on a register of its own that holds what is written; one that reads something else prints '!'.
pub fn hammer() -> Vec<u8> {
    pvh(|asm| {
        let mut others = asm.create_label();
        asm.cld()?;
        asm.start_others(others)?;
        asm.xor(ebx, ebx)?;
        let (mut number, mut digit, mut decimal) = (asm.create_label(), asm.create_label(), asm.create_label());
        asm.set_label(&mut number)?;
        asm.mov(ebp, ebx)?;
        asm.mov(edi, LINE)?;
        asm.mov(ecx, 8)?;
        asm.set_label(&mut digit)?;
        asm.rol(ebp, 4)?;
        asm.mov(eax, ebp)?;
        asm.and(eax, 0xf)?;
        asm.add(eax, i32::from(b'0'))?;
        asm.cmp(eax, i32::from(b'9'))?;
        asm.jbe(decimal)?;
        asm.add(eax, i32::from(b'a' - b'9' - 1))?;
        asm.set_label(&mut decimal)?;
        asm.stosb()?;
        asm.dec(ecx)?;
        asm.jne(digit)?;
        asm.mov(eax, u32::from(b'\n'))?;
        asm.stosb()?;
        asm.mov(esi, LINE)?;
        asm.mov(ecx, LINE_LEN as u32)?;
        asm.mov(edx, u32::from(COM1))?;
        asm.rep().outsb()?;
        asm.inc(ebx)?;
        asm.jmp(number)?;

        let (mut scratch, mut address, mut wrong) = (asm.create_label(), asm.create_label(), asm.create_label());
        asm.set_label(&mut others)?;
        asm.cmp(ebx, 1)?;
        asm.je(scratch)?;
        asm.cmp(ebx, 2)?;
        asm.je(address)?;
        // CPU 3: the host bridge's ids, a read that crosses into the next function, and a register of the bridge.
        let mut bridge = asm.create_label();
        asm.xor(ebp, ebp)?;
        asm.set_label(&mut bridge)?;
        asm.mov(edx, ECAM)?;
        asm.cmp(dword_ptr(edx), HOST_BRIDGE)?;
        asm.jne(wrong)?;
        asm.cmp(dword_ptr(edx + 0xffe), -1)?;
        asm.jne(wrong)?;
        asm.inc(ebp)?;
        asm.mov(eax, ebp)?;
        asm.mov(byte_ptr(edx + 0x3c), al)?;
        asm.cmp(byte_ptr(edx + 0x3c), al)?;
        asm.je(bridge)?;
        asm.jmp(wrong)?;

        // CPU 1: the UART's scratch register, read back by string input.
        asm.set_label(&mut scratch)?;
        asm.xor(ebp, ebp)?;
        let mut rounds = asm.create_label();
        asm.set_label(&mut rounds)?;
        asm.inc(ebp)?;
        asm.mov(eax, ebp)?;
        asm.out_al(COM1 + 7)?;
        asm.mov(edi, DATA + 0x200)?;
        asm.mov(ecx, 16)?;
        asm.rep().insb()?;
        asm.mov(edi, DATA + 0x200)?;
        asm.mov(ecx, 16)?;
        asm.repe().scasb()?;
        asm.je(rounds)?;
        asm.jmp(wrong)?;

        // CPU 2: the configuration address.
        asm.set_label(&mut address)?;
        asm.xor(ebp, ebp)?;
        asm.mov(edx, 0xcf8)?;
        let mut turns = asm.create_label();
        asm.set_label(&mut turns)?;
        asm.inc(ebp)?;
        asm.mov(eax, ebp)?;
        asm.out(dx, eax)?;
        asm.xor(eax, eax)?;
        asm.in_(eax, dx)?;
        asm.cmp(eax, ebp)?;
        asm.je(turns)?;

        asm.set_label(&mut wrong)?;
        asm.mov(eax, u32::from(b'!'))?;
        asm.print_al()?;
        let mut rest = asm.create_label();
        asm.set_label(&mut rest)?;
        asm.hlt()?;
        asm.jmp(rest)
    })
}

/// What a guest does while it is watched: bytes printed, exits of each vCPU.
fn activity(vm: &Vm) -> (u64, Vec<u64>) {
    let info = vm.info();
    let exits = info.vcpus.iter().map(|vcpu| vcpu.exits.values().sum()).collect();
    (vm.counter("serial", "output_bytes"), exits)
}

/// What each vCPU's thread is in, by `/proc/PID/task/TID/syscall`: `202 0x…`, the number and arguments of a system call that it waits
/// in, or `running`.
fn vcpu_calls(vm: &Vm) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", vm.pid())).expect("the monitor's threads");
    let tasks = tasks.map(|task| task.expect("a thread").path());
    // Device threads come and go meanwhile.
    let is_vcpu = |name: String| name.starts_with("vcpu");
    let vcpus = tasks.filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(is_vcpu));
    vcpus.map(|task| fs::read_to_string(task.join("syscall")).expect("what a vCPU's thread is in")).collect()
}

/// Whether each vCPU is out of the guest: its thread waits for another thread (futex(2)), not in `KVM_RUN`, whether that runs or the
/// guest's processor sleeps. One that was back in the guest between two looks has more exits.
fn all_wait_outside(vm: &Vm) -> bool {
    let calls = vcpu_calls(vm);
    assert_eq!(calls.len(), vm.info().vcpus.len(), "{calls:?}");
    calls.iter().all(|call| call.starts_with("202 "))
}

/// Pauses, and returns once every vCPU's thread has come to rest: it says that it parks just before it does.
fn pause_to_rest(vm: &Vm) {
    vm.pause();
    vm.until("all vCPUs to wait outside the guest", all_wait_outside);
}

/// Consumes what was printed, up to `len` bytes, and checks that it counts on from `next`.
fn check_sequence(vm: &mut Vm, len: usize, next: &mut u32) {
    let bytes = vm.take(len / LINE_LEN * LINE_LEN);
    for line in bytes.chunks(LINE_LEN) {
        let expected = format!("{next:08x}\n");
        assert_eq!(line.escape_ascii().to_string(), expected.escape_default().to_string());
        *next += 1;
    }
}

#[test]
fn a_paused_guest_holds_still_and_goes_on_with_the_very_next_value() {
    let mut vm = Setup::new(&hammer()).cpus(4).boot();
    let mut next = 0;
    for _ in 0..5 {
        vm.until("output", |vm| vm.printed() > (next as usize + 20) * LINE_LEN);
        pause_to_rest(&vm);
        assert_eq!(vm.state(), VmState::Paused);
        let before = activity(&vm);
        let run = vm.info().run_ms;
        // All that it printed is here in a moment; nothing follows.
        vm.until("the last output", |vm| vm.printed() as u64 == before.0);
        assert!(all_wait_outside(&vm), "{:?}", vcpu_calls(&vm));
        assert_eq!(activity(&vm), before);
        vm.resume();
        assert_eq!(vm.state(), VmState::Running);
        vm.until("more output", |vm| vm.printed() as u64 > before.0);
        assert!(vm.info().run_ms >= run);
        let printed = vm.printed();
        check_sequence(&mut vm, printed - next as usize * LINE_LEN, &mut next);
    }
    vm.kill();
    assert!(vm.ended().success());
}

#[test]
fn two_hundred_pauses_under_load_lose_and_repeat_nothing() {
    let mut vm = Setup::new(&hammer()).cpus(4).boot();
    vm.until("output", |vm| vm.printed() > 0);
    for round in 0..200 {
        vm.pause();
        if round % 8 == 0 {
            let before = activity(&vm);
            assert_eq!(activity(&vm), before);
        }
        vm.resume();
        // Vary where the next pause strikes.
        std::thread::sleep(Duration::from_micros(round * 37 % 2000));
    }
    // Each CPU has come on meanwhile.
    let before = activity(&vm).1;
    vm.until("progress of every CPU", |vm| activity(vm).1.iter().zip(&before).all(|(now, then)| now > &(then + 10)));
    vm.pause();
    let printed = vm.counter("serial", "output_bytes") as usize;
    let mut next = 0;
    check_sequence(&mut vm, printed, &mut next);
    assert!(next > 200, "only {next} lines in 200 rounds");
    vm.kill();
    assert!(vm.ended().success());
}

#[test]
fn sleeping_and_waiting_cpus_can_be_paused() {
    // One sleeps for ever, fifteen wait for a start-up interrupt that never comes.
    let kernel = pvh(|asm| {
        asm.print("sleeping\n")?;
        let mut sleep = asm.create_label();
        asm.set_label(&mut sleep)?;
        asm.hlt()?;
        asm.jmp(sleep)
    });
    let mut vm = Setup::new(&kernel).cpus(16).boot();
    vm.expect("sleeping\n");
    for _ in 0..10 {
        vm.pause();
        assert_eq!(vm.state(), VmState::Paused);
        vm.resume();
    }
    vm.kill();
    assert!(vm.ended().success());
}

#[test]
fn what_is_typed_while_it_is_paused_wakes_it_on_resume() {
    let mut vm = Setup::new(&echo(false)).boot();
    vm.expect("ready\n");
    for key in *b"civic" {
        pause_to_rest(&vm);
        let (before, activity_before) = (vm.counter("serial", "input_bytes"), activity(&vm));
        vm.send(&[key]);
        vm.until("the key to reach the port", |vm| vm.counter("serial", "input_bytes") == before + 1);
        // The port interrupts before it counts: had anybody been in the guest to hear it, that thread would be awake now.
        assert!(all_wait_outside(&vm), "{:?}", vcpu_calls(&vm));
        assert_eq!(activity(&vm), activity_before);
        vm.resume();
        assert_eq!(vm.take(1), [key]);
    }
    vm.kill();
    assert!(vm.ended().success());
}

#[test]
fn pauses_and_resets_do_not_lose_each_other() {
    let kernel = pvh(|asm| {
        let mut others = asm.create_label();
        asm.start_others(others)?;
        asm.print("boot\n")?;
        asm.out8(0xcf9, 6)?;
        asm.set_label(&mut others)?;
        asm.pause()?;
        asm.jmp(others)
    });
    let mut vm = Setup::new(&kernel).cpus(2).boot();
    for round in 0..60 {
        std::thread::sleep(Duration::from_micros(round * 311 % 10_000));
        vm.pause();
        assert_eq!(vm.state(), VmState::Paused);
        // A reset that came first makes the next machine meanwhile, which waits. Commands and resets come through one channel: what
        // the guest did before it was paused is done when another command is answered, and then nothing more comes.
        let boots = vm.info().boots;
        let behind = || {
            let refused = vm.api(|client| async move { client.pause().await });
            let code = refused.as_ref().err().and_then(ClientError::refusal).map(|refusal| refusal.code);
            assert_eq!(code, Some(ErrorCode::WrongState), "{refused:?}");
            vm.info()
        };
        let info = behind();
        assert!(info.state == VmState::Paused && info.boots - boots <= 1, "{boots} boots before {info:?}");
        assert_eq!((behind().state, behind().boots), (VmState::Paused, info.boots));
        vm.resume();
    }
    let boots = vm.info().boots;
    vm.until("another boot", |vm| vm.info().boots > boots + 3);
    for _ in 0..10 {
        vm.expect("boot\n");
    }
    vm.kill();
    assert!(vm.ended().success());
}

#[test]
fn what_does_not_fit_the_state_is_refused_with_a_way_out() {
    async fn all(client: Client, commands: &[&str]) -> Vec<Result<(), ClientError>> {
        let mut answers = Vec::new();
        for command in commands {
            answers.push(match *command {
                "start" => client.start().await,
                "pause" => client.pause().await,
                "resume" => client.resume().await,
                _ => client.stop().await,
            });
        }
        answers
    }
    let refuses = |vm: &Vm, state: VmState, commands: &'static [&'static str]| {
        assert_eq!(vm.state(), state);
        for (answer, command) in vm.api(|client| all(client, commands)).iter().zip(commands) {
            let refusal = answer.as_ref().err().and_then(ClientError::refusal);
            let refusal = refusal.unwrap_or_else(|| vm.fail(&format!("{command} while {state}: {answer:?}")));
            assert_eq!(refusal.code, ErrorCode::WrongState, "{command} while {state}");
            assert!(refusal.message.contains(command) && refusal.message.contains(state.as_str()), "{refusal:?}");
            assert!(refusal.hint.is_some(), "{refusal:?}");
        }
        assert_eq!(vm.state(), state);
    };
    let kernel = pvh(|asm| asm.spin());
    let mut vm = Setup::new(&kernel).launch();
    refuses(&vm, VmState::Created, &["pause", "resume", "stop"]);
    assert_eq!(vm.info().boots, 0);
    vm.start();
    assert_eq!(vm.info().boots, 1);
    refuses(&vm, VmState::Running, &["start", "resume"]);
    vm.pause();
    refuses(&vm, VmState::Paused, &["start", "pause", "stop"]);
    vm.resume();
    // A guest that does not listen goes on stopping; it may be paused, and the button pressed again.
    vm.stop();
    refuses(&vm, VmState::Stopping, &["start", "resume"]);
    vm.stop();
    vm.pause();
    refuses(&vm, VmState::Paused, &["start", "pause", "stop"]);
    vm.kill();
    assert!(vm.ended().success());
}

#[test]
fn kill_ends_a_guest_in_any_state() {
    let kernel = pvh(|asm| asm.spin());
    let created = Setup::new(&kernel).launch();
    let running = Setup::new(&kernel).boot();
    let paused = Setup::new(&kernel).boot();
    paused.pause();
    for mut vm in [created, running, paused] {
        vm.kill();
        assert_eq!(vm.ended().code(), Some(0));
    }
}
