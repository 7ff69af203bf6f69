//! What to compare a fork with, taken in the same run; and what the guests need of their host.
#![allow(unsafe_code)]

use std::arch::x86_64::_rdtsc;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use userfaultfd::{Event, FeatureFlags, RegisterMode, UffdBuilder};

pub const PAGE: usize = 4096;

/// A mapping of this process, gone when dropped.
struct Map(*mut u8, usize);

impl Map {
    /// Of `file`, shared, or of nothing, private.
    fn new(len: usize, file: Option<&File>) -> Self {
        let flags = if file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
        Self::with(len, file, flags)
    }

    /// Of `file`, so that what is written there is nobody else's.
    fn private(len: usize, file: &File) -> Self {
        Self::with(len, Some(file), libc::MAP_PRIVATE)
    }

    fn with(len: usize, file: Option<&File>, flags: i32) -> Self {
        let fd = file.map_or(-1, |file| file.as_raw_fd());
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self(at.cast(), len)
    }

    fn touch(&self) {
        for at in (0..self.1).step_by(PAGE) {
            self.write(at);
        }
    }

    fn byte(&self, at: usize) -> *mut u8 {
        assert!(at < self.1);
        // SAFETY: within the mapping, as has just been checked.
        unsafe { self.0.add(at) }
    }

    fn read(&self, at: usize) -> u8 {
        let byte = self.byte(at);
        // SAFETY: it is mapped for reading, and nobody has a reference into it.
        unsafe { byte.read_volatile() }
    }

    fn write(&self, at: usize) {
        let byte = self.byte(at);
        // SAFETY: it is mapped for writing, and nobody has a reference into it.
        unsafe { byte.write_volatile(1) };
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { libc::munmap(self.0.cast(), self.1) };
    }
}

/// Milliseconds of `fork(2)`, `children` times in a row, of a process with so much memory, all of it touched.
pub fn fork2(bytes: u64, children: usize, times: usize) -> Vec<f64> {
    let map = Map::new(bytes as usize, None);
    map.touch();
    let fork = |_| {
        // SAFETY: the child does nothing but end.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: ends the process without running anything of ours.
            unsafe { libc::_exit(0) };
        }
        assert!(pid > 0, "{}", io::Error::last_os_error());
        pid
    };
    let once = |_| {
        let begun = Instant::now();
        let pids: Vec<_> = (0..children).map(fork).collect();
        let took = begun.elapsed();
        for pid in pids {
            let mut status = 0;
            // SAFETY: `status` is a live int.
            unsafe { libc::waitpid(pid, &raw mut status, 0) };
        }
        took.as_secs_f64() * 1e3
    };
    (0..times).map(once).collect()
}

/// Milliseconds of copying so much memory within this process, all of it there.
pub fn memcpy(bytes: u64, times: usize) -> Vec<f64> {
    let [from, to] = [(); 2].map(|()| Map::new(bytes as usize, None));
    from.touch();
    to.touch();
    let once = |_| {
        let begun = Instant::now();
        // SAFETY: two mappings of so many bytes, into which nobody has a reference.
        unsafe { std::ptr::copy_nonoverlapping(from.0, to.0, bytes as usize) };
        begun.elapsed().as_secs_f64() * 1e3
    };
    (0..times).map(once).collect()
}

/// Microseconds of a first write to a page of a private mapping that has been read: the kernel's copy on write.
pub fn cow(writes: usize) -> Vec<f64> {
    let file = File::from(memfd_create(c"bench-cow", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    let len = writes * PAGE;
    file.set_len(len as u64).expect("it can be so long");
    Map::new(len, Some(&file)).touch();
    let map = Map::private(len, &file);
    let once = |at| {
        assert_eq!(map.read(at), 1);
        let begun = Instant::now();
        map.write(at);
        begun.elapsed().as_secs_f64() * 1e6
    };
    (0..len).step_by(PAGE).map(once).collect()
}

/// Milliseconds until a bare KVM VM with so much memory has run its first instruction and left for its host.
pub fn kvm_vm(bytes: u64, times: usize) -> Vec<f64> {
    let once = |_| {
        let begun = Instant::now();
        let vm = Kvm::new().expect("/dev/kvm opens").create_vm().expect("a VM");
        let memory = Map::new(bytes as usize, None);
        // At 0: hlt.
        // SAFETY: the mapping's first byte, into which nobody has a reference.
        unsafe { memory.0.write_volatile(0xf4) };
        let userspace_addr = memory.0 as u64;
        let region =
            kvm_userspace_memory_region { slot: 0, flags: 0, guest_phys_addr: 0, memory_size: bytes, userspace_addr };
        // SAFETY: the mapping outlives the VM, which is dropped before it.
        unsafe { vm.set_user_memory_region(region) }.expect("memory for the VM");
        let mut cpu = vm.create_vcpu(0).expect("a vCPU");
        let mut segments = cpu.get_sregs().expect("its segments");
        (segments.cs.base, segments.cs.selector) = (0, 0);
        cpu.set_sregs(&segments).expect("its segments");
        let mut registers = cpu.get_regs().expect("its registers");
        (registers.rip, registers.rflags) = (0, 2);
        cpu.set_regs(&registers).expect("its registers");
        assert!(matches!(cpu.run(), Ok(VcpuExit::Hlt)), "its first instruction");
        let took = begun.elapsed();
        drop(cpu);
        drop(vm);
        took.as_secs_f64() * 1e3
    };
    (0..times).map(once).collect()
}

/// Milliseconds of copying so much memory from one memfd to another.
pub fn copy(bytes: u64, times: usize) -> Vec<f64> {
    let memfd = |name| File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    let from = memfd(c"bench-from");
    from.set_len(bytes).expect("it can be so long");
    Map::new(bytes as usize, Some(&from)).touch();
    let once = |_| {
        let (mut source, mut to) = (&from, memfd(c"bench-to"));
        io::Seek::rewind(&mut source).expect("a memfd has an offset");
        let begun = Instant::now();
        io::copy(&mut source, &mut to).expect("it can be copied");
        begun.elapsed().as_secs_f64() * 1e3
    };
    (0..times).map(once).collect()
}

/// Microseconds of a first write to a protected page that another thread lets through: nothing kept, nothing else done.
pub fn round_trip(writes: usize) -> Vec<f64> {
    let file = File::from(memfd_create(c"bench-uffd", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    let len = writes * PAGE;
    file.set_len(len as u64).expect("it can be so long");
    let map = Map::new(len, Some(&file));
    map.touch();
    let features = FeatureFlags::PAGEFAULT_FLAG_WP | FeatureFlags::from_bits_retain(1 << 12);
    let uffd = UffdBuilder::new().require_features(features).non_blocking(false).close_on_exec(true).create();
    let uffd = uffd.expect("userfaultfd can be had");
    uffd.register_with_mode(map.0.cast(), len, RegisterMode::WRITE_PROTECT).expect("memfds can be watched");
    uffd.write_protect(map.0.cast(), len).expect("memfds can be protected");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..writes {
                let Ok(Some(Event::Pagefault { addr, .. })) = uffd.read_event() else { panic!("no fault") };
                let page = (addr as usize & !(PAGE - 1)) as *mut libc::c_void;
                uffd.remove_write_protection(page, PAGE, true).expect("the page is there");
            }
        });
        let once = |at| {
            let begun = Instant::now();
            map.write(at);
            begun.elapsed().as_secs_f64() * 1e6
        };
        (0..len).step_by(PAGE).map(once).collect()
    })
}

/// The time stamp counter's frequency.
pub fn tsc_hz() -> f64 {
    // SAFETY: the instruction reads a counter.
    let now = || (Instant::now(), unsafe { _rdtsc() });
    let (begun, from) = now();
    while begun.elapsed() < Duration::from_millis(200) {
        std::hint::spin_loop();
    }
    let (ended, to) = now();
    (to - from) as f64 / (ended - begun).as_secs_f64()
}

/// A guest's RAM in its monitor, reached as the monitor reaches it: through its page table, so that what is in flight is waited for.
pub struct GuestRam {
    pid: i32,
    /// Offset in the memfd, address, length.
    pieces: Vec<(u64, u64, u64)>,
}

impl GuestRam {
    /// Of the monitor with this process id.
    pub fn of(pid: u32) -> Self {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("it lives");
        let hex = |text: &str| u64::from_str_radix(text, 16).expect("maps are in hexadecimal");
        let piece = |line: &str| {
            let words: Vec<_> = line.split_whitespace().collect();
            let (start, end) = words[0].split_once('-').map(|(start, end)| (hex(start), hex(end))).expect("a range");
            (hex(words[2]), start, end - start)
        };
        // A fork has its source's memory privately.
        let ours = maps.lines().filter(|line| line.contains("memfd:civic-ram") && line.contains(" rw-"));
        Self { pid: pid as i32, pieces: ours.map(piece).collect() }
    }

    /// What is at `offset`, which must lie in one piece.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        let len = into.len();
        let piece = self.pieces.iter().find(|(from, _, len)| offset.checked_sub(*from).is_some_and(|at| at < *len));
        let (from, start, _) = piece.expect("it lies in RAM");
        let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: len };
        let remote = libc::iovec { iov_base: (start + offset - from) as *mut _, iov_len: len };
        // SAFETY: both are one live iovec; the local one is a slice that is borrowed for writing.
        let read = unsafe { libc::process_vm_readv(self.pid, &raw const local, 1, &raw const remote, 1, 0) };
        assert_eq!(read, len as isize, "{}", io::Error::last_os_error());
    }

    /// Touches every page from `first` on, as the monitor itself would: the pages are there and in its page table. Their last bytes,
    /// which no guest of ours uses, become zero.
    pub fn populate(&self, first: u64) {
        for (from, start, len) in &self.pieces {
            let skip = first.saturating_sub(*from).min(*len);
            for at in (skip..*len).step_by(PAGE) {
                let mut byte = [0_u8; 1];
                let local = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
                let remote = libc::iovec { iov_base: (start + at + PAGE as u64 - 1) as *mut _, iov_len: 1 };
                // SAFETY: both are one live iovec; the other process's memory is a guest's.
                let wrote = unsafe { libc::process_vm_writev(self.pid, &raw const local, 1, &raw const remote, 1, 0) };
                assert_eq!(wrote, 1, "{}", io::Error::last_os_error());
            }
        }
    }
}
