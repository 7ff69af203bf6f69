//! What packing and unpacking have in common. The program's process does either instead of executing a file.
//!
//! What cannot be done is said on standard error, in a line for each. Names are those in the archive.

use core::fmt::{self, Write};

use civic_loader::archive::{Decimal, Fault};
use rustix::fd::BorrowedFd;
use rustix::io::{Errno, write};

use crate::failure::Text;
use crate::sys;

/// Bytes that are moved at a time.
pub const CHUNK: usize = 64 << 10;
/// Folders within each other, at most. Each has a descriptor, of which the kernel's helpers have 1024.
pub const MAX_DEPTH: usize = 256;
/// Bytes of a name that are told: the line has room for more besides.
const TOLD: usize = 800;

/// Why something could not be done. It is small: nearly everything here may fail.
#[derive(Clone, Copy)]
pub struct Trouble {
    what: What,
    errno: Option<Errno>,
}

/// What went wrong, besides what the system says.
#[derive(Clone, Copy)]
pub enum What {
    Nothing,
    /// With what is unpacked.
    Archive(Fault),
    EndsEarly,
    Unreadable,
    Unwritten,
    TooDeep,
    LeadsOut,
    LedAway,
    NoFolder,
    NoParent,
    NoTarget,
    Zero,
    LeftOut,
    Shorter,
    Longer,
    Incomplete,
}

impl What {
    #[inline(never)]
    fn text(self) -> &'static str {
        match self {
            Self::Nothing => "",
            Self::Archive(fault) => fault.text(),
            Self::EndsEarly => "ends too early",
            Self::Unreadable => "cannot be read",
            Self::Unwritten => "the archive cannot be written",
            Self::TooDeep => "folders lie too deep within each other",
            Self::LeadsOut => "leads out of the folder",
            Self::LedAway => "leads through a file or a symbolic link",
            Self::NoFolder => "is to be where no folder is",
            Self::NoParent => "the folder that it would be in",
            Self::NoTarget => "the file that it is another name of",
            Self::Zero => "has a zero in its name",
            Self::LeftOut => "left out: no file, folder or link",
            Self::Shorter => "became shorter while it was read: filled up with zeroes",
            Self::Longer => "became longer while it was read: cut off",
            Self::Incomplete => "not all of it could be read",
        }
    }
}

impl From<Errno> for Trouble {
    fn from(errno: Errno) -> Self {
        Self::new(What::Nothing, errno)
    }
}

impl From<What> for Trouble {
    fn from(what: What) -> Self {
        Self { what, errno: None }
    }
}

impl Trouble {
    /// `what`, for the system's reason.
    pub fn new(what: What, errno: Errno) -> Self {
        Self { what, errno: Some(errno) }
    }

    /// Says it of the file of that name.
    #[inline(never)]
    pub fn tell(self, name: &[u8]) {
        let mut line = Text::new();
        // The end of a name tells more than its beginning.
        let _ = write!(line, "{}", OneLine(&name[name.len().saturating_sub(TOLD)..]));
        let number = Decimal::new(self.errno.map_or(0, Errno::raw_os_error).unsigned_abs().into());
        let known = REASONS.iter().find(|(errno, _)| Some(*errno) == self.errno);
        let reason = match (self.errno, known) {
            (None, _) => ["", ""],
            (_, Some((_, reason))) => [reason, ""],
            (_, None) => ["error ", str::from_utf8(number.text()).unwrap_or_default()],
        };
        for [before, after] in [[self.what.text(), ""], reason] {
            if !before.is_empty() {
                let _ = [": ", before, after].into_iter().try_for_each(|part| line.write_str(part));
            }
        }
        let _ = line.write_str("\n");
        // Nobody else could be told.
        let _ = write_all(sys::standard(2), line.as_str().as_bytes());
    }
}

/// The system's reasons that files are likely to meet: what has strings for all of them is a library.
const REASONS: [(Errno, &str); 16] = [
    (Errno::NOENT, "no such file or folder"),
    (Errno::NOTDIR, "not a folder"),
    (Errno::ISDIR, "a folder"),
    (Errno::EXIST, "there already"),
    (Errno::NOTEMPTY, "a folder that is not empty"),
    (Errno::LOOP, "a symbolic link"),
    (Errno::ACCESS, "not permitted"),
    (Errno::PERM, "not permitted"),
    (Errno::ROFS, "the file system is read-only"),
    (Errno::NOSPC, "no space left on the device"),
    (Errno::DQUOT, "the quota is used up"),
    (Errno::FBIG, "larger than files can be there"),
    (Errno::NAMETOOLONG, "the name is too long"),
    (Errno::MFILE, "too many open files"),
    (Errno::NOMEM, "no memory is left"),
    (Errno::IO, "the device fails"),
];

/// Bytes as a text in one line, whatever they are.
struct OneLine<'a>(&'a [u8]);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.utf8_chunks().try_for_each(|chunk| {
            let invalid = (!chunk.invalid().is_empty()).then_some(char::REPLACEMENT_CHARACTER);
            let shown = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
            chunk.valid().chars().map(shown).chain(invalid).try_for_each(|c| f.write_char(c))
        })
    }
}

/// Writes all of `bytes` to what blocks.
#[inline(never)]
pub fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match write(to, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Fills `into` as far as there is something; gives the count.
#[inline(never)]
pub fn read_full(from: BorrowedFd<'_>, into: &mut [u8]) -> Result<usize, Errno> {
    let mut len = 0;
    while len < into.len() {
        match rustix::io::read(from, &mut into[len..]) {
            Ok(0) => break,
            Ok(count) => len += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(len)
}
