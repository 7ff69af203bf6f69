//! The system calls and instructions that `rustix` has no safe function for.
#![allow(unsafe_code)]

use core::arch::asm;
use core::arch::x86_64::_rdtsc;
use core::ffi::{CStr, c_char};
use core::ptr;

use rustix::fd::{AsRawFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use rustix::thread::{UnshareFlags, unshare_unsafe};

const SYS_CLOSE: usize = 3;
const SYS_RT_SIGACTION: usize = 13;
const SYS_RT_SIGPROCMASK: usize = 14;
const SYS_CLONE: usize = 56;
const SYS_EXECVE: usize = 59;
const SYS_SCHED_SETSCHEDULER: usize = 144;
const SYS_IOPERM: usize = 173;
const SYS_CLOCK_GETTIME: usize = 228;
const SYS_EXIT_GROUP: usize = 231;
const SYS_CLOSE_RANGE: usize = 436;

const SIGNALS: usize = 64;
const SIGCHLD: usize = 17;
const SIG_DFL: usize = 0;
const SIG_IGN: usize = 1;
const SIG_SETMASK: usize = 2;
const SCHED_OTHER: usize = 0;
const SCHED_FIFO: usize = 1;
const SCHED_RESET_ON_FORK: usize = 0x4000_0000;
const CLOCK_MONOTONIC: usize = 1;

const PAGE: usize = 4096;

/// The kernel's `struct sigaction`.
#[repr(C)]
struct SigAction {
    handler: usize,
    flags: usize,
    restorer: usize,
    mask: u64,
}

/// # Safety
/// What the kernel does with the arguments must be sound: pointers among them are valid for it.
unsafe fn syscall(number: usize, args: [usize; 5]) -> Result<usize, Errno> {
    let result: isize;
    // SAFETY: the caller's; the kernel changes no registers but these, and no stack.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    match usize::try_from(result) {
        Ok(result) => Ok(result),
        Err(_) => Err(Errno::from_raw_os_error(-(result as i32))),
    }
}

/// Ends the process.
pub fn exit(status: i32) -> ! {
    // SAFETY: no pointers.
    let _ = unsafe { syscall(SYS_EXIT_GROUP, [status as usize, 0, 0, 0, 0]) };
    // The kernel does not come back.
    loop {
        core::hint::spin_loop();
    }
}

/// Which of two processes this is.
pub enum Fork {
    /// The one that there was, and the other's number.
    Parent(Pid),
    /// The new one.
    Child,
}

/// Doubles the process.
pub fn fork() -> Result<Fork, Errno> {
    // SAFETY: as fork(2); there is one thread, so the child's memory is as consistent as the parent's.
    let pid = unsafe { syscall(SYS_CLONE, [SIGCHLD, 0, 0, 0, 0]) }?;
    Ok(Pid::from_raw(pid as i32).map_or(Fork::Child, Fork::Parent))
}

/// Standard input, output or error: 0, 1 or 2.
pub fn standard(number: u8) -> BorrowedFd<'static> {
    // SAFETY: something is open as each of them from the beginning on, and nobody closes it.
    unsafe { BorrowedFd::borrow_raw(number.min(2).into()) }
}

/// A list of strings as `execve` wants it: pointers, and a null one at the end.
pub struct Pointers<'a, const N: usize>([*const c_char; N], core::marker::PhantomData<&'a CStr>);

impl<'a, const N: usize> Pointers<'a, N> {
    /// To `strings`, of which those that have no place are left out.
    pub fn new(strings: impl Iterator<Item = &'a CStr>) -> Self {
        let mut pointers = [ptr::null(); N];
        // The last stays null.
        pointers[..N - 1].iter_mut().zip(strings).for_each(|(pointer, string)| *pointer = string.as_ptr());
        Self(pointers, core::marker::PhantomData)
    }
}

/// Becomes the program in the file `path`; comes back only if that cannot be.
pub fn execve<const N: usize>(path: &CStr, argv: &Pointers<'_, N>, env: &Pointers<'_, N>) -> Errno {
    let args = [path.as_ptr() as usize, argv.0.as_ptr() as usize, env.0.as_ptr() as usize, 0, 0];
    // SAFETY: a C string, and two lists of such with a null pointer at their end, all of them borrowed.
    unsafe { syscall(SYS_EXECVE, args) }.err().unwrap_or(Errno::INVAL)
}

/// Lets this thread use `count` ports of the processor from `port` on, or not any more.
pub fn ioperm(port: u16, count: usize, allowed: bool) -> Result<(), Errno> {
    // SAFETY: no pointers.
    unsafe { syscall(SYS_IOPERM, [port.into(), count, allowed.into(), 0, 0]) }.map(drop)
}

/// Closes all descriptors but 0, 1, 2 and `keep`.
pub fn close_but(keep: &OwnedFd) {
    let keep = keep.as_raw_fd() as usize;
    for (first, last) in [(3, keep.saturating_sub(1)), (keep.saturating_add(1).max(3), u32::MAX as usize)] {
        if first > last {
            continue;
        }
        // SAFETY: no pointers. Who calls this is about to become another program: nobody uses a descriptor any more.
        let closed = unsafe { syscall(SYS_CLOSE_RANGE, [first, last, 0, 0, 0]) };
        if closed.is_err() {
            // A filter forbids it; the loader has not opened so many.
            for fd in first..=last.min(1023) {
                // SAFETY: as above.
                let _ = unsafe { syscall(SYS_CLOSE, [fd, 0, 0, 0, 0]) };
            }
        }
    }
}

/// Gives this process a mount namespace of its own.
pub fn unshare_mounts() -> Result<(), Errno> {
    // SAFETY: no thread shares anything with this one, descriptors included.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
}

/// Makes this thread a real-time one (`SCHED_FIFO`).
pub fn realtime(priority: u8) -> Result<(), Errno> {
    schedule(SCHED_FIFO, priority)
}

/// Lets this thread run before all that are no real-time ones, or no longer. Those that it makes are ordinary ones.
pub fn hurry(hurry: bool) -> Result<(), Errno> {
    schedule(if hurry { SCHED_FIFO | SCHED_RESET_ON_FORK } else { SCHED_OTHER }, hurry.into())
}

fn schedule(policy: usize, priority: u8) -> Result<(), Errno> {
    let priority = i32::from(priority);
    // SAFETY: a `struct sched_param`, which is one int.
    unsafe { syscall(SYS_SCHED_SETSCHEDULER, [0, policy, ptr::from_ref(&priority) as usize, 0, 0]) }.map(drop)
}

/// The signal of that number, if there is one.
pub fn signal(number: u8) -> Option<Signal> {
    // SAFETY: it is one of the kernel's, and there is no C library that would keep some for itself.
    (1..=SIGNALS).contains(&number.into()).then(|| unsafe { Signal::from_raw_unchecked(number.into()) })
}

/// Ignores all signals that can be, but for SIGCHLD: who ignores that has no children to wait for.
pub fn ignore_signals() {
    (1..=SIGNALS).filter(|signal| *signal != SIGCHLD).for_each(|signal| set_signal(signal, SIG_IGN));
    set_signal(SIGCHLD, SIG_DFL);
    set_mask(0);
}

/// What programs expect to start with.
pub fn reset_signals() {
    (1..=SIGNALS).for_each(|signal| set_signal(signal, SIG_DFL));
    set_mask(0);
}

fn set_signal(signal: usize, handler: usize) {
    let action = SigAction { handler, flags: 0, restorer: 0, mask: 0 };
    // SAFETY: a `struct sigaction` without a handler of ours, and the size of its mask. SIGKILL and SIGSTOP are refused, as is well.
    let _ = unsafe { syscall(SYS_RT_SIGACTION, [signal, ptr::from_ref(&action) as usize, 0, size_of::<u64>(), 0]) };
}

fn set_mask(blocked: u64) {
    let args = [SIG_SETMASK, ptr::from_ref(&blocked) as usize, 0, size_of::<u64>(), 0];
    // SAFETY: a signal set, and its size.
    let _ = unsafe { syscall(SYS_RT_SIGPROCMASK, args) };
}

/// Milliseconds since some moment.
pub fn now_ms() -> u64 {
    let mut now = [0u64; 2];
    // SAFETY: a `struct timespec`, two 64-bit words. It cannot fail.
    let _ = unsafe { syscall(SYS_CLOCK_GETTIME, [CLOCK_MONOTONIC, ptr::from_mut(&mut now) as usize, 0, 0, 0]) };
    now[0] * 1000 + now[1] / 1_000_000
}

/// The time stamp counter.
pub fn rdtsc() -> u64 {
    // SAFETY: user mode may; a guest whose kernel forbids it (`prctl(PR_SET_TSC)`) forbids it to single processes that ask for it.
    unsafe { _rdtsc() }
}

/// A hypercall: see `civic_loader::OP_SEND`.
///
/// # Safety
/// This thread may use the port, somebody answers there, and `buffer` is valid for what `op` does with it.
pub unsafe fn hypercall(port: u16, op: u32, token: u64, buffer: *mut u8, len: usize) -> i64 {
    let result: i64;
    // SAFETY: the caller's; whoever answers changes RAX and the buffer alone. Its upper half is what it was if nobody answers.
    unsafe {
        asm!(
            "out dx, eax",
            in("dx") port,
            inlateout("rax") u64::from(op) => result,
            in("rdi") buffer,
            in("rsi") len,
            in("r8") token,
            options(nostack),
        );
    }
    result
}

/// The same without a port: see `civic_loader::KNOCK`.
///
/// # Safety
/// As there, but for the port.
pub unsafe fn knock(op: u32, token: u64, buffer: *mut u8, len: usize) -> i64 {
    let result: i64;
    // SAFETY: the caller's; what is called does nothing but return.
    unsafe {
        asm!(
            "call civic_knock",
            inlateout("rax") u64::from(op) => result,
            in("rdi") buffer,
            in("rsi") len,
            in("r8") token,
        );
    }
    result
}

/// Reads a byte of each page of `bytes`, so that they can all be read.
pub fn map_for_reading(bytes: &[u8]) {
    for byte in in_each_page(bytes.len()).map(|index| &bytes[index]) {
        // SAFETY: from a reference.
        unsafe { ptr::from_ref(byte).read_volatile() };
    }
}

/// Writes a byte of each page of `bytes`, so that they can all be written. Their content is lost.
pub fn map_for_writing(bytes: &mut [u8]) {
    for index in in_each_page(bytes.len()) {
        // SAFETY: from a reference that may write.
        unsafe { ptr::from_mut(&mut bytes[index]).write_volatile(0) };
    }
}

/// Indices of bytes among `len`, one at least in each page wherever the first is.
fn in_each_page(len: usize) -> impl Iterator<Item = usize> {
    (0..len).step_by(PAGE).chain(len.checked_sub(1))
}
