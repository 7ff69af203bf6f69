//! The hypervisor's side of devices, for targets: interrupts and doorbells that only remember.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use civic_devices::console_hub::ConsoleHub;
use civic_devices::irq::{IrqLine, MsiAllocator, MsiMessage, MsiSource};
use civic_devices::pci::Doorbells;
use vmm_sys_util::eventfd::EventFd;

/// A new path for files that a target makes, in memory where there is such a place. The same each time in one process.
pub fn scratch(name: &str) -> PathBuf {
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let path = dir.join(format!("civic-fuzz-{name}-{}", std::process::id()));
    let _ = fs::remove_file(&path);
    let _ = fs::remove_dir_all(&path);
    path
}

/// A console port with nobody at it.
pub fn hub() -> Arc<ConsoleHub> {
    // One for all runs: it has a thread.
    static HUB: OnceLock<Arc<ConsoleHub>> = OnceLock::new();
    Arc::clone(HUB.get_or_init(|| ConsoleHub::new("fuzz", 0, None).expect("the host has a thread")))
}

/// Gives out message sources without end.
pub struct Messages;

struct Source;

impl MsiSource for Source {
    fn route(&self, message: MsiMessage) -> io::Result<()> {
        // As KVM, which takes no message that is not for a local APIC.
        if message.address >> 20 == 0xfee { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
    fn fire(&self) {}
}

impl MsiAllocator for Messages {
    fn allocate(&self) -> io::Result<Arc<dyn MsiSource>> {
        Ok(Arc::new(Source))
    }
}

/// The doorbells that are bound, by address.
#[derive(Default)]
pub struct Bells(Mutex<BTreeMap<u64, EventFd>>);

impl Bells {
    fn bound(&self) -> MutexGuard<'_, BTreeMap<u64, EventFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where there are some, ascending.
    pub fn addresses(&self) -> Vec<u64> {
        self.bound().keys().copied().collect()
    }

    /// The eventfds behind them, in the same order.
    pub fn kicks(&self) -> Vec<EventFd> {
        self.bound().values().map(|kick| kick.try_clone().expect("a descriptor can be had")).collect()
    }
}

impl Doorbells for Bells {
    fn bind(&self, address: u64, kick: &EventFd) -> io::Result<()> {
        let before = self.bound().insert(address, kick.try_clone()?);
        assert!(before.is_none(), "two doorbells at {address:#x}");
        Ok(())
    }

    fn unbind(&self, address: u64, _kick: &EventFd) -> io::Result<()> {
        let before = self.bound().remove(&address);
        assert!(before.is_some(), "there is no doorbell at {address:#x} to unbind");
        Ok(())
    }
}

/// An interrupt line that remembers its level and counts its rises.
#[derive(Default)]
pub struct Wire {
    state: Mutex<bool>,
    rises: AtomicU64,
}

impl Wire {
    /// Whether it is high.
    pub fn high(&self) -> bool {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often it rose.
    pub fn rises(&self) -> u64 {
        self.rises.load(Ordering::Relaxed)
    }
}

impl IrqLine for Wire {
    fn set(&self, high: bool) {
        let before = std::mem::replace(&mut *self.state.lock().unwrap_or_else(PoisonError::into_inner), high);
        if high && !before {
            self.rises.fetch_add(1, Ordering::Relaxed);
        }
    }
}
