//! A guest's memory and registers, in which its kernel is looked for: all of it, and each reader alone.
//!
//! A kernel's image is too large for an input. So most inputs are a shape, from which a good one is made, and then what is written over it.

use arbitrary::{Result, Unstructured};
use civic_guest::anchors::Anchors;
use civic_guest::btf::{Btf, TypeId};
use civic_guest::exports::Exports;
use civic_guest::hints::Hints;
use civic_guest::image::Image;
use civic_guest::kallsyms::{FEWEST_SYMBOLS, Kallsyms};
use civic_guest::kernel::Kernel;
use civic_guest::memory::{Gpa, Gva};
use civic_guest::paging::{AddressSpace, IMAGE_WINDOW, KernelImage, MOST_IMAGE};
use civic_guest::registers::Registers;
use civic_guest::symbols::{LONGEST_NAME, MOST_SYMBOLS, SymbolTable};
use civic_guest::testing::{Guest, GuestShape, STYLES, SparseMemory, Types, exports, kallsyms};

const BASE: Gva = Gva(0xffff_ffff_8100_0000);
/// Bytes of the images that have one thing to be found.
const IMAGE: usize = 0x2_0000;
/// The longest name of a type, of which every name in it has its share.
const LONGEST_TYPE: usize = 4 * LONGEST_NAME;

/// Runs one input: its first byte says which reader reads it.
pub fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let _ = match input.arbitrary::<u8>() {
        Ok(0..0x40) => whole(&mut input),
        Ok(0x40..0x80) => symbols(&mut input),
        Ok(0x80..0xa0) => exported(&mut input),
        Ok(0xa0..0xd0) => types(&mut input),
        Ok(0xd0..0xf0) => tables(&mut input),
        _ => files(&mut input),
    };
}

/// A guest with any of its memory and registers changed.
fn whole(input: &mut Unstructured<'_>) -> Result<()> {
    let (style, flags) = (input.arbitrary::<u8>()?, input.arbitrary::<u8>()?);
    let mut guest = Guest::new(&shape(style, flags));
    // The IDT, the page tables, and each part of the image.
    let image = [0, 0x20_0000, 0x40_0000, 0x60_0000, 0x80_0000, 0xa0_0000].map(|at| guest.image.physical.plus(at));
    let parts = [&[Gpa(0x1000), Gpa(0x10_0000)][..], &image].concat();
    let mut registers = guest.registers;
    while !input.is_empty() {
        let (what, at, value) = (input.arbitrary::<u8>()?, input.arbitrary::<u32>()?, input.arbitrary::<u64>()?);
        match what & 0xf {
            part @ 0..8 => {
                let len = 1 + usize::from(what >> 4) % 8;
                guest.memory.write(parts[usize::from(part)].plus(u64::from(at)), &value.to_le_bytes()[..len]);
            }
            8 => registers.cr3 = value,
            9 => registers.cr4 = value,
            10 => registers.efer = value,
            11 => registers.idt_base = Gva(value),
            12 => registers.idt_limit = value as u16,
            13 => registers.lstar = Gva(value),
            14 => registers.lstar = IMAGE_WINDOW.start.plus(u64::from(at)),
            _ => (registers.gs_base, registers.cpl) = (value, at as u8),
        }
    }
    let map = b"ffffffff81000000 T _text\nffffffff81000040 T entry_SYSCALL_64\n";
    let hints = Hints { system_map: (flags & 0x80 != 0).then_some(&map[..]), vmlinux: None };
    match Kernel::find_with(&guest.memory, &[registers, guest.registers], &hints) {
        Ok(kernel) => ask(&kernel, &guest),
        Err(error) => drop(error.to_string()),
    }
    Ok(())
}

fn shape(style: u8, flags: u8) -> GuestShape {
    let levels = if flags & 1 == 0 { 4 } else { 5 };
    GuestShape {
        levels,
        isolated: flags & 2 != 0,
        in_program: flags & 4 != 0,
        direct_map: Gva(if levels == 4 { 0xffff_8880_0000_0000 } else { 0xff11_0000_0000_0000 }),
        style: STYLES.get(usize::from(style) % (STYLES.len() + 1)).copied(),
        names_data: flags & 8 == 0,
        exports: [Some(12), Some(8), None][usize::from(flags >> 4 & 3).min(2)],
        types: flags & 0x40 == 0,
        ..Default::default()
    }
}

/// Whatever was found, its answers are about its image.
fn ask(kernel: &Kernel, guest: &Guest) {
    let image = *kernel.image();
    assert!(image.base < image.end && image.bytes() <= MOST_IMAGE);
    assert!(IMAGE_WINDOW.contains(&image.base) && image.end <= IMAGE_WINDOW.end);
    for name in ["schedule", "kern_path", "twice", "init_mount", "nothing"] {
        if let Ok(at) = kernel.function(name) {
            let _ = kernel.entry_slot(&guest.memory, at);
            if let Some((found, offset)) = kernel.nearest(at) {
                assert_eq!(found.symbol.address.plus(offset), at);
            }
        }
        let _ = kernel.symbol(name).map_err(|error| error.to_string());
        let _ = kernel.prototypes(name);
    }
    let _ = (kernel.member("task_struct", "se.sum_exec_runtime"), kernel.current());
    for slot in image.free_slots(&guest.memory).unwrap_or_default() {
        assert!(!(image.base..image.end).contains(&slot.at));
    }
    let report = kernel.report();
    assert!(report.banner.is_none_or(|banner| banner.len() <= 512));
    assert!(kernel.version().is_none_or(|version| version.starts_with('#')));
}

/// An image with `blob` in it, and then what the input writes over it.
fn image(input: &mut Unstructured<'_>, blob: &[u8]) -> Result<Image> {
    let mut bytes = vec![0; IMAGE];
    let len = blob.len().min(IMAGE);
    bytes[..len].copy_from_slice(&blob[..len]);
    while !input.is_empty() {
        let (at, value) = (input.arbitrary::<u32>()? as usize % (IMAGE - 8), input.arbitrary::<u64>()?);
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    Ok(Image::of(BASE, bytes))
}

fn symbols(input: &mut Unstructured<'_>) -> Result<()> {
    let style = STYLES[usize::from(input.arbitrary::<u8>()?) % STYLES.len()];
    let names: Vec<_> = (0..FEWEST_SYMBOLS as u64).map(|n| (BASE.0 + 16 * n, format!("filler_{n}"))).collect();
    let list: Vec<_> = names.iter().map(|(address, name)| (*address, 'T', name.as_str())).collect();
    let image = image(input, &kallsyms(&list, &style, BASE))?;
    match Kallsyms::find(&image, &Anchors::default()) {
        Ok(found) => check(&found.symbols),
        Err(error) => drop(error.to_string()),
    }
    Ok(())
}

fn check(symbols: &SymbolTable) {
    assert!(symbols.len() < MOST_SYMBOLS);
    assert!(symbols.iter().is_sorted_by_key(|symbol| symbol.address));
    for symbol in symbols.iter().step_by(193) {
        assert!(symbol.name.len() <= LONGEST_NAME);
        assert!(symbols.named(symbol.name).any(|same| same == symbol));
        assert_eq!(
            symbols.nearest(symbol.address).map(|(near, offset)| (near.address, offset)),
            Some((symbol.address, 0))
        );
    }
}

fn exported(input: &mut Unstructured<'_>) -> Result<()> {
    let entry_bytes = if input.arbitrary::<bool>()? { 12 } else { 8 };
    let names: Vec<_> = (0..1_100).map(|n| format!("filler_{n:04}")).collect();
    let list: Vec<_> = names.iter().map(|name| (name.as_str(), BASE.0)).collect();
    let image = image(input, &exports(&list, entry_bytes, BASE))?;
    if let Some(found) = Exports::find(&image) {
        check(&found.symbols);
    }
    Ok(())
}

/// Types and strings as they come, with a header that says how many bytes they have.
fn types(input: &mut Unstructured<'_>) -> Result<()> {
    let types = input.arbitrary::<u16>()?;
    let rest = input.bytes(input.len())?;
    let types = u32::from(types).min(rest.len() as u32);
    let mut bytes = vec![0x9f, 0xeb, 1, 0];
    for word in [24, 0, types, types, rest.len() as u32 - types] {
        bytes.extend(u32::to_le_bytes(word));
    }
    bytes.extend(rest);
    let Ok(btf) = Btf::find(&bytes) else { return Ok(()) };
    for id in (0..=btf.count() as u32).map(TypeId) {
        assert!(btf.type_name(id).len() <= LONGEST_TYPE);
        let _ = (btf.kind(id), btf.size_of(id), btf.array(id));
    }
    for name in ["task_struct", "a"] {
        for path in ["pid", "a", "a.a", "se.a"] {
            let _ = btf.member(name, path).map_err(|error| error.to_string());
        }
        let _ = (btf.size(name), btf.enumerator(name));
        for prototype in btf.prototypes(name) {
            drop(prototype.to_string());
        }
    }
    Ok(())
}

/// Page tables in six pages: entries, each with the page and slot where it is.
fn tables(input: &mut Unstructured<'_>) -> Result<()> {
    let mut memory = SparseMemory::new();
    memory.add(Gpa(0), 0x6000);
    let (cr3, at) = (u64::from(input.arbitrary::<u16>()?), input.arbitrary::<u64>()?);
    let cr4 = if input.arbitrary::<bool>()? { 0x1020 } else { 0x20 };
    while !input.is_empty() {
        let (place, value) = (u64::from(input.arbitrary::<u16>()?), input.arbitrary::<u64>()?);
        memory.write(Gpa(place * 8 % 0x6000), &value.to_le_bytes());
    }
    let registers = Registers { cr3, cr4, efer: 0x500, ..Default::default() };
    let space = AddressSpace::of(&registers).expect("64-bit mode is on");
    let _ = space.walk(&memory, Gva(at)).map_err(|error| error.to_string());
    let at = IMAGE_WINDOW.start.plus(at % (1 << 30));
    match KernelImage::find(&memory, &registers, at) {
        Ok(image) => {
            assert!((image.base..image.end).contains(&at) && image.bytes() <= MOST_IMAGE);
            let place = image.address_space().walk(&memory, at).ok().map(|found| found.at);
            assert_eq!(image.to_physical(at), place);
        }
        Err(error) => drop(error.to_string()),
    }
    Ok(())
}

/// Files of the operator's.
fn files(input: &mut Unstructured<'_>) -> Result<()> {
    let map = input.arbitrary::<bool>()?;
    let file = Some(input.bytes(input.len())?);
    let hints = if map { Hints { system_map: file, vmlinux: None } } else { Hints { system_map: None, vmlinux: file } };
    let guest = Guest::new(&GuestShape { style: None, exports: None, types: false, ..Default::default() });
    if let Err(error) = Kernel::find_with(&guest.memory, &[guest.registers], &hints) {
        drop(error.to_string());
    }
    Ok(())
}

/// A guest of every kind and nothing written over it, a table of every layout, a few types, tables that map something, and files.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<_> = (0..=STYLES.len() as u8).map(|style| vec![0, style, style.wrapping_mul(0x25)]).collect();
    seeds.push([&[0, 5, 0, 3][..], &[1; 12]].concat());
    seeds.extend((0..STYLES.len() as u8).map(|style| vec![0x40, style]));
    seeds.extend([vec![0x80, 0], vec![0x80, 1]]);
    let mut types = Types::default();
    let (int, long) = (types.int("int", 4), types.int("long", 8));
    let inner = types.union("", 8, &[("a", int), ("pid", long)]);
    let array = types.array(inner, 3);
    let task = types.structure("task_struct", 64, &[("", inner, 0), ("se", array, 64)]);
    let pointer = types.pointer(task);
    let prototype = types.prototype(pointer, &[("a", pointer), ("", 0)]);
    types.function("a", prototype);
    types.enumeration("colours", &[("a", 1)]);
    let btf = types.finish();
    seeds.push([&[0xa0][..], &btf[12..14], &btf[24..]].concat());
    let entry = |slot: u16, value: u64| [&slot.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let mut mapped = vec![0xd0, 0, 0x10, 0, 0, 0x10, 1, 0, 0, 0, 0, 0];
    mapped.extend([entry(512 + 511, 0x2003), entry(1024 + 510, 0x3003)].concat());
    mapped.extend((0..12).flat_map(|n| entry(1536 + 8 + n, 0x83 | (0x100 + u64::from(n)) << 21)));
    seeds.push(mapped);
    seeds.push([&[0xf0, 1][..], b"ffffffff81000000 T _text\nffffffff81000040 T entry_SYSCALL_64\n"].concat());
    seeds.push([&[0xf0, 0][..], b"\x7fELF\x02\x01\x01"].concat());
    seeds
}
