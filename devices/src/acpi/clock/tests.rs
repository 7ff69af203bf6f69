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
