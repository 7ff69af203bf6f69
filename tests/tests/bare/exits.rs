//! Port I/O, string I/O and MMIO exits, and their counters.

use civic_tests::bare::program::{Asm, COM1, DATA, ECAM, linux64, pvh};
use civic_tests::bare::vm::Setup;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Decoded by nobody: a port, and an address in the window for BARs.
const NO_PORT: u16 = 0x5f0;
const NO_DEVICE: u32 = 0xd000_0000;
/// The host bridge's ids, device first.
const HOST_BRIDGE: u32 = 0x0008_1b36;

#[test]
fn both_boot_protocols_reach_the_serial_port() {
    let hello = |asm: &mut Asm| {
        asm.print("hello\n")?;
        asm.mov(eax, 0xdead_beefu32)?;
        asm.print_value("eax")?;
        asm.power_off()
    };
    for kernel in [linux64(hello), pvh(hello)] {
        let mut vm = Setup::new(&kernel).boot();
        vm.expect("hello\n");
        assert_eq!(vm.value("eax"), 0xdead_beef);
        assert!(vm.ended().success());
    }
}

/// Counts what it does to nobody: 4 ports and 6 addresses.
fn accesses(asm: &mut Asm) -> Result<(), IcedError> {
    // A register that holds what is written, and what floats.
    asm.out8(COM1 + 7, 0x5a)?;
    asm.in8(COM1 + 7)?;
    asm.print_value("scratch")?;
    asm.mov(edx, u32::from(NO_PORT))?;
    asm.out(dx, eax)?;
    for width in [1, 2, 4] {
        asm.xor(eax, eax)?;
        match width {
            1 => asm.in_(al, dx)?,
            2 => asm.in_(ax, dx)?,
            _ => asm.in_(eax, dx)?,
        }
        asm.print_value("float")?;
        asm.mov(edx, u32::from(NO_PORT))?;
    }
    // String I/O: 8 bytes in from the scratch register, then out to the wire.
    asm.cld()?;
    asm.mov(edi, DATA)?;
    asm.mov(edx, u32::from(COM1 + 7))?;
    asm.mov(ecx, 8)?;
    asm.rep().insb()?;
    asm.mov(esi, DATA)?;
    asm.mov(edx, u32::from(COM1))?;
    asm.mov(ecx, 8)?;
    asm.rep().outsb()?;
    asm.mov(eax, esi)?;
    asm.sub(eax, DATA as i32)?;
    asm.print_value("moved")?;
    // More than a page of it, across a page's end.
    asm.mov(edi, DATA + 0x800)?;
    asm.mov(ecx, 0x1400)?;
    asm.mov(eax, u32::from(b'x'))?;
    asm.rep().stosb()?;
    asm.mov(esi, DATA + 0x800)?;
    asm.mov(ecx, 0x1400)?;
    asm.mov(edx, u32::from(COM1))?;
    asm.rep().outsb()?;
    asm.print("\n")?;
    // Configuration space, by both ways; the ids are read-only.
    asm.poke(ECAM, 0)?;
    asm.peek(ECAM)?;
    asm.print_value("bridge")?;
    asm.mov(edx, ECAM)?;
    asm.movzx(eax, word_ptr(edx + 2))?;
    asm.print_value("device")?;
    asm.mov(edx, ECAM)?;
    asm.movzx(eax, byte_ptr(edx + 1))?;
    asm.print_value("byte")?;
    asm.mov(edx, 0xcf8)?;
    asm.mov(eax, 0x8000_0000u32)?;
    asm.out(dx, eax)?;
    asm.mov(edx, 0xcfc)?;
    asm.in_(eax, dx)?;
    asm.print_value("ports")?;
    // Two functions' registers in one access, and a slot that is empty.
    asm.peek(ECAM + 0xffe)?;
    asm.print_value("crossing")?;
    asm.peek(ECAM + (31 << 15))?;
    asm.print_value("empty")?;
    // Nobody's.
    asm.poke(NO_DEVICE, 0)?;
    asm.peek(NO_DEVICE)?;
    asm.print_value("nobody")?;
    asm.mov(edx, NO_DEVICE)?;
    asm.movzx(eax, word_ptr(edx))?;
    asm.print_value("word")?;
    asm.mov(edx, NO_DEVICE)?;
    asm.movzx(eax, byte_ptr(edx))?;
    asm.print_value("byte")?;
    for beyond in [0xe010_0000, 0xfff0_0000] {
        asm.peek(beyond)?;
        asm.print_value("beyond")?;
    }
    asm.print("done\n")?;
    asm.spin()
}

#[test]
fn every_kind_of_access_finds_its_device_or_nobody() {
    for kernel in [linux64(accesses), pvh(accesses)] {
        let mut vm = Setup::new(&kernel).launch();
        for kind in ["io", "mmio", "unclaimed"] {
            assert_eq!(vm.exits(kind), 0, "{kind} before the start");
        }
        vm.start();
        assert_eq!(vm.value("scratch"), 0x5a);
        for ones in [0xff, 0xffff, 0xffff_ffff] {
            assert_eq!(vm.value("float"), ones);
        }
        assert_eq!(vm.take(8), b"ZZZZZZZZ");
        assert_eq!(vm.value("moved"), 8);
        assert_eq!(vm.take(0x1401), [vec![b'x'; 0x1400], b"\n".to_vec()].concat());
        assert_eq!(vm.value("bridge"), HOST_BRIDGE);
        assert_eq!(vm.value("device"), HOST_BRIDGE >> 16);
        assert_eq!(vm.value("byte"), HOST_BRIDGE >> 8 & 0xff);
        assert_eq!(vm.value("ports"), HOST_BRIDGE);
        assert_eq!(vm.value("crossing"), !0);
        assert_eq!(vm.value("empty"), !0);
        assert_eq!(vm.value("nobody"), !0);
        assert_eq!(vm.value("word"), 0xffff);
        assert_eq!(vm.value("byte"), 0xff);
        for _ in 0..2 {
            assert_eq!(vm.value("beyond"), !0);
        }
        vm.expect("done\n");
        assert_eq!(vm.exits("unclaimed"), 10);
        assert!(vm.exits("mmio") >= 13, "{:?}", vm.info().vcpus);
        assert!(vm.exits("io") >= 200, "{:?}", vm.info().vcpus);
        assert_eq!(vm.counter("serial", "output_bytes"), vm.printed() as u64);
        vm.kill();
        assert!(vm.ended().success());
    }
}
