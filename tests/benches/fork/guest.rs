//! Guests to be forked: one that writes at a given pace and times each write, one that does nothing.

use std::time::{Duration, Instant};

use civic_tests::bare::program::pvh;
use civic_tests::bare::vm::{Setup, Vm};
use iced_x86::code_asm::*;

use super::baseline::{GuestRam, PAGE, tsc_hz};

const CPUS: u32 = 2;
/// Bytes that all of them write in a second, counted by pages.
const PACE: u64 = 100_000_000;
/// Where a CPU says how far its log is, 4 bytes each; and the logs: a word for each write, how many cycles it took.
const MARKS: u32 = 0x6_f000;
const LOGS: u32 = 8 << 20;
const LOG: u32 = 2 << 20;
/// From here on pages are written, up to the end of RAM or this one.
const FIRST: u32 = 16 << 20;
const LAST: u64 = 2 << 30;
/// Behind by more cycles than this, a CPU does not make up for it.
const LATE: u32 = 1 << 24;

/// In which order a guest goes through its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after the other, as whoever copies or clears memory.
    Sequential,
    /// Here and there: none lies near the one before.
    Scattered,
}

impl Order {
    /// Behind the name of what was measured so.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Sequential => "",
            Self::Scattered => ".scattered",
        }
    }

    /// Pages from one to the next. The scattered one's is a prime that divides no number of pages here, so that each page has its turn once.
    pub fn stride(self) -> u32 {
        match self {
            Self::Sequential => 1,
            Self::Scattered => 7919,
        }
    }
}

/// A guest that writes.
pub struct Load {
    /// Running.
    pub vm: Vm,
    /// What it says of its writes.
    pub log: Log,
}

/// What such a guest, or a fork of it, has in its memory on its writes.
pub struct Log {
    ram: GuestRam,
    hz: f64,
}

/// Writes in some time.
pub struct Sample {
    /// How long each took.
    pub micros: Vec<f64>,
    time: Duration,
}

impl Sample {
    /// Bytes in pages that were written, per second.
    pub fn bytes_per_second(&self) -> f64 {
        (self.micros.len() * PAGE) as f64 / self.time.as_secs_f64()
    }
}

impl Load {
    /// With so many bytes of RAM, all of it there.
    pub fn boot(memory: u64, order: Order) -> Self {
        let hz = tsc_hz();
        let end = memory.min(LAST) as u32;
        let period = (hz * f64::from(CPUS) * PAGE as f64 / PACE as f64) as u32;
        let vm = Setup::new(&writer(end, period, order.stride())).cpus(CPUS as u8).memory(memory).boot();
        let log = Log { ram: GuestRam::of(vm.pid()), hz };
        vm.until("every CPU to write", |_| (0..CPUS).all(|cpu| log.mark(cpu) > log.begin(cpu)));
        log.ram.populate(u64::from(FIRST));
        Self { vm, log }
    }
}

impl Log {
    /// That of a fork.
    pub fn of_fork(&self, vm: &Vm) -> Self {
        Self { ram: GuestRam::of(vm.pid()), hz: self.hz }
    }

    fn begin(&self, cpu: u32) -> u32 {
        LOGS + cpu * LOG
    }

    fn mark(&self, cpu: u32) -> u32 {
        let mut word = [0; 4];
        self.ram.read(u64::from(MARKS + 4 * cpu), &mut word);
        u32::from_le_bytes(word)
    }

    /// What the log has from `from` to `to`, in microseconds.
    fn entries(&self, from: u32, to: u32) -> Vec<f64> {
        let mut bytes = vec![0; (to - from) as usize];
        self.ram.read(from.into(), &mut bytes);
        let cycles = |word: &[u8]| f64::from(u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
        bytes.chunks_exact(4).map(|word| cycles(word) / self.hz * 1e6).collect()
    }

    /// Times the writes of as long as this.
    pub fn sample(&self, time: Duration) -> Sample {
        let begun = Instant::now();
        let before: Vec<_> = (0..CPUS).map(|cpu| self.mark(cpu)).collect();
        // The figure is of this time; nothing is waited for.
        std::thread::sleep(time);
        let mut micros = Vec::new();
        for (cpu, before) in (0..CPUS).zip(before) {
            let (log, end) = (self.begin(cpu), self.mark(cpu));
            let before = before.max(log);
            if before <= end {
                micros.extend(self.entries(before, end));
            } else {
                micros.extend(self.entries(before, log + LOG));
                micros.extend(self.entries(log, end));
            }
        }
        Sample { micros, time: begun.elapsed() }
    }
}

/// A guest whose CPUs sleep, with all of its RAM there.
pub fn idle(memory: u64) -> Vm {
    let kernel = pvh(|asm| {
        let mut all = asm.create_label();
        asm.start_others(all)?;
        asm.set_label(&mut all)?;
        asm.hlt()?;
        asm.jmp(all)
    });
    let vm = Setup::new(&kernel).cpus(CPUS as u8).memory(memory).boot();
    GuestRam::of(vm.pid()).populate(u64::from(FIRST));
    vm
}

/// A guest that says that it is there, and sleeps.
pub fn speaker() -> Vec<u8> {
    pvh(|asm| {
        asm.print("up\n")?;
        let mut rest = asm.create_label();
        asm.set_label(&mut rest)?;
        asm.hlt()?;
        asm.jmp(rest)
    })
}

/// Each CPU goes through its half of `FIRST..end`, a page every `period` cycles, and the next `stride` pages on.
fn writer(end: u32, period: u32, stride: u32) -> Vec<u8> {
    let half = (end - FIRST) / CPUS;
    assert!(stride == 1 || !(half / PAGE as u32).is_multiple_of(stride), "pages would be left out");
    pvh(|asm| {
        let (mut all, mut page, mut on_time) = (asm.create_label(), asm.create_label(), asm.create_label());
        asm.start_others(all)?;
        asm.xor(ebx, ebx)?;
        asm.set_label(&mut all)?;
        // EBX: the CPU; EBP: when the next page is due; ESI: in the log; EDI: the page.
        asm.imul_3(esi, ebx, LOG as i32)?;
        asm.add(esi, LOGS as i32)?;
        asm.rdtsc()?;
        asm.mov(ebp, eax)?;
        asm.imul_3(edi, ebx, half as i32)?;
        asm.add(edi, FIRST as i32)?;
        // Comes back here until the page is due.
        asm.set_label(&mut page)?;
        asm.rdtsc()?;
        asm.sub(eax, ebp)?;
        asm.js(page)?;
        asm.cmp(eax, LATE as i32)?;
        asm.jb(on_time)?;
        asm.add(ebp, eax)?;
        asm.set_label(&mut on_time)?;
        asm.add(ebp, period as i32)?;
        asm.rdtsc()?;
        asm.mov(ecx, eax)?;
        asm.inc(dword_ptr(edi))?;
        asm.rdtsc()?;
        asm.sub(eax, ecx)?;
        asm.mov(dword_ptr(esi), eax)?;
        asm.add(esi, 4)?;
        // Around at the log's end.
        let mut within = asm.create_label();
        asm.imul_3(edx, ebx, LOG as i32)?;
        asm.add(edx, (LOGS + LOG) as i32)?;
        asm.cmp(esi, edx)?;
        asm.jb(within)?;
        asm.sub(esi, LOG as i32)?;
        asm.set_label(&mut within)?;
        asm.mov(dword_ptr(ebx * 4 + MARKS), esi)?;
        asm.add(edi, (stride * PAGE as u32) as i32)?;
        asm.imul_3(edx, ebx, half as i32)?;
        asm.add(edx, (FIRST + half) as i32)?;
        asm.cmp(edi, edx)?;
        asm.jb(page)?;
        asm.sub(edi, half as i32)?;
        asm.jmp(page)
    })
}
