//! Unpacking: an archive on standard input, in a folder.
//!
//! ```text
//!   a/b/c ─▶ folder ─ a ─ b ─▶ .civic-1f3a90c2 ─▶ c
//!                     └───┴ each opened where the one before is, or made; never through a symbolic link
//! ```
//!
//! Nobody knows who made the archive: no name leads out of the folder, and nothing that is written there by the archive or by others makes it.
//! A file has its name only when all of it is there. Folders that are there keep what they have, times aside; those that are made get
//! their times when all is in them, as far as the archive has it together.

use core::ffi::CStr;

use civic_loader::archive::{Broken, Decimal, Entry, Kind, Parts, Reader, Source, Time, last_part, padding, parts};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, chownat, fchmod, futimens, linkat, mkdirat, open, openat,
    renameat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use crate::copy::{CHUNK, MAX_DEPTH, Trouble, What, read_full, write_all};
use crate::sys;

/// A name's bytes, with a zero at its end.
const NAME: usize = 256;
/// Bytes of the names of all folders on the way to a file: those of the longest path, and more.
const NAMES: usize = 4096 + NAME;

const FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Does it; gives the exit status.
pub fn unpack(path: &CStr, rename: bool) -> i32 {
    let (mut room, mut way, mut names) = ([0; CHUNK], [const { None }; MAX_DEPTH], [0; NAMES]);
    let mut reader = Reader::new();
    let mut name: &[u8] = path.to_bytes();
    let mut tree = match Tree::open(path, rename, &mut way, &mut names) {
        Ok(tree) => tree,
        Err(trouble) => return failed(trouble, name),
    };
    loop {
        name = b"the archive";
        let trouble = match reader.next(&mut Input, &mut room) {
            Ok(Some(entry)) => match tree.add(&entry, &mut room) {
                Ok(()) => continue,
                Err(trouble) => return failed(trouble, entry.name),
            },
            Ok(None) => break,
            Err(Broken::Source(trouble)) => trouble,
            Err(Broken::Archive(fault)) => What::Archive(fault).into(),
        };
        return failed(trouble, name);
    }
    tree.leave(0);
    // Whoever sends it may wait until all of it is taken.
    while read_full(sys::standard(0), &mut room).is_ok_and(|count| count > 0) {}
    for part in [Decimal::new(tree.files).text(), b" ", Decimal::new(tree.bytes).text(), b"\n"] {
        // What was made is made.
        let _ = write_all(sys::standard(1), part);
    }
    0
}

fn failed(trouble: Trouble, name: &[u8]) -> i32 {
    trouble.tell(name);
    1
}

/// Standard input.
struct Input;

impl Source for Input {
    type Error = Trouble;

    fn fill(&mut self, into: &mut [u8]) -> Result<(), Trouble> {
        match read_full(sys::standard(0), into) {
            Ok(count) if count == into.len() => Ok(()),
            Ok(_) => Err(What::EndsEarly.into()),
            Err(errno) => Err(Trouble::new(What::Unreadable, errno)),
        }
    }
}

/// Reads `size` bytes and the padding; writes the bytes to a file, if there is one for them.
#[inline(never)]
fn content(size: u64, room: &mut [u8], to: Option<&OwnedFd>) -> Result<(), Trouble> {
    let mut left = size;
    while left > 0 {
        let room = &mut room[..left.min(CHUNK as u64) as usize];
        Input.fill(room)?;
        if let Some(to) = to {
            write_all(to.as_fd(), room)?;
        }
        left -= room.len() as u64;
    }
    Input.fill(&mut room[..padding(size)])
}

/// The folder, and the way from there to where the last entry was.
struct Tree<'p> {
    base: OwnedFd,
    /// What the first part of all names is replaced by.
    renamed: Option<&'p [u8]>,
    /// What that is has to be a folder.
    folder_only: bool,
    way: &'p mut [Option<Folder>; MAX_DEPTH],
    depth: usize,
    names: &'p mut [u8; NAMES],
    files: u64,
    bytes: u64,
}

/// A folder on the way.
struct Folder {
    fd: OwnedFd,
    /// Where its name ends among all names.
    end: usize,
    /// Its time, once nothing more comes into it.
    time: Option<Time>,
}

impl<'p> Tree<'p> {
    #[inline(never)]
    fn open(
        path: &'p CStr,
        rename: bool,
        way: &'p mut [Option<Folder>; MAX_DEPTH],
        names: &'p mut [u8; NAMES],
    ) -> Result<Self, Trouble> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let bytes = path.to_bytes();
        let (base, renamed) = match open(path, flags, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) if rename => {
                let name = last_part(bytes);
                // Where it begins, but for slashes at the path's end.
                let end = bytes.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
                let parent = c_str(&bytes[..end.saturating_sub(name.len())], names)?;
                if name == b"." {
                    return Err(Errno::NOENT.into());
                }
                let base = open(parent, flags, Mode::empty());
                (base.map_err(|errno| Trouble::new(What::NoParent, errno))?, Some(name))
            }
            opened => (opened?, None),
        };
        Ok(Self { base, renamed, folder_only: bytes.ends_with(b"/"), way, depth: 0, names, files: 0, bytes: 0 })
    }

    /// Makes what an entry is about.
    #[inline(never)]
    fn add(&mut self, entry: &Entry<'_>, room: &mut [u8]) -> Result<(), Trouble> {
        if let Kind::Other(_) = entry.kind {
            Trouble::from(What::LeftOut).tell(entry.name);
            return content(entry.size, room, None);
        }
        let mut way = self.way_to(entry.name)?;
        let Some(mut last) = way.next() else {
            // The folder itself, which is there.
            return if entry.kind == Kind::Folder { Ok(()) } else { Err(Errno::ISDIR.into()) };
        };
        let mut depth = 0;
        for part in way {
            self.enter(depth, last, None)?;
            (depth, last) = (depth + 1, part);
        }
        if entry.kind == Kind::Folder {
            return self.enter(depth, last, Some(entry));
        }
        if depth == 0 && self.renamed.is_some() && self.folder_only {
            return Err(What::NoFolder.into());
        }
        self.leave(depth);
        let mut name = [0; NAME];
        let name = c_str(last, &mut name)?;
        let folder = self.at(depth);
        let temporary = temporary();
        let temporary = CStr::from_bytes_until_nul(&temporary).unwrap_or_default();
        let made =
            self.make(entry, folder, temporary, room).and_then(|()| Ok(renameat(folder, temporary, folder, name)?));
        // Half of a file; or a second name of one that had the wanted name already.
        let _ = unlinkat(folder, temporary, AtFlags::empty());
        made?;
        self.files += 1;
        self.bytes += entry.size;
        Ok(())
    }

    /// Makes a file with all that it has but its name.
    #[inline(never)]
    fn make(&self, entry: &Entry<'_>, folder: BorrowedFd<'_>, name: &CStr, room: &mut [u8]) -> Result<(), Trouble> {
        match entry.kind {
            Kind::HardLink => return self.link(entry.link, folder, name),
            Kind::SymLink => {
                symlinkat(c_str(entry.link, room)?, folder, name)?;
                own(folder, name, entry)?;
            }
            _ => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = openat(folder, name, flags, Mode::from_raw_mode(0o600))?;
                content(entry.size, room, Some(&file))?;
                own(folder, name, entry)?;
                // After its owner, with which some of it would go.
                fchmod(&file, Mode::from_raw_mode(entry.mode))?;
            }
        }
        Ok(utimensat(folder, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// The parts of the way to what has this name in the archive.
    fn way_to<'n>(&self, name: &'n [u8]) -> Result<Parts<'n>, Trouble>
    where
        'p: 'n,
    {
        let parts = parts(name).ok_or(What::LeadsOut)?;
        Ok(match self.renamed {
            Some(first) => parts.renamed(first),
            None => parts,
        })
    }

    /// Where the way has come to at a depth.
    fn at(&self, depth: usize) -> BorrowedFd<'_> {
        match depth.checked_sub(1).and_then(|above| self.way[above].as_ref()) {
            Some(folder) => folder.fd.as_fd(),
            None => self.base.as_fd(),
        }
    }

    fn end(&self, depth: usize) -> usize {
        depth.checked_sub(1).and_then(|above| self.way[above].as_ref()).map_or(0, |folder| folder.end)
    }

    /// Enters the folder `name`, whose depth is `depth`. One that is not there is made, as `entry` says if that is about it.
    #[inline(never)]
    fn enter(&mut self, depth: usize, name: &[u8], entry: Option<&Entry<'_>>) -> Result<(), Trouble> {
        let start = self.end(depth);
        if depth < self.depth && self.names[start..self.end(depth + 1)] == *name {
            // What lies in it may have come first.
            if entry.is_some() {
                self.leave(depth + 1);
            }
            return Ok(());
        }
        self.leave(depth);
        if depth == MAX_DEPTH {
            return Err(What::TooDeep.into());
        }
        let end = start + name.len();
        let room = self.names.get_mut(start..end).ok_or(Trouble::from(Errno::NAMETOOLONG))?;
        room.copy_from_slice(name);
        let mut path = [0; NAME];
        let path = c_str(name, &mut path)?;
        let at = self.at(depth);
        let made = mkdirat(at, path, Mode::from_raw_mode(0o755));
        let fd = match made {
            Ok(()) | Err(Errno::EXIST) => openat(at, path, FOLDER, Mode::empty()).map_err(led_away)?,
            Err(errno) => return Err(errno.into()),
        };
        let mut time = None;
        if let (Ok(()), Some(entry)) = (made, entry) {
            own(at, path, entry)?;
            fchmod(&fd, Mode::from_raw_mode(entry.mode))?;
            time = Some(entry.mtime);
        }
        self.way[depth] = Some(Folder { fd, end, time });
        self.depth = depth + 1;
        Ok(())
    }

    /// Goes back to where the way had come to at a depth.
    fn leave(&mut self, depth: usize) {
        while self.depth > depth {
            self.depth -= 1;
            if let Some(Folder { fd, time: Some(time), .. }) = self.way[self.depth].take() {
                // All else of it is there.
                let _ = futimens(&fd, &times(time));
            }
        }
    }

    /// Gives what has this name in the archive another one.
    #[inline(never)]
    fn link(&self, target: &[u8], folder: BorrowedFd<'_>, name: &CStr) -> Result<(), Trouble> {
        let mut way = self.way_to(target)?;
        let mut part = [0; NAME];
        let mut last = way.next().ok_or(Errno::ISDIR)?;
        let mut at = None;
        for next in way {
            let from = at.as_ref().map_or(self.base.as_fd(), OwnedFd::as_fd);
            at = Some(openat(from, c_str(last, &mut part)?, FOLDER, Mode::empty()).map_err(led_away)?);
            last = next;
        }
        let from = at.as_ref().map_or(self.base.as_fd(), OwnedFd::as_fd);
        linkat(from, c_str(last, &mut part)?, folder, name, AtFlags::empty())
            .map_err(|errno| Trouble::new(What::NoTarget, errno))
    }
}

fn led_away(errno: Errno) -> Trouble {
    match errno {
        Errno::NOTDIR | Errno::LOOP => What::LedAway.into(),
        errno => errno.into(),
    }
}

/// The name of a file that is being made.
fn temporary() -> [u8; 24] {
    let mut name = *b".civic-0000000000000000\0";
    let mut number = sys::rdtsc();
    for digit in &mut name[7..23] {
        *digit = b"0123456789abcdef"[(number >> 60) as usize];
        number <<= 4;
    }
    name
}

/// Gives a file the owner that it is to have.
fn own(folder: BorrowedFd<'_>, name: &CStr, entry: &Entry<'_>) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    chownat(folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}

fn times(mtime: Time) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanoseconds.into() },
    }
}

/// `bytes` as a string in `room`.
#[inline(never)]
fn c_str<'r>(bytes: &[u8], room: &'r mut [u8]) -> Result<&'r CStr, Trouble> {
    let room = room.get_mut(..bytes.len() + 1).ok_or(Errno::NAMETOOLONG)?;
    let (end, start) = room.split_last_mut().ok_or(What::Zero)?;
    start.copy_from_slice(bytes);
    *end = 0;
    CStr::from_bytes_with_nul(room).map_err(|_| What::Zero.into())
}
