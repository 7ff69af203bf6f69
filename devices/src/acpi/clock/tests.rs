use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::acpi::power::tests::machine;

const PAGE: u64 = 0x1000;

fn installed() -> (GuestMemoryMmap, VmClock) {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 3 * PAGE as usize)]).unwrap();
    let clock = VmClock::new(PAGE);
    clock.install(&ram).unwrap();
    (ram, clock)
}

fn field<const N: usize>(ram: &GuestMemoryMmap, offset: u64) -> u64 {
    let mut word = [0; 8];
    ram.read_slice(&mut word[..N], GuestAddress(PAGE + offset)).unwrap();
    u64::from_le_bytes(word)
}

/// What Linux' ptp_vmclock checks before it takes the device, and why it then makes no PTP clock of it.
#[test]
fn the_page_is_one_that_a_driver_takes() {
    let (ram, _) = installed();
    assert_eq!(field::<4>(&ram, 0), 0x4b4c_4356);
    assert_eq!(field::<4>(&ram, 4), 4096, "a whole page, or it cannot be mapped");
    assert_eq!(field::<2>(&ram, 8), 1);
    assert_eq!(field::<1>(&ram, 10), 0xff, "no counter, so no time");
    assert_eq!(field::<4>(&ram, 12), 0);
    assert_eq!(field::<8>(&ram, 24), 0x300);
    assert_eq!(field::<1>(&ram, 34), 0);
    for offset in (40..104).step_by(8) {
        assert_eq!(field::<8>(&ram, offset), 0, "time that nobody measured");
    }
}

#[test]
fn a_disruption_changes_the_markers_within_one_sequence() {
    let (ram, clock) = installed();
    let (_, power) = machine();
    let constant = |ram: &GuestMemoryMmap| (field::<8>(ram, 0), field::<4>(ram, 8), field::<8>(ram, 24));
    let before = constant(&ram);
    assert_eq!(power.save().gpe_status, 0);
    for times in 1..4 {
        clock.disrupt(&ram, &power).unwrap();
        assert_eq!(field::<4>(&ram, 12), 2 * times, "two steps, the last to an even number");
        assert_eq!((field::<8>(&ram, 16), field::<8>(&ram, 104)), (times, times));
    }
    assert_eq!(constant(&ram), before);
    assert_eq!(power.save().gpe_status, 1 << gpe::CLOCK);
}

#[test]
fn a_page_that_the_guest_spoiled_still_changes() {
    let (ram, clock) = installed();
    let (_, power) = machine();
    ram.write_slice(&[0xff; 4096], GuestAddress(PAGE)).unwrap();
    clock.disrupt(&ram, &power).unwrap();
    assert_eq!((field::<4>(&ram, 12), field::<8>(&ram, 16), field::<8>(&ram, 104)), (0, 0, 0));
    assert_eq!(field::<8>(&ram, 24), u64::MAX, "what is the guest's stays");

    let outside = VmClock::new(3 * PAGE);
    let (_, power) = machine();
    assert!(outside.install(&ram).is_err());
    assert!(outside.disrupt(&ram, &power).is_err());
    assert_eq!(power.save().gpe_status, 0);
}

/// `struct vmclock_abi` as Linux has it. Nothing in it is packed.
#[repr(C)]
struct Abi {
    magic: u32,
    size: u32,
    version: u16,
    counter_id: u8,
    time_type: u8,
    seq_count: u32,
    disruption_marker: u64,
    flags: u64,
    pad: [u8; 2],
    clock_status: u8,
    leap_second_smearing_hint: u8,
    tai_offset_sec: i16,
    leap_indicator: u8,
    counter_period_shift: u8,
    counter_value: u64,
    counter_period_frac_sec: u64,
    counter_period_esterror_rate_frac_sec: u64,
    counter_period_maxerror_rate_frac_sec: u64,
    time_sec: u64,
    time_frac_sec: u64,
    time_esterror_nanosec: u64,
    time_maxerror_nanosec: u64,
    vm_generation_counter: u64,
}

#[test]
fn fields_are_where_the_header_has_them() {
    assert_eq!(
        (offset_of!(Abi, magic), offset_of!(Abi, size), offset_of!(Abi, version), offset_of!(Abi, counter_id)),
        (0, 4, 8, 10)
    );
    assert_eq!(offset_of!(Abi, seq_count) as u64, SEQUENCE);
    assert_eq!(offset_of!(Abi, disruption_marker) as u64, DISRUPTION);
    assert_eq!((offset_of!(Abi, flags), offset_of!(Abi, clock_status)), (FLAGS, STATUS));
    assert_eq!(offset_of!(Abi, vm_generation_counter) as u64, GENERATION);
    assert_eq!((offset_of!(Abi, counter_value), size_of::<Abi>() as u64), (40, GENERATION + 8));
}

/// Reads both markers as Linux' `vmclock_miscdev_read` reads the page, and as a program does that has it mapped: again while the
/// sequence is odd or has changed meanwhile. Returns them and the sequence.
fn consistent(ram: &GuestMemoryMmap) -> (u32, u64, u64) {
    let at = |offset| GuestAddress(PAGE + offset);
    loop {
        let sequence = ram.load::<u32>(at(SEQUENCE), Ordering::Relaxed).unwrap() & !1;
        fence(Ordering::Acquire);
        let markers = [DISRUPTION, GENERATION].map(|field| ram.load::<u64>(at(field), Ordering::Relaxed).unwrap());
        fence(Ordering::Acquire);
        if sequence == ram.load::<u32>(at(SEQUENCE), Ordering::Relaxed).unwrap() {
            return (sequence, markers[0], markers[1]);
        }
        std::hint::spin_loop();
    }
}

#[test]
fn a_reader_never_sees_half_of_a_disruption() {
    const TIMES: u64 = 100_000;
    let (ram, clock) = installed();
    let (ram, (_, power), done) = (Arc::new(ram), machine(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut last = 0;
                while !done.load(Ordering::Acquire) {
                    let (sequence, disruption, generation) = consistent(&ram);
                    assert_eq!((disruption, u64::from(sequence)), (generation, 2 * disruption));
                    assert!(last <= disruption, "{disruption} after {last}");
                    last = disruption;
                }
            });
        }
        (0..TIMES).for_each(|_| clock.disrupt(&ram, &power).unwrap());
        done.store(true, Ordering::Release);
    });
    assert_eq!(consistent(&ram), (2 * TIMES as u32, TIMES, TIMES));
}
