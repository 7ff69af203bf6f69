//! How a device's thread shares a processor with the guest's vCPUs.
#![allow(unsafe_code)]

use std::io;

/// Lets the calling thread wait its turn where a vCPU has the processor, instead of taking it when it is woken: SCHED_BATCH (sched(7)).
/// Its share of the processor stays the same, and where another processor is free it begins there at once. A policy that somebody
/// chose for the monitor stays.
///
/// A guest that has more to ask for goes on asking, without a kick for each request, and what it asked for is served together.
/// Measured in the testbed, which has one processor, with `cargo xtask bench io --only NAME`, 9 rounds with the
/// scheduler's default and 9 with this: `blk.randread4k` 0.70 and 2.32 of QEMU's, `vsock.tx` 0.78 and 0.99; 5 and 7 rounds:
/// `net.tcp_tx` 1.23 and 2.23. There, by KVM's counters in debugfs, a MiB that TCP sends, which is 16 frames, cost 31 exits and 18
/// interrupts, since the thread woke for each frame; with this 15 and 7.
///
/// # Errors
/// What sched_setscheduler(2) says.
pub fn wait_for_turns() -> io::Result<()> {
    let how = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is the calling thread; nothing else is passed.
    if unsafe { libc::sched_getscheduler(0) } != libc::SCHED_OTHER {
        return Ok(());
    }
    // SAFETY: 0 is the calling thread; `how` is only read, during the call.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &how) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_waits_for_its_turns() {
        std::thread::spawn(|| {
            wait_for_turns().unwrap();
            wait_for_turns().unwrap();
            // SAFETY: as above.
            assert_ne!(unsafe { libc::sched_getscheduler(0) }, libc::SCHED_OTHER);
        })
        .join()
        .unwrap();
    }
}
