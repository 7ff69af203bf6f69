//! What the monitor finds out about a guest's kernel by itself.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Files of the host that belong to a guest's kernel, for one whose own memory does not say enough. Each is believed only if the kernel's
/// entry points are where the guest's are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestFiles {
    /// Its `System.map`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub system_map: Option<PathBuf>,
    /// Its `vmlinux`, with symbols.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub vmlinux: Option<PathBuf>,
}

impl GuestFiles {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// How many symbols a file has told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestFile {
    /// `System.map` or `vmlinux`.
    pub file: String,
    /// How many.
    pub count: u64,
}

/// A guest's kernel, found in its memory and registers alone. Addresses are hexadecimal, with `0x`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestKernel {
    /// `uname -r`.
    pub release: Option<String>,
    /// `uname -v`.
    pub version: Option<String>,
    /// How it introduces itself, with compiler and build.
    pub banner: Option<String>,
    /// Where it is.
    pub image: GuestImage,
    /// Levels of its page tables: 4 or 5.
    pub paging_levels: u8,
    /// Whether programs have page tables of their own (KPTI).
    pub isolated: bool,
    /// Its page table root, a physical address.
    pub page_table: String,
    /// Where it has all of physical memory mapped, if that was found.
    pub direct_map: Option<String>,
    /// What per-CPU symbols are, if that was found.
    pub per_cpu: Option<PerCpuSymbols>,
    /// Its own symbols (kallsyms).
    pub symbols: Finding<GuestSymbols>,
    /// What files that were given have told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<GuestFile>,
    /// How many symbols it exports to modules, if the table was found.
    pub exports: Option<u64>,
    /// Its types (BTF).
    pub types: Finding<GuestTypes>,
    /// Sums (CRC-32) over what should not change but by the kernel itself, if it is known where that is.
    pub checksums: Option<GuestChecksums>,
    /// How long the vCPUs stood still to tell their registers, in microseconds.
    pub stopped_us: u64,
    /// How long it took in all, in microseconds.
    pub took_us: u64,
}

/// CRC-32 sums over parts of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestChecksums {
    /// All of its functions' code. The kernel itself changes that where it traces, or chooses between alternatives.
    pub text: u32,
    /// The page table that maps its image, but for accessed and dirty bits.
    pub mapping: u32,
}

/// Where a kernel is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestImage {
    /// Its first byte, which is `_text`.
    pub base: String,
    /// The same in physical memory.
    pub physical: String,
    /// Its bytes.
    pub bytes: u64,
    /// How far it is from where kernels are linked to run by default (KASLR), in bytes; none if it is below.
    pub slide: Option<u64>,
    /// How far it is in physical memory from where kernels are loaded by default, in bytes; none if it is below.
    pub physical_slide: Option<u64>,
}

/// What the addresses of per-CPU symbols are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PerCpuSymbols {
    /// Offsets from a CPU's variables.
    Offsets,
    /// Addresses in the image.
    Addresses,
}

/// Something that was found, or why it was not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Finding<T> {
    /// It was.
    Found(T),
    /// Why not.
    Missing(String),
}

/// A kernel's own symbols.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestSymbols {
    /// How many there are.
    pub count: u64,
    /// How addresses are stored.
    pub addresses: SymbolAddresses,
    /// Whether where the processor enters the kernel has the name that it should.
    pub confirmed: bool,
    /// Whether data has names (`CONFIG_KALLSYMS_ALL`).
    pub names_data: bool,
}

/// How a kernel stores the addresses of its symbols.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SymbolAddresses {
    /// Downwards from a base, those of per-CPU variables as they are.
    AbsolutePerCpu,
    /// Upwards from a base.
    FromBase,
    /// Each from where it is stored.
    FromThemselves,
}

/// A kernel's types.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestTypes {
    /// How many there are.
    pub count: u64,
    /// Bytes that they and their names take.
    pub bytes: u64,
    /// Whether all of them were understood.
    pub complete: bool,
}
