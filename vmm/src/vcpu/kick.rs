//! The signal that takes a thread out of `KVM_RUN`, and the shared page behind it.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use nix::libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// The page of the vCPU that this thread runs, or null.
    static PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    // Async-signal-safe: a constant-initialised thread local without destructor and one store.
    let page = PAGE.with(Cell::get);
    if !page.is_null() {
        // SAFETY: non-null only while the thread's `RunPage` lives, which ends before the page is unmapped.
        let flag = unsafe { &raw mut (*page).immediate_exit };
        // SAFETY: as above; a byte of its own that the kernel only reads.
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the handler, for the process; calling it again changes nothing.
pub fn install_handler() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(Into::into)
}

/// Takes the thread out of `KVM_RUN`, or keeps it from entering.
pub fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the handle has not been joined, so the thread id is valid even if the thread has ended.
    unsafe { nix::libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
}

/// The thread's claim on its vCPU's page; while it lives, kicks reach the page.
pub struct RunPage(*mut kvm_run);

impl RunPage {
    /// Claims the page of `fd` for this thread. `fd` must outlive the claim and stay on this thread, as in `Vcpu::run`.
    pub fn enter(fd: &mut VcpuFd) -> Self {
        let page: *mut kvm_run = fd.get_kvm_run();
        PAGE.with(|cell| cell.set(page));
        Self(page)
    }

    /// Size in bytes of one item of the I/O exit just taken (a string instruction moves several).
    pub fn io_size(&self) -> usize {
        // SAFETY: the page is mapped while the claim lives.
        let size = unsafe { &raw const (*self.0).__bindgen_anon_1.io.size };
        // SAFETY: as above; after an I/O exit the kernel has written this member, and any bit pattern is a valid u8.
        let size = unsafe { size.read_volatile() };
        usize::from(size)
    }

    /// What KVM said of an internal error just reported: suberror and data.
    pub fn internal_error(&self) -> String {
        // SAFETY: the page is mapped while the claim lives.
        let error = unsafe { &raw const (*self.0).__bindgen_anon_1.internal };
        // SAFETY: as above; after an internal error the kernel has written this member, and any bit pattern is valid.
        let error = unsafe { error.read_volatile() };
        let count = (error.ndata as usize).min(error.data.len());
        format!("suberror {}, data {:x?}", error.suberror, &error.data[..count])
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        PAGE.with(|cell| cell.set(ptr::null_mut()));
    }
}
