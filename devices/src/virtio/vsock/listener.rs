//! The host's side of the device in the file system: a socket for programs that want to connect into the guest, and beside
//! it, named after the ports, the sockets of programs that the guest may connect to.
//!
//! ```text
//! PATH       ours: a program connects and says which port of the guest it wants
//! PATH_52    a program's: where the guest gets to when it connects to port 52 of the host
//! PATH.lock  ours, see `claim`
//! ```

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use nix::sys::stat::{Mode, fchmod};
use tracing::warn;

use super::claim::{Claim, identity};

/// What a path of a unix socket may have, without the byte that ends it.
const MAX_PATH: usize = 107;
/// An underscore and a port.
const MAX_SUFFIX: usize = 11;

/// Why the device cannot listen where it should.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// Somebody has a socket there: another VM's monitor, or another program.
    #[error("the socket {} is in use", .0.display())]
    InUse(PathBuf),
    /// Something has that name that is no socket.
    #[error("{} exists already, and is no socket", .0.display())]
    Taken(PathBuf),
    /// Unix sockets have short names, and this one is to be the beginning of others.
    #[error("the path {} is too long for a socket: it has {} bytes, and may have {max}", path.display(), path.as_os_str().len(), max = MAX_PATH - MAX_SUFFIX)]
    TooLong {
        /// The absolute path.
        path: PathBuf,
    },
    /// Anything else that the system said.
    #[error("cannot listen on {}", path.display())]
    Io {
        /// As given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A listening socket in the file system, for the user alone. It is unlinked when dropped.
#[derive(Debug)]
pub struct VsockListener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode: whether what has the path at the end is still ours.
    identity: (u64, u64),
    /// Goes last.
    _claim: Claim,
}

impl VsockListener {
    /// Listens on `path`. A socket that a process left there which has ended is replaced.
    ///
    /// # Errors
    /// When something else has that path, it is too long, or the socket cannot be made.
    pub fn bind(path: &Path) -> Result<Self, VsockError> {
        let failed = |source: io::Error| VsockError::Io { path: path.to_owned(), source };
        // Not to depend on the working directory later.
        let path = std::path::absolute(path).map_err(failed)?;
        if path.as_os_str().len() > MAX_PATH - MAX_SUFFIX {
            return Err(VsockError::TooLong { path });
        }
        let because = |errno: Errno| match errno {
            // Another program that came between.
            Errno::EADDRINUSE => VsockError::InUse(path.clone()),
            _ => failed(errno.into()),
        };
        let claim = Claim::take(&path)?;
        claim.clear()?;
        let socket = stream_socket().map_err(because)?;
        // Linux gives the name the mode that the socket has: nobody else can connect even before the next call.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR).map_err(because)?;
        bind(socket.as_raw_fd(), &UnixAddr::new(&path).map_err(because)?).map_err(because)?;
        let identity = identity(&path).map_err(failed)?;
        let bound = Self { listener: socket.into(), path: path.clone(), identity, _claim: claim };
        listen(&bound.listener, Backlog::MAXCONN).map_err(because)?;
        Ok(bound)
    }

    /// The next program that connected; `WouldBlock` when there is none.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// Connects to the program that serves `port` of the host.
    ///
    /// # Errors
    /// When there is none, or it is so far behind in accepting that it would have to be waited for.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let socket = stream_socket()?;
        connect(socket.as_raw_fd(), &UnixAddr::new(Path::new(&path))?)?;
        Ok(socket.into())
    }
}

impl AsFd for VsockListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity)
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            warn!(path = %self.path.display(), "cannot remove the vsock device's socket: {e}");
        }
    }
}

/// A unix socket that never waits.
pub(super) fn stream_socket() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn listens_for_its_user_alone_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let listener = VsockListener::bind(&path).unwrap();
        assert_eq!(path.symlink_metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    fn names(dir: &tempfile::TempDir) -> Vec<String> {
        let entries = std::fs::read_dir(dir.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    }

    /// What a process that was killed leaves at `path`.
    fn leave_behind(path: &Path) {
        drop(UnixListener::bind(path).unwrap());
        std::fs::write(path.with_extension("sock.lock"), "").unwrap();
    }

    #[test]
    fn what_is_not_its_own_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let listener = VsockListener::bind(&path).unwrap();
        std::fs::rename(&path, dir.path().join("moved")).unwrap();
        std::fs::write(&path, "another's").unwrap();
        drop(listener);
        assert!(matches!(VsockListener::bind(&path), Err(VsockError::Taken(taken)) if taken == path));
        assert_eq!(names(&dir), ["moved", "v.sock"]);
    }

    #[test]
    fn what_somebody_listens_on_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let refused = || matches!(VsockListener::bind(&path), Err(VsockError::InUse(taken)) if taken == path);
        let listener = VsockListener::bind(&path).unwrap();
        assert!(refused());
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(listener);
        // Programs that know no lock: one that listens, one whose queue is full, one of another sort.
        let server = UnixListener::bind(&path).unwrap();
        assert!(refused());
        listen(&server, Backlog::new(0).unwrap()).unwrap();
        let _waiting: Vec<_> = std::iter::from_fn(|| {
            let socket = stream_socket().unwrap();
            connect(socket.as_raw_fd(), &UnixAddr::new(&path).unwrap()).is_ok().then_some(socket)
        })
        .collect();
        assert!(refused());
        drop(server);
        std::fs::remove_file(&path).unwrap();
        let _datagrams = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        assert!(refused());
        assert_eq!(names(&dir), ["v.sock"]);
    }

    #[test]
    fn what_was_left_behind_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        leave_behind(&path);
        let listener = VsockListener::bind(&path).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(listener);
        assert_eq!(names(&dir), [""; 0]);
    }

    #[test]
    fn of_several_that_replace_it_at_once_one_does() {
        const RIVALS: usize = 4;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let together = std::sync::Barrier::new(RIVALS);
        for _ in 0..200 {
            leave_behind(&path);
            let rival = || {
                together.wait();
                let bound = VsockListener::bind(&path);
                // All have tried before one goes.
                together.wait();
                if let Ok(listener) = &bound {
                    let _client = UnixStream::connect(&path).unwrap();
                    listener.accept().unwrap();
                }
                bound.map(drop)
            };
            let outcomes: Vec<_> = std::thread::scope(|scope| {
                let rivals: Vec<_> = (0..RIVALS).map(|_| scope.spawn(rival)).collect();
                rivals.into_iter().map(|rival| rival.join().unwrap()).collect()
            });
            let refused = |outcome: &&Result<(), VsockError>| matches!(outcome, Err(VsockError::InUse(_)));
            assert_eq!(outcomes.iter().filter(refused).count(), RIVALS - 1, "{outcomes:?}");
            assert!(outcomes.iter().any(Result::is_ok), "{outcomes:?}");
            assert_eq!(names(&dir), [""; 0]);
        }
    }

    /// Each holds it for a moment and goes, while others come: never two at once.
    #[test]
    fn those_who_come_and_go_never_meet() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let holders = std::sync::atomic::AtomicUsize::new(0);
        let come_and_go = || {
            let mut held = 0;
            for _ in 0..2000 {
                match VsockListener::bind(&path) {
                    Ok(listener) => {
                        assert_eq!(holders.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                        held += 1;
                        holders.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        drop(listener);
                    }
                    Err(VsockError::InUse(_)) => {}
                    Err(e) => panic!("{e:?}"),
                }
            }
            held
        };
        let held: usize = std::thread::scope(|scope| {
            let all: Vec<_> = (0..3).map(|_| scope.spawn(come_and_go)).collect();
            all.into_iter().map(|one| one.join().unwrap()).sum()
        });
        assert!(held > 0);
        assert_eq!(names(&dir), [""; 0]);
    }

    #[test]
    fn names_what_is_wrong_with_a_path() {
        let dir = tempfile::tempdir().unwrap();
        let room = MAX_PATH - MAX_SUFFIX - dir.path().as_os_str().len() - 1;
        let longest = dir.path().join("v".repeat(room));
        let listener = VsockListener::bind(&longest).unwrap();
        // The longest name of a port still fits.
        assert_eq!(listener.connect(u32::MAX).unwrap_err().kind(), io::ErrorKind::NotFound);
        let error = VsockListener::bind(&dir.path().join("v".repeat(room + 1))).unwrap_err();
        assert!(matches!(error, VsockError::TooLong { .. }));
        assert!(error.to_string().ends_with("it has 97 bytes, and may have 96"), "{error}");
        let nowhere = dir.path().join("no/v.sock");
        assert!(matches!(VsockListener::bind(&nowhere), Err(VsockError::Io { path, .. }) if path == nowhere));
    }

    #[test]
    fn connects_to_whoever_serves_the_port() {
        let dir = tempfile::tempdir().unwrap();
        let listener = VsockListener::bind(&dir.path().join("v")).unwrap();
        assert_eq!(listener.connect(7).unwrap_err().kind(), io::ErrorKind::NotFound);
        let server = UnixListener::bind(dir.path().join("v_7")).unwrap();
        listener.connect(7).unwrap();
        drop(server);
        assert_eq!(listener.connect(7).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
