use super::super::state::DeviceState;
use super::*;
use crate::pci::msix::tests::Recorder;
use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

#[derive(Default)]
struct Bells(Mutex<Vec<u64>>);
impl Doorbells for Bells {
    fn bind(&self, address: u64, _: &EventFd) -> io::Result<()> {
        self.0.lock().unwrap().push(address);
        Ok(())
    }
    fn unbind(&self, address: u64, _: &EventFd) -> io::Result<()> {
        self.0.lock().unwrap().retain(|a| *a != address);
        Ok(())
    }
}

struct NoCounters;
impl Counters for NoCounters {
    fn read(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Keeps what it was activated with.
struct Echo(Arc<Mutex<Option<Activation>>>);
impl VirtioDevice for Echo {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::super::read_config_bytes(&[1, 2, 3, 4], offset, data);
    }
    fn activate(&mut self, activation: Activation) -> Result<Workers, super::super::ActivateError> {
        *self.0.lock().unwrap() = Some(activation);
        Ok(Workers::default())
    }
    fn save(&self) -> DeviceState {
        DeviceState::Rng
    }
    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        if state == DeviceState::Rng { Ok(()) } else { Err(StateError::WrongDevice("echo")) }
    }
    fn reset(&mut self) {
        *self.0.lock().unwrap() = None;
    }
    fn counters(&self) -> Arc<dyn Counters> {
        Arc::new(NoCounters)
    }
}

struct Rig {
    function: VirtioPci,
    active: Arc<Mutex<Option<Activation>>>,
    bells: Arc<Bells>,
}

fn rig() -> Rig {
    let ram = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
    let active = Arc::new(Mutex::new(None));
    let bells = Arc::new(Bells::default());
    let device = Box::new(Echo(active.clone()));
    let function = VirtioPci::new("echo", device, 0xc000_0000, ram, &Recorder::default(), bells.clone()).unwrap();
    Rig { function, active, bells }
}

impl Rig {
    fn read(&self, offset: u64, len: usize) -> u64 {
        let mut raw = [0; 8];
        self.function.bar_read(0, offset, &mut raw[..len]);
        u64::from_le_bytes(raw)
    }
    fn write(&self, offset: u64, len: usize, value: u64) {
        self.function.bar_write(0, offset, &value.to_le_bytes()[..len]);
    }
    fn negotiate(&self, features: u64) {
        self.write(0x14, 1, 0);
        self.write(0x14, 1, 3);
        for half in 0..2 {
            self.write(0x08, 4, half);
            self.write(0x0c, 4, features >> (32 * half) & 0xffff_ffff);
        }
        self.write(0x14, 1, 11);
    }
    fn queue(&self, index: u64, at: u64) {
        self.write(0x16, 2, index);
        for (register, address) in [(0x20, at), (0x28, at + 0x1000), (0x30, at + 0x2000)] {
            self.write(register, 4, address & 0xffff_ffff);
            self.write(register + 4, 4, address >> 32);
        }
        self.write(0x1c, 2, 1);
    }
}

#[test]
fn a_driver_brings_the_device_up_and_resets_it() {
    let rig = rig();
    assert_eq!(rig.read(0x12, 2), 2);
    assert_eq!(rig.read(0x04, 4), 1 << 5);
    rig.negotiate(VERSION_1 | 1 << 5);
    assert_eq!(rig.read(0x14, 1), 11);
    rig.queue(0, 0x1000);
    rig.write(0x16, 2, 1);
    assert_eq!(rig.read(0x18, 2), 64);
    rig.write(0x14, 1, 15);
    {
        let active = rig.active.lock().unwrap();
        let active = active.as_ref().unwrap();
        assert_eq!((active.queues.len(), active.queues[0].index), (1, 0));
        assert_eq!(active.features, VERSION_1 | 1 << 5);
        active.interrupt.needs_reset();
    }
    assert_eq!(rig.read(0x14, 1), 15 | 64);
    assert_eq!(rig.read(0x1000, 1), 2);
    assert_eq!(rig.read(0x1000, 1), 0);
    rig.write(0x14, 1, 0);
    assert_eq!(rig.read(0x14, 1), 0);
    assert!(rig.active.lock().unwrap().is_none());
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_refused() {
    let rig = rig();
    for features in [VERSION_1 | 1 << 6, 1 << 5, 0] {
        rig.negotiate(features);
        assert_eq!(rig.read(0x14, 1), 3, "{features:#x}");
        rig.write(0x14, 1, 15);
        assert_eq!(rig.read(0x14, 1) & 4, 0);
    }
}

#[test]
fn rings_outside_of_memory_need_a_reset() {
    let rig = rig();
    rig.negotiate(VERSION_1);
    rig.queue(0, 0xfff0_0000_0000_0000);
    rig.write(0x14, 1, 15);
    assert_ne!(rig.read(0x14, 1) & 64, 0);
    assert!(rig.active.lock().unwrap().is_none());
}

#[test]
fn doorbells_follow_the_bar_and_kicks_arrive_without_them() {
    let rig = rig();
    rig.function.moved(0, Some(0xc000_0000));
    assert_eq!(*rig.bells.0.lock().unwrap(), [0xc000_3000, 0xc000_3004]);
    rig.function.moved(0, None);
    rig.function.moved(0, Some(0xd000_0000));
    assert_eq!(*rig.bells.0.lock().unwrap(), [0xd000_3000, 0xd000_3004]);
    rig.write(0x3004, 2, 1);
    assert_eq!(rig.function.kicks[1].read().unwrap(), 1);
    rig.function.shut_down();
    assert!(rig.bells.0.lock().unwrap().is_empty());
}

#[test]
fn configuration_space_reaches_the_bar() {
    let rig = rig();
    let cap = rig.function.pci_cfg;
    rig.function.config_write((cap + 8) as u16, &0x2000u32.to_le_bytes());
    rig.function.config_write((cap + 12) as u16, &4u32.to_le_bytes());
    let mut data = [0; 4];
    rig.function.config_read((cap + 16) as u16, &mut data);
    assert_eq!(data, [1, 2, 3, 4]);
    // A window that is not sound leaves the data alone.
    rig.function.config_write((cap + 12) as u16, &3u32.to_le_bytes());
    rig.function.config_read((cap + 16) as u16, &mut data);
    assert_eq!(data, [0; 4]);
}

/// A function in the middle of its life: negotiated, with a queue, a moved BAR, vectors routed, masked and pending.
fn lived_in() -> Rig {
    let rig = rig();
    rig.negotiate(VERSION_1 | 1 << 5);
    rig.queue(0, 0x1000);
    rig.write(0x1a, 2, 1);
    rig.write(0x10, 2, 2);
    rig.write(0x14, 1, 15);
    rig.function.config_write(0x10, &0xd000_0000u32.to_le_bytes());
    rig.function.config_write(4, &[6, 4]);
    let control = (rig.function.msix_cap + msix::CONTROL) as u16;
    rig.function.config_write(control, &0x8000u16.to_le_bytes());
    rig.write(0x4010, 8, 0xfee0_1000);
    rig.write(0x4018, 4, 0x41);
    rig.write(0x401c, 4, 0);
    rig.write(0x4020, 8, 0xfee0_2000);
    rig.active.lock().unwrap().as_ref().unwrap().interrupt.config();
    rig
}

#[test]
fn a_function_comes_back_as_it_was() {
    let saved = lived_in().function.save();
    assert!(saved.msix.vectors[2].pending && saved.isr == 2 && saved.generation == 1);
    let rig = rig();
    rig.function.restore(saved.clone()).unwrap();
    assert_eq!(rig.function.decoded(), [BarWindow { bar: 0, base: 0xd000_0000, len: BAR_LEN }]);
    assert_eq!(rig.read(0x14, 1), 15);
    {
        let active = rig.active.lock().unwrap();
        let active = active.as_ref().unwrap();
        assert!(active.paused);
        assert_eq!((active.queues[0].queue.next_avail(), active.features), (0, VERSION_1 | 1 << 5));
    }
    // Nothing serves the queue here, so its positions are those of the state.
    assert_eq!(rig.function.save(), VirtioPciStateV1 { ..saved });
}

#[test]
fn positions_and_a_broken_device_come_back() {
    let mut saved = lived_in().function.save();
    (saved.queues[0].next_avail, saved.queues[0].next_used) = (0xfffe, 0xfff0);
    let rig = rig();
    rig.function.restore(saved.clone()).unwrap();
    let active = rig.active.lock().unwrap().take().unwrap();
    assert_eq!((active.queues[0].queue.next_avail(), active.queues[0].queue.next_used()), (0xfffe, 0xfff0));
    saved.needs_reset = true;
    let rig = self::rig();
    rig.function.restore(saved).unwrap();
    assert!(rig.active.lock().unwrap().is_none());
    assert_eq!(rig.read(0x14, 1), 15 | 64);
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let saved = lived_in().function.save();
    let changes: [fn(&mut VirtioPciStateV1); 8] = [
        |state| state.queues.truncate(1),
        |state| state.queues[0].size = 512,
        |state| state.queues[0].size = 48,
        |state| state.accepted |= 1 << 9,
        |state| state.config[0] ^= 1,
        |state| state.config.truncate(255),
        |state| state.msix.vectors.truncate(2),
        |state| state.queues[0].driver = u64::MAX - 1,
    ];
    for (i, change) in changes.iter().enumerate() {
        let mut state = saved.clone();
        change(&mut state);
        assert!(rig().function.restore(state).is_err(), "change {i}");
    }
}

proptest! {
    #[test]
    fn no_access_panics(accesses in prop::collection::vec((any::<bool>(), any::<bool>(), 0u64..0x9000, 0usize..9, any::<u64>()), 0..200)) {
        let rig = rig();
        for (config, write, offset, len, value) in accesses {
            let mut data = value.to_le_bytes();
            let len = if config { len.min(4) } else { len.max(1) };
            match (config, write) {
                (true, true) => rig.function.config_write((offset % 4092) as u16, &data[..len]),
                (true, false) => rig.function.config_read((offset % 4092) as u16, &mut data[..len]),
                (false, true) => rig.function.bar_write(0, offset, &data[..len]),
                (false, false) => rig.function.bar_read(0, offset, &mut data[..len]),
            }
        }
    }
}
