use proptest::prelude::*;

use super::*;
use crate::testing::{STYLES, Style, kallsyms, put};

const BASE: u64 = 0xffff_ffff_8100_0000;

/// Symbols in the order of their addresses, with one that has a name of many tokens if the style has that.
fn symbols(style: &Style, count: usize) -> Vec<(u64, char, String)> {
    let mut symbols = vec![(BASE, 'T', "_text".to_owned()), (BASE, 'T', "_stext".into())];
    if style.addresses == Addresses::AbsolutePerCpu {
        symbols.insert(0, (0x1fb80, 'A', "current_task".into()));
    }
    symbols.push((BASE + 64, 'T', "entry_SYSCALL_64".into()));
    if style.long_names {
        symbols.push((BASE + 80, 't', "_RNv".to_owned() + &"x".repeat(300)));
    }
    for n in symbols.len() as u64..count as u64 {
        symbols.push((BASE + 0x100 + n / 2 * 16, if n % 2 == 0 { 'T' } else { 'd' }, format!("filler_{}", n / 3)));
    }
    symbols
}

fn encode(symbols: &[(u64, char, String)], style: &Style, at: usize) -> Image {
    let borrowed: Vec<_> = symbols.iter().map(|(address, kind, name)| (*address, *kind, name.as_str())).collect();
    let blob = kallsyms(&borrowed, style, Gva(BASE + at as u64));
    let mut bytes = vec![0; 0x20_0000];
    put(&mut bytes, at, &blob);
    Image::of(Gva(BASE), bytes)
}

fn anchors() -> Anchors {
    Anchors { syscall: Some(Gva(BASE + 64)), page_fault: None }
}

#[test]
fn every_layout_is_read() {
    for style in &STYLES {
        for (count, at) in [(FEWEST_SYMBOLS, 0x8000), (5_003, 0x1_2348)] {
            let symbols = symbols(style, count);
            let image = encode(&symbols, style, at);
            let found = Kallsyms::find(&image, &anchors()).unwrap_or_else(|e| panic!("{}: {e}", style.since));
            let Style { counter_bytes, offsets_last, addresses, .. } = *style;
            assert_eq!(found.layout, Layout { counter_bytes, offsets_last, addresses }, "{}", style.since);
            assert!(found.confirmed && !found.names_data());
            let read: Vec<_> = found.symbols.iter().map(|s| (s.address.0, s.kind, s.name.to_owned())).collect();
            assert_eq!(read, symbols, "{}", style.since);
        }
    }
}

#[test]
fn symbols_of_another_kernel_are_refused() {
    let style = &STYLES[5];
    let image = encode(&symbols(style, 3_000), style, 0x8000);
    let elsewhere = Anchors { syscall: Some(Gva(BASE + 128)), page_fault: None };
    assert_eq!(Kallsyms::find(&image, &elsewhere).unwrap_err(), NoKallsyms::NoAddresses { count: 3_000 });
    assert!(!Kallsyms::find(&image, &Anchors::default()).unwrap().confirmed);
}

#[test]
fn a_damaged_copy_before_the_table_does_not_hide_it() {
    let style = &STYLES[7];
    let symbols = symbols(style, 2_500);
    let copy = encode(&symbols, style, 0x8000);
    let mut image = encode(&symbols, style, 0x10_0000);
    let mut bytes = image.bytes().to_vec();
    // All of it but the names' count.
    bytes[0x8100..0x8_0000].copy_from_slice(&copy.bytes()[0x8100..0x8_0000]);
    image = Image::of(Gva(BASE), bytes);
    assert_eq!(Kallsyms::find(&image, &anchors()).unwrap().symbols.len(), 2_500);
}

#[test]
fn what_is_missing_is_told() {
    let find = |image: &Image| Kallsyms::find(image, &anchors()).map(|found| found.symbols.len());
    assert_eq!(find(&Image::of(Gva(BASE), Vec::new())), Err(NoKallsyms::NoTokens));
    assert_eq!(find(&Image::of(Gva(BASE), b"0\x001\x002\x00".repeat(100))), Err(NoKallsyms::NoTokens));
    let style = &STYLES[5];
    let few = symbols(style, FEWEST_SYMBOLS - 1);
    assert_eq!(find(&encode(&few, style, 0x8000)), Err(NoKallsyms::NoNames));
    let mut upside_down = symbols(style, 3_000);
    upside_down.last_mut().unwrap().0 = BASE + 1;
    assert_eq!(find(&encode(&upside_down, style, 0x8000)), Err(NoKallsyms::NoAddresses { count: 3_000 }));
    let mut outside = symbols(&STYLES[6], 3_000);
    outside.last_mut().unwrap().0 = BASE + (1 << 30);
    assert_eq!(find(&encode(&outside, &STYLES[6], 0x8000)), Err(NoKallsyms::NoAddresses { count: 3_000 }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damage_does_no_harm(
        style in 0..STYLES.len(),
        damage in proptest::collection::vec((0_usize..0x1_8000, any::<u32>()), 1..32),
    ) {
        let style = &STYLES[style];
        let image = encode(&symbols(style, 2_100), style, 0x1000);
        let mut bytes = image.bytes()[..0x2_0000].to_vec();
        for (at, value) in damage {
            put(&mut bytes, 0x1000 + at, &value.to_le_bytes());
        }
        if let Ok(found) = Kallsyms::find(&Image::of(Gva(BASE), bytes), &Anchors::default()) {
            prop_assert!(found.symbols.iter().is_sorted_by_key(|symbol| symbol.address));
            for symbol in found.symbols.iter().step_by(97) {
                prop_assert!(found.symbols.named(symbol.name).any(|same| same == symbol));
            }
        }
    }
}
