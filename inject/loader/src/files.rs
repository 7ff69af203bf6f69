//! Small files, folders, and file systems that are mounted nowhere.

use core::ffi::CStr;
use core::mem::MaybeUninit;

use rustix::fd::{AsRawFd, IntoRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags, RawDir, open, openat};
use rustix::io::{Errno, Result, read};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
};

/// An option of a file system: a name, and a value if it is not a flag.
pub type Setting<'a> = (&'a CStr, Option<&'a [u8]>);

/// Opens something as 0, 1 and 2, if they are free: what is opened later is moved there for the program.
pub fn fill_standard() -> Result<()> {
    loop {
        let root = open(c"/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        if root.as_raw_fd() > 2 {
            return Ok(());
        }
        // It stays open.
        let _ = root.into_raw_fd();
    }
}

/// A new instance of a file system as a folder, which is mounted nowhere. It goes with the descriptor.
pub fn detached(fs: &CStr, settings: &[Setting<'_>]) -> Result<OwnedFd> {
    let context = fsopen(fs, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (name, value) in settings {
        match value {
            Some(value) => fsconfig_set_string(&context, *name, *value)?,
            None => fsconfig_set_flag(&context, *name)?,
        }
    }
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
}

/// Opens a folder.
pub fn folder(at: &OwnedFd, path: &CStr) -> Result<OwnedFd> {
    openat(at, path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Calls `each` with the name of each folder in a folder, and with the folder; to the end, or until it gives something.
pub fn find_folder<T>(
    at: &OwnedFd,
    path: &CStr,
    mut each: impl FnMut(&CStr, &OwnedFd) -> Option<T>,
) -> Result<Option<T>> {
    let parent = folder(at, path)?;
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(&parent, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_bytes().starts_with(b".") {
            continue;
        }
        // It may be a file, or gone already.
        if let Some(found) = folder(&parent, name).ok().and_then(|folder| each(name, &folder)) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The beginning of a file, as much as has a place in `buffer`.
pub fn read_into<'a>(at: &OwnedFd, path: &CStr, buffer: &'a mut [u8]) -> Result<&'a [u8]> {
    let file = openat(at, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let count = read(&file, &mut *buffer)?;
    Ok(&buffer[..count])
}

/// Writes a file that is there, in one piece.
pub fn write(at: &OwnedFd, path: &CStr, bytes: &[u8]) -> Result<()> {
    let file = openat(at, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    match rustix::io::write(&file, bytes)? {
        count if count == bytes.len() => Ok(()),
        _ => Err(Errno::IO),
    }
}
