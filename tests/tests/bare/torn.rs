//! Nothing torn, nothing lost: every CPU counts in each page of its part of memory, and sees at once if a page is not as it left it.
//!
//! In a source that is what is lost or comes from a child; in a child, what is torn or comes from the source's future.

use civic_tests::bare::program::{Asm, COM1, pvh};
use civic_tests::bare::virtio::{Direction, ask_disk, await_disk, start_disk};
use civic_tests::bare::vm::{Setup, Vm};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Where the parts begin, and how long each is.
pub const PARTS: u32 = 4 << 20;
pub const PART: u32 = 2 << 20;
pub const CPUS: u8 = 4;

/// What CPU 0 writes to its disk, and what it reads from there.
const WRITTEN: u32 = 16 << 20;
const READ: u32 = 17 << 20;
/// The disk has so many places, each of these many bytes, and is written in turns.
const PLACES: u32 = 16;
const PLACE: u32 = 16 << 10;

/// Prints a CPU's number whenever it has been through its part, and `bad=` when it found something else than it wrote.
pub fn counting() -> Vec<u8> {
    program(1, false)
}

/// The same in every fourth page, so that many forks can be made; and the first CPU writes its number to its disk, goes on while that is
/// under way, and finds there what it wrote: the last time, and some time before.
pub fn counting_on_a_disk() -> Vec<u8> {
    program(4, true)
}

fn program(stride: u32, disk: bool) -> Vec<u8> {
    pvh(|asm| {
        let (mut all, mut round, mut page, mut wrong) =
            (asm.create_label(), asm.create_label(), asm.create_label(), asm.create_label());
        asm.start_others(all)?;
        asm.xor(ebx, ebx)?;
        if disk {
            start_disk(asm)?;
        }
        asm.set_label(&mut all)?;
        asm.xor(ebp, ebp)?;
        asm.set_label(&mut round)?;
        if disk {
            let mut others = asm.create_label();
            asm.test(ebx, ebx)?;
            asm.jne(others)?;
            count_on_disk(asm)?;
            asm.set_label(&mut others)?;
        }
        asm.mov(edi, ebx)?;
        asm.imul_3(edi, edi, PART as i32)?;
        asm.add(edi, PARTS as i32)?;
        asm.mov(ecx, PART / 4096 / stride)?;
        asm.set_label(&mut page)?;
        // One word is read before it is written, one is written at once: a child's first touch is either.
        asm.lea(eax, ebp + 1)?;
        asm.mov(dword_ptr(edi + 0xff8), eax)?;
        for at in [0, 0x7f8] {
            asm.cmp(dword_ptr(edi + at), ebp)?;
            asm.jne(wrong)?;
            asm.mov(dword_ptr(edi + at), eax)?;
        }
        asm.add(edi, 4096 * stride as i32)?;
        asm.dec(ecx)?;
        asm.jne(page)?;
        asm.inc(ebp)?;
        asm.mov(eax, ebx)?;
        asm.add(eax, i32::from(b'0'))?;
        asm.mov(edx, u32::from(COM1))?;
        asm.out(dx, al)?;
        asm.jmp(round)?;
        asm.set_label(&mut wrong)?;
        tell(asm, "bad", 0x7f8)
    })
}

/// Prints what is at EDI and `behind` it in place of EBP, and does nothing more.
fn tell(asm: &mut Asm, what: &str, behind: i32) -> Result<(), IcedError> {
    asm.mov(ebx, edi)?;
    asm.mov(eax, dword_ptr(ebx))?;
    asm.print_value(what)?;
    asm.mov(eax, dword_ptr(ebx + behind))?;
    asm.print_value("and")?;
    asm.mov(eax, ebp)?;
    asm.print_value("for")?;
    asm.mov(eax, ebx)?;
    asm.print_value("at")?;
    asm.spin()
}

/// A round of the disk: EBP is the number that was written last, at its place modulo [`PLACES`].
fn count_on_disk(asm: &mut Asm) -> Result<(), IcedError> {
    let (mut wrong, mut young, mut fine) = (asm.create_label(), asm.create_label(), asm.create_label());
    let done = |asm: &mut Asm| {
        await_disk(asm)?;
        asm.test(al, al)?;
        asm.jne(wrong)
    };
    // EAX := the first sector of the number's place.
    let place = |asm: &mut Asm| {
        asm.and(eax, PLACES as i32 - 1)?;
        asm.imul_3(eax, eax, (PLACE / 512) as i32)
    };
    let finds = |asm: &mut Asm, before: i32| {
        asm.lea(eax, ebp - before)?;
        place(asm)?;
        ask_disk(asm, Direction::Read, READ, PLACE)?;
        done(asm)?;
        asm.lea(eax, ebp - before)?;
        asm.mov(edi, READ)?;
        asm.mov(ecx, PLACE / 4)?;
        asm.repe().scasd()?;
        asm.jne(wrong)
    };
    let mut nothing_yet = asm.create_label();
    asm.cld()?;
    asm.test(ebp, ebp)?;
    asm.je(nothing_yet)?;
    done(asm)?;
    asm.set_label(&mut nothing_yet)?;
    finds(asm, 0)?;
    asm.cmp(ebp, PLACES as i32)?;
    asm.jb(young)?;
    finds(asm, PLACES as i32 - 3)?;
    asm.set_label(&mut young)?;
    asm.lea(eax, ebp + 1)?;
    asm.mov(edi, WRITTEN)?;
    asm.mov(ecx, PLACE / 4)?;
    asm.rep().stosd()?;
    asm.lea(eax, ebp + 1)?;
    place(asm)?;
    ask_disk(asm, Direction::Write, WRITTEN, PLACE)?;
    asm.jmp(fine)?;
    asm.set_label(&mut wrong)?;
    // SCAS is by then behind it.
    asm.sub(edi, 4)?;
    tell(asm, "bad disk", 4)?;
    asm.set_label(&mut fine)?;
    asm.nop()
}

/// Waits until every CPU has been through its part so many times more.
pub fn rounds(vm: &mut Vm, more: usize) {
    let mut seen = [0; CPUS as usize];
    while seen.iter().any(|count| *count < more) {
        let byte = vm.take(1)[0];
        match byte.wrapping_sub(b'0') {
            cpu if cpu < CPUS => seen[usize::from(cpu)] += 1,
            _ => {
                let more = vm.expect("at=");
                let at = vm.expect("\n");
                vm.fail(&format!("memory is not what it was: {}{more}{at}", char::from(byte)));
            }
        }
    }
}

/// Sees that the child has been through all its memory since it was last looked at, and ends it.
fn end(source: &mut Vm, mut child: Vm) {
    if child.api(|client| async move { client.info().await }).is_err() {
        // Why, is in the source's log.
        source.fail(&format!("a child has ended:\n{}", child.log()));
    }
    rounds(&mut child, 2);
    child.kill();
    assert!(child.ended().success());
    rounds(source, 1);
}

/// Both go on for some rounds, then the child ends.
pub fn live_for_a_while(source: &mut Vm, child: &mut Vm) {
    for _ in 0..3 {
        rounds(child, 1);
        rounds(source, 1);
    }
    child.kill();
    assert!(child.ended().success());
}

#[test]
fn source_and_children_find_what_they_wrote() {
    let forks = std::env::var("CIVIC_FORKS").ok().and_then(|n| n.parse().ok()).unwrap_or(10);
    let mut setup = Setup::new(&counting_on_a_disk()).cpus(CPUS).disk("root", (PLACES * PLACE).into());
    // Each child keeps its own of what all CPUs overwrite.
    setup.config.forks.memory_bytes = Some(256 << 20);
    let mut source = setup.boot();
    rounds(&mut source, 2);
    // As many children of different moments live at a time; not the oldest ends first.
    const ALIVE: usize = 4;
    let mut alive = Vec::new();
    for n in 0..forks {
        let (report, mut children) = source.fork(vec![source.waiting(&format!("child{n}"))], false);
        println!("{n}: {:?}", report.stages);
        alive.append(&mut children);
        rounds(&mut source, 1);
        if alive.len() == ALIVE {
            end(&mut source, alive.remove(n * 7 % ALIVE));
        }
    }
    alive.into_iter().for_each(|child| end(&mut source, child));
    rounds(&mut source, 2);
}

#[test]
fn forks_of_forks_find_what_they_wrote() {
    let forks = std::env::var("CIVIC_FORKS").ok().and_then(|n| n.parse().ok()).unwrap_or(4);
    let disk = u64::from(PLACES * PLACE);
    let mut source = Setup::new(&counting_on_a_disk()).cpus(CPUS).qcow2("root", disk).boot();
    rounds(&mut source, 2);
    for n in 0..forks {
        // Each of them goes on while the next is made, and ends while that lives.
        let (_, mut line) = source.fork(vec![source.waiting(&format!("child{n}"))], false);
        for depth in 0..3 {
            let parent = line.last_mut().unwrap();
            rounds(parent, 1);
            let (report, children) = parent.fork(vec![parent.waiting(&format!("child{n}-{depth}"))], false);
            println!("{n}, {depth}: {:?}", report.stages);
            line.extend(children);
            rounds(&mut source, 1);
        }
        while !line.is_empty() {
            line.iter_mut().for_each(|vm| rounds(vm, 1));
            let mut first = line.remove(0);
            first.kill();
            assert!(first.ended().success());
            rounds(&mut source, 1);
        }
    }
    rounds(&mut source, 2);
}
