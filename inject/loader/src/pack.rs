//! Packing: what is at a path, as an archive on standard output.
//!
//! Folders are walked by their descriptors and no symbolic link is followed but those in the path itself, so that nothing that happens in the
//! guest meanwhile leads elsewhere. A file is as long as it was when it was opened: what it lacks then is zeroes, what it has more is left out,
//! and either is said. Several names of one file become several files.

use core::ffi::CStr;
use core::mem::MaybeUninit;

use civic_loader::archive::{BLOCK, Entry, Kind, MAX_HEADERS, MAX_NAME, Time, last_part, padding};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, Stat, fstat, openat, readlinkat_raw, statat};
use rustix::io::Errno;

use crate::copy::{CHUNK, MAX_DEPTH, Trouble, What, read_full, write_all};
use crate::sys;

/// Bytes for a folder's entries, at each depth. One has at most 280.
const LISTED: usize = 1024;

/// Does it; gives the exit status.
pub fn pack(path: &CStr) -> i32 {
    let (mut name, mut content, mut headers) = ([0; MAX_NAME], [0; CHUNK], [0; MAX_HEADERS]);
    let name = Name { bytes: &mut name, len: 0 };
    let mut packer = Packer { name, content: &mut content, headers: &mut headers, incomplete: false };
    let packed = packer.name.push(last_part(path.to_bytes())).and_then(|_| {
        packer.add(CWD, path, 0)?;
        packer.end(2 * BLOCK)
    });
    match packed {
        Ok(()) if packer.incomplete => Trouble::from(What::Incomplete).tell(path.to_bytes()),
        Ok(()) => return 0,
        // What is asked for goes by the name that it was asked by.
        Err(trouble) if packer.name.is_first() => trouble.tell(path.to_bytes()),
        Err(trouble) => trouble.tell(packer.name.get()),
    }
    1
}

/// Writes a piece of the archive.
fn put(bytes: &[u8]) -> Result<(), Trouble> {
    write_all(sys::standard(1), bytes).map_err(|errno| Trouble::new(What::Unwritten, errno))
}

struct Packer<'a> {
    name: Name<'a>,
    content: &'a mut [u8; CHUNK],
    headers: &'a mut [u8; MAX_HEADERS],
    /// Something was left out that should not have been.
    incomplete: bool,
}

impl Packer<'_> {
    /// Adds the file `file` of the folder `at`, whose name is in place. Fails where there is no use in going on.
    fn add(&mut self, at: BorrowedFd<'_>, file: &CStr, depth: usize) -> Result<(), Trouble> {
        let stat = match statat(at, file, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(errno) => return self.unreadable(errno, depth),
        };
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let folder = match openat(at, file, flags | OFlags::DIRECTORY, Mode::empty()) {
                    Ok(folder) => folder,
                    Err(errno) => return self.unreadable(errno, depth),
                };
                if depth == MAX_DEPTH {
                    return Err(What::TooDeep.into());
                }
                self.header(&stat, Kind::Folder, b"", 0)?;
                self.list(folder.as_fd(), depth + 1)
            }
            FileType::Symlink => self.link(at, file, &stat, depth),
            FileType::RegularFile => {
                let opened = openat(at, file, flags, Mode::empty()).and_then(|file| Ok((fstat(&file)?, file)));
                match opened {
                    Ok((stat, file)) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {
                        self.file(file.as_fd(), &stat, depth)
                    }
                    // Another one has its name now.
                    Ok(_) => self.unreadable(Errno::NOENT, depth),
                    Err(errno) => self.unreadable(errno, depth),
                }
            }
            _ if depth == 0 => Err(What::LeftOut.into()),
            _ => {
                Trouble::from(What::LeftOut).tell(self.name.get());
                Ok(())
            }
        }
    }

    /// Adds all that is in a folder.
    fn list(&mut self, folder: BorrowedFd<'_>, depth: usize) -> Result<(), Trouble> {
        let mut buffer = [MaybeUninit::uninit(); LISTED];
        let mut entries = RawDir::new(folder, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(errno) => return self.unreadable(errno, depth),
            };
            let file = entry.file_name();
            if matches!(file.to_bytes(), b"." | b"..") {
                continue;
            }
            let len = self.name.push(file.to_bytes())?;
            self.add(folder, file, depth)?;
            self.name.len = len;
        }
        Ok(())
    }

    /// Not in [`Packer::add`], which is there once for each depth.
    #[inline(never)]
    fn link(&mut self, at: BorrowedFd<'_>, file: &CStr, stat: &Stat, depth: usize) -> Result<(), Trouble> {
        let mut link = [MaybeUninit::uninit(); MAX_NAME];
        match readlinkat_raw(at, file, &mut link) {
            Ok((link, _)) => self.header(stat, Kind::SymLink, link, 0),
            Err(errno) => self.unreadable(errno, depth),
        }
    }

    #[inline(never)]
    fn file(&mut self, file: BorrowedFd<'_>, stat: &Stat, depth: usize) -> Result<(), Trouble> {
        let first = match read_full(file, self.content) {
            Ok(count) => count,
            Err(errno) => return self.unreadable(errno, depth),
        };
        // Files that the kernel makes up, and that end within the buffer, are not as long as they say.
        let size = if first < CHUNK { first as u64 } else { stat.st_size.cast_unsigned().max(first as u64) };
        self.header(stat, Kind::File, b"", size)?;
        let (mut count, mut left, mut ended) = (first, size, false);
        loop {
            put(&self.content[..count])?;
            left -= count as u64;
            count = left.min(CHUNK as u64) as usize;
            if count == 0 {
                break;
            }
            let read = if ended { Ok(0) } else { read_full(file, &mut self.content[..count]) };
            self.content[read.unwrap_or(0)..count].fill(0);
            match read {
                Ok(read) if read < count && !ended => {
                    Trouble::from(What::Shorter).tell(self.name.get());
                    ended = true;
                }
                Ok(_) => {}
                Err(errno) => {
                    self.unreadable(errno, depth + 1)?;
                    ended = true;
                }
            }
        }
        self.end(padding(size))?;
        if first == CHUNK && read_full(file, &mut self.content[..1]) == Ok(1) {
            Trouble::from(What::Longer).tell(self.name.get());
        }
        Ok(())
    }

    /// Writes zeroes: content is no more needed.
    fn end(&mut self, count: usize) -> Result<(), Trouble> {
        let zeroes = &mut self.content[..count];
        zeroes.fill(0);
        put(zeroes)
    }

    #[inline(never)]
    fn header(&mut self, stat: &Stat, kind: Kind, link: &[u8], size: u64) -> Result<(), Trouble> {
        let entry = Entry {
            kind,
            name: self.name.get(),
            link,
            size,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: Time { seconds: stat.st_mtime, nanoseconds: stat.st_mtime_nsec as u32 },
        };
        let len = entry.encode(self.headers).ok_or(Errno::NAMETOOLONG)?;
        put(&self.headers[..len])
    }

    /// What was asked for has to be there. What is in it may come and go in a guest that runs.
    #[inline(never)]
    fn unreadable(&mut self, errno: Errno, depth: usize) -> Result<(), Trouble> {
        if depth == 0 {
            return Err(errno.into());
        }
        Trouble::new(What::Unreadable, errno).tell(self.name.get());
        self.incomplete |= errno != Errno::NOENT;
        Ok(())
    }
}

/// The name that a file has in the archive.
struct Name<'a> {
    bytes: &'a mut [u8; MAX_NAME],
    len: usize,
}

impl Name<'_> {
    fn get(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Whether it is that of what was asked for.
    fn is_first(&self) -> bool {
        !self.get().contains(&b'/')
    }

    /// Leads to `part` in the folder that it led to. Gives the length that it had.
    fn push(&mut self, part: &[u8]) -> Result<usize, Trouble> {
        let before = self.len;
        let slash: &[u8] = if before == 0 { b"" } else { b"/" };
        for bytes in [slash, part] {
            let room = self.bytes[self.len..].get_mut(..bytes.len()).ok_or(Trouble::from(Errno::NAMETOOLONG))?;
            room.copy_from_slice(bytes);
            self.len += bytes.len();
        }
        Ok(before)
    }
}
