//! Having the guest's processes stand still while the program runs, and go on again.
//!
//! Two ways. SIGSTOP to all: simple, but their parents hear of it, and the first process cannot be stopped so. The freezer of control
//! groups: nobody hears of it, and it takes whoever is in a group, the first process included where systemd has put it into one. The
//! loader and the program are in the root group, which cannot be frozen.

use core::ffi::CStr;

use civic_loader::{Freeze, FromGuest, Step};
use rustix::fd::OwnedFd;
use rustix::io::{Errno, Result};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::channel::Lost;
use crate::failure::{Ending, Failure};
use crate::files::{detached, find_folder, read_into, write};
use crate::link::Link;
use crate::time::{Deadline, sleep_ms};

/// How long to wait for frozen groups to stand still, in milliseconds. A process in the kernel goes on until it comes out of there.
const STANDSTILL_MS: u64 = 1000;

/// What stands still.
pub enum Frozen {
    /// Nothing, or nothing any more.
    Nothing,
    /// All processes but the first and our own.
    Stopped,
    /// The groups below this one.
    Groups(OwnedFd),
}

impl Frozen {
    /// Freezes what is to be.
    pub fn new<'a>(how: Freeze, link: &mut Link<'_>) -> core::result::Result<Self, Ending<'a>> {
        if how == Freeze::Cgroup {
            match freeze_groups() {
                Ok((groups, true)) => return Ok(Self::Groups(groups)),
                Ok((groups, false)) => {
                    link.tell(FromGuest::Warning("some of the guest's processes did not stand still within a second"))?;
                    return Ok(Self::Groups(groups));
                }
                Err(_) => link.tell(FromGuest::Warning(
                    "the guest has no control groups that can be frozen: its processes are stopped by SIGSTOP instead",
                ))?,
            }
        }
        if how == Freeze::None {
            return Ok(Self::Nothing);
        }
        signal_all(Signal::STOP)
            .map_err(|e| Failure::new(Step::Freeze, e, "the guest's processes cannot be stopped by SIGSTOP"))?;
        Ok(Self::Stopped)
    }

    /// Freezes who came after. New members of frozen groups are.
    pub fn again(&self) {
        if let Self::Stopped = self {
            // It was possible before.
            let _ = signal_all(Signal::STOP);
        }
    }

    /// Lets all go on.
    pub fn thaw(&mut self, link: &mut Link<'_>) -> core::result::Result<(), Lost> {
        let thawed = match core::mem::replace(self, Self::Nothing) {
            Self::Nothing => Ok(()),
            Self::Stopped => signal_all(Signal::CONT),
            Self::Groups(root) => set_groups(&root, b"0").map(drop),
        };
        thawed.or_else(|_| link.tell(FromGuest::Warning("the guest's processes could not be made to go on")))
    }
}

/// `kill(-1, …)`: to all processes but the first and our own.
fn signal_all(signal: Signal) -> Result<()> {
    match kill_process_group(Pid::INIT, signal) {
        // There are none.
        Err(Errno::SRCH) => Ok(()),
        result => result,
    }
}

/// Freezes all groups but the root, which is given back, and says whether all of them stand still.
fn freeze_groups() -> Result<(OwnedFd, bool)> {
    let root = detached(c"cgroup2", &[])?;
    write(&root, c"cgroup.procs", b"0")?;
    if set_groups(&root, b"1")? == 0 {
        return Err(Errno::NOENT);
    }
    let deadline = Deadline::after_ms(STANDSTILL_MS);
    while !all_frozen(&root)? {
        if deadline.passed() {
            return Ok((root, false));
        }
        sleep_ms(1);
    }
    Ok((root, true))
}

/// Writes the switch of each group below the root, and says of how many.
fn set_groups(root: &OwnedFd, value: &[u8]) -> Result<usize> {
    let mut count = 0;
    find_folder(root, c".", |_, group| {
        count += usize::from(write(group, c"cgroup.freeze", value).is_ok());
        None::<()>
    })?;
    Ok(count)
}

fn all_frozen(root: &OwnedFd) -> Result<bool> {
    let moving = find_folder(root, c".", |_: &CStr, group| {
        let mut buffer = [0; 256];
        // A group that is gone does not move.
        let events = read_into(group, c"cgroup.events", &mut buffer).ok()?;
        events.split(|byte| *byte == b'\n').any(|line| line == b"frozen 0").then_some(())
    })?;
    Ok(moving.is_none())
}
