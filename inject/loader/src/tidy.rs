//! Leaving nothing behind: what the program has left running ends, and the store is unmounted, so that the next who gets it finds a file
//! system that needs no recovery.
//!
//! ```text
//!   adopt ─▶ the program, its end ─▶ end_orphans ─▶ leave_store ─▶ the disk can be opened by whoever wants it alone
//! ```
//!
//! Processes whose parents have ended become the loader's own, so that all that the program has started are found, however they went into
//! the background.

use civic_loader::FromGuest;
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, FileType, Mode, OFlags, fsync, mknodat, open, stat, syncfs};
use rustix::io::{Errno, Result};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{
    Pid, Signal, WaitOptions, chdir, chroot, fchdir, getpid, kill_process, set_child_subreaper, wait,
};

use crate::channel::Lost;
use crate::files::{detached, find_folder, read_into};
use crate::link::Link;
use crate::time::{Deadline, sleep_ms};

/// How long killed processes may take to end, and the store to be let go, in milliseconds: one that is in the kernel goes on until it comes
/// out of there.
const PATIENCE_MS: u64 = 5000;
/// How often to look, in milliseconds.
const LOOK_MS: u64 = 2;

/// From now on, processes whose parents have ended are ours.
pub fn adopt() {
    // Those of a kernel that forbids it are not found, and may keep the store: that is told then.
    let _ = set_child_subreaper(Some(getpid()));
}

/// Kills all processes that the program has left, and theirs. What cannot be done is told by the store's not being let go.
pub fn end_orphans(proc: Option<&OwnedFd>) {
    let deadline = Deadline::after_ms(PATIENCE_MS);
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => continue,
            Ok(None) => {}
            // There are none any more.
            Err(_) => return,
        }
        let Some(proc) = proc.filter(|_| !deadline.passed()) else { return };
        let ours = getpid();
        let _ = find_folder(proc, c".", |name, process| {
            let pid = str::from_utf8(name.to_bytes()).ok()?.parse().ok().and_then(Pid::from_raw)?;
            let mut buffer = [0; 512];
            if parent(read_into(process, c"stat", &mut buffer).ok()?) == Some(ours) {
                // Nobody but us waits for it: the number is its own.
                let _ = kill_process(pid, Signal::KILL);
            }
            None::<()>
        });
        sleep_ms(LOOK_MS);
    }
}

/// Whose child a process is, by what `/proc/PID/stat` says of it (proc(5)): the field behind its name, which is in parentheses and may have
/// any, and its state.
fn parent(stat: &[u8]) -> Option<Pid> {
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = stat[name_end + 1..].split(|byte| *byte == b' ').filter(|field| !field.is_empty());
    str::from_utf8(fields.nth(1)?).ok()?.parse().ok().and_then(Pid::from_raw)
}

/// Has what the program has written to the store, which is the root, on its disk: whoever ends the guest then loses nothing of it.
pub fn sync_store(link: &mut Link<'_>) -> core::result::Result<(), Lost> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match open(c"/", flags, Mode::empty()).and_then(syncfs) {
        Ok(()) => Ok(()),
        Err(_) => link.tell(FromGuest::Warning("not all that was written to the store is on its disk")),
    }
}

/// Unmounts the store, which is the root, and waits until all of it is on its disk.
pub fn leave_store(link: &mut Link<'_>) -> core::result::Result<(), Lost> {
    match unmount_root() {
        Ok(()) => Ok(()),
        Err(Errno::BUSY) => link.tell(FromGuest::Warning(
            "the store is still in use in the guest and was not unmounted: who gets it next has to recover it",
        )),
        Err(_) => link.tell(FromGuest::Warning("the store could not be unmounted: who gets it next has to recover it")),
    }
}

fn unmount_root() -> Result<()> {
    let nowhere = detached(c"tmpfs", &[])?;
    chdir(c"/")?;
    let device = stat(c".")?.st_dev;
    unmount(c".", UnmountFlags::DETACH)?;
    // The last that holds it are our own root and folder.
    fchdir(&nowhere)?;
    chroot(c".")?;
    mknodat(CWD, c"store", FileType::BlockDevice, Mode::RUSR, device)?;
    let deadline = Deadline::after_ms(PATIENCE_MS);
    loop {
        // As long as it is mounted, nobody has it alone.
        match open(c"store", OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty()) {
            Ok(disk) => return fsync(&disk),
            Err(Errno::BUSY) if !deadline.passed() => sleep_ms(LOOK_MS),
            Err(Errno::BUSY) => return Err(Errno::BUSY),
            // btrfs has a number of its own, which is no disk's.
            Err(_) => return Ok(()),
        }
    }
}
