//! Counts that are figures and do not depend on how fast a machine is: exits, faults, copies, system calls. A change that makes one
//! of them worse fails here, on any machine.
//!
//! Each bound is what was counted when it was written, with room for what may vary and for nothing else. Beside each there is a count that is not
//! zero, so that a counter which counts nothing is seen.

use civic_tests::bare::program::{Asm, linux64};
use civic_tests::bare::syscalls;
use civic_tests::bare::virtio::{Direction, FIRST_BAR, ask_disk, await_disk, start_disk};
use civic_tests::bare::vm::{Setup, Vm};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const PAGE: u32 = 4096;
/// What guests touch.
const FIRST: u32 = 16 << 20;
const PAGES: u32 = 4096;
const MEMORY: u64 = 64 << 20;

/// Exits to the monitor of a guest that reads its disk so often, a page at a time.
fn exits(requests: u32, extra: impl Fn(&mut Asm) -> Result<(), IcedError>) -> u64 {
    let kernel = linux64(|asm| {
        start_disk(asm)?;
        asm.xor(ebp, ebp)?;
        let mut request = asm.create_label();
        asm.set_label(&mut request)?;
        asm.mov(eax, ebp)?;
        asm.and(eax, 0xff)?;
        ask_disk(asm, Direction::Read, FIRST, PAGE)?;
        await_disk(asm)?;
        extra(asm)?;
        asm.inc(ebp)?;
        asm.cmp(ebp, requests)?;
        asm.jb(request)?;
        asm.print("done\n")?;
        asm.spin()
    });
    let mut vm = Setup::new(&kernel).disk("data", 1 << 20).boot();
    vm.expect("done\n");
    let exits = vm.info().vcpus.iter().flat_map(|vcpu| vcpu.exits.values()).sum();
    assert_eq!(vm.counter("data", "reads"), u64::from(requests));
    vm.kill();
    assert!(vm.ended().success());
    exits
}

/// A queue's notification is an eventfd that KVM signals: the monitor's vCPU thread has nothing to do with a request.
#[test]
fn a_disks_request_takes_no_exit_to_the_monitor() {
    let nothing = |_: &mut Asm| Ok(());
    let [few, many] = [100, 300].map(|requests| exits(requests, nothing));
    // The counter counts: reading a register of the device is an exit.
    let looks = |asm: &mut Asm| asm.peek(FIRST_BAR + 0x14);
    let [few_with, many_with] = [100, 300].map(|requests| exits(requests, looks));
    println!("{few} and {many} exits, {few_with} and {many_with} with a look at the device for each");
    assert_eq!(many_with - few_with, 200, "an exit for each look");
    assert_eq!(many - few, 0, "of 200 requests");
}

/// Writes [`PAGES`] pages, says so, waits for a key and writes (or reads) them all again, and so on.
fn sweeper(memory: u64, write_again: bool) -> Vm {
    let kernel = linux64(|asm| {
        sweep(asm, true)?;
        let mut again = asm.create_label();
        asm.set_label(&mut again)?;
        asm.print("swept\n")?;
        asm.read_key()?;
        sweep(asm, write_again)?;
        asm.jmp(again)
    });
    let mut vm = Setup::new(&kernel).memory(memory).boot();
    vm.expect("swept\n");
    vm
}

fn sweep(asm: &mut Asm, write: bool) -> Result<(), IcedError> {
    let mut page = asm.create_label();
    asm.mov(edi, FIRST)?;
    asm.set_label(&mut page)?;
    if write {
        asm.inc(dword_ptr(edi))?;
    } else {
        asm.mov(eax, dword_ptr(edi))?;
    }
    asm.add(edi, PAGE as i32)?;
    asm.cmp(edi, FIRST + PAGES * PAGE)?;
    asm.jb(page)
}

/// What the page server has done for a source's forks.
#[derive(Debug)]
struct Done {
    /// First touches of the fork that waited.
    child_faults: u64,
    /// Writes of the source that waited.
    write_faults: u64,
    kept: u64,
    mapped: u64,
    copied: u64,
}

impl Done {
    fn of(source: &Vm, child: &str) -> Self {
        let event = |event: &str| source.metric(&format!("civic_fork_page_events_total{{event=\"{event}\"}}"));
        let done = Self {
            child_faults: source.metric(&format!("civic_fork_child_service_seconds_count{{child=\"{child}\"}}")),
            write_faults: source.metric("civic_fork_write_stall_seconds_count"),
            kept: event("kept"),
            mapped: event("mapped"),
            copied: event("copied"),
        };
        println!("{done:?}");
        done
    }
}

/// A fork that goes through its memory is given it by neighbourhoods, its source's own pages: a fault for 16, and nothing copied.
#[test]
fn a_fork_faults_once_for_sixteen_pages_and_copies_none() {
    let source = sweeper(MEMORY, false);
    let (_, mut children) = source.fork(vec![source.waiting("child")], false);
    let child = &mut children[0];
    child.send(b"x");
    child.expect("swept\n");
    let done = Done::of(&source, "child");
    assert!(done.mapped >= u64::from(PAGES), "{done:?}");
    assert!(done.child_faults >= 16, "it must have touched what it had not: {done:?}");
    assert!(done.child_faults <= u64::from(PAGES) / 16 + IDLE, "{done:?}");
    assert_eq!(done.copied, 0, "{done:?}");
    assert!(done.kept <= IDLE, "{done:?}");
}

/// A source that goes through its memory is let through ahead, 16 pages at a time at most, and each page that it writes is kept once.
#[test]
fn a_source_waits_for_few_of_its_first_writes_and_each_page_is_kept_once() {
    let mut source = sweeper(MEMORY, true);
    let (_, children) = source.fork(vec![source.waiting("child")], true);
    for _ in 0..3 {
        source.send(b"x");
        source.expect("swept\n");
    }
    let done = Done::of(&source, "child");
    assert!(done.kept >= u64::from(PAGES) && done.kept <= u64::from(PAGES) + 16 + IDLE, "{done:?}");
    assert!(done.write_faults >= u64::from(PAGES) / 16, "they must have waited: {done:?}");
    assert!(done.write_faults <= u64::from(PAGES) / 8, "{done:?}");
    drop(children);
}

/// Pages that a fork and a source need who do nothing but wait for a key: code, stack, and page tables.
const IDLE: u64 = 64;

/// An idle fork costs no copies, be its source small or large.
#[test]
fn an_idle_fork_copies_nothing_whatever_its_sources_size() {
    for memory in [MEMORY, 16 * MEMORY] {
        let source = sweeper(memory, true);
        let (_, children) = source.fork(vec![source.waiting("child")], false);
        let child = &children[0];
        let before = exits_of(child);
        child.until("the fork to wait for its key", |child| exits_of(child) > before + 1000);
        let done = Done::of(&source, "child");
        assert_eq!(done.copied, 0, "{done:?}");
        assert!(done.kept <= IDLE && done.child_faults <= IDLE && done.write_faults <= IDLE, "{done:?}");
        assert!(done.mapped > 0 && done.mapped <= 16 * IDLE, "{done:?}");
    }
}

fn exits_of(vm: &Vm) -> u64 {
    vm.exits("io")
}

/// System calls at most of the thread that makes the pause, from before a fork is asked for until it is answered: 22 to 27 were counted, as the
/// least of five. Of one vCPU, without devices but the serial port's.
const PAUSE: usize = 32;
/// How many more a guest of 16 times the memory may take.
const MORE: usize = 5;

/// The monitor's first thread makes the pause, and does little else while a VM is forked. Threads that wait for each other need some more
/// calls now and then; so of some forks the least counts.
#[test]
fn a_pause_takes_few_system_calls_whatever_the_guests_size() {
    let counted = |memory| {
        let source = sweeper(memory, true);
        let fork = |n: usize| {
            source.page_server();
            let waiting = source.waiting(&format!("child{n}"));
            let ((_, mut children), calls) = syscalls::during(source.pid(), || source.fork(vec![waiting], true));
            println!("of process {}: {calls:?}", source.pid());
            children[0].kill();
            assert!(children[0].ended().success());
            source.until("the child to be forgotten", |vm| vm.info().family == civic_api::Family::default());
            calls[&(source.pid() as i32)]
        };
        (0..5).map(fork).min().expect("five forks")
    };
    let [small, large] = [MEMORY, 16 * MEMORY].map(counted);
    assert!((10..=PAUSE).contains(&small), "{small}");
    assert!(large <= PAUSE && large <= small + MORE, "{small}, and {large} of one of {} MiB", (16 * MEMORY) >> 20);
}
