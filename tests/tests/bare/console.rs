//! The serial console loses no input, however the guest reads it.

use civic_tests::bare::program::{COM1, linux64, pvh};
use civic_tests::bare::vm::Setup;
use iced_x86::code_asm::*;

const VECTOR: u8 = 0x44;
const BYTES: usize = 256 << 10;

/// Bytes that follow no pattern: xorshift64.
fn random_bytes(mut seed: u64) -> Vec<u8> {
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 24) as u8
    };
    (0..BYTES).map(|_| next()).collect()
}

fn echoes_all(kernel: &[u8], seed: u64) {
    let mut vm = Setup::new(kernel).boot();
    vm.expect("ready\n");
    let bytes = random_bytes(seed);
    vm.send(&bytes);
    let echoed = vm.take(BYTES);
    let wrong = echoed.iter().zip(&bytes).position(|(got, sent)| got != sent);
    assert_eq!(wrong, None, "the first byte that came back wrong");
    assert_eq!(vm.counter("serial", "input_bytes"), BYTES as u64);
    assert_eq!(vm.counter("serial", "output_bytes"), (BYTES + "ready\n".len()) as u64);
    vm.kill();
    assert!(vm.ended().success());
}

#[test]
fn a_polling_guest_gets_every_byte() {
    let kernel = pvh(|asm| {
        asm.print("ready\n")?;
        let mut echo = asm.create_label();
        asm.set_label(&mut echo)?;
        asm.read_key()?;
        // EDX is the port still.
        asm.out(dx, al)?;
        asm.jmp(echo)
    });
    echoes_all(&kernel, 0x1234_5678_9abc_def1);
}

#[test]
fn an_interrupted_guest_gets_every_byte() {
    // As Linux does: at most so many bytes an interrupt, and then it looks at IIR again.
    let kernel = linux64(|asm| {
        asm.load_idt()?;
        asm.on_interrupt(VECTOR, |asm| {
            let (mut cause, mut next, mut done) = (asm.create_label(), asm.create_label(), asm.create_label());
            asm.set_label(&mut cause)?;
            asm.in8(COM1 + 2)?;
            asm.test(al, 1)?;
            asm.jne(done)?;
            asm.mov(ecx, 32)?;
            asm.set_label(&mut next)?;
            asm.in8(COM1 + 5)?;
            asm.test(al, 1)?;
            asm.je(cause)?;
            asm.in8(COM1)?;
            asm.out(dx, al)?;
            asm.dec(ecx)?;
            asm.jne(next)?;
            asm.jmp(cause)?;
            asm.set_label(&mut done)?;
            asm.end_of_interrupt()
        })?;
        asm.enable_lapic()?;
        asm.route_pin(4, VECTOR, false)?;
        // FIFOs on, then the interrupt.
        asm.out8(COM1 + 2, 7)?;
        asm.out8(COM1 + 1, 1)?;
        asm.print("ready\n")?;
        let mut sleep = asm.create_label();
        asm.set_label(&mut sleep)?;
        asm.sti()?;
        asm.hlt()?;
        asm.jmp(sleep)
    });
    echoes_all(&kernel, 0xfeed_beef_cafe_0001);
}
