//! A guest's kernel: found once in a paused VM, then asked for addresses and offsets.

mod report;

use std::ops::Range;

use memchr::memmem;

pub use report::{BtfReport, HintReport, KallsymsReport, Report};

use crate::anchors::Anchors;
use crate::btf::{Btf, Member, NoBtf, Prototype, TypeError};
use crate::bytes::string_at;
use crate::current::{Current, CurrentError, READERS};
use crate::entry::{EntrySlot, SlotError};
use crate::exports::Exports;
use crate::hints::{File, Hint, HintError, Hints};
use crate::image::Image;
use crate::kallsyms::{Kallsyms, NoKallsyms};
use crate::memory::{Absent, Gpa, Gva, PhysicalMemory};
use crate::paging::{AddressSpace, KernelImage, NoImage};
use crate::registers::Registers;
use crate::symbols::{Symbol, SymbolTable};

/// How a kernel introduces itself (`linux_banner`).
const BANNER: &str = "Linux version ";
/// The longest banner.
const LONGEST_BANNER: usize = 512;
/// Bytes of text that are summed up at a time.
const CHUNK: usize = 64 << 10;
/// Strings that are looked at for the banner.
const MOST_BANNERS: usize = 64;
/// Where the direct map begins if its place is not randomized (`__PAGE_OFFSET_BASE_L4`, `_L5`): since 4.20, and before.
const DIRECT_MAPS: [[u64; 2]; 2] =
    [[0xffff_8880_0000_0000, 0xffff_8800_0000_0000], [0xff11_0000_0000_0000, 0xff10_0000_0000_0000]];

/// Why one vCPU led to no kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoKernel {
    /// No address at which it would enter the kernel is in a kernel's image.
    #[error("it enters the kernel nowhere")]
    NoEntry,
    /// Its page tables have no image where it enters the kernel.
    #[error(transparent)]
    NoImage(#[from] NoImage),
}

/// Why no kernel was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// No vCPU runs a Linux kernel.
    #[error("no vCPU runs a Linux kernel yet ({}): wait until the guest has booted", list(tried))]
    Nowhere {
        /// Why not, for each vCPU.
        tried: Vec<NoKernel>,
    },
    /// Where a kernel's image would be, nothing says that it is Linux.
    #[error("what runs at {base} has neither symbols nor a banner: it is no Linux kernel, or not ready yet")]
    NotLinux {
        /// The image's first byte.
        base: Gva,
    },
    /// A file that should help does not.
    #[error(transparent)]
    Hint(#[from] HintError),
}

fn list(tried: &[NoKernel]) -> String {
    let each: Vec<_> = tried.iter().enumerate().map(|(n, why)| format!("vCPU {n}: {why}")).collect();
    if each.is_empty() { "there is none".into() } else { each.join("; ") }
}

/// Why a symbol cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SymbolError {
    /// There is none of this name.
    #[error("the kernel has no symbol '{name}'{}", if *complete { "" } else { " (it does not name its data: give its System.map or vmlinux)" })]
    Missing {
        /// The name.
        name: String,
        /// Whether the symbols that were found are all there are.
        complete: bool,
    },
    /// There are many of this name, none of them better than the others.
    #[error("the kernel has {count} symbols '{name}'")]
    Ambiguous {
        /// The name.
        name: String,
        /// How many there are.
        count: usize,
    },
    /// There are some of this name, but none is a function.
    #[error("the kernel's '{name}' is no function")]
    NotFunction {
        /// The name.
        name: String,
    },
    /// The function was freed when the kernel had booted.
    #[error("the kernel's function '{name}' is gone since it has booted")]
    InitText {
        /// The name.
        name: String,
    },
    /// Where the kernel's text is, is not known.
    #[error("where the kernel's text ends is not known: give its System.map or vmlinux")]
    NoText,
}

/// Why a type or member cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemberError {
    /// The kernel does not describe types.
    #[error(transparent)]
    NoBtf(#[from] NoBtf),
    /// It does not have this one.
    #[error(transparent)]
    Type(#[from] TypeError),
}

/// Where a symbol's address comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// The kernel's own symbols.
    Kallsyms,
    /// What the kernel exports to modules.
    Exports,
    /// A file of the operator's.
    File(File),
}

/// A symbol, and who says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// The symbol.
    pub symbol: Symbol<'a>,
    /// Who says so.
    pub source: Source,
}

/// A guest's kernel.
#[derive(Debug)]
pub struct Kernel {
    image: KernelImage,
    /// How much of the image is not RAM, in bytes.
    absent: u64,
    kallsyms: Result<Kallsyms, NoKallsyms>,
    exports: Option<Exports>,
    hints: Vec<Hint>,
    btf: Result<Btf, NoBtf>,
    banner: Option<String>,
    direct_map: Option<Gva>,
    text: Option<Text>,
    /// Where the kernel's own functions have the current task.
    current_in_code: Option<Current>,
}

/// Sums over what the kernel does not change often (CRC-32, IEEE 802.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksums {
    /// From `_stext` to `_etext`.
    pub text: u32,
    /// The image's table of 2 MiB entries, but for what processors note there: whether an entry was used.
    pub mapping: u32,
}

/// Where functions are.
#[derive(Debug)]
struct Text {
    all: Range<Gva>,
    init: Range<Gva>,
}

impl Kernel {
    /// Finds the kernel that these vCPUs of a paused VM run.
    pub fn find(memory: &dyn PhysicalMemory, vcpus: &[Registers]) -> Result<Self, FindError> {
        Self::find_with(memory, vcpus, &Hints::default())
    }

    /// The same, with files that belong to the kernel.
    pub fn find_with(memory: &dyn PhysicalMemory, vcpus: &[Registers], hints: &Hints<'_>) -> Result<Self, FindError> {
        let (place, anchors) = locate(memory, vcpus)?;
        let hints = hints.read(&place, &anchors)?;
        let image = Image::read(memory, &place);
        let mut kernel = Self {
            image: place,
            absent: image.absent(),
            kallsyms: Kallsyms::find(&image, &anchors),
            exports: Exports::find(&image),
            hints,
            btf: Btf::find(image.bytes()),
            banner: None,
            direct_map: None,
            text: None,
            current_in_code: None,
        };
        kernel.banner = kernel.read_banner(&image);
        if kernel.banner.is_none() && kernel.kallsyms.is_err() && kernel.hints.is_empty() {
            return Err(FindError::NotLinux { base: place.base });
        }
        kernel.direct_map = kernel.find_direct_map(memory);
        kernel.text = kernel.find_text();
        kernel.current_in_code = kernel.read_current(&image);
        Ok(kernel)
    }

    /// Where the image is.
    pub fn image(&self) -> &KernelImage {
        &self.image
    }

    /// The kernel's page tables, see [`KernelImage::address_space`].
    pub fn address_space(&self) -> AddressSpace {
        self.image.address_space()
    }

    /// How the kernel introduces itself, with compiler and build.
    pub fn banner(&self) -> Option<&str> {
        self.banner.as_deref()
    }

    /// What `uname -r` would say.
    pub fn release(&self) -> Option<&str> {
        self.banner()?.strip_prefix(BANNER)?.split(' ').next()
    }

    /// What `uname -v` would say: number, kind and time of the build.
    pub fn version(&self) -> Option<&str> {
        let banner = self.banner()?;
        Some(&banner[banner.rfind(" #")? + 1..])
    }

    /// Where all of physical memory is mapped. `None` where the page tables have it in no place that is known.
    pub fn direct_map(&self) -> Option<Gva> {
        self.direct_map
    }

    /// The kernel's types.
    pub fn btf(&self) -> Result<&Btf, NoBtf> {
        self.btf.as_ref().map_err(|why| *why)
    }

    /// A symbol of any kind. Of several the global one; there is no choosing between two that are global, or two that are not.
    pub fn symbol<'a>(&'a self, name: &'a str) -> Result<Found<'a>, SymbolError> {
        for (source, table) in self.tables() {
            let mut found: Vec<_> = table.named(name).collect();
            if found.iter().any(|symbol| is_global(symbol)) {
                found.retain(is_global);
            }
            if let Some(symbol) = single(name, &found)? {
                return Ok(Found { symbol, source });
            }
        }
        Err(self.missing(name))
    }

    /// A function, to be called: in the kernel's text, and not in that which is freed once it has booted. Of several the global or
    /// weak one.
    pub fn function(&self, name: &str) -> Result<Gva, SymbolError> {
        let text = self.text.as_ref().ok_or(SymbolError::NoText)?;
        let mut error = self.missing(name);
        for (source, table) in self.tables() {
            let mut found: Vec<_> = table.named(name).collect();
            if !found.is_empty() {
                error = SymbolError::NotFunction { name: name.to_owned() };
            }
            found.retain(|symbol| symbol.is_text() || source == Source::Exports);
            if found.iter().any(|symbol| text.init.contains(&symbol.address)) {
                error = SymbolError::InitText { name: name.to_owned() };
            }
            found.retain(|symbol| text.all.contains(&symbol.address) && !text.init.contains(&symbol.address));
            if found.iter().any(is_global) {
                found.retain(is_global);
            }
            if let Some(symbol) = single(name, &found)? {
                return Ok(symbol.address);
            }
        }
        Err(error)
    }

    /// A member of a structure or union, see [`Btf::member`].
    pub fn member(&self, of: &str, path: &str) -> Result<Member, MemberError> {
        Ok(self.btf()?.member(of, path)?)
    }

    /// What a function takes and returns, see [`Btf::prototypes`].
    pub fn prototypes(&self, function: &str) -> Result<Vec<Prototype>, NoBtf> {
        Ok(self.btf()?.prototypes(function))
    }

    /// The symbol that an address of the image belongs to, and how far behind it that is.
    pub fn nearest(&self, at: Gva) -> Option<(Found<'_>, u64)> {
        if !(self.image.base..self.image.end).contains(&at) {
            return None;
        }
        let mut tables = self.tables().filter(|(source, _)| *source != Source::Exports);
        let (source, table) = tables.next()?;
        let (symbol, offset) = table.nearest(at)?;
        Some((Found { symbol, source }, offset))
    }

    /// Where the task is that runs on a CPU: `pcpu_hot.current_task` (6.2 to 6.14), else `current_task`; and where the kernel does not name
    /// its data, where its own functions read it.
    pub fn current(&self) -> Result<Current, CurrentError> {
        match (self.symbol("pcpu_hot"), self.symbol("current_task")) {
            (Ok(found), _) => {
                Ok(Current::at(found.symbol.address.plus(self.member("pcpu_hot", "current_task")?.offset)))
            }
            (_, Ok(found)) => Ok(Current::at(found.symbol.address)),
            (_, Err(missing)) => self.current_in_code.ok_or(CurrentError::Symbol(missing)),
        }
    }

    /// The slot at the entry of a function, as it is now.
    pub fn entry_slot(&self, memory: &dyn PhysicalMemory, function: Gva) -> Result<EntrySlot, SlotError> {
        EntrySlot::at(&self.image, memory, function)
    }

    /// The kernel's functions as they are now, and the table that maps its image, to be compared with what they are later. None where it
    /// is not known where the text ends. The kernel changes its text itself, where it traces or chooses between alternatives.
    pub fn checksums(&self, memory: &dyn PhysicalMemory) -> Result<Option<Checksums>, Absent> {
        let mapping = self.image.mapping_crc32(memory)?;
        let Some(text) = &self.text else { return Ok(None) };
        let (Some(at), Some(end)) = (self.image.to_physical(text.all.start), self.image.to_physical(text.all.end))
        else {
            return Ok(None);
        };
        let mut sum = crc32fast::Hasher::new();
        let mut chunk = vec![0; CHUNK];
        for start in (at.0..end.0).step_by(CHUNK) {
            let part = &mut chunk[..CHUNK.min((end.0 - start) as usize)];
            memory.read(Gpa(start), part)?;
            sum.update(part);
        }
        Ok(Some(Checksums { text: sum.finalize(), mapping }))
    }

    /// All that is known.
    pub fn report(&self) -> Report {
        Report::of(self)
    }

    fn tables(&self) -> impl Iterator<Item = (Source, &SymbolTable)> {
        let own = self.kallsyms.as_ref().ok().map(|found| (Source::Kallsyms, &found.symbols));
        let exports = self.exports.as_ref().map(|found| (Source::Exports, &found.symbols));
        let hints = self.hints.iter().map(|hint| (Source::File(hint.file), &hint.symbols));
        own.into_iter().chain(exports).chain(hints)
    }

    fn missing(&self, name: &str) -> SymbolError {
        let complete = !self.hints.is_empty() || self.kallsyms.as_ref().is_ok_and(Kallsyms::names_data);
        SymbolError::Missing { name: name.to_owned(), complete }
    }

    fn read_banner(&self, image: &Image) -> Option<String> {
        let named = self.symbol("linux_banner").ok().and_then(|found| image.offset(found.symbol.address));
        let others = memmem::find_iter(image.bytes(), BANNER).take(MOST_BANNERS);
        named.into_iter().chain(others).find_map(|at| banner(image.bytes(), at))
    }

    fn read_current(&self, image: &Image) -> Option<Current> {
        Current::in_code(image, READERS.iter().filter_map(|name| image.offset(self.function(name).ok()?)))
    }

    /// By what the kernel says, else where it is by default: wherever the page tables have their own root there.
    fn find_direct_map(&self, memory: &dyn PhysicalMemory) -> Option<Gva> {
        let space = self.image.address_space();
        let said = self.symbol("page_offset_base").ok();
        let said = said.and_then(|found| memory.u64(self.image.to_physical(found.symbol.address)?).ok());
        let defaults = DIRECT_MAPS[usize::from(space.levels == 5)];
        let root = space.root;
        let leads_there = |base: &Gva| space.walk(memory, base.plus(root.0)).is_ok_and(|found| found.at == root);
        said.into_iter().chain(defaults).map(Gva).find(leads_there)
    }

    fn find_text(&self) -> Option<Text> {
        let address = |name| self.symbol(name).ok().map(|found| found.symbol.address);
        let range = |start, end| Some(address(start)?..address(end)?);
        Some(Text { all: range("_stext", "_etext")?, init: range("_sinittext", "_einittext")? })
    }
}

fn is_global(symbol: &Symbol<'_>) -> bool {
    symbol.kind.is_ascii_uppercase() || symbol.kind == 'w'
}

/// The only address among these symbols, if there are any.
fn single<'a>(name: &str, found: &[Symbol<'a>]) -> Result<Option<Symbol<'a>>, SymbolError> {
    let Some(first) = found.first() else { return Ok(None) };
    if found.iter().any(|symbol| symbol.address != first.address) {
        return Err(SymbolError::Ambiguous { name: name.to_owned(), count: found.len() });
    }
    Ok(Some(*first))
}

fn locate(memory: &dyn PhysicalMemory, vcpus: &[Registers]) -> Result<(KernelImage, Anchors), FindError> {
    let mut tried = Vec::new();
    for registers in vcpus {
        let anchors = Anchors::of(memory, registers);
        let mut why = NoKernel::NoEntry;
        for anchor in anchors.iter() {
            match KernelImage::find(memory, registers, anchor) {
                Ok(image) => return Ok((image, anchors)),
                Err(error) => why = error.into(),
            }
        }
        tried.push(why);
    }
    Err(FindError::Nowhere { tried })
}

/// The banner at `at`, if there is one.
fn banner(bytes: &[u8], at: usize) -> Option<String> {
    let text = std::str::from_utf8(string_at(bytes, at, LONGEST_BANNER)?).ok()?.trim_end_matches('\n');
    let release = text.strip_prefix(BANNER)?;
    // Kernels hold one without number and time as well, from a first step of their build.
    let build = &text[text.rfind(" #")? + 2..];
    let numbered = |text: &str| text.starts_with(|c: char| c.is_ascii_digit());
    let good = numbered(release) && numbered(build) && text.chars().all(|c| !c.is_control());
    good.then(|| text.to_owned())
}

#[cfg(test)]
mod tests;
