//! A minimal driver for the entropy device: set-up, requests, MSI-X, and a BAR that the guest moves. Without disks and network cards
//! that is in the first slot.

use civic_tests::bare::program::{Asm, DATA, LAPIC, TABLES, linux64};
use civic_tests::bare::virtio::{
    AVAILABLE, DESCRIPTORS, FIRST_BAR as FIRST_BASE, FIRST_FUNCTION as FUNCTION, NOTIFY, USED, common, place_queue,
};
use civic_tests::bare::vm::Setup;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const VECTOR: u8 = 0x50;
const COUNT: u32 = DATA;
/// Where the function's MSI-X capability is: the first of all.
const MSIX_CONTROL: u32 = FUNCTION + 0x40;

const BUFFER: u32 = TABLES + 0x3000;
const LEN: u32 = 64;

const SECOND_BASE: u32 = 0xd123_8000;
/// In the window above 4 GiB, which guests with 39 address bits reach.
const HIGH_BASE: u64 = 0x41_2345_8000;
const ISR: u32 = 0x1000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PENDING: u32 = 0x5000;

/// Prints a byte of the BAR.
fn show_byte(asm: &mut Asm, name: &str, address: u32) -> Result<(), IcedError> {
    asm.mov(edx, address)?;
    asm.movzx(eax, byte_ptr(edx))?;
    asm.print_value(name)
}

/// Offers the buffer for the `n`th time, from 1, and kicks.
fn request(asm: &mut Asm, base: u32, n: u32) -> Result<(), IcedError> {
    asm.mov(edi, BUFFER)?;
    asm.xor(eax, eax)?;
    asm.mov(ecx, LEN)?;
    asm.rep().stosb()?;
    // Flags 0, then the index; descriptor 0 stands in every ring entry.
    asm.poke(AVAILABLE, n << 16)?;
    asm.mov(edx, base + NOTIFY)?;
    asm.xor(eax, eax)?;
    asm.mov(word_ptr(edx), ax)
}

/// Prints what the device has done.
fn outcome(asm: &mut Asm, n: u32) -> Result<(), IcedError> {
    asm.peek(USED)?;
    asm.shr(eax, 16)?;
    asm.print_value("used")?;
    asm.peek(USED + 8 * n)?;
    asm.print_value("length")?;
    // How many of the 16 words are not zero.
    asm.xor(ebx, ebx)?;
    asm.mov(esi, BUFFER)?;
    asm.mov(ecx, LEN / 4)?;
    let (mut word, mut zero) = (asm.create_label(), asm.create_label());
    asm.set_label(&mut word)?;
    asm.lodsd()?;
    asm.test(eax, eax)?;
    asm.je(zero)?;
    asm.inc(ebx)?;
    asm.set_label(&mut zero)?;
    asm.dec(ecx)?;
    asm.jne(word)?;
    asm.mov(eax, ebx)?;
    asm.print_value("filled")
}

fn driver() -> Vec<u8> {
    linux64(|asm| {
        asm.load_idt()?;
        asm.on_interrupt(VECTOR, |asm| {
            asm.mov(edx, COUNT)?;
            asm.inc(dword_ptr(edx))?;
            asm.end_of_interrupt()
        })?;
        asm.enable_lapic()?;
        asm.cld()?;
        asm.peek(FUNCTION)?;
        asm.print_value("id")?;
        asm.peek(FUNCTION + 0x10)?;
        asm.print_value("bar")?;
        asm.peek(MSIX_CONTROL)?;
        asm.print_value("msix")?;
        // Not decoded before the guest says so.
        asm.peek(FIRST_BASE)?;
        asm.print_value("before")?;
        asm.poke(FUNCTION + 4, 6)?;

        // Reset, acknowledge, driver.
        let base = FIRST_BASE;
        for status in [0, 1, 3] {
            common(asm, base, 0x14, 1, status)?;
        }
        // Without VERSION_1 it refuses; with it, it agrees.
        common(asm, base, 0x14, 1, 11)?;
        show_byte(asm, "refused", base + 0x14)?;
        common(asm, base, 0x00, 4, 1)?;
        asm.peek(base + 4)?;
        asm.print_value("offered")?;
        common(asm, base, 0x08, 4, 1)?;
        common(asm, base, 0x0c, 4, 1)?;
        common(asm, base, 0x14, 1, 11)?;
        show_byte(asm, "agreed", base + 0x14)?;

        place_queue(asm, base, 8)?;
        asm.poke(DESCRIPTORS, BUFFER)?;
        asm.poke(DESCRIPTORS + 8, LEN)?;
        asm.poke(DESCRIPTORS + 12, 2)?; // The device writes.
        for (at, word) in [(0, LAPIC), (4, 0), (8, VECTOR.into()), (12, 0)] {
            asm.poke(base + MSIX_TABLE + at, word)?;
        }
        // MSI-X on; the queue's vector is 0. A write of the whole dword leaves the rest as it is.
        asm.peek(MSIX_CONTROL)?;
        asm.or(eax, 0x8000_0000u32 as i32)?;
        asm.mov(dword_ptr(edx), eax)?;
        common(asm, base, 0x1a, 2, 0)?;
        common(asm, base, 0x1c, 2, 1)?;
        common(asm, base, 0x14, 1, 15)?;
        show_byte(asm, "running", base + 0x14)?;
        asm.sti()?;

        request(asm, base, 1)?;
        asm.await_word(COUNT, 1)?;
        outcome(asm, 1)?;
        show_byte(asm, "isr", base + ISR)?;
        show_byte(asm, "isr", base + ISR)?;

        // To learn its size the guest writes ones, here with the BAR switched on.
        for word in [!0, base | 4] {
            asm.poke(FUNCTION + 0x10, word)?;
            asm.peek(FUNCTION + 0x10)?;
            asm.print_value("sized")?;
        }

        // Moved, the device goes on where it was; nobody answers at the old place.
        asm.poke(FUNCTION + 0x10, SECOND_BASE)?;
        asm.peek(base)?;
        asm.print_value("left")?;
        let base = SECOND_BASE;
        show_byte(asm, "running", base + 0x14)?;
        request(asm, base, 2)?;
        asm.await_word(COUNT, 2)?;
        outcome(asm, 2)?;

        // Masked, the interrupt waits in the pending bits.
        asm.poke(base + MSIX_TABLE + 12, 1)?;
        request(asm, base, 3)?;
        let mut poll = asm.create_label();
        asm.set_label(&mut poll)?;
        asm.peek(base + MSIX_PENDING)?;
        asm.test(eax, eax)?;
        asm.je(poll)?;
        asm.print_value("pending")?;
        asm.peek(COUNT)?;
        asm.print_value("count")?;
        asm.poke(base + MSIX_TABLE + 12, 0)?;
        asm.await_word(COUNT, 3)?;
        asm.peek(base + MSIX_PENDING)?;
        asm.print_value("pending")?;
        outcome(asm, 3)?;

        // In the window above 4 GiB, by 64-bit addresses, it goes on as well.
        asm.map(HIGH_BASE, 0)?;
        asm.poke(FUNCTION + 0x14, (HIGH_BASE >> 32) as u32)?;
        asm.poke(FUNCTION + 0x10, HIGH_BASE as u32)?;
        asm.peek(base + 0x14)?;
        asm.print_value("left")?;
        asm.mov(rdx, HIGH_BASE)?;
        asm.movzx(eax, byte_ptr(rdx + 0x14))?;
        asm.print_value("running")?;
        asm.poke(AVAILABLE, 4 << 16)?;
        asm.mov(rdx, HIGH_BASE)?;
        asm.mov(word_ptr(rdx + NOTIFY), 0)?;
        asm.await_word(COUNT, 4)?;
        outcome(asm, 4)?;
        asm.poke(FUNCTION + 0x10, SECOND_BASE)?;
        asm.poke(FUNCTION + 0x14, 0)?;

        // Nothing stays of a device that is reset.
        common(asm, base, 0x14, 1, 0)?;
        show_byte(asm, "reset", base + 0x14)?;
        asm.peek(base + 0x20)?;
        asm.print_value("ring")?;
        asm.print("done\n")?;
        asm.read_key()?;
        asm.power_off()
    })
}

#[test]
fn entropy_comes_by_msix_even_after_the_bar_has_moved() {
    let mut vm = Setup::new(&driver()).boot();
    assert_eq!(vm.value("id"), 0x1044_1af4);
    assert_eq!(vm.value("bar"), FIRST_BASE | 4);
    assert_eq!(vm.value("msix") & 0xff, 0x11, "not the MSI-X capability");
    assert_eq!(vm.value("before"), !0);
    assert_eq!(vm.value("refused"), 3);
    assert_eq!(vm.value("offered") & 1, 1);
    assert_eq!(vm.value("agreed"), 11);
    assert_eq!(vm.value("running"), 15);
    let outcome = |vm: &mut civic_tests::bare::vm::Vm, n| {
        assert_eq!((vm.value("used"), vm.value("length")), (n, LEN));
        // A random word is zero once in 2^32 times.
        assert!(vm.value("filled") >= 15);
    };
    outcome(&mut vm, 1);
    assert_eq!((vm.value("isr"), vm.value("isr")), (1, 0));
    assert_eq!((vm.value("sized"), vm.value("sized")), (0xffff_8004, FIRST_BASE | 4));
    assert_eq!(vm.value("left"), !0);
    assert_eq!(vm.value("running"), 15);
    outcome(&mut vm, 2);
    assert_eq!((vm.value("pending"), vm.value("count")), (1, 2));
    assert_eq!(vm.value("pending"), 0);
    outcome(&mut vm, 3);
    assert_eq!((vm.value("left"), vm.value("running")), (!0, 15));
    outcome(&mut vm, 4);
    assert_eq!((vm.value("reset"), vm.value("ring")), (0, 0));
    vm.expect("done\n");
    assert_eq!((vm.counter("rng", "requests"), vm.counter("rng", "bytes")), (4, 4 * u64::from(LEN)));
    vm.send(b"x");
    assert_eq!(vm.ended().code(), Some(0));
}
