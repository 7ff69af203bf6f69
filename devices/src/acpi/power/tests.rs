use super::*;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

#[derive(Default)]
pub(in crate::acpi) struct Probe {
    high: AtomicBool,
    power_offs: AtomicU32,
    resets: AtomicU32,
}

impl IrqLine for Probe {
    fn set(&self, high: bool) {
        self.high.store(high, Ordering::Relaxed);
    }
}

impl PowerEvents for Probe {
    fn power_off(&self) {
        self.power_offs.fetch_add(1, Ordering::Relaxed);
    }
}

impl ResetEvents for Probe {
    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }
}

pub(in crate::acpi) fn machine() -> (Arc<Probe>, PowerManagement) {
    let probe = Arc::new(Probe::default());
    (probe.clone(), PowerManagement::new(probe.clone(), probe))
}

fn read<const N: usize>(device: &impl BusDevice, offset: u64) -> [u8; N] {
    let mut data = [0x55; N];
    device.read(offset, &mut data);
    data
}

#[test]
fn the_button_interrupts_a_guest_that_listens() {
    let (probe, pm) = machine();
    let high = || probe.high.load(Ordering::Relaxed);
    pm.press_power_button();
    assert!(!high(), "not enabled yet");
    pm.write(2, &POWER_BUTTON.to_le_bytes());
    assert!(high());
    pm.write(0, &[0xff, 0xfe]);
    assert!(high(), "zeroes clear nothing");
    assert_eq!(read(&pm, 0), POWER_BUTTON.to_le_bytes());
    pm.write(0, &POWER_BUTTON.to_le_bytes());
    assert!(!high());
    assert_eq!(read(&pm, 0), [0, 0]);
}

#[test]
fn general_purpose_events_share_the_line() {
    let (probe, pm) = machine();
    let high = || probe.high.load(Ordering::Relaxed);
    pm.raise_gpe(GPES);
    assert_eq!(read(&pm, 0x20), [0; 4]);
    pm.raise_gpe(17);
    pm.raise_gpe(2);
    pm.write(0x26, &[0x02]);
    assert!(high());
    pm.write(0x22, &[0x02]);
    assert!(!high(), "event 2 is not enabled");
    assert_eq!(read(&pm, 0x20), [4, 0, 0, 0]);
    pm.write(0x24, &[4]);
    assert!(high());
    assert_eq!(read(&pm, 0x24), [4, 0, 2, 0]);
}

#[test]
fn acpi_mode_cannot_be_left() {
    let (_, pm) = machine();
    assert_eq!(read(&pm, 4), [1, 0]);
    pm.write(4, &[0, 0]);
    assert_eq!(read(&pm, 4), [1, 0]);
}

#[test]
fn only_s5_turns_the_machine_off() {
    let (probe, pm) = machine();
    let offs = || probe.power_offs.load(Ordering::Relaxed);
    let sleep = |kind: u16| kind << 10 | SLP_EN;
    pm.write(4, &sleep(1).to_le_bytes());
    pm.write(4, &(u16::from(SLP_TYP_S5) << 10).to_le_bytes());
    assert_eq!(offs(), 0);
    assert_eq!(read(&pm, 4), [1, SLP_TYP_S5 << 2]);
    pm.write(4, &sleep(SLP_TYP_S5.into()).to_le_bytes());
    assert_eq!(offs(), 1);
    assert_eq!(read(&pm, 4), [1, SLP_TYP_S5 << 2], "SLP_EN reads as zero");
    pm.write(5, &[(sleep(SLP_TYP_S5.into()) >> 8) as u8]);
    assert_eq!(offs(), 2);
}

#[test]
fn state_continues_with_timer_and_line() {
    let (_, pm) = machine();
    pm.write(0x24, &[1, 0, 0, 0]);
    pm.raise_gpe(0);
    let mut state = pm.save();
    state.timer_ticks = u32::MAX;
    let probe = Arc::new(Probe::default());
    let copy = PowerManagement::new(probe.clone(), probe.clone());
    copy.restore(&state);
    assert!(probe.high.load(Ordering::Relaxed));
    std::thread::sleep(std::time::Duration::from_millis(2));
    let ticks = u32::from_le_bytes(read(&copy, 8));
    assert!((7_000..0x8000_0000).contains(&ticks), "wraps: {ticks:#x}");
    let again = copy.save();
    state.timer_ticks = again.timer_ticks;
    assert_eq!(again, state);
}

#[test]
fn odd_accesses_are_harmless() {
    let (probe, pm) = machine();
    for offset in 0..u64::from(PORTS) {
        for len in 1..=8 {
            let mut data = [0; 8];
            pm.read(offset, &mut data[..len]);
            pm.write(offset, &data[..len]);
        }
    }
    assert_eq!(read(&pm, 6), [0xff, 0xff], "between the registers");
    assert_eq!(probe.power_offs.load(Ordering::Relaxed), 0);
}

#[test]
fn the_keyboard_controller_resets() {
    let probe = Arc::new(Probe::default());
    let i8042 = I8042Reset::new(probe.clone());
    for (offset, data) in [(0, &[0xfe][..]), (4, &[0xff]), (4, &[0xfe, 0])] {
        i8042.write(offset, data);
    }
    assert_eq!(probe.resets.load(Ordering::Relaxed), 0);
    assert_eq!(read(&i8042, 4), [0]);
    i8042.write(4, &[0xfe]);
    assert_eq!(probe.resets.load(Ordering::Relaxed), 1);
}
