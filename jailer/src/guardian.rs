//! The jailer's own process: makes what a jail needs, starts the program in it, and stays outside until that ends. It then takes away what
//! it made, and ends as the program did.
//!
//! ```text
//!   take the folder ─ find libraries ─ plan ─ group ─ connect ─ fork ─┬─ introduce ─ "go" ─ watch ─ remove
//!                                                                     └─ (waits) ─ namespaces, root, user, exec
//! ```
//!
//! It reads nothing that a jailed program says: a byte on the leash, whatever it is, means that the program has to end.
#![allow(unsafe_code)]

use std::fs::{self, DirBuilder, File};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use caps::{CapSet, Capability};
use civic_api::launch::{LOCK_FILE, LOG_FILE};
use civic_api::{ErrorBody, ErrorCode};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket, socketpair,
};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};

use crate::cgroup::{self, Group};
use crate::jail::Jail;
use crate::users::Taken;
use crate::{Refusal, inside, libraries, mounts, refusal, refused, root};

/// To whom the program is introduced: a VM that forks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Introduction {
    /// The VM's `fork.sock`.
    pub socket: PathBuf,
    /// As what, in the words of `civic_fork::hello::Jailed`.
    pub role: String,
}

/// Where jails are kept on this host.
#[derive(Clone, Debug)]
pub struct Places {
    /// A folder of the jailer's own.
    pub state: PathBuf,
    /// Control groups are made below this one.
    pub group: PathBuf,
}

/// A program in its jail, seen from outside. Dropped, it takes away what was made for it.
pub struct Jailed {
    pid: Pid,
    leash: Option<OwnedFd>,
    signals: SignalFd,
    // What follows is dropped in this order: nothing of it is needed any more.
    _group: Option<Group>,
    _scratch: Vec<Scratch>,
    _dir: Option<Folder>,
    _user: Taken,
}

/// Starts the program of `jail` as `user`.
///
/// # Errors
/// When this host cannot, or the jail cannot be; nothing is left of it then.
pub fn start(
    jail: &Jail,
    user: Taken,
    introduction: Option<&Introduction>,
    places: &Places,
) -> Result<Jailed, Refusal> {
    const HINT: &str = "see the system's limits";
    jail.check()?;
    let signals = signals().map_err(|e| refusal("cannot wait for signals", e, HINT))?;
    let dir = jail.dir.as_deref().map(|dir| Folder::take(dir, user.user)).transpose()?;
    let libraries = libraries::of(&jail.program)?;
    let scratch = jail.scratch.iter().map(|dir| Scratch::new(dir, user.user)).collect::<Result<Vec<_>, _>>()?;
    let made: Vec<_> = scratch.iter().map(|scratch| scratch.0.clone()).collect();
    let steps = root::plan(jail, &libraries, &made, mounts::look);
    let owners = mounts::owners(&steps, jail.user)?;
    let group = jail.limits.any().then(|| group(jail, places)).transpose()?;
    let connection = introduction.map(|to| meet(&to.socket)).transpose()?;
    let place = places.state.join("root");
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&place)
        .map_err(|e| refusal("cannot make a folder", e, HINT))?;
    let channel = || {
        let (read, write) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        io::Result::Ok((File::from(inside::above(read)?), File::from(inside::above(write)?)))
    };
    let (mut told, tell) = channel().map_err(|e| refusal("cannot make a pipe", e, HINT))?;
    let (go, mut say) = channel().map_err(|e| refusal("cannot make a pipe", e, HINT))?;
    unshare(CloneFlags::CLONE_NEWPID).map_err(|e| refusal("cannot make a namespace of processes", e, "run as root"))?;
    // SAFETY: this process has one thread, so the child may do whatever it could.
    let pid = match unsafe { fork() }.map_err(|e| refusal("cannot start a process", e, HINT))? {
        ForkResult::Child => {
            drop((told, say));
            let mut go = go;
            let mut bytes = [0; 4];
            if go.read_exact(&mut bytes).is_ok() {
                let pid = i32::from_le_bytes(bytes);
                let e = inside::become_program(jail, &steps, &owners, connection.as_ref(), pid, &go, &place);
                let _ = serde_json::to_writer(tell, &e);
            }
            // SAFETY: the call ends this process, in which nothing is to be dropped: it is all its parent's.
            unsafe { libc::_exit(1) }
        }
        ForkResult::Parent { child } => child,
    };
    // From here on it is ended and waited for, whatever happens.
    let mut jailed = Jailed { pid, leash: None, signals, _group: group, _scratch: scratch, _dir: dir, _user: user };
    drop((go, tell));
    if let Some(group) = &jailed._group {
        group.add(pid.as_raw())?;
    }
    if let (Some(connection), Some(to)) = (&connection, introduction) {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        )
        .map_err(|e| refusal("cannot make a leash", e, HINT))?;
        introduce(connection, pid, &to.role, &theirs).map_err(|e| nobody(&to.socket, e))?;
        jailed.leash = Some(ours);
    }
    drop(connection);
    let begun = say.write_all(&pid.as_raw().to_le_bytes());
    begun.map_err(|e| refusal("the jailed process has ended", e, HINT))?;
    let mut failure = Vec::new();
    told.read_to_end(&mut failure).map_err(|e| refusal("cannot hear the jailed process", e, HINT))?;
    if failure.is_empty() {
        return Ok(jailed);
    }
    Err(serde_json::from_slice(&failure).unwrap_or_else(|e| ErrorBody::internal(format!("the jail failed: {e}"))))
}

/// Has the jailed program end at once, and what was made for it taken away: killed itself, a jailer could not do so.
pub const END: Signal = Signal::SIGUSR1;

/// Signals that are passed on or waited for, blocked in this process.
fn signals() -> nix::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD, END] {
        set.add(signal);
    }
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

fn group(jail: &Jail, places: &Places) -> Result<Group, Refusal> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let root = cgroup::mounted(&mounts).ok_or_else(|| {
        let hint = "mount it: mount -t cgroup2 none /sys/fs/cgroup; or leave the limits out";
        refused("this host has no control groups of version 2 mounted", hint)
    })?;
    let files = jail.shown.iter().map(|shown| &shown.path).chain(&jail.scratch);
    let device = |path: &PathBuf| {
        let meta = fs::metadata(path).ok()?;
        Some(if meta.rdev() != 0 { meta.rdev() } else { meta.dev() })
    };
    let disks = cgroup::whole_disks(Path::new("/sys"), &files.filter_map(device).collect::<Vec<_>>());
    Group::new(&root, &places.group, &jail.user.to_string(), &jail.limits, &disks)
}

fn nobody(socket: &Path, e: impl Into<io::Error>) -> Refusal {
    let message = format!("nobody can be forked at {}: {}", socket.display(), e.into());
    ErrorBody::new(ErrorCode::NotFound, message).with_hint("see 'civic list'")
}

/// Connects to a VM that forks. Whoever owns its folder may have put anything there in the socket's place: a link to another's is not followed.
fn meet(path: &Path) -> Result<OwnedFd, Refusal> {
    let found = File::options().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path);
    let found = found.map_err(|e| nobody(path, e))?;
    let connected = || {
        let wire = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        let there = UnixAddr::new(&PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd())))?;
        connect(wire.as_raw_fd(), &there)?;
        nix::Result::Ok(wire)
    };
    let wire = connected().map_err(|e| nobody(path, e))?;
    inside::above(wire).map_err(|e| nobody(path, e))
}

/// Says who will speak, before it can.
fn introduce(connection: &OwnedFd, pid: Pid, role: &str, leash: &OwnedFd) -> io::Result<()> {
    // SAFETY: the call takes its arguments by value and touches no memory of ours.
    let pidfd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    // SAFETY: the kernel has just made this descriptor for us; it is nobody else's, and fits an i32.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as i32) };
    let text = format!("civic-jail 1 {pid} {role}");
    let fds = [pidfd.as_raw_fd(), leash.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(connection.as_raw_fd(), &[IoSlice::new(text.as_bytes())], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

impl Jailed {
    /// Waits for the program to end, passing on signals: its exit status, or 128 and the signal that ended it.
    pub fn wait(mut self) -> u8 {
        if let Err(e) = alone() {
            eprintln!("civic-jailer: cannot give up what is not needed any more: {e}");
        }
        loop {
            let mut ready = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            ready.extend(self.leash.iter().map(|leash| PollFd::new(leash.as_fd(), PollFlags::POLLIN)));
            let polled = poll(&mut ready, PollTimeout::NONE);
            let pulled = ready.get(1).and_then(|leash| leash.revents()).unwrap_or(PollFlags::empty());
            if polled.is_ok() && !pulled.is_empty() {
                self.heed_leash();
            }
            while let Ok(Some(info)) = self.signals.read_signal() {
                if let Some(signal) = Signal::try_from(info.ssi_signo as i32).ok().filter(|s| *s != Signal::SIGCHLD) {
                    // It has not been waited for, so the number is its.
                    let _ = kill(self.pid, if signal == END { Signal::SIGKILL } else { signal });
                }
            }
            match waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(_, status)) => return self.over(status as u8),
                Ok(WaitStatus::Signaled(_, signal, _)) => return self.over(128 + signal as u8),
                Ok(_) | Err(Errno::EINTR) => (),
                Err(_) => return self.over(1),
            }
        }
    }

    /// It has been waited for: its number may be another's.
    fn over(&mut self, status: u8) -> u8 {
        self.pid = Pid::from_raw(0);
        status
    }

    /// Somebody pulls the leash, or nobody holds it any more.
    fn heed_leash(&mut self) {
        let Some(leash) = &self.leash else { return };
        let mut byte = [0];
        match nix::unistd::read(leash, &mut byte) {
            Ok(1) => {
                // It has not been waited for, so the number is its.
                let _ = kill(self.pid, Signal::SIGKILL);
            }
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            // Everybody who could want its end has ended before it.
            _ => (),
        }
        self.leash = None;
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        if self.pid.as_raw() > 0 {
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = waitpid(self.pid, None);
        }
    }
}

/// Gives up what a guardian does not need: the program's input and output, and all capabilities but those to kill and to clean up.
fn alone() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    let needed = [Capability::CAP_KILL, Capability::CAP_DAC_OVERRIDE, Capability::CAP_FOWNER].into();
    caps::clear(None, CapSet::Bounding).map_err(io::Error::other)?;
    caps::set(None, CapSet::Effective, &needed).map_err(io::Error::other)?;
    caps::set(None, CapSet::Permitted, &needed).map_err(io::Error::other)
}

/// A VM's folder, made its user's. Removed on drop if it is empty: the program cannot do that from inside.
struct Folder {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Folder {
    fn take(path: &Path, user: u32) -> Result<Self, Refusal> {
        let hint = "choose another with --run-dir, below a folder of root's";
        let unusable = |e: io::Error| refusal(format!("cannot use {}", path.display()), e, hint);
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| {
            ErrorBody::new(ErrorCode::InvalidRequest, format!("cannot make {}: {e}", path.display())).with_hint(hint)
        })?;
        let dir = File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path);
        let dir = dir.map_err(unusable)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let taken = || {
            let hint = format!("choose another --name, or end it with 'civic stop {name}'");
            ErrorBody::new(ErrorCode::NameInUse, format!("a VM named '{name}' is running")).with_hint(hint)
        };
        let lock = match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return Err(taken()),
            Err((_, e)) => return Err(unusable(e.into())),
        };
        // One that is not jailed holds this.
        if let Ok(file) = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(path.join(LOCK_FILE))
            && let Err((_, Errno::EWOULDBLOCK)) = Flock::lock(file, FlockArg::LockSharedNonblock)
        {
            return Err(taken());
        }
        for entry in fs::read_dir(path).map_err(unusable)? {
            let entry = entry.map_err(unusable)?;
            // What another user may have left is removed as it is, never followed.
            if entry.file_name() == LOG_FILE && entry.file_type().is_ok_and(|kind| kind.is_file()) {
                continue;
            }
            let removed = match entry.file_type() {
                Ok(kind) if kind.is_dir() => fs::remove_dir_all(entry.path()),
                _ => fs::remove_file(entry.path()),
            };
            removed.map_err(unusable)?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(unusable)?;
        std::os::unix::fs::lchown(path, Some(user), Some(user)).map_err(unusable)?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Where something is left, somebody may want to see why.
        let _ = fs::remove_dir(&self.path);
    }
}

/// A folder on the file system of another, for one jail.
struct Scratch(PathBuf);

impl Scratch {
    fn new(beside: &Path, user: u32) -> Result<Self, Refusal> {
        let path = beside.join(format!(".civic-jail-{user}"));
        let unusable = |e: io::Error| {
            refusal(
                format!("cannot use {}", beside.display()),
                e,
                "name another folder with --overlay-dir or --forks dir=",
            )
        };
        // The user is ours alone: what has this name was left by a jail whose guardian was killed.
        match fs::remove_dir_all(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(unusable(e)),
            _ => (),
        }
        DirBuilder::new().mode(0o700).create(&path).map_err(unusable)?;
        let made = Self(path);
        std::os::unix::fs::lchown(&made.0, Some(user), Some(user)).map_err(unusable)?;
        Ok(made)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.0) {
            eprintln!("civic-jailer: cannot remove {}: {e}", self.0.display());
        }
    }
}
