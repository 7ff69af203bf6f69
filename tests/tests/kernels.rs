//! Stock kernels, looked into: each vmlinux laid out in memory as a boot leaves it, with page tables and an IDT, and found there by
//! `civic-guest`. No KVM, no guest that runs.
//!
//! Run with `CIVIC_ASSETS`, the folder of kernels that `cargo xtask test` makes: every cloud kernel in it is tried, and those of
//! [`KERNELS`] must be there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use civic_guest::anchors::Anchors;
use civic_guest::current::{Current, PerCpu, READERS};
use civic_guest::entry::EntrySlot;
use civic_guest::image::Image;
use civic_guest::kallsyms::{Addresses, Kallsyms};
use civic_guest::kernel::{FindError, Kernel, NoKernel, SymbolError};
use civic_guest::memory::{Gpa, Gva};
use civic_guest::paging::{KernelImage, LARGE, PageSize};
use civic_guest::registers::Registers;
use civic_guest::testing::{ENTRY_FLAGS, PageTables, SparseMemory};
use civic_tests::linux::{KERNELS, from_env};
use libtest_mimic::{Arguments, Failed, Trial};
use object::LittleEndian;
use object::elf::PT_LOAD;
use object::read::elf::{ElfFile64, ProgramHeader};

fn main() -> Result<()> {
    let arguments = Arguments::from_args();
    let mut names: BTreeSet<String> = KERNELS.map(str::to_owned).into();
    let assets = from_env("CIVIC_ASSETS")?;
    for folder in fs::read_dir(&assets).with_context(|| format!("cannot list {}", assets.display()))? {
        let path = folder?.path();
        let name = path.file_name().and_then(|name| name.to_str()).filter(|_| path.join("vmlinux").exists());
        // What is known by other means is of these; real-time kernels and others have other types.
        let name = name.filter(|name| name.ends_with("-cloud"));
        names.extend(name.map(str::to_owned));
    }
    let trials = names.into_iter().map(|name| {
        let folder = assets.join(&name);
        Trial::test(name, move || found(&folder).map_err(|e| Failed::from(format!("{e:#}"))))
    });
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

/// What is known of a kernel by other means (`readelf`, `pahole` and prototypes that were tried against running guests).
struct Golden {
    /// The release begins with this, and ends with "-cloud-amd64".
    release: &'static str,
    /// How many symbols it has, where that is of exactly this release.
    symbols: Option<(&'static str, usize)>,
    /// Bytes from a type's first to a member.
    members: [u64; 22],
    /// Bytes from a function's first to its slot.
    slot: u64,
}

/// In the order of [`Golden::members`].
const MEMBERS: [(&str, &str); 22] = [
    ("task_struct", "__state"),
    ("task_struct", "tasks"),
    ("task_struct", "pid"),
    ("task_struct", "tgid"),
    ("task_struct", "comm"),
    ("task_struct", "mm"),
    ("task_struct", "real_parent"),
    ("task_struct", "signal"),
    ("task_struct", "files"),
    ("task_struct", "fs"),
    ("task_struct", "nsproxy"),
    ("task_struct", "cred"),
    ("task_struct", "utime"),
    ("task_struct", "start_time"),
    ("task_struct", "se.sum_exec_runtime"),
    ("mm_struct", "pgd"),
    ("mm_struct", "mm_mt"),
    ("mm_struct", "arg_start"),
    ("mm_struct", "exe_file"),
    ("vm_area_struct", "vm_file"),
    ("file", "f_op"),
    ("net_device", "dev_addr"),
];

const GOLDEN: [Golden; 2] = [
    Golden {
        release: "6.1.",
        symbols: Some(("6.1.0-56-cloud-amd64", 87_347)),
        members: [
            24, 2192, 2416, 2420, 2976, 2272, 2432, 3072, 3048, 3040, 3064, 2960, 2656, 2776, 200, 72, 0, 312, 944,
            112, 40, 768,
        ],
        slot: 0,
    },
    Golden {
        release: "6.12.",
        symbols: Some(("6.12.117+deb12-cloud-amd64", 154_686)),
        members: [
            24, 2224, 2432, 2436, 2976, 2304, 2448, 3072, 3048, 3040, 3064, 2960, 2656, 2776, 224, 120, 64, 376, 1168,
            128, 16, 1024,
        ],
        slot: 4,
    },
];

/// Members that are where they are in every kernel from 5.10 to 7.3.
const CONSTANT: [(&str, &str, u64); 12] = [
    ("vm_area_struct", "vm_end", 8),
    ("dentry", "d_parent", 24),
    ("dentry", "d_name.name", 40),
    ("mount", "mnt.mnt_root", 32),
    ("files_struct", "fdt", 32),
    ("fdtable", "fd", 8),
    ("sock", "__sk_common.skc_num", 14),
    ("work_struct", "func", 24),
    ("subprocess_info", "path", 40),
    ("subprocess_info", "init", 72),
    ("subprocess_info", "cleanup", 80),
    ("path", "dentry", 8),
];

const FUNCTIONS: [&str; 9] = [
    "schedule",
    "call_usermodehelper_setup",
    "call_usermodehelper_exec",
    "vfs_kern_mount",
    "get_fs_type",
    "filp_open",
    "kernel_write",
    "set_fs_pwd",
    "task_work_run",
];

const SETUP: &str = "struct subprocess_info *call_usermodehelper_setup(const char *path, char **argv, char **envp, gfp_t gfp_mask, \
                     int (*init)(struct subprocess_info *, struct cred *), void (*cleanup)(struct subprocess_info *), void *data)";

/// Where things are in the guest's memory.
const TABLES: Gpa = Gpa(0x10_0000);
const IDT_PAGE: Gpa = Gpa(0x1000);
const IDT: Gva = Gva(0xffff_fe00_0000_0000);
const PHYSICAL: Gpa = Gpa(0x1_3a00_0000);

/// A machine with a kernel in its memory.
struct Laid {
    memory: SparseMemory,
    registers: Registers,
    image: KernelImage,
}

/// How the machine differs.
#[derive(Clone, Copy, Debug)]
struct Shape {
    levels: u8,
    isolated: bool,
}

fn found(folder: &Path) -> Result<()> {
    let path: PathBuf = folder.join("vmlinux");
    let bytes = fs::read(&path).with_context(|| format!("cannot read {}: run 'cargo xtask setup'", path.display()))?;
    let release = fs::read_to_string(folder.join("version")).context("the kernel has no file 'version'")?;
    for shape in [Shape { levels: 4, isolated: false }, Shape { levels: 5, isolated: true }] {
        let laid = lay(&bytes, shape)?;
        check(&laid, release.trim()).with_context(|| format!("with {shape:?}"))?;
    }
    Ok(())
}

fn lay(vmlinux: &[u8], shape: Shape) -> Result<Laid> {
    let file = ElfFile64::<LittleEndian>::parse(vmlinux)?;
    let loads = || file.elf_program_headers().iter().filter(|header| header.p_type(LittleEndian) == PT_LOAD);
    let first = loads().next().context("nothing is loaded")?;
    let (base, loaded) = (first.p_vaddr(LittleEndian), first.p_paddr(LittleEndian));
    let end = loads().map(|header| header.p_paddr(LittleEndian) + header.p_memsz(LittleEndian)).max().unwrap_or(loaded);
    let len = (end - loaded).next_multiple_of(LARGE);
    let mut memory = SparseMemory::new();
    memory.add(Gpa(0), 0x40_0000);
    memory.add(PHYSICAL, len);
    for header in loads() {
        let bytes = header.data(LittleEndian, vmlinux).ok().context("a segment is cut short")?;
        memory.write(PHYSICAL.plus(header.p_paddr(LittleEndian) - loaded), bytes);
    }
    let base = Gva(base);
    let mut tables = PageTables::new(TABLES, shape.levels);
    let mut pair = tables.pair();
    tables.map(&mut memory, IDT, IDT_PAGE, PageSize::Small, ENTRY_FLAGS);
    for page in (0..len).step_by(LARGE as usize) {
        tables.map(&mut memory, base.plus(page), PHYSICAL.plus(page), PageSize::Large, ENTRY_FLAGS);
    }
    tables.map(&mut memory, direct_map(shape.levels), Gpa(0), PageSize::Huge, ENTRY_FLAGS);
    let pmd = tables.entry(&mut memory, base, 2);
    let image = KernelImage {
        base,
        end: base.plus(len),
        physical: PHYSICAL,
        pmd_table: Gpa(pmd.0 & !0xfff),
        root: TABLES,
        levels: shape.levels,
        isolated: shape.isolated,
    };
    // The file has no symbols of its own: where it would enter the kernel is told by those in it, read without that help.
    let kallsyms = Kallsyms::find(&Image::read(&memory, &image), &Anchors::default())?;
    let address = |name: &str| kallsyms.symbols.named(name).next().map(|symbol| symbol.address);
    let lstar = address("entry_SYSCALL_64").context("no entry_SYSCALL_64")?;
    let fault = address("asm_exc_page_fault").context("no asm_exc_page_fault")?.0;
    let gate = [fault & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (fault >> 16 & 0xffff) << 48, fault >> 32];
    memory.write(IDT_PAGE.plus(14 * 16), &gate.map(u64::to_le_bytes).concat());
    if shape.isolated {
        pair.continue_at(tables.end());
        pair.map(&mut memory, IDT, IDT_PAGE, PageSize::Small, ENTRY_FLAGS);
        let entry = Gva(lstar.0 & !(LARGE - 1));
        pair.map(&mut memory, entry, PHYSICAL.plus(entry.0 - base.0), PageSize::Large, ENTRY_FLAGS);
    }
    let registers = Registers {
        cr3: TABLES.0 | if shape.isolated { 0x1800 } else { 0 },
        cr4: if shape.levels == 5 { 0x1020 } else { 0x20 },
        efer: 0xd01,
        idt_base: IDT,
        idt_limit: 0xfff,
        lstar,
        cpl: 3,
        ..Default::default()
    };
    Ok(Laid { memory, registers, image })
}

/// Where physical memory is mapped, by default.
fn direct_map(levels: u8) -> Gva {
    Gva(if levels == 5 { 0xff11_0000_0000_0000 } else { 0xffff_8880_0000_0000 })
}

fn check(laid: &Laid, release: &str) -> Result<()> {
    let start = Instant::now();
    let kernel = Kernel::find(&laid.memory, &[Registers::default(), laid.registers])?;
    let took = start.elapsed();
    ensure!(kernel.image() == &laid.image, "the image is at {:?}, not {:?}", kernel.image(), laid.image);
    let report = kernel.report();
    println!("{release}: {took:?}: {report:?}");
    ensure!(kernel.release() == Some(release), "its release is {:?}", kernel.release());
    ensure!(report.version.as_ref().is_some_and(|version| version.starts_with("#1 SMP")), "{:?}", report.version);
    let kallsyms = report.kallsyms?;
    ensure!(kallsyms.confirmed && kallsyms.names_data, "{kallsyms:?}");
    ensure!(report.exports.is_some_and(|count| (5_000..50_000).contains(&count)), "{:?} exports", report.exports);
    let btf = report.btf?;
    ensure!(btf.unknown.is_none() && btf.count > 50_000, "{btf:?}");
    ensure!((report.virtual_slide, report.absent) == (Some(0), 0), "{report:?}");
    ensure!(report.direct_map == Some(direct_map(laid.image.levels)), "the direct map is at {:?}", report.direct_map);

    for name in FUNCTIONS {
        let at = kernel.function(name)?;
        let (nearest, offset) = kernel.nearest(at.plus(3)).with_context(|| format!("nothing is near {name}"))?;
        ensure!((nearest.symbol.address, offset) == (at, 3), "{name} is at {at}, not {nearest:?}");
    }
    let init = kernel.function("init_mount").err();
    ensure!(matches!(init, Some(SymbolError::InitText { .. })), "init_mount: {init:?}");
    let banner = kernel.function("linux_banner").err();
    ensure!(matches!(banner, Some(SymbolError::NotFunction { .. })), "linux_banner: {banner:?}");
    let prototypes = kernel.prototypes("call_usermodehelper_setup")?;
    let prototypes: Vec<_> = prototypes.iter().map(ToString::to_string).collect();
    ensure!(prototypes == [SETUP], "{prototypes:#?}");
    for (of, path, offset) in CONSTANT {
        let member = kernel.member(of, path)?;
        ensure!(member.offset == offset, "{of}.{path} is at {}", member.offset);
    }
    let comm = kernel.member("task_struct", "comm")?;
    ensure!((comm.size, comm.elements) == (16, Some(16)), "{comm:?}");

    // Both changed with 6.15.
    let current = kernel.current()?;
    let addresses = kallsyms.layout.addresses != Addresses::AbsolutePerCpu;
    ensure!((current.per_cpu == PerCpu::Addresses) == addresses, "{current:?} with {:?}", kallsyms.layout);
    let image = Image::read(&laid.memory, &laid.image);
    let readers = READERS.iter().filter_map(|name| image.offset(kernel.function(name).ok()?));
    let in_code = Current::in_code(&image, readers);
    ensure!(in_code == Some(current), "functions have the current task at {in_code:?}, symbols at {current:?}");

    if let Some(golden) = golden(release) {
        for ((of, path), offset) in MEMBERS.iter().zip(golden.members) {
            let member = kernel.member(of, path)?;
            ensure!(member.offset == offset, "{of}.{path} is at {}, not {offset}", member.offset);
        }
        let schedule = kernel.function("schedule")?;
        let (at, slot) = (schedule.plus(golden.slot), kernel.entry_slot(&laid.memory, schedule)?);
        // As the compiler leaves it; ftrace puts no-operations there while the kernel boots.
        ensure!(slot == EntrySlot::Traced { at }, "{slot:?} in schedule at {schedule}");
        if let Some((exactly, count)) = golden.symbols.filter(|(exactly, _)| *exactly == release) {
            ensure!(kallsyms.count == count, "{} symbols in {exactly}", kallsyms.count);
        }
    }
    refused(laid)
}

fn golden(release: &str) -> Option<&'static Golden> {
    let cloud = release.ends_with("-cloud-amd64");
    GOLDEN.iter().find(|golden| cloud && release.starts_with(golden.release))
}

/// Symbols are believed only with the processor's own word for them.
fn refused(laid: &Laid) -> Result<()> {
    let astray = Registers { lstar: laid.registers.lstar.plus(1), idt_limit: 0, ..laid.registers };
    let kernel = Kernel::find(&laid.memory, &[astray])?;
    ensure!(kernel.report().kallsyms.is_err(), "symbols of another kernel were believed");
    let elsewhere = Registers { lstar: Gva(0x1000), ..astray };
    let error = Kernel::find(&laid.memory, &[elsewhere]).err();
    ensure!(matches!(&error, Some(FindError::Nowhere { tried }) if tried == &[NoKernel::NoEntry]), "{error:?}");
    Ok(())
}
