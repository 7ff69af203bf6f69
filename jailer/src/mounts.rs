//! Mounting as a [`root`](crate::root) is planned, in a mount namespace of this process's own; `mount_setattr(2)`, `open_tree(2)`.
//!
//! What is the host's is mounted anew, so that flags and owners are this mount's alone: an owner is mapped by a user namespace that has
//! nothing but that one line in its map (Linux 5.12; ext4, xfs, btrfs and others; tmpfs from 6.3).
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Gid, Uid, chdir, chown, fork, pipe, pivot_root};

use crate::root::{Kind, Seen, Step};
use crate::{Refusal, refusal};

/// What the host has at `path`.
pub fn look(path: &Path) -> Option<Seen> {
    let meta = fs::metadata(path).ok()?;
    let kind = match meta.file_type() {
        kind if kind.is_file() => Kind::File,
        kind if kind.is_dir() => Kind::Folder,
        kind if kind.is_block_device() => Kind::Block(meta.rdev()),
        kind if kind.is_char_device() => Kind::Character(meta.rdev()),
        _ => Kind::Other,
    };
    Some(Seen { kind, mode: meta.mode() & 0o777, user: meta.uid(), group: meta.gid() })
}

/// User namespaces by which owners of files change, by owner and group.
pub type Owners = BTreeMap<(u32, u32), OwnedFd>;

/// Makes those that `steps` need for `user`. To be called while this process has one thread.
///
/// # Errors
/// When the host refuses user namespaces.
pub fn owners(steps: &[Step], user: u32) -> Result<Owners, Refusal> {
    let mut owners = Owners::new();
    for step in steps {
        if let Step::Mount { owner: Some(owner), from, .. } = step
            && !owners.contains_key(owner)
        {
            let hint =
                format!("raise user.max_user_namespaces, or let user {user} use {} by its permissions", from.display());
            let made = owner_map(*owner, user).map_err(|e| refusal("cannot have files change their owner", e, hint))?;
            owners.insert(*owner, made);
        }
    }
    Ok(owners)
}

/// A user namespace in which what is `owner`'s and its group's on disk is `user`'s.
fn owner_map((owner, group): (u32, u32), user: u32) -> io::Result<OwnedFd> {
    let (there, tell) = pipe()?;
    let (wait, go) = pipe()?;
    // SAFETY: this process has one thread, so the child may do whatever it could.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop(go);
            let made = unshare(CloneFlags::CLONE_NEWUSER).is_ok();
            let _ = File::from(tell).write_all(&[u8::from(made)]);
            // The namespace lives at least as long as this process, which is until the parent has it.
            let _ = File::from(wait).read(&mut [0]);
            // SAFETY: the call ends this process, which has nothing to be dropped.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop((tell, wait));
            let mut made = [0];
            let namespace = match File::from(there).read(&mut made) {
                Ok(1) if made[0] == 1 => {
                    let proc = PathBuf::from(format!("/proc/{child}"));
                    fs::write(proc.join("uid_map"), format!("{owner} {user} 1"))
                        .and_then(|()| fs::write(proc.join("gid_map"), format!("{group} {user} 1")))
                        .and_then(|()| File::open(proc.join("ns/user")))
                }
                _ => Err(io::ErrorKind::PermissionDenied.into()),
            };
            drop(go);
            waitpid(child, None)?;
            namespace.map(OwnedFd::from)
        }
    }
}

/// Makes the root that `steps` plan and enters it, with nothing of the host's left. `place` is any folder. In a mount namespace of this
/// process's own.
///
/// # Errors
/// When the host refuses a mount.
pub fn enter(steps: &[Step], owners: &Owners, user: u32, place: &Path) -> Result<(), Refusal> {
    const HINT: &str = "run as root outside of containers, or in one that may mount";
    let none: Option<&Path> = None;
    let failed = |what: &str| {
        let what = what.to_owned();
        move |e: Errno| refusal(what, e, HINT)
    };
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(failed("cannot have mounts of its own"))?;
    mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::MS_NOSUID, Some("size=1m,nr_inodes=4k,mode=755"))
        .map_err(failed("cannot mount a tmpfs"))?;
    for step in steps {
        perform(step, owners, user, place)?;
    }
    chdir(place).map_err(failed("cannot enter the jail"))?;
    pivot_root(".", ".").map_err(|e| {
        refusal("cannot make the jail this process's root", e, "run on a host whose root is not its initramfs")
    })?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("cannot let go of the host's root"))?;
    chdir("/").map_err(failed("cannot enter the jail"))?;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(none, "/", none, flags, none).map_err(failed("cannot make the jail's root read-only"))
}

fn perform(step: &Step, owners: &Owners, user: u32, root: &Path) -> Result<(), Refusal> {
    let inside = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    let cannot = |path: &Path, e: io::Error| {
        let hint = match e.raw_os_error() {
            Some(libc::EINVAL) => format!(
                "its file system cannot map owners: let user {user} use it by its permissions, or put it on another"
            ),
            _ => "see whether it is there".to_owned(),
        };
        refusal(format!("cannot bring {} into the jail", path.display()), e, hint)
    };
    match step {
        Step::Folder(path) => {
            let made = DirBuilder::new().mode(0o755).create(inside(path));
            made.map_err(|e| cannot(path, e))
        }
        Step::File(path) => {
            let made = File::options().write(true).create_new(true).mode(0o644).open(inside(path));
            made.map(drop).map_err(|e| cannot(path, e))
        }
        Step::Node { at, kind, write } => {
            let (kind, number) = match kind {
                Kind::Block(number) => (SFlag::S_IFBLK, *number),
                Kind::Character(number) => (SFlag::S_IFCHR, *number),
                _ => return Ok(()),
            };
            let mode = if *write { Mode::S_IRUSR | Mode::S_IWUSR } else { Mode::S_IRUSR };
            let place = inside(at);
            mknod(&place, kind, mode, number)
                .and_then(|()| chown(&place, Some(Uid::from_raw(user)), Some(Gid::from_raw(user))))
                .map_err(|e| cannot(at, e.into()))
        }
        Step::Mount { from, at, write, run, owner } => {
            let owner = owner.and_then(|owner| owners.get(&owner));
            bind(from, &inside(at), *write, *run, owner).map_err(|e| cannot(at, e))
        }
        Step::Proc(at) => {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
            let none: Option<&Path> = None;
            mount(Some("proc"), &inside(at), Some("proc"), flags, none).map_err(|e| cannot(at, e.into()))
        }
    }
}

/// Mounts what is at `from` at `at`, and nothing that is mounted within.
fn bind(from: &Path, at: &Path, write: bool, run: bool, owner: Option<&OwnedFd>) -> io::Result<()> {
    let tree = open_tree(from)?;
    let mut flags = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    if !write {
        flags |= libc::MOUNT_ATTR_RDONLY;
    }
    if !run {
        flags |= libc::MOUNT_ATTR_NOEXEC;
    }
    if owner.is_some() {
        flags |= libc::MOUNT_ATTR_IDMAP;
    }
    let attributes = libc::mount_attr {
        attr_set: flags,
        attr_clr: 0,
        propagation: 0,
        userns_fd: owner.map_or(0, |owner| owner.as_raw_fd() as u64),
    };
    set_attributes(&tree, &attributes)?;
    attach(&tree, at)
}

fn path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn open_tree(from: &Path) -> io::Result<OwnedFd> {
    let from = path(from)?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the path is a string that lives as long as the call, which only reads it.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, from.as_ptr(), flags) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just made this descriptor for us; it is nobody else's, and fits an i32.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn set_attributes(tree: &OwnedFd, attributes: &libc::mount_attr) -> io::Result<()> {
    let (fd, size) = (tree.as_raw_fd(), size_of::<libc::mount_attr>());
    // SAFETY: an empty string and attributes of the size that is given, which live as long as the call; it only reads them.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd,
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(attributes),
            size,
        )
    };
    Errno::result(done)?;
    Ok(())
}

fn attach(tree: &OwnedFd, at: &Path) -> io::Result<()> {
    let (fd, at) = (tree.as_raw_fd(), path(at)?);
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH;
    // SAFETY: strings that live as long as the call, which only reads them.
    let done = unsafe { libc::syscall(libc::SYS_move_mount, fd, c"".as_ptr(), libc::AT_FDCWD, at.as_ptr(), flags) };
    Errno::result(done)?;
    Ok(())
}
