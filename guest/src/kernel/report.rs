//! All that is known of a kernel, as plain data to be shown.

use super::Kernel;
use crate::btf::{NoBtf, Unknown};
use crate::current::Current;
use crate::hints::File;
use crate::kallsyms::{Layout, NoKallsyms};
use crate::memory::Gva;
use crate::paging::KernelImage;

/// Where kernels are linked to run, and loaded, unless their configuration says otherwise (`CONFIG_PHYSICAL_START`).
const LINKED: (u64, u64) = (0xffff_ffff_8100_0000, 0x100_0000);

/// All that is known of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Where the image is, in virtual and physical memory; levels of page tables; isolation.
    pub image: KernelImage,
    /// How much of the image is not RAM, in bytes.
    pub absent: u64,
    /// How far the image is from where kernels are linked to run by default (KASLR), in bytes; nothing if it is below.
    pub virtual_slide: Option<u64>,
    /// How far it is in physical memory from where kernels are loaded by default, in bytes; nothing if it is below.
    pub physical_slide: Option<u64>,
    /// Where all of physical memory is mapped.
    pub direct_map: Option<Gva>,
    /// How the kernel introduces itself.
    pub banner: Option<String>,
    /// `uname -r`.
    pub release: Option<String>,
    /// `uname -v`.
    pub version: Option<String>,
    /// The kernel's own symbols.
    pub kallsyms: Result<KallsymsReport, NoKallsyms>,
    /// How many symbols are exported to modules, if the table was found.
    pub exports: Option<usize>,
    /// The kernel's types.
    pub btf: Result<BtfReport, NoBtf>,
    /// Files that help.
    pub hints: Vec<HintReport>,
    /// Where the current task is, if that is known.
    pub current: Option<Current>,
}

/// The kernel's own symbols.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KallsymsReport {
    /// How many there are.
    pub count: usize,
    /// How they are stored.
    pub layout: Layout,
    /// Whether an address at which the processor enters the kernel has the name that it should.
    pub confirmed: bool,
    /// Whether data has names (`CONFIG_KALLSYMS_ALL`).
    pub names_data: bool,
}

/// The kernel's types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BtfReport {
    /// How many there are.
    pub count: usize,
    /// Bytes of types and strings.
    pub bytes: usize,
    /// Where the reading ended early.
    pub unknown: Option<Unknown>,
}

/// A file that helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HintReport {
    /// Its kind.
    pub file: File,
    /// How many symbols it has.
    pub count: usize,
}

impl Report {
    pub(super) fn of(kernel: &Kernel) -> Self {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        let kallsyms = kernel.kallsyms.as_ref().map_err(|why| *why);
        Self {
            image: kernel.image,
            absent: kernel.absent,
            virtual_slide: kernel.image.base.0.checked_sub(LINKED.0),
            physical_slide: kernel.image.physical.0.checked_sub(LINKED.1),
            direct_map: kernel.direct_map,
            banner: kernel.banner.clone(),
            release: owned(kernel.release()),
            version: owned(kernel.version()),
            kallsyms: kallsyms.map(|found| KallsymsReport {
                count: found.symbols.len(),
                layout: found.layout,
                confirmed: found.confirmed,
                names_data: found.names_data(),
            }),
            exports: kernel.exports.as_ref().map(|found| found.symbols.len()),
            btf: kernel.btf().map(|found| BtfReport {
                count: found.count(),
                bytes: found.bytes(),
                unknown: found.unknown(),
            }),
            hints: kernel.hints.iter().map(|hint| HintReport { file: hint.file, count: hint.symbols.len() }).collect(),
            current: kernel.current().ok(),
        }
    }
}
