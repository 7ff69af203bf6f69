//! A whole guest: one vCPU and a kernel's image, mapped as Linux maps it.

use super::{ENTRY_FLAGS, PageTables, STYLES, SparseMemory, Style, Types, exports, kallsyms};
use crate::memory::{Gpa, Gva};
use crate::paging::{KernelImage, LARGE, PageSize};
use crate::registers::Registers;

/// Large pages of the image: the fewest that a kernel has.
const PAGES: u64 = 9;
const TABLES: Gpa = Gpa(0x10_0000);
const IDT: Gva = Gva(0xffff_fe00_0000_0000);
const IDT_PAGE: Gpa = Gpa(0x1000);
/// Bytes of each function.
const FUNCTION: u64 = 64;
const FILLERS: u64 = 2_100;
/// Where things are in the image.
const INIT: u64 = 0x20_0000;
const DATA: u64 = 0x40_0000;
const KALLSYMS: u64 = 0x60_0000;
const EXPORTS: u64 = 0x80_0000;
const BTF: u64 = 0xa0_0000;

/// What kind of guest it is.
#[derive(Clone, Copy, Debug)]
pub struct GuestShape {
    /// Levels of page tables.
    pub levels: u8,
    /// Whether programs have page tables of their own.
    pub isolated: bool,
    /// Whether the vCPU is in a program.
    pub in_program: bool,
    /// Where the image is.
    pub base: Gva,
    /// Where it is in physical memory.
    pub physical: Gpa,
    /// Where physical memory is mapped.
    pub direct_map: Gva,
    /// How its symbols are stored; not at all without.
    pub style: Option<Style>,
    /// Whether data has symbols.
    pub names_data: bool,
    /// Bytes of an entry of its exports; none without.
    pub exports: Option<usize>,
    /// Whether it describes its types.
    pub types: bool,
}

impl Default for GuestShape {
    fn default() -> Self {
        Self {
            levels: 4,
            isolated: false,
            in_program: false,
            base: Gva(0xffff_ffff_9a20_0000),
            physical: Gpa(0x4_2a00_0000),
            direct_map: Gva(0xffff_8880_0000_0000),
            style: Some(STYLES[5]),
            names_data: true,
            exports: Some(12),
            types: true,
        }
    }
}

/// A guest that stands still.
#[derive(Debug)]
pub struct Guest {
    /// Its memory.
    pub memory: SparseMemory,
    /// Its vCPU.
    pub registers: Registers,
    /// Where its kernel is.
    pub image: KernelImage,
    /// The kernel's symbols, by address.
    pub symbols: Vec<(u64, char, String)>,
}

impl Guest {
    /// Makes one.
    pub fn new(shape: &GuestShape) -> Self {
        let bytes = PAGES * LARGE;
        let mut memory = SparseMemory::new();
        memory.add(Gpa(0), 0x20_0000);
        memory.add(shape.physical, bytes);
        let mut tables = PageTables::new(TABLES, shape.levels);
        let mut pair = tables.pair();
        tables.map(&mut memory, IDT, IDT_PAGE, PageSize::Small, ENTRY_FLAGS);
        for page in (0..bytes).step_by(LARGE as usize) {
            let (at, to) = (shape.base.plus(page), shape.physical.plus(page));
            tables.map(&mut memory, at, to, PageSize::Large, ENTRY_FLAGS);
        }
        tables.map(&mut memory, shape.direct_map, Gpa(0), PageSize::Huge, ENTRY_FLAGS);
        if shape.isolated {
            pair.continue_at(tables.end());
            pair.map(&mut memory, IDT, IDT_PAGE, PageSize::Small, ENTRY_FLAGS);
            pair.map(&mut memory, shape.base, shape.physical, PageSize::Large, ENTRY_FLAGS);
        }
        let pmd = tables.entry(&mut memory, shape.base, 2);
        let symbols = symbols(shape);
        let of = |name: &str| symbols.iter().find(|symbol| symbol.2 == name).map_or(0, |symbol| symbol.0);
        let fault = of("asm_exc_page_fault");
        let gate = [fault & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (fault >> 16 & 0xffff) << 48, fault >> 32];
        memory.write(IDT_PAGE.plus(14 * 16), &gate.map(u64::to_le_bytes).concat());
        let user_root = if shape.isolated && shape.in_program { 0x1800 } else { 0 };
        let registers = Registers {
            cr3: tables.root.0 | user_root,
            cr4: if shape.levels == 5 { 0x1020 } else { 0x20 },
            efer: 0xd01,
            idt_base: IDT,
            idt_limit: 0xfff,
            kernel_gs_base: if shape.in_program { shape.direct_map.0 } else { 0 },
            gs_base: if shape.in_program { 0 } else { shape.direct_map.0 },
            lstar: Gva(of("entry_SYSCALL_64")),
            rip: Gva(of("schedule")),
            rsp: shape.direct_map,
            cpl: if shape.in_program { 3 } else { 0 },
        };
        let image = KernelImage {
            base: shape.base,
            end: shape.base.plus(bytes),
            physical: shape.physical,
            pmd_table: Gpa(pmd.0 & !0xfff),
            root: tables.root,
            levels: shape.levels,
            isolated: shape.isolated,
        };
        let mut guest = Self { memory, registers, image, symbols };
        guest.fill(shape);
        guest
    }

    /// Writes to the image.
    pub fn write(&mut self, at: Gva, bytes: &[u8]) {
        if let Some(at) = self.image.to_physical(at) {
            self.memory.write(at, bytes);
        }
    }

    /// The address of a symbol; 0 if there is none.
    pub fn address(&self, name: &str) -> Gva {
        Gva(self.symbols.iter().find(|symbol| symbol.2 == name).map_or(0, |symbol| symbol.0))
    }

    fn fill(&mut self, shape: &GuestShape) {
        let base = shape.base;
        self.write(self.address("schedule"), &[0xf3, 0x0f, 0x1e, 0xfa, 0x0f, 0x1f, 0x44, 0, 0]);
        self.write(self.address("do_exit"), &[0xe8, 1, 2, 3, 4]);
        let banner = "Linux version 6.12.1-test (civic@test) (gcc 12) #7 SMP PREEMPT_DYNAMIC Debian 6.12.1-1\n\0";
        self.write(self.address("linux_banner"), banner.as_bytes());
        self.write(self.address("page_offset_base"), &shape.direct_map.0.to_le_bytes());
        let symbols = self.symbols.clone();
        if let Some(style) = &shape.style {
            let is_text = |kind: char| matches!(kind, 't' | 'T' | 'W');
            let named = symbols.iter().filter(|symbol| shape.names_data || is_text(symbol.1));
            let named: Vec<_> = named.map(|(address, kind, name)| (*address, *kind, name.as_str())).collect();
            self.write(base.plus(KALLSYMS), &kallsyms(&named, style, base.plus(KALLSYMS)));
        }
        if let Some(entry_bytes) = shape.exports {
            let secret = |name: &str| name.starts_with('_') || ["init_mount", "linux_banner"].contains(&name);
            let mut exported: Vec<_> =
                symbols.iter().filter(|symbol| symbol.1.is_ascii_uppercase() && !secret(&symbol.2)).collect();
            exported.sort_by_key(|symbol| &symbol.2);
            exported.dedup_by_key(|symbol| &symbol.2);
            let exported: Vec<_> = exported.into_iter().map(|(address, _, name)| (name.as_str(), *address)).collect();
            self.write(base.plus(EXPORTS), &exports(&exported, entry_bytes, base.plus(EXPORTS)));
        }
        if shape.types {
            self.write(base.plus(BTF), &types().finish());
        }
    }
}

fn symbols(shape: &GuestShape) -> Vec<(u64, char, String)> {
    let mut symbols = Vec::new();
    let mut add = |address, kind, name: &str| symbols.push((address, kind, name.to_owned()));
    let zero_based = shape.style.is_none_or(|style| style.addresses == crate::kallsyms::Addresses::AbsolutePerCpu);
    if zero_based {
        add(0x1fb80, 'A', "pcpu_hot");
    }
    let mut at = shape.base.0;
    for name in ["_text", "_stext"] {
        add(at, 'T', name);
    }
    let functions = ["entry_SYSCALL_64", "asm_exc_page_fault", "schedule", "do_exit", "call_usermodehelper_setup"];
    for name in functions {
        at += FUNCTION;
        add(at, 'T', name);
    }
    for name in ["kern_path", "twice", "twice"] {
        at += FUNCTION;
        add(at, 't', name);
    }
    for n in 0..FILLERS {
        at += FUNCTION;
        add(at, if n % 3 == 0 { 't' } else { 'T' }, &format!("filler_{n:04}"));
    }
    add(at + FUNCTION, 'T', "_etext");
    let init = shape.base.0 + INIT;
    for (place, kind, name) in [(0, 'T', "_sinittext"), (64, 'T', "init_mount"), (128, 'T', "_einittext")] {
        add(init + place, kind, name);
    }
    let data = shape.base.0 + DATA;
    for (place, name) in [(0, "init_task"), (0x100, "page_offset_base"), (0x200, "linux_banner"), (0x400, "kern_path")]
    {
        add(data + place, if name == "kern_path" { 'd' } else { 'D' }, name);
    }
    if !zero_based {
        add(data + 0x800, 'D', "current_task");
    }
    symbols
}

fn types() -> Types {
    let mut types = Types::default();
    let int = types.int("int", 4);
    let long = types.int("long unsigned int", 8);
    let character = types.int("char", 1);
    let comm = types.array(character, 16);
    let list = types.structure("list_head", 16, &[]);
    let state = types.union("", 8, &[("__state", int), ("saved_state", long)]);
    let entity = types.structure("sched_entity", 64, &[("sum_exec_runtime", long, 8 * 24)]);
    let task = types.structure(
        "task_struct",
        256,
        &[("", state, 0), ("tasks", list, 64), ("pid", int, 192), ("comm", comm, 256), ("se", entity, 512)],
    );
    let pointer = types.pointer(task);
    let hot = types.structure("", 16, &[("current_task", pointer, 0)]);
    types.structure("pcpu_hot", 64, &[("", hot, 64)]);
    let nothing = types.prototype(0, &[]);
    types.function("schedule", nothing);
    types
}
