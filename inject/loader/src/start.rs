//! Where the kernel enters, and what ends it.
#![allow(unsafe_code)]

use core::arch::global_asm;
use core::ffi::{CStr, c_char};

use crate::{run, sys};

// The stack holds the count of arguments, their addresses, and more that is not looked at. Where the monitor may have a breakpoint is said
// in `civic_loader::KNOCK`; it knows where the first instruction is.
global_asm!(
    ".balign 16",
    ".globl _start",
    "_start:",
    "    jmp 2f",
    ".balign {knock}",
    ".globl civic_knock",
    "civic_knock:",
    "    nop",
    "    ret",
    "2:",
    "    xor ebp, ebp",
    "    mov rdi, [rsp]",
    "    lea rsi, [rsp + 8]",
    "    and rsp, -16",
    "    call {start}",
    "    ud2",
    knock = const civic_loader::KNOCK,
    start = sym start,
);

extern "C" fn start(count: usize, arguments: *const *const c_char) -> ! {
    if count < 2 {
        sys::exit(2);
    }
    // SAFETY: there are two arguments, so there is a second address.
    let argument = unsafe { arguments.add(1) };
    // SAFETY: see above; the kernel has put it there.
    let argument = unsafe { argument.read() };
    // SAFETY: the kernel has put a string there, which nobody changes.
    let argument = unsafe { CStr::from_ptr(argument) };
    sys::exit(run(argument.to_bytes()))
}

/// Nothing here panics on purpose. The host hears nothing any more, and says so when it has waited long enough.
#[cfg(panic = "abort")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    sys::exit(3)
}
