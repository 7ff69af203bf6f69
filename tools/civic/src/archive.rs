//! Archives on the host: files become a tar stream for a guest, and a guest's tar stream becomes files.
//!
//! What comes from a guest is hostile. Its names begin with what was asked for, and lead nowhere from there but down: each is looked up from
//! the destination by its descriptor, and not through symbolic links, its own or others'. A file has its name only when all of it is there.
//! What an archive has besides files, folders and symbolic links is left out or refused, permissions that change who a program runs as are
//! taken away unless owners are kept, and no more is held of it than [`HELD`] and the names of the folders that it is in.

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use civic_loader::archive::parts;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, renameat};
use nix::sys::stat::{Mode, UtimensatFlags, fchmod, futimens, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, symlinkat, unlinkat};
use serde::Serialize;
use tar::{Archive, Builder, Entry, EntryType, Header};

/// Bytes of a header and all that belongs to it, at most: a guest's are kept in memory.
const HELD: u64 = 64 << 10;
/// Bytes of a name that a header has a place for.
const SHORT: usize = 100;

/// What was copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Copied {
    /// Files and symbolic links.
    pub files: u64,
    /// Bytes of their content.
    pub bytes: u64,
}

/// Takes what is worth telling while something is copied.
pub type Warn<'w> = &'w dyn Fn(String);

/// A name for people: in one line, and without what terminals obey.
pub fn shown(name: &[u8]) -> String {
    let control = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    String::from_utf8_lossy(name).chars().map(control).collect()
}

/// Whoever makes the archive may say why.
fn too_early() -> anyhow::Error {
    io::Error::new(ErrorKind::UnexpectedEof, "the archive ends too early").into()
}

/// Writes `from` and all that is in it as an archive whose names begin with `name`.
///
/// # Errors
/// When something cannot be read, or the archive cannot be written.
pub fn pack(from: &Path, name: &[u8], keep_owners: bool, to: impl Write, warn: Warn<'_>) -> Result<()> {
    let mut packer = Packer { builder: Builder::new(to), keep_owners, warn };
    packer.add(from, name.to_vec())?;
    packer.builder.into_inner()?.flush()?;
    Ok(())
}

struct Packer<'w, W: Write> {
    builder: Builder<W>,
    keep_owners: bool,
    warn: Warn<'w>,
}

impl<W: Write> Packer<'_, W> {
    fn add(&mut self, path: &Path, name: Vec<u8>) -> Result<()> {
        let of = || format!("'{}'", path.display());
        let meta = fs::symlink_metadata(path).with_context(of)?;
        if meta.is_dir() {
            self.header(&meta, EntryType::Directory, &[&name[..], b"/"].concat(), b"", 0)?;
            let mut inside = fs::read_dir(path).and_then(Iterator::collect::<io::Result<Vec<_>>>).with_context(of)?;
            inside.sort_unstable_by_key(fs::DirEntry::file_name);
            for file in inside {
                self.add(&file.path(), [&name[..], b"/", file.file_name().as_bytes()].concat())?;
            }
        } else if meta.is_symlink() {
            let link = fs::read_link(path).with_context(of)?;
            self.header(&meta, EntryType::Symlink, &name, link.as_os_str().as_bytes(), 0)?;
        } else if meta.is_file() {
            let file = File::open(path).with_context(of)?;
            let meta = file.metadata().with_context(of)?;
            self.header(&meta, EntryType::Regular, &name, b"", meta.len())?;
            self.content(file, meta.len(), &of())?;
        } else {
            (self.warn)(format!("{} is left out: it is no file, folder or symbolic link", of()));
        }
        Ok(())
    }

    /// As much as was promised, whatever becomes of the file.
    fn content(&mut self, file: File, size: u64, name: &str) -> Result<()> {
        let to = self.builder.get_mut();
        let mut file = file.take(size);
        let copied = io::copy(&mut file, to).with_context(|| name.to_owned())?;
        if copied < size {
            (self.warn)(format!("{name} became shorter while it was read: it is filled up with zeroes"));
            io::copy(&mut io::repeat(0).take(size - copied), to)?;
        } else if file.into_inner().read(&mut [0]).is_ok_and(|count| count > 0) {
            (self.warn)(format!("{name} became longer while it was read: it is cut off"));
        }
        Ok(to.write_all(&[0; 512][..(size.wrapping_neg() % 512) as usize])?)
    }

    fn header(&mut self, meta: &Metadata, kind: EntryType, name: &[u8], link: &[u8], size: u64) -> Result<()> {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(meta.mode() & 0o7777);
        let (uid, gid) = if self.keep_owners { (meta.uid(), meta.gid()) } else { (0, 0) };
        header.set_uid(uid.into());
        header.set_gid(gid.into());
        header.set_size(size);
        header.set_mtime(meta.mtime().try_into().unwrap_or_default());
        let fields = header.as_old_mut();
        for (field, text) in [(&mut fields.name, name), (&mut fields.linkname, link)] {
            field.iter_mut().zip(text).for_each(|(to, from)| *to = *from);
        }
        header.set_cksum();
        let mtime = (meta.mtime() >= 0).then(|| format!("{}.{:09}", meta.mtime(), meta.mtime_nsec()));
        let extended = [
            ("path", Some(name).filter(|name| name.len() > SHORT)),
            ("linkpath", Some(link).filter(|link| link.len() > SHORT)),
            ("mtime", mtime.as_ref().map(String::as_bytes).filter(|_| meta.mtime_nsec() != 0)),
        ];
        self.builder.append_pax_extensions(extended.into_iter().filter_map(|(key, value)| Some((key, value?))))?;
        // The content follows, if there is some.
        Ok(self.builder.get_mut().write_all(header.as_bytes())?)
    }
}

/// Where files go.
#[derive(Debug)]
pub struct Destination {
    folder: OwnedFd,
    /// What it is called in the folder; the folder itself is meant if there is no such name.
    name: Option<PathBuf>,
    /// It has to be a folder.
    folder_only: bool,
    /// What it is called in the archive.
    origin: Vec<u8>,
}

impl Destination {
    /// What `origin`, the first part of all names, becomes at `path`: something in the folder there, or what has that name itself. `.` stands for
    /// what is in a folder alone.
    ///
    /// # Errors
    /// When neither is there.
    pub fn new(path: &Path, origin: &[u8]) -> Result<Self> {
        let of = || format!("'{}'", path.display());
        let there = path.is_dir();
        let (folder, name) = if there {
            (path, (origin != b".").then(|| PathBuf::from(OsStr::from_bytes(origin))))
        } else {
            let name = path.file_name().with_context(|| format!("there is no folder {}", of()))?;
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            (parent.unwrap_or(Path::new(".")), Some(name.into()))
        };
        let folder = File::open(folder).with_context(|| format!("the folder '{}'", folder.display()))?;
        ensure!(folder.metadata()?.is_dir(), "{} is to be in what is no folder", of());
        let folder_only = !there && path.as_os_str().as_bytes().ends_with(b"/");
        Ok(Self { folder: folder.into(), name, folder_only, origin: origin.to_vec() })
    }

    /// The way to what the archive calls `name`, from the folder.
    fn place(&self, name: &[u8]) -> Result<PathBuf> {
        let rest = name.strip_prefix(&self.origin[..]).filter(|rest| rest.is_empty() || rest.starts_with(b"/"));
        let rest = rest.with_context(|| format!("'{}' was not asked for", shown(name)))?;
        let rest = parts(rest.strip_prefix(b"/").unwrap_or_default());
        let rest = rest.with_context(|| format!("'{}' leads out of where it is to be", shown(name)))?;
        Ok(self.name.iter().map(|name| name.as_os_str()).chain(rest.map(OsStr::from_bytes)).collect())
    }
}

/// Makes files of a guest's archive.
///
/// # Errors
/// When it is no archive, leads astray or ends too early, or a file cannot be made. What was made until then stays.
pub fn unpack(from: impl Read, to: &Destination, keep_owners: bool, warn: Warn<'_>) -> Result<Copied> {
    let mut unpacker = Unpacker { to, keep_owners, warn, open: Vec::new(), copied: Copied::default() };
    let made = each(from, |entry| unpacker.add(entry));
    let left = unpacker.leave(Path::new(""));
    made.and(left).map(|()| unpacker.copied)
}

/// Counts what an archive has that passes by.
///
/// # Errors
/// When it is no archive, or ends too early.
pub fn count(from: impl Read) -> Result<Copied> {
    let mut copied = Copied::default();
    each(from, |entry| {
        let kind = entry.header().entry_type();
        copied.files += u64::from(kind.is_file() || kind.is_symlink());
        copied.bytes += io::copy(entry, &mut io::sink())?;
        Ok(())
    })?;
    Ok(copied)
}

/// A stream of which only so much is given out.
struct Bounded<R> {
    stream: R,
    bound: Rc<Bound>,
}

#[derive(Default)]
struct Bound {
    /// How much may still be read; anything if that is not said.
    left: Cell<Option<u64>>,
    /// The stream has ended.
    ended: Cell<bool>,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(into)?;
        self.bound.ended.set(count == 0 && !into.is_empty());
        if let Some(left) = self.bound.left.get() {
            let left = left.checked_sub(count as u64).ok_or_else(|| io::Error::other("a name is too long"))?;
            self.bound.left.set(Some(left));
        }
        Ok(count)
    }
}

type GuestEntry<'e, R> = Entry<'e, Bounded<R>>;

/// Calls `take` with each entry of an archive from a guest.
fn each<R: Read>(from: R, mut take: impl FnMut(&mut GuestEntry<'_, R>) -> Result<()>) -> Result<()> {
    let bound = Rc::new(Bound::default());
    let mut archive = Archive::new(Bounded { stream: from, bound: Rc::clone(&bound) });
    let mut entries = archive.entries()?;
    loop {
        bound.left.set(Some(HELD));
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.context("the guest sent what is no archive")?;
        bound.left.set(None);
        // Its zeroes are none that the guest has sent.
        ensure!(!entry.header().entry_type().is_gnu_sparse(), "the guest sent a file that is stored with holes");
        take(&mut entry)?;
    }
    if bound.ended.get() {
        return Err(too_early());
    }
    bound.left.set(None);
    // Whoever sends may wait until all is taken.
    io::copy(&mut archive.into_inner(), &mut io::sink())?;
    Ok(())
}

struct Unpacker<'d> {
    to: &'d Destination,
    keep_owners: bool,
    warn: Warn<'d>,
    /// Folders that were made, each within the one before. They get what they are to have when all is in them.
    open: Vec<(PathBuf, Attributes)>,
    copied: Copied,
}

/// What a file has besides its content.
#[derive(Clone, Copy)]
struct Attributes {
    mode: Mode,
    owner: Option<(Uid, Gid)>,
    mtime: TimeSpec,
}

impl Attributes {
    fn new<R: Read>(entry: &mut Entry<'_, R>, keep_owners: bool) -> io::Result<Self> {
        let header = entry.header();
        let (mode, uid, gid) = (header.mode()?, header.uid()?, header.gid()?);
        let mut mtime = TimeSpec::new(header.mtime()?.try_into().unwrap_or_default(), 0);
        for record in entry.pax_extensions()?.into_iter().flatten().flatten() {
            if record.key_bytes() == b"mtime" {
                mtime = record.value().ok().and_then(time).unwrap_or(mtime);
            }
        }
        let id = |id: u64| u32::try_from(id).map_err(|_| io::Error::other("an owner's number is too large"));
        Ok(Self {
            mode: Mode::from_bits_truncate(mode & if keep_owners { 0o7777 } else { 0o777 }),
            owner: keep_owners.then_some((Uid::from_raw(id(uid)?), Gid::from_raw(id(gid)?))),
            mtime,
        })
    }

    fn set(&self, fd: impl AsFd) -> nix::Result<()> {
        if let Some((uid, gid)) = self.owner {
            fchown(&fd, Some(uid), Some(gid))?;
        }
        fchmod(&fd, self.mode)?;
        futimens(&fd, &TimeSpec::UTIME_OMIT, &self.mtime)
    }
}

/// `-1.5`, half a second before one second before 1970.
fn time(text: &str) -> Option<TimeSpec> {
    let (negative, text) = text.strip_prefix('-').map_or((false, text), |text| (true, text));
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = seconds.parse().ok().filter(|seconds| *seconds >= 0)?;
    let nanoseconds: i64 = format!("{fraction:0<9}").get(..9)?.parse().ok().filter(|nanoseconds| *nanoseconds >= 0)?;
    Some(match (negative, nanoseconds) {
        (false, nanoseconds) => TimeSpec::new(seconds, nanoseconds),
        (true, 0) => TimeSpec::new(-seconds, 0),
        (true, nanoseconds) => TimeSpec::new(-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}

impl Unpacker<'_> {
    fn add<R: Read>(&mut self, entry: &mut Entry<'_, R>) -> Result<()> {
        let name = entry.path_bytes().into_owned();
        let of = || format!("'{}'", shown(&name));
        let place = self.to.place(&name)?;
        self.leave(&place)?;
        let attributes = Attributes::new(entry, self.keep_owners).with_context(of)?;
        let kind = entry.header().entry_type();
        let Some(last) = place.file_name() else {
            ensure!(kind.is_dir(), "{} is to be where a folder is", of());
            return Ok(());
        };
        let (last, parent) = (Path::new(last), place.parent().unwrap_or(Path::new("")));
        let parent = self.folder(parent, OFlag::O_PATH).with_context(of)?;
        if kind.is_dir() {
            match mkdirat(&parent, last, Mode::S_IRWXU) {
                Ok(()) => self.open.push((place, attributes)),
                // One that is there stays as it is.
                Err(Errno::EEXIST) => drop(self.folder(&place, OFlag::O_PATH).with_context(of)?),
                Err(errno) => return Err(errno).with_context(of),
            }
            return Ok(());
        }
        ensure!(
            !(self.to.folder_only && Some(&place) == self.to.name.as_ref()),
            "{} is to be where no folder is, and is none",
            of()
        );
        let temporary = Temporary::new(parent.as_fd(), self.copied.files);
        match kind {
            EntryType::Regular | EntryType::Continuous => self.file(entry, &temporary, &attributes).with_context(of)?,
            EntryType::Symlink => {
                let link = entry.link_name_bytes().unwrap_or_default().into_owned();
                symlinkat(OsStr::from_bytes(&link), temporary.folder, &temporary.name[..]).with_context(of)?;
                if let Some((uid, gid)) = attributes.owner {
                    let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
                    fchownat(temporary.folder, &temporary.name[..], Some(uid), Some(gid), flags).with_context(of)?;
                }
                let (atime, mtime) = (TimeSpec::UTIME_OMIT, attributes.mtime);
                let flags = UtimensatFlags::NoFollowSymlink;
                utimensat(temporary.folder, &temporary.name[..], &atime, &mtime, flags).with_context(of)?;
            }
            // None that is asked for an archive makes one.
            EntryType::Link => bail!("{} is a second name of a file", of()),
            _ => {
                (self.warn)(format!("{} is left out: it is no file, folder or symbolic link", of()));
                return Ok(io::copy(entry, &mut io::sink()).map(drop)?);
            }
        }
        renameat(temporary.folder, &temporary.name[..], temporary.folder, last).with_context(of)?;
        self.copied.files += 1;
        Ok(())
    }

    fn file<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        temporary: &Temporary<'_>,
        attributes: &Attributes,
    ) -> Result<()> {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut file = File::from(openat(temporary.folder, &temporary.name[..], flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
        let size = entry.size();
        let copied = io::copy(entry, &mut file)?;
        self.copied.bytes += copied;
        if copied != size {
            return Err(too_early());
        }
        Ok(attributes.set(&file)?)
    }

    /// Opens a folder below the destination's.
    fn folder(&self, path: &Path, flags: OFlag) -> Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        openat2(&self.to.folder, path, how).map_err(|errno| match errno {
            Errno::ELOOP | Errno::ENOTDIR => anyhow!("it leads through a file or a symbolic link"),
            errno => errno.into(),
        })
    }

    /// Gives all folders what they are to have that `place` is not in.
    fn leave(&mut self, place: &Path) -> Result<()> {
        while let Some((path, attributes)) = self.open.pop_if(|(path, _)| !place.starts_with(path)) {
            let folder = self.folder(&path, OFlag::O_RDONLY);
            let set = folder.and_then(|folder| Ok(attributes.set(folder)?));
            set.with_context(|| format!("'{}'", shown(path.as_os_str().as_bytes())))?;
        }
        Ok(())
    }
}

/// The name of a file that is being made. What still has it at the end is given up.
struct Temporary<'f> {
    folder: BorrowedFd<'f>,
    name: Vec<u8>,
}

impl<'f> Temporary<'f> {
    fn new(folder: BorrowedFd<'f>, number: u64) -> Self {
        Self { folder, name: format!(".civic-{}-{number}", std::process::id()).into_bytes() }
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        let _ = unlinkat(self.folder, &self.name[..], UnlinkatFlags::NoRemoveDir);
    }
}

#[cfg(test)]
mod tests;
