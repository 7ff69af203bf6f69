//! Kernels: recognised, checked, placed in guest memory with what they need to start.
//!
//! ```text
//! file ─► Kernel (checked file) ─► load: image, initrd, command line, memory map ─► Entry ─► cpu::registers
//! ```
//!
//! Two protocols: bzImage by Linux' 64-bit entry (Documentation/arch/x86/boot.rst, at least 2.12), ELF by its PVH note
//! (Xen's docs/misc/pvh.pandoc). Nothing is passed that turns address randomisation off.
//!
//! Invariants:
//! * a kernel or initrd file is untrusted: it may be refused, it may not make us panic or allocate without bound;
//! * a kernel never overlaps the first megabyte, where boot structures and ACPI tables lie.

mod bzimage;
mod elf;
mod image_reader;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestMemoryError, GuestMemoryMmap};

use self::image_reader::At;
use crate::layout::{CMDLINE, CMDLINE_CAPACITY, Gpa, Layout, PAGE_SIZE};

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// bzImage: 64-bit mode, RSI at `boot_params`.
    Linux64,
    /// ELF: 32-bit mode, EBX at `hvm_start_info`.
    Pvh,
}

/// Where and how the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// How.
    pub protocol: Protocol,
    /// The first instruction.
    pub rip: Gpa,
    /// `boot_params` or `hvm_start_info`.
    pub boot_info: Gpa,
}

/// What a kernel is started with.
#[derive(Debug)]
pub struct BootParams<'a> {
    /// The command line, without a terminating zero.
    pub cmdline: &'a str,
    /// The initial file system.
    pub initrd: Option<&'a mut File>,
    /// The ACPI root pointer.
    pub rsdp: Gpa,
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file cannot be opened.
    #[error("cannot open the kernel")]
    Open(#[from] io::Error),
    /// The kernel is a folder, a pipe or a device.
    #[error("the kernel is not a regular file")]
    KernelNotAFile,
    /// The kernel file cannot be read.
    #[error("cannot read the kernel")]
    Read(#[source] io::Error),
    /// The kernel file has no bytes.
    #[error("the kernel file is empty")]
    Empty,
    /// Neither bzImage nor ELF.
    #[error("neither a bzImage nor an ELF kernel: it begins with {start:02x?}")]
    Unknown {
        /// Its first bytes.
        start: Vec<u8>,
    },
    /// The kernel file ends too early.
    #[error("the kernel is cut short: its {what} needs {needed} bytes, the file has {found}")]
    Truncated {
        /// What is not all there.
        what: &'static str,
        /// The file length it needs.
        needed: u64,
        /// The file's length.
        found: u64,
    },
    /// A kernel for another machine.
    #[error("the kernel is not for x86-64: {what}")]
    NotX86_64 {
        /// What gives it away.
        what: String,
    },
    /// A bzImage that speaks an old boot protocol.
    #[error("the bzImage speaks boot protocol {}.{:02}; 2.12 (Linux 3.8) is needed", .version >> 8, .version & 0xff)]
    OldProtocol {
        /// The protocol, major in the high byte.
        version: u16,
    },
    /// An ELF kernel without a PVH entry.
    #[error("the ELF kernel has no PVH entry: use its bzImage, or build it with CONFIG_PVH")]
    NoPvhNote,
    /// A field of the kernel's headers makes no sense.
    #[error("the kernel is corrupt: {field} is {value:#x}")]
    Corrupt {
        /// Which.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// The kernel does not fit.
    #[error("the kernel needs memory up to {needed}, low memory ends at {available}")]
    KernelTooLarge {
        /// The first address behind what it needs.
        needed: Gpa,
        /// The first address behind low memory.
        available: Gpa,
    },
    /// The initrd has no bytes.
    #[error("the initrd file is empty")]
    InitrdEmpty,
    /// The initrd is a folder, a pipe or a device.
    #[error("the initrd is not a regular file")]
    InitrdNotAFile,
    /// The initrd does not fit beside the kernel.
    #[error("the initrd has {size} bytes, memory beside the kernel has room for {room}")]
    InitrdTooLarge {
        /// Its size in bytes.
        size: u64,
        /// What there is room for.
        room: u64,
    },
    /// The initrd file cannot be read.
    #[error("cannot read the initrd")]
    InitrdRead(#[source] io::Error),
    /// The command line is longer than the kernel takes.
    #[error("the command line has {len} bytes, this kernel takes {max}")]
    CmdlineTooLong {
        /// Its length in bytes.
        len: usize,
        /// The most that the kernel takes.
        max: usize,
    },
    /// The command line has a zero byte, where the kernel would stop reading.
    #[error("the command line contains a zero byte")]
    CmdlineNul,
    /// Guest memory is not what the layout says.
    #[error("cannot write to guest memory")]
    Memory(#[from] GuestMemoryError),
}

#[derive(Debug)]
enum Image {
    Bz(bzimage::Header),
    Elf(elf::Image),
}

/// A kernel file that passed the checks.
#[derive(Debug)]
pub struct Kernel {
    file: File,
    image: Image,
}

impl Kernel {
    /// Checks a kernel file.
    pub fn open(file: File) -> Result<Self, BootError> {
        let metadata = file.metadata().map_err(BootError::Read)?;
        if !metadata.is_file() {
            return Err(BootError::KernelNotAFile);
        }
        let source = Source { file: &file, len: metadata.len() };
        if source.len == 0 {
            return Err(BootError::Empty);
        }
        let start = source.read(0, source.len.min(4), "magic number")?;
        let image = if start == elf::MAGIC {
            Image::Elf(elf::Image::parse(&source)?)
        } else if let Some(header) = bzimage::Header::parse(&source)? {
            Image::Bz(header)
        } else {
            return Err(BootError::Unknown { start });
        };
        Ok(Self { file, image })
    }

    /// Its file, which others may read: nobody here relies on where it stands.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// How it will be entered.
    pub fn protocol(&self) -> Protocol {
        match self.image {
            Image::Bz(_) => Protocol::Linux64,
            Image::Elf(_) => Protocol::Pvh,
        }
    }

    /// Puts the kernel and all it needs into `memory`, which is laid out as `layout` says and reads as zeroes.
    pub fn load(
        &mut self,
        memory: &GuestMemoryMmap,
        layout: &Layout,
        params: BootParams<'_>,
    ) -> Result<Entry, BootError> {
        match &self.image {
            Image::Bz(header) => header.load(&mut self.file, memory, layout, params),
            Image::Elf(image) => image.load(&mut self.file, memory, layout, params),
        }
    }
}

/// A file with bounds-checked reads.
struct Source<'a> {
    file: &'a File,
    len: u64,
}

impl Source<'_> {
    /// Reads `len` bytes at `offset`; `what` names them for the error.
    fn read(&self, offset: u64, len: u64, what: &'static str) -> Result<Vec<u8>, BootError> {
        self.require(offset, len, what)?;
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, offset).map_err(BootError::Read)?;
        Ok(bytes)
    }

    fn require(&self, offset: u64, len: u64, what: &'static str) -> Result<(), BootError> {
        let needed = offset.saturating_add(len);
        if needed > self.len {
            return Err(BootError::Truncated { what, needed, found: self.len });
        }
        Ok(())
    }
}

/// Where the initrd lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Initrd {
    start: Gpa,
    len: u64,
}

/// Puts the initrd on the highest pages of low memory that lie between `floor` and `ceiling`.
fn load_initrd(file: &mut File, memory: &GuestMemoryMmap, floor: Gpa, ceiling: Gpa) -> Result<Initrd, BootError> {
    let metadata = file.metadata().map_err(BootError::InitrdRead)?;
    if !metadata.is_file() {
        return Err(BootError::InitrdNotAFile);
    }
    let len = metadata.len();
    if len == 0 {
        return Err(BootError::InitrdEmpty);
    }
    let floor = floor.0.next_multiple_of(PAGE_SIZE);
    let ceiling = ceiling.0 / PAGE_SIZE * PAGE_SIZE;
    let room = ceiling.saturating_sub(floor);
    if len > room {
        return Err(BootError::InitrdTooLarge { size: len, room });
    }
    let start = Gpa((ceiling - len) / PAGE_SIZE * PAGE_SIZE);
    load_range(file, 0, memory, start, len).map_err(|e| e.or(BootError::InitrdRead))?;
    Ok(Initrd { start, len })
}

/// Why [`load_range`] failed: the file's fault or the memory's.
enum RangeError {
    File(io::Error),
    Memory(GuestMemoryError),
}

impl RangeError {
    /// The error, with `file` naming whose file it was.
    fn or(self, file: fn(io::Error) -> BootError) -> BootError {
        match self {
            RangeError::File(error) => file(error),
            RangeError::Memory(error) => error.into(),
        }
    }
}

/// Copies `len` bytes from `offset` of the file to `start`.
fn load_range(file: &mut File, offset: u64, memory: &GuestMemoryMmap, start: Gpa, len: u64) -> Result<(), RangeError> {
    memory.read_exact_volatile_from(start.into(), &mut At { file, offset }, len as usize).map_err(|error| match error {
        GuestMemoryError::IOError(error) => RangeError::File(error),
        other => RangeError::Memory(other),
    })
}

fn corrupt(field: &'static str, value: impl Into<u64>) -> BootError {
    BootError::Corrupt { field, value: value.into() }
}

/// Writes the command line, of which the kernel takes `max` bytes.
fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str, max: u64) -> Result<(), BootError> {
    let max = max.min(CMDLINE_CAPACITY - 1) as usize;
    let len = cmdline.len();
    if len > max {
        return Err(BootError::CmdlineTooLong { len, max });
    }
    if cmdline.contains('\0') {
        return Err(BootError::CmdlineNul);
    }
    memory.write_slice(cmdline.as_bytes(), CMDLINE.into())?;
    Ok(memory.write_obj(0u8, Gpa(CMDLINE.0 + len as u64).into())?)
}

#[cfg(test)]
mod tests;
