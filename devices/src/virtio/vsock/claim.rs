//! The right to a socket's name in the file system.
//!
//! ```text
//! PATH        the socket; connect(2) to one whose process has ended is refused
//! PATH.lock   held with flock(2) as long as the socket is there
//! ```
//!
//! A process that was killed leaves both behind. That nobody listens does not tell whether a socket is of the dead: one that is bound
//! and does not listen yet answers the same, and may have come in place of another just now. So only who holds the lock binds, and
//! only it removes what nobody listens on. Of two processes that come at once one is refused; neither waits.
//!
//! The lock is held on a file that the path still names afterwards: who goes removes it, and another may have opened it before.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{UnixAddr, connect};
use tracing::warn;

use super::listener::{VsockError, stream_socket};

/// How often a lock may vanish before it is had: each time another process has come and gone in the meantime.
const ATTEMPTS: usize = 100;

/// The right to bind a socket to a path. Given up when dropped; the socket must be gone by then.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    lock_path: PathBuf,
    lock: Flock<File>,
}

impl Claim {
    /// The right to bind to `path`.
    ///
    /// # Errors
    /// When another process has it, or the lock cannot be had.
    pub fn take(path: &Path) -> Result<Self, VsockError> {
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);
        let failed = |source: io::Error| VsockError::Io { path: path.to_owned(), source };
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        for _ in 0..ATTEMPTS {
            let mut options = File::options();
            let options = options.write(true).create(true).truncate(false).mode(0o600).custom_flags(flags);
            let file = options.open(&lock_path).map_err(failed)?;
            let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
                Errno::EWOULDBLOCK => VsockError::InUse(path.to_owned()),
                errno => failed(errno.into()),
            })?;
            if identity_of(&lock).is_ok_and(|held| identity(&lock_path).is_ok_and(|named| named == held)) {
                return Ok(Self { path: path.to_owned(), lock_path, lock });
            }
        }
        Err(VsockError::InUse(path.to_owned()))
    }

    /// Removes the socket that a process left behind which has ended.
    ///
    /// # Errors
    /// When somebody listens there, or it is something else than a socket.
    pub fn clear(&self) -> Result<(), VsockError> {
        let failed = |source: io::Error| VsockError::Io { path: self.path.clone(), source };
        match self.path.symlink_metadata() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(failed(e)),
            // To connect to a file of another sort is refused as well.
            Ok(there) if !there.file_type().is_socket() => return Err(VsockError::Taken(self.path.clone())),
            Ok(_) => {}
        }
        let address = UnixAddr::new(&self.path).map_err(|e| failed(e.into()))?;
        let socket = stream_socket().map_err(|e| failed(e.into()))?;
        match connect(socket.as_raw_fd(), &address) {
            Err(Errno::ENOENT) => Ok(()),
            Err(Errno::ECONNREFUSED) => {
                warn!(path = %self.path.display(), "replaces a socket that nobody listens on any more");
                std::fs::remove_file(&self.path).map_err(failed)
            }
            // It took the connection, or there is somebody who is too busy for it, or wants another sort.
            _ => Err(VsockError::InUse(self.path.clone())),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Still locked: nobody can have put another lock there.
        let ours = identity_of(&self.lock).is_ok_and(|held| identity(&self.lock_path).is_ok_and(|named| named == held));
        if ours && let Err(e) = std::fs::remove_file(&self.lock_path) {
            warn!(path = %self.lock_path.display(), "cannot remove the lock of the vsock device's socket: {e}");
        }
    }
}

/// Device and inode of what has this path.
pub fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = path.symlink_metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

fn identity_of(file: &File) -> io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}
