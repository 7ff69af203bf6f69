use object::elf;
use proptest::prelude::*;

use super::*;
use crate::memory::{Gpa, Gva};
use crate::paging::LARGE;
use crate::symbols::Symbol;

const LINKED: u64 = 0xffff_ffff_8100_0000;
const SLIDE: u64 = 0x1a20_0000;
const MAP: &str = "0000000000000000 A __per_cpu_start\n000000000001fb80 A current_task\nffffffff81000000 T _text\n\
                   ffffffff81000040 T entry_SYSCALL_64\nffffffff81400000 D init_task\nffffffff81400100 d page_offset_base\n";

fn image() -> KernelImage {
    let base = Gva(LINKED + SLIDE);
    KernelImage {
        base,
        end: base.plus(9 * LARGE),
        physical: Gpa(LARGE),
        pmd_table: Gpa(0),
        root: Gpa(0),
        levels: 4,
        isolated: false,
    }
}

fn read(hints: &Hints<'_>) -> Result<Vec<Hint>, HintError> {
    let anchors = Anchors { syscall: Some(Gva(LINKED + SLIDE + 0x40)), page_fault: None };
    hints.read(&image(), &anchors)
}

fn system_map(text: &str) -> Result<Vec<Hint>, HintError> {
    read(&Hints { system_map: Some(text.as_bytes()), vmlinux: None })
}

fn symbol<'a>(hints: &'a [Hint], name: &'a str) -> Option<(u64, char)> {
    hints[0].symbols.named(name).next().map(|Symbol { address, kind, .. }| (address.0, kind))
}

#[test]
fn a_system_map_moves_with_the_kernel() {
    let hints = system_map(MAP).unwrap();
    assert_eq!((hints.len(), hints[0].file, hints[0].symbols.len()), (1, File::SystemMap, 6));
    assert_eq!(symbol(&hints, "init_task"), Some((LINKED + SLIDE + 0x40_0000, 'D')));
    assert_eq!(symbol(&hints, "current_task"), Some((0x1fb80, 'A')));
}

#[test]
fn a_file_of_another_kernel_is_refused() {
    let other = MAP.replace("81000040", "81000080");
    assert_eq!(system_map(&other).unwrap_err(), HintError::OtherKernel { file: File::SystemMap });
    let silent = MAP.replace("entry_SYSCALL_64", "entry");
    assert_eq!(system_map(&silent).unwrap_err(), HintError::OtherKernel { file: File::SystemMap });
    // What Debian's packages have in place of the real one.
    let stub = "ffffffffffffffff B The real System.map is in the linux-image-6.1.0-56-cloud-amd64-dbg package\n";
    assert_eq!(system_map(stub).unwrap_err(), HintError::Line { line: 1 });
    assert_eq!(system_map("").unwrap_err(), HintError::Stripped { file: File::SystemMap });
    for bad in ["x T a", "0 TT a", "0 T ", "0", "0 T a b", "\0"] {
        assert_eq!(system_map(&format!("{MAP}{bad}\n")).unwrap_err(), HintError::Line { line: 7 }, "{bad}");
    }
    let long = format!("{MAP}0 T {}\n", "x".repeat(600));
    assert_eq!(system_map(&long).unwrap_err(), HintError::NotSymbols { file: File::SystemMap });
}

/// A file with text, data and these symbols: name, binding, section (1 text, 2 data) and address.
fn vmlinux(symbols: &[(&str, u8, u16, u64)]) -> Vec<u8> {
    const SECTION: usize = 64;
    let (mut names, mut table) = (vec![0], vec![0; 24]);
    for (name, binding, section, address) in symbols {
        table.extend((names.len() as u32).to_le_bytes());
        table.extend([binding << 4, 0]);
        table.extend(section.to_le_bytes());
        table.extend(address.to_le_bytes());
        table.extend([0; 8]);
        names.extend(name.bytes());
        names.push(0);
    }
    let (table_at, names_at) = (64, 64 + table.len());
    let sections = (names_at + names.len()).next_multiple_of(8);
    let mut bytes = vec![0; sections + 5 * SECTION];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1]);
    put(40, &(sections as u64).to_le_bytes());
    put(52, &[64, 0, 0, 0, 0, 0, 64, 0, 5, 0, 4, 0]);
    put(table_at, &table);
    put(names_at, &names);
    // Type, flags, where, how long, linked section, size of an entry.
    for (n, [kind, flags, at, len, link, entry]) in [
        [0; 6],
        [1, 6, 0, 0, 0, 0],
        [1, 3, 0, 0, 0, 0],
        [2, 0, table_at, table.len(), 4, 24],
        [3, 0, names_at, names.len(), 0, 0],
    ]
    .into_iter()
    .enumerate()
    {
        let header = sections + n * SECTION;
        for (field, value) in [(8, flags), (24, at), (32, len), (56, entry)] {
            put(header + field, &(value as u64).to_le_bytes());
        }
        put(header + 4, &(kind as u32).to_le_bytes());
        put(header + 40, &(link as u32).to_le_bytes());
    }
    bytes
}

fn sample() -> Vec<u8> {
    vmlinux(&[
        ("_text", elf::STB_GLOBAL.0, 1, LINKED),
        ("entry_SYSCALL_64", elf::STB_GLOBAL.0, 1, LINKED + 0x40),
        ("weak", elf::STB_WEAK.0, 1, LINKED + 0x80),
        ("local", elf::STB_LOCAL.0, 1, LINKED + 0xc0),
        ("init_task", elf::STB_GLOBAL.0, 2, LINKED + 0x40_0000),
        ("page_offset_base", elf::STB_LOCAL.0, 2, LINKED + 0x40_0100),
        ("absolute", elf::STB_GLOBAL.0, 0xfff1, 5),
        ("elsewhere", elf::STB_GLOBAL.0, 0, 0),
    ])
}

#[test]
fn a_vmlinux_tells_text_from_data() {
    let bytes = sample();
    let hints = read(&Hints { system_map: Some(MAP.as_bytes()), vmlinux: Some(&bytes) }).unwrap();
    assert_eq!((hints.len(), hints[1].file), (2, File::Vmlinux));
    let found: Vec<_> = hints[1].symbols.iter().map(|symbol| (symbol.name, symbol.kind)).collect();
    let expected = [
        ("absolute", 'A'),
        ("_text", 'T'),
        ("entry_SYSCALL_64", 'T'),
        ("weak", 'W'),
        ("local", 't'),
        ("init_task", 'D'),
        ("page_offset_base", 'd'),
    ];
    assert_eq!(found, expected);
    assert_eq!(symbol(&hints[1..], "weak"), Some((LINKED + SLIDE + 0x80, 'W')));
}

#[test]
fn a_vmlinux_that_does_not_help_is_refused() {
    let refuse = |bytes: &[u8]| read(&Hints { system_map: None, vmlinux: Some(bytes) }).unwrap_err();
    assert!(matches!(refuse(b"MZ"), HintError::Elf { .. }));
    assert_eq!(refuse(&vmlinux(&[])), HintError::Stripped { file: File::Vmlinux });
    let mut arm = sample();
    arm[18] = 183;
    assert_eq!(refuse(&arm), HintError::Elf { why: "it is for another processor".into() });
}

proptest! {
    #[test]
    fn damage_does_no_harm(damage in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..16), cut in any::<usize>()) {
        let (mut elf, mut map) = (sample(), MAP.as_bytes().to_vec());
        for (at, value) in damage {
            let (in_elf, in_map) = (at % elf.len(), at % map.len());
            (elf[in_elf], map[in_map]) = (value, value);
        }
        let _ = read(&Hints { system_map: Some(&map), vmlinux: None });
        let _ = read(&Hints { system_map: None, vmlinux: Some(&elf) });
        let _ = read(&Hints { system_map: None, vmlinux: Some(&elf[..cut % elf.len()]) });
    }
}
