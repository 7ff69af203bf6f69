use proptest::prelude::*;
use serde::Deserialize;

use super::*;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Lamp {
    on: bool,
    colour: Vec<u16>,
}

impl Section for Lamp {
    const VERSION: u16 = 3;
}

/// The lamp's next version.
#[derive(Debug, Serialize, Deserialize)]
struct NewLamp(bool);

impl Section for NewLamp {
    const VERSION: u16 = 4;
}

fn lamp() -> Lamp {
    Lamp { on: true, colour: vec![1, 500, 65535] }
}

fn sections() -> Sections {
    let mut sections = Sections::default();
    sections.put("lamp", &lamp());
    sections.put("other lamp", &Lamp { on: false, colour: Vec::new() });
    sections
}

#[test]
fn what_is_put_comes_out_once() {
    let mut read = Sections::decode(&sections().encode()).unwrap();
    assert_eq!(read, sections());
    assert_eq!(read.take::<Lamp>("lamp").unwrap(), lamp());
    assert!(matches!(read.take::<Lamp>("lamp"), Err(StateError::Missing(name)) if name == "lamp"));
    assert!(matches!(read.finish(), Err(StateError::Unknown(left)) if left == ["other lamp"]));
}

#[test]
fn another_version_is_named() {
    let mut read = Sections::decode(&sections().encode()).unwrap();
    let refused = read.take::<NewLamp>("lamp").unwrap_err();
    assert_eq!(refused.to_string(), "the state's section 'lamp' has version 3: this monitor reads version 4");
    let mut bytes = sections().encode();
    bytes[8] = 2;
    assert!(matches!(Sections::decode(&bytes), Err(StateError::Format { found: 2 })));
}

#[test]
fn a_section_with_bytes_to_spare_is_malformed() {
    let mut sections = sections();
    sections.0.get_mut("lamp").unwrap().1.push(0);
    assert!(matches!(sections.take::<Lamp>("lamp"), Err(StateError::Malformed { source: None, .. })));
    sections.0.get_mut("other lamp").unwrap().1.pop();
    assert!(matches!(sections.take::<Lamp>("other lamp"), Err(StateError::Malformed { source: Some(_), .. })));
}

#[test]
fn every_truncation_and_every_flipped_bit_is_refused() {
    let bytes = sections().encode();
    for len in 0..bytes.len() {
        assert!(Sections::decode(&bytes[..len]).is_err(), "{len} bytes");
    }
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << bit;
            assert!(Sections::decode(&bytes).is_err(), "bit {bit} of byte {at}");
        }
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(Sections::decode(&longer), Err(StateError::TooLong(_))));
}

proptest! {
    /// With a checksum that is right, only the decoder stands between the bytes and us.
    #[test]
    fn nonsense_with_a_good_checksum_is_survived(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend(u64::from(FORMAT).to_le_bytes());
        bytes.extend((body.len() as u64).to_le_bytes());
        bytes.extend(CHECKSUM.checksum(&body).to_le_bytes());
        bytes.extend(&body);
        if let Ok(mut sections) = Sections::decode(&bytes) {
            let names: Vec<_> = sections.0.keys().cloned().collect();
            for name in names {
                let _ = sections.take::<Lamp>(&name);
            }
        }
    }
}
