//! Guests with work to do, whose pace their host reads in their memory.

use std::time::{Duration, Instant};

use civic_api::ForkReport;
use civic_tests::bare::program::{Asm, linux64};
use civic_tests::bare::virtio::{Direction, ask_disk, await_disk, start_disk};
use civic_tests::bare::vm::{Setup, Vm};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::baseline::{GuestRam, PAGE};
use super::{GIB, mean, ms};

/// Where a guest counts what it has done: a word.
const DONE: u32 = 0x6_f000;
/// From here on it has its data.
const FIRST: u32 = 16 << 20;
/// Below this there is RAM in guests of any size: above are devices.
const LAST: u64 = 3 << 30;
/// Memory that the work of the processor goes through, over and over: as much as the paper's video encoder has.
const FOOTPRINT: u32 = 350 << 20;
/// Multiplications between one page and the next: some tens of microseconds, and so some 100 MB/s of pages written.
const SPINS: u32 = 32 << 10;
/// The disk, and what is read or written of it at a time: small enough that a stretch has many turns of both.
const DISK: u64 = 64 << 20;
const CHUNK: u32 = 256 << 10;
/// The ACPI event of devices that come and go, enabled by its second bit.
const GPE_ENABLE: u16 = 0x624;
/// Longest that a fork lives which is made while its source works.
const LIFE: Duration = Duration::from_secs(1);

/// What a guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// It computes, and writes a page of its memory now and then.
    Cpu,
    /// It reads its disk from end to end, then writes it, and so on.
    Disk,
    /// Nothing.
    Idle,
    /// Nothing, with three quarters of its memory written once.
    Static,
    /// It writes three quarters of its memory, over and over, as fast as it can.
    Dirty,
}

/// A guest of one vCPU that works.
pub struct Worker {
    /// Running.
    pub vm: Vm,
    ram: GuestRam,
}

/// How a guest is forked while it works.
#[derive(Clone, Copy, Debug)]
pub struct Forking {
    /// From one fork to the next.
    pub every: Duration,
    /// Whether forks stand still.
    pub frozen: bool,
}

/// What some time of it showed, with forks or without.
pub struct Stretch {
    /// What it did in a second.
    pub rate: f64,
    /// Its forks.
    pub forks: Vec<ForkReport>,
    length: Duration,
}

impl Stretch {
    /// Forks in a second.
    pub fn pace(&self) -> f64 {
        self.forks.len() as f64 / self.length.as_secs_f64()
    }

    /// Their pauses, in milliseconds.
    pub fn pauses(&self) -> impl Iterator<Item = f64> {
        self.forks.iter().map(|fork| ms(fork.stages.pause_us))
    }
}

impl Worker {
    /// With so much memory. Whoever goes through its memory or disk has done so once, when this returns.
    pub fn boot(work: Work, memory: u64) -> Self {
        let mut setup = Setup::new(&program(work, memory)).memory(memory);
        if work == Work::Disk {
            setup = setup.disk("data", DISK);
        }
        let vm = setup.boot();
        let ram = GuestRam::of(vm.pid());
        let enough = match work {
            Work::Cpu => FOOTPRINT / PAGE as u32,
            Work::Disk => 2 * (DISK / u64::from(CHUNK)) as u32,
            Work::Idle | Work::Static | Work::Dirty => 1,
        };
        let this = Self { vm, ram };
        this.vm.until("the guest to go through all once", |_| this.done() >= enough);
        this
    }

    /// How much it has done.
    pub fn done(&self) -> u32 {
        done(&self.ram)
    }

    /// Of a fork of it.
    pub fn done_by(fork: &Vm) -> u32 {
        done(&GuestRam::of(fork.pid()))
    }

    /// Lets it work for as long as this, and forks it so. A fork lives for half of the time until the next, a second at most.
    pub fn stretch(&self, length: Duration, forking: Option<Forking>) -> Stretch {
        let (begun, before) = (Instant::now(), self.done());
        let mut forks = Vec::new();
        if let Some(Forking { every, frozen }) = forking {
            let life = LIFE.min(every / 2);
            // In the middle of its time, so that as much of what comes after a fork is in the stretch for all of them.
            let mut due = begun + every / 2;
            while due < begun + length {
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                let waiting = self.vm.waiting(&format!("c{}", forks.len()));
                let (told, mut children) = self.vm.fork(vec![waiting], frozen);
                // It is to live for so long; nothing is waited for.
                std::thread::sleep(life);
                children[0].kill();
                assert!(children[0].ended().success());
                forks.push(told);
                due = (due + every).max(Instant::now());
            }
        }
        std::thread::sleep((begun + length).saturating_duration_since(Instant::now()));
        let (length, done) = (begun.elapsed(), self.done().wrapping_sub(before));
        Stretch { rate: f64::from(done) / length.as_secs_f64(), forks, length }
    }

    /// What it loses, in percent, to forks: of rounds, each with a stretch without and one with them, in turns.
    pub fn losses(&self, length: Duration, forking: Forking, rounds: usize) -> Losses {
        let mut losses = Losses { percent: Vec::new(), pauses: Vec::new(), paces: Vec::new() };
        for round in 0..rounds {
            let stretch = |forked: bool| self.stretch(length, forked.then_some(forking));
            let (plain, forked) = if round % 2 == 0 {
                let plain = stretch(false);
                (plain, stretch(true))
            } else {
                let forked = stretch(true);
                (stretch(false), forked)
            };
            losses.percent.push(100.0 * (1.0 - forked.rate / plain.rate));
            losses.pauses.extend(forked.pauses());
            losses.paces.push(forked.pace());
        }
        losses
    }
}

/// What forks cost their source.
pub struct Losses {
    /// Of its work, in each round.
    pub percent: Vec<f64>,
    /// Of each fork, in milliseconds.
    pub pauses: Vec<f64>,
    /// Forks in a second, in each round.
    pub paces: Vec<f64>,
}

impl Losses {
    /// How many forks there were in a second, of as many as there were to be.
    pub fn on_time(&self, hz: f64) -> f64 {
        mean(&self.paces) / hz
    }
}

fn done(ram: &GuestRam) -> u32 {
    let mut word = [0; 4];
    ram.read(DONE.into(), &mut word);
    u32::from_le_bytes(word)
}

fn program(work: Work, memory: u64) -> Vec<u8> {
    // Three quarters of all, from FIRST on.
    let end = (u64::from(FIRST) + memory / 4 * 3).min(LAST) as u32;
    linux64(|asm| {
        // It hears of devices that come: forks are given some.
        asm.out8(GPE_ENABLE, 2)?;
        // Who is to sleep may not be a user's program.
        if matches!(work, Work::Cpu | Work::Disk | Work::Dirty) {
            asm.become_user()?;
        }
        works(asm, work, end)
    })
}

fn works(asm: &mut Asm, work: Work, end: u32) -> Result<(), IcedError> {
    match work {
        Work::Cpu => {
            let (mut pass, mut page, mut spin) = (asm.create_label(), asm.create_label(), asm.create_label());
            asm.set_label(&mut pass)?;
            asm.mov(edi, FIRST)?;
            asm.set_label(&mut page)?;
            asm.mov(ecx, SPINS)?;
            asm.set_label(&mut spin)?;
            asm.imul_3(eax, eax, 0x1_0001)?;
            asm.dec(ecx)?;
            asm.jne(spin)?;
            asm.add(dword_ptr(edi), eax)?;
            asm.inc(dword_ptr(DONE))?;
            asm.add(edi, PAGE as i32)?;
            asm.cmp(edi, (FIRST + FOOTPRINT) as i32)?;
            asm.jb(page)?;
            asm.jmp(pass)
        }
        Work::Disk => {
            start_disk(asm)?;
            let mut pass = asm.create_label();
            asm.set_label(&mut pass)?;
            for direction in [Direction::Read, Direction::Write] {
                let (mut chunk, mut good) = (asm.create_label(), asm.create_label());
                asm.xor(ebp, ebp)?;
                asm.set_label(&mut chunk)?;
                asm.mov(eax, ebp)?;
                ask_disk(asm, direction, FIRST, CHUNK)?;
                await_disk(asm)?;
                asm.test(al, al)?;
                asm.je(good)?;
                asm.print("the disk fails\n")?;
                asm.power_off()?;
                asm.set_label(&mut good)?;
                asm.inc(dword_ptr(DONE))?;
                asm.add(ebp, (CHUNK / 512) as i32)?;
                asm.cmp(ebp, (DISK / 512) as i32)?;
                asm.jb(chunk)?;
            }
            asm.jmp(pass)
        }
        Work::Idle => {
            asm.inc(dword_ptr(DONE))?;
            rest(asm)
        }
        Work::Static => {
            sweep(asm, end)?;
            rest(asm)
        }
        Work::Dirty => {
            let mut pass = asm.create_label();
            asm.set_label(&mut pass)?;
            sweep(asm, end)?;
            asm.jmp(pass)
        }
    }
}

/// Writes every page up to `end`.
fn sweep(asm: &mut CodeAssembler, end: u32) -> Result<(), IcedError> {
    let mut page = asm.create_label();
    asm.mov(edi, FIRST)?;
    asm.set_label(&mut page)?;
    asm.inc(dword_ptr(edi))?;
    asm.add(edi, PAGE as i32)?;
    asm.cmp(edi, end as i32)?;
    asm.jb(page)?;
    asm.inc(dword_ptr(DONE))
}

fn rest(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut rest = asm.create_label();
    asm.set_label(&mut rest)?;
    asm.hlt()?;
    asm.jmp(rest)
}

/// A worker of the usual size.
pub fn usual(work: Work) -> Worker {
    Worker::boot(work, GIB)
}
