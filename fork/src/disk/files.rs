//! Files that have no name: stores, overlays, reflinks. They are gone with the last descriptor, whatever ends a process.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

/// Opens once more what `file` is, only for reading: for someone who must not write.
///
/// Locks do not come along. Needs /proc.
///
/// # Errors
/// What the system says; `NotFound` without /proc.
pub fn reopen_read_only(file: &File) -> io::Result<File> {
    let again = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let id = |file: &File| file.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
    if id(file)? == id(&again)? { Ok(again) } else { Err(io::ErrorKind::NotFound.into()) }
}

/// A file without a name and without content: one descriptor to write, one to read.
#[derive(Debug)]
pub struct Nameless {
    /// For its maker.
    pub file: File,
    /// For others.
    pub reader: File,
}

impl Nameless {
    /// On the file system of the folder `dir`.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let made = OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(dir);
        if let Ok(file) = made
            && let Ok(reader) = reopen_read_only(&file)
        {
            return Ok(Self { file, reader });
        }
        Self::named_at_first(dir)
    }

    /// For file systems without O_TMPFILE, and places without /proc.
    fn named_at_first(dir: &Path) -> io::Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let path = dir.join(format!(".civic-{}-{number}", std::process::id()));
            let file = match OpenOptions::new().read(true).write(true).mode(0o600).create_new(true).open(&path) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                file => file?,
            };
            let reader = File::open(&path);
            fs::remove_file(&path)?;
            return Ok(Self { file, reader: reader? });
        }
    }
}

/// Gives back the space of a range, which then reads as zeroes.
///
/// # Errors
/// What fallocate(2) says: `EOPNOTSUPP` where there are no holes.
pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let place = |n: u64| libc::off_t::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let (offset, len) = (place(offset)?, place(len)?);
    loop {
        match fallocate(file, mode, offset, len) {
            Err(Errno::EINTR) => {}
            result => return Ok(result?),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn leave_nothing_behind_and_are_read_only_for_others() {
        let dir = tempfile::tempdir().unwrap();
        for make in [Nameless::new, Nameless::named_at_first] {
            let Nameless { file, reader } = make(dir.path()).unwrap();
            file.write_all_at(b"abc", 0).unwrap();
            let mut bytes = [0; 3];
            reader.read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!(bytes, *b"abc");
            assert!(reader.write_all_at(b"x", 0).is_err());
            assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
            punch(&file, 0, 4096).unwrap();
            reader.read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!(bytes, [0; 3]);
        }
        assert!(Nameless::new(&dir.path().join("missing")).is_err());
    }
}
