//! A function with its RAM, run in steps: outside of one, nothing of it runs.
//!
//! A step ends when the device has seen everything that happened: each queue's eventfd is filled to its brim, which wakes the device
//! and tells when it was read; input that came before is seen before, since an epoll set reports in order.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use civic_devices::pci::Function;
use civic_devices::virtio::GuestRam;
use civic_devices::virtio::pci::{VirtioPci, status};
use civic_devices::virtio::state::VirtioPciStateV1;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::devices::Far;
use super::memory::{Snapshot, zeroed};
use super::oracle::{Moment, judge};
use crate::host::{Bells, Messages};

const BAR: u64 = 0xc000_0000;
/// Kicks that a device may give itself without a driver's doing, before it counts as one that never rests.
const PATIENCE: usize = 1000;
/// Milliseconds that a device may take, on a machine that has other things to do, for what takes it none.
const DEADLINE: i32 = 20_000;

/// A function under test.
pub struct Rig {
    /// Guest RAM.
    pub ram: GuestRam,
    /// The far side of its device.
    pub far: Far,
    /// Runs all the time, and is judged by its survival alone.
    racing: bool,
    function: VirtioPci,
    bells: Arc<Bells>,
    kicks: Vec<Kick>,
}

/// A queue's eventfd, and how to wait for its being read.
struct Kick {
    fd: EventFd,
    emptied: Epoll,
}

impl Kick {
    fn new(fd: EventFd) -> Self {
        let emptied = Epoll::new().expect("the host has descriptors");
        let event = EpollEvent::new(EventSet::OUT, 0);
        emptied.ctl(ControlOperation::Add, fd.as_raw_fd(), event).expect("an eventfd can be watched");
        Self { fd, emptied }
    }

    fn await_empty(&self) {
        loop {
            match self.emptied.wait(DEADLINE, &mut [EpollEvent::default()]) {
                Ok(1) => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => panic!("the device does not look at its queue: {other:?}"),
            }
        }
    }
}

fn kicks(bells: &Bells) -> Vec<Kick> {
    bells.kicks().into_iter().map(Kick::new).collect()
}

fn function(far: &mut Far, ram: &GuestRam) -> (VirtioPci, Arc<Bells>) {
    let bells = Arc::new(Bells::default());
    let function = VirtioPci::new("fuzz", far.device(ram), BAR, Arc::clone(ram), &Messages, Arc::clone(&bells) as _);
    let function = function.expect("the host has descriptors");
    function.moved(0, Some(BAR));
    (function, bells)
}

impl Rig {
    /// A new function with a device of sort `kind`.
    pub fn new(kind: u8, racing: bool) -> Self {
        Self::before(Far::new(kind), racing)
    }

    /// A new function with a device before `far`.
    pub fn before(mut far: Far, racing: bool) -> Self {
        let ram = zeroed();
        let (function, bells) = function(&mut far, &ram);
        let kicks = kicks(&bells);
        Self { ram, far, racing, function, bells, kicks }
    }

    /// A function that goes on from a state, wherever that comes from; none when it is refused.
    pub fn restored(kind: u8, saved: VirtioPciStateV1) -> Option<Self> {
        let rig = Self::new(kind, false);
        match rig.function.restore(saved) {
            Ok(()) => Some(rig),
            Err(error) => {
                drop(error.to_string());
                None
            }
        }
    }

    /// Lets the guest, or who is on the far side, do something, and the device what follows from it.
    pub fn step(&mut self, act: impl FnOnce(&Self)) {
        if self.racing {
            return act(self);
        }
        let before = self.moment();
        act(self);
        let rests = self.settle();
        let after = self.moment();
        let judged = judge(before, &after);
        assert!(rests || !judged, "the device goes on for ever");
    }

    /// Writes to the BAR, in a step where that may do something.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        // Only the status and the notifications make a device begin anything.
        match offset {
            0x14 | 0x3000..0x4000 => self.step(|rig| rig.function.bar_write(0, offset, data)),
            _ => self.function.bar_write(0, offset, data),
        }
    }

    /// Reads from the BAR. Not a step: what is read may change, nothing else.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.bar_read(0, offset, data);
    }

    /// Accesses the configuration space.
    pub fn config(&mut self, offset: u16, data: &mut [u8], write: bool) {
        self.step(
            |rig| {
                if write { rig.function.config_write(offset, data) } else { rig.function.config_read(offset, data) }
            },
        );
    }

    /// Kicks a queue.
    pub fn kick(&mut self, queue: u16) {
        self.step(|rig| rig.ring(queue));
    }

    /// Something comes in from the far side.
    pub fn feed(&mut self, how: u8, bytes: &[u8]) {
        self.step(|rig| {
            rig.far.feed(how, bytes);
            rig.ring(0);
        });
    }

    fn ring(&self, queue: u16) {
        if let Some(kick) = self.kicks.get(usize::from(queue)) {
            let _ = kick.fd.write(1);
        }
    }

    /// Takes the BAR off the bus and puts it back.
    pub fn move_bar(&mut self) {
        self.function.moved(0, None);
        assert!(self.bells.addresses().is_empty(), "a doorbell stays behind");
        self.function.moved(0, Some(BAR));
        assert_eq!(self.bells.addresses().len(), self.kicks.len());
    }

    /// From here on it runs in steps.
    pub fn calm(&mut self) {
        self.function.pause();
        self.racing = false;
    }

    /// Pauses and resumes, with nothing to see from outside.
    pub fn pause(&mut self) {
        self.function.pause();
        if self.racing {
            let _ = self.function.save();
            self.function.resume();
        }
    }

    /// Puts a new function in its place that goes on from its state, by way of bytes.
    pub fn migrate(&mut self) {
        self.function.pause();
        let saved = self.function.save();
        let bytes = postcard::to_stdvec(&saved).expect("plain data");
        self.function.shut_down();
        let (function, bells) = function(&mut self.far, &self.ram);
        function.restore(postcard::from_bytes(&bytes).expect("what was written")).expect("a state that was saved");
        let mut expected = saved;
        if expected.needs_reset {
            // It has no threads that would know.
            expected.queues.iter_mut().for_each(|queue| (queue.next_avail, queue.next_used) = (0, 0));
        }
        let back = function.save();
        // A device may have news for the driver that was not there before.
        (expected.isr, expected.generation) = (back.isr, back.generation);
        for (expected, back) in expected.msix.vectors.iter_mut().zip(&back.msix.vectors) {
            expected.pending |= back.pending;
        }
        assert_eq!(back, expected, "a function comes back otherwise");
        (self.function, self.kicks, self.bells) = (function, kicks(&bells), bells);
        self.function.nudge();
        if self.racing {
            self.function.resume();
        }
    }

    /// Its registers.
    pub fn state(&self) -> VirtioPciStateV1 {
        self.function.save()
    }

    fn moment(&self) -> Moment {
        Moment { state: self.function.save(), ram: Snapshot::take(&self.ram) }
    }

    /// Returns when nothing is left to do, with the device paused; false when there always is something.
    fn settle(&self) -> bool {
        for _ in 0..PATIENCE {
            self.function.pause();
            let kicked = self.kicked();
            if kicked.is_empty() {
                return true;
            }
            for kick in &kicked {
                kick.fd.write(u64::MAX - 1).expect("it was just emptied");
            }
            self.function.resume();
            kicked.into_iter().for_each(Kick::await_empty);
        }
        false
    }

    /// Takes the kicks of those queues that somebody serves.
    fn kicked(&self) -> Vec<&Kick> {
        let state = self.function.save();
        if state.status & status::DRIVER_OK == 0 || state.needs_reset {
            return Vec::new();
        }
        let served = self.kicks.iter().enumerate().filter(|(index, _)| self.far.serves(*index, &state));
        served.map(|(_, kick)| kick).filter(|kick| kick.fd.read().is_ok()).collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.function.shut_down();
        assert!(self.bells.addresses().is_empty() || std::thread::panicking(), "a doorbell stays behind");
    }
}
