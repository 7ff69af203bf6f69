//! The CIVIC paper's way on QEMU: the guest stands still, code is written into an empty piece of its memory through QEMU's GDB stub, and
//! a jump to it into `schedule()`.
//!
//! Where the paper's way can be had faster, or not at all any more, it is had faster:
//!
//! * The guest is no clone, as the paper's and Civic's are: nothing of its memory must be fetched when it is touched.
//! * The addresses are read beforehand, in the guest as root (`/proc/kallsyms`: Debian has `System.map` with the debugging symbols only), and
//!   its kernel is kept where it was linked to (`nokaslr`). A client of our own talks with the stub, not GDB, whose start and reading
//!   of symbols are in the paper's 2.3 s.
//! * The store is plugged in while the guest stands still, and that is not counted: nor is it where Civic forks with `--store`.
//! * No breakpoint: the jump is written at once, the code lets only the first task through, and is taken away, with the jump, after the
//!   program has spoken, which is not counted either.
//! * The helper is the program itself and not a script that starts it.
//! * The paper's guessed page, 16 MiB and one page above the start of memory, is kernel text since. The code goes into the last page
//!   of the kernel's text, which the alignment of its end leaves empty, and the flag into the lowest megabyte, which Linux leaves alone; both
//!   are looked at first.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::code::{Helper, JUMP, SPARE, Targets, assemble};
use super::{PATIENCE, Program, Run};
use crate::bench::clock::Clock;
use crate::bench::guest::Guest;
use crate::bench::io::complaints;
use crate::bench::qmp::Qmp;
use crate::bench::rsp::Rsp;

/// Where kernels map their image: `__START_KERNEL_map` (arch/x86/include/asm/page_64_types.h). Not moved, it is as far from physical
/// addresses.
const IMAGE: u64 = 0xffff_ffff_8000_0000;
const PAGE: u64 = 4096;
/// Physical, of the flag: in the first megabyte, which x86 kernels reserve since 5.13, and out of its firmware's way.
const CLAIM: u64 = 0x5000;
/// The instruction that may stand before the spare bytes: `endbr64`.
const ENDBR: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
const FOLDER: &str = "/mnt";
const BUSYBOX: &str = "/mnt/bin/busybox";

/// QEMU with its guest.
pub struct Peer<'a> {
    guest: Guest<'a>,
    qmp: Qmp,
    stub: PathBuf,
    store: PathBuf,
    kernel: Kernel,
}

/// What must be known of the guest's kernel.
#[derive(Clone, Copy)]
struct Kernel {
    targets: Targets,
    /// Virtual: of the spare bytes, of the empty page, of the flag.
    spare: u64,
    page: u64,
    claim: u64,
    /// What the page is full of.
    filler: u8,
}

impl<'a> Peer<'a> {
    /// Looks at a guest that is up, and has it stand still.
    pub fn new(mut guest: Guest<'a>, control: &Path, stub: PathBuf, store: PathBuf) -> Result<Self> {
        let symbols = guest.run(&look_up(), PATIENCE)?;
        let mut qmp = Qmp::connect(control, PATIENCE)?;
        qmp.execute("stop", json!({}), PATIENCE)?;
        let kernel = Kernel::new(&symbols, &mut Rsp::connect(&stub, PATIENCE)?)?;
        Ok(Self { guest, qmp, stub, store, kernel })
    }

    fn go(&mut self) -> Result<()> {
        self.qmp.execute("cont", json!({}), PATIENCE).map(drop)
    }

    fn halt(&mut self) -> Result<()> {
        self.qmp.execute("stop", json!({}), PATIENCE).map(drop)
    }

    /// Has the guest start programs: with the store just plugged in, and then once more.
    pub fn round(&mut self, programs: &[Program; 2], clock: &Clock) -> Result<[Run; 2]> {
        self.go()?;
        self.guest.run("true", PATIENCE)?;
        self.halt()?;
        self.plug()?;
        let first = self.start(&programs[0], clock)?;
        self.halt()?;
        let again = self.start(&programs[1], clock)?;
        self.unplug()?;
        self.halt()?;
        Ok([first, again])
    }

    /// From a guest that stands still until a program in it speaks; afterwards all is as before and the guest runs.
    fn start(&mut self, program: &Program, clock: &Clock) -> Result<Run> {
        let kernel = self.kernel;
        let script = program.script();
        let argv = [BUSYBOX, "sh", "-c", &script];
        let helper = Helper { device: "/dev/vda", folder: FOLDER, argv: &argv };
        let (mark, call) = (clock.mark(), Instant::now());
        let mut stub = Rsp::connect(&self.stub, PATIENCE)?;
        let (jump, code) = assemble(&kernel.targets, &helper, kernel.spare, kernel.page, kernel.claim);
        stub.write(CLAIM, &[0; 8])?;
        stub.write(kernel.page - IMAGE, &code)?;
        stub.write(kernel.spare - IMAGE, &jump)?;
        stub.go()?;
        let spoke = match self.guest.wait(&program.line(), PATIENCE) {
            Ok((_, spoke)) => spoke,
            Err(e) => {
                let flag = stub.stop().and_then(|()| stub.read(CLAIM, 1));
                return Err(e.context(format!("the program in QEMU's guest; a task came by: {flag:?}")));
            }
        };
        let stretch = clock.stretch(&mark)?;
        let took = (spoke - call).as_secs_f64() * 1e3 / stretch;
        stub.stop()?;
        stub.write(kernel.spare - IMAGE, &SPARE)?;
        // A task may still be in there.
        stub.go()?;
        self.guest.run(&format!("until umount {FOLDER}; do usleep 50000; done 2>/dev/null"), PATIENCE)?;
        stub.stop()?;
        stub.write(kernel.page - IMAGE, &vec![kernel.filler; code.len()])?;
        stub.write(CLAIM, &[0; 8])?;
        stub.detach()?;
        Ok(Run { took, stages: Vec::new() })
    }

    /// Fails if the guest's kernel complained; and lets it go on.
    pub fn finish(mut self) -> Result<()> {
        self.go()?;
        complaints(&mut self.guest)
    }

    fn plug(&mut self) -> Result<()> {
        let file = json!({ "driver": "file", "filename": self.store });
        self.qmp.insist("blockdev-add", &json!({ "driver": "raw", "node-name": "store", "file": file }), PATIENCE)?;
        let device = json!({ "driver": "virtio-blk-pci", "id": "store", "bus": "rp0", "drive": "store" });
        self.qmp.execute("device_add", device, PATIENCE).map(drop)
    }

    fn unplug(&mut self) -> Result<()> {
        self.qmp.execute("device_del", json!({ "id": "store" }), PATIENCE)?;
        self.qmp.event("DEVICE_DELETED", PATIENCE)?;
        self.qmp.insist("blockdev-del", &json!({ "node-name": "store" }), PATIENCE)
    }
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

fn look_up() -> String {
    format!("grep -E ' ({})$' /proc/kallsyms", NAMES.join("|"))
}

impl Kernel {
    /// From its symbols and a look at its memory.
    fn new(symbols: &str, stub: &mut Rsp) -> Result<Self> {
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
        Ok(Self { targets, spare, page, claim: u64::from_le_bytes(direct) + CLAIM, filler })
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
