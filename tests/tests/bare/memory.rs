//! Sizes of memory, its holes, and the map that the guest is given.

use std::fs;

use civic_tests::bare::program::{Asm, linux64, pvh};
use civic_tests::bare::vm::{Setup, Vm};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// 64-bit code: EAX := the word at any mapped address.
fn far_peek(asm: &mut Asm, address: u64) -> Result<(), IcedError> {
    asm.mov(rdx, address)?;
    asm.mov(eax, dword_ptr(rdx))
}

fn far_poke(asm: &mut Asm, address: u64, value: u32) -> Result<(), IcedError> {
    asm.mov(rdx, address)?;
    asm.mov(dword_ptr(rdx), value)
}

#[test]
fn the_most_memory_is_there_to_its_last_page_and_costs_nothing_untouched() {
    // 3 GiB below the hole, 61 above.
    let size = 64 * GIB;
    let end = 4 * GIB + size - 3 * GIB;
    let places = [0x50_0000, 3 * GIB - 4096, 4 * GIB, 4 * GIB + 0x50_0000, end - 4096, end - 4];
    let kernel = linux64(|asm| {
        asm.map(4 * GIB, 0)?;
        asm.map(end - GIB, 1)?;
        asm.map(end, 2)?;
        for place in places {
            far_peek(asm, place)?;
            asm.print_value("fresh")?;
        }
        for (index, place) in places.into_iter().enumerate() {
            far_poke(asm, place, 0xa5a5_0000 + index as u32)?;
        }
        for place in places {
            far_peek(asm, place)?;
            asm.print_value("kept")?;
        }
        for hole in [3 * GIB, end, end + GIB - 4] {
            far_poke(asm, hole, 0)?;
            far_peek(asm, hole)?;
            asm.print_value("hole")?;
        }
        asm.read_key()?;
        asm.power_off()
    });
    let mut setup = Setup::new(&kernel).memory(size);
    setup.config.overcommit = true;
    let mut vm = setup.boot();
    for place in places {
        assert_eq!(vm.value("fresh"), 0, "at {place:#x}");
    }
    for (index, place) in places.into_iter().enumerate() {
        assert_eq!(vm.value("kept"), 0xa5a5_0000 + index as u32, "at {place:#x}");
    }
    for _ in 0..3 {
        assert_eq!(vm.value("hole"), !0);
    }
    assert_eq!(vm.info().memory_bytes, size);
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).expect("the monitor has a status");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it says what is resident");
    let kib: u64 = resident.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(kib < 256 << 10, "{kib} KiB are resident");
    vm.send(b"x");
    assert!(vm.ended().success());
}

#[test]
fn the_least_memory_ends_where_it_should() {
    let size = 16 * MIB;
    let kernel = pvh(|asm| {
        asm.poke(size as u32 - 4, 0x1234_5678)?;
        asm.peek(size as u32 - 4)?;
        asm.print_value("last")?;
        for hole in [size as u32, 0x8000_0000, 0xbfff_fffc, 0xc000_0000, 0xdfff_fffc, 0xe010_0000, 0xfebf_fffc] {
            asm.poke(hole, 0)?;
            asm.peek(hole)?;
            asm.print_value("hole")?;
        }
        // An access that begins in memory and ends outside.
        asm.poke(size as u32 - 4, 0x1234_5678)?;
        asm.peek(size as u32 - 2)?;
        asm.print_value("edge")?;
        asm.power_off()
    });
    let mut vm = Setup::new(&kernel).memory(size).boot();
    assert_eq!(vm.value("last"), 0x1234_5678);
    for _ in 0..7 {
        assert_eq!(vm.value("hole"), !0);
    }
    assert_eq!(vm.value("edge"), 0xffff_1234);
    assert!(vm.ended().success());
}

/// Prints the memory map as PVH gives it: start and length in halves, kind.
fn tell_map() -> Vec<u8> {
    pvh(|asm| {
        asm.peek_at_ebx(0)?;
        asm.print_value("magic")?;
        asm.peek_at_ebx(48)?;
        asm.print_value("entries")?;
        asm.peek_at_ebx(48)?;
        asm.mov(ebp, eax)?;
        asm.mov(ebx, dword_ptr(ebx + 40))?;
        let mut entry = asm.create_label();
        asm.set_label(&mut entry)?;
        for (field, name) in [(0, "start"), (4, "start"), (8, "length"), (12, "length"), (16, "kind")] {
            asm.peek_at_ebx(field)?;
            asm.print_value(name)?;
        }
        asm.add(ebx, 24)?;
        asm.dec(ebp)?;
        asm.jne(entry)?;
        asm.power_off()
    })
}

#[test]
fn the_memory_map_adds_up() {
    let word = |vm: &mut Vm, name| u64::from(vm.value(name)) | u64::from(vm.value(name)) << 32;
    for size in [16 * MIB, 2 * GIB, 3 * GIB, 5 * GIB] {
        let mut setup = Setup::new(&tell_map()).memory(size);
        setup.config.overcommit = true;
        let mut vm = setup.boot();
        assert_eq!(vm.value("magic"), 0x336e_c578);
        let mut usable = 0;
        let mut behind = 0;
        for _ in 0..vm.value("entries") {
            let (start, length) = (word(&mut vm, "start"), word(&mut vm, "length"));
            assert!(start >= behind, "{start:#x} is not behind {behind:#x}");
            behind = start + length;
            if vm.value("kind") == 1 {
                usable += length;
            }
        }
        // All but what is reserved for a BIOS between 639 KiB and 1 MiB.
        assert_eq!(usable, size - (MIB - 639 * 1024));
        assert!(vm.ended().success());
    }
}
