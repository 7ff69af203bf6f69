//! Several vCPUs: start-up, identity, atomic counting.

use std::collections::BTreeSet;

use civic_tests::bare::program::{DATA, LAPIC, pvh};
use civic_tests::bare::vm::Setup;
use iced_x86::code_asm::*;

const LOCK: u32 = DATA;
const SUM: u32 = DATA + 0x40;
const DONE: u32 = DATA + 0x80;
/// What each CPU adds to [`SUM`].
const ADDS: u32 = 500;

fn counting(cpus: u8) -> Vec<u8> {
    pvh(|asm| {
        let mut work = asm.create_label();
        asm.xor(ebx, ebx)?;
        if cpus > 1 {
            asm.start_others(work)?;
            asm.xor(ebx, ebx)?;
        }
        // All CPUs come here, with EBX their APIC id.
        asm.set_label(&mut work)?;
        asm.mov(ebp, ebx)?;
        asm.mov(ecx, ADDS)?;
        asm.mov(edx, SUM)?;
        let mut add = asm.create_label();
        asm.set_label(&mut add)?;
        asm.lock().add(dword_ptr(edx), 1)?;
        asm.dec(ecx)?;
        asm.jne(add)?;
        asm.lock_word(LOCK)?;
        asm.mov(eax, ebp)?;
        asm.print_value("cpu")?;
        asm.peek(LAPIC + 0x20)?;
        asm.print_value("lapic")?;
        asm.mov(eax, 1)?;
        asm.cpuid()?;
        asm.mov(eax, ebx)?;
        asm.print_value("leaf1")?;
        asm.xor(eax, eax)?;
        asm.cpuid()?;
        asm.print_value("leaves")?;
        asm.mov(eax, 0xb)?;
        asm.mov(ecx, 1)?;
        asm.cpuid()?;
        asm.push(edx)?;
        asm.mov(eax, ebx)?;
        asm.print_value("cores")?;
        asm.pop(eax)?;
        asm.print_value("x2apic")?;
        asm.unlock_word(LOCK)?;
        asm.mov(edx, DONE)?;
        asm.lock().inc(dword_ptr(edx))?;
        let mut rest = asm.create_label();
        asm.test(ebp, ebp)?;
        asm.jne(rest)?;
        asm.await_word(DONE, cpus.into())?;
        asm.peek(SUM)?;
        asm.print_value("sum")?;
        asm.power_off()?;
        asm.set_label(&mut rest)?;
        asm.cli()?;
        asm.hlt()?;
        asm.jmp(rest)
    })
}

fn all_start_and_count(cpus: u8) {
    let mut vm = Setup::new(&counting(cpus)).cpus(cpus).boot();
    let mut seen = BTreeSet::new();
    for _ in 0..cpus {
        let id = vm.value("cpu");
        assert!(seen.insert(id), "CPU {id} came twice");
        assert_eq!(vm.value("lapic") >> 24, id);
        let leaf1 = vm.value("leaf1");
        assert_eq!((leaf1 >> 24, leaf1 >> 16 & 0xff), (id, cpus.into()));
        let extended = vm.value("leaves") >= 0xb;
        let (cores, x2apic) = (vm.value("cores"), vm.value("x2apic"));
        if extended {
            assert_eq!((cores & 0xffff, x2apic), (cpus.into(), id));
        }
    }
    assert_eq!(seen, (0..u32::from(cpus)).collect());
    assert_eq!(vm.value("sum"), u32::from(cpus) * ADDS);
    assert!(vm.ended().success());
}

#[test]
fn one_cpu_counts() {
    all_start_and_count(1);
}

#[test]
fn two_cpus_start_and_count() {
    all_start_and_count(2);
}

#[test]
fn four_cpus_start_and_count() {
    all_start_and_count(4);
}

#[test]
fn sixteen_cpus_start_and_count() {
    all_start_and_count(16);
}
