//! What the program sees as `/`, in a mount namespace of its own.
//!
//! ```text
//!   the store's file system   over the guest's root, in this namespace only
//!   ├── guest                 the guest's root with all that is mounted there
//!   ├── proc, sys, dev        the kernel's, new
//!   │            └── pts      terminals of our own
//!   └── tmp, run              in memory, if the store cannot be written
//! ```

use core::ffi::CStr;

use civic_loader::{FromGuest, Step, Store};
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, CWD, Mode, StatVfsMountFlags, fstatvfs, mkdirat, statat};
use rustix::io::{Errno, Result};
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount_change, move_mount, open_tree};
use rustix::process::{chdir, chroot, fchdir};

use crate::channel::Lost;
use crate::failure::{Ending, Failure};
use crate::files::{Setting, detached};
use crate::link::Link;
use crate::time::Deadline;
use crate::{disk, sys};

/// What is mounted in a store that can be written: where, what, with which settings.
const KERNELS: [(&CStr, &CStr, &[Setting<'static>]); 4] =
    [(c"proc", c"proc", &[]), (c"sys", c"sysfs", &[]), (c"dev", c"devtmpfs", &[]), (c"dev/pts", c"devpts", TERMINALS)];
/// And in one that cannot.
const IN_MEMORY: [(&CStr, &CStr, &[Setting<'static>]); 2] =
    [(c"tmp", c"tmpfs", &[(c"mode", Some(b"1777"))]), (c"run", c"tmpfs", &[(c"mode", Some(b"0755"))])];
/// What a guest may lack: where it would be seen, and what.
const GUESTS: [(&CStr, &CStr, &CStr); 3] =
    [(c"/proc/self", c"/proc", c"proc"), (c"/sys/class", c"/sys", c"sysfs"), (c"/dev/null", c"/dev", c"devtmpfs")];

/// A new instance of devpts whose terminals all may open.
pub const TERMINALS: &[Setting<'static>] =
    &[(c"newinstance", None), (c"ptmxmode", Some(b"0666")), (c"mode", Some(b"0620")), (c"gid", Some(b"5"))];

/// Mounts from here on are not the guest's.
pub fn leave_namespace() -> core::result::Result<(), Failure<'static>> {
    let failure = |errno, text| Failure::new(Step::Namespace, errno, text);
    sys::unshare_mounts().map_err(|e| failure(e, "the guest's kernel gives no mount namespace"))?;
    mount_change(c"/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .map_err(|e| failure(e, "the guest's mounts cannot be made private"))
}

/// Makes the guest's root the program's: with /proc, /sys and /dev, if there are such folders.
pub fn complete(link: &mut Link<'_>) -> core::result::Result<(), Ending<'static>> {
    chdir(c"/").map_err(|e| Failure::new(Step::Root, e, "the guest's root cannot be entered"))?;
    for (sign, path, fs) in GUESTS {
        if statat(CWD, sign, AtFlags::empty()).is_err() && statat(CWD, path, AtFlags::empty()).is_ok() {
            let mounted = detached(fs, &[]).and_then(|fs| attach(&fs, path));
            warn(link, mounted, path)?;
        }
    }
    Ok(())
}

/// Makes the store the program's root.
pub fn enter<'a>(link: &mut Link<'_>, store: &Store<'a>, deadline: Deadline) -> core::result::Result<(), Ending<'a>> {
    let failure = |errno, text| Failure::new(Step::Root, errno, text);
    let guest = open_tree(
        CWD,
        c"/",
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE,
    );
    let root = disk::mount(store, deadline)?;
    attach(&root, c"/").map_err(|e| failure(e, "the store cannot be mounted over the guest's root"))?;
    // The lookup of `/` goes on to begin below the mount until the root changes.
    fchdir(&root).and_then(|()| chroot(c".")).map_err(|e| failure(e, "the store cannot be entered"))?;

    let writable = fstatvfs(&root).is_ok_and(|stat| !stat.f_flag.contains(StatVfsMountFlags::RDONLY));
    warn(link, make_folder(c"guest").and_then(|()| attach(&guest?, c"guest")), c"guest")?;
    let in_memory = if writable { &[][..] } else { &IN_MEMORY[..] };
    for (path, fs, settings) in KERNELS.iter().chain(in_memory) {
        let mounted = make_folder(path).and_then(|()| detached(fs, settings)).and_then(|fs| attach(&fs, path));
        warn(link, mounted, path)?;
    }
    // Even where nothing is mounted there.
    for path in [c"tmp", c"run"] {
        let _ = make_folder(path);
    }
    Ok(())
}

fn attach(tree: &OwnedFd, path: &CStr) -> Result<()> {
    move_mount(tree, c"", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Makes a folder if there is none and one can be made.
fn make_folder(path: &CStr) -> Result<()> {
    match mkdirat(CWD, path, Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST | Errno::ROFS) => Ok(()),
        result => result,
    }
}

fn warn(link: &mut Link<'_>, mounted: Result<()>, path: &CStr) -> core::result::Result<(), Lost> {
    if mounted.is_ok() {
        return Ok(());
    }
    let path = path.to_bytes();
    link.tell(FromGuest::Warning(match path.strip_prefix(b"/").unwrap_or(path) {
        b"guest" => "the program does not see the guest's root at /guest",
        b"proc" => "nothing could be mounted at the program's /proc",
        b"sys" => "nothing could be mounted at the program's /sys",
        b"dev" => "nothing could be mounted at the program's /dev",
        b"dev/pts" => "nothing could be mounted at the program's /dev/pts",
        b"tmp" => "nothing could be mounted at the program's /tmp: it cannot be written",
        _ => "nothing could be mounted at the program's /run: it cannot be written",
    }))
}
