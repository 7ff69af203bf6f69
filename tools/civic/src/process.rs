//! Waiting for a process that is not our child, and ending it, without mistaking another that gets its id for it.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::{SIGKILL, SYS_pidfd_open, SYS_pidfd_send_signal, siginfo_t, syscall};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A process, by its pidfd (pidfd_open(2), Linux 5.3): that becomes readable when the process ends, and refers to it whoever has
/// the id by then.
pub struct Process {
    pidfd: OwnedFd,
}

impl Process {
    /// The process that has this id now.
    pub fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: the call takes its arguments by value and touches no memory of ours.
        let fd = Errno::result(unsafe { syscall(SYS_pidfd_open, pid, 0) })?;
        // SAFETY: the kernel has just made this descriptor for us; it is nobody else's, and fits a RawFd.
        Ok(Self { pidfd: unsafe { OwnedFd::from_raw_fd(fd as RawFd) } })
    }

    /// Kills it; one that has ended needs no killing.
    pub fn kill(&self) -> io::Result<()> {
        let (fd, as_kill_does) = (self.pidfd.as_raw_fd(), std::ptr::null::<siginfo_t>());
        // SAFETY: the call takes its arguments by value; the null pointer, which it takes for "as kill(2) does", is not followed.
        match Errno::result(unsafe { syscall(SYS_pidfd_send_signal, fd, SIGKILL, as_kill_does, 0) }) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until it has ended, whether or not somebody has waited for it: true, or false after `limit`.
    pub async fn wait(&self, limit: Duration) -> io::Result<bool> {
        // SAFETY: the descriptor is ours and stays open and the same until `self` is dropped, which this borrows for longer than
        // the registration lives.
        let ended = unsafe { AsyncFd::register_with_interest(self.pidfd.as_raw_fd(), Interest::READABLE) }?;
        match tokio::time::timeout(limit, ended.readable()).await {
            Ok(ready) => ready.map(|_| true),
            Err(_) => Ok(false),
        }
    }
}

impl AsFd for Process {
    /// Readable when it has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn an_ended_process_is_noticed_before_and_after_it_is_reaped() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let waited = |limit| runtime.block_on(process.wait(limit)).unwrap();
        assert!(!waited(Duration::from_millis(1)));
        process.kill().unwrap();
        assert!(waited(Duration::from_secs(20)));
        child.wait().unwrap();
        assert!(waited(Duration::from_secs(20)));
        process.kill().unwrap();
    }

    #[test]
    fn who_is_not_there_cannot_be_opened() {
        // Ids end below this.
        let error = Process::open(1 << 30).err().unwrap();
        assert_eq!(error.raw_os_error(), Some(Errno::ESRCH as i32));
    }
}
