//! What a process does to itself before it becomes the jailed program: the order matters, and none of it can be undone afterwards.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use caps::{CapSet, CapsHashSet};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, dup2_raw, setgroups, sethostname, setresgid, setresuid};

use crate::jail::{Jail, Net, THREADS};
use crate::mounts::{self, Owners};
use crate::root::Step;
use crate::{Refusal, refusal, refused};

/// The descriptor by which the program is connected with whom it was introduced to.
pub const CONNECTION: i32 = 3;
/// The variable in which the program finds its number outside.
pub const PID: &str = "CIVIC_PID";

/// The variable that has the program filter its system calls: `enforce`, or `audit`.
pub const FILTER: &str = "CIVIC_SECCOMP";

/// Variables of the environment that come along, by how they begin.
const VARIABLES: [&str; 3] = ["CIVIC_", "RUST_LOG", "RUST_BACKTRACE"];

/// Becomes the program. Returns only if that cannot be, with the reason.
///
/// `pid` is this process's number outside, `outside` a descriptor that hangs up when the guardian is gone, `place` a folder to mount on.
pub fn become_program(
    jail: &Jail,
    steps: &[Step],
    owners: &Owners,
    connection: Option<&OwnedFd>,
    pid: i32,
    outside: &File,
    place: &Path,
) -> Refusal {
    let ready = namespaces(jail)
        .and_then(|()| mounts::enter(steps, owners, jail.user, place))
        .and_then(|()| renounce(jail.user))
        .and_then(|()| die_with_guardian(outside.as_fd()))
        .and_then(|()| descriptors(connection));
    if let Err(e) = ready {
        return e;
    }
    let mut command = Command::new(&jail.program);
    command.args(&jail.args).env_clear().env(PID, pid.to_string()).current_dir("/");
    // Where nothing else is said, its system calls are filtered.
    command.env(FILTER, "enforce");
    let ours = |name: &str| name != PID && VARIABLES.iter().any(|start| name.starts_with(start));
    command.envs(std::env::vars().filter(|(name, _)| ours(name)));
    let e = command.exec();
    refusal(format!("cannot start {}", jail.program.display()), e, "install Civic's programs where all may read them")
}

fn namespaces(jail: &Jail) -> Result<(), Refusal> {
    const HINT: &str = "run as root, outside of containers or in one that may make namespaces";
    let mut own = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    match &jail.net {
        Net::None => own |= CloneFlags::CLONE_NEWNET,
        Net::Host => (),
        Net::At(path) => {
            let hint = "'ip netns list' shows those there are, in /run/netns";
            let file = File::open(path).map_err(|e| refusal(format!("cannot open {}", path.display()), e, hint))?;
            setns(file, CloneFlags::CLONE_NEWNET)
                .map_err(|e| refusal(format!("{} is no network namespace", path.display()), e, hint))?;
        }
    }
    unshare(own).map_err(|e| refusal("cannot make namespaces", e, HINT))?;
    sethostname("civic").map_err(|e| refusal("cannot name the jail", e, HINT))
}

/// Becomes the user, and gives up whatever could bring anything back.
fn renounce(user: u32) -> Result<(), Refusal> {
    const HINT: &str = "run as root with all capabilities";
    let failed = |what: &str, e: Errno| refusal(what, e, HINT);
    let limit = |resource, most: u64| {
        let (_, hard) = getrlimit(resource).map_err(|e| failed("cannot read limits", e))?;
        let most = most.min(hard);
        setrlimit(resource, most, most).map_err(|e| failed("cannot set limits", e))
    };
    limit(Resource::RLIMIT_CORE, 0)?;
    // The user is nobody else's, so that its processes are the jail's.
    limit(Resource::RLIMIT_NPROC, THREADS)?;
    caps::clear(None, CapSet::Bounding).map_err(|e| refused(format!("cannot drop capabilities: {e}"), HINT))?;
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    setgroups(&[]).map_err(|e| failed("cannot leave groups", e))?;
    setresgid(gid, gid, gid).map_err(|e| failed("cannot change the group", e))?;
    setresuid(uid, uid, uid).map_err(|e| failed("cannot change the user", e))?;
    for set in [CapSet::Inheritable, CapSet::Permitted, CapSet::Effective] {
        caps::set(None, set, &CapsHashSet::new())
            .map_err(|e| refused(format!("cannot drop capabilities: {e}"), HINT))?;
    }
    prctl::set_no_new_privs().map_err(|e| failed("cannot renounce new privileges", e))?;
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
    Ok(())
}

/// Has the kernel kill this process when the guardian ends, however that ends.
fn die_with_guardian(outside: BorrowedFd<'_>) -> Result<(), Refusal> {
    let hint = "see prctl(2)";
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|e| refusal("cannot be bound to the jailer", e, hint))?;
    // One that ended before is not noticed by that.
    let mut hung = [PollFd::new(outside, PollFlags::empty())];
    match poll(&mut hung, PollTimeout::ZERO) {
        Ok(0) => Ok(()),
        _ => Err(refused("the jailer is gone", hint)),
    }
}

/// Keeps the first three descriptors and the connection, and blocks no signal.
fn descriptors(connection: Option<&OwnedFd>) -> Result<(), Refusal> {
    let failed = |e: Errno| refusal("cannot close descriptors", e, "use Linux 5.11 or later");
    let mut first = CONNECTION;
    if let Some(connection) = connection {
        // SAFETY: no descriptor of ours has this number: those that matter until exec were made above it.
        let kept = unsafe { dup2_raw(connection, CONNECTION) }.map_err(failed)?;
        // The program's from now on.
        std::mem::forget(kept);
        first += 1;
    }
    // SAFETY: the call takes its arguments by value; descriptors stay open until exec.
    let closed = unsafe { libc::close_range(first as u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
    Errno::result(closed).map_err(failed)?;
    SigSet::empty().thread_set_mask().map_err(failed)
}

/// Moves a descriptor above the ones that the program gets.
///
/// # Errors
/// When there are none left.
pub fn above(fd: OwnedFd) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: the call takes its arguments by value.
    let moved = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, CONNECTION + 1) };
    let moved = Errno::result(moved)?;
    // SAFETY: the kernel has just made this descriptor for us; it is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(moved) })
}
