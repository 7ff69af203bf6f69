//! How the page server's thread wants a processor: briefly at a time, and soon.
//!
//! Whom it lets through would otherwise take the processor from it at once, before it has gone to sleep. It is then neither asleep, so that the
//! next vCPU that waits for it could wake it on an idle processor, nor running: it waits behind the first, which computes on until it has to
//! wait itself. With bare-metal guests on 2 processors and the scheduler's default of 1.4 ms, the source's first writes were held up for
//! 940 us at p99; with a slice of 0.1 ms, and no `sched_yield(2)`, which did the same harm, for 100 us (`cargo xtask bench fork`, `fork.write_stall`).
//!
//! `sched_setattr(2)`; `sched_runtime` of ordinary threads counts since Linux 6.12 (857b158dc5e8), which is no error before.
#![allow(unsafe_code)]

use std::io;

use nix::errno::Errno;

/// As short as the kernel takes it, in nanoseconds.
const SLICE: u64 = 100_000;

/// Has the calling thread ask for short slices. A policy that somebody chose for the process stays.
///
/// # Errors
/// What sched_getattr(2) and sched_setattr(2) say.
pub fn shorten() -> io::Result<()> {
    let how = attributes()?;
    if how.sched_policy != libc::SCHED_OTHER as u32 {
        return Ok(());
    }
    let how = libc::sched_attr { sched_runtime: SLICE, ..how };
    // SAFETY: `how` is only read, during the call, and says its size itself; 0 is the calling thread.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const how, 0) })?;
    Ok(())
}

/// How the calling thread is scheduled.
fn attributes() -> io::Result<libc::sched_attr> {
    // SAFETY: plain numbers, for which 0 is a value.
    let mut how: libc::sched_attr = unsafe { std::mem::zeroed() };
    // SAFETY: `how` has the size that is passed with it, and is only used during the call; 0 is the calling thread.
    let told = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut how, size_of::<libc::sched_attr>(), 0) };
    Errno::result(told)?;
    Ok(how)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_slice_changes() {
        std::thread::spawn(|| {
            let before = attributes().unwrap();
            shorten().unwrap();
            shorten().unwrap();
            let after = attributes().unwrap();
            assert_eq!((after.sched_policy, after.sched_nice), (before.sched_policy, before.sched_nice));
            // A kernel that does not heed it tells of none.
            assert!(before.sched_runtime == 0 || after.sched_runtime == SLICE, "{}", after.sched_runtime);
        })
        .join()
        .unwrap();
    }
}
