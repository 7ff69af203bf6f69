use proptest::prelude::*;

use super::*;
use crate::testing::{ENTRY_FLAGS, Guest, GuestShape, PageTables, SparseMemory};

const TABLES: Gpa = Gpa(0x4000);

fn registers(root: u64, levels: u8) -> Registers {
    Registers { cr3: root, cr4: if levels == 5 { 0x1020 } else { 0x20 }, efer: 0x500, ..Default::default() }
}

fn memory() -> SparseMemory {
    let mut memory = SparseMemory::new();
    memory.add(Gpa(0), 0x10_0000);
    memory
}

#[test]
fn pages_of_all_sizes_are_walked() {
    for levels in [4, 5] {
        let mut memory = memory();
        let mut tables = PageTables::new(TABLES, levels);
        let (small, large, huge) = (Gva(0x7f12_3456_7000), Gva(0xffff_ffff_8120_0000), Gva(0xffff_8880_4000_0000));
        tables.map(&mut memory, small, Gpa(0x12_3000), PageSize::Small, ENTRY_FLAGS | USER | PAGE_SIZE | NO_EXECUTE);
        // Bit 12 of an entry of 2 MiB is one of its memory type.
        tables.map(&mut memory, large, Gpa(0x20_1000), PageSize::Large, ENTRY_FLAGS & !WRITABLE);
        tables.map(&mut memory, huge, Gpa(0x1_4000_0000), PageSize::Huge, ENTRY_FLAGS);
        let space = AddressSpace::of(&registers(tables.root.0 | 0xfff, levels)).unwrap();
        assert_eq!((space.root, space.levels), (TABLES, levels));
        let walk = |at: Gva, offset| space.walk(&memory, at.plus(offset));
        let (at, page) = (Gpa(0x12_3fff), PageSize::Small);
        assert_eq!(walk(small, 0xfff), Ok(Translation { at, page, writable: true, user: true, executable: false }));
        let (at, page) = (Gpa(0x3f_fff8), PageSize::Large);
        assert_eq!(
            walk(large, 0x1f_fff8),
            Ok(Translation { at, page, writable: false, user: false, executable: true })
        );
        let (at, page) = (Gpa(0x1_7fff_ffff), PageSize::Huge);
        assert_eq!(
            walk(huge, 0x3fff_ffff),
            Ok(Translation { at, page, writable: true, user: false, executable: true })
        );
        assert_eq!(walk(small, 0x1000), Err(WalkError::NotPresent { at: small.plus(0x1000), level: 1 }));
        assert_eq!(walk(large, LARGE), Err(WalkError::NotPresent { at: large.plus(LARGE), level: 2 }));
    }
}

#[test]
fn what_is_no_translation_is_told() {
    let mut memory = memory();
    let mut tables = PageTables::new(TABLES, 4);
    let at = Gva(0x1000);
    tables.map(&mut memory, at, Gpa(0x5000), PageSize::Small, ENTRY_FLAGS);
    let space = AddressSpace { root: TABLES, levels: 4 };
    for beyond in [Gva(1 << 47), Gva(0xffff_7fff_ffff_ffff), Gva(1 << 56)] {
        assert_eq!(space.walk(&memory, beyond), Err(WalkError::NotCanonical { at: beyond, levels: 4 }));
    }
    let five = AddressSpace { levels: 5, ..space };
    assert!(matches!(five.walk(&memory, Gva(1 << 47)), Err(WalkError::NotPresent { level: 4, .. })));
    let top = tables.entry(&mut memory, at, 4);
    memory.write(top, &(0x8000 | ENTRY_FLAGS | PAGE_SIZE).to_le_bytes());
    assert_eq!(space.walk(&memory, at), Err(WalkError::Malformed { at, level: 4 }));
    memory.write(top, &(0x10_0000 | ENTRY_FLAGS).to_le_bytes());
    assert_eq!(space.walk(&memory, at), Err(WalkError::Table(Absent { at: Gpa(0x10_0000), len: 8 })));
    assert_eq!(AddressSpace::of(&Registers::default()), None);
}

#[test]
fn images_are_found_under_every_root() {
    for (levels, isolated, in_program) in [(4, false, false), (4, false, true), (4, true, false), (5, true, true)] {
        let direct_map = Gva(if levels == 5 { 0xff11_0000_0000_0000 } else { 0xffff_8880_0000_0000 });
        let guest = Guest::new(&GuestShape { levels, isolated, in_program, direct_map, ..Default::default() });
        let found = KernelImage::find(&guest.memory, &guest.registers, guest.registers.lstar);
        assert_eq!(found, Ok(guest.image), "{levels} levels, isolated: {isolated}, in a program: {in_program}");
        let last = guest.image.end.0 - 1;
        let physical = guest.image.to_physical(Gva(last)).unwrap();
        assert_eq!(guest.image.to_virtual(physical), Some(Gva(last)));
        assert_eq!((guest.image.to_physical(Gva(last + 1)), guest.image.to_virtual(physical.plus(1))), (None, None));
        assert_eq!(guest.image.to_virtual(Gpa(0)), None);
    }
}

/// Page tables with so many large pages from `base` on.
fn mapped(memory: &mut SparseMemory, base: Gva, pages: u64) -> PageTables {
    let mut tables = PageTables::new(TABLES, 4);
    for page in 0..pages {
        let (at, to) = (base.plus(page * LARGE), Gpa(0x800_0000 + page * LARGE));
        tables.map(memory, at, to, PageSize::Large, ENTRY_FLAGS);
    }
    tables
}

#[test]
fn pages_that_are_gone_or_split_are_still_the_images() {
    let base = Gva(0xffff_ffff_8200_0000);
    let mut memory = memory();
    let mut tables = mapped(&mut memory, base, 20);
    // As CPA leaves a large page that is not present: its frame inverted (L1TF).
    let gone = tables.entry(&mut memory, base.plus(3 * LARGE), 2);
    memory.write(gone, &0x000f_ffff_f7ff_f062_u64.to_le_bytes());
    let split = tables.entry(&mut memory, base.plus(5 * LARGE), 2);
    memory.write(split, &0_u64.to_le_bytes());
    for page in 0..512 {
        let (at, to) = (base.plus(5 * LARGE + page * 4096), Gpa(0x800_0000 + 5 * LARGE + page * 4096));
        tables.map(&mut memory, at, to, PageSize::Small, ENTRY_FLAGS);
    }
    let other = tables.entry(&mut memory, base.plus(17 * LARGE), 2);
    memory.write(other, &(0x4000_0000 | ENTRY_FLAGS | PAGE_SIZE).to_le_bytes());
    for at in [base, base.plus(5 * LARGE + 0x3210), base.plus(16 * LARGE + 5)] {
        let image = KernelImage::find(&memory, &registers(TABLES.0, 4), at).unwrap();
        assert_eq!((image.base, image.end, image.physical), (base, base.plus(17 * LARGE), Gpa(0x800_0000)));
    }
}

#[test]
fn what_is_no_image_is_told() {
    let base = Gva(0xffff_ffff_8200_0000);
    let find = |memory: &SparseMemory, at| KernelImage::find(memory, &registers(TABLES.0, 4), at);
    let mut short = memory();
    mapped(&mut short, base, FEWEST as u64 - 1);
    assert_eq!(find(&short, base), Err(NoImage::TooShort { at: base, entries: FEWEST - 1 }));
    let absent = base.plus((FEWEST as u64 - 1) * LARGE);
    assert_eq!(find(&short, absent), Err(NoImage::Walk(WalkError::NotPresent { at: absent, level: 2 })));
    let mut long = memory();
    mapped(&mut long, base, 257);
    assert_eq!(find(&long, base), Err(NoImage::TooLong { at: base, entries: 257 }));
    let mut crooked = memory();
    let mut tables = mapped(&mut crooked, base, 9);
    let split = tables.entry(&mut crooked, base, 2);
    crooked.write(split, &0_u64.to_le_bytes());
    tables.map(&mut crooked, base, Gpa(0x1000), PageSize::Small, ENTRY_FLAGS);
    assert_eq!(find(&crooked, base), Err(NoImage::Unaligned { at: base, physical: Gpa(0x1000) }));
    assert_eq!(KernelImage::find(&short, &Registers::default(), base), Err(NoImage::NotLongMode));
}

#[test]
fn an_image_is_not_larger_than_physical_memory() {
    let base = Gva(0xffff_ffff_8200_0000);
    let mut memory = memory();
    let mut tables = PageTables::new(TABLES, 4);
    for page in 0..20 {
        let entry = tables.entry(&mut memory, base.plus(page * LARGE), 2);
        // All but the anchor's are not present, so that they may be anywhere.
        let value = if page == 10 { ENTRY_FLAGS | PAGE_SIZE } else { 2 };
        memory.write(entry, &value.to_le_bytes());
    }
    let image = KernelImage::find(&memory, &registers(TABLES.0, 4), base.plus(10 * LARGE)).unwrap();
    assert_eq!((image.base, image.physical), (base.plus(10 * LARGE), Gpa(0)));
}

#[test]
fn neighbours_are_not_taken_for_a_pair() {
    let guest = Guest::new(&GuestShape::default());
    let mut memory = guest.memory;
    // The root of another task in the page behind: the kernel's half is the same.
    let root: [u8; 4096] = (&memory as &dyn PhysicalMemory).bytes(guest.image.root).unwrap();
    let other = guest.image.root.plus(USER_ROOT);
    memory.write(other, &root);
    let registers = Registers { cr3: other.0, ..guest.registers };
    let image = KernelImage::find(&memory, &registers, registers.lstar).unwrap();
    assert_eq!(image, KernelImage { root: other, ..guest.image });
    let image = KernelImage::find(&memory, &guest.registers, registers.lstar).unwrap();
    assert_eq!(image, guest.image);
}

#[test]
fn free_slots_are_beside_the_image() {
    let slots = |base: u64, pages| {
        let mut memory = memory();
        let mut tables = mapped(&mut memory, Gva(base), pages);
        let used = tables.entry(&mut memory, Gva(0xffff_ffff_8020_0000), 2);
        memory.write(used, &2_u64.to_le_bytes());
        let image = KernelImage::find(&memory, &registers(TABLES.0, 4), Gva(base)).unwrap();
        let free = image.free_slots(&memory).unwrap();
        let indices = free.iter().map(|slot| {
            assert_eq!(slot.entry.0 - image.pmd_table.0, (slot.at.0 - IMAGE_WINDOW.start.0) / LARGE * 8);
            (slot.entry.0 - image.pmd_table.0) / 8
        });
        indices.collect::<Vec<_>>()
    };
    // Slot 1 is in use; the image is 8 to 17; from 256 on there may be modules.
    let expected: Vec<_> = [0].into_iter().chain(2..8).chain(18..256).collect();
    assert_eq!(slots(0xffff_ffff_8100_0000, 10), expected);
    // An image behind the half: its place is randomized, and modules are elsewhere.
    let expected: Vec<_> = [0].into_iter().chain(2..250).chain(260..512).collect();
    assert_eq!(slots(0xffff_ffff_8000_0000 + 250 * LARGE, 10), expected);
    let expected: Vec<_> = [0].into_iter().chain(2..500).collect();
    assert_eq!(slots(0xffff_ffff_8000_0000 + 500 * LARGE, 12), expected);
}

proptest! {
    #[test]
    fn any_tables_are_walked_to_an_end(
        entries in proptest::collection::vec((0_u64..0x6000, any::<u64>()), 0..64),
        tables in proptest::collection::vec((0_u64..512, 0_u64..6, 0_u64..0x100), 0..64),
        at in any::<u64>(), offset in 0_u64..0x4000_0000, cr3 in 0_u64..0x8000, levels in 4_u8..=5,
    ) {
        let mut memory = SparseMemory::new();
        memory.add(Gpa(0), 0x6000);
        for (at, value) in entries {
            memory.write(Gpa(at), &value.to_le_bytes());
        }
        for (slot, table, flags) in tables {
            memory.write(Gpa((flags & 7) * 4096 + slot * 8), &(table << 12 | flags | 1).to_le_bytes());
        }
        let registers = registers(cr3, levels);
        let space = AddressSpace::of(&registers).unwrap();
        let _ = space.walk(&memory, Gva(at));
        let at = IMAGE_WINDOW.start.plus(offset);
        if let Ok(image) = KernelImage::find(&memory, &registers, at) {
            prop_assert!(image.base <= at && at < image.end && image.bytes() <= MOST_IMAGE);
            prop_assert!(image.free_slots(&memory).unwrap().len() < ENTRIES);
            prop_assert_eq!(image.to_physical(at), image.address_space().walk(&memory, at).ok().map(|found| found.at));
        }
    }
}
