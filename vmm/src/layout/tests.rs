use super::*;
use proptest::prelude::*;

fn check(memory: u64) {
    let layout = Layout::new(memory).unwrap();
    let regions = layout.ram_regions();
    assert_eq!(regions.iter().map(|r| r.1).sum::<u64>(), memory);
    let mut offset = 0;
    for &(start, len, at) in &regions {
        assert_eq!(at, offset, "the memory file has no gaps");
        assert!(len > 0);
        offset += len;
        for window in [MMIO32, ECAM, MMIO64] {
            assert!(start.0 + len <= window.start.0 || window.end() <= start);
        }
        for page in [IOAPIC, LAPIC, KVM_IDENTITY_MAP, KVM_TSS] {
            assert!(start.0 + len <= page.0 || page < start);
        }
    }

    let e820 = layout.e820();
    for pair in e820.windows(2) {
        assert!(pair[0].start.0 + pair[0].len <= pair[1].start.0);
    }
    let usable: u64 = e820.iter().filter(|e| e.kind == E820Kind::Ram).map(|e| e.len).sum();
    assert_eq!(usable, memory - (HIMEM.0 - EBDA.0));
    for page in [ACPI_TABLES, GENERATION_PAGE, CLOCK_PAGE] {
        let holds = |e: &&E820Entry| e.start <= page && page.0 + PAGE_SIZE <= e.start.0 + e.len;
        assert_eq!(e820.iter().find(holds).map(|e| e.kind), Some(E820Kind::Reserved));
        assert!(page < layout.low_ram_end(), "it is RAM all the same");
    }
    for entry in e820.iter().filter(|e| e.kind == E820Kind::Ram) {
        assert!(
            regions.iter().any(|&(start, len, _)| start <= entry.start && entry.start.0 + entry.len <= start.0 + len)
        );
    }
}

#[test]
fn sizes_around_the_hole() {
    for memory in [
        MIN_MEMORY,
        LOW_RAM_END.0 - PAGE_SIZE,
        LOW_RAM_END.0,
        LOW_RAM_END.0 + PAGE_SIZE,
        4 * GIB,
        4 * GIB + PAGE_SIZE,
        MAX_MEMORY,
    ] {
        check(memory);
    }
    let at = |memory| Layout::new(memory).unwrap();
    assert_eq!(at(3 * GIB).ram_regions(), [(Gpa(0), 3 * GIB, 0)]);
    assert_eq!(at(3 * GIB).ram_end(), Gpa(3 * GIB));
    assert_eq!(at(3 * GIB + PAGE_SIZE).ram_regions(), [(Gpa(0), 3 * GIB, 0), (Gpa(4 * GIB), PAGE_SIZE, 3 * GIB)]);
}

#[test]
fn refuses_what_it_cannot_lay_out() {
    for bytes in [0, MIN_MEMORY - PAGE_SIZE, MAX_MEMORY + PAGE_SIZE, u64::MAX] {
        assert_eq!(Layout::new(bytes), Err(LayoutError::Size { bytes }));
    }
    let bytes = MIN_MEMORY + 1;
    assert_eq!(Layout::new(bytes), Err(LayoutError::Unaligned { bytes }));
}

#[test]
fn follows_the_address_width() {
    let layout = Layout::new(MAX_MEMORY).unwrap();
    assert_eq!(layout.mmio64(38), None);
    assert_eq!(layout.mmio64(39), Some(MMIO64));
    assert!(layout.check_reach(36).is_err());
    for bits in [37, 39, 52, 64] {
        assert_eq!(layout.check_reach(bits), Ok(()));
    }
}

proptest! {
    #[test]
    fn any_size(pages in MIN_MEMORY / PAGE_SIZE..=MAX_MEMORY / PAGE_SIZE) {
        check(pages * PAGE_SIZE);
    }
}
