use super::*;
use std::collections::BTreeSet;

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

fn vendor(name: &[u8; 12]) -> kvm_cpuid_entry2 {
    let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
    entry(0, 0, [0x1f, word(0), word(8), word(4)])
}

/// Tables as a host with eight cores of two threads would list them.
fn intel() -> Vec<kvm_cpuid_entry2> {
    vec![
        vendor(b"GenuineIntel"),
        entry(1, 0, [0x50654, 0x0710_0800, 0xffff_7fff & !(1 << 31), !0]),
        entry(4, 0, [0x1c00_4121, 0x01c0_003f, 63, 0]),
        entry(4, 1, [0x1c03_c163, 0x02c0_003f, 0x9fff, 0]),
        entry(4, 2, [0, 0, 0, 0]),
        entry(5, 0, [64, 64, 3, 0x20]),
        entry(0xa, 0, [0x0730_0404, 0, 0, 0x603]),
        entry(0xb, 0, [1, 2, 0x100, 7]),
        entry(0xb, 1, [4, 16, 0x201, 7]),
        entry(0x1f, 0, [1, 2, 0x100, 7]),
        entry(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        entry(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        entry(0x8000_0008, 0, [0x302e, 0, 0x1234, 0]),
    ]
}

fn amd() -> Vec<kvm_cpuid_entry2> {
    vec![
        vendor(b"AuthenticAMD"),
        entry(1, 0, [0x0083_0f10, 0x0710_0800, 0, 0]),
        entry(0xb, 0, [1, 2, 0x100, 7]),
        entry(0x8000_0001, 0, [0, 0, !0, 0]),
        entry(0x8000_0008, 0, [0x002b_3030, 0, 0x700f, 0]),
        entry(0x8000_001d, 0, [0x4121, 0, 0, 0]),
        entry(0x8000_001d, 3, [0x3c163, 0, 0, 0]),
        entry(0x8000_001e, 0, [7, 0x103, 0x300, 0]),
        entry(0x8000_0022, 0, [1, 6, 0, 0]),
        entry(0x8000_0026, 0, [1, 2, 0x100, 7]),
    ]
}

fn leaf(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
    let found: Vec<_> = table.iter().filter(|e| (e.function, e.index) == (function, index)).collect();
    assert_eq!(found.len(), 1, "leaf {function:#x}.{index}");
    [found[0].eax, found[0].ebx, found[0].ecx, found[0].edx]
}

fn table(supported: &[kvm_cpuid_entry2], cpus: u8, index: u8) -> Vec<kvm_cpuid_entry2> {
    CpuidTemplate::new(supported, cpus, true).unwrap().vcpu(index)
}

#[test]
fn every_vcpu_has_an_id_of_its_own_inside_the_socket() {
    for supported in [intel(), amd()] {
        for cpus in 1..=MAX_CPUS {
            let mut ids = BTreeSet::new();
            for index in 0..cpus {
                let table = table(&supported, cpus, index);
                let id = leaf(&table, 0xb, 0)[3];
                assert_eq!(leaf(&table, 1, 0)[1] >> 24, id);
                assert_eq!(leaf(&table, 0xb, 1)[3], id);
                let [shift, cores, kind, _] = leaf(&table, 0xb, 1);
                assert_eq!((cores, kind), (u32::from(cpus), 0x201));
                assert_eq!(id >> shift, 0, "one socket");
                assert_eq!(leaf(&table, 0xb, 0)[..3], [0, 1, 0x100], "one thread a core");
                assert_eq!(leaf(&table, 0xb, 2)[..3], [0, 0, 2]);
                ids.insert(id);
            }
            assert_eq!(ids.len(), usize::from(cpus));
        }
    }
}

#[test]
fn leaf_1_describes_the_machine() {
    let [_, ebx, ecx, edx] = leaf(&table(&intel(), 4, 3), 1, 0);
    assert_eq!(ebx, 0x0304_0800);
    assert_eq!(ecx & (1 << 3 | 1 << 15), 0, "MONITOR and PDCM");
    assert_eq!(ecx >> 21 & 1, 1, "x2APIC");
    assert_eq!(ecx >> 31, 1, "hypervisor");
    assert_eq!(edx >> 28 & 1, 1, "HTT");
    assert_eq!(leaf(&table(&intel(), 1, 0), 1, 0)[3] >> 28 & 1, 0);
    for deadline in [false, true] {
        let template = CpuidTemplate::new(&intel(), 1, deadline).unwrap();
        let ecx = leaf(&template.vcpu(0), 1, 0)[2];
        assert_eq!(ecx >> 24 & 1 == 1, deadline);
    }
}

#[test]
fn caches_are_shared_by_what_exists() {
    let table = table(&intel(), 6, 0);
    assert_eq!(leaf(&table, 4, 0)[0], 7 << 26 | 0x121);
    assert_eq!(leaf(&table, 4, 1)[0], 7 << 26 | 7 << 14 | 0x163);
    assert_eq!(leaf(&table, 4, 2)[0], 0, "the end of the list stays one");
    let table = self::table(&amd(), 2, 0);
    assert_eq!(leaf(&table, 0x8000_001d, 0)[0], 0x121);
    assert_eq!(leaf(&table, 0x8000_001d, 3)[0], 1 << 14 | 0x163);
}

#[test]
fn amd_counts_its_cores() {
    let table = table(&amd(), 6, 5);
    assert_eq!(leaf(&table, 0x8000_0008, 0)[2], 3 << 12 | 5);
    assert_eq!(leaf(&table, 0x8000_001e, 0), [5, 5, 0, 0]);
    assert_eq!(leaf(&table, 0x8000_0001, 0)[2], !(1 << 2 | 1 << 23 | 1 << 24 | 1 << 28));
    assert!(!table.iter().any(|e| e.function == 0x8000_0026));
    assert_eq!(leaf(&table, 0x8000_0022, 0), [0; 4]);
    let one = self::table(&amd(), 1, 0);
    assert_eq!(leaf(&one, 0x8000_0008, 0)[2], 0);
    assert_eq!(leaf(&one, 0x8000_0001, 0)[2] >> 1 & 1, 0);
}

#[test]
fn no_counters_and_a_clock() {
    let table = table(&intel(), 2, 1);
    assert_eq!(leaf(&table, 0xa, 0), [0; 4]);
    assert_eq!(leaf(&table, 5, 0), [0; 4]);
    assert_eq!(leaf(&table, 0x4000_0000, 0), leaf(&intel(), 0x4000_0000, 0));
    assert_ne!(leaf(&table, 0x4000_0001, 0)[0] & 1 << 3, 0, "KVM_FEATURE_CLOCKSOURCE2");
    assert_eq!(leaf(&table, 0x1f, 1), leaf(&table, 0xb, 1));
    assert_eq!(leaf(&table, 0x8000_0008, 0)[2], 0, "reserved on Intel");
}

#[test]
fn no_asynchronous_page_faults() {
    let features = leaf(&table(&intel(), 1, 0), 0x4000_0001, 0)[0];
    // Of KVM_FEATURE_ASYNC_PF, _VMEXIT and _INT nothing, all else as KVM has it.
    assert_eq!(features, 0x0100_7efb & !(1 << 4 | 1 << 10 | 1 << 14));
}

#[test]
fn no_nested_virtualisation() {
    let mut with_svm = amd();
    with_svm.push(entry(0x8000_000a, 0, [1, 16, 0, 0xb]));
    assert_eq!(leaf(&table(&intel(), 2, 0), 1, 0)[2] & 1 << 5, 0);
    assert_eq!(leaf(&table(&with_svm, 2, 0), 0x8000_0001, 0)[2] & 1 << 2, 0);
    assert_eq!(leaf(&table(&with_svm, 2, 0), 0x8000_000a, 0), [0; 4]);
}

#[test]
fn physical_address_bits() {
    let bits = |supported: &[kvm_cpuid_entry2]| CpuidTemplate::new(supported, 1, true).unwrap().phys_bits();
    assert_eq!(bits(&intel()), 46);
    assert_eq!(bits(&amd()), 43, "where the hypervisor reaches less");
    assert_eq!(bits(&intel()[..2]), DEFAULT_PHYS_BITS);
}

#[test]
fn refuses_what_is_no_machine() {
    for cpus in [0, MAX_CPUS + 1] {
        let error = CpuidTemplate::new(&intel(), cpus, true).unwrap_err();
        assert!(matches!(error, CpuidError::Cpus { .. }));
    }
    let error = CpuidTemplate::new(&intel()[..1], 1, true).unwrap_err();
    assert!(matches!(error, CpuidError::NoLeaf { leaf: 1 }));
}
