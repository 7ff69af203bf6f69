use super::*;

const BASE: u64 = 0xe_0000;

struct Parsed(AcpiBlob);

impl Parsed {
    fn new(config: &AcpiConfig) -> Self {
        Self(build(config, BASE))
    }

    fn at(&self, address: u64) -> &[u8] {
        &self.0.bytes[(address - BASE) as usize..]
    }

    /// The table at `address`: its length field obeyed, its checksum checked.
    fn table(&self, address: u64) -> &[u8] {
        let bytes = self.at(address);
        let bytes = &bytes[..int(bytes, 4, 4) as usize];
        assert_eq!(sum(bytes), 0);
        assert_eq!(&bytes[10..16], &OEM);
        bytes
    }

    fn find(&self, signature: &[u8; 4]) -> &[u8] {
        let xsdt = self.table(int(self.at(BASE), 24, 8));
        assert_eq!(&xsdt[..4], b"XSDT");
        xsdt[36..]
            .chunks_exact(8)
            .map(|entry| self.table(int(entry, 0, 8)))
            .find(|table| &table[..4] == signature)
            .unwrap()
    }
}

fn int(bytes: &[u8], at: usize, len: usize) -> u64 {
    let mut word = [0; 8];
    word[..len].copy_from_slice(&bytes[at..at + len]);
    u64::from_le_bytes(word)
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn the_root_pointer_leads_to_every_table() {
    let parsed = Parsed::new(&AcpiConfig::default());
    assert_eq!(parsed.0.rsdp, BASE);
    let rsdp = &parsed.at(BASE)[..36];
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(rsdp), rsdp[15]), (0, 0, 2));
    for signature in [b"FACP", b"APIC", b"MCFG"] {
        parsed.find(signature);
    }
}

#[test]
fn fadt_names_the_fixed_hardware() {
    let parsed = Parsed::new(&AcpiConfig::default());
    let fadt = parsed.find(b"FACP");
    assert_eq!((fadt.len(), fadt[8]), (276, 6));
    let facs = int(fadt, 36, 4);
    assert_eq!(facs % 64, 0);
    assert_eq!(&parsed.at(facs)[..4], b"FACS");
    let dsdt = int(fadt, 40, 4);
    assert_eq!(int(fadt, 140, 8), dsdt);
    assert_eq!(&parsed.table(dsdt)[..4], b"DSDT");
    assert_eq!(int(fadt, 46, 2), 9, "SCI");
    assert_eq!(int(fadt, 48, 4), 0, "no SMI command");
    for (legacy, extended, port, len_at, len) in
        [(56, 148, 0x600, 88, 4), (64, 172, 0x604, 89, 2), (76, 208, 0x608, 91, 4), (80, 220, 0x620, 92, 8)]
    {
        assert_eq!(int(fadt, legacy, 4), port);
        assert_eq!(fadt[len_at], len);
        assert_eq!(fadt[extended..extended + 2], [1, len * 8]);
        assert_eq!(int(fadt, extended + 4, 8), port);
    }
    assert_eq!(int(fadt, 109, 2), 0b11_0101, "IA-PC boot architecture");
    assert_eq!(int(fadt, 112, 4), 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10);
    assert_eq!((fadt[116], int(fadt, 120, 8), fadt[128]), (1, 0xcf9, 6));
}

#[test]
fn madt_lists_the_processors_and_the_wiring() {
    for cpus in [1, 16] {
        let parsed = Parsed::new(&AcpiConfig { cpus, ..Default::default() });
        let madt = parsed.find(b"APIC");
        assert_eq!(int(madt, 36, 4), 0xfee0_0000);
        assert_eq!(int(madt, 40, 4), 1);
        let mut rest = &madt[44..];
        let mut structures = Vec::new();
        while !rest.is_empty() {
            let (structure, next) = rest.split_at(rest[1].into());
            structures.push(structure);
            rest = next;
        }
        let of = |kind: u8| structures.iter().filter(move |s| s[0] == kind);
        let ids: Vec<u8> = of(0).map(|s| s[3]).collect();
        assert_eq!(ids, (0..cpus).collect::<Vec<_>>());
        assert!(of(0).all(|s| s[2] == s[3] && int(s, 4, 4) == 1));
        assert_eq!(of(1).map(|s| int(s, 4, 4)).collect::<Vec<_>>(), [0xfec0_0000]);
        let overrides: Vec<_> = of(2).map(|s| (s[3], int(s, 4, 4), int(s, 8, 2))).collect();
        assert_eq!(overrides, [(0, 2, 0), (9, 9, 13)]);
        assert_eq!(of(4).count(), 1);
    }
}

#[test]
fn mcfg_covers_one_bus() {
    let parsed = Parsed::new(&AcpiConfig::default());
    let mcfg = parsed.find(b"MCFG");
    assert_eq!(mcfg.len(), 60);
    assert_eq!(int(mcfg, 44, 8), 0xe000_0000);
    assert_eq!(mcfg[52..56], [0, 0, 0, 0]);
}

#[test]
fn dsdt_follows_the_configuration() {
    let dsdt = |config: &AcpiConfig| {
        let parsed = Parsed::new(config);
        let address = int(parsed.find(b"FACP"), 140, 8);
        parsed.table(address).to_vec()
    };
    let plain = dsdt(&AcpiConfig::default());
    for name in [b"_S5_", b"PCI0", b"_OSC", b"MBRD", b"COM1", b"C000"] {
        assert!(contains(&plain, name));
    }
    for name in [b"C001", b"VGEN", b"VCLK", b"_GPE", b"HPRG", b"_EJ0"] {
        assert!(!contains(&plain, name));
    }
    let window = 0x40_0000_0000u64..0x60_0000_0000;
    assert!(!contains(&plain, &window.start.to_le_bytes()));
    let rich = dsdt(&AcpiConfig {
        cpus: 16,
        mmio64: Some(window.clone()),
        com1: None,
        generation_id: Some(0x12_3456_7000),
        clock: Some(0xf_f000),
        hotplug_slots: 1 << 3 | 1 << 31,
        ..Default::default()
    });
    assert!(contains(&rich, b"C00F"));
    assert!(contains(&rich, &window.start.to_le_bytes()));
    assert!(contains(&rich, &(window.end - 1).to_le_bytes()));
    assert!(!contains(&rich, b"COM1"));
    // Name (ADDR, Package {0x34567000, 0x12}).
    assert!(contains(&rich, b"\x08ADDR\x12\x09\x02\x0c\x00\x70\x56\x34\x0a\x12"));
    // Memory32Fixed (ReadOnly, 0xff000, 0x1000).
    assert!(contains(&rich, b"\x86\x09\0\0\x00\xf0\x0f\0\0\x10\0\0"));
    // Method (_E02) { Notify (\_SB.VGEN, 0x80) }, and the like for the clock.
    for (handler, device) in [(b"_E02", b"VGEN"), (b"_E03", b"VCLK")] {
        let method = [&handler[..], b"\0\x86\\\x2e_SB_", device, b"\x0a\x80"].concat();
        assert!(contains(&rich, &method));
    }
    // Device (S03) { Name (_ADR, 0x00030000) … and no others.
    assert!(contains(&rich, b"S03_\x08_ADR\x0c\0\0\x03\0") && contains(&rich, b"S1F_\x08_ADR\x0c\0\0\x1f\0"));
    assert!((1..31).filter(|slot| *slot != 3).all(|slot| !contains(&rich, format!("S{slot:02X}_").as_bytes())));
    // Method (_E01) { \_SB.PCI0.HPEV () }.
    assert!(contains(&rich, b"_E01\0\\\x2f\x03_SB_PCI0HPEV"));
}

#[test]
fn fits_below_one_mebibyte() {
    let config = AcpiConfig { cpus: 254, ..Default::default() };
    assert!(build(&config, BASE).bytes.len() < 0x1_0000);
}
