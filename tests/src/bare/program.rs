//! Assembling a guest program.
//!
//! Convention: helpers change EAX, ECX, EDX and ESI; EBX, EDI and EBP (and R8 up) are the program's own. All memory is
//! identity-mapped or unpaged, so addresses are guest-physical.

use std::ops::{Deref, DerefMut};

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::image;

/// The first serial port.
pub const COM1: u16 = 0x3f8;
/// The boot CPU's stack grows down from here.
pub const STACK: u32 = 0x9_0000;
/// ECAM of bus 0.
pub const ECAM: u32 = 0xe000_0000;
/// The local APIC.
pub const LAPIC: u32 = 0xfee0_0000;
/// The IOAPIC.
pub const IOAPIC: u32 = 0xfec0_0000;

/// A page that programs may use for data of their own: zero at first.
pub const DATA: u32 = 0x5_0000;
/// Another, from which on there is room for rings and tables.
pub const TABLES: u32 = 0x4_0000;
/// Page directories of [`Asm::map`].
const DIRECTORIES: u32 = 0x8_0000;
/// The interrupt descriptor table, and behind it the operand of LIDT.
const IDT: u32 = 0x3_0000;
const IDT_POINTER: u32 = IDT + 0x1000;

/// Where application processors start: code in a page of its own, below the first megabyte.
const TRAMPOLINE: u32 = 0x1_0000;
const TRAMPOLINE_GDT: u32 = TRAMPOLINE + 0xff0;
const TRAMPOLINE_ENTRY: u32 = TRAMPOLINE + 0xff8;
/// The processors' stacks end here, a page each, by APIC id.
const AP_STACKS: u32 = 0x6_0000;
/// The table that the monitor leaves for the boot CPU.
const BOOT_GDT: u32 = 0x500;
const BOOT_CS: u16 = 0x10;

/// Real mode to flat 32-bit mode, then to the address at [`TRAMPOLINE_ENTRY`].
#[rustfmt::skip]
const TRAMPOLINE_CODE: [u8; 0x54] = {
    let mut code = [0x90; 0x54];
    let real = [
        0x8c, 0xc8,                                     // mov ax, cs
        0x8e, 0xd8,                                     // mov ds, ax
        0x0f, 0x01, 0x16, 0xf0, 0x0f,                   // lgdt [0xff0]
        0x0f, 0x20, 0xc0,                               // mov eax, cr0
        0x66, 0x83, 0xc8, 0x01,                         // or eax, 1
        0x0f, 0x22, 0xc0,                               // mov cr0, eax
        0x66, 0xea, 0x40, 0x00, 0x01, 0x00, 0x10, 0x00, // jmp 0x10:0x10040
    ];
    let flat = [
        0x66, 0xb8, 0x18, 0x00,       // mov ax, 0x18
        0x8e, 0xd8,                   // mov ds, ax
        0x8e, 0xc0,                   // mov es, ax
        0x8e, 0xd0,                   // mov ss, ax
        0xa1, 0xf8, 0x0f, 0x01, 0x00, // mov eax, [0x10ff8]
        0xff, 0xe0,                   // jmp eax
    ];
    let mut i = 0;
    while i < real.len() {
        code[i] = real[i];
        i += 1;
    }
    i = 0;
    while i < flat.len() {
        code[0x40 + i] = flat[i];
        i += 1;
    }
    code
};

/// An assembler with the words that guest programs share.
pub struct Asm {
    code: CodeAssembler,
    put: CodeLabel,
    hex: CodeLabel,
    text: CodeLabel,
}

impl Deref for Asm {
    type Target = CodeAssembler;
    fn deref(&self) -> &CodeAssembler {
        &self.code
    }
}

impl DerefMut for Asm {
    fn deref_mut(&mut self) -> &mut CodeAssembler {
        &mut self.code
    }
}

/// A kernel of 32-bit code, entered by PVH: flat segments, no paging, interrupts off.
pub fn pvh(program: impl FnOnce(&mut Asm) -> Result<(), IcedError>) -> Vec<u8> {
    image::pvh(&assemble(32, image::LOAD, program))
}

/// A kernel of 64-bit code, entered by Linux' 64-bit protocol: the first 4 GiB mapped one to one, interrupts off.
pub fn linux64(program: impl FnOnce(&mut Asm) -> Result<(), IcedError>) -> Vec<u8> {
    image::bzimage(&assemble(64, image::LOAD_BZ + image::ENTRY_64, program))
}

/// The program's bytes, to be placed at `at`.
///
/// # Panics
/// When it does not assemble: a fault of the test.
pub fn assemble(bits: u32, at: u32, program: impl FnOnce(&mut Asm) -> Result<(), IcedError>) -> Vec<u8> {
    let build = || {
        let mut code = CodeAssembler::new(bits)?;
        let (put, hex, text) = (code.create_label(), code.create_label(), code.create_label());
        let mut asm = Asm { code, put, hex, text };
        asm.mov(esp, STACK)?;
        program(&mut asm)?;
        asm.helpers()?;
        asm.assemble(at.into())
    };
    build().unwrap_or_else(|e: IcedError| panic!("the guest program does not assemble: {e}"))
}

impl Asm {
    fn helpers(&mut self) -> Result<(), IcedError> {
        let (mut put, mut hex, mut text) = (self.put, self.hex, self.text);
        // AL to the serial port, which is always ready.
        self.set_label(&mut put)?;
        self.mov(edx, u32::from(COM1))?;
        self.out(dx, al)?;
        self.ret()?;
        // EAX in hexadecimal.
        self.set_label(&mut hex)?;
        self.mov(esi, eax)?;
        self.mov(ecx, 8)?;
        self.mov(edx, u32::from(COM1))?;
        let mut digit = self.create_label();
        self.set_label(&mut digit)?;
        self.rol(esi, 4)?;
        self.mov(eax, esi)?;
        self.and(eax, 0xf)?;
        let mut decimal = self.create_label();
        self.cmp(eax, 10)?;
        self.jb(decimal)?;
        self.add(eax, i32::from(b'a' - b'0' - 10))?;
        self.set_label(&mut decimal)?;
        self.add(eax, i32::from(b'0'))?;
        self.out(dx, al)?;
        self.dec(ecx)?;
        self.jne(digit)?;
        self.ret()?;
        // The zero-terminated string at ESI.
        self.set_label(&mut text)?;
        self.mov(edx, u32::from(COM1))?;
        let (mut next, mut done) = (self.create_label(), self.create_label());
        self.set_label(&mut next)?;
        self.lodsb()?;
        self.test(al, al)?;
        self.je(done)?;
        self.out(dx, al)?;
        self.jmp(next)?;
        self.set_label(&mut done)?;
        self.ret()?;
        Ok(())
    }

    /// Prints AL.
    pub fn print_al(&mut self) -> Result<(), IcedError> {
        let put = self.put;
        self.call(put)
    }

    /// Prints EAX as eight hexadecimal digits.
    pub fn print_eax(&mut self) -> Result<(), IcedError> {
        let hex = self.hex;
        self.call(hex)
    }

    /// Prints a text.
    pub fn print(&mut self, text: &str) -> Result<(), IcedError> {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.data(&bytes, esi, rsi)?;
        let print = self.text;
        self.call(print)
    }

    /// Prints `name=` and EAX, and ends the line.
    pub fn print_value(&mut self, name: &str) -> Result<(), IcedError> {
        self.mov(edi, eax)?;
        self.print(&format!("{name}="))?;
        self.mov(eax, edi)?;
        self.print_eax()?;
        self.print("\n")
    }

    /// Puts `bytes` here, and their address into the register: its first name in 32-bit code, the second in 64-bit code.
    pub fn data(&mut self, bytes: &[u8], short: AsmRegister32, long: AsmRegister64) -> Result<(), IcedError> {
        // 32-bit code cannot name its own addresses, so a call pushes the one behind it.
        let mut behind = self.create_label();
        self.call(behind)?;
        self.db(bytes)?;
        self.set_label(&mut behind)?;
        if self.bitness() == 64 { self.pop(long) } else { self.pop(short) }
    }

    /// The address of a jump to `target` in the register, named as for [`Asm::data`].
    pub fn address(&mut self, target: CodeLabel, short: AsmRegister32, long: AsmRegister64) -> Result<(), IcedError> {
        let mut behind = self.create_label();
        self.call(behind)?;
        self.jmp(target)?;
        self.set_label(&mut behind)?;
        if self.bitness() == 64 { self.pop(long) } else { self.pop(short) }
    }

    /// Holds still without sleeping.
    pub fn spin(&mut self) -> Result<(), IcedError> {
        let mut here = self.create_label();
        self.set_label(&mut here)?;
        self.pause()?;
        self.jmp(here)
    }

    /// Switches the machine off (ACPI S5).
    pub fn power_off(&mut self) -> Result<(), IcedError> {
        self.mov(edx, 0x604)?;
        self.mov(eax, 1 << 13 | 5 << 10)?;
        self.out(dx, ax)?;
        self.spin()
    }

    /// EAX := the 32-bit word at a physical address below 4 GiB. Changes EDX.
    pub fn peek(&mut self, address: u32) -> Result<(), IcedError> {
        self.mov(edx, address)?;
        self.mov(eax, dword_ptr(edx))
    }

    /// 32-bit code: EAX := the word `offset` bytes behind EBX.
    pub fn peek_at_ebx(&mut self, offset: u32) -> Result<(), IcedError> {
        self.mov(eax, dword_ptr(ebx + offset))
    }

    /// Writes a 32-bit word to a physical address below 4 GiB. Changes EDX.
    pub fn poke(&mut self, address: u32, value: u32) -> Result<(), IcedError> {
        self.mov(edx, address)?;
        self.mov(dword_ptr(edx), value)
    }

    /// Writes AL to a port. Changes EDX.
    pub fn out_al(&mut self, port: u16) -> Result<(), IcedError> {
        self.mov(edx, u32::from(port))?;
        self.out(dx, al)
    }

    /// Writes a byte to a port. Changes EAX and EDX.
    pub fn out8(&mut self, port: u16, value: u8) -> Result<(), IcedError> {
        self.mov(eax, u32::from(value))?;
        self.out_al(port)
    }

    /// EAX := a byte from a port. Changes EDX.
    pub fn in8(&mut self, port: u16) -> Result<(), IcedError> {
        self.mov(edx, u32::from(port))?;
        self.xor(eax, eax)?;
        self.in_(al, dx)
    }

    /// AL := the next byte that is typed; waits for it by polling. Changes EDX.
    pub fn read_key(&mut self) -> Result<(), IcedError> {
        let mut poll = self.create_label();
        self.mov(edx, u32::from(COM1 + 5))?;
        self.set_label(&mut poll)?;
        self.in_(al, dx)?;
        self.test(al, 1)?;
        self.je(poll)?;
        self.mov(edx, u32::from(COM1))?;
        self.in_(al, dx)
    }

    /// Goes on once the word at `address` is `value`; waits by polling, and prints nothing.
    pub fn await_word(&mut self, address: u32, value: u32) -> Result<(), IcedError> {
        let (mut poll, mut done) = (self.create_label(), self.create_label());
        self.mov(edx, address)?;
        self.set_label(&mut poll)?;
        self.cmp(dword_ptr(edx), value as i32)?;
        self.je(done)?;
        self.pause()?;
        self.jmp(poll)?;
        self.set_label(&mut done)
    }

    /// 64-bit code: maps the GiB of `address` one to one, with a page directory `table` pages behind [`DIRECTORIES`].
    pub fn map(&mut self, address: u64, table: u32) -> Result<(), IcedError> {
        let directory = DIRECTORIES + table * 0x1000;
        let gib = address >> 30;
        self.mov(rdi, u64::from(directory))?;
        self.mov(rax, gib << 30 | 0x83)?;
        self.mov(ecx, 512)?;
        let mut entry = self.create_label();
        self.set_label(&mut entry)?;
        self.mov(qword_ptr(rdi), rax)?;
        self.add(rdi, 8)?;
        self.add(rax, 2 << 20)?;
        self.dec(ecx)?;
        self.jne(entry)?;
        // The monitor's tables for the boot CPU: a PML4, and its first PDPT on the page behind.
        self.mov(rax, cr3)?;
        self.mov(dword_ptr(rax + 0x1000 + 8 * gib as u32), directory | 3)?;
        self.mov(cr3, rax)
    }

    /// 64-bit code: goes on as a user's program, with all that the monitor has mapped and all ports. Some hosts run only that by their
    /// processor, and interpret what else there is.
    pub fn become_user(&mut self) -> Result<(), IcedError> {
        const GDT: u32 = IDT + 0x2000;
        const POINTER: u32 = GDT + 0x100;
        // The monitor's tables for the boot CPU: a PML4, its first PDPT, that one's four page directories.
        self.mov(rdi, cr3)?;
        self.mov(ecx, 6 * 512)?;
        let (mut entry, mut user) = (self.create_label(), self.create_label());
        self.set_label(&mut entry)?;
        self.or(dword_ptr(rdi), 4)?;
        self.add(rdi, 8)?;
        self.dec(ecx)?;
        self.jne(entry)?;
        self.mov(rax, cr3)?;
        self.mov(cr3, rax)?;
        // The present code and data segments where they are, and a user's.
        let descriptors: [u64; 6] =
            [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
        for (n, descriptor) in (0..).zip(descriptors) {
            self.mov(rax, descriptor)?;
            self.mov(qword_ptr(u64::from(GDT + 8 * n)), rax)?;
        }
        self.mov(word_ptr(u64::from(POINTER)), 6 * 8 - 1)?;
        self.mov(rax, u64::from(GDT))?;
        self.mov(qword_ptr(u64::from(POINTER + 2)), rax)?;
        self.lgdt(qword_ptr(u64::from(POINTER)))?;
        self.push(0x23)?;
        self.push(STACK as i32)?;
        // Interrupts off, I/O privilege 3.
        self.push(0x3002)?;
        self.push(0x2b)?;
        self.lea(rax, qword_ptr(user))?;
        self.push(rax)?;
        self.iretq()?;
        self.set_label(&mut user)?;
        // The next instruction may have a label of its own.
        self.nop()
    }

    /// 64-bit code: an interrupt table without entries.
    pub fn load_idt(&mut self) -> Result<(), IcedError> {
        self.mov(word_ptr(u64::from(IDT_POINTER)), 0xfff)?;
        self.mov(dword_ptr(u64::from(IDT_POINTER + 2)), IDT)?;
        self.lidt(qword_ptr(u64::from(IDT_POINTER)))
    }

    /// 64-bit code: what happens on an interrupt. RAX, RCX, RDX, RSI and RDI may be changed; the interrupt controller is to be
    /// told by `body`.
    pub fn on_interrupt(
        &mut self,
        vector: u8,
        body: impl FnOnce(&mut Asm) -> Result<(), IcedError>,
    ) -> Result<(), IcedError> {
        let (mut handler, mut behind) = (self.create_label(), self.create_label());
        self.jmp(behind)?;
        self.set_label(&mut handler)?;
        for register in [rax, rcx, rdx, rsi, rdi] {
            self.push(register)?;
        }
        body(self)?;
        for register in [rdi, rsi, rdx, rcx, rax] {
            self.pop(register)?;
        }
        self.iretq()?;
        self.set_label(&mut behind)?;
        let gate = u64::from(IDT) + 16 * u64::from(vector);
        self.lea(rax, ptr(handler))?;
        self.mov(word_ptr(gate), ax)?;
        self.mov(word_ptr(gate + 2), i32::from(BOOT_CS))?;
        self.mov(word_ptr(gate + 4), 0x8e00)?;
        self.shr(eax, 16)?;
        self.mov(word_ptr(gate + 6), ax)
    }

    /// Switches the local APIC on, and masks the 8259s: they start out open, their vectors from 0.
    pub fn enable_lapic(&mut self) -> Result<(), IcedError> {
        self.out8(0x21, 0xff)?;
        self.out8(0xa1, 0xff)?;
        self.poke(LAPIC + 0xf0, 0x1ff)
    }

    /// Tells the local APIC that the interrupt is served.
    pub fn end_of_interrupt(&mut self) -> Result<(), IcedError> {
        self.poke(LAPIC + 0xb0, 0)
    }

    /// Sends a pin of the IOAPIC to a vector of CPU 0.
    pub fn route_pin(&mut self, pin: u8, vector: u8, level: bool) -> Result<(), IcedError> {
        let register = 0x10 + 2 * u32::from(pin);
        self.poke(IOAPIC, register + 1)?;
        self.poke(IOAPIC + 0x10, 0)?;
        self.poke(IOAPIC, register)?;
        self.poke(IOAPIC + 0x10, u32::from(vector) | u32::from(level) << 15)
    }

    /// EAX := a register of the IOAPIC.
    pub fn read_ioapic(&mut self, register: u32) -> Result<(), IcedError> {
        self.poke(IOAPIC, register)?;
        self.peek(IOAPIC + 0x10)
    }

    /// 32-bit code: starts all other processors at `entry`, in flat 32-bit mode, ESP at a stack of their own and EBX their
    /// APIC id.
    pub fn start_others(&mut self, entry: CodeLabel) -> Result<(), IcedError> {
        let (mut common, mut behind) = (self.create_label(), self.create_label());
        self.jmp(behind)?;
        self.set_label(&mut common)?;
        self.mov(eax, 1)?;
        self.cpuid()?;
        self.shr(ebx, 24)?;
        self.mov(esp, ebx)?;
        self.shl(esp, 12)?;
        self.add(esp, (AP_STACKS + 0x1000) as i32)?;
        self.jmp(entry)?;
        self.set_label(&mut behind)?;
        self.data(&TRAMPOLINE_CODE, esi, rsi)?;
        self.mov(edi, TRAMPOLINE)?;
        self.mov(ecx, TRAMPOLINE_CODE.len() as u32)?;
        self.rep().movsb()?;
        self.address(common, eax, rax)?;
        self.mov(dword_ptr(u64::from(TRAMPOLINE_ENTRY)), eax)?;
        self.mov(word_ptr(u64::from(TRAMPOLINE_GDT)), 0x2f)?;
        self.mov(dword_ptr(u64::from(TRAMPOLINE_GDT + 2)), BOOT_GDT)?;
        self.enable_lapic()?;
        // INIT, then a start-up interrupt, to all but this one.
        self.poke(LAPIC + 0x300, 0xc4500)?;
        self.poke(LAPIC + 0x300, 0xc4600 | TRAMPOLINE >> 12)
    }

    /// Takes a spin lock: a word that is zero while it is free. Changes EAX and EDX.
    pub fn lock_word(&mut self, address: u32) -> Result<(), IcedError> {
        let (mut again, mut held) = (self.create_label(), self.create_label());
        self.set_label(&mut again)?;
        self.mov(edx, address)?;
        self.mov(eax, 1)?;
        self.xchg(dword_ptr(edx), eax)?;
        self.test(eax, eax)?;
        self.je(held)?;
        self.pause()?;
        self.jmp(again)?;
        self.set_label(&mut held)
    }

    /// Gives it back. Changes EDX.
    pub fn unlock_word(&mut self, address: u32) -> Result<(), IcedError> {
        self.poke(address, 0)
    }
}
