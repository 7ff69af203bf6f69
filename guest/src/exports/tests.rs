use proptest::prelude::*;

use super::*;
use crate::testing::{exports, put};

const BASE: u64 = 0xffff_ffff_8100_0000;

fn names(prefix: &str, count: usize) -> Vec<(String, u64)> {
    (0..count).map(|n| (format!("{prefix}_{n:05}"), BASE + 16 * n as u64)).collect()
}

/// An image with these tables one behind the other, and the distance from its first byte.
fn image(tables: &[&[(String, u64)]], entry_bytes: usize, at: usize) -> Image {
    let all: Vec<_> = tables.iter().copied().flatten().map(|(name, value)| (name.as_str(), *value)).collect();
    let mut bytes = vec![0; 0x10_0000];
    put(&mut bytes, at, &exports(&all, entry_bytes, Gva(BASE + at as u64)));
    Image::of(Gva(BASE), bytes)
}

#[test]
fn tables_of_both_kinds_are_found() {
    let plain = [vec![("__per_cpu_offset".to_owned(), 0x1_f000)], names("all", 800)].concat();
    let gpl = names("GPL", 700);
    for (entry_bytes, at) in [(12, 0x1_2344), (8, 0x5004), (12, 0)] {
        let found = Exports::find(&image(&[&plain, &gpl], entry_bytes, at)).unwrap();
        assert_eq!((found.entry_bytes, found.symbols.len()), (entry_bytes, 1_501));
        let address = |name| found.symbols.named(name).next().map(|symbol| symbol.address.0);
        assert_eq!(address("__per_cpu_offset"), Some(0x1_f000));
        assert_eq!((address("all_00799"), address("GPL_00001")), (Some(BASE + 16 * 799), Some(BASE + 16)));
    }
}

#[test]
fn what_is_no_table_is_not_found() {
    assert!(Exports::find(&image(&[&names("few", FEWEST - 1)], 12, 0x1000)).is_none());
    assert!(Exports::find(&image(&[&names("enough", FEWEST)], 12, 0x1000)).is_some());
    let tables: Vec<_> = (0..5).map(|_| names("again", 300)).collect();
    let tables: Vec<_> = tables.iter().map(Vec::as_slice).collect();
    assert!(Exports::find(&image(&tables, 12, 0x1000)).is_none());
    let far: Vec<_> = names("far", 1_200).into_iter().map(|(name, _)| (name, BASE - (32 << 20))).collect();
    assert!(Exports::find(&image(&[&far], 12, 0x1000)).is_none());
    let odd: Vec<_> = names("od-d", 1_200);
    assert!(Exports::find(&image(&[&odd], 12, 0x1000)).is_none());
    assert!(Exports::find(&Image::of(Gva(BASE), Vec::new())).is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damage_does_no_harm(
        stride in prop_oneof![Just(8_usize), Just(12)],
        damage in proptest::collection::vec((0_usize..0x8000, any::<u32>()), 0..8),
    ) {
        let whole = image(&[&names("all", 1_100)], stride, 0x1000);
        let mut bytes = whole.bytes()[..0x1_0000].to_vec();
        for (at, value) in damage {
            put(&mut bytes, at, &value.to_le_bytes());
        }
        if let Some(found) = Exports::find(&Image::of(Gva(BASE), bytes)) {
            prop_assert!(found.symbols.len() >= FEWEST);
        }
    }
}
