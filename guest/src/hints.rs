//! Symbols from files that belong to a kernel, for one that has none in memory: `System.map` (the output of `nm(1)`) and `vmlinux`
//! (ELF with a symbol table, as kernels are linked and as packages of debug symbols have it).
//!
//! Both say where the kernel was linked to run. Where it runs is known by its image, so each address moves by as much as `_text` does; per-CPU
//! variables of kernels before 6.15, whose addresses are offsets, stay. A file is believed only if it has the kernel's entry points
//! where the processor enters it.

use std::collections::HashSet;
use std::fmt;

use object::read::elf::ElfFile64;
use object::{Architecture, LittleEndian, Object, ObjectSection, ObjectSymbol, SectionKind, SymbolKind, SymbolSection};

use crate::anchors::Anchors;
use crate::paging::{IMAGE_WINDOW, KernelImage};
use crate::symbols::{Builder, SymbolTable};

/// The longest line of a `System.map` that is read.
const LONGEST_LINE: usize = 4096;

/// Files that an operator says belong to the guest's kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hints<'a> {
    /// Its `System.map`.
    pub system_map: Option<&'a [u8]>,
    /// Its `vmlinux`, with symbols.
    pub vmlinux: Option<&'a [u8]>,
}

/// A kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum File {
    /// `System.map`.
    SystemMap,
    /// `vmlinux`.
    Vmlinux,
}

impl fmt::Display for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SystemMap => "System.map",
            Self::Vmlinux => "vmlinux",
        })
    }
}

/// Why a file is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HintError {
    /// A line of a `System.map` is none.
    #[error("line {line} of the System.map is not 'ADDRESS TYPE NAME': give the file as the kernel's build made it")]
    Line {
        /// Its number, from 1 on.
        line: usize,
    },
    /// The `vmlinux` cannot be read.
    #[error("the vmlinux is no x86-64 ELF file: {why}")]
    Elf {
        /// In which way.
        why: String,
    },
    /// There are more symbols than a kernel has, or names that are none.
    #[error("the {file} has more symbols than a kernel, or longer names")]
    NotSymbols {
        /// The file.
        file: File,
    },
    /// There are no symbols.
    #[error("the {file} has no symbol '_text': give one that was not stripped")]
    Stripped {
        /// The file.
        file: File,
    },
    /// The file belongs to another kernel.
    #[error("the {file} is another kernel's: its entry points are not where the guest's are")]
    OtherKernel {
        /// The file.
        file: File,
    },
}

/// Symbols of one file, where the guest has them.
#[derive(Debug)]
pub(crate) struct Hint {
    pub(crate) file: File,
    pub(crate) symbols: SymbolTable,
}

impl Hints<'_> {
    /// Reads the files there are.
    pub(crate) fn read(&self, image: &KernelImage, anchors: &Anchors) -> Result<Vec<Hint>, HintError> {
        let mut hints = Vec::new();
        if let Some(text) = self.system_map {
            hints.push(place(File::SystemMap, system_map(text)?, image, anchors)?);
        }
        if let Some(bytes) = self.vmlinux {
            hints.push(place(File::Vmlinux, vmlinux(bytes)?, image, anchors)?);
        }
        Ok(hints)
    }
}

/// Address, type and name.
type Line<'a> = (u64, u8, &'a [u8]);

fn place(file: File, lines: Vec<Line<'_>>, image: &KernelImage, anchors: &Anchors) -> Result<Hint, HintError> {
    let linked = lines.iter().find(|line| line.2 == b"_text").ok_or(HintError::Stripped { file })?.0;
    let slide = image.base.0.wrapping_sub(linked);
    let mut builder = Builder::with_capacity(lines.len());
    for (address, kind, name) in lines {
        let moved = if address >= IMAGE_WINDOW.start.0 { address.wrapping_add(slide) } else { address };
        builder.add(moved, kind, name).map_err(|_| HintError::NotSymbols { file })?;
    }
    let symbols = builder.finish();
    // What does not have them at all is refused as well.
    if anchors.confirm(&symbols) != Some(true) {
        return Err(HintError::OtherKernel { file });
    }
    Ok(Hint { file, symbols })
}

fn system_map(text: &[u8]) -> Result<Vec<Line<'_>>, HintError> {
    let lines = text.split(|c| *c == b'\n').zip(1..).filter(|(line, _)| !line.is_empty());
    lines.map(|(line, number)| system_map_line(line).ok_or(HintError::Line { line: number })).collect()
}

fn system_map_line(line: &[u8]) -> Option<Line<'_>> {
    let mut words = line.get(..line.len().min(LONGEST_LINE))?.splitn(3, |c| *c == b' ');
    let (address, kind, name) = (words.next()?, words.next()?, words.next()?);
    let [kind] = kind else { return None };
    let address = u64::from_str_radix(std::str::from_utf8(address).ok()?, 16).ok()?;
    let good = !name.is_empty() && name.iter().all(u8::is_ascii_graphic);
    good.then_some((address, *kind, name))
}

fn vmlinux(bytes: &[u8]) -> Result<Vec<Line<'_>>, HintError> {
    let bad = |why: String| HintError::Elf { why };
    let file = ElfFile64::<LittleEndian>::parse(bytes).map_err(|e| bad(e.to_string()))?;
    if file.architecture() != Architecture::X86_64 {
        return Err(bad("it is for another processor".into()));
    }
    let text: HashSet<_> =
        file.sections().filter(|section| section.kind() == SectionKind::Text).map(|section| section.index()).collect();
    let mut lines = Vec::new();
    for symbol in file.symbols().filter(|symbol| !symbol.is_undefined()) {
        let name = symbol.name_bytes().map_err(|e| bad(e.to_string()))?;
        if name.is_empty() || matches!(symbol.kind(), SymbolKind::File | SymbolKind::Section) {
            continue;
        }
        let local = match symbol.section() {
            SymbolSection::Absolute => b'a',
            SymbolSection::Section(index) if text.contains(&index) => b't',
            _ => b'd',
        };
        let kind = match local {
            b't' if symbol.is_weak() => b'W',
            _ if symbol.is_local() => local,
            _ => local.to_ascii_uppercase(),
        };
        lines.push((symbol.address(), kind, name));
    }
    Ok(lines)
}

#[cfg(test)]
mod tests;
