use proptest::prelude::*;

use super::*;
use crate::current::PerCpu;
use crate::kallsyms::Addresses;
use crate::memory::Gpa;
use crate::testing::{Guest, GuestShape, STYLES};

fn find(guest: &Guest) -> Result<Kernel, FindError> {
    Kernel::find(&guest.memory, &[guest.registers])
}

#[test]
fn kernels_of_every_layout_are_found() {
    for (n, style) in STYLES.into_iter().enumerate() {
        let levels = if n % 2 == 0 { 4 } else { 5 };
        let shape = GuestShape {
            levels,
            isolated: n % 3 == 0,
            in_program: n % 4 < 2,
            style: Some(style),
            direct_map: Gva(if levels == 4 { 0xffff_9c55_4000_0000 } else { 0xff23_4567_4000_0000 }),
            ..Default::default()
        };
        let guest = Guest::new(&shape);
        // The first vCPU waits to be started.
        let kernel = Kernel::find(&guest.memory, &[Registers::default(), guest.registers]).unwrap();
        assert_eq!(kernel.image(), &guest.image);
        assert_eq!(kernel.direct_map(), Some(shape.direct_map), "{}", style.since);
        for name in ["schedule", "do_exit", "filler_0001"] {
            assert_eq!(kernel.function(name), Ok(guest.address(name)), "{}", style.since);
        }
        let per_cpu = kernel.current().unwrap();
        let expected = if style.addresses == Addresses::AbsolutePerCpu {
            Current { displacement: 0x1fb88, per_cpu: PerCpu::Offsets }
        } else {
            Current { displacement: guest.address("current_task").0 as i32, per_cpu: PerCpu::Addresses }
        };
        assert_eq!(per_cpu, expected, "{}", style.since);
    }
}

#[test]
fn a_kernel_says_who_it_is() {
    let guest = Guest::new(&GuestShape::default());
    let kernel = find(&guest).unwrap();
    assert_eq!(kernel.release(), Some("6.12.1-test"));
    assert_eq!(kernel.version(), Some("#7 SMP PREEMPT_DYNAMIC Debian 6.12.1-1"));
    assert!(kernel.banner().unwrap().starts_with("Linux version 6.12.1-test (civic@test)"));
    let report = kernel.report();
    assert_eq!((report.virtual_slide, report.physical_slide), (Some(0x1920_0000), Some(0x4_2900_0000)));
    let symbols = report.kallsyms.unwrap();
    assert_eq!(symbols.count, guest.symbols.len());
    assert!(symbols.confirmed && symbols.names_data);
    assert_eq!(
        (report.exports, report.absent, report.hints),
        (Some(kernel.exports.unwrap().symbols.len()), 0, Vec::new())
    );
    assert_eq!((report.btf.unwrap().unknown, report.image), (None, guest.image));
}

#[test]
fn functions_are_in_text_that_stays() {
    let guest = Guest::new(&GuestShape::default());
    let kernel = find(&guest).unwrap();
    let name = |name: &str| name.to_owned();
    // A function and data of the same name.
    let of_text = guest.symbols.iter().find(|symbol| symbol.2 == "kern_path" && symbol.1 == 't').unwrap();
    assert_eq!(kernel.function("kern_path"), Ok(Gva(of_text.0)));
    assert_eq!(kernel.symbol("kern_path"), Err(SymbolError::Ambiguous { name: name("kern_path"), count: 2 }));
    assert_eq!(kernel.function("twice"), Err(SymbolError::Ambiguous { name: name("twice"), count: 2 }));
    assert_eq!(kernel.function("init_mount"), Err(SymbolError::InitText { name: name("init_mount") }));
    assert_eq!(kernel.function("init_task"), Err(SymbolError::NotFunction { name: name("init_task") }));
    assert_eq!(kernel.function("nothing"), Err(SymbolError::Missing { name: name("nothing"), complete: true }));
    let task = kernel.symbol("init_task").unwrap();
    assert_eq!((task.symbol.address, task.source), (guest.address("init_task"), Source::Kallsyms));
    let (near, offset) = kernel.nearest(guest.address("schedule").plus(9)).unwrap();
    assert_eq!((near.symbol.name, near.source, offset), ("schedule", Source::Kallsyms, 9));
    assert_eq!((kernel.nearest(Gva(0x1fb80)), kernel.nearest(guest.image.end)), (None, None));
}

#[test]
fn members_and_prototypes_are_read() {
    let kernel = find(&Guest::new(&GuestShape::default())).unwrap();
    assert_eq!(kernel.member("task_struct", "pid").map(|member| member.offset), Ok(24));
    assert!(matches!(kernel.member("task_struct", "x"), Err(MemberError::Type(TypeError::NoMember { .. }))));
    assert_eq!(kernel.prototypes("schedule").unwrap()[0].to_string(), "void schedule(void)");
    let bare = find(&Guest::new(&GuestShape { types: false, ..Default::default() })).unwrap();
    assert_eq!(bare.member("task_struct", "pid"), Err(MemberError::NoBtf(NoBtf::NotFound)));
    assert_eq!(bare.current(), Err(CurrentError::Member(MemberError::NoBtf(NoBtf::NotFound))));
    assert_eq!(bare.report().current, None);
}

#[test]
fn slots_are_as_they_are_now() {
    let mut guest = Guest::new(&GuestShape::default());
    let kernel = find(&guest).unwrap();
    let slot = |guest: &Guest, name: &str| kernel.entry_slot(&guest.memory, guest.address(name));
    let schedule = guest.address("schedule");
    assert_eq!(slot(&guest, "schedule"), Ok(EntrySlot::Free { at: schedule.plus(4) }));
    assert_eq!(slot(&guest, "do_exit"), Ok(EntrySlot::Traced { at: guest.address("do_exit") }));
    assert_eq!(slot(&guest, "_text"), Ok(EntrySlot::None));
    guest.write(schedule.plus(4), &[0xe8]);
    assert_eq!(slot(&guest, "schedule"), Ok(EntrySlot::Traced { at: schedule.plus(4) }));
    let last = Gva(guest.image.end.0 - 8);
    assert_eq!(kernel.entry_slot(&guest.memory, last), Err(SlotError::Outside { at: last }));
}

#[test]
fn data_without_names_is_found_by_what_is_exported() {
    let guest = Guest::new(&GuestShape { names_data: false, ..Default::default() });
    let kernel = find(&guest).unwrap();
    let task = kernel.symbol("init_task").unwrap();
    assert_eq!((task.symbol.address, task.source), (guest.address("init_task"), Source::Exports));
    assert_eq!(kernel.direct_map(), Some(Gva(0xffff_8880_0000_0000)));
    assert_eq!(kernel.release(), Some("6.12.1-test"));
    assert_eq!(kernel.function("schedule"), Ok(guest.address("schedule")));
    let missing = kernel.symbol("modules").unwrap_err();
    assert_eq!(missing, SymbolError::Missing { name: "modules".into(), complete: false });
    assert!(missing.to_string().contains("System.map"));
}

#[test]
fn files_help_a_kernel_without_symbols() {
    let guest = Guest::new(&GuestShape { style: None, ..Default::default() });
    let kernel = find(&guest).unwrap();
    assert_eq!(kernel.report().kallsyms, Err(NoKallsyms::NoTokens));
    assert_eq!(kernel.function("schedule"), Err(SymbolError::NoText));
    assert_eq!(kernel.nearest(guest.address("schedule")), None);
    let slide = guest.image.base.0 - 0xffff_ffff_8100_0000;
    let line = |(address, kind, name): &(u64, char, String)| {
        let linked = if *address >> 63 == 1 { address - slide } else { *address };
        format!("{linked:016x} {kind} {name}\n")
    };
    let text: String = guest.symbols.iter().map(line).collect();
    let hints = Hints { system_map: Some(text.as_bytes()), vmlinux: None };
    let kernel = Kernel::find_with(&guest.memory, &[guest.registers], &hints).unwrap();
    assert_eq!(kernel.function("schedule"), Ok(guest.address("schedule")));
    let local = kernel.symbol("filler_0000").unwrap();
    assert_eq!((local.symbol.address, local.source), (guest.address("filler_0000"), Source::File(File::SystemMap)));
    assert_eq!(kernel.report().hints, [HintReport { file: File::SystemMap, count: guest.symbols.len() }]);
    let other = text.replace("entry_SYSCALL_64", "a").replace("asm_exc_page_fault", "b");
    let hints = Hints { system_map: Some(other.as_bytes()), vmlinux: None };
    let error = Kernel::find_with(&guest.memory, &[guest.registers], &hints).unwrap_err();
    assert_eq!(error, FindError::Hint(HintError::OtherKernel { file: File::SystemMap }));
}

#[test]
fn the_page_fault_gate_is_enough() {
    let guest = Guest::new(&GuestShape::default());
    for lstar in [Gva(0), Gva(0xffff_fe00_0000_6000)] {
        let registers = Registers { lstar, ..guest.registers };
        let kernel = Kernel::find(&guest.memory, &[registers]).unwrap();
        assert!(kernel.report().kallsyms.unwrap().confirmed);
    }
    let neither = Registers { lstar: Gva(0), idt_limit: 14 * 16 + 14, ..guest.registers };
    let error = Kernel::find(&guest.memory, &[neither, Registers::default()]).unwrap_err();
    assert_eq!(error, FindError::Nowhere { tried: vec![NoKernel::NoEntry; 2] });
    assert!(error.to_string().contains("vCPU 1: it enters the kernel nowhere"));
    let none = Kernel::find(&guest.memory, &[]).unwrap_err();
    assert!(none.to_string().contains("(there is none)"));
    let elsewhere = Registers { lstar: guest.image.end, idt_limit: 0, ..guest.registers };
    let error = Kernel::find(&guest.memory, &[elsewhere]).unwrap_err();
    assert!(matches!(error, FindError::Nowhere { tried } if matches!(tried[..], [NoKernel::NoImage(_)])));
}

#[test]
fn what_is_not_linux_is_told() {
    let shape = GuestShape { style: None, exports: None, types: false, ..Default::default() };
    let mut guest = Guest::new(&shape);
    guest.write(guest.address("linux_banner"), b"Linux version unknown\0");
    assert_eq!(find(&guest).unwrap_err(), FindError::NotLinux { base: guest.image.base });
}

#[test]
fn a_direct_map_that_is_not_there_is_not_believed() {
    let mut guest = Guest::new(&GuestShape::default());
    guest.write(guest.address("page_offset_base"), &0xffff_c000_0000_0000_u64.to_le_bytes());
    // Where it is by default.
    assert_eq!(find(&guest).unwrap().direct_map(), Some(Gva(0xffff_8880_0000_0000)));
    let guest = Guest::new(&GuestShape {
        direct_map: Gva(0xffff_9c00_0000_0000),
        names_data: false,
        exports: None,
        ..Default::default()
    });
    assert_eq!(find(&guest).unwrap().direct_map(), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn damage_does_no_harm(
        style in 0..STYLES.len(),
        damage in proptest::collection::vec((0_usize..6, 0_u64..0x2_0000, any::<u64>()), 1..24),
    ) {
        let mut guest = Guest::new(&GuestShape { style: Some(STYLES[style]), ..Default::default() });
        let physical = guest.image.physical;
        for (part, at, value) in damage {
            let start = [Gpa(0x10_0000), physical, physical.plus(0x40_0000), physical.plus(0x60_0000), physical.plus(0x80_0000), physical.plus(0xa0_0000)][part];
            guest.memory.write(start.plus(at), &value.to_le_bytes());
        }
        if let Ok(kernel) = find(&guest) {
            let _ = (kernel.report(), kernel.function("schedule"), kernel.symbol("twice"), kernel.current());
            let _ = kernel.entry_slot(&guest.memory, guest.address("schedule"));
            let _ = kernel.image().free_slots(&guest.memory);
        }
    }
}
