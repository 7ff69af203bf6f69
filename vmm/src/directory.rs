//! A VM's directory: its lock, its socket, its log. One live monitor per name.
//!
//! The lock is taken on a file that the path still names afterwards, so that a monitor which removes its directory while another
//! waits at the door cannot leave that one with a lock nobody else sees.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use civic_api::launch::{LOCK_FILE, LOG_FILE, SOCKET_FILE};
use civic_api::{ErrorBody, ErrorCode, FORK_SOCKET_FILE};
use nix::fcntl::{Flock, FlockArg};

/// A directory that this process owns while it lives.
pub struct Directory {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Directory {
    /// Takes the directory at `path`, making it if need be, and clears what a dead monitor left in it.
    pub fn take(path: &Path) -> Result<Self, ErrorBody> {
        let unusable = |what: &str, e: io::Error| {
            ErrorBody::new(ErrorCode::InvalidRequest, format!("cannot {what} {}: {e}", path.display()))
                .with_hint("choose a --run-dir that this user may write to")
        };
        loop {
            DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| unusable("make", e))?;
            let file = match File::options().write(true).create(true).truncate(false).open(path.join(LOCK_FILE)) {
                Ok(file) => file,
                // The last owner removed the directory just now.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(unusable("use", e)),
            };
            let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
                nix::errno::Errno::EWOULDBLOCK => {
                    let name = path.file_name().unwrap_or_default().to_string_lossy();
                    ErrorBody::new(ErrorCode::NameInUse, format!("a VM named '{name}' is running"))
                        .with_hint(format!("choose another --name, or end it with 'civic stop {name}'"))
                }
                errno => unusable("lock", errno.into()),
            })?;
            if still_there(&lock, &path.join(LOCK_FILE)) {
                let directory = Self { path: path.to_owned(), _lock: lock };
                directory.clear(&[LOCK_FILE, LOG_FILE]).map_err(|e| unusable("clear", e))?;
                return Ok(directory);
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Binds the API's socket. Only this user may connect.
    pub fn bind(&self) -> Result<UnixListener, ErrorBody> {
        let socket = self.path.join(SOCKET_FILE);
        UnixListener::bind(&socket).map_err(|e| {
            ErrorBody::new(ErrorCode::InvalidRequest, format!("cannot listen on {}: {e}", socket.display()))
                .with_hint("choose a shorter --run-dir: a socket's path has at most 107 bytes")
        })
    }

    /// Removes what `keep` does not name.
    fn clear(&self, keep: &[&str]) -> io::Result<()> {
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if !keep.iter().any(|name| entry.file_name() == *name) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Leaves nothing behind, or only the logs.
    pub fn remove(self, keep_logs: bool) -> io::Result<()> {
        if keep_logs {
            for socket in [SOCKET_FILE, FORK_SOCKET_FILE] {
                fs::remove_file(self.path.join(socket)).or_else(ignore_missing)?;
            }
            return fs::remove_file(self.path.join(LOCK_FILE));
        }
        self.clear(&[LOCK_FILE])?;
        // The lock goes last: until then the directory is ours.
        fs::remove_file(self.path.join(LOCK_FILE))?;
        match fs::remove_dir(&self.path) {
            // A new owner has come in already.
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            // It is mounted: the jailer removes it.
            Err(_) if crate::process::is_jailed() => Ok(()),
            other => other,
        }
    }
}

fn ignore_missing(e: io::Error) -> io::Result<()> {
    if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) }
}

fn still_there(held: &File, path: &Path) -> bool {
    match (held.metadata(), fs::metadata(path)) {
        (Ok(held), Ok(named)) => (held.dev(), held.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_owner_at_a_time_and_nothing_left_behind() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("run/web");
        let first = Directory::take(&path).unwrap();
        let _socket = first.bind().unwrap();
        let refused = Directory::take(&path).err().unwrap();
        assert_eq!(refused.code, ErrorCode::NameInUse);
        first.remove(false).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn what_a_dead_monitor_left_is_cleared_but_for_its_log() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("web");
        fs::create_dir(&path).unwrap();
        for name in [LOCK_FILE, SOCKET_FILE, LOG_FILE, "serial.log"] {
            fs::write(path.join(name), "old").unwrap();
        }
        let directory = Directory::take(&path).unwrap();
        directory.bind().unwrap();
        assert!(path.join(LOG_FILE).exists() && !path.join("serial.log").exists());
        directory.remove(true).unwrap();
        assert!(path.join(LOG_FILE).exists() && !path.join(SOCKET_FILE).exists());
    }
}
